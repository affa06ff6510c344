"""Measures on short sequences what one decoder layer of this model takes for a sequence of T tokens."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from qlora_kernels.offload import ATTENTION_OPERATORS, LayerBytes, drop_failed_graphs
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_sft.data.batch import Batch
from qlora_sft.errors import RunError, first_line
from qlora_sft.model.base import decoder_layers
from qlora_sft.model.hidden import one_at_a_time
from qlora_sft.model.loss import last_hidden_states
from qlora_sft.model.mlp import TiledMLP, set_recompute
from qlora_sft.model.shards import whole
from qlora_sft.say import Say, tell

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from qlora_sft.model.base import CausalModel

# Tokens of the shorter sequence that is run; the longer has twice as many. What a layer takes is a constant
# (dequantised weights) plus a part proportional to the tokens, as attention keeps no matrix of scores. So two points
# give the line.
SHORT = 256
# A GPU without room for twice as many tokens of one layer has none for training.
SHORTEST = 32


def measure_layer(
    model: CausalModel, tokens: int, dtype: torch.dtype, tree: bool = False, say: Say = tell
) -> LayerBytes:
    """Returns the bytes of the largest decoder layer for a sequence of ``tokens``.

    It changes neither the model nor the random numbers. If the GPU has no room for the lengths that are measured,
    shorter ones are measured, which is printed. Raises `RunError` if there is no room even for the shortest.
    """
    layer = max(decoder_layers(model), key=lambda each: sum(p.nbytes for p in each.parameters()))
    mlp = getattr(layer, "mlp", None)
    # Up to one tile the MLP's backward takes more with every token, beyond it no more.
    short = mlp.tile if isinstance(mlp, TiledMLP) else SHORT
    while True:
        try:
            with whole(model, layer):
                return _measure(layer, model, tokens, dtype, short, tree)
        except torch.OutOfMemoryError as error:
            obstacle = first_line(error)
        # Only here, where the error has gone with all that its traceback held.
        drop_failed_graphs()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if short <= SHORTEST:
            raise RunError(
                f"beside the model the GPU has no room for one layer of {min(tokens, 2 * short)} tokens ({obstacle}). "
                "Free some of it, or try memory.offload_embeddings, model.head_in_4bit or a smaller lora.r"
            )
        short //= 2
        say(
            f"memory: no room to measure a layer ({obstacle}); measured with {2 * short:,} tokens instead, which "
            "overestimates a long sequence"
        )


def _measure(
    layer: nn.Module, model: CausalModel, tokens: int, dtype: torch.dtype, short: int, tree: bool
) -> LayerBytes:
    """Measures ``layer`` as it is kept and as it is computed again, from lengths of ``short`` and twice as many."""
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, TiledMLP):
        return _extrapolate(layer, model, tokens, dtype, short, tree)
    before = mlp.recompute
    try:
        set_recompute(layer, False, tokens)
        kept = _extrapolate(layer, model, tokens, dtype, short, tree)
        set_recompute(layer, True, tokens)
        again = _extrapolate(layer, model, tokens, dtype, short, tree)
    finally:
        mlp.recompute = before
    return replace(kept, recomputed=again.kept, backward=max(kept.backward, again.backward))


def _extrapolate(
    layer: nn.Module, model: CausalModel, tokens: int, dtype: torch.dtype, short: int, tree: bool
) -> LayerBytes:
    """Returns the bytes for ``tokens`` on the line through two measured lengths, ``short`` tokens and twice as many.

    A shorter sequence is measured itself.
    """
    long = 2 * short
    if model.device.type == "cuda":
        _measured(
            layer, model, min(short, tokens), dtype, tree
        )  # cuBLAS and Triton take workspaces at their first call
    if tokens <= long:
        return _measured(layer, model, tokens, dtype, tree)
    low, high = (asdict(_measured(layer, model, each, dtype, tree)) for each in (short, long))
    names = ("input", "attention", "kept", "backward")
    return LayerBytes(**{n: high[n] + round((high[n] - low[n]) * (tokens - long) / (long - short)) for n in names})


def _measured(layer: nn.Module, model: CausalModel, tokens: int, dtype: torch.dtype, tree: bool = False) -> LayerBytes:
    """Runs one layer forward and backward for ``tokens`` and returns what it took."""
    device = model.device
    was_training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            return _run(layer, _call_of(layer, model, tokens, tree))
    finally:
        model.train(was_training)


class _Captured(Exception):
    """Ends a forward as soon as it has called the layer in question."""


class LayerCall(NamedTuple):
    """Holds the arguments with which the model calls a decoder layer."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, object]


