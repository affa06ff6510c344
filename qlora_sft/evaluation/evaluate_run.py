"""The verb ``evaluate``: tasks -> prompts -> the tuned model and its base -> what changed.

The base is the same model with its adapter switched off: same weights in NF4, same template, same questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_sft.atomic import written_file
from qlora_sft.config import TaskConfig, check_tasks, load_config, task_name
from qlora_sft.errors import ConfigError
from qlora_sft.evaluation.tasks import Task, read_tasks
from qlora_sft.manifest import read_manifest, write_json
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from qlora_sft.evaluation.ask import Questions, Scores, Subject


def evaluate_run(
    path: str | Path,
    tasks: Sequence[TaskConfig] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    base: bool = True,
    run_code: bool = False,
    seed: int = 0,
    say: Say = tell,
) -> dict[str, Any]:
    """Asks the model of a run (or in a folder) the ``tasks``; default: ``evaluation.tasks`` of the run's configuration.

    settings: fields of `TaskConfig` that replace those of every task.
    base: also the base under the adapter, and compare. run_code: answers to ``code`` tasks may be run. Results stand in
    ``RUN/evaluation/NAME.json`` (figures) and ``NAME.jsonl`` (every answer) as soon as a task is done.
    Raises `ConfigError` or `DataError` before a model is loaded.
    """
    # ------------------------------------------------------------------ tasks
    path = Path(path).expanduser()
    is_run = (path / "adapter").is_dir()
    if not is_run and not (path / "config.json").is_file():
        raise ConfigError(f"{path}: neither a run folder (no adapter/) nor a model folder (no config.json)")
    chosen = [replace(task, **(settings or {})) for task in tasks or _configured_tasks(path, is_run)]
    _check(chosen)
    read = read_tasks(chosen, seed, say)
    _check_code(read, run_code)
    if is_run:
        _warn_of_contamination(path, chosen, say)

    # ------------------------------------------------------------------ prompts
    from transformers import AutoTokenizer

    from qlora_sft.data.template import chat_format
    from qlora_sft.evaluation.ask import Subject, encode_task
    from qlora_sft.evaluation.compare import compared, comparison_table
    from qlora_sft.model.load import load_for_inference, saved_stops

    tokenizer: Any = AutoTokenizer.from_pretrained(path / "adapter" if is_run else path)
    style = chat_format(tokenizer, saved_stops(path, tokenizer))
    encoded = [encode_task(task, tokenizer, style) for task in read]

    # ------------------------------------------------------------------ model
    model = load_for_inference(path)
    _check_room(encoded, model)
    subject = Subject(model, tokenizer, style, model.get_input_embeddings().weight.dtype)

    # ------------------------------------------------------------------ ask, compare
    folder = path / "evaluation" if is_run else path.with_name(f"{path.name}-evaluation")
    reports = []
    for questions in encoded:
        before, after = ask(subject, questions, base and is_run, seed, say)
        report = compared(questions.task, before, after, seed)
        _write(folder, report, questions.task, before, after)
        reports.append(report)
    say(comparison_table(reports))
    say(f"figures and answers: {folder}")
    return {"model": str(path), "folder": str(folder), "tasks": reports}


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


def _configured_tasks(path: Path, is_run: bool) -> list[TaskConfig]:
    tasks = load_config(path / "config.yaml").evaluation.tasks if is_run else []
    if not tasks:
        where = f"{path / 'config.yaml'} has no evaluation.tasks" if is_run else f"{path} is a model folder"
        raise ConfigError(f"no tasks: {where}; name files of questions with --task FILE")
    return tasks


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


def _warn_of_contamination(run: Path, tasks: Sequence[TaskConfig], say: Say) -> None:
    checked = read_manifest(run)["config"]["data"].get("decontaminate") or []
    unchecked = [task_name(task) for task in tasks if task.path not in checked]
    if unchecked:
        say(f"training rows were not searched for questions of {', '.join(unchecked)}; data.decontaminate does that")


def _check_room(encoded: Sequence[Questions], model: Any) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    for questions in encoded:
        if questions.longest > limit:
            raise ConfigError(
                f"{questions.task.name}: its longest question takes {questions.longest:,} tokens with its answer, the "
                f"model {limit:,}; lower max_new_tokens, or leave the question out"
            )


def _write(folder: Path, report: dict[str, Any], task: Task, base: Scores | None, tuned: Scores) -> None:
    rows = []
    # Texts in which nothing is to be predicted are left out, so only questions stand beside their items.
    items = task.items if task.form != "loss" else [None] * len(tuned.records)
    for number, item in enumerate(items):
        row: dict[str, Any] = {"tuned": tuned.records[number]}
        if base is not None:
            row = {"base": base.records[number], **row}
        if item is not None:
            asked = item.conversation["messages"][-1]["content"]
            row = {"place": item.place, "question": asked, "reference": item.reference, **row}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    with written_file(folder / f"{task.name}.jsonl") as beside:
        beside.write_text("".join(rows), encoding="utf-8")
    write_json(folder / f"{task.name}.json", report)
