"""The report of a run: what it shows, and that nothing in a run folder can break it."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from page_check import checked
from run_folders import SOURCES, ledger, step_rows, task_json, write_lines, write_run

from qlora_sft.errors import ConfigError
from qlora_sft.page.facts import read_run
from qlora_sft.page.run_page import run_page
from qlora_sft.page.tasks import tasks_html
from qlora_sft.page.warnings import warnings_of
from qlora_sft.page.write import write_report

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' & \u202eevil\u2066 \ud800 \x00" + "W" * 300


def page_of(folder: Path) -> str:
    page = run_page(read_run(folder))
    checked(page)
    return page


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def warned(folder: Path) -> list[str]:
    return [warning.what for warning in warnings_of(read_run(folder))]


def test_it_shows_everything_that_a_run_has(tmp_path: Path) -> None:
    run = write_run(tmp_path / "support")
    report = json.loads((run / "manifest.json").read_text())["report"]
    change_json(run / "manifest.json", report={**report, "base": "/models/SmolLM2-135M-Instruct"})
    page = page_of(run)
    assert '<span class="chip">SmolLM2-135M-Instruct</span>' in page
    parts = [part.split('"')[0] for part in page.split('<section id="')[1:]]
    assert parts == "curves held-out answers tasks data mask machine choices settings manifest".split()
    titles = [part.split("</b>")[0] for part in page.split("<figcaption><b>")[1:]]
    assert titles == [
        "Held-out loss", "Training loss", "Training loss by source", "Learning rate", "Gradient norm", "Right tokens",
        "Tokens per step", "Speed", "Memory",
    ]  # fmt: skip
    for source in SOURCES:
        pair = report["loss"][source]
        assert f'<span class="before">{pair["before"]:.3f}</span> <i>→</i> {pair["after"]:.3f}' in page
    for text in (
        "finished", "rank 16", "transformers (unsloth is not installed)", "chatml-think; its {% generation %} marks",
        "2.5% → 25%, +22.5 (+14.4 to +31.2)", "pass@4 has risen", "everything fits 11.22 GiB",
        '<mark class="s">{&quot;name&quot;: &quot;Carmen&quot;', "before training",
        "torch 2.13.0", "training.learning_rate",
    ):  # fmt: skip
        assert text in page, text
    assert not read_run(run).lacks
    assert len(page) < 300_000


def test_the_curve_is_the_file(tmp_path: Path) -> None:
    """A short run is drawn point by point, and its table has the values."""
    run = write_run(tmp_path / "run", steps=5, every=5)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure = page_of(run).split("<b>Training loss</b>")[1].split("</figure>")[0]
    assert figure.count("L") == 4
    for row in rows:
        assert f'<td>{row["step"]}</td><td class="n">{row["loss"]:.3f}</td>' in figure


def test_an_interrupted_run_is_shown_with_what_it_lacks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20, finished=False)
    with (run / "metrics.jsonl").open("a") as opened:
        opened.write('{"step": 21, "lo')
    page = page_of(run)
    assert "not finished: 20 of 40 steps" in page
    assert "`train --resume` goes on with it" in page
    assert "metrics.jsonl: 1 damaged lines are left out (line 21)" in page
    assert "Training loss" in page
    assert "chatml-think" in page


def test_an_old_run_says_what_it_lacks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("trained_on.json", "said.jsonl", "evaluations.jsonl", "before.json"):
        (run / name).unlink()
    rows = [
        {key: value for key, value in row.items() if key not in ("source_loss", "tokens_per_second", "resident_bytes")}
        for row in step_rows(10, [])
    ]
    write_lines(run / "metrics.jsonl", rows)
    page = page_of(run)
    assert "trained_on.json: it was not kept" in page
    assert "measured before and after training" in page
    assert "Speed" in page
    assert "as they were read" in page
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["report"]["optimizer"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "has no &#x27;optimizer&#x27;" in page_of(run)


@pytest.mark.parametrize("steps", [0, 1, 2, 11, 12])
def test_short_runs_are_drawn(tmp_path: Path, steps: int) -> None:
    run = write_run(tmp_path / "run", steps=max(steps, 1), every=1, finished=bool(steps))
    if not steps:
        (run / "metrics.jsonl").write_text("")
    page = page_of(run)
    assert ("Training loss</b>" in page) == bool(steps)


def test_steps_without_a_loss_leave_gaps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=40)
    rows = step_rows(40, SOURCES)
    for row in rows[10:14]:
        row["loss"] = row["grad_norm"] = None
    lines = [json.dumps(row) for row in rows]
    lines[20] = lines[20].replace(f'"loss": {rows[20]["loss"]}', '"loss": NaN')
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    figure = page_of(run).split("<b>Training loss</b>")[1].split("</figure>")[0]
    assert figure.split('class="line s0 d0" d="')[1].split('"')[0].count("M") == 3
    assert figure.split('class="missing" d="')[1].split('"')[0].count("M") == 5
    assert "4 steps were left out" in warned(run)[0]


def test_a_run_of_a_hundred_thousand_steps_is_a_small_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=200, every=1)
    lines = [json.dumps({**row, "step": -1}) + "\n" for row in step_rows(200, SOURCES)]
    peak = json.dumps({"step": -1, "loss": 9.5}) + "\n"
    numbered = ((step, peak if step == 54_321 else lines[step % 200]) for step in range(1, 100_001))
    with (run / "metrics.jsonl").open("w") as opened:
        opened.writelines(line.replace("-1", str(step), 1) for step, line in numbered)
    page = page_of(run)
    assert len(page.encode()) < 2_000_000
    assert "100,000 steps are too many to draw each" in page
    faint = page.split("<b>Training loss</b>")[1].split('class="line s0 d0 faint" d="')[1].split('"')[0]
    assert 500 < faint.count("L") < 600
    heights = [int(point.split()[1]) for point in faint[1:].replace("M", "L").split("L")]
    assert min(heights) < 100 < sorted(heights)[1]


def test_a_turn_of_the_held_out_loss_is_seen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (warning,) = warnings_of(read_run(run))
    assert warning.what == "Held-out loss turned"
    assert "lowest at step 48" in warning.meaning
    assert "lowest mean" in page_of(run)
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    asked = [{**row, "tasks": {"gsm8k": row["step"] / 100, "wiki loss": 3.25}} for row in rows[::2]]
    write_lines(run / "evaluations.jsonl", asked)
    page = page_of(run)
    assert '<td>32</td><td class="n">32%</td>' in page.split("<b>Tasks while training</b>")[1]
    # A loss is no share of questions that were answered rightly.
    assert '<td>32</td><td class="n">3.250</td>' in page.split("<b>Texts of tasks while training</b>")[1]
    assert "325%" not in page
    write_lines(run / "evaluations.jsonl", rows)
    change = json.loads((run / "manifest.json").read_text())["report"]
    change_json(
        run / "manifest.json", report={**change, "kept": {"step": 48, "reason": "lowest"}, "stopped_early": "patience"}
    )
    page = page_of(run)
    assert "adapter of step 48" in page
    assert "The adapter of that step was kept." in page
    assert "stopped early: patience" in page


def test_what_asks_for_attention_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", every=64)
    assert warned(run) == []
    write_lines(run / "evaluations.jsonl", [
        {"step": 0, "held_out": {"fields": 1.0, "tools": 1.0}}, {"step": 64, "held_out": {"fields": 1.5, "tools": 0.5}},
    ])  # fmt: skip
    dropped = {"too long": {"rows": 400, "first": ["a:1", "a:2", "a:3"]}}
    data = {"few": ledger(1000, 50), "short": ledger(1000, 500, dropped=dropped)}
    report = json.loads((run / "manifest.json").read_text())["report"]
    change_json(
        run / "manifest.json", data=data, report={**report, "warnings": ["the loss jumped", "the disk is full"]}
    )
    (run / "evaluation" / "x.json").write_text(
        json.dumps(task_json("x", verdict="forgetting", reason="pass@4 has fallen"))
    )
    write_lines(run / "said.jsonl", [{"text": "warning: the disk is full"}, {"text": "backend: x (y)"}])
    assert warned(run) == [
        "Held-out loss rose", "50% of the rows of short were dropped", "x: forgetting", "The run warned",
        "The run warned",
    ]  # fmt: skip
    page = page_of(run)
    assert page.count("<b>The run warned</b>: the disk is full") == 1
    assert "too long (400)" in page
    assert "a:1, a:2, a:3" in page


def test_memory_and_time_stand_beside_the_plan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    assert "A plan kept as plan.json" in page_of(run)
    plan = {"this_run": {"peak": 2**30}, "time": {"tokens_per_second": 150.0, "training": 60.0}}
    (run / "plan.json").write_text(json.dumps(plan))
    report = json.loads((run / "manifest.json").read_text())["report"]
    measured = {"resident": 2**29, "allocated": 3 * 2**29, "reserved": 2**31, "card": 24 * 2**30}
    change_json(run / "manifest.json", report={**report, "memory": {**report["memory"], "measured": measured}})
    page = page_of(run)
    for name, value in {
        "peak, planned": "1.00 GiB", "most allocated in training, measured": "1.50 GiB",
        "the card, measured": "24.0 GiB",
        "tokens per second": "118, planned 150", "training": "82 s, planned 60 s",
    }.items():  # fmt: skip
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page, name
    assert ">planned</span>" in page.split("<b>Speed</b>")[1].split("</figure>")[0]


def test_hostile_texts_are_texts(tmp_path: Path) -> None:
    """Every text and every name in every file, replaced by markup: the same elements, and not one more."""
    run = write_run(tmp_path / "run", sources=["a"])
    tags = set(checked(run_page(read_run(run))).tags)

    def spoiled(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {(HOSTILE if name == "a" else name): spoiled(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [spoiled(each, key) for each in value]
        return HOSTILE if isinstance(value, str) and key != "tiers" else value

    for file in run.rglob("*.json*"):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        file.write_text("".join(json.dumps(spoiled(json.loads(line))) + "\n" for line in lines))
    page = run_page(read_run(run))
    assert set(checked(page).tags) <= tags | {"h3", "ul", "li"}
    assert page.count("&lt;script&gt;") > 20
    assert "\u202e" not in page
    assert read_run(run).report is not None


JUNK: list[Any] = [
    None,
    True,
    -1,
    1e308,
    10**400,
    float("nan"),
    float("-inf"),
    "",
    HOSTILE,
    [],
    {},
    [[1]],
    {"a": {}},
    "🎉",
]


def test_whatever_stands_in_the_files_a_page_is_made(tmp_path: Path) -> None:
    """One to three values of one file at a time are replaced by others, of any kind."""
    run = write_run(tmp_path / "run", steps=14, every=4)
    change_json(run / "trained_on.json", steps=64)
    (run / "plan.json").write_text(
        json.dumps({"time": {"tokens_per_second": 100, "training": 9}, "this_run": {"peak": 1}})
    )
    drawn = random.Random(0)
    files = sorted(run.rglob("*.json*"))
    for _ in range(120):
        file = drawn.choice(files)
        whole = file.read_text()
        rows = [json.loads(line) for line in (whole.splitlines() if file.suffix == ".jsonl" else [whole])]
        for _ in range(drawn.randint(1, 3)):
            spoil(rows, drawn)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        page_of(run)
        file.write_text(whole)


def spoil(value: Any, drawn: random.Random) -> None:
    """Replaces one value at any depth."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = drawn.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and drawn.random() < 0.85:
        spoil(value[key], drawn)
    else:
        value[key] = copy.deepcopy(drawn.choice(JUNK))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00\xff", "[" * 100_000])
def test_damaged_files_are_named(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run", steps=3)
    names = ["manifest.json", "before.json", "trained_on.json", "evaluation/arithmetic.json"]
    for name in names:
        (run / name).write_text(content, encoding="latin-1")
    lacks = read_run(run).lacks
    assert [name for name in names if any(name in text and "damaged" in text for text in lacks)] == names
    page_of(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"not the folder of a run \(it has none of manifest.json, metrics.jsonl"):
        read_run(tmp_path)


def test_the_report_is_written_into_the_folder_and_written_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3)
    assert write_report(run) == run / "report.html"
    first = (run / "report.html").read_text()
    write_report(run)
    assert (run / "report.html").read_text() == first
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


def test_a_change_of_too_few_items_has_no_colour() -> None:
    """One question that is answered now, and was not before, has an interval that leaves out zero."""

    def drawn(more_than_chance: bool | None) -> str:
        change = {"difference": 1.0, "interval": [1.0, 1.0], "more_than_chance": more_than_chance}
        task = {"name": "t", "tuned": {"pass@1": 1.0}, "base": {"pass@1": 0.0}, "change": {"pass@1": change}}
        return tasks_html([task])

    sure, chance, unknown = map(drawn, (True, False, None))
    assert sure == unknown != chance
