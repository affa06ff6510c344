"""Compares two runs on the tasks that both were asked in the same way, question by question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qlora_sft.errors import ConfigError
from qlora_sft.evaluation.compare import LOWER_IS_BETTER, SHARES, MetricChange, TaskReport, main_metric
from qlora_sft.evaluation.results import ASKED
from qlora_sft.evaluation.statistics import paired_change
from qlora_sft.json_types import JsonObject, read_object
from qlora_sft.run.report import Report


@dataclass(frozen=True, kw_only=True)
class TaskComparison(Report):
    """Says how the second run differs from the first on one task."""

    name: str
    metric: str
    items: int
    first: float
    second: float
    change: MetricChange
    verdict: str
    """Of the second run: better, worse, or no difference shown."""


@dataclass(frozen=True)
class RunComparison(Report):
    """Holds the tasks that both runs were asked, and the names of those that only one was, or in another way."""

    first: str
    second: str
    tasks: list[TaskComparison]
    not_compared: list[str]


def compare_runs(first: str | Path, second: str | Path, seed: int = 0) -> RunComparison:
    """Compares the results that `evaluate` has left in two runs. Asks no model.

    Raises `ConfigError` if one of them has no results, or if no task was asked of both in the same way.
    """
    one, two = (_results(Path(run).expanduser().resolve()) for run in (first, second))
    found = {key: _compared(*one[key], *two[key], seed) for key in one if key in two}
    tasks = [each for each in found.values() if each is not None]
    if not tasks:
        names = [", ".join(sorted(report.name for report, _ in each.values())) for each in (one, two)]
        raise ConfigError(
            f"{first} has {names[0]} and {second} has {names[1]}: no task was asked of both in the same way; run "
            "evaluate on both with the same tasks and settings (a loss compares only between models of one tokenizer)"
        )
    alone = {each[key][0].name for each in (one, two) for key in each if found.get(key) is None}
    return RunComparison(str(first), str(second), tasks, sorted(alone))


def _results(run: Path) -> dict[str, tuple[TaskReport, Path]]:
    """Returns every result of a run with the file of its answers, by what was asked and how."""
    files = sorted((run / "evaluation").glob("*.json"))
    found = {}
    for file in files:
        if not file.with_suffix(".jsonl").is_file():
            continue
        try:
            content = read_object(file)
            report = TaskReport.from_json(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: no readable results ({error}); run evaluate once more") from None
        found[json.dumps([content.get(name) for name in ASKED])] = (report, file.with_suffix(".jsonl"))
    if not found:
        raise ConfigError(f"{run} has no results to compare; run qlora-sft evaluate {run} --task FILE")
    return found


def _compared(one: TaskReport, of_one: Path, two: TaskReport, of_two: Path, seed: int) -> TaskComparison | None:
    """Compares the answers of two runs to one task.

    Returns None for texts that are other tokens to the second model: a loss per token does not compare then.
    """
    metric = main_metric(one.form)
    (first, weights), (second, others) = (figures(file, metric) for file in (of_one, of_two))
    if metric == "loss" and weights != others:
        return None
    if len(first) != len(second):
        raise ConfigError(f"{of_one} has {len(first):,} answers, {of_two} {len(second):,}; evaluate both once more")
    moved = paired_change(first, second, weights, seed)
    risen, fallen = (moved.fallen, moved.risen) if metric in LOWER_IS_BETTER else (moved.risen, moved.fallen)
    return TaskComparison(
        name=one.name,
        metric=metric,
        items=len(first),
        first=moved.base,
        second=moved.tuned,
        change=MetricChange.of(moved),
        verdict="better" if risen else "worse" if fallen else "no difference shown",
    )


def figures(file: Path, metric: str) -> tuple[list[float], list[float]]:
    """Reads the tuned model's figure of every question, and its weight in the mean, from a file of answers."""
    values, weights = [], []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                tuned: JsonObject = json.loads(line)["tuned"]
                values.append(_figure(tuned, metric))
            except (ValueError, KeyError, TypeError, AssertionError, ZeroDivisionError):
                raise ConfigError(f"{file}:{number}: no answer to compare; run evaluate once more") from None
            weight = tuned.get("weight", 1.0)
            weights.append(weight if isinstance(weight, float) else 1.0)
    if not values:
        raise ConfigError(f"{file}: no answers to compare; run evaluate once more")
    return values, weights


def _figure(tuned: JsonObject, metric: str) -> float:
    """Returns the figure of one question."""
    value = tuned["loss"] if metric == "loss" else tuned["right"]
    assert isinstance(value, int | float)
    if metric in ("loss", "accuracy"):
        return float(value)
    answers = tuned["answers"]
    assert isinstance(answers, list)
    share = value / len(answers)
    return 1 - share if metric == "refused" else share


def runs_table(result: RunComparison) -> str:
    """Formats the comparison as a table."""
    lines = [f"{'task':<24}{'items':>7}  {'':<10}{'first':>8}{'second':>8}  change (95% interval)"]
    for task in result.tasks:
        percent = task.metric in SHARES or task.metric.startswith("pass@")
        scale, digits = (100, 1) if percent else (1, 3)
        values = "".join(f"{value:>8.1%}" if percent else f"{value:>8.3f}" for value in (task.first, task.second))
        low, high = (f"{scale * edge:+.{digits}f}" for edge in task.change.interval)
        moved = f"{scale * task.change.difference:+.{digits}f} ({low} to {high})"
        lines.append(f"{task.name[:24]:<24}{task.items:>7,}  {task.metric:<10}{values}  {moved}  {task.verdict}")
    if result.not_compared:
        lines.append(f"not compared, asked of one or in another way: {', '.join(result.not_compared)}")
    return "\n".join(lines)
