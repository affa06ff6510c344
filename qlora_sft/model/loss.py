"""A batch -> its loss, from the last hidden states: the logits of the whole row are never formed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from qlora_kernels.packed_ce import CEOutput, Targets, choose_path, packed_linear_cross_entropy
from qlora_kernels.packed_ce.backend import Path
from torch import Tensor

from qlora_sft.data.batch import Batch
from qlora_sft.errors import ConfigError
from qlora_sft.model.base import base_of
from qlora_sft.model.head import loss_weight
from qlora_sft.model.rows import hidden_states

PathName = Literal["torch", "triton"]
# Where the choice is kept: on the model, like its attention.
PATH = "_packed_ce_path"
# Gemma 2 and later; RecurrentGemma; xLSTM.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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
    return hidden_states(model, batch["input_ids"], batch["position_ids"], batch["cu_seqlens"], batch["lengths"])


def batch_loss(model: Any, batch: Batch, n_items: float | None = None) -> CEOutput:
    """Cross-entropy of the supervised rows of ``batch``, divided by ``n_items`` (default: its own weight)."""
    base = base_of(model)
    hidden = last_hidden_states(model, batch)
    n_documents = batch["cu_seqlens"].numel() - 1
    targets = Targets.from_host(batch["rows"], batch["targets"], batch["row_documents"], n_documents)
    head = base.get_output_embeddings()
    return packed_linear_cross_entropy(
        hidden.squeeze(0),
        loss_weight(head),
        targets,
        n_items=n_items,
        row_weights=batch["row_weights"],
        bias=getattr(head, "bias", None),
        path=path_of(base) or "auto",
        **logit_transform(base.config),
    )


def logit_transform(config: Any) -> dict[str, Any]:
    """What the model does to its logits after the head, under the names each family gives it."""
    text = config.get_text_config()
    options: dict[str, Any] = {}
    for name in SOFTCAPS:
        softcap = getattr(text, name, None)
        if softcap:
            options["softcap"] = float(softcap)
    scale = getattr(text, "logit_scale", None)  # Cohere multiplies
    if scale is not None:
        options["logit_scale"] = float(scale)
    scaling = getattr(text, "logits_scaling", None)  # Granite divides
    if scaling is not None:
        options["logit_scale"] = 1.0 / float(scaling)
    multiplier = getattr(text, "lm_head_multiplier", None)  # Falcon-H1 multiplies
    if multiplier is not None:
        options["logit_scale"] = float(multiplier)
    return options
