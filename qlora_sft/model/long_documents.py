"""Lets what changes with length or place in long texts go by each document, and not by the packed sequence.

It shows only behind thousands of tokens, so the check of three short documents before training sees none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qlora_sft.model.attention_tree import tree_of
from qlora_sft.model.base import decoder_of
from qlora_sft.model.bounds import lengths_of
from qlora_sft.model.mixers import ByDocument, run_by_document

if TYPE_CHECKING:
    from qlora_sft.json_types import JsonObject
    from qlora_sft.model.base import CausalModel


def at_own_temperature(module: nn.Module, query: Tensor, bounds: Tensor) -> Tensor:
    """Returns the queries [1, H, T, d] of a layer without positions of Llama 4 as they are in their documents alone.

    Such a layer scales them by steps of thousands of places, which transformers counts from the start of the row.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    floor, scale = (float(getattr(module, name)) for name in ("floor_scale", "attn_scale"))
    places = torch.arange(query.shape[2], device=query.device)
    if len(places) < floor:
        return query
    if tree_of(bounds) is not None:
        raise ValueError(f"{type(module).__name__} scales queries by their place, not over a tree")
    own = places - bounds[torch.searchsorted(bounds, places, right=True) - 1]
    given, wanted = (torch.log1p(torch.floor((each.float() + 1.0) / floor)) * scale + 1.0 for each in (places, own))
    return (query * (wanted / given)[:, None]).to(query.dtype)


def longest_short(settings: JsonObject) -> int | None:
    """Returns how long a document may be before all of its positions turn in another way (LongRoPE, as in Phi-3 and
    Phi-4-mini); None for a model that has none of this.

    ``settings``: the configuration of the language model.
    """
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict) or rope.get("rope_type") != "longrope":
        return None
    most = rope.get("original_max_position_embeddings") or settings.get("max_position_embeddings")
    return most if isinstance(most, int) else None


def turn_by_document(model: CausalModel) -> None:
    """Makes ``model`` turn the positions of each packed document by its own length, where it has LongRoPE.

    transformers goes by the longest of the row, and the short ones in it would have the positions of long ones.
    """
    decoder = decoder_of(model)
    most, rotary = longest_short(decoder.config.to_dict()), getattr(decoder, "rotary_emb", None)
    if most is None or not isinstance(rotary, nn.Module) or isinstance(rotary, ByDocument):
        return
    run_by_document(rotary)

    def hand_bounds(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, Tensor]) -> None:
        bounds = kwargs.get("cu_seq_lens_q")
        tree = tree_of(bounds) if bounds is not None else None
        if tree is not None and tree.longest > most:
            raise ValueError(f"rows of more than {most} tokens cannot share prefixes here; set data.share_prefixes=off")
        long = bounds is not None and max(lengths_of(bounds)) > most
        rotary.document_bounds = bounds if long else None  # type: ignore[assignment]

    decoder.register_forward_pre_hook(hand_bounds, with_kwargs=True)
