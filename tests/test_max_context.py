"""The benchmark of the longest row: its search, and a smoke run of everything but the cap."""

import json
from pathlib import Path

import max_context as benchmark
import pytest
import report


@pytest.mark.parametrize("fits", [1, 700, 999, 1000, 1001, 1500])
def test_the_search_ends_within_two_percent_of_what_fits(fits: int) -> None:
    def attempt(tokens: int) -> dict[str, int] | None:
        return {"tokens": tokens} if tokens <= fits else None

    found = benchmark.search(1000, attempt, float("inf"))["tokens"]
    assert fits / 1.025 - 1 <= found <= fits


def test_a_smoke_run_writes_a_row_that_no_table_shows(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert benchmark.main(["--smoke", "--output", str(output)]) == 0
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["tokens"] == 64
    assert row["smoke"]
    table = report.max_context([row])
    assert sum("not measured" in line for line in table) == 6
    assert benchmark.PUBLISHED == report.UNSLOTH_CONTEXT
