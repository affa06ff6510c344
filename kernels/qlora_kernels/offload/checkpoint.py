"""Runs a decoder layer by its tier, in functions with the signature of transformers' ``_gradient_checkpointing_func``.

``function(*args)`` is the layer; its first argument is the hidden states, everything else is shared between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qlora_kernels.offload.schedule import Schedule, TicketRef
from qlora_kernels.offload.tiers import Tier

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.utils.checkpoint import SelectiveCheckpointContext

LayerFunction = Callable[..., Any]

# The operators that attend, whatever library they come from. Their results (output, log-sum-exp) are all that their
# backward needs beside query, key and value.
ATTENTION_OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
    }
)


def layer_functions(tiers: Sequence[Tier], schedule: Schedule | None) -> list[LayerFunction]:
    """Returns one function per layer, in the order of the forward.

    schedule: what moves the inputs; it may be None if no tier is ``offload``.
    """
    plain: dict[Tier, LayerFunction] = {
        "keep": run_kept, "attention": run_attention_kept, "checkpoint": run_checkpointed
    }  # fmt: skip
    if schedule is None:
        return [plain[tier] for tier in tiers]
    offloaded = partial(run_offloaded, schedule)
    functions = [offloaded if tier == "offload" else partial(_fetching, schedule, plain[tier]) for tier in tiers]
    return [partial(_beginning, schedule, functions[0]), *functions[1:]]


def run_kept(function: LayerFunction, *args: object) -> object:
    """Runs the layer and keeps everything that its backward needs."""
    return function(*args)


def run_checkpointed(function: LayerFunction, *args: object) -> object:
    """Runs the layer and keeps its input, from which the backward computes it again."""
    return checkpoint(function, *args, use_reentrant=False)


def run_attention_kept(function: LayerFunction, *args: object) -> object:
    """Runs the layer checkpointed, but keeps the results of attention, which is then not done again.

    torch allows one backward per forward of such a layer.
    """
    contexts = partial(create_selective_checkpoint_contexts, _attention_is_saved)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def run_offloaded(schedule: Schedule, function: LayerFunction, *args: object) -> object:
    """Runs the layer checkpointed, with its hidden states in host memory.

    Non-reentrant checkpointing saves its tensor arguments through the hooks around it and hides what the layer itself
    saves, so the hooks see the hidden states and nothing else.
    """
    if not args or not isinstance(args[0], Tensor):
        raise TypeError("the hidden states must be the layer's first positional argument to be offloaded")
    hidden, *rest = args
    with torch.autograd.graph.saved_tensors_hooks(schedule.pack, schedule.unpack):
        return checkpoint(lambda x: function(x, *rest), hidden, use_reentrant=False)


def _fetching(schedule: Schedule, run: LayerFunction, function: LayerFunction, *args: object) -> object:
    """Runs a layer that stays on the device after offloaded ones: its backward starts their way back."""
    newest = schedule.newest
    result = run(function, *args)
    hidden = result if isinstance(result, Tensor) else result[0]
    if newest is not None and hidden.requires_grad:
        hidden.register_hook(partial(_fetch, schedule, newest))
    return result


def _fetch(schedule: Schedule, newest: TicketRef, gradient: Tensor) -> None:
    """Starts the copies of the offloaded layers before this one, when its gradient arrives."""
    schedule.fetch_before(newest)


def _beginning(schedule: Schedule, run: LayerFunction, function: LayerFunction, *args: object) -> object:
    """Runs the first layer of a forward, which begins the schedule anew."""
    schedule.begin()
    return run(function, *args)


def _attention_is_saved(
    context: SelectiveCheckpointContext, operator: OpOverload, *args: object, **kwargs: object
) -> CheckpointPolicy:
    """Tells selective checkpointing to keep the results of attention and to compute everything else again."""
    if operator.name() in ATTENTION_OPERATORS and not _dropout(operator, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _dropout(operator: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    """Returns the dropout of an attention operator.

    With dropout attention draws random numbers. If the second forward left it out, all later draws would differ.
    """
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            value = args[position] if position < len(args) else kwargs.get("dropout_p", 0.0)
            return float(value)
    return 0.0
