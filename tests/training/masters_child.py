"""Trains a tiny NF4 model and tells what its adapters, gradients and optimizer states were.

``python masters_child.py CONFIG [key=value ...]`` does it in a process of its own, which Unsloth needs: one JSON
document per optimizer step on stdout. The run fails after three steps, and then goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import load_config
from qlora_sft.model.backend import choose_backend


def types(tensors: Any) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


class Stopped(Exception):
    pass


def watched_trainer(seen: list[dict[str, Any]]) -> Any:
    """The run's own trainer, which notes what it works on before and after each micro-batch."""
    import torch

    from qlora_sft.training.trainer import PackedSFTTrainer

    class Watched(PackedSFTTrainer):
        stops = True

        def training_step(self, model: Any, *args: Any) -> Any:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            states = [x for s in self.optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
            if states:
                sizes = [sum(p.nbytes for p in trained), sum(x.nbytes for x in states)]
                step = {"step": self.state.global_step, "bytes": sizes}
                seen.append({**step, "parameters": types(trained), "states": types(states)})
            if self.stops and self.state.global_step == 3:
                raise Stopped
            loss = super().training_step(model, *args)
            seen.append({"gradients": types(p.grad for p in trained)})
            return loss

    return Watched


def watched(file: str | Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Trains, and returns what was seen; the backend is chosen before anything else that is heavy is imported."""
    config = load_config(file, overrides)
    choose_backend(config.model.backend)
    from qlora_sft.train import train
    from qlora_sft.training import fit

    seen: list[dict[str, Any]] = []
    trainer = watched_trainer(seen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "PackedSFTTrainer", trainer)
        with pytest.raises(Stopped):
            train(config, say=lambda text: print(text, file=sys.stderr))
        trainer.stops = False
        train(config, resume=True, say=lambda text: print(text, file=sys.stderr))
    return seen


if __name__ == "__main__":
    # What runs inside a trainer prints to stderr, and Unsloth has something to say on stdout, too.
    for each in watched(sys.argv[1], sys.argv[2:]):
        print(json.dumps(each), file=sys.__stdout__, flush=True)
