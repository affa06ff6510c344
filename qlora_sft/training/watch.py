"""Evaluates a model during training, has the best checkpoint kept, and ends a run that no longer improves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from qlora_sft.config import Config
from qlora_sft.errors import RunError, first_line
from qlora_sft.model.full_memory import free_memory, is_memory_full
from qlora_sft.say import Say
from qlora_sft.training.alarms import Alarms
from qlora_sft.training.evaluations import AskedTasks, EvaluationRow, Evaluations, named
from qlora_sft.training.steps import keeps_best

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class Watch(TrainerCallback):  # type: ignore[misc]
    """Asks the trainer to evaluate when it is time, to save the best so far, and to stop when patience has run out."""

    def __init__(
        self,
        config: Config,
        steps: int,
        evaluations: Evaluations,
        held_out_loss: Callable[[], dict[str, float]],
        alarms: Alarms,
        say: Say,
        ask_tasks: Callable[[], AskedTasks] | None = None,
    ):
        """Takes the number of ``steps`` of the run, its ``evaluations`` so far, and a function that measures the model.

        ask_tasks: asks the model the questions of all tasks.
        """
        self.evaluations, self.held_out_loss, self.alarms, self.say = evaluations, held_out_loss, alarms, say
        self.steps, self.ask_tasks = steps, ask_tasks
        self.every, self.tasks_every = config.evaluation.every_steps, config.evaluation.tasks_every_steps
        self.patience = config.training.patience
        self.keeps_best = keeps_best(config)
        self.saves = bool(config.training.save_steps)
        for number in range(len(evaluations.rows)):
            alarms.evaluated(evaluations.rows[: number + 1], self.keeps_best, quiet=True)

    @property
    def best_step(self) -> int | None:
        """Returns the step whose checkpoint is to be kept; None if none is better than another."""
        best = self.evaluations.best
        return best.step if best and self.keeps_best else None

    @property
    def out_of_patience(self) -> str | None:
        """Returns why the run ends here, or None if it does not."""
        if not self.patience or self.evaluations.since_best < self.patience:
            return None
        best = self.evaluations.best
        since = f"since step {best.step}" if best else "at all"
        worse = "not been better" if self.evaluations.metric.startswith("tasks/") else "not fallen"
        return (
            f"the {named(self.evaluations.metric)} has {worse} {since}, in {self.evaluations.since_best} evaluations "
            f"(training.patience={self.patience})"
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Asks for an evaluation if it is time. The trainer makes it after the step was logged and before a checkpoint,
        so a checkpoint always comes after the evaluation of its step."""
        if self._due(self.every, state.global_step) or self._due(self.tasks_every, state.global_step):
            control.should_evaluate = True

    def _due(self, every: int | None, step: int) -> bool:
        """Says whether something that happens this often is due after ``step``."""
        return every is not None and (step % every == 0 or step == self.steps)

    def measure(self, step: int) -> dict[str, float]:
        """Evaluates the model as it is after ``step``, writes the result down, prints it, and returns it by name."""
        started = time.perf_counter()
        try:
            losses = self.held_out_loss() if self._due(self.every, step) else {}
            asked = self.ask_tasks() if self.ask_tasks and self._due(self.tasks_every, step) else None
        except Exception as error:
            if not is_memory_full(error) and not isinstance(error, RunError):
                raise
            why = str(error) if isinstance(error, RunError) else f"no memory left: {first_line(error)}"
            free_memory()
            self.say(f"step {step}: not evaluated ({why}); training goes on")
            return {}
        row = self.evaluations.add(step, losses, time.perf_counter() - started, asked)
        self.say(f"step {step}: {described(row, self.evaluations.metric)}")
        self.alarms.evaluated(self.evaluations.rows, self.keeps_best)
        figures = {f"eval_held_out/{name}": loss for name, loss in losses.items()}
        figures |= {f"eval_tasks/{name}": figure for name, figure in (row.tasks or {}).items()}
        return {"eval_loss": math.nan if row.mean is None else row.mean, **figures} if losses else figures

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Asks for a checkpoint if this is the best so far, and for an end when patience has run out."""
        if self.best_step == state.global_step:
            control.should_save = True
        if (why := self.out_of_patience) and state.global_step < self.steps:
            self.say(f"stopping after step {state.global_step}: {why}")
            control.should_training_stop = True
            control.should_save = control.should_save or self.saves


def described(row: EvaluationRow, metric: str = "held_out") -> str:
    """Returns the figures of an evaluation as text. metric: what decides which is the best."""
    losses = [f"{name} {loss:.3f}" if loss is not None else f"{name} not finite" for name, loss in row.held_out.items()]
    mean = f", mean {row.mean:.3f}" if row.mean is not None and len(losses) > 1 else ""
    parts = ["held-out loss " + ", ".join(losses) + mean] if losses else []
    of_tasks = metric.startswith("tasks/")
    best = " (the lowest so far)" if metric == "held_out" else f" (the best so far by {named(metric)})"
    if row.best and not of_tasks:
        parts[0] += best
    if row.tasks:
        parts.append("tasks " + ", ".join(f"{name} {figure:.3f}" for name, figure in row.tasks.items()))
    if row.best and of_tasks:
        parts[-1] += best
    return "; ".join(parts)
