"""The specification: every number that a kernel of this project computes, in plain PyTorch.

Nothing here knows of GPUs, chunks or fusion, so this file can be read by itself. The fast paths beside it are
tested against these functions, forward and backward. Order: what a block is made of, attention, a linear
layer's gradient, log-probs, AdamW, float8, t-SNE.

Letters, for the whole file:
    T tokens of a packed stream     N documents in it           U tokens of all documents, prefixes included
    D hidden size                   V vocabulary                F inner size of the MLP
    H query heads                   G key/value heads           K head size
    R, C rows and columns of a matrix that is rounded to float8
    n points that t-SNE embeds      d dimensions, of those      r of the points, taken together

A packed stream is documents laid end to end: document n is rows cu_seqlens[n]:cu_seqlens[n+1], with
cu_seqlens (N+1,) int32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # target of a position that is not supervised


# ---------------------------------------------------------------- norm, rotary positions, SwiGLU
# Each is computed in float32 and rounded once, to the dtype it came in.


def rms_norm(x, weight, eps, residual=None):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, eq. 4).

    x (T, D), weight (D,) -> (T, D). residual (T, D), where it is given, is added to y.
    """
    x32 = x.float()
    rms_inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)  # (T, 1)
    y = x32 * rms_inverse * weight.float()
    return (y if residual is None else y + residual.float()).to(x.dtype)


def rms_norm_backward(dy, x, weight, eps, d_residual=None):
    """(dx (T, D), dweight (D,) float32) of y = rms_norm(x).

    With u = x / rms(x):  du = dy * weight,  dx = (du - u mean(u du)) / rms(x),  dweight = sum of dy * u over
    tokens. d_residual (T, D), where it is given, is x's gradient from the residual branch, and added to dx.
    """
    dtype = x.dtype
    x, dy = x.float(), dy.float()
    rms_inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # (T, 1)
    unit = x * rms_inverse
    d_unit = dy * weight.float()
    dx = rms_inverse * (d_unit - unit * (unit * d_unit).mean(-1, keepdim=True))
    dx = dx if d_residual is None else dx + d_residual.float()
    return dx.to(dtype), (dy * unit).sum(0)


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + K/2]) by its position's angle (Su et al. 2021).

    x (T, H, K); cos, sin (T, 1, K/2). The gradient is the rotation back, rotate(dy, cos, -sin).
    """
    # Hugging Face's pairs, i with i + K/2. Meta's files pair 2i with 2i + 1, which is the same model with the
    # rows of q_proj and k_proj in another order.
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def norm_rotate(x, weight, eps, cos, sin):
    """rotate(rms_norm(x)) of queries or keys x (T, H, K), rounded once.

    weight (K,): the norm is over each head (Qwen3); weight (H K,): over all of a token's heads (OLMo 2).
    """
    normed = rms_norm(x.float().reshape(-1, len(weight)), weight, eps)
    return rotate(normed.view(x.shape), cos, sin).to(x.dtype)


def norm_rotate_backward(dy, x, weight, eps, cos, sin):
    """(dx (T, H, K), dweight in float32) of y = norm_rotate(x): turned back, then the norm's gradient."""
    d_normed = rotate(dy.float(), cos, -sin).reshape(-1, len(weight))
    dx, d_weight = rms_norm_backward(d_normed, x.float().reshape(-1, len(weight)), weight, eps)
    return dx.view(x.shape).to(x.dtype), d_weight


