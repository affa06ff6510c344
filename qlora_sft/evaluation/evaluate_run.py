"""Runs the verb ``evaluate``: finds the model and its tasks and checks them; `asking` does the rest.

The base is the same model with its adapter switched off. It has the same NF4 weights, the same template and the same
questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from qlora_sft.config import TaskConfig, check_tasks, task_name
from qlora_sft.errors import ConfigError
from qlora_sft.evaluation.programs import check_programs
from qlora_sft.evaluation.tasks import Task, read_tasks
from qlora_sft.run.folder import Run, is_run
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from qlora_sft.evaluation.compare import EvaluationReport


class TaskSettings(TypedDict, total=False):
    """Holds fields of `TaskConfig` that replace those of every task."""

    form: Literal["auto", "choices", "number", "exact", "code", "refusal", "loss"]
    samples: int
    temperature: float
    max_rows: int
    max_new_tokens: int
    thinking: Literal["auto", "on", "off"]


def evaluate_run(
    path: str | Path,
    tasks: Sequence[TaskConfig] = (),
    settings: TaskSettings | None = None,
    *,
    base: bool = True,
    run_code: bool = False,
    seed: int = 0,
    say: Say = tell,
) -> EvaluationReport:
    """Asks the model of a run, or of a model folder, the questions of ``tasks`` and reports the results.

    tasks: the default is ``evaluation.tasks`` of the run's configuration.
    settings: fields of `TaskConfig` that replace those of every task.
    base: whether the base under the adapter is asked, too, and compared.
    run_code: whether answers to ``code`` tasks may be run.

    As soon as a task is done, its figures are written to ``RUN/evaluation/NAME.json`` and its answers to
    ``NAME.jsonl``. Earlier results that were obtained with other settings are kept.

    Raises `ConfigError` or `DataError` before a model is loaded, and `RunError` if it cannot answer (no memory for a
    question, logits that are not numbers).
    """
    path, run, chosen = _opened(path, tasks, settings)
    read = _read_all(run, chosen, run_code, seed, say)
    from qlora_sft.evaluation.asking import ask_model

    return ask_model(path, run, read, base and run is not None, seed, say)


def diagnose_run(
    path: str | Path,
    tasks: Sequence[TaskConfig] = (),
    settings: TaskSettings | None = None,
    *,
    run_code: bool = False,
    seed: int = 0,
    say: Say = tell,
) -> EvaluationReport:
    """Does what `evaluate_run` does, and asks everything once more behind examples and in other words.

    Harmless questions (``benign``) are asked as well. All together tells forgetting from alignment tax.
    """
    path, run, chosen = _opened(path, tasks, settings)
    if run is None:
        raise ConfigError(f"{path}: a model folder has no base to compare with; diagnose the run that it was made from")
    if all(task.form != "refusal" and task.path != "benign" for task in chosen):
        chosen.append(_with(TaskConfig("benign", form="refusal"), _limits(settings or {})))
    read = _read_all(run, chosen, run_code, seed, say)
    from qlora_sft.evaluation.asking import ask_model
    from qlora_sft.evaluation.diagnose import in_other_ways

    return ask_model(path, run, [*read, *in_other_ways(read, seed)], True, seed, say)


def _opened(
    path: str | Path, tasks: Sequence[TaskConfig], settings: TaskSettings | None
) -> tuple[Path, Run | None, list[TaskConfig]]:
    """Returns the folder, the run in it if it is one, and the tasks with their settings. Raises `ConfigError`."""
    path = Path(path).expanduser().resolve()
    run = Run.open(path) if is_run(path) else None
    if run is None and not (path / "config.json").is_file():
        raise ConfigError(f"{path}: neither a run folder (no adapter/) nor a model folder (no config.json)")
    return path, run, [_with(task, settings or {}) for task in tasks or _configured_tasks(path, run)]


def _read_all(run: Run | None, chosen: list[TaskConfig], run_code: bool, seed: int, say: Say) -> list[Task]:
    """Reads the questions of all tasks. Raises `ConfigError` or `DataError` for all that is wrong with them."""
    _check(chosen)
    read = read_tasks(chosen, seed, say)
    _check_code(read, run_code, say)
    if run:
        _warn_of_contamination(run, chosen, say)
    return read


def _limits(settings: TaskSettings) -> TaskSettings:
    """Returns the settings that hold for harmless questions as well: how many are asked, and how long answers are."""
    kept: TaskSettings = {}
    if "max_rows" in settings:
        kept["max_rows"] = settings["max_rows"]
    if "max_new_tokens" in settings:
        kept["max_new_tokens"] = settings["max_new_tokens"]
    return kept


def _configured_tasks(path: Path, run: Run | None) -> list[TaskConfig]:
    """Returns the tasks of the run's configuration. Raises `ConfigError` if there are none."""
    tasks = run.config.evaluation.tasks if run else []
    if not tasks:
        where = f"{path / 'config.yaml'} has no evaluation.tasks" if run else f"{path} is a model folder"
        raise ConfigError(f"no tasks: {where}; name files of questions with --task FILE")
    return tasks


def _with(task: TaskConfig, settings: TaskSettings) -> TaskConfig:
    """Replaces settings of a task by those of the command line.

    One command line may be for tasks of several forms, so ``samples`` is left out where it has no effect.
    """
    form = settings.get("form") or task.form
    changed = settings.copy()
    if form in ("choices", "loss"):
        changed.pop("samples", None)
    return replace(task, **changed)


def _check(tasks: list[TaskConfig]) -> None:
    problems: list[str] = []
    check_tasks(tasks, lambda good, key, text: None if good else problems.append(f"{key} {text}"), "tasks")
    if problems:
        raise ConfigError(problems)


def _check_code(tasks: Sequence[Task], run_code: bool, say: Say) -> None:
    """Says how the programs that answers are will be shut in.

    Raises `ConfigError` if answers would have to be run and may not be, `RunError` if no program can run here.
    """
    names = [task.name for task in tasks if task.form == "code"]
    if names and not run_code:
        raise ConfigError(
            f"{', '.join(names)}: graded by running what the model writes; add --run-code to allow that. It is run in "
            "a sandbox where bubblewrap is installed or Linux allows namespaces, else with limits only"
        )
    if names:
        sandbox = check_programs()
        listed = ", ".join(names)
        if sandbox.name:
            say(f"{listed}: programs run in a sandbox ({sandbox.name}): no network, none of your files")
        else:
            say(f"{listed}: no sandbox, programs can read your files and use the network ({sandbox.reason})")


def _warn_of_contamination(run: Run, tasks: Sequence[TaskConfig], say: Say) -> None:
    """Names the tasks whose questions were not searched for in the training rows."""
    checked = run.config.data.decontaminate
    unchecked = [task_name(task) for task in tasks if task.path not in checked and task.path != "benign"]
    if unchecked:
        say(f"training rows were not searched for questions of {', '.join(unchecked)}; data.decontaminate does that")
