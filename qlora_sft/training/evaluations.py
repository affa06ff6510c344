"""Keeps the evaluations that a run makes while it trains (``evaluations.jsonl``), and tells which was the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_sft.atomic import written_file
from qlora_sft.run.report import LEFT_OUT, Report


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
    """Whether no evaluation before had a lower mean; the one before training does not count."""
    seconds: float
    tasks: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    """By task, the share of its questions that was answered rightly, or the loss of one that only measures it."""


class Evaluations:
    """Holds the evaluations of a run up to now. What is the best and how long ago it was follows from its rows alone,
    so a run that goes on finds both as they were."""

    def __init__(self, file: Path, begin: int = 0):
        """Reads what an earlier part of the run has measured; later lines than those of step ``begin`` are dropped."""
        self.file = file
        self.rows: list[EvaluationRow] = []
        if begin and file.exists():
            lines = file.read_text(encoding="utf-8").splitlines()
            rows = [EvaluationRow.from_json(json.loads(line)) for line in lines if line.endswith("}")]
            self.rows = [row for row in rows if row.step <= begin]
            with written_file(file) as beside:
                beside.write_text("".join(map(_line, self.rows)), encoding="utf-8")

    def add(
        self, step: int, held_out: Mapping[str, float], seconds: float, tasks: dict[str, float] | None = None
    ) -> EvaluationRow:
        """Adds an evaluation to the file and returns it."""
        losses = {source: loss if math.isfinite(loss) else None for source, loss in held_out.items()}
        finite = [loss for loss in losses.values() if loss is not None]
        mean = sum(finite) / len(finite) if finite and len(finite) == len(losses) else None
        best = self.best
        lowest = step > 0 and mean is not None and (best is None or best.mean is None or mean < best.mean)
        row = EvaluationRow(step, losses, mean, lowest, round(seconds, 3), tasks)
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(_line(row))
        self.rows.append(row)
        return row

    @property
    def best(self) -> EvaluationRow | None:
        """Returns the evaluation with the lowest mean, the first of several; None before there is one."""
        return next((row for row in reversed(self.rows) if row.best), None)

    @property
    def since_best(self) -> int:
        """Returns how many evaluations there were after the best one."""
        measured = [row for row in self.rows if row.step > 0 and row.held_out]
        return next((number for number, row in enumerate(reversed(measured)) if row.best), len(measured))


def _line(row: EvaluationRow) -> str:
    return json.dumps(row.to_json(), ensure_ascii=False) + "\n"
