"""Make the curves of a run from what it measured at every step."""

from __future__ import annotations

from collections.abc import Callable

from qlora_sft.json_types import JsonObject, mapping, number, numbers
from qlora_sft.markup.chart import Chart
from qlora_sft.markup.series import MOST_POINTS, Point, Series, present, smoothed, smoothing_window
from qlora_sft.page.facts import RunFacts, step_of
from qlora_sft.run.report import TASK_LOSS
from qlora_sft.units import figure, nats, share


def points_of(run: RunFacts, read: Callable[[JsonObject], float | None]) -> list[Point]:
    """Returns the points of a value that `read` takes from the line of every step."""
    return [(step, read(row)) for step, row in zip(run.step_numbers, run.steps, strict=True)]


def of_key(name: str, scale: float = 1.0) -> Callable[[JsonObject], float | None]:
    """Returns a function that reads the number under ``name`` from the line of a step."""
    return lambda row: found * scale if (found := number(row.get(name))) is not None else None


def tokens_per_second(row: JsonObject) -> float | None:
    """Returns the speed of a step."""
    given, tokens, seconds = (number(row.get(key)) for key in ("tokens_per_second", "tokens", "seconds"))
    return given if given is not None else tokens / seconds if tokens is not None and seconds else None


def smooth_and_raw(name: str, points: list[Point], steps: list[JsonObject], colour: int | None = None) -> list[Series]:
    """Returns a curve of means, and behind it what they are means of; of a short run the curve alone."""
    window = smoothing_window(len(points))
    if window == 1:
        return [Series(name, points, dots=True, colour=colour)]
    weights = [number(row.get("supervised_tokens")) or 0.0 for row in steps]
    if not any(weights):
        weights = [1.0] * len(steps)
    return [
        Series(name, points, faint=True, colour=colour),
        Series(name, smoothed(points, weights, window), colour=colour),
    ]


def loss_chart(run: RunFacts) -> Chart:
    points = points_of(run, of_key("loss"))
    window = smoothing_window(len(points))
    note = f"mean over {window} steps, by supervised tokens; behind it every step" if window > 1 else ""
    return Chart(
        "Training loss", "nats per supervised token", smooth_and_raw("loss", points, run.steps, 0), note,
        marks=marks_of(run), missing=[x for x, y in points if y is None], write=nats, write_tick=figure,
    )  # fmt: skip


def source_chart(run: RunFacts) -> Chart:
    """Returns the training loss by source, where the run kept it."""
    names = list(dict.fromkeys(name for row in run.steps for name in mapping(row.get("source_loss"))))
    window = smoothing_window(len(run.steps))
    weights = [1.0] * len(run.steps)
    series = [
        # A step has no value of a source that it did not see. That is no gap, so such steps are left out.
        Series(name, smoothed(seen, weights[: len(seen)], window))
        for name in names
        if (seen := list[Point](present(points_of(run, _of_source(name)))))
    ]
    note = f"mean over {window} steps" if window > 1 else ""
    return Chart("Training loss by source", "nats per supervised token", series, note, write=nats, write_tick=figure)


def _of_source(name: str) -> Callable[[JsonObject], float | None]:
    return lambda row: number(mapping(row.get("source_loss")).get(name))


def held_out_chart(run: RunFacts) -> Chart:
    names = list(dict.fromkeys(name for _, losses in run.held_out for name in losses))
    series = [Series(name, [(step, losses.get(name)) for step, losses in run.held_out], dots=True) for name in names]
    between = len(run.held_out) > 2
    note = "" if between else "measured before and after training"
    best = best_evaluation(run) if between else None
    marks = [(best, "lowest mean")] if best is not None else []
    if run.kept_step is not None and run.kept_step != best:
        marks.append((run.kept_step, "kept"))
    return Chart(
        "Held-out loss", "nats per supervised token, by source", series, note, marks=marks, write=nats,
        write_tick=figure,
    )  # fmt: skip


def tasks_chart(run: RunFacts) -> Chart:
    """Returns the share of the questions of every task that was answered rightly while the run trained."""
    return Chart("Tasks while training", "share of questions answered rightly", _of_tasks(run, False), write=share)


