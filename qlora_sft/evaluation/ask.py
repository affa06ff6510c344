"""Asks one model the questions of a task, and grades its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_sft.data.render import Rendered, render_conversation
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError
from qlora_sft.evaluation.benign import refuses
from qlora_sft.evaluation.choices import choose, letter_prompts
from qlora_sft.evaluation.diversity import diversity
from qlora_sft.evaluation.drift import Reading, readable
from qlora_sft.evaluation.drift import read as read_document
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.generate import Drawn, generate
from qlora_sft.evaluation.grade import last_number, said
from qlora_sft.evaluation.kept import Generated, KeptAnswers
from qlora_sft.evaluation.programs import program, run_all
from qlora_sft.evaluation.prompt import prompt_of
from qlora_sft.evaluation.sandbox import choose_sandbox
from qlora_sft.evaluation.statistics import pass_at_k
from qlora_sft.evaluation.tasks import Item, Task
from qlora_sft.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Questions:
    """Holds a task as token ids."""

    task: Task
    prompts: list[list[int]] = field(default_factory=list)
    """One prompt for each item. The list is empty for a task whose texts are only read."""
    letters: list[int] = field(default_factory=list)
    """The token of every letter, for a task of multiple choice."""
    documents: list[Rendered] = field(default_factory=list)
    """The texts of a task that only reads them."""
    in_thought: list[bool] = field(default_factory=list)
    """Whether the template opens a thought at the end of each prompt."""
    unlabelled: list[str] = field(default_factory=list)
    """Where the texts are that are left out, because nothing in them is to be predicted."""
    thoughtless: int = 0
    """How many prompts end in an empty thought although nobody asked for one."""

    @property
    def longest(self) -> int:
        """Returns how many tokens the longest question takes together with its answer."""
        rows = self.prompts or [document.input_ids for document in self.documents]
        answer = 1 if self.letters else self.task.settings.max_new_tokens if self.prompts else 0
        return max(map(len, rows)) + answer


@dataclass
class Scores:
    """Holds what one model achieved on a task, item by item."""

    metrics: dict[str, list[float]]
    """By metric, one figure for each item."""
    weights: list[float]
    """The weight of each item in a mean."""
    records: list[JsonObject]
    """What the file of answers says of each item."""


def encode_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    chat_format: ChatFormat,
    text_tokenizer: PreTrainedTokenizerBase,
    limit: int,
) -> Questions:
    """Renders the questions of a task into token ids.

    ``text_tokenizer`` is the same tokenizer with the eos token that ends plain texts. ``limit`` is the number of
    positions that the model has. Raises `DataError` naming file and line where a question cannot be rendered.
    """
    if task.form == "choices":
        return Questions(task, *letter_prompts(task.items, tokenizer, chat_format))
    if task.form == "loss":
        documents = [readable(_document(item, tokenizer, chat_format, text_tokenizer), limit) for item in task.items]
        kept = [document for document in documents if document is not None]
        if not kept:
            raise DataError(f"{task.settings.path}: it has no token to predict")
        pairs = zip(task.items, documents, strict=True)
        return Questions(task, documents=kept, unlabelled=[item.place for item, document in pairs if document is None])
    prompts = [prompt_of(item, task.settings.thinking, tokenizer, chat_format) for item in task.items]
    tails = [tokenizer.decode(prompt[-8:]).rstrip() for prompt in prompts]
    unasked = ["enable_thinking" not in (item.conversation.get("chat_template_kwargs") or {}) for item in task.items]
    thoughtless = sum(own and tail.endswith("</think>") for own, tail in zip(unasked, tails, strict=True))
    return Questions(task, prompts, in_thought=[tail.endswith("<think>") for tail in tails], thoughtless=thoughtless)


def _document(
    item: Item, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, text_tokenizer: PreTrainedTokenizerBase
) -> Rendered:
    plain = "text" in item.conversation
    try:
        return render_conversation(item.conversation, text_tokenizer if plain else tokenizer, chat_format=chat_format)
    except DataError as error:
        raise DataError(f"{item.place}: {error}") from None


# ------------------------------------------------------------------ one function per way of asking


def ask_choices(evaluated: EvaluatedModel, questions: Questions) -> Scores:
    """Asks questions of multiple choice and compares the likeliest letter of each with the right one."""
    items = questions.task.items
    chosen = choose(
        evaluated.model,
        evaluated.tokenizer,
        items,
        questions.prompts,
        questions.letters,
        evaluated.dtype,
        evaluated.chat_format.stop_token_ids,
    )
    correct = [letter == item.reference for (letter, _), item in zip(chosen, items, strict=True)]
    begun = [float(good and first) for good, (_, first) in zip(correct, chosen, strict=True)]
    records: list[JsonObject] = [
        {"answer": letter, "right": good} for (letter, _), good in zip(chosen, correct, strict=True)
    ]
    return Scores({"accuracy": list(map(float, correct)), "said": begun}, [1.0] * len(items), records)


def ask_answers(evaluated: EvaluatedModel, questions: Questions, seed: int, kept: KeptAnswers | None) -> Scores:
    """Asks every question, but for those whose answers are ``kept``, and grades the answers.

    With one sample a question the answer is greedy; with more, all are drawn, the same ones in every run with ``seed``.
    """
    task, settings = questions.task, questions.task.settings
    samples = settings.samples
    repeated = [prompt for prompt in questions.prompts for _ in range(samples)]
    drawn = Drawn(settings.temperature, seed) if samples > 1 else None
    given = generate(evaluated, repeated, settings.max_new_tokens, drawn, kept)
    texts = [decoded(evaluated.tokenizer, ids, each.ids) for ids, each in zip(repeated, given, strict=True)]
    outcomes = grade_all(task, questions.in_thought, texts)
    figures = ["refused"] if task.form == "refusal" else [f"pass@{k}" for k in powers(samples)]
    scores = Scores({name: [] for name in [*figures, *ABOUT_ANSWERS]}, [1.0] * len(task.items), [])
    for number in range(len(task.items)):
        here = slice(number * samples, (number + 1) * samples)
        _count(scores, given[here], texts[here], outcomes[here])
    scores.metrics |= diversity([each.ids for each in given], samples)
    return scores


def decoded(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int]) -> str:
    """Decodes an answer behind the last token of its prompt.

    Decoded alone, the answer would lose a leading space where the tokenizer puts a space before every text.
    """
    anchor = tokenizer.decode(prompt[-1:], clean_up_tokenization_spaces=False)
    text: str = tokenizer.decode([*prompt[-1:], *answer], clean_up_tokenization_spaces=False)
    return text.removeprefix(anchor)


def powers(samples: int) -> list[int]:
    """Returns the powers of two up to ``samples``, and ``samples`` itself."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


