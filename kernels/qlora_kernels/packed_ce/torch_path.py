"""Computes the loss over tiles of the vocabulary in plain torch: the path on a CPU.

The head is read once, tile by tile. A tile's logits of at most `workspace.BLOCK_ROWS` rows are computed *relative to
the logit of the row's target* (the matrix product starts from minus that logit), turned into exponentials in place and
multiplied with the same tile of the head while both are still in the cache::

    e = 2^(z - m)      s += sum_{j != y} e_j      acc += e @ head_tile            (two matrix products in all)

``m`` is the target's logit, so nothing overflows for a model that is worth training; a row in which another
logit is far higher is rescaled when that shows. Subtracting before the rounding is also what makes bfloat16
products good enough: the large terms of the sum are those near the target, and these lose nothing
(nll within 1e-3 of float64, where rounded logits are off by 3e-2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_kernels.packed_ce.finish import Finished, OnlineSoftmax, finish
from qlora_kernels.packed_ce.head import head_rows
from qlora_kernels.packed_ce.inputs import LossInputs, LossResult, compute_dtype
from qlora_kernels.packed_ce.options import LOG2E
from qlora_kernels.packed_ce.workspace import block_rows, block_shape

# A trainable head needs the exponentials of all tiles at once. A group has as many rows as fit these bytes.
GROUP_BYTES = 64 * 2**20
# Units of log 2 between the shift and the largest logit before a row is rescaled; float32 ends at 128.
HEADROOM = 60.0


def run(inputs: LossInputs, tile: int | None = None) -> LossResult:
    """Computes losses and gradients: groups of rows, for each the tiles of the head, for each the blocks of rows."""
    dtype = compute_dtype(inputs.hidden.dtype, inputs.head.dtype, inputs.hidden.device)
    wide = torch.promote_types(dtype, torch.float32)
    count, (vocabulary, width) = len(inputs.positions), inputs.head.shape
    device = inputs.hidden.device
    sums: dict[str, Any] = {"dtype": wide, "device": device}
    result = LossResult(
        torch.empty(count, **sums), torch.empty(count, **sums), torch.empty(count, dtype=torch.bool, device=device)
    )
    if inputs.need_hidden:
        result.grad_hidden = torch.empty(count, width, dtype=inputs.hidden.dtype, device=device)
    if inputs.need_head:
        result.grad_head = torch.zeros(vocabulary, width, **sums)
    if inputs.need_bias:
        result.grad_bias = torch.zeros(vocabulary, **sums)
    keep = inputs.need_head or inputs.need_bias
    block, columns = block_shape(width, dtype)
    size = min(block, max(1, GROUP_BYTES // (vocabulary * dtype.itemsize))) if keep else count
    size = -(-count // -(-count // size))
    for start in range(0, count, size):
        _Group(inputs, result, slice(start, min(start + size, count)), dtype, tile or columns, keep).run()
    return result


class _Group:
    """Computes the rows whose running values are alive together: all of them, or as many as a trainable head allows."""

    def __init__(self, inputs: LossInputs, result: LossResult, rows: slice, dtype: torch.dtype, tile: int, keep: bool):
        self.inputs, self.result, self.rows, self.dtype, self.tile = inputs, result, rows, dtype, tile
        self.wide = torch.promote_types(dtype, torch.float32)
        self.labels = inputs.labels[rows].long()
        self.hidden = inputs.hidden.detach().index_select(0, inputs.positions[rows].long()).to(dtype)
        self.kept: list[tuple[slice, Tensor, Tensor | None]] | None = [] if keep else None
        width = inputs.head.shape[1]
        self.sums: Tensor | None = None
        if result.grad_hidden is not None:  # summed where it is wanted, if that is wide enough
            there = result.grad_hidden.dtype == self.wide
            self.sums = result.grad_hidden[rows] if there else self.hidden.new_empty(self.hidden.shape, dtype=self.wide)
            self.sums.zero_()
        # Label smoothing pulls towards the mean of all (sloped) head rows: [D], or [M, D] with a softcap.
        capped = inputs.options.softcap is not None
        shape = self.hidden.shape if capped else torch.Size([width])
        smooth = inputs.options.label_smoothing and inputs.need_hidden
        self.mean = self.hidden.new_zeros(shape, dtype=self.wide) if smooth else None
        self.bias = None if inputs.bias is None else inputs.bias.detach().to(self.wide)
        self.begin()

    def begin(self) -> None:
        """Computes the target's logit in float64, which gives the shift.

        What the products start from is rounded to their type.
        """
        o, block = self.inputs.options, 128
        parts = [
            torch.einsum(
                "md,md->m", self.hidden[a : a + block].double(), self.head_rows(self.labels[a : a + block]).double()
            )
            for a in range(0, len(self.labels), block)
        ]
        raw = torch.cat(parts) * o.logit_scale
        # In units of log 2 at once where no softcap stands between the product and the exponential.
        self.unit = o.logit_scale if o.softcap is not None else o.logit_scale * LOG2E
        self.start = -(raw if o.softcap is not None else raw * LOG2E).to(self.dtype)
        z = raw if self.bias is None else raw + o.logit_scale * self.bias[self.labels].double()
        self.slope = torch.full_like(z, o.logit_scale)
        if o.softcap is not None:
            t = torch.tanh(z / o.softcap)
            z, self.slope = o.softcap * t, o.logit_scale * (1 - t.square())
        target = (z * LOG2E).to(self.wide)
        plain = o.softcap is None and self.bias is None
        self.state = OnlineSoftmax.begin(target, -self.start.to(self.wide) if plain else target.clone())
        # While this holds, the product comes out relative to the shift and needs no further subtraction.
        self.aligned = plain

    def head_rows(self, which: slice | Tensor) -> Tensor:
        """Returns rows of the head in the type of the products."""
        return head_rows(self.inputs.head, which, self.dtype)

    def run(self) -> None:
        """Visits every block of rows with every tile of the head, and finishes the losses."""
        count, vocabulary = len(self.labels), self.inputs.vocabulary
        step = block_rows(count, self.hidden.shape[1], self.dtype)
        self.product = self.hidden.new_empty(step * self.tile)
        self.exponent = (
            self.product if self.dtype == self.wide else self.hidden.new_empty(step * self.tile, dtype=self.wide)
        )
        spans = [slice(a, min(a + step, count)) for a in range(0, count, step)]
        placed = [self.place(span) for span in spans]
        for index, first in enumerate(range(0, vocabulary, self.tile)):
            columns = slice(first, min(first + self.tile, vocabulary))
            weight = self.head_rows(columns)
            for span, (order, columns_of, bounds) in zip(spans, placed, strict=True):
                own = slice(bounds[index], bounds[index + 1])
                self.visit(span, columns, weight, order[own], columns_of[own] - first)
            if self.mean is not None and self.inputs.options.softcap is None:
                self.mean += weight.sum(0, dtype=self.wide)
            del weight  # before the next tile is made
        del self.product, self.exponent
        self.end()

    def place(self, span: slice) -> tuple[Tensor, Tensor, list[int]]:
        """Returns the rows of a block sorted by target, and where those of each tile begin among them."""
        columns, order = self.labels[span].sort(stable=True)
        tiles = -(-self.inputs.vocabulary // self.tile)
        edges = torch.arange(tiles + 1, device=columns.device) * self.tile
        return order, columns, torch.searchsorted(columns, edges).tolist()

    def visit(self, span: slice, columns: slice, weight: Tensor, own: Tensor, own_columns: Tensor) -> None:
        """Adds one tile of the head to the running values of one block of rows."""
        x, state = self.hidden[span], self.state.part(span)
        shape = (len(x), len(weight))
        z = self.product[: shape[0] * shape[1]].view(shape)
        z.copy_(self.start[span, None].expand(shape))
        torch.addmm(z, x, weight.t(), alpha=self.unit, out=z)
        f = self.exponent[: z.numel()].view(shape)
        if f.data_ptr() != z.data_ptr():
            f.copy_(z)
        slope = self.transform(f, span, columns)
        if self.inputs.options.label_smoothing:
            state.z_sum.add_(f.sum(1)).add_(state.shift, alpha=shape[1])
            if self.mean is not None and slope is not None:
                self.mean[span] += slope.to(self.dtype) @ weight
        f[own, own_columns] = -torch.inf
        largest = f.amax(1)
        torch.maximum(state.max_logit, largest + state.shift, out=state.max_logit)
        if float(largest.max()) > HEADROOM:
            f.sub_(self.rescale(span, state, largest)[:, None])
        f.exp2_()
        state.sum_exp.add_(f.sum(1))
        if slope is not None:
            f.mul_(slope)
        if f.data_ptr() != z.data_ptr():
            z.copy_(f)
        if self.kept is not None:
            self.kept.append((columns, z.clone(), slope if self.inputs.options.label_smoothing else None))
        if self.sums is None:
            return
        if self.dtype == self.wide:
            self.sums[span].addmm_(z, weight)
        else:
            self.sums[span] += z @ weight

    def transform(self, f: Tensor, span: slice, columns: slice) -> Tensor | None:
        """Turns the product in place into ``z - m`` in units of log 2.

        Returns ``1 - tanh^2`` if there is a softcap.
        """
        o = self.inputs.options
        if self.bias is not None:
            f.add_(self.bias[columns], alpha=self.unit)
        if o.softcap is None:
            if not self.aligned:
                f.sub_((self.start[span].to(self.wide) + self.state.shift[span])[:, None])
            return None
        f.sub_(self.start[span, None])
        # tanh(u) = 1 - 2 / (1 + exp(2 u)): ten times faster here than tanh itself.
        f.mul_(2 * LOG2E / o.softcap).exp2_().add_(1).reciprocal_().mul_(-2).add_(1)
        slope = 1 - f.square()
        f.mul_(o.softcap * LOG2E).sub_(self.state.shift[span, None])
        return slope

    def rescale(self, span: slice, state: OnlineSoftmax, largest: Tensor) -> Tensor:
        """Raises the shift of the rows whose largest logit runs away, and returns by how much, in units of log 2."""
        raised = torch.where(largest > HEADROOM, largest, 0.0)
        factor = torch.exp2(-raised)
        state.shift.add_(raised)
        state.sum_exp.mul_(factor)
        if self.sums is not None:
            self.sums[span].mul_(factor[:, None])
        if self.kept is not None:
            assert span == slice(0, len(self.labels)), "a trainable head keeps one block of rows at a time"
            for _, exponentials, _ in self.kept:
                exponentials.mul_(factor[:, None])
        self.aligned = False
        return raised

    def end(self) -> None:
        """Writes losses and gradients of the group into the result."""
        done = finish(self.state, self.inputs.options, self.inputs.vocabulary)
        result, rows = self.result, self.rows
        result.token_loss[rows], result.nll[rows], result.correct[rows] = done.token_loss, done.nll, done.correct
        target_factor = done.target_factor * self.slope.to(self.wide)
        if self.sums is not None and result.grad_hidden is not None:
            self.sums.mul_((done.sum_factor * self.inputs.options.logit_scale)[:, None])
            if self.mean is not None:
                o = self.inputs.options
                self.sums.sub_(self.mean, alpha=o.logit_scale * o.label_smoothing / self.inputs.vocabulary)
            for a in range(0, len(self.labels), 128):
                part = slice(a, a + 128)
                self.sums[part] += target_factor[part, None] * self.head_rows(self.labels[part])
            if self.sums.dtype != result.grad_hidden.dtype:
                result.grad_hidden[rows] = self.sums.to(result.grad_hidden.dtype)
        if self.kept is not None:
            self.add_head_gradient(done, target_factor)

    def add_head_gradient(self, done: Finished, target_factor: Tensor) -> None:
        """Adds ``sum_i w_i dz_i^T h_i`` to the gradient of the head.

        It takes one more product per tile, with all factors of a row put onto its hidden state.
        """
        o, kept = self.inputs.options, self.kept
        assert self.inputs.weights is not None, "the gradient of the head needs the weights of the rows"
        assert kept is not None
        weights = self.inputs.weights[self.rows].to(self.wide)
        sum_factor = done.sum_factor * weights * o.logit_scale
        smooth = weights * (-o.logit_scale * o.label_smoothing / self.inputs.vocabulary)
        grad_head, grad_bias = self.result.grad_head, self.result.grad_bias
        if grad_head is not None:
            x = self.hidden.to(self.wide)
            scaled, smoothed = (x * sum_factor[:, None]).to(self.dtype), (x * smooth[:, None]).to(self.dtype)
            for columns, exponentials, slope in kept:
                grad_head[columns] += exponentials.t() @ scaled
                if slope is not None:
                    grad_head[columns] += slope.to(self.dtype).t() @ smoothed
            if o.label_smoothing and o.softcap is None:
                grad_head += (x * smooth[:, None]).sum(0)
            grad_head.index_add_(0, self.labels, x * (target_factor * weights)[:, None])
        if grad_bias is not None:
            for columns, exponentials, slope in kept:
                grad_bias[columns] += exponentials.to(self.wide).t() @ sum_factor
                if slope is not None:
                    grad_bias[columns] += slope.t() @ smooth
            if o.label_smoothing and o.softcap is None:
                grad_bias += smooth.sum()
            grad_bias.index_add_(0, self.labels, target_factor * weights)
