"""Every fast path of Glassbox beside its plain-PyTorch twin (`*_reference`), which says what the fast path must compute.

Shapes: T tokens of a packed stream, N documents in it, D hidden size, H query heads, G key/value heads, K head size, V vocabulary.
A packed stream is documents laid end to end; document n is rows cu_seqlens[n]:cu_seqlens[n+1], with cu_seqlens (N+1,) int32.
"""

import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

IGNORE_INDEX = -100  # target of a position that is not supervised


# ---------------------------------------------------------------- attention

# torch 2.11 takes grouped heads without being asked; later ones refuse them unless asked
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class SharedPrefix(NamedTuple):
    """Where the keys and values of each document are, in a stream in which a document may leave out the prefix that it shares with another.

    Document n, prefix and all, is the rows kv_index[cu_seqlens_k[n]:cu_seqlens_k[n+1]]; the last of them are its queries. No row may be
    there more than twice: the gather's backward then adds at most two numbers, in either order, so that it repeats bit for bit on CUDA.
    """

    kv_index: torch.Tensor  # (U,) int64, U tokens of all documents
    cu_seqlens_k: torch.Tensor  # (N + 1,) int32


def attention(q, k, v, cu_seqlens, max_seqlen, shared=None, kernel="flash2"):
    """Causal attention inside each document of a packed stream.

    q (T, H, K), k and v (T, G, K) with H a multiple of G (grouped heads are not repeated by the caller); cu_seqlens (N+1,) int32;
    max_seqlen: length of the longest document, prefix included, a Python int; shared: a SharedPrefix where documents have one.
    Returns (T, H, K). Softmax scale is 1/sqrt(K).
    16-bit tensors on CUDA take a flash kernel: torch's own ("flash2") or, twice as fast on long documents, the package flash-attn-4's
    ("flash4"). Everything else takes scaled_dot_product_attention document by document.
    """
    k, v, cu_seqlens_k = _keys_and_values(k, v, cu_seqlens, shared)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # causal, the last query beside the last key
        if kernel == "flash4":
            return _flash4()(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
                             causal=True)[0]  # fmt: skip
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen, window_size=(-1, 0), **_GROUPED)
    lengths, lengths_k = cu_seqlens.diff().tolist(), cu_seqlens_k.diff().tolist()
    documents = zip(q.split(lengths), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([_causal_sdpa(*document) for document in documents])


@functools.cache
def _flash4():
    from flash_attn.cute import flash_attn_varlen_func  # optional, and its kernels are compiled at the first call

    return flash_attn_varlen_func


def attention_path(device, precision, kernel="flash2"):
    """Name of the path that `attention` takes, for cache keys: log-probs of two paths differ by rounding."""
    return kernel if torch.device(device).type == "cuda" and precision != "fp32" else f"sdpa-{torch.device(device).type}"


def attention_reference(q, k, v, cu_seqlens, max_seqlen, shared=None):
    """Plain twin of `attention`: explicit scores, an explicit (T, U) mask and softmax, in float32. O(T U) memory."""
    T, H, K = q.shape
    k, v, cu_seqlens_k = _keys_and_values(k, v, cu_seqlens, shared)
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (U, H, K)
    document, left = _places(T, cu_seqlens)
    document_k, left_k = _places(k.shape[0], cu_seqlens_k)
    visible = (document[:, None] == document_k) & (left[:, None] <= left_k)  # (T, U): a key has no fewer tokens behind it
    scores = torch.einsum("qhk,shk->hqs", q.float(), k.float()) / K**0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqs,shk->qhk", weights, v.float()).to(q.dtype)


def _keys_and_values(k, v, cu_seqlens, shared):
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


def _causal_sdpa(q, k, v):
    """One document: q (T, H, K), the last T of its U tokens; k and v (U, G, K) -> (T, H, K)."""
    T, U = q.shape[0], k.shape[0]
    # is_causal would align the first query with the first key
    causal = {"is_causal": True} if T == U else {"attn_mask": q.new_ones(T, U, dtype=torch.bool).tril(U - T)}
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, T or U, K)
    return F.scaled_dot_product_attention(*heads_first, **causal)[0].transpose(0, 1)


# ---------------------------------------------------------------- the pieces of a block
# Without autograd: fused.py puts them together, forward and backward. CUDA tensors take Triton kernels, others the twins.


@functools.cache
def _triton():
    import block_kernels

    return block_kernels


