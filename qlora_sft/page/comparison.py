"""Make the page that compares runs: their curves over each other, differing settings and results side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from qlora_sft.json_types import JsonObject, numbers
from qlora_sft.markup.chart import Chart
from qlora_sft.markup.elements import note, page, section, table
from qlora_sft.markup.series import Point, Series, smoothed, smoothing_window
from qlora_sft.markup.style import style
from qlora_sft.markup.text import escape, shortened
from qlora_sft.page.curves import of_key, points_of, tokens_per_second
from qlora_sft.page.facts import RunFacts
from qlora_sft.page.run_page import charts, links, listed, panel
from qlora_sft.page.settings import flat, written
from qlora_sft.page.tasks import DESCRIBING, NO_SHARES
from qlora_sft.units import duration, figure, nats, share

Write = Callable[[float | None], str]


def comparison_page(runs: Sequence[RunFacts]) -> str:
    """Returns the page that compares ``runs``."""
    names = names_of(runs)
    results = [[what, *map(write, values)] for what, values, write in result_rows(runs)]
    differing = [
        [key, *(shortened(written(value), 500) for value in values)] for key, values in differing_settings(runs)
    ]
    settings = (
        table(["setting", *names], differing, left=1 + len(runs)) if differing else note("All settings are the same.")
    )
    parts = [
        ("results", "Results", [panel(table(["", *names], results)), *map(note, _cautions(runs))]),
        ("settings", "Differing settings", [panel(settings)]),
        ("curves", "Curves", [charts(_charts(runs, names))]),
        ("lacks", "What these runs lack", [listed([text for run in runs for text in run.lacks])]),
    ]
    sections = [(name, title, made) for name, title, pieces in parts if (made := section(name, title, *pieces))]
    title = f"{len(runs)} runs compared"
    places = "".join(
        f"<li>{escape(name)}: <small>{escape(run.path)}</small></li>" for name, run in zip(names, runs, strict=True)
    )
    head = f"<header><h1>{title}</h1><ul>{places}</ul>{links((name, text) for name, text, _ in sections)}</header>"
    return page(title, style(), "\n".join([head, *(made for _, _, made in sections)]))


def names_of(runs: Sequence[RunFacts]) -> list[str]:
    """Returns a name for each run: that of its folder, or its path where several folders have one name."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def differing_settings(runs: Sequence[RunFacts]) -> list[tuple[str, list[object]]]:
    """Returns the settings in which the runs differ, but for the run folder, each with the value of every run."""
    trees = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    found = [(key, [tree.get(key) for tree in trees]) for key in keys if key != "output"]
    return [(key, values) for key, values in found if any(value != values[0] for value in values)]


def result_rows(runs: Sequence[RunFacts]) -> list[tuple[str, list[float | None], Write]]:
    """Returns the results: what, the figure of every run, and how it is written."""
    rows: list[tuple[str, list[float | None], Write]] = []

    def add(what: str, read: Callable[[RunFacts], float | None], write: Write = nats) -> None:
        values = [read(run) for run in runs]
        if any(value is not None for value in values):
            rows.append((what, values, write))

    add("steps", lambda run: float(run.last_step), _count)
    add("training loss, first", lambda run: run.report.train_loss.first if run.report else None)
    add("training loss, last", lambda run: run.report.train_loss.last if run.report else _last(run.losses))
    for name in dict.fromkeys(name for run in runs for _, losses in run.held_out for name in losses):
        add(f"held-out loss, {name}, before", partial(_held_out, source=name, place=0))
        add(f"held-out loss, {name}, at the end", partial(_held_out, source=name, place=-1))
    for name in dict.fromkeys(name for run in runs if run.report for name in run.report.exact_match):
        add(f"exact answers, {name}, after", partial(_matched, source=name), share)
    for task, metric in dict.fromkeys(
        (str(each.get("name")), metric) for run in runs for each in run.tasks for metric in numbers(each.get("tuned"))
    ):
        if metric not in DESCRIBING:
            write = nats if metric in NO_SHARES else share
            add(f"{task}, {metric}", partial(_answered, task=task, metric=metric), write)
    add("tokens", lambda run: float(run.report.tokens) if run.report else _sum(run, "tokens"), _count)
    add("supervised tokens", lambda run: float(run.report.supervised_tokens) if run.report else None, _count)
    add("tokens per second", lambda run: run.report.tokens_per_second if run.report else None, _count)
    add("training time", lambda run: _sum(run, "seconds"), lambda value: "–" if value is None else duration(value))
    return rows


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _held_out(run: RunFacts, source: str, place: int) -> float | None:
    """Returns the held-out loss of a source before training (``place`` 0), or at the end (-1): there that of the
    adapter that was kept, of which the answers are, too."""
    kept = run.report.loss.get(source) if run.report else None
    if kept and place == -1:
        return kept.after
    measured = [losses for _, losses in run.held_out]
    only_before = bool(run.held_out) and run.held_out[-1][0] == 0 and run.last_step > 0
    if not measured or (place == 0 and run.held_out[0][0] != 0) or (place == -1 and only_before):
        return None
    return measured[place].get(source)


