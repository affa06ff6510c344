"""Documents that share prefixes, computed once, against the same documents alone: loss, gradients, leaks, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteSWAConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    VaultGemmaConfig,
    set_seed,
)

from qlora_sft.config import Config
from qlora_sft.data.batch import Batch, flatten
from qlora_sft.data.prefix_tree import BLOCK
from qlora_sft.data.render import Rendered
from qlora_sft.data.sequences import WORTH, Sharing
from qlora_sft.data.tree_batch import flatten_tree
from qlora_sft.errors import ConfigError
from qlora_sft.model import prefix_sharing
from qlora_sft.model.attention import use_document_attention
from qlora_sft.model.attention_tree import CPU, Flash
from qlora_sft.model.base_files import text_config
from qlora_sft.model.loss import batch_loss
from qlora_sft.model.prefix_sharing import _obstacle, tree_differs

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "smollm3": SmolLM3Config(**SIZES),
    "phi3": Phi3Config(**SIZES),
    "granite": GraniteConfig(**SIZES, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0),
}
# Windows that end inside of a prefix, inside of a segment, and behind several segments.
BOUNDED: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(**SIZES, sliding_window=19),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, sliding_window=5, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=37),
    "vaultgemma": VaultGemmaConfig(**SIZES, head_dim=16, sliding_window=11),
    "granite_swa": GraniteSWAConfig(**SIZES, sliding_window=7),
    "gpt_oss": GptOssConfig(**SIZES, head_dim=16, sliding_window=9, num_local_experts=4, num_experts_per_tok=2),
}


def test_every_family_that_shares_by_itself_is_tried_here() -> None:
    assert {config.model_type for config in (FAMILIES | BOUNDED).values()} - {"gpt_oss"} == prefix_sharing.TRIED


def model_of(config: PretrainedConfig) -> Any:
    set_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "sinks" in name:  # they begin where they do nothing
            torch.nn.init.normal_(parameter)
    use_document_attention(model)
    return model


MODELS = {name: model_of(config) for name, config in (FAMILIES | BOUNDED).items()}

# Few different blocks and short tails, some tokens supervised with weights of their own: rows that are prefixes of
# others, rows that are equal, tokens that one row supervises and another does not.
ROW = st.tuples(st.lists(st.integers(1, 3), max_size=3), st.lists(st.integers(1, 4), min_size=1, max_size=BLOCK + 3))


@st.composite
def documents(draw: st.DrawFn) -> list[Rendered]:
    drawn = []
    for blocks, tail in draw(st.lists(ROW, min_size=1, max_size=6)):
        ids = [block * 7 + i for block in blocks for i in range(BLOCK)] + [40 + token for token in tail]
        weights = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 0.5]), min_size=len(ids), max_size=len(ids)))
        drawn.append(Rendered(ids, weights, "s"))
    return drawn


def loss_and_gradients(model: Any, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    loss = torch.stack([batch_loss(model, batch, n_items=3.0).loss for batch in batches]).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=10, deadline=None)
@given(drawn=documents())
def test_loss_and_gradients_are_those_of_the_rows_alone(family: str, drawn: list[Rendered]) -> None:
    model = MODELS[family]
    shared = flatten_tree(drawn)
    assert shared["input_ids"].numel() <= sum(len(document.input_ids) for document in drawn)
    assert shared["n_supervised"] == sum(flatten([document])["n_supervised"] for document in drawn)
    if not shared["n_supervised"]:
        return
    loss, gradients = loss_and_gradients(model, [shared])
    right, of_rows = loss_and_gradients(model, [flatten([document]) for document in drawn])
    assert float(loss) == pytest.approx(float(right), rel=1e-6)
    assert float((gradients - of_rows).norm()) <= 1e-5 * float(of_rows.norm())
    assert shared["weight_sum"] == pytest.approx(sum(flatten([document])["weight_sum"] for document in drawn))


def test_documents_without_a_common_beginning_are_as_in_a_flat_row() -> None:
    rows = [Rendered([n, *range(10, 40)], [1.0] * 31, "s") for n in range(1, 5)]
    tree, flat = flatten_tree(rows), flatten(rows)
    assert tree["lengths"] == flat["lengths"]
    assert set(tree["parents"] or ()) == {-1}
    assert sorted(tree["input_ids"][0].tolist()) == sorted(flat["input_ids"][0].tolist())


def test_another_token_in_one_branch_changes_nothing_in_its_siblings() -> None:
    model = MODELS["llama"]
    prompt = list(range(2 * BLOCK))
    rows = [Rendered(prompt + [50 + n] * 5, [0.0] * len(prompt) + [1.0] * 5, "s") for n in range(3)]
    before = batch_loss(model, flatten_tree(rows)).nll
    rows[1] = replace(rows[1], input_ids=[*prompt, 51, 51, 90, 51, 51])
    after = batch_loss(model, flatten_tree(rows)).nll
    # Scored: the three tokens that follow the prompt once each, then four of each branch.
    same = before == after
    assert int((~same).sum()) == 3
    assert len(before) == 15


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention"),
        ({"layer_types": ["chunked_attention"]}, "layers of type chunked_attention"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"kv_lora_rank": 8}, "different sizes"),
        ({"num_experts": 8, "output_router_logits": True}, "every token of every row"),
    ],
)
def test_a_model_that_cannot_share_says_why(make_config: Any, change: dict[str, Any], why: str) -> None:
    config: Config = make_config()
    assert _obstacle(config, text_config({"model_type": "llama"}), "transformers") is None
    assert why in str(_obstacle(config, text_config({"model_type": "llama", **change}), "transformers"))
    assert "Unsloth" in str(_obstacle(config, text_config({"model_type": "llama"}), "unsloth"))


def sharing(config: Config, settings_of: PretrainedConfig, monkeypatch: pytest.MonkeyPatch, asked: Any) -> Sharing:
    monkeypatch.setattr(prefix_sharing, "read_settings", lambda *_: settings_of)
    config = replace(config, data=replace(config.data, share_prefixes=asked))
    return prefix_sharing.sharing_of(config, "base", "transformers")


def test_what_was_asked_for_and_cannot_be_is_an_error(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = LlamaConfig(**SIZES)
    chunks.layer_types = ["chunked_attention"] * 2
    with pytest.raises(ConfigError, match="rows cannot share prefixes here: the model has layers of type chunked"):
        sharing(make_config(), chunks, monkeypatch, "on")
    assert "chunked" in str(sharing(make_config(), chunks, monkeypatch, "auto").obstacle)


@pytest.mark.parametrize("family", FAMILIES | BOUNDED)
def test_on_a_cpu_every_family_shares_where_its_experts_do_not_depend_on_rounding(
    family: str, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_of = (FAMILIES | BOUNDED)[family]
    assert sharing(make_config(), settings_of, monkeypatch, "on") == Sharing()
    obstacle = sharing(make_config(), settings_of, monkeypatch, "auto").obstacle
    assert "other experts" in str(obstacle) if family == "gpt_oss" else obstacle is None


def test_a_gpu_shares_by_itself_where_its_kernels_were_tried(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config: Config = make_config()
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(prefix_sharing, "compute_dtype", lambda _: (torch.bfloat16, ""))
    found: list[str | None] = [None, "failed: no kernel"]
    monkeypatch.setattr(prefix_sharing, "tree_differs", lambda *_: found.pop(0))
    agreed = sharing(config, FAMILIES["llama"], monkeypatch, "auto")
    assert agreed.obstacle is None
    assert agreed.worth > WORTH
    assert "agrees" in agreed.reason
    assert "GPU failed: no kernel" in str(sharing(config, FAMILIES["llama"], monkeypatch, "auto").obstacle)
    assert "not yet measured" in str(sharing(config, BOUNDED["gemma3"], monkeypatch, "auto").obstacle)
    assert sharing(config, BOUNDED["gemma3"], monkeypatch, "on") == Sharing()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "compute capability" in str(sharing(config, FAMILIES["llama"], monkeypatch, "auto").obstacle)
    # Caps are not for FlashAttention, so what that cannot do does not matter.
    assert sharing(config, BOUNDED["gemma2"], monkeypatch, "on") == Sharing()


def test_kernels_that_err_over_a_tree_are_found() -> None:
    def forgets_the_joined_sum(*given: Any) -> Any:
        *rest, out, lse, cut = given
        return CPU.backward(*rest, out, lse + 0.1, cut)

    def missing(*_: Any) -> Any:
        raise NotImplementedError("no such kernel")

    for dtype in (torch.float32, torch.bfloat16):
        assert tree_differs(16, dtype, "cpu", CPU) is None
    assert "differs from plain products by" in str(
        tree_differs(16, torch.float32, "cpu", Flash(CPU.forward, forgets_the_joined_sum))
    )
    assert tree_differs(16, torch.float32, "cpu", Flash(missing, missing)) == "failed: no such kernel"
