"""Hands the figures of a run to the loggers that people know, through transformers' own callbacks."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from qlora_sft.config import Config
from qlora_sft.errors import RunError, first_line
from qlora_sft.say import Say
from qlora_sft.strict import as_tree

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

PROJECT = "qlora_sft"
"""The project in which a run stands, where the environment names none."""


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Passes the events of training on to the callback of a logger.

    Its first error is printed, and then nothing more is passed on: a server that is gone is no reason to lose a run.
    """

    def __init__(self, name: str, callback: TrainerCallback, say: Say):
        """Takes the ``name`` of the logger and its ``callback``."""
        self.name, self.callback, self.say = name, callback, say
        self.failed = False

    def _pass(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, more: dict[str, object]
    ) -> None:
        if self.failed:
            return
        try:
            getattr(self.callback, event)(args, state, control, **more)
        except Exception as error:
            self.failed = True
            self.say(
                f"warning: {self.name} gets no more figures, because it failed ({first_line(error)}); training goes "
                "on, and metrics.jsonl has them all"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        self._pass("on_train_begin", args, state, control, more)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object) -> None:
        self._pass("on_log", args, state, control, more)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: object
    ) -> None:
        self._pass("on_train_end", args, state, control, more)


@contextmanager
def reporters(config: Config, run: Path, begin: int, say: Say) -> Iterator[list[TrainerCallback]]:
    """Yields the trainer's callbacks for the loggers of ``config``, and closes their files at the end, even after an
    error.

    If one cannot be closed, that is only printed: by then everything is trained and nothing is saved yet.

    begin: the number of steps that are done already.

    Raises `RunError` for a logger that cannot begin.
    """
    stack = ExitStack()
    try:
        result: list[TrainerCallback] = []
        for name in dict.fromkeys(config.training.report_to):
            try:
                result.append(Reporter(name, OPEN[name](config, run, begin, stack), say))
            except Exception as error:
                raise RunError(
                    f"training.report_to: {name} cannot begin ({first_line(error)}); set it up, or leave it out"
                ) from None
        yield result
    finally:
        try:
            stack.close()
        except Exception as error:
            say(f"warning: a logger was not closed, because it failed ({first_line(error)}); metrics.jsonl has all")


def _tensorboard(config: Config, run: Path, begin: int, stack: ExitStack) -> TrainerCallback:
    """Opens TensorBoard's file in the run folder, without the steps of an earlier part of the run that will be
    repeated."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    writer = SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=begin + 1)
    stack.callback(writer.close)
    return TensorBoardCallback(writer)


def _wandb(config: Config, run: Path, begin: int, stack: ExitStack) -> TrainerCallback:
    """Opens a run of W&B, or continues the one that an earlier part of this run opened."""
    import wandb
    from transformers.integrations import WandbCallback

    if wandb.run is None:  # a user may have opened one
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        wandb.init(project=project, name=run.name, id=run_id(run), resume="allow", config=as_tree(config))
        stack.callback(wandb.finish)
    return WandbCallback()


def _trackio(config: Config, run: Path, begin: int, stack: ExitStack) -> TrainerCallback:
    """Leaves the run of Trackio to the callback, which continues one of the same name."""
    from transformers.integrations import TrackioCallback

    callback = TrackioCallback()
    # The callback itself closes only what came to its end.
    stack.callback(lambda: callback._initialized and callback._trackio.finish())
    return callback


def _mlflow(config: Config, run: Path, begin: int, stack: ExitStack) -> TrainerCallback:
    """Leaves the run of MLflow to the callback."""
    import mlflow
    from transformers.integrations import MLflowCallback

    if mlflow.active_run() is None:  # a user may have opened one
        stack.callback(mlflow.end_run)
    return MLflowCallback()


OPEN: dict[str, Callable[[Config, Path, int, ExitStack], TrainerCallback]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow,
}  # fmt: skip


def run_id(run: Path) -> str:
    """Returns a unique name for a run, which it keeps when it is resumed."""
    begun = (run / "begun.json").stat().st_mtime_ns
    digest = hashlib.sha256(f"{run.resolve()} {begun}".encode()).hexdigest()[:8]
    return f"{re.sub('[^0-9A-Za-z_-]', '-', run.name)}-{digest}"
