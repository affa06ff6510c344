"""Cuts the frozen weights of the decoder layers over the processes of a run (`memory.base_shards`), as FSDP does.

Between two uses a process has one shard of every layer, an N-th of its bytes. A layer is fetched whole from all of them
just before it computes, and the next one meanwhile; it goes when another one is needed::

    forward    0 1 .. L-1     fetched by a hook before the layer
    backward   L-1 .. 1 0     fetched by a hook on the gradient of the layer's result: before it is computed again

What is trained stays whole in every process. Fetched bytes are the very bytes that were cut, so nothing is rounded.

A tensor that is cut stays the same tensor with the same shape, only its storage is empty in between. So whatever the
autograd graph has saved of it is filled again in its backward, and nothing of a layer can be read unless it is whole.

Fetching takes all processes, each layer in the same order. Within a micro-batch the order is known (`Shards.expect`),
and who has less to compute takes part all the same (`end_forward`, `end`). When the first process works alone the
others fetch what it names (`lead`, `follow`).
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qlora_sft.errors import ConfigError, RunError
from qlora_sft.model.base import base_of, decoder_layers
from qlora_sft.model.experts import SCALES, in_nf4, stacks
from qlora_sft.parallel import naming_lost, processes_here, rank, world_size
from qlora_sft.units import size

if TYPE_CHECKING:
    from torch.distributed import Work

    from qlora_sft.model.base import CausalModel

# Where each tensor of a layer begins: kernels read several bytes at once.
ALIGNMENT = 256
# Layers that are whole at a time: the one that computes and the one that is fetched meanwhile.
WHOLE_AT_ONCE = 2
# Families whose forward reads weights of layers before it calls them.
READS_OUTSIDE = {"rwkv"}
# What the first process says when it needs no layer any more.
NONE = -1


def layer_bytes(tensors: Sequence[int], shards: int) -> int:
    """Returns the bytes of a layer in all shards together, whose tensors that are cut have these bytes."""
    return _places(tensors, shards)[1]


def whole_bytes(layers: Sequence[int]) -> int:
    """Returns the most bytes that layers take which are whole at a time, of layers of these bytes."""
    return sum(sorted(layers, reverse=True)[:WHOLE_AT_ONCE])


def _places(tensors: Sequence[int], shards: int) -> tuple[list[int], int]:
    """Returns where each tensor of a layer begins among its bytes, and how many these are in all shards together."""
    places, end = [], 0
    for nbytes in tensors:
        places.append(end)
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return places, -(-end // (ALIGNMENT * shards)) * ALIGNMENT * shards


@dataclass(frozen=True)
class CutTensor:
    """Holds a tensor of a layer that is to be cut, and what puts another one in its place."""

    tensor: Tensor
    put: Callable[[Tensor], None]


def tensors_to_cut(layer: nn.Module, shared: Container[int] = ()) -> list[CutTensor]:
    """Returns the frozen matrices of a decoder layer, packed or not, and the scales of those in NF4.

    Vectors (norms, biases) and what undoes the quantisation of scales are small and stay whole. So does what several
    layers have in common; shared: the `id` of such parameters.
    """
    found = []
    for parameter in layer.parameters():
        if parameter.requires_grad or parameter.dim() < 2 or id(parameter) in shared:
            continue
        found.append(CutTensor(parameter.data, partial(setattr, parameter, "data")))
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            found.append(CutTensor(state.absmax, partial(setattr, state, "absmax")))
    for _, module, name in stacks(layer):
        if in_nf4(module, name) and id(getattr(module, name)) not in shared:
            scales = f"{name}_{SCALES[0]}"
            found.append(CutTensor(getattr(module, scales), partial(setattr, module, scales)))
    return found


class CutLayer:
    """Holds this process's shard of a decoder layer, and the room in which the layer is whole."""

    def __init__(self, layer: nn.Module, shared: Container[int], device: torch.device):
        """Cuts ``layer``, which is whole in this process's host memory, and leaves it empty on ``device``."""
        cut = tensors_to_cut(layer, shared)
        places, self.size = _places([each.tensor.nbytes for each in cut], world_size())
        flat = torch.zeros(self.size, dtype=torch.uint8)
        self.whole = torch.empty(self.size, dtype=torch.uint8, device=device)
        for each, place in zip(cut, places, strict=True):
            here, tensor = slice(place, place + each.tensor.nbytes), each.tensor
            flat[here] = tensor.contiguous().view(-1).view(torch.uint8)
            # .data: what a graph has saved of it does not count what is gathered as a change.
            each.put(self.whole[here].view(tensor.dtype).view(tensor.shape).data)
        share = self.size // world_size()
        self.shard = flat[rank() * share : (rank() + 1) * share].to(device, copy=True)
        self.empty()

    def empty(self) -> None:
        """Frees the bytes of the whole layer."""
        self.whole.untyped_storage().resize_(0)

    def make_room(self) -> None:
        """Takes the memory of the whole layer, with nothing in it yet."""
        self.whole.untyped_storage().resize_(self.size)


