"""Bytes that a decoder layer keeps from its forward to its backward, and what that takes, from shapes alone.

What autograd saves in transformers' Llama-like layers with PEFT's LoRA on bitsandbytes' linear layers. Per token, with
D hidden, F intermediate, H query and G key heads of size d, r the rank, s bytes per value (2 under autocast)::

    RMSNorm over w values      4 w + 4       its input in float32, and the reciprocal root
           lean                s w + 4       its input as it is; of the first norm that is the layer's own, kept anyway
    inputs of LoRA layers      s D | s H d | s D | s F      of q k v | o | gate up | down, one tensor for each group
    after A                    s r           of each LoRA layer
    attention                  s (H + 2 G) d + s H d + 4 H      q, k, v after rotation, the result, the log-sum-exp
    activation function        3 s F         its input, its result, and up
    or the tiled MLP           s D + 2 s F   its input, gate and up, for all its layers; where recomputed s D

On a GPU attention's result is the input of o, and counts once. LoRA's weights are kept once more in 16 bits, except by
the tiled MLP; autocast holds those of every layer, kept or not, until the forward of the model is over. On a CPU, and
on 16-bit layers, PEFT takes no notice of autocast and casts to float32 and back, so each LoRA layer has an input of its
own; on a CPU the documents' results are joined into a copy. Frozen layers keep nothing: the gradient of their input
needs only the weight.

The backward goes through the parts of a layer from the last to the first and frees what each has kept. Its peak is
where what is still kept and what the part itself takes are most: with short rows in the MLP (dequantised weights), with
long ones in a norm, whose backward in transformers' operations takes five tensors in float32, or in attention.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from qlora_kernels.nf4_lora import default_tile, gated
from qlora_kernels.offload.tiers import LayerBytes
from qlora_kernels.rms_norm import CPU_BLOCK, GPU_BLOCK

from qlora_sft.config import LoraConfig
from qlora_sft.errors import ConfigError
from qlora_sft.model.loss import PathName
from qlora_sft.model.loss_bytes import between_bytes, standing_bytes, with_standing
from qlora_sft.model.mlp import NORM_AFTER, recomputes
from qlora_sft.plan.blueprint import Blueprint, Linear, Norm

QKV = {"q_proj", "k_proj", "v_proj", "qkv_proj"}
OUT = {"o_proj"}
GATE_UP = {"gate_proj", "up_proj", "gate_up_proj"}
DOWN = {"down_proj"}


def layer_bytes(
    blueprint: Blueprint, tokens: int, lora: LoraConfig, dtype: torch.dtype, on_gpu: bool, joined: bool = False
) -> LayerBytes:
    """Of the largest decoder layer, for one row of ``tokens``. `ConfigError` if they are not Llama-like.

    joined: on a GPU, documents are attended to one by one, and their results are joined into a copy.
    """
    heads, _, size = blueprint.heads
    each = [_Layer(blueprint, number, tokens, lora, dtype, on_gpu, joined) for number in range(blueprint.n_layers)]
    for layer in each:
        layer.require_known()
    kept = max((layer.parts(again=False) for layer in each), key=_saved)
    again = max((layer.parts(again=True) for layer in each), key=_saved)
    return LayerBytes(
        input=tokens * blueprint.hidden * dtype.itemsize,
        attention=tokens * heads * (size * dtype.itemsize + 4),
        kept=_saved(kept),
        backward=max(_peak(kept) - _saved(kept), _peak(again) - _saved(again)),
        recomputed=_saved(again),
    )


Row = Callable[[int], tuple[LayerBytes, int]]
"""Tokens of a row -> (bytes of a layer, bytes between forward and backward)."""


def row_bytes(
    blueprint: Blueprint, lora: LoraConfig, dtype: torch.dtype, on_gpu: bool, joined: bool = False,
    path: PathName | None = None,
) -> Row:  # fmt: skip
    """Returns the function that says what a row of so many tokens takes. path: of the loss; default: as
    `between_bytes` has it."""
    layers = [_Layer(blueprint, number, 1, lora, dtype, on_gpu) for number in range(blueprint.n_layers)]
    casts = sum(layer.all_casts() for layer in layers)

    def row(tokens: int) -> tuple[LayerBytes, int]:
        head = blueprint.head(dtype)
        between = casts + between_bytes(blueprint.config, tokens, dtype, on_gpu, blueprint.lean_norms, head, path)
        layer = layer_bytes(blueprint, tokens, lora, dtype, on_gpu, joined)
        return with_standing(layer, standing_bytes(blueprint.config, tokens, dtype)), between

    return row


class Part(NamedTuple):
    """Of a layer, in the order of its forward. Bytes."""

    saved: int
    """From forward to backward."""
    backward: int
    """What its backward takes beside that."""


def _saved(parts: list[Part]) -> int:
    return sum(part.saved for part in parts)


def _peak(parts: list[Part]) -> int:
    """A part's backward finds all that was saved before it, and its own."""
    return max(saved + part.backward for saved, part in zip(accumulate(p.saved for p in parts), parts, strict=True))


