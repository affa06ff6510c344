"""A run that was stopped goes on to the very result of one that was not, or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests_support import SHORT, result, with_unsloth
from transformers import Trainer

from qlora_sft import run_data
from qlora_sft.config import Config
from qlora_sft.errors import ConfigError, DataError, Interrupted
from qlora_sft.evaluation import around_training as module
from qlora_sft.run.report import Choice
from qlora_sft.strict import as_tree
from qlora_sft.train import train
from qlora_sft.training.checkpoints import all_checkpoints, as_begun, differences
from qlora_sft.training.trainer import PackedSFTTrainer


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[], None]) -> None:
    """``what`` happens when the trainer has done ``step`` steps and takes the rows of the next."""
    take = PackedSFTTrainer.get_batch_samples

    def taken(self: Any, *args: Any) -> Any:
        if self.state.global_step == step:
            what()
        return take(self, *args)

    monkeypatch.setattr(PackedSFTTrainer, "get_batch_samples", taken)


@pytest.mark.parametrize(
    ("step", "what", "ends", "left"),
    [
        (5, crash, Crash, [2, 4]),
        (3, lambda: os.kill(os.getpid(), signal.SIGINT), Interrupted, [2, 4]),
        (2, lambda: os.kill(os.getpid(), signal.SIGHUP), Interrupted, [2, 3]),
        (2, lambda: os.kill(os.getpid(), signal.SIGTERM), Interrupted, [2, 3]),
    ],
    ids=["crash", "control-c", "terminal-closed", "terminated"],
)
def test_it_ends_as_if_nothing_had_happened(
    make_config: Any, tmp_path: Path, whole: Any, step: int, what: Any, ends: Any, left: list[int]
) -> None:
    config = make_config(*SHORT, f"output={tmp_path / 'stopped'}")
    run = Path(config.output)
    # Started with nohup, these tests would ignore a terminal that is closed, and so would the run.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, what)
        with pytest.raises(ends) as stopped:
            train(config, say=lambda _: None)
    signal.signal(signal.SIGHUP, before)
    assert [path.name for path in all_checkpoints(run)] == [f"step-{number:06d}" for number in left]
    assert not (run / "adapter").exists()
    assert not list(run.glob(".*"))
    if ends is Interrupted:
        assert stopped.value.exit_code == 130
        assert f"{run / 'checkpoints' / f'step-{left[-1]:06d}'} is complete" in str(stopped.value)
    said: list[str] = []
    report = train(config, resume=True, say=said.append)
    assert f"resume: from step {left[-1]}" in said[0]
    assert (report.resumed_at, report.steps) == (left[-1], 6)
    assert result(run) == whole


def test_the_base_is_evaluated_once_unless_the_questions_are_others(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    row = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
    held_out.write_text(json.dumps(row) + "\n")
    asked = [f"data.held_out=[{{path: {held_out}}}]", "evaluation.answers=1", "evaluation.max_new_tokens=3"]
    moments: list[str] = []
    own = module.evaluate

    def evaluate(*arguments: Any) -> Any:
        moments.append(arguments[-1].split()[0])
        return own(*arguments)

    monkeypatch.setattr(module, "evaluate", evaluate)
    whole = train(make_config(*SHORT, *asked), say=lambda _: None)
    assert moments == ["before", "after"]
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            train(make_config(*SHORT, *asked, f"output={tmp_path / 'stopped'}"), say=lambda _: None)
    for extra, again in (([], []), (["evaluation.max_new_tokens=2"], ["before"])):
        moments.clear()
        stopped = shutil.copytree(tmp_path / "stopped", tmp_path / f"stopped{len(again)}")
        config = make_config(*SHORT, *asked, *extra, f"output={stopped}")
        report = train(config, resume=True, say=lambda _: None)
        assert moments == [*again, "after"]
        assert report.loss == whole.loss
        samples = (Path(config.output) / "samples.jsonl").read_text()
        assert again or samples == (tmp_path / "run" / "samples.jsonl").read_text()


def test_a_second_signal_stops_at_once(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(*SHORT, "training.save_steps=0")
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    with pytest.raises(Interrupted, match="interrupted at once; there is no checkpoint"):
        train(config, say=lambda _: None)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_loses_nothing(make_config: Any, tmp_path: Path, whole: Any) -> None:
    config = make_config(*SHORT, "training.save_steps=0", f"output={tmp_path / 'late'}")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        train(config, say=lambda _: None)
    assert result(Path(config.output)) == whole


def test_a_run_whose_steps_are_all_done_is_only_finished(whole_config: Config, tmp_path: Path, whole: Any) -> None:
    """It was killed while it was evaluated, say."""
    run = Path(shutil.copytree(whole_config.output, tmp_path / "run"))
    config = replace(whole_config, output=str(run))
    (run / "manifest.json").unlink()
    report = train(config, resume=True, say=lambda _: None)
    assert (report.resumed_at, report.steps) == (6, 6)
    assert result(run) == whole


def test_without_a_checkpoint_it_begins(make_config: Any, whole: Any, tmp_path: Path) -> None:
    config = make_config(*SHORT, f"output={tmp_path / 'new'}")
    said: list[str] = []
    train(config, resume=True, say=said.append)
    assert "has no checkpoint yet, so it begins at step 0" in said[0]
    assert result(Path(config.output)) == whole


def stopped_run(make_config: Any, *overrides: str) -> Config:
    config: Config = make_config(*SHORT, *overrides)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            train(config, say=lambda _: None)
    return config


def test_another_run_is_refused_with_every_difference(make_config: Any, tmp_path: Path) -> None:
    config = stopped_run(make_config)
    other = make_config(*SHORT, "training.learning_rate=1e-3", "lora.r=4", "memory.policy=checkpoint")
    with pytest.raises(ConfigError) as refused:
        train(other, resume=True, say=lambda _: None)
    assert len(refused.value.problems) == 3
    assert f"training.learning_rate was 0.01 when {tmp_path / 'run'} began and is 0.001 now" in str(refused.value)
    with pytest.raises(ConfigError, match="give one of them"):
        train(config, resume=True, overwrite=True, say=lambda _: None)
    with pytest.raises(ConfigError, match="or --resume to go on with it"):
        train(config, say=lambda _: None)


def test_other_data_or_another_base_are_refused(make_config: Any, tmp_path: Path) -> None:
    config = stopped_run(make_config)
    data = Path(config.data.train[0].path)
    before = data.read_text()
    data.write_text(before.replace("Answer 3", "Anbwer 3"))
    with pytest.raises(ConfigError, match="training data, or how it is rendered and packed, is not what this run"):
        train(config, resume=True, say=lambda _: None)
    data.write_text(before)
    begun = json.loads((tmp_path / "run" / "begun.json").read_text())
    (tmp_path / "run" / "begun.json").write_text(json.dumps({**begun, "base_sha256": "x", "dtype": "float16"}))
    with pytest.raises(ConfigError) as refused:
        train(config, resume=True, say=lambda _: None)
    assert len(refused.value.problems) == 2
    assert "set model.dtype=float16, which this run began with" in str(refused.value)


def test_what_auto_meant_may_be_named_as_the_errors_advise(make_config: Any, tmp_path: Path) -> None:
    stopped_run(make_config, "model.dtype=auto", "model.backend=auto", f"output={tmp_path / 'stopped'}")
    run = tmp_path / "stopped"
    begun = json.loads((run / "begun.json").read_text())
    assert (begun["backend"], begun["attention"]) == ("transformers", "varlen")
    as_meant = [f"model.dtype={begun['dtype']}", "model.backend=transformers", "model.attention=varlen"]
    as_meant += [f"data.share_prefixes={'on' if begun['shares_prefixes'] else 'off'}"]
    named = make_config(*SHORT, *as_meant, f"output={run}")
    other = make_config(*SHORT, *as_meant[1:], "model.dtype=float16", f"output={run}")
    with pytest.raises(ConfigError, match=r"model\.dtype was 'auto' when .* began and is 'float16' now"):
        train(other, resume=True, say=lambda _: None)
    for way in ("sdpa", "flash4"):
        (run / "begun.json").write_text(json.dumps({**begun, "attention": way}))
        assert as_begun(make_config(*SHORT), run, lambda _: None).model.attention == way
    # A run of a version that knew no sharing packed every row alone.
    old = {key: value for key, value in begun.items() if key != "shares_prefixes"}
    (run / "begun.json").write_text(json.dumps(old))
    assert as_begun(make_config(*SHORT), run, lambda _: None).data.share_prefixes == "off"
    (run / "begun.json").write_text(json.dumps(begun))
    report = train(named, resume=True, say=lambda _: None)
    assert report.resumed_at == 2
    assert report.attention == Choice("varlen", "model.attention=varlen")


def test_a_finished_run_is_not_gone_on_with(whole_config: Config) -> None:
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(whole_config, resume=True, say=lambda _: None)


def test_a_run_of_an_earlier_version_goes_on_with_its_rows_of_new_tokens(make_config: Any, tmp_path: Path) -> None:
    """Its optimizer had them in one group with the adapters, and so decayed them; a new run does not."""
    settings = [*SHORT, "model.new_tokens=[<|one|>,<|two|>]", "training.weight_decay=0.5"]
    earlier, stopped, new = (make_config(*settings, f"output={tmp_path / name}") for name in ("a", "b", "c"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSFTTrainer, "create_optimizer", Trainer.create_optimizer)
        train(earlier, say=lambda _: None)
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            train(stopped, say=lambda _: None)
    train(stopped, resume=True, say=lambda _: None)
    assert result(tmp_path / "b") == result(tmp_path / "a")
    train(new, say=lambda _: None)
    assert result(tmp_path / "c")[0] != result(tmp_path / "a")[0]


def test_a_source_that_is_judged_now_can_be_accepted_by_a_run_that_goes_on(make_config: Any, tmp_path: Path) -> None:
    """An earlier version had begun it without a word: what the error asks for must not make it another run."""
    long = [{"messages": [{"role": "user", "content": f"{n} " + "why? " * 90}, {"role": "assistant", "content": "So."}]}
            for n in range(12)]  # fmt: skip
    settings = [*SHORT, "training.max_steps=4"]
    config = make_config(*settings, rows=long)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "judge", lambda *_: [])
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            train(config, say=lambda _: None)
    with pytest.raises(DataError, match=r"set data\.train\.0\.allow_share=true"):
        train(config, resume=True, say=lambda _: None)
    accepted = make_config(*settings, "data.train.0.allow_share=true", rows=long)
    assert train(accepted, resume=True, say=lambda _: None).resumed_at == 2
    named = make_config(*settings, "data.train.0.loss_weight=0.5", rows=long)
    changed = differences(as_tree(config), as_tree(named))
    assert list(changed) == [("data.train.0.loss_weight", 1.0, 0.5)]


UNDER_UNSLOTH = """
import sys
from qlora_sft.cli import main
from qlora_sft.training import checkpoints
publish = checkpoints.publish
def published(unfinished, folder, *rest):
    publish(unfinished, folder, *rest)
    if sys.argv[1] == "kill" and checkpoints.step_of(folder) == 4:
        import os
        os._exit(9)
