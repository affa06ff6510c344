"""Code that a base brings along is named and not run, unless it is trusted; then the model is trained and merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from tests_support import SHORT, keep_code_in

from qlora_sft.cli import main
from qlora_sft.export.merge import merge_run
from qlora_sft.export.parity import check_parity
from qlora_sft.run.folder import Run
from qlora_sft.train import train

CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n"
    "    model_type = 'own_llama'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n"
    "open('MARK', 'w').close()\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def edited(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def own(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model as one that only its own code can build; that code leaves a mark when it is run."""
    keep_code_in(tmp_path / "modules", monkeypatch)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "own"))
    for name, text in CODE.items():
        (folder / name).write_text(text.replace("MARK", str(tmp_path / "mark")))
    edited(folder / "config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=MAP)
    return folder


def test_it_is_refused_by_every_verb_and_nothing_is_run(
    own: Path, make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config()
    for verb in ("train", "preview", "plan"):
        assert main([verb, str(tmp_path / "config.yaml"), f"model.path={own}"]) == 2
        said = capsys.readouterr().err
        assert "transformers has no model 'own_llama'" in said
        assert "configuration_own.py, modeling_own.py" in said
    edited(own / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["tok.Own", None]})
    assert main(["plan", str(tmp_path / "config.yaml"), f"model.path={own}", "model.trust_remote_code=true"]) == 2
    assert "is code of its own (tok.py in" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


def test_code_for_a_model_that_transformers_has_is_not_needed(
    own: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    from qlora_sft.model.load import load_base

    edited(own / "config.json", model_type="llama")
    assert type(load_base(str(own), torch.float32, False, trust=True)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "mark").exists()


def test_what_is_trusted_is_trained_planned_and_merged(
    own: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "n")
    trusted = [*SHORT, f"model.path={own}", "model.trust_remote_code=true", "model.load_in_4bit=true"]
    config = make_config(*trusted)
    assert main(["plan", str(tmp_path / "config.yaml"), *trusted[-3:], "--no-data", "--no-time"]) == 0
    train(config, say=lambda _: None)
    assert (tmp_path / "mark").exists()
    run = Run.open(config.output)
    merge_run(run.path, say=lambda _: None)
    assert check_parity(run.path, run.merged, say=lambda _: None)["merged"].kl < 1e-4
    assert asked == []  # transformers asks on stdin about code of which nothing was said
    assert {*CODE} <= {file.name for file in run.merged.iterdir()}