def rms_norm(x, weight, eps):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, reduced in float32, in x's dtype (Zhang & Sennrich 2019, eq. 4)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_reference(x, weight, eps):
    """Plain twin of `rms_norm` and `rms_norm_forward`: the formula, in float32, rounded once."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rms_norm_forward(x, weight, eps):
    """`rms_norm` of (T, D) without autograd."""
    return _triton().rms_norm(x, weight, eps) if x.is_cuda else rms_norm_reference(x, weight, eps)


def rms_norm_backward(dy, x, weight, eps, d_residual):
    """Gradients of y = rms_norm(x): dx (T, D) in x's dtype, plus d_residual (T, D), x's gradient from the residual branch; dweight (D,)
    float32."""
    function = _triton().rms_norm_backward if x.is_cuda else rms_norm_backward_reference
    return function(dy, x, weight, eps, d_residual)


def rms_norm_backward_reference(dy, x, weight, eps, d_residual):
    """With u = x / rms(x): du = dy * weight, dx = (du - u mean(u du)) / rms(x)."""
    x, dy, dtype = x.float(), dy.float(), x.dtype
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit, d_unit = x * rstd, dy * weight.float()
    dx = rstd * (d_unit - unit * (unit * d_unit).mean(-1, keepdim=True)) + d_residual.float()
    return dx.to(dtype), (dy * unit).sum(0)


def rotate(x, cos, sin, back=False):
    """Rotate pairs (x[i], x[i + K/2]) by the position's angles, in float32, or back. x (T, H, K); cos, sin (T, 1, K/2). In x's dtype."""
    sign = -1 if back else 1
    return _triton().rotate(x, cos, sin, sign) if x.is_cuda else rotate_reference(x, cos, sign * sin)


def rotate_reference(x, cos, sin):
    """Plain twin of `rotate`, and what autograd differentiates in the plain block."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def swiglu(gate, up):
    """silu(gate) * up, in float32, rounded once (Shazeer 2020)."""
    return _triton().swiglu(gate, up) if gate.is_cuda else swiglu_reference(gate, up)


def swiglu_reference(gate, up):
    """Plain twin of `swiglu`."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward(dout, gate, up):
    """Gradients of gate and up, and silu(gate) * up once more, for the gradient of the weight behind it."""
    return _triton().swiglu_backward(dout, gate, up) if gate.is_cuda else swiglu_backward_reference(dout, gate, up)


def swiglu_backward_reference(dout, gate, up):
    """silu(g) = g s with s = sigmoid(g), so silu'(g) = s + silu(g) (1 - s)."""
    dout, gate32, up32 = dout.float(), gate.float(), up.float()
    s = gate32.sigmoid()
    silu = gate32 * s
    return tuple(x.to(gate.dtype) for x in (dout * up32 * (s + silu * (1 - s)), dout * silu, silu * up32))


# ---------------------------------------------------------------- matmuls whose sums stay in float32


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

    A weight with the attribute `accumulates` (plumbing.trainee sets it where one process owns the whole model) takes its gradient here: it
    is added to weight.grad, in weight.grad_dtype, inside the matmul, which saves a pass over all gradients, and None is returned.
    """
    if not getattr(weight, "accumulates", False):
        return dy.T @ x
    weight.grad = matmul(dy.T, x, weight.grad_dtype, into=weight.grad)
    return None


# ---------------------------------------------------------------- matmuls in float8
# e4m3 (Micikevicius et al. 2022): 3 bits of mantissa, so a number is off by at most 1/16 of itself, and a range of 2^-9 to 448. For
# gradients too: e5m2 halves the precision for a range that a scale taken from the tensor in hand does not need.
#
# Every factor has a scale per row, where the rows run outside the contraction, and every product is rows by rows:
#     y = x8 w8^T        dx = (dy w_scale)8 (w8^T)^T        dW = (dy x_scale)8^T (x8^T)^T
# The scales of w8 and x8 lie along the contraction of dx and dW: there they are multiplied into dy before that is quantised. So both
# gradients are of the function computed, x8 and w8 are rounded once and their transposed copies need no second search for maxima.
# One scale per tensor reads as many bytes, and ties a document's numbers to its neighbours in the stream.
# A scale is a power of two: exact to multiply by, so fast paths equal their twins bit for bit.

_E4M3 = torch.float8_e4m3fn


class Float8(NamedTuple):
    """A factor (M, N) of a float8 product: row m is values[m] * scale[m]."""

    values: torch.Tensor  # (M, N) e4m3, contiguous
    scale: torch.Tensor  # (M,) float32, powers of two; NaN for a row with a number that is not finite


def quantize(x, columns=None):
    """x (M, N), or x * columns with columns (N,) float32, as a Float8 of scales that bring each row's largest number into (224, 448]."""
    return Float8(*_triton().quantize(x.contiguous(), columns)) if x.is_cuda else quantize_reference(x, columns)


