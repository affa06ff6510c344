"""The type of what all tasks of an evaluation say together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qlora_sft.run.report import Report

Verdict = Literal["idle adapter", "forgetting", "refusals", "alignment tax", "worse", "better", "no difference shown"]
"""Of all tasks together, the first of these for which there is a sign."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Report):
    """Holds what all tasks together say of a model."""

    verdict: Verdict
    signs: list[str]
    """One sentence for each task that says something."""
    cure: str | None = None
