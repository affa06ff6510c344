"""The output head in NF4: the loss of the dequantised head, the bytes that the plan says, and an export that has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora_sft.config import Config
from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError
from qlora_sft.export.merge import merge_run
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.head import loss_weight
from qlora_sft.model.load import load_for_inference, load_model, quantized_modules
from qlora_sft.model.loss import batch_loss
from qlora_sft.plan.blueprint import read_blueprint
from qlora_sft.plan.weights import residents
from qlora_sft.train import train


@pytest.fixture(scope="module")
def untied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an output head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    config = LlamaConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def config(make_config: Any, untied: Path) -> Config:
    return make_config(f"model.path={untied}", "model.load_in_4bit=true", "model.head_in_4bit=true")


def batch() -> Batch:
    return flatten([Rendered(list(range(20, 20 + n)), [0.0] * 3 + [1.0] * (n - 3), "s") for n in (30, 17)])


def test_the_loss_and_its_gradient_are_those_of_the_dequantised_head(config: Config, untied: Path) -> None:
    model = load_model(config, str(untied), torch.float32, "transformers")
    use_document_attention(model)
    assert "lm_head" in quantized_modules(model)
    head = model.get_base_model().get_output_embeddings()

    def loss_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        loss = batch_loss(model, batch()).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    ours = loss_and_gradients()
    dense = torch.nn.Linear(head.in_features, head.out_features, bias=False)
    dense.weight = torch.nn.Parameter(loss_weight(head).dequantize(), requires_grad=False)
    model.get_base_model().set_output_embeddings(dense)
    theirs = loss_and_gradients()
    assert len(ours) > 20
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    original = AutoModelForCausalLM.from_pretrained(untied).lm_head.weight
    error = (dense.weight - original).norm() / original.norm()
    assert 0.01 < error < 0.15


def test_the_plan_counts_its_bytes(config: Config, untied: Path) -> None:
    def nbytes(parameter: Any) -> int:
        state = getattr(parameter, "quant_state", None)
        beside = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code) if state else ()
        return int(parameter.nbytes + sum(tensor.nbytes for tensor in beside))

    model = load_model(config, str(untied), torch.float32, "transformers")
    frozen = sum(nbytes(p) for p in model.parameters() if not p.requires_grad)
    blueprint = read_blueprint(config, str(untied))
    planned = residents(blueprint, config, torch.float32, "adamw_torch")
    assert blueprint.head_in_4bit
    assert planned.nf4 + planned.full == frozen


def test_a_run_is_exported_with_the_head_it_was_trained_with(config: Config) -> None:
    said: list[str] = []
    run = Path(train(config, say=said.append).output)
    assert "lm_head" in json.loads((run / "manifest.json").read_text())["report"]["quantized_modules"]
    result = merge_run(run)
    assert result.onto == "nf4-dequantized"
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        adapter = load_for_inference(run)(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(merged, adapter, rtol=1e-3, atol=1e-3 * float(adapter.std()))


def test_where_the_head_cannot_be_in_nf4(make_config: Any, tiny_model: Path, untied: Path) -> None:
    both = ("model.load_in_4bit=true", "model.head_in_4bit=true")
    with pytest.raises(ConfigError, match="output head is its input embedding, too"):
        load_model(make_config(*both), str(tiny_model), torch.float32, "transformers")
    with pytest.raises(ConfigError, match="output head is its input embedding, too"):
        read_blueprint(make_config(*both), str(tiny_model))
    gemma = make_config(f"model.path={untied}", "model.chat_template=gemma", *both)
    with pytest.raises(ConfigError, match="chat_template=gemma adds tokens whose rows of the head are trained"):
        load_model(gemma, str(untied), torch.float32, "transformers")
    with pytest.raises(ConfigError, match=r"model\.head_in_4bit has no effect without model\.load_in_4bit"):
        make_config("model.head_in_4bit=true")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["model.load_in_4bit=true", "model.head_in_4bit=true"], "output head is its input embedding, too"),
        (["lora.target_modules=[query]"], "no linear layer is named"),
    ],
)
def test_layers_that_are_not_there_are_missed_before_any_row_is_rendered(
    settings: list[str], fault: str, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_sft.run_data.plan_data", lambda *_: pytest.fail("rendered"))
    config = make_config(*settings)
    with pytest.raises(ConfigError, match=fault):
        train(config, say=lambda _: None)
    assert not Path(config.output).exists()