def _matched(run: RunFacts, source: str) -> float | None:
    pair = run.report.exact_match.get(source) if run.report else None
    return pair.after if pair else None


def _answered(run: RunFacts, task: str, metric: str) -> float | None:
    return next((numbers(each.get("tuned")).get(metric) for each in run.tasks if str(each.get("name")) == task), None)


def _sum(run: RunFacts, key: str) -> float | None:
    values = [value for row in run.steps if (value := of_key(key)(row)) is not None]
    return sum(values) if values else None


def _cautions(runs: Sequence[RunFacts]) -> list[str]:
    """Returns why figures of these runs may not be compared."""
    found = []
    asked = {str(run.before["question"]) for run in runs if run.before.get("question")}
    if len(asked) > 1:
        found.append(
            "The held-out data, or what was asked of it, differs: losses and answers do not compare one to one."
        )
    bases = {run.report.base_sha256 for run in runs if run.report and run.report.base_sha256}
    if len(bases) > 1:
        found.append("The base models differ: a loss per token compares only between models with one tokenizer.")
    digests = {task["questions"] for run in runs for task in run.tasks if "questions" in task}
    names = {str(task.get("name")) for run in runs for task in run.tasks}
    if len(digests) > len(names):
        found.append("Tasks of one name asked different questions.")
    return found


def _charts(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Chart]:
    """Returns the curves of all runs over each other, smoothed."""

    def overlaid(read: Callable[[JsonObject], float | None], smooth: bool = True) -> list[Series]:
        drawn = _smooth if smooth else list
        return [
            Series(name, drawn(points_of(run, read)), dots=len(run.steps) < 12, colour=number)
            for number, (name, run) in enumerate(zip(names, runs, strict=True))
        ]

    sources = dict.fromkeys(name for run in runs for _, losses in run.held_out for name in losses)
    held_out = [
        Chart(
            f"Held-out loss, {source}", "nats per supervised token",
            [
                Series(name, [(step, losses.get(source)) for step, losses in run.held_out], dots=True, colour=number)
                for number, (name, run) in enumerate(zip(names, runs, strict=True))
            ],
            write=nats, write_tick=figure,
        )
        for source in sources
    ]  # fmt: skip
    windows = [smoothing_window(len(run.steps)) for run in runs]
    smooth = f"means over {' and '.join(map(str, dict.fromkeys(windows)))} steps" if max(windows) > 1 else ""
    return [
        Chart(
            "Training loss",
            "nats per supervised token",
            overlaid(of_key("loss")),
            smooth,
            write=nats,
            write_tick=figure,
        ),
        *held_out,
        Chart("Learning rate", "", overlaid(of_key("learning_rate"), smooth=False), zero=True),
        Chart("Gradient norm", "", overlaid(of_key("grad_norm")), smooth, zero=True),
        Chart("Speed", "tokens per second", overlaid(tokens_per_second), smooth, zero=True),
    ]


def _smooth(points: list[Point]) -> list[Point]:
    return smoothed(points, [1.0] * len(points), smoothing_window(len(points)))
