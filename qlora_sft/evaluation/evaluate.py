"""Measures held-out loss and held-out answers of a model at one moment of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qlora_sft.config import Config
from qlora_sft.data.prepare import Prepared
from qlora_sft.errors import RunError, first_line
from qlora_sft.evaluation.answers import HeldOutAnswer, Prompt, exact_match, judge
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.evaluation.generate import generate
from qlora_sft.evaluation.held_out import held_out_loss
from qlora_sft.model.full_memory import free_memory, is_memory_full
from qlora_sft.say import Say


@dataclass
class Evaluation:
    """Holds the held-out results of one moment: by source the loss and the exact match, and every answer."""

    loss: dict[str, float] = field(default_factory=dict)
    exact_match: dict[str, float] = field(default_factory=dict)
    records: list[HeldOutAnswer] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    """What was asked for and could not be measured, each with the reason."""
    interrupted: bool = False
    """Whether Ctrl-C ended it."""

    def lack(self, what: str, say: Say) -> None:
        """Notes what could not be measured, and says so."""
        self.lacking.append(what)
        say(f"warning: {what}")


def evaluate(
    evaluated: EvaluatedModel, config: Config, held_out: Prepared, prompts: list[Prompt], say: Say, when: str
) -> Evaluation:
    """Evaluates what ``config.evaluation`` asks for and prints the figures. Leaves the model in training mode.

    What there is no memory for, or is not a finite number, is left out and said: no training is lost for a figure.
    """
    result = Evaluation()
    if config.evaluation.loss and held_out.documents:
        with _left_out_if_full(result, f"held-out loss {when}", say):
            losses = held_out_loss(evaluated.model, held_out.documents, config.data.max_length, evaluated.dtype)
            say(f"held-out loss {when}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
            result.loss = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
            for name in losses.keys() - result.loss.keys():
                result.lack(f"the held-out loss of {name} {when} is not finite; look at its rows with `preview`", say)
    if prompts:
        with _left_out_if_full(result, f"answers {when}", say):
            ids = [prompt.input_ids for prompt in prompts]
            answers = generate(evaluated, ids, config.evaluation.max_new_tokens)
            stop_token_ids = evaluated.chat_format.stop_token_ids
            result.records = judge(prompts, [answer.ids for answer in answers], evaluated.tokenizer, stop_token_ids)
            result.exact_match = exact_match(result.records)
            shares = ", ".join(f"{name} {share:.0%}" for name, share in result.exact_match.items())
            say(f"exact match {when}: {shares}")
    return result


@contextmanager
def _left_out_if_full(result: Evaluation, what: str, say: Say) -> Iterator[None]:
    """Notes in ``result`` that its body has found no memory, in place of raising that. what: what the body measures."""
    try:
        yield
        return
    except Exception as error:
        if not is_memory_full(error) and not isinstance(error, RunError):
            raise
        why = str(error) if isinstance(error, RunError) else f"no memory left: {first_line(error)}"
    free_memory()
    result.lack(f"{what}: not measured ({why}); `qlora-sft evaluate` can measure it when the run is done", say)
