"""A bad step costs that step, or nothing; what cannot go on says why and keeps what is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import SHORT, result
from torch import Tensor
from transformers import LlamaConfig
from trl import SFTTrainer

from qlora_sft.errors import EndedTogether, RunError
from qlora_sft.train import train
from qlora_sft.training.run_folder import save_adapter
from qlora_sft.training.trainer import PackedSFTTrainer


def with_losses(patch: pytest.MonkeyPatch, change: Callable[[int, Tensor], Tensor]) -> None:
    """``change(steps done, loss)`` is what every micro-batch's loss becomes."""
    compute = PackedSFTTrainer.compute_loss

    def changed(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return change(self.state.global_step, compute(self, *args, **kwargs))

    patch.setattr(PackedSFTTrainer, "compute_loss", changed)


def test_a_step_without_a_finite_gradient_is_left_out(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(*SHORT)
    with_losses(monkeypatch, lambda step, loss: loss * (torch.nan if step == 2 else 1))
    weights: list[Tensor] = []
    take = PackedSFTTrainer.get_batch_samples

    def noted(self: Any, *args: Any) -> Any:
        weights.append(torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad]))
        return take(self, *args)

    monkeypatch.setattr(PackedSFTTrainer, "get_batch_samples", noted)
    said: list[str] = []
    report = train(config, say=said.append)
    assert (report.steps, report.steps_left_out) == (6, 1)
    assert [torch.equal(a, b) for a, b in pairwise(weights)] == [False, False, True, False, False]
    assert all(each.isfinite().all() for each in weights)
    assert "step 3 left out: its gradient is not finite (rows 4 to 5 of order.json, from chat)" in said
    rows = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [3]


