"""Suggest a learning rate for a run, by trying ever higher ones on its own rows (``train --find-rate``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError
from qlora_sft.prepare import prepare
from qlora_sft.say import Say, tell
from qlora_sft.stopwatch import Stopwatch
from qlora_sft.text import as_path
from qlora_sft.training.join import check_shards
from qlora_sft.training.run_folder import check_writable

if TYPE_CHECKING:
    from qlora_sft.training.rate_curve import RateReport


def find_rate(config: Config, say: Say = tell) -> RateReport:
    """Tries learning rates with the model, the rows and the batches of a run, and writes the curve beside its folder.

    The folder itself is not touched, so an earlier run may be in it. Raises the errors of `train`.
    """
    check_shards(config)
    page = page_beside(config)
    watch = Stopwatch()
    prepared = prepare(config, say, watch)
    with watch("imports"):
        from qlora_sft.training.rate_test import try_rates
    return try_rates(config, prepared, page, say)


def page_beside(config: Config) -> Path:
    """Returns the file of the curve. Raises `ConfigError` if it cannot be written, before a model is loaded."""
    # "." and ".." are names of folders too; a link is not followed, because its own name is the run's.
    folder = Path(os.path.abspath(as_path(config.output)))
    page = folder.parent / f"{folder.name}-rates.html"
    check_writable(page.parent)
    if page.is_dir():
        raise ConfigError(f"output: {page} is a folder, and the curve would have that name; choose another output=...")
    return page
