"""A Llama block whose backward pass is written by hand, so that only what it needs is kept and each tensor is read as rarely as it can be.

The plain twin is Block.plain in model.py, differentiated by autograd. Per token and layer of the 8B shape, in bf16, that keeps some 200 KB;
this keeps 92: the block's input, rotated q, k and v, the attention's output, the middle of the residual stream, gate and up. Normalised
inputs and silu(gate) * up are made again from them, inside the kernels that read them anyway.

With fp8 the matmuls of x, W and dy run in float8 (reference.Float8): x8 and w8 are x and W in float8, and None without fp8. Everything else,
LoRA's matmuls included, is unchanged. Of x8 only the scales are kept for the backward pass: 4 bytes per token and linear.

Shapes: T tokens, D hidden size, V vocabulary, r LoRA rank. dy is the gradient of the loss in y. Reading order: leaf to root.
"""

import torch
import torch.nn.functional as F

from kernels import block as pieces
from kernels import float8
from kernels.block import matmul, weight_gradient
from kernels.masters import accumulates

# ---------------------------------------------------------------- the embedding


class _Embed(torch.autograd.Function):
    """Rows of the embedding, for a weight that accumulates (masters.Master): its gradient touches the stream's rows and not the whole (V, D)."""

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
        else:  # in bf16 a frequent token's later occurrences would vanish into the sum of its earlier ones: rounded once, at the end
            rows, place = input_ids.unique(return_inverse=True)
            sums = torch.zeros(len(rows), dy.shape[1], device=dy.device).index_put_((place,), dy.float(), accumulate=True)
            weight.grad[rows] += sums
        return None, None


def embed(weight, input_ids):
    """weight (V, D), input_ids (T,) -> (T, D)."""
    return _Embed.apply(weight, input_ids) if accumulates(weight) else F.embedding(input_ids, weight)


# ---------------------------------------------------------------- a linear layer with a LoRA adapter, and its gradients


def weight_and_adapter(linear):
    """(scale, weight, bias, lora_A, lora_B) of a plain linear layer or a LoRALinear: None for what it has not."""
    if not getattr(linear, "enabled", False):
        return 0.0, linear.weight, linear.bias, None, None
    assert linear.dropout == 0 or not linear.training, "LoRA dropout is in the plain block only"
    return linear.scale, linear.weight, linear.bias, linear.lora_A, linear.lora_B


def project(x, x8, low, scale, weight, bias, lora_A, lora_B, residual=None):
    """x W^T + b + scale low B^T, (T, in) -> (T, out), added to `residual` where that is given: in bf16, inside the matmul. low: x A^T.

    The adapter comes last: one whose B is zero leaves the bits of the frozen model. Returns it with the scales of w8 (out,), or None."""
    w_scale = None
    if x8 is not None:
        w8 = float8.quantize(weight)
        y, w_scale = float8.matmul_float8(x8, w8), w8.scale
        y = y if residual is None else y.add_(residual)
        y = y if bias is None else y.add_(bias)
    elif residual is None:
        y = F.linear(x, weight, bias)
    else:
        y = torch.addmm(residual, x, weight.T)
        y = y if bias is None else y.add_(bias)
    return y if low is None else y.addmm_(low, lora_B.to(x.dtype).T, alpha=scale), w_scale


def reads_bf16(fp8, linears):
    """Is the input of these linears needed in bf16? In float8 only adapters read it."""
    return not fp8 or any(lora_A is not None for _, _, lora_A, _ in linears)


def gradient_float8(dy, x_scale, w_scale, weight_wanted):
    """dy8 (T, out) for the gradient of x and dy8^T (out, T) for that of the weight; None for what is not taken in float8 or not wanted."""
    if w_scale is None:
        return None, None
    return float8.quantize_gradient(dy, w_scale, x_scale) if weight_wanted else (float8.quantize(dy, w_scale), None)


def input_gradient(dy, dy8, w_scale, weight, dx):
    """dy W, (T, in), added to `dx` where that is given."""
    if dy8 is None:
        return dy @ weight if dx is None else dx.addmm_(dy, weight)
    product = float8.matmul_float8(dy8, float8.quantize_transposed(weight, w_scale))
    return product if dx is None else dx.add_(product)


def parameter_gradients(dy, dy8t, d_lora_A, x, x8t, low, wanted, scale, weight, bias, lora_A, lora_B):
    """Gradients of weight, bias, lora_A and lora_B; None where not wanted, or where the weight has taken its own already."""
    d_weight = None
    if wanted[0]:
        d_weight = float8.weight_gradient_float8(weight, dy8t, x8t) if dy8t is not None else weight_gradient(weight, dy, x)
    d_bias = dy.sum(0) if wanted[1] else None
    return d_weight, d_bias, d_lora_A, None if low is None else matmul(dy.T, low, lora_B.dtype).mul_(scale)


