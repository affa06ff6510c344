"""Concludes from all tasks together what training has done to the model, and names the cures.

The signs, each with the base's figure beside it: questions that are answered worse, and whether examples or other words
bring the answers back; plain texts with a higher loss; harmless questions that are refused; answers that are much
longer, repeat themselves, or do not end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_sft.config import TaskConfig
from qlora_sft.evaluation.compare import TaskReport, main_metric
from qlora_sft.evaluation.diagnosis import Diagnosis, Verdict
from qlora_sft.evaluation.examples import PHRASINGS, rephrased, with_examples
from qlora_sft.evaluation.item import Item
from qlora_sft.evaluation.tasks import Task

# Examples before each question when the same is asked once more.
SHOTS = 4
# A loss of plain texts that rose by a smaller share is no forgetting: after most trainings it is a little higher.
RISE = 0.01

CURES = {
    "idle adapter": "it changes nothing: was it trained (training.learning_rate, steps), and is it the right one?",
    "forgetting": "mix replay of such data in (data.replay), lower training.learning_rate, or train fewer steps",
    "refusals": "mix in harmless questions with answers, and look for refusals among the training rows (preview)",
    "alignment tax": "the ability is there: add a few rows that answer such questions in the wanted form",
    "worse": "ask more questions, with --diagnose or --samples 8, which tells forgetting from alignment tax",
}


def in_other_ways(tasks: Sequence[Task], seed: int) -> list[Task]:
    """Returns tasks that ask the same once more: behind examples, and in other words.

    Plain texts are only read, and harmless questions have no answers to show.
    """
    more = []
    for task in tasks:
        settings = task.settings
        if task.form == "loss" or settings.shots or settings.phrasing != "plain":
            continue
        if task.form not in ("code", "refusal") and len(task.items) > SHOTS:
            items = with_examples(task.items, SHOTS, task.form, seed)
            more.append(_again(task, f"{SHOTS}-shot", items, replace(settings, shots=SHOTS)))
        for phrasing in PHRASINGS if task.form != "code" else ():
            items = [rephrased(item, phrasing) for item in task.items]
            more.append(_again(task, phrasing, items, replace(settings, phrasing=phrasing)))
    return more


def _again(task: Task, how: str, items: list[Item], settings: TaskConfig) -> Task:
    return Task(f"{task.name}-{how}", task.form, items, settings, asks_again=task.name)


def diagnosed(reports: Sequence[TaskReport]) -> Diagnosis | None:
    """Concludes from the reports of all tasks. Returns None where no base was asked: there is nothing to compare."""
    compared = [report for report in reports if report.change is not None]
    if not compared:
        return None
    # Of a choice only its letter is known, which may stay the same whatever the adapter does.
    if not any(report.differing for report in compared) and any(report.form != "choices" for report in compared):
        sign = f"not one of {sum(report.items for report in compared):,} answers and readings differs from the base's"
        return Diagnosis(verdict="idle adapter", signs=[sign], cure=CURES["idle adapter"])
    found: list[tuple[Verdict, str]] = []
    for report in compared:
        if report.asks_again is None:
            again = [other for other in compared if other.asks_again == report.name]
            verdict, reason = explained(report, again)
            if verdict != "no difference shown":
                found.append((verdict, f"{report.name}: {verdict}" + (f", {reason}" if reason else "")))
    order: tuple[Verdict, ...] = ("forgetting", "refusals", "alignment tax", "worse", "better")
    verdict = next((each for each in order if any(each == kind for kind, _ in found)), "no difference shown")
    return Diagnosis(verdict=verdict, signs=[sign for _, sign in found], cure=CURES.get(verdict))


def explained(report: TaskReport, again: Sequence[TaskReport]) -> tuple[Verdict, str]:
    """Returns the verdict on one task with its reason, given its results when it was asked in other ways.

    If examples or other words clearly recover at least half of what was lost, the loss is one of form: the ability is
    still there. If the questions are too few to see that, or the base fails in those ways as well, it stays open.
    """
    known: tuple[Verdict, ...] = ("forgetting", "alignment tax", "worse", "better")
    nothing: Verdict = "no difference shown"
    verdict = next((each for each in known if each == report.verdict), nothing)
    if report.form == "refusal":
        return ("refusals" if verdict == "worse" else verdict), _moved(report)
    if report.form == "loss":
        change = (report.change or {})["loss"].difference
        if verdict == "worse" and change < RISE * (report.base or {})["loss"]:
            return "no difference shown", _moved(report)
        return ("forgetting" if verdict == "worse" else verdict), _moved(report)
    if verdict not in ("forgetting", "worse") or not again:
        return verdict, f"{report.reason}; {_moved(report)}" if report.reason else _moved(report)
    if _cut_off(report):
        what = f"{_moved(report)}, and {1 - report.tuned['ended']:.0%} of its answers were cut off"
        return "worse", f"{what} at {report.max_new_tokens} tokens: ask with more --max-new-tokens"
    recovered = [other for other in again if _undoes(other, report)]
    if recovered:
        return "alignment tax", f"{_moved(report)}, but the answers are back {', '.join(map(_way, recovered))}"
    lost = [other for other in again if _lost(other)]
    # Only a way in which the base answers can tell something, and examples tell most.
    metric = main_metric(report.form)
    able = [other for other in again if (other.base or {})[metric] >= (report.base or {})[metric] / 2]
    telling = [other for other in able if other.shots] or able
    if (telling and all(map(_lost, telling))) or (lost and verdict == "forgetting"):
        return "forgetting", f"{_moved(report)}, and {', '.join(map(_way, lost))} as well"
    return verdict, f"{_moved(report)}; whether it comes back is open {', '.join(map(_way, again))}"


def _cut_off(report: TaskReport) -> bool:
    """Says whether half of a loss may be due to answers that were cut off, and did not go in circles."""
    base, tuned, metric = report.base or {}, report.tuned, main_metric(report.form)
    if "ended" not in tuned:
        return False
    circles = (report.change or {})["repetition"].interval[0] > 0
    more = base["ended"] - tuned["ended"]
    return more > 0 and more >= (base[metric] - tuned[metric]) / 2 and not circles


def _lost(report: TaskReport) -> bool:
    return report.verdict in ("worse", "forgetting")


def _undoes(other: TaskReport, plain: TaskReport) -> bool:
    """Says whether the loss of ``plain`` is undone where the same is asked in the way of ``other``.

    The tuned model must regain half of what was lost, and its distance from the base must surely be smaller than it
    was. Without the former a way in which both fail would count, without the latter noise.
    """
    metric = "accuracy" if plain.form == "choices" else f"pass@{plain.samples or 1}"
    before, after = (plain.base or {})[metric], plain.tuned[metric]
    low = (other.change or {})[metric].interval[0]
    return not _lost(other) and other.tuned[metric] >= (before + after) / 2 and low > after - before


def _way(report: TaskReport) -> str:
    """Says in which other way a task was asked, and what came of it."""
    how = f"with {report.shots} examples" if report.shots else f"in other words ({report.phrasing})"
    return f"{how} ({_moved(report)})"


def _moved(report: TaskReport) -> str:
    """Returns the main metric of base and tuned model."""
    metric = main_metric(report.form)
    base, tuned = (report.base or {})[metric], report.tuned[metric]
    if metric == "loss":
        return f"loss {base:.3f} to {tuned:.3f}"
    return f"{metric} {base:.1%} to {tuned:.1%}"


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Formats a diagnosis for a terminal."""
    lines = [f"verdict: {diagnosis.verdict}", *(f"  {sign}" for sign in diagnosis.signs)]
    return "\n".join([*lines, f"  what helps: {diagnosis.cure}"] if diagnosis.cure else lines)
