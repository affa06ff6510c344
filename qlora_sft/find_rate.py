"""Suggest a learning rate for a run, by trying ever higher ones on its own rows (``train --find-rate``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_sft.config import Config
from qlora_sft.prepare import prepare
from qlora_sft.say import Say, tell
from qlora_sft.stopwatch import Stopwatch
from qlora_sft.text import as_path

if TYPE_CHECKING:
    from qlora_sft.training.rate_curve import RateReport


def find_rate(config: Config, say: Say = tell) -> RateReport:
    """Tries learning rates with the model, the rows and the batches of a run, and writes the curve beside its folder.

    The folder itself is not touched, so an earlier run may be in it. Raises the errors of `train`.
    """
    watch = Stopwatch()
    prepared = prepare(config, say, watch)
    with watch("imports"):
        from qlora_sft.training.rate_test import try_rates
    folder = as_path(config.output)
    return try_rates(config, prepared, folder.with_name(f"{folder.name}-rates.html"), say)
