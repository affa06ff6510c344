"""What a plan says, as typed values. Bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from qlora_sft.run.report import LEFT_OUT, Choice, Report


@dataclass(frozen=True)
class ModelPlan(Report):
    path: str
    kind: str = field(metadata={"key": "class"})
    parameters: int
    layers: int
    quantized_layers: int
    note: str
    """What of the files does not fit the configuration."""


@dataclass(frozen=True)
class ResidentPlan(Report):
    """What stays on the device all the time."""

    nf4: int
    full: int
    buffers: int
    adapters: int
    gradients: int
    optimizer: int
    total: int


@dataclass(frozen=True, kw_only=True)
class DevicePlan(Report):
    """Memory of this run on the device that is here. Without a split nothing is known of activations."""

    device: str
    memory: int
    tokens: int
    split: str | None
    reason: str
    layer: dict[str, int] | None = field(default=None, metadata=LEFT_OUT)
    loss: int | None = field(default=None, metadata=LEFT_OUT)
    activations: int | None = field(default=None, metadata=LEFT_OUT)
    offloaded: int | None = field(default=None, metadata=LEFT_OUT)
    context: int | None = field(default=None, metadata=LEFT_OUT)
    peak: int | None = field(default=None, metadata=LEFT_OUT)
    fits: bool | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class CardPlan(Report):
    """The longest row on a card of ``gib``."""

    gib: int
    tokens: int
    split: str | None
    host: int
    """Host memory that it takes."""
    limit: str
    tokens_with_host: int
    """The longest row if there is as much host memory as it takes."""
    host_needed: int


@dataclass(frozen=True, kw_only=True)
class CardsPlan(Report):
    note: str
    """What the rows rest on, or why there are none."""
    resident: int | None = field(default=None, metadata=LEFT_OUT)
    rows: list[CardPlan]
    positions: int | None = None
    """Positions that the model has, scaled as configured."""


@dataclass(frozen=True)
class HostPlan(Report):
    process: int
    offloaded: int
    device: int
    """The model, where the device is the CPU."""
    total: int
    available: int


@dataclass(frozen=True)
class DiskPlan(Report):
    download: int
    prepared_data: int
    adapter: int
    checkpoints: int
    merged: int
    """In 16 bits."""
    gguf_q8_0: int
    free: int


@dataclass(frozen=True)
class DataPlan(Report):
    steps: int
    rows: int
    tokens: int
    supervised_tokens: int
    longest_row: int


@dataclass(frozen=True)
class MeasuredPlan(Report):
    """Seconds of one layer on a row of ``tokens``, and of the loss."""

    tokens: int
    documents: int
    forward: float
    backward: float
    loss: float
    repeats: int


@dataclass(frozen=True)
class TimePlan(Report):
    measured: MeasuredPlan
    tokens_per_second: float
    training: float | None
    """Of the whole run; None if its data was not read."""


@dataclass(frozen=True)
class PlanReport(Report):
    """What a run will need; `plan_table` makes it text."""

    model: ModelPlan
    choices: dict[str, Choice]
    resident: ResidentPlan
    this_run: DevicePlan
    cards: CardsPlan
    host: HostPlan
    disk: DiskPlan
    data: DataPlan | None
    time: TimePlan | None
