"""What goes wrong beside the training costs no more than itself: figures, a checkpoint, lines of a log."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import conversation, write_rows
from tests_support import SHORT, result
from transformers import TrainerCallback

from qlora_sft.atomic import GrowingFile
from qlora_sft.config import Config
from qlora_sft.errors import ConfigError, Interrupted, RunError
from qlora_sft.evaluation import evaluate, held_out
from qlora_sft.page.comparison import result_rows
from qlora_sft.page.facts import read_run
from qlora_sft.run.folder import Run
from qlora_sft.run.report import RunReport
from qlora_sft.train import train
from qlora_sft.training import reporting, run_folder
from qlora_sft.training.checkpoints import all_checkpoints, step_of
from qlora_sft.training.interrupt import StopAfterStep
from qlora_sft.training.run_folder import held
from qlora_sft.training.trainer import PackedSFTTrainer
from qlora_sft.training.whole import damage_of

HOST_FULL = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
FULL = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(HOST_FULL),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")]  # fmt: skip


@pytest.fixture
def configure(make_config: Any, tmp_path: Path) -> Callable[..., Config]:
    """A short run with held-out rows, whose answers are asked for."""
    rows = write_rows(tmp_path / "other.jsonl", [conversation(50 + i) for i in range(4)])
    asked = [f"data.held_out=[{{path: {rows}}}]", "evaluation.answers=1", "evaluation.max_new_tokens=2"]
    return lambda *overrides: make_config(*SHORT, *asked, *overrides)


def at_step(patch: pytest.MonkeyPatch, step: int, what: Callable[[], object]) -> None:
    """``what`` happens when ``step`` steps are done."""
    take = PackedSFTTrainer.get_batch_samples

    def taken(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == step:
            what()
        return take(self, *arguments)

    patch.setattr(PackedSFTTrainer, "get_batch_samples", taken)


def failing(patch: pytest.MonkeyPatch, place: str, call: int, error: BaseException) -> None:
    """The call of this number, counted from 1, of a function in `evaluate` raises ``error``."""
    own, calls = getattr(evaluate, place), []

    def called(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return own(*arguments)

    patch.setattr(evaluate, place, called)


@pytest.mark.parametrize("error", FULL, ids="gpu host torchs_host cublas".split())
def test_an_evaluation_that_finds_no_memory_costs_its_figures(
    error: Exception, configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the base the loss, of the trained model the answers."""
    config = configure()
    failing(monkeypatch, "held_out_loss", 1, error)
    failing(monkeypatch, "generate", 2, error)
    said: list[str] = []
    report = train(config, say=said.append)
    assert report.loss["other"].before is None
    assert report.loss["other"].after > 0
    assert not report.exact_match
    lacking = ["held-out loss before training: not measured (no memory left", "answers after training: not measured"]
    assert all(any(text.startswith(each) for text in report.warnings) for each in lacking)
    assert all(any(text.startswith(f"warning: {each}") for text in said) for each in lacking)
    assert Run.open(config.output).report == report
    assert not (Path(config.output) / "before.json").exists()  # a run that goes on measures it


