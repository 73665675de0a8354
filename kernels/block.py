"""The pieces of a block without autograd: fused_block.py puts them together, forward and backward.

What each computes, with shapes: the function of the same name in reference.py.
"""

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


def path_of(tensor):
    """The module that computes on this tensor: triton_block on CUDA, reference elsewhere.

    Their functions have the same names.
    """
    return gpu_kernels() if tensor.is_cuda else reference


def rms_norm(x, weight, eps):
    """reference.rms_norm for autograd, by torch's own kernel."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_forward(x, weight, eps, residual=None):
    """reference.rms_norm of x (T, D)."""
    return path_of(x).rms_norm(x, weight, eps, residual)


def rms_norm_backward(dy, x, weight, eps, d_residual=None):
    """reference.rms_norm_backward."""
    return path_of(x).rms_norm_backward(dy, x, weight, eps, d_residual)


def rotate(x, cos, sin, back=False):
    """reference.rotate, or its gradient: the rotation back."""
    sign = -1 if back else 1
    if x.is_cuda:
        return gpu_kernels().rotate(x, cos, sin, sign)
    return reference.rotate(x, cos, sign * sin)


def norm_rotate(x, weight, eps, cos, sin):
    """reference.norm_rotate."""
    return path_of(x).norm_rotate(x, weight, eps, cos, sin)


def norm_rotate_backward(dy, x, weight, eps, cos, sin):
    """reference.norm_rotate_backward."""
    return path_of(x).norm_rotate_backward(dy, x, weight, eps, cos, sin)


def swiglu(gate, up):
    """reference.swiglu."""
    return path_of(gate).swiglu(gate, up)


def swiglu_backward(dout, gate, up):
    """reference.swiglu_backward."""
    return path_of(gate).swiglu_backward(dout, gate, up)


def matmul(a, b, dtype, into=None):
    """reference.matmul, added in place to `into` (of that dtype) where it is given."""
    if a.dtype == dtype:
        return a @ b if into is None else into.addmm_(a, b)
    if a.is_cuda and into is None:
        return torch.mm(a, b, out_dtype=dtype)
    if a.is_cuda:
        return torch.addmm(into, a, b, out_dtype=dtype, out=into)
    product = reference.matmul(a, b, dtype)
    return product if into is None else into.add_(product)


def weight_gradient(weight, dy, x):
    """dy^T x in their dtype, the gradient of weight (out, in) in y = x weight^T.

    A weight that accumulates (masters.Master) takes it here: it is added to weight.grad in weight.grad_dtype
    inside the matmul, and None is returned.
    """
    if not accumulates(weight):
        return dy.T @ x
    weight.grad = matmul(dy.T, x, weight.grad_dtype, into=weight.grad)
    return None
