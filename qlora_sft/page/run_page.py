"""Make the page of one run, from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qlora_sft.json_types import mapping
from qlora_sft.markup.chart import Chart, draw
from qlora_sft.markup.elements import Markup, cards, chip, note, page, section
from qlora_sft.markup.style import style
from qlora_sft.markup.text import attribute, escape
from qlora_sft.page import curves, data, machine, results, settings
from qlora_sft.page.facts import RunFacts
from qlora_sft.page.tasks import diagnosis_html, tasks_html
from qlora_sft.page.warnings import Warn, warnings_of


def run_page(run: RunFacts) -> str:
    """Returns the whole page of a run."""
    parts = [
        ("curves", "Curves", [charts(_every_chart(run)), remark(curves.drawn_note(run))]),
        ("held-out", "Held-out results", [panel(results.held_out_table(run))]),
        ("answers", "Answers before and after", [results.answers(run)]),
        ("tasks", "Tasks", [diagnosis_html(run.diagnosis), tasks_html(run.tasks)]),
        ("data", "Data", [data.mixture(run), data.ledger(run)]),
        ("mask", "What is supervised", [data.mask_sample(run)]),
        ("machine", "Memory and time", [machine.memory(run), machine.speed(run)]),
        ("choices", "Choices and their reasons", [settings.choices(run), settings.said(run)]),
        ("settings", "Settings", [settings.settings(run)]),
        ("manifest", "Manifest", [settings.manifest(run)]),
        ("lacks", "What this run lacks", [listed(run.lacks)]),
    ]  # fmt: skip
    sections = [(name, title, made) for name, title, pieces in parts if (made := section(name, title, *pieces))]
    to_parts = links((name, title) for name, title, _ in sections)
    head = f"<header><h1>{escape(run.name)}</h1>{_chips(run)}{to_parts}</header>"
    body = [head, warnings_html(warnings_of(run)), cards(results.figures(run)), *(made for _, _, made in sections)]
    return page(f"{run.name}: training report", style(), "\n".join(filter(None, body)))


def _every_chart(run: RunFacts) -> list[Chart]:
    return [
        curves.held_out_chart(run), curves.loss_chart(run), curves.source_chart(run), curves.tasks_chart(run),
        curves.task_losses_chart(run), *curves.other_charts(run),
    ]  # fmt: skip


def _chips(run: RunFacts) -> Markup:
    if run.finished:
        state = chip("finished", "good")
    else:
        of = f" of {run.planned_steps:,}" if run.planned_steps else ""
        state = chip(f"not finished: {run.last_step:,}{of} steps", "bad")
    base = run.report.base if run.report else mapping(run.config.get("model")).get("path")
    lora = mapping(run.config.get("lora"))
    early = run.reported.get("stopped_early")
    about = [
        f"adapter of step {run.kept_step:,.0f}" if run.kept_step is not None else "",
        f"stopped early: {early}" if early else "",
        Path(str(base)).name if base else "",
        f"rank {lora['r']}" if "r" in lora else "",
        f"{run.report.backend.name}, {run.report.dtype}" if run.report else "",
    ]
    return Markup(f'<div class="chips">{state}{"".join(chip(each) for each in about if each)}</div>')


def links(sections: Iterable[tuple[str, str]]) -> Markup:
    """Returns the links to the parts of a page."""
    found = "".join(f'<a href="#{attribute(name)}">{escape(title)}</a>' for name, title in sections)
    return Markup(f'<nav aria-label="parts of this page">{found}</nav>')


def charts(every: Iterable[Chart]) -> Markup:
    """Returns the figures of all charts that have values, side by side where there is room."""
    drawn = "".join(map(draw, every))
    return Markup(f'<div class="charts">{drawn}</div>' if drawn else "")


def warnings_html(found: list[Warn]) -> Markup:
    """Returns the warnings as a list; nothing if there are none."""
    rows = "".join(f"<li><b>{escape(what)}</b>: {escape(meaning)}</li>" for what, meaning in found)
    return Markup(f'<ul class="warnings" aria-label="warnings">{rows}</ul>' if rows else "")


def panel(content: str) -> Markup:
    return Markup(f'<div class="panel">{content}</div>' if content else "")


def remark(text: str) -> Markup:
    return note(text) if text else Markup("")


def listed(texts: list[str]) -> Markup:
    rows = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return Markup(f'<ul class="note">{rows}</ul>' if rows else "")