def test_no_gradient_at_all_ends_the_run_with_the_cure(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_losses(monkeypatch, lambda step, loss: loss * (torch.inf if step >= 2 else 1))
    with pytest.raises(
        RunError, match=r"gradients of steps 3 to 5 are not finite.*lower .*learning_rate.*step-000004 is complete"
    ):
        train(make_config(*SHORT), say=lambda _: None)


def full(_: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_full_gpu_costs_nothing_but_time(make_config: Any, tmp_path: Path, whole: Any) -> None:
    """In the second micro-batch of the third step, in its backward: the first has left its gradient, and dropout has
    drawn its numbers."""
    config = make_config(*SHORT, f"output={tmp_path / 'full'}")
    calls: list[int] = []

    def change(step: int, loss: Tensor) -> Tensor:
        calls.append(step)
        if calls.count(2) == 2 and len(calls) == 6:
            loss.register_hook(full)
        return loss

    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        with_losses(patch, change)
        report = train(config, say=said.append)
    assert calls.count(2) == 4
    assert report.memory.tiers == ["checkpoint", "checkpoint"]
    assert "2 checkpoint (CUDA out of memory. Tried to allocate 2 GiB)" in "\n".join(said)
    assert result(Path(config.output)) == whole


def test_a_gpu_that_stays_full_keeps_what_is_done(make_config: Any, tmp_path: Path, whole: Any) -> None:
    config = make_config(*SHORT, f"output={tmp_path / 'full'}")
    with pytest.MonkeyPatch.context() as patch:
        with_losses(patch, lambda step, loss: full(loss) if step == 3 else loss)
        with pytest.raises(RunError, match=r"as little kept as possible.*step-000003 is complete, --resume goes on"):
            train(config, say=lambda _: None)
    report = train(config, resume=True, say=lambda _: None)
    assert report.resumed_at == 3
    assert result(Path(config.output)) == whole


@pytest.mark.parametrize("step", [1, 4], ids=["first", "later"])
def test_a_gpu_that_is_full_in_an_update_ends_the_run_with_what_is_left(
    step: int, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's states are made in its first step."""
    config = make_config(*SHORT)
    steps: list[int] = []
    own = torch.optim.AdamW.step

    def update(self: Any, *arguments: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return own(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    with pytest.raises(RunError) as caught:
        train(config, say=lambda _: None)
    assert "updates the weights (CUDA out of memory. Tried to allocate 2 GiB)" in str(caught.value)
    assert "paged_adamw_8bit" in str(caught.value)
    checkpoints = Path(config.output) / "checkpoints"
    assert [folder.name for folder in checkpoints.glob("*")] == ([] if step == 1 else ["step-000002"])


def test_an_update_that_is_not_finite_ends_the_run_and_is_never_saved(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is finite; the fourth step's learning rate is not."""
    config = make_config(*SHORT)
    own = torch.optim.AdamW.step

    def update(self: Any, *arguments: Any, **options: Any) -> Any:
        if len(list((Path(config.output) / "metrics.jsonl").open())) == 3:
            self.param_groups[0]["lr"] = torch.inf
        return own(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    with pytest.raises(RunError) as caught:
        train(config, say=lambda _: None)
    assert caught.value.exit_code == 1
    assert "step 4 made values of the adapter that are not finite (learning rate inf, rows 6 to 7" in str(caught.value)
    assert "step-000002 is complete, --resume goes on from there" in str(caught.value)
    assert not (Path(config.output) / "adapter").exists()
    assert [folder.name for folder in (Path(config.output) / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_adapter_with_a_value_that_is_not_finite_is_not_written(value: float, tmp_path: Path) -> None:
    class Model(torch.nn.Linear):
        config = LlamaConfig()

        def save_pretrained(self, folder: Path, **_: Any) -> None:
            (folder / "weights").write_bytes(b"")

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer").write_bytes(b"")

    model = Model(3, 3)
    save_adapter(model, Tokenizer(), tmp_path / "adapter")
    with torch.no_grad():
        model.weight[1, 2] = value
    with pytest.raises(RunError, match="values that are not finite"):
        save_adapter(model, Tokenizer(), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_run_in_which_every_step_is_left_out_fails(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def hurt(step: int, loss: Tensor) -> Tensor:
        loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss

    with_losses(monkeypatch, hurt)
    with pytest.raises(RunError, match="no step had a finite gradient"):
        train(make_config(*SHORT, "training.max_steps=2"), say=lambda _: None)


def test_a_loss_that_only_rises_is_said(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_losses(monkeypatch, lambda step, loss: -loss)
    said: list[str] = []
    report = train(make_config("training.learning_rate=1e-2", "data.packing=none"), say=said.append)
    assert report.train_loss.rose
    assert any("the training loss rose" in text.splitlines()[-1] for text in said)


class TwoRanks:
    """Are this process and one that answers what it is told."""

    def __init__(self, first: bool, other: str | None):
        self.first, self.other = first, other

    def gather(self, own: str | None) -> list[str | None]:
        return [own, self.other]


FULL, BROKEN = OSError(122, "Disk quota exceeded"), RunError("values that are not finite")


@pytest.mark.parametrize(
    ("own", "other", "ends"),
    [
        (None, None, None),
        (FULL, None, None),
        (None, "the disk is full (theirs)", None),
        (BROKEN, None, RunError),
        (BROKEN, "", RunError),
        (None, "", EndedTogether),
        (FULL, "", EndedTogether),
    ],
    ids="none full full_there broken both_broken broken_there full_and_broken_there".split(),
)
@pytest.mark.parametrize("first", [True, False])
def test_of_a_checkpoint_that_one_process_cannot_write_it_says_why(
    first: bool, own: Exception | None, other: str | None, ends: type[Exception] | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A full disk costs all of them the checkpoint only. Any other error is raised by the process that has it."""

    def save(self: Any, *_: object) -> None:
        if own is not None:
            raise own
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")

    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", save)
    said: list[str] = []
    trainer: Any = PackedSFTTrainer.__new__(PackedSFTTrainer)
    trainer.ranks, trainer.run, trainer.watch, trainer.say = TwoRanks(first, other), tmp_path, None, said.append
    trainer.state = SimpleNamespace(global_step=2)
    trainer.args = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=2)
    with pytest.raises(ends) if ends else nullcontext():
        trainer._save_checkpoint(None, None)
    published = [folder.name for folder in tmp_path.glob("checkpoints/*")]
    assert published == (["step-000002"] if first and own is None and other is None else [])
    full = ends is None and not (own is None and other is None)
    assert len(said) == full
    assert all("checkpoint not written, training goes on" in text and "the disk is full" in text for text in said)
