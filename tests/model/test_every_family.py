"""Every causal architecture of the installed transformers trains, packed or one document at a time, or is refused with
the reason: never a traceback, and never with one document seeing another."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from every_family import NOT_MADE, WRONG, Outcome, architectures, settings, try_family
from tiny_models import tiny_config

from qlora_sft.errors import ConfigError
from qlora_sft.model.attention import why_one_at_a_time
from qlora_sft.model.meta_model import meta_model
from qlora_sft.plan.activations import sequence_bytes
from qlora_sft.plan.blueprint import blueprint_of
from qlora_sft.plan.weights import residents

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# One of each way to mix tokens: gated delta nets, short convolutions, Mamba 2 beside attention and instead of it,
# windows with shared keys, chunks, experts that are part of a model without recurrence, a family that is not told, a
# window that only the configuration names; of some, whole checkpoints with towers.
QUICK = (
    "qwen3_5_text", "lfm2", "falcon_h1", "granitemoehybrid", "gemma4", "llama4", "mamba", "mistral", "qwen2_5_vl",
)  # fmt: skip
WANTED = {
    "packed": (
        "bamba", "cohere2", "deepseek_v3", "falcon_h1", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4",
        "glm4_moe", "gpt_oss", "granitemoehybrid", "jamba", "lfm2", "llama", "llama4_text", "mamba2", "ministral3",
        "mistral", "mixtral", "nemotron_h", "olmo3", "phi", "phi3", "qwen2", "qwen3", "qwen3_5_text", "qwen3_moe",
        "qwen3_next", "smollm3", "zamba2", "gemma3", "gemma4", "internvl", "lfm2_vl", "llama4", "mistral3",
        "qwen2_5_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe", "voxtral", "aya_vision", "cohere2_vision", "glm4v",
        "glm4v_moe", "idefics3", "kimi_linear", "llava", "mistral4", "muse_glimmer", "qwen2_vl", "smolvlm",
    ),
    "one at a time": ("mamba", "stablelm"),
    "refused": ("bert", "gpt2", "mllama", "paligemma"),
}  # fmt: skip
PLANNED = (*QUICK, "gemma3", "gemma3n_text", "gpt_oss", "mamba2", "nemotron_h", "zamba2")
TRIED = [kind for kind in architectures() if kind not in NOT_MADE]


def check(outcome: Outcome) -> None:
    if outcome.how == "refused":
        assert len(outcome.reason) > 20
        return
    assert outcome.difference < WRONG, outcome
    assert all(math.isfinite(loss) for loss in outcome.losses)
    assert outcome.losses[-1] < outcome.losses[0]


@pytest.mark.parametrize("kind", QUICK)
def test_a_family_trains(kind: str, tmp_path: Path) -> None:
    outcome = try_family(kind, tmp_path)
    check(outcome)
    assert outcome.how == ("one at a time" if kind == "mamba" else "packed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRIED)
def test_every_family_trains_or_is_refused(kind: str, tmp_path: Path) -> None:
    outcome = try_family(kind, tmp_path)
    check(outcome)
    for how, kinds in WANTED.items():
        assert kind not in kinds or outcome.how == how, outcome
    # What a plan says without weights is what the check before training finds.
    if outcome.how != "refused":
        check_plan(kind)
        assert bool(why_one_at_a_time(meta_model(tiny_config(kind)))) == (outcome.how == "one at a time"), outcome


@pytest.mark.parametrize("kind", PLANNED)
def test_a_plan_counts_a_family_or_says_why_not(kind: str) -> None:
    check_plan(kind)


def check_plan(kind: str) -> None:
    """All parameters are counted, on the meta device, and what layers keep where there is a formula."""
    config, wanted = settings(kind), tiny_config(kind)
    blueprint = blueprint_of(wanted, config)
    assert blueprint.n_parameters == meta_model(wanted).num_parameters()
    held = residents(blueprint, config, torch.bfloat16, "adamw_torch_fused")
    assert held.nf4 + held.full > 0
    if any(blueprint.stacked(number) for number in range(blueprint.n_layers)):
        with pytest.raises(ConfigError, match="what its layers keep is not known"):
            sequence_bytes(blueprint, config.lora, torch.bfloat16, True)(100)
