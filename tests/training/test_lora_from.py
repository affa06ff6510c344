"""A run that goes on from an adapter begins with all that it has learned; what does not fit is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, configured
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests_support import SHORT, bare_base, killed, result
from transformers import AutoModelForCausalLM

from qlora_sft.cli import main
from qlora_sft.errors import ConfigError
from qlora_sft.export.merge import merge_run
from qlora_sft.model.go_on import check_adapter
from qlora_sft.run.folder import Run
from qlora_sft.train import train

FIRST = [*SHORT, "training.max_steps=2", "lora.r=4", "lora.alpha=9", "lora.target_modules=[q_proj, up_proj]"]
PROBE = torch.arange(20, 60)[None]


@pytest.fixture
def first(make_config: MakeConfig, tmp_path: Path) -> Path:
    train(make_config(*FIRST, f"output={tmp_path / 'first'}"), say=lambda _: None)
    return tmp_path / "first"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits


def test_it_begins_as_the_adapter_and_its_merge_is_what_it_has_become(
    make_config: MakeConfig, first: Path, tiny_model: Path, tmp_path: Path
) -> None:
    still = make_config(
        *SHORT, f"lora.from={first}", "training.max_steps=1", "training.learning_rate=1e-10", "training.save_steps=0"
    )
    assert (still.lora.r, still.lora.alpha, still.lora.target_modules) == (4, 9, ["q_proj", "up_proj"])
    said: list[str] = []
    report = train(still, say=said.append)
    assert any(f"goes on from {first / 'adapter'} (" in text and "is checked" in text for text in said)
    before, after = tensors(first), tensors(tmp_path / "run")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-8)
    moved = make_config(*SHORT, f"lora.from={first / 'adapter'}", f"output={tmp_path / 'moved'}")
    train(moved, say=lambda _: None)
    assert report.train_loss.base == Run.open(moved.output).report.train_loss.base
    assert not torch.equal(*(next(iter(tensors(run).values())) for run in (first, tmp_path / "moved")))
    merge_run(moved.output, say=lambda _: None)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "merged", dtype=torch.float32)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "moved" / "adapter"))
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-5, atol=2e-5)


def test_a_killed_run_goes_on_though_the_adapter_it_came_from_is_gone(
    make_config: MakeConfig, first: Path, tmp_path: Path
) -> None:
    whole = [*SHORT, f"lora.from={first}", "training.max_steps=4"]
    train(make_config(*whole), say=lambda _: None)
    stopped = make_config(*whole, f"output={tmp_path / 'stopped'}")
    killed(stopped, 3)
    shutil.rmtree(first)
    said: list[str] = []
    train(make_config(*whole, f"output={stopped.output}"), resume=True, say=said.append)
    assert f"lora.from: {first} is gone; the checkpoint has all of it" in said
    assert result(tmp_path / "stopped") == result(tmp_path / "run")
    assert Run.open(stopped.output).config.lora.from_ == str(first)


def test_what_began_by_loftq_stays_an_adapter_of_nf4(make_config: MakeConfig, tmp_path: Path) -> None:
    """On the 16-bit weights it would add what they have already, in a merge as in a training."""
    short = [*SHORT, "training.max_steps=1", "model.load_in_4bit=true"]
    first, second = tmp_path / "first", tmp_path / "second"
    train(make_config(*short, "lora.init=loftq", f"output={first}"), say=lambda _: None)
    train(make_config(*short, f"lora.from={first}", f"output={second}"), say=lambda _: None)
    assert Run.open(second).lora_init == "loftq"
    with pytest.raises(ConfigError, match="--onto bf16: the adapter holds what NF4 lost"):
        merge_run(second, onto="bf16", say=lambda _: None)
    with pytest.raises(ConfigError, match=r"holds what NF4 has lost of its base, and needs model\.load_in_4bit"):
        make_config(*SHORT, f"lora.from={second}")
    third = make_config(*short, f"lora.from={first}", "lora.init=default")
    with pytest.raises(ConfigError, match=r"began as loftq, and lora\.init is default; leave lora\.init out"):
        check_adapter(third, third.model.path)
    shutil.rmtree(first)  # a finished run is read without it
    assert Run.open(second).config.lora.init == "loftq"


def test_rows_of_new_control_tokens_go_on_too(small_tokenizer: Any, tmp_path: Path) -> None:
    base = bare_base(tmp_path / "base", small_tokenizer, tied=False, room=0)
    make = configured(tmp_path, base)
    template = "model.chat_template=chatml"
    train(make(template, "training.max_steps=1", f"output={tmp_path / 'first'}"), say=lambda _: None)
    still = [f"lora.from={tmp_path / 'first'}", "training.max_steps=1", "training.learning_rate=1e-10"]
    train(make(template, *still), say=lambda _: None)
    before, after = tensors(tmp_path / "first"), tensors(tmp_path / "run")
    assert sum("trainable_tokens_delta" in name for name in before) == 2
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7)
    adapter = json.loads((tmp_path / "first" / "adapter" / "adapter_config.json").read_text())
    adapter["trainable_token_indices"] = {"embed_tokens": [3]}
    (tmp_path / "first" / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ConfigError, match=r"rows of its own for 1 control tokens, and model\.chat_template adds 2"):
        train(make(template, *still, f"output={tmp_path / 'other'}"), say=lambda _: None)


def test_what_does_not_go_with_it_is_named_by_every_verb(
    make_config: MakeConfig, first: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config()
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    dora = shutil.copytree(first / "adapter", tmp_path / "dora")
    settings = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**settings, "lora_bias": True}))
    source = f"lora.from={first}"
    cases: dict[str, list[str]] = {
        "has r 4, and lora.r is 8; leave lora.r out": [source, "lora.r=8"],
        "has alpha 9, and lora.alpha is 16": [source, "lora.alpha=16"],
        "has target_modules ['q_proj', 'up_proj'], and lora.target_modules is ['q_proj']": [
            source, "lora.target_modules=[q_proj]",
        ],
        f"was trained on other weights than those of {other}": [source, f"model.path={other}"],
        "has lora_bias, which is not supported here": [f"lora.from={dora}"],
        "neither a run with an adapter nor an adapter": [f"lora.from={tmp_path}"],
    }  # fmt: skip
    for expected, overrides in cases.items():
        config = make_config(*overrides)
        with pytest.raises(ConfigError, match=re.escape(expected)):
            check_adapter(config, config.model.path)
    for verb in ("train", "preview", "plan"):
        assert main([verb, str(tmp_path / "config.yaml"), source, "lora.r=8"]) == 2
        assert "has r 4, and lora.r is 8" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"is for other layers than this model with lora\.target_modules has"):
        train(make_config(source, "lora.target_modules=all-linear"), say=lambda _: None)
    with pytest.raises(ConfigError, match="is in the folder of this run"):
        train(make_config(source, f"output={first}"), overwrite=True, say=lambda _: None)
