"""A corpus of faulty configurations and data files: each ends with 2 and the reason, and none in a traceback."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import MakeConfig, conversation
from misread_files import BAD, lines

from qlora_sft.cli import main

HEAD = "model: {path: MODEL, backend: transformers, dtype: float32, load_in_4bit: false}\n"
DATA = "data: {train: [{path: FOLDER/chat.jsonl}], max_length: 256}\n"
TAIL = "output: FOLDER/run\n"
MORE = "data.train.1={path: FOLDER/more.jsonl}"

# Whole recipes: what stands in the file, and what is said of it.
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "expected keys and values (model:, data:, output:), got nothing"),
    "a list": ("- model\n- data\n", "expected keys and values (model:, data:, output:), got a list"),
    "a sentence": ("please train my model\n", "expected keys and values (model:, data:, output:), got a text"),
    "JSON cut off": ('{"model": {"path": "demo"', ":1: not valid YAML"),
    "a tab": (HEAD + "data:\n\ttrain: []\n" + TAIL, ":3: not valid YAML"),
    "an open quote": (HEAD + DATA + 'output: "run\n', "not valid YAML"),
    "wrong indentation": (HEAD + "data:\n  train:\n   - path: a\n  - path: b\n" + TAIL, "not valid YAML"),
    "a key twice": (HEAD + DATA + TAIL + "seed: 1\nseed: 2\n", ":5: the key 'seed' stands twice, first in line 4"),
    "two documents": (HEAD + DATA + TAIL + "---\nseed: 1\n", "not valid YAML: expected a single document"),
    "UTF-16": ((HEAD + DATA + TAIL).encode("utf-16"), "not UTF-8 text; re-save it as UTF-8 (it is UTF-16"),
    "Latin-1": ((HEAD + DATA + TAIL + "# naïve\n").encode("latin-1"), "not UTF-8 text; re-save it as UTF-8 (byte 0xef"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0", "not UTF-8 text"),
    "code": (HEAD + DATA + "output: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "an alias of nothing": (HEAD + DATA + "output: *run\n", "not valid YAML: found undefined alias"),
    "an anchor in itself": (HEAD + "data: &d {train: [*d]}\n" + TAIL, "the anchor &d contains its own alias *d"),
    "a section that is a text": ("model: MODEL\n" + DATA + TAIL, "model must be a section with keys, got a text"),
    "a section that is a list": (HEAD + DATA + TAIL + "training: [1]\n", "training must be a section with keys, got a"),
    "data as a path": (HEAD + "data: FOLDER/chat.jsonl\n" + TAIL, "data must be a section with keys, got a text"),
    "train as a path": (HEAD + "data: {train: FOLDER/chat.jsonl}\n" + TAIL, "data.train must be a list, got"),
    "paths without keys": (HEAD + "data: {train: [FOLDER/chat.jsonl]}\n" + TAIL, "data.train.0 must be a section with"),
    "no data": (HEAD + TAIL, "missing key 'data'"),
    "no model": (DATA + TAIL, "missing key 'model'"),
    "no output": (HEAD + DATA, "missing key 'output'"),
    "no path of the model": ("model: {dtype: float32}\n" + DATA + TAIL, "missing key 'model.path'"),
    "no sources": (HEAD + "data: {train: []}\n" + TAIL, "data.train must name at least one source"),
    "a section that is another's": (HEAD + DATA + TAIL + "trainer: {epochs: 1}\n", "unknown key 'trainer' (did you me"),
    "axolotl's": ("base_model: MODEL\ndatasets: [{path: a}]\n", "unknown key 'base_model'"),
}  # fmt: skip

# Values of the command line, which are those of the file.
VALUES: dict[str, tuple[list[str], str]] = {
    "a key of another toolkit": (["training.num_train_epochs=3"], "unknown key 'training.num_train_epochs'"),
    "a slip": (["training.learning_rte=1e-4"], "(did you mean 'learning_rate'?)"),
    "a text for a number": (["training.epochs=three"], "training.epochs must be a number, got 'three'"),
    "a list for a number": (["training.learning_rate=[1e-4]"], "training.learning_rate must be a number, got a list"),
    "half a step": (["training.max_steps=1.5"], "training.max_steps must be a whole number or empty, got 1.5"),
    "a quoted number": (['training.epochs="2"'], "training.epochs must be a number, got '2' (without quotes)"),
    "an octal number": (["lora.r=016"], "lora.r must be a whole number, got '016' (a number that begins with 0"),
    "a time": (["training.max_steps=1:30"], "a number with colons is in base 60 to some"),
    "a thousands separator": (["data.max_length=2,048"], "data.max_length must be a whole number, got '2,048'"),
    "yes for a switch": (["model.load_in_4bit=yes"], "model.load_in_4bit must be true or false, got 'yes'"),
    "1 for a switch": (["lora.dora=1"], "lora.dora must be true or false, got 1"),
    "no rate": (["training.learning_rate=0"], "training.learning_rate must be positive, got 0"),
    "a rate of infinity": (["training.learning_rate=.inf"], "training.learning_rate must be a finite number, got inf"),
    "a rate that is no number": (["training.learning_rate=.nan"], "must be a finite number, got nan"),
    "a rate of 2": (["training.learning_rate=2"], "training.learning_rate must be at most 1, got 2"),
    "no epochs": (["training.epochs=0"], "training.epochs must be positive, got 0"),
    "no rank": (["lora.r=0"], "lora.r must be positive, got 0"),
    "a rank beyond all layers": (["lora.r=100000"], "lora.r must be at most 4,096, got 100000"),
    "dropout of everything": (["lora.dropout=1"], "lora.dropout must be less than 1, got 1"),
    "dropout in percent": (["lora.dropout=5"], "lora.dropout must be less than 1, got 5"),
    "a seed below zero": (["seed=-1"], "seed must not be negative, got -1"),
    "an unknown optimizer": (["training.optimizer=adam"], "training.optimizer must be one of auto, adamw_torch"),
    "an unknown schedule": (["training.schedule=cosin"], "(did you mean 'cosine'?)"),
    "an unknown type": (["model.dtype=bf16"], "model.dtype must be one of auto, bfloat16, float16, float32, got 'bf16"),
    "an unknown logger": (["training.report_to=[wandbb]"], "training.report_to.0 must be one of tensorboard, wandb"),
    "an unknown packing": (["data.packing=true"], "data.packing must be one of bfd, ffd, none, got True"),
    "an unknown form of rows": (["data.train.0.format=chatml"], "data.train.0.format must be one of auto, messages"),
    "warm-up twice": (
        ["training.warmup_steps=5", "training.warmup_ratio=0.2"], "training.warmup_steps replaces",
    ),
    "accumulation twice": (
        ["training.tokens_per_step=4096", "training.gradient_accumulation=4"], "remove training.gradient_accumulation",
    ),
    "a decay without its schedule": (["training.decay_ratio=0.5"], "has an effect with training.schedule=wsd only"),
    "patience without evaluations": (["training.patience=2"], "training.patience needs evaluation.every_steps"),
    "a metric that is not measured": (["training.best_metric=accuracy"], "training.best_metric needs evaluation.every"),
    "evaluations of nothing": (["evaluation.every_steps=5"], "measures held-out rows, and data.held_out names none"),
    "questions without tasks": (["evaluation.tasks_every_steps=5"], "asks the questions of evaluation.tasks, and ther"),
    "two tasks of one name": (
        ["evaluation.tasks=[{path: a.jsonl}, {path: b/a.jsonl}]"], "evaluation.tasks has two tasks named a",
    ),
    "two sources of one name": (["data.train=[{path: FOLDER/chat.jsonl}, {path: FOLDER/chat.jsonl}]"], "two sources n"),
    "a share above half": (["data.held_out=60%"], "data.held_out must be a share of at most half, as 5%, got '60%'"),
    "a share without percent": (["data.held_out=five"], "data.held_out must be a share of at most half"),
    "a weight without its mixture": (["data.train.0.weight=2"], "has an effect with data.mixture=explicit only"),
    "a mixture without weights": (["data.mixture=explicit"], "must be given with data.mixture=explicit"),
    "a temperature without its mixture": (["data.temperature=2"], "has an effect with data.mixture=temperature only"),
    "a curriculum of nothing": (["data.curriculum=progressive"], "data.curriculum needs data.replay"),
    "a leash on nothing": (["training.replay_kl=1"], "training.replay_kl needs data.replay"),
    "weights held for nothing": (["training.ewc=10"], "training.ewc needs data.replay"),
    "a stream without an end": (["data.train.0.streaming=true"], "data.train.0.streaming needs max_rows"),
    "columns of no form": (["data.train.0.columns={promt: q}"], "maps 'promt', which is none of"),
    "modules to save": (["lora.modules_to_save=[lm_head]"], "whole matrices are not trained here"),
    "PiSSA": (["lora.init=pissa"], "takes the largest directions out of the base's weights"),
    "LoftQ without NF4": (["lora.init=loftq"], "loftq has no effect without model.load_in_4bit"),
    "odd ranks, orthogonal": (["lora.init=orthogonal", "lora.r=3"], "orthogonal needs even ranks, not [3]"),
    "a pattern that is none": (["lora.target_modules='(q'"], "is no regular expression"),
    "no layers": (["lora.target_modules=[]"], "lora.target_modules must name at least one layer"),
    "layers that are not there": (["lora.target_modules=[query]"], "no linear layer is named ['query']"),
    "a pattern that says nothing": (["lora.modules=[{match: q_proj}]"], "has no effect; give it an r or an alpha"),
    "a head in 4 bits alone": (["model.head_in_4bit=true"], "has no effect without model.load_in_4bit"),
    "a factor below 1": (["model.rope_scaling={rope_type: yarn, factor: 0.5}"], "factor must be larger than 1, got 0."),
    "a scaling of another name": (["model.rope_scaling={rope_type: su, factor: 2}"], "must be one of yarn, linear, dy"),
    "a budget without its policy": (["memory.policy=none", "memory.gpu_budget_gib=8"], "has an effect only with memor"),
    "a new token with a space": (["model.new_tokens=['a b']"], "model.new_tokens must be texts without spaces"),
    "a revision of a folder": (["model.revision=main"], "only a model of the Hub has revisions"),
    "an item that is not there": (["data.train.4.path=x"], "data.train has 1 items, counted from 0; there is no '4'"),
    "a key below a text": (["output.path=x"], "output is a text, it has no 'path'"),
    "a value twice": (["seed=1", "seed=2"], "override 'seed=2' would undo 'seed=1'; give one of them"),
    "an output that is a file": (["output=FOLDER/chat.jsonl"], "chat.jsonl is a file; name a folder"),
}  # fmt: skip

USER = {"role": "user", "content": "Why?"}
SAID = {"role": "assistant", "content": "Because."}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
RESULT = {"role": "tool", "content": "2", "tool_call_id": "c9"}


def chat(*messages: Any, **more: Any) -> str:
    return lines({"messages": list(messages), **more})


def table(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


# Rows that cannot be trained on: name of the file, content, and what is said of it beside the file and the line.
ROWS: dict[str, tuple[str, str | bytes, str]] = {
    "nothing in it": ("a.jsonl", "", "no conversations"),
    "blank lines": ("a.jsonl", "\n \n\n", "no conversations"),
    "a header alone": ("a.csv", "prompt,completion\n", "no conversations"),
    "an empty list": ("a.json", "[]", "no conversations"),
    "a number": ("a.jsonl", "3\n", "expected an object with columns (e.g. 'messages'), got a number"),
    "a text": ("a.jsonl", '"Hello"\n', "(e.g. 'messages'), got a text"),
    "null": ("a.jsonl", "null\n", "(e.g. 'messages'), got nothing"),
    "unknown columns": ("a.jsonl", lines({"question": "a", "reply": "b"}), "expected a row in one of the known forms"),
    "a file of preferences": (
        "a.jsonl", lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        "map it (columns: {completion: chosen} beside a prompt",
    ),
    "two forms": ("a.jsonl", lines({"prompt": "a", "completion": "b"}, {"text": "c"}), "a file holds one form"),
    "not UTF-8": (
        "a.jsonl", b'{"text": "\xff\xfe"}\n', ":1: not UTF-8 text (invalid start byte at byte 10 of the line)",
    ),
    "cut off": ("a.jsonl", chat(USER, SAID) + '{"messages": [{"role": "us', ":2: not valid JSON"),
    "a damaged gzip": ("a.jsonl.gz", gzip.compress(chat(USER, SAID).encode() * 99)[:-9], "damaged or cut off"),
    "a damaged Parquet": ("a.parquet", b"PAR1 and nothing more", "a.parquet: not a Parquet file or damaged"),
    "an empty Parquet": ("a.parquet", b"", "damaged (Parquet file size is 0 bytes)"),
    "Parquet of numbers": ("a.parquet", table(text=[1, 2]), ":1: 'text' must be a text, got a number"),
    "messages as numbers": ("a.parquet", table(messages=[[1, 2]]), "an object with 'role' and 'content', got a number"),
    "an unknown kind": ("a.xlsx", "x", "unknown kind of file"),
    "no ending": ("rows", chat(USER, SAID), "unknown kind of file"),
    "messages that are none": (
        "a.jsonl", lines({"messages": "hello"}), "'messages' is not JSON: Expecting value at column 1",
    ),
    "a message that is a text": (
        "a.jsonl", chat("hello", SAID), "message 0: expected an object with 'role' and 'content', got a text",
    ),
    "no messages": ("a.jsonl", chat(), "expected a list 'messages' with at least one message, got an empty list"),
    "an unknown role": (
        "a.jsonl", chat({"role": "owl", "content": "hoo"}),
        ":1: message 0: unknown role 'owl'; use one of system, user",
    ),
    "no role": ("a.jsonl", chat({"content": "hoo"}), ":1: message 0: unknown role None; use one of system"),
    "no content": (
        "a.jsonl", chat(USER, {"role": "assistant"}), ":1: message 1: 'content' must be a text, got nothing",
    ),
    "content of null": (
        "a.jsonl", chat(USER, {"role": "assistant", "content": None}),
        ":1: message 1: 'content' must be a text, got nothing",
    ),
    "content that is a number": (
        "a.jsonl", chat(USER, {"role": "assistant", "content": 42}),
        "must be a text or a list of typed parts, got a number",
    ),
    "no answer": ("a.jsonl", chat(USER), "no assistant turn, so nothing could be trained"),
    "an answer that is not trained": ("a.jsonl", chat(USER, {**SAID, "train": False}), "no token of 'a' is supervised"),
    "train that is a text": (
        "a.jsonl", chat(USER, {**SAID, "train": "no"}), "message 1: 'train' has the wrong type: 'no'; it must be",
    ),
    "a weight below zero": ("a.jsonl", chat(USER, {**SAID, "weight": -1}), "message 1: 'weight' must not be negative"),
    "a weight that is a text": (
        "a.jsonl", chat(USER, {**SAID, "weight": "1"}), "'weight' has the wrong type: '1'; it must be a number",
    ),
    "a picture": (
        "a.jsonl", chat({"role": "user", "content": [{"type": "image"}]}, SAID),
        "a content part of type 'image': only text is trained here",
    ),
    "a part of no kind": (
        "a.jsonl", chat({"role": "user", "content": [{"text": 1}]}, SAID),
        "a part of 'content' needs a 'type' and a 'value'",
    ),
    "a call without a name": (
        "a.jsonl", chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}),
        "a tool call needs a function with a 'name'",
    ),
    "calls that are a text": (
        "a.jsonl", chat(USER, {"role": "assistant", "content": "", "tool_calls": "add"}),
        "message 1: 'tool_calls' is not valid JSON",
    ),
    "arguments that are no JSON": (
        "a.jsonl",
        chat(USER, {**SAID, "tool_calls": [{"function": {"name": "f", "arguments": "{a: 1"}}]}),
        "the arguments of 'f': the text is not valid JSON",
    ),
    "a result of no call": (
        "a.jsonl", chat(USER, RESULT, SAID), "the message before it calls no tool",
    ),
    "a result of another call": (
        "a.jsonl",
        chat(USER, {**SAID, "tool_calls": [CALL]}, RESULT, SAID), "the calls before it have the ids 'c1'",
    ),
    "tools that are a number": (
        "a.jsonl", chat(USER, SAID, tools=3), "'tools' must be a list of functions or JSON text",
    ),
    "reasoning that the template leaves out": ("a.jsonl", chat(USER, {**SAID, "reasoning": "Hm."}), "'reasoning'"),
    "a thought that never ends": ("a.jsonl", chat(USER, {**SAID, "content": "<think>Hm. Because."}), "never closes it"),
    "a chat that is written out": (
        "a.jsonl", lines({"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"}), ":1: ",
    ),
    "a turn of nobody": (
        "a.jsonl", lines({"conversations": [{"from": "martian", "value": "x"}]}),
        "turn 0: unknown speaker 'martian'; use one of",
    ),
    "a turn without a value": (
        "a.jsonl", lines({"conversations": [{"from": "human"}]}), "turn 0: 'value' must be a text, got nothing",
    ),
    "an instruction alone": (
        "a.jsonl", lines({"instruction": "Do it"}),
        "in one of the known forms (messages, ShareGPT, Alpaca, prompt/completion or text), found 'instruc",
    ),
    "an output that is a list": ("a.jsonl", lines({"instruction": "Do it", "output": ["x", "y"]}), "a row for each"),
    "a text that is empty": ("a.jsonl", lines({"text": ""}), ":1: 'text' must be a text, got an empty one"),
    "everything too long": ("a.jsonl", chat(USER, {**SAID, "content": "because " * 400}), "are too long"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, make_config: MakeConfig) -> Path:
    """A folder with a recipe that has no fault."""
    make_config(rows=[conversation(i) for i in range(4)])
    return tmp_path


def said_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of a faulty command, which ends with 2 and without a traceback."""
    assert main([*arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    _, error, text = err.partition("error: ")
    assert error
    return text.strip()


@pytest.mark.parametrize("name", RECIPES)
def test_a_faulty_recipe(name: str, folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = RECIPES[name]
    if isinstance(content, str):
        content = content.replace("FOLDER", str(folder)).replace("MODEL", str(tiny_model)).encode()
    file = folder / "faulty.yaml"
    file.write_bytes(content)
    said = said_of(capsys, "train", str(file))
    assert str(file) in said
    assert expected in said
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", VALUES)
def test_a_faulty_value(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, expected = VALUES[name]
    given = [each.replace("FOLDER", str(folder)) for each in overrides]
    said = said_of(capsys, "train", str(folder / "config.yaml"), *given)
    assert expected in said
    assert not (folder / "run").exists()


FILES = {**ROWS, **{f"misread: {name}": fault for name, fault in BAD.items()}}


@pytest.mark.parametrize("name", FILES)
def test_a_faulty_data_file(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, expected = FILES[name]
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = said_of(capsys, "preview", str(folder / "config.yaml"), f"data.train.0.path={folder / file}")
    assert expected in said
    assert file.partition(".")[0] in said


def test_the_corpus_is_as_large_as_it_should_be() -> None:
    assert len(RECIPES) + len(VALUES) >= 60
    assert len(ROWS) >= 40


def failing() -> Iterator[tuple[Exception, str]]:
    yield KeyError("lost"), "KeyError: 'lost'"
    yield RuntimeError("first\nsecond"), "RuntimeError: first"
    yield ValueError(), "ValueError: ValueError"


@pytest.mark.parametrize(("error", "expected"), failing())
def test_what_nobody_has_foreseen_is_a_line_unless_one_wants_to_see_it(
    error: Exception, expected: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("qlora_sft.faults.load_checked", fail)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert main(["plan", str(folder / "config.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {expected} (this is a fault of qlora_sft")
    (file,) = folder.glob("qlora-sft-*.txt")
    assert f"{file} says where, and so does --debug" in line
    assert file.read_text().startswith("Traceback")
    with pytest.raises(type(error)):
        main(["plan", str(folder / "config.yaml"), "--debug"])
