"""A recipe says what it means, or is refused with the line: nothing in it is replaced or read in another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_sft.config import load_config
from qlora_sft.errors import ConfigError
from qlora_sft.yaml_text import YamlFault, read_yaml, write_yaml

CASES = Path(__file__).parent / "cases"
# Every line is nine times the one before.
BILLIONS = "b0: &b0 [1]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 10))
MINIMAL = "model: {path: demo}\ndata: {train: [{path: a.jsonl}, {path: b.jsonl}]}\noutput: out\n"


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return caught.value.problems


def test_a_section_that_stands_twice_is_refused_with_both_lines() -> None:
    file = CASES / "duplicate_keys.yaml"
    (problem,) = problems_of(file)
    assert problem.startswith(f"{file}:14: the key 'training' stands twice, first in line 8")


def test_all_keys_that_stand_twice_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {path: demo, path: other}\n"
        "data:\n  train:\n    - path: a.jsonl\n      path: b.jsonl\n"
        "output: x\n'output': y\n"
    )
    found = [problem.removeprefix(f"{file}:").split(";")[0] for problem in problems_of(file)]
    assert found == [
        "1: the key 'path' stands twice, first in line 1",
        "5: the key 'path' stands twice, first in line 4",
        "7: the key 'output' stands twice, first in line 6",
    ]


def test_an_override_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    (problem,) = problems_of(file, "training={epochs: 1, epochs: 2}")
    assert "'epochs' stands twice" in problem


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (None, "it is UTF-16"),
        ("data: é\n".encode("cp1252"), "byte 0xe9 in line 1"),
        (MINIMAL.encode("utf-16"), "it is UTF-16"),
        (MINIMAL.encode("utf-16-le"), "a zero byte in line 1"),
        (MINIMAL.encode("utf-16-be"), "a zero byte in line 1"),
        (MINIMAL.encode() + "# ünïcödé\n".encode("latin-1"), "byte 0xfc in line 4"),
        (b"\x89PNG\r\n\x1a\n\0\0", "byte 0x89 in line 1"),
    ],
)
def test_a_recipe_in_another_encoding_is_refused(content: bytes | None, where: str, tmp_path: Path) -> None:
    file = CASES / "utf16.yaml" if content is None else tmp_path / "recipe.yaml"
    if content is not None:
        file.write_bytes(content)
    (problem,) = problems_of(file)
    assert problem == f"{file}: not UTF-8 text; re-save it as UTF-8 ({where})"


def test_the_shipped_case_in_windows_encoding_names_byte_and_line() -> None:
    (problem,) = problems_of(CASES / "cp1252.yaml")
    assert problem.endswith("not UTF-8 text; re-save it as UTF-8 (byte 0xe9 in line 14)")


def test_a_byte_order_mark_and_line_ends_of_windows_do_no_harm(tmp_path: Path) -> None:
    plain, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    plain.write_text(MINIMAL)
    other.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_config(plain) == load_config(other)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0512", "0512"), ("-0512", "-0512"), ("00", "00"), ("1:30", "1:30"), ("190:20:30", "190:20:30"),
        ("1:30.5", "1:30.5"), ("2024-01-01", "2024-01-01"), ("2024-01-01 10:00:00", "2024-01-01 10:00:00"), ("=", "="),
        ("on", "on"), ("yes", "yes"), ("0o17", "0o17"), ("512", 512), ("-3", -3), ("+4", 4), ("0", 0), ("1_000", 1000),
        ("0x10", 16), ("2e-4", 2e-4), ("2.5e3", 2500.0), ("1.", 1.0), (".5", 0.5), ("-.inf", float("-inf")),
        ("1e5", 1e5), ("true", True), ("null", None), ("~", None), ("", None),
    ],
)  # fmt: skip
def test_numbers_are_decimal_and_everything_else_is_text(text: str, value: Any) -> None:
    read = read_yaml(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        (
            "data.max_length=0512",
            "got '0512' (a number that begins with 0 is octal to some and decimal to others; write",
        ),
        ("training.max_steps=1:30", "(a number with colons is in base 60 to some; write it out)"),
        ("training.max_steps='100'", "got '100' (without quotes)"),
        ("training.learning_rate='2e-4'", "got '2e-4' (without quotes)"),
        ("training.learning_rate=2024-01-01", "got '2024-01-01'"),
        ("training.learning_rate=nan", "must be a number, got 'nan'"),
    ],
)
def test_a_text_that_looks_like_a_number_is_explained(override: str, hint: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    (problem,) = problems_of(file, override)
    assert hint in problem


def test_a_name_may_be_a_date_or_a_time(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIMAL)
    config = load_config(file, ["data.train.0.name=2024-01-01", "data.train.1.name=0512", "output=12:30"])
    assert [source.name for source in config.data.train] == ["2024-01-01", "0512"]
    assert config.output == "12:30"


# ------------------------------------------------------------------ anchors


def test_what_two_uses_of_an_anchor_become_is_theirs_alone(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {path: demo}\n"
        "data:\n  train:\n    - &one {path: a.jsonl, name: a}\n    - {<<: *one, name: b}\n"
        "  held_out:\n    - &held {path: c.jsonl, max_rows: 9, name: c}\n    - *held\n"
        "output: out\n"
    )
    config = load_config(file, ["data.held_out.1.max_rows=5", "data.held_out.1.name=d"])
    assert [(source.name, source.max_rows) for source in config.data.held_out] == [("c", 9), ("d", 5)]
    assert [(source.path, source.name) for source in config.data.train] == [("a.jsonl", "a"), ("a.jsonl", "b")]


def test_a_merged_key_that_is_given_again_is_no_double() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: [*b, *a], y: 4}\nd: {<<: *b}\n"
    assert read_yaml(text)["c"] == {"x": 3, "y": 4}
    assert read_yaml(text)["d"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: *nosuch\n", 1, "undefined alias"),
        ("a: &a\n  b: *a\n", 2, "the anchor &a contains its own alias *a"),
        ("a: &a [*a]\n", 1, "contains its own alias"),
        ("a: &a {b: &b [1, *b]}\n", 1, "contains its own alias *b"),
        ("a: 1\n---\nb: 2\n", 2, "expected a single document"),
        ("a: 1\n\tb: 2\n", 2, "cannot start any token"),
        ("a: 1\n b: 2\n", 2, "mapping values are not allowed"),
        ("a: [1, 2\n", 2, "expected ',' or ']'"),
        ("a: !!python/object:os.system {}\n", 1, "could not determine a constructor"),
        ("a: !!int text\n", 0, "invalid literal"),
        ("a: !!timestamp text\n", 0, "not valid YAML"),
        ("? [1, 2]\n: 3\n", 1, "unhashable"),
        ("a: {<<: 3}\n", 1, "expected a mapping"),
        ("[" * 3000, 0, "nested too deep"),
        ("a: \x01\n", 0, "special characters are not allowed"),
        (BILLIONS, 0, "more than 100,000 values"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_refused_with_its_line(text: str, line: int, what: str) -> None:
    with pytest.raises(YamlFault) as caught:
        read_yaml(text)
    ((found, fault),) = caught.value.faults
    assert found == line
    assert what in fault


# PyYAML writes U+0085 and its like so that it reads them as spaces.
WORDS = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | WORDS
TEXTS = st.sampled_from(
    ["0512", "1e5", "2e-4", "on", "no", "1:30", "=", "<<", "2024-01-01", "~", ".5", "1.", "0x1F", "+1"]
)
TREES = st.recursive(
    SCALARS | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3)
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_what_is_written_is_read_back(tree: Any) -> None:
    assert read_yaml(write_yaml(tree)) == tree
