"""Prepare a run for train, preview and plan: read the data, choose the backend, and only then import what is heavy.

This module imports nothing heavy, so that a bad file is reported at once and Unsloth is imported before what it
patches.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import date
from typing import TYPE_CHECKING

from qlora_sft.config import Config
from qlora_sft.data.splits import read_data
from qlora_sft.errors import ConfigError
from qlora_sft.faults import every_fault
from qlora_sft.json_types import JsonObject
from qlora_sft.model.allocator import use_expandable_segments
from qlora_sft.model.backend import choose_backend, expected_backend
from qlora_sft.model.base_files import has_experts, has_towers, read_config
from qlora_sft.model.base_folder import resolve_base
from qlora_sft.parallel import world_size
from qlora_sft.say import Say
from qlora_sft.stopwatch import Stopwatch

if TYPE_CHECKING:
    from qlora_sft.run_data import RunData


def why_not_unsloth(config: Config) -> str:
    """Returns why the run of ``config`` is loaded without Unsloth; "" if nothing speaks against it.

    A base that cannot be found speaks against nothing; that fault is reported later, together with all others.
    """
    settings: JsonObject = {}
    if config.model.path != "demo":  # to build it imports transformers
        with suppress(ConfigError):
            settings = read_config(resolve_base(config.model.path, config.model.revision))
    if has_experts(settings):
        return "the base is a mixture of experts, whose NF4 weights and adapters are loaded without Unsloth"
    if world_size() > 1:
        return "several processes train together, which was not tried with Unsloth's patched trainer"
    if has_towers(settings):
        return "the base is multimodal; its towers are kept as they are, for which Unsloth is not used"
    lora = config.lora
    if lora.dora:
        return "lora.dora trains magnitudes, which Unsloth's kernels do not know"
    if lora.init == "eva":
        return "lora.init=eva looks at what goes into each layer, which Unsloth's kernels do not show"
    if config.training.ewc is not None:
        return "training.ewc looks at what goes into each layer, which Unsloth's kernels do not show"
    if config.training.replay_kl is not None:
        return "training.replay_kl asks the base in the middle of a step, which was not tried with Unsloth's forward"
    if lora.modules or (isinstance(lora.target_modules, str) and lora.target_modules != "all-linear"):
        return "lora.modules and regular expressions for layers are passed to PEFT itself"
    return ""


def prepare(
    config: Config, say: Say, watch: Stopwatch | None = None, *, unsloth: bool = True, day: date | None = None
) -> RunData:
    """Reads, renders and packs what ``config`` trains on, and finds all faults that can be found without weights.

    unsloth: whether the backend is chosen as for training, which imports Unsloth. Without it Unsloth is imported only
    if the configuration names it, and the rows are packed for the backend that training is expected to take.

    day: the date that a chat template writes; default: today.

    Raises `ConfigError` or `DataError`, the same one for every verb.
    """
    watch = watch or Stopwatch()
    with watch("data"), every_fault(config):
        sources = read_data(config, say)
    with watch("imports"):
        obstacle = why_not_unsloth(config)
        if unsloth or config.model.backend == "unsloth":
            use_expandable_segments()
            backend = choose_backend(config.model.backend, obstacle)
            say(f"backend: {backend.name} ({backend.reason})")
        else:
            backend = expected_backend(config.model.backend, obstacle)
        from qlora_sft.run_data import checked_base, render_data
    with watch("base model"):
        base = checked_base(config)
    with watch("data"):
        return render_data(config, sources, base, backend, say, day)
