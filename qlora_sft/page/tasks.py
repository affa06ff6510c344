"""Show the results of tasks: what changed from the base to the tuned model, with 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_sft.json_types import JsonObject, items, mapping, number, numbers
from qlora_sft.markup.axis import drawable
from qlora_sft.markup.bars import Interval, intervals
from qlora_sft.markup.elements import Markup, chip, note, table
from qlora_sft.markup.text import escape
from qlora_sft.units import figure, share

LOWER_IS_BETTER = ("loss", "kl", "refused")
# Metrics that are no shares, so they are not written in percent.
NO_SHARES = ("loss", "kl", "length", "entropy", "self-BLEU", "distinct-2")
# Metrics that describe the answers and do not grade them.
DESCRIBING = {
    "ended": "answers that came to their end", "distinct": "different answers, of those to one question",
    "length": "tokens of an answer", "repetition": "tokens of an answer that are said again in it",
    "entropy": "entropy of the next token, in nats", "self-BLEU": "likeness of the answers (self-BLEU)",
    "distinct-2": "different pairs of tokens in the answers to one question (distinct-2)",
}  # fmt: skip
BAD, GOOD = ("forgetting", "alignment tax", "worse"), ("better",)


def tasks_html(tasks: Sequence[JsonObject]) -> Markup:
    """Returns the results of ``tasks``, each as ``evaluation/NAME.json`` has it."""
    return Markup("".join(map(_task, tasks)))


def diagnosis_html(diagnosis: JsonObject) -> Markup:
    """Returns what ``evaluate --diagnose`` concluded: verdict, signs and cure; nothing where it was not run."""
    verdict = str(diagnosis.get("verdict") or "")
    if not verdict:
        return Markup("")
    kind = "good" if verdict == "better" else "" if verdict == "no difference shown" else "bad"
    signs = "".join(f"<li>{escape(sign)}</li>" for sign in items(diagnosis.get("signs")))
    cure = note(f"What helps: {diagnosis['cure']}") if diagnosis.get("cure") else ""
    asked = note(f"Concluded from {', '.join(map(str, items(diagnosis.get('tasks'))))}.")
    listed = f"<ul>{signs}</ul>" if signs else ""
    return Markup(f'<div class="panel"><h3>Diagnosis {chip(verdict, kind)}</h3>{listed}{cure}{asked}</div>')


def _task(task: JsonObject) -> str:
    verdict = str(task.get("verdict") or "")
    kind = "bad" if verdict in BAD else "good" if verdict in GOOD else ""
    asked = number(task.get("items"))
    head = f"<h3>{escape(task.get('name', '?'))} {chip(verdict, kind) if verdict else ''}</h3>"
    said = [f"{asked:,.0f} items" if asked else "", str(task.get("form") or ""), str(task.get("reason") or "")]
    tuned, base = numbers(task.get("tuned")), numbers(task.get("base"))
    changes = {name: row for name in tuned if (row := _interval(name, task)) and name not in DESCRIBING}
    drawn = "".join(
        intervals(
            f"changes of {task.get('name')}",
            rows,
            _points if percent else _signed,
        )
        for percent in (True, False)
        if (rows := [row for name, row in changes.items() if (name not in NO_SHARES) == percent])
    )
    others = [
        [DESCRIBING.get(name, name), _write(name, base.get(name)), _write(name, value)]
        for name, value in tuned.items()
        if name not in changes
    ]
    unit = note("Change in percentage points from the base to the tuned model, with its 95% interval.") if drawn else ""
    rest = table(["", "base", "tuned"], others) if others else ""
    about = note("; ".join(filter(None, said)))
    return f'<div class="panel">{head}{about}{drawn}{unit if _has_percent(changes) else ""}{rest}</div>'


def _has_percent(changes: dict[str, Interval]) -> bool:
    return any(name not in NO_SHARES for name in changes)


def _interval(name: str, task: JsonObject) -> Interval | None:
    """Returns the change of one metric; None if the base was not asked."""
    change = mapping(mapping(task.get("change")).get(name))
    difference = number(change.get("difference"))
    edges = [edge for each in items(change.get("interval")) if (edge := number(each)) is not None]
    if difference is None or len(edges) != 2 or not all(map(drawable, (difference, *edges))):
        return None
    # An interval over few items leaves out zero where all that have changed did so in one direction.
    low_end, high_end = edges if change.get("more_than_chance") is not False else (0.0, 0.0)
    better = (high_end < 0 or None) if name in LOWER_IS_BETTER else (low_end > 0 or None)
    worse = low_end > 0 if name in LOWER_IS_BETTER else high_end < 0
    before, after = (_write(name, numbers(task.get(who)).get(name)) for who in ("base", "tuned"))
    scale = 1 if name in NO_SHARES else 100
    low, high, moved = (_signed(scale * each) for each in (*edges, difference))
    text = f"{before} → {after}, {moved} ({low} to {high})"
    return Interval(name, difference, edges[0], edges[1], text, False if worse else better)


def _write(name: str, value: float | None) -> str:
    return figure(value) if name in NO_SHARES else share(value)


def _points(value: float) -> str:
    return _signed(100 * value)


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−") if value else "0"
