"""No input ends in a traceback: 2,000 damaged data files and 500 damaged recipes are used or refused with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from mutations import mutated_bytes, mutated_tree

from qlora_sft.cli import main
from qlora_sft.config import DataConfig, SourceConfig
from qlora_sft.config_data import TrainSourceConfig
from qlora_sft.data.prepare import render_sources
from qlora_sft.data.sources import read_sources
from qlora_sft.data.template import choose_chat_format
from qlora_sft.errors import DataError

FILES, RECIPES = 2000, 500

CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "weight": 0.5}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]},
                {"role": "assistant", "content": "", "reasoning": "Easy.", "tool_calls": [CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "c1"},
                {"role": "assistant", "content": "<think>\nYes.\n</think>\n2", "train": True},
            ],
            "tools": [TOOL],
            "chat_template_kwargs": {"enable_thinking": True},
        },
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "S"}],
    "alpaca": [{"instruction": "Do it", "input": "now", "output": "Done", "history": [["a", "b"]]}],
    "pairs": [{"prompt": "Hi", "completion": "Ho"}, {"prompt": [{"role": "user", "content": "x"}], "completion": "y"}],
    "text": [{"text": "A plain text."}, {"text": "Another one."}],
}


def encoded(rows: list[Any], ending: str) -> bytes:
    if ending == ".json":
        return json.dumps(rows, indent=1).encode("utf-8", "surrogatepass")
    if ending in (".csv", ".tsv"):
        table = io.StringIO()
        keys = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
        writer = csv.writer(table, delimiter="," if ending == ".csv" else "\t")
        writer.writerow(keys)
        for row in rows:
            cells = [row.get(key, "") for key in keys] if isinstance(row, dict) else [row]
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
        return table.getvalue().encode("utf-8", "surrogatepass")
    if ending == ".txt":
        return "\n\n".join(map(str, rows)).encode("utf-8", "surrogatepass")
    if ending == ".parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    return gzip.compress(lines) if ending == ".jsonl.gz" else lines


def damaged_files(count: int) -> Iterator[tuple[str, bytes]]:
    endings = [".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"]
    for number in range(count):
        rng = random.Random(number)
        rows: list[Any] = rng.choice(list(ROWS.values())) * rng.randint(1, 2)
        ending = rng.choice(endings)
        if rng.random() < 0.6:
            rows = mutated_tree(rows, rng)
        try:
            content = encoded(rows, ending)
        except (pyarrow.ArrowException, AttributeError, TypeError, UnicodeError, OverflowError, ValueError):
            content, ending = encoded(rows, ".jsonl"), ".jsonl"
        if rng.random() < 0.6:
            content = mutated_bytes(content, rng)
        yield ending, content


@pytest.mark.slow
def test_damaged_files_are_used_or_refused(tokenizer: Any, own_tokenizer: Any, tmp_path: Path) -> None:
    styles = [(each, choose_chat_format(each)) for each in (tokenizer, own_tokenizer)]
    settings: list[dict[str, Any]] = [{}, {"format": "messages"}, {"supervise": "last"}, {"thinking": "on"}]
    said = []
    for number, (ending, content) in enumerate(damaged_files(FILES)):
        file = tmp_path / f"{number}{ending}"
        file.write_bytes(content)
        source = SourceConfig(str(file), name="x", **settings[number % 4])
        try:
            read = read_sources([source], 0)
            render_sources(read, DataConfig([TrainSourceConfig("")], max_length=64), *styles[number % 2])
        except DataError as error:
            said.append((file, str(error)))
        file.unlink()
    print(f"{FILES - len(said)} used, {len(said)} refused")
    assert [(file, text) for file, text in said if str(file) not in text] == []
    assert FILES // 10 < len(said) < FILES * 9 // 10


RECIPE: dict[str, Any] = {
    "model": {
        "path": "MODEL", "backend": "transformers", "dtype": "float32", "load_in_4bit": False,
        "chat_template": "chatml",
    },
    "data": {
        "train": [
            {"path": "FOLDER/a.jsonl", "max_rows": 5, "loss_weight": 2.0, "columns": {"messages": "messages"}},
            {"path": "FOLDER/b.txt", "name": "b", "fraction": 0.5, "repeat": 1.5},
        ],
        "held_out": [{"path": "FOLDER/c.csv", "supervise": "last"}],
        "max_length": 64,
        "packing": "bfd",
        "replay": {"path": "FOLDER/b.txt", "name": "general", "share": 0.1},
        "decontaminate": ["FOLDER/c.csv"],
    },
    "training": {"learning_rate": 1e-4, "epochs": 1, "max_steps": 2, "optimizer": "auto"},
    "lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]},
    "evaluation": {"tasks": [{"path": "FOLDER/c.csv", "form": "exact"}], "answers": 0},
    "memory": {"policy": "checkpoint"},
    "output": "FOLDER/run",
    "seed": 1,
}  # fmt: skip


def damaged_recipes(count: int, folder: Path, model: Path) -> Iterator[bytes]:
    for number in range(count):
        rng = random.Random(number)
        tree = mutated_tree(RECIPE, rng) if number % 3 else RECIPE
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        content = text.replace("MODEL", str(model)).replace("FOLDER", str(folder)).encode("utf-8", "surrogatepass")
        yield content if number % 3 == 1 else mutated_bytes(content, rng)


@pytest.mark.slow
def test_damaged_recipes_are_used_or_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(encoded(ROWS["messages"][:1] * 3, ".jsonl"))
    (tmp_path / "b.txt").write_text("One text.\nAnother text.\n")
    (tmp_path / "c.csv").write_text("prompt,completion\nWhat is it?,That.\n")
    monkeypatch.chdir(tmp_path)
    codes = []
    for number, content in enumerate(damaged_recipes(RECIPES, tmp_path, tiny_model)):
        Path("recipe.yaml").write_bytes(content)
        # One in ten is trained, or planned.
        verb = {3: ["train", "--overwrite"], 8: ["plan", "--no-time"]}.get(number % 10, ["preview"])
        codes.append(main([verb[0], "recipe.yaml", *verb[1:]]))
        said = capsys.readouterr().err
        assert codes[-1] in (0, 2), (number, said)
        assert codes[-1] == 0 or "error: " in said, number
    print(f"{codes.count(0)} used, {codes.count(2)} refused")
    assert RECIPES // 50 < codes.count(0) < RECIPES // 2
