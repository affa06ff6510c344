"""Asks the configured tasks while a model is trained, with the code of the verb ``evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError
from qlora_sft.evaluation.ask import Questions, encode_task
from qlora_sft.evaluation.asking import ask_task, check_length, positions_of
from qlora_sft.evaluation.compare import compared
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.tasks import read_tasks
from qlora_sft.model.tokenizer import load_tokenizer
from qlora_sft.run.report import TASK_LOSS
from qlora_sft.run_data import RunData
from qlora_sft.say import Say
from qlora_sft.training.evaluations import AskedTasks


def questions_while_training(config: Config, data: RunData, say: Say) -> list[Questions]:
    """Reads the questions that are asked during training: some of every task, each with one answer.

    Raises `ConfigError` or `DataError` for what cannot be asked, before a model is loaded.
    """
    e = config.evaluation
    if not e.tasks_every_steps:
        return []
    settings = [replace(task, max_rows=min(task.max_rows or e.tasks_rows, e.tasks_rows), samples=1) for task in e.tasks]
    tasks = read_tasks(settings, config.seed, say)
    if code := [task.name for task in tasks if task.form == "code"]:
        raise ConfigError(
            f"evaluation.tasks_every_steps: {', '.join(code)} is graded by running what the model writes, which "
            "training does not do; remove it here, and ask it with `qlora-sft evaluate RUN --run-code`"
        )
    # A plain text ends in the base's own eos token.
    own = load_tokenizer(config.model, data.base)
    limit = positions_of(data.base, config.model.rope_scaling)
    encoded = [encode_task(task, data.tokenizer, data.chat_format, own, limit) for task in tasks]
    for questions in encoded:
        check_length(questions, limit)
    return encoded


def asking(evaluated: EvaluatedModel, questions: list[Questions], seed: int) -> Callable[[], AskedTasks] | None:
    """Returns a function that asks the model all ``questions`` and returns the main figure of each task by name; None
    if there are no questions.

    The figure is the share of right answers, for harmless questions the share that was not refused, and for a task that
    only measures a loss that loss.
    """
    if not questions:
        return None

    def ask() -> AskedTasks:
        evaluated.model.eval()  # not all ways of asking do so: the verb has a model that is never trained
        figures, endless = {}, {}
        for each in questions:
            _, scores = ask_task(evaluated, each, False, seed, lambda _: None)
            metric, figure = next(iter(compared(each.task, None, scores, seed).tuned.items()))
            name = f"{each.task.name}{TASK_LOSS}" if metric == "loss" else each.task.name
            figures[name] = 1 - figure if metric == "refused" else figure
            if ended := scores.metrics.get("ended"):
                endless[name] = round(1 - fmean(ended), 4)
        return AskedTasks(figures, {name: share for name, share in endless.items() if share})

    return ask
