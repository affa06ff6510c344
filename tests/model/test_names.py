"""The model that was typed is the one that is loaded, recorded, gone on with and merged: a fake cache of the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from safetensors.torch import load_file, save_file
from tests_support import SHORT, bare_base, killed, result, with_unsloth

from qlora_sft.cli import main
from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.merge import merge_run
from qlora_sft.model.base_folder import resolve_base
from qlora_sft.model.fingerprint import fingerprint
from qlora_sft.model.run_base import run_base
from qlora_sft.model.snapshot import file_hashes, origin_of
from qlora_sft.plan.plan import make_plan
from qlora_sft.run.folder import Run
from qlora_sft.train import train

FIRST, SECOND = "a1" * 20, "b2" * 20
NAME = "owner/model"
CHILD = Path(__file__).with_name("names_child.py")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
AddModel = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AddModel:
    """Puts a model into a cache of the Hub that nothing can be added to from outside; ``seed``: which weights."""
    cache = tmp_path / "hub"
    # The library reads the place from the environment once, when it is imported.
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    for module in ("constants", "_snapshot_download"):
        target = f"huggingface_hub.{module}" + (".constants" if module != "constants" else "")
        monkeypatch.setattr(f"{target}.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(f"{target}.HF_HUB_OFFLINE", True)

    def add(name: str, commit: str, seed: int = 0, main: bool = True) -> Path:
        kept = cache / f"models--{name.replace('/', '--')}"
        folder = Path(shutil.copytree(tiny_model, kept / "snapshots" / commit))
        tensors = load_file(folder / "model.safetensors")
        torch.manual_seed(seed)
        changed = {key: tensor + seed * 1e-3 * torch.randn_like(tensor) for key, tensor in tensors.items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        (kept / "refs").mkdir(exist_ok=True)
        if main:
            (kept / "refs" / "main").write_text(commit)
        return folder

    return add


def test_what_is_loaded_stands_in_the_run_and_in_its_adapter(hub: AddModel, make_config: MakeConfig) -> None:
    folder = hub(NAME, FIRST)
    config = make_config(*SHORT, "training.max_steps=2", f"model.path={NAME}")
    plan = make_plan(config, data=False, timing=False, say=lambda _: None)
    assert (plan.model.path, plan.disk.download) == (NAME, 0)
    said: list[str] = []
    train(config, say=said.append)
    assert any(f"model: {NAME} at commit {FIRST}, LoRA rank" in text for text in said)
    run = Run.open(config.output)
    assert (run.base, run.base_commit, run.base_sha256) == (NAME, FIRST, fingerprint(folder))
    assert run.report.base_files == file_hashes(str(folder))
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(run.report.base_files)
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, FIRST)
    assert run_base(run) == folder


def test_a_killed_run_goes_on_to_the_same_bits_though_the_main_branch_has_moved(
    hub: AddModel, make_config: MakeConfig, tmp_path: Path
) -> None:
    hub(NAME, FIRST)
    whole = make_config(*SHORT, f"model.path={NAME}")
    train(whole, say=lambda _: None)
    resumed = make_config(*SHORT, f"model.path={NAME}", f"output={tmp_path / 'killed'}")
    killed(resumed, 3)
    hub(NAME, SECOND, seed=1)
    said: list[str] = []
    train(resumed, resume=True, say=said.append)
    assert f"base: {NAME} at commit {FIRST}, with which this run began" in said
    assert result(tmp_path / "killed") == result(tmp_path / "run")
    assert Run.open(resumed.output).base_commit == FIRST


def test_another_revision_is_refused_with_both_commits(hub: AddModel, make_config: MakeConfig, tmp_path: Path) -> None:
    first = hub(NAME, FIRST)
    hub(NAME, SECOND, seed=1, main=False)
    config = make_config(*SHORT, f"model.path={NAME}", "training.save_steps=1", "training.max_steps=2")
    killed(config, 1)
    other = make_config(
        *SHORT, f"model.path={NAME}", "training.save_steps=1", "training.max_steps=2", f"model.revision={SECOND}"
    )
    with pytest.raises(ConfigError, match=f"at commit {SECOND}, and this run began with {FIRST}"):
        train(other, resume=True, say=lambda _: None)
    named = make_config(
        *SHORT, f"model.path={NAME}", "training.save_steps=1", "training.max_steps=2", f"model.revision={FIRST}"
    )
    train(named, resume=True, say=lambda _: None)
    # The merge goes onto the commit that was trained on, whichever the main branch is now.
    (first.parents[1] / "refs" / "main").write_text(SECOND)
    assert merge_run(config.output, say=lambda _: None).modules == 14
    shutil.rmtree(first)
    with pytest.raises(RunError, match=f"{NAME} at revision {FIRST} .*holds {NAME} at {SECOND}"):
        merge_run(config.output, say=lambda _: None)
    # Nor onto other weights under the same commit.
    shutil.copytree(first.with_name(SECOND), first)
    with pytest.raises(RunError, match="not the weights that the adapter was trained on"):
        merge_run(config.output, say=lambda _: None)
    with pytest.raises(RunError, match="not the weights that the adapter was trained on"):
        from qlora_sft.model.load import load_for_inference

        load_for_inference(Path(config.output))


def test_a_revision_takes_effect_and_is_refused_where_it_has_none(
    hub: AddModel, make_config: MakeConfig, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub(NAME, FIRST)
    second = hub(NAME, SECOND, seed=1, main=False)
    (second.parents[1] / "refs" / "v2").write_text(SECOND)
    assert origin_of(resolve_base(NAME)) == (NAME, FIRST)
    assert origin_of(resolve_base(NAME, SECOND)) == origin_of(resolve_base(NAME, "v2")) == (NAME, SECOND)
    make_config()
    cases = {
        f"model.revision: only a model of the Hub has revisions, and {tiny_model} is a folder": ["model.revision=v2"],
        f"{NAME} at revision v3 is neither a folder here nor to be had": [f"model.path={NAME}", "model.revision=v3"],
    }
    for expected, overrides in cases.items():
        for verb in ("train", "preview", "plan"):
            assert main([verb, str(tmp_path / "config.yaml"), *overrides]) == 2
            assert expected in capsys.readouterr().err


def test_weights_that_are_not_there_are_said_before_anything_is_loaded(hub: AddModel, make_config: MakeConfig) -> None:
    folder = hub(NAME, FIRST)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"the weights of {NAME} at commit {FIRST} are not all here"):
        train(make_config(f"model.path={NAME}"), say=lambda _: None)


def small_model(folder: Path, small_tokenizer: Any) -> Path:
    """The smallest there is, with a chat template."""
    model = bare_base(folder, small_tokenizer, tied=True, room=0)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
@with_unsloth
def test_names_that_unsloth_would_replace_are_loaded_as_they_were_typed(
    make_config: MakeConfig, small_tokenizer: Any, tmp_path: Path, count: int
) -> None:
    make_config()
    model = small_model(tmp_path / "small", small_tokenizer)
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, CHILD, tmp_path / "config.yaml", model, str(count)],
        cwd=tmp_path, env={**os.environ, **cache}, stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    # Unsloth has something to say on stdout, too.
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert json.loads(done.stdout.splitlines()[-1]) == {"packed": [True, True]}
    assert len({each["name"] for each in seen}) == count
    for each in seen:
        assert each["other"].lower() != each["name"].lower()
        assert each["norm"] == [each["number"]] * 2, each
        assert (each["adapter"], each["plan"]) == ([each["name"]] * 2, each["name"])
        assert each["fingerprint"]


@with_unsloth
@pytest.mark.slow
def test_a_run_of_unsloth_is_recorded_and_merged_under_the_name_that_was_typed(
    hub: AddModel, make_config: MakeConfig, tmp_path: Path
) -> None:
    name = "meta-llama/Llama-3.2-1B-Instruct"
    folder = hub(name, FIRST)
    make_config()
    settings = [*SHORT, f"model.path={name}", "model.backend=unsloth", "model.load_in_4bit=true"]
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "qlora_sft", "train", tmp_path / "config.yaml", *settings]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **cache}, check=True)
    run = Run.open(tmp_path / "run")
    assert (run.report.backend.name, run.base, run.base_commit) == ("unsloth", name, FIRST)
    assert run.base_sha256 == fingerprint(folder)
    adapter = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (name, FIRST)
    assert merge_run(run.path, say=lambda _: None).modules == 14
