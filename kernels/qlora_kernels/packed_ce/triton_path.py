"""Computes the loss on a GPU: cuBLAS for the products, one Triton kernel per chunk of rows for everything between them.

Every balanced chunk of positions is gathered, multiplied with float32 output, turned into losses and gradients in place
by the row kernel, and multiplied into ``U[a:b]``. These are two products; nothing is recomputed, and there are never
more logits than the workspace holds. With a head in 4 bits or with trained rows, or a vocabulary of which the workspace
holds too few rows, the vocabulary is cut into tiles instead. A tile is then made once for all rows of a group, and an
accumulator in float32 [group, D] takes the second product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels.packed_ce import gather_scatter, workspace
from qlora_kernels.packed_ce.finish import OnlineSoftmax, finish
from qlora_kernels.packed_ce.head import head_rows
from qlora_kernels.packed_ce.inputs import LossInputs, LossResult
from qlora_kernels.packed_ce.logit_kernels import row_kernel, tile_kernel
from qlora_kernels.packed_ce.options import LOG2E

# With 8 warps, 4096 columns at once need up to 80 registers on sm_75 to sm_120; 32768 spill. The kernel for tiles
# keeps more alive: it spills on sm_120 with 4096.
BLOCK, TILE_BLOCK, WARPS = 4096, 2048, 8


def run(inputs: LossInputs, tile: int | None, workspace_bytes: int | None) -> LossResult:
    """Computes losses and gradients, with whole rows of logits or by tiles of the vocabulary."""
    budget = workspace.WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    trainable = inputs.need_head or inputs.need_bias
    tile = workspace.vocabulary_tile(workspace.HeadShape.of(inputs.head), trainable, tile, budget)
    return _run_rows(inputs, budget) if tile is None else _run_tiles(inputs, tile, budget)


def processors_of(device: torch.device) -> int:
    """Returns the multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Computes out = a @ b, accumulated in float32; ``out`` may be wider than its factors."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the interpreter
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes out += a @ b with float32 ``out``."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += a.to(out.dtype) @ b.to(out.dtype)


def _run_rows(inputs: LossInputs, budget: int) -> LossResult:
    """Computes everything from whole rows of logits, chunk by chunk."""
    count, (vocabulary, width) = len(inputs.positions), inputs.head.shape
    hidden, o = inputs.hidden.detach(), inputs.options
    device, dtype = hidden.device, hidden.dtype
    weight = head_rows(inputs.head, slice(None), dtype)
    bias = None if inputs.bias is None else inputs.bias.detach().contiguous()
    result = _new_result(inputs)
    gradient = inputs.need_hidden or inputs.need_head or inputs.need_bias
    size = workspace.chunk_rows(count, width, vocabulary, budget, processors_of(device))
    logits = torch.empty(size, workspace.padded(vocabulary), dtype=torch.float32, device=device)
    # The same bytes: a row of gradients starts where its row of logits does.
    gradients = logits if dtype == torch.float32 else logits.view(dtype)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        x = gather_scatter.gather_rows(hidden, inputs.positions[part])
        z, g = logits[: len(x), :vocabulary], gradients[: len(x), :vocabulary]
        product(x, weight.t(), out=z)
        row_kernel[(len(x),)](
            z, z.stride(0), g, g.stride(0), bias, inputs.labels[part], result.token_loss[part], result.nll[part],
            result.correct[part], vocabulary, o.logit_scale, o.softcap or 1.0, o.label_smoothing, o.z_loss,
            HAS_BIAS=bias is not None, HAS_CAP=o.softcap is not None, SMOOTH=o.label_smoothing > 0, Z_LOSS=o.z_loss > 0,
            GRAD=gradient, BLOCK=gather_scatter.block_for(vocabulary, BLOCK), num_warps=WARPS,
        )  # fmt: skip
        if result.grad_hidden is not None:
            product(g, weight, out=result.grad_hidden[part])
        if result.grad_head is not None and inputs.weights is not None:
            add_product(result.grad_head, g.t(), (x * inputs.weights[part, None]).to(dtype))
        if result.grad_bias is not None and inputs.weights is not None:
            result.grad_bias += inputs.weights[part] @ g.float()
    result.correct = result.correct.bool()
    return result


def _new_result(inputs: LossInputs) -> LossResult:
    """Returns the empty tensors that the result is written into."""
    count, (vocabulary, width) = len(inputs.positions), inputs.head.shape
    device = inputs.hidden.device
    result = LossResult(
        torch.empty(count, device=device),
        torch.empty(count, device=device),
        torch.empty(count, dtype=torch.int8, device=device),
    )
    if inputs.need_hidden:
        result.grad_hidden = torch.empty(count, width, dtype=inputs.hidden.dtype, device=device)
    if inputs.need_head:
        result.grad_head = torch.zeros(vocabulary, width, device=device)
    if inputs.need_bias:
        result.grad_bias = torch.zeros(vocabulary, device=device)
    return result


