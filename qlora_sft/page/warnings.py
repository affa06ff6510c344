"""Find what in a run asks for attention, each with what it may mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from qlora_sft.json_types import items, mapping, number
from qlora_sft.page.curves import best_evaluation
from qlora_sft.page.facts import RunFacts
from qlora_sft.page.settings import is_warning
from qlora_sft.page.tasks import BAD
from qlora_sft.units import nats, share

# A held-out loss that is higher by a smaller share is not worth a word.
RISE = 0.01
# Of the rows of a source.
DROPPED = 0.05


class Warn(NamedTuple):
    """Holds what is the matter, and what it means."""

    what: str
    meaning: str


def warnings_of(run: RunFacts) -> list[Warn]:
    """Returns everything that asks for attention."""
    return [*_of_training(run), *_of_held_out(run), *_of_data(run), *_of_tasks(run), *_that_were_said(run)]


def _of_training(run: RunFacts) -> Iterator[Warn]:
    left_out = sum(row.get("grad_norm") is None for row in run.steps if "grad_norm" in row)
    if left_out:
        yield Warn(f"{left_out:,} steps were left out", "their gradient was not finite, so they changed nothing.")
    if run.report and run.report.train_loss.rose:
        yield Warn(
            "The training loss rose",
            "where that is more than noise between steps, the model is worse at its training data than before: "
            "lower training.learning_rate, and look at the rows with `preview`.",
        )


def _of_held_out(run: RunFacts) -> Iterator[Warn]:
    if len(run.held_out) < 2:
        return
    (_, first), (last_step, last) = run.held_out[0], run.held_out[-1]
    risen = [name for name in last if name in first and last[name] > first[name] * (1 + RISE)]
    if risen:
        each = ", ".join(f"{name} ({nats(first[name])} → {nats(last[name])})" for name in risen)
        yield Warn("Held-out loss rose", f"{each}: the model has got worse at it.")
    best = best_evaluation(run)
    if best is None or best == last_step:
        return
    lowest = dict(run.held_out)[best]
    low, end = sum(lowest.values()) / len(lowest), sum(last.values()) / len(last)
    if end > low * (1 + RISE):
        kept = "The adapter of that step was kept." if run.kept_step == best else "Fewer epochs are better."
        yield Warn(
            "Held-out loss turned",
            f"its mean was lowest at step {best:,.0f} ({nats(low)}) and was {nats(end)} at the last step: from there "
            f"on the run learned its rows by heart. {kept}",
        )


def _of_data(run: RunFacts) -> Iterator[Warn]:
    for name, each in mapping(run.manifest.get("data")).items():
        source = mapping(each)
        dropped = {why: number(mapping(drop).get("rows")) or 0 for why, drop in mapping(source.get("dropped")).items()}
        read = number(source.get("read")) or 0
        if read and sum(dropped.values()) > DROPPED * read:
            reasons = ", ".join(f"{why} ({rows:,.0f})" for why, rows in dropped.items())
            yield Warn(f"{share(sum(dropped.values()) / read)} of the rows of {name} were dropped", f"{reasons}.")


def _of_tasks(run: RunFacts) -> Iterator[Warn]:
    for task in run.tasks:
        if task.get("verdict") in BAD:
            yield Warn(f"{task.get('name')}: {task['verdict']}", f"{task.get('reason') or 'see the tasks below'}.")


def _that_were_said(run: RunFacts) -> Iterator[Warn]:
    """Yields what the run itself has warned of, while it was prepared and while it trained."""
    said = [text.partition(":")[2].strip() or text for text in run.said if is_warning(text)]
    for text in dict.fromkeys([*said, *map(str, items(run.reported.get("warnings")))]):
        yield Warn("The run warned", text)
