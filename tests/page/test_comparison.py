"""The comparison of runs, and the verb that draws it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from page_check import checked
from run_folders import write_run

from qlora_sft.cli import main
from qlora_sft.page.comparison import comparison_page, differing_settings, names_of, result_rows
from qlora_sft.page.facts import read_run
from qlora_sft.page.write import report_runs


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    changed = ["lora.r=32", "training.learning_rate=1e-4"]
    return [
        write_run(tmp_path / "a" / "support", steps=24),
        write_run(tmp_path / "b" / "support", steps=16, overrides=changed, start=3.0),
        write_run(tmp_path / "c", steps=30, finished=False),
    ]


def test_settings_and_results_stand_side_by_side(runs: list[Path]) -> None:
    facts = [read_run(run) for run in runs]
    assert names_of(facts) == [str(runs[0]), str(runs[1]), "c"]
    assert differing_settings(facts) == [("lora.r", [16, 32, 16]), ("training.learning_rate", [5e-4, 1e-4, 5e-4])]
    rows = {what: values for what, values, _ in result_rows(facts)}
    for number, run in enumerate(facts):
        assert rows["steps"][number] == [24, 16, 30][number]
        assert rows["training loss, last"][number] == run.losses[-1]
        assert rows["held-out loss, tools, at the end"][number] == run.held_out[-1][1]["tools"]
    assert rows["arithmetic, pass@1"] == [0.25, 0.25, None]
    assert rows["exact answers, tools, after"] == [0.75, 0.75, None]


def test_the_loss_at_the_end_is_that_of_the_adapter_that_was_kept(runs: list[Path]) -> None:
    """As on the page of the run, and as the answers are; the last step was worse."""
    file = runs[0] / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["report"]["loss"]["tools"]["after"] = 0.125
    file.write_text(json.dumps(manifest))
    facts = [read_run(run) for run in runs]
    assert facts[0].held_out[-1][1]["tools"] != 0.125
    found = {what: values for what, values, _ in result_rows(facts)}["held-out loss, tools, at the end"]
    assert found[0] == 0.125
    assert found[2] == facts[2].held_out[-1][1]["tools"]  # not finished


def test_the_curves_of_all_runs_are_in_one_figure(runs: list[Path]) -> None:
    page = comparison_page([read_run(run) for run in runs])
    checked(page)
    titles = [part.split("</b>")[0] for part in page.split("<figcaption><b>")[1:]]
    assert titles == [
        "Training loss", "Held-out loss, fields", "Held-out loss, arithmetic", "Held-out loss, tools", "Learning rate",
        "Gradient norm", "Speed",
    ]  # fmt: skip
    figure = page.split("<figcaption>")[1]
    assert figure.count('class="line') == 3
    for run in ("support", "c"):
        assert f"{run}</span>" in figure


def test_what_cannot_be_compared_is_said(runs: list[Path]) -> None:
    before = json.loads((runs[1] / "before.json").read_text())
    (runs[1] / "before.json").write_text(json.dumps({**before, "question": "another"}))
    page = comparison_page([read_run(run) for run in runs[:2]])
    assert "losses and answers do not compare one to one" in page
    assert "do not compare" not in comparison_page([read_run(run) for run in (runs[0], runs[2])])


def test_the_verb_writes_the_pages_and_says_where(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert f"{runs[0]}/comparison.html: 3 runs compared" in said
    assert f"{runs[2]}/report.html: 30 steps, not finished" in said
    assert "  warning: Held-out loss turned" in said
    for file in (*(run / "report.html" for run in runs), runs[0] / "comparison.html"):
        checked(file.read_text())


def test_its_json_has_the_figures(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pages" / "page.html"
    assert main(["report", str(runs[0]), str(runs[1]), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["comparison"] == str(out)
    assert out.is_file()
    assert result["differing_settings"]["lora.r"] == [16, 32]
    assert result["results"]["steps"] == [24, 16]
    assert [run["finished"] for run in result["runs"]] == [True, True]
    assert main(["report", str(runs[2]), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["comparison"], result["runs"][0]["page"]) == (None, str(out))
    assert not (runs[2] / "report.html").exists()


def test_faults_end_with_2_before_anything_is_written(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, why in (
        ([str(tmp_path / "none")], "no such folder"), ([str(tmp_path)], "not the folder of a run"),
        ([f"{runs[0]}/../support"], "named twice"), (["\0"], "cannot be a file or folder"),
    ):  # fmt: skip
        assert main(["report", str(runs[0]), *more]) == 2
        assert why in capsys.readouterr().err
    assert not (runs[0] / "report.html").exists()
    (runs[0] / "report.html").mkdir()
    assert main(["report", str(runs[0])]) == 1
    assert f"error: {runs[0]}/report.html" in capsys.readouterr().err


def test_drawing_imports_nothing_heavy(runs: list[Path]) -> None:
    heavy = ("torch", "transformers", "numpy", "datasets", "jinja2")
    code = f"import sys, qlora_sft.cli as c; c.main(sys.argv[1:]); print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code, "report", *map(str, runs)], capture_output=True, text=True)
    assert result.stdout.strip().endswith("[]"), result.stderr


def test_a_page_does_not_depend_on_when_it_is_made(runs: list[Path]) -> None:
    report_runs(runs)
    first = [(run / "report.html").read_bytes() for run in runs]
    report_runs(runs)
    assert [(run / "report.html").read_bytes() for run in runs] == first