checkpoints.publish = published
sys.exit(main(["train", *sys.argv[2:]]))
"""


@with_unsloth
@pytest.mark.slow
def test_unsloths_trainer_goes_on_as_well(make_config: Any, tmp_path: Path) -> None:
    """It is evaluated and asked in between, for which Unsloth changes the model."""
    make_config()
    asked = [f"data.held_out=[{{path: {tmp_path / 'chat.jsonl'}, name: same}}]", "evaluation.every_steps=1"]
    asked += [f"evaluation.tasks=[{{path: {tmp_path / 'chat.jsonl'}, form: exact, max_new_tokens: 3}}]"]
    asked += ["evaluation.tasks_every_steps=2", "evaluation.tasks_rows=2"]

    def run(how: str, name: str, *more: str) -> int:
        settings = [*SHORT, *asked, "model.backend=unsloth", f"output={tmp_path / name}"]
        return subprocess.run(
            [sys.executable, "-c", UNDER_UNSLOTH, how, str(tmp_path / "config.yaml"), *settings, *more], cwd=tmp_path
        ).returncode

    assert run("whole", "whole") == 0
    assert run("kill", "killed") == 9
    assert run("whole", "killed", "--resume") == 0
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    evaluations = (tmp_path / "killed" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [0, 1, 2, 3, 4, 5, 6]
