"""Define the evaluation section of the configuration, its tasks, and what of them makes no sense together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from qlora_sft.config_data import DataConfig, Require, SourceConfig, held_out_shares, held_out_sources, source_name
from qlora_sft.config_training import TrainingConfig
from qlora_sft.ranges import Count, CountOrNone, Range
from qlora_sft.strict import did_you_mean, range_faults


@dataclass(frozen=True)
class TaskConfig:
    """Describes questions with known answers, which ``qlora-sft evaluate`` asks."""

    path: str
    """A path, as for a data source. The split of a Hub data set is given in brackets: ``owner/name[test]``. ``benign``
    is a shipped list of harmless questions, for ``refusal``."""
    name: str | None = None
    """Name in reports; default: the last part of the path without its extension."""
    form: Literal["auto", "choices", "number", "exact", "code", "refusal", "loss"] = "auto"
    """How answers are graded. ``choices`` takes the likeliest letter (rows like those of MMLU and ARC); ``number``
    compares the last number (GSM8K); ``exact`` compares the text; ``code`` runs the answer (HumanEval); ``refusal``
    counts refusals of harmless questions; ``loss`` measures the loss of the rows without asking. ``auto`` decides by
    the columns and prints what it found."""
    max_rows: Count | None = None
    """Asks only this many questions, drawn at random with the seed of the evaluation."""
    shots: Annotated[int, Range(0, 100)] = 0
    """Examples with their answers before every question, drawn from the other questions of the task."""
    phrasing: Literal["plain", "labelled", "polite"] = "plain"
    """``plain`` asks as the file does; ``labelled`` writes Question: and Answer: around it; ``polite`` asks for help
    first. What a model can do should not depend on this."""
    samples: Annotated[int, Range(1, 10_000)] = 1
    """Answers per question. One is greedy; several are sampled and give pass@k up to that k."""
    temperature: Annotated[float, Range(0, 100, above=True)] = 0.8
    """Temperature of sampled answers."""
    max_new_tokens: Count = 512
    """Most tokens of an answer; longer ones are cut off."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """``on`` and ``off`` set ``enable_thinking`` of the template for rows that do not set it. ``auto`` prompts as
    training would have shown the row with its reference: without reasoning if the reference has none."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Says what is measured on held-out data before, while and after training."""

    loss: bool = True
    """Measures the held-out loss per source before and after training."""
    before_training: bool = True
    """Also measures before training what is measured after it; false saves that time and leaves nothing to compare
    with."""
    every_steps: Count | None = None
    """Optimizer steps between measurements of the held-out loss while training, each a line of ``evaluations.jsonl``;
    the last step is measured, too. Default: only before and after training."""
    answers: CountOrNone = 3
    """Greedy answers per held-out source, before and after training; 0 for none."""
    max_new_tokens: Count = 128
    """Most tokens of one of these answers; longer ones are cut off."""
    show: CountOrNone = 3
    """How many of the answers are printed."""
    tasks: list[TaskConfig] = field(default_factory=list)
    """Questions that ``qlora-sft evaluate`` asks the finished run and its base. They are asked during training only if
    ``tasks_every_steps`` is set."""
    tasks_every_steps: Count | None = None
    """Asks some questions of every task each time this many optimizer steps are done, and after the last step. Default:
    never."""
    tasks_rows: Count = 100
    """Questions of each task that are asked while training, drawn with the seed; each gets one greedy answer."""


def check_tasks(tasks: list[TaskConfig], require: Require, key: str = "evaluation.tasks") -> None:
    """Requires that every task is in its ranges and that no two have one name."""
    for i, task in enumerate(tasks):
        here = f"{key}.{i}"
        for name, fault in range_faults(task):  # a task may come from the command line
            require(False, f"{here}.{name}", fault)
        sampled = task.form not in ("choices", "loss")
        require(sampled or task.samples == 1, f"{here}.samples", f"has no effect with form {task.form}; remove it")
        asked = task.form != "loss"
        require(asked or task.shots == 0, f"{here}.shots", "has no effect with form loss; remove it")
        require(asked or task.phrasing == "plain", f"{here}.phrasing", "has no effect with form loss; remove it")
        referenced = task.form not in ("code", "refusal") or task.shots == 0
        require(referenced, f"{here}.shots", f"needs answers to show, and form {task.form} has none; remove it")
    names = [task_name(task) for task in tasks]
    double = sorted({name for name in names if names.count(name) > 1})
    require(not double, key, f"has two tasks named {', '.join(double)}; give each its own name:")


def task_name(task: TaskConfig) -> str:
    """Returns the name that reports give a task: its own, or the last part of its path.

    ``a/b.jsonl`` gives b, ``a/b:c[test]`` gives b-c.
    """
    path, _, configuration = task.path.partition("[")[0].partition(":")
    if path == "demo":
        path, configuration = configuration, ""
    return task.name or source_name(SourceConfig(path)) + (f"-{configuration}" if configuration else "")


def check_watch(t: TrainingConfig, data: DataConfig, e: EvaluationConfig, require: Require) -> None:
    """Requires that what is to be decided by the held-out loss while training is measured while training."""
    key = "evaluation.every_steps"
    held_out = bool(held_out_sources(data) or held_out_shares(data))
    require(not e.every_steps or held_out, key, "measures held-out rows, and data.held_out names none")
    require(not e.every_steps or e.loss, key, "has no effect with evaluation.loss=false; remove one of them")
    of_task = t.best_metric.startswith("tasks/")
    every = e.tasks_every_steps if of_task else e.every_steps
    needs = f"needs {key}, the steps between measurements of the held-out loss"
    if of_task:
        needs = "needs evaluation.tasks_every_steps, the steps between the times at which tasks are asked"
    require(t.keep != "best" or bool(every), "training.keep=best", needs)
    require(not t.patience or bool(every), "training.patience", needs)
    require(t.best_metric == "held_out" or bool(every), "training.best_metric", needs)
    sources = [*map(source_name, held_out_sources(data)), *held_out_shares(data)]
    metrics = ["held_out", *(f"held_out/{name}" for name in sources), *(f"tasks/{task_name(each)}" for each in e.tasks)]
    known = f"is none of {', '.join(metrics)}{did_you_mean(t.best_metric, metrics)}, got {t.best_metric!r}"
    require(t.best_metric in metrics, "training.best_metric", known)
    key = "evaluation.tasks_every_steps"
    require(not e.tasks_every_steps or bool(e.tasks), key, "asks the questions of evaluation.tasks, and there are none")
