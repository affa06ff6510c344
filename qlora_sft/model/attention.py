"""Attends causally inside each document of a packed sequence, and never across documents.

The function is registered with transformers under a name of our own. It is told the bounds of the documents by
``cu_seq_lens_q``, an argument that transformers hands to every attention function. So the model itself is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_sft.config import AttentionWay
from qlora_sft.model.attention_capped import Scores, flex_documents, in_band, plain_documents
from qlora_sft.model.attention_tree import CPU, CUDA, tree_attention, tree_of
from qlora_sft.model.base import base_of
from qlora_sft.model.bounds import chunked, parts_of
from qlora_sft.model.long_documents import at_own_temperature

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qlora_sft.model.base import CausalModel

NAME = "qlora_documents"
# The same attention, but with one call of sdpa per document, also where a GPU could take all documents at once. It is
# faster where documents are long.
NAME_ONE_BY_ONE = "qlora_documents_one_by_one"
Way = AttentionWay
# What layers may be: those that attend to all of a document, to a window or to chunks of it; those that mix tokens
# without attention (`mixers.py`); and those that look at one token at a time. Others choose by themselves what they
# attend to (sparse attention), by scores over the whole row.
CHUNKS, WINDOWS = "chunked_attention", "sliding_attention"
LAYER_TYPES = {"full_attention", WINDOWS, CHUNKS, "linear_attention", "conv", "hybrid", "mlp", "moe"}
# Families whose layers transformers does not tell where documents begin, or that reckon with the whole row in another
# way. The check before training finds them, too, but a plan has no weights to check. A test holds this to what is so.
RECURRENT = "its recurrent layers are not told where documents begin"
ATTENTION = "its attention is not told where documents begin"
POSITIONS = "it reckons with positions in the whole row"
NOT_TOLD = {
    "falcon_mamba": RECURRENT, "mamba": RECURRENT, "xlstm": RECURRENT,
    "bigbird_pegasus": ATTENTION, "doge": ATTENTION, "moshi": ATTENTION, "nemotron": ATTENTION, "stablelm": ATTENTION,
    "bart": POSITIONS, "blenderbot": POSITIONS, "blenderbot-small": POSITIONS, "marian": POSITIONS, "mbart": POSITIONS,
    "pegasus": POSITIONS, "phimoe": POSITIONS, "plbart": POSITIONS,
}  # fmt: skip


def document_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    one_by_one: bool = False,
    **_: object,
) -> tuple[Tensor, None]:
    """Attends to the tokens of the same document that are not behind the query.

    query [1, H, T, d], key and value [1, Hkv, T, d], cu_seq_lens_q int32 [D + 1] (the bounds of D documents) ->
    [1, T, H, d].

    ``sliding_window``: a token sees itself and the ``sliding_window - 1`` before it. ``softcap``: logits become
    ``cap * tanh(logit / cap)``. ``s_aux`` [H]: attention sinks. Each is one more logit of its head in the softmax, and
    its weight goes to no token. Raises ValueError rather than attend across documents, or in another way than the
    model asks for.
    """
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            f"{NAME} needs one flat row and its cu_seq_lens_q, and takes no mask; got batch {query.shape[0]}, "
            f"mask {'none' if attention_mask is None else list(attention_mask.shape)}. Use sdpa for other inputs."
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME} is causal; {type(module).__name__} attends in both directions")
    if sliding_window is None and kind_of(module) == WINDOWS:
        # Qwen2-MoE knows its window and does not hand it on: transformers has it in the mask alone.
        sliding_window = getattr(module, "sliding_window", None)
    query = at_own_temperature(module, query, cu_seq_lens_q)
    tree, chunk = tree_of(cu_seq_lens_q), chunk_of(module)
    if tree is not None and (chunk is not None or dropout):
        raise ValueError(f"{type(module).__name__} attends in chunks or with dropout, not over a tree")
    longest = tree.longest if tree is not None else max_length_q
    if longest is None:
        longest = int((cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).max())
    if chunk is not None and chunk < longest:
        cu_seq_lens_q, longest = chunked(cu_seq_lens_q, chunk), chunk
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    capped = softcap is not None or s_aux is not None
    if tree is not None and window is None and not capped:
        return tree_attention(query, key, value, tree, scaling, CUDA if query.is_cuda else CPU), None
    path = choose_path(query.device, query.dtype, query.shape[-1], capped, dropout > 0).name
    if tree is not None and query.is_cuda:
        path = "flex"  # FlashAttention's window counts from the end of the keys, and not along a row's path.
    scores = Scores(scaling, window, softcap, s_aux, dropout)
    if path == "varlen" and one_by_one and window is None:
        return _one_by_one(query, key, value, cu_seq_lens_q, scores, repeats=False), None
    if path == "varlen":
        return _varlen(query, key, value, cu_seq_lens_q, longest, scaling, window), None
    if path == "sdpa":
        # On a GPU without FlashAttention, torch shares keys only in its plain kernel, which forms all T x T weights.
        return _one_by_one(query, key, value, cu_seq_lens_q, scores, repeats=query.is_cuda), None
    if path == "flex":
        return flex_documents(query, key, value, cu_seq_lens_q, scores), None
    return plain_documents(query, key, value, cu_seq_lens_q, scores), None


class AttentionPath(NamedTuple):
    name: Literal["varlen", "sdpa", "flex", "plain"]
    reason: str


@cache
def choose_path(
    device: torch.device, dtype: torch.dtype, head_size: int, capped: bool, dropout: bool = False
) -> AttentionPath:
    """Chooses how documents are attended to, and says why.

    capped: the model caps its logits or has attention sinks, which FlashAttention lacks. dropout: it drops some of its
    attention in training (Seed-OSS).
    """
    if device.type != "cuda":
        if capped:
            return AttentionPath(
                "plain", "document by document in plain products, because the model caps logits or has sinks"
            )
        return AttentionPath("sdpa", f"document by document, on a {device.type}, the only way there")
    if capped and dropout:
        return AttentionPath(
            "plain", "document by document in plain products: FlexAttention has no dropout, which this model asks for"
        )
    if capped:
        return AttentionPath(
            "flex", "FlexAttention, compiled at the first step: the model caps logits or has attention sinks"
        )
    slower = "document by document, slower with many short ones: FlashAttention"
    if dtype not in (torch.bfloat16, torch.float16):
        return AttentionPath(
            "sdpa", f"{slower} computes in 16 bits only, this run in {str(dtype).removeprefix('torch.')}"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        return AttentionPath("sdpa", f"{slower} needs compute capability 8.0")
    if head_size > 256:
        return AttentionPath("sdpa", f"{slower} has heads of up to 256, this model of {head_size}")
    # Imported here and below, because it takes as long as all of torch, and to prepare data it is not needed.
    from torch.nn.attention import varlen

    if not {"scale", "window_size"} <= signature(varlen.varlen_attn).parameters.keys():
        return AttentionPath("sdpa", f"{slower} takes neither scale nor window before torch 2.11")
    if dropout:
        return AttentionPath("sdpa", f"{slower} over all documents at once has no dropout, which this model asks for")
    return AttentionPath("varlen", "FlashAttention over all documents at once")


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scores: Scores, repeats: bool) -> Tensor:
    """Attends with one call per document. On a CPU that is twice as fast as one call with a block-diagonal mask (2,048
    tokens in 8 documents: 5.2 s against 11.1 s for forward and backward of the whole model).

    repeats: keys and values are copied for every head that shares them, for kernels that need as many.
    """
    scaling, window, _, _, dropout = scores
    grouped = query.shape[1] != key.shape[1]
    if grouped and repeats:
        times = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), False
    outputs = []
    for q, k, v in parts_of(query, key, value, bounds, window):
        queries, keys = q.shape[2], k.shape[2]
        whole = queries == keys and (window is None or window >= queries)
        band = None if whole else in_band(queries, keys, window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, dropout_p=dropout, is_causal=band is None, scale=scaling, enable_gqa=grouped
            )
        )
    if len(outputs) == 1:
        return outputs[0].transpose(1, 2)
    # Joined in the order in which the next layer reads them, which saves it a copy.
    return torch.cat([out.transpose(1, 2) for out in outputs], dim=1)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """Attends with torch's own variable-length FlashAttention: one launch, no mask, and the host does not wait."""
    from torch.nn.attention import varlen

    # Before torch 2.13 there is no argument enable_gqa: keys and values with fewer heads are shared unasked.
    grouped: dict[str, Any] = {}
    if "enable_gqa" in signature(varlen.varlen_attn).parameters:
        grouped["enable_gqa"] = query.shape[1] != key.shape[1]
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    # A token attends to so many tokens on its left (-1: any number), and to none on its right.
    left = -1 if window is None else window - 1
    out = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), **grouped)
    return cast(Tensor, out).unsqueeze(0)


