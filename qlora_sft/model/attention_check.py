"""Before training: a few documents in one row must come out as each of them does alone.

A model may carry attention of its own that takes no notice of document bounds, or mix tokens elsewhere (convolutions,
recurrent states). Training would go on, with every document conditioned on strangers, and nothing would show it.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_sft.errors import RunError
from qlora_sft.model.attention import Way, use_document_attention
from qlora_sft.model.base import base_of, has_unsloths_forward
from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_sft.model.base import CausalModel

LENGTHS = (11, 1, 23)
# Relative difference of the hidden states that rounding explains. Packed and alone, matrix products have other shapes
# and add up in another order; in a type of spacing eps that grows to about eps * sqrt(layers). A leak gives 0.1 to 1.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def use_checked_attention(
    model: CausalModel, dtype: torch.dtype, say: Say, way: Way = "varlen", reason: str = ""
) -> None:
    """`use_document_attention`, its choice printed, and the check. Raises `RunError` where packing mixes documents."""
    base = base_of(model)
    try:
        choice = use_document_attention(model, way, reason)
        if has_unsloths_forward(base):
            choice = "as Unsloth does it (documents begin where positions do)"
        say(f"attention: {choice}")
        difference = packed_against_separate(model, dtype)
    except (ValueError, NotImplementedError) as error:
        raise RunError(f"{type(base).__name__}: {error}. {_cure(base)}") from None
    # A difference that is not a number is no agreement either.
    if not difference <= TOLERANCE[dtype]:
        raise RunError(
            f"{type(base).__name__}: documents in one row see each other: hidden states differ by {difference:.1e} "
            f"from those of the same documents alone (rounding explains {TOLERANCE[dtype]:.0e}). {_cure(base)}"
        )
    say(f"attention check: {len(LENGTHS)} documents packed and alone agree within {difference:.0e}")


def packed_against_separate(model: CausalModel, dtype: torch.dtype) -> float:
    """Largest ``|packed - alone| / |alone|`` of the hidden states of any document; the model stays in its mode."""
    base = base_of(model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).to(base.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(base.device.type, dtype=dtype, enabled=dtype != torch.float32):
            packed = _hidden_states(base, ids, LENGTHS)
            edges = pairwise(accumulate(LENGTHS, initial=0))
            return max(_difference(packed[a:b], _hidden_states(base, ids[a:b], (b - a,))) for a, b in edges)
    finally:
        model.train(training)


def _hidden_states(base: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """ids [T], documents of ``lengths`` behind one another -> [T, D], float32."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device)
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    output = base.get_decoder()(
        input_ids=ids[None], position_ids=positions[None], cu_seq_lens_q=bounds, cu_seq_lens_k=bounds,
        max_length_q=max(lengths), max_length_k=max(lengths), use_cache=False,
    )  # fmt: skip
    hidden: Tensor = output.last_hidden_state.squeeze(0).float()
    return hidden


def _difference(packed: Tensor, alone: Tensor) -> float:
    return float((packed - alone).norm() / alone.norm())


def _cure(base: PreTrainedModel) -> str:
    if has_unsloths_forward(base):
        return "Set model.backend=transformers: this may be Unsloth's version of the model."
    return "Rows hold several documents here, so this model cannot be trained; take one whose layers only attend."
