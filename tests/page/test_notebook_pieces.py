"""Results show themselves in a notebook, in the words and figures of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from page_check import checked
from run_folders import report_of, step_rows, task_json, write_run

from qlora_sft import curves
from qlora_sft.config import Config
from qlora_sft.evaluation.compare import EvaluationReport, TaskReport
from qlora_sft.markup.elements import page
from qlora_sft.plan.report import (
    CardPlan,
    CardsPlan,
    DataPlan,
    DevicePlan,
    DiskPlan,
    HostPlan,
    MeasuredPlan,
    ModelPlan,
    PlanReport,
    ResidentPlan,
    TimePlan,
)  # fmt: skip
from qlora_sft.preview import preview
from qlora_sft.run.report import Choice, Pair

EVIL = "<script>alert(1)</script>"


def shown(result: Any) -> str:
    html: str = result._repr_html_()
    checked(page("notebook", "", html.replace("<style>", "<pre>").replace("</style>", "</pre>")))
    assert EVIL not in html
    return html


def test_a_run() -> None:
    report = report_of(step_rows(9, ["a"]), {EVIL: Pair(2.0, 0.5)}, output=EVIL)
    html = shown(report)
    assert f"{report.train_loss.last:.3f}" in html
    assert '<span class="before">2.000</span> <i>→</i> 0.500' in html
    assert '<span class="before">0%</span> <i>→</i> 75%' in html
    assert "unsloth is not installed" in html
    assert "_repr_html_" not in report.to_json()
    assert "Training loss" in shown(report_of(step_rows(1, ["a"]), {}, memory=None, tokens=0, seconds={}))


def test_an_evaluation() -> None:
    tasks = [TaskReport.from_json(task_json(EVIL)), TaskReport.from_json(task_json("alone", base=None, change=None))]
    html = shown(EvaluationReport("m", "f", tasks))
    assert "2.5% → 25%, +22.5 (+14.4 to +31.2)" in html
    assert html.count('class="span good"') == 3


def test_more_refusals_are_no_gain_and_a_length_is_no_share() -> None:
    changes = {"refused": (0.58, 0.5, 0.65), "length": (40.0, 30.0, 50.0), "repetition": (0.4, 0.3, 0.5)}
    task = task_json(
        "benign", form="refusal", base={"refused": 0.02, "length": 80.0, "repetition": 0.1},
        tuned={"refused": 0.6, "length": 120.0, "repetition": 0.5}, verdict="worse",
        change={name: {"difference": d, "interval": [low, high]} for name, (d, low, high) in changes.items()},
    )  # fmt: skip
    html = shown(EvaluationReport("m", "f", [TaskReport.from_json(task)]))
    assert "2% → 60%, +58 (+50 to +65)" in html
    assert html.count('class="span bad"') == 1
    assert 'class="span good"' not in html
    assert '<td>tokens of an answer</td><td class="n">80</td><td class="n">120</td>' in html


def test_a_plan() -> None:
    gib = 2**30
    plan = PlanReport(
        ModelPlan(EVIL, "Llama", 8_000_000_000, 32, 224, 0, "a note"), {"backend": Choice("transformers", EVIL)},
        ResidentPlan(4 * gib, gib, 0, gib // 4, gib // 4, gib // 8, 6 * gib),
        DevicePlan(device="GPU", memory=24 * gib, tokens=4096, split="32 keep", reason="fits", activations=gib,
                   peak=8 * gib, fits=True),
        CardsPlan(note="", rows=[CardPlan(24, 90_000, "all", gib, "memory", 170_000, 2 * gib)]),
        HostPlan(1, 2, 3, 4, 5), DiskPlan(1, 2, 3, 4, 5, 6, 7, 8), DataPlan(100, 2000, 300_000, 90_000, 4000),
        TimePlan(MeasuredPlan(4096, 3, 0.1, 0.2, 0.01, 5), 1234.0, 7200.0),
    )  # fmt: skip
    html = shown(plan)
    for text in ("8.00 GiB", "2.0 h", "1,234 tokens per second", "170,000", "a note", "weights in NF4"):
        assert text in html
    assert "html" not in str(plan.to_json())


def test_the_curves_of_a_run_that_is_still_training(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("manifest.json", "report.html"):
        (run / name).unlink(missing_ok=True)
    html = shown(curves(run))
    assert "Training loss" in html
    assert "Held-out loss" in html
    assert 'class="line' in html
    (run / "metrics.jsonl").write_text("")
    assert "Training loss" not in shown(curves(str(run)))


def test_a_preview(make_config: Any, capsys: Any) -> None:
    config: Config = make_config()
    result = preview(config, 2, show=False, alone=True)
    html = shown(result)
    assert html.count('<div class="tokens"') == 2
    assert 'class="s">Answer' in html
    assert list(result.to_json()) == ["rows", "ledger", "findings"]
    capsys.readouterr()
