"""The benchmark of the longest row: its search, and a smoke run of everything but the cap."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return load("max_context")


@pytest.mark.parametrize("fits", [1, 700, 999, 1000, 1001, 1500])
def test_the_search_ends_within_two_percent_of_what_fits(benchmark: Any, fits: int) -> None:
    def attempt(tokens: int) -> dict[str, int] | None:
        return {"tokens": tokens} if tokens <= fits else None

    found = benchmark.search(1000, attempt, float("inf"))["tokens"]
    assert fits / 1.025 - 1 <= found <= fits


def test_a_smoke_run_writes_a_row_that_no_table_shows(benchmark: Any, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert benchmark.main(["--smoke", "--output", str(output)]) == 0
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["tokens"] == 64
    assert row["smoke"]
    report = load("report")
    table = report.max_context([row])
    assert sum("not measured" in line for line in table) == 6
    assert benchmark.PUBLISHED == report.UNSLOTH_CONTEXT
