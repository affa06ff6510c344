"""Computes the last hidden states of packed documents: all at once, or one document at a time where they cannot share a
packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from qlora_sft.model.attention_tree import tree_of
from qlora_sft.model.base import base_of, decoder_of
from qlora_sft.model.bounds import remember_lengths

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel


class Decoded(NamedTuple):
    """Holds what a decoder returns."""

    hidden: Tensor
    """The hidden states [1, T, D] behind the last norm and before the output head."""
    router_logits: tuple[Tensor, ...] = ()
    """What the routers of a mixture of experts said in every layer that has one, [T, E], if they are asked to tell."""


# Models whose documents are run one at a time, and those whose layers take the number of every token's document.
_one_at_a_time: WeakSet[nn.Module] = WeakSet()
_numbered: WeakSet[nn.Module] = WeakSet()


def run_one_at_a_time(model: CausalModel) -> None:
    """Makes `hidden_states` run the documents of ``model`` one after the other, with transformers' own attention."""
    _one_at_a_time.add(base_of(model))


def one_at_a_time(model: CausalModel) -> bool:
    """Returns whether the documents of a packed sequence are run one after the other."""
    return base_of(model) in _one_at_a_time


def number_documents(model: CausalModel) -> None:
    """Makes `hidden_states` hand on ``seq_idx``, the number of every token's document.

    The kernels of short convolutions and of Mamba take it; models without such layers have no use for it.
    """
    _numbered.add(base_of(model))


def hidden_states(
    model: CausalModel,
    ids: Tensor,
    positions: Tensor,
    bounds: Tensor,
    lengths: Sequence[int],
    longest: int | None = None,
) -> Tensor:
    """Returns the hidden states that `decode` returns."""
    return decode(model, ids, positions, bounds, lengths, longest).hidden


def decode(
    model: CausalModel,
    ids: Tensor,
    positions: Tensor,
    bounds: Tensor,
    lengths: Sequence[int],
    longest: int | None = None,
) -> Decoded:
    """Runs the decoder over packed documents.

    ids and positions [1, T] are of documents with ``lengths`` tokens, between the ``bounds`` int32 [D + 1]; longest:
    tokens of the longest one, by default that of ``lengths``.
    """
    if one_at_a_time(model):
        if tree_of(bounds) is not None:
            raise ValueError("documents that are run one at a time cannot share prefixes; set data.share_prefixes=off")
        return _joined([_decoded_alone(model, part) for part in ids.split(list(lengths), dim=1)])
    remember_lengths(bounds, lengths)
    longest = max(lengths) if longest is None else longest
    numbers = {"seq_idx": document_numbers(lengths, ids.device)} if base_of(model) in _numbered else {}
    output = decoder_of(model)(
        input_ids=ids,
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        use_cache=False,
        **numbers,
    )
    return _decoded(output)


def alone(model: CausalModel, ids: Tensor) -> Tensor:
    """Returns the last hidden states of one document, ids [1, T].

    It needs neither positions nor bounds, which not every family takes.
    """
    return _decoded_alone(model, ids).hidden


def _decoded_alone(model: CausalModel, ids: Tensor) -> Decoded:
    return _decoded(decoder_of(model)(input_ids=ids, use_cache=False))


def _decoded(output: Any) -> Decoded:
    return Decoded(output.last_hidden_state, tuple(getattr(output, "router_logits", None) or ()))


def _joined(parts: list[Decoded]) -> Decoded:
    """Returns what documents that were run one at a time come to, one behind the other."""
    routers = zip(*(part.router_logits for part in parts), strict=True)
    return Decoded(torch.cat([part.hidden for part in parts], dim=1), tuple(torch.cat(layer) for layer in routers))


def document_numbers(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Returns the number of every token's document, int32 [1, T]."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return numbers.int()[None].to(device)
