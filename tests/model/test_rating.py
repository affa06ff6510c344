"""Sources are rated by how strange their answers are to the base: garbled rows cost a source its share."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qlora_sft.config import load_config
from qlora_sft.errors import ConfigError
from qlora_sft.model.rating import rate
from qlora_sft.prepare import prepare

SUBJECTS = ["The river", "A small dog", "My neighbour", "The old teacher", "Our train", "The young doctor"]
VERBS = [
    "was late this morning because",
    "could not sleep last night, and",
    "went to the market, where",
    "stopped when",
]
ENDS = ["it had been raining for two days.", "the weather was very cold.", "there were too many people on the road."]


def sentence(number: int) -> str:
    draw = random.Random(number)
    return " ".join(f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(ENDS)}" for _ in range(2))


def row(number: int, *, shuffled: bool = False) -> dict[str, Any]:
    words = sentence(number).split()
    if shuffled:
        random.Random(number).shuffle(words)
    return {
        "messages": [
            {"role": "user", "content": f"Tell story {number}."},
            {"role": "assistant", "content": " ".join(words)},
        ]
    }


def test_a_source_with_a_third_of_its_rows_shuffled_loses_weight_and_the_rows_are_shown(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_SFT_CACHE", str(tmp_path / "cache"))
    rows = {"plain": [row(n) for n in range(12)], "garbled": [row(n, shuffled=n % 3 == 0) for n in range(100, 112)]}
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in each))
    sources = ", ".join(f"{{path: {tmp_path / name}.jsonl, quality: perplexity}}" for name in rows)
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: {base_model}, backend: transformers, chat_template: chatml, dtype: float32}}\n"
        f"data: {{train: [{sources}], mixture: quality}}\noutput: {tmp_path / 'run'}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    said: list[str] = []
    first = prepare(config, said.append, unsloth=False)
    (told,) = (text for text in said if text.startswith("quality of plain:"))
    assert "quality of plain: 1 (" in told
    assert "quality of garbled: 0.67 (" in told
    strangest = [line for line in told.partition("quality of garbled")[2].splitlines() if "strangest: " in line]
    lines = {int(line.split("garbled.jsonl:")[1].split(":")[0]) for line in strangest}
    assert len(lines) == 3
    assert lines <= {n - 100 + 1 for n in range(100, 112) if n % 3 == 0}
    # N * q is 12 and 8.
    mixture = next(text for text in said if text.startswith("mixture (quality"))
    assert [line.split()[1] for line in mixture.splitlines()[2:]] == ["14", "10"]
    # The second time the losses come from the cache, and the run is the same.
    said.clear()
    second = prepare(config, said.append, unsloth=False)
    assert not [text for text in said if "rows are scored with the base" in text]
    assert second.sequences == first.sequences


def test_the_quality_is_the_share_of_rows_that_are_not_strange() -> None:
    usual = [2.0, 2.1, 1.9, 2.05, 1.95, 2.2, 1.8, 2.0]
    assert rate({"a": usual, "b": [*usual[:6], 7.0, 8.0]}) == {"a": 1.0, "b": 0.75}
    # One that is expected is no fault, and a source of nothing but noise keeps its least part.
    assert rate({"a": usual * 3, "b": [0.01] * 4, "c": [9.0] * 3}) == {"a": 1.0, "b": 1.0, "c": 0.01}
    assert rate({"a": [1.0] * 5, "b": [1.2]}) == {"a": 1.0, "b": 1.0}
    assert rate({"a": [], "b": [1.0]}) == {"a": 1.0, "b": 1.0}
    assert rate({"a": []}) == {"a": 1.0}


def test_it_belongs_to_the_mixture_by_quality(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.0\.quality has an effect with data\.mixture=quality only"):
        make_config("data.train.0.quality=perplexity")
    assert make_config("data.train.0.quality=perplexity", "data.mixture=quality").data.train[0].quality == "perplexity"
