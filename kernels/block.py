"""The pieces of a block without autograd: fused_block.py puts them together, forward and backward."""

import functools

import torch
import torch.nn.functional as F

from kernels import reference
from kernels.masters import accumulates


@functools.cache
def gpu_kernels():
    """kernels.triton_block, imported for the first CUDA tensor: a torch for CPUs comes without Triton."""
    from kernels import triton_block

    return triton_block


def rms_norm(x, weight, eps):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, reduced in float32, in x's dtype (Zhang & Sennrich 2019, eq. 4)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_forward(x, weight, eps):
    """`rms_norm` of (T, D) without autograd."""
    return gpu_kernels().rms_norm(x, weight, eps) if x.is_cuda else reference.rms_norm(x, weight, eps)


def rms_norm_backward(dy, x, weight, eps, d_residual):
    """Gradients of y = rms_norm(x): dx (T, D) in x's dtype, plus d_residual (T, D), x's gradient from the residual branch; dweight (D,)
    float32."""
    function = gpu_kernels().rms_norm_backward if x.is_cuda else reference.rms_norm_backward
    return function(dy, x, weight, eps, d_residual)


def rotate(x, cos, sin, back=False):
    """Rotate pairs (x[i], x[i + K/2]) by the position's angles, in float32, or back. x (T, H, K); cos, sin (T, 1, K/2). In x's dtype."""
    sign = -1 if back else 1
    return gpu_kernels().rotate(x, cos, sin, sign) if x.is_cuda else reference.rotate(x, cos, sign * sin)


def swiglu(gate, up):
    """silu(gate) * up, in float32, rounded once (Shazeer 2020)."""
    return gpu_kernels().swiglu(gate, up) if gate.is_cuda else reference.swiglu(gate, up)


def swiglu_backward(dout, gate, up):
    """Gradients of gate and up, and silu(gate) * up once more, for the gradient of the weight behind it."""
    return gpu_kernels().swiglu_backward(dout, gate, up) if gate.is_cuda else reference.swiglu_backward(dout, gate, up)


def matmul(a, b, dtype, into=None):
    """a @ b in `dtype`, which may be wider than theirs: a float32 result of 16-bit factors is never rounded to 16 bits on the way.
    Added in place to `into` (of that dtype) where it is given."""
    if a.dtype == dtype:
        return a @ b if into is None else into.addmm_(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype) if into is None else torch.addmm(into, a, b, out_dtype=dtype, out=into)
    product = a.to(dtype) @ b.to(dtype)
    return product if into is None else into.add_(product)


def weight_gradient(weight, dy, x):
    """dy^T x, the gradient of weight (out, in) in y = x weight^T.

    A weight that accumulates (masters.Master) takes it here: it is added to weight.grad inside the matmul, and None is returned.
    """
    if not accumulates(weight):
        return dy.T @ x
    weight.grad = matmul(dy.T, x, weight.grad_dtype, into=weight.grad)
    return None
