"""Two Triton kernels for t-SNE on a GPU: reference.tsne_probabilities and reference.tsne_gradient.
kernels/tsne.py imports this file where the fused path is taken, because Triton is not installed with every
torch.

n points, r rows of a block. Neither kernel holds an (r, n) temporary: what plain torch reads and writes a
dozen times is touched once.
"""

import math

import torch
import triton
import triton.language as tl

# a tile of P, the warps that share it, and how many tiles are on their way at once
ROWS, COLUMNS, WARPS, STAGES = 8, 128, 4, 3
PROGRAMS = 2048  # enough for 132 multiprocessors: with few points each row is cut into spans


@triton.jit
def _forces_kernel(
    y_ptr, p_ptr, forces_ptr, z_ptr, n, span, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr
):
    """Sums over one span of columns j, for ROWS points i.

    forces (spans, 6, n): of p w (y_i - y_j) and u w (y_i - y_j); z (spans, n): of u.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = i < n
    a0, b0, c0 = tl.load(y_ptr + i, real), tl.load(y_ptr + n + i, real), tl.load(y_ptr + 2 * n + i, real)
    p_rows = p_ptr + i.to(tl.int64)[:, None] * n
    begin = tl.program_id(1) * span
    # summed over columns once, at the end: in the loop that would be most of the work
    pull_a = tl.zeros((ROWS, COLUMNS), tl.float32)
    pull_b, pull_c, push_a, push_b, push_c, z = pull_a, pull_a, pull_a, pull_a, pull_a, pull_a
    for start in tl.range(begin, begin + span, COLUMNS, num_stages=STAGES):
        j = start + tl.arange(0, COLUMNS)
        inside = j < n
        p = tl.load(p_rows + j[None, :], real[:, None] & inside[None, :], other=-1.0)
        a = a0[:, None] - tl.load(y_ptr + j, inside, other=0.0)[None, :]
        b = b0[:, None] - tl.load(y_ptr + n + j, inside, other=0.0)[None, :]
        c = c0[:, None] - tl.load(y_ptr + 2 * n + j, inside, other=0.0)[None, :]
        root = tl.math.rsqrt(1.0 + 0.5 * (a * a + b * b + c * c))
        # p < 0 is no pair; this also lays w out as p, else Triton computes it in two layouts
        w = tl.where(p < 0, 0.0, root * root)
        u = w * root  # w^((nu + 1) / 2) with nu = 2
        z += u
        pull = p * w
        push = u * w
        pull_a += pull * a
        pull_b += pull * b
        pull_c += pull * c
        push_a += push * a
        push_b += push * b
        push_c += push * c
    out = forces_ptr + tl.program_id(1) * 6 * n + i
    tl.store(out, tl.sum(pull_a, 1), real)
    tl.store(out + n, tl.sum(pull_b, 1), real)
    tl.store(out + 2 * n, tl.sum(pull_c, 1), real)
    tl.store(out + 3 * n, tl.sum(push_a, 1), real)
    tl.store(out + 4 * n, tl.sum(push_b, 1), real)
    tl.store(out + 5 * n, tl.sum(push_c, 1), real)
    tl.store(z_ptr + tl.program_id(1) * n + i, tl.sum(z, 1), real)


def gradient(Y, P, exaggeration=1.0):
    """reference.tsne_gradient in three dimensions: Y (n, 3) and P (n, n) float32 -> (n, 3).

    P is read once and is all that is read from memory: n = 28,000, 3.1 GB, 0.73 ms at 4.3 TB/s. No atomics:
    bits repeat.
    """
    n = len(Y)
    assert Y.shape == (n, 3) and P.shape == (n, n) and P.is_contiguous()
    assert Y.dtype == P.dtype == torch.float32
    blocks = triton.cdiv(n, ROWS)
    span = COLUMNS * triton.cdiv(n, COLUMNS * triton.cdiv(PROGRAMS, blocks))
    spans = triton.cdiv(n, span)
    forces, z = Y.new_empty(spans, 6, n), Y.new_empty(spans, n)
    _forces_kernel[blocks, spans](
        Y.T.contiguous(), P, forces, z, n, span, ROWS, COLUMNS, STAGES, num_warps=WARPS
    )
    pull, push = forces.sum(0).split(3)
    Z = z.sum(dtype=torch.float64) - n  # u_ii = 1
    return (3 * (exaggeration * pull - push / Z)).T  # 2 (nu + 1) / nu = 3


@triton.jit
def _conditional_kernel(d2_ptr, own_ptr, p_ptr, n, log_perplexity, tolerance, max_steps, BLOCK: tl.constexpr):
    """One row of conditional probabilities.

    The float32 distances live in the row of the output, which stays in the cache, until p replaces them.
    """
    row = tl.program_id(0)
    own = tl.load(own_ptr + row)
    d2_ptr += row.to(tl.int64) * n
    p_ptr += row.to(tl.int64) * n
    lanes = tl.arange(0, BLOCK)
    nearest = tl.full((BLOCK,), float("inf"), tl.float64)
    for start in range(0, n, BLOCK):
        j = start + lanes
        d2 = tl.load(d2_ptr + j, (j < n) & (j != own), other=float("inf"))
        nearest = tl.minimum(nearest, d2.to(tl.float64))
    least = tl.min(nearest, 0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        j = start + lanes
        total += tl.load(d2_ptr + j, (j < n) & (j != own), other=least) - least
    scale = 1.0 / tl.maximum(tl.sum(total, 0) / n, 1e-300)
    for start in range(0, n, BLOCK):
        j = start + lanes
        d2 = (tl.load(d2_ptr + j, (j < n) & (j != own), other=float("inf")) - least) * scale
        tl.store(p_ptr + j, d2.to(tl.float32), j < n)  # a point's own distance is infinite: its p is 0 below
    tl.debug_barrier()

    beta, low, high = 1.0, 0.0, float("inf")
    sum_p, steps, excess = 0.0, 0, float("inf")
    while (tl.abs(excess) >= tolerance) & (steps < max_steps):
        if steps > 0:
            if excess > 0:
                low = beta
            else:
                high = beta
            if high == float("inf"):
                beta = 2 * beta
            else:
                beta = 0.5 * (low + high)
        sums, moments = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            d2 = tl.load(p_ptr + start + lanes, start + lanes < n, other=float("inf"))
            p = tl.exp(-beta * d2)
            sums += p
            moments += tl.where(p > 0, p * d2, 0.0)  # 0 times infinity
        sum_p = tl.sum(sums, 0)
        excess = tl.log(sum_p) + beta * tl.sum(moments, 0) / sum_p - log_perplexity
        steps += 1
    for start in range(0, n, BLOCK):
        j = start + lanes
        tl.store(p_ptr + j, tl.exp(-beta * tl.load(p_ptr + j, j < n)) / sum_p, j < n)


def conditional_probabilities(d2, own, perplexity, tolerance=1e-5, max_steps=100):
    """reference.tsne_probabilities with its bisection in float32.

    d2 (r, n) float64, own (r,) int64 -> (r, n) float32. One program per row, which reads it from the cache in
    each of its 20 or so steps; plain torch passes over a block a dozen times.
    """
    assert d2.is_contiguous() and d2.dtype == torch.float64 and own.shape == d2.shape[:1]
    p = torch.empty_like(d2, dtype=torch.float32)
    block = min(2048, triton.next_power_of_2(d2.shape[1]))
    _conditional_kernel[len(d2),](
        d2, own, p, d2.shape[1], math.log(perplexity), tolerance, max_steps, block, num_warps=8
    )
    return p
