"""Convert when held-out rows are measured while a run trains, how long it waits for better ones, and what it keeps."""

from __future__ import annotations

from qlora_sft.convert.pieces import Converted, text
from qlora_sft.json_types import JsonObject

BY_STEPS = "evaluation.every_steps counts optimizer steps; held-out rows are measured before and after training"
NOT_MEASURED = "needs evaluation.every_steps, the steps between measurements of the held-out loss"
BY_LOSS = "the held-out loss decides here which step is kept and when a run ends"


def move_evaluation(given: JsonObject, made: Converted, *, patience: str, by_steps: bool, best: bool) -> None:
    """Moves evaluation while training; call it when the held-out data is known.

    patience: their key for it. by_steps, best: whether a number of steps alone asks for evaluation, and whether the
    best step is kept, where they do not say it.
    """
    strategy = eval_strategy(given, "steps" if by_steps else "no")
    for key in ("eval_strategy", "evaluation_strategy"):
        given.pop(key, None)
    every = given.pop("eval_steps", None)
    if not every and not by_steps:
        every = given.get("logging_steps")
    measured = strategy == "steps" and _every(every, made)
    if strategy not in ("steps", "no"):
        made.note("eval_strategy", strategy, BY_STEPS)
    _patience(given, made, patience, measured)
    keep = given.pop("load_best_model_at_end", best)
    if measured and not keep:
        made.put("training.keep", "last")
    elif keep and not measured and not best:
        made.note("load_best_model_at_end", keep, NOT_MEASURED)
    metric = text("metric_for_best_model", given.pop("metric_for_best_model", "loss"))
    given.pop("greater_is_better", None)
    if metric not in ("loss", "eval_loss"):
        made.note("metric_for_best_model", metric, BY_LOSS)


def eval_strategy(given: JsonObject, default: str) -> str:
    """Returns when theirs evaluates: no, steps or epoch. YAML reads a bare ``no`` as false."""
    value = given.get("eval_strategy", given.get("evaluation_strategy", default))
    return "no" if value is False else text("eval_strategy", value)


def _every(every: object, made: Converted) -> bool:
    """Moves the steps between measurements, and says whether they could be had."""
    if every is None:
        return False
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        made.note("eval_steps", every, BY_STEPS)
    elif not (made.held_out or "held_out" in made.sections.get("data", {})):
        made.note("eval_steps", every, "no data is held out; name some (data.held_out) and set evaluation.every_steps")
    else:
        made.put("evaluation.every_steps", every)
        return True
    return False


def _patience(given: JsonObject, made: Converted, key: str, measured: bool) -> None:
    value = given.pop(key, None)
    if value is None:
        return
    if measured:
        made.put("training.patience", value)
    else:
        made.note(key, value, NOT_MEASURED)
