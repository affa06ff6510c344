"""Damaged files of a model, a run or an adapter are named, by every reader alike, and never end in a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import ModelConfig, RopeScaling
from qlora_sft.errors import ConfigError
from qlora_sft.lora_from import adapter_settings, base_of_adapter
from qlora_sft.model.base_files import check_tokenizer_files, read_config, read_headers
from qlora_sft.model.base_folder import resolve_base
from qlora_sft.model.load import load_for_inference
from qlora_sft.model.remote_code import check_code, tokenizer_code
from qlora_sft.model.run_base import described_base
from qlora_sft.model.tensors import RunError, read_model
from qlora_sft.run.folder import Run
from qlora_sft.run_data import saved_text


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.mark.parametrize(
    "text",
    [
        "[]", "null", "3", "{bad", '{"model_type": ["llama"]}', '{"text_config": "x"}', '{"quantization_config": "x"}',
        '{"text_config": {"quantization_config": [1]}}',
    ],
)  # fmt: skip
def test_a_config_of_another_form_is_named_by_every_reader(text: str, copied: Path) -> None:
    (copied / "config.json").write_text(text)
    for read in (
        lambda: read_config(str(copied)),
        lambda: check_code(ModelConfig(str(copied)), str(copied)),
        lambda: load_for_inference(copied),
        lambda: saved_text(copied),
    ):
        with pytest.raises(ConfigError, match=r"base: no readable config\.json"):
            read()


def test_a_config_may_hold_nulls_in_these_places(tmp_path: Path) -> None:
    config = {"model_type": None, "text_config": None, "quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(str(tmp_path)) == config


@pytest.mark.parametrize("text", ["{}", "[]", "{bad", '{"weight_map": ["a"]}', '{"weight_map": {"a": ["b"]}}'])
def test_a_damaged_index_of_weights_is_named(text: str, copied: Path) -> None:
    (copied / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json: damaged"):
        read_headers(str(copied))
    with pytest.raises(RunError, match=r"model\.safetensors\.index\.json: damaged"):
        read_model(copied)


@pytest.mark.parametrize("text", ["[]", "{bad"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named(name: str, text: str, copied: Path) -> None:
    (copied / name).write_text(text)
    assert tokenizer_code(str(copied)) == []
    for read in (check_tokenizer_files, load_for_inference, saved_text):
        with pytest.raises(ConfigError, match=f"{name} is damaged"):
            read(copied)


def test_the_older_form_of_a_tokenizers_code_is_found(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": ["tok.Own", None]}))
    assert tokenizer_code(str(tmp_path)) == ["tok.py"]


def test_a_model_folder_without_what_it_takes_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    own = {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    for content, message in ((own, r"brings code for it.*own\.py.*name the folder of the run"), ({}, "model_type")):
        (copied / "config.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            load_for_inference(copied)
    for file in copied.glob("tokenizer*"):
        file.unlink()
    for read in (load_for_inference, saved_text):
        with pytest.raises(ConfigError, match="no tokenizer in"):
            read(copied)


# ------------------------------------------------------------------ adapters and runs


def written(folder: Path, manifest: object) -> Path:
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    return folder


def test_a_damaged_adapter_and_a_damaged_run_around_it_are_named(tmp_path: Path) -> None:
    for text in ("[]", "3", "{bad"):
        (written(tmp_path, {}) / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"no readable adapter_config\.json"):
            adapter_settings(tmp_path / "adapter")
    for manifest in ("{bad", [1], {"report": []}, {"report": "x"}):
        with pytest.raises(ConfigError, match=r"lora\.from: .*manifest\.json: damaged"):
            base_of_adapter(written(tmp_path, manifest) / "adapter")
    written(tmp_path, {"report": {"base_sha256": None}})
    (tmp_path / "begun.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"lora\.from: .*begun\.json: damaged"):
        base_of_adapter(tmp_path / "adapter")
    (tmp_path / "begun.json").write_text('{"base_sha256": "ab"}')
    assert base_of_adapter(tmp_path / "adapter") == "ab"


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    for manifest in ("{bad", [], "null"):
        with pytest.raises(ConfigError, match=r"manifest\.json: damaged"):
            Run.open(written(tmp_path, manifest))
    with pytest.raises(ConfigError, match="no section 'model'"):
        assert Run.open(written(tmp_path, {"config": {"model": [1]}, "report": {"base": "x"}})).model
    rope = {"rope_type": "linear", "factor": 2}
    for given in ({**rope, "new": 1}, {"factor": 2}, "linear"):
        run = Run.open(written(tmp_path, {"config": {"model": {"rope_scaling": given}}, "report": {"base": "x"}}))
        with pytest.raises(ConfigError, match=r"rope_scaling is .*this version knows rope_type, factor"):
            assert run.model
    run = Run.open(written(tmp_path, {"config": {"model": {"rope_scaling": rope}}, "report": {"base": "x"}}))
    assert run.model.rope_scaling == RopeScaling("linear", 2)
    (tmp_path / "export.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"export\.json: damaged"):
        assert run.exports


# ------------------------------------------------------------------ a base that has moved


def test_a_base_that_has_moved_is_said_with_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    content: dict[str, Any] = {"config": {"model": {"path": str(gone)}}, "report": {"base": str(gone)}}
    run = written(tmp_path / "run", content)
    message = rf"no longer at {gone}; put it back there, or write its new place as report\.base in .*manifest\.json"
    with pytest.raises(RunError, match=message):
        described_base(Run.open(run))
    content["report"]["base"] = str(run)
    assert described_base(Run.open(written(run, content))) == str(run)
    content = {"config": {"model": {"path": "demo"}}, "report": {"base": str(gone)}}
    monkeypatch.setattr("qlora_sft.demo.base_model_path", lambda: tmp_path / "anew")
    assert described_base(Run.open(written(run, content))) == str(tmp_path / "anew")


def test_a_relative_base_is_found_from_other_places(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    assert resolve_base("base") == resolve_base(str(copied)) == str(copied)
