"""The noise on embeddings: each document's own, in training alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_sft.model.neftune import EmbeddingNoise


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture
def noisy(model: Any) -> Any:
    """The noise of alpha 5 over documents of these lengths, packed or one call for each of ``parts``."""
    embedding = model.get_input_embeddings()
    noise = EmbeddingNoise(model, 5.0)

    def noise_of(lengths: list[int], parts: list[int] | None = None) -> torch.Tensor:
        ids = torch.arange(sum(lengths))[None]
        torch.manual_seed(0)
        with noise.over(lengths):
            parts = parts or [sum(lengths)]
            found = torch.cat([embedding(part) for part in ids[:, : sum(parts)].split(parts, dim=1)], dim=1)
        return found - embedding(ids)

    yield noise_of
    embedding._forward_hooks.clear()


def test_one_document_alone_gets_what_transformers_gives_it(noisy: Any, model: Any) -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    ours = noisy([30])
    torch.manual_seed(0)
    still = torch.zeros(1, 30, 64)
    theirs = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=5.0), None, still)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_noise_of_a_document_does_not_know_what_it_is_packed_with(noisy: Any) -> None:
    found = noisy([8, 400])
    for part, length in ((found[:, :8], 8), (found[:, 8:], 400)):
        most = 5 / (length * 64) ** 0.5
        assert 0.98 * most < part.abs().max() <= most * 1.001
    torch.testing.assert_close(noisy([8, 400], parts=[8, 400]), found)


def test_there_is_none_outside_of_training_and_no_document_is_missed(noisy: Any, model: Any) -> None:
    embedding = model.get_input_embeddings()
    ids = torch.arange(12)[None]
    assert torch.equal(embedding(ids), embedding.weight[:12][None])
    with pytest.raises(RuntimeError, match="12 tokens were embedded that are no whole documents"):
        noisy([5, 8], parts=[12, 1])
    with pytest.raises(RuntimeError, match="1 documents were embedded without noise"):
        noisy([5, 8], parts=[5])
    assert torch.equal(embedding(ids), embedding.weight[:12][None])
