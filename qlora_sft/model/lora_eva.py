"""Lets adapters begin in the directions in which the training data varies most (EVA): the rows of A are the first
principal components of what goes into each layer, B is zero, so the model begins as its base.

The components are found by subspace iteration on the covariance: a few passes over the first tokens, in which only the
products with as many directions as the rank are kept, never a matrix of inputs or a covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError
from qlora_sft.model.lora_init import adapted_layers, put_factors
from qlora_sft.model.loss import last_hidden_states, to_device

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from qlora_sft.model.base import CausalModel

TOKENS, LONGEST = 8192, 2048
PASSES, MORE_DIRECTIONS = 4, 8


@dataclass
class _Input:
    """Holds what is known of one input: the layers that get it, and sums over the tokens of a pass."""

    layers: list[LoraLayer]
    directions: Tensor
    """[width, k]"""
    product: Tensor
    """[width, k]: the sum of x (x . directions) over the tokens x."""
    total: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Counts the tokens [..., width] of one batch."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.product += flat.T @ (flat @ self.directions)
        self.total += flat.sum(0)
        self.count += len(flat)

    def take(self) -> Tensor:
        """Returns the covariance's product with the directions, and begins anew."""
        found = self.product - torch.outer(self.total, self.total @ self.directions) / self.count
        self.product, self.total, self.count = torch.zeros_like(found), torch.zeros_like(self.total), 0
        return found


@torch.no_grad()
def begin_from_data(
    model: CausalModel, documents: Sequence[Rendered], sequences: list[list[int]], dtype: torch.dtype, seed: int
) -> str:
    """Gives every A the principal components of its layer's input over the first documents; says what it did."""
    batches = list(_first(documents, sequences))
    model.eval()  # dropout would count as variation
    try:
        first = batches[0]["input_ids"][0, : batches[0]["lengths"][0]].tolist()
        alone = flatten(
            [Rendered(first, [0.0] * len(first), "")]
        )  # where documents run one by one, layers are called once
        inputs = _inputs(model, lambda: _run(model, alone, dtype), seed)
        for number in range(PASSES):
            hooks = [each.layers[0].register_forward_pre_hook(_counts(each)) for each in inputs]
            try:
                for batch in batches:
                    _run(model, batch, dtype)
            finally:
                for hook in hooks:
                    hook.remove()
            for each in inputs:
                seen = each.take()
                each.directions = torch.linalg.qr(seen)[0] if number < PASSES - 1 else _ordered(each.directions, seen)
    finally:
        model.train()
    for each in inputs:
        for layer in each.layers:
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            put_factors(layer, each.directions.T[: len(A)], torch.zeros_like(B))
    tokens, layers = sum(batch["input_ids"].numel() for batch in batches), sum(len(each.layers) for each in inputs)
    return f"A of {layers} layers is the principal components of their input over {tokens:,} tokens (lora.init=eva)"


def _first(documents: Sequence[Rendered], sequences: list[list[int]]) -> Iterator[Batch]:
    """Yields the first documents in the order of training, until there are enough tokens."""
    seen = 0
    for sequence in sequences:
        chosen = []
        for index in sequence if seen < TOKENS else ():
            ids = list(documents[index].input_ids[: min(LONGEST, TOKENS - seen)])
            if ids:
                chosen.append(Rendered(ids, [0.0] * len(ids), documents[index].source))
                seen += len(ids)
        if chosen:
            yield flatten(chosen)


def _run(model: CausalModel, batch: Batch, dtype: torch.dtype) -> None:
    device = model.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        last_hidden_states(model, to_device(batch, device))


def _counts(of: _Input) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        of.add(args[0])

    return hook


def _inputs(model: CausalModel, run: Callable[[], None], seed: int) -> list[_Input]:
    """Runs the model once to see which layers get the very same input; each input begins with random directions."""
    calls: list[tuple[Tensor, LoraLayer]] = []
    layers = [layer for _, layer in adapted_layers(model)]
    hooks = [each.register_forward_pre_hook(lambda layer, args: calls.append((args[0], layer))) for each in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[int, list[LoraLayer]] = {}
    for x, layer in calls:
        groups.setdefault(id(x), []).append(layer)
    called = {id(layer) for _, layer in calls}
    if len(calls) != len(layers) or len(called) != len(layers):
        raise ConfigError("lora.init: eva looks at what goes into each layer, and some are not called; take another")
    draw = torch.Generator().manual_seed(seed)
    return [_begun(group, draw) for group in groups.values()]


def _begun(layers: list[LoraLayer], draw: torch.Generator) -> _Input:
    ranks, width = [len(layer.lora_A["default"].weight) for layer in layers], layers[0].in_features
    if max(ranks) > width:
        raise ConfigError(f"lora.init: eva needs ranks of at most the width of a layer's input, {width}; take another")
    device = layers[0].lora_A["default"].weight.device
    directions = torch.randn(width, min(width, max(ranks) + MORE_DIRECTIONS), generator=draw).to(device)
    return _Input(layers, directions, torch.zeros_like(directions), torch.zeros(width, device=device))


def _ordered(directions: Tensor, seen: Tensor) -> Tensor:
    """Returns the principal components inside the span of orthonormal ``directions``, the largest first."""
    _, vectors = torch.linalg.eigh(directions.T @ seen)
    ordered: Tensor = directions @ vectors.flip(1)
    return ordered
