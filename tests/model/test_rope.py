"""Rows longer than the model's positions: refused with the cure, or scaled from training to the exported file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from tests_support import with_unsloth
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_sft.config import RopeScaling, load_config
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.gguf_file import read_gguf
from qlora_sft.model.load import load_for_inference, load_model
from qlora_sft.model.rope import check_context, check_rope, scaled_config, with_rope_scaling

YARN = ("data.max_length=5000", "model.rope_scaling.rope_type=yarn", "model.rope_scaling.factor=3")


def test_a_row_longer_than_the_model_is_refused_with_both_numbers_and_a_cure_that_works(
    make_config: MakeConfig, tiny_model: Path
) -> None:
    with pytest.raises(ConfigError, match=r"5,000 tokens, but .* knows positions up to 2,048") as caught:
        check_context(make_config(YARN[0]), str(tiny_model))
    cure = [word for word in str(caught.value).split() if word.startswith("model.rope_scaling")]
    assert cure == list(YARN[1:])
    check_context(make_config(YARN[0], *cure), str(tiny_model))
    check_context(make_config("data.max_length=2048"), str(tiny_model))


def test_a_factor_that_is_too_small_is_refused(make_config: MakeConfig, tiny_model: Path) -> None:
    config = make_config(YARN[0], YARN[1], "model.rope_scaling.factor=2")
    with pytest.raises(ConfigError, match="makes 4,096 positions of 2,048; it takes a factor of 3"):
        check_context(config, str(tiny_model))


def test_what_is_wrong_in_the_section_is_said(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config("model.rope_scaling={type: yarn, factor: 0.5}")
    assert "unknown key 'model.rope_scaling.type' (did you mean 'rope_type'?)" in str(caught.value)
    with pytest.raises(ConfigError, match=r"must be larger than 1, got 0\.5"):
        make_config("model.rope_scaling={rope_type: yarn, factor: 0.5}")
    with pytest.raises(ConfigError, match=r"dynamic: the longest document .* take yarn"):
        make_config("model.rope_scaling={rope_type: dynamic, factor: 2}")
    make_config("model.rope_scaling={rope_type: dynamic, factor: 2}", "data.packing=none")


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
@pytest.mark.parametrize("old", [{"rope_theta": 5e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}])
def test_both_spellings_of_a_config_come_out_as_transformers_reads_them(kind: Any, old: dict[str, Any]) -> None:
    base = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 100, **old}
    scaled = with_rope_scaling(base, RopeScaling(kind, 4.0))
    read = AutoConfig.for_model(**scaled)
    assert read.rope_parameters["rope_type"] == kind
    assert read.rope_parameters["factor"] == 4.0
    assert read.rope_parameters["rope_theta"] == 5e4
    assert read.max_position_embeddings == (100 if kind == "dynamic" else 400)
    if kind == "yarn":
        assert read.rope_parameters["original_max_position_embeddings"] == 100


def test_only_global_layers_are_scaled_where_each_type_has_its_own() -> None:
    base = {
        "max_position_embeddings": 100,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    scaled = with_rope_scaling({"text_config": base}, RopeScaling("linear", 8.0))["text_config"]["rope_parameters"]
    assert scaled["sliding_attention"] == base["rope_parameters"]["sliding_attention"]
    assert scaled["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}


def test_a_model_that_was_loaded_without_the_scaling_is_refused(tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(RunError, match="did not reach the model"):
        check_rope(plain, scaled_config(str(tiny_model), RopeScaling("yarn", 3.0)))


def test_the_scaling_goes_from_training_to_merge_and_gguf(make_config: MakeConfig, convertible_model: Path) -> None:
    from qlora_sft.export.gguf import export_run
    from qlora_sft.export.merge import merge_run
    from qlora_sft.train import train

    short = ["training.max_steps=1", "training.learning_rate=0.01", "evaluation.loss=false"]
    config = make_config(*YARN, *short, f"model.path={convertible_model}")
    train(config, say=lambda _: None)
    run = Path(config.output)
    model = load_for_inference(run)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    merge_run(run, say=lambda _: None)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    assert merged.config.max_position_embeddings == 3 * 2048
    assert merged.config.rope_parameters == model.config.rope_parameters
    ids = torch.randint(20, 400, (1, 40))
    far = {"position_ids": torch.arange(4900, 4940)[None]}
    with torch.no_grad():
        ours, theirs = model(input_ids=ids, **far).logits, merged(input_ids=ids, **far).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    fields = read_gguf(Path(export_run(run, "f32", say=lambda _: None).gguf)).fields
    assert fields["llama.rope.scaling.type"] == "yarn"
    assert fields["llama.rope.scaling.factor"] == 3.0
    assert fields["llama.rope.scaling.original_context_length"] == 2048
    assert fields["llama.context_length"] == 3 * 2048


UNSLOTH = """
import json, sys, torch
from qlora_sft.model.backend import choose_backend
choose_backend("unsloth")
from qlora_sft.config import load_config
from qlora_sft.model.load import load_model
model = load_model(load_config("demo", sys.argv[2:]), sys.argv[1], torch.float32, "unsloth")
print(json.dumps(model.get_base_model().get_decoder().rotary_emb.inv_freq.tolist()))
"""


@with_unsloth
@pytest.mark.slow
def test_unsloth_loads_it_with_the_same_frequencies(tiny_model: Path) -> None:
    overrides = [*YARN, "model.load_in_4bit=false"]
    command = [sys.executable, "-c", UNSLOTH, str(tiny_model), *overrides]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours = load_model(load_config("demo", overrides), str(tiny_model), torch.float32, "transformers")
    inv_freq = ours.get_base_model().get_decoder().rotary_emb.inv_freq
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(inv_freq.tolist(), rel=1e-6)
