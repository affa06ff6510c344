"""A row of documents -> its last hidden states: all at once, or one at a time where documents cannot share a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from qlora_sft.model.attention import remember_lengths
from qlora_sft.model.base import base_of, decoder_of

# Where the choice is kept: on the model, like its attention.
ONE_AT_A_TIME = "_documents_one_at_a_time"
NUMBERED = "_documents_numbered"


def run_one_at_a_time(model: Any) -> None:
    """Makes `hidden_states` run the documents of a row one after the other. They need no attention of ours then."""
    setattr(base_of(model), ONE_AT_A_TIME, True)


def one_at_a_time(model: Any) -> bool:
    """Returns whether the documents of a row are run one after the other."""
    return bool(getattr(base_of(model), ONE_AT_A_TIME, False))


def number_documents(model: Any) -> None:
    """Makes `hidden_states` hand on ``seq_idx``, the number of every token's document, which the kernels of short
    convolutions and of Mamba take. Models without such layers have no use for it."""
    setattr(base_of(model), NUMBERED, True)


def hidden_states(model: Any, ids: Tensor, positions: Tensor, bounds: Tensor, lengths: Sequence[int]) -> Tensor:
    """ids and positions [1, T], bounds int32 [D + 1] of documents with ``lengths`` -> [1, T, D], behind the last norm
    and before the output head."""
    if one_at_a_time(model):
        return torch.cat([alone(model, part) for part in ids.split(list(lengths), dim=1)], dim=1)
    remember_lengths(bounds, lengths)
    longest = max(lengths)
    output = decoder_of(model)(
        input_ids=ids,
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        **_numbered(model, lengths, ids.device),
        use_cache=False,
    )
    return cast(Tensor, output.last_hidden_state)


def alone(model: Any, ids: Tensor) -> Tensor:
    """Returns the last hidden states of one document, ids [1, T]; it needs neither positions nor bounds, which not
    every family takes."""
    return cast(Tensor, decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state)


def _numbered(model: Any, lengths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    if not getattr(base_of(model), NUMBERED, False):
        return {}
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    return {"seq_idx": numbers[None].to(device)}
