"""Matmuls in float8 (e4m3), forward and backward. What a Float8 is, and why its scales lie where they do:
reference.py.
"""

import functools

import torch

from kernels import reference
from kernels.block import path_of
from kernels.masters import accumulates
from kernels.reference import Float8


def quantize(x, columns=None):
    """reference.quantize. 3 bytes a number moved."""
    return Float8(*path_of(x).quantize(x.contiguous(), columns))


def quantize_transposed(x, scale):
    """x^T (N, M') as a Float8 of reference.quantize_transposed's values and scales of 1."""
    values = path_of(x).quantize_transposed(x.contiguous(), scale)
    return Float8(values, _ones(len(values), x.device))


def quantize_gradient(dy, w_scale, x_scale):
    """reference.quantize_gradient. 6 bytes a number moved; one by one, 8."""
    by_rows, by_columns = path_of(dy).quantize_gradient(dy.contiguous(), w_scale, x_scale)
    return Float8(*by_rows), Float8(*by_columns)


def rms_norm_float8(x, weight, eps):
    """quantize(rms_norm(x)): the rounding inside the kernel that makes the numbers."""
    return Float8(*path_of(x).rms_norm_float8(x, weight, eps))


def swiglu_float8(gate, up):
    """quantize(swiglu(gate, up)), likewise."""
    return Float8(*path_of(gate).swiglu_float8(gate, up))


def swiglu_backward_float8(dout, gate, up, scale):
    """`swiglu_backward`, with quantize_transposed(silu(gate) * up, scale) in the third place."""
    d_gate, d_up, values = path_of(gate).swiglu_backward_float8(dout, gate, up, scale)
    return d_gate, d_up, Float8(values, _ones(len(values), gate.device))


def matmul_float8(a, b):
    """a b^T of Float8s (M, K) and (N, K), in bf16: (M, N). K and N must be multiples of 16.

    Fast accumulation leaves sums in the matrix units, with about 14 bits (DeepSeek-V3, sec. 3.3.2, sees up to
    2 % lost at K = 4,096). Two roundings to e4m3 leave 4 % of noise in any sum as it is, and adding in
    float32 is slower. tests/gpu_checks.py measures both.
    """
    assert len(b.values) % 16 == b.values.shape[1] % 16 == 0, b.values.shape
    if not a.values.is_cuda:
        return reference.matmul_float8(a, b)
    # cuBLASLt refuses what is not aligned, scales too
    assert all(tensor.data_ptr() % 16 == 0 for tensor in (*a, *b))
    scales = {"scale_a": a.scale[:, None], "scale_b": b.scale[None, :]}
    return torch._scaled_mm(a.values, b.values.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def weight_gradient_float8(weight, dy, x):
    """`weight_gradient` in float8, rounded to bf16, then added.

    dy and x: Float8s of dy^T (out, T') and x^T (in, T').
    """
    product = matmul_float8(dy, x)
    if not accumulates(weight):
        return product
    # _scaled_mm cannot add to its result: a pass of 10 bytes a weight
    weight.grad = product.to(weight.grad_dtype) if weight.grad is None else weight.grad.add_(product)
    return None


@functools.cache
def _ones(n, device):
    return torch.ones(n, dtype=torch.float32, device=device)
