"""Define the results of commands as typed values; their JSON is what ``--json`` prints and the manifest keeps."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal, Self

from qlora_sft.json_types import JsonObject
from qlora_sft.run.notebook import run_html

LEFT_OUT: dict[str, bool] = {"left_out": True}
"""Marks a field that is left out of the JSON where it is None."""
ONLY_HERE: dict[str, bool] = {"only_here": True}
"""Marks a field that is never in the JSON."""
TASK_LOSS = " loss"
"""Stands in ``evaluations.jsonl`` behind the name of a task whose figure is its loss."""


@dataclass(frozen=True)
class Report:
    """Turns the fields of a result into JSON and back; all results derive from it."""

    def to_json(self) -> JsonObject:
        """Returns the fields as JSON has them, in their order."""
        values = [(each, getattr(self, each.name)) for each in fields(self)]
        return {
            each.metadata.get("key", each.name): _plain(value)
            for each, value in values
            if not each.metadata.get("only_here") and (value is not None or not each.metadata.get("left_out"))
        }

    @classmethod
    def from_json(cls, content: Mapping[str, object]) -> Self:
        """Reads what `to_json` wrote and leaves out unknown keys. Raises KeyError for a missing one."""
        hints = typing.get_type_hints(cls)
        values: JsonObject = {}
        for each in fields(cls):
            key = each.metadata.get("key", each.name)
            if key in content or (each.default is MISSING and each.default_factory is MISSING):
                values[each.name] = _typed(hints[each.name], content[key])
        return cls(**values)


def _typed(hint: object, value: object) -> object:
    """Returns ``value`` as ``hint`` names it: a report, a dict of reports, or itself."""
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and issubclass(option, Report) and isinstance(value, Mapping):
            if option is hint or type(None) in typing.get_args(hint):
                return option.from_json(value)
            return {key: option.from_json(each) for key, each in value.items()}
    return value


def _plain(value: object) -> object:
    if isinstance(value, Report):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Choice(Report):
    """Holds something that was chosen, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Pair(Report):
    """Holds a figure before and after training."""

    before: float | None
    """None where nothing was measured before training."""
    after: float


@dataclass(frozen=True)
class Course(Report):
    """Holds the training loss at its beginning and its end, as means over the supervised tokens of some steps."""

    first: float
    last: float
    first_steps: int = 1
    """How many steps ``first`` is the mean of."""
    last_steps: int = 1
    """How many steps ``last`` is the mean of."""
    base: float | None = None
    """The loss of the first step, before any update; None in runs of earlier versions."""
    rose: bool = False
    """Whether the model is worse at its training data than before training."""


@dataclass(frozen=True)
class MemoryReport(Report):
    """Says what each decoder layer keeps for its backward."""

    tiers: list[Literal["keep", "attention", "checkpoint", "offload"]]
    split: str
    """The tiers in words."""
    reason: str
    tokens: int
    """Tokens of the longest micro-batch, to which the bytes apply."""
    device_bytes: int
    host_bytes: int
    layer: dict[str, int | None]
    """Bytes of the largest layer, by purpose; None for what no layer does."""
    between: int | None = None
    """Bytes between forward and backward; None in runs of earlier versions."""
    measured: dict[str, int] | None = None
    """Bytes before training on a GPU, and the most that torch had allocated and reserved during it."""


@dataclass(frozen=True)
class Kept(Report):
    """Says of which step the saved adapter is."""

    step: int
    reason: str
    held_out: dict[str, float | None] | None = None
    """Held-out loss of that step by source, as it was measured while training; None if it was not."""


@dataclass(frozen=True)
class OrderReport(Report):
    """Describes the packed sequences of a run; ``order.json`` holds them."""

    sha256: str
    rows: int
    removed: int
    """Rows of the sources that were removed as duplicates or contaminated; ``removed.jsonl`` names them."""


@dataclass(frozen=True, kw_only=True)
class RunReport(Report):
    """Says what a finished training run has achieved, and on what.

    Older manifests may lack the fields that have a default.
    """

    output: str
    """The run folder."""
    backend: Choice
    base: str
    """Folder or Hub id of the base model."""
    base_sha256: str | None = None
    """Fingerprint of the base's weights."""
    base_commit: str | None = None
    """Commit of the Hub that its files are of."""
    base_files: dict[str, str] = field(default_factory=dict)
    """sha256 of its files, by name; large ones only where the Hub's cache names it."""
    base_dequantized: str | None = None
    """Format of its files, MXFP4 or FP8, if it was trained on a 16-bit copy of them; ``base_sha256`` is the copy's."""
    data_sha256: str | None = None
    dtype: str
    attention: Choice | None = None
    """How a GPU attends inside documents, with what was measured. None in runs of earlier versions."""
    quantized_modules: list[str]
    """Layers of the base whose weights went through NF4."""
    loss: dict[str, Pair]
    """Held-out loss by source."""
    exact_match: dict[str, Pair]
    """Share of held-out answers that equal their reference, by source."""
    steps: int
    steps_left_out: int = 0
    """Steps whose gradient was not finite."""
    resumed_at: int | None = None
    """Step from which the run went on, if it was interrupted."""
    kept: Kept | None = None
    """None in runs of earlier versions, which kept the last step."""
    stopped_early: str | None = None
    """Why the run ended before its last step; None if it did not."""
    warnings: list[str] = field(default_factory=list)
    """What there was to warn of while it went."""
    train_loss: Course
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    optimizer: str
    processes: int = 1
    """How many processes trained together, each on a device of its own."""
    memory: MemoryReport | None = None
    order: OrderReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of every stage."""

    def _repr_html_(self) -> str:
        return run_html(self)
