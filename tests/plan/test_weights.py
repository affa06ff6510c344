"""The plan's bytes of what stays on the device are those of the loaded model after an optimizer step, exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from moe_bases import write_base
from tests_support import bare_base
from transformers import AutoTokenizer

from qlora_sft.config import Config, load_config
from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.base import decoder_layers
from qlora_sft.model.load import load_model
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.memory_budget import optimizer_bytes
from qlora_sft.model.shards import layer_bytes, tensors_to_cut
from qlora_sft.plan.blueprint import Blueprint, check_headers, read_blueprint
from qlora_sft.plan.weights import adapter_tensors, nf4_bytes, residents


def configured(*overrides: str) -> Config:
    return load_config("demo", ["model.backend=transformers", *overrides])


def after_one_step(config: Config, base: Path, dtype: torch.dtype) -> tuple[Any, torch.optim.Optimizer]:
    model = load_model(config, str(base), dtype, "transformers")
    use_document_attention(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    batch_loss(model, flatten([Rendered(list(range(20, 40)), [1.0] * 20, "s")])).loss.backward()
    optimizer.step()
    return model, optimizer


def stored(parameter: Any) -> int:
    """With everything that bitsandbytes keeps beside a packed weight."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return int(parameter.nbytes)
    beside = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return int(parameter.nbytes + sum(tensor.nbytes for tensor in beside))


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".token_adapter", "")


def compare(model: Any, optimizer: torch.optim.Optimizer, blueprint: Blueprint, config: Config, dtype: Any) -> None:
    planned = residents(blueprint, config, dtype, "adamw_torch_fused")
    frozen = {plain_name(n): stored(p) for n, p in model.named_parameters() if not p.requires_grad}
    quantized = {f"{linear.name}.weight": linear for linear in blueprint.linears if linear.quantized}
    assert set(frozen) == set(blueprint.parameters)
    for name, nbytes in frozen.items():
        shape = blueprint.parameters[name]
        assert nbytes == (nf4_bytes(shape.numel()) if name in quantized else shape.numel() * dtype.itemsize), name
    assert sum(frozen.values()) == planned.nf4 + planned.full
    assert sum(b.nbytes for b in model.buffers()) == planned.buffers
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(p.numel() for p in trained) == sorted(adapter_tensors(blueprint, config.lora.r))
    assert sum(p.nbytes for p in trained) == planned.adapters
    assert sum(p.grad.nbytes for p in trained) == planned.gradients
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert sum(value.nbytes for value in states) == planned.optimizer


@pytest.mark.parametrize("in_4bit", [True, False])
def test_weights_adapters_gradients_and_optimizer_of_the_real_model(base_model: Path, in_4bit: bool) -> None:
    config = configured(f"model.load_in_4bit={in_4bit}")
    model, optimizer = after_one_step(config, base_model, torch.bfloat16)
    compare(model, optimizer, read_blueprint(config, str(base_model)), config, torch.bfloat16)


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.r=3", "lora.target_modules=[q_proj, down_proj]"],
        ["lora.dora=true", r"lora.modules=[{match: down_proj, r: 5}, {match: 'layers\.1\..*q_proj', r: 2}]"],
        [r"lora.target_modules='layers\.0\..*'", "lora.rslora=true"],
    ],
    ids=["names", "dora and modules", "regular expression"],
)
def test_some_modules_only_and_other_ranks(tiny_model: Path, overrides: list[str]) -> None:
    config = configured(*overrides)
    model, optimizer = after_one_step(config, tiny_model, torch.float32)
    compare(model, optimizer, read_blueprint(config, str(tiny_model)), config, torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("in_4bit", [True, False])
def test_the_shards_of_a_base_that_is_cut(family: str, in_4bit: bool, tiny_model: Path, tmp_path: Path) -> None:
    """As many bytes as `CutLayer` takes of the loaded model, tensor by tensor."""
    base = tiny_model
    if family != "llama":
        base = write_base(tmp_path, family, tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    config = configured(f"model.load_in_4bit={in_4bit}", "model.chat_template=null")
    blueprint = read_blueprint(config, str(base))
    whole = residents(blueprint, config, torch.float32, "adamw_torch_fused")
    model = load_model(config, str(base), torch.float32, "transformers")
    tensors = [[each.tensor.nbytes for each in tensors_to_cut(layer)] for layer in decoder_layers(model)]
    for shards in (2, 3):
        part = replace(config, memory=replace(config.memory, base_shards=shards))
        held = residents(blueprint, part, torch.float32, "adamw_torch_fused")
        assert held.shards * shards == sum(layer_bytes(each, shards) for each in tensors)
        assert held.fetched == sum(layer_bytes(each, shards) for each in tensors)  # of these two layers
        assert held.nf4 + held.full + sum(map(sum, tensors)) == whole.nf4 + whole.full
        assert held.total - held.nf4 - held.full - held.shards - held.fetched == whole.total - whole.nf4 - whole.full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [0, 8], ids=["grown", "in unused rows"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_of_added_tokens(tmp_path: Path, small_tokenizer: Any, tied: bool, room: int, dtype: torch.dtype) -> None:
    base = bare_base(tmp_path / "base", small_tokenizer, tied, room)
    config = configured(f"model.path={base}", "model.chat_template=llama3")
    model, optimizer = after_one_step(config, base, dtype)
    blueprint = read_blueprint(config, str(base))
    compare(model, optimizer, blueprint, config, dtype)
    assert (blueprint.added_rows, blueprint.trained_matrices) == (3, 1 if tied else 2)
    assert check_headers(blueprint, str(base)).note == ""


@pytest.mark.parametrize("count", [64, 4095, 4096, 4097, 70_000])
def test_bitsandbytes_8_bit_states(count: int) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(count)), torch.nn.Parameter(torch.zeros(count + 1))]
    optimizer = bnb.optim.AdamW8bit(parameters)
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    assert sum(tensors.values()) == optimizer_bytes([count, count + 1], eight_bit=True)


def test_the_files_headers_say_what_will_be_downloaded(tiny_model: Path) -> None:
    config = configured()
    facts = check_headers(read_blueprint(config, str(tiny_model)), str(tiny_model))
    file = tiny_model / "model.safetensors"
    assert 0 < file.stat().st_size - facts.nbytes < 20_000
    assert facts.note == ""


def test_files_that_do_not_fit_the_configuration_are_noticed(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_model / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    some = dict(list(tensors.items())[:-1])
    save_file(some, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="no tokenizer in"):
        read_blueprint(configured(), str(tmp_path))
    blueprint = read_blueprint(configured("model.chat_template=null"), str(tmp_path))
    assert "fewer than config.json asks for" in check_headers(blueprint, str(tmp_path)).note
    save_file({**tensors, "vision.weight": torch.zeros(7, 3)}, tmp_path / "model.safetensors")
    assert "21 parameters that a language model does not use" in check_headers(blueprint, str(tmp_path)).note
