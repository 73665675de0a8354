"""What every kernel computes, in plain PyTorch: the specification. The fast paths beside it are tested against these functions.

Read this file by itself: nothing here knows of GPUs, chunks or fusion, and every formula stands where it is used.
Shapes: T tokens of a packed stream, N documents in it, D hidden size, H query heads, G key/value heads, K head size, V vocabulary.
A packed stream is documents laid end to end; document n is rows cu_seqlens[n]:cu_seqlens[n+1], with cu_seqlens (N+1,) int32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # target of a position that is not supervised


# ---------------------------------------------------------------- attention


class SharedPrefix(NamedTuple):
    """Where the keys and values of each document are, in a stream in which a document may leave out the prefix that it shares with another.

    Document n, prefix and all, is the rows kv_index[cu_seqlens_k[n]:cu_seqlens_k[n+1]]; the last of them are its queries. No row may be
    there more than twice: the gather's backward then adds at most two numbers, in either order, so that it repeats bit for bit on CUDA.
    """

    kv_index: torch.Tensor  # (U,) int64, U tokens of all documents
    cu_seqlens_k: torch.Tensor  # (N + 1,) int32


def attention(q, k, v, cu_seqlens, max_seqlen, shared=None):
    """Plain twin of `attention`: explicit scores, an explicit (T, U) mask and softmax, in float32. O(T U) memory."""
    T, H, K = q.shape
    k, v, cu_seqlens_k = keys_and_values(k, v, cu_seqlens, shared)
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (U, H, K)
    document, left = _places(T, cu_seqlens)
    document_k, left_k = _places(k.shape[0], cu_seqlens_k)
    visible = (document[:, None] == document_k) & (left[:, None] <= left_k)  # (T, U): a key has no fewer tokens behind it
    scores = torch.einsum("qhk,shk->hqs", q.float(), k.float()) / K**0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqs,shk->qhk", weights, v.float()).to(q.dtype)


def keys_and_values(k, v, cu_seqlens, shared):
    """k, v (U, G, K) of the documents end to end, every prefix with each document that begins with it; their boundaries (N+1,)."""
    if shared is None:
        return k, v, cu_seqlens
    # index_select, not k[kv_index]: the latter's backward sorts the index
    return k.index_select(0, shared.kv_index), v.index_select(0, shared.kv_index), shared.cu_seqlens_k


def _places(T, cu_seqlens):
    """(T,) number of each row's document, from 1, and how many of the document's rows are left from it on."""
    row = torch.arange(T, device=cu_seqlens.device)
    document = torch.bucketize(row, cu_seqlens.long(), right=True)
    return document, cu_seqlens[document] - row


# ---------------------------------------------------------------- norm, rotary positions, SwiGLU


def rms_norm(x, weight, eps):
    """Plain twin of `rms_norm` and `rms_norm_forward`: the formula, in float32, rounded once."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rms_norm_backward(dy, x, weight, eps, d_residual):
    """With u = x / rms(x): du = dy * weight, dx = (du - u mean(u du)) / rms(x)."""
    x, dy, dtype = x.float(), dy.float(), x.dtype
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit, d_unit = x * rstd, dy * weight.float()
    dx = rstd * (d_unit - unit * (unit * d_unit).mean(-1, keepdim=True)) + d_residual.float()
    return dx.to(dtype), (dy * unit).sum(0)


def rotate(x, cos, sin):
    """Plain twin of `rotate`, and what autograd differentiates in the plain block."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def swiglu(gate, up):
    """Plain twin of `swiglu`."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward(dout, gate, up):
    """silu(g) = g s with s = sigmoid(g), so silu'(g) = s + silu(g) (1 - s)."""
    dout, gate32, up32 = dout.float(), gate.float(), up.float()
    s = gate32.sigmoid()
    silu = gate32 * s
    return tuple(x.to(gate.dtype) for x in (dout * up32 * (s + silu * (1 - s)), dout * silu, silu * up32))


# ---------------------------------------------------------------- log-probs


def token_logps(hidden, weight, targets):
    """Plain twin of `token_logps`: full (T, V) logits in float32 and log_softmax."""
    logps = (hidden.float() @ weight.float().T).log_softmax(-1)
    picked = logps.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return picked.masked_fill(targets == IGNORE_INDEX, 0.0)


def pick_logps(logits, targets):
    """Plain twin of `pick_logps`."""
    log_z = logits.logsumexp(-1)
    return logits.gather(1, targets[:, None]).squeeze(1) - log_z, log_z


def logits_gradient(logits, log_z, targets, g, dtype):
    """Plain twin of `logits_gradient`."""
    return (g[:, None] * (F.one_hot(targets, logits.shape[1]) - (logits - log_z[:, None]).exp())).to(dtype)


# ---------------------------------------------------------------- AdamW on split masters
# A float32 master weight is kept as the bf16 weight that the matmuls read, and the 16 bits that rounding took off: 4 bytes, not 6.


