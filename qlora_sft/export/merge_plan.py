"""Plans a merged model: every tensor's name, type and shape, and where its rows come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import torch

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.export.adapter import TensorUpdate
from qlora_sft.export.nf4 import FromNF4Checkpoint, RowReader, ThroughNF4, companions, described
from qlora_sft.export.stacks import StackUpdate, UnitsThroughNF4, planned_rows
from qlora_sft.json_types import JsonObject
from qlora_sft.model.tensors import Planned, Stored, copied, row_ranges, shards_of

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass
class MergePlan:
    """Holds the tensors to write, in the base's order, and what changes in the configuration with them."""

    tensors: list[Planned] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """The file of the base that holds each tensor."""
    modules: list[str] = field(default_factory=list)
    """The modules whose weight is updated."""
    config: JsonObject = field(default_factory=dict)
    """What config.json says differently from the base's."""
    notes: list[str] = field(default_factory=list)
    dtype: str = ""
    """The type of most of the weights, as a configuration names it."""

    @property
    def nbytes(self) -> int:
        """Returns the size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def shards(self) -> dict[str, list[Planned]]:
        """Returns the tensors by file name, in the base's files as far as they are not too large."""
        return shards_of(self.tensors, self.files)


def plan_merge(
    base: dict[str, Stored],
    config: JsonObject,
    updates: dict[str, TensorUpdate],
    through_nf4: set[str],
    dtype: torch.dtype | None,
    where: str,
    stacked: Mapping[str, tuple[StackUpdate | None, int]] = MappingProxyType({}),
) -> MergePlan:
    """Plans every tensor of ``base`` with its update; stacked: as in `stacks.InFiles`.


    Modules in ``through_nf4`` go through NF4 first. Floating-point tensors become ``dtype``, or keep their type if it
    is None. Raises `RunError` when the adapter updates something that the base does not have; ``where`` names the
    adapter in the message.
    """
    plan = MergePlan()
    updates = dict(updates)
    head = _untie(base, config, updates, plan)
    hidden = {part for name in base for part in companions(name, base)}
    todo = dict(updates)
    for name, stored in {**base, **head}.items():
        if name in hidden or (name == HEAD and _ties(config) and not head):
            todo.pop(name, None)
            continue
        if name in stacked:
            plan.tensors.append(_planned_stack(name, stored, *stacked[name], dtype))
            plan.files.append(stored.file)
            plan.modules += [name] if stacked[name][0] is not None else []
            continue
        update = todo.pop(name, None)
        tensor = _planned(name, stored, base, update, name.removesuffix(".weight") in through_nf4, dtype)
        plan.tensors.append(tensor)
        plan.files.append(stored.file)
        if update is not None:
            plan.modules.append(name.removesuffix(".weight"))
        if name.endswith(EMBEDDINGS):
            _describe_vocabulary(stored.shape[0], tensor.shape[0], config, plan)
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        kind = str(tensor.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + tensor.nbytes
    plan.dtype = max(sizes, key=lambda kind: sizes[kind], default="float32")
    if todo:
        first = sorted(todo)[0].removesuffix(".weight")
        raise RunError(
            f"{where}: {len(todo)} of {len(updates)} adapter modules have no weight in the base "
            f"(first: {first}); is it the adapter of another base model?"
        )
    return plan


def _describe_vocabulary(rows: int, now: int, config: JsonObject, plan: MergePlan) -> None:
    """Notes the size of an embedding, which had ``rows`` in the base, if config.json says another one.

    Models that also see have it in the section of their language model, and not there either if it is the family's own.
    """
    inner = config.get("text_config")
    own: JsonObject = inner if isinstance(inner, dict) and inner else config
    known = own.get("vocab_size")
    # Beside a language model with a section of its own there may be other embeddings, which stay as they are.
    if now == known or (now == rows and (own is not config or known is None)):
        return
    plan.config |= {"vocab_size": now} if own is config else {"text_config": {**own, "vocab_size": now}}
    plan.notes.append(f"vocabulary: {known or rows:,} -> {now:,} rows, as the adapter has them")


def _ties(config: JsonObject) -> bool:
    """Says whether the output head is the embedding."""
    return bool(config.get("tie_word_embeddings"))


def _untie(
    base: dict[str, Stored], config: JsonObject, updates: dict[str, TensorUpdate], plan: MergePlan
) -> dict[str, Stored]:
    """Returns the output head as a tensor of its own, by name, if it was the embedding and the two come to differ.

    PEFT's LoRA and modules_to_save on one of the two leave the other as it was. Trained token rows and a resized
    vocabulary are shared by both. Removes the update of the head where it is the embedding's.
    """
    embedding = next((name for name in base if name.endswith(EMBEDDINGS)), None)
    if not _ties(config) or embedding is None:
        return {}
    ours, theirs = updates.get(embedding), updates.get(HEAD)
    if ours is None and theirs is None:
        return {}
    resized = ours is not None and ours.replaced is not None and ours.replaced.shape != base[embedding].shape
    shared = ours is not None and ours.a is None and (ours.tokens is not None or resized)
    if shared and (theirs is None or theirs.only_replaces):
        updates.pop(HEAD, None)
        return {}
    if ours and theirs and ours.only_replaces and theirs.only_replaces and _equal(ours.replaced, theirs.replaced):
        del updates[HEAD]
        return {}
    plan.config["tie_word_embeddings"] = False
    plan.notes.append("output head and embedding were one tensor and are two now: the adapter changes them differently")
    return {HEAD: base[embedding]}


def _equal(one: Stored | None, other: Stored | None) -> bool:
    """Says whether two stored tensors have the same values."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return all(torch.equal(one.rows(a, b), other.rows(a, b)) for a, b in row_ranges(one.shape))


def _planned(
    name: str,
    stored: Stored,
    base: dict[str, Stored],
    update: TensorUpdate | None,
    through_nf4: bool,
    wanted: torch.dtype | None,
) -> Planned:
    """Plans one tensor: its type, its shape, and the slices of its new value."""
    packed = bool(companions(name, base))
    kept = wanted is None or not stored.dtype.is_floating_point or stored.dtype == wanted
    if update is None and not packed and not through_nf4 and kept:
        return copied(name, stored)
    if update is not None and update.replaced is not None:
        _check_replacement(name, stored, update, packed)
        stored, packed, through_nf4 = update.replaced, False, False
        dtype = base[name].dtype if name in base else stored.dtype
    else:
        dtype = stored.dtype

    opened = _opener(name, stored, base, packed, through_nf4)
    shape = stored.shape
    if packed:
        shape, dtype = described(name, base)
    if update is not None:
        _check_shapes(name, shape, update)
    final = wanted or dtype
    grown = _new_rows(name, shape, update)
    whole = (shape[0] + len(grown), *shape[1:])
    return Planned(
        name, final, whole, lambda: chain(_changed(name, opened(), shape, final, update), _cast(grown, final))
    )


def _planned_stack(
    name: str, stored: Stored, update: StackUpdate | None, unit: int, wanted: torch.dtype | None
) -> Planned:
    """Plans how one stack of experts is merged.

    ``unit``: how many of its rows went through NF4 together; 0 if it was not quantised. Raises `RunError` if the
    adapter is for experts of another shape.
    """
    flat, final = planned_rows(stored), wanted or stored.dtype
    if update is not None and (len(update.left) * update.left.shape[1], update.right.shape[2]) != flat.shape:
        raise RunError(f"{name}: the adapter is for experts of another shape, the base has {stored.shape}")
    source = (lambda: UnitsThroughNF4(flat, unit)) if unit else (lambda: flat)
    return Planned(name, final, stored.shape, lambda: _changed(name, source(), flat.shape, final, update))


def _cast(rows: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Returns the rows in another type as one slice, or no slice if there are none."""
    return [rows.to(dtype)] if len(rows) else []


def _new_rows(name: str, shape: tuple[int, ...], update: TensorUpdate | None) -> torch.Tensor:
    """Returns the trained rows of tokens that were added to the base's vocabulary, [n, in].

    Raises `RunError` if a row between the base's last and the last trained one is missing.
    """
    if update is None or update.tokens is None:
        return torch.empty(0, *shape[1:])
    indices, rows = update.tokens
    beyond = {int(index): row for index, row in zip(indices, rows, strict=True) if int(index) >= shape[0]}
    if sorted(beyond) != list(range(shape[0], shape[0] + len(beyond))):
        raise RunError(
            f"{name}: the adapter trained token {max(beyond)}, the base has {shape[0]} rows, and not all between "
            "are in the adapter"
        )
    return torch.stack([beyond[index] for index in sorted(beyond)]) if beyond else torch.empty(0, *shape[1:])


def _opener(
    name: str, stored: Stored, base: dict[str, Stored], packed: bool, through_nf4: bool
) -> Callable[[], RowReader]:
    """Returns a function that opens the source of the rows.

    It is called only when the tensor is written, because both 4-bit sources keep a quarter of the tensor in memory.
    """
    if packed:
        return lambda: FromNF4Checkpoint(name, base)
    return (lambda: ThroughNF4(stored)) if through_nf4 else (lambda: stored)


def _changed(
    name: str, source: RowReader, shape: tuple[int, ...], dtype: torch.dtype, update: TensorUpdate | StackUpdate | None
) -> Iterator[torch.Tensor]:
    """Yields the new rows of a tensor, slice by slice. Raises `RunError` for values that are not finite."""
    for start, stop in row_ranges(shape):
        rows = source.rows(start, stop)
        # The sum is rounded once, at the very end.
        total = rows if update is None else update.apply(rows, start)
        module = name.removesuffix(".weight")
        if update is not None and not total.isfinite().all():
            raise RunError(f"{module}: the merged weight is not finite; the adapter is damaged")
        rounded = total.to(dtype)
        if dtype == torch.float16 and not rounded.isfinite().all():
            raise RunError(f"{module}: a weight is beyond float16's range; merge with --dtype bf16 or f32")
        yield rounded


def _check_replacement(name: str, stored: Stored, update: TensorUpdate, packed: bool) -> None:
    """Raises `RunError` unless a replaced tensor has the base's shape.

    An embedding or head may have another number of rows, because the vocabulary may have been resized.
    """
    assert update.replaced is not None
    if packed:
        return
    grows = name == HEAD or name.endswith(EMBEDDINGS)
    same = update.replaced.shape[1:] == stored.shape[1:] if grows else update.replaced.shape == stored.shape
    if not same:
        raise RunError(f"{name}: the adapter has it as {update.replaced.shape}, the base as {stored.shape}")


def _check_shapes(name: str, shape: tuple[int, ...], update: TensorUpdate) -> None:
    """Raises `RunError` or `ConfigError` if the update does not fit the shape of the tensor."""
    flat = (shape[0], int(torch.Size(shape[1:]).numel()))
    if update.a is not None and update.b is not None and (update.b.shape[0], update.a.shape[1]) != flat:
        adapter = (update.b.shape[0], update.a.shape[1])
        module = name.removesuffix(".weight")
        raise RunError(f"{module}: the adapter is for a weight {adapter}, the base has {shape}")
    if update.added is not None and tuple(update.added.shape) != shape:
        raise ConfigError(f"{name}: the adapter adds a bias of shape {tuple(update.added.shape)}, the base has {shape}")
