"""q, k, v and o of real model classes, computed by nf4_lora: same results, same names; what is not known stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_mlp import TARGETS
from torch import Tensor

from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.projection import frozen_weight
from qlora_sft.model.qkv import LeanAttention, use_lean_attention

ALL = [*TARGETS, "k_proj", "v_proj", "o_proj"]
# Biases, heads' norms, layers without rotation, windows, caps, a scale of the scores.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 5}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3}),
    # A window that is read from the configuration, longer than what the small module is tried with.
    "mistral": ("MistralConfig", {"sliding_window": 16}),
}
IDS = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
BOUNDS = torch.tensor([0, 13, 40], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(13), torch.arange(27)])[None]


def base_model(name: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name)(
        **{
            "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0, **options,
        }
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)


def build(family: str = "llama", **lora: Any) -> Any:
    """A PEFT model of two layers in training mode, no LoRA factor and no bias zero, that attends by document."""
    from peft import LoraConfig, get_peft_model

    name, options = FAMILIES[family]
    model = get_peft_model(base_model(name, **options), LoraConfig(**{"r": 4, "target_modules": ALL, **lora}))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name or parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    use_document_attention(model)
    return model.train()


def step(model: Any, start: int = 0, stop: int = 40) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients by parameter) of some of the row's tokens, in their documents."""
    model.zero_grad()
    bounds = torch.unique(BOUNDS.clamp(start, stop) - start).int()
    ids = IDS[:, start:stop]
    logits = model(
        input_ids=ids, position_ids=POSITIONS[:, start:stop], cu_seq_lens_q=bounds, max_length_q=27, use_cache=False
    ).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_and_gradients(family: str) -> None:
    model = build(family)
    logits, wanted = step(model)
    assert use_lean_attention(model) == "on for 2 layers (a small one of their class gives the same results)"
    found_logits, found = step(model)
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
    assert_close(found, wanted)
    alone, _ = step(model, 13)
    torch.testing.assert_close(alone, found_logits[:, 13:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "o_proj"]}, {"target_modules": ["v_proj", "up_proj"]},
                                  {"target_modules": ["up_proj"]}, {"use_rslora": True, "lora_alpha": 6}])  # fmt: skip
def test_some_layers_with_adapters_and_a_scale(lora: dict[str, Any]) -> None:
    model = build(**lora)
    _, wanted = step(model)
    assert use_lean_attention(model).startswith("on")
    assert_close(step(model)[1], wanted)


