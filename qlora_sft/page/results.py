"""Show what a run has achieved: its figures, held-out results by source, answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from qlora_sft.json_types import JsonObject
from qlora_sft.markup.elements import Markup, change, chip, note, opens, table
from qlora_sft.markup.text import escape, shortened
from qlora_sft.page.curves import of_key
from qlora_sft.page.facts import RunFacts
from qlora_sft.run.report import Pair
from qlora_sft.units import duration, nats, share

# Answers that are seen at once, and all that are in the page.
SHOWN, MOST = 4, 40
# Characters of a prompt and of an answer.
PROMPT, ANSWER = 1500, 3000


def held_out_table(run: RunFacts) -> Markup:
    """Returns loss and exact match of every held-out source, before training and at the end."""
    losses = {name: _course(run, name) for _, measured in run.held_out for name in measured}
    matches = run.report.exact_match if run.report else {}
    rows = []
    for name in dict.fromkeys([*losses, *matches]):
        seen = losses.get(name, [])
        match = matches.get(name)
        rows.append([
            name, change(nats(seen[0]), nats(seen[-1])) if len(seen) > 1 else nats(seen[0] if seen else None),
            _relative(seen), nats(min(seen)) if len(seen) > 2 else "–",
            _matched(match.before, match.after) if match else "–",
        ])  # fmt: skip
    return table(["source", "held-out loss", "change", "lowest", "exact answers"], rows) if rows else Markup("")


def _course(run: RunFacts, source: str) -> list[float]:
    """Returns the held-out loss of a source every time it was measured, and last that of the adapter that was kept."""
    seen = [losses[source] for _, losses in run.held_out if source in losses]
    pair = run.report.loss.get(source) if run.report else None
    return [*seen[:-1], pair.after] if pair else seen


def _matched(before: float | None, after: float) -> Markup | str:
    return share(after) if before is None else change(share(before), share(after))


def _relative(losses: Sequence[float]) -> Markup | str:
    if len(losses) < 2 or losses[0] <= 0:
        return "–"
    moved = losses[-1] / losses[0] - 1
    return chip(f"{moved:+.1%}".replace("-", "−"), "good" if moved < -0.005 else "bad" if moved > 0.005 else "")


def answers(run: RunFacts) -> Markup:
    """Returns answers to held-out prompts, before and after side by side, from every source in turn."""
    if not run.samples:
        return Markup("")
    names = list(dict.fromkeys(str(row.get("source")) for row in run.samples))
    by_source = [[row for row in run.samples if str(row.get("source")) == name] for name in names]
    in_turn = [row for group in zip_longest(*by_source) for row in group if row is not None][:MOST]
    drawn = [_answer(row) for row in in_turn]
    more = opens(f"{len(drawn) - SHOWN} more", *drawn[SHOWN:]) if len(drawn) > SHOWN else ""
    left = len(run.samples) - len(in_turn)
    rest = note(f"{left:,} more are in samples.jsonl.") if left > 0 else ""
    return Markup(f'<div class="panel">{"".join(drawn[:SHOWN])}{more}</div>{rest}')


def _answer(row: JsonObject) -> str:
    reference, after = str(row.get("reference", "")), str(row.get("answer", ""))
    asked = row.get("before")
    before = "(not asked)" if asked is None else str(asked)
    exact = [chip("as wanted", "good")] if row.get("exact") else []
    return (
        f'<div class="answer"><div class="chips">{chip(str(row.get("source")))}{"".join(exact)}</div>'
        f'<div class="asked">{_text(shortened(str(row.get("prompt", "")), PROMPT))}</div>'
        f'<div class="pair">{_side("before training", before, before == reference)}'
        f"{_side('after training', after, after == reference)}</div>"
        f'<div class="wanted"><small>wanted</small>{_text(shortened(reference, ANSWER))}</div></div>'
    )


def _side(name: str, text: str, right: bool) -> str:
    mark = ' class="right"' if right else ""
    return f"<div{mark}><small>{name}</small>{_text(shortened(text, ANSWER) or '(nothing)')}</div>"


def _text(text: str) -> str:
    return f'<div class="text" dir="auto">{escape(text)}</div>'


def figures(run: RunFacts) -> list[tuple[str, object, str]]:
    """Returns the figures that stand at the top of the page: what, how much, and what is to be said about it."""
    found: list[tuple[str, object, str]] = []
    report = run.report
    losses = [loss for loss in run.losses if loss is not None]
    if report:
        course = report.train_loss
        ends = (course.first_steps, course.last_steps)
        means = "first and last step" if ends == (1, 1) else "means of the first {} and last {} steps".format(*ends)
        first_last = change(nats(course.first), nats(course.last)) if report.steps > 1 else nats(course.last)
        found.append(("Training loss", first_last, means if report.steps > 1 else "one step"))
    elif losses:
        found.append(("Training loss", change(nats(losses[0]), nats(losses[-1])), "first and last step so far"))
    if run.held_out:
        names = list(run.held_out[-1][1])
        courses = [_course(run, name) for name in names]
        first, last = ([course[place] for course in courses] for place in (0, -1))
        before, after = (nats(sum(each) / len(each)) for each in (first, last))
        several = any(len(course) > 1 for course in courses)
        note_of = f"mean of {len(names)} sources" if len(names) > 1 else f"of {names[0]}"
        if run.held_out[-1][0] == 0 and run.last_step > 0:
            note_of += ", before training only"
        found.append(("Held-out loss", change(before, after) if several else after, note_of))
    if report and report.exact_match:
        found.append(("Exact answers", _matched(*_mean_of(list(report.exact_match.values()))), "mean of the sources"))
    return found + _amounts(run)


def _mean_of(pairs: Sequence[Pair]) -> tuple[float | None, float]:
    """Returns the means of figures before and after training."""
    before = [pair.before for pair in pairs if pair.before is not None]
    after = sum(pair.after for pair in pairs) / len(pairs)
    # Without a figure of before for every source the two would not be means of the same.
    return (sum(before) / len(pairs) if len(before) == len(pairs) else None), after


def _amounts(run: RunFacts) -> list[tuple[str, object, str]]:
    sums = {
        key: sum(value for row in run.steps if (value := of_key(key)(row)) is not None)
        for key in ("tokens", "supervised_tokens", "seconds")
    }
    tokens = run.report.tokens if run.report else sums["tokens"]
    supervised = run.report.supervised_tokens if run.report else sums["supervised_tokens"]
    planned = f"of {run.planned_steps:,}" if run.planned_steps and run.planned_steps != run.last_step else ""
    found: list[tuple[str, object, str]] = [
        ("Steps", f"{run.last_step:,}", planned),
        ("Tokens", f"{tokens:,.0f}", f"{share(supervised / tokens)} supervised" if tokens else ""),
    ]
    if sums["seconds"]:
        rate = run.report.tokens_per_second if run.report else tokens / sums["seconds"]
        whole = sum(run.report.seconds.values()) if run.report else 0.0
        in_all = f"; {duration(whole)} with loading and evaluation" if whole else ""
        found.append(("Training time", duration(sums["seconds"]), f"{rate:,.0f} tokens per second{in_all}"))
    return found
