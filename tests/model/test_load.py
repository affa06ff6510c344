"""NF4 on the real 135M model: what evaluation must not break, and what both backends must agree on."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests_support import with_unsloth

from qlora_sft.config import load_config
from qlora_sft.data.batch import flatten
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import ConfigError
from qlora_sft.model.load import load_base, load_model, quantized_modules, resolve_base
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.tokenizer import load_tokenizer

STEP = """
import sys
from qlora_sft.model.backend import choose_backend
choose_backend("unsloth")
import torch
from safetensors.torch import save_file
from test_load import first_step
from qlora_sft.config import load_config
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.load import load_model, resolve_base
base = resolve_base("demo")
model = load_model(load_config("demo", ["model.backend=unsloth"]), base, torch.bfloat16, "unsloth")
use_document_attention(model)
model.train()
save_file(first_step(model, base), sys.argv[1])
"""


def first_step(model: Any, base: str) -> dict[str, torch.Tensor]:
    """The adapter as it begins, the loss of a few rows of the demo, and its gradients."""
    config = load_config("demo", ["data.train.0.max_rows=4"])
    rows = render_sources(read_sources(config.data.train[:1], 0), config.data, load_tokenizer(config.model, base))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    begun = {name: p.detach().clone() for name, p in trained.items()}
    loss = batch_loss(model, flatten(rows.all_documents)).loss
    loss.backward()
    gradients = {f"grad.{name}": p.grad for name, p in trained.items() if p.grad is not None}
    assert len(gradients) == len(trained)
    return {**begun, **gradients, "loss": loss.detach()}


@pytest.fixture(scope="module")
def nf4_model(base_model: Path) -> Any:
    from qlora_sft.model.attention import use_document_attention

    model = load_model(load_config("demo"), str(base_model), torch.bfloat16, "transformers")
    use_document_attention(model)
    model.train()
    return model


@with_unsloth
def test_both_backends_take_the_same_step_from_the_same_adapter(
    base_model: Path, nf4_model: Any, tmp_path: Path
) -> None:
    """Unsloth in a process of its own, because it changes what it is imported beside; the other model is that of the
    tests below, which has not been trained."""
    file = tmp_path / "unsloth.safetensors"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(file)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    nf4_model.zero_grad()
    ours, theirs = first_step(nf4_model, str(base_model)), load_file(file)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        if not name.startswith("grad.") and name != "loss":
            assert torch.equal(tensor, theirs[name]), f"{name} starts differently"
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-2, atol=0.0)
    for name in (n for n in ours if n.startswith("grad.")):
        error = (ours[name] - theirs[name]).norm()
        assert error <= 2e-2 * ours[name].norm() + 1e-6, name


def test_every_linear_layer_of_every_block_is_nf4_and_has_an_adapter(nf4_model: Any) -> None:
    quantized = quantized_modules(nf4_model)
    assert len(quantized) == len(set(quantized)) == 30 * 7
    assert all(name.startswith("model.layers.") for name in quantized)
    adapted = {
        n.removeprefix("base_model.model.").split(".lora_A")[0]
        for n, _ in nf4_model.named_parameters()
        if "lora_A" in n
    }
    assert adapted == set(quantized)
    trainable = [p for p in nf4_model.parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(quantized)
    assert {p.dtype for p in trainable} == {torch.float32}


def test_an_evaluation_leaves_the_gradient_bitwise_as_it_was(nf4_model: Any, tokenizer: Any) -> None:
    """bitsandbytes repacks NF4 weights at the first inference and never undoes it."""
    from qlora_sft.data.render import render_conversation
    from qlora_sft.data.template import ChatFormat
    from qlora_sft.evaluation.answers import prompts_of
    from qlora_sft.evaluation.evaluated_model import EvaluatedModel
    from qlora_sft.evaluation.generate import generate
    from qlora_sft.evaluation.held_out import held_out_loss

    row = {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]}
    document = render_conversation(row, tokenizer, source="s")

    def gradient() -> dict[str, torch.Tensor]:
        nf4_model.zero_grad()
        batch_loss(nf4_model, flatten([document])).loss.backward()
        return {name: p.grad.clone() for name, p in nf4_model.named_parameters() if p.requires_grad}

    before = gradient()
    held_out_loss(nf4_model, {"s": [document]}, 512, torch.bfloat16)
    evaluated = EvaluatedModel(nf4_model, tokenizer, ChatFormat("", "a test", frozenset({2})), torch.bfloat16)
    generate(evaluated, [prompt.input_ids for prompt in prompts_of(document)], 3)
    after = gradient()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(g.abs().max() > 0 for g in before.values())


def test_what_layers_keep_changes_no_bit_of_an_nf4_gradient(nf4_model: Any) -> None:
    from qlora_sft.data.render import Rendered
    from qlora_sft.evaluation.held_out import autocast
    from qlora_sft.model.base import decoder_layers
    from qlora_sft.model.layer_bytes import measure_layer
    from qlora_sft.model.memory import install

    documents = [Rendered(list(range(9, 9 + size)), [1.0] * size, "s") for size in (40, 24)]
    n_layers = len(decoder_layers(nf4_model))
    layer = measure_layer(nf4_model, 64, torch.bfloat16)
    mixture = ["offload"] * 8 + ["checkpoint"] * 8 + ["attention"] * 8 + ["keep"] * (n_layers - 24)
    gradients = []
    for tiers in (["checkpoint"] * n_layers, mixture):
        install(nf4_model, tiers, 64, layer.input, lambda text: None)
        nf4_model.zero_grad()
        with autocast(nf4_model.device, torch.bfloat16):
            loss = batch_loss(nf4_model, flatten(documents)).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in nf4_model.named_parameters() if p.requires_grad})
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_missing_model_folder_and_a_folder_without_a_model(tmp_path: Path) -> None:
    for path, message in ((str(tmp_path / "none"), "no such folder"), (str(tmp_path), "has no config.json")):
        with pytest.raises(ConfigError, match=message):
            resolve_base(path)


def test_an_unknown_chat_template_lists_the_shipped_ones(base_model: Path) -> None:
    config = load_config("demo", ["model.chat_template=chatmel"])
    with pytest.raises(ConfigError, match=r"chatmel: neither a file nor a shipped template \(.*chatml-think"):
        load_tokenizer(config.model, str(base_model))


def test_an_unknown_target_module_lists_those_there_are(base_model: Path) -> None:
    config = load_config("demo", ["lora.target_modules=[query]"])
    with pytest.raises(ConfigError, match=r"no linear layer is named \['query'\]; this model has .*q_proj"):
        load_model(config, str(base_model), torch.bfloat16, "transformers")


def test_layers_of_a_width_that_nf4_has_no_blocks_for_stay_as_they_are(tmp_path: Path) -> None:
    """bitsandbytes on a CPU takes a block that goes on in the next row for another."""
    from tiny_models import write_tiny

    from qlora_sft.plan.blueprint import read_blueprint

    base = write_tiny("llama", tmp_path, intermediate_size=96)
    config = load_config("demo", ["model.chat_template=null"])
    model = load_base(str(base), torch.float32, load_in_4bit=True)
    names = {name.rsplit(".", 1)[-1] for name in quantized_modules(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    planned = {linear.name for linear in read_blueprint(config, str(base)).linears if linear.quantized}
    assert planned == set(quantized_modules(model))
