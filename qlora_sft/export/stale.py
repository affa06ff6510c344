"""Knows whether the merged model of a run is that of the adapter which the run has now."""

from __future__ import annotations

import hashlib

from qlora_sft.json_types import JsonObject
from qlora_sft.run.folder import Run

ENTRY = "merged_of"


def merged_of(run: Run) -> JsonObject:
    """Returns what export.json has to say of the adapter that was merged: a hash of its weights."""
    with (run.adapter / "adapter_model.safetensors").open("rb") as file:
        return {ENTRY: hashlib.file_digest(file, "sha256").hexdigest()}


def is_stale(run: Run) -> bool:
    """Says whether the merged model of a run was made of another adapter. Nothing is known of one that an earlier
    version has made."""
    known = run.exports.get(ENTRY)
    return known is not None and known != merged_of(run)[ENTRY]
