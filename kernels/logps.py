"""Log-probs of target tokens, without ever holding (T, V) logits, and their sums per document."""

import torch

from kernels import reference
from kernels.block import matmul, path_of, weight_gradient
from kernels.masters import accumulates


def token_logps(hidden, weight, targets, chunk=2048, soft_cap=None):
    """log p(target) of every position under softmax(hidden @ weight.T), without ever holding (T, V) logits.

    hidden (T, D), weight (V, D), targets (T,) int64 already shifted. Returns (T,) float32, nats; 0.0, with no
    gradient, where targets == IGNORE_INDEX. Gradients reach hidden and weight.
    Forward and backward each walk chunks of `chunk` rows, and the backward recomputes the chunk's logits: the
    workspace is chunk * V * 4 bytes, 1 GiB at a 128k vocabulary (4,096 rows would be 3 % faster).
    soft_cap: of the logits (reference.soft_cap); for inference, there is no backward pass.
    """
    assert hidden.ndim == 2 and targets.shape == hidden.shape[:1], (hidden.shape, targets.shape)
    return _TokenLogps.apply(hidden, weight, targets, chunk, soft_cap)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, soft_cap):
        ignored = targets == reference.IGNORE_INDEX
        targets = targets.clamp(min=0)
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        log_z = torch.empty_like(logps)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            # the logits (C, V) have no name: they are gone before the next chunk's are allocated
            logps[rows], log_z[rows] = pick_logps(
                reference.soft_cap(_logits(hidden[rows], weight), soft_cap), targets[rows]
            )
        ctx.save_for_backward(hidden, weight, targets, ignored, log_z)
        ctx.chunk, ctx.soft_cap = chunk, soft_cap
        return logps.masked_fill_(ignored, 0.0)

    @staticmethod
    def backward(ctx, grad_logps):
        assert ctx.soft_cap is None, "the gradient of capped logits is not written"
        hidden, weight, targets, ignored, log_z = ctx.saved_tensors
        g = grad_logps.masked_fill(ignored, 0.0)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # summed over chunks in float32; a weight that accumulates sums in its grad_dtype, which may be bf16
        grad_weight = None
        if wants_weight and not accumulates(weight):
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = _logits(hidden[rows], weight)
            d_logits = logits_gradient(logits, log_z[rows], targets[rows], g[rows], hidden.dtype)
            del logits
            if wants_hidden:
                torch.mm(d_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                matmul(d_logits.T, hidden[rows], torch.float32, into=grad_weight)
            elif wants_weight:
                weight_gradient(weight, d_logits, hidden[rows])
            del d_logits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _logits(hidden, weight):
    """(C, V) float32, never rounded to 16 bits."""
    return matmul(hidden, weight.T, torch.float32)


def pick_logps(logits, targets):
    """reference.pick_logps of one chunk, (C, V)."""
    return path_of(logits).pick_logps(logits, targets)


def logits_gradient(logits, log_z, targets, g, dtype):
    """reference.logits_gradient of one chunk, (C, V)."""
    return path_of(logits).logits_gradient(logits, log_z, targets, g, dtype)


def segment_sums(values, offsets):
    """reference.segment_sums: sums of values (S,) over offsets[n]:offsets[n+1], (N,); offsets (N+1,) int64.

    A segmented reduction, not index_add: CUDA's index_add is not deterministic, and the step-0 check compares
    two passes bit for bit.
    """
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0, axis=0)
