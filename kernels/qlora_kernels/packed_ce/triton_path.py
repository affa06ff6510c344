"""The path on a GPU: cuBLAS for the products, one Triton kernel per chunk of rows for everything between them.

Per balanced chunk of rows: gather -> product with float32 output -> row kernel, gradient in place -> product into
``U[a:b]``. Two products, nothing recomputed, and never more logits than the workspace holds. With a head in 4 bits or
with trained rows, or a vocabulary of which the workspace holds too few rows, the vocabulary is cut into tiles instead;
a tile is made once for all rows of a group, and an accumulator in float32 [group, D] takes the second product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kernels.packed_ce import move, workspace
from qlora_kernels.packed_ce.finish import RowState, finish
from qlora_kernels.packed_ce.head import head_rows
from qlora_kernels.packed_ce.options import LOG2E
from qlora_kernels.packed_ce.problem import Problem, Result
from qlora_kernels.packed_ce.rows import row_kernel, tile_kernel

# With 8 warps, 4096 columns at once need up to 80 registers on sm_75 to sm_120; 32768 spill. The kernel for tiles
# keeps more alive: it spills on sm_120 with 4096.
BLOCK, TILE_BLOCK, WARPS = 4096, 2048, 8


def run(problem: Problem, tile: int | None, workspace_bytes: int | None) -> Result:
    budget = workspace.WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    trainable = problem.need_head or problem.need_bias
    tile = workspace.vocabulary_tile(workspace.HeadShape.of(problem.head), trainable, tile, budget)
    return _run_rows(problem, budget) if tile is None else _run_tiles(problem, tile, budget)


def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, accumulated in float32; ``out`` may be wider than its factors."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the interpreter
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b with float32 ``out``."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += a.to(out.dtype) @ b.to(out.dtype)


def _run_rows(problem: Problem, budget: int) -> Result:
    count, (vocabulary, width) = len(problem.rows), problem.head.shape
    hidden, o = problem.hidden.detach(), problem.options
    device, dtype = hidden.device, hidden.dtype
    weight = head_rows(problem.head, slice(None), dtype)
    bias = None if problem.bias is None else problem.bias.detach().contiguous()
    result = _new_result(problem)
    gradient = problem.need_hidden or problem.need_head or problem.need_bias
    size = workspace.chunk_rows(count, width, vocabulary, budget, processors_of(device))
    logits = torch.empty(size, workspace.padded(vocabulary), dtype=torch.float32, device=device)
    # The same bytes: a row of gradients starts where its row of logits does.
    gradients = logits if dtype == torch.float32 else logits.view(dtype)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        x = move.gather_rows(hidden, problem.rows[part])
        z, g = logits[: len(x), :vocabulary], gradients[: len(x), :vocabulary]
        product(x, weight.t(), out=z)
        row_kernel[(len(x),)](
            z, z.stride(0), g, g.stride(0), bias, problem.ids[part], result.objective[part], result.nll[part],
            result.hit[part], vocabulary, o.logit_scale, o.softcap or 1.0, o.label_smoothing, o.z_loss,
            HAS_BIAS=bias is not None, HAS_CAP=o.softcap is not None, SMOOTH=o.label_smoothing > 0, Z_LOSS=o.z_loss > 0,
            GRAD=gradient, BLOCK=move.block_for(vocabulary, BLOCK), num_warps=WARPS,
        )  # fmt: skip
        if result.unscaled is not None:
            product(g, weight, out=result.unscaled[part])
        if result.head is not None and problem.weights is not None:
            add_product(result.head, g.t(), (x * problem.weights[part, None]).to(dtype))
        if result.bias is not None and problem.weights is not None:
            result.bias += problem.weights[part] @ g.float()
    result.hit = result.hit.bool()
    return result


def _new_result(problem: Problem) -> Result:
    count, (vocabulary, width) = len(problem.rows), problem.head.shape
    device = problem.hidden.device
    result = Result(
        torch.empty(count, device=device),
        torch.empty(count, device=device),
        torch.empty(count, dtype=torch.int8, device=device),
    )
    if problem.need_hidden:
        result.unscaled = torch.empty(count, width, dtype=problem.hidden.dtype, device=device)
    if problem.need_head:
        result.head = torch.zeros(vocabulary, width, device=device)
    if problem.need_bias:
        result.bias = torch.zeros(vocabulary, device=device)
    return result


def _run_tiles(problem: Problem, tile: int, budget: int) -> Result:
    result = _new_result(problem)
    count = len(problem.rows)
    size = workspace.group_rows(count, tile, budget)
    for start in range(0, count, size):
        _run_group(problem, result, slice(start, min(start + size, count)), tile)
    result.hit = result.hit.bool()
    return result


def _run_group(problem: Problem, result: Result, part: slice, tile: int) -> None:
    """All tiles of the vocabulary for one group of rows."""
    hidden, o, vocabulary = problem.hidden.detach(), problem.options, problem.vocabulary
    x, ids = move.gather_rows(hidden, problem.rows[part]), problem.ids[part]
    weight_y = _target_rows(problem, ids, x.dtype)
    state, slope_y = _begin(problem, x, ids, weight_y)
    logits = torch.empty(len(x), workspace.padded(tile), dtype=torch.float32, device=x.device)
    gradients = logits if x.dtype == torch.float32 else logits.view(x.dtype)
    factor = torch.empty_like(state.shift)
    sums = torch.zeros(x.shape, device=x.device) if problem.need_hidden else None
    mean = torch.zeros_like(sums) if sums is not None and o.label_smoothing else None
    bias = None if problem.bias is None else problem.bias.detach().contiguous()
    for first in range(0, vocabulary, tile):
        columns = slice(first, min(first + tile, vocabulary))
        weight = head_rows(problem.head, columns, x.dtype)
        z, g = logits[:, : len(weight)], gradients[:, : len(weight)]
        product(x, weight.t(), out=z)
        if mean is not None:
            _add_smoothing(mean, z, weight, None if bias is None else bias[columns], problem)
        tile_kernel[(len(x),)](
            z, z.stride(0), g, g.stride(0), None if bias is None else bias[columns], ids, first, len(weight),
            state.shift, state.others, state.top, state.z_sum, factor, o.logit_scale, o.softcap or 1.0,
            HAS_BIAS=bias is not None, HAS_CAP=o.softcap is not None, SMOOTH=o.label_smoothing > 0,
            BLOCK=move.block_for(len(weight), TILE_BLOCK), num_warps=WARPS,
        )  # fmt: skip
        if sums is not None:
            add_product(sums.mul_(factor[:, None]), g, weight)
        del weight  # before the next tile is made
    del logits, gradients, z, g
    done = finish(state, o, vocabulary)
    result.objective[part], result.nll[part] = done.objective, done.nll
    result.hit[part] = done.hit.to(torch.int8)
    if sums is not None and result.unscaled is not None:
        sums.mul_(done.of_sum[:, None])
        if mean is not None:
            sums.sub_(mean, alpha=o.label_smoothing / vocabulary)
        result.unscaled[part] = sums.addcmul_((done.of_target * slope_y)[:, None], weight_y.float()).to(hidden.dtype)


def _target_rows(problem: Problem, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """head[ids]; NaN for an id outside of the vocabulary."""
    known = (ids >= 0) & (ids < problem.vocabulary)
    rows = head_rows(problem.head, torch.where(known, ids, 0).long(), dtype)
    return torch.where(known[:, None], rows, float("nan"))


def _begin(problem: Problem, x: Tensor, ids: Tensor, weight_y: Tensor) -> tuple[RowState, Tensor]:
    """The target's logit is the first shift. Returns the state and ``dz_y / dx_y``."""
    o = problem.options
    z = (x.float() * weight_y.float()).sum(1)
    if problem.bias is not None:
        z = z + problem.bias.detach()[ids.clamp(0, problem.vocabulary - 1).long()].float()
    z = z * o.logit_scale
    slope = torch.full_like(z, o.logit_scale)
    if o.softcap is not None:
        t = torch.tanh(z / o.softcap)
        z, slope = o.softcap * t, o.logit_scale * (1 - t.square())
    target = z * LOG2E
    return RowState.begin(target, target.clone()), slope


def _add_smoothing(mean: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem) -> None:
    """mean += sum_j (dz_j / dx_j) w_j; the same for all rows unless the logits are capped."""
    o = problem.options
    if o.softcap is None:
        mean.add_(weight.sum(0, dtype=torch.float32), alpha=o.logit_scale)
        return
    capped = torch.tanh((z if bias is None else z + bias) * (o.logit_scale / o.softcap))
    add_product(mean, ((1 - capped.square()) * o.logit_scale).to(weight.dtype), weight)
