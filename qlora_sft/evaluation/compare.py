"""The base against the tuned model on one task: what changed, how surely, and what kind of loss it is.

A tuned model that does worse has either lost the ability or stopped showing it. What it can do is measured by the best
of several samples (``pass@n``), or by the likeliest of the letters; what it does by one answer (``pass@1``), or by the
likeliest of all tokens. Both are compared with their base, question by question:

- **forgetting**: what it can do has fallen. Replay, a lower learning rate or fewer steps are the cure.
- **alignment tax**: what it does has fallen, what it can do has not. It answers in another way (format, length, tone),
  and examples of the right way, or reinforcement learning, bring it back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from qlora_sft.evaluation.ask import Scores
from qlora_sft.evaluation.statistics import Change, change
from qlora_sft.evaluation.tasks import Form, Task
from qlora_sft.run.report import LEFT_OUT, Report

LOWER_IS_BETTER = ("loss",)


@dataclass(frozen=True, kw_only=True)
class Moved(Report):
    """How far a metric has moved from the base to the tuned model."""

    difference: float
    interval: list[float]
    """The edges of its 95% interval."""


@dataclass(frozen=True, kw_only=True)
class TaskReport(Report):
    """What ``evaluation/NAME.json`` holds: the task, every metric of both models, the verdict with its reason."""

    name: str
    form: Form
    path: str
    questions: str
    """A digest of what was asked."""
    items: int
    seed: int
    tuned: dict[str, float]
    samples: int | None = field(default=None, metadata=LEFT_OUT)
    max_new_tokens: int | None = field(default=None, metadata=LEFT_OUT)
    thinking: str | None = field(default=None, metadata=LEFT_OUT)
    temperature: float | None = field(default=None, metadata=LEFT_OUT)
    for_rl: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    """Shares of the questions that are right always, never and sometimes."""
    base: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    change: dict[str, Moved] | None = field(default=None, metadata=LEFT_OUT)
    verdict: str | None = field(default=None, metadata=LEFT_OUT)
    reason: str | None = field(default=None, metadata=LEFT_OUT)
    answers: str | None = field(default=None, metadata=LEFT_OUT)
    """The file with every answer."""


@dataclass(frozen=True)
class EvaluationReport(Report):
    """What a model, and its base if it was asked, made of every task."""

    model: str
    folder: str
    """Where the figures and the answers stand."""
    tasks: list[TaskReport]


def compared(task: Task, base: Scores | None, tuned: Scores, seed: int) -> TaskReport:
    """Every metric of ``tuned`` and, if it was asked, of ``base``, and what has changed."""
    settings = task.settings
    report = TaskReport(
        name=task.name,
        form=task.form,
        path=settings.path,
        questions=_digest(task),
        items=len(tuned.weights),
        seed=seed,
        tuned={name: _mean(tuned, name) for name in tuned.metrics},
    )
    if task.form not in ("choices", "loss"):
        n = settings.samples
        report = replace(report, samples=n, max_new_tokens=settings.max_new_tokens, thinking=settings.thinking)
        if n > 1:
            report = replace(report, temperature=settings.temperature, for_rl=for_rl(tuned, n))
    if base is None:
        return report
    changes = _changes(base, tuned, seed)
    verdict, reason = judged(task.form, changes, settings.samples)
    return replace(
        report,
        base={name: _mean(base, name) for name in base.metrics},
        change={name: Moved(difference=c.difference, interval=[c.low, c.high]) for name, c in changes.items()},
        verdict=verdict,
        reason=reason,
    )


def _digest(task: Task) -> str:
    """Of what was asked: files of one name may hold other questions, in another folder or at another time."""
    asked = [[item.conversation, item.reference] for item in task.items]
    return hashlib.sha256(json.dumps(asked, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _changes(base: Scores, tuned: Scores, seed: int) -> dict[str, Change]:
    shared = [name for name in tuned.metrics if name in base.metrics]
    return {name: change(base.metrics[name], tuned.metrics[name], tuned.weights, seed) for name in shared}


def _mean(scores: Scores, name: str) -> float:
    weighted = zip(scores.metrics[name], scores.weights, strict=True)
    return sum(figure * weight for figure, weight in weighted) / sum(scores.weights)


def main_metric(form: Form) -> str:
    return {"choices": "accuracy", "loss": "loss"}.get(form, "pass@1")


def judged(form: Form, changes: dict[str, Change], samples: int) -> tuple[str, str]:
    """(verdict, reason). A change counts only if its interval leaves out zero and enough items have changed."""
    if form == "choices":
        can, does = "accuracy", "said"
    else:
        can, does = f"pass@{samples}", main_metric(form)
    if form == "loss" or (samples == 1 and form != "choices"):
        return _alone(does, changes[does])
    if _worse(can, changes[can]):
        return "forgetting", f"{can} has fallen, too" if _worse(does, changes[does]) else f"{can} has fallen"
    if _worse(does, changes[does]):
        return "alignment tax", f"{does} has fallen, {can} has not"
    if _better(can, changes[can]) or _better(does, changes[does]):
        return "better", f"{can if _better(can, changes[can]) else does} has risen"
    return "no difference shown", ""


def _alone(metric: str, c: Change) -> tuple[str, str]:
    if _worse(metric, c):
        why = "it reads such text worse" if metric == "loss" else "samples: 8 tells forgetting from alignment tax"
        return "worse", why
    return ("better", "") if _better(metric, c) else ("no difference shown", "")


def _worse(metric: str, c: Change) -> bool:
    return c.risen if metric in LOWER_IS_BETTER else c.fallen


def _better(metric: str, c: Change) -> bool:
    return c.fallen if metric in LOWER_IS_BETTER else c.risen


def for_rl(tuned: Scores, samples: int) -> dict[str, float]:
    """Shares of the questions: right in every sample, in none, in some. Only the last have an advantage to learn from
    in group-relative reinforcement learning, whose gradient is zero where all samples earn the same."""
    right = [record["right"] for record in tuned.records]
    always, never = (sum(r == wanted for r in right) / len(right) for wanted in (samples, 0))
    return {"always": always, "never": never, "sometimes": 1 - always - never}


# ------------------------------------------------------------------ as text


def comparison_table(reports: Sequence[TaskReport]) -> str:
    lines = [f"{'task':<20}{'items':>7}  {'':<10}{'base':>8}{'tuned':>8}  change (95% interval)"]
    for report in reports:
        main = main_metric(report.form)
        shown = [name for name in report.tuned if name == main or name.startswith("pass@") or name in ("said", "kl")]
        for number, metric in enumerate(shown):
            head = f"{report.name[:20]:<20}{report.items:>7,}" if number == 0 else " " * 27
            lines.append(f"{head}  {metric:<10}{_figures(report, metric)}")
        lines += [f"{'':<29}{note}" for note in _notes(report)]
    return "\n".join(lines)


def _figures(report: TaskReport, metric: str) -> str:
    percent = metric not in ("loss", "kl")
    base = (report.base or {}).get(metric)
    text = f"{_figure(base, percent):>8}{_figure(report.tuned[metric], percent):>8}"
    moved = (report.change or {}).get(metric)
    if moved is None:
        return text
    scale, digits = (100, 1) if percent else (1, 3)
    low, high = (f"{scale * edge:+.{digits}f}" for edge in moved.interval)
    return f"{text}  {scale * moved.difference:+.{digits}f} ({low} to {high})"


def _figure(value: float | None, percent: bool) -> str:
    return "-" if value is None else f"{value:.1%}" if percent else f"{value:.3f}"


def _notes(report: TaskReport) -> list[str]:
    notes = []
    if report.verdict is not None:
        notes.append(report.verdict + (f": {report.reason}" if report.reason else ""))
    unended = {"base": 1 - (report.base or {}).get("ended", 1.0), "tuned": 1 - report.tuned.get("ended", 1.0)}
    if any(unended.values()):
        listed = " and ".join(f"{share:.0%} of the {who} model's" for who, share in unended.items() if share)
        notes.append(f"{listed} answers were cut off at {report.max_new_tokens} tokens")
    if report.for_rl is not None and report.samples is not None:
        r = report.for_rl
        different = report.tuned["distinct"] * report.samples
        notes += [
            f"for RL: {r['sometimes']:.0%} of the questions are sometimes right (what it can learn from),",
            f"{r['always']:.0%} always, {r['never']:.0%} never; {different:.1f} of {report.samples} answers differ",
        ]
    return notes
