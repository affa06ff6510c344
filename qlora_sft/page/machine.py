"""Show memory and time of a run, beside what was planned."""

from __future__ import annotations

from qlora_sft.json_types import mapping, number
from qlora_sft.markup.bars import Bar, bars
from qlora_sft.markup.elements import Markup, facts, note
from qlora_sft.page.facts import RunFacts
from qlora_sft.units import duration, size


def memory(run: RunFacts) -> Markup:
    """Returns what layers kept, and the bytes that were planned and measured."""
    report = run.report.memory if run.report else None
    if report is None:
        return Markup("")
    measured = report.measured or {}
    planned = number(mapping(run.plan.get("this_run")).get("peak"))
    rows: list[tuple[object, object]] = [
        ("layers", f"{report.split}: {report.reason}"),
        ("activations, planned", f"{size(report.device_bytes)} for {report.tokens:,} tokens"),
    ]
    if report.host_bytes:
        rows.append(("in host memory, planned", size(report.host_bytes)))
    if planned is not None:
        rows.append(("peak, planned", size(planned)))
    names = {
        "resident": "held before the first step", "allocated": "most allocated in training",
        "reserved": "most reserved in training", "card": "the card",
    }  # fmt: skip
    rows += [(f"{names.get(key, key)}, measured", size(value)) for key, value in measured.items()]
    if not measured:
        rows.append(("measured", "only on a GPU"))
    most = [value for row in run.steps if (value := number(row.get("resident_bytes"))) is not None]
    if most:
        rows.append(("host process, measured", f"{size(max(most))} resident at most"))
    return Markup(f'<h3>Memory</h3><div class="panel">{facts(rows)}</div>')


def speed(run: RunFacts) -> Markup:
    """Returns the seconds of every stage, and the speed beside the planned one."""
    rows: list[tuple[object, object]] = []
    planned = mapping(run.plan.get("time"))
    rate, training = number(planned.get("tokens_per_second")), number(planned.get("training"))
    trained = sum(value for row in run.steps if (value := number(row.get("seconds"))) is not None)
    if rate and run.report:
        rows.append(("tokens per second", f"{run.report.tokens_per_second:,.0f}, planned {rate:,.0f}"))
    if training and trained:
        rows.append(("training", f"{duration(trained)}, planned {duration(training)}"))
    seconds = run.report.seconds if run.report else {}
    whole = sum(seconds.values()) or 1.0
    stages = [Bar(name, value, value, f"{_seconds(value)} ({value / whole:.0%})") for name, value in seconds.items()]
    plan = "" if run.plan else note(
        "A plan kept as plan.json in the run folder (qlora-sft plan CONFIG --json) would be shown beside these figures."
    )  # fmt: skip
    if not rows and not stages:
        return Markup("")
    below = f"{facts(rows)}" if rows else ""
    return Markup(f'<h3>Time</h3><div class="panel">{below}{bars("seconds by stage", stages)}</div>{plan}')


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else duration(value)
