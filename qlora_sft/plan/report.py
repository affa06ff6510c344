"""Defines the typed values of a plan. Sizes are in bytes and times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field

from qlora_sft.plan.notebook import plan_html
from qlora_sft.run.report import LEFT_OUT, Choice, Report


@dataclass(frozen=True)
class ModelPlan(Report):
    """Describes the base model."""

    path: str
    kind: str = field(metadata={"key": "class"})
    parameters: int
    layers: int
    quantized_layers: int
    quantized_stacks: int
    """Of experts."""
    note: str
    """What does not fit the configuration, and the parts beside the language model; empty if there is neither."""


@dataclass(frozen=True)
class ResidentPlan(Report):
    """Holds the bytes that stay on the device all the time."""

    nf4: int
    full: int
    buffers: int
    adapters: int
    gradients: int
    optimizer: int
    total: int
    base_shards: int = 1
    shards: int = 0
    """The shard of every layer that one of several cards has; what is cut is in none of the figures above but the
    total."""
    fetched: int = 0
    """The layers that are whole at a time."""


@dataclass(frozen=True, kw_only=True)
class DevicePlan(Report):
    """Holds the memory of this run on the device that is here. Without a split nothing is known of activations."""

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
    """Holds the longest sequence that fits on a card of ``gib``."""

    gib: int
    tokens: int
    split: str | None
    host: int
    """Host memory that it takes."""
    limit: str
    tokens_with_host: int
    """The longest sequence if there is as much host memory as it takes."""
    host_needed: int


@dataclass(frozen=True, kw_only=True)
class CardsPlan(Report):
    """Holds the longest sequences on cards of common sizes."""

    note: str
    """What the rows rest on, or why there are none."""
    resident: int | None = field(default=None, metadata=LEFT_OUT)
    rows: list[CardPlan]
    positions: int | None = None
    """Positions that the model has, scaled as configured."""


@dataclass(frozen=True)
class HostPlan(Report):
    """Holds the host memory of the run."""

    process: int
    offloaded: int
    device: int
    """The model, where the device is the CPU."""
    total: int
    available: int
    base: int = 0
    """The whole base, while a process takes its shards of it; one process after the other does."""
    embedding: int = 0
    """The input embedding, where a GPU leaves it in host memory."""


@dataclass(frozen=True)
class DiskPlan(Report):
    """Holds the disk space of the run."""

    download: int
    copy_in_16_bits: int
    """Of a base in MXFP4 or FP8; once, in the user's cache."""
    prepared_data: int
    adapter: int
    """With the tokenizer."""
    checkpoints: int
    merged: int
    """The merged model in 16 bits."""
    gguf_q8_0: int
    free: int
    anchors: int = 0
    """What training.ewc needs to go on, in the run folder."""


@dataclass(frozen=True)
class DataPlan(Report):
    """Holds the counts of what is trained on."""

    steps: int
    rows: int
    tokens: int
    supervised_tokens: int
    longest_row: int
    rows_per_step: int = 1
    """Of all cards together, where several train."""
    micro_batches: int = 1
    """Of a step; as many cards can share it without smaller ones."""


@dataclass(frozen=True)
class MeasuredPlan(Report):
    """Holds the seconds of one layer on a sequence of ``tokens``, and of the loss."""

    tokens: int
    documents: int
    forward: float
    backward: float
    loss: float
    repeats: int


@dataclass(frozen=True)
class TimePlan(Report):
    """Holds the time of the run, extrapolated from one layer."""

    measured: MeasuredPlan
    tokens_per_second: float
    training: float | None
    """The training of the whole run; None if its data was not read."""


@dataclass(frozen=True)
class PlanReport(Report):
    """Holds what a run will need; `plan_table` makes it text."""

    model: ModelPlan
    choices: dict[str, Choice]
    resident: ResidentPlan
    this_run: DevicePlan
    cards: CardsPlan
    host: HostPlan
    disk: DiskPlan
    data: DataPlan | None
    time: TimePlan | None

    def _repr_html_(self) -> str:
        return plan_html(self)
