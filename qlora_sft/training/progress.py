"""Measures every step, writes it as a line to ``metrics.jsonl``, and shows how far training is."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback

from qlora_sft.atomic import GrowingFile, written_file
from qlora_sft.json_types import whole_lines
from qlora_sft.training.display import Display
from qlora_sft.training.losses import StepLoss
from qlora_sft.training.utilisation import peak_of, step_work

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from qlora_sft.training.alarms import Alarms
    from qlora_sft.training.evaluations import EvaluationRow
    from qlora_sft.training.totals import StepTotals
    from qlora_sft.training.trainer import PackedSFTTrainer


StepRow = dict[str, Any]
"""A line of ``metrics.jsonl``."""


class Progress(TrainerCallback):  # type: ignore[misc]
    """Logs every step as JSON and on the display, and passes it to the alarms."""

    def __init__(self, metrics_file: Path, display: Display, alarms: Alarms):
        """Reads the lines of ``metrics_file`` that an earlier part of the run wrote.

        Lines up to the step at which ``display`` begins are counted and kept; later and damaged ones are dropped.
        """
        self.metrics_file, self.display, self.alarms = metrics_file, display, alarms
        self.trainer: PackedSFTTrainer | None = None
        self.learning_rate = 0.0
        self.supervised = self.tokens = self.steps_done = self.left_out = 0
        self.seconds = 0.0
        self.losses: list[StepLoss] = []
        begin = display.begin
        rows: list[StepRow] = whole_lines(metrics_file) if begin else []
        self._rows = [row for row in rows if row.get("step", math.inf) <= begin]
        if len(self._rows) < begin:
            display.say(
                f"metrics.jsonl lacks {begin - len(self._rows)} of the first {begin} steps; sums are without them"
            )
        for row in self._rows:
            self._count(row, quiet=True)
        self._row: StepRow = {}
        self._file = GrowingFile(metrics_file)
        self._told = False
        self._step_started = 0.0
        self._process = psutil.Process()

    def begin(self, trainer: PackedSFTTrainer) -> None:
        """Takes the trainer whose steps are measured, and adds the measures to what it logs."""
        self.trainer, trainer.figures = trainer, self.figures
        model, dtype = trainer.accelerator.unwrap_model(trainer.model), trainer.computes_in
        self._device: torch.device = model.device
        self._peak = peak_of(self._device, dtype)
        self._work = step_work(model) if self._peak else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        with written_file(self.metrics_file) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in self._rows), encoding="utf-8")
        self.display.open()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._step_started = time.perf_counter()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **_: object,
    ) -> None:
        # Read here: once the step is done the scheduler has moved on to the next one's rate.
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def figures(self, logs: dict[str, float]) -> dict[str, float]:
        """Returns ``logs`` of the trainer with the figures of the step that they belong to.

        Logs of anything but a step are returned as they are.
        """
        if self.trainer is None or "grad_norm" not in logs:
            return logs  # an evaluation, or the summary at the end of training
        row = self._row = self._measured(self.trainer, logs["grad_norm"])
        of_sources = {f"source_loss/{name}": loss for name, loss in row["source_loss"].items()}
        named = {key: value for key, value in row.items() if key not in ("step", "time", "source_loss", *logs)}
        return {**logs, **{key: value for key, value in {**named, **of_sources}.items() if value is not None}}

    def _measured(self, trainer: PackedSFTTrainer, grad_norm: float) -> StepRow:
        """Returns the line of the step that is just done."""
        totals = trainer.totals
        losses = totals.losses
        seconds = time.perf_counter() - self._step_started
        row = {
            "step": trainer.state.global_step,
            "loss": finite(losses.loss),
            "source_loss": {name: finite(loss) for name, loss in losses.of_sources.items()},
            "accuracy": finite(losses.accuracy),
            "learning_rate": self.learning_rate,
            "grad_norm": finite(float(grad_norm)),
            "supervised_tokens": totals.supervised,
            "tokens": totals.tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(totals.tokens / seconds, 1),
            **self._memory(),
            **self._utilisation(totals, seconds),
            "time": round(time.time(), 3),
        }
        if trainer.config.training.replay_kl is not None:
            row["replay_kl"] = finite(losses.divergence)  # None in a step without a row of replay
        if trainer.anchors:
            row["ewc_penalty"] = finite(losses.penalty)
        scaler = trainer.accelerator.scaler
        if scaler is not None:  # in float16; a step that it left out has no gradient norm
            row["loss_scale"] = scaler.get_scale()
        return row

    def _memory(self) -> dict[str, int]:
        """Returns the bytes of the process in host memory, and the most that there were on its GPU."""
        resident = {"resident_bytes": self._process.memory_info().rss}
        if self._device.type != "cuda":
            return resident
        return {"gpu_peak_bytes": torch.cuda.max_memory_allocated(self._device), **resident}

    def _utilisation(self, totals: StepTotals, seconds: float) -> dict[str, float]:
        """Returns the share of the GPU's peak that was work of the model, if both are known."""
        if self._work is None or self._peak is None:
            return {}
        work = self._work.of(totals.tokens, totals.supervised, totals.pairs)
        cards = self.trainer.ranks.size if self.trainer else 1
        return {"mfu": round(work / seconds / (cards * self._peak), 4)}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        if not logs or "grad_norm" not in logs:
            return
        row = self._row
        self._count(row)
        error = self._file.add(json.dumps(row) + "\n")
        if error and not self._told:
            self._told = True
            self.display.say(f"warning: {self.metrics_file}: {error.strerror}; its lines wait, and training goes on")
        self.display.update(row["step"], self._described(row), row["loss"])

    def _described(self, row: StepRow) -> str:
        """Returns what the display says of a step: its loss, the last held-out losses, the speed and the memory."""
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        memory = row["gpu_peak_bytes" if "gpu_peak_bytes" in row else "resident_bytes"] / 2**30
        parts = [f"loss {loss}", f"lr {row['learning_rate']:.1e}"]
        watch = self.trainer.watch if self.trainer else None
        if watch and (measured := [row for row in watch.evaluations.rows if row.held_out]):
            parts.append(held_out_briefly(measured[-1]))
        return ", ".join([*parts, f"{self.supervised / self.seconds:.0f} supervised tok/s", f"{memory:.1f} GiB"])

    def _count(self, row: StepRow, quiet: bool = False) -> None:
        """Adds one line of ``metrics.jsonl`` to the totals, and has the alarms look at it."""
        self.supervised += row["supervised_tokens"]
        self.tokens += row["tokens"]
        self.seconds += row["seconds"]
        self.steps_done += 1
        self.left_out += row["grad_norm"] is None  # no weight was changed
        step = None
        if row["loss"] is not None and row["supervised_tokens"]:
            step = StepLoss(row["loss"], row["supervised_tokens"])
            self.losses.append(step)
        self.alarms.step(row["step"], step, row["supervised_tokens"], quiet)

    def close(self) -> None:
        """Closes display and file. It may be called at any time, also after an error in the middle of a step."""
        self.display.close()
        if error := self._file.add(""):
            self.display.say(f"warning: {self.metrics_file}: {error.strerror}; its last lines are lost")


def finite(value: float) -> float | None:
    """Returns ``value``, or None if it is no finite number, which JSON does not know."""
    return value if math.isfinite(value) else None


def held_out_briefly(row: EvaluationRow) -> str:
    """Returns the held-out losses in few words: of up to three sources by name, of more their mean."""
    losses = row.held_out if len(row.held_out) <= 3 else {"mean": row.mean}
    return "held-out " + " ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if loss is not None)
