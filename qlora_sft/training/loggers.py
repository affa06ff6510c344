"""Checks that the loggers of a run are installed, before any work is done. It imports nothing heavy."""

from __future__ import annotations

from importlib.util import find_spec

from qlora_sft.config import Config
from qlora_sft.errors import ConfigError


def check_loggers(config: Config) -> None:
    """Raises `ConfigError` for every logger whose package is not installed."""
    problems = [
        f"training.report_to: {name} is not installed; pip install {name}"
        for name in dict.fromkeys(config.training.report_to)
        if not _installed(name)
    ]
    if problems:
        raise ConfigError(problems)


def _installed(name: str) -> bool:
    found = find_spec(name)
    # A folder of that name without a module in it, as W&B itself makes one where it runs, is no package.
    return found is not None and found.origin is not None
