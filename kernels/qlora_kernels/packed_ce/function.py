"""Defines the public loss: checks its arguments, picks the path, and reduces per token, per document and in all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlora_kernels.packed_ce.autograd import LossSettings, cross_entropy, document_sums
from qlora_kernels.packed_ce.backend import Requested, choose_path
from qlora_kernels.packed_ce.checks import check_arguments
from qlora_kernels.packed_ce.head import Head, PatchedHead
from qlora_kernels.packed_ce.options import Options
from qlora_kernels.packed_ce.targets import Targets


@dataclass(frozen=True)
class CEOutput:
    """Holds the loss and the statistics of the supervised positions.

    loss: scalar, or [M] with ``reduction="none"``; differentiable. The others are detached and cost nothing:
    nll: float32 [M] in nats, without smoothing or z-loss;
    correct: bool [M], whether no logit is larger than the target's;
    per_document: float32 [n_documents, 3], the sum of nll, positions, correct.

    All are the same, bit for bit, in every run.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor
    per_document: Tensor

    def per_source(self, source_of_document: Tensor, n_sources: int) -> Tensor:
        """Returns [n_sources, 3] from ``per_document`` and the source (int) of each document; float64."""
        sources = torch.arange(n_sources, device=source_of_document.device)
        member = (source_of_document[None, :] == sources[:, None]).double()
        return member @ self.per_document.double()


def packed_linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Targets,
    *,
    n_items: float | None = None,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "none"] = "mean",
    path: Requested = "auto",
    tile: int | None = None,
    workspace_bytes: int | None = None,
) -> CEOutput:
    """Computes the mean (or ``n_items``-normalised) cross-entropy of the supervised positions, without the full logits.

    ``loss = sum_i w_i * l_i / n_items`` with ``z_i = cap * tanh(scale * (hidden[positions_i] @ head.T + bias) / cap)``,
    ``nll_i = logsumexp(z_i) - z_i[y_i]`` and ``l_i = nll_i + label_smoothing * (z_i[y_i] - mean(z_i)) +
    z_loss * logsumexp(z_i)^2``; no cap, no bias, no smoothing and no z-loss by default.

    Args:
        hidden: [T, D] last hidden states, floating, any strides.
        head: [V, D] output embedding, or an `NF4Head`. Frozen, its gradient costs nothing; trainable, one more product.
            A `PatchedHead` is a frozen one with a few trained rows, whose gradient costs next to nothing.
        targets: the supervised positions, see `Targets`.
        n_items: the divisor, e.g. the supervised tokens of a whole accumulation group; default: the sum of the
            token weights (the number of positions without any). With ``reduction="none"`` the default is 1.
        token_weights: float [M], default 1.
        bias: [V] of the head.
        softcap, logit_scale: as the model's configuration has them.
        reduction: ``none`` returns ``w_i * l_i / n_items`` per token, each differentiable. (With a trainable head its
            backward pass has to compute the logits again.)
        path: ``auto``, ``triton`` or ``torch``; see `choose_path`.
        tile: columns of the vocabulary handled at once; default: on Triton all, unless they do not fit or the head
            is in 4 bits.
        workspace_bytes: limit of a chunk's logits on Triton; default 512 MiB.

    Returns `CEOutput`. Zero positions give loss 0 with a zero gradient, not NaN.
    Raises ValueError naming the argument and its value for wrong shapes, dtypes, devices and targets. Targets that
    only the GPU knows are not looked at, for that would make the host wait: one outside of the vocabulary gives NaN.
    """
    options = Options(softcap, logit_scale, label_smoothing, z_loss)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected mean or none, got {reduction!r}")
    chosen = choose_path(path, hidden.device, (hidden.dtype, head.dtype)).name
    may_wait = chosen == "torch" or hidden.device.type == "cpu"
    check_arguments(hidden, head, targets, token_weights, bias, may_wait)
    if len(targets) == 0:
        return _nothing_supervised(hidden, head, bias, targets, reduction)
    weights = None if token_weights is None else token_weights.float()
    settings = LossSettings(chosen, options, tile, workspace_bytes, reduction == "mean")
    # Autocast would run the products of this function in half precision, behind the back of its float32 sums.
    with torch.autocast(hidden.device.type, enabled=False):
        total, token_loss, nll, correct = cross_entropy(hidden, head, bias, targets, weights, settings)
    nll, correct = nll.detach(), correct.detach()
    if reduction == "none":
        loss = token_loss if weights is None else token_loss * weights
        loss = loss if n_items is None else loss / n_items
    elif n_items is None:
        loss = total / (float(len(targets)) if weights is None else weights.sum().clamp(min=1e-30))
    else:
        loss = total / n_items
    return CEOutput(loss, nll, correct, document_sums(nll, correct, targets, chosen))


def _nothing_supervised(hidden: Tensor, head: Head, bias: Tensor | None, targets: Targets, reduction: str) -> CEOutput:
    # Sums over no row at all: connected to the graph, and 0 even where hidden is not finite.
    """Returns a loss of 0 with a zero gradient.

    It is made of sums over no position at all, which are 0 even where hidden is not finite.
    """
    empty = hidden[:0].sum(1).float()
    loss = empty.sum()
    for parameter in (head.values if isinstance(head, PatchedHead) else head, bias):
        if isinstance(parameter, Tensor):
            loss = loss + parameter[:0].sum()
    nothing = empty.detach()
    per_document = nothing.new_zeros(targets.n_documents, 3)
    return CEOutput(loss if reduction == "mean" else empty, nothing, nothing.bool(), per_document)
