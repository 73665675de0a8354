"""Every fast path of Glassbox beside its plain-PyTorch twin (`*_reference`), which says what the fast path must compute.

Shapes: T tokens of a packed stream, N documents in it, D hidden size, H query heads, G key/value heads, K head size, V vocabulary.
A packed stream is documents laid end to end; document n is rows cu_seqlens[n]:cu_seqlens[n+1], with cu_seqlens (N+1,) int32.
"""

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


def attention(q, k, v, cu_seqlens, max_seqlen, shared=None):
    """Causal attention inside each document of a packed stream.

    q (T, H, K), k and v (T, G, K) with H a multiple of G (grouped heads are not repeated by the caller); cu_seqlens (N+1,) int32;
    max_seqlen: length of the longest document, prefix included, a Python int; shared: a SharedPrefix where documents have one.
    Returns (T, H, K). Softmax scale is 1/sqrt(K).
    16-bit tensors on CUDA take torch's varlen flash kernel; everything else takes scaled_dot_product_attention document by document.
    """
    k, v, cu_seqlens_k = _keys_and_values(k, v, cu_seqlens, shared)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # (-1, 0): causal, the last query beside the last key
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen, window_size=(-1, 0), **_GROUPED)
    lengths, lengths_k = cu_seqlens.diff().tolist(), cu_seqlens_k.diff().tolist()
    documents = zip(q.split(lengths), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([_causal_sdpa(*document) for document in documents])


def attention_path(device, precision):
    """Name of the path that `attention` takes, for cache keys: log-probs of two paths differ by rounding."""
    return "varlen_attn" if torch.device(device).type == "cuda" and precision == "bf16" else f"sdpa-{torch.device(device).type}"


def attention_reference(q, k, v, cu_seqlens, max_seqlen, shared=None):
    """Plain twin of `attention`: explicit scores, an explicit (T, U) mask and softmax, in float32. O(T U) memory."""
    T, H, K = q.shape
    k, v, cu_seqlens_k = _keys_and_values(k, v, cu_seqlens, shared)
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))  # (U, H, K)
    (document, left), (document_k, left_k) = _places(T, cu_seqlens), _places(k.shape[0], cu_seqlens_k)
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


# ---------------------------------------------------------------- normalisation


def rms_norm(x, weight, eps):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, reduced in float32, in x's dtype (Zhang & Sennrich 2019, eq. 4)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_reference(x, weight, eps):
    """Plain twin of `rms_norm`: the formula, in float32, rounded once."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


# ---------------------------------------------------------------- linear + log-softmax + gather


def token_logps(hidden, weight, targets, chunk=4096):
    """log p(target) of every position under softmax(hidden @ weight.T), without ever holding (T, V) logits.

    hidden (T, D), weight (V, D), targets (T,) int64 already shifted. Returns (T,) float32, nats; 0.0, with no gradient, where
    targets == IGNORE_INDEX. Forward and backward each walk chunks of `chunk` rows: the workspace is chunk * V * 4 bytes
    (4,096 rows of a 128k vocabulary: 2 GiB) and the backward recomputes the chunk's logits. Gradients reach hidden and weight.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    return _TokenLogps.apply(hidden, weight, targets, chunk)


def token_logps_reference(hidden, weight, targets):
    """Plain twin of `token_logps`: full (T, V) logits in float32 and log_softmax."""
    logps = (hidden.float() @ weight.float().T).log_softmax(-1)
    picked = logps.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return picked.masked_fill(targets == IGNORE_INDEX, 0.0)


def _chunk_logits(hidden, weight):
    """(C, D) @ (V, D).T in float32. On CUDA a 16-bit product is also *returned* in float32: as bf16, a logit of 20 is off by 0.06."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return (hidden @ weight.T).float()


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        T = hidden.shape[0]
        ignored = targets == IGNORE_INDEX
        targets = targets.clamp(min=0)
        logps, log_z = (torch.empty(T, dtype=torch.float32, device=hidden.device) for _ in range(2))
        for start in range(0, T, chunk):
            rows = slice(start, start + chunk)
            logits = _chunk_logits(hidden[rows], weight)  # (C, V) float32
            log_z[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - log_z[rows]
            del logits  # before the next chunk's are allocated: one workspace, not two
        ctx.save_for_backward(hidden, weight, targets, ignored, log_z)
        ctx.chunk = chunk
        return logps.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx, grad_logps):
        """d logp_t / d logits_t = onehot(target_t) - softmax_t, so with g = grad_logps: dlogits = g * (onehot - softmax)."""
        hidden, weight, targets, ignored, log_z = ctx.saved_tensors
        g = grad_logps.masked_fill(ignored, 0.0)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # summed over chunks in float32: in bf16 the later chunks would vanish into the sum of the earlier ones
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            dlogits = _chunk_logits(hidden[rows], weight).sub_(log_z[rows, None]).exp_().mul_(-g[rows, None])
            dlogits.scatter_add_(1, targets[rows, None], g[rows, None])
            dlogits = dlogits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = dlogits @ weight
            if grad_weight is not None:
                grad_weight += dlogits.T @ hidden[rows]
            del dlogits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


# ---------------------------------------------------------------- sums per document


def segment_sums(values, offsets):
    """Sum of values (S,) over each segment offsets[n]:offsets[n+1]; offsets (N+1,) int64. Returns (N,); 0.0 for an empty segment.

    A segmented reduction, not index_add: CUDA's index_add is not deterministic, and the step-0 check compares two passes bit for bit.
    """
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0, axis=0)
