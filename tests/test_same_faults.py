"""train, preview and plan say the same of whatever is wrong with a configuration, its data or its base."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, conversation

from qlora_sft.cli import main

Fault = Callable[[Path, Path], list[str]]
"""(a folder, the tiny model) -> overrides of the configuration, which is without fault otherwise."""

PLAIN = {"role": "user", "content": "Why?"}


def data(content: str | bytes, name: str = "bad.jsonl", key: str = "data.train.0.path") -> Fault:
    def make(folder: Path, _: Path) -> list[str]:
        file = folder / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return [f"{key}={file}"]

    return make


def rows(*answers: dict[str, Any], overrides: tuple[str, ...] = ()) -> Fault:
    lines = "".join(json.dumps({"messages": [PLAIN, {"role": "assistant", **each}]}) + "\n" for each in answers)
    return lambda folder, model: [*data(lines)(folder, model), *overrides]


def settings(*overrides: str) -> Fault:
    return lambda folder, _: [override.replace("FOLDER", str(folder)) for override in overrides]


def base(change: Callable[[Path], None], *overrides: str) -> Fault:
    """A copy of the tiny model, changed."""

    def make(folder: Path, model: Path) -> list[str]:
        copy = folder / "base"
        shutil.copytree(model, copy)
        change(copy)
        return [f"model.path={copy}", *overrides]

    return make


def edited(file: str, **values: Any) -> Callable[[Path], None]:
    """The JSON ``file`` of the base with these values; None takes a key out."""

    def change(folder: Path) -> None:
        content = {**json.loads((folder / file).read_text()), **values}
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def template(text: str) -> Fault:
    def make(folder: Path, _: Path) -> list[str]:
        (folder / "own.jinja").write_text(text)
        return [f"model.chat_template={folder / 'own.jinja'}"]

    return make


def both(*faults: Fault) -> Fault:
    return lambda folder, model: [override for fault in faults for override in fault(folder, model)]


# Turns without an end.
ENDLESS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CORPUS: dict[str, tuple[Fault, str]] = {
    # ---------------------------------------------------------------- files
    "missing file": (settings("data.train.0.path=FOLDER/none.jsonl"), "no such file"),
    "unknown kind": (data("x", "a.docx"), "unknown kind of file"),
    "damaged gzip": (data(gzip.compress(b'{"a": 1}\n' * 99)[:-12], "a.jsonl.gz"), "damaged or cut off"),
    "broken JSON": (data('{"messages": [\n'), "bad.jsonl:1"),
    "not UTF-8": (data(b'{"text": "\xff\xfe"}\n'), "bad.jsonl:1"),
    "no known form": (data('{"colour": "red"}\n'), "expected a row in one of the known forms"),
    "two forms": (data('{"prompt": "a", "completion": "b"}\n{"text": "c"}\n'), "a file holds one form"),
    "empty file": (data(""), "no conversations"),
    "no match": (settings("data.train.0.path=FOLDER/*.jsonl.zst"), "no file matches"),
    "split of a file": (settings("data.train.0.split=train"), "a file has no split"),
    "held-out missing": (settings("data.held_out=[{path: FOLDER/none.jsonl}]"), "none.jsonl"),
    "replay missing": (settings("data.replay={path: FOLDER/none.txt}"), "none.txt"),
    "evaluation file missing": (settings("data.decontaminate=[FOLDER/exam.csv]"), "exam.csv"),
    # ---------------------------------------------------------------- rows
    "reasoning left out": (rows({"content": "Because.", "reasoning": "Hm."}), "leaves out its 'reasoning'"),
    "nothing supervised": (rows({"content": "Because.", "train": False}), "no token of 'bad' is supervised"),
    "all too long": (settings("data.max_length=4"), "are too long"),
    "role unknown": (data('{"messages": [{"role": "owl", "content": "hoo"}]}\n'), "bad.jsonl:1"),
    # ---------------------------------------------------------------- template and tokens
    "no such template": (settings("model.chat_template=chatmel"), "neither a file nor a shipped template"),
    "template that is no Jinja": (template("{% for %}"), "not valid Jinja"),
    "template without an end": (template(ENDLESS), "chat.jsonl:1"),
    "no such stop token": (settings('model.stop_tokens=["<|halt|>"]'), "'<|halt|>' is not a token"),
    # ---------------------------------------------------------------- base
    "no such folder": (settings("model.path=FOLDER/none"), "no such folder"),
    "no model in it": (base(without("config.json")), "has no config.json"),
    "no tokenizer": (base(without("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")), "tokenizer"),
    "no template": (base(without("chat_template.jinja")), "no chat template; name one"),
    "quantised in AWQ": (
        base(edited("config.json", quantization_config={"quant_method": "awq"})), "are quantised with awq",
    ),
    "code of its own": (
        base(edited("config.json", model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"})), "own.py",
    ),
    "revision of a folder": (settings("model.revision=v2"), "only a model of the Hub has revisions"),
    "no adapter to go on from": (settings("lora.from=FOLDER"), "neither a run with an adapter nor an adapter"),
    "broken config.json": (base(lambda f: (f / "config.json").write_text("{") and None), "no readable config.json"),
    "no eos": (base(edited("tokenizer_config.json", eos_token=None)), "names no eos token"),
    # ---------------------------------------------------------------- settings that the base does not go with
    "more tokens than positions": (settings("data.max_length=4096"), "knows positions up to 2,048"),
    "scaled too little": (
        settings("data.max_length=8192", "model.rope_scaling={rope_type: yarn, factor: 2}"), "it takes a factor of 4",
    ),
    "no such layer": (settings("lora.target_modules=[q_proj, kproj]"), "no linear layer is named ['kproj']"),
    "tied head in 4 bits": (
        settings("model.load_in_4bit=true", "model.head_in_4bit=true"), "is its input embedding, too",
    ),
    "tiles with dropout": (settings("memory.tiled_mlp=on", "lora.dropout=0.1"), "memory.tiled_mlp: on is not possible"),
    "Triton on a CPU": (settings("model.loss=triton"), "model.loss: path: triton cannot run here"),
    "Unsloth too late": (settings("model.backend=unsloth"), "model.backend=unsloth"),
    # ---------------------------------------------------------------- the configuration itself, and two at once
    "unknown key": (settings("training.lr=1"), "training.lr"),
    "value without sense": (settings("lora.r=0"), "lora.r must be positive"),
    "data before model": (
        both(data("{"), settings("data.max_length=4096", "model.backend=unsloth", "lora.target_modules=[x]")),
        "bad.jsonl:1",
    ),
    "base before rows": (
        both(rows({"content": "a", "reasoning": "b"}), settings("lora.target_modules=[x]")), "no linear layer",
    ),
    "both splits": (
        both(rows({"content": "Because.", "reasoning": "Hm."}), settings("data.held_out=[{path: FOLDER/bad.jsonl}]")),
        "bad.jsonl:1",
    ),
}  # fmt: skip


@pytest.fixture
def recipe(make_config: MakeConfig, tmp_path: Path) -> Path:
    make_config(rows=[conversation(i) for i in range(4)])
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("name", CORPUS)
def test_train_preview_and_plan_find_the_same_fault(
    name: str, recipe: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, expected = CORPUS[name]
    folder = tmp_path / "faulty"
    folder.mkdir()
    overrides = fault(folder, tiny_model)
    said = {}
    for verb in ("train", "preview", "plan"):
        assert main([verb, str(recipe), *overrides, *(["--no-time"] if verb == "plan" else [])]) == 2, verb
        said[verb] = capsys.readouterr().err.split("error: ", 1)[1]
    assert expected in said["train"]
    assert said["preview"] == said["train"]
    assert said["plan"] == said["train"]
    assert not (tmp_path / "run").exists()


def test_the_faults_are_many_and_the_configuration_itself_has_none(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(CORPUS) >= 25
    assert main(["preview", str(recipe)]) == 0
    assert main(["plan", str(recipe), "--no-time"]) == 0
    capsys.readouterr()
