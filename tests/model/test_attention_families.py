"""Windows, capped logits and sinks: every document of a packed row is what transformers' eager attention makes of it
alone, and a model that mixes documents is found out before it is trained."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from qlora_sft.errors import ConfigError
from qlora_sft.model.attention import choose_path, plain_attention, use_document_attention
from qlora_sft.model.attention_capped import Scores, flex_documents, plain_documents
from qlora_sft.model.attention_check import obstacle_in, packed_against_separate, use_checked_attention
from qlora_sft.model.hidden import one_at_a_time

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=5, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=5),
    "gpt_oss": GptOssConfig(**SHAPE, head_dim=16, sliding_window=5, num_local_experts=4, num_experts_per_tok=2),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
    "phi3": Phi3Config(**SHAPE, sliding_window=5),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
LENGTHS = (13, 1, 4, 9)


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32)
    for name, p in model.named_parameters():
        # Sinks and norms begin where they do nothing, and small weights leave a cap without effect.
        torch.nn.init.normal_(p, std=1.0 if "sinks" in name or "norm" in name else 0.3)
    return model.train()


def hidden_states(model: Any, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])
    extra = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "position_ids": positions[None]}
    hidden: Tensor = model.get_decoder()(input_ids=ids[None], use_cache=False, **extra).last_hidden_state[0]
    return hidden


def eager(model: Any, ids: Tensor) -> Tensor:
    hidden: Tensor = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_each_packed_document_is_what_eager_attention_makes_of_it_alone(family: str) -> None:
    model = model_of(FAMILIES[family])
    ids = torch.randint(1, 97, (sum(LENGTHS),))
    gradient = torch.randn(sum(LENGTHS), 48)
    use_document_attention(model)
    packed = hidden_states(model, ids, LENGTHS)
    packed.backward(gradient)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attn_implementation("eager")
    alone = torch.cat([eager(model, part) for part in ids.split(LENGTHS)])
    alone.backward(gradient)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (gradients[name] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-5, name


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt_oss", "mistral", "phi3"])
def test_the_window_cap_and_sinks_of_these_models_matter(family: str) -> None:
    """Otherwise the equality above would show nothing."""
    model = model_of(FAMILIES[family])
    ids = torch.randint(1, 97, (13,))
    model.set_attn_implementation("eager")
    before = eager(model, ids)
    for module in model.modules():
        for name in ("sliding_window", "attn_logit_softcapping"):
            if getattr(module, name, None) is not None:
                setattr(module, name, None)
        if hasattr(module, "sinks"):
            torch.nn.init.constant_(module.sinks, -1e4)
    model.config.sliding_window = 100
    use_document_attention(model)
    assert not torch.allclose(hidden_states(model, ids, (13,)), before, atol=1e-2)


@pytest.mark.parametrize(("window", "softcap", "with_sinks"), [(None, 3.0, False), (4, 3.0, True), (4, None, True)])
def test_flex_attention_is_the_textbook(window: int | None, softcap: float | None, with_sinks: bool) -> None:
    torch.manual_seed(1)
    lengths = (70, 1, 60)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = torch.randn(1, 4, 131, 16), torch.randn(1, 2, 131, 16), torch.randn(1, 2, 131, 16)
    sinks = torch.randn(4) if with_sinks else None
    theirs = plain_documents(q, k, v, bounds, Scores(0.3, window, softcap, sinks))
    ours = flex_documents(q, k, v, bounds, Scores(0.3, window, softcap, sinks))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_gpu_path_is_chosen_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    # As of torch 2.11; what is chosen with an older torch is tested in test_attention_choice.py.
    monkeypatch.setattr(varlen, "varlen_attn", lambda *, scale, window_size: None)
    choose_path.cache_clear()
    assert choose_path(cuda, torch.bfloat16, 128, False).name == "varlen"
    assert choose_path(cuda, torch.bfloat16, 128, True).name == "flex"
    assert "heads of up to 256, this model of 512" in choose_path(cuda, torch.bfloat16, 512, False).reason
    assert choose_path(cuda, torch.bfloat16, 128, False, True).name == "sdpa"
    assert choose_path(cuda, torch.bfloat16, 128, True, True).name == "plain"
    assert "this run in float32" in choose_path(cuda, torch.float32, 128, False).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    choose_path.cache_clear()
    assert "compute capability 8.0" in choose_path(cuda, torch.float16, 128, False).reason
    choose_path.cache_clear()


def test_a_model_with_caps_or_sinks_generates_with_them() -> None:
    """transformers' sdpa leaves both out."""
    for family, expected in (("gemma2", "eager"), ("gpt_oss", "eager"), ("qwen3", "sdpa")):
        model = model_of(FAMILIES[family])
        use_document_attention(model)
        with plain_attention(model):
            assert model.config._attn_implementation == expected


# ------------------------------------------------------------------ the check before training


def test_the_check_passes_and_says_so() -> None:
    for config in FAMILIES.values():
        said: list[str] = []
        use_checked_attention(model_of(config), torch.float32, said.append)
        assert said[-1].startswith("attention check: 3 documents packed and alone agree")


def deafened(model: Any) -> Any:
    """``model`` with an attention that takes no notice of the bounds of documents."""
    for layer in model.model.layers:
        inner = layer.self_attn.forward

        def deaf(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            if "cu_seq_lens_q" in kwargs:
                length = kwargs["hidden_states"].shape[1]
                kwargs["cu_seq_lens_q"] = torch.tensor([0, length], dtype=torch.int32)
                kwargs["max_length_q"] = length
            return inner(*args, **kwargs)

        layer.self_attn.forward = deaf
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_that_see_each_other_are_run_one_at_a_time(dtype: torch.dtype) -> None:
    model = deafened(model_of(LlamaConfig(**SHAPE)).to(dtype))
    said: list[str] = []
    use_checked_attention(model, dtype, said.append)
    assert one_at_a_time(model)
    assert "one at a time" in said[-1]
    assert "packed document 3 depends on document 1" in said[-1]
    assert packed_against_separate(model, dtype) == 0


def test_a_leak_that_is_smaller_than_rounding_is_found() -> None:
    """In bfloat16 the comparison of results allows for 0.06."""
    model = model_of(LlamaConfig(**SHAPE)).bfloat16()
    mlp = model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) + 1e-4 * F.pad(x, (0, 0, 1, 0))[:, :-1]
    use_document_attention(model)
    assert packed_against_separate(model, torch.bfloat16) < 0.06
    assert "packed document 3 depends on document 2" in obstacle_in(model, torch.bfloat16, (11, 1, 23))


def test_a_model_that_sees_what_follows_is_refused() -> None:
    model = model_of(LlamaConfig(**SHAPE))
    mlp = model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) + torch.roll(x, -1, dims=1)
    with pytest.raises(ConfigError, match=r"cannot be trained here: .* a token depends on those that follow it"):
        use_checked_attention(model, torch.float32, lambda _: None)


def test_layers_that_choose_what_they_attend_to_cannot_be_packed() -> None:
    model = model_of(FAMILIES["qwen3"])
    model.config.layer_types = ["full_attention", "deepseek_sparse_attention"]
    with pytest.raises(ValueError, match="layers of type deepseek_sparse_attention, which choose what they attend to"):
        use_document_attention(model)


def test_the_check_leaves_mode_and_gradients_alone() -> None:
    model = model_of(FAMILIES["qwen3"])
    use_document_attention(model)
    assert packed_against_separate(model, torch.float32) < 1e-5
    assert model.training
    assert all(p.grad is None for p in model.parameters())
