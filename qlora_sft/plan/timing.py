"""Estimates the seconds of a run from one decoder layer and the loss, measured on this machine for a few seconds.

A layer of the model's shape with random NF4 weights and LoRA takes a sequence like those of the run, forward and
backward. The time is extrapolated over layers, their tiers and the run's tokens. Loading, evaluation and the
optimizer's steps are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from typing import Any, TypeVar

import torch
from qlora_kernels.offload.tiers import ATTENTION_SHARE, Tier
from torch import Tensor, nn

from qlora_sft.config import Config
from qlora_sft.model.attention import Way
from qlora_sft.model.base import decoder_of
from qlora_sft.model.flash_switch import switch_flash
from qlora_sft.model.head import loss_weight, nf4_linear
from qlora_sft.model.mlp import use_tiled_mlp
from qlora_sft.model.norms import use_lean_norms
from qlora_sft.model.qkv import use_lean_attention
from qlora_sft.plan.blueprint import Blueprint
from qlora_sft.plan.random_model import random_model

Result = TypeVar("Result")

SECONDS = 10.0
# Tokens of the row that is measured, at most, so that it ends in time. Of longer documents attention takes a larger
# share, which is then missed.
LONGEST = {"cuda": 32_768, "cpu": 2_048}


@dataclass(frozen=True)
class Speed:
    """Holds the measured seconds of one layer and of the loss for one sequence of ``tokens``."""

    tokens: int
    documents: int
    forward: float
    backward: float
    """The backward of a layer whose forward was kept."""
    loss: float
    """The output head and the loss, with their gradient."""
    repeats: int

    def seconds_for(self, tiers: tuple[Tier, ...]) -> float:
        """Returns the seconds of one step: forward, recomputation and backward of all layers, and the loss."""
        again = {"keep": 0.0, "attention": 1 - ATTENTION_SHARE, "checkpoint": 1.0, "offload": 1.0}
        layers = sum(self.forward * (1 + again[tier]) + self.backward for tier in tiers)
        return layers + self.loss


def measure(
    blueprint: Blueprint, config: Config, dtype: torch.dtype, documents: list[int], supervised: float, way: Way
) -> Speed:
    """Measures one layer and the loss of the model.

    documents: the lengths of the documents in the measured sequence. supervised: the share of its tokens that are.
    way: how the run will attend.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = shortened(documents, LONGEST[device.type])
    tokens = sum(documents)
    switch_flash(way if device.type == "cuda" else "varlen")
    model = one_layer(blueprint, config, dtype, device, way)
    hidden = torch.randn(1, tokens, blueprint.hidden, dtype=dtype, device=device, requires_grad=True)
    bounds = torch.tensor([0, *accumulate(documents)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in documents])[None]
    inputs: dict[str, Any] = {"position_ids": positions, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    inputs |= {"max_length_q": max(documents), "max_length_k": max(documents), "use_cache": False}

    def layer() -> tuple[float, float]:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            forward, out = _timed(device, lambda: model(inputs_embeds=hidden, **inputs).last_hidden_state)
        backward, _ = _timed(device, lambda: out.backward(torch.ones_like(out)))
        return forward, backward

    loss = _loss(blueprint, dtype, device, tokens, max(1, round(supervised * tokens)))
    layer(), loss()  # the first time includes compilation and first allocations
    timed: list[tuple[float, float, float]] = []
    end = time.perf_counter() + SECONDS
    while not timed or time.perf_counter() < end:
        timed.append((*layer(), loss()))
    forward, backward, of_loss = (median(column) for column in zip(*timed, strict=True))
    return Speed(tokens, len(documents), forward, backward, of_loss, len(timed))


def shortened(documents: list[int], most: int) -> list[int]:
    """Returns as many documents as ``most`` tokens hold. The first one is cut if it alone is longer."""
    total = 0
    kept: list[int] = []
    for length in documents:
        if total + length > most:
            break
        total, kept = total + length, [*kept, length]
    return kept or [most]


def one_layer(
    blueprint: Blueprint, config: Config, dtype: torch.dtype, device: torch.device, way: Way = "varlen"
) -> nn.Module:
    """Returns the decoder of the model's shape with its first layer only."""
    settings = deepcopy(blueprint.config)
    settings.num_hidden_layers, settings.vocab_size = 1, 8
    settings.pad_token_id = settings.bos_token_id = settings.eos_token_id = None
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[:1]
    model = random_model(settings, config, dtype, device, way)
    use_lean_norms(model)
    use_lean_attention(model)
    use_tiled_mlp(model, config.memory.tiled_mlp, LONGEST[device.type])
    decoder: nn.Module = decoder_of(model)
    return decoder


def _loss(
    blueprint: Blueprint, dtype: torch.dtype, device: torch.device, tokens: int, supervised: int
) -> Callable[[], float]:
    """Returns the function that measures one forward and backward of the loss."""
    from qlora_kernels.packed_ce import Targets, packed_linear_cross_entropy

    head: Any = torch.randn(blueprint.vocabulary, blueprint.hidden, dtype=dtype, device=device) * 0.02
    if blueprint.head_in_4bit:
        plain = torch.nn.Linear(blueprint.hidden, blueprint.vocabulary, bias=False, device="meta")
        head = loss_weight(nf4_linear(plain, head, dtype))
    hidden = torch.randn(tokens, blueprint.hidden, dtype=dtype, device=device, requires_grad=True)
    # The last token of a row has none that follows it.
    rows = torch.arange(min(supervised, max(1, tokens - 1)), dtype=torch.int32, device=device)
    ids = torch.randint(0, blueprint.vocabulary, rows.shape, dtype=torch.int32, device=device)
    targets = Targets.from_host(rows, ids, torch.zeros_like(rows), 1)

    def once() -> Tensor:
        loss = packed_linear_cross_entropy(hidden, head, targets).loss
        loss.backward()
        return loss

    return lambda: _timed(device, once)[0]


def _timed(device: torch.device, action: Callable[[], Result]) -> tuple[float, Result]:
    """Runs ``action`` and returns its seconds and its result, when the device has finished."""
    _wait(device)
    start = time.perf_counter()
    result = action()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    """Waits until a GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
