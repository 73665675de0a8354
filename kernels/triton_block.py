"""Triton kernels of a Llama block, of the vocabulary's softmax and of AdamW.

kernels/reference.py has what each must compute, under the same name. This file is imported for the first CUDA
tensor (block.gpu_kernels), because Triton is not installed with every torch.

All of them move memory and compute next to nothing, so what counts is that each tensor is touched once.
Shapes: T tokens, D hidden size, H heads, K head size, V vocabulary, C rows of a chunk, M x N a matrix.
Arithmetic is float32 whatever the tensors are. The only atomics are maxima, which do not depend on the order,
so results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

# ---------------------------------------------------------------- RMSNorm


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, residual_ptr, y_ptr, D, eps, BLOCK: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + d, d < D, other=0.0).to(tl.float32)
    # read before the sum over the row, which waits for x: both loads are then under way at once
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * D + d, d < D, other=0.0).to(tl.float32)
    rstd = tl.math.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + d, d < D, other=0.0).to(tl.float32)
    y = x * rstd * weight
    if residual_ptr is not None:
        y += residual
    tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), d < D)


def rms_norm(x, weight, eps, residual=None):
    """reference.rms_norm by Triton: x and residual (T, D) -> (T, D). 4 bytes a number, 6 with a residual."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    y, block = torch.empty_like(x), triton.next_power_of_2(x.shape[1])
    _rms_norm_kernel[(len(x),)](x, weight, residual, y, x.shape[1], eps, block, num_warps=_warps(block))
    return y


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, d_residual_ptr, dx_ptr, dw_ptr, T, D, eps, span, BLOCK: tl.constexpr
):
    """One program takes `span` rows, so that its part of the weight's gradient stays in registers."""
    d = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + d, d < D, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * span
    for row in range(first, tl.minimum(first + span, T)):
        at = tl.cast(row, tl.int64) * D + d
        x = tl.load(x_ptr + at, d < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, d < D, other=0.0).to(tl.float32)
        d_residual = 0.0
        if d_residual_ptr is not None:
            d_residual = tl.load(d_residual_ptr + at, d < D, other=0.0).to(tl.float32)
        rstd = tl.math.rsqrt(tl.sum(x * x, 0) / D + eps)
        unit = x * rstd
        dw += dy * unit
        dunit = dy * weight
        dx = rstd * (dunit - unit * (tl.sum(dunit * unit, 0) / D)) + d_residual
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), d < D)
    tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * D + d, dw, d < D)


def rms_norm_backward(dy, x, weight, eps, d_residual=None):
    """reference.rms_norm_backward by Triton: dy, x, d_residual (T, D) -> dx (T, D), dweight (D,) float32."""
    assert dy.is_contiguous() and x.is_contiguous() and (d_residual is None or d_residual.is_contiguous())
    T, D = x.shape
    span = triton.cdiv(T, 1024)  # 1,024 programs keep 132 multiprocessors busy
    programs, block = triton.cdiv(T, span), triton.next_power_of_2(D)
    dx, dw = torch.empty_like(x), torch.empty(programs, D, dtype=torch.float32, device=x.device)
    _rms_norm_backward_kernel[(programs,)](
        dy, x, weight, d_residual, dx, dw, T, D, eps, span, block, num_warps=_warps(block)
    )
    return dx, dw.sum(0)


