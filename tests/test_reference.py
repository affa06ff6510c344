"""The page of settings and the editor's schema say what the code says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from schema_check import faults

from qlora_sft import reference
from qlora_sft.config import Config, load_config
from qlora_sft.errors import ConfigError
from qlora_sft.reference import Key, keys_of, section_of
from qlora_sft.yaml_text import read_yaml

GOOD = "model: {path: demo}\ndata: {train: [{path: a.jsonl}]}\noutput: out\n"


def all_keys(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Key]]:
    for key in keys_of(kind):
        yield prefix + key.name, key
        inner = section_of(key.hint)
        if inner:
            yield from all_keys(inner, f"{prefix}{key.name}.")


def test_the_files_are_what_the_code_says() -> None:
    again = "run: python -m qlora_sft.reference"
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), again
    assert reference.SCHEMA.read_text(encoding="utf-8") == reference.schema_text(), again


@pytest.mark.parametrize(("path", "key"), [pytest.param(path, key, id=path) for path, key in all_keys()])
def test_every_key_has_a_meaning(path: str, key: Key) -> None:
    assert len(key.meaning) >= 5, f"{path}: write a docstring under the field"
    assert key.meaning.endswith((".", ")", ":", ";")), f"{path}: {key.meaning}"


def test_the_keys_of_an_heir_are_those_of_what_it_extends_too() -> None:
    paths = {path for path, _ in all_keys()}
    assert {"data.train.path", "data.train.weight", "data.replay.share", "data.replay.max_rows"} <= paths
    assert "data.held_out.weight" not in paths


@pytest.mark.parametrize(
    "override",
    [
        "training.lerning_rate=1", "training.batch_size=0", "training.batch_size=true", "training.learning_rate=2",
        "lora.dropout=1", "lora.dropout=0.99", "model.backend=slow", "model.backend=unsloth", "output=5",
        "lora.target_modules=[q_proj]", "lora.target_modules=[3]", "lora.target_modules=some", "memory.policy=null",
        "data.replay={path: c.jsonl, share: 0.95}", "data.replay={path: c.jsonl, share: 0.96}", "data.replay=3",
        "data.replay=null", "data.train.0.columns={prompt: a}", "data.train.0.columns={prompt: 3}", "seed=-1",
        "model.rope_scaling={factor: 2}", "model.rope_scaling={factor: 2, rope_type: yarn}",
        "model.rope_scaling={factor: 1, rope_type: yarn}", "data.held_out=[{path: b, weight: 1}]", "lora=null",
    ],
)  # fmt: skip
def test_the_schema_takes_what_the_loader_takes(override: str, tmp_path: Path) -> None:
    from qlora_sft.strict import apply_override

    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    tree = read_yaml(GOOD)
    assert isinstance(tree, dict)
    apply_override(tree, override, {}, [])
    try:
        load_config(file, [override])
        loads = True
    except ConfigError:
        loads = False
    assert (list(faults(tree, json.loads(reference.SCHEMA.read_text()))) == []) == loads
