"""Draw a plan for a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_sft.markup.bars import Bar, bars
from qlora_sft.markup.elements import cards, facts, note, table
from qlora_sft.markup.style import piece
from qlora_sft.units import duration, size

if TYPE_CHECKING:
    from qlora_sft.plan.report import PlanReport


def plan_html(plan: PlanReport) -> str:
    """Returns what a run will need: memory, time, the longest row per card, and what was chosen."""
    run, held = plan.this_run, plan.resident
    fits = "" if run.fits is None else "fits" if run.fits else "does NOT fit"
    figures = [("Peak", size(run.peak) if run.peak else "–", f"{run.device}, {size(run.memory)}; {fits}")]
    if plan.data:
        figures.append(("Steps", f"{plan.data.steps:,}", f"{plan.data.tokens:,} tokens"))
    if plan.time and plan.time.training is not None:
        figures.append(
            ("Training", duration(plan.time.training), f"{plan.time.tokens_per_second:,.0f} tokens per second")
        )
    parts = {
        "weights in NF4": held.nf4, "weights in full": held.full + held.buffers,
        "adapters and gradients": held.adapters + held.gradients, "optimizer": held.optimizer,
        "activations": run.activations or 0,
    }  # fmt: skip
    rows = [
        [f"{row.gib} GB", f"{row.tokens:,}", f"{row.tokens_with_host:,}", row.split or row.limit]
        for row in plan.cards.rows
    ]
    return piece(
        cards(figures),
        bars("memory", [Bar(name, count, count, size(count)) for name, count in parts.items() if count]),
        note(f"{run.split}: {run.reason}" if run.split else run.reason),
        table(["card", "longest row", "with any host memory", "split"], rows) if rows else note(plan.cards.note),
        facts((name, f"{each.name} ({each.reason})") for name, each in plan.choices.items()),
        note(plan.model.note) if plan.model.note else "",
    )
