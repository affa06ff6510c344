"""Tries learning rates on a run's own rows: each step has a higher one than the step before it (``--find-rate``).

The loss of every step is compared with the loss of the same rows before the test, so that easy and hard rows, which
differ by more than a step can change, do not hide what the rate does (after Smith, "Cyclical Learning Rates", 2017).
"""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from qlora_sft.atomic import written_file
from qlora_sft.config import Config
from qlora_sft.data.batch import longest_micro_batch
from qlora_sft.data.collate import PackedCollator
from qlora_sft.data.documents import sizes
from qlora_sft.errors import RunError
from qlora_sft.evaluation.held_out import autocast
from qlora_sft.model.load import compute_dtype
from qlora_sft.model.lora_eva import begin_from_data
from qlora_sft.model.loss import batch_loss, to_device
from qlora_sft.model.memory import use_memory
from qlora_sft.model.setup import prepare_model
from qlora_sft.run_data import RunData
from qlora_sft.say import Say, progress
from qlora_sft.training.guards import measuring_too_full, update_too_full
from qlora_sft.training.rate_curve import RateReport, Tried, rate_page, smoothed, suggest
from qlora_sft.training.recipe import how_to_attend
from qlora_sft.training.steps import settle_accumulation
from qlora_sft.training.trainer import PackedSFTTrainer, sft_config

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from qlora_sft.model.base import CausalModel

STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0
# The test ends when the loss is so much above that before training, as a share of it.
SPOILED = 0.5
# What to say where the test fails.
NOTHING_KEPT = "nothing of the test is kept"

Before = dict[tuple[int, ...], tuple[float, float]]
"""Maps a packed sequence to its summed loss before the test, and the weight of its tokens."""


def rate_of(step: int) -> float:
    """Returns the learning rate of a step, counted from 0."""
    return float(LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1)))


def try_rates(config: Config, data: RunData, page: Path, say: Say) -> RateReport:
    """Trains with ever higher rates until the model is spoiled, writes the curve to ``page`` and suggests a rate.

    Nothing of the model is kept. Raises `RunError` if no step has a finite loss.
    """
    config, told = settle_accumulation(config, data.packed.tokens)
    dtype, _ = compute_dtype(config.model.dtype)
    attention = how_to_attend(config, data, dtype, sizes(data.documents).tokens)
    tokens = longest_micro_batch(data.packed.tokens, config.training.batch_size)
    model = prepare_model(config, data.base, dtype, data.backend.name, tokens, say, attention)
    if config.lora.init == "eva":
        say(f"adapter: {begin_from_data(model, data.documents, data.sequences, dtype, config.seed)}")
    memory = use_memory(model, config, tokens, dtype, say, data.packed.shares_prefixes)
    of_step = config.training.batch_size * config.training.gradient_accumulation
    sequences = list(islice(cycle(data.sequences), STEPS * of_step))
    again = len(sequences) / len(data.sequences)
    said = [f"{STEPS} steps of {of_step} packed sequences, from {LOWEST:g} to {HIGHEST:g}", told]
    if again > 1:
        said.append(f"all rows come {again:.1f} times, and those that came before count as learned")
    say("learning rates: " + "; ".join(filter(None, said)))
    collate = PackedCollator(data.documents, data.packed.shares_prefixes)
    with memory:
        try:
            before = _before(model, sequences[: len(data.sequences)], collate, dtype)
        except torch.OutOfMemoryError as error:
            raise measuring_too_full(error, NOTHING_KEPT) from None
        tried = _trained(config, data, model, sequences, (before, dtype), memory.keep_less, say)
    if not tried:
        raise RunError("no step of the test had a finite loss; compute in another model.dtype")
    suggested, reason = suggest(tried)
    with written_file(page) as beside:
        beside.write_text(rate_page(tried, suggested, reason, f"Learning rates for {config.output}"), encoding="utf-8")
    return RateReport(suggested, reason, [each.rate for each in tried], [each.change for each in tried], str(page))


