"""What goes wrong beside the training costs no more than itself: figures, a checkpoint, lines of a log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import conversation, write_rows
from tests_support import SHORT

from qlora_sft.config import Config
from qlora_sft.errors import Interrupted
from qlora_sft.evaluation import evaluate, held_out
from qlora_sft.page.facts import read_run
from qlora_sft.run.folder import Run
from qlora_sft.run.report import RunReport
from qlora_sft.train import train
from qlora_sft.training.trainer import PackedSFTTrainer

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
    assert (Path(config.output) / "report.html").is_file()


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
