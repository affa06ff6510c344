"""Tells whether a checkpoint is undamaged: a disk or a copy may have damaged it after it was complete."""

from __future__ import annotations

import zipfile
from pathlib import Path

from qlora_sft.errors import first_line
from qlora_sft.json_types import read_object
from qlora_sft.model.base_files import safetensors_header

WEIGHTS, STATE = "adapter_model.safetensors", "trainer_state.json"
# What torch writes is an archive. Where one of these is missing, transformers goes on without it and without a word.
ARCHIVES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")


def damage_of(checkpoint: Path) -> str:
    """Says what is missing or damaged in ``checkpoint``; "" if it is whole."""
    try:
        read_object(checkpoint / STATE)
    except (OSError, ValueError) as error:
        return f"{STATE}: {first_line(error)}"
    try:
        header, begin = safetensors_header(checkpoint / WEIGHTS)
        end = begin + max((int(each["data_offsets"][1]) for each in header.values()), default=0)
        if (checkpoint / WEIGHTS).stat().st_size != end:
            return f"{WEIGHTS} is cut off"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{WEIGHTS}: {first_line(error)}"
    for pattern in ARCHIVES:
        files = list(checkpoint.glob(pattern))
        if not files:
            return f"{pattern} is missing"
        # The list of what an archive holds stands at its end.
        if broken := [file.name for file in files if not zipfile.is_zipfile(file)]:
            return f"{broken[0]} is cut off"
    return ""