def _before(model: CausalModel, sequences: Sequence[list[int]], collate: PackedCollator, dtype: torch.dtype) -> Before:
    """Returns of every packed sequence the summed loss before the test, and the weight of its tokens."""
    found: Before = {}
    bar = progress(len(sequences), "loss before", "sequence")
    model.eval()
    for sequence in sequences:
        batch = to_device(collate([{"documents": sequence}]), model.device)
        with torch.no_grad(), autocast(model.device, dtype):
            output = batch_loss(model, batch)
        found[tuple(sequence)] = float((output.nll * batch["position_weights"]).sum()), batch["weight_sum"]
        bar.update()
    bar.close()
    model.train()
    return found


class Ramp(TrainerCallback):  # type: ignore[misc]
    """Notes the loss of every step beside that of its rows before the test, and ends the test when it is spoiled."""

    def __init__(self, before: Sequence[float]):
        """Takes the loss of the rows of every step before the test."""
        self.before = before
        self.trainer: PackedSFTTrainer | None = None
        self.tried: list[Tried] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        assert self.trainer is not None
        loss, before = self.trainer.totals.losses.loss, self.before[state.global_step - 1]
        if math.isfinite(loss) and math.isfinite(before):
            self.tried.append(Tried(rate_of(state.global_step - 1), before, loss))
        elif self.trainer.totals.supervised:
            control.should_training_stop = True
        spoiled = self.tried and smoothed([each.change for each in self.tried])[-1] > SPOILED * self.tried[-1].before
        if spoiled:
            control.should_training_stop = True


class ForgetfulTrainer(PackedSFTTrainer):
    """Trains without saving anything, because the test ends with what it has seen."""

    def _save_finished_steps(self) -> str:
        return NOTHING_KEPT


def _trained(
    config: Config, data: RunData, model: CausalModel, sequences: list[list[int]],
    measured: tuple[Before, torch.dtype], keep_less: Callable[[str], bool], say: Say,
) -> list[Tried]:  # fmt: skip
    """Trains with rising rates and returns what every step has shown. measured: as `_before` returns it, and the type
    to compute in."""
    before, dtype = measured
    of_step = config.training.batch_size * config.training.gradient_accumulation
    groups = [sequences[start : start + of_step] for start in range(0, len(sequences), of_step)]
    ramp = Ramp([_mean([before[tuple(sequence)] for sequence in group]) for group in groups])
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        tested = _as_test(config, scratch)
        args, _ = sft_config(tested, Path(scratch), STEPS, dtype)
        trainer = ForgetfulTrainer(
            model, PackedCollator(data.documents, data.packed.shares_prefixes), sequences, tested, keep_less, say,
            args=args, processing_class=data.tokenizer, callbacks=[ramp],
        )  # fmt: skip
        trainer.factor = lambda step: rate_of(step) / HIGHEST
        ramp.trainer = trainer
        try:
            trainer.train()
        except torch.OutOfMemoryError as error:
            raise update_too_full(error, NOTHING_KEPT) from None
    return ramp.tried


def _as_test(config: Config, scratch: str) -> Config:
    """Returns ``config`` with the highest rate of the test, and without all that is written down of a run.

    Noise is left out, too: the loss before the test has none.
    """
    t = config.training
    rows = None if t.new_tokens_rate is None else t.new_tokens_rate / t.learning_rate * HIGHEST
    training = replace(
        t, learning_rate=HIGHEST, new_tokens_rate=rows, max_steps=STEPS, save_steps=0, patience=None, report_to=[],
        keep="last", replay_kl=None, ewc=None, neftune_alpha=None,
    )  # fmt: skip
    return replace(config, training=training, output=scratch)


def _mean(parts: Sequence[tuple[float, float]]) -> float:
    weight = sum(each for _, each in parts)
    return sum(nll for nll, _ in parts) / weight if weight else math.nan
