"""Computes losses and gradients from rows of logits in Triton, with one kernel for whole rows and one for a tile.

Plain reference: `reference.reference_linear_cross_entropy` and its autograd.

Per row, with ``z_j = cap * tanh(scale * (x_j + b_j) / cap)``, the largest other logit ``m = max_{j != y} z_j`` and
``s = sum_{j != y} exp(z_j - m)``, all from one online pass (Milakov & Gimelshein 2018)::

    q = m + log s - z_y                    log odds of "not the target"
    nll = softplus(q)                      = logsumexp(z) - z_y, exact where p_y is near 1
    dz_y = -sigmoid(q)                     = p_y - 1, likewise
    dz_j = exp(z_j - lse)

The gradient overwrites the logits. In half precision its row starts where the float32 row starts, so element ``o``
goes to byte ``2 o`` while logit ``o`` lies at byte ``4 o``: a block overwrites only bytes that it, or an earlier
block, has read. All threads have loaded before any stores, which is what the barrier is for.
"""

# Triton compiles a kernel from its own globals; constants have to be constexpr, and tl has no type stubs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def transform(x, scale, cap, HAS_CAP: tl.constexpr):
    """Returns ``z`` and ``dz / dx``. tanh goes by way of the sigmoid: the interpreter has no libdevice."""
    z = x * scale
    slope = scale
    if HAS_CAP:
        t = 2.0 * tl.sigmoid(2.0 * z / cap) - 1.0
        z = cap * t
        slope = scale * (1.0 - t * t)
    return z, slope


@triton.jit
def load_logits(X, bias, columns, inside, HAS_BIAS: tl.constexpr):
    """Loads a block of logits of one row in float32, with the bias added."""
    x = tl.load(X + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def softplus_and_sigmoid(q):
    """Returns ``log(1 + e^q)``, ``1 / (1 + e^-q)`` and its complement; none of them loses digits in a tail."""
    e = tl.exp2(-tl.abs(q) * LOG2E)
    u = 1.0 + e
    # log1p(e) = log(u) * e / (u - 1): the rounding of u cancels (Kahan). For e below half an ulp of 1 it is e itself.
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0 + (u == 1.0))))
    small = e / u
    large = 1.0 / u
    return tl.maximum(q, 0.0) + log1p, tl.where(q > 0, large, small), tl.where(q > 0, small, large)


@triton.jit
def row_kernel(
    X, stride_x, G, stride_g, bias, labels, token_loss, nll, correct, V, scale, cap, smoothing, z_loss,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTH: tl.constexpr, Z_LOSS: tl.constexpr, GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns each row of logits X float32 [n, V] into token_loss, nll, correct [n], and d token_loss / d x in G."""
    # int64: row * stride passes 2^31 from 16,744 rows of 128,256 columns on.
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    G += row * stride_g
    columns = tl.arange(0, BLOCK)

    # 1. The target. Outside of the vocabulary nothing is read, and the row's loss is NaN.
    y = tl.load(labels + row)
    known = (y >= 0) & (y < V)
    x_y = load_logits(X, bias, tl.where(known, y, 0), known, HAS_BIAS)
    z_y, _slope_y = transform(tl.where(known, x_y, float("nan")), scale, cap, HAS_CAP)

    # 2. Online maximum and sum over the other classes.
    m = -float("inf")
    s = 0.0
    z_sum = 0.0
    for start in range(0, V, BLOCK):
        o = start + columns
        z, _ = transform(load_logits(X, bias, o, o < V, HAS_BIAS), scale, cap, HAS_CAP)
        if SMOOTH:
            z_sum += tl.sum(tl.where(o < V, z, 0.0), 0)
        z = tl.where((o < V) & (o != y), z, -float("inf"))
        new = tl.maximum(m, tl.max(z, 0))
        finite = tl.where(new == -float("inf"), 0.0, new)  # exp(-inf - -inf) would be NaN
        s = s * tl.exp2((m - finite) * LOG2E) + tl.sum(tl.exp2((z - finite) * LOG2E), 0)
        m = new

    # 3. The losses.
    loss, not_y, p_y = softplus_and_sigmoid(m + tl.log(s) - z_y)
    lse = loss + z_y
    tl.store(nll + row, loss)
    tl.store(correct + row, (z_y >= m).to(tl.int8))
    extra = 0.0
    if Z_LOSS:
        extra = 2.0 * z_loss * lse
        loss += z_loss * lse * lse
    if SMOOTH:
        loss += smoothing * (z_y - z_sum / V)
    tl.store(token_loss + row, loss)

    # 4. The gradient, in place.
    if GRAD:
        for start in range(0, V, BLOCK):
            o = start + columns
            x = load_logits(X, bias, o, o < V, HAS_BIAS)
            tl.debug_barrier()
            z, slope = transform(x, scale, cap, HAS_CAP)
            g = tl.exp2((z - lse) * LOG2E) * (1.0 + extra)
            g = tl.where(o == y, extra * p_y - not_y + smoothing, g)
            if SMOOTH:
                g -= smoothing / V
            tl.store(G + o, (g * slope).to(G.dtype.element_ty), mask=o < V)


@triton.jit
def tile_kernel(
    X, stride_x, G, stride_g, bias, labels, first, width, shift, sum_exp, max_logit, z_sum, factor, scale, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates each row of a tile of columns ``first .. first + width``: logits X float32 [n, width] -> in place
    ``G = 2^(z - shift) * dz/dx`` (0 for the target). Logits in units of log 2.

    shift, sum_exp, max_logit, z_sum: float32 [n], the running values of `finish.OnlineSoftmax`, updated; factor: [n],
    what everything summed with the old shift has to be multiplied with.
    """
    row = tl.program_id(0).to(tl.int64)
    X += row * stride_x
    G += row * stride_g
    columns = tl.arange(0, BLOCK)
    y = tl.load(labels + row) - first

    # 1. The largest of the others; the shift never falls, so factor <= 1.
    largest = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        o = start + columns
        z, _ = transform(load_logits(X, bias, o, o < width, HAS_BIAS), scale, cap, HAS_CAP)
        z *= LOG2E
        if SMOOTH:
            total += tl.sum(tl.where(o < width, z, 0.0), 0)
        largest = tl.maximum(largest, tl.max(tl.where((o < width) & (o != y), z, -float("inf")), 0))
    old = tl.load(shift + row)
    m = tl.maximum(old, largest)
    alpha = tl.exp2(old - m)

    # 2. The exponentials, in place, and their sum.
    s = 0.0
    for start in range(0, width, BLOCK):
        o = start + columns
        x = load_logits(X, bias, o, o < width, HAS_BIAS)
        tl.debug_barrier()
        z, slope = transform(x, scale, cap, HAS_CAP)
        e = tl.where((o < width) & (o != y), tl.exp2(z * LOG2E - m), 0.0)
        s += tl.sum(e, 0)
        tl.store(G + o, (e * slope).to(G.dtype.element_ty), mask=o < width)

    # 3. The running values.
    tl.store(shift + row, m)
    tl.store(factor + row, alpha)
    tl.store(sum_exp + row, tl.load(sum_exp + row) * alpha + s)
    tl.store(max_logit + row, tl.maximum(tl.load(max_logit + row), largest))
    if SMOOTH:
        tl.store(z_sum + row, tl.load(z_sum + row) + total)
