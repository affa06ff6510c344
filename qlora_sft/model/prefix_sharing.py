"""Decide whether a run can compute prefixes that rows share once, and check that the model does it exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qlora_sft.config import Config
from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.prefix_tree import BLOCK
from qlora_sft.data.render import Rendered
from qlora_sft.data.sequences import Sharing
from qlora_sft.data.tree_batch import flatten_tree
from qlora_sft.errors import ConfigError, RunError, first_line
from qlora_sft.model.attention import head_size_of
from qlora_sft.model.attention_tree import CPU, CUDA, Flash, Tree, tree_attention
from qlora_sft.model.base import base_of
from qlora_sft.model.base_files import has_experts
from qlora_sft.model.block_mask import WITH_SINKS
from qlora_sft.model.flash_switch import switch_flash
from qlora_sft.model.hidden import one_at_a_time
from qlora_sft.model.load import compute_dtype
from qlora_sft.model.long_documents import longest_short
from qlora_sft.model.loss import batch_loss, to_device
from qlora_sft.model.meta_model import read_settings

if TYPE_CHECKING:
    from qlora_sft.json_types import JsonObject
    from qlora_sft.model.backend import BackendName
    from qlora_sft.model.base import CausalModel

# Families in which this was tried (tests/model/test_prefix_sharing.py); others must ask for it.
TRIED = {
    "llama", "qwen2", "qwen3", "mistral", "smollm3", "phi3", "granite", "gemma2", "gemma3_text", "vaultgemma",
    "granite_swa",
}  # fmt: skip
# Layers whose tokens mix by attention over all tokens before them or the last of them, and in no other way.
BY_ATTENTION = {"full_attention", "sliding_attention"}
# Share of the tokens that sharing must save on a GPU. Every depth of the tree reads and writes queries, results and
# their gradients once more, in float32: about 4% of an 8B's step, by bytes and bandwidth.
WORTH_ON_GPU = 0.15
ASK = "data.share_prefixes=on does it"


def sharing_of(config: Config, base: str, backend: BackendName) -> Sharing:
    """Returns whether prefixes that rows share can be computed once, and why.

    Raises `ConfigError` if ``data.share_prefixes`` is ``on`` and they cannot.
    """
    if config.data.share_prefixes == "off" or config.data.packing == "none":
        return Sharing("data.share_prefixes=off" if config.data.packing != "none" else "data.packing=none")
    if config.training.neftune_alpha is not None:
        return Sharing("training.neftune_alpha adds noise by the length of each document")
    if config.training.replay_kl is not None:
        return Sharing("training.replay_kl lets the base read the rows of replay by themselves")
    # As transformers understands them: Mistral has a window that its config.json need not name.
    understood = read_settings(config, base).get_text_config()
    settings = understood.to_dict()
    reason = _obstacle(config, settings, backend)
    if config.data.share_prefixes == "on":
        if reason is not None:
            raise ConfigError(f"data.share_prefixes: rows cannot share prefixes here: {reason}. Set it to auto")
        return Sharing()
    reason = reason or _unproven(settings)
    if reason is not None or not torch.cuda.is_available():
        return Sharing(reason)
    switch_flash("varlen")  # torch's own kernels, whatever an earlier run of this process took
    difference = tree_differs(head_size_of(understood), compute_dtype(config.model.dtype)[0])
    if difference is not None:
        return Sharing(f"FlashAttention over a small tree on this GPU {difference}")
    return Sharing(None, WORTH_ON_GPU, "FlashAttention over a small tree on this GPU agrees with plain products")


def _obstacle(config: Config, settings: JsonObject, backend: BackendName) -> str | None:
    """Returns why rows cannot share prefixes; None if they can."""
    if backend == "unsloth":
        return "Unsloth's forward knows no tree of documents; model.backend=transformers does"
    if config.lora.dropout or settings.get("attention_dropout"):
        return "dropout would be the same for all rows that share a prefix"
    kinds = settings.get("layer_types") or []
    others = sorted(set(map(str, kinds)) - BY_ATTENTION) if isinstance(kinds, list) else ["unknown"]
    if others:
        return f"the model has layers of type {', '.join(others)}"
    if has_experts(settings) and settings.get("output_router_logits"):
        return "the balance of a mixture's experts counts every token of every row"
    short = longest_short(settings)
    if short is not None and config.data.max_length > short:
        return f"rows of more than {short:,} tokens turn all of their positions in another way (LongRoPE)"
    if settings.get("kv_lora_rank"):
        return "keys and values of the model have heads of different sizes"
    if torch.cuda.is_available() and not _capped(settings):
        return _obstacle_of_flash(config, settings)
    return None


def _unproven(settings: JsonObject) -> str | None:
    """Returns why rows share no prefixes unless it is asked for, though they could; None if there is no reason."""
    kind = settings.get("model_type")
    if has_experts(settings):
        return f"rounding may send a token to other experts than in its row alone; {ASK}"
    if kind not in TRIED:
        return f"not tried with models of type {kind}; {ASK}"
    if torch.cuda.is_available() and (_windowed(settings) or _capped(settings)):
        return f"windows, caps and sinks over a tree take FlexAttention on a GPU, which is not yet measured; {ASK}"
    return None


def _windowed(settings: JsonObject) -> bool:
    """Says whether layers attend to a window."""
    kinds = settings.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return "sliding_attention" in kinds
    return bool(settings.get("sliding_window") and settings.get("use_sliding_window", True))


def _capped(settings: JsonObject) -> bool:
    """Says whether attention caps its logits or has sinks, which no layer then computes with FlashAttention."""
    return bool(settings.get("attn_logit_softcapping")) or settings.get("model_type") in WITH_SINKS


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


def tree_differs(size: int, dtype: torch.dtype, device: str = "cuda", flash: Flash = CUDA) -> str | None:
    """Says how attention by ``flash`` over a small tree, with heads of ``size``, is not what plain products in float64
    make of it; None if output and gradients agree."""
    tree = Tree((40, 24, 17, 3), (-1, 0, 1, 0))
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, tree.bounds[-1], size)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]

    def run(tensors: list[torch.Tensor], how: Flash) -> list[torch.Tensor]:
        q, k, v, gradient = tensors
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = tree_attention(q, k, v, tree, None, how)
        return [out, *torch.autograd.grad(out, inputs, gradient.transpose(1, 2))]

    try:
        found = run([x.to(device, dtype) for x in exact], flash)
    except Exception as error:  # kernels that refuse a shape may raise anything
        return f"failed: {first_line(error)}"
    right = run(exact, CPU)
    worst = max(
        float((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(found, right, strict=True)
    )
    return None if worst <= TOLERANCE[dtype] else f"differs from plain products by {worst:.1e}"


# Relative difference of the gradients that rounding explains; see `attention_check.TOLERANCE`.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# Longer ones would make the check slow.
LONGEST_WINDOW = 1024


def check_prefixes(model: CausalModel, dtype: torch.dtype) -> str:
    """Compares the gradients of three documents that share prefixes with those of the documents alone.

    Returns what to print. Raises `RunError` if rounding does not explain the difference.
    """
    if one_at_a_time(model):
        raise RunError("documents that are run one at a time cannot share prefixes; set data.share_prefixes=off")
    generator = torch.Generator().manual_seed(0)
    vocabulary = base_of(model).get_input_embeddings().weight.shape[0]
    drawn = torch.randint(0, vocabulary, (8, BLOCK), generator=generator).tolist()
    first = torch.randint(0, vocabulary, (_shared_tokens(model),), generator=generator).tolist()
    rows = [[*first, *drawn[1], *drawn[n], *drawn[n + 1][:5]] for n in (2, 4)] + [[*first, *drawn[6], *drawn[7]]]
    documents = [Rendered(ids, [0.0] * len(first) + [1.0] * (len(ids) - len(first)), "check") for ids in rows]
    alone = torch.stack([_gradients(model, dtype, flatten([document])) for document in documents]).sum(0)
    difference = float((_gradients(model, dtype, flatten_tree(documents)) - alone).norm() / alone.norm())
    if not difference <= TOLERANCE[dtype]:
        raise RunError(
            f"{type(base_of(model)).__name__}: documents that share prefixes have other gradients than alone: they "
            f"differ by {difference:.1e} (rounding explains {TOLERANCE[dtype]:.0e}). Set data.share_prefixes=off"
        )
    return f"gradients of documents that share them and of the same documents alone agree within {difference:.0e}"


def _shared_tokens(model: CausalModel) -> int:
    """Returns how long the prefix of the check is: on a GPU, whose kernels are compiled there, longer than a window."""
    window = getattr(base_of(model).config.get_text_config(), "sliding_window", None) or 0
    return BLOCK * (1 + window // BLOCK) if model.device.type == "cuda" and window <= LONGEST_WINDOW else BLOCK


def _gradients(model: CausalModel, dtype: torch.dtype, batch: Batch) -> torch.Tensor:
    """Returns the gradients of the summed loss of ``batch``, one behind the other, in float32."""
    moved = to_device(batch, model.device)
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = batch_loss(model, moved, n_items=1.0).loss
    trainable = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trainable, allow_unused=True)
    return torch.cat([g.float().flatten() for g in found if g is not None])