class _Layer:
    """One decoder layer: the terms of the formula above."""

    def __init__(
        self, blueprint: Blueprint, number: int, tokens: int, lora: LoraConfig, dtype: torch.dtype, on_gpu: bool,
        joined: bool = False,
    ):  # fmt: skip
        self.blueprint, self.tokens, self.lora, self.size, self.on_gpu = blueprint, tokens, lora, dtype.itemsize, on_gpu
        self.joined = joined and on_gpu
        self.linears, self.norms = blueprint.layer(number), blueprint.norms[number]
        self.tiled = not blueprint.why_not_tiled
        # Only PEFT's 4-bit layer asks for autocast, and asks for that of a GPU; else inputs go to float32 and back.
        self.recast = self.size == 2 and not (on_gpu and all(x.quantized for x in self.linears if x.adapted))

    def parts(self, again: bool) -> list[Part]:
        """again: of a layer that is computed again in the backward, the recomputation included."""
        places: dict[str, list[Part]] = {place: [] for place in ("first", "heads", "middle", "last")}
        for norm in self.norms:
            places[_place(norm)].append(self.norm(norm))
        mlp = self.tiled_mlp(again) if self.tiled else self.mlp()
        return [
            self.input(), *places["first"], self.linear(QKV), *places["heads"], self.attention(), self.linear(OUT),
            *places["middle"], mlp, *places["last"],
        ]  # fmt: skip

    def require_known(self) -> None:
        known = QKV | OUT | GATE_UP | DOWN
        odd = sorted({linear.short for linear in self.linears} - known)
        odd += sorted({norm.kind for norm in self.norms if "RMSNorm" not in norm.kind})
        missing = not any(linear.short in DOWN for linear in self.linears)
        if odd or missing:
            raise ConfigError(
                f"{self.blueprint.kind}: what its layers keep is not known ({', '.join(odd) or 'no dense MLP'})"
            )

    def input(self) -> Part:
        # It is kept by whoever computes the layer again; in float32 it is what the first norm keeps.
        counted = self.size == 2 or self.blueprint.lean_norms
        return Part(self.tokens * self.blueprint.hidden * self.size if counted else 0, 0)

    def norm(self, norm: Norm) -> Part:
        """Backward: the gradient of the residual; float32 copies or, if it is lean, gradients of its result and input;
        in a norm of the heads also the gradients of its result and of what has come from k and v."""
        heads, groups, size = self.blueprint.heads
        short = norm.name.rsplit(".", 1)[-1]
        width = {"q_norm": heads * size, "k_norm": groups * size}.get(short, self.blueprint.hidden)
        roots = 4 * (width // norm.width)
        beside = self.size * (self.blueprint.hidden + (width if _place(norm) == "heads" else 0))
        if self.blueprint.lean_norms:
            own = 0 if _place(norm) == "first" else self.size * width
            # Its backward takes no more in float32 than a block of tokens.
            values = self.tokens * width
            blocks = 12 * min(values, GPU_BLOCK if self.on_gpu else CPU_BLOCK)
            return Part(self.tokens * (own + roots), self.tokens * (beside + 2 * self.size * width) + blocks)
        shifted = 4 * norm.width if norm.kind.startswith("Gemma") else 0  # 1 + weight
        wide = (20 if self.size == 2 else 16) * width
        return Part(self.tokens * (4 * width + roots) + shifted, self.tokens * (beside + wide))

    def linear(self, group: set[str]) -> Part:
        """Backward: the gradients of the residual, of its result and of its input (from LoRA, from the frozen weight,
        and the sum), and the weight dequantised."""
        inputs = max(x.inputs for x in self.linears if x.short in group)
        taken = self.size * self.tokens * (2 * self.blueprint.hidden + 3 * inputs) + self.weight(group)
        return Part(self.lora_saved(group), taken)

    def lora_saved(self, group: set[str]) -> int:
        """Inputs, what A makes of them, and LoRA's weights in 16 bits."""
        adapted = [linear for linear in self.linears if linear.short in group and linear.adapted]
        if not adapted:
            return 0
        per_token = len(adapted) * self.lora.r * self.size
        width = adapted[0].inputs
        if self.lora.dropout:
            # Each has an input of its own, thinned out, and remembers what was dropped.
            mask = 1 if self.on_gpu else 4
            per_token += len(adapted) * width * (self.size + mask)
        elif group is not OUT or not self.on_gpu or self.recast:  # else it is counted with attention
            per_token += width * self.size * (len(adapted) if self.recast else 1)
        return self.tokens * per_token + self.casts(group)

    def casts(self, group: set[str]) -> int:
        """LoRA's weights in 16 bits."""
        adapted = [linear for linear in self.linears if linear.short in group and linear.adapted]
        return sum(self.lora.r * (x.inputs + x.outputs) * self.size for x in adapted) if self.size == 2 else 0

    def all_casts(self) -> int:
        """Those that autocast holds until the forward of the whole model is over, whatever the layer keeps."""
        return self.casts(QKV | OUT if self.tiled else QKV | OUT | GATE_UP | DOWN)

    def attention(self) -> Part:
        """Backward: gradients of its result, of q, k and v and of the residual; on a GPU FlashAttention's workspace."""
        heads, groups, size = self.blueprint.heads
        qkv = [linear.outputs for linear in self.linears if linear.short == "qkv_proj"]
        # The values of a joint projection are a view of all of it; only the GPU path copies them out.
        values = qkv[0] if qkv and not self.on_gpu else groups * size
        results = 2 if self.joined else 1
        saved = self.size * (heads * size + groups * size + values + results * heads * size) + 4 * heads
        taken = self.size * (2 * heads * size + 2 * groups * size + self.blueprint.hidden)
        workspace = flash_workspace(self.blueprint, self.size) if self.on_gpu else 0
        return Part(self.tokens * saved, self.tokens * (taken + workspace))

    def mlp(self) -> Part:
        """transformers' own. Backward, in down_proj: the gradient of the layer's result, which is the residual's, those
        of its input from LoRA and from the frozen weight [T, F], and that weight dequantised.

        Where PEFT casts, computing the layer again may need more: down_proj's input a second time, and in float32.
        """
        hidden, wide = self.blueprint.hidden, self.down.inputs
        saved = self.lora_saved(GATE_UP) + self.lora_saved(DOWN) + self.tokens * 3 * self.size * wide
        backward = self.size * self.tokens * (self.incoming() + 2 * wide) + self.weight(GATE_UP | DOWN)
        again = self.tokens * (wide * (4 + self.size) + 2 * hidden * self.size) if self.recast else 0
        return Part(saved, max(backward, again))

    def tiled_mlp(self, again: bool) -> Part:
        """Backward: the gradients of result and input, three weights dequantised, three values per column and the
        gradient of the input for a tile, and LoRA's gradients.

        A row a little longer than a tile is cut into smaller ones; a whole one is counted: more tokens, more bytes.
        """
        hidden, wide = self.blueprint.hidden, self.down.inputs
        tile = default_tile(hidden)
        kept = 0 if again and recomputes(self.tokens, tile, self.norm_after) else 2 * wide
        rows = min(self.tokens, tile)
        # What the three A make of a tile, and the three B of its gradients; two of these are not there from the start.
        rank = self.size * rows * self.lora.r
        later = max(self.size * rows * hidden + 2 * rank, self.pointwise(rows * wide))
        of_tile = self.size * rows * 3 * wide + 3 * rank + later
        adapted = sum(x.inputs + x.outputs for x in self.linears if x.short in GATE_UP | DOWN and x.adapted)
        gradients = self.tokens * (self.incoming() + hidden)
        taken = self.size * (gradients + 3 * hidden * wide) + of_tile + 4 * self.lora.r * adapted
        return Part(self.size * self.tokens * (hidden + kept), taken)

    def incoming(self) -> int:
        """Per token: the gradient of the MLP's result; the residual's is the same, unless a norm stands between."""
        return self.blueprint.hidden * (2 if self.norm_after else 1)

    def pointwise(self, values: int) -> int:
        """Float32 buffers between the products: on a CPU as many blocks as `gated_backward` has at once, with those of
        the block before; none on a GPU."""
        if self.on_gpu:
            return 0
        alone, followed = (3, 5) if self.size == 4 else (6, 9)
        return 4 * (alone if values <= gated.BLOCK else followed) * min(values, gated.BLOCK)

    @property
    def norm_after(self) -> bool:
        return any(_place(norm) == "last" for norm in self.norms)

    def weight(self, group: set[str]) -> int:
        """The largest one, dequantised."""
        quantized = [x.inputs * x.outputs for x in self.linears if x.short in group and x.quantized]
        return self.size * max(quantized, default=0)

    @property
    def down(self) -> Linear:
        return next(linear for linear in self.linears if linear.short in DOWN)


def flash_workspace(blueprint: Blueprint, itemsize: int) -> int:
    """Bytes per token of FlashAttention's backward beside its results: a float32 sum for q, one number for every
    head and, where heads share keys, gradients of k and v for every head. From FlashAttention's source (flash_api.cpp,
    mha_varlen_bwd); on an H200 (torch 2.11) it took 0.05% more. cuDNN's takes as much there."""
    heads, groups, size = blueprint.heads
    return heads * (4 + size * (4 + (2 * itemsize if groups < heads else 0)))


def _place(norm: Norm) -> str:
    """Where in the forward of its layer a norm stands: whose input it shares and what is freed before it."""
    short = norm.name.rsplit(".", 1)[-1]
    if short in ("q_norm", "k_norm"):
        return "heads"
    return {"input_layernorm": "first", NORM_AFTER: "last"}.get(short, "middle")
