"""Computes the loss of a batch from the last hidden states; the logits of the whole sequence are never formed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypedDict, cast
from weakref import WeakKeyDictionary

import torch
from qlora_kernels.packed_ce import (
    CEOutput,
    PathChoice,
    PathName,
    Targets,
    choose_path,
    packed_linear_cross_entropy,
)  # fmt: skip
from torch import Tensor, nn

from qlora_sft.data.batch import Batch
from qlora_sft.errors import ConfigError
from qlora_sft.model.attention_tree import remember_tree
from qlora_sft.model.balance import balance_loss
from qlora_sft.model.base import base_of
from qlora_sft.model.head import loss_weight
from qlora_sft.model.hidden import Decoded, decode

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qlora_sft.model.base import CausalModel

# The implementation that `use_loss` has chosen for each model, kept for as long as the model lives.
_chosen: WeakKeyDictionary[nn.Module, PathName] = WeakKeyDictionary()
# Gemma 2 and later; RecurrentGemma; xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# By what logits are multiplied (1) or divided (-1): Cohere, Falcon-H1, Muse Glimmer; Granite, Inkling.
SCALES = {
    "logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1,
    "logits_scaling": -1, "logits_mup_width_multiplier": -1,
}  # fmt: skip


def use_loss(model: CausalModel, requested: Literal["auto", "triton", "torch"]) -> str:
    """Chooses the implementation for all losses of ``model``, once. Returns the choice with its reason, to print.

    Raises `ConfigError` when ``triton`` is demanded where it cannot run.
    """
    base = base_of(model)
    path = choose_loss(requested, base.device)
    _chosen[base] = path.name
    return f"{path.name} ({path.reason})"


def choose_loss(requested: Literal["auto", "triton", "torch"], device: torch.device) -> PathChoice:
    """Names the implementation for a model on ``device``. Raises `ConfigError` for one that cannot run there."""
    try:
        return choose_path(requested, device)
    except ValueError as error:
        raise ConfigError(f"model.loss: {error}") from None


def path_of(model: CausalModel) -> PathName | None:
    """Returns the implementation that `use_loss` has chosen for ``model``; None if nothing has been chosen yet."""
    return _chosen.get(base_of(model))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns ``batch`` with its tensors on ``device``."""
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return cast(Batch, moved)


def last_hidden_states(model: CausalModel, batch: Batch) -> Tensor:
    """Returns the hidden states [1, T, D] behind the last norm and before the output head."""
    return decode_batch(model, batch).hidden


def decode_batch(model: CausalModel, batch: Batch) -> Decoded:
    """Returns the hidden states and, of a mixture, the logits of its routers."""
    if batch["parents"] is not None:
        remember_tree(batch["cu_seqlens"], batch["lengths"], batch["parents"])
    return decode(
        model, batch["input_ids"], batch["position_ids"], batch["cu_seqlens"], batch["lengths"], batch["longest"]
    )


def batch_loss(model: CausalModel, batch: Batch, n_items: float | None = None) -> CEOutput:
    """Computes the cross-entropy of the supervised positions of ``batch``, divided by ``n_items``.

    By default the divisor is the batch's own weight. In training a mixture's load-balance loss is added, where
    config.json has one; over an accumulation group it is the mean of its batches', each with the weight of its
    supervised positions.
    """
    return loss_of(model, batch, decode_batch(model, batch), n_items)


def loss_of(model: CausalModel, batch: Batch, decoded: Decoded, n_items: float | None = None) -> CEOutput:
    """Computes what `batch_loss` returns, from what the decoder has made of ``batch``."""
    base = base_of(model)
    hidden = decoded.hidden
    if batch["repeated"].numel():
        hidden = torch.cat([hidden, hidden[:, batch["repeated"]]], dim=1)
    n_documents = batch["cu_seqlens"].numel() - 1
    targets = Targets.from_host(batch["positions"], batch["targets"], batch["position_documents"], n_documents)
    head = base.get_output_embeddings()
    output = packed_linear_cross_entropy(
        hidden.squeeze(0),
        loss_weight(head),
        targets,
        n_items=n_items,
        token_weights=batch["position_weights"],
        bias=getattr(head, "bias", None),
        path=path_of(base) or "auto",
        **logit_transform(base.config),
    )
    balance = balance_loss(base, decoded.router_logits) if model.training else None
    if balance is None:
        return output
    share = 1.0 if n_items is None else batch["weight_sum"] / n_items
    return replace(output, loss=output.loss + share * balance)


class LogitTransform(TypedDict, total=False):
    """Names the options of `packed_linear_cross_entropy` that a model's configuration asks for."""

    softcap: float
    logit_scale: float


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """Returns what the model does to its logits after the head.

    Each family has names of its own for it.
    """
    text = config.get_text_config()
    options: LogitTransform = {}
    for name in SOFTCAPS:
        softcap = getattr(text, name, None)
        if softcap:
            options["softcap"] = float(softcap)
    for name, sign in SCALES.items():
        scale = getattr(text, name, None)
        if scale is not None:
            options["logit_scale"] = float(scale) ** sign
    return options
