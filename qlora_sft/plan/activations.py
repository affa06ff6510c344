"""Computes from shapes alone what a decoder layer keeps from its forward to its backward, and what that takes.

The formula counts what autograd saves in transformers' Llama-like layers with PEFT's LoRA on bitsandbytes' linear
layers. Per token, with D hidden, F intermediate, H query and G key heads of size d, r the rank, s bytes per value (2
under autocast)::

    RMSNorm over w values      4 w + 4       its input in float32, and the reciprocal root
           lean                s w + 4       its input as it is; of the first norm that is the layer's own, kept anyway
    inputs of LoRA layers      s D | s H d | s D | s F      of q k v | o | gate up | down, one tensor for each group
    after A                    s r           of each LoRA layer
    attention                  s (H + 2 G) d + s H d + 4 H      q, k, v after rotation, the result, the log-sum-exp
    activation function        3 s F         its input, its result, and up
    or the tiled MLP           s D + 2 s F   its input, gate and up, for all its layers; where recomputed s D

On a GPU attention's result is the input of o, and counts once. Where documents are attended to one by one it is joined
into a copy, and without FlashAttention keys and values are repeated for every head first, so that H stands for G.
LoRA's weights are kept once more in 16 bits, except by nf4_lora: in the tiled MLP, and in q, k, v and o where it
computes those; autocast holds the others of every layer, kept or not, until the forward of the model is over. On a CPU,
and on 16-bit layers, PEFT takes no notice of autocast and casts to float32 and back, so each LoRA layer has an input of
its own; on a CPU the documents' results are joined into a copy. Frozen layers keep nothing: the gradient of their input
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
from qlora_kernels.nf4_lora.experts import GROUP_VALUES
from qlora_kernels.offload.tiers import LayerBytes
from qlora_kernels.packed_ce import PathName
from qlora_kernels.rms_norm import CPU_BLOCK, GPU_BLOCK

from qlora_sft.config import LoraConfig
from qlora_sft.model.attention_choice import Attended
from qlora_sft.model.loss_bytes import between_bytes, persistent_bytes, with_persistent
from qlora_sft.model.mlp import recomputes
from qlora_sft.plan.blueprint import Blueprint, Linear, Norm
from qlora_sft.plan.known_layers import DOWN, GATE_UP, KEY_NORMS, OUT, QKV, QUERY_NORMS, place_of, require_known


def layer_bytes(
    blueprint: Blueprint,
    tokens: int,
    lora: LoraConfig,
    dtype: torch.dtype,
    on_gpu: bool,
    attended: Attended = "at once",
) -> LayerBytes:
    """Returns the bytes of the largest decoder layer for one packed sequence of ``tokens``.

    attended: how a GPU attends to documents. Raises `ConfigError` if the layers are not Llama-like.
    """
    each = [
        _LayerFormula(blueprint, number, tokens, lora, dtype, on_gpu, attended) for number in range(blueprint.n_layers)
    ]
    for number in range(blueprint.n_layers):
        require_known(blueprint, number)
    heads, _, size = blueprint.heads
    kept = max((layer.parts(again=False) for layer in each), key=_saved)
    again = max((layer.parts(again=True) for layer in each), key=_saved)
    return LayerBytes(
        input=tokens * blueprint.hidden * dtype.itemsize,
        attention=tokens * heads * (size * dtype.itemsize + 4),
        kept=_saved(kept),
        backward=max(_peak(kept) - _saved(kept), _peak(again) - _saved(again)),
        recomputed=_saved(again),
    )


SequenceBytes = Callable[[int], tuple[LayerBytes, int]]
"""Maps the tokens of a sequence to (bytes of a layer, bytes between forward and backward)."""


def sequence_bytes(
    blueprint: Blueprint, lora: LoraConfig, dtype: torch.dtype, on_gpu: bool, attended: Attended = "at once",
    path: PathName | None = None,
) -> SequenceBytes:  # fmt: skip
    """Returns the function that computes the bytes of a layer, and those between forward and backward, from a length.

    attended: as in `layer_bytes`. path: as in `between_bytes`.
    """
    layers = [_LayerFormula(blueprint, number, 1, lora, dtype, on_gpu) for number in range(blueprint.n_layers)]
    casts = sum(layer.all_casts() for layer in layers)

    def bytes_for(tokens: int) -> tuple[LayerBytes, int]:
        head = blueprint.head(dtype)
        between = casts + between_bytes(blueprint.config, tokens, dtype, on_gpu, blueprint.lean_norms, head, path)
        layer = layer_bytes(blueprint, tokens, lora, dtype, on_gpu, attended)
        return with_persistent(layer, persistent_bytes(blueprint.config, tokens, dtype, on_gpu)), between

    return bytes_for


class LayerPart(NamedTuple):
    """Holds the bytes of one part of a decoder layer. The parts stand in the order of the forward."""

    saved: int
    """Bytes that stay from its forward to its backward."""
    backward: int
    """Bytes that its backward takes beside those."""


def _saved(parts: list[LayerPart]) -> int:
    """Returns the bytes that all ``parts`` together keep from the forward to the backward."""
    return sum(part.saved for part in parts)


def _peak(parts: list[LayerPart]) -> int:
    """Returns the most bytes at any time of the backward.

    When a part's backward runs, everything is there that the parts before it and the part itself have saved.
    """
    return max(saved + part.backward for saved, part in zip(accumulate(p.saved for p in parts), parts, strict=True))


class _LayerFormula:
    """Computes the terms of the formula above for one decoder layer."""

    def __init__(
        self, blueprint: Blueprint, number: int, tokens: int, lora: LoraConfig, dtype: torch.dtype, on_gpu: bool,
        attended: Attended = "at once",
    ):  # fmt: skip
        self.blueprint, self.tokens, self.lora, self.size, self.on_gpu = blueprint, tokens, lora, dtype.itemsize, on_gpu
        self.attended = attended if on_gpu else "at once"
        self.linears, self.norms = blueprint.layer(number), blueprint.norms[number]
        self.stacks = [stack for stack in blueprint.stacks if stack.block == number]
        self.tiled = not blueprint.why_not_tiled
        self.lean = not blueprint.why_not_lean
        # Only PEFT's 4-bit layer asks for autocast, and asks for that of a GPU; else inputs go to float32 and back.
        self.recast = self.size == 2 and not (on_gpu and all(x.quantized for x in self.linears if x.adapted))

    def parts(self, again: bool) -> list[LayerPart]:
        """Returns the parts of the layer in the order of its forward.

        again: the layer is computed again in the backward, and the bytes of that recomputation are meant.
        """
        places: dict[str, list[LayerPart]] = {place: [] for place in ("first", "heads", "middle", "last")}
        for norm in self.norms:
            places[place_of(norm)].append(self.norm(norm))
        mlp = self.experts() if self.stacks else self.tiled_mlp(again) if self.tiled else self.mlp()
        return [
            self.input(), *places["first"], self.linear(QKV), *places["heads"], self.attention(), self.linear(OUT),
            *places["middle"], mlp, *places["last"],
        ]  # fmt: skip

    def input(self) -> LayerPart:
        """Returns the bytes of the layer's input."""
        # Computing the layer again begins with it. In float32 the first norm keeps the same tensor, and counts it.
        counted = self.size == 2 or self.blueprint.lean_norms
        return LayerPart(self.tokens * self.blueprint.hidden * self.size if counted else 0, 0)

    def norm(self, norm: Norm) -> LayerPart:
        """Returns the bytes of one norm.

        Its backward takes the gradient of the residual, and float32 copies or, if the norm is lean, the gradients of
        its result and its input. In a norm of the heads the gradients of its result and of what has come from k and v
        are there as well.
        """
        heads, groups, size = self.blueprint.heads
        short = norm.name.rsplit(".", 1)[-1]
        of_heads = heads if short in QUERY_NORMS else groups if short in KEY_NORMS else 0
        width = of_heads * size or self.blueprint.hidden
        roots = 4 * (width // norm.width)
        beside = self.size * (self.blueprint.hidden + (width if place_of(norm) == "heads" else 0))
        if self.blueprint.lean_norms:
            own = 0 if place_of(norm) == "first" else self.size * width
            # Its backward takes no more in float32 than a block of tokens.
            values = self.tokens * width
            blocks = 12 * min(values, GPU_BLOCK if self.on_gpu else CPU_BLOCK)
            return LayerPart(self.tokens * (own + roots), self.tokens * (beside + 2 * self.size * width) + blocks)
        shifted = 4 * norm.width if norm.kind.startswith("Gemma") else 0  # 1 + weight
        wide = (20 if self.size == 2 else 16) * width
        return LayerPart(self.tokens * (4 * width + roots) + shifted, self.tokens * (beside + wide))

    def linear(self, group: set[str]) -> LayerPart:
        """Returns the bytes of a group of linear layers that share their input.

        The backward takes the gradients of the residual, of the result and of the input (from LoRA, from the frozen
        weight, and their sum), and the dequantised weight.
        """
        inputs = max(x.inputs for x in self.linears if x.short in group)
        if self.lean:  # the gradients of its results are there; that of its input is one sum
            results = sum(x.outputs for x in self.linears if x.short in group) if group is QKV else 0
            taken = self.size * self.tokens * (self.blueprint.hidden + results + inputs) + self.weight(group)
            return LayerPart(self.lean_saved(group), taken)
        taken = self.size * self.tokens * (2 * self.blueprint.hidden + 3 * inputs) + self.weight(group)
        return LayerPart(self.lora_saved(group), taken)

    def lean_saved(self, group: set[str]) -> int:
        """Returns what nf4_lora saves for a group of layers: their one input, and its products with the A of each.

        On a GPU the input of o_proj is the result of attention and is counted there.
        """
        adapted = [linear for linear in self.linears if linear.short in group and linear.adapted]
        if not adapted:
            return 0
        own = adapted[0].inputs if group is not OUT or not self.on_gpu else 0
        return self.tokens * self.size * (own + sum(x.rank for x in adapted))

    def lora_saved(self, group: set[str]) -> int:
        """Returns what LoRA saves: inputs, their products with A, and the adapter's weights in 16 bits."""
        adapted = [linear for linear in self.linears if linear.short in group and linear.adapted]
        if not adapted:
            return 0
        per_token = sum(x.rank for x in adapted) * self.size
        width = adapted[0].inputs
        if self.lora.dropout:
            # Each has an input of its own, thinned out, and remembers what was dropped.
            mask = 1 if self.on_gpu else 4
            per_token += len(adapted) * width * (self.size + mask)
        elif group is not OUT or not self.on_gpu or self.recast:  # else it is counted with attention
            per_token += width * self.size * (len(adapted) if self.recast else 1)
        return self.tokens * per_token + self.casts(group)

    def casts(self, group: set[str]) -> int:
        """Returns the bytes of the 16-bit copies of LoRA's weights; 0 where they are used in float32."""
        adapted = [linear for linear in self.linears if linear.short in group and linear.adapted]
        return sum(x.rank * (x.inputs + x.outputs) * self.size for x in adapted) if self.size == 2 else 0

    def all_casts(self) -> int:
        """Returns the bytes of the copies that autocast holds until the forward of the whole model is over.

        They stay whatever the layer itself keeps. nf4_lora makes none.
        """
        return self.casts((set() if self.lean else QKV | OUT) | (set() if self.tiled else GATE_UP | DOWN))

    def attention(self) -> LayerPart:
        """Returns the bytes of attention.

        Its backward takes the gradients of its result, of q, k and v and of the residual, and on a GPU the workspace of
        FlashAttention, which stands for that of other kernels as well.
        """
        heads, groups, size = self.blueprint.heads
        qkv = [linear.outputs for linear in self.linears if linear.short == "qkv_proj"]
        # The values of a joint projection are a view of all of it; only the GPU path copies them out.
        values = qkv[0] if qkv and not self.on_gpu else groups * size
        results = 1 if self.attended == "at once" else 2
        repeated = self.attended == "one by one, keys repeated" and groups < heads
        keys, values = (heads * size, heads * size) if repeated else (groups * size, values)
        saved = self.size * (heads * size + keys + values + results * heads * size) + 4 * heads
        # Gradients of repeated keys are added up behind the kernel instead of inside of it.
        sums = 2 * groups * size if repeated else 0
        taken = self.size * (2 * heads * size + 2 * keys + sums + self.blueprint.hidden)
        workspace = flash_workspace(self.blueprint, self.size, shared=not repeated) if self.on_gpu else 0
        return LayerPart(self.tokens * saved, self.tokens * (taken + workspace))

    def mlp(self) -> LayerPart:
        """Returns the bytes of transformers' own MLP.

        The peak of its backward is in down_proj: the gradient of the layer's result, which is also the residual's, the
        two gradients of down_proj's input [T, F], from LoRA and from the frozen weight, and that weight dequantised.
        Where PEFT casts, computing the layer again may need more: down_proj's input a second time, in float32.
        """
        hidden, wide = self.blueprint.hidden, self.down.inputs
        saved = self.lora_saved(GATE_UP) + self.lora_saved(DOWN) + self.tokens * 3 * self.size * wide
        backward = self.size * self.tokens * (self.incoming() + 2 * wide) + self.weight(GATE_UP | DOWN)
        again = self.tokens * (wide * (4 + self.size) + 2 * hidden * self.size) if self.recast else 0
        return LayerPart(saved, max(backward, again))

    def tiled_mlp(self, again: bool) -> LayerPart:
        """Returns the bytes of the tiled MLP.

        Its backward takes the gradients of result and input, three dequantised weights, three values per column and the
        gradient of the input for one tile, and LoRA's gradients. A sequence a little longer than a tile is cut into
        smaller tiles; a whole one is counted, so that more tokens never seem to take fewer bytes.
        """
        hidden, wide = self.blueprint.hidden, self.down.inputs
        tile = default_tile(hidden)
        kept = 0 if again and recomputes(self.tokens, tile, self.norm_after) else 2 * wide
        rows = min(self.tokens, tile)
        # What the three A make of a tile, and the three B of its gradients; two of these are not there from the start.
        rank = self.size * rows * max([x.rank for x in self.linears if x.short in GATE_UP | DOWN], default=0)
        later = max(self.size * rows * hidden + 2 * rank, self.pointwise(rows * wide))
        of_tile = self.size * rows * 3 * wide + 3 * rank + later
        adapted = sum(x.rank * (x.inputs + x.outputs) for x in self.linears if x.short in GATE_UP | DOWN)
        gradients = self.tokens * (self.incoming() + hidden)
        taken = self.size * (gradients + 3 * hidden * wide) + of_tile + 4 * adapted
        return LayerPart(self.size * self.tokens * (hidden + kept), taken)

    def experts(self) -> LayerPart:
        """Returns the bytes of a mixture of experts: `lora_experts` behind a router that takes the likeliest k of a
        softmax.

        It keeps its input, the softmax in float32, the choice and its weights. The backward has the gradients of its
        result and, in float32, of its input and of all factors, the dequantised weights of a group of experts, and the
        rows of a tile.
        """
        up, down = self.stacks
        hidden, wide, settings = self.blueprint.hidden, down.inputs, self.blueprint.config
        chosen, count = int(settings.num_experts_per_tok), up.count
        scaled = getattr(settings, "norm_topk_prob", True)  # weights that are made to add up to one
        weights = chosen * (4 if settings.model_type == "mixtral" else self.size)
        router = 4 * count + 8 * chosen + (4 * chosen + 4 if scaled else 0) + weights
        each = up.inputs * up.outputs + down.inputs * down.outputs
        group = min(count, max(1, GROUP_VALUES // each))
        factors = sum(x.count * self.lora.r * (x.inputs + x.outputs) for x in self.stacks if x.adapted)
        # Some groups get more rows than others; twice their share is counted.
        rows = min(self.tokens * chosen * min(2 * group, count) // count, default_tile(hidden))
        # The bytes of a row at the three moments that can take most: in the gradient of the choice's weights, behind
        # that of the activation, and in that of the input.
        s, inner = self.size, up.outputs + 3 * wide
        moments = (2 * s * hidden + s * inner + 12 * wide, 2 * s * (hidden + inner), (3 * s + 4) * hidden + s * inner)
        of_group = s * group * (each + factors // count) + rows * max(moments)
        of_tokens = self.tokens * ((s + 4) * hidden + 20 * chosen)
        taken = of_tokens + 4 * factors + max(of_group, self.tokens * s * hidden)
        return LayerPart(self.tokens * (self.size * hidden + router), taken)

    def incoming(self) -> int:
        """Returns the values per token of the gradients that reach the MLP.

        The gradient of its result is also the residual's, unless a norm stands between.
        """
        return self.blueprint.hidden * (2 if self.norm_after else 1)

    def pointwise(self, values: int) -> int:
        """Returns the bytes of the float32 buffers between the products; a GPU has none.

        On a CPU they are as many blocks as `gated_backward` has at once, together with those of the block before.
        """
        if self.on_gpu:
            return 0
        alone, followed = (3, 5) if self.size == 4 else (6, 9)
        return 4 * (alone if values <= gated.BLOCK else followed) * min(values, gated.BLOCK)

    @property
    def norm_after(self) -> bool:
        """Returns whether a norm stands behind the MLP."""
        return any(place_of(norm) == "last" for norm in self.norms)

    def weight(self, group: set[str]) -> int:
        """Returns the bytes of the largest weight of a group when it is dequantised."""
        quantized = [x.inputs * x.outputs for x in self.linears if x.short in group and x.quantized]
        return self.size * max(quantized, default=0)

    @property
    def down(self) -> Linear:
        """Returns the layer that leads out of the MLP."""
        return next(linear for linear in self.linears if linear.short in DOWN)


def flash_workspace(blueprint: Blueprint, itemsize: int, shared: bool = True) -> int:
    """Returns the bytes per token that FlashAttention's backward takes beside its results.

    They are a float32 sum for q, one number for every head and, where heads share keys, gradients of k and v for every
    head. Source: FlashAttention's flash_api.cpp, mha_varlen_bwd. On an H200 (torch 2.11) it took 0.05% more, and
    cuDNN's backward took as much.

    shared: keys are not repeated before, so that it does this itself.
    """
    heads, groups, size = blueprint.heads
    return heads * (4 + size * (4 + (2 * itemsize if shared and groups < heads else 0)))
