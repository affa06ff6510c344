"""Computes the last hidden states of packed documents: all at once, or one document at a time where they cannot share a
packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from qlora_sft.model.attention import remember_lengths
from qlora_sft.model.attention_tree import tree_of
from qlora_sft.model.base import base_of, decoder_of

if TYPE_CHECKING:
    from qlora_sft.model.base import CausalModel

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
    """Returns the hidden states [1, T, D] behind the last norm and before the output head.

    ids and positions [1, T] are of documents with ``lengths`` tokens, between the ``bounds`` int32 [D + 1]; longest:
    tokens of the longest one, by default that of ``lengths``.
    """
    if one_at_a_time(model):
        if tree_of(bounds) is not None:
            raise ValueError("documents that are run one at a time cannot share prefixes; set data.share_prefixes=off")
        return torch.cat([alone(model, part) for part in ids.split(list(lengths), dim=1)], dim=1)
    remember_lengths(bounds, lengths)
    longest = max(lengths) if longest is None else longest
    numbers = {"seq_idx": document_numbers(lengths, ids.device)} if base_of(model) in _numbered else {}
    hidden: Tensor = decoder_of(model)(
        input_ids=ids,
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        use_cache=False,
        **numbers,
    ).last_hidden_state
    return hidden


def alone(model: CausalModel, ids: Tensor) -> Tensor:
    """Returns the last hidden states of one document, ids [1, T].

    It needs neither positions nor bounds, which not every family takes.
    """
    hidden: Tensor = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def document_numbers(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Returns the number of every token's document, int32 [1, T]."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return numbers.int()[None].to(device)
