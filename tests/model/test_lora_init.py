"""How adapters begin, and what of the adapter's section is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from tests_support import bare_base

from qlora_sft.config import Config, load_config
from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.logits import expand_4bit
from qlora_sft.model import lora_init
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.load import load_model
from qlora_sft.model.lora_eva import begin_from_data
from qlora_sft.model.lora_init import adapted_layers, begin_adapters, check_shapes, nearest, orthogonal
from qlora_sft.model.loss import last_hidden_states
from qlora_sft.model.meta_model import check_layers


@pytest.fixture
def base(tmp_path: Path, small_tokenizer: Any) -> Path:
    return bare_base(tmp_path / "base", small_tokenizer, tied=False, room=8)


def configured(base: Path, *overrides: str) -> Config:
    given = [f"model.path={base}", "model.backend=transformers", "model.chat_template=null", *overrides]
    return load_config("demo", given)


def adapted(base: Path, *overrides: str) -> tuple[Any, Config]:
    config = configured(base, *overrides)
    model = load_model(config, str(base), torch.float32, "transformers")
    check_shapes(model, config.lora)
    return model, config


def product(layer: Any) -> torch.Tensor:
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def test_orthogonal_factors_are_those_of_peft_and_their_product_is_zero(base: Path) -> None:
    layer = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(48, 80)), LoraConfig(r=6, target_modules=["0"])
    ).base_model
    theirs = layer.model[0]
    torch.manual_seed(3)
    theirs.orthogonal_init("default")
    A, B = orthogonal(6, 48, 80, torch.Generator().manual_seed(3))
    torch.testing.assert_close(A, theirs.lora_A["default"].weight)
    torch.testing.assert_close(B, theirs.lora_B["default"].weight)
    model, config = adapted(base, "lora.init=orthogonal", "lora.r=6")
    assert begin_adapters(model, config.lora, str(base), 0).startswith("14 layers begin orthogonal")
    for _, each in adapted_layers(model):
        assert each.lora_A["default"].weight.norm() > 0.1
        assert each.lora_B["default"].weight.dtype == torch.float32
        assert product(each).norm() < 1e-6 * each.lora_A["default"].weight.norm() * each.lora_B["default"].weight.norm()


@pytest.mark.parametrize("form", [[], ["lora.rslora=true"], ["lora.dora=true"]], ids=["plain", "rslora", "dora"])
def test_loftq_brings_the_model_nearer_to_its_files_and_leaves_the_base_alone(base: Path, form: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    model, config = adapted(base, "lora.init=loftq", "lora.alpha=5", "lora.r=8", *form)
    files = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    packed = {path: layer.get_base_layer().weight.data.clone() for path, layer in adapted_layers(model)}
    assert "14 layers begin with" in begin_adapters(model, config.lora, str(base), 0)
    assert all(torch.equal(layer.get_base_layer().weight.data, packed[path]) for path, layer in adapted_layers(model))
    expand_4bit(model.get_base_model())
    for path, layer in adapted_layers(model):
        wanted, quantized = files.get_submodule(path).weight, layer.get_base_layer().weight
        best = _low_rank_decomposition(wanted - quantized, 8)
        torch.testing.assert_close(product(layer), best["L"] @ best["R"], rtol=1e-3, atol=1e-5)
        merged = quantized + product(layer)
        assert (wanted - merged).norm() < 0.9 * (wanted - quantized).norm()
        if form == ["lora.dora=true"]:
            torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, merged.norm(dim=1))
            assert layer.lora_magnitude_vector["default"].weight.requires_grad


def test_eva_begins_with_the_principal_components_of_what_goes_into_each_layer(base: Path) -> None:
    model, config = adapted(
        base, "lora.init=eva", "lora.r=6", "lora.modules=[{match: k_proj, r: 3}]", "lora.dropout=0.5"
    )
    assert begin_adapters(model, config.lora, str(base), 0) == ""
    use_document_attention(model)
    ids = [[(31 * n + 7 * i * i) % 280 for i in range(40 + 9 * n)] for n in range(3)]
    documents = [Rendered(each, [1.0] * len(each), "s") for each in ids]
    state = torch.get_rng_state()
    told = begin_from_data(model, documents, [[0, 1], [2]], torch.float32, 0)
    assert told == "A of 14 layers is the principal components of their input over 147 tokens (lora.init=eva)"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    inputs: dict[str, list[torch.Tensor]] = {}
    for path, layer in adapted_layers(model):
        layer.register_forward_pre_hook(
            lambda _, args, path=path: inputs.setdefault(path, []).append(args[0].detach()[0])
        )
    for document in documents:
        last_hidden_states(model.eval(), flatten([document]))
    for path, layer in adapted_layers(model):
        A, x = layer.lora_A["default"].weight, torch.cat(inputs[path])
        assert not layer.lora_B["default"].weight.any()
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-4)
        spectrum = torch.linalg.svdvals(x - x.mean(0))[: len(A)]
        held = ((x - x.mean(0)) @ A.T).norm(dim=0)
        assert len(A) == (3 if "k_proj" in path else 6)
        torch.testing.assert_close(held.square().sum(), spectrum.square().sum(), rtol=0.03, atol=0)
        torch.testing.assert_close(held[0], spectrum[0], rtol=0.01, atol=0)


def test_large_matrices_are_decomposed_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(300, 200)
    exact = nearest(matrix, 16, 0)
    monkeypatch.setattr(lora_init, "EXACT", 100)
    drawn = nearest(matrix, 16, 0)
    held = [float((B @ A).square().sum() / matrix.square().sum()) for A, B in (exact, drawn)]
    assert 0.97 * held[0] < held[1] <= held[0]
    assert all(torch.equal(*pair) for pair in zip(drawn, nearest(matrix, 16, 0), strict=True))


def test_a_setting_that_a_library_passes_over_is_noticed(base: Path) -> None:
    model, config = adapted(base, "lora.rslora=true", "lora.modules=[{match: down_proj, r: 4}]")
    layer = dict(adapted_layers(model))["model.layers.1.mlp.down_proj"]
    assert layer.scaling["default"] == pytest.approx(config.lora.alpha / 4**0.5)
    layer.scaling["default"] = 4.0
    with pytest.raises(
        RunError, match=r"layers\.1\.mlp\.down_proj: its adapter has \(rank, scale, DoRA\) \(4, 4\.0, False"
    ):
        check_shapes(model, config.lora)


def test_the_root_of_a_rank_is_the_one_that_peft_takes(base: Path) -> None:
    """A power of 0.5 is another number for this rank."""
    adapted(base, "lora.rslora=true", "lora.r=2921", "lora.target_modules=[k_proj]")


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["lora.init=pissa_niter_4"],
            r"lora\.init: pissa_niter_4 takes the largest directions out of the base's weights",
        ),
        (["lora.modules_to_save=[lm_head]"], r"lora\.modules_to_save: whole matrices are not trained here"),
        (["lora.init=orthogonal", "lora.r=5"], r"lora\.init orthogonal needs even ranks, not \[5\]"),
        (["lora.init=loftq", "model.load_in_4bit=false"], r"loftq has no effect without model\.load_in_4bit"),
        (["lora.modules=[{match: '(', r: 4}]"], r"lora\.modules\.0\.match is no regular expression"),
        (["lora.modules=[{match: q_proj}]"], r"lora\.modules\.0 has no effect"),
        (["lora.target_modules='*'"], r"lora\.target_modules is no regular expression"),
        (["lora.target_modules=[]"], "must name at least one layer"),
        (
            ["lora.target_modules=all_linear"],
            r"no linear layer is matched by 'all_linear' \(did you mean 'all-linear'\?\)",
        ),
        (["lora.modules=[{match: q_prj, r: 4}]"], r"is matched by 'q_prj' \(did you mean 'q_proj'\?\)"),
        (["lora.modules=[{match: q_proj, r: 4}, {match: '.*attn.*', r: 2}]"], r"q_proj is matched by entries 0 and 1"),
        (["lora.dora=true", "memory.tiled_mlp=on"], r"memory\.tiled_mlp: on is not possible here: Dora adapters"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_loaded(base: Path, overrides: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        check_layers(configured(base, *overrides), str(base))
