"""Causal attention inside each document of a packed stream: flash kernels on GPUs, torch's own on CPUs."""

import inspect

import torch
import torch.nn.functional as F

from kernels import reference


def attention(q, k, v, cu_seqlens, max_seqlen, shared=None, kernel="flash2"):
    """Causal attention inside each document of a packed stream.

    q (T, H, K), k and v (T, G, K) with H a multiple of G (grouped heads are not repeated by the caller);
    cu_seqlens (N+1,) int32; max_seqlen: length of the longest document, prefix included, a Python int;
    shared: a SharedPrefix where documents have one. Returns (T, H, K). Softmax scale is 1/sqrt(K). 16-bit
    tensors on CUDA take a flash kernel: torch's own ("flash2") or, twice as fast on long documents, the
    package flash-attn-4's ("flash4"). Everything else takes scaled_dot_product_attention inside
    documents.
    """
    k, v, cu_seqlens_k = reference.keys_and_values(k, v, cu_seqlens, shared)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        flash = _flash4 if kernel == "flash4" else _flash2
        return flash(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen)
    return _sdpa(q, k, v, cu_seqlens.diff().tolist(), cu_seqlens_k.diff().tolist())


def _flash2(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen):
    """Causal, a document's last query beside its last key, by torch's flash kernel."""
    # here, because it imports the compiler: a second, and only needed on a GPU
    from torch.nn.attention.varlen import varlen_attn

    lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen)
    # torch 2.11 takes grouped heads without being asked; later versions refuse them unless asked
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(q, k, v, *lengths, window_size=(-1, 0), **grouped)


def _flash4(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen):
    """The same by the package flash-attn-4, which is optional and compiles its kernels at the first call."""
    from flash_attn.cute import flash_attn_varlen_func

    boundaries = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    lengths = dict(max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
    return flash_attn_varlen_func(q, k, v, **boundaries, **lengths, causal=True)[0]


def attention_path(device, precision, kernel="flash2"):
    """Name of the path that `attention` takes, for cache keys: log-probs of two paths differ by rounding."""
    device_type = torch.device(device).type
    return kernel if device_type == "cuda" and precision != "fp32" else f"sdpa-{device_type}"


def _sdpa(q, k, v, lengths, lengths_k):
    """Attention of documents lengths (N,) by torch's kernel, called once for all documents of one size.

    280 short texts have some 20 sizes. The bits are those of one call per document.
    """
    queries, keys, values = q.split(lengths), k.split(lengths_k), v.split(lengths_k)
    same_size = {}  # {(a document's queries, its keys): which documents}
    for n, size in enumerate(zip(lengths, lengths_k, strict=True)):
        same_size.setdefault(size, []).append(n)
    found = [None] * len(lengths)
    for members in same_size.values():
        batch = []
        for parts in (queries, keys, values):
            batch.append(torch.stack([parts[n] for n in members]))
        for n, document in zip(members, _causal_sdpa(*batch), strict=True):
            found[n] = document
    return torch.cat(found)


def _causal_sdpa(q, k, v):
    """B documents: q (B, T, H, K) of the last T of their U tokens; k, v (B, U, G, K) -> (B, T, H, K)."""
    T, U = q.shape[1], k.shape[1]
    repeats = q.shape[2] // k.shape[2]
    q = q.transpose(1, 2)  # (B, H, T, K)
    k = k.repeat_interleave(repeats, dim=2).transpose(1, 2)  # (B, H, U, K)
    v = v.repeat_interleave(repeats, dim=2).transpose(1, 2)
    if T == U:
        causal = {"is_causal": True}
    else:  # is_causal would align the first query with the first key
        causal = {"attn_mask": q.new_ones(T, U, dtype=torch.bool).tril(U - T)}
    return F.scaled_dot_product_attention(q, k, v, **causal).transpose(1, 2)
