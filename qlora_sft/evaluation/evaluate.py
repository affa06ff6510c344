"""Held-out loss and held-out answers of a model at one moment of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_sft.config import Config
from qlora_sft.data.prepare import Prepared
from qlora_sft.evaluation.answers import Prompt, exact_match, judge
from qlora_sft.evaluation.generate import generate
from qlora_sft.evaluation.held_out import held_out_loss
from qlora_sft.evaluation.subject import Subject
from qlora_sft.say import Say


@dataclass
class Evaluation:
    """Held-out results at one moment: source -> loss, source -> exact match, and one record per answer."""

    loss: dict[str, float] = field(default_factory=dict)
    exact_match: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    subject: Subject, config: Config, held_out: Prepared, prompts: list[Prompt], say: Say, when: str
) -> Evaluation:
    """As ``config.evaluation`` asks; prints the figures. The model is left in training mode."""
    model, tokenizer, dtype, stops = subject.model, subject.tokenizer, subject.dtype, subject.style.stop_token_ids
    result = Evaluation()
    if config.evaluation.loss and held_out.documents:
        result.loss = held_out_loss(model, held_out.documents, config.data.max_length, dtype)
        say(f"held-out loss {when}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in result.loss.items()))
    if prompts:
        ids = [prompt.input_ids for prompt in prompts]
        answers = generate(model, tokenizer, ids, config.evaluation.max_new_tokens, dtype, stops)
        result.records = judge(prompts, [answer.ids for answer in answers], tokenizer, stops)
        result.exact_match = exact_match(result.records)
        say(f"exact match {when}: " + ", ".join(f"{name} {share:.0%}" for name, share in result.exact_match.items()))
    return result