def why_one_at_a_time(model: CausalModel) -> str:
    """Says why documents of ``model`` cannot share a row, as far as that is known without its weights; "" if they can.

    Leaves the model's attention as it was.
    """
    before = base_of(model).config._attn_implementation
    try:
        use_document_attention(model)
    except ValueError as error:
        return str(error)
    finally:
        switch(base_of(model), before)
    return ""


def switch(base: PreTrainedModel, name: str) -> None:
    """Switches the language model of ``base`` to the attention function that transformers knows as ``name``.

    Towers for images and sound keep theirs: texts pass them by, and some of them can do no other.
    """
    config = base.config
    text = config.get_text_config()
    found = {key: getattr(config, key, None) for key in config.sub_configs}
    parts = {key: part for key, part in found.items() if part is not None}
    towers = {key: part._attn_implementation for key, part in parts.items() if part.get_text_config() is not text}
    base.set_attn_implementation({"": name, **dict.fromkeys(parts, name), **towers})


def chunk_of(module: nn.Module) -> int | None:
    """Returns the size of the chunks that an attention layer attends inside of; None if it is not of that kind."""
    return int(module.config.attention_chunk_size) if kind_of(module) == CHUNKS else None  # type: ignore[union-attr, arg-type]


def kind_of(module: nn.Module) -> str | None:
    """Returns of which type an attention layer is, by its number in the configuration; None where it has none."""
    types = getattr(getattr(module, "config", None), "layer_types", None) or ()
    number = getattr(module, "layer_idx", None)
    return None if number is None or number >= len(types) else str(types[number])


