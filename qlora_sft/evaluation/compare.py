"""Compares the tuned model with its base on one task: what changed, how surely, and what kind of loss it is.

A tuned model that does worse has either lost the ability or stopped showing it. What the model can do is measured by
the best of several samples (``pass@n``), or by the likeliest letter. What the model does is measured by one answer
(``pass@1``), or by the likeliest token of all. Both are compared with the base, question by question:

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
from qlora_sft.evaluation.diagnosis import Diagnosis
from qlora_sft.evaluation.outlook import rl_outlook
from qlora_sft.evaluation.statistics import PairedChange, paired_change
from qlora_sft.evaluation.tasks import Task, TaskForm
from qlora_sft.markup.style import piece
from qlora_sft.page.tasks import tasks_html
from qlora_sft.run.report import LEFT_OUT, Report

LOWER_IS_BETTER = ("loss", "refused")
SHARES = ("accuracy", "said", "refused", "ended", "repetition")
"""Metrics that are shares, beside pass@k, and are shown in percent."""
DIVERSITY = ("entropy", "self-BLEU", "distinct-2")


@dataclass(frozen=True, kw_only=True)
class MetricChange(Report):
    """Says how far a metric has moved from the base to the tuned model."""

    difference: float
    interval: list[float]
    """The edges of its 95% interval."""
    more_than_chance: bool | None = field(default=None, metadata=LEFT_OUT)
    """Whether the interval leaves out zero and enough items have changed; None in results of earlier versions."""

    @classmethod
    def of(cls, c: PairedChange) -> MetricChange:
        """Returns what is reported of a change."""
        return cls(difference=c.difference, interval=[c.low, c.high], more_than_chance=c.risen or c.fallen)


@dataclass(frozen=True, kw_only=True)
class TaskReport(Report):
    """Holds what ``evaluation/NAME.json`` says: the task, every metric of both models, the verdict with its reason."""

    name: str
    form: TaskForm
    path: str
    questions: str
    """The digest of what was asked."""
    items: int
    seed: int
    tuned: dict[str, float]
    samples: int | None = field(default=None, metadata=LEFT_OUT)
    max_new_tokens: int | None = field(default=None, metadata=LEFT_OUT)
    thinking: str | None = field(default=None, metadata=LEFT_OUT)
    temperature: float | None = field(default=None, metadata=LEFT_OUT)
    shots: int | None = field(default=None, metadata=LEFT_OUT)
    """How many examples stood before every question."""
    phrasing: str | None = field(default=None, metadata=LEFT_OUT)
    """How questions were put, if not as in the file."""
    asks_again: str | None = field(default=None, metadata=LEFT_OUT)
    """The task whose questions are asked in another way here."""
    for_rl: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    """The shares of the questions that are answered correctly always, never and sometimes."""
    rl_outlook: str | None = field(default=None, metadata=LEFT_OUT)
    """What reinforcement learning can expect of the model on these questions."""
    base: dict[str, float] | None = field(default=None, metadata=LEFT_OUT)
    change: dict[str, MetricChange] | None = field(default=None, metadata=LEFT_OUT)
    differing: int | None = field(default=None, metadata=LEFT_OUT)
    """How many items have another answer, or another loss, than the base's, be it right or wrong."""
    verdict: str | None = field(default=None, metadata=LEFT_OUT)
    reason: str | None = field(default=None, metadata=LEFT_OUT)
    answers: str | None = field(default=None, metadata=LEFT_OUT)
    """The file with every answer."""


@dataclass(frozen=True)
class EvaluationReport(Report):
    """Holds the results of a model, and of its base if that was asked, on every task."""

    model: str
    folder: str
    """The folder that holds the figures and the answers."""
    tasks: list[TaskReport]
    diagnosis: Diagnosis | None = None
    """What all tasks together say; None where no base was asked."""

    def _repr_html_(self) -> str:
        return piece(tasks_html([task.to_json() for task in self.tasks]))


def compared(task: Task, base: Scores | None, tuned: Scores, seed: int) -> TaskReport:
    """Reports every metric of ``tuned`` and, if it was asked, of ``base``, and what has changed between them."""
    settings = task.settings
    report = TaskReport(
        name=task.name,
        form=task.form,
        path=settings.path,
        questions=_digest(task),
        items=len(tuned.weights),
        seed=seed,
        tuned={name: _mean(tuned, name) for name in tuned.metrics},
        shots=settings.shots or None,
        phrasing=settings.phrasing if settings.phrasing != "plain" else None,
        asks_again=task.asks_again,
    )
    if task.form not in ("choices", "loss"):
        n = settings.samples
        report = replace(report, samples=n, max_new_tokens=settings.max_new_tokens, thinking=settings.thinking)
        if n > 1:
            report = replace(report, temperature=settings.temperature)
        if n > 1 and task.form != "refusal":
            outlook = rl_outlook(report.tuned["pass@1"], report.tuned[f"pass@{n}"], n, report.items)
            report = replace(report, for_rl=for_rl(tuned, n), rl_outlook=outlook)
    if base is None:
        return report
    changes = _changes(base, tuned, seed)
    verdict, reason = judged(task.form, changes, settings.samples)
    return replace(
        report,
        base={name: _mean(base, name) for name in base.metrics},
        change={name: MetricChange.of(c) for name, c in changes.items()},
        differing=sum(one != other for one, other in zip(base.records, tuned.records, strict=True)),
        verdict=verdict,
        reason=reason,
    )


