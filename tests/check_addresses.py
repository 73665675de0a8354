"""Bounds of every load and store beyond 2^32 numbers, for test_triton.py: TRITON_INTERPRET=1 python
check_addresses.py.

Tensors have no memory: each is given a range of addresses far from all others, loads return zeros, and an
address outside its tensor's range, where the mask is true, is a violation. Of each launch a few programs are
run: those at the grid's ends, and at three quarters of it, where a 32-bit offset of 2^32 numbers is negative
(at the end it may be small again, and in range). Of each loop, likewise, three steps. Prints
{kernel: [launches, violations]}, of the broken kernels below too.
"""

import inspect
import itertools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import triton
import triton.language as tl
from launches import Shapes, empty, kernel_names, launch_all, launch_float8, launch_tsne
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder

from kernels import triton_block, triton_tsne

# no size a power of two or a multiple of a tile, and every matrix has over 2^32 numbers
LARGE = Shapes(T=72_001, D=65_521, F=65_537, H=601, K=126, C=40_009, V=128_257, n=70_001)
APART = 1 << 44  # bytes between two tensors' ranges

interpreter_patch_lang = interpreter._patch_lang
found = {}  # kernel: [launches, violations]


class Memory:
    """The addresses of one launch's tensors, and the builder's loads and stores, which check them."""

    def __init__(self, kernel):
        self.counts = found.setdefault(kernel, [0, 0])
        self.counts[0] += 1
        self.sizes = {}  # number of a range: its bytes

    def address(self, tensor):
        number = len(self.sizes) + 1
        self.sizes[number] = tensor.numel() * tensor.element_size()
        return number * APART

    def check(self, pointers, mask):
        addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[mask].astype(np.int64)
        if not addresses.size:
            return
        number = int(addresses[0] // APART)
        width = pointers.get_element_ty().primitive_bitwidth // 8
        begin, end = number * APART, number * APART + self.sizes.get(number, 0)
        self.counts[1] += int(addresses.min() < begin or addresses.max() + width > end)

    def load(self, pointers, mask, other, *_):
        self.check(pointers, mask)
        dtype = pointers.get_element_ty()
        return TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(dtype)), dtype)

    def store(self, pointers, value, mask, *_):
        self.check(pointers, mask)

    def atomic(self, operation, pointers, value, mask, *_):
        self.check(pointers, mask)
        return value


def some_of(steps):
    """The first, the last, and the one at three quarters."""
    return sorted({steps[0], steps[3 * len(steps) // 4], steps[-1]})


def some_steps(*bounds, num_stages=None):
    """What range and tl.range are here. No address depends on a step before its own."""
    return some_of(range(*bounds))


def patch_lang(kernel):
    """What interpreter._patch_lang is here. It runs before every function that a kernel calls."""
    scope = interpreter_patch_lang(kernel)
    tl.range = some_steps
    return scope


def zeros_cast(data, _, dtype, rounding):
    """A cast between floats: their values are zeros. The interpreter's own takes most of a launch."""
    return np.zeros(data.shape, f"uint{dtype.primitive_bitwidth}")


def run_some(kernel, *args, grid, warmup, **options):
    """What InterpretedFunction.run is here."""
    memory = Memory(kernel.fn.__name__)
    interpreter_builder.create_masked_load = memory.load
    interpreter_builder.create_masked_store = memory.store
    interpreter_builder.create_atomic_rmw = memory.atomic

    def convert(arg):
        if not torch.is_tensor(arg):
            return interpreter._implicit_cvt(arg)
        pointer = tl.str_to_ty(triton.runtime.jit.mangle_type(arg), None)
        return tl.tensor(TensorHandle(np.array([memory.address(arg)], dtype=np.uint64), pointer), pointer)

    executor = interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, grid)
    names = inspect.signature(kernel.fn).parameters
    values = inspect.getcallargs(executor.fn, *args, **{key: options[key] for key in options if key in names})
    values = {key: value if key in executor.constexprs else convert(value) for key, value in values.items()}
    grid = (grid,) if isinstance(grid, int) else grid
    grid = (*grid, 1, 1)[:3]
    scope = interpreter._patch_lang(executor.fn)
    try:
        interpreter_builder.set_grid_dim(*grid)
        for program in itertools.product(*(some_of(range(size)) for size in grid)):
            interpreter_builder.set_grid_idx(*program)
            executor.fn(**values)
    finally:
        scope.restore()


# ---------------------------------------------------------------- kernels that are wrong


@triton.jit
def no_mask_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < n))


@triton.jit
def no_cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < n), at < n)


@triton.jit
def right_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, at < n), at < n)


def launch_broken():
    n = 2**32 + 7
    for kernel in (no_mask_kernel, no_cast_kernel, right_kernel):
        x = empty(n)
        kernel[(math.ceil(n / 1024),)](x, x, n, 1024)


def main():
    InterpretedFunction.run = run_some
    interpreter._convert_float, interpreter._patch_lang = zeros_cast, patch_lang
    triton_block.range = triton_tsne.range = some_steps
    launch_all(LARGE, torch.bfloat16)
    launch_float8(LARGE)
    launch_tsne(LARGE)
    assert found.keys() == kernel_names(), found.keys() ^ kernel_names()
    launch_broken()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
