"""Sources weighed by ratings of their rows: the mean of those in use, and files that do not fit are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from qlora_sft.config import Config, load_config
from qlora_sft.data.mixture import shares
from qlora_sft.data.ratings import with_file_ratings
from qlora_sft.data.sources import read_sources
from qlora_sft.errors import ConfigError, DataError


def config_of(folder: Path, ratings: Sequence[object], name: str = "r.jsonl", *overrides: str) -> Config:
    rows = [{"prompt": f"q{n}", "completion": f"answer {n}"} for n in range(8)]
    for source in "ab":
        (folder / f"{source}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in ratings))
    (folder / "c.yaml").write_text(
        f"model: {{path: demo}}\ndata:\n  mixture: quality\n  train:\n    - {{path: {folder}/a.jsonl, quality: file, "
        f"ratings: {folder / name}}}\n    - {{path: {folder}/b.jsonl}}\noutput: {folder / 'run'}\n"
    )
    return load_config(folder / "c.yaml", overrides)


def rated(config: Config, said: list[str] | None = None) -> Config:
    sources = read_sources(config.data.train, config.seed)
    return with_file_ratings(config, sources, (said if said is not None else []).append)


@pytest.mark.parametrize(
    ("name", "ratings"),
    [
        ("r.jsonl", [0, 1, 2, 3, 0.5, 0.5, 0, 1]),
        ("r.jsonl", [{"rating": r, "by": "me"} for r in (0, 1, 2, 3, 0.5, 0.5, 0, 1)]),
        ("r.csv", ["rating,by", *(f"{r},me" for r in (0, 1, 2, 3, 0.5, 0.5, 0, 1))]),
        ("r.txt", [0, 1, 2, 3, 0.5, 0.5, 0, 1]),
    ],
)
def test_a_source_weighs_what_its_rows_were_rated(tmp_path: Path, name: str, ratings: list[object]) -> None:
    said: list[str] = []
    config = rated(config_of(tmp_path, ratings, name), said)
    assert [source.quality for source in config.data.train] == [1.0, None]
    assert shares({"a": 8, "b": 4}, config.data) == {"a": Fraction(2, 3), "b": Fraction(1, 3)}
    first, *lines = said[0].splitlines()
    assert first == f"quality of a: 1 (mean of 8 ratings from 0 to 3 in {tmp_path / name})"
    assert [line.split(": ", 2)[:2] for line in lines] == [["  lowest", x] for x in ("0", "0", "0.5")] + [
        ["  highest", x] for x in ("3", "2", "1")
    ]
    assert f"highest: 3: {tmp_path}/a.jsonl:4: answer 3" in said[0]


def test_rows_that_are_not_in_use_do_not_count(tmp_path: Path) -> None:
    config = config_of(tmp_path, [0, 1, 2, 3, 4, 5, 6, 7], "r.jsonl", "data.train.0.max_rows=2")
    (source, _) = read_sources(config.data.train, config.seed)
    assert len(source.rows.chosen) == 2
    wanted = sum(source.rows.chosen) / 2
    assert rated(config).data.train[0].quality == wanted
    one = rated(config_of(tmp_path, [0, 0, 0, 0, 0, 0, 0, 3.25], "r.jsonl"))
    assert one.data.train[0].quality == 0.4062


def test_unwanted_answers_do_not_count(tmp_path: Path) -> None:
    config = config_of(tmp_path, [1, 1, 1, 9, 9, 1, 3, 9])
    file, said = tmp_path / "a.jsonl", list[str]()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    unwanted = (3, 4, 7)
    file.write_text("".join(json.dumps({**row, "label": n not in unwanted}) + "\n" for n, row in enumerate(rows)))
    assert rated(config, said).data.train[0].quality == 1.4
    assert "mean of 5 ratings from 1 to 3" in said[0]
    assert f"highest: 3: {file}:7: answer 6" in said[0]
    file.write_text("".join(json.dumps({**row, "label": False}) + "\n" for row in rows))
    with pytest.raises(DataError, match="every row of 'a' in use has label: false"):
        rated(config)


@pytest.mark.parametrize(
    ("ratings", "problem"),
    [
        ([1, 2], r"r\.jsonl: 2 ratings for the 8 rows of .*a\.jsonl; it has one for each row"),
        ([1, 2, -1, 1, "nan", True, {"score": 1}, 1], r"(?s)r\.jsonl:3: a rating is .*jsonl:5: .*jsonl:6: .*jsonl:7: "),
        ([0] * 8, "every row of 'a' in use is rated 0; remove the source"),
    ],
)
def test_ratings_that_do_not_fit_are_named(tmp_path: Path, ratings: list[object], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        rated(config_of(tmp_path, ratings))


def test_ratings_belong_to_quality_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.0\.ratings must name the file of ratings with quality=file"):
        config_of(tmp_path, [1] * 8, "r.jsonl", "data.train.0.quality=2")
    with pytest.raises(ConfigError, match=r"data\.train\.1\.ratings must name"):
        config_of(tmp_path, [1] * 8, "r.jsonl", "data.train.1.quality=file")
    config = config_of(tmp_path, [1] * 8)
    (tmp_path / "r.jsonl").unlink()
    with pytest.raises(DataError, match=r"r\.jsonl: no such file; ratings of 'a' name a file"):
        rated(config)