def _digest(task: Task) -> str:
    """Returns a digest of what was asked, because files of one name may hold different questions.

    Sets of code problems may have the same questions with more tests (HumanEval, HumanEval+).
    """
    asked = [[item.conversation, item.reference, *([item.tests.test] if item.tests else [])] for item in task.items]
    return hashlib.sha256(json.dumps(asked, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _changes(base: Scores, tuned: Scores, seed: int) -> dict[str, PairedChange]:
    shared = [name for name in tuned.metrics if name in base.metrics]
    return {name: paired_change(base.metrics[name], tuned.metrics[name], tuned.weights, seed) for name in shared}


def _mean(scores: Scores, name: str) -> float:
    weighted = zip(scores.metrics[name], scores.weights, strict=True)
    return sum(figure * weight for figure, weight in weighted) / sum(scores.weights)


def main_metric(form: TaskForm) -> str:
    """Names the metric that says what the model does, for tasks of this form."""
    return {"choices": "accuracy", "loss": "loss", "refusal": "refused"}.get(form, "pass@1")


def judged(form: TaskForm, changes: dict[str, PairedChange], samples: int) -> tuple[str, str]:
    """Returns (verdict, reason). A change counts only if its interval leaves out zero and enough items have changed."""
    if form == "choices":
        can, does = "accuracy", "said"
    else:
        can, does = f"pass@{samples}", main_metric(form)
    if form in ("loss", "refusal") or (samples == 1 and form != "choices"):
        return _alone(does, changes[does])
    if _worse(can, changes[can]):
        return "forgetting", f"{can} has fallen, too" if _worse(does, changes[does]) else f"{can} has fallen"
    if _worse(does, changes[does]):
        return "alignment tax", f"{does} has fallen, {can} has not"
    if _better(can, changes[can]) or _better(does, changes[does]):
        return "better", f"{can if _better(can, changes[can]) else does} has risen"
    return "no difference shown", ""


def _alone(metric: str, c: PairedChange) -> tuple[str, str]:
    """Returns (verdict, reason) for a task with a single metric, which cannot tell forgetting from alignment tax."""
    if _worse(metric, c):
        why = {"loss": "it reads such text worse", "refused": "it refuses more of what is harmless"}
        return "worse", why.get(metric, "samples: 8, or --diagnose, tells forgetting from alignment tax")
    return ("better", "") if _better(metric, c) else ("no difference shown", "")


def _worse(metric: str, c: PairedChange) -> bool:
    return c.risen if metric in LOWER_IS_BETTER else c.fallen


def _better(metric: str, c: PairedChange) -> bool:
    return c.fallen if metric in LOWER_IS_BETTER else c.risen


def for_rl(tuned: Scores, samples: int) -> dict[str, float]:
    """Returns the shares of the questions that are answered correctly in every sample, in none, and in some.

    Group-relative reinforcement learning can learn only from the last kind: its gradient is zero where all samples of
    a question earn the same reward.
    """
    correct = [record["right"] for record in tuned.records]
    always, never = (sum(count == wanted for count in correct) / len(correct) for wanted in (samples, 0))
    return {"always": always, "never": never, "sometimes": 1 - always - never}


# ------------------------------------------------------------------ as text


def comparison_table(reports: Sequence[TaskReport]) -> str:
    """Formats the metrics of all tasks as a table, with the verdict of each below its rows."""
    lines = [f"{'task':<20}{'items':>7}  {'':<10}{'base':>8}{'tuned':>8}  change (95% interval)"]
    for report in reports:
        main = main_metric(report.form)
        shown = [name for name in report.tuned if name == main or name.startswith("pass@") or name in ("said", "kl")]
        for number, metric in enumerate(shown):
            head = f"{report.name[:20]:<20}{report.items:>7,}" if number == 0 else " " * 27
            lines.append(f"{head}  {metric:<10}{_figures(report, metric)}")
        lines += [f"{'':<29}{note}" for note in _notes(report)]
    return "\n".join(lines)


def diversity_table(reports: Sequence[TaskReport]) -> str:
    """Formats how much the answers to each task are alike; empty if no task has answers."""
    lines = []
    for report in reports:
        shown = [name for name in DIVERSITY if name in report.tuned]
        lines += [
            f"{report.name[:20] if number == 0 else '':<20}{'':7}  {name:<10}{_figures(report, name)}"
            for number, name in enumerate(shown)
        ]
    head = "how open the answers are: entropy of next tokens, likeness of answers, different pairs of tokens"
    return "\n".join([head, *lines]) if lines else ""


def _figures(report: TaskReport, metric: str) -> str:
    percent = metric in SHARES or metric.startswith("pass@")
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
    for metric, more, less in (("length", "longer", "shorter"), ("repetition", "more repetitive", "less repetitive")):
        moved = (report.change or {}).get(metric)
        if moved is not None and report.base is not None and 0 not in (report.base[metric], report.tuned[metric]):
            ratio, (low, high) = report.tuned[metric] / report.base[metric], moved.interval
            if (low > 0 or high < 0) and not 2 / 3 < ratio < 3 / 2:
                notes.append(f"its answers are {max(ratio, 1 / ratio):.1f} times {more if ratio > 1 else less}")
    if report.rl_outlook is not None:
        notes.append(report.rl_outlook)
    if report.for_rl is not None and report.samples is not None:
        r = report.for_rl
        different = report.tuned["distinct"] * report.samples
        notes += [
            f"for RL: {r['sometimes']:.0%} of the questions are sometimes right (what it can learn from),",
            f"{r['always']:.0%} always, {r['never']:.0%} never; {different:.1f} of {report.samples} answers differ",
        ]
    return notes
