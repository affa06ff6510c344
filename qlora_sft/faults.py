"""Report everything that is wrong with one command at once.

A command stops at its first fault: a wrong key, a missing file, a missing base. A user who corrected that one would
meet the next at the next try. So whatever can be checked without the faulty part is checked before the report is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qlora_sft.config import Config, LoraConfig, ModelConfig, load_config
from qlora_sft.config_data import DataConfig, SourceConfig, held_out_sources
from qlora_sft.config_lora import patterns_of, regex_fault
from qlora_sft.errors import ConfigError, DataError, all_at_once

# Larger sources are only looked for, not read, when the report is made.
_READ_AT_MOST = 2**28


def load_checked(name: str, overrides: Sequence[str]) -> Config:
    """Returns the configuration of `load_config`, or raises its faults together with those of what it names."""
    check_overrides(overrides)
    try:
        return load_config(name, overrides)
    except ConfigError as error:
        _raise_all(error, error.rest)
        raise


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises `ConfigError` for a value of the command line that a later one would undo without a word."""
    problems = []
    for i, later in enumerate(overrides):
        key = later.lstrip("-").partition("=")[0]
        for earlier in overrides[:i]:
            before = earlier.lstrip("-").partition("=")[0]
            if before == key or before.startswith(f"{key}."):
                problems.append(f"override {later!r} would undo {earlier!r}; give one of them")
    if problems:
        raise ConfigError(problems)


@contextmanager
def every_fault(config: Config) -> Iterator[None]:
    """Raises a `ConfigError` or `DataError` of its body together with all else that is wrong with ``config``."""
    try:
        yield
    except (ConfigError, DataError) as error:
        _raise_all(error, {"model": config.model, "data": config.data, "lora": config.lora})
        raise


def _raise_all(error: ConfigError | DataError, parts: Mapping[str, object]) -> None:
    """Raises ``error`` together with the faults of ``parts``, the sections that could be read (see `ConfigError`)."""

    def first() -> None:
        raise error

    all_at_once([first, *_data_checks(parts.get("data")), *_base_checks(parts)])


def _data_checks(data: object) -> Iterator[Callable[[], object]]:
    if not isinstance(data, DataConfig):
        return
    sources: list[SourceConfig] = [*data.train, *([data.replay] if data.replay else []), *held_out_sources(data)]
    for source in sources:
        yield partial(_check_source, source)
    for path in data.decontaminate:
        yield partial(_check_evaluation, path)


def _check_source(source: SourceConfig) -> None:
    from qlora_sft.data.sources import open_parts, read_sources

    files = [file for _, _, file in open_parts(source) if file is not None]
    if sum(file.stat().st_size for file in files) <= _READ_AT_MOST:
        read_sources([source], 0)


def _check_evaluation(path: str) -> None:
    from qlora_sft.data.sources import open_evaluation

    open_evaluation(path)


def _base_checks(parts: Mapping[str, object]) -> Iterator[Callable[[], object]]:
    model, lora = parts.get("model"), parts.get("lora")
    if not isinstance(model, ModelConfig):
        return
    from qlora_sft.data.shipped import template_text
    from qlora_sft.model.base_files import check_path, check_tokenizer_files

    if model.chat_template:
        yield partial(template_text, model.chat_template)
    if model.path == "demo":  # which may have to be downloaded, and is as it should be
        return
    yield partial(check_path, model.path, model.revision)
    # Of os.path, which answers for a text that can be no path instead of raising an error.
    folder = Path(os.path.expanduser(model.path))
    if not os.path.isfile(folder / "config.json"):
        return
    yield partial(_check_files, model, folder)
    yield partial(check_tokenizer_files, folder)
    # A faulty regular expression is told with the faults of the recipe, and matches nothing here.
    sound = isinstance(lora, LoraConfig) and not any(map(regex_fault, patterns_of(lora)))
    if isinstance(lora, LoraConfig) and sound and (lora.target_modules != "all-linear" or lora.modules):
        yield partial(_check_modules, Config(model, DataConfig([]), "", lora))


def _check_files(model: ModelConfig, folder: Path) -> None:
    from qlora_sft.model.base_files import check_quantization, read_config

    check_quantization(model, str(folder), read_config(str(folder)))


def _check_modules(config: Config) -> None:
    from qlora_sft.model.backend import choose_backend

    # A notebook goes on after the report; Unsloth could patch nothing any more if transformers were imported first.
    choose_backend(config.model.backend)
    from qlora_sft.model.base_folder import resolve_base
    from qlora_sft.model.meta_model import check_layers

    check_layers(config, resolve_base(config.model.path))
