"""Asks one model the questions of a task, and grades what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_sft.data.render import Rendered, render_conversation
from qlora_sft.data.template import ChatFormat
from qlora_sft.errors import DataError
from qlora_sft.evaluation.choices import choose, letter_prompts
from qlora_sft.evaluation.drift import Reading, readable
from qlora_sft.evaluation.drift import read as read_document
from qlora_sft.evaluation.generate import Generated, generate
from qlora_sft.evaluation.grade import last_number, said
from qlora_sft.evaluation.programs import program, run_all
from qlora_sft.evaluation.prompt import prompt_of
from qlora_sft.evaluation.statistics import pass_at_k
from qlora_sft.evaluation.subject import Subject
from qlora_sft.evaluation.tasks import Item, Task


@dataclass(frozen=True)
class Questions:
    """A task in token ids. ``prompts``: one per item; ``documents`` in their place where texts are only read."""

    task: Task
    prompts: list[list[int]] = field(default_factory=list)
    letters: list[int] = field(default_factory=list)
    documents: list[Rendered] = field(default_factory=list)
    in_thought: list[bool] = field(default_factory=list)
    """Whether the template opens a thought at the end of the prompt."""
    thoughtless: int = 0
    """Prompts that end in an empty thought although nobody asked for that."""

    @property
    def longest(self) -> int:
        """Tokens that the longest question takes, with its answer."""
        rows = self.prompts or [document.input_ids for document in self.documents]
        answer = 1 if self.letters else self.task.settings.max_new_tokens if self.prompts else 0
        return max(map(len, rows)) + answer


@dataclass
class Scores:
    """Metric -> one figure per item; the weight of each item; one record per item."""

    metrics: dict[str, list[float]]
    weights: list[float]
    records: list[dict[str, Any]]


def encode_task(task: Task, tokenizer: Any, style: ChatFormat, text_tokenizer: Any, limit: int) -> Questions:
    """``text_tokenizer``: the same one with the eos token that ends plain texts; ``limit``: positions of the model.

    Raises `DataError` naming file and line where a question cannot be rendered.
    """
    if task.form == "choices":
        return Questions(task, *letter_prompts(task.items, tokenizer, style))
    if task.form == "loss":
        documents = [_document(item, tokenizer, style, text_tokenizer) for item in task.items]
        kept = [short for document in documents if (short := readable(document, limit))]
        if not kept:
            raise DataError(f"{task.settings.path}: nothing in it is to be predicted")
        return Questions(task, documents=kept)
    prompts = [prompt_of(item, task.settings.thinking, tokenizer, style) for item in task.items]
    tails = [tokenizer.decode(prompt[-8:]).rstrip() for prompt in prompts]
    unasked = ["enable_thinking" not in (item.conversation.get("chat_template_kwargs") or {}) for item in task.items]
    thoughtless = sum(own and tail.endswith("</think>") for own, tail in zip(unasked, tails, strict=True))
    return Questions(task, prompts, in_thought=[tail.endswith("<think>") for tail in tails], thoughtless=thoughtless)


def _document(item: Item, tokenizer: Any, style: ChatFormat, text_tokenizer: Any) -> Rendered:
    plain = "text" in item.conversation
    try:
        return render_conversation(item.conversation, text_tokenizer if plain else tokenizer, chat_format=style)
    except DataError as error:
        raise DataError(f"{item.place}: {error}") from None


# ------------------------------------------------------------------ one function per way of asking


def ask_choices(subject: Subject, questions: Questions) -> Scores:
    items = questions.task.items
    chosen = choose(
        subject.model,
        subject.tokenizer,
        items,
        questions.prompts,
        questions.letters,
        subject.dtype,
        subject.style.stop_token_ids,
    )
    right = [letter == item.reference for (letter, _), item in zip(chosen, items, strict=True)]
    begun = [float(good and first) for good, (_, first) in zip(right, chosen, strict=True)]
    records = [{"answer": letter, "right": good} for (letter, _), good in zip(chosen, right, strict=True)]
    return Scores({"accuracy": list(map(float, right)), "said": begun}, [1.0] * len(items), records)


def ask_answers(subject: Subject, questions: Questions, seed: int) -> Scores:
    """Greedy, or ``samples`` drawn for every question, the same in every run of the same seed."""
    task, settings = questions.task, questions.task.settings
    samples = settings.samples
    repeated = [prompt for prompt in questions.prompts for _ in range(samples)]
    temperature = settings.temperature if samples > 1 else None
    torch.manual_seed(seed)
    given = generate(
        subject.model,
        subject.tokenizer,
        repeated,
        settings.max_new_tokens,
        subject.dtype,
        subject.style.stop_token_ids,
        temperature,
    )
    texts = [decoded(subject.tokenizer, ids, each.ids) for ids, each in zip(repeated, given, strict=True)]
    outcomes = grade_all(task, questions.in_thought, texts)
    scores = Scores({f"pass@{k}": [] for k in powers(samples)}, [1.0] * len(task.items), [])
    scores.metrics |= {"ended": [], "distinct": []}
    for number in range(len(task.items)):
        here = slice(number * samples, (number + 1) * samples)
        _count(scores, given[here], texts[here], outcomes[here])
    return scores


def decoded(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    """The answer behind its prompt: alone, tokenizers that put a space before every text would take one away."""
    anchor = tokenizer.decode(prompt[-1:], clean_up_tokenization_spaces=False)
    text: str = tokenizer.decode([*prompt[-1:], *answer], clean_up_tokenization_spaces=False)
    return text.removeprefix(anchor)


def powers(samples: int) -> list[int]:
    """1, 2, 4, ... up to ``samples``, and ``samples``."""
    return sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})


Outcome = tuple[bool, str, str]
"""(right, what was graded, what was found wrong)."""


def grade_all(task: Task, in_thought: Sequence[bool], texts: Sequence[str]) -> list[Outcome]:
    """Every answer of every item in turn, as many of each as there are."""
    samples = len(texts) // len(task.items)
    answers = [said(text, in_thought[number // samples]) for number, text in enumerate(texts)]
    items = [task.items[number // samples] for number in range(len(texts))]
    if task.form == "code":  # whose indentation counts, also in its first line
        written = [program(answer, item.tests) for answer, item in zip(answers, items, strict=True) if item.tests]
        return [(said == "passed", text, said) for text, said in zip(written, run_all(written), strict=True)]
    answers = [(last_number(answer) or "") if task.form == "number" else answer.strip() for answer in answers]
    return [(answer == item.reference, answer, "") for answer, item in zip(answers, items, strict=True)]


def _count(scores: Scores, given: Sequence[Generated], texts: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    samples, right = len(outcomes), sum(good for good, _, _ in outcomes)
    for metric, figures in scores.metrics.items():
        if metric.startswith("pass@"):
            figures.append(pass_at_k(samples, right, int(metric.removeprefix("pass@"))))
    scores.metrics["ended"].append(sum(each.ended for each in given) / samples)
    scores.metrics["distinct"].append(len({graded for _, graded, _ in outcomes}) / samples)
    found = [fault for _, _, fault in outcomes]
    answers = [
        {"text": text, "right": good, **({"found": fault} if fault else {})}
        for text, (good, _, _), fault in zip(texts, outcomes, found, strict=True)
    ]
    scores.records.append({"answers": answers, "right": right})


def read_texts(subject: Subject, questions: Questions, with_base: bool) -> tuple[Scores | None, Scores]:
    """(base, tuned): both are read in one go, because the distance needs the probabilities of both."""
    read = [read_document(subject.model, each, subject.dtype, with_base) for each in questions.documents]
    tuned = _readings(read, [each.loss for each in read])
    if not with_base:
        return None, tuned
    tuned.metrics["kl"] = [each.kl or 0.0 for each in read]
    return _readings(read, [each.base_loss or 0.0 for each in read]), tuned


def _readings(read: Sequence[Reading], losses: list[float]) -> Scores:
    return Scores({"loss": losses}, [each.weight for each in read], [{"loss": loss} for loss in losses])
