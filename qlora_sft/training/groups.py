"""Sorts the trained parameters into the optimizer's groups, by learning rate and weight decay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from torch.nn import Parameter

from qlora_sft.config import Config

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

NEW_ROWS = "trainable_tokens_delta"


class Group(TypedDict):
    """Holds parameters that share a learning rate and a decay."""

    params: list[Parameter]
    lr: float
    weight_decay: float


def parameter_groups(model: CausalModel, config: Config, rows_decay: bool = False) -> list[Group]:
    """Returns the groups of all trained parameters of ``model``; the first has the learning rate of the run.

    The factors of adapters decay. Magnitudes and rows of new tokens do not, because decay towards zero would not bring
    them closer to the base. Factors B have a rate of their own with ``lora.plus_ratio``, and new tokens with
    ``training.new_tokens_rate``.

    rows_decay: whether rows of new tokens are in the group of the factors, as in a run that an earlier version began.
    """
    t, ratio = config.training, config.lora.plus_ratio
    factors, others, second, rows = (Group(params=[], lr=t.learning_rate, weight_decay=0.0) for _ in range(4))
    factors["weight_decay"] = second["weight_decay"] = t.weight_decay
    second["lr"] *= ratio or 1.0
    rows["lr"] = t.new_tokens_rate or t.learning_rate
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if NEW_ROWS in name and rows_decay:
            group = factors
        elif NEW_ROWS in name:
            group = rows if t.new_tokens_rate is not None else others
        elif ".lora_B." in name:
            group = second if ratio is not None else factors
        else:
            group = factors if ".lora_A." in name else others
        group["params"].append(parameter)
    # The first two are there in any case, as in the checkpoints of runs without rates of their own.
    return [factors, others, *(group for group in (second, rows) if group["params"])]


def may_decay_rows(checkpoint: Path) -> bool:
    """Says whether ``checkpoint`` has a single group, with rows of new tokens beside the factors, as earlier versions
    wrote it."""
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    return [bool(group["params"]) for group in saved] == [True, False]


def describe_rates(groups: list[Group], config: Config) -> str:
    """Says which rates there are beside the run's own; "" if there is none."""
    told = []
    if config.lora.plus_ratio is not None:
        told.append(f"{config.lora.plus_ratio * config.training.learning_rate:g} for B (lora.plus_ratio)")
    if config.training.new_tokens_rate is not None:
        has_rows = len(groups) > 2 + (config.lora.plus_ratio is not None)
        told.append(
            f"{config.training.new_tokens_rate:g} for new tokens"
            if has_rows
            else "new_tokens_rate unused: no new tokens"
        )
    return "; ".join(told)
