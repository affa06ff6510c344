"""Packing and accumulation change the speed and nothing else: equal losses, step by step, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests_support import documents_of

from qlora_sft.config import Config
from qlora_sft.data.batch import longest_micro_batch
from qlora_sft.data.render import Rendered
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.load import load_model
from qlora_sft.model.memory import use_memory
from qlora_sft.model.tokenizer import load_tokenizer
from qlora_sft.training.fit import Training, fit
from qlora_sft.training.run_folder import Beginning, begin_run


def run_bins(
    config: Config, documents: list[Rendered], bins: list[list[int]], shares_prefixes: bool = False
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and the trained adapter."""
    base = config.model.path
    model = load_model(config, base, torch.float32, "transformers")
    use_document_attention(model)
    run = Path(config.output)
    begin_run(run, config, Beginning("", None, "float32", "transformers"))
    tokens = longest_micro_batch(
        [sum(len(documents[i].input_ids) for i in each) for each in bins], config.training.batch_size
    )
    with use_memory(model, config, tokens, torch.float32, lambda _: None, shares_prefixes):
        tokenizer = load_tokenizer(config.model, base)
        training = Training(
            config, run, lambda _: None, model, tokenizer, torch.float32, documents, bins, shares_prefixes
        )
        fit(training, keep_less=lambda _: False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], {
        n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
    }


def assert_same(first: Any, second: Any, tolerance: float) -> None:
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(second[0]), rtol=tolerance, atol=0.0)
    for name, tensor in first[1].items():
        torch.testing.assert_close(tensor, second[1][name], rtol=1e-3, atol=2e-5, msg=name)


BINS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_packed_and_unpacked_training_are_the_same(make_config: Any) -> None:
    """Four documents in one row, or four rows of one document accumulated: three optimizer steps of both."""
    config = make_config("training.learning_rate=1e-3")
    documents = documents_of(config)
    packed = run_bins(config, documents, BINS)
    config = make_config("training.learning_rate=1e-3", "training.gradient_accumulation=4")
    unpacked = run_bins(config, documents, [[i] for each in BINS for i in each])
    assert len(packed[0]) == 3
    assert packed[0][0] != packed[0][1]
    assert_same(packed, unpacked, 1e-5)


@pytest.mark.parametrize("policy", ["none", "checkpoint", "offload"])
def test_sharing_prefixes_changes_speed_and_nothing_else(make_config: Any, policy: str) -> None:
    """Four documents behind one prompt, one of them twice, computed once or one by one: three steps of both."""
    config = make_config("training.learning_rate=1e-3", f"memory.policy={policy}")
    drawn = documents_of(config)[:6]
    prompt = (drawn[0].input_ids * 4)[:70]
    documents = [
        Rendered(prompt[: 70 - 16 * (n % 2)] + d.input_ids, [0.0] * (70 - 16 * (n % 2)) + d.weights, "s")
        for n, d in enumerate(drawn)
    ]
    bins = [[0, 1, 2, 0], [3, 4, 5], [1, 2, 4]]
    alone = run_bins(config, documents, bins)
    shared = run_bins(config, documents, bins, shares_prefixes=True)
    assert_same(alone, shared, 1e-5)


def test_accumulating_1x8_is_8x1(make_config: Any) -> None:
    """Rows of very different numbers of supervised tokens, so that a mean of means would show."""
    bins = [[i] for i in range(8)]
    config = make_config("training.batch_size=8", "training.learning_rate=1e-3")
    documents = documents_of(config)
    assert len({d.n_supervised for d in documents[:8]}) > 3
    together = run_bins(config, documents, bins)
    config = make_config("training.gradient_accumulation=8", "training.learning_rate=1e-3")
    assert_same(together, run_bins(config, documents, bins), 1e-6)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(make_config: Any) -> None:
    """Against the textbook: every document alone through transformers, one mean over all supervised tokens."""
    from transformers import AutoModelForCausalLM

    config = make_config("training.gradient_accumulation=4")
    documents = documents_of(config)
    losses, _ = run_bins(config, documents, [[0, 1], [2], [3], [4, 5]])
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    nll = []
    for document in documents[:6]:
        logits = model(input_ids=torch.tensor([document.input_ids])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(document.input_ids[1:]), reduction="none")
        nll.append(each[torch.tensor(document.weights[1:]) > 0])
    assert losses[0] == pytest.approx(float(torch.cat(nll).mean().detach()), rel=1e-5)


def test_the_same_seed_gives_the_same_run_bit_for_bit(make_config: Any) -> None:
    config = make_config("lora.dropout=0.1")
    documents = documents_of(config)
    first, second = (run_bins(config, documents, BINS) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("policy", ["none", "offload", "auto"])
def test_what_layers_keep_changes_no_bit(make_config: Any, policy: str) -> None:
    config = make_config("memory.policy=checkpoint", "lora.dropout=0.1")
    documents = documents_of(config)
    first = run_bins(config, documents, BINS)
    second = run_bins(make_config(f"memory.policy={policy}", "lora.dropout=0.1"), documents, BINS)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_group_without_supervised_tokens_trains_nothing_and_breaks_nothing(make_config: Any) -> None:
    config = make_config()
    documents = documents_of(config)
    mute = Rendered(documents[0].input_ids, [0.0] * len(documents[0].input_ids), "s")
    losses, adapter = run_bins(config, [mute, documents[1]], [[0], [1]])
    assert losses[0] is None
    assert losses[1] > 0.0
    assert all(tensor.isfinite().all() for tensor in adapter.values())


def test_the_adapter_on_disk_is_the_adapter_in_memory(make_config: Any) -> None:
    from qlora_sft.train import train

    config = make_config("training.max_steps=2")
    report = train(config, say=lambda _: None)
    saved = load_file(Path(report.output) / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 7
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    manifest = json.loads((Path(report.output) / "manifest.json").read_text())
    assert manifest["report"]["steps"] == 2
    assert manifest["data"]["chat"]["kept"] == 12
    assert len(manifest["data"]["chat"]["sha256"]) == 64
