"""A batch -> its loss, from the last hidden states: the logits of the whole row are never formed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch
from qlora_kernels.packed_ce import CEOutput, Targets, choose_path, packed_linear_cross_entropy
from qlora_kernels.packed_ce.backend import Path
from torch import Tensor

from qlora_sft.data.batch import Batch
from qlora_sft.errors import ConfigError
from qlora_sft.model.attention import remember_lengths
from qlora_sft.model.balance import balance_loss
from qlora_sft.model.base import base_of
from qlora_sft.model.head import loss_weight

PathName = Literal["torch", "triton"]
# Where the choice is kept: on the model, like its attention.
PATH = "_packed_ce_path"


def use_loss(model: Any, requested: Literal["auto", "triton", "torch"]) -> str:
    """Chooses the implementation for all losses of ``model``, once. Returns the choice with its reason, to print.

    Raises ConfigError when ``triton`` is demanded where it cannot run.
    """
    base = base_of(model)
    path = choose_loss(requested, base.device)
    setattr(base, PATH, path.name)
    return f"{path.name} ({path.reason})"


def choose_loss(requested: Literal["auto", "triton", "torch"], device: torch.device) -> Path:
    """Names the implementation for a model on ``device``. Raises `ConfigError` for one that cannot run there."""
    try:
        return choose_path(requested, device)
    except ValueError as error:
        raise ConfigError(f"model.loss: {error}") from None


def path_of(model: Any) -> PathName | None:
    """The implementation that `use_loss` has chosen for ``model``; None if nothing has been chosen yet."""
    path: PathName | None = getattr(base_of(model), PATH, None)
    return path


def last_hidden_states(model: Any, batch: Batch) -> Tensor:
    """[1, T, D], behind the last norm, before the output head."""
    return cast(Tensor, _decoded(model, batch).last_hidden_state)


def _decoded(model: Any, batch: Batch) -> Any:
    """What the decoder returns."""
    base = base_of(model)
    remember_lengths(batch["cu_seqlens"], batch["lengths"])
    return base.get_decoder()(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        cu_seq_lens_q=batch["cu_seqlens"],
        cu_seq_lens_k=batch["cu_seqlens"],
        max_length_q=batch["longest"],
        max_length_k=batch["longest"],
        use_cache=False,
    )


def batch_loss(model: Any, batch: Batch, n_items: float | None = None) -> CEOutput:
    """Cross-entropy of the supervised rows of ``batch``, divided by ``n_items`` (default: its own weight).

    In training a mixture's load-balance loss is added, where config.json has one; over an accumulation group it is the
    mean of its batches', each with the weight of its supervised rows.
    """
    base = base_of(model)
    decoded = _decoded(model, batch)
    hidden: Tensor = decoded.last_hidden_state
    n_documents = batch["cu_seqlens"].numel() - 1
    targets = Targets.from_host(batch["rows"], batch["targets"], batch["row_documents"], n_documents)
    head = base.get_output_embeddings()
    output = packed_linear_cross_entropy(
        hidden.squeeze(0),
        loss_weight(head),
        targets,
        n_items=n_items,
        row_weights=batch["row_weights"],
        bias=getattr(head, "bias", None),
        path=path_of(base) or "auto",
        **logit_transform(base.config),
    )
    balance = balance_loss(base, decoded) if model.training else None
    if balance is None:
        return output
    share = 1.0 if n_items is None else batch["weight_sum"] / n_items
    return replace(output, loss=output.loss + share * balance)


def logit_transform(config: Any) -> dict[str, Any]:
    """What the model does to its logits after the head, under the names each family gives it."""
    text = config.get_text_config()
    options: dict[str, Any] = {}
    softcap = getattr(text, "final_logit_softcapping", None)  # Gemma 2 and later
    if softcap:
        options["softcap"] = float(softcap)
    scale = getattr(text, "logit_scale", None)  # Cohere multiplies
    if scale is not None:
        options["logit_scale"] = float(scale)
    scaling = getattr(text, "logits_scaling", None)  # Granite divides
    if scaling is not None:
        options["logit_scale"] = 1.0 / float(scaling)
    return options