def test_a_packed_sequence_that_finds_no_memory_is_read_document_by_document(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: RunReport = train(configure("evaluation.answers=0"), say=lambda _: None)
    own, sizes = held_out.batch_loss, []

    def batch_loss(model: Any, batch: Any) -> Any:
        sizes.append(len(batch["lengths"]))
        if len(batch["lengths"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(model, batch)

    monkeypatch.setattr(held_out, "batch_loss", batch_loss)
    said: list[str] = []
    parted = train(configure("evaluation.answers=0"), overwrite=True, say=said.append)
    assert max(sizes) > 1
    assert parted.loss["other"].before == pytest.approx(whole.loss["other"].before, rel=1e-5)
    assert parted.loss["other"].after == pytest.approx(whole.loss["other"].after, rel=1e-5)
    assert not any(text.startswith("warning") for text in said)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("nobody has foreseen it")], ids=["control-c", "fault"]
)
def test_what_ends_the_evaluation_after_training_does_not_end_the_run(
    error: BaseException, configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without checkpoints nothing could go on with the adapter, and all would have to be trained again."""
    config = configure("training.save_steps=0")
    failing(monkeypatch, "held_out_loss", 2, error)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(Interrupted, match="is complete, without what was not measured"):
            train(config, say=lambda _: None)
    else:
        train(config, say=lambda _: None)
    report = Run.open(config.output).report
    assert (report.steps, report.loss) == (6, {})
    assert report.warnings[-1].startswith("evaluation after training: not measured (")
    assert (Path(config.output) / "adapter" / "adapter_model.safetensors").is_file()
    assert "of other, before training only" in (Path(config.output) / "report.html").read_text()
    compared = {what: values for what, values, _ in result_rows([read_run(config.output)])}
    assert "held-out loss, other, before" in compared
    assert "held-out loss, other, last" not in compared


def test_a_held_out_loss_that_is_no_number_is_said_and_the_rest_is_reported(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evaluate.held_out_loss
    monkeypatch.setattr(evaluate, "held_out_loss", lambda *a: {**own(*a), "broken": float("nan")})
    config = configure("evaluation.answers=0")
    report = train(config, say=lambda _: None)
    assert list(report.loss) == ["other"]
    assert [text.partition(";")[0] for text in report.warnings] == [
        f"the held-out loss of broken {when} training is not finite" for when in ("before", "after")
    ]
    json.loads((Path(config.output) / "manifest.json").read_text(), parse_constant=pytest.fail)
    facts = read_run(config.output)
    assert facts.report == report
    assert not facts.lacks


def test_the_manifest_names_the_files_as_they_were_trained_on(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One was edited while the run went, the other was removed."""
    config = configure("evaluation.answers=0")
    base = Path(config.model.path)
    data = Path(config.data.train[0].path)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    files = {"config.json": hashlib.sha256((base / "config.json").read_bytes()).hexdigest()}
    at_step(monkeypatch, 3, data.unlink)
    at_step(monkeypatch, 5, lambda: data.write_text("another\n"))
    report = train(config, say=lambda _: None)
    assert Run.open(config.output).data["chat"]["sha256"] == digest
    assert files.items() <= report.base_files.items()


# ------------------------------------------------------------------ messages and signals


class Gone:
    """Is a terminal that takes nothing any more once ``sign`` is there."""

    encoding = "utf-8"

    def __init__(self, sign: Path):
        self.sign = sign

    def write(self, text: str) -> int:
        if self.sign.exists():
            raise OSError(errno.EIO, "Input/output error")
        return len(text)

    def flush(self) -> None:
        self.write("")

    def isatty(self) -> bool:
        return False


def test_a_terminal_that_is_gone_ends_no_run(make_config: Any, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(*SHORT)
    run = Path(config.output)
    monkeypatch.setattr(sys, "stderr", Gone(run / "config.yaml"))
    report = train(config)
    with pytest.raises(OSError, match="Input/output error"):
        print("gone", file=sys.stderr)
    assert report.steps == 6
    assert result(run) == whole
    assert "kept: the adapter of step 6" in (run / "said.jsonl").read_text()
    assert (run / "report.html").is_file()


def test_that_nobody_can_be_told_changes_no_exit_code() -> None:
    """What a dead stream has not taken must not be written at the end of the process either: Python ends with 120."""
    tell = "import sys; from qlora_sft.cli import guarded; from qlora_sft.say import *"
    for action, expected in (("dict()", 0), ("1 / 0", 1)):
        code = f"{tell}\nwith unfailing_messages(): tell('x')\nsys.exit(guarded(lambda: {action}))"
        command = [sys.executable, "-c", code]
        with open("/dev/full", "w") as full:
            assert subprocess.run(command, stderr=full, timeout=60).returncode == expected


def test_a_terminal_that_is_closed_stops_after_the_step_unless_nohup_says_otherwise() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, heard in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            with StopAfterStep(lambda _: None) as stop:
                os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signalled is heard
            assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------ disks


@pytest.mark.parametrize("most", [100_000, 800_000], ids=["adapter", "optimizer"])
def test_a_checkpoint_that_the_disk_does_not_take_costs_itself(
    most: int, make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors, tokenizers and torch each have an error of their own for it."""
    config = make_config(*SHORT, "lora.r=64")  # an adapter of 0.5 MB, and twice as much in the optimizer
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(monkeypatch, 1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited[1])))
    at_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited))
    said: list[str] = []
    try:
        train(config, say=said.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    lost = [text for text in said if text.startswith("checkpoint not written, training goes on: ")]
    assert len(lost) == 1
    assert "step-000002: " in lost[0]
    assert [step_of(each) for each in all_checkpoints(Path(config.output))] == [4, 6]
    assert not list(Path(config.output).glob(".*"))


def test_lines_that_the_disk_does_not_take_wait_for_it(
    make_config: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*SHORT)
    metrics = Path(config.output) / "metrics.jsonl"

    def away() -> None:
        metrics.rename(metrics.with_suffix(".away"))
        metrics.mkdir()

    def back() -> None:
        metrics.rmdir()
        metrics.with_suffix(".away").rename(metrics)

    at_step(monkeypatch, 2, away)
    at_step(monkeypatch, 5, back)
    said: list[str] = []
    train(config, say=said.append)
    assert result(Path(config.output)) == whole
    assert [text for text in said if text.startswith("warning")] == [
        f"warning: {metrics}: Is a directory; its lines wait, and training goes on"
    ]


def test_half_of_a_text_does_not_stay_where_the_disk_fills_up(tmp_path: Path) -> None:
    growing = GrowingFile(tmp_path / "file")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert growing.add("one\n") is None
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6, unlimited[1]))
        errors = [growing.add("two\n"), growing.add("three\n")]
        assert [error and error.errno for error in errors] == [errno.EFBIG] * 2
        assert growing.file.read_text() == "one\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert growing.add("four\n") is None
    assert growing.file.read_text() == "one\ntwo\nthree\nfour\n"
    assert GrowingFile(tmp_path / "other").add("") is None
    assert not (tmp_path / "other").exists()


def test_an_adapter_that_its_folder_does_not_take_is_saved_elsewhere(
    make_config: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(*SHORT, "training.save_steps=0")

    def refused(*_: object) -> None:
        raise RunError("the disk is full.")

    monkeypatch.setattr(run_folder, "save_adapter", refused)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(RunError) as caught:
        train(config, say=lambda _: None)
    (place,) = (tmp_path / "elsewhere").glob("qlora_sft-adapter-*")
    assert f"the disk is full. What was trained is in {place}: move it away" in str(caught.value)
    assert (place / "adapter_model.safetensors").read_bytes() == whole[0]


def test_a_logger_that_cannot_be_closed_costs_nothing(
    make_config: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(config: Config, run: Path, begin: int, stack: ExitStack) -> TrainerCallback:
        stack.callback(lambda: 1 / 0)
        return TrainerCallback()

    monkeypatch.setitem(reporting.OPEN, "wandb", opened)
    monkeypatch.setattr(sys.modules["qlora_sft.train"], "check_loggers", lambda _: None)
    config, said = make_config(*SHORT, "training.save_steps=0", "training.report_to=[wandb]"), list[str]()
    train(config, say=said.append)
    assert result(Path(config.output)) == whole
    assert "warning: a logger was not closed, because it failed (division by zero); metrics.jsonl has all" in said


# ------------------------------------------------------------------ the folder of a run


def test_two_processes_do_not_train_in_one_folder(make_config: Any, tmp_path: Path) -> None:
    """A lock belongs to an opened folder, so that this process stands for both."""
    config = make_config(*SHORT)
    with held(tmp_path / "run"), pytest.raises(ConfigError, match="another process is training in"):
        train(config, say=lambda _: None)
    assert not (tmp_path / "run").exists()
    with held(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "config.yaml").touch()
    with held(tmp_path / "a" / "run"):
        pass
    assert (tmp_path / "a" / "run" / "config.yaml").exists()


def test_a_trained_adapter_without_checkpoints_is_not_thrown_away(tmp_path: Path, make_config: Any) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has no checkpoint .* is trained to its end; `lora.from: .*--overwrite"):
        train(make_config(*SHORT), resume=True, say=lambda _: None)
    assert (tmp_path / "run" / "adapter").exists()


def test_a_damaged_checkpoint_is_passed_over(whole_config: Config, whole: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole_config.output, tmp_path / "run"))
    (run / "manifest.json").unlink()
    config = replace(whole_config, output=str(run))
    last = run / "checkpoints" / "step-000006"
    assert damage_of(last) == ""
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"):
        content = (last / name).read_bytes()
        for damaged in (None, b"", content[: len(content) // 2]):
            (last / name).unlink() if damaged is None else (last / name).write_bytes(damaged)
            assert damage_of(last).startswith(name.replace("state.pth", "state*.pth") if damaged is None else name)
        (last / name).write_bytes(content)
    (last / "scheduler.pt").unlink()  # transformers would go on without it, and with another rate
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], lines[1][:40] + "\n", *lines[2:]]))
    (run / "before.json").write_text("{")
    said: list[str] = []
    report = train(config, resume=True, say=said.append)
    assert said[0] == f"resume: {last} is damaged (scheduler.pt is missing), so it is not taken"
    assert "metrics.jsonl lacks 1 of the first 4 steps; sums are without them" in said
    assert (report.resumed_at, report.steps) == (4, 5)
    adapter, rows = result(run)
    assert adapter == whole[0]
    assert rows == [row for row in whole[1] if row["step"] != 2]


def test_what_a_run_began_with_is_not_guessed(whole_config: Config, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole_config.output, tmp_path / "run"))
    (run / "manifest.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        assert not damage_of(checkpoint)
    begun = (run / "begun.json").read_text()
    for content in ("", begun[:50]):
        (run / "begun.json").write_text(content)
        with pytest.raises(ConfigError, match=r"begun\.json is damaged"):
            train(replace(whole_config, output=str(run)), resume=True, say=lambda _: None)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no checkpoint of .* is whole; --overwrite begins the run once more"):
        train(replace(whole_config, output=str(run)), resume=True, say=lambda _: None)
