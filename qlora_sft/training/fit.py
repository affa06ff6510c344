"""Runs the optimizer steps of a run, from the first one or from a checkpoint, to the last one."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_sft.config import Config
from qlora_sft.data.collate import PackedCollator
from qlora_sft.data.render import Rendered
from qlora_sft.errors import Interrupted, RunError
from qlora_sft.run.report import Course
from qlora_sft.say import Say
from qlora_sft.training.checkpoints import clear_unfinished, step_of, what_is_left
from qlora_sft.training.guards import FiniteSteps, update_too_full
from qlora_sft.training.interrupt import StopAfterStep
from qlora_sft.training.losses import summarize_losses
from qlora_sft.training.progress import Progress
from qlora_sft.training.schedule import describe_schedule, schedule_of
from qlora_sft.training.steps import count_steps
from qlora_sft.training.trainer import PackedSFTTrainer, sft_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_sft.model.base import CausalModel


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


@dataclass(frozen=True)
class Fitted:
    """Holds the steps, losses and speed of a run that has come to its end. `RunReport` has the same fields."""

    steps: int
    steps_left_out: int
    resumed_at: int | None
    train_loss: Course
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    optimizer: str


def fit(training: Training, keep_less: Callable[[str], bool], checkpoint: Path | None = None) -> Fitted:
    """Trains from the beginning, or from ``checkpoint`` if there is one, and returns what was measured.

    keep_less: called with the reason when the GPU is full. It makes every layer keep less, and returns False if the
    layers keep the least already.

    Raises `RunError` when the run fails and `Interrupted` after Ctrl-C.
    """
    config, run, say = training.config, training.run, training.say
    steps = count_steps(len(training.sequences), config)
    t = config.training
    # The trainer gets only the sequences that it will reach: a resumed run skips all others one by one.
    sequences = training.sequences[: steps * t.batch_size * t.gradient_accumulation]
    clear_unfinished(run)
    # On the same disk as the run, so that what is complete there needs no copying.
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=run) as scratch, StopAfterStep(say) as stop:
        args, optimizer = sft_config(config, Path(scratch), steps, training.dtype)
        say(f"optimizer: {optimizer}; {steps} steps of {t.batch_size} x {t.gradient_accumulation} rows")
        say(f"learning rate: {t.learning_rate:g} {describe_schedule(schedule_of(t, steps))}")
        begin = step_of(checkpoint) if checkpoint else 0
        progress = Progress(run / "metrics.jsonl", steps, begin)
        finite = FiniteSteps(
            lambda step: sources_of(step, config, training.documents, sequences), lambda: what_is_left(run), say
        )
        collate = PackedCollator(training.documents, training.shares_prefixes)
        trainer = PackedSFTTrainer(
            training.model, collate, sequences, config, keep_less, say,
            args=args, processing_class=training.tokenizer, callbacks=[progress, finite, stop],
        )  # fmt: skip
        progress.trainer = trainer
        try:
            # Unsloth's trainer prints a banner to stdout, which belongs to --json.
            with contextlib.redirect_stdout(sys.stderr):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted at once; {what_is_left(run)}") from None
        except torch.OutOfMemoryError as error:
            raise update_too_full(error, what_is_left(run)) from None
        finally:
            progress.close()
        done = trainer.state.global_step
        if stop.requested and done < steps:
            raise Interrupted(f"interrupted after step {done}; {what_is_left(run)}")
    if not progress.losses or progress.left_out == progress.steps_done:
        lacking = "loss" if not progress.losses else "gradient"
        raise RunError(
            f"no step had a finite {lacking}; lower training.learning_rate or compute in another model.dtype"
        )
    return Fitted(
        steps=progress.steps_done,
        steps_left_out=progress.left_out,
        resumed_at=begin or None,
        train_loss=summarize_losses(progress.losses),
        tokens=progress.tokens,
        supervised_tokens=progress.supervised,
        tokens_per_second=round(progress.tokens / progress.seconds, 1),
        optimizer=optimizer,
    )


def sources_of(step: int, config: Config, documents: Sequence[Rendered], sequences: list[list[int]]) -> str:
    """Says where to look for the examples that the optimizer step of this number, counted from 0, learns from."""
    size = config.training.batch_size * config.training.gradient_accumulation
    group = sequences[step * size : (step + 1) * size]
    names = sorted({documents[index].source for sequence in group for index in sequence})
    return f"rows {step * size} to {step * size + len(group) - 1} of order.json, from {', '.join(names)}"