# What is measured of all answers: ended by themselves, unlike the other samples, tokens, tokens said again, and how
# open the next token was.
ABOUT_ANSWERS = ("ended", "distinct", "length", "repetition", "entropy")

Outcome = tuple[bool, str, str]
"""Whether the answer is correct, the text that was graded, and what was found wrong with it."""


def grade_all(task: Task, in_thought: Sequence[bool], texts: Sequence[str]) -> list[Outcome]:
    """Grades the answers of all items. ``texts`` has equally many for each item, those of one item side by side."""
    samples = len(texts) // len(task.items)
    answers = [said(text, in_thought[number // samples]) for number, text in enumerate(texts)]
    items = [task.items[number // samples] for number in range(len(texts))]
    if task.form == "code":  # not stripped, because the indentation of the first line counts
        written = [program(answer, item.tests) for answer, item in zip(answers, items, strict=True) if item.tests]
        ran = run_all(written, sandbox=choose_sandbox())
        return [(said == "passed", text, said) for text, said in zip(written, ran, strict=True)]
    if task.form == "refusal":
        # Nothing behind a thought that was cut off is no refusal: what the answer would have been is not known.
        refused = [
            refuses(answer) and not (text.strip() and not answer.strip() and "</think>" not in text)
            for answer, text in zip(answers, texts, strict=True)
        ]
        return [(not no, answer.strip(), "refused" if no else "") for answer, no in zip(answers, refused, strict=True)]
    answers = [(last_number(answer) or "") if task.form == "number" else answer.strip() for answer in answers]
    return [(answer == item.reference, answer, "") for answer, item in zip(answers, items, strict=True)]


def _count(scores: Scores, given: Sequence[Generated], texts: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Adds the figures and the record of one item to ``scores``."""
    samples, correct = len(outcomes), sum(good for good, _, _ in outcomes)
    for metric, figures in scores.metrics.items():
        if metric.startswith("pass@"):
            figures.append(pass_at_k(samples, correct, int(metric.removeprefix("pass@"))))
    if "refused" in scores.metrics:
        scores.metrics["refused"].append(1 - correct / samples)
    scores.metrics["ended"].append(sum(each.ended for each in given) / samples)
    scores.metrics["length"].append(sum(len(each.ids) for each in given) / samples)
    scores.metrics["entropy"].append(sum(each.entropy for each in given) / samples)
    scores.metrics["repetition"].append(sum(repetition(each.ids) for each in given) / samples)
    scores.metrics["distinct"].append(len({graded for _, graded, _ in outcomes}) / samples)
    found = [fault for _, _, fault in outcomes]
    answers: list[object] = [
        {
            "text": text,
            "right": good,
            **({"found": fault} if fault else {}),
            **({} if each.ended else {"cut_off": True}),
        }
        for text, (good, _, _), fault, each in zip(texts, outcomes, found, given, strict=True)
    ]
    scores.records.append({"answers": answers, "right": correct})


def repetition(ids: Sequence[int]) -> float:
    """Returns the share of an answer's runs of four tokens that stood in it before; near 1 where it goes in circles."""
    runs = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def read_texts(evaluated: EvaluatedModel, questions: Questions, with_base: bool) -> tuple[Scores | None, Scores]:
    """Reads the texts with the tuned model and, if asked, with its base, and returns the scores of (base, tuned).

    Both models read a text in one go, because the distance between them needs the probabilities of both.
    """
    read = [read_document(evaluated.model, each, evaluated.dtype, with_base) for each in questions.documents]
    tuned = _readings(read, [each.loss for each in read])
    if not with_base:
        return None, tuned
    tuned.metrics["kl"] = [each.kl or 0.0 for each in read]
    return _readings(read, [each.base_loss or 0.0 for each in read]), tuned


def _readings(read: Sequence[Reading], losses: list[float]) -> Scores:
    """Makes the scores of one model out of what was read."""
    records: list[JsonObject] = [{"loss": loss, "weight": each.weight} for loss, each in zip(losses, read, strict=True)]
    return Scores({"loss": losses}, [each.weight for each in read], records)
