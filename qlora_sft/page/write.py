"""Write the report of a run into its folder, and the page that compares several (``qlora-sft report``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_sft.atomic import written_file
from qlora_sft.errors import ConfigError
from qlora_sft.page.comparison import comparison_page, differing_settings, result_rows
from qlora_sft.page.facts import RunFacts, read_run
from qlora_sft.page.run_page import run_page
from qlora_sft.page.warnings import warnings_of
from qlora_sft.run.report import Report
from qlora_sft.text import as_path

PAGE, COMPARISON = "report.html", "comparison.html"


@dataclass(frozen=True)
class ReportedRun(Report):
    """Says what the page of one run holds."""

    run: str
    page: str
    finished: bool
    steps: int
    warnings: list[str]
    lacks: list[str]


@dataclass(frozen=True)
class ReportResult(Report):
    """Says which pages were written, and how the runs compare."""

    runs: list[ReportedRun]
    comparison: str | None
    """The page that compares the runs; None for a single run."""
    results: dict[str, list[float | None]]
    """By what was measured, the figure of every run."""
    differing_settings: dict[str, list[object]]


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` into the folder of a run and returns its path."""
    run = read_run(folder)
    return _write(run.path / PAGE, run_page(run))


def report_runs(folders: Sequence[str | Path], out: str | None = None) -> ReportResult:
    """Writes the report of every run into its folder and, of several runs, the page that compares them.

    out: where the comparison, or the report of a single run, is written; default: into the folder of the first run.
    Raises `ConfigError` for a folder that is not that of a run, before anything is written.
    """
    runs = [read_run(folder) for folder in folders]
    places = [run.path.resolve() for run in runs]
    double = [str(place) for place in dict.fromkeys(places) if places.count(place) > 1]
    if double:
        raise ConfigError(f"{', '.join(double)}: named twice; a run compares with another one")
    several = len(runs) > 1
    own = as_path(out) if out else None
    pages = [_write(run.path / PAGE if several or own is None else own, run_page(run)) for run in runs]
    comparison = _write(own or runs[0].path / COMPARISON, comparison_page(runs)) if several else None
    return ReportResult(
        runs=[_reported(run, page) for run, page in zip(runs, pages, strict=True)],
        comparison=str(comparison) if comparison else None,
        results={what: values for what, values, _ in result_rows(runs)},
        differing_settings=dict(differing_settings(runs)) if several else {},
    )


def said_of(result: ReportResult) -> str:
    """Returns what a terminal shows of it: where the pages are, what asks for attention, what is lacking."""
    lines = []
    for run in result.runs:
        lines.append(f"{run.page}: {run.steps:,} steps{'' if run.finished else ', not finished'}")
        lines += [f"  warning: {text}" for text in run.warnings]
        lines += [f"  lacks {text}" for text in run.lacks]
    if result.comparison:
        lines.append(f"{result.comparison}: {len(result.runs)} runs compared")
    return "\n".join(lines)


def _reported(run: RunFacts, page: Path) -> ReportedRun:
    warned = [f"{what}: {meaning}" for what, meaning in warnings_of(run)]
    return ReportedRun(str(run.path), str(page), run.finished, run.last_step, warned, run.lacks)


def _write(file: Path, page: str) -> Path:
    with written_file(file) as beside:
        beside.write_text(page, encoding="utf-8")
    return file