def quantize_reference(x, columns=None):
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
    """x^T as a Float8 (N, M') of the numbers that quantize(x) found with `scale` (M,), so its own scales are 1: the caller's other factor
    has `scale` in it. M' is M with columns of zeros up to a multiple of 16, which _scaled_mm wants of a contraction."""
    values = _triton().quantize_transposed(x.contiguous(), scale) if x.is_cuda else quantize_transposed_reference(x, scale)
    return Float8(values, _ones(len(values), x.device))


def quantize_transposed_reference(x, scale):
    """Plain twin of `quantize_transposed`: the values."""
    return _pad16((x.float() / scale[:, None]).T).to(_E4M3)


def quantize_gradient(dy, w_scale, x_scale):
    """dy (T, out), the gradient in y = x W^T, as both products want it: Float8s of dy * w_scale, (T, out), and (dy * x_scale)^T, (out, T').

    w_scale (out,) and x_scale (T,): scales of W's and x's rows; T' is T padded likewise. 6 bytes a number moved; one by one, 8.
    """
    function = _triton().quantize_gradient if dy.is_cuda else quantize_gradient_reference
    return tuple(Float8(*pair) for pair in function(dy.contiguous(), w_scale, x_scale))


def quantize_gradient_reference(dy, w_scale, x_scale):
    """Plain twin of `quantize_gradient`."""
    return quantize_reference(dy, w_scale), quantize_reference(_pad16((dy.float() * x_scale[:, None]).T))


def rms_norm_float8(x, weight, eps):
    """quantize(rms_norm(x)): the rounding inside the kernel that makes the numbers."""
    return Float8(*_triton().rms_norm_float8(x, weight, eps)) if x.is_cuda else rms_norm_float8_reference(x, weight, eps)


def rms_norm_float8_reference(x, weight, eps):
    """Plain twin of `rms_norm_float8`."""
    return quantize_reference(rms_norm_reference(x, weight, eps))


def swiglu_float8(gate, up):
    """quantize(swiglu(gate, up))."""
    return Float8(*_triton().swiglu_float8(gate, up)) if gate.is_cuda else swiglu_float8_reference(gate, up)


def swiglu_float8_reference(gate, up):
    """Plain twin of `swiglu_float8`."""
    return quantize_reference(swiglu_reference(gate, up))


def swiglu_backward_float8(dout, gate, up, scale):
    """`swiglu_backward`, with quantize_transposed(silu(gate) * up, scale) in the third place."""
    function = _triton().swiglu_backward_float8 if gate.is_cuda else swiglu_backward_float8_reference
    d_gate, d_up, values = function(dout, gate, up, scale)
    return d_gate, d_up, Float8(values, _ones(len(values), gate.device))


def swiglu_backward_float8_reference(dout, gate, up, scale):
    """Plain twin of `swiglu_backward_float8`: the values."""
    d_gate, d_up, inner = swiglu_backward_reference(dout, gate, up)
    return d_gate, d_up, quantize_transposed_reference(inner, scale)


