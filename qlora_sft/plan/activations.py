"""Bytes that a decoder layer keeps from its forward to its backward, and the loss, from shapes alone.

What autograd saves in transformers' Llama-like layers with PEFT's LoRA on bitsandbytes' linear layers. Per token, with
D hidden, F intermediate, H query and G key heads of size d, r the rank, s bytes per value (2 under autocast)::

    RMSNorm over w values      4 w + 4       its input in float32, and the reciprocal root
    inputs of LoRA layers      s D | s H d | s D | s F      of q k v | o | gate up | down, one tensor for each group
    after A                    s r           of each LoRA layer
    attention                  s (H + 2 G) d + s H d + 4 H      q, k, v after rotation, the result, the log-sum-exp
    activation function        3 s F         its input, its result, and up

On a GPU attention's result is the input of o, and counts once. LoRA's weights are kept once more in 16 bits. On a CPU,
and on 16-bit layers, PEFT takes no notice of autocast and casts to float32 and back, so each LoRA layer has an input
of its own; on a CPU the documents' results are joined into a copy. Frozen layers keep nothing: the gradient of their
input needs only the weight.
"""

from __future__ import annotations

import torch
from qlora_kernels.offload.tiers import LayerBytes
from qlora_kernels.packed_ce.tiled import block_shape

from qlora_sft.config import LoraConfig
from qlora_sft.errors import ConfigError
from qlora_sft.plan.blueprint import Blueprint, Linear, Norm

QKV, OUT, GATE_UP, DOWN = {"q_proj", "k_proj", "v_proj", "qkv_proj"}, {"o_proj"}, {"gate_proj", "up_proj", "gate_up_proj"}, {"down_proj"}  # fmt: skip  # noqa: E501
GROUPS = (QKV, OUT, GATE_UP, DOWN)


def layer_bytes(blueprint: Blueprint, tokens: int, lora: LoraConfig, dtype: torch.dtype, on_gpu: bool) -> LayerBytes:
    """Of the largest decoder layer, for one row of ``tokens``. `ConfigError` if they are not Llama-like."""
    heads, _, size = blueprint.heads
    each = [_Layer(blueprint, number, lora, dtype, on_gpu) for number in range(blueprint.n_layers)]
    for layer in each:
        layer.require_known()
    return LayerBytes(
        input=tokens * blueprint.hidden * dtype.itemsize,
        attention=tokens * heads * (size * dtype.itemsize + 4),
        kept=max(layer.kept(tokens) for layer in each),
        backward=max(layer.backward(tokens) for layer in each),
    )


