"""A run is measured while it trains, keeps its best step, stops when nothing gets better, and is the same run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import conversation, write_rows
from tests_support import SHORT, result

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.run.folder import Run
from qlora_sft.run.report import RunReport
from qlora_sft.train import train
from qlora_sft.training import watch as module
from qlora_sft.training.checkpoints import all_checkpoints, step_of
from qlora_sft.training.evaluations import AskedTasks, Evaluations
from qlora_sft.training.fit import keep_adapter
from qlora_sft.training.steps import most_checkpoints


def silent(_: str) -> None:
    pass


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "evaluations.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def held_out(tmp_path: Path) -> list[str]:
    """Two held-out sources of other conversations."""
    files = [write_rows(tmp_path / f"{name}.jsonl", [conversation(n + i) for i in range(3)]) for name, n in
             (("near", 20), ("far", 90))]  # fmt: skip
    return [f"data.held_out=[{{path: {files[0]}}}, {{path: {files[1]}}}]"]


NEW = ("kept", "stopped_early", "warnings")
"""What reports of earlier versions do not have."""
OVERFIT = [
    "training.epochs=50", "training.learning_rate=5e-3", "data.max_length=512", "lora.alpha=32",
    "evaluation.every_steps=4", "training.patience=4", "training.save_steps=10", "training.save_total_limit=1",
]  # fmt: skip


WORDS = "red oak sun sea cat dog jam tea map box pen cup hat key owl fox bee ant ice sky".split()


def by_heart(number: int) -> dict[str, Any]:
    """A question and an answer that nothing but its row says."""
    draw = random.Random(number)
    user = {"role": "user", "content": " ".join(draw.choices(WORDS, k=4))}
    return {"messages": [user, {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=6))}]}


def able(base: Path, folder: Path) -> Path:
    """``base``, a tiny model, with larger logits, so that its adapter can learn something by heart."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(base)
    torch.nn.init.constant_(model.model.norm.weight, 12.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_a_planted_overfit_is_stopped_and_its_best_step_is_kept(
    make_config: Any, convertible_model: Path, tmp_path: Path
) -> None:
    """Twenty rows, fifty epochs; what is to be learned of other rows is the words, and after that nothing."""
    files = [write_rows(tmp_path / f"{name}.jsonl", [by_heart(n + i) for i in range(6)]) for name, n in
             (("near", 100), ("far", 200))]  # fmt: skip
    held_out = f"data.held_out=[{{path: {files[0]}}}, {{path: {files[1]}}}]"
    model = able(convertible_model, tmp_path / "able")
    config = make_config(*OVERFIT, held_out, f"model.path={model}", rows=[by_heart(i) for i in range(20)])
    said: list[str] = []
    report = train(config, say=said.append)
    run = Run.open(config.output)
    rows = evaluations_of(run.path)
    assert [row["step"] for row in rows] == list(range(0, report.steps + 1, 4))
    means = {row["step"]: row["mean"] for row in rows}
    assert all(row["mean"] == sum(row["held_out"].values()) / 2 for row in rows)
    best = min((step for step in means if step), key=lambda step: means[step])
    # It ended four evaluations behind the best of them, long before its 100 steps.
    assert report.steps == best + 4 * 4 < 100
    assert report.stopped_early is not None
    assert f"has not fallen since step {best}, in 4 evaluations" in report.stopped_early
    assert f"stopping after step {report.steps}: {report.stopped_early}" in said
    assert all(means[step] > means[best] + 0.1 for step in range(best + 8, report.steps, 4))
    # It was said at the third rise, before patience had run out, and stands in the report.
    (warning,) = (text for text in report.warnings if "has risen in 3 evaluations in a row" in text)
    assert f"at step {best + 12} from {means[best]:.3f} at step {best}" in warning
    assert said.count(f"warning: {warning}") == 1
    # Of all checkpoints those of the best and of the last step are left; the adapter is that of the best.
    assert [step_of(each) for each in all_checkpoints(run.path)] == [best, report.steps]
    # While one is written it is one more, for which the plan counts the room.
    assert most_checkpoints(config) == 2 + 1
    assert adapter(run.adapter) == adapter(run.checkpoints / f"step-{best:06d}")
    assert adapter(run.adapter) != adapter(run.checkpoints / f"step-{report.steps:06d}")
    assert report.kept is not None
    assert (report.kept.step, report.kept.held_out) == (best, dict(rows[best // 4]["held_out"]))
    # What is measured of the adapter in the end is what was measured when it was new.
    assert {name: pair.after for name, pair in report.loss.items()} == report.kept.held_out
    assert {name: pair.before for name, pair in report.loss.items()} == rows[0]["held_out"]
    assert run.report == report
    # A manifest of an earlier version says nothing of it.
    earlier = {key: value for key, value in report.to_json().items() if key not in NEW}
    old = RunReport.from_json(earlier)
    assert (old.kept, old.stopped_early, old.warnings) == (None, None, [])


def test_evaluating_changes_nothing_that_is_trained(
    make_config: Any, tmp_path: Path, held_out: list[str], whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if it draws random numbers; and the last step is kept where that is asked for."""
    measure = module.Watch.measure

    def drawing(self: Any, step: int) -> dict[str, float]:
        torch.rand(3)
        return measure(self, step)

    monkeypatch.setattr(module.Watch, "measure", drawing)
    asked = ["evaluation.every_steps=1", "training.keep=last", f"output={tmp_path / 'w'}"]
    report = train(make_config(*SHORT, *held_out, *asked), say=silent)
    rows = evaluations_of(tmp_path / "w")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert result(tmp_path / "w") == whole
    assert report.kept is not None
    assert (report.kept.step, report.kept.reason) == (6, "the last one")
    assert {name: pair.after for name, pair in report.loss.items()} == report.kept.held_out == rows[-1]["held_out"]
    assert [step_of(each) for each in all_checkpoints(tmp_path / "w")] == [4, 6]


@pytest.mark.parametrize("form", [[], ["lora.dora=true"]], ids=["plain", "dora"])
def test_the_best_stays_however_old_it_is_and_without_other_checkpoints(
    make_config: Any, held_out: list[str], monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    """The losses are planted: step 2 is the best of seven."""
    losses = iter([5.0, 2.0, 3.0, 2.0, 2.5, 2.5, math.nan])
    real = module.Watch.measure

    def planted(self: Any, step: int) -> dict[str, float]:
        loss = next(losses)
        self.held_out_loss = lambda: {"near": loss, "far": loss + 1}
        return real(self, step)

    monkeypatch.setattr(module.Watch, "measure", planted)
    asked = ["training.max_steps=7", "training.save_steps=0", "evaluation.before_training=false", *SHORT[2:], *held_out]
    config = make_config(*asked, *form, "evaluation.every_steps=1", "training.epochs=2")
    report = train(config, say=silent)
    run = Run.open(config.output)
    assert [row["best"] for row in evaluations_of(run.path)] == [True, True, False, False, False, False, False]
    assert evaluations_of(run.path)[-1]["held_out"] == {"near": None, "far": None}
    assert [step_of(each) for each in all_checkpoints(run.path)] == [1, 2]
    assert report.kept is not None
    assert report.kept.step == 2
    assert adapter(run.adapter) == adapter(run.checkpoints / "step-000002")
    assert {name: pair.before for name, pair in report.loss.items()} == {"near": None, "far": None}


def test_an_evaluation_that_cannot_be_made_costs_no_more_than_itself(
    make_config: Any, tmp_path: Path, held_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.Watch.measure
    broken = {2: torch.OutOfMemoryError("CUDA out of memory"), 4: RunError("programs cannot be run here")}

    def measure(self: Any, step: int) -> dict[str, float]:
        own = self.held_out_loss

        def held_out_loss() -> dict[str, float]:
            if step in broken:
                raise broken[step]
            return own()

        self.held_out_loss = held_out_loss
        try:
            return real(self, step)
        finally:
            self.held_out_loss = own

    monkeypatch.setattr(module.Watch, "measure", measure)
    said: list[str] = []
    train(make_config(*SHORT, *held_out, "evaluation.every_steps=2"), say=said.append)
    assert "step 2: not evaluated (no memory left: CUDA out of memory); training goes on" in said
    assert "step 4: not evaluated (programs cannot be run here); training goes on" in said
    assert [row["step"] for row in evaluations_of(tmp_path / "run")] == [0, 6]


def test_a_checkpoint_that_found_no_room_is_not_kept(
    make_config: Any, tmp_path: Path, held_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_sft.training import trainer

    real = trainer.publish

    def full(unfinished: Path, folder: Path, *rest: Any) -> None:
        if step_of(folder) == 1:
            raise OSError(28, "No space left on device")
        real(unfinished, folder, *rest)

    monkeypatch.setattr(trainer, "publish", full)
    monkeypatch.setattr(Evaluations, "best", property(lambda self: next((r for r in self.rows if r.step == 1), None)))
    report = train(make_config(*SHORT, *held_out, "evaluation.every_steps=1"), say=silent)
    assert report.kept is not None
    assert report.kept.step == 6
    assert "step 1 had the lowest held-out loss, but its checkpoint could not be written" in report.kept.reason


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["evaluation.every_steps=5"], "evaluation.every_steps measures held-out rows, and data.held_out names none"),
        (["training.patience=2"], "training.patience needs evaluation.every_steps"),
        (["training.keep=best"], "training.keep=best needs evaluation.every_steps"),
        (["HELD", "evaluation.every_steps=5", "evaluation.loss=false"], "has no effect with evaluation.loss=false"),
        (["data.held_out=0%", "evaluation.every_steps=5"], "and data.held_out names none"),
        (["HELD", "evaluation.every_steps=5", "training.best_metric=held_out/nera"], "(did you mean 'held_out/near'?)"),
        (
            ["training.best_metric=tasks/x", "training.patience=2"],
            "training.patience needs evaluation.tasks_every_steps",
        ),
        (["evaluation.tasks_every_steps=5"], "asks the questions of evaluation.tasks, and there are none"),
    ],
)
def test_what_is_not_measured_can_decide_nothing(
    make_config: Any, held_out: list[str], overrides: list[str], expected: str
) -> None:
    given = [held_out[0] if each == "HELD" else each for each in overrides]
    with pytest.raises(ConfigError) as refused:
        make_config(*given)
    assert expected in str(refused.value)


def test_tasks_are_asked_while_training_and_answered_as_evaluate_does(
    make_config: Any, tmp_path: Path, tiny_model: Path
) -> None:
    """It learns one answer, which is right three times out of four, and it is trained no differently."""
    from qlora_sft.evaluation.evaluate_run import evaluate_run

    rows = [{"messages": [by_heart(i)["messages"][0], {"role": "assistant", "content": "sea"}]} for i in range(4)]
    questions = write_rows(tmp_path / "words.jsonl", [*rows[:3], by_heart(50)])
    two = f"{{path: {questions}, form: exact, max_new_tokens: 12}}, {{path: {questions}, name: read, form: loss}}"
    tasks = f"evaluation.tasks=[{two}]"
    settings = ["training.epochs=40", "training.learning_rate=1e-2", "lora.alpha=32", "lora.dropout=0.1"]
    settings += [f"model.path={able(tiny_model, tmp_path / 'able')}"]
    plain = make_config(*settings, rows=rows)
    train(plain, say=silent)
    asked = [tasks, "evaluation.tasks_every_steps=15", f"output={tmp_path / 'asked'}"]
    said: list[str] = []
    report = train(make_config(*settings, *asked, rows=rows), say=said.append)
    assert result(tmp_path / "asked") == result(Path(plain.output))
    rows_asked = evaluations_of(tmp_path / "asked")
    assert [row["step"] for row in rows_asked] == [15, 30, 40]
    assert all((row["held_out"], row["mean"], row["best"]) == ({}, None, False) for row in rows_asked)
    shares = [row["tasks"]["words"] for row in rows_asked]
    assert shares[-1] == 0.75
    assert f"step 40: tasks words 0.750, read loss {rows_asked[-1]['tasks']['read loss']:.3f}" in said
    assert report.kept is not None
    assert report.kept.step == 40
    after = evaluate_run(tmp_path / "asked", base=False, say=silent)
    assert [next(iter(task.tuned.values())) for task in after.tasks] == [
        pytest.approx(figure, rel=1e-5) for figure in rows_asked[-1]["tasks"].values()
    ]


def test_code_is_not_run_while_training(make_config: Any, tmp_path: Path) -> None:
    code = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    file = write_rows(tmp_path / "code.jsonl", [code])
    config = make_config(f"evaluation.tasks=[{{path: {file}}}]", "evaluation.tasks_every_steps=2")
    with pytest.raises(ConfigError, match="code is graded by running what the model writes"):
        train(config, say=silent)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("held_out", "held-out loss near 1.000 (the lowest so far); tasks words 0.500"),
        ("held_out/near", "held-out loss near 1.000 (the best so far by held-out loss of near); tasks words 0.500"),
        ("tasks/words", "held-out loss near 1.000; tasks words 0.500 (the best so far by task words)"),
    ],
)
def test_the_best_is_said_where_its_measure_stands_and_of_those_that_have_it(
    metric: str, said: str, tmp_path: Path
) -> None:
    """Tasks are asked at steps 2 and 4, and the loss is measured at steps 1, 2 and 3."""
    evaluations = Evaluations(tmp_path / "evaluations.jsonl", metric=metric)
    evaluations.add(0, {"near": 2.0}, 1.0)
    evaluations.add(1, {"near": 1.5}, 1.0)
    best = evaluations.add(2, {"near": 1.0}, 1.0, AskedTasks({"words": 0.5}))
    evaluations.add(3, {"near": 1.2}, 1.0)
    evaluations.add(4, {}, 1.0, AskedTasks({"words": 0.25}))
    assert module.described(best, metric) == said
    trainer: Any = None
    watch: Any = SimpleNamespace(evaluations=evaluations, best_step=2)
    count = 2 if metric.startswith("tasks/") else 3
    assert keep_adapter(trainer, watch, 2).reason.endswith(f" of {count} evaluations")
