"""Translates what is to be done to stacks of experts into what is to be done to the tensors of the files.

In memory a stack is one parameter [E, R, C]. In the files it is the same, or one tensor for every expert. Which tensor
of the files belongs to which part of which stack is asked of transformers, which stacks them when it loads a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from qlora_sft.errors import RunError, first_line
from qlora_sft.export.adapter import TensorUpdate
from qlora_sft.export.nf4 import RowReader, ThroughNF4
from qlora_sft.export.tensor_names import modules_in_files, names_in_files, renamed
from qlora_sft.model.base_files import has_experts
from qlora_sft.model.experts import parts_of, stack_shape, stacks
from qlora_sft.model.meta_model import meta_model
from qlora_sft.model.tensors import Stored


@dataclass(frozen=True)
class StackUpdate:
    """Adds ``scale * left[e] @ right[e]`` to every expert e of a stack; left [E, R, r], right [E, r, C].

    The rows of a stack are those of all its experts, one expert after the other.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Returns updated rows in float32. ``rows`` [n, C] are the rows [start, start + n) of the stack."""
        total, each = rows.float(), self.left.shape[1]
        for expert in range(start // each, -(-(start + len(rows)) // each)):
            begin, end = max(start, expert * each), min(start + len(rows), (expert + 1) * each)
            left = self.left[expert, begin - expert * each : end - expert * each]
            total[begin - start : end - start].addmm_(left, self.right[expert], alpha=self.scale)
        return total


@dataclass(frozen=True)
class Unit:
    """Shows ``count`` rows of a stack, from row ``begin`` on, as a matrix: a part that was quantised on its own."""

    source: RowReader
    begin: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count, self.source.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.source.rows(self.begin + start, self.begin + stop)


class UnitsThroughNF4:
    """Shows a stack as a matrix whose values have gone through NF4 and back, every ``unit`` rows on their own.

    Only the unit that was read last is held in memory.
    """

    def __init__(self, source: RowReader, unit: int):
        self.source, self.unit, self.shape, self.dtype = source, unit, source.shape, source.dtype
        self.held: tuple[int, ThroughNF4] | None = None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        parts = []
        while start < stop:
            number = start // self.unit
            begin = number * self.unit
            end = min(stop, begin + self.unit)
            parts.append(self._through(number).rows(start - begin, end - begin))
            start = end
        return torch.cat(parts)

    def _through(self, number: int) -> ThroughNF4:
        if self.held is None or self.held[0] != number:
            self.held = number, ThroughNF4(Unit(self.source, number * self.unit, self.unit))
        return self.held[1]


@dataclass
class InFiles:
    """Says what an adapter and NF4 do to the tensors of the files, under the names that they have there."""

    updates: dict[str, TensorUpdate]
    through_nf4: set[str]
    """Names of tensors that went through NF4, without their ending .weight."""
    stacked: dict[str, tuple[StackUpdate | None, int]] = field(default_factory=dict)
    """Maps a tensor that is a whole stack to its update, and how many rows went through NF4 together (0: none)."""


def in_files(
    folder: Path,
    tensors: Mapping[str, Stored],
    config: dict[str, Any],
    updates: dict[str, TensorUpdate],
    through: set[str],
    trust: bool = False,
) -> InFiles:
    """Returns what an adapter and NF4 do to the tensors in the files of ``folder``.

    updates, through: what they do to the parameters of the model, by the names that those have in memory; ``through``
    names those that went through NF4. trust: code that ``folder`` brings along may be run.

    An update for which the files have no tensor keeps its name. Raises `RunError` for layers in NF4 that the files do
    not have.
    """
    if not has_experts(config):
        names = names_in_files(folder, tensors, trust)
        return InFiles(renamed(updates, names), modules_in_files(through, names, tensors))
    layout = _Layout.of(folder, trust)
    found = InFiles(dict(updates), through - layout.stacks.keys())
    for name in tensors:
        place = layout.place(name)
        stack = layout.stacks.get(place.parameter)
        if stack is None:
            _rename(name, place.parameter, found)
            continue
        update, quantized = updates.get(place.parameter), place.parameter in through
        found.updates.pop(place.parameter, None)
        whole = None if update is None else _stack_update(update, stack.transposed)
        if place.expert is None:
            unit = stack.rows // stack.parts if quantized else 0
            found.stacked[name] = whole, unit
            continue
        if quantized:
            found.through_nf4.add(name.removesuffix(".weight"))
        if whole is not None:
            left = whole.left[place.expert].chunk(place.parts)[place.part]
            found.updates[name] = TensorUpdate(a=whole.right[place.expert], b=left, scale=whole.scale)
    return replace(found, through_nf4=modules_in_files(found.through_nf4, {}, tensors))


def _rename(name: str, parameter: str, found: InFiles) -> None:
    """Moves what is known of ``parameter`` to the name that it has in the files."""
    if name == parameter:
        return
    if parameter in found.updates:
        found.updates[name] = found.updates.pop(parameter)
    if parameter.removesuffix(".weight") in found.through_nf4:
        found.through_nf4.remove(parameter.removesuffix(".weight"))
        found.through_nf4.add(name.removesuffix(".weight"))


def _stack_update(update: TensorUpdate, transposed: bool) -> StackUpdate:
    """Returns the update of a whole stack from the adapter's factors a [E, r, in] and b [E, out, r].

    transposed: the stack holds its weights as [in, out] and not as [out, in].
    """
    assert update.a is not None
    assert update.b is not None
    if transposed:
        return StackUpdate(update.a.transpose(1, 2), update.b.transpose(1, 2), update.scale)
    return StackUpdate(update.b, update.a, update.scale)


# ------------------------------------------------------------------ what transformers knows


def _for_peft(module: torch.nn.Module) -> bool:
    """Says whether PEFT takes the stacks of ``module`` for [in, out], as it decides which factor is A and which B."""
    return bool(getattr(module, "is_transposed", False))


@dataclass(frozen=True)
class _Stack:
    rows: int
    transposed: bool
    """Whether an update has A for the rows of the stack and B for its columns."""
    parts: int


@dataclass(frozen=True)
class _Place:
    """Says where in the model a tensor of the files goes: a whole parameter, or a part of one expert of a stack."""

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class _Layout:
    """Knows the stacks of a model by name, and what transformers makes of the names of its tensors on loading."""

    stacks: dict[str, _Stack]
    renamings: list[Any]
    converters: list[Any]
    prefix: str
    """What transformers puts before a name if only then there is such a parameter, as in files of a model without its
    head."""
    parameters: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, folder: Path, trust: bool) -> _Layout:
        from transformers import AutoConfig
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        from qlora_sft.model.remote_code import runs_code

        try:
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=runs_code(str(folder), trust))
        except (OSError, ValueError) as error:
            raise RunError(f"{folder}: cannot read the model's configuration: {first_line(error)}") from None
        model = meta_model(settings)
        found = {
            f"{path}.{name}": _Stack(stack_shape(module, name)[1], _for_peft(module), parts_of(module, name))
            for path, module, name in stacks(model)
        }
        known = get_model_conversion_mapping(model)
        renamings = [each for each in known if isinstance(each, WeightRenaming)]
        converters = [each for each in known if isinstance(each, WeightConverter)]
        return cls(found, renamings, converters, model.base_model_prefix, model.state_dict())

    def place(self, name: str) -> _Place:
        """Returns where in the model the tensor ``name`` of the files goes."""
        from transformers.core_model_loading import rename_source_key

        parameter, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.parameters)
        if pattern is None:
            return _Place(parameter)
        sources = next(each.source_patterns for each in self.converters if pattern in each.source_patterns)
        for each in self.renamings:
            name, _ = each.rename_source_key(name)
        # A pattern is a regular expression but for the star, which stands for the number of an expert.
        number = re.search(pattern.replace(".*.", r"\.(\d+)\."), name)
        if number is None or not number.groups():
            return _Place(parameter)
        return _Place(parameter, int(number[1]), list(sources).index(pattern), len(sources))


def planned_rows(stored: Stored) -> Stored:
    """Returns a stack [E, R, C] in a file as the matrix [E * R, C]."""
    return replace(stored, shape=(prod(stored.shape[:-1]), stored.shape[-1]))