def _call_of(layer: nn.Module, model: CausalModel, tokens: int, tree: bool) -> LayerCall:
    """Returns the arguments that the model gives to ``layer`` for two documents of ``tokens``.

    Each family of models has keywords of its own.
    """
    calls: list[LayerCall] = []

    def capture(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        calls.append(LayerCall(args, kwargs))
        raise _Captured

    hook = layer.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Captured):
            last_hidden_states(model, _documents(model, tokens, tree))
    finally:
        hook.remove()
    return calls[0]


def _documents(model: CausalModel, tokens: int, tree: bool = False) -> Batch:
    """Returns a batch of two documents without a supervised token, or of a tree with as many segments and a branch."""
    vocabulary = model.config.get_text_config().vocab_size
    none = torch.zeros(0, dtype=torch.int32)
    # Two of them, because the results of several are joined where each is attended to alone.
    halves = (tokens - tokens // 2, tokens // 2)
    lengths = halves if tokens > 1 and not one_at_a_time(model) else (tokens,)
    parents = tuple(range(-1, len(lengths) - 1)) if tree else None
    edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=model.device)
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])
    return Batch(
        input_ids=(torch.arange(tokens) % vocabulary).to(model.device)[None],
        position_ids=positions[None],
        cu_seqlens=edges,
        positions=none, targets=none, position_weights=none.float(), position_documents=none,
        position_counts=none.float(), position_sources=none, sources=(), source_weights=(),
        n_supervised=0, weight_sum=0.0, longest=lengths[0], lengths=lengths,
        parents=parents, repeated=none.long(),
    )  # fmt: skip


def _run(layer: nn.Module, call: LayerCall) -> LayerBytes:
    """Runs forward and backward of the layer and measures both."""
    hidden = call.args[0].detach().requires_grad_()
    with memory_use(hidden.device) as use, _AttentionBytes() as attention:
        with torch.enable_grad():
            # Not layer(...), which would run the checkpointing that the loader has switched on.
            result = layer.forward(hidden, *call.args[1:], **call.kwargs)
        output = _tensors(result)[0]
        # The output is the next layer's input, and gone when this layer's backward begins.
        kept = hidden.nbytes + use.live() - output.nbytes
        wanted = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
        edge, gradient = get_gradient_edge(output), torch.ones_like(output)
        del output, result
        torch.autograd.grad(edge, wanted, gradient, allow_unused=True)
    return LayerBytes(hidden.nbytes, attention.nbytes, kept, max(0, hidden.nbytes + use.peak() - kept))


def _tensors(tree: object) -> list[Tensor]:
    """Returns all tensors in a nested structure."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _AttentionBytes(TorchDispatchMode):
    """Adds up the bytes of the results of all attention operators."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func.name() in ATTENTION_OPERATORS:
            self.nbytes += sum(tensor.nbytes for tensor in _tensors(result))
        return result


class MemoryUse(Protocol):
    """Counts the bytes that were allocated since it began."""

    def live(self) -> int: ...
    def peak(self) -> int: ...


@contextlib.contextmanager
def memory_use(device: torch.device) -> Iterator[MemoryUse]:
    """Measures what is done inside.

    On a GPU torch's allocator is asked, on a CPU the results of all operators are counted.
    """
    if device.type == "cuda":
        yield _CudaUse(device)
    else:
        counted = _CpuUse()
        with counted:
            yield counted


class _CudaUse:
    """Counts requested bytes.

    Allocated ones include up to 1 MiB of rounding per tensor, of which a long sequence has no more than a short one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        self.before = self._requested("current")

    def live(self) -> int:
        return self._requested("current") - self.before

    def peak(self) -> int:
        return self._requested("peak") - self.before

    def _requested(self, when: str) -> int:
        return int(torch.cuda.memory_stats(self.device).get(f"requested_bytes.all.{when}", 0))


class _CpuUse(TorchDispatchMode):
    """Follows the storage of every new tensor until it is freed.

    What an operator takes inside, it does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live = self._peak = 0
        self._known: set[int] = set()

    def live(self) -> int:
        return self._live

    def peak(self) -> int:
        return self._peak

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address and address not in given and address not in self._known:
                self._known.add(address)
                self._live += storage.nbytes()
                weakref.finalize(storage, self._freed, address, storage.nbytes())
        self._peak = max(self._peak, self._live)
        return result

    def _freed(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self._live -= nbytes