def _warps(block):
    return min(16, max(1, block // 256))


# ---------------------------------------------------------------- rotary positions


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, H, half, sign, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    h, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    real = (h < H) & (i < half)
    at = token * H * half * 2 + h * half * 2 + i
    cos = tl.load(cos_ptr + token * half + i, i < half)
    sin = tl.load(sin_ptr + token * half + i, i < half) * sign
    first, second = tl.load(x_ptr + at, real).to(tl.float32), tl.load(x_ptr + at + half, real).to(tl.float32)
    tl.store(y_ptr + at, (first * cos - second * sin).to(y_ptr.dtype.element_ty), real)
    tl.store(y_ptr + at + half, (second * cos + first * sin).to(y_ptr.dtype.element_ty), real)


def rotate(x, cos, sin, sign):
    """reference.rotate by Triton: x (T, H, K); cos, sin (T, 1, K/2) float32; sign -1 turns back."""
    T, H, K = x.shape
    x, y = x.contiguous(), torch.empty(T, H, K, dtype=x.dtype, device=x.device)
    heads, half = triton.next_power_of_2(H), triton.next_power_of_2(K // 2)
    _rotate_kernel[(T,)](x, cos, sin, y, H, K // 2, float(sign), heads, half, num_warps=4)
    return y


# ---------------------------------------------------------------- the norm of q and k, and their rotation
# A program has all heads of a token, as above: one head of 128 numbers would be 256 bytes a program.


@triton.jit
def _mean(x, size, IS_OF_HEAD: tl.constexpr):
    """Means over the norm's rows of `size` numbers: (HEADS, 1) of each head, or (1, 1) of all heads.

    x (HEADS, HALF) holds sums of pairs, and zeros beyond them.
    """
    total = tl.sum(x, 1, keep_dims=True)
    if not IS_OF_HEAD:
        total = tl.sum(total, 0, keep_dims=True)
    return total / size


@triton.jit
def _norm_rotate_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, eps, H, half, stride, size,
    IS_OF_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    real = (h < H) & (i < half)
    at = token * H * half * 2 + h * half * 2 + i
    first = tl.load(x_ptr + at, real, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + at + half, real, other=0.0).to(tl.float32)
    cos, sin = tl.load(cos_ptr + token * half + i, i < half), tl.load(sin_ptr + token * half + i, i < half)
    weight_ptr += h * stride + i
    rstd = tl.math.rsqrt(_mean(first * first + second * second, size, IS_OF_HEAD) + eps)
    first *= rstd * tl.load(weight_ptr, real, other=0.0).to(tl.float32)
    second *= rstd * tl.load(weight_ptr + half, real, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (first * cos - second * sin).to(y_ptr.dtype.element_ty), real)
    tl.store(y_ptr + at + half, (second * cos + first * sin).to(y_ptr.dtype.element_ty), real)


def norm_rotate(x, weight, eps, cos, sin):
    """reference.norm_rotate by Triton. 4 bytes a number, not 4 + 4."""
    T, H, K = x.shape
    x, y = x.contiguous(), torch.empty(T, H, K, dtype=x.dtype, device=x.device)
    about = _norm_of_heads(H, K, weight)
    warps = _warps(2 * about["HEADS"] * about["HALF"])
    _norm_rotate_kernel[(T,)](x, weight, cos, sin, y, eps, **about, num_warps=warps)
    return y


def _norm_of_heads(H, K, weight):
    """Arguments of both kernels: a weight (K,) is read again for each head, one of (H K,) goes along."""
    heads, half = triton.next_power_of_2(H), triton.next_power_of_2(K // 2)
    is_of_head = len(weight) == K
    about = dict(H=H, half=K // 2, stride=0 if is_of_head else K, size=len(weight), IS_OF_HEAD=is_of_head)
    return about | dict(HEADS=heads, HALF=half)


@triton.jit
def _norm_rotate_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, dw_ptr, eps, T, span, H, half, stride, size,
    IS_OF_HEAD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program takes `span` tokens, so that its part of the weight's gradient stays in registers."""
    h, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    real = (h < H) & (i < half)
    weight_at = weight_ptr + h * stride + i
    weight1 = tl.load(weight_at, real, other=0.0).to(tl.float32)
    weight2 = tl.load(weight_at + half, real, other=0.0).to(tl.float32)
    dw1, dw2 = tl.zeros((HEADS, HALF), tl.float32), tl.zeros((HEADS, HALF), tl.float32)
    start = tl.program_id(0) * span
    for row in range(start, tl.minimum(start + span, T)):
        token = tl.cast(row, tl.int64)
        at = token * H * half * 2 + h * half * 2 + i
        unit1 = tl.load(x_ptr + at, real, other=0.0).to(tl.float32)
        unit2 = tl.load(x_ptr + at + half, real, other=0.0).to(tl.float32)
        dy1 = tl.load(dy_ptr + at, real, other=0.0).to(tl.float32)
        dy2 = tl.load(dy_ptr + at + half, real, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + token * half + i, i < half, other=0.0)
        sin = tl.load(sin_ptr + token * half + i, i < half, other=0.0)
        rstd = tl.math.rsqrt(_mean(unit1 * unit1 + unit2 * unit2, size, IS_OF_HEAD) + eps)
        unit1 *= rstd
        unit2 *= rstd
        back1, back2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
        dw1 += back1 * unit1
        dw2 += back2 * unit2
        back1 *= weight1
        back2 *= weight2
        shift = _mean(back1 * unit1 + back2 * unit2, size, IS_OF_HEAD)
        tl.store(dx_ptr + at, (rstd * (back1 - unit1 * shift)).to(dx_ptr.dtype.element_ty), real)
        tl.store(dx_ptr + at + half, (rstd * (back2 - unit2 * shift)).to(dx_ptr.dtype.element_ty), real)
    dw_ptr += tl.program_id(0).to(tl.int64) * size
    if IS_OF_HEAD:
        tl.store(dw_ptr + i, tl.sum(dw1, 0, keep_dims=True), i < half)
        tl.store(dw_ptr + half + i, tl.sum(dw2, 0, keep_dims=True), i < half)
    else:
        tl.store(dw_ptr + h * stride + i, dw1, real)
        tl.store(dw_ptr + h * stride + half + i, dw2, real)


def norm_rotate_backward(dy, x, weight, eps, cos, sin):
    """reference.norm_rotate_backward by Triton. 6 bytes a number, not 4 + 6."""
    T, H, K = x.shape
    x, dy = x.contiguous(), dy.contiguous()
    span = triton.cdiv(T, 1024)
    programs, dx = triton.cdiv(T, span), torch.empty_like(x)
    dw = torch.empty(programs, len(weight), dtype=torch.float32, device=x.device)
    about = _norm_of_heads(H, K, weight)
    # half as many as forward: loads of 16 bytes from each of x's and dy's halves
    warps = _warps(about["HEADS"] * about["HALF"])
    _norm_rotate_backward_kernel[(programs,)](
        dy, x, weight, cos, sin, dx, dw, eps, T, span, **about, num_warps=warps
    )
    return dx, dw.sum(0)


# ---------------------------------------------------------------- SwiGLU

_SPAN = 2048  # elements of a program: 4 warps x 16 a lane


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate, up = tl.load(gate_ptr + at, at < n).to(tl.float32), tl.load(up_ptr + at, at < n).to(tl.float32)
    tl.store(out_ptr + at, (gate / (1 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), at < n)


def swiglu(gate, up):
    """reference.swiglu by Triton: same shapes in and out."""
    assert gate.is_contiguous() and up.is_contiguous()
    out = torch.empty_like(gate)
    _swiglu_kernel[(triton.cdiv(gate.numel(), _SPAN),)](gate, up, out, gate.numel(), _SPAN, num_warps=4)
    return out


@triton.jit
def _swiglu_backward_kernel(dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dout = tl.load(dout_ptr + at, at < n).to(tl.float32)
    gate, up = tl.load(gate_ptr + at, at < n).to(tl.float32), tl.load(up_ptr + at, at < n).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + at, (silu * up).to(dtype), at < n)
    tl.store(dup_ptr + at, (dout * silu).to(dtype), at < n)
    tl.store(dgate_ptr + at, (dout * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), at < n)


def swiglu_backward(dout, gate, up):
    """reference.swiglu_backward by Triton: all (T, F)."""
    assert dout.is_contiguous() and gate.is_contiguous() and up.is_contiguous()
    dgate, dup, out = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    _swiglu_backward_kernel[(triton.cdiv(gate.numel(), _SPAN),)](
        dout, gate, up, dgate, dup, out, gate.numel(), _SPAN, num_warps=4
    )
    return dgate, dup, out


# ---------------------------------------------------------------- float8


@triton.jit
def _inverse(scale):
    """1 / scale of a power of two, in integers: Triton's division is not exact."""
    return ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _scale(top):
    """reference.float8_scale, and one over it."""
    exponent = ((top.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
    scale = (tl.maximum(exponent, 27) << 23).to(tl.float32, bitcast=True)
    return tl.where(top < float("inf"), scale, float("nan")), _inverse(scale)


@triton.jit
def _store_row(values_ptr, scale_ptr, x, row, n, N):
    """Round one row, float32 and zero beyond N."""
    scale, inverse = _scale(tl.max(tl.abs(x), 0))
    tl.store(values_ptr + row * N + n, (x * inverse).to(tl.float8e4nv), n < N)
    tl.store(scale_ptr + row, scale)


def _by_row(kernel, x, *inputs):
    """Run a kernel over the rows of x (M, N): values (M, N) e4m3 and scale (M,).

    It is called as kernel(x, *inputs, values, scale, N, BLOCK).

    A row stays in registers.
    """
    M, N = x.shape
    values = torch.empty(M, N, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(N)
    kernel[(M,)](x, *inputs, values, scale, N, block, num_warps=_warps(block))
    return values, scale


@triton.jit
def _quantize_kernel(x_ptr, columns_ptr, values_ptr, scale_ptr, N, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + n, n < N, other=0.0).to(tl.float32)
    if columns_ptr is not None:
        x *= tl.load(columns_ptr + n, n < N, other=0.0)
    _store_row(values_ptr, scale_ptr, x, row, n, N)


def quantize(x, columns):
    """reference.quantize by Triton. 3 bytes a number."""
    return _by_row(_quantize_kernel, x, columns)


@triton.jit
def _rms_norm_float8_kernel(x_ptr, weight_ptr, eps, values_ptr, scale_ptr, N, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + n, n < N, other=0.0).to(tl.float32)
    rstd = tl.math.rsqrt(tl.sum(x * x, 0) / N + eps)
    y = (x * rstd * tl.load(weight_ptr + n, n < N, other=0.0).to(tl.float32)).to(x_ptr.dtype.element_ty)
    _store_row(values_ptr, scale_ptr, y.to(tl.float32), row, n, N)


def rms_norm_float8(x, weight, eps):
    """reference.rms_norm_float8 by Triton. 3 bytes a number, not 4 + 3."""
    assert x.is_contiguous()
    return _by_row(_rms_norm_float8_kernel, x, weight, eps)


@triton.jit
def _swiglu_float8_kernel(gate_ptr, up_ptr, values_ptr, scale_ptr, N, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * N + n, n < N, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * N + n, n < N, other=0.0).to(tl.float32)
    # in the backward's order: the same numbers
    y = (gate * (1 / (1 + tl.exp(-gate))) * up).to(gate_ptr.dtype.element_ty)
    _store_row(values_ptr, scale_ptr, y.to(tl.float32), row, n, N)


def swiglu_float8(gate, up):
    """reference.swiglu_float8 by Triton. 5 bytes a number, not 6 + 3."""
    assert gate.is_contiguous() and up.is_contiguous()
    return _by_row(_swiglu_float8_kernel, gate, up)


# rows x columns of a program: loads of 128 bytes along a row, stores of 128 bytes along a column
_TILE = (128, 64)


def _tiles(M, N, tile=_TILE):
    return triton.cdiv(N, tile[1]), triton.cdiv(M, tile[0])


@triton.jit
def _tile(x_ptr, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's numbers (ROWS, COLUMNS) in float32, their rows (int64) and columns.

    The numbers are zero beyond M and N.
    """
    m = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :], other=0.0)
    return x.to(tl.float32), m, n


@triton.jit
def _store_transposed(values_ptr, x, m, n, N, padded):
    at = n[:, None].to(tl.int64) * padded + m[None, :]
    tl.store(values_ptr + at, tl.trans(x.to(tl.float8e4nv)), (n < N)[:, None] & (m < padded)[None, :])


@triton.jit
def _quantize_transposed_kernel(
    x_ptr, scale_ptr, values_ptr, M, N, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    x, m, n = _tile(x_ptr, M, N, ROWS, COLUMNS)
    inverse = _inverse(tl.load(scale_ptr + m, m < M, other=1.0))
    _store_transposed(values_ptr, x * inverse[:, None], m, n, N, padded)


def quantize_transposed(x, scale):
    """reference.quantize_transposed by Triton. 3 bytes a number."""
    M, N = x.shape
    padded = triton.cdiv(M, 16) * 16
    values = torch.empty(N, padded, dtype=torch.float8_e4m3fn, device=x.device)
    _quantize_transposed_kernel[_tiles(M, N)](x, scale, values, M, N, padded, *_TILE, num_warps=4)
    return values


@triton.jit
def _swiglu_backward_float8_kernel(
    dout_ptr, gate_ptr, up_ptr, scale_ptr, dgate_ptr, dup_ptr, values_ptr, M, N, padded,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dout, m, n = _tile(dout_ptr, M, N, ROWS, COLUMNS)
    gate, _, _ = _tile(gate_ptr, M, N, ROWS, COLUMNS)
    up, _, _ = _tile(up_ptr, M, N, ROWS, COLUMNS)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    dtype = gate_ptr.dtype.element_ty
    at, real = m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
    tl.store(dup_ptr + at, (dout * silu).to(dtype), real)
    tl.store(dgate_ptr + at, (dout * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), real)
    inverse = _inverse(tl.load(scale_ptr + m, m < M, other=1.0))
    _store_transposed(values_ptr, (silu * up).to(dtype).to(tl.float32) * inverse[:, None], m, n, N, padded)


def swiglu_backward_float8(dout, gate, up, scale):
    """reference.swiglu_backward_float8 by Triton. 11 bytes a number, not 12 + 3."""
    assert dout.is_contiguous() and gate.is_contiguous() and up.is_contiguous()
    M, N = gate.shape
    padded = triton.cdiv(M, 16) * 16
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    values = torch.empty(N, padded, dtype=torch.float8_e4m3fn, device=gate.device)
    tile = 64, 64  # six tensors in registers: half as large, three programs to a multiprocessor
    _swiglu_backward_float8_kernel[_tiles(M, N, tile)](
        dout, gate, up, scale, dgate, dup, values, M, N, padded, *tile, num_warps=4
    )
    return dgate, dup, values


@triton.jit
def _maxima_kernel(
    dy_ptr, w_scale_ptr, x_scale_ptr, row_top_ptr, column_top_ptr, M, N,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Largest |dy * w_scale| of each row and |dy * x_scale| of each column, as integers.

    float32 numbers from 0 up are in the order of their bits.
    """
    dy, m, n = _tile(dy_ptr, M, N, ROWS, COLUMNS)
    dy = tl.abs(dy)
    row_top = tl.max(dy * tl.load(w_scale_ptr + n, n < N, other=0.0)[None, :], 1)
    column_top = tl.max(dy * tl.load(x_scale_ptr + m, m < M, other=0.0)[:, None], 0)
    tl.atomic_max(row_top_ptr + m, row_top.to(tl.int32, bitcast=True), m < M, sem="relaxed")
    tl.atomic_max(column_top_ptr + n, column_top.to(tl.int32, bitcast=True), n < N, sem="relaxed")


@triton.jit
def _quantize_gradient_kernel(
    dy_ptr, w_scale_ptr, x_scale_ptr, row_top_ptr, column_top_ptr, values_ptr, scale_ptr, turned_ptr,
    turned_scale_ptr, M, N, padded, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dy, m, n = _tile(dy_ptr, M, N, ROWS, COLUMNS)
    scale, inverse = _scale(tl.load(row_top_ptr + m, m < M, other=0).to(tl.float32, bitcast=True))
    x = dy * tl.load(w_scale_ptr + n, n < N, other=0.0)[None, :] * inverse[:, None]
    real = (m < M)[:, None] & (n < N)[None, :]
    tl.store(values_ptr + m[:, None] * N + n[None, :], x.to(tl.float8e4nv), real)
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + m, scale, m < M)
    scale, inverse = _scale(tl.load(column_top_ptr + n, n < N, other=0).to(tl.float32, bitcast=True))
    x = dy * tl.load(x_scale_ptr + m, m < M, other=0.0)[:, None] * inverse[None, :]
    _store_transposed(turned_ptr, x, m, n, N, padded)
    if tl.program_id(1) == 0:
        tl.store(turned_scale_ptr + n, scale, n < N)


def quantize_gradient(dy, w_scale, x_scale):
    """reference.quantize_gradient by Triton: 2 bytes a number for the maxima, then 2 read and 2 written."""
    M, N = dy.shape
    padded = triton.cdiv(M, 16) * 16
    values = torch.empty(M, N, dtype=torch.float8_e4m3fn, device=dy.device)
    turned = torch.empty(N, padded, dtype=torch.float8_e4m3fn, device=dy.device)
    # not views of one tensor: matmul_float8 wants both aligned
    scale = torch.empty(M, dtype=torch.float32, device=dy.device)
    turned_scale = torch.empty(N, dtype=torch.float32, device=dy.device)
    tops = torch.zeros(M + N, dtype=torch.int32, device=dy.device).split((M, N))
    _maxima_kernel[_tiles(M, N)](dy, w_scale, x_scale, *tops, M, N, *_TILE, num_warps=4)
    _quantize_gradient_kernel[_tiles(M, N)](
        dy, w_scale, x_scale, *tops, values, scale, turned, turned_scale, M, N, padded, *_TILE, num_warps=4
    )
    return (values, scale), (turned, turned_scale)


# ---------------------------------------------------------------- the vocabulary's softmax


@triton.jit
def _pick_logps_kernel(logits_ptr, targets_ptr, logps_ptr, log_z_ptr, V, BLOCK: tl.constexpr):
    """One row, read once: a running maximum and a running sum per lane."""
    row, v = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits_ptr += row * V
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + v, start + v < V, other=float("-inf"))
        higher = tl.maximum(top, x)
        # a lane beyond V sees -inf only, and -inf - -inf is NaN
        shrink = tl.where(top == higher, 1.0, tl.exp(top - higher))
        total = total * shrink + tl.where(x == float("-inf"), 0.0, tl.exp(x - higher))
        top = higher
    highest = tl.max(top, 0)
    log_z = highest + tl.log(tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - highest)), 0))
    tl.store(log_z_ptr + row, log_z)
    tl.store(logps_ptr + row, tl.load(logits_ptr + tl.load(targets_ptr + row)) - log_z)


def pick_logps(logits, targets):
    """reference.pick_logps by Triton: logits (C, V) float32, targets (C,) int64."""
    assert logits.is_contiguous() and logits.dtype == torch.float32 and targets.is_contiguous()
    logps = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    log_z = torch.empty_like(logps)
    _pick_logps_kernel[(len(logits),)](logits, targets, logps, log_z, logits.shape[1], 4096, num_warps=8)
    return logps, log_z


@triton.jit
def _logits_gradient_kernel(logits_ptr, log_z_ptr, targets_ptr, g_ptr, out_ptr, V, BLOCK: tl.constexpr):
    row, v = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g, log_z, target = tl.load(g_ptr + row), tl.load(log_z_ptr + row), tl.load(targets_ptr + row)
    x = tl.load(logits_ptr + row * V + v, v < V, other=0.0)
    out = g * (tl.where(v == target, 1.0, 0.0) - tl.exp(x - log_z))
    tl.store(out_ptr + row * V + v, out.to(out_ptr.dtype.element_ty), v < V)


def logits_gradient(logits, log_z, targets, g, dtype):
    """reference.logits_gradient by Triton: (C, V) float32 -> (C, V) in dtype."""
    assert logits.is_contiguous() and targets.is_contiguous() and g.is_contiguous()
    C, V = logits.shape
    out = torch.empty(C, V, dtype=dtype, device=logits.device)
    _logits_gradient_kernel[(C, triton.cdiv(V, 4096))](logits, log_z, targets, g, out, V, 4096, num_warps=8)
    return out


# ---------------------------------------------------------------- AdamW on split masters


@triton.jit
def _mix(index, seed):
    """reference.random_bits."""
    h = index.to(tl.uint32) * 0x9E3779B1 ^ seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _round(x, bits, STOCHASTIC: tl.constexpr):
    """float32 to bfloat16, up with the probability that makes the expectation exact; bits: 16 random ones."""
    if STOCHASTIC:
        whole = x.to(tl.uint32, bitcast=True) + bits
        return (whole >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x


@triton.jit
def _adamw_kernel(
    weight_ptr, low_bits_ptr, m_ptr, v_ptr, grad_ptr, n, grad_scale, lr, decay, beta1, beta2, new1, new2, eps,
    correction1, correction2, seed, first, COMPACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < n
    high = tl.load(weight_ptr + at, real).to(tl.uint16, bitcast=True).to(tl.int32) << 16
    master = (high + tl.load(low_bits_ptr + at, real).to(tl.int32)).to(tl.float32, bitcast=True)
    g = tl.load(grad_ptr + at, real).to(tl.float32) * grad_scale
    m = tl.load(m_ptr + at, real).to(tl.float32)
    v = tl.load(v_ptr + at, real).to(tl.float32)
    m = beta1 * m + new1 * g
    v = beta2 * v + new2 * g * g
    master = master * (1 - lr * decay) - lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
    bits = _mix(first + at, seed)
    tl.store(m_ptr + at, _round(m, bits & 0xFFFF, COMPACT), real)
    tl.store(v_ptr + at, _round(v, bits >> 16, COMPACT), real)
    # every NaN becomes the usual one, as in reference.split_master: the largest would wrap round to -0
    master = tl.where(master != master, float("nan"), master)
    whole = master.to(tl.int32, bitcast=True)
    high = (whole + 0x8000) >> 16  # to nearest, a tie away from zero: what is left fits 16 signed bits
    tl.store(weight_ptr + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), real)
    tl.store(low_bits_ptr + at, (whole - (high << 16)).to(tl.int16), real)


def adamw(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed, first=0):
    """reference.adamw by Triton, in place: 16 or 20 bytes read and 8 or 12 written per weight, once."""
    assert all(tensor.is_contiguous() for tensor in (weight, low_bits, m, v, grad))
    n = weight.numel()
    # like 1 - beta, in double: float32's 1 - 0.999 is off by 1.3e-5 of itself
    corrections = 1 - beta1**step, 1 - beta2**step
    _adamw_kernel[(triton.cdiv(n, _SPAN),)](
        weight, low_bits, m, v, grad, n, grad_scale, lr, decay, beta1, beta2, 1 - beta1, 1 - beta2, eps,
        *corrections, seed, first, COMPACT=m.dtype == torch.bfloat16, BLOCK=_SPAN, num_warps=4,
    )  # fmt: skip
