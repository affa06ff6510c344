"""Tasks -> prompts -> the tuned model and its base -> what changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.evaluation.ask import Questions, Scores, ask_answers, ask_choices, encode_task, read_texts
from qlora_sft.evaluation.compare import EvaluationReport, compared, comparison_table
from qlora_sft.evaluation.results import write_results
from qlora_sft.evaluation.subject import Subject
from qlora_sft.evaluation.tasks import Task
from qlora_sft.model.base_files import read_config, text_config
from qlora_sft.model.load import load_for_inference
from qlora_sft.model.rope import context_length
from qlora_sft.run.folder import Run
from qlora_sft.run_data import SavedText, saved_text
from qlora_sft.say import Say


def ask_model(path: Path, run: Run | None, tasks: Sequence[Task], base: bool, seed: int, say: Say) -> EvaluationReport:
    """Asks the model of ``run``, or in the folder ``path``, and with ``base`` the base under the adapter, too."""
    # ------------------------------------------------------------------ prompts
    text = saved_text(path)
    tokenizer, style = text.tokenizer, _style(text, tasks)
    limit = _positions(path, run)
    encoded = [encode_task(task, tokenizer, style, text.training_tokenizer, limit) for task in tasks]
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
        before, after = ask_task(subject, questions, base, seed, say)
        report = compared(questions.task, before, after, seed)
        answers = write_results(folder, report, questions.task, before, after)
        reports.append(replace(report, answers=str(answers)))
    say(comparison_table(reports))
    say(f"figures and answers: {folder}")
    return EvaluationReport(str(path), str(folder), reports)


def ask_task(subject: Subject, questions: Questions, base: bool, seed: int, say: Say) -> tuple[Scores | None, Scores]:
    """(base, tuned) on one task."""
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


def _style(text: SavedText, tasks: Sequence[Task]) -> ChatFormat:
    """Plain texts are read without a template, which the tokenizer of a base model may not have."""
    if all("text" in item.conversation for task in tasks for item in task.items):
        return ChatFormat("", "plain texts", text.stop_token_ids)
    try:
        return text.chat_format
    except DataError:
        raise ConfigError("this model has no chat template, so it can only be given plain texts (form: loss)") from None


def _positions(path: Path, run: Run | None) -> int:
    """How many tokens the model takes."""
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