def swiglu(gate, up):
    """silu(gate) * up, with silu(g) = g sigmoid(g) (Shazeer 2020). All (T, F)."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward(dout, gate, up):
    """(dgate, dup, silu(gate) * up), each (T, F). The weight behind it needs the third for its own gradient.

    With s = sigmoid(g):  silu(g) = g s,  silu'(g) = s + silu(g) (1 - s).
    """
    dtype = gate.dtype
    dout, gate, up = dout.float(), gate.float(), up.float()
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    d_gate = dout * up * (sigmoid + silu * (1 - sigmoid))
    return d_gate.to(dtype), (dout * silu).to(dtype), (silu * up).to(dtype)


# ---------------------------------------------------------------- attention
# The only place where documents matter. Queries are the T rows of the stream; keys are the U tokens of whole
# documents, which is the same thing unless a prefix is shared.


class SharedPrefix(NamedTuple):
    """Which rows of the stream hold each document's keys and values.

    Two documents may share a prefix whose rows are stored once. The rows of document n, prefix included, are
    kv_index[cu_seqlens_k[n]:cu_seqlens_k[n+1]]; the last of them are its queries. A row occurs at most twice:
    its gradient is then a sum of at most two numbers, which has the same bits in either order on CUDA.
    """

    kv_index: torch.Tensor  # (U,) int64
    cu_seqlens_k: torch.Tensor  # (N + 1,) int32


def attention(q, k, v, cu_seqlens, max_seqlen, shared=None):
    """softmax(q k^T / sqrt(K)) v inside each document, causal (Vaswani et al. 2017, eq. 1), in float32.

    q (T, H, K); k, v (T, G, K), each for H / G query heads in a row. Returns (T, H, K). The mask (T, U) is
    explicit, so max_seqlen, the longest document's length, is not needed here.
    """
    T, H, K = q.shape
    k, v, cu_seqlens_k = keys_and_values(k, v, cu_seqlens, shared)
    G = k.shape[1]
    k = k.float().repeat_interleave(H // G, dim=1)  # (U, H, K)
    v = v.float().repeat_interleave(H // G, dim=1)
    document, left = _places(T, cu_seqlens)  # (T,) each
    document_k, left_k = _places(len(k), cu_seqlens_k)  # (U,) each
    # a query sees the keys of its document that have at least as many tokens behind them as it has itself
    visible = (document[:, None] == document_k) & (left[:, None] <= left_k)  # (T, U)
    # a masked score is -inf, not a large number: softmax gives it a weight of exactly 0
    scores = torch.einsum("thk,uhk->htu", q.float(), k) / math.sqrt(K)
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    return torch.einsum("htu,uhk->thk", weights, v).to(q.dtype)


def soft_cap(x, cap):
    """cap tanh(x / cap): about x while |x| is small, never beyond +-cap (Gemma 2, section 2). cap None: x."""
    return x if cap is None else cap * torch.tanh(x / cap)


def keys_and_values(k, v, cu_seqlens, shared):
    """Keys and values of whole documents: k, v (U, G, K) and boundaries (N+1,).

    A shared prefix is repeated for each document that begins with it.
    """
    if shared is None:
        return k, v, cu_seqlens
    # index_select, not k[kv_index]: the latter's backward sorts the index
    return k.index_select(0, shared.kv_index), v.index_select(0, shared.kv_index), shared.cu_seqlens_k


def _places(rows, cu_seqlens):
    """Each row's document, counted from 1, and how many of the document's rows are left, itself included."""
    row = torch.arange(rows, device=cu_seqlens.device)
    document = torch.bucketize(row, cu_seqlens.long(), right=True)
    return document, cu_seqlens[document] - row


# ---------------------------------------------------------------- a linear layer's gradient
# A micro-batch's gradients are added to those before it: in float32, or in what training asks for. 16-bit
# sums of 16-bit products would lose the later ones.


def matmul(a, b, dtype):
    """a @ b, multiplied and added in dtype: a float32 product of 16-bit factors is never rounded to 16."""
    return a.to(dtype) @ b.to(dtype)


def weight_gradient(dy, x, dtype):
    """dW = dy^T x of y = x W^T. dy (T, out), x (T, in) -> (out, in) in dtype, the sum over tokens."""
    return matmul(dy.T, x, dtype)


# ---------------------------------------------------------------- log-probs
# Targets are shifted already: row t predicts targets[t]. A loss sees nothing of the model but these numbers.


def token_logps(hidden, weight, targets):
    """log p(target) under softmax(hidden weight^T), (T,) float32, nats; 0.0 where targets == IGNORE_INDEX.

    hidden (T, D), weight (V, D), targets (T,).
    """
    # in float32: a bf16 logit of 20 is off by up to 0.06, and so would its log-prob be
    logps = (hidden.float() @ weight.float().T).log_softmax(-1)  # (T, V): 4 GB for 8,192 tokens at V = 128k
    picked = logps.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return picked.masked_fill(targets == IGNORE_INDEX, 0.0)


def pick_logps(logits, targets):
    """(log p(target), log Z), both (T,), of logits (T, V).

    log p = logit - log Z, Z = sum of exp(logits).
    """
    log_z = logits.logsumexp(-1)
    return logits.gather(1, targets[:, None]).squeeze(1) - log_z, log_z


def logits_gradient(logits, log_z, targets, g, dtype):
    """d(sum_t g_t log p_t) / d logits = g (onehot(target) - softmax(logits)), (T, V) in dtype.

    logits (T, V); log_z, targets and g (T,).
    """
    probabilities = (logits - log_z[:, None]).exp()
    return (g[:, None] * (F.one_hot(targets, logits.shape[1]) - probabilities)).to(dtype)


def segment_sums(values, offsets):
    """The sum of values[offsets[n]:offsets[n+1]] for each n, (N,): an answer's log-prob is such a sum."""
    lengths = offsets.diff().tolist()
    return torch.stack([segment.sum() for segment in values.split(lengths)])


# ---------------------------------------------------------------- AdamW on split masters
# A float32 master weight is kept as the bf16 weight that matmuls read and the 16 bits that rounding took off:
# 4 bytes. A master beside its bf16 copy would be 6.