def task_losses_chart(run: RunFacts) -> Chart:
    """Returns the loss of every task whose texts were only read while the run trained."""
    return Chart("Texts of tasks while training", "nats per token", _of_tasks(run, True), write=nats, write_tick=figure)


def _of_tasks(run: RunFacts, losses: bool) -> list[Series]:
    asked = [(step, numbers(row.get("tasks"))) for row in run.evaluations if (step := step_of(row)) is not None]
    names = dict.fromkeys(name for _, figures in asked for name in figures if name.endswith(TASK_LOSS) == losses)
    return [
        Series(name, [(step, figures[name]) for step, figures in asked if name in figures], dots=True) for name in names
    ]


def best_evaluation(run: RunFacts) -> float | None:
    """Returns the step after the first at which the mean of the held-out losses was lowest; sources count alike."""
    means = [(sum(losses.values()) / len(losses), step) for step, losses in run.held_out if step > 0]
    return min(means)[1] if means else None


def other_charts(run: RunFacts) -> list[Chart]:
    """Returns the curves of rate, gradient, tokens, speed, memory and accuracy, as far as the run kept them."""
    steps = run.steps
    norms = points_of(run, of_key("grad_norm"))
    most = number(mapping(run.config.get("training")).get("max_grad_norm"))
    largest = max((y for _, y in present(norms)), default=0.0)
    clip = [(most, f"cut down to {figure(most)}")] if most is not None and most <= 3 * largest else []
    left_out = [x for x, y in norms if y is None]
    accuracy = points_of(run, of_key("accuracy"))
    speed = points_of(run, tokens_per_second)
    planned = number(mapping(run.plan.get("time")).get("tokens_per_second"))
    return [
        Chart("Learning rate", "", [Series("rate", points_of(run, of_key("learning_rate")))], zero=True),
        Chart(
            "Gradient norm", "before it is cut", smooth_and_raw("norm", norms, steps),
            f"{len(left_out):,} steps were left out, because it was not finite (marked below)" if left_out else "",
            levels=clip, missing=left_out, zero=True,
        ),
        Chart("Right tokens", "share of supervised tokens ranked first", smooth_and_raw("right", accuracy, steps),
              write=share),
        Chart(
            "Tokens per step", "", [
                Series("all", points_of(run, of_key("tokens")), colour=5),
                Series("supervised", points_of(run, of_key("supervised_tokens")), colour=2),
            ], zero=True,
        ),
        Chart(
            "Speed", "tokens per second", smooth_and_raw("speed", speed, steps), zero=True,
            levels=[(planned, "planned")] if planned else [],
        ),
        Chart(
            "Memory", "GiB; the most so far on a GPU, what is resident in the host", [
                Series("GPU", points_of(run, of_key("gpu_peak_bytes", 2**-30))),
                Series("host", points_of(run, of_key("resident_bytes", 2**-30))),
            ], zero=True,
        ),
        Chart("Model FLOPs utilisation", "", smooth_and_raw("MFU", points_of(run, of_key("mfu")), steps), write=share,
              zero=True),
        Chart("Divergence from the base", "nats per supervised token of replay",
              smooth_and_raw("KL", points_of(run, of_key("replay_kl")), steps), zero=True),
        Chart("Penalty on changed weights", "nats (training.ewc)",
              [Series("penalty", points_of(run, of_key("ewc_penalty")))], zero=True),
        Chart("Loss scale", "of float16", [Series("scale", points_of(run, of_key("loss_scale")))]),
    ]  # fmt: skip


def marks_of(run: RunFacts) -> list[tuple[float, str]]:
    """Returns the step after which the run was interrupted and went on."""
    resumed = run.report.resumed_at if run.report else None
    return [(float(resumed), "went on here")] if resumed else []


def drawn_note(run: RunFacts) -> str:
    """Says how a long run was drawn; empty for a short one."""
    if len(run.steps) <= MOST_POINTS:
        return ""
    stretch = len(run.steps) * 2 / MOST_POINTS
    return (
        f"{len(run.steps):,} steps are too many to draw each. Curves show the lowest and the highest value of every "
        f"{figure(stretch)} steps, so that no peak is lost; metrics.jsonl has them all."
    )
