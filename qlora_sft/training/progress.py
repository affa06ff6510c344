"""Shows the progress of training, and writes one line per step to ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback

from qlora_sft.atomic import written_file
from qlora_sft.training.losses import StepLoss
from qlora_sft.training.trainer import PackedSFTTrainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments


class Progress(TrainerCallback):  # type: ignore[misc]
    """Draws a bar on stderr (loss, rate, supervised tokens per second, time left) and logs every step as JSON."""

    def __init__(self, metrics_file: Path, steps: int, begin: int = 0):
        """Reads what an earlier part of the run has measured.

        ``begin``: the number of steps that are done already. Lines of ``metrics_file`` up to there are counted and
        kept, later ones are dropped.
        """
        self.metrics_file = metrics_file
        self.steps = steps
        self.trainer: PackedSFTTrainer | None = None
        self.learning_rate = 0.0
        self.supervised = self.tokens = self.steps_done = self.left_out = 0
        self.seconds = 0.0
        self.losses: list[StepLoss] = []
        self.begin = begin
        lines = metrics_file.read_text(encoding="utf-8").splitlines()[:begin] if begin and metrics_file.exists() else []
        self._rows = [json.loads(line) for line in lines]
        for row in self._rows:
            self._count(row)
        self._bar: Any = None
        self._file: IO[str] | None = None
        self._step_started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        with written_file(self.metrics_file) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in self._rows), encoding="utf-8")
        self._file = self.metrics_file.open("a", encoding="utf-8")
        # A log file gets a line every 20 seconds instead of a bar that redraws itself.
        interval = 0.1 if sys.stderr.isatty() else 20.0
        self._bar = tqdm(
            total=self.steps, initial=self.begin, desc="train", unit="step", file=sys.stderr, dynamic_ncols=True,
            mininterval=interval,
        )  # fmt: skip

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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        if self.trainer is None or not logs or "grad_norm" not in logs:
            return  # the summary at the end of training
        totals = self.trainer.totals
        # JSON knows no NaN.
        loss, accuracy, norm = (
            value if math.isfinite(value) else None
            for value in (totals.loss, totals.accuracy, float(logs["grad_norm"]))
        )
        seconds = time.perf_counter() - self._step_started
        row = {
            "step": state.global_step,
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": self.learning_rate,
            "grad_norm": norm,
            "supervised_tokens": totals.supervised,
            "tokens": totals.tokens,
            "seconds": round(seconds, 4),
        }
        self._count(row)
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        rate = self.supervised / self.seconds
        text = f"loss {totals.loss:.4f}, lr {self.learning_rate:.1e}, {rate:.0f} supervised tok/s"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(state.global_step - self._bar.n)

    def _count(self, row: dict[str, Any]) -> None:
        """Adds one line of ``metrics.jsonl`` to the totals."""
        self.supervised += row["supervised_tokens"]
        self.tokens += row["tokens"]
        self.seconds += row["seconds"]
        self.steps_done += 1
        self.left_out += row["grad_norm"] is None  # no weight was changed
        if row["loss"] is not None and row["supervised_tokens"]:
            self.losses.append(StepLoss(row["loss"], row["supervised_tokens"]))

    def close(self) -> None:
        """Closes the bar and the file. It may be called at any time, also after an error in the middle of a step."""
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