def _no_mask(*_: object, **__: object) -> None:
    """Makes no mask. transformers asks for one for every attention function, but the bounds say all that it would."""
    return None


def register() -> None:
    """Makes our attention known to transformers under both of its names."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, document_attention)
    AttentionInterface.register(NAME_ONE_BY_ONE, partial(document_attention, one_by_one=True))
    for name in (NAME, NAME_ONE_BY_ONE):
        AttentionMaskInterface.register(name, _no_mask)


def use_document_attention(model: CausalModel, way: Way = "varlen", reason: str = "") -> str:
    """Switches ``model`` to attention by document; returns in which way, with the reason, to print.

    way: for a GPU that could do either. sdpa takes documents one by one, with the fastest of torch's kernels, which
    pays where documents are long; the others all in one call, of the kernels that `flash_switch` has switched to.
    reason: why this one, to be printed with it.

    Raises ValueError if the model does not follow the switch, or has layers that attend in a way of their own.
    """
    register()
    name = NAME_ONE_BY_ONE if way == "sdpa" else NAME
    base = base_of(model)
    switch(base, name)
    config = base.config.get_text_config()
    if base.config._attn_implementation != name or config._attn_implementation != name:
        raise ValueError(f"{type(base).__name__} keeps its own attention")
    told = NOT_TOLD.get(config.model_type)
    if told is not None:
        raise ValueError(f"{type(base).__name__}: {told}")
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if unknown:
        kinds = ", ".join(unknown)
        raise ValueError(f"{type(base).__name__} has layers of type {kinds}, which choose what they attend to")
    path = choose_path(base.device, base.dtype, head_size_of(config), _capped(base), drops(config))
    if path.name != "varlen":
        return f"{path.name} ({path.reason})"
    said = "one call per document" if way == "sdpa" else path.reason
    return f"{way} ({said}{': ' if reason else ''}{reason})"


def drops(config: PretrainedConfig) -> bool:
    """Says whether a model drops some of its attention in training. ``config``: of the language model."""
    return bool(getattr(config, "attention_dropout", None))


def head_size_of(config: PretrainedConfig) -> int:
    """Returns the size of the largest attention head; 0 for a model without attention.

    ``config``: of the language model. Where layers differ (Gemma 4), it answers for single layers only.
    """
    return max(_head_size(layer) for layer in layer_settings(config))


def layer_settings(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Returns the configuration of every layer where they differ, else the one that all have."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def _head_size(config: PretrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    count = getattr(config, "num_attention_heads", None)
    if isinstance(given, int) and given:
        return given
    return int(config.hidden_size) // count if isinstance(count, int) and count else 0


def _capped(base: PreTrainedModel) -> bool:
    """Says whether attention does something to its logits that sdpa and FlashAttention cannot do."""
    softcap = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
    return softcap is not None or not getattr(base, "_supports_sdpa", True)


def use_plain_attention(model: CausalModel) -> None:
    """Switches ``model`` to transformers' own attention: sdpa, or eager where sdpa would leave out a cap on the logits
    or attention sinks."""
    base = base_of(model)
    switch(base, "eager" if _capped(base) else "sdpa")


@contextmanager
def plain_attention(model: CausalModel) -> Iterator[None]:
    """Lets ``model`` use transformers' own attention inside the ``with`` block, for padded batches and generation."""
    base = base_of(model)
    before = base.config._attn_implementation
    use_plain_attention(model)
    try:
        yield
    finally:
        switch(base, before)
