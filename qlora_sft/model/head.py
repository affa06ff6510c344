"""Quantises the output head to NF4 (`model.head_in_4bit`).

A head of 128,256 tokens 4,096 wide takes 0.98 GiB in 16 bits and 0.25 GiB in NF4. This is a choice about the model and
not only about memory: the loss is that of the rounded head, and what is exported has to have it too. So the run says
which layers went through NF4, and a merge onto the dequantised base takes the head along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from qlora_kernels.packed_ce import NF4Head, PatchedHead
from torch import Tensor, nn

from qlora_sft.config import ModelConfig
from qlora_sft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # weights that share a scale in NF4


def quantize_head(model: PreTrainedModel, dtype: torch.dtype, device: str | None = None) -> None:
    """Replaces the head of a base model that has no adapters yet. Raises `ConfigError` as `check_head` does.

    device: what quantises it and has it from then on; default: where it is.
    """
    check_head(model)
    head = model.get_output_embeddings()
    model.set_output_embeddings(nf4_linear(head, head.weight.detach().to(device), dtype))


def check_frozen_head(settings: ModelConfig, new_rows: Sequence[int]) -> None:
    """Raises `ConfigError` where a head in NF4 would have to learn rows of new tokens."""
    if new_rows and settings.head_in_4bit:
        raise ConfigError(
            f"model.head_in_4bit: chat_template={settings.chat_template} adds tokens whose rows of the head are "
            "trained, which is impossible in NF4; remove one of the two settings"
        )


def check_head(model: PreTrainedModel) -> None:
    """Raises `ConfigError` where the head cannot be in NF4."""
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        obstacle = "is its input embedding, too, which has to be read row by row"
    elif type(head) is not nn.Linear:
        obstacle = f"is a {type(head).__name__} already, and no plain linear layer"
    elif head.in_features % BLOCK:
        obstacle = f"is {head.in_features} wide, which is no multiple of NF4's blocks of {BLOCK}"
    else:
        return
    raise ConfigError(f"model.head_in_4bit: this model's output head {obstacle}; remove the setting")


def nf4_linear(like: nn.Linear, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """Returns a frozen layer of bitsandbytes with ``weight`` in NF4, doubly quantised, on the device of that tensor."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    new = Linear4bit(
        like.in_features, like.out_features, bias=like.bias is not None, compute_dtype=dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    new.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(weight.device)
    new.bias = like.bias
    layer: nn.Module = new
    return layer


def loss_weight(head: nn.Module) -> Tensor | NF4Head | PatchedHead:
    """Returns the head [V, D] as `packed_linear_cross_entropy` takes it."""
    patched = _patched(head)
    if patched is not None:
        return patched
    weight = cast(Tensor, head.weight)
    state = getattr(weight, "quant_state", None)
    return weight if state is None else NF4Head.from_bitsandbytes(weight.data, state)


def _patched(head: nn.Module) -> PatchedHead | None:
    """Returns the frozen head with its trained rows if PEFT trains some of them, else None.

    PEFT's own ``weight`` would be a whole copy of the head, and its gradient another.
    """
    layer = getattr(head, "token_adapter", None)
    if layer is None or layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    base: Tensor = layer.base_layer.weight
    if base.requires_grad or name not in layer.trainable_tokens_delta:
        return None
    return PatchedHead(base, tuple(layer.token_indices[name]), layer.trainable_tokens_delta[name])