# ---------------------------------------------------------------- adapters of linears that share an input
# Their A's lie one below the other, (R, in) with R the sum of ranks, so that q, k and v read x once, and their part of its gradient is
# written once. It is written first, and the large matmuls add to it: a pass over (T, in) less than adding it to theirs.


def stack_lora_A(linears):
    """A of all adapters, (R, in); None without any."""
    present = [lora_A for _, _, lora_A, _ in linears if lora_A is not None]
    return torch.cat(present) if present else None


def lora_down(x, linears):
    """x A^T of all adapters, (T, R); None without any."""
    lora_A = stack_lora_A(linears)
    return None if lora_A is None else x @ lora_A.to(x.dtype).T


def of_each(stacked, linears, dim):
    """The part of each linear's adapter in a tensor with R along dim; None for a linear without, or without the tensor."""
    ranks = [0 if lora_A is None else len(lora_A) for _, _, lora_A, _ in linears]
    if stacked is None:
        return [None] * len(linears)
    return [part if rank else None for part, rank in zip(stacked.split(ranks, dim), ranks, strict=True)]


def lora_down_backward(dys, scales, linears):
    """Gradient of x A^T, (T, R), and what of x's gradient goes through it, (T, in); None, None without adapters."""
    lora_A = stack_lora_A(linears)
    if lora_A is None:
        return None, None
    d_low = dys[0].new_empty(len(dys[0]), len(lora_A))
    for part, dy, scale, (_, _, _, lora_B) in zip(of_each(d_low, linears, 1), dys, scales, linears, strict=True):
        if part is not None:
            torch.addmm(part, dy, lora_B.to(dy.dtype), beta=0, alpha=scale, out=part)
    return d_low, d_low @ lora_A.to(d_low.dtype)


def lora_A_gradients(d_low, x, linears):
    """Gradient of each linear's A; None for a linear without."""
    return of_each(None if d_low is None else matmul(d_low.T, x, torch.float32), linears, 0)


# ---------------------------------------------------------------- the pieces of a block
# Parameters wait for the backward pass on ctx itself: what a recomputing block saves through save_for_backward comes back detached, without
# the attributes by which a weight says how it takes its gradient.


def _by_linear(flat):
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]  # weight, bias, lora_A, lora_B


def _scale_of(x8):
    return None if x8 is None else x8.scale


class _NormProject(torch.autograd.Function):
    """x -> x, and y_i = rms_norm(x) W_i^T of linears that share an input. x is handed through so that the gradient of the residual
    branch comes back here, to be added inside the norm's backward kernel."""

    @staticmethod
    def forward(ctx, x, fp8, norm_weight, eps, scales, *flat):
        linears = _by_linear(flat)
        normed = pieces.rms_norm_forward(x, norm_weight, eps) if reads_bf16(fp8, linears) else None
        x8 = float8.rms_norm_float8(x, norm_weight, eps) if fp8 else None
        low = lora_down(normed, linears)
        each = zip(of_each(low, linears, 1), scales, linears, strict=True)
        ys, w_scales = zip(*[project(normed, x8, part, scale, *linear) for part, scale, linear in each], strict=True)
        ctx.save_for_backward(x, norm_weight, low, _scale_of(x8), *w_scales)
        ctx.eps, ctx.scales, ctx.linears = eps, scales, linears
        return x.view_as(x), *ys

    @staticmethod
    def backward(ctx, d_residual, *dys):
        x, norm_weight, low, x_scale, *w_scales = ctx.saved_tensors
        scales, linears, wanted = ctx.scales, ctx.linears, _by_linear(ctx.needs_input_grad[5:])
        normed = pieces.rms_norm_forward(x, norm_weight, ctx.eps)
        x8t = float8.quantize_transposed(normed, x_scale) if x_scale is not None and any(weight for weight, *_ in wanted) else None
        d_low, d_normed = lora_down_backward(dys, scales, linears)
        adapters = of_each(low, linears, 1), lora_A_gradients(d_low, normed, linears)
        d_flat = []
        for dy, w_scale, wants, scale, linear, part, d_lora_A in zip(dys, w_scales, wanted, scales, linears, *adapters, strict=True):
            dy8, dy8t = gradient_float8(dy, x_scale, w_scale, wants[0])
            d_normed = input_gradient(dy, dy8, w_scale, linear[0], d_normed)
            d_flat += parameter_gradients(dy, dy8t, d_lora_A, normed, x8t, part, wants, scale, *linear)
        dx, d_norm_weight = pieces.rms_norm_backward(d_normed, x, norm_weight, ctx.eps, d_residual)
        return dx, None, d_norm_weight.to(norm_weight.dtype) if ctx.needs_input_grad[2] else None, None, None, *d_flat