def test_names_adapters_merging_disabling_and_generating_stay() -> None:
    plain, model = build(), build()
    use_lean_attention(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    for each in (plain.eval(), model.eval()):
        each.get_base_model().set_attn_implementation("sdpa")
    prompt = IDS[:, :9]
    with torch.no_grad():
        one, other = (m(input_ids=IDS).logits for m in (plain, model))
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
        with plain.disable_adapter(), model.disable_adapter():
            without, other = (m(input_ids=IDS).logits for m in (plain, model))
        torch.testing.assert_close(other, without, rtol=1e-4, atol=1e-4)
        assert (one - without).abs().max() > 0.05
        options: Any = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        answers = [m.generate(input_ids=prompt, **options) for m in (plain, model)]
        assert torch.equal(*(answer.sequences for answer in answers))
        # Step by step: tokens may be the same without the cache.
        wanted, found = (torch.stack(answer.logits) for answer in answers)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        merged = model.merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(merged, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lora_dropout": 0.1}, "LoRA dropout 0.1"),
        ({"use_dora": True}, "Dora adapters"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_without_a_formula_are_left_to_peft(change: dict[str, Any], reason: str) -> None:
    model = build(**change).eval()  # as it is loaded; it is training that counts
    assert use_lean_attention(model) == f"left to PEFT ({reason})"
    assert not any(isinstance(module, LeanAttention) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Phi3Config", {}, "no formula here for Phi3Attention"),
        ("Olmo2Config", {}, "no formula here for the norms of Olmo2Attention"),
        ("GlmConfig", {"head_dim": 16}, "GlmAttention computes something else than is known here"),  # other pairs turn
        ("CohereConfig", {}, "CohereAttention computes something else than is known here"),
        ("OlmoConfig", {"clip_qkv": 3.0}, "OlmoAttention computes something else than is known here"),
        (
            "Starcoder2Config",
            {"residual_dropout": 0.1},
            "Starcoder2Attention computes something else than is known here",
        ),
    ],
)
def test_what_has_the_parts_but_another_formula_is_left_alone(name: str, options: Any, reason: str) -> None:
    assert use_lean_attention(base_model(name, **options)) == f"left to PEFT ({reason})"


def test_a_part_of_each_head_may_turn() -> None:
    """It is part of what is tried out."""
    assert use_lean_attention(base_model("NemotronConfig", partial_rotary_factor=0.25)).startswith("on for 2 layers")


def test_a_patched_module_and_a_hook_are_left_alone() -> None:
    model = build()
    attention = model.get_base_model().get_decoder().layers[1].self_attn
    handle = attention.register_forward_hook(lambda *_: None)
    assert use_lean_attention(model) == "left to PEFT (hooks on its attention)"
    handle.remove()
    attention.forward = type(attention).forward.__get__(attention)
    assert use_lean_attention(model) == "left to PEFT (LlamaAttention has a forward that is not transformers' own)"


def test_trying_out_draws_no_random_numbers() -> None:
    model = build()
    state = torch.get_rng_state()
    use_lean_attention(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert use_lean_attention(model) == "left to PEFT (replaced already)"


def test_a_second_adapter_falls_back_to_peft() -> None:
    from peft import LoraConfig

    plain, model = build(), build()
    use_lean_attention(model)
    for each in (plain, model):
        torch.manual_seed(1)
        each.add_adapter("second", LoraConfig(r=2, target_modules=ALL, init_lora_weights=False))
        each.base_model.set_adapter(["default", "second"])
    (one, wanted), (other, found) = step(plain), step(model)
    assert torch.equal(one, other)
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())


# ------------------------------------------------------------------ in 4 bits and 16


def in_four_bits(model: Any) -> Any:
    """The base layers of ``model`` in NF4."""
    import bitsandbytes as bnb

    for module in model.modules():
        if hasattr(module, "base_layer"):
            plain = module.base_layer
            four = bnb.nn.Linear4bit(
                plain.in_features, plain.out_features, bias=plain.bias is not None, compute_dtype=plain.weight.dtype
            )
            four.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
            four.bias = plain.bias
            four.support_avx512bf16_for_cpu = False
            module.base_layer = four.to("cpu")
    return model


def sixteen_bit(family: str) -> Any:
    model = build(family)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return in_four_bits(model)


def exact_twin(model: Any, family: str) -> Any:
    """The same model in float64, with the weights as they are dequantised."""
    twin = build(family).double()
    others = dict(model.named_modules())
    for name, module in twin.named_modules():
        if hasattr(module, "base_layer"):
            base = others[name].base_layer
            module.base_layer.weight.data = frozen_weight(base).dequantize(torch.bfloat16).double()
            if base.bias is not None:
                module.base_layer.bias.data = base.bias.double()
    return twin


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_error_within_twice_that_of_peft(family: str) -> None:
    """Of the result of an attention module in NF4 under autocast, and of all gradients."""
    model = sixteen_bit(family)
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    noise = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)

    def measured(whole: Any, dtype: torch.dtype) -> list[Tensor]:
        decoder = whole.get_base_model().get_decoder()
        attention = decoder.layers[0].self_attn
        leaf = x.to(dtype).requires_grad_()
        rotation = [f.to(torch.bfloat16).to(dtype) for f in decoder.rotary_emb(leaf.float(), POSITIONS)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = attention(hidden_states=leaf, position_embeddings=rotation, attention_mask=None,
                             cu_seq_lens_q=BOUNDS, max_length_q=27)  # fmt: skip
        wanted = [leaf, *(p for p in attention.parameters() if p.requires_grad)]
        return [y, *torch.autograd.grad(y, wanted, noise.to(y.dtype))]

    truth = measured(exact_twin(model, family), torch.float64)
    theirs = measured(model, torch.bfloat16)
    assert use_lean_attention(model).startswith("on")
    ours = measured(model, torch.bfloat16)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - exact).norm() <= 2 * (other - exact).norm()


def losses(lean: bool, seed: int) -> list[float]:
    """Of 50 steps that learn to count, in NF4 and bfloat16. seed: of LoRA's A."""
    model = sixteen_bit("qwen3")
    model.get_output_embeddings().weight.data *= 20  # else logits this small hardly move
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.zeros_(parameter) if "lora_B" in name else torch.nn.init.normal_(parameter, std=0.1)
    if lean:
        assert use_lean_attention(model).startswith("on")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=3e-2), []
    generator = torch.Generator().manual_seed(9)
    for _ in range(50):
        ids = 3 + (torch.randint(0, 90, (1, 1), generator=generator) + torch.arange(40)) % 90
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, position_ids=POSITIONS, cu_seq_lens_q=BOUNDS, max_length_q=27).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_losses_of_fifty_steps_are_those_of_peft() -> None:
    peft, ours, reseeded = (torch.tensor(losses(*run)) for run in ((False, 0), (True, 0), (False, 1)))
    assert peft[-5:].mean() < 0.8 * peft[:5].mean()
    assert (ours - peft).abs().mean() < 0.25 * (reseeded - peft).abs().mean()
