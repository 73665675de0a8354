"""Every Triton launch of the repository on tensors without memory, for compile_kernels.py and
check_addresses.py."""

from typing import NamedTuple

import torch

from kernels import triton_block, triton_tsne


class Shapes(NamedTuple):
    """T tokens of size D, F inner size, H heads of size K, C rows of V logits, n points."""

    T: int
    D: int
    F: int
    H: int
    K: int
    C: int
    V: int
    n: int


LLAMA_8B = Shapes(T=4096, D=4096, F=14336, H=32, K=128, C=2048, V=128256, n=7000)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_all(shapes, dtype):
    """Call every wrapper whose tensors are of 16 or 32 bits."""
    T, D, F, H, K, C, V, _ = shapes
    x, weight = empty(T, D, dtype=dtype), empty(D, dtype=dtype)
    triton_block.rms_norm(x, weight, 1e-5)
    triton_block.rms_norm_backward(x, x, weight, 1e-5, x)
    triton_block.rms_norm(x, weight, 1e-5, x)
    triton_block.rms_norm_backward(x, x, weight, 1e-5)
    inner = empty(T, F, dtype=dtype)
    triton_block.swiglu(inner, inner)
    triton_block.swiglu_backward(inner, inner, inner)
    angles = empty(T, 1, K // 2, dtype=torch.float32)
    q = empty(T, H, K, dtype=dtype)
    triton_block.rotate(q, angles, angles, 1)
    for size in (K, H * K):
        about = q, empty(size, dtype=dtype), 1e-5, angles, angles
        triton_block.norm_rotate(*about)
        triton_block.norm_rotate_backward(q, *about)
    logits, row = empty(C, V, dtype=torch.float32), empty(C, dtype=torch.float32)
    targets = empty(C, dtype=torch.int64)
    triton_block.pick_logps(logits, targets)
    triton_block.logits_gradient(logits, row, targets, row, dtype)
    master = empty(T, F), empty(T, F, dtype=torch.int16)
    triton_block.adamw(*master, inner, inner, inner, 1.0, 1e-3, 0.1, 0.9, 0.999, 1e-8, 7, seed=12345)


def launch_tsne(shapes):
    """Call both wrappers of t-SNE."""
    n = shapes.n
    d2, own = empty(n, n, dtype=torch.float64), empty(n, dtype=torch.int64)
    triton_tsne.conditional_probabilities(d2, own, 30.0, max_steps=2)
    triton_tsne.gradient(empty(n, 3, dtype=torch.float32), empty(n, n, dtype=torch.float32))


def launch_float8(shapes):
    """Call every wrapper of float8, whose inputs are bf16."""
    T, D, F, *_ = shapes
    x, inner = empty(T, D), empty(T, F)
    rows, columns = empty(T, dtype=torch.float32), empty(F, dtype=torch.float32)
    triton_block.rms_norm_float8(x, empty(D), 1e-5)
    triton_block.swiglu_float8(inner, inner)
    triton_block.swiglu_backward_float8(inner, inner, inner, rows)
    triton_block.quantize(inner, None)
    triton_block.quantize(inner, columns)
    triton_block.quantize_transposed(inner, rows)
    triton_block.quantize_gradient(inner, columns, rows)


def kernel_names():
    """Names of all kernels that the wrappers have."""
    names = [*vars(triton_block), *vars(triton_tsne)]
    return {name for name in names if name.endswith("_kernel")}
