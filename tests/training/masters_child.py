"""Trains a tiny NF4 model in a process of its own and prints what its adapters, gradients and optimizer states were.

``python masters_child.py CONFIG [key=value ...]``: one JSON document per optimizer step on stdout. The run fails after
three steps, and then goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def types(tensors: Any) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def tell(seen: dict[str, Any]) -> None:
    """Prints to the process's own stdout; what runs inside a trainer prints to stderr."""
    print(json.dumps(seen), file=sys.__stdout__, flush=True)


class Stopped(Exception):
    pass


def watched_trainer() -> Any:
    """The run's own trainer, which prints what it works on before and after each micro-batch."""
    import torch

    from qlora_sft.training.trainer import PackedSFTTrainer

    class Watched(PackedSFTTrainer):
        stops = True

        def training_step(self, model: Any, *args: Any) -> Any:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            states = [x for s in self.optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
            if states:
                sizes = [sum(p.nbytes for p in trained), sum(x.nbytes for x in states)]
                seen = {"step": self.state.global_step, "bytes": sizes}
                tell({**seen, "parameters": types(trained), "states": types(states)})
            if self.stops and self.state.global_step == 3:
                raise Stopped
            loss = super().training_step(model, *args)
            tell({"gradients": types(p.grad for p in trained)})
            return loss

    return Watched


def main(file: str, *overrides: str) -> None:
    from qlora_sft.config import load_config
    from qlora_sft.model.backend import choose_backend

    config = load_config(file, overrides)
    choose_backend(config.model.backend)
    from qlora_sft.train import train
    from qlora_sft.training import trainer

    watched = watched_trainer()
    trainer.PackedSFTTrainer = watched  # type: ignore[misc]
    try:
        train(config, say=lambda text: print(text, file=sys.stderr))
    except Stopped:
        watched.stops = False
    train(config, resume=True, say=lambda text: print(text, file=sys.stderr))


if __name__ == "__main__":
    main(*sys.argv[1:])
