"""Draw the report of a run for a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qlora_sft.markup.elements import cards, change, facts, note, table
from qlora_sft.markup.style import piece
from qlora_sft.units import duration, nats, share

if TYPE_CHECKING:
    from qlora_sft.run.report import Pair, RunReport


def run_html(report: RunReport) -> str:
    """Returns the figures of a finished run, its held-out results, and what it chose."""
    course = report.train_loss
    figures = [
        ("Training loss", change(nats(course.first), nats(course.last)), "first and last steps"),
        ("Steps", f"{report.steps:,}", f"{report.steps_left_out:,} left out" if report.steps_left_out else ""),
        ("Tokens", f"{report.tokens:,}", f"{share(report.supervised_tokens / max(report.tokens, 1))} supervised"),
        (
            "Time, with loading",
            duration(sum(report.seconds.values())),
            f"{report.tokens_per_second:,.0f} tokens per second",
        ),
    ]
    rows = [
        [source, _change(report.loss.get(source), nats), _change(report.exact_match.get(source), share)]
        for source in dict.fromkeys([*report.loss, *report.exact_match])
    ]
    chosen = [
        ("backend", f"{report.backend.name} ({report.backend.reason})"),
        ("compute in", report.dtype),
        ("optimizer", report.optimizer),
        *([("memory", f"{report.memory.split} ({report.memory.reason})")] if report.memory else []),
    ]
    return piece(
        cards(figures),
        table(["source", "held-out loss", "exact answers"], rows) if rows else "",
        facts(chosen),
        note(f"{report.output}/report.html has the curves and all else."),
    )


def _change(pair: Pair | None, write: Callable[[float | None], str]) -> str:
    """Returns a figure before and after training, or what there is of it."""
    if pair is None:
        return "–"
    return write(pair.after) if pair.before is None else change(write(pair.before), write(pair.after))