def norm_project(x, fp8, norm, *linears):
    """(x, y_1, y_2, ..) with y_i = linears[i](norm(x)); go on with the x returned, not with the argument."""
    scales, flat = [], []
    for linear in linears:
        scale, *tensors = weight_and_adapter(linear)
        scales.append(scale)
        flat += tensors
    return _NormProject.apply(x, fp8, norm.weight, norm.eps, scales, *flat)


class _Rotate(torch.autograd.Function):
    """Rotary positions. The gradient of a rotation is the rotation back, so only the angles are kept, once for all layers."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return pieces.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return pieces.rotate(dy, cos, sin, back=True), None, None


class _ProjectAdd(torch.autograd.Function):
    """residual + a W^T."""

    @staticmethod
    def forward(ctx, a, residual, fp8, scale, *linear):
        a8 = float8.quantize(a) if fp8 else None
        low = lora_down(a, [linear])
        y, w_scale = project(a, a8, low, scale, *linear, residual=residual)
        ctx.save_for_backward(a, _scale_of(a8), w_scale, low)
        ctx.scale, ctx.linear = scale, linear
        return y

    @staticmethod
    def backward(ctx, dy):
        (a, a_scale, w_scale, low), linear = ctx.saved_tensors, ctx.linear
        wanted = ctx.needs_input_grad[4:]
        dy8, dy8t = gradient_float8(dy, a_scale, w_scale, wanted[0])
        d_low, da = lora_down_backward([dy], [ctx.scale], [linear])
        da = input_gradient(dy, dy8, w_scale, linear[0], da)
        (d_lora_A,) = lora_A_gradients(d_low, a, [linear])
        a8t = None if dy8t is None else float8.quantize_transposed(a, a_scale)
        return da, dy, None, None, *parameter_gradients(dy, dy8t, d_lora_A, a, a8t, low, wanted, ctx.scale, *linear)


class _SwiGLUProjectAdd(torch.autograd.Function):
    """residual + (silu(gate) * up) W^T."""

    @staticmethod
    def forward(ctx, gate, up, residual, fp8, scale, *linear):
        inner = pieces.swiglu(gate, up) if reads_bf16(fp8, [linear]) else None
        inner8 = float8.swiglu_float8(gate, up) if fp8 else None
        low = lora_down(inner, [linear])
        y, w_scale = project(inner, inner8, low, scale, *linear, residual=residual)
        ctx.save_for_backward(gate, up, _scale_of(inner8), w_scale, low)
        ctx.scale, ctx.linear = scale, linear
        return y

    @staticmethod
    def backward(ctx, dy):
        (gate, up, inner_scale, w_scale, low), linear = ctx.saved_tensors, ctx.linear
        wanted = ctx.needs_input_grad[5:]
        dy8, dy8t = gradient_float8(dy, inner_scale, w_scale, wanted[0])
        d_low, d_inner = lora_down_backward([dy], [ctx.scale], [linear])
        d_inner = input_gradient(dy, dy8, w_scale, linear[0], d_inner)
        inner, inner8t = None, None  # the linear's input again: one of the two, for the weight's gradient
        if dy8t is None:
            d_gate, d_up, inner = pieces.swiglu_backward(d_inner, gate, up)
        else:
            d_gate, d_up, inner8t = float8.swiglu_backward_float8(d_inner, gate, up, inner_scale)
        (d_lora_A,) = lora_A_gradients(d_low, inner, [linear])
        return d_gate, d_up, dy, None, None, *parameter_gradients(dy, dy8t, d_lora_A, inner, inner8t, low, wanted, ctx.scale, *linear)


# ---------------------------------------------------------------- the block


def block(layer, hidden, cos, sin, cu_seqlens, max_seqlen, attend):
    """Block.plain, fast: hidden (T, D) -> (T, D)."""
    attn, mlp, T = layer.self_attn, layer.mlp, hidden.shape[0]
    hidden, q, k, v = norm_project(hidden, layer.fp8, layer.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj)
    q, k, v = (x.view(T, -1, attn.head_dim) for x in (q, k, v))
    mixed = attend(_Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin), v, cu_seqlens, max_seqlen).reshape(T, -1)
    hidden = _ProjectAdd.apply(mixed, hidden, layer.fp8, *weight_and_adapter(attn.o_proj))
    hidden, gate, up = norm_project(hidden, layer.fp8, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    return _SwiGLUProjectAdd.apply(gate, up, hidden, layer.fp8, *weight_and_adapter(mlp.down_proj))
