"""Decide whether a run can compute prefixes that rows share once, and check that the model does it exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qlora_sft.config import Config
from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.prefix_tree import BLOCK
from qlora_sft.data.render import Rendered
from qlora_sft.data.tree_batch import flatten_tree
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model.base import base_of
from qlora_sft.model.base_files import has_experts
from qlora_sft.model.hidden import one_at_a_time
from qlora_sft.model.loss import batch_loss, to_device
from qlora_sft.model.meta_model import read_settings

if TYPE_CHECKING:
    from qlora_sft.json_types import JsonObject
    from qlora_sft.model.backend import BackendName
    from qlora_sft.model.base import CausalModel

# Families in which this was tried (tests/model/test_prefix_sharing.py); others must ask for it.
TRIED = {"llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "granite"}
# Layers whose tokens mix by attention over all tokens before them, and in no other way.
WHOLE_ATTENTION = {"full_attention"}


def why_not_shared(config: Config, base: str, backend: BackendName) -> str | None:
    """Returns why prefixes that rows share must be computed anew for every row; None if they can be computed once.

    Raises `ConfigError` if ``data.share_prefixes`` is ``on`` and they cannot.
    """
    if config.data.share_prefixes == "off" or config.data.packing == "none":
        return "data.share_prefixes=off" if config.data.packing != "none" else "data.packing=none"
    if config.training.neftune_alpha is not None:
        return "training.neftune_alpha adds noise by the length of each document"
    # As transformers understands them: Mistral has a window that its config.json need not name.
    settings = read_settings(config, base).get_text_config().to_dict()
    reason = _obstacle(config, settings, backend)
    kind = settings.get("model_type")
    if reason is None and config.data.share_prefixes == "auto" and kind not in TRIED:
        return f"not tried with models of type {kind}; data.share_prefixes=on does it"
    if reason is None and config.data.share_prefixes == "auto" and torch.cuda.is_available():
        return "not yet measured on a GPU; data.share_prefixes=on does it"
    if reason is not None and config.data.share_prefixes == "on":
        raise ConfigError(f"data.share_prefixes: rows cannot share prefixes here: {reason}. Set it to auto")
    return reason


def _obstacle(config: Config, settings: JsonObject, backend: BackendName) -> str | None:
    if backend == "unsloth":
        return "Unsloth's forward knows no tree of documents; model.backend=transformers does"
    if config.lora.dropout or settings.get("attention_dropout"):
        return "dropout would be the same for all rows that share a prefix"
    kinds = settings.get("layer_types") or []
    others = sorted(set(map(str, kinds)) - WHOLE_ATTENTION) if isinstance(kinds, list) else ["unknown"]
    if others:
        return f"the model has layers of type {', '.join(others)}"
    window = settings.get("sliding_window")
    if window and settings.get("use_sliding_window", True) and not kinds:
        return f"the model attends in a sliding window of {window} tokens"
    if settings.get("attn_logit_softcapping") or settings.get("model_type") == "gpt_oss":
        return "the model caps its logits or has attention sinks"
    if has_experts(settings):
        return "the balance of a mixture's experts counts every token of every row"
    if settings.get("kv_lora_rank"):
        return "keys and values of the model have heads of different sizes"
    if torch.cuda.is_available():
        return _obstacle_of_flash(config, settings)
    return None


def _obstacle_of_flash(config: Config, settings: JsonObject) -> str | None:
    """Returns why FlashAttention, which computes trees on a GPU, cannot do it; None if it can."""
    if torch.cuda.get_device_capability() < (8, 0):
        return "FlashAttention needs compute capability 8.0"
    if config.model.dtype == "float32":
        return "FlashAttention computes in 16 bits only"
    size = settings.get("head_dim")
    if isinstance(size, int) and size > 256:
        return f"FlashAttention has heads of up to 256, this model of {size}"
    return None


# Relative difference of the gradients that rounding explains; see `attention_check.TOLERANCE`.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def check_prefixes(model: CausalModel, dtype: torch.dtype) -> str:
    """Compares the gradients of three documents that share prefixes with those of the documents alone.

    Returns what to print. Raises `RunError` if rounding does not explain the difference.
    """
    if one_at_a_time(model):
        raise RunError("documents that are run one at a time cannot share prefixes; set data.share_prefixes=off")
    generator = torch.Generator().manual_seed(0)
    vocabulary = base_of(model).get_input_embeddings().weight.shape[0]
    drawn = torch.randint(0, vocabulary, (8, BLOCK), generator=generator).tolist()
    rows = [[*drawn[0], *drawn[1], *drawn[n], *drawn[n + 1][:5]] for n in (2, 4)] + [[*drawn[0], *drawn[6], *drawn[7]]]
    documents = [Rendered(ids, [0.0] * BLOCK + [1.0] * (len(ids) - BLOCK), "check") for ids in rows]
    alone = torch.stack([_gradients(model, dtype, flatten([document])) for document in documents]).sum(0)
    difference = float((_gradients(model, dtype, flatten_tree(documents)) - alone).norm() / alone.norm())
    if not difference <= TOLERANCE[dtype]:
        raise RunError(
            f"{type(base_of(model)).__name__}: documents that share prefixes have other gradients than alone: they "
            f"differ by {difference:.1e} (rounding explains {TOLERANCE[dtype]:.0e}). Set data.share_prefixes=off"
        )
    return f"gradients of documents that share them and of the same documents alone agree within {difference:.0e}"


def _gradients(model: CausalModel, dtype: torch.dtype, batch: Batch) -> torch.Tensor:
    """Returns the gradients of the summed loss of ``batch``, one behind the other, in float32."""
    moved = to_device(batch, model.device)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = batch_loss(model, moved, n_items=1.0).loss
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trainable, allow_unused=True)
    return torch.cat([g.float().flatten() for g in found if g is not None])
