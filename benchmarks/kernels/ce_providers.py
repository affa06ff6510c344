"""Provides the losses that are compared, as ``f(hidden [T, D], head [V, D], labels) -> mean loss of supervised rows``.

Each is imported when it is asked for. What is not installed or does not run on this device is reported, not guessed.
Every provider gets what its own trainer gives it: those that drop unsupervised rows are given all rows and the mask.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from qlora_kernels.packed_ce.targets import Targets


class NotAvailable(Exception):
    """Says why a provider cannot be measured here."""


@dataclass(frozen=True)
class Labels:
    """Holds the labels in the forms that the providers want.

    ``shifted`` int64 [T] has the label of each row, -100 where unsupervised. ``unshifted`` int64 [T] has them as a
    tokenizer makes them. ``targets`` has them for our function. ``count`` is the number of supervised rows.
    """

    shifted: Tensor
    unshifted: Tensor
    targets: Targets
    count: int


Loss = Callable[[Tensor, Tensor, Labels], Tensor]


def eager(device: torch.device) -> Loss:
    return lambda hidden, head, labels: F.cross_entropy((hidden @ head.t()).float(), labels.shifted)


def compiled(device: torch.device) -> Loss:
    return torch.compile(eager(device))


def torch_fused(device: torch.device) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotAvailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    # Without options it forms all the logits.
    options = LinearCrossEntropyOptions()
    return lambda hidden, head, labels: F.linear_cross_entropy(
        hidden, head, labels.shifted, ignore_index=-100, options=options
    )


def liger(device: torch.device) -> Loss:
    need_gpu(device)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    def loss(hidden: Tensor, head: Tensor, labels: Labels) -> Tensor:
        result = Liger.apply(hidden, head, labels.shifted)
        return result[0] if isinstance(result, tuple) else result

    return loss


def cce(device: torch.device) -> Loss:
    need_gpu(device)
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, head, labels: linear_cross_entropy(hidden, head, labels.shifted)


def trl(device: torch.device) -> Loss:
    need_gpu(device)
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(hidden: Tensor, head: Tensor, labels: Labels) -> Tensor:
        kept = labels.shifted != -100
        # 32768 columns and no optional outputs: what its SFT trainer passes for loss_type="nll".
        log_probs = ChunkedLogProbFunction.apply(
            hidden[kept], head, None, labels.shifted[kept], 1.0, 32768, None, 1.0, ()
        )[0]
        return -log_probs.sum() / kept.sum().clamp(min=1)

    return loss


def unsloth(device: torch.device) -> Loss:
    if device.type == "cuda":
        from unsloth_zoo.fused_losses import unsloth_fused_ce_loss

        return lambda hidden, head, labels: unsloth_fused_ce_loss(
            None, hidden[None], head, None, labels.unshifted[None], n_items=labels.count
        )
    os.environ.setdefault("UNSLOTH_IS_PRESENT", "1")
    from unsloth_zoo.cpu.ops import chunked_linear_cross_entropy

    return lambda hidden, head, labels: chunked_linear_cross_entropy(
        hidden, head, None, num_items_in_batch=labels.count, shift_labels=labels.shifted
    )


def ours(device: torch.device) -> Loss:
    from qlora_kernels.packed_ce import packed_linear_cross_entropy

    return lambda hidden, head, labels: packed_linear_cross_entropy(hidden, head, labels.targets).loss


def need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotAvailable("needs a GPU")


PROVIDERS: dict[str, Callable[[torch.device], Loss]] = {
    "torch eager": eager,
    "torch.compile": compiled,
    "F.linear_cross_entropy": torch_fused,
    "Liger": liger,
    "cut-cross-entropy": cce,
    "TRL": trl,
    "Unsloth": unsloth,
    "ours": ours,
}


def build(name: str, device: torch.device) -> Loss:
    """Returns the provider of this name. Raises `NotAvailable` with the reason if it cannot be measured here."""
    try:
        return PROVIDERS[name](device)
    except NotAvailable:
        raise
    except Exception as error:  # a peer that fails while it is imported is not there, whatever it raises
        raise NotAvailable(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None
