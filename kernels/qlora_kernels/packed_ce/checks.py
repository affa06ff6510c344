"""Refuses wrong arguments with the argument's name and its value, before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels.packed_ce.head import Head, NF4Head, PatchedHead
from qlora_kernels.packed_ce.targets import Targets

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    hidden: Tensor, head: Head, targets: Targets, token_weights: Tensor | None, bias: Tensor | None, may_wait: bool
) -> None:
    """Raises ValueError for wrong shapes, types, devices and values.

    may_wait: whether values on the device may be looked at even if that makes the host wait for it.
    """
    if hidden.dim() != 2 or hidden.dtype not in FLOATING:
        raise ValueError(f"hidden: expected floating [T, D], got {hidden.dtype} {list(hidden.shape)}")
    if isinstance(head, Tensor) and (head.dim() != 2 or head.dtype not in FLOATING):
        raise ValueError(f"head: expected floating [V, {hidden.shape[1]}], got {head.dtype} {list(head.shape)}")
    if head.shape[1] != hidden.shape[1]:
        raise ValueError(f"head: expected floating [V, {hidden.shape[1]}], got {head.dtype} {list(head.shape)}")
    if isinstance(head, NF4Head) and head.requires_grad:
        raise ValueError("head: a 4-bit head cannot be trained")
    if isinstance(head, PatchedHead):
        _check_patch(head)
    named: dict[str, Head | None] = {
        "head": head,
        "targets.positions": targets.positions,
        "targets.labels": targets.labels,
        "targets.documents": targets.documents,
    }
    named |= {"token_weights": token_weights, "bias": bias}
    named |= {"head.values": head.values} if isinstance(head, PatchedHead) else {}
    for name, value in named.items():
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}")
    if token_weights is not None and (
        token_weights.shape != targets.positions.shape or not token_weights.is_floating_point()
    ):
        got = f"{token_weights.dtype} {list(token_weights.shape)}"
        raise ValueError(f"token_weights: expected floating [{len(targets)}], got {got}")
    if bias is not None and (bias.shape != (head.shape[0],) or not bias.is_floating_point()):
        raise ValueError(f"bias: expected floating [{head.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    _check_range(
        "targets.positions", targets.positions, targets.position_range, hidden.shape[0], "positions of hidden", may_wait
    )
    _check_range(
        "targets.labels", targets.labels, targets.label_range, head.shape[0], "tokens of the vocabulary", may_wait
    )


def _check_patch(head: PatchedHead) -> None:
    vocabulary, width = head.shape
    if head.base.requires_grad:
        raise ValueError("head.base: it is trained as a whole; give it as head, without a PatchedHead")
    if head.values.shape != (len(head.token_ids), width) or not head.values.is_floating_point():
        got = f"{head.values.dtype} {list(head.values.shape)}"
        raise ValueError(f"head.values: expected floating [{len(head.token_ids)}, {width}], got {got}")
    if len(set(head.token_ids)) < len(head.token_ids) or any(not 0 <= token < vocabulary for token in head.token_ids):
        raise ValueError(
            f"head.token_ids: expected distinct rows of a head of {vocabulary}, got {list(head.token_ids)}"
        )


def _check_range(
    name: str, values: Tensor, known: tuple[int, int] | None, size: int, what: str, may_wait: bool
) -> None:
    if not values.numel():
        return
    if known is None:
        if not may_wait:
            return  # the kernels answer NaN for what is outside, and read nothing there
        known = int(values.min()), int(values.max())
    if known[0] < 0 or known[1] >= size:
        worst = known[0] if known[0] < 0 else known[1]
        raise ValueError(f"{name}: {worst} is outside of the {size} {what}")
