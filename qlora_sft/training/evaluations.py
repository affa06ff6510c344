"""Keeps the evaluations that a run makes while it trains (``evaluations.jsonl``), and tells which was the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qlora_sft.atomic import GrowingFile, written_file
from qlora_sft.json_types import whole_lines
from qlora_sft.run.report import LEFT_OUT, TASK_LOSS, Report


@dataclass(frozen=True)
class AskedTasks:
    """Holds the results of the configured tasks at one step."""

    figures: dict[str, float]
    """By task, the share of its questions that was answered rightly, or its loss."""
    endless: dict[str, float] = field(default_factory=dict)
    """By task, the share of its answers that had not ended where they were cut off."""


@dataclass(frozen=True)
class EvaluationRow(Report):
    """Holds one evaluation, as a line of ``evaluations.jsonl`` has it."""

    step: int
    """Optimizer steps that were done."""
    held_out: dict[str, float | None]
    """Held-out loss by source, in nats; None for one that is not finite. Empty where only tasks were asked."""
    mean: float | None
    """The mean over the sources; None if a loss is not finite."""
    best: bool
    """Whether none before was as good by ``training.best_metric``; the one before training does not count."""
    seconds: float
    tasks: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    """By task, the share of its questions that was answered rightly, or the loss of one that only measures it."""
    endless: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    """By task, the share of its answers that did not end within its limit of tokens, where some did not."""


class Evaluations:
    """Holds the evaluations of a run so far.

    Which was the best, and how long ago, follows from its rows alone, so a resumed run finds both again.
    """

    def __init__(self, file: Path, begin: int = 0, metric: str = "held_out"):
        """Reads what an earlier part of the run has measured; later lines than those of step ``begin`` are dropped.

        metric: what decides which was the best, as ``training.best_metric`` names it.
        """
        self.file, self.metric = file, metric
        self._growing = GrowingFile(file)
        self.rows: list[EvaluationRow] = []
        if begin and file.exists():
            rows = map(EvaluationRow.from_json, whole_lines(file))
            self.rows = [row for row in rows if row.step <= begin]
            with written_file(file) as beside:
                beside.write_text("".join(map(_line, self.rows)), encoding="utf-8")

    def add(
        self, step: int, held_out: Mapping[str, float], seconds: float, asked: AskedTasks | None = None
    ) -> EvaluationRow:
        """Adds an evaluation to the file and returns it. If the disk is full, the line waits until the next one."""
        losses = {source: loss if math.isfinite(loss) else None for source, loss in held_out.items()}
        finite = [loss for loss in losses.values() if loss is not None]
        mean = sum(finite) / len(finite) if finite and len(finite) == len(losses) else None
        tasks, endless = (_finite(asked.figures), asked.endless or None) if asked else (None, None)
        row = EvaluationRow(step, losses, mean, False, round(seconds, 3), tasks, endless)
        cost, best = cost_of(row, self.metric), self.best
        least = cost_of(best, self.metric) if best else None
        if step > 0 and cost is not None and (least is None or cost < least):
            row = replace(row, best=True)
        self._growing.add(_line(row))
        self.rows.append(row)
        return row

    def close(self) -> None:
        """Writes the lines for which there was no room, if there is now."""
        self._growing.add("")

    @property
    def best(self) -> EvaluationRow | None:
        """Returns the best evaluation, the first of several; None before there is one."""
        return next((row for row in reversed(self.rows) if row.best), None)

    @property
    def since_best(self) -> int:
        """Returns how many evaluations there were after the best one."""
        of_tasks = self.metric.startswith("tasks/")
        measured = [row for row in self.rows if row.step > 0 and (row.tasks if of_tasks else row.held_out)]
        return next((number for number, row in enumerate(reversed(measured)) if row.best), len(measured))


def cost_of(row: EvaluationRow, metric: str) -> float | None:
    """Returns a number that is lower the better the model is by ``metric``; None if it was not measured.

    metric: ``held_out``, the mean of the held-out losses; ``held_out/SOURCE``; or ``tasks/TASK``, whose share of right
    answers is negated unless the task only measures a loss.
    """
    kind, _, name = metric.partition("/")
    if kind == "held_out":
        return row.held_out.get(name) if name else row.mean
    tasks = row.tasks or {}
    if (loss := tasks.get(f"{name}{TASK_LOSS}")) is not None:
        return loss if math.isfinite(loss) else None
    return -tasks[name] if name in tasks else None


def named(metric: str) -> str:
    """Says what ``metric`` is, in the words of a message."""
    kind, _, name = metric.partition("/")
    if kind == "tasks":
        return f"task {name}"
    return f"held-out loss of {name}" if name else "held-out loss"


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Returns ``figures`` without those that are no finite numbers, which JSON does not know."""
    return {name: figure for name, figure in figures.items() if math.isfinite(figure)}


def _line(row: EvaluationRow) -> str:
    return json.dumps(row.to_json(), ensure_ascii=False) + "\n"
