"""A Llama block whose backward pass is written by hand.

It keeps only what the backward pass needs, and reads each tensor as rarely as possible. The plain block is
Block.plain in model.py, differentiated by autograd. Per token and layer of the 8B shape, in bf16, that keeps
some 200 KB; this keeps 92: the block's input, rotated q, k and v, the attention's output, the middle of the
residual stream, gate and up. Normalised inputs and silu(gate) * up are made again from them, inside the
kernels that read them anyway. Norms of q and k (Qwen3, OLMo 2) also keep q and k as they were before them;
norms behind attention and MLP (OLMo 2) keep what those gave. An OLMo 2 1B keeps 72 KB, where a Llama of its
shape keeps 56.

With fp8 the matmuls of x, W and dy run in float8 (reference.Float8): x8 and w8 are x and W in float8, and
None without fp8. Everything else, LoRA's matmuls included, is unchanged. Of x8 only the scales are kept for
the backward pass: 4 bytes per token and linear.

Shapes: T tokens, D hidden size, V vocabulary, r LoRA rank, R sum of the ranks of linears that share an input.
dy is the gradient of the loss in y. Reading order: leaf to root.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import block as pieces
from kernels import float8
from kernels.block import matmul, weight_gradient
from kernels.masters import accumulates

# ---------------------------------------------------------------- the embedding


class _Embed(torch.autograd.Function):
    """Rows of the embedding, for a weight that accumulates (masters.Master).

    Its gradient touches the stream's rows, not all of (V, D).
    """

    @staticmethod
    def forward(ctx, weight, input_ids):
        ctx.save_for_backward(weight, input_ids)
        return F.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx, dy):
        weight, input_ids = ctx.saved_tensors
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
        if weight.grad_dtype == torch.float32:
            weight.grad.index_put_((input_ids,), dy.float(), accumulate=True)  # sorts the ids, so bits repeat
        else:
            # summed in float32 and rounded once: in bf16 a frequent token's later occurrences would vanish
            rows, place = input_ids.unique(return_inverse=True)
            sums = torch.zeros(len(rows), dy.shape[1], device=dy.device)
            weight.grad[rows] += sums.index_put_((place,), dy.float(), accumulate=True)
        return None, None


def embed(weight, input_ids):
    """weight (V, D), input_ids (T,) -> (T, D)."""
    return _Embed.apply(weight, input_ids) if accumulates(weight) else F.embedding(input_ids, weight)


# ---------------------------------------------------------------- a linear layer with a LoRA adapter


class Linear(NamedTuple):
    """A linear layer with a LoRA adapter: y = x weight^T + bias + scale x lora_A^T lora_B^T.

    A field is None where the layer has no such tensor.
    """

    weight: torch.Tensor  # (out, in)
    bias: torch.Tensor | None  # (out,)
    lora_A: torch.Tensor | None  # (r, in)
    lora_B: torch.Tensor | None  # (out, r)
    scale: float  # of the adapter


def weight_and_adapter(module):
    """The Linear of an nn.Linear or a LoRALinear; a switched-off adapter is None."""
    if not getattr(module, "enabled", False):
        return Linear(module.weight, module.bias, None, None, 0.0)
    assert module.dropout == 0 or not module.training, "LoRA dropout is in the plain block only"
    return Linear(module.weight, module.bias, module.lora_A, module.lora_B, module.scale)


def project(linear, x, x8, low, residual=None):
    """(y, scales of w8 (out,) or None): y = x W^T + b + scale low B^T, (T, in) -> (T, out), with low = x A^T.

    `residual` (T, out), where it is given, is added inside the matmul, in bf16. The adapter comes last: one
    whose B is zero leaves the bits of the frozen model.
    """
    w_scale = None
    if x8 is not None:
        w8 = float8.quantize(linear.weight)
        y, w_scale = float8.matmul_float8(x8, w8), w8.scale
        y = y if residual is None else y.add_(residual)
        y = y if linear.bias is None else y.add_(linear.bias)
    elif residual is None:
        y = F.linear(x, linear.weight, linear.bias)
    else:
        y = torch.addmm(residual, x, linear.weight.T)
        y = y if linear.bias is None else y.add_(linear.bias)
    if low is not None:
        y.addmm_(low, linear.lora_B.to(x.dtype).T, alpha=linear.scale)
    return y, w_scale


def reads_bf16(fp8, linears):
    """Whether the input of these linears is needed in bf16. In float8 only adapters read it."""
    return not fp8 or any(linear.lora_A is not None for linear in linears)


def gradient_float8(dy, x_scale, w_scale, weight_wanted):
    """dy in float8, as (dy8 (T, out), dy8^T (out, T)), for the gradients of x and of the weight.

    None for what is not in float8 or not wanted.
    """
    if w_scale is None:
        return None, None
    if not weight_wanted:
        return float8.quantize(dy, w_scale), None
    return float8.quantize_gradient(dy, w_scale, x_scale)


def input_gradient(dy, dy8, w_scale, weight, dx):
    """dy W, (T, in), added to `dx` where that is given."""
    if dy8 is None:
        return dy @ weight if dx is None else dx.addmm_(dy, weight)
    product = float8.matmul_float8(dy8, float8.quantize_transposed(weight, w_scale))
    return product if dx is None else dx.add_(product)


def parameter_gradients(linear, wanted, dy, dy8t, x, x8t, low, d_lora_A):
    """Gradients of weight, bias, lora_A and lora_B.

    None where one is not wanted, or where the weight has taken its own already. wanted: the same four as
    booleans. dy8t and x8t: dy^T and x^T in float8, or None.
    """
    weight_wanted, bias_wanted, _, _ = wanted
    d_weight, d_bias, d_lora_B = None, None, None
    if weight_wanted and dy8t is not None:
        d_weight = float8.weight_gradient_float8(linear.weight, dy8t, x8t)
    elif weight_wanted:
        d_weight = weight_gradient(linear.weight, dy, x)
    if bias_wanted:
        d_bias = dy.sum(0)
    if low is not None:
        d_lora_B = matmul(dy.T, low, linear.lora_B.dtype).mul_(linear.scale)
    return d_weight, d_bias, d_lora_A, d_lora_B


# ---------------------------------------------------------------- adapters of linears that share an input
# Their A's are stacked, (R, in), so that q, k and v read x once, and their part of its gradient is written
# once. It is written first, and the large matmuls add to it, which saves a pass over (T, in).


def stack_lora_A(linears):
    """A of all adapters, (R, in); None without any."""
    present = [linear.lora_A for linear in linears if linear.lora_A is not None]
    return torch.cat(present) if present else None


def lora_down(x, linears):
    """x A^T of all adapters, (T, R); None without any."""
    lora_A = stack_lora_A(linears)
    return None if lora_A is None else x @ lora_A.to(x.dtype).T


def of_each(stacked, linears, dim):
    """The part of each linear's adapter in a tensor with R along dim.

    None for a linear without an adapter, or where there is no tensor.
    """
    if stacked is None:
        return [None] * len(linears)
    ranks = [0 if linear.lora_A is None else len(linear.lora_A) for linear in linears]
    parts = stacked.split(ranks, dim)
    return [part if rank else None for part, rank in zip(parts, ranks, strict=True)]


def lora_down_backward(dys, linears):
    """Gradient of x A^T, (T, R), and the part of x's gradient that goes through it, (T, in).

    (None, None) without adapters.
    """
    lora_A = stack_lora_A(linears)
    if lora_A is None:
        return None, None
    d_low = dys[0].new_empty(len(dys[0]), len(lora_A))  # (T, R)
    for part, dy, linear in zip(of_each(d_low, linears, 1), dys, linears, strict=True):
        if part is not None:
            torch.addmm(part, dy, linear.lora_B.to(dy.dtype), beta=0, alpha=linear.scale, out=part)
    return d_low, d_low @ lora_A.to(d_low.dtype)


def lora_A_gradients(d_low, x, linears):
    """Gradient of each linear's A; None for a linear without."""
    d_lora_A = None if d_low is None else matmul(d_low.T, x, torch.float32)  # (R, in)
    return of_each(d_lora_A, linears, 0)


