"""Asks a tuned model and its base the questions of all tasks, and compares the two."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from qlora_sft.atomic import write_json
from qlora_sft.config import RopeScaling
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import ConfigError, DataError
from qlora_sft.evaluation.ask import Questions, Scores, ask_answers, ask_choices, encode_task, read_texts
from qlora_sft.evaluation.compare import EvaluationReport, compared, comparison_table, diversity_table
from qlora_sft.evaluation.diagnose import diagnosed, diagnosis_text
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.results import DIAGNOSIS, write_results
from qlora_sft.evaluation.tasks import Task
from qlora_sft.evaluation.unfinished import FOLDER, Unfinished, digest_of
from qlora_sft.model.base_files import read_config, text_config
from qlora_sft.model.load import load_for_inference
from qlora_sft.model.rope import context_length
from qlora_sft.model.run_base import described_base
from qlora_sft.run.folder import Run
from qlora_sft.run_data import SavedText, saved_text
from qlora_sft.say import Say


def ask_model(path: Path, run: Run | None, tasks: Sequence[Task], base: bool, seed: int, say: Say) -> EvaluationReport:
    """Asks the model of ``run``, or the model in the folder ``path``, every task and writes the results.

    With ``base`` the base under the adapter is asked, too, and the two are compared.
    """
    # ------------------------------------------------------------------ prompts
    text = saved_text(path)
    tokenizer, chat_format = text.tokenizer, _chat_format(text, tasks)
    limit = _positions(path, run)
    encoded = [encode_task(task, tokenizer, chat_format, text.training_tokenizer, limit) for task in tasks]
    too_long = [each for each in encoded if each.task.asks_again is not None and each.longest > limit]
    if too_long:
        say(f"left out, longer than the model's {limit:,} tokens: {', '.join(each.task.name for each in too_long)}")
        encoded = [each for each in encoded if each not in too_long]
    for questions in encoded:
        check_length(questions, limit)
        if questions.unlabelled:
            say(
                f"{questions.task.name}: {len(questions.unlabelled):,} of {len(questions.task.items):,} texts left "
                f"out, because they have no token to predict (first {questions.unlabelled[0]})"
            )
        if questions.thoughtless:
            say(
                f"{questions.task.name}: {questions.thoughtless:,} of {len(questions.prompts):,} questions end in an "
                "empty thought, as training writes before answers without reasoning; --thinking on lets the model think"
            )

    # ------------------------------------------------------------------ model
    say("loading the model")
    model = load_for_inference(path)
    evaluated = EvaluatedModel(model, tokenizer, chat_format, model.get_input_embeddings().weight.dtype)

    # ------------------------------------------------------------------ ask, compare
    folder = path / "evaluation" if run else path.with_name(f"{path.name}-evaluation")
    unfinished = Unfinished(folder / FOLDER, digest_of(path, run))
    reports = []
    try:
        for questions in encoded:
            of_base, of_tuned = ask_task(evaluated, questions, base, seed, say, unfinished)
            report = compared(questions.task, of_base, of_tuned, seed)
            answers = write_results(folder, report, questions, of_base, of_tuned)
            reports.append(replace(report, answers=str(answers)))
    except KeyboardInterrupt:
        if any(file.is_file() for file in unfinished.files):
            say("the answers so far are kept; the same command continues with them")
        raise
    say(comparison_table(reports))
    diagnosis = diagnosed(reports)
    if diagnosis is not None:
        say(diagnosis_text(diagnosis))
        if any(report.asks_again is not None for report in reports):
            say(diversity_table([report for report in reports if report.asks_again is None]))
            write_json(folder / DIAGNOSIS, {**diagnosis.to_json(), "tasks": [report.name for report in reports]})
    unfinished.remove()
    say(f"figures and answers: {folder}")
    return EvaluationReport(str(path), str(folder), reports, diagnosis)


def ask_task(
    evaluated: EvaluatedModel,
    questions: Questions,
    base: bool,
    seed: int,
    say: Say,
    unfinished: Unfinished | None = None,
) -> tuple[Scores | None, Scores]:
    """Asks one task and returns the scores of (base, tuned). The first is None without ``base``.

    Answers that are ``unfinished`` are taken from an evaluation that was interrupted, and new ones are kept there.
    """
    name, form = questions.task.name, questions.task.form
    if form == "loss":
        say(f"{name}: reading {len(questions.documents):,} texts")
        return read_texts(evaluated, questions, base)
    results: list[Scores] = []
    for who in ("base", "tuned") if base else ("tuned",):
        say(f"{name}: asking the {who} model {len(questions.prompts):,} questions")
        with evaluated.model.disable_adapter() if who == "base" else nullcontext():
            if form == "choices":
                results.append(ask_choices(evaluated, questions))
                continue
            kept = unfinished.answers(evaluated, questions, who, seed) if unfinished else None
            if kept is not None and (count := len(kept.read())):
                say(f"{name}: {count:,} answers are kept from an evaluation that was interrupted")
            results.append(ask_answers(evaluated, questions, seed, kept))
    return (results[0] if base else None), results[-1]


def _chat_format(text: SavedText, tasks: Sequence[Task]) -> ChatFormat:
    """Returns the chat format of the model.

    Where all tasks are plain texts, it has no template, because the tokenizer of a base model may not have one either.
    """
    if all("text" in item.conversation for task in tasks for item in task.items):
        return ChatFormat("", "plain texts", text.stop_token_ids)
    try:
        return text.chat_format
    except DataError:
        raise ConfigError("this model has no chat template, so it can only be given plain texts (form: loss)") from None


def _positions(path: Path, run: Run | None) -> int:
    """Returns how many positions the model of a run, or the model in the folder ``path``, has."""
    return positions_of(described_base(run), run.model.rope_scaling) if run else positions_of(str(path), None)


def positions_of(base: str, rope: RopeScaling | None) -> int:
    """Returns how many positions the model in the folder ``base`` has, extended as ``rope`` says."""
    settings = text_config(read_config(base))
    return context_length(settings, rope) if rope else settings.get("max_position_embeddings") or 2**31


def check_length(questions: Questions, limit: int) -> None:
    """Raises `ConfigError` if the longest question and its answer have more tokens than the model has positions."""
    if questions.longest > limit:
        cure = "leave it out" if questions.letters else "lower max_new_tokens, or leave it out"
        raise ConfigError(
            f"{questions.task.name}: its longest question takes {questions.longest:,} tokens with its answer, the "
            f"model {limit:,}; {cure}"
        )