class Shards:
    """Holds the decoder layers of a model, cut, and has them whole while they compute."""

    def __init__(self, model: CausalModel, device: torch.device):
        """Cuts the layers of ``model``, which is in host memory, and moves the rest of it to ``device``."""
        layers = decoder_layers(model)
        uses = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
        shared = {each for each, count in uses.items() if count > 1}
        self.layers = [CutLayer(layer, shared, device) for layer in layers]
        self.whole_bytes = whole_bytes([each.size for each in self.layers])
        self._here: dict[int, Work | None] = {}
        """The layers that are whole, or on their way: what to wait for, or None."""
        self._kept: int | None = None
        self._leads = False
        self._forward: deque[int] | None = None
        self._backward: deque[int] = deque()
        model.to(device)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before_forward, number))
            layer.register_forward_hook(partial(self._after_forward, number))

    # -------------------------------------------------------------- one layer after the other

    def _before_forward(self, number: int, *_: object) -> None:
        """Has a layer whole before its forward. One that is computed again in its backward is whole already."""
        if not _in_backward():
            self._need_next(number, number + 1, self._forward)

    def _after_forward(self, number: int, _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        """Lets the gradient of the layer's result fetch the layer again."""
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad and not _in_backward():
            hidden.register_hook(partial(self._before_backward, number))

    def _before_backward(self, number: int, _: Tensor) -> None:
        self._need_next(number, number - 1, self._backward if self._forward is not None else None)

    def _need_next(self, number: int, ahead: int, to_come: deque[int] | None) -> None:
        """Has a layer whole and fetches another one ahead. to_come: the layers that are expected, this one first."""
        if to_come is not None and (not to_come or to_come[0] != number):
            raise RunError(
                f"memory.base_shards: decoder layer {number} is computed out of turn, which the other processes do not "
                "know of; this kind of model cannot be trained with its base cut: set it to 1"
            )
        self._need(number, ahead)
        if to_come is not None:
            to_come.popleft()

    def _need(self, number: int, ahead: int) -> None:
        """Has one layer whole, another one on its way if there is such a layer, and no others."""
        wanted = {number, ahead if self._kept is None else self._kept}
        for other in [each for each in self._here if each not in wanted]:
            self._drop(other)
        self._fetch(number)
        self._wait_for(number)
        if self._kept is None and 0 <= ahead < len(self.layers):
            self._fetch(ahead)

    def _fetch(self, number: int) -> None:
        """Starts to gather a layer from all processes."""
        if number in self._here:
            return
        layer = self.layers[number]
        layer.make_room()  # may find the card full, before others are told to wait for this process
        with naming_lost():
            if self._leads:
                _say_number(number)
            self._here[number] = _gather(layer) if layer.size else None

    def _wait_for(self, number: int) -> None:
        if (work := self._here[number]) is not None:
            with naming_lost():
                work.wait()
            self._here[number] = None

    def _drop(self, number: int) -> None:
        self._wait_for(number)
        self.layers[number].empty()
        del self._here[number]

    def drop_all(self) -> None:
        """Leaves no layer whole. All processes do so together."""
        for number in list(self._here):
            self._drop(number)

    @property
    def missing_bytes(self) -> int:
        """Returns the bytes that the layers which are whole at a time will take beside those that are whole now."""
        return max(0, self.whole_bytes - sum(self.layers[number].size for number in self._here))

    @contextmanager
    def whole(self, number: int) -> Iterator[None]:
        """Keeps one layer whole while the body runs, and fetches nothing ahead: its forward may be called directly."""
        self._kept = number
        try:
            self._need(number, NONE)
            yield
        finally:
            self._kept = None

    # -------------------------------------------------------------- micro-batches of different size

    def expect(self, forwards: int, backwards: int) -> None:
        """Begins a micro-batch in which the process that computes most runs all layers so often."""
        order = range(len(self.layers))
        self._forward = deque([*order] * forwards)
        self._backward = deque([*reversed(order)] * backwards)

    def end_forward(self) -> None:
        """Takes part in the forwards that others do beside those that this process has done."""
        self._take_part(self._forward, 1)

    def end(self) -> None:
        """Ends a micro-batch: takes part in all that this process has not done, or was hindered from doing."""
        self.end_forward()
        self._take_part(self._backward, -1)
        self._forward = None

    def _take_part(self, to_come: deque[int] | None, step: int) -> None:
        while to_come:
            self._need(to_come[0], to_come[0] + step)
            to_come.popleft()

    # -------------------------------------------------------------- the first process alone

    @contextmanager
    def lead(self) -> Iterator[None]:
        """Lets the first process use the model alone in the body, while the others `follow`."""
        self.drop_all()
        self._leads = True
        yield
        self.drop_all()
        self._leads = False
        with naming_lost():
            _say_number(NONE)

    def follow(self) -> None:
        """Fetches what the first process names, until its `lead` is over."""
        self.drop_all()
        while (number := _heard_number()) != NONE:
            self._fetch(number)
            self._drop(number)


_shards: WeakKeyDictionary[nn.Module, Shards] = WeakKeyDictionary()


def cut_base(model: CausalModel) -> str:
    """Cuts the frozen weights of ``model``'s layers over all processes; the rest goes to this process's device.

    Returns what was done, to print. Raises `ConfigError` where the model reads weights of layers that are not whole.
    """
    kind = str(base_of(model).config.get_text_config().model_type)
    if kind in READS_OUTSIDE:
        raise ConfigError(f"memory.base_shards: {kind} changes weights of its layers outside of them; set it to 1")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    shards = _shards[base_of(model)] = Shards(model, device)
    if device.type == "cuda":
        base_of(model).hf_device_map = {"": device.index}  # type: ignore[assignment]  # where accelerate looks
    own, every = sum(each.shard.nbytes for each in shards.layers), sum(each.size for each in shards.layers)
    return (
        f"{size(every)} of frozen weights in {len(shards.layers)} layers are cut over {world_size()} processes, "
        f"{size(own)} each; {WHOLE_AT_ONCE} layers are whole at a time, {size(shards.whole_bytes)} (memory.base_shards)"
    )


def shards_of(model: CausalModel) -> Shards | None:
    """Returns how the base of ``model`` is cut; None if it is whole."""
    return _shards.get(base_of(model))


@contextmanager
def whole(model: CausalModel, layer: nn.Module) -> Iterator[None]:
    """Keeps a decoder layer of ``model`` whole while the body runs, whose forward may be called without the model's."""
    shards = shards_of(model)
    if shards is None:
        yield
        return
    with shards.whole(next(i for i, each in enumerate(decoder_layers(model)) if each is layer)):
        yield


@contextmanager
def in_turn() -> Iterator[None]:
    """Lets the processes of this machine run the body one after the other: in it each has a whole model in host
    memory."""
    own, turns = int(os.environ["LOCAL_RANK"]), _most(processes_here())
    for _ in range(own):
        _most(0)
    yield
    for _ in range(turns - own):
        _most(0)


def _most(number: int) -> int:
    """Returns the highest ``number`` of all processes, for which each waits."""
    import torch.distributed as dist

    most = torch.tensor(number)
    with naming_lost():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _gather(layer: CutLayer) -> Work | None:
    """Starts to gather a layer from its shards, and returns what to wait for."""
    import torch.distributed as dist

    # Its name is another one from torch 2.13 on.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: Work | None = gather(layer.whole, layer.shard, async_op=True)
    return work


def _say_number(number: int) -> None:
    """Tells the other processes a number; the caller has rank 0."""
    from torch.distributed import broadcast

    broadcast(torch.tensor(number), src=0)


def _heard_number() -> int:
    """Returns the number that the first process tells."""
    from torch.distributed import broadcast

    heard = torch.tensor(NONE)
    with naming_lost():
        broadcast(heard, src=0)
    return int(heard)


def _in_backward() -> bool:
    """Returns whether autograd is running a backward in this thread, as torch's own checkpointing asks."""
    return torch._C._current_graph_task_id() != -1
