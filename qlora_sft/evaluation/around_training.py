"""Evaluates the base before training, or takes what was measured then, and the trained model behind the last step."""

from __future__ import annotations

from pathlib import Path

from qlora_sft.config import Config
from qlora_sft.data.prepare import Prepared
from qlora_sft.errors import first_line
from qlora_sft.evaluation.answers import Prompt
from qlora_sft.evaluation.baseline import kept_baseline
from qlora_sft.evaluation.evaluate import Evaluation, evaluate
from qlora_sft.evaluation.evaluated_model import EvaluatedModel
from qlora_sft.say import Say


def evaluate_before(
    run: Path | None, asked: str, evaluated: EvaluatedModel, config: Config, held_out: Prepared, prompts: list[Prompt],
    say: Say,
) -> Evaluation:  # fmt: skip
    """Returns the evaluation of the base that the ``run`` that goes on has kept, or makes it, if
    ``evaluation.before_training`` asks for it. asked: the digest of its questions."""
    kept = kept_baseline(run, asked) if run else None
    if kept or not config.evaluation.before_training:
        return kept or Evaluation()
    return evaluate(evaluated, config, held_out, prompts, say, "before training")


def evaluate_after(
    evaluated: EvaluatedModel, config: Config, held_out: Prepared, prompts: list[Prompt], say: Say
) -> Evaluation:
    """Evaluates the trained model. Whatever goes wrong, Ctrl-C included, costs figures only: it is said, and the run is
    finished without them."""
    result = Evaluation()
    try:
        return evaluate(evaluated, config, held_out, prompts, say, "after training")
    except KeyboardInterrupt:
        why, result.interrupted = "interrupted", True
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
    result.lack(f"evaluation after training: not measured ({why}); `qlora-sft evaluate` can do so", say)
    return result