def split_master(master):
    """float32 -> (bf16 to nearest, a tie away from zero; int16 low_bits), with all 32 bits in them."""
    # every NaN becomes the usual one: the upper half of the largest would wrap round to -0
    master = torch.where(master.isnan(), float("nan"), master)
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(weight, low_bits):
    """The float32 master of a bf16 weight and its int16 low_bits."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low_bits).view(torch.float32)


def adamw(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed, first=0):
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2) on a split master, in place.

        g = grad * grad_scale
        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        master = master (1 - lr decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    Moments are float32, or bf16 rounded stochastically by random bits of (seed, place in the tensor); these
    numbers begin at place `first` of theirs.
    """
    g = grad.float() * grad_scale
    new_m = beta1 * m.float() + (1 - beta1) * g
    new_v = beta2 * v.float() + (1 - beta2) * g * g
    update = (new_m / (1 - beta1**step)) / ((new_v / (1 - beta2**step)).sqrt() + eps)
    new_weight, new_low_bits = split_master(join_master(weight, low_bits) * (1 - lr * decay) - lr * update)
    weight.copy_(new_weight)
    low_bits.copy_(new_low_bits)
    if m.dtype == torch.bfloat16:
        # 32 bits a number: the lower 16 round m, the upper 16 round v, so that their errors are independent
        bits = random_bits(weight.numel(), seed, weight.device, first).view(weight.shape)
        new_m = round_stochastically(new_m, bits & 0xFFFF)
        new_v = round_stochastically(new_v, bits >> 16)
    m.copy_(new_m)
    v.copy_(new_v)


