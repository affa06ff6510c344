"""Convert a file: find out whose it is, write a recipe that loads, and name what has no counterpart."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from qlora_sft.atomic import written_file
from qlora_sft.config import load_config
from qlora_sft.convert.axolotl import convert_axolotl
from qlora_sft.convert.llama_factory import convert_llama_factory
from qlora_sft.convert.pieces import Converted
from qlora_sft.convert.python_arguments import python_arguments
from qlora_sft.convert.trl import convert_trl
from qlora_sft.errors import ConfigError
from qlora_sft.json_types import JsonObject
from qlora_sft.text import as_path, read_text
from qlora_sft.yaml_text import YamlFault, read_yaml, write_yaml


class Recipe(NamedTuple):
    """Holds the text of a converted recipe and what could not be said in it."""

    text: str
    notes: list[str]


def convert(file: str) -> Recipe:
    """Returns the recipe for a configuration of axolotl, LLaMA-Factory or TRL, or a script that uses TRL or Unsloth.

    A script is read and not run. Raises `ConfigError` if the file is none of these, or names a kind of training that
    there is not here.
    """
    path = as_path(file)
    is_script = path.suffix == ".py"
    original = {} if is_script else _read(path)
    try:
        toolkit, made = _from_script(read_text(path)) if is_script else _converted(original, path)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None
    if "output" not in made.top:
        made.put("output", f"runs/{path.stem}")
        made.note("output_dir", "not given", f"output: runs/{path.stem} is written, after the file's name")
    header = [f"# Converted from {path.name}, a configuration of {toolkit}.", *(f"# not here: {n}" for n in made.notes)]
    text = "\n".join([*(" ".join(line.split()) for line in header), write_yaml(made.tree())])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        try:
            load_config(copy)
        except ConfigError as error:
            raise ConfigError(
                [problem.replace(str(copy), f"{path}, converted") for problem in error.problems]
            ) from None
    return Recipe(text, made.notes)


def _from_script(code: str) -> tuple[str, Converted]:
    arguments, notes = python_arguments(code)
    made = convert_trl(arguments)
    made.notes[:0] = notes
    if not made.train:
        made.train = [{"path": "data.jsonl"}]
        made.note("load_dataset", "not found", "data.jsonl is written for the training data")
    return "TRL, PEFT or Unsloth in Python", made


def _read(path: Path) -> JsonObject:
    try:
        original = read_yaml(read_text(path))
    except YamlFault as fault:
        raise ConfigError([f"{path}:{line}: {what}" for line, what in fault.faults]) from None
    if not isinstance(original, dict):
        raise ConfigError(f"{path}: expected keys and values")
    return original


def _converted(original: JsonObject, path: Path) -> tuple[str, Converted]:
    _check_keys(original)
    if "base_model" in original:
        return "axolotl", convert_axolotl(original)
    if "model_name_or_path" in original and ("finetuning_type" in original or "stage" in original):
        return "LLaMA-Factory", convert_llama_factory(original, path.parent)
    if "model_name_or_path" in original:
        return "TRL", convert_trl(original)
    raise ConfigError(
        "neither of axolotl (base_model: ...) nor of LLaMA-Factory (model_name_or_path: ..., stage: ...) nor of TRL "
        "(model_name_or_path: ...); a script that uses TRL or Unsloth ends in .py"
    )


def _check_keys(tree: object) -> None:
    """Raises `ConfigError` for a key that is no text, in any section."""
    for key in tree if isinstance(tree, dict) else ():
        if not isinstance(key, str):
            raise ConfigError(f"{key!r}: a key must be a text; quote it or remove it")
    if isinstance(tree, list | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            _check_keys(item)


def write_recipe(recipe: Recipe, out: str) -> Path:
    """Writes the text to the file ``out``, which must not exist, and returns its path."""
    target = as_path(out)
    if target.exists():
        raise ConfigError(f"{target} exists; name another file, or remove it first")
    with written_file(target) as beside:
        beside.write_text(recipe.text, encoding="utf-8")
    return target
