"""The road of a GPU without bfloat16 (a T4): float16 with a gradient scaler, one call of sdpa per document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests_support import SHORT, result
from torch import Tensor

from qlora_sft.errors import RunError
from qlora_sft.train import train
from qlora_sft.training import trainer as module
from qlora_sft.training.step_group import StepGroup
from qlora_sft.training.trainer import PackedSFTTrainer

FLOAT16 = ["model.dtype=float16", "model.attention=sdpa"]


def with_losses(patch: pytest.MonkeyPatch, change: Callable[[int, Tensor], Tensor]) -> None:
    compute = PackedSFTTrainer.compute_loss

    def changed(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return change(self.state.global_step, compute(self, *args, **kwargs))

    patch.setattr(PackedSFTTrainer, "compute_loss", changed)


def metrics_of(config: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def too_large_in(*steps: int) -> Callable[[int, Tensor], Tensor]:
    """A loss whose gradient float16 cannot hold, in the steps of these numbers, from 0."""
    return lambda step, loss: loss * 1e8 if step in steps else loss


def test_thirty_steps_learn_with_float32_masters(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    types: set[torch.dtype] = set()
    step = torch.optim.AdamW.step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained = [p for group in self.param_groups for p in group["params"]]
        types.update(tensor.dtype for p in trained for tensor in (p, p.grad))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    config = make_config(
        *FLOAT16, "model.load_in_4bit=true", "training.max_steps=30", "training.epochs=3", "data.packing=none",
        "training.learning_rate=1e-2",
    )  # fmt: skip
    said: list[str] = []
    report = train(config, say=said.append)
    rows = metrics_of(config)
    assert report.steps == len(rows) == 30
    assert report.dtype == "float16"
    assert report.train_loss.last < report.train_loss.first - 0.2
    assert types == {torch.float32}
    saved = load_file(Path(config.output) / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert report.steps_left_out == sum(row["grad_norm"] is None for row in rows)
    assert rows[-1]["loss_scale"] == 65536 / 2**report.steps_left_out


def test_a_step_too_large_for_float16_is_left_out_counted_and_said(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_losses(monkeypatch, too_large_in(2))
    said: list[str] = []
    config = make_config(*SHORT, *FLOAT16)
    report = train(config, say=said.append)
    assert (report.steps, report.steps_left_out) == (6, 1)
    rows = metrics_of(config)
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [3]
    assert [row["loss_scale"] for row in rows] == [65536] * 2 + [32768] * 4
    left_out = "step 3 left out: its gradient is not finite in float16 (rows 4 to 5 of order.json, from chat)"
    assert f"{left_out}; the scale of the loss is now 32768" in said


def test_a_run_goes_on_with_the_scale_that_it_had(make_config: Any, tmp_path: Path) -> None:
    def stop(step: int, loss: Tensor) -> Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return too_large_in(1)(step, loss)

    whole = make_config(*SHORT, *FLOAT16)
    with pytest.MonkeyPatch.context() as patch:
        with_losses(patch, too_large_in(1))
        train(whole, say=lambda _: None)
    stopped = make_config(*SHORT, *FLOAT16, f"output={tmp_path / 'stopped'}")
    with pytest.MonkeyPatch.context() as patch:
        with_losses(patch, stop)
        with pytest.raises(Exception, match="interrupted"):
            train(stopped, say=lambda _: None)
    report = train(stopped, resume=True, say=lambda _: None)
    assert (report.resumed_at, report.steps, report.steps_left_out) == (4, 6, 1)
    assert metrics_of(stopped)[-1]["loss_scale"] == 32768
    assert result(Path(stopped.output)) == result(Path(whole.output))


def test_gradients_that_no_scale_makes_finite_end_the_run(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_losses(monkeypatch, lambda step, loss: loss * torch.nan)
    config = make_config(*FLOAT16, "training.max_steps=20", "training.epochs=2", "data.packing=none")
    with pytest.raises(RunError, match=r"step 17 is not finite in float16 whatever .*model\.dtype"):
        train(config, say=lambda _: None)
    assert not (Path(config.output) / "adapter").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_layers_compute_in_the_type_of_the_run(make_config: Any, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """As evaluation and plan have it: else LoRA's products would be float32 ones, of inputs kept in float32."""
    seen: list[Any] = []
    own = module.loss_of

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return own(*args, **kwargs)

    monkeypatch.setattr(module, "loss_of", noted)
    train(make_config(f"model.dtype={dtype}", "training.max_steps=2"), say=lambda _: None)
    assert seen == [getattr(torch, dtype)] * 2


def test_a_process_without_a_micro_batch_can_undo_the_scale_of_the_others_gradients() -> None:
    """Its scaler is given no loss of its own before gradients are shortened."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = torch.nn.Parameter(torch.zeros(2))
    model: Any = torch.nn.Module()
    group = StepGroup(model, SimpleNamespace(scaler=scaler, device=torch.device("cpu")), lambda _: False)
    batch: Any = {"lengths": []}
    group.begin([batch])
    assert group.next_loss(batch, lambda _: torch.ones(())).item() == 0
    weight.grad = torch.full((2,), 24.0)  # of another process, which has scaled its loss
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert weight.tolist() == [-3.0, -3.0]
