"""The plan of a mixture of experts, from config.json, against the loaded model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_bases import settings_of, write_base
from qlora_kernels.nf4_lora import experts as kernel
from test_activations import peak_of_a_layer, plain, saved_bytes
from test_weights import plain_name

from qlora_sft.config import load_config
from qlora_sft.errors import ConfigError
from qlora_sft.model.load import load_model
from qlora_sft.plan import activations
from qlora_sft.plan.activations import layer_bytes
from qlora_sft.plan.blueprint import blueprint_of, check_headers
from qlora_sft.plan.random_model import random_model
from qlora_sft.plan.weights import adapter_tensors, residents

BACKEND = ["model.backend=transformers", "model.chat_template=null", "lora.r=4"]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_weights_and_adapters_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    write_base(tmp_path, family)
    for overrides in ([], ["lora.experts=frozen"], ["model.load_in_4bit=false"]):
        config = load_config("demo", [*BACKEND, f"model.path={tmp_path}", *overrides])
        model: Any = load_model(config, str(tmp_path), torch.float32, "transformers")
        blueprint = blueprint_of(settings_of(family), config)
        planned = residents(blueprint, config, torch.float32, "adamw_torch_fused")
        frozen = {plain_name(name): p for name, p in model.named_parameters() if not p.requires_grad}
        assert set(frozen) == set(blueprint.parameters)
        packed = sum(stored(p) for p in frozen.values() if p.dtype == torch.uint8)
        scales = {name: b for name, b in model.named_buffers() if "_proj_" in name}
        assert packed + sum(b.nbytes for b in scales.values()) == planned.nf4
        assert sum(p.nbytes for p in frozen.values() if p.dtype != torch.uint8) == planned.full
        assert sum(b.nbytes for name, b in model.named_buffers() if name not in scales) == planned.buffers
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sorted(p.numel() for p in trained) == sorted(adapter_tensors(blueprint, config.lora.r))
        assert 4 * sum(p.numel() for p in trained) == planned.adapters
        if family != "deepseek_v3":  # whose router has a buffer in the files
            assert check_headers(blueprint, str(tmp_path)).note == ""


def stored(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    beside = () if state is None else (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return int(parameter.nbytes + sum(tensor.nbytes for tensor in beside))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_what_a_layer_keeps_is_what_autograd_saves(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_base(tmp_path, family, dtype)
    config = load_config("demo", [*BACKEND, f"model.path={tmp_path}"])
    model: Any = load_model(config, str(tmp_path), dtype, "transformers").train()
    blueprint = plain(blueprint_of(settings_of(family), config))
    for on_gpu in (False, True):
        planned = layer_bytes(blueprint, 75, config.lora, dtype, on_gpu)
        assert planned.kept == planned.recomputed == saved_bytes(model, dtype, 75, on_gpu)


def test_the_peak_of_a_layers_backward_is_not_underrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernel, activations):
        monkeypatch.setattr(module, "GROUP_VALUES", 3 * 3 * 64 * 32)
    monkeypatch.setattr(activations, "flash_workspace", lambda *_, **__: 0)
    write_base(tmp_path, "qwen3_moe", torch.bfloat16)
    config = load_config("demo", [*BACKEND, f"model.path={tmp_path}"])
    model: Any = load_model(config, str(tmp_path), torch.bfloat16, "transformers").train()
    blueprint = plain(blueprint_of(settings_of("qwen3_moe"), config))
    for tokens in (256, 2048):
        planned = layer_bytes(blueprint, tokens, config.lora, torch.bfloat16, on_gpu=True)
        measured = peak_of_a_layer(model, tokens)
        assert measured <= planned.kept + planned.backward <= 1.25 * measured


def test_a_router_that_is_not_known_is_named() -> None:
    config = load_config("demo", BACKEND)
    for family, odd in (("gpt_oss", "this family's router"), ("glm4_moe", "experts beside a dense MLP")):
        with pytest.raises(ConfigError, match=f"what its layers keep is not known .*{odd}"):
            layer_bytes(blueprint_of(settings_of(family), config), 16, config.lora, torch.bfloat16, True)


def test_a_random_model_of_this_shape_is_like_the_loaded_one(tmp_path: Path) -> None:
    """For measurements: the same parameters, trained and frozen, in the same types."""
    write_base(tmp_path, "deepseek_v3")
    config = load_config("demo", [*BACKEND, f"model.path={tmp_path}"])
    loaded: Any = load_model(config, str(tmp_path), torch.float32, "transformers")
    drawn = random_model(settings_of("deepseek_v3"), config, torch.float32, torch.device("cpu"))
    kinds = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (loaded, drawn)]
    assert kinds[0] == kinds[1]
    ids = torch.arange(20)[None]
    drawn(input_ids=ids, labels=ids, cu_seq_lens_q=torch.tensor([0, 20], dtype=torch.int32)).loss.backward()
    assert all(p.grad is not None for p in drawn.parameters() if p.requires_grad)
