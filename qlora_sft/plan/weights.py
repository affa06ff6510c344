"""Counts the bytes that stay on the device all the time: weights, adapters, gradients and optimizer states. Exact.

Every function is checked, tensor by tensor, against a loaded model after an optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qlora_sft.config import Config
from qlora_sft.model.memory_budget import optimizer_bytes
from qlora_sft.model.shards import layer_bytes, whole_bytes
from qlora_sft.plan.blueprint import Blueprint, Linear, Stack

# bitsandbytes: one uint8 per 64 weights (their absolute maximum, itself quantised), one float32 per 256 of those.
NF4_BLOCK, NESTED_BLOCK = 64, 256
# float32 tables of 16 and 256 values, and the mean that was subtracted before the maxima were quantised; per layer.
NF4_TABLE = 16 * 4
NF4_TABLES = (16 + 256 + 1) * 4
LORA_BYTES = 4  # LoRA and its gradients are float32


@dataclass(frozen=True)
class Residents:
    """Holds the bytes that stay on the device, by what they are for."""

    nf4: int
    full: int
    """Tensors that stay in the compute type: embeddings, head, norms, biases."""
    buffers: int
    adapters: int
    gradients: int
    optimizer: int
    base_shards: int = 1
    shards: int = 0
    """What this process has of the weights that are cut over several (``memory.base_shards``), one shard of each layer;
    they are in none of the other figures."""
    fetched: int = 0
    """The layers of them that are whole at a time."""

    @property
    def loaded(self) -> int:
        """Returns the bytes of the model while it is trained, without gradients."""
        return self.nf4 + self.full + self.buffers + self.adapters + self.shards + self.fetched

    @property
    def total(self) -> int:
        """Returns the bytes of everything that stays on the device."""
        return self.loaded + self.gradients + self.optimizer


def residents(
    blueprint: Blueprint, config: Config, dtype: torch.dtype, optimizer: str, on_gpu: bool = False
) -> Residents:
    """Counts what stays on the device that has the layers.

    With ``memory.offload_embeddings`` a GPU has no input embedding, and with ``memory.base_shards`` one shard of the
    layers.
    """
    quantized = quantized_names(blueprint)
    full = sum(shape.numel() for name, shape in blueprint.parameters.items() if name not in quantized)
    if on_gpu and config.memory.offload_embeddings:
        full -= blueprint.input_embedding
    adapters = adapter_tensors(blueprint, config.lora.r)
    held = Residents(
        nf4=sum(
            nf4_bytes(linear.inputs * linear.outputs, blueprint.nested)
            for linear in blueprint.linears
            if linear.quantized
        )
        + sum(stack_bytes(stack) for stack in blueprint.stacks if stack.quantized),
        full=full * dtype.itemsize,
        # PEFT keeps the rows of added tokens as they began.
        buffers=blueprint.buffer_bytes + sum(row_tensors(blueprint)) * LORA_BYTES,
        adapters=sum(adapters) * LORA_BYTES,
        gradients=sum(adapters) * LORA_BYTES,
        optimizer=optimizer_bytes(adapters, "8bit" in optimizer),
    )
    return _cut(held, blueprint, dtype, config.memory.base_shards) if config.memory.base_shards > 1 else held


def _cut(held: Residents, blueprint: Blueprint, dtype: torch.dtype, shards: int) -> Residents:
    """Returns what stays on one of so many devices over which the frozen weights of the layers are cut."""
    in_nf4 = [_cut_in_nf4(blueprint, number) for number in range(blueprint.n_layers)]
    in_full = [_cut_in_full(blueprint, number, dtype) for number in range(blueprint.n_layers)]
    layers = [layer_bytes([*packed, *full], shards) for packed, full in zip(in_nf4, in_full, strict=True)]
    return replace(
        held,
        nf4=held.nf4 - sum(map(sum, in_nf4)),
        full=held.full - sum(map(sum, in_full)),
        base_shards=shards,
        shards=sum(layers) // shards,
        fetched=whole_bytes(layers),
    )


def _cut_in_nf4(blueprint: Blueprint, number: int) -> list[int]:
    """Returns the bytes of packed weights and of their scales in a decoder layer, tensor by tensor."""
    found = []
    for linear in blueprint.layer(number):
        if linear.quantized and f"{linear.name}.weight" not in blueprint.shared:
            count = linear.inputs * linear.outputs
            found += [_ceil(count, 2), _ceil(count, NF4_BLOCK) * (1 if blueprint.nested else 4)]
    for stack in blueprint.stacks:
        if stack.block == number and stack.quantized and stack.name not in blueprint.shared:
            units, count = stack.count * stack.parts, stack.inputs * stack.outputs // stack.parts
            found += [units * _ceil(count, 2), units * _ceil(count, NF4_BLOCK)]
    return found


def _cut_in_full(blueprint: Blueprint, number: int, dtype: torch.dtype) -> list[int]:
    """Returns the bytes of the matrices of a decoder layer that are not quantised, tensor by tensor."""
    here, quantized = f"{blueprint.prefix}{number}.", quantized_names(blueprint)
    return [
        shape.numel() * dtype.itemsize
        for name, shape in blueprint.parameters.items()
        if name.startswith(here) and len(shape) > 1 and name not in quantized and name not in blueprint.shared
    ]


def quantized_names(blueprint: Blueprint) -> set[str]:
    """Returns the names of all parameters in NF4."""
    linears = {f"{linear.name}.weight" for linear in blueprint.linears if linear.quantized}
    return linears | {stack.name for stack in blueprint.stacks if stack.quantized}


def nf4_bytes(count: int, nested: bool = True) -> int:
    """Returns the bytes of ``count`` weights in NF4: 4.127 bits each and the tables; 4.5 bits and one table if the
    scales are not quantised themselves (``nested``)."""
    blocks = _ceil(count, NF4_BLOCK)
    if not nested:
        return _ceil(count, 2) + 4 * blocks + NF4_TABLE
    return _ceil(count, 2) + blocks + 4 * _ceil(blocks, NESTED_BLOCK) + NF4_TABLES


def stack_bytes(stack: Stack) -> int:
    """Returns the bytes of a stack of experts in NF4. Every part has scales of its own; all share one table."""
    units = stack.count * stack.parts
    tables = NF4_TABLES - LORA_BYTES  # without the mean
    return units * (nf4_bytes(stack.inputs * stack.outputs // stack.parts) - tables) + tables


def adapter_tensors(blueprint: Blueprint, rank: int) -> list[int]:
    """Returns the elements of every A [rank, inputs] and B [outputs, rank], of DoRA's magnitudes, and of the trained
    rows of added tokens. rank: of the adapters of experts; a layer has its own."""
    adapted = [linear for linear in blueprint.linears if linear.adapted]
    lora = [size for linear in adapted for size in _lora(linear, linear.rank)]
    lora += [linear.outputs for linear in adapted] if blueprint.dora else []
    experts = [stack.count * size for stack in blueprint.stacks if stack.adapted for size in _lora(stack, rank)]
    return lora + experts + row_tensors(blueprint)


def row_tensors(blueprint: Blueprint) -> list[int]:
    """Returns the elements of the trained rows of each matrix that has some."""
    return [blueprint.added_rows * blueprint.hidden] * blueprint.trained_matrices


def _lora(linear: Linear | Stack, rank: int) -> tuple[int, int]:
    return rank * linear.inputs, rank * linear.outputs


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
