"""The verb ``evaluate``: tasks -> prompts -> the tuned model and its base -> what changed.

The base is the same model with its adapter switched off: same weights in NF4, same template, same questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_sft.config import TaskConfig, check_tasks, task_name
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.evaluation.programs import check_programs
from qlora_sft.evaluation.tasks import Task, read_tasks
from qlora_sft.run.folder import Run, is_run
from qlora_sft.run.report import Report
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from qlora_sft.data.template import ChatFormat
    from qlora_sft.evaluation.ask import Questions, Scores, Subject
    from qlora_sft.evaluation.compare import TaskReport
    from qlora_sft.run_data import SavedText


@dataclass(frozen=True)
class EvaluationReport(Report):
    """What a model, and its base if it was asked, made of every task."""

    model: str
    folder: str
    """Where the figures and the answers stand."""
    tasks: list[TaskReport]


def evaluate_run(
    path: str | Path,
    tasks: Sequence[TaskConfig] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    base: bool = True,
    run_code: bool = False,
    seed: int = 0,
    say: Say = tell,
) -> EvaluationReport:
    """Asks the model of a run (or in a folder) the ``tasks``; default: ``evaluation.tasks`` of the run's configuration.

    settings: fields of `TaskConfig` that replace those of every task.
    base: also the base under the adapter, and compare. run_code: answers to ``code`` tasks may be run. Results stand in
    ``RUN/evaluation/NAME.json`` (figures) and ``NAME.jsonl`` (every answer) as soon as a task is done; those of a task
    that was asked in another way stay.
    Raises `ConfigError` or `DataError` before a model is loaded.
    """
    # ------------------------------------------------------------------ tasks
    path = Path(path).expanduser().resolve()
    run = Run.open(path) if is_run(path) else None
    if run is None and not (path / "config.json").is_file():
        raise ConfigError(f"{path}: neither a run folder (no adapter/) nor a model folder (no config.json)")
    chosen = [_with(task, settings or {}) for task in tasks or _configured_tasks(path, run)]
    _check(chosen)
    read = read_tasks(chosen, seed, say)
    _check_code(read, run_code)
    if run:
        _warn_of_contamination(run, chosen, say)

    # ------------------------------------------------------------------ prompts
    from qlora_sft.evaluation.ask import Subject, encode_task
    from qlora_sft.evaluation.compare import compared, comparison_table
    from qlora_sft.evaluation.results import write_results
    from qlora_sft.model.load import load_for_inference
    from qlora_sft.run_data import saved_text

    text = saved_text(path)
    tokenizer, style = text.tokenizer, _style(text, read)
    limit = _positions(path, run)
    encoded = [encode_task(task, tokenizer, style, text.training_tokenizer, limit) for task in read]
    for questions in encoded:
        _check_room(questions, limit)
        if questions.thoughtless:
            say(
                f"{questions.task.name}: {questions.thoughtless:,} of {len(questions.prompts):,} questions end in an "
                "empty thought, as training writes before answers without reasoning; --thinking on lets the model think"
            )

    # ------------------------------------------------------------------ model
    say("loading the model")
    model = load_for_inference(path)
    subject = Subject(model, tokenizer, style, model.get_input_embeddings().weight.dtype)

    # ------------------------------------------------------------------ ask, compare
    folder = path / "evaluation" if run else path.with_name(f"{path.name}-evaluation")
    reports = []
    for questions in encoded:
        before, after = ask(subject, questions, base and run is not None, seed, say)
        report = compared(questions.task, before, after, seed)
        answers = write_results(folder, report, questions.task, before, after)
        reports.append(replace(report, answers=str(answers)))
    say(comparison_table(reports))
    say(f"figures and answers: {folder}")
    return EvaluationReport(str(path), str(folder), reports)


def ask(subject: Subject, questions: Questions, base: bool, seed: int, say: Say) -> tuple[Scores | None, Scores]:
    """(base, tuned) on one task."""
    from qlora_sft.evaluation.ask import ask_answers, ask_choices, read_texts

    name, form = questions.task.name, questions.task.form
    if form == "loss":
        say(f"{name}: reading {len(questions.documents):,} texts")
        return read_texts(subject, questions, base)
    results: list[Scores] = []
    for who in ("base", "tuned") if base else ("tuned",):
        say(f"{name}: asking the {who} model {len(questions.prompts):,} questions")
        with subject.model.disable_adapter() if who == "base" else nullcontext():
            results.append(
                ask_choices(subject, questions) if form == "choices" else ask_answers(subject, questions, seed)
            )
    return (results[0] if base else None), results[-1]


def _configured_tasks(path: Path, run: Run | None) -> list[TaskConfig]:
    tasks = run.config.evaluation.tasks if run else []
    if not tasks:
        where = f"{path / 'config.yaml'} has no evaluation.tasks" if run else f"{path} is a model folder"
        raise ConfigError(f"no tasks: {where}; name files of questions with --task FILE")
    return tasks


def _with(task: TaskConfig, settings: Mapping[str, Any]) -> TaskConfig:
    """One command line may be for tasks of several forms: what has no effect on one is left to the others."""
    form = settings.get("form") or task.form
    return replace(task, **{k: v for k, v in settings.items() if k != "samples" or form not in ("choices", "loss")})


def _style(text: SavedText, tasks: Sequence[Task]) -> ChatFormat:
    """Plain texts are read without a template, which the tokenizer of a base model may not have."""
    from qlora_sft.data.template import ChatFormat

    if all("text" in item.conversation for task in tasks for item in task.items):
        return ChatFormat("", "plain texts", text.stops)
    try:
        return text.chat_format
    except DataError:
        raise ConfigError("this model has no chat template, so it can only be given plain texts (form: loss)") from None


def _check(tasks: list[TaskConfig]) -> None:
    problems: list[str] = []
    check_tasks(tasks, lambda good, key, text: None if good else problems.append(f"{key} {text}"), "tasks")
    if problems:
        raise ConfigError(problems)


def _check_code(tasks: Sequence[Task], run_code: bool) -> None:
    names = [task.name for task in tasks if task.form == "code"]
    if names and not run_code:
        raise ConfigError(
            f"{', '.join(names)}: graded by running what the model writes, with limits but without a sandbox; "
            "add --run-code where that may be (a container, a machine of its own)"
        )
    if names:
        check_programs()


def _warn_of_contamination(run: Run, tasks: Sequence[TaskConfig], say: Say) -> None:
    checked = run.config.data.decontaminate
    unchecked = [task_name(task) for task in tasks if task.path not in checked]
    if unchecked:
        say(f"training rows were not searched for questions of {', '.join(unchecked)}; data.decontaminate does that")


def _positions(path: Path, run: Run | None) -> int:
    """How many tokens the model takes."""
    from qlora_sft.model.base_files import read_config, text_config
    from qlora_sft.model.rope import context_length

    settings = text_config(read_config(run.base if run else str(path)))
    rope = run.model.rope_scaling if run else None
    return context_length(settings, rope) if rope else settings.get("max_position_embeddings") or 2**31


def _check_room(questions: Questions, limit: int) -> None:
    if questions.longest > limit:
        cure = "leave it out" if questions.letters else "lower max_new_tokens, or leave it out"
        raise ConfigError(
            f"{questions.task.name}: its longest question takes {questions.longest:,} tokens with its answer, the "
            f"model {limit:,}; {cure}"
        )
