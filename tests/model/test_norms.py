"""The RMSNorms of real model classes, replaced by lean ones: same bits, same names, same files, fewer bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests_support import with_unsloth
from torch import Tensor

from qlora_sft.model.norms import LeanRMSNorm, use_lean_norms

WIDTH, HEAD = 64, 16
# family -> (configuration, its options, norms of a layer over the hidden size, norms over the size of a head)
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama": ("LlamaConfig", {}, 2, 0),
    "qwen2": ("Qwen2Config", {}, 2, 0),
    "qwen3": ("Qwen3Config", {"head_dim": HEAD}, 2, 2),
    "mistral": ("MistralConfig", {}, 2, 0),
    "smollm3": ("SmolLM3Config", {}, 2, 0),
    "phi3": ("Phi3Config", {}, 2, 0),
    "gemma": ("GemmaConfig", {"head_dim": HEAD}, 2, 0),
    "gemma2": ("Gemma2Config", {"head_dim": HEAD}, 4, 0),
    "gemma3": ("Gemma3TextConfig", {"head_dim": HEAD}, 4, 2),
}
HEADS, GROUPS, LAYERS = 4, 2, 2
IDS = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))


def build(family: str = "llama", *, dtype: torch.dtype = torch.float32, checkpointed: bool = False) -> Any:
    """A PEFT model of two layers in training mode, no LoRA factor zero, no norm's weight the same everywhere."""
    import transformers
    from peft import LoraConfig, get_peft_model

    name, options, *_ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=97, hidden_size=WIDTH, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    if checkpointed:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name or "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.1)
    return model.train()


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients by parameter)"""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), IDS[0, 1:]).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def norms_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if "RMSNorm" in type(m).__name__]


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_gradients(family: str, checkpointed: bool) -> None:
    model = build(family, checkpointed=checkpointed)
    logits, wanted = step(model)
    count = LAYERS * sum(FAMILIES[family][2:]) + 1  # and the last one
    assert use_lean_norms(model) == f"on for {count} norms (kept: their input as it is, no float32 copy)"
    assert [type(norm) for norm in norms_of(model)] == count * [LeanRMSNorm]
    found_logits, found = step(model)
    assert torch.equal(found_logits, logits)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_same_bits_in_evaluation_and_under_autocast(family: str) -> None:
    plain, model = build(family, dtype=torch.bfloat16), build(family, dtype=torch.bfloat16)
    use_lean_norms(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits)
        answers = [m.generate(input_ids=IDS[:, :9], max_new_tokens=6, do_sample=False) for m in (plain, model)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3", "gemma3"])
def test_each_norm_keeps_two_bytes_a_value_less(family: str) -> None:
    def kept(model: Any) -> int:
        """Bytes that the forward saves; each place once, parameters not."""
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        places: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                places[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS, use_cache=False)
        return sum(t.untyped_storage().nbytes() for t in places.values())

    plain, model = build(family, dtype=torch.bfloat16), build(family, dtype=torch.bfloat16)
    for each in (plain, model):
        each.enable_input_require_grads()  # else the first norm has no backward, and keeps nothing
    use_lean_norms(model)
    _, _, wide, by_head = FAMILIES[family]
    values = LAYERS * (wide * WIDTH + (HEADS + GROUPS) * HEAD * bool(by_head)) + WIDTH
    # Gemma's float32 1 + weight is no longer kept either.
    factors = 4 * (LAYERS * (wide * WIDTH + by_head * HEAD) + WIDTH) if family.startswith("gemma") else 0
    # Without checkpointing nobody else kept the input.
    assert kept(plain) - kept(model) == 2 * values * IDS.numel() + factors


def test_adapters_are_saved_and_loaded_under_the_same_names(tmp_path: Path) -> None:
    from peft import PeftModel

    plain, model = build("qwen3"), build("qwen3")
    before = dict(model.named_parameters())
    use_lean_norms(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "lean")
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "lean"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    loaded = PeftModel.from_pretrained(build("qwen3").unload(), str(tmp_path / "lean"))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_a_trained_weight_is_trained() -> None:
    model = build()
    for norm in norms_of(model):
        norm.requires_grad_()
    _, wanted = step(model)
    use_lean_norms(model)
    _, found = step(model)
    assert sum("norm" in name for name in found) == 5
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_what_is_left_alone_is_named() -> None:
    import transformers

    model = build()
    layers = model.get_base_model().get_decoder().layers
    layers[0].input_layernorm.register_forward_hook(lambda *_: None)
    kept = layers[0].input_layernorm
    assert "1 left: hooks on a LlamaRMSNorm" in use_lean_norms(model)
    assert layers[0].input_layernorm is kept
    assert use_lean_norms(model).startswith("off (4 left: replaced already; 1 left: hooks")
    olmo = transformers.AutoModelForCausalLM.from_config(
        transformers.Olmo2Config(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
        )
    )
    assert use_lean_norms(olmo) == "off (5 left: no formula here for Olmo2RMSNorm)"


def test_a_class_of_the_same_name_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    kind = type(norms_of(model)[0])
    monkeypatch.setattr(kind, "forward", lambda self, x: (self.weight.float() * x.float()).to(x.dtype))
    assert use_lean_norms(model) == "off (5 left: LlamaRMSNorm computes something else here)"
    assert type(norms_of(model)[0]) is kind


def test_layers_that_do_not_call_their_norms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth replaces the forward of the layers' class where there is a GPU."""
    model = build()
    kind = type(model.get_base_model().get_decoder().layers[0])

    def theirs(self: Any, x: Any, **_: Any) -> Any:
        return x

    theirs.__module__ = "unsloth.models.llama"
    monkeypatch.setattr(kind, "forward", theirs)
    assert use_lean_norms(model) == "off (Unsloth's layers compute their norms in their own way)"
    assert not any(isinstance(norm, LeanRMSNorm) for norm in norms_of(model))


UNDER_UNSLOTH = """
import sys
from qlora_sft.model.backend import choose_backend
choose_backend("unsloth")
import torch
from qlora_sft.config import load_config
from qlora_sft.model.load import load_model
from qlora_sft.model.norms import use_lean_norms
model = load_model(load_config("demo", ["model.load_in_4bit=false"]), sys.argv[1], torch.float32, "unsloth")
ids = torch.arange(40)[None]
def step():
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
logits, gradients = step()
print(use_lean_norms(model))
again, found = step()
assert torch.equal(logits, again)
assert len(found) == len(gradients) > 0
for one, other in zip(gradients, found):
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
"""


@with_unsloth
@pytest.mark.slow
def test_under_unsloth_as_well(tiny_model: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", UNDER_UNSLOTH, str(tiny_model)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("on for 5 norms")
