"""Runs the optimizer steps of a run, from the first one or from a checkpoint, to the last one."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_sft.config import Config
from qlora_sft.config_data import source_name
from qlora_sft.data.collate import PackedCollator
from qlora_sft.data.documents import sizes
from qlora_sft.data.render import Rendered
from qlora_sft.errors import Interrupted, RunError
from qlora_sft.evaluation.held_out import held_out_loss
from qlora_sft.model.full_memory import is_gpu_full
from qlora_sft.run.report import Course, Kept
from qlora_sft.say import Say
from qlora_sft.training.alarms import Alarms
from qlora_sft.training.checkpoints import clear_unfinished, folder_of, step_of, what_is_left
from qlora_sft.training.display import Display
from qlora_sft.training.evaluations import AskedTasks, Evaluations, cost_of, named
from qlora_sft.training.groups import may_decay_rows
from qlora_sft.training.guards import FiniteSteps, update_too_full
from qlora_sft.training.interrupt import StopAfterStep
from qlora_sft.training.join import join_ranks
from qlora_sft.training.losses import summarize_losses
from qlora_sft.training.progress import Progress
from qlora_sft.training.reporting import reporters
from qlora_sft.training.schedule import describe_schedule, schedule_of
from qlora_sft.training.steps import count_steps, deal, describe_deal
from qlora_sft.training.trainer import PackedSFTTrainer, sft_config
from qlora_sft.training.watch import Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

    from qlora_sft.model.base import CausalModel
    from qlora_sft.model.ewc import Anchors
    from qlora_sft.model.memory import Memory


@dataclass(frozen=True)
class Training:
    """Holds what is trained, the data it is trained on, and where the results are kept."""

    config: Config
    run: Path
    say: Say
    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    documents: Sequence[Rendered]
    sequences: list[list[int]]
    """Packed sequences in training order, as indices into ``documents``."""
    shares_prefixes: bool = False
    held_out: Mapping[str, Sequence[Rendered]] = field(default_factory=dict)
    """Documents by source that are measured while training."""
    baseline: Mapping[str, float] = field(default_factory=dict)
    """Their loss before training, where it was measured."""
    baseline_seconds: float = 0.0
    """Time that the evaluation before training took."""
    ask_tasks: Callable[[], AskedTasks] | None = None
    """Asks the model the questions that are asked while training; None if there are none."""
    anchors: Anchors | None = None
    """What training.ewc keeps the weights near to."""

    def describe(self, step: int) -> str:
        """Says where to look for the examples that the step of this number, counted from 0, learns from."""
        return sources_of(step, self.config, self.documents, self.sequences)


@dataclass(frozen=True)
class Fitted:
    """Holds the steps, losses and speed of a finished run. `RunReport` has the same fields."""

    steps: int
    steps_left_out: int
    resumed_at: int | None
    kept: Kept
    stopped_early: str | None
    warnings: list[str]
    train_loss: Course
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    optimizer: str
    processes: int


def fit(training: Training, keep_less: Callable[[str], bool], checkpoint: Path | None = None) -> Fitted:
    """Trains from the beginning, or from ``checkpoint`` if there is one, and returns what was measured.

    Of several processes the first one runs this: it measures, prints and writes. The others run `train_along`.

    keep_less: called with the reason when the GPU is full. It makes every layer keep less, and returns False if the
    layers keep the least already.

    Raises `RunError` when the run fails and `Interrupted` after Ctrl-C.
    """
    config, run, ranks = training.config, training.run, join_ranks()
    t = config.training
    steps = count_steps(len(training.sequences), config)
    clear_unfinished(run)
    begin = step_of(checkpoint) if checkpoint else 0
    display = Display(steps, begin, training.say)
    say = display.say
    with (
        # On the same disk as the run, so that what is complete there needs no copying.
        tempfile.TemporaryDirectory(prefix=".unfinished-", dir=run, ignore_cleanup_errors=True) as scratch,
        # Unsloth's trainer and loggers print to stdout, which belongs to --json.
        contextlib.redirect_stdout(sys.stderr),
        StopAfterStep(say, ranks.alone) as stop,
        reporters(config, run, begin, say) as reporting,
    ):
        args, optimizer = sft_config(config, Path(ranks.from_first(lambda: scratch)), steps, training.dtype)
        say(f"optimizer: {optimizer}; {steps} steps of {t.batch_size} x {t.gradient_accumulation} rows")
        if told := describe_deal(deal(config, ranks.size), torch.cuda.device_count()):
            say(f"processes: {told}")
        say(f"learning rate: {t.learning_rate:g} {describe_schedule(schedule_of(t, steps))}")
        alarms = Alarms(steps, training.describe, say)
        progress = Progress(run / "metrics.jsonl", display, alarms)
        watch = watch_of(training, steps, begin, alarms, say)
        finite = FiniteSteps(training.describe, lambda: what_is_left(run), say)
        trainer = trainer_of(training, keep_less, say, args, [*reporting, progress, finite, stop, watch])
        trainer.watch, trainer.stop = watch, stop
        progress.begin(trainer)
        alarms.data(sizes(training.documents), training.shares_prefixes, quiet=begin > 0)
        try:
            done = run_steps(trainer, checkpoint)
        finally:
            progress.close()
            watch.evaluations.close()
        stopped_early = ranks.from_first(lambda: watch.out_of_patience if done < steps else None)
        end_if_stopped(trainer, done, steps, stopped_early)
    if not progress.losses or progress.left_out == progress.steps_done:
        lacking = "loss" if not progress.losses else "gradient"
        raise RunError(
            f"no step had a finite {lacking}; lower training.learning_rate or compute in another model.dtype"
        )
    kept = keep_adapter(trainer, watch, done)
    say(f"kept: the adapter of step {kept.step} ({kept.reason})")
    return Fitted(
        steps=progress.steps_done,
        steps_left_out=progress.left_out,
        resumed_at=begin or None,
        kept=kept,
        stopped_early=stopped_early,
        warnings=alarms.texts,
        train_loss=summarize_losses(progress.losses),
        tokens=progress.tokens,
        supervised_tokens=progress.supervised,
        tokens_per_second=round(progress.tokens / progress.seconds, 1),
        optimizer=optimizer,
        processes=ranks.size,
    )


def train_along(training: Training, memory: Memory, checkpoint: Path | None) -> None:
    """Does the steps of a process that is not the first: it computes its own micro-batches, and prints and writes
    nothing but the state of its random numbers in the checkpoints.

    It also helps with the evaluations before and after.
    """
    config, ranks = training.config, join_ranks()
    ranks.help_first()
    steps = count_steps(len(training.sequences), config)
    with memory, contextlib.redirect_stdout(sys.stderr), StopAfterStep(unheard, ranks.alone) as stop:
        args, _ = sft_config(config, Path(ranks.from_first(str)), steps, training.dtype)
        alarms = Alarms(steps, training.describe, unheard)
        # It only knows when it is time to evaluate. What was measured, and what follows, is the first process's.
        watch = Watch(config, steps, Evaluations(training.run / "evaluations.jsonl"), dict, alarms, unheard)
        finite = FiniteSteps(training.describe, lambda: what_is_left(training.run), unheard)
        trainer = trainer_of(training, memory.keep_less, unheard, args, [finite, stop, watch])
        trainer.watch, trainer.stop = watch, stop
        done = run_steps(trainer, checkpoint)
        stopped_early: str | None = ranks.from_first(lambda: None)
        end_if_stopped(trainer, done, steps, stopped_early)
        ranks.help_first()


def unheard(text: str) -> None:
    """Prints nothing, because the first process prints it."""


def trainer_of(
    training: Training, keep_less: Callable[[str], bool], say: Say, args: SFTConfig, callbacks: list[TrainerCallback]
) -> PackedSFTTrainer:
    """Returns the trainer of this process.

    It gets only the sequences that it will reach, because a resumed run skips all others one by one.
    """
    steps = count_steps(len(training.sequences), training.config)
    sequences = training.sequences[: steps * deal(training.config, join_ranks().size).per_step]
    config = training.config
    leashed = source_name(config.data.replay) if config.data.replay and config.training.replay_kl else None
    collate = PackedCollator(training.documents, training.shares_prefixes, leashed)
    trainer = PackedSFTTrainer(
        training.model, collate, sequences, config, keep_less, say,
        args=args, processing_class=training.tokenizer, callbacks=callbacks,
    )  # fmt: skip
    trainer.anchors = training.anchors
    return trainer


def end_if_stopped(trainer: PackedSFTTrainer, done: int, steps: int, stopped_early: str | None) -> None:
    """Raises `Interrupted` if a signal has ended the run before its last step."""
    if trainer.stop and trainer.stop.requested and done < steps and not stopped_early:
        raise Interrupted(f"interrupted after step {done}; {what_is_left(trainer.run)}")


def watch_of(training: Training, steps: int, begin: int, alarms: Alarms, say: Say) -> Watch:
    """Returns what evaluates the model during training, and writes the line of the evaluation before training.

    begin: the number of steps that are done already.
    """
    config = training.config
    evaluations = Evaluations(training.run / "evaluations.jsonl", begin, config.training.best_metric)

    def measure() -> dict[str, float]:
        return held_out_loss(training.model, training.held_out, config.data.max_length, training.dtype)

    if config.evaluation.every_steps and training.baseline and not evaluations.rows:
        evaluations.add(0, training.baseline, training.baseline_seconds)
    return Watch(config, steps, evaluations, measure, alarms, say, training.ask_tasks)


def run_steps(trainer: PackedSFTTrainer, checkpoint: Path | None) -> int:
    """Trains to the end, from ``checkpoint`` if there is one, and returns how many steps are done."""
    watch = trainer.watch
    # It was killed behind its last step.
    if checkpoint and trainer.ranks.from_first(lambda: watch.out_of_patience if watch else None):
        trainer.load_adapter(checkpoint)
        return step_of(checkpoint)
    trainer.rows_decay = checkpoint is not None and may_decay_rows(checkpoint)
    trainer.begin_together()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted at once; {what_is_left(trainer.run)}") from None
    except RuntimeError as error:
        if not is_gpu_full(error):
            raise
        raise update_too_full(error, what_is_left(trainer.run)) from None
    done: int = trainer.state.global_step
    return done


def keep_adapter(trainer: PackedSFTTrainer, watch: Watch, done: int) -> Kept:
    """Gives the model the adapter of the step that is to be kept, and returns which one that is.

    done: the step that the model is at.
    """
    rows = {row.step: row for row in watch.evaluations.rows}
    best = watch.best_step
    if best is None:
        return Kept(done, "the last one", rows[done].held_out if done in rows else None)
    metric = watch.evaluations.metric
    measured = sum(row.step > 0 and cost_of(row, metric) is not None for row in rows.values())
    good = ("best " if metric.startswith("tasks/") else "lowest ") + named(metric)
    why = f"the {good} of {measured} evaluations"
    if best != done:
        folder = folder_of(trainer.run, best)
        if not folder.is_dir():
            lost = f"the last one; step {best} had the {good}, but its checkpoint could not be written"
            return Kept(done, lost, rows[done].held_out if done in rows else None)
        trainer.load_adapter(folder)
    return Kept(best, why, rows[best].held_out)


def sources_of(step: int, config: Config, documents: Sequence[Rendered], sequences: list[list[int]]) -> str:
    """Says where to look for the examples that the optimizer step of this number, counted from 0, learns from."""
    size = config.training.batch_size * config.training.gradient_accumulation
    group = sequences[step * size : (step + 1) * size]
    names = sorted({documents[index].source for sequence in group for index in sequence})
    return f"rows {step * size} to {step * size + len(group) - 1} of order.json, from {', '.join(names)}"
