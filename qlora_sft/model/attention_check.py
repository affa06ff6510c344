"""Decides before training how the documents of a packed sequence are kept apart, and checks that they are.

They are computed together, in one sequence, wherever that is exact: attention goes by document, and recurrent and
convolutional layers are told where documents begin, or run one document after the other. A model that still mixes
documents, or attends in a way of its own, gets its documents one at a time. Nothing else of a run changes with that,
and nothing is refused for it.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_sft.errors import ConfigError, RunError, first_line
from qlora_sft.model.attention import Way, plain_attention, use_document_attention, use_plain_attention
from qlora_sft.model.base import base_of, decoder_layers, has_unsloths_forward
from qlora_sft.model.hidden import alone, hidden_states, number_documents, run_one_at_a_time
from qlora_sft.model.leaks import leak
from qlora_sft.model.long_documents import turn_by_document
from qlora_sft.model.mixers import mix_by_document, mixers_of, use_adapted_projections
from qlora_sft.say import Say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_sft.model.base import CausalModel

LENGTHS = (11, 1, 23)
# The relative difference of hidden states that rounding explains. Packed documents give matrix products other shapes,
# in which sums are taken in another order. In a type of spacing eps the difference grows to about eps * sqrt(layers). A
# leak gives 0.1 to 1.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# The errors that the forward of a family raises if it does not take what it is given here.
FAILURES = (ValueError, NotImplementedError, TypeError, AttributeError, KeyError, IndexError, RuntimeError)


def use_checked_attention(
    model: CausalModel, dtype: torch.dtype, say: Say, way: Way = "varlen", reason: str = ""
) -> None:
    """Chooses how the documents of a packed sequence are kept apart, checks that they are, and prints both.

    Raises `ConfigError` for a model that is no causal language model, `RunError` for Unsloth's version of one that
    mixes documents.
    """
    base = base_of(model)
    mixers = sum(len(mixers_of(layer)) for layer in decoder_layers(model))
    if mixers:
        number_documents(model)
        use_adapted_projections(model)
    obstacle = _use_shared_rows(model, dtype, say, mixers, way, reason)
    if not obstacle:
        return
    if has_unsloths_forward(base):
        raise RunError(f"{obstacle}. Set model.backend=transformers: this may be Unsloth's version of the model.")
    run_one_at_a_time(model)
    use_plain_attention(model)
    remaining = obstacle_in(model, dtype, LENGTHS[-1:])
    if remaining:
        raise ConfigError(f"model.path: {type(base).__name__} cannot be trained here: {remaining}")
    say(f"documents: one at a time, not packed, because {obstacle}; same result, slower if they are short")


def _use_shared_rows(model: CausalModel, dtype: torch.dtype, say: Say, mixers: int, way: Way, reason: str) -> str:
    """Returns why documents cannot share a packed sequence; "" if they can, and then all is set for it.

    mixers: recurrent and convolutional layers of the model.
    """
    try:
        choice = use_document_attention(model, way, reason)
    except ValueError as error:
        return str(error)
    if has_unsloths_forward(base_of(model)):
        choice = "as Unsloth does it (documents begin where positions do)"
    else:
        turn_by_document(model)
    obstacle = obstacle_in(model, dtype, LENGTHS)
    how = "their kernels take the bounds of documents"
    if obstacle and mixers:
        mix_by_document(model)
        how = "document by document, because their kernels are not installed or take no bounds"
        obstacle = obstacle_in(model, dtype, LENGTHS)
    if obstacle:
        return obstacle
    say(f"attention: {choice}")
    if mixers:
        say(f"recurrent and convolutional layers: {mixers}, {how}")
    difference = packed_against_separate(model, dtype)
    say(f"attention check: {len(LENGTHS)} documents packed and alone agree within {difference:.0e}, none sees another")
    return ""


def obstacle_in(model: CausalModel, dtype: torch.dtype, lengths: tuple[int, ...]) -> str:
    """Says what is wrong with packed documents of ``lengths``: one is seen by another, or by its own past, or comes
    out as it does not alone. "" if nothing is; the model stays in its mode."""
    base = base_of(model)
    try:
        with Asking(base, dtype):
            obstacle = leak(base, partial(_hidden_states, base), some_ids(base, lengths), lengths)
        difference = 0.0 if obstacle or len(lengths) == 1 else packed_against_separate(model, dtype)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"{type(base).__name__}: {first_line(error)}"
    # A difference that is not a number is no agreement either.
    if not difference <= TOLERANCE[dtype]:
        obstacle = (
            f"hidden states of packed documents differ by {difference:.1e} from those of the same documents alone "
            f"(rounding explains {TOLERANCE[dtype]:.0e})"
        )
    return f"{type(base).__name__}: {obstacle}" if obstacle else ""


def packed_against_separate(model: CausalModel, dtype: torch.dtype) -> float:
    """Computes how far the hidden states of packed documents are from those of the same documents alone.

    Returns the largest ``|packed - alone| / |alone|`` of any document. Alone, a document is run as transformers does
    it, with its own attention and the positions that the model counts. The model stays in its mode.
    """
    base = base_of(model)
    ids = some_ids(base, LENGTHS)
    with torch.no_grad(), Asking(base, dtype):
        packed = _hidden_states(base, ids, LENGTHS).split(LENGTHS)
        with plain_attention(base):
            apart = [alone(base, part[None]).squeeze(0).float() for part in ids.split(LENGTHS)]
        return max(_difference(*pair) for pair in zip(packed, apart, strict=True))


class Asking:
    """Puts ``base`` into evaluation mode under the autocast of training, inside a ``with`` block."""

    def __init__(self, base: PreTrainedModel, dtype: torch.dtype):
        self.base, self.training = base, base.training
        self.autocast = torch.autocast(base.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def __enter__(self) -> None:
        self.base.eval()
        self.autocast.__enter__()

    def __exit__(self, *error: object) -> None:
        self.autocast.__exit__(*error)
        self.base.train(self.training)


def some_ids(base: PreTrainedModel, lengths: tuple[int, ...]) -> Tensor:
    """Returns random token ids for documents of ``lengths``, one after the other; they are the same in every call."""
    vocabulary = base.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(0)).to(base.device)


def _hidden_states(base: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Computes the hidden states of documents that stand one behind the other: ids [T] -> float32 [T, D].

    lengths: tokens of each document.
    """
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device)
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])
    return hidden_states(base, ids[None], positions[None], bounds, lengths).squeeze(0).float()


def _difference(packed: Tensor, apart: Tensor) -> float:
    return float((packed - apart).norm() / apart.norm())