# ---------------------------------------------------------------- the pieces of a block
# Parameters wait for the backward pass on ctx itself: what a recomputing block saves through
# save_for_backward comes back detached, without the attributes by which a weight says how it takes its
# gradient. autograd.Function wants its tensors as separate arguments, and their gradients in the same places:
# four of each Linear, last.


def _tensors(linear):
    """(weight, bias, lora_A, lora_B)."""
    return linear[:4]


def _in_fours(flat):
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def _scale_of(x8):
    return None if x8 is None else x8.scale


class _NormProject(torch.autograd.Function):
    """x -> x, and y_i = rms_norm(x) W_i^T of linears that share an input.

    norm_weight None: the linears read x itself. x is handed through so that the gradient of the residual
    branch comes back here, to be added inside the norm's backward kernel.
    """

    @staticmethod
    def forward(ctx, x, fp8, norm_weight, eps, linears, *tensors):
        normed, x8 = x, None
        if norm_weight is None:
            x8 = float8.quantize(x) if fp8 else None
        else:
            normed = pieces.rms_norm_forward(x, norm_weight, eps) if reads_bf16(fp8, linears) else None
            x8 = float8.rms_norm_float8(x, norm_weight, eps) if fp8 else None
        low = lora_down(normed, linears)
        ys, w_scales = [], []
        for linear, part in zip(linears, of_each(low, linears, 1), strict=True):
            y, w_scale = project(linear, normed, x8, part)
            ys.append(y)
            w_scales.append(w_scale)
        ctx.save_for_backward(x, norm_weight, low, _scale_of(x8), *w_scales)
        ctx.eps, ctx.linears = eps, linears
        return x.view_as(x), *ys

    @staticmethod
    def backward(ctx, d_residual, *dys):
        x, norm_weight, low, x_scale, *w_scales = ctx.saved_tensors
        linears, wanted = ctx.linears, _in_fours(ctx.needs_input_grad[5:])
        normed = x if norm_weight is None else pieces.rms_norm_forward(x, norm_weight, ctx.eps)
        x8t = None
        if x_scale is not None and any(weight_wanted for weight_wanted, *_ in wanted):
            x8t = float8.quantize_transposed(normed, x_scale)
        d_low, d_normed = lora_down_backward(dys, linears)
        lows = of_each(low, linears, 1)
        d_lora_As = lora_A_gradients(d_low, normed, linears)
        gradients = []
        for i, linear in enumerate(linears):
            dy8, dy8t = gradient_float8(dys[i], x_scale, w_scales[i], weight_wanted=wanted[i][0])
            d_normed = input_gradient(dys[i], dy8, w_scales[i], linear.weight, d_normed)
            gradients += parameter_gradients(
                linear, wanted[i], dys[i], dy8t, normed, x8t, lows[i], d_lora_As[i]
            )
        if norm_weight is None:
            return d_normed.add_(d_residual), None, None, None, None, *gradients
        dx, d_norm_weight = pieces.rms_norm_backward(d_normed, x, norm_weight, ctx.eps, d_residual)
        d_norm_weight = d_norm_weight.to(norm_weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, None, d_norm_weight, None, None, *gradients


def norm_project(x, fp8, norm, *modules):
    """(x, y_1, y_2, ..) with y_i = modules[i](norm(x)); go on with the x returned, not with the argument.

    norm None: y_i = modules[i](x).
    """
    linears = [weight_and_adapter(module) for module in modules]
    tensors = []
    for linear in linears:
        tensors += _tensors(linear)
    weight, eps = (None, None) if norm is None else (norm.weight, norm.eps)
    return _NormProject.apply(x, fp8, weight, eps, linears, *tensors)


class _Rotate(torch.autograd.Function):
    """Rotary positions.

    The gradient of a rotation is the rotation back, so only the angles are kept, once for all layers.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return pieces.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return pieces.rotate(dy, cos, sin, back=True), None, None


class _NormRotate(torch.autograd.Function):
    """Rotary positions of rms_norm(x). Keeps x beside what attention keeps: 2 K bytes a head in bf16."""

    @staticmethod
    def forward(ctx, x, norm_weight, eps, cos, sin):
        ctx.save_for_backward(x, norm_weight, cos, sin)
        ctx.eps = eps
        return pieces.norm_rotate(x, norm_weight, eps, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        x, norm_weight, cos, sin = ctx.saved_tensors
        dx, d_norm_weight = pieces.norm_rotate_backward(dy, x, norm_weight, ctx.eps, cos, sin)
        d_norm_weight = d_norm_weight.to(norm_weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, d_norm_weight, None, None, None


def rotate(x, norm, cos, sin):
    """norm(x), turned by each position's angles: x (T, H, K). norm None: only turned."""
    if norm is None:
        return _Rotate.apply(x, cos, sin)
    return _NormRotate.apply(x, norm.weight, norm.eps, cos, sin)


class _NormAdd(torch.autograd.Function):
    """residual + rms_norm(y), the sum rounded once.

    Keeps y, which no norm's gradient can do without: 4 KB a token at D = 2048 in bf16, twice a block.
    """

    @staticmethod
    def forward(ctx, y, residual, norm_weight, eps):
        ctx.save_for_backward(y, norm_weight)
        ctx.eps = eps
        return pieces.rms_norm_forward(y, norm_weight, eps, residual)

    @staticmethod
    def backward(ctx, d_sum):
        y, norm_weight = ctx.saved_tensors
        dy, d_norm_weight = pieces.rms_norm_backward(d_sum, y, norm_weight, ctx.eps)
        d_residual = d_sum if ctx.needs_input_grad[1] else None
        d_norm_weight = d_norm_weight.to(norm_weight.dtype) if ctx.needs_input_grad[2] else None
        return dy, d_residual, d_norm_weight, None


def norm_add(y, residual, norm):
    """residual + norm(y)."""
    return _NormAdd.apply(y, residual, norm.weight, norm.eps)


class _ProjectAdd(torch.autograd.Function):
    """residual + a W^T; a W^T where residual is None."""

    @staticmethod
    def forward(ctx, a, residual, fp8, linear, *tensors):
        a8 = float8.quantize(a) if fp8 else None
        low = lora_down(a, [linear])
        y, w_scale = project(linear, a, a8, low, residual)
        ctx.save_for_backward(a, _scale_of(a8), w_scale, low)
        ctx.linear = linear
        return y

    @staticmethod
    def backward(ctx, dy):
        a, a_scale, w_scale, low = ctx.saved_tensors
        linear, wanted = ctx.linear, ctx.needs_input_grad[4:]
        dy8, dy8t = gradient_float8(dy, a_scale, w_scale, weight_wanted=wanted[0])
        d_low, da = lora_down_backward([dy], [linear])
        da = input_gradient(dy, dy8, w_scale, linear.weight, da)
        (d_lora_A,) = lora_A_gradients(d_low, a, [linear])
        a8t = None if dy8t is None else float8.quantize_transposed(a, a_scale)
        d_residual = dy if ctx.needs_input_grad[1] else None
        gradients = parameter_gradients(linear, wanted, dy, dy8t, a, a8t, low, d_lora_A)
        return da, d_residual, None, None, *gradients


def project_add(a, residual, fp8, module, norm=None):
    """residual + module(a), or residual + norm(module(a))."""
    linear = weight_and_adapter(module)
    if norm is None:
        return _ProjectAdd.apply(a, residual, fp8, linear, *_tensors(linear))
    y = _ProjectAdd.apply(a, None, fp8, linear, *_tensors(linear))
    return norm_add(y, residual, norm)


class _SwiGLUProjectAdd(torch.autograd.Function):
    """residual + (silu(gate) * up) W^T; without the residual where it is None."""

    @staticmethod
    def forward(ctx, gate, up, residual, fp8, linear, *tensors):
        inner = pieces.swiglu(gate, up) if reads_bf16(fp8, [linear]) else None
        inner8 = float8.swiglu_float8(gate, up) if fp8 else None
        low = lora_down(inner, [linear])
        y, w_scale = project(linear, inner, inner8, low, residual)
        ctx.save_for_backward(gate, up, _scale_of(inner8), w_scale, low)
        ctx.linear = linear
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up, inner_scale, w_scale, low = ctx.saved_tensors
        linear, wanted = ctx.linear, ctx.needs_input_grad[5:]
        dy8, dy8t = gradient_float8(dy, inner_scale, w_scale, weight_wanted=wanted[0])
        d_low, d_inner = lora_down_backward([dy], [linear])
        d_inner = input_gradient(dy, dy8, w_scale, linear.weight, d_inner)
        inner, inner8t = None, None  # the linear's input again: one of the two, for the weight's gradient
        if dy8t is None:
            d_gate, d_up, inner = pieces.swiglu_backward(d_inner, gate, up)
        else:
            d_gate, d_up, inner8t = float8.swiglu_backward_float8(d_inner, gate, up, inner_scale)
        (d_lora_A,) = lora_A_gradients(d_low, inner, [linear])
        gradients = parameter_gradients(linear, wanted, dy, dy8t, inner, inner8t, low, d_lora_A)
        d_residual = dy if ctx.needs_input_grad[2] else None
        return d_gate, d_up, d_residual, None, None, *gradients


def swiglu_project_add(gate, up, residual, fp8, module, norm=None):
    """residual + module(silu(gate) * up), or residual + norm(module(silu(gate) * up))."""
    linear = weight_and_adapter(module)
    if norm is None:
        return _SwiGLUProjectAdd.apply(gate, up, residual, fp8, linear, *_tensors(linear))
    y = _SwiGLUProjectAdd.apply(gate, up, None, fp8, linear, *_tensors(linear))
    return norm_add(y, residual, norm)


# ---------------------------------------------------------------- the block


def block(layer, hidden, cos, sin, cu_seqlens, max_seqlen, attend):
    """Block.plain, fast: hidden (T, D) -> (T, D)."""
    attn, mlp, fp8, T = layer.self_attn, layer.mlp, layer.fp8, hidden.shape[0]
    # one of each two is None: Llama's norms are before attention and MLP, OLMo 2's behind them
    before_attn, behind_attn, before_mlp, behind_mlp = layer.norms()
    hidden, q, k, v = norm_project(hidden, fp8, before_attn, attn.q_proj, attn.k_proj, attn.v_proj)
    q = rotate(q.view(T, -1, attn.head_dim), attn.q_norm, cos, sin)  # (T, H, K)
    k = rotate(k.view(T, -1, attn.head_dim), attn.k_norm, cos, sin)  # (T, G, K)
    v = v.view(T, -1, attn.head_dim)
    mixed = attend(q, k, v, cu_seqlens, max_seqlen).reshape(T, -1)
    hidden = project_add(mixed, hidden, fp8, attn.o_proj, behind_attn)
    hidden, gate, up = norm_project(hidden, fp8, before_mlp, mlp.gate_proj, mlp.up_proj)
    return swiglu_project_add(gate, up, hidden, fp8, mlp.down_proj, behind_mlp)
