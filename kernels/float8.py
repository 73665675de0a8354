"""Matmuls in float8 (e4m3), forward and backward. reference.py says what a Float8 is and why its scales lie where they do."""

import functools

import torch

from kernels import reference
from kernels.block import gpu_kernels
from kernels.masters import accumulates
from kernels.reference import Float8


def quantize(x, columns=None):
    """x (M, N), or x * columns with columns (N,) float32, as a Float8 of scales that bring each row's largest number into (224, 448]."""
    return Float8(*gpu_kernels().quantize(x.contiguous(), columns)) if x.is_cuda else reference.quantize(x, columns)


def quantize_transposed(x, scale):
    """x^T as a Float8 (N, M') of the numbers that quantize(x) found with `scale` (M,), so its own scales are 1: the caller's other factor
    has `scale` in it. M' is M with columns of zeros up to a multiple of 16, which _scaled_mm wants of a contraction."""
    values = gpu_kernels().quantize_transposed(x.contiguous(), scale) if x.is_cuda else reference.quantize_transposed(x, scale)
    return Float8(values, _ones(len(values), x.device))


def quantize_gradient(dy, w_scale, x_scale):
    """dy (T, out), the gradient in y = x W^T, as both products want it: Float8s of dy * w_scale, (T, out), and (dy * x_scale)^T, (out, T').

    w_scale (out,) and x_scale (T,): scales of W's and x's rows; T' is T padded likewise. 6 bytes a number moved; one by one, 8.
    """
    function = gpu_kernels().quantize_gradient if dy.is_cuda else reference.quantize_gradient
    return tuple(Float8(*pair) for pair in function(dy.contiguous(), w_scale, x_scale))


def rms_norm_float8(x, weight, eps):
    """quantize(rms_norm(x)): the rounding inside the kernel that makes the numbers."""
    return Float8(*gpu_kernels().rms_norm_float8(x, weight, eps)) if x.is_cuda else reference.rms_norm_float8(x, weight, eps)


def swiglu_float8(gate, up):
    """quantize(swiglu(gate, up))."""
    return Float8(*gpu_kernels().swiglu_float8(gate, up)) if gate.is_cuda else reference.swiglu_float8(gate, up)


def swiglu_backward_float8(dout, gate, up, scale):
    """`swiglu_backward`, with quantize_transposed(silu(gate) * up, scale) in the third place."""
    function = gpu_kernels().swiglu_backward_float8 if gate.is_cuda else reference.swiglu_backward_float8
    d_gate, d_up, values = function(dout, gate, up, scale)
    return d_gate, d_up, Float8(values, _ones(len(values), gate.device))


def matmul_float8(a, b):
    """a b^T of Float8s (M, K) and (N, K), in bf16: (M, N). K and N must be multiples of 16.

    Fast accumulation leaves sums in the matrix units, with about 14 bits (DeepSeek-V3, sec. 3.3.2, sees up to 2 % lost at K = 4,096). Two
    roundings to e4m3 leave 4 % of noise in any sum as it is, and adding in float32 is slower. tests/gpu_checks.py measures both.
    """
    assert len(b.values) % 16 == b.values.shape[1] % 16 == 0, b.values.shape
    if not a.values.is_cuda:
        return reference.matmul_float8(a, b)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in (*a, *b)), "cuBLASLt refuses what is not aligned, scales too"
    scales = {"scale_a": a.scale[:, None], "scale_b": b.scale[None, :]}
    return torch._scaled_mm(a.values, b.values.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def weight_gradient_float8(weight, dy, x):
    """`weight_gradient` in float8; dy and x: Float8s of dy^T (out, T') and x^T (in, T'). The product is rounded to bf16, then added."""
    product = matmul_float8(dy, x)
    if not accumulates(weight):
        return product
    # _scaled_mm cannot add to its result: a pass of 10 bytes a weight
    weight.grad = product.to(weight.grad_dtype) if weight.grad is None else weight.grad.add_(product)
    return None


@functools.cache
def _ones(n, device):
    return torch.ones(n, dtype=torch.float32, device=device)