def split_master(master):
    """float32 -> (bf16 to nearest, a tie away from zero; int16 low_bits), from which join_master makes the same 32 bits again."""
    master = torch.where(master.isnan(), float("nan"), master)  # the usual NaN: the largest ones would wrap round to -0
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weight, low_bits):
    """The float32 master of a bf16 weight and its int16 low_bits."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low_bits).view(torch.float32)


def adamw(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed):
    """Plain twin of `adamw`."""
    g, master = grad.float() * grad_scale, join_master(weight, low_bits)
    m32 = beta1 * m.float() + (1 - beta1) * g
    v32 = beta2 * v.float() + (1 - beta2) * g * g
    update = (m32 / (1 - beta1**step)) / ((v32 / (1 - beta2**step)).sqrt() + eps)
    for tensor, value in zip((weight, low_bits), split_master(master * (1 - lr * decay) - lr * update), strict=True):
        tensor.copy_(value)
    bits = random_bits(weight.numel(), seed, weight.device).view(weight.shape)
    for moment, value, chance in ((m, m32, bits & 0xFFFF), (v, v32, bits >> 16)):
        moment.copy_(round_stochastically(value, chance) if moment.dtype == torch.bfloat16 else value)


def round_stochastically(x, chance):
    """float32 -> bf16, away from zero with the probability that makes the expectation x; chance: uniform in 0..65535."""
    return ((x.view(torch.int32) + chance.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


def random_bits(n, seed, device):
    """32 well-mixed bits of each counter 0..n-1 (MurmurHash3's finalizer), (n,) int64: no state, so a resumed run draws the same."""
    h = (torch.arange(n, device=device) * 0x9E3779B1 ^ seed) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


# ---------------------------------------------------------------- matmuls in float8
# e4m3 (Micikevicius et al. 2022): 3 bits of mantissa, so a number is off by at most 1/16 of itself, and a range of 2^-9 to 448. For
# gradients too: e5m2 halves the precision for a range that a scale taken from the tensor in hand does not need.
#
# Every factor has a scale per row, where the rows run outside the contraction, and every product is rows by rows:
#     y = x8 w8^T        dx = (dy w_scale)8 (w8^T)^T        dW = (dy x_scale)8^T (x8^T)^T
# The scales of w8 and x8 lie along the contraction of dx and dW: there they are multiplied into dy before that is quantised. So both
# gradients are of the function computed, x8 and w8 are rounded once and their transposed copies need no second search for maxima.
# One scale per tensor reads as many bytes, and ties a document's numbers to its neighbours in the stream.
# A scale is a power of two: exact to multiply by, so fast paths equal this file bit for bit.


_E4M3 = torch.float8_e4m3fn


class Float8(NamedTuple):
    """A factor (M, N) of a float8 product: row m is values[m] * scale[m]."""

    values: torch.Tensor  # (M, N) e4m3, contiguous
    scale: torch.Tensor  # (M,) float32, powers of two; NaN for a row with a number that is not finite


def quantize(x, columns=None):
    """Plain twin of `quantize`."""
    x = x.float() if columns is None else x.float() * columns
    scale = float8_scale(x.abs().amax(1))
    return Float8((x / scale[:, None]).to(_E4M3), scale)


def float8_scale(top):
    """The least power of two s (at least 2^-100) with top / s <= 448 = 1.75 * 2^8, from float32's bits; NaN where top is not finite."""
    exponent = (top.view(torch.int32) + 0x1FFFFF) >> 23  # one up where top's mantissa is over 1.75
    scale = ((exponent - 8).clamp(min=27) << 23).view(torch.float32)
    return scale.masked_fill(~top.isfinite(), float("nan"))


def quantize_transposed(x, scale):
    """Plain twin of `quantize_transposed`: the values."""
    return pad16((x.float() / scale[:, None]).T).to(_E4M3)


def quantize_gradient(dy, w_scale, x_scale):
    """Plain twin of `quantize_gradient`."""
    return quantize(dy, w_scale), quantize(pad16((dy.float() * x_scale[:, None]).T))


def rms_norm_float8(x, weight, eps):
    """Plain twin of `rms_norm_float8`."""
    return quantize(rms_norm(x, weight, eps))


def swiglu_float8(gate, up):
    """Plain twin of `swiglu_float8`."""
    return quantize(swiglu(gate, up))


def swiglu_backward_float8(dout, gate, up, scale):
    """Plain twin of `swiglu_backward_float8`: the values."""
    d_gate, d_up, inner = swiglu_backward(dout, gate, up)
    return d_gate, d_up, quantize_transposed(inner, scale)


def matmul_float8(a, b):
    """Plain twin of `matmul_float8`: the numbers that the factors stand for, multiplied and added in float32, rounded once."""
    a, b = (x.values.float() * x.scale[:, None] for x in (a, b))
    return (a @ b.T).bfloat16()


def pad16(x):
    """Columns of zeros up to a multiple of 16."""
    return F.pad(x, (0, -x.shape[1] % 16))
