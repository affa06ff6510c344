"""Training with this loss follows the same curve as training with the textbook loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from qlora_kernels.packed_ce import Targets, packed_linear_cross_entropy
from torch import Tensor

STEPS = 50


def small_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def curve(loss: Callable[[Any, Tensor, Tensor], Tensor], train_head: bool) -> list[float]:
    """Losses of 50 steps of AdamW on two sequences that a small model learns by heart."""
    model = small_model()
    model.get_output_embeddings().weight.requires_grad_(train_head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(0, 160, (2, 48), generator=generator)
    losses = []
    for step in range(STEPS):
        tokens = sequences[step % 2]
        labels = tokens.clone()
        labels[:16] = -100
        hidden = model.model(input_ids=tokens[None]).last_hidden_state[0]
        value = loss(model, hidden, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def our_loss(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    targets = Targets.from_labels(labels, torch.tensor([0, len(labels)]))
    return packed_linear_cross_entropy(hidden, model.get_output_embeddings().weight, targets).loss


def textbook_loss(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    logits = hidden[:-1] @ model.get_output_embeddings().weight.t()
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The model is so small that threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_curve_is_the_textbooks() -> None:
    for train_head in (False, True):
        ours, theirs = curve(our_loss, train_head), curve(textbook_loss, train_head)
        assert theirs[-1] < 0.9 * theirs[0], "nothing was learnt, so nothing is shown"
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
