"""Measures held-out loss and held-out answers of a model at one moment of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from qlora_sft.config import Config
from qlora_sft.data.prepare import Prepared
from qlora_sft.evaluation.answers import HeldOutAnswer, Prompt, exact_match, judge
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.generate import generate
from qlora_sft.evaluation.held_out import held_out_loss
from qlora_sft.say import Say


@dataclass
class Evaluation:
    """Holds the held-out results of one moment: by source the loss and the exact match, and every answer."""

    loss: dict[str, float] = field(default_factory=dict)
    exact_match: dict[str, float] = field(default_factory=dict)
    records: list[HeldOutAnswer] = field(default_factory=list)


def evaluate(
    evaluated: EvaluatedModel, config: Config, held_out: Prepared, prompts: list[Prompt], say: Say, when: str
) -> Evaluation:
    """Evaluates what ``config.evaluation`` asks for and prints the figures. Leaves the model in training mode."""
    result = Evaluation()
    if config.evaluation.loss and held_out.documents:
        result.loss = held_out_loss(evaluated.model, held_out.documents, config.data.max_length, evaluated.dtype)
        say(f"held-out loss {when}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in result.loss.items()))
    if prompts:
        ids = [prompt.input_ids for prompt in prompts]
        answers = generate(evaluated, ids, config.evaluation.max_new_tokens)
        stop_token_ids = evaluated.chat_format.stop_token_ids
        result.records = judge(prompts, [answer.ids for answer in answers], evaluated.tokenizer, stop_token_ids)
        result.exact_match = exact_match(result.records)
        say(f"exact match {when}: " + ", ".join(f"{name} {share:.0%}" for name, share in result.exact_match.items()))
    return result
