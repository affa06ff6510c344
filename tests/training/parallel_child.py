"""Trains in several processes, as `torchrun` starts this file: one run after the other, with what may happen to them.

Usage: torchrun --nproc-per-node 2 parallel_child.py CONFIG HELD_OUT. The runs are written beside the configuration.
With ``killed`` or ``fails`` in place of HELD_OUT there is one run, whose second process ends so in its second step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import SHORT
from torch import Tensor

from qlora_sft.cli import main
from qlora_sft.config import load_config
from qlora_sft.model.base import decoder_layers
from qlora_sft.model.shards import shards_of, tensors_to_cut
from qlora_sft.parallel import rank
from qlora_sft.train import train
from qlora_sft.training.step_group import StepGroup
from qlora_sft.training.trainer import PackedSFTTrainer

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"
Happening = Callable[[int, Tensor], Tensor]
"""Gets the number of steps that are done and the loss of a micro-batch, and returns what the loss becomes."""


def nothing(step: int, loss: Tensor) -> Tensor:
    return loss


def terminated_once() -> Happening:
    sent: list[int] = []

    def happening(step: int, loss: Tensor) -> Tensor:
        if step == 2 and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    return happening


def full(step: int, loss: Tensor) -> Tensor:
    if step == 4:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)
    return loss


def full_once() -> Happening:
    """The second micro-batch of a step finds the GPU full in its backward, once."""
    found: list[int] = []

    def hurt(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    def happening(step: int, loss: Tensor) -> Tensor:
        found.append(step)
        if found.count(5) == 2 and found[-1] == 5:
            loss.register_hook(hurt)
        return loss

    return happening


def not_finite(step: int, loss: Tensor) -> Tensor:
    return loss * (torch.nan if step == 2 else 1)


def note_bytes(model: Any, file: Path) -> None:
    """Writes down what this process has of the frozen weights of the layers, in bytes of storages."""
    shards = shards_of(model)
    if shards is None:
        return
    cut = [each.tensor.untyped_storage() for layer in decoder_layers(model) for each in tensors_to_cut(layer)]
    whole = sum({each._cdata: each.nbytes() for each in cut}.values())
    sizes = {"shards": sum(each.shard.nbytes for each in shards.layers), "whole": whole}
    file.write_text(json.dumps({**sizes, "of": [each.size for each in shards.layers]}), encoding="utf-8")


def run(config: Path, overrides: list[str], happening: Happening = nothing, resume: bool = False) -> None:
    """Trains while ``happening`` happens in the last process, and writes down what was said and how it ended."""
    settings = load_config(config, overrides)
    compute, begin = PackedSFTTrainer.compute_loss, StepGroup.begin
    said: list[str] = []

    def changed(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return happening(self.state.global_step, compute(self, *args, **kwargs))

    def begun(self: Any, batches: Any) -> None:
        note_bytes(self.model, Path(f"{settings.output}.{rank()}.bytes.json"))
        begin(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGroup, "begin", begun)
        if rank() == 1:
            patch.setattr(PackedSFTTrainer, "compute_loss", changed)
        try:
            ended = f"{train(settings, resume=resume, say=said.append).steps} steps"
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
    with Path(f"{settings.output}.{rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"said": said, "ended": ended}) + "\n")


def all_runs(config: Path, held_out: str) -> None:
    """Trains all runs of the tests."""
    beside = config.parent
    assert main(["train", str(config), f"output={beside / 'two'}", "memory.policy=offload", "--json"]) == 0
    run(config, [f"output={beside / 'two_cut'}", "memory.policy=offload", "memory.base_shards=2"])
    # Four micro-batches a step, with evaluations and dropout.
    long = [*SHORT[1:], "training.gradient_accumulation=4", "training.epochs=3", "training.max_steps=6"]
    long = [each for each in long if each != "training.gradient_accumulation=2"]
    long += [f"data.held_out=[{{path: {held_out}}}]", "evaluation.every_steps=3"]
    # Some micro-batches have rows that the base reads too, and what that is to hold is measured before.
    long += [f"data.replay={{path: {beside / 'replay.jsonl'}, share: 0.2}}", "training.replay_kl=0.1", "training.ewc=1"]
    run(config, [*long, f"output={beside / 'whole'}"])
    stopped = [*long, f"output={beside / 'stopped'}"]
    run(config, stopped, terminated_once())
    run(config, stopped, full, resume=True)
    run(config, stopped, full_once(), resume=True)
    # The same with the base cut, and with questions that the first process asks alone.
    cut = [*long, "memory.base_shards=2", "evaluation.answers=1", "evaluation.max_new_tokens=4"]
    run(config, [*cut, f"output={beside / 'cut'}"], full)
    run(config, [*cut, f"output={beside / 'cut'}"], full_once(), resume=True)
    run(config, [*long, f"output={beside / 'left_out'}", "evaluation.every_steps=null"], not_finite)
    run(config, [f"output={beside / 'idle'}", "training.gradient_accumulation=1"])


def one_dies(config: Path, how: str) -> int:
    """Trains a run whose second process ends in its second step."""
    compute = PackedSFTTrainer.compute_loss

    def dying(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if rank() == 1 and self.state.global_step == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the second process has failed")
        return compute(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedSFTTrainer, "compute_loss", dying)
        return main(["train", str(config), f"output={config.parent / how}", "training.save_steps=1"])


if __name__ == "__main__":
    if sys.argv[2] in ("killed", "fails"):
        sys.exit(one_dies(Path(sys.argv[1]), sys.argv[2]))
    all_runs(Path(sys.argv[1]), sys.argv[2])
