"""Names the fields of a measurement, which is one line of ``results/*.jsonl``."""

from __future__ import annotations

from typing import TypedDict


class PlannedBytes(TypedDict):
    """Holds what the plan says of a step."""

    held: int
    gradients: int
    activations: int
    layer: dict[str, int]
    loss: int


class MeasuredBytes(TypedDict):
    """Holds what torch's allocator counted for a step."""

    held: int
    beyond: int
    allocated: int
    requested: int
    reserved: int
    context: int


class Cell(TypedDict, total=False):
    """Holds one measurement. Every benchmark fills in the fields that concern it."""

    # where it was measured
    benchmark: str
    commit: str
    torch: str
    python: str
    device: str
    load: float | None
    # what was measured
    provider: str
    not_measured: str
    chosen: str
    reason: str
    shape: str
    dtype: str
    layers: int
    width: int
    inner: int
    rank: int
    batch: int
    rows: int
    share: float
    tokens: int | None
    documents: int | None
    supervised: int
    checkpointed: bool
    attention: str
    allocator: str
    tile: int | None
    workspace_mib: int
    # time
    milliseconds: float
    fastest_milliseconds: float
    forward_ms: float
    backward_ms: float
    floor_ms: float
    share_of_floor: float
    seconds: float
    equal: int
    tokens_per_second: float
    ratio: str
    # memory
    peak_bytes: int | None
    predicted_bytes: int
    planned_bytes: int
    reserved_bytes: int | None
    host_bytes: int
    kept_bytes: int
    backward_bytes: int
    split: str
    # precision
    gradient_error: float | None
    difference: float
    # the longest row of a card
    smoke: bool
    card_gib: int | None
    predicted: int | None
    published: int | None
    host_budget: int
    five_percent_more: bool
    # a step, part by part
    planned: PlannedBytes
    measured: MeasuredBytes
