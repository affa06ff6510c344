"""What one decoder layer of this model takes for a row of T tokens, measured on short rows."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from qlora_kernels.offload import ATTENTION_OPERATORS, LayerBytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_sft.data.batch import Batch
from qlora_sft.model.loss import last_hidden_states

# Rows that are run. What a layer takes is a constant (dequantised weights) plus a part proportional to the tokens,
# because attention keeps no matrix of scores: two points give the line.
SHORT, LONG = 256, 512


def measure_layer(model: Any, tokens: int, dtype: torch.dtype) -> LayerBytes:
    """Bytes of the largest decoder layer for a row of ``tokens``. Changes neither the model nor the random numbers."""
    if tokens <= LONG:
        return _measured(model, tokens, dtype)
    low, high = _measured(model, SHORT, dtype), _measured(model, LONG, dtype)

    def at(a: int, b: int) -> int:
        return b + round((b - a) * (tokens - LONG) / (LONG - SHORT))

    return LayerBytes(
        input=at(low.input, high.input),
        attention=at(low.attention, high.attention),
        kept=at(low.kept, high.kept),
        backward=at(low.backward, high.backward),
    )


def decoder_layers(model: Any) -> list[nn.Module]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(base.get_decoder().layers)


def _measured(model: Any, tokens: int, dtype: torch.dtype) -> LayerBytes:
    layer = max(decoder_layers(model), key=lambda each: sum(p.nbytes for p in each.parameters()))
    device = model.device
    was_training = model.training
    model.train()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            args, kwargs = _call_of(layer, model, tokens)
            return _run(layer, args, kwargs)
    finally:
        model.train(was_training)


class _Captured(Exception):
    pass


def _call_of(layer: nn.Module, model: Any, tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model gives to ``layer`` for one document of ``tokens``: each family has keywords of its own."""
    call: list[Any] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.extend((args, kwargs))
        raise _Captured

    hook = layer.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad(), contextlib.suppress(_Captured):
            last_hidden_states(model, _document(model, tokens))
    finally:
        hook.remove()
    return call[0], call[1]


def _document(model: Any, tokens: int) -> Batch:
    vocabulary = model.get_input_embeddings().num_embeddings
    none = torch.zeros(0, dtype=torch.int32)
    return Batch(
        input_ids=(torch.arange(tokens) % vocabulary).to(model.device)[None],
        position_ids=torch.arange(tokens, device=model.device)[None],
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32, device=model.device),
        rows=none, targets=none, row_weights=none.float(), row_documents=none,
        n_supervised=0, weight_sum=0.0, longest=tokens,
    )  # fmt: skip


def _run(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBytes:
    hidden = args[0].detach().requires_grad_()
    shared = {_address(t) for t in (*layer.parameters(), *layer.buffers(), *_tensors((args, kwargs)))}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if _address(tensor) not in shared:
            saved[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with peak_above(hidden.device) as peak, _AttentionBytes() as attention:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            # Not layer(...), which would run the checkpointing that the loader has switched on.
            output = next(t for t in _tensors(layer.forward(*args[:0], hidden, *args[1:], **kwargs)))
        saved.pop(_address(output), None)  # the next layer's input
        wanted = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
        torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
    kept = hidden.nbytes + sum(saved.values())
    return LayerBytes(hidden.nbytes, attention.nbytes, kept, max(0, hidden.nbytes + peak[0] - kept))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _AttentionBytes(TorchDispatchMode):
    """Bytes of the results of all attention operators."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in ATTENTION_OPERATORS:
            self.nbytes += sum(tensor.nbytes for tensor in _tensors(result))
        return result


class _LiveBytes(TorchDispatchMode):
    """Bytes of all memory that operators have allocated and that is still in use; for devices without such counts."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address and address not in before and address not in self._known:
                self._known.add(address)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, address, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, address: int, nbytes: int) -> None:
        self._known.discard(address)
        self.live -= nbytes


@contextlib.contextmanager
def peak_above(device: torch.device) -> Iterator[list[int]]:
    """``[bytes]``: the most that was allocated at once inside, beyond what there was before."""
    found = [0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(device) - before
    else:
        with _LiveBytes() as live:
            yield found
        found[0] = live.peak