def matmul_float8(a, b):
    """a b^T of Float8s (M, K) and (N, K), in bf16: (M, N). K and N must be multiples of 16.

    Fast accumulation leaves sums in the matrix units, with about 14 bits (DeepSeek-V3, sec. 3.3.2, sees up to 2 % lost at K = 4,096). Two
    roundings to e4m3 leave 4 % of noise in any sum as it is, and adding in float32 is slower. tests/gpu_checks.py measures both.
    """
    assert len(b.values) % 16 == b.values.shape[1] % 16 == 0, b.values.shape
    if not a.values.is_cuda:
        return matmul_float8_reference(a, b)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in (*a, *b)), "cuBLASLt refuses what is not aligned, scales too"
    scales = {"scale_a": a.scale[:, None], "scale_b": b.scale[None, :]}
    return torch._scaled_mm(a.values, b.values.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def matmul_float8_reference(a, b):
    """Plain twin of `matmul_float8`: the numbers that the factors stand for, multiplied and added in float32, rounded once."""
    a, b = (x.values.float() * x.scale[:, None] for x in (a, b))
    return (a @ b.T).bfloat16()


def weight_gradient_float8(weight, dy, x):
    """`weight_gradient` in float8; dy and x: Float8s of dy^T (out, T') and x^T (in, T'). The product is rounded to bf16, then added."""
    product = matmul_float8(dy, x)
    if not getattr(weight, "accumulates", False):
        return product
    # _scaled_mm cannot add to its result: a pass of 10 bytes a weight
    weight.grad = product.to(weight.grad_dtype) if weight.grad is None else weight.grad.add_(product)
    return None


def _pad16(x):
    return F.pad(x, (0, -x.shape[1] % 16))


@functools.cache
def _ones(n, device):
    return torch.ones(n, dtype=torch.float32, device=device)


# ---------------------------------------------------------------- linear + log-softmax + gather


def token_logps(hidden, weight, targets, chunk=2048):
    """log p(target) of every position under softmax(hidden @ weight.T), without ever holding (T, V) logits.

    hidden (T, D), weight (V, D), targets (T,) int64 already shifted. Returns (T,) float32, nats; 0.0, with no gradient, where
    targets == IGNORE_INDEX. Forward and backward each walk chunks of `chunk` rows, and the backward recomputes the chunk's logits: the
    workspace is chunk * V * 4 bytes, 1 GiB at a 128k vocabulary (4,096 rows would be 3 % faster). Gradients reach hidden and weight.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    return _TokenLogps.apply(hidden, weight, targets, chunk)


def token_logps_reference(hidden, weight, targets):
    """Plain twin of `token_logps`: full (T, V) logits in float32 and log_softmax."""
    logps = (hidden.float() @ weight.float().T).log_softmax(-1)
    picked = logps.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return picked.masked_fill(targets == IGNORE_INDEX, 0.0)


def pick_logps(logits, targets):
    """log p(target) and log Z, each (C,) float32, of logits (C, V) float32 and targets (C,) int64."""
    return _triton().pick_logps(logits, targets) if logits.is_cuda else pick_logps_reference(logits, targets)


def pick_logps_reference(logits, targets):
    """Plain twin of `pick_logps`."""
    log_z = logits.logsumexp(-1)
    return logits.gather(1, targets[:, None]).squeeze(1) - log_z, log_z


def logits_gradient(logits, log_z, targets, g, dtype):
    """d(sum_t g_t log p_t) / d logits = g (onehot(target) - softmax), (C, V) in dtype; log_z and g (C,) float32."""
    function = _triton().logits_gradient if logits.is_cuda else logits_gradient_reference
    return function(logits, log_z, targets, g, dtype)


def logits_gradient_reference(logits, log_z, targets, g, dtype):
    """Plain twin of `logits_gradient`."""
    return (g[:, None] * (F.one_hot(targets, logits.shape[1]) - (logits - log_z[:, None]).exp())).to(dtype)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        ignored = targets == IGNORE_INDEX
        targets = targets.clamp(min=0)
        logps, log_z = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            # a temporary without a name: gone before the next chunk's is allocated
            logps[rows], log_z[rows] = pick_logps(matmul(hidden[rows], weight.T, torch.float32), targets[rows])
        ctx.save_for_backward(hidden, weight, targets, ignored, log_z)
        ctx.chunk = chunk
        return logps.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, targets, ignored, log_z = ctx.saved_tensors
        g = grad_logps.masked_fill(ignored, 0.0)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # summed over chunks in float32; a weight that accumulates has its own dtype for that, and bf16 gradients are rounded every chunk
        accumulates = getattr(weight, "accumulates", False)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight and not accumulates else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            dlogits = logits_gradient(matmul(hidden[rows], weight.T, torch.float32), log_z[rows], targets[rows], g[rows], hidden.dtype)
            if wants_hidden:
                torch.mm(dlogits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                matmul(dlogits.T, hidden[rows], torch.float32, into=grad_weight)
            elif wants_weight:
                weight_gradient(weight, dlogits, hidden[rows])
            del dlogits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


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
    """One AdamW step (Loshchilov & Hutter 2019, algorithm 2) of a split master, in place.

    weight bf16, low_bits int16, moments m and v float32 or bf16, grad float32 or bf16, all of one shape. The gradient is multiplied by
    grad_scale (clipping). bf16 moments are rounded stochastically: at beta2 = 0.999 a step changes v by up to 0.1 %, less than half of
    bf16's spacing, so to nearest v would stand still. step counts from 1; seed chooses the random bits.
    """
    function = _triton().adamw if weight.is_cuda else adamw_reference
    function(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed)


def adamw_reference(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed):
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


# ---------------------------------------------------------------- sums per document


def segment_sums(values, offsets):
    """Sum of values (S,) over each segment offsets[n]:offsets[n+1]; offsets (N+1,) int64. Returns (N,); 0.0 for an empty segment.

    A segmented reduction, not index_add: CUDA's index_add is not deterministic, and the step-0 check compares two passes bit for bit.
    """
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0, axis=0)
