"""What a run's settings come to before anything is loaded: its steps, and its optimizer. Imports nothing heavy."""

from __future__ import annotations

import math

from qlora_sft.config import Config


def count_steps(n_sequences: int, config: Config) -> int:
    """Optimizer steps of the run. The last group of an epoch may be smaller."""
    t = config.training
    steps = math.ceil(math.ceil(n_sequences / t.batch_size) / t.gradient_accumulation)
    return min(steps, t.max_steps) if t.max_steps else steps


def choose_optimizer(config: Config, on_gpu: bool) -> tuple[str, str]:
    """(name as transformers knows it, reason)."""
    if config.training.optimizer != "auto":
        return config.training.optimizer, "as configured"
    if on_gpu:
        return "adamw_8bit", "its states take 2 bytes per parameter"
    return "adamw_torch_fused", "bitsandbytes has no 8-bit optimizer for a CPU"