def _run_tiles(inputs: LossInputs, tile: int, budget: int) -> LossResult:
    """Computes everything by tiles of the vocabulary, group by group."""
    result = _new_result(inputs)
    count = len(inputs.positions)
    size = workspace.group_rows(count, tile, budget)
    for start in range(0, count, size):
        _run_group(inputs, result, slice(start, min(start + size, count)), tile)
    result.correct = result.correct.bool()
    return result


def _run_group(inputs: LossInputs, result: LossResult, part: slice, tile: int) -> None:
    """Runs all tiles of the vocabulary for one group of rows."""
    hidden, o, vocabulary = inputs.hidden.detach(), inputs.options, inputs.vocabulary
    x, labels = gather_scatter.gather_rows(hidden, inputs.positions[part]), inputs.labels[part]
    weight_y = _target_rows(inputs, labels, x.dtype)
    state, slope_y = _begin(inputs, x, labels, weight_y)
    logits = torch.empty(len(x), workspace.padded(tile), dtype=torch.float32, device=x.device)
    gradients = logits if x.dtype == torch.float32 else logits.view(x.dtype)
    factor = torch.empty_like(state.shift)
    sums = torch.zeros(x.shape, device=x.device) if inputs.need_hidden else None
    mean = torch.zeros_like(sums) if sums is not None and o.label_smoothing else None
    bias = None if inputs.bias is None else inputs.bias.detach().contiguous()
    for first in range(0, vocabulary, tile):
        columns = slice(first, min(first + tile, vocabulary))
        weight = head_rows(inputs.head, columns, x.dtype)
        z, g = logits[:, : len(weight)], gradients[:, : len(weight)]
        product(x, weight.t(), out=z)
        if mean is not None:
            _add_smoothing(mean, z, weight, None if bias is None else bias[columns], inputs)
        tile_kernel[(len(x),)](
            z, z.stride(0), g, g.stride(0), None if bias is None else bias[columns], labels, first, len(weight),
            state.shift, state.sum_exp, state.max_logit, state.z_sum, factor, o.logit_scale, o.softcap or 1.0,
            HAS_BIAS=bias is not None, HAS_CAP=o.softcap is not None, SMOOTH=o.label_smoothing > 0,
            BLOCK=gather_scatter.block_for(len(weight), TILE_BLOCK), num_warps=WARPS,
        )  # fmt: skip
        if sums is not None:
            add_product(sums.mul_(factor[:, None]), g, weight)
        del weight  # before the next tile is made
    del logits, gradients, z, g
    done = finish(state, o, vocabulary)
    result.token_loss[part], result.nll[part] = done.token_loss, done.nll
    result.correct[part] = done.correct.to(torch.int8)
    if sums is not None and result.grad_hidden is not None:
        sums.mul_(done.sum_factor[:, None])
        if mean is not None:
            sums.sub_(mean, alpha=o.label_smoothing / vocabulary)
        result.grad_hidden[part] = sums.addcmul_((done.target_factor * slope_y)[:, None], weight_y.float()).to(
            hidden.dtype
        )


def _target_rows(inputs: LossInputs, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns head[labels], with NaN for a label outside of the vocabulary."""
    known = (labels >= 0) & (labels < inputs.vocabulary)
    rows = head_rows(inputs.head, torch.where(known, labels, 0).long(), dtype)
    return torch.where(known[:, None], rows, float("nan"))


def _begin(inputs: LossInputs, x: Tensor, labels: Tensor, weight_y: Tensor) -> tuple[OnlineSoftmax, Tensor]:
    """Returns the state whose first shift is the target's logit, and ``dz_y / dx_y``."""
    o = inputs.options
    z = (x.float() * weight_y.float()).sum(1)
    if inputs.bias is not None:
        z = z + inputs.bias.detach()[labels.clamp(0, inputs.vocabulary - 1).long()].float()
    z = z * o.logit_scale
    slope = torch.full_like(z, o.logit_scale)
    if o.softcap is not None:
        t = torch.tanh(z / o.softcap)
        z, slope = o.softcap * t, o.logit_scale * (1 - t.square())
    target = z * LOG2E
    return OnlineSoftmax.begin(target, target.clone()), slope


def _add_smoothing(mean: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, inputs: LossInputs) -> None:
    """Computes mean += sum_j (dz_j / dx_j) w_j.

    It is the same for all rows unless the logits are capped.
    """
    o = inputs.options
    if o.softcap is None:
        mean.add_(weight.sum(0, dtype=torch.float32), alpha=o.logit_scale)
        return
    capped = torch.tanh((z if bias is None else z + bias) * (o.logit_scale / o.softcap))
    add_product(mean, ((1 - capped.square()) * o.logit_scale).to(weight.dtype), weight)