def round_stochastically(x, chance):
    """float32 -> bf16, away from zero as often as makes the mean x; chance: uniform in 0..65535."""
    return ((x.view(torch.int32) + chance.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)


def random_bits(n, seed, device, first=0):
    """32 well-mixed bits of each of first..first+n-1, (n,) int64 (MurmurHash3's finalizer).

    There is no state, so a resumed run draws the same bits.
    """
    h = (torch.arange(first, first + n, device=device) * 0x9E3779B1 ^ seed) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


# ---------------------------------------------------------------- matmuls in float8
# e4m3 (Micikevicius et al. 2022): 3 bits of mantissa, so a number is off by at most 1/16 of itself, and a
# range of 2^-9 to 448. For gradients too: e5m2 halves the precision for a range that a scale taken from the
# tensor in hand does not need.
#
# Every factor has a scale per row, the rows run outside the contraction, and every product is rows by rows:
#     y = x8 w8^T        dx = (dy w_scale)8 (w8^T)^T        dW = (dy x_scale)8^T (x8^T)^T
# The scales of w8 and x8 lie along the contraction of dx and dW: there they are multiplied into dy before
# that is quantised. So both gradients are of the function computed, x8 and w8 are rounded once and their
# transposed copies need no second search for maxima. One scale per tensor reads as many bytes, and ties a
# document's numbers to its neighbours in the stream.
# A scale is a power of two: exact to multiply by, so fast paths equal this file bit for bit.

_E4M3 = torch.float8_e4m3fn


class Float8(NamedTuple):
    """A factor (R, C) of a float8 product: row i is values[i] * scale[i]."""

    values: torch.Tensor  # (R, C) e4m3, contiguous
    scale: torch.Tensor  # (R,) float32, powers of two; NaN for a row with a number that is not finite


def float8_scale(top):
    """The least power of two s from 2^-100 up with top / s <= 448 = 1.75 * 2^8; NaN where top is not finite.

    top: float32, from 0 up; s is read off its bits.
    """
    exponent = (top.view(torch.int32) + 0x1FFFFF) >> 23  # one up where top's mantissa is over 1.75
    scale = ((exponent - 8).clamp(min=27) << 23).view(torch.float32)
    return scale.masked_fill(~top.isfinite(), float("nan"))


def quantize(x, columns=None):
    """x (R, C), or x * columns (C,), as a Float8, each row's largest number in (224, 448]."""
    x = x.float() if columns is None else x.float() * columns
    scale = float8_scale(x.abs().amax(1))
    return Float8((x / scale[:, None]).to(_E4M3), scale)


def quantize_transposed(x, scale):
    """The values of quantize(x), whose scales were `scale` (R,), transposed: (C, R') e4m3.

    R' is R padded to a multiple of 16. They have no scales of their own: `scale` is in the factor that they
    are multiplied by.
    """
    return pad16((x.float() / scale[:, None]).T).to(_E4M3)


def quantize_gradient(dy, w_scale, x_scale):
    """dy (T, out) of y = x W^T as both products want it: Float8s of dy * w_scale and (dy * x_scale)^T.

    They are (T, out) and (out, T'), T padded to a multiple of 16. w_scale (out,) and x_scale (T,) are the
    scales of W's and x's rows.
    """
    return quantize(dy, w_scale), quantize(pad16((dy.float() * x_scale[:, None]).T))


def rms_norm_float8(x, weight, eps):
    """quantize(rms_norm(x)), the norm rounded to x's dtype on the way."""
    return quantize(rms_norm(x, weight, eps))


def swiglu_float8(gate, up):
    """quantize(swiglu(gate, up)), rounded to their dtype on the way."""
    return quantize(swiglu(gate, up))


def swiglu_backward_float8(dout, gate, up, scale):
    """(dgate, dup, quantize_transposed(silu(gate) * up, scale)), with the scales that swiglu_float8 found."""
    d_gate, d_up, inner = swiglu_backward(dout, gate, up)
    return d_gate, d_up, quantize_transposed(inner, scale)


def matmul_float8(a, b):
    """a b^T of the numbers that Float8s (R, n) and (C, n) stand for: (R, C) bf16.

    Computed in float32 and rounded once.
    """
    a32 = a.values.float() * a.scale[:, None]
    b32 = b.values.float() * b.scale[:, None]
    return (a32 @ b32.T).bfloat16()


def pad16(x):
    """Columns of zeros up to a multiple of 16, which float8 matmuls want of a contraction."""
    return F.pad(x, (0, -x.shape[1] % 16))


# ---------------------------------------------------------------- t-SNE
# Student's t with nu = d - 1 degrees of freedom (van der Maaten 2009); nu = 1 is the t-SNE of 2008.


def tsne_probabilities(d2, own, perplexity, tolerance=1e-5, max_steps=100):
    """p(j|i) ~ exp(-beta_i d2_ij), (r, n), each row of entropy log(perplexity).

    Van der Maaten & Hinton 2008, eq. 1. d2 (r, n) squared distances; own (r,): the column of each row's own
    point, where p = 0. beta_i by bisection, doubled or halved until it is bracketed, to `tolerance` nats. A
    row of equal distances, or of more duplicates than `perplexity`, has no such beta and keeps the last one
    tried.
    """
    own = own[:, None]
    nearest = d2.scatter(1, own, math.inf).amin(1, keepdim=True)
    d2 = (d2 - nearest).scatter(1, own, 0.0)  # p does not change, and the nearest point cannot underflow
    d2 = d2 / d2.mean(1, keepdim=True).clamp(min=1e-300)  # so that beta starts at 1
    beta = torch.ones_like(d2[:, :1])
    low, high = torch.zeros_like(beta), torch.full_like(beta, math.inf)
    for _ in range(max_steps):
        p = (-beta * d2).exp().scatter(1, own, 0.0)
        total = p.sum(1, keepdim=True)
        entropy = total.log() + beta * (p * d2).sum(1, keepdim=True) / total
        excess = entropy - math.log(perplexity)
        found = excess.abs() < tolerance
        if found.all():
            break
        low, high = torch.where(excess > 0, beta, low), torch.where(excess > 0, high, beta)
        halfway = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
        beta = torch.where(found, beta, halfway)
    return p / total


def tsne_divergence(Y, P):
    """KL(P || Q) = sum_ij P_ij log(P_ij / Q_ij), nats, of an embedding Y (n, d).

    P (n, n) is symmetric, with a zero diagonal and the sum 1.
    Q_ij = u_ij / sum of u,  u_ij = w_ij^((nu + 1) / 2) for i != j,  w_ij = 1 / (1 + |y_i - y_j|^2 / nu).
    """
    _, _, Q = _tsne_similarities(Y)
    return torch.xlogy(P, P).sum() - torch.xlogy(P, Q).sum()


def tsne_gradient(Y, P, exaggeration=1.0):
    """dKL/dy_i = 2 (nu + 1) / nu sum_j (P_ij - Q_ij) w_ij (y_i - y_j), (n, d): eq. 5 of 2008 for nu = 1.

    P is multiplied by `exaggeration`. scikit-learn has u where this has w, which for d = 3 is not the
    gradient of its divergence: it ends higher (analysis.tsne.tsne).
    """
    # attraction along P, which is given, and repulsion along Q, which Y makes
    differences, w, Q = _tsne_similarities(Y)
    nu = max(Y.shape[1] - 1, 1)
    forces = (exaggeration * P - Q) * w  # (n, n)
    return 2 * (nu + 1) / nu * (forces[:, :, None] * differences).sum(1)


def _tsne_similarities(Y):
    """(y_i - y_j (n, n, d), w (n, n), Q (n, n)) of an embedding; Q has a zero diagonal."""
    nu = max(Y.shape[1] - 1, 1)
    differences = Y[:, None] - Y[None]
    w = 1 / (1 + differences.square().sum(-1) / nu)
    u = (w ** ((nu + 1) / 2)).fill_diagonal_(0.0)
    return differences, w, u / u.sum()
