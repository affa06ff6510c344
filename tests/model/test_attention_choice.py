"""Which way a GPU attends is chosen by the documents' lengths, said, and can be forced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from torch import Tensor
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from qlora_sft.data.batch import flatten
from qlora_sft.data.render import Rendered
from qlora_sft.model import attention
from qlora_sft.model.attention import NAME_ONE_BY_ONE, use_document_attention
from qlora_sft.model.attention_choice import choose_way, plan_attention, typical_length
from qlora_sft.model.loss import batch_loss

CUDA = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def test_the_average_token_decides_and_not_the_average_document() -> None:
    assert typical_length([100] * 50) == 100
    # Fifty short documents hold half of the tokens, one long one the other half.
    assert typical_length([100] * 50 + [5000]) == pytest.approx(2550)
    assert typical_length([]) == 0


@pytest.mark.usefixtures("hopper")
def test_long_documents_are_attended_to_one_by_one() -> None:
    assert choose_way("auto", CUDA, [512] * 16).way == "varlen"
    assert choose_way("auto", CUDA, [2048] * 4).way == "sdpa"
    assert "2,048 tokens on average" in choose_way("auto", CUDA, [2048] * 4).reason
    assert choose_way("auto", CUDA, range(2048, 2148)).way == "varlen"
    assert "100 different lengths" in choose_way("auto", CUDA, range(2048, 2148)).reason
    assert choose_way("varlen", CUDA, [32768]) == ("varlen", "model.attention=varlen")
    assert choose_way("sdpa", CUDA, [1]).way == "sdpa"


@pytest.mark.usefixtures("hopper")
def test_a_plan_attends_as_the_run_will() -> None:
    """By the documents of the whole run; capped models, float32 and old GPUs have one way each."""
    attention.choose_path.cache_clear()
    llama, gemma = LlamaConfig(), Gemma2Config()
    bfloat16, float32 = torch.bfloat16, torch.float32
    assert plan_attention(llama, "auto", CUDA, bfloat16, [2048] * 4)[:3] == ("sdpa", "sdpa", "one by one")
    assert plan_attention(llama, "auto", CUDA, bfloat16, [100] * 50)[:3] == ("varlen", "varlen", "at once")
    assert plan_attention(llama, "sdpa", CUDA, bfloat16, [100] * 50)[:3] == ("sdpa", "sdpa", "one by one")
    assert plan_attention(llama, "varlen", CUDA, float32, [100])[:3] == ("varlen", "sdpa", "one by one, keys repeated")
    assert plan_attention(gemma, "sdpa", CUDA, bfloat16, [100])[:3] == ("sdpa", "flex", "at once")
    assert plan_attention(llama, "auto", torch.device("cpu"), float32, [100]).path == "sdpa"
    dropping = LlamaConfig(attention_dropout=0.1)  # as Seed-OSS; FlashAttention over all documents has no dropout
    assert plan_attention(dropping, "auto", CUDA, bfloat16, [100])[1:3] == ("sdpa", "one by one, keys repeated")
    # Most layers have heads of 256, and some have larger ones than FlashAttention takes.
    two_sizes = tiny_config("gemma4_text", head_dim=256, global_head_dim=512)
    assert plan_attention(two_sizes, "auto", CUDA, bfloat16, [100])[1:3] == ("sdpa", "one by one, keys repeated")
    attention.choose_path.cache_clear()


def test_where_it_was_not_measured_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert choose_way("auto", CUDA, [32768]).way == "varlen"
    assert choose_way("auto", torch.device("cpu"), [32768]).way == "varlen"


def test_both_ways_are_one_way_on_a_cpu_and_the_same_to_the_bit(tiny_model: Path) -> None:
    losses = []
    for way in ("varlen", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        assert "document by document, on a cpu" in use_document_attention(model, way, "as a test")
        documents = [Rendered(list(range(20, 20 + length)), [1.0] * length, "s") for length in (30, 1, 17)]
        losses.append(batch_loss(model, flatten(documents)).nll)
    assert model.config._attn_implementation == NAME_ONE_BY_ONE
    assert torch.equal(*losses)


def test_a_gpu_takes_the_way_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window goes with FlashAttention whatever was chosen: sdpa would form the square of the document."""
    asked: list[str] = []
    monkeypatch.setattr(attention, "choose_path", lambda *_: attention.AttentionPath("varlen", "a test"))
    monkeypatch.setattr(attention, "_varlen", lambda *_: asked.append("varlen"))
    monkeypatch.setattr(attention, "_one_by_one", lambda *_, repeats: asked.append(f"sdpa {repeats}"))
    q, bounds = torch.zeros(1, 2, 9, 8), torch.tensor([0, 9], dtype=torch.int32)
    for one_by_one, window in ((False, None), (True, None), (True, 4)):
        attention.document_attention(
            torch.nn.Module(), q, q, q, None, cu_seq_lens_q=bounds, sliding_window=window, one_by_one=one_by_one
        )
    assert asked == ["varlen", "sdpa False", "varlen"]


def test_a_torch_whose_function_takes_no_window_attends_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.10's: on a GPU the arguments would be a TypeError in the first step."""

    def old(q: Tensor, *_: object, is_causal: bool = False) -> Tensor:
        return q

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(varlen, "varlen_attn", old)
    path = attention.choose_path.__wrapped__(CUDA, torch.bfloat16, 128, False)
    assert path.name == "sdpa"
    assert "before torch 2.11" in path.reason


@pytest.mark.parametrize("newer", [True, False])
def test_keys_are_shared_by_every_version_of_torchs_function(monkeypatch: pytest.MonkeyPatch, newer: bool) -> None:
    """Before 2.13 it has no argument for that, and shares keys unasked."""
    given: list[bool] = []

    def with_argument(q: Tensor, *_: object, scale: object, window_size: object, enable_gqa: bool = False) -> Tensor:
        given.append(enable_gqa)
        return q

    def without(q: Tensor, *_: object, scale: object, window_size: object) -> Tensor:
        return q

    monkeypatch.setattr(varlen, "varlen_attn", with_argument if newer else without)
    q, k, bounds = torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 9, 8), torch.tensor([0, 9], dtype=torch.int32)
    assert attention._varlen(q, k, k, bounds, 9, None, None).shape == (1, 9, 4, 8)
    assert given == [True] * newer
