"""Data sets of the Hub, which is out of reach here: what is asked of `datasets`, and what is said when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from qlora_sft.config_data import DataConfig, SourceConfig, TrainSourceConfig
from qlora_sft.data.dedup import clean_sources
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import DataError

EXAM = "one two three four five six seven eight nine ten eleven twelve thirteen"


def row(prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": "an answer"}


class Hub:
    """Stands in for the Hub: its splits, and what was asked of it."""

    def __init__(self, **splits: list[dict[str, str]]):
        self.splits = splits
        self.asked: list[dict[str, Any]] = []

    def load_dataset(self, name: str, configuration: str | None, **options: Any) -> Any:
        self.asked.append({"name": name, "configuration": configuration, **options})
        if options["split"]:
            return self.splits[options["split"]]
        return self.splits


def test_name_configuration_split_and_revision_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(test=[row("a"), row("b")])
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    (source,) = read_sources([SourceConfig("owner/name:main", split="test", revision="v2")], 0)
    assert hub.asked == [
        {"name": "owner/name", "configuration": "main", "split": "test", "revision": "v2", "streaming": False}
    ]
    assert [conversation["line"] for conversation in source.rows] == [1, 2]


def test_a_stream_is_read_once_and_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def stream() -> Any:
        for number in range(1000):
            given.append(number)
            yield {**row(f"question {number}"), "nothing": None}

    hub = Hub(train=stream())  # type: ignore[arg-type]
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    (source,) = read_sources([SourceConfig("owner/name", streaming=True, max_rows=7)], 0)
    one, other = iter(source.rows), iter(source.rows)
    # Two readers at once do not take rows from one another.
    pairs = [(next(one)["messages"], next(other)["messages"]) for _ in range(7)]
    assert [a[0]["content"] for a, b in pairs if a == b] == [f"question {number}" for number in range(7)]
    assert len(list(source.rows)) == 7
    assert given == list(range(7))


@pytest.mark.parametrize(
    ("path", "asked", "dropped"),
    [("owner/name", None, 1), ("owner/name[test]", "test", 1), ("owner/name[dev]", "dev", 0)],
)
def test_an_evaluation_set_is_every_split_but_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, asked: str | None, dropped: int
) -> None:
    """The train split of the benchmark is what is trained on: to compare with it would drop every row."""
    hub = Hub(train=[row("learn this " * 13)], test=[row(EXAM)], dev=[row("x")])
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    file = tmp_path / "a.jsonl"
    file.write_text(
        f'{{"prompt": "{"learn this " * 13}", "completion": "a"}}\n{{"prompt": "{EXAM}", "completion": "b"}}\n'
    )
    data = DataConfig([TrainSourceConfig(str(file))], decontaminate=[path])
    said: list[str] = []
    _, removed = clean_sources(read_sources([SourceConfig(str(file))], 0), data, said.append)
    assert [each.place for each in removed] == [f"{file}:2"] * dropped
    assert hub.asked[-1]["split"] == asked
    assert all("[train]" not in text for text in said)


CASES = [
    (
        DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."),
        "check owner/name",
    ),
    (
        DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub. Visit the page"),
        "accept its terms",
    ),
    (
        DatasetNotFoundError("Revision 'v9' doesn't exist for dataset 'o/n' on the Hub."),
        "no revision 'v9'",
    ),
    (ValueError("BuilderConfig 'main' not found. Available: ['socratic']"), "choose another behind the colon"),
    (ValueError("Config name is missing. Please pick one among the available"), "path: o/n:CONFIGURATION"),
    (ValueError("Unknown split \"dev\". Should be one of ['train']"), "set split: to one that it has"),
    (ConnectionError("Couldn't reach 'o/n' on the Hub (LocalEntryNotFoundError)"), "hf download --repo-type dataset"),
]


@pytest.mark.parametrize(("error", "cure"), CASES, ids=[cure for _, cure in CASES])
def test_every_way_to_fail_has_its_cure(monkeypatch: pytest.MonkeyPatch, error: Exception, cure: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        read_sources([SourceConfig("o/n", split="dev", revision="v9")], 0)
    text = str(caught.value)
    assert text.startswith("o/n[dev]: ")
    assert cure in text
    assert str(error) in text


def test_a_data_set_out_of_reach_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # The variable is read when datasets is imported, which another test may have done.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        read_sources([SourceConfig("nobody/nothing", split="test")], 0)
    text = str(caught.value)
    assert text.startswith("nobody/nothing[test]: no such file or folder here, and no such data set")
    assert "hf download --repo-type dataset" in text