class _Layer:
    """One decoder layer: the terms of the formula above."""

    def __init__(self, blueprint: Blueprint, number: int, lora: LoraConfig, dtype: torch.dtype, on_gpu: bool):
        self.blueprint, self.lora, self.size, self.on_gpu = blueprint, lora, dtype.itemsize, on_gpu
        self.linears, self.norms = blueprint.layer(number), blueprint.norms[number]
        # Only PEFT's 4-bit layer asks for autocast, and asks for that of a GPU; else inputs go to float32 and back.
        self.recast = self.size == 2 and not (on_gpu and all(x.quantized for x in self.linears if x.adapted))

    def require_known(self) -> None:
        known = set().union(*GROUPS)
        odd = sorted({linear.short for linear in self.linears} - known)
        odd += sorted({norm.kind for norm in self.norms if "RMSNorm" not in norm.kind})
        missing = not any(linear.short in DOWN for linear in self.linears)
        if odd or missing:
            raise ConfigError(
                f"{self.blueprint.kind}: what its layers keep is not known ({', '.join(odd) or 'no dense MLP'})"
            )

    def kept(self, tokens: int) -> int:
        per_token = sum(self.norm(norm) for norm in self.norms) + self.lora_inputs() + self.attention() + self.mlp()
        per_token += sum(self.lora.r * self.size for linear in self.linears if linear.adapted)
        # The input is kept by whoever computes the layer again; in float32 it is what the first norm keeps.
        per_token += self.blueprint.hidden * self.size if self.size == 2 else 0
        return tokens * per_token + self.constant()

    def constant(self) -> int:
        """Independent of the row: LoRA's weights in 16 bits, and Gemma's 1 + weight of a norm."""
        cast = sum(self.lora.r * (x.inputs + x.outputs) * self.size for x in self.linears if x.adapted)
        shifted = sum(4 * norm.width for norm in self.norms if norm.kind.startswith("Gemma"))
        return (cast if self.size == 2 else 0) + shifted

    def norm(self, norm: Norm) -> int:
        heads, groups, size = self.blueprint.heads
        short = norm.name.rsplit(".", 1)[-1]
        width = {"q_norm": heads * size, "k_norm": groups * size}.get(short, self.blueprint.hidden)
        return 4 * width + 4 * (width // norm.width)

    def lora_inputs(self) -> int:
        per_token = 0
        for group in GROUPS:
            adapted = [linear for linear in self.linears if linear.short in group and linear.adapted]
            if not adapted:
                continue
            width = adapted[0].inputs
            if self.lora.dropout:
                # Each has an input of its own, thinned out, and remembers what was dropped.
                mask = 1 if self.on_gpu else 4
                per_token += len(adapted) * width * (self.size + mask)
            elif group is OUT and self.on_gpu and not self.recast:
                continue  # counted with attention
            else:
                per_token += width * self.size * (len(adapted) if self.recast else 1)
        return per_token

    def attention(self) -> int:
        heads, groups, size = self.blueprint.heads
        qkv = [linear.outputs for linear in self.linears if linear.short == "qkv_proj"]
        # The values of a joint projection are a view of all of it; only the GPU path copies them out.
        values = qkv[0] if qkv and not self.on_gpu else groups * size
        return self.size * (heads * size + groups * size + values + heads * size) + 4 * heads

    def mlp(self) -> int:
        return 3 * self.size * self.down.inputs

    @property
    def down(self) -> Linear:
        return next(linear for linear in self.linears if linear.short in DOWN)

    def backward(self, tokens: int) -> int:
        """At its peak, in down_proj: the gradients of the layer's result, of the residual and of LoRA's share [T, D]
        each, those of its input from LoRA and from the frozen weight [T, F] each, and that weight dequantised.

        Where PEFT casts, computing the layer again may need more: down_proj's input a second time, and in float32.
        """
        hidden, wide = self.blueprint.hidden, self.down.inputs
        weight = max((x.inputs * x.outputs for x in self.linears if x.quantized), default=0)
        backward = self.size * (tokens * (3 * hidden + 2 * wide) + weight)
        again = tokens * (wide * (4 + self.size) + 3 * hidden * self.size) if self.recast else 0
        return max(backward, again)


# ------------------------------------------------------------------ between forward and backward


def loss_bytes(blueprint: Blueprint, tokens: int, dtype: torch.dtype, on_gpu: bool) -> int:
    """Of a row that is supervised throughout: the last norm's float32 input, the last hidden states, the gradient of
    the supervised rows; and packed_ce's workspace by its own rule, or after it the gradient of the hidden states."""
    hidden, size = blueprint.hidden, dtype.itemsize
    kept = tokens * (4 * hidden + 4 + 2 * hidden * size)
    return kept + max(tokens * hidden * size, _workspace(blueprint, tokens, dtype, on_gpu))


def rotation_bytes(blueprint: Blueprint, tokens: int, dtype: torch.dtype) -> int:
    """Cosines and sines, one pair for all layers."""
    return 2 * tokens * blueprint.heads[2] * dtype.itemsize


def _workspace(blueprint: Blueprint, tokens: int, dtype: torch.dtype, on_gpu: bool) -> int:
    hidden, vocabulary = blueprint.hidden, blueprint.vocabulary
    if on_gpu:
        from qlora_kernels.packed_ce.fused import FEWEST_ROWS, TILE, WORKSPACE_BYTES, padded

        if WORKSPACE_BYTES // (4 * padded(vocabulary)) >= FEWEST_ROWS:
            return min(WORKSPACE_BYTES, 4 * padded(vocabulary) * tokens)
        # Tiles of the vocabulary: their logits, and a float32 sum for each row of a group.
        rows = min(tokens, WORKSPACE_BYTES // (4 * padded(TILE)))
        return rows * (4 * padded(TILE) + 4 * hidden + hidden * dtype.itemsize)
    block, tile = block_shape(hidden)
    # The supervised rows, gathered, their float32 sums, and a tile of logits, in 16 bits a second time.
    logits = min(block, tokens) * tile
    return tokens * (4 + dtype.itemsize) * hidden + logits * (4 if dtype.itemsize == 4 else 4 + dtype.itemsize)
