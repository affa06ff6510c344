"""The leash is the divergence from the base on replay, whatever is packed beside it, and its gradient is autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MakeConfig
from qlora_kernels.packed_ce import PatchedHead
from torch.nn.functional import kl_div

from qlora_sft.data.batch import flatten, replayed_of
from qlora_sft.data.render import Rendered
from qlora_sft.model import leash
from qlora_sft.model.attention import plain_attention
from qlora_sft.model.leash import Head, base_hidden_states, divergence_from
from qlora_sft.model.loss import decode_batch
from qlora_sft.model.setup import prepare_model
from qlora_sft.training.model_snapshot import training_facts


def document(length: int, source: str, first: int) -> Rendered:
    ids = [20 + (first * 31 + 7 * i) % 500 for i in range(length)]
    return Rendered(ids, [0.0, 0.0, *([0.5] * (length - 2))], source)


@pytest.fixture
def model(make_config: MakeConfig, tiny_model: Any) -> Any:
    config = make_config("lora.dropout=0.3")
    torch.manual_seed(0)
    made = prepare_model(config, str(tiny_model), torch.float32, "transformers", 256, lambda _: None)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return made


def test_it_is_the_divergence_of_the_replayed_rows_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed with others as by itself, a few positions and a few rows of the head at a time."""
    vocabulary, width = model.get_output_embeddings().weight.shape
    monkeypatch.setattr(leash, "CHUNK_BYTES", 3 * 4 * leash.BUFFERS * vocabulary)
    monkeypatch.setattr(leash, "TILE_BYTES", 4 * width * 1007)
    assert leash.positions_at_once(vocabulary) == 3
    assert len(list(leash._tiles(leash.head_of(model)))) > 1
    documents = [document(9, "new", 1), document(12, "old", 2), document(7, "new", 3), document(11, "old", 4)]
    replayed = replayed_of(documents, "old")
    assert replayed is not None
    facts, numbers = training_facts(model), torch.get_rng_state()
    base = base_hidden_states(model, replayed)
    assert training_facts(model) == facts
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model.training
    model.eval()  # only to compare: dropout acts in training
    hidden = decode_batch(model, flatten(documents)).hidden[0].detach().requires_grad_()
    found = divergence_from(base, model, hidden, replayed)
    expected = torch.zeros(())
    start = 0
    for each in documents:
        end = start + len(each.input_ids)
        if each.source == "old":
            ids = torch.tensor([each.input_ids])
            with plain_attention(model), torch.no_grad(), model.disable_adapter():
                p = model(input_ids=ids, use_cache=False).logits[0, 1:-1].log_softmax(-1)
            q = model.get_output_embeddings()(hidden[start + 1 : end - 1]).log_softmax(-1)
            expected = expected + 0.5 * kl_div(q, p, reduction="sum", log_target=True)
        start = end
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(2 * each, hidden)[0] for each in (found, expected))
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_there_is_none_without_a_supervised_row_of_replay() -> None:
    assert replayed_of([document(9, "new", 1)], "old") is None
    assert replayed_of([Rendered([5, 6, 7], [0.0, 0.0, 0.0], "old")], "old") is None


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_caps_scales_biases_and_trained_rows_of_the_head(softcap: float | None) -> None:
    draw = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(50, 8, generator=draw), torch.randn(50, generator=draw)
    hidden = torch.randn(6, 8, generator=draw, requires_grad=True)
    base, values = torch.randn(6, 8, generator=draw), torch.randn(2, 8, generator=draw, requires_grad=True)
    weights = torch.rand(6, generator=draw)
    transform: Any = {"logit_scale": 0.7, **({"softcap": softcap} if softcap else {})}
    head = Head(PatchedHead(weight, (3, 41), values), bias, transform)

    def logits(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        z = 0.7 * (x @ matrix.T + bias)
        return (softcap * torch.tanh(z / softcap) if softcap else z).log_softmax(-1)

    patched = weight.index_put((torch.tensor([3, 41]),), values)
    p, q = logits(base, weight), logits(hidden, patched)
    expected = (kl_div(q, p, reduction="none", log_target=True).sum(-1) * weights).sum()
    found = leash._Divergence.apply(hidden, values, base, weights, head)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (hidden, values)), torch.autograd.grad(expected, (hidden, values)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
