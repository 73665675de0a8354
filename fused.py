"""A Llama block whose backward pass is written by hand, so that only what it needs is kept and each tensor is read as rarely as it can be.

The plain twin is Block.plain in model.py, differentiated by autograd. Per token and layer of the 8B shape, in bf16, that keeps some 200 KB;
this keeps 92: the block's input, rotated q, k and v, the attention's output, the middle of the residual stream, gate and up. Normalised
inputs and silu(gate) * up are made again from them, inside the kernels that read them anyway.

Shapes: T tokens, D hidden size, H query heads, G key/value heads, K head size, r LoRA rank. dy is the gradient of the loss in y.
"""

import torch
import torch.nn.functional as F

import kernels
from kernels import matmul, weight_gradient


def block(layer, hidden, cos, sin, cu_seqlens, max_seqlen, attend):
    """Block.plain, fast: hidden (T, D) -> (T, D)."""
    attn, mlp, T = layer.self_attn, layer.mlp, hidden.shape[0]
    hidden, q, k, v = norm_project(hidden, layer.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj)
    q, k, v = (x.view(T, -1, attn.head_dim) for x in (q, k, v))
    mixed = attend(_Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin), v, cu_seqlens, max_seqlen).reshape(T, -1)
    hidden = _ProjectAdd.apply(mixed, hidden, *parts(attn.o_proj))
    hidden, gate, up = norm_project(hidden, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    return _SwiGLUProjectAdd.apply(gate, up, hidden, *parts(mlp.down_proj))


class _Embed(torch.autograd.Function):
    """Rows of the embedding, for a weight that `accumulates`: its gradient touches the stream's rows and not the whole (V, D)."""

    @staticmethod
    def forward(ctx, weight, input_ids):
        ctx.save_for_backward(weight, input_ids)
        return F.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx, dy):
        weight, input_ids = ctx.saved_tensors
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
        weight.grad.index_put_((input_ids,), dy.to(weight.grad_dtype), accumulate=True)  # sorts the ids, so bits repeat
        return None, None


def embed(weight, input_ids):
    """weight (V, D), input_ids (T,) -> (T, D)."""
    return _Embed.apply(weight, input_ids) if getattr(weight, "accumulates", False) else F.embedding(input_ids, weight)


# ---------------------------------------------------------------- a linear layer with a LoRA adapter, and its gradients


def parts(linear):
    """(scale, weight, bias, lora_A, lora_B) of a plain linear layer or a LoRALinear: None for what it has not."""
    if not getattr(linear, "enabled", False):
        return 0.0, linear.weight, linear.bias, None, None
    assert linear.dropout == 0 or not linear.training, "LoRA dropout is in the plain block only"
    return linear.scale, linear.weight, linear.bias, linear.lora_A, linear.lora_B


def project(x, scale, weight, bias, lora_A, lora_B, residual=None):
    """y = x W^T + b + scale (x A^T) B^T, (T, in) -> (T, out), added to `residual` inside the matmul where there is one; and x A^T."""
    if residual is None:
        y = F.linear(x, weight, bias)
    else:
        y = torch.addmm(residual, x, weight.T)
        y = y if bias is None else y.add_(bias)
    if lora_A is None:
        return y, None
    low = x @ lora_A.to(x.dtype).T
    return y.addmm_(low, lora_B.to(x.dtype).T, alpha=scale), low


def low_gradient(dy, scale, lora_B):
    """Gradient of x A^T, (T, r)."""
    return None if lora_B is None else (dy @ lora_B.to(dy.dtype)).mul_(scale)


def input_gradient(dy, d_low, weight, lora_A, dx=None):
    """Gradient of x, (T, in), added to `dx` where that is given."""
    dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx if d_low is None else dx.addmm_(d_low, lora_A.to(dy.dtype))


def part_gradients(dy, d_low, x, low, wanted, scale, weight, bias, lora_A, lora_B):
    """Gradients of weight, bias, lora_A and lora_B; None where not wanted, or where the weight has taken its own already."""
    d_weight = weight_gradient(weight, dy, x) if wanted[0] else None
    d_bias = dy.sum(0) if wanted[1] else None
    if d_low is None:
        return d_weight, d_bias, None, None
    return d_weight, d_bias, matmul(d_low.T, x, lora_A.dtype), matmul(dy.T, low, lora_B.dtype).mul_(scale)


# ---------------------------------------------------------------- the pieces of a block


class _NormProject(torch.autograd.Function):
    """x -> x, and y_i = rms_norm(x) W_i^T of linears that share an input. x is handed through so that the gradient of the residual
    branch comes back here, to be added inside the norm's backward kernel."""

    @staticmethod
    def forward(ctx, x, norm_weight, eps, scales, *flat):
        normed = kernels.rms_norm_forward(x, norm_weight, eps)
        ys, lows = zip(*(project(normed, scale, *linear) for scale, linear in zip(scales, _by_linear(flat), strict=True)), strict=True)
        ctx.save_for_backward(x, norm_weight, *lows, *flat)
        ctx.eps, ctx.scales = eps, scales
        return x.view_as(x), *ys

    @staticmethod
    def backward(ctx, d_residual, *dys):
        x, norm_weight, *saved = ctx.saved_tensors
        lows, linears, wanted = saved[: len(dys)], _by_linear(saved[len(dys) :]), _by_linear(ctx.needs_input_grad[4:])
        normed = kernels.rms_norm_forward(x, norm_weight, ctx.eps)
        d_normed, d_flat = None, []
        for dy, low, scale, linear, wants in zip(dys, lows, ctx.scales, linears, wanted, strict=True):
            weight, _, lora_A, lora_B = linear
            d_low = low_gradient(dy, scale, lora_B)
            d_normed = input_gradient(dy, d_low, weight, lora_A, d_normed)
            d_flat += part_gradients(dy, d_low, normed, low, wants, scale, *linear)
        dx, d_norm_weight = kernels.rms_norm_backward(d_normed, x, norm_weight, ctx.eps, d_residual)
        return dx, d_norm_weight.to(norm_weight.dtype) if ctx.needs_input_grad[1] else None, None, None, *d_flat


def _by_linear(flat):
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]  # weight, bias, lora_A, lora_B


def norm_project(x, norm, *linears):
    """(x, y_1, y_2, ..) with y_i = linears[i](norm(x)); go on with the x returned, not with the argument."""
    scales, *columns = zip(*map(parts, linears), strict=True)
    return _NormProject.apply(x, norm.weight, norm.eps, scales, *(part for linear in zip(*columns, strict=True) for part in linear))


class _Rotate(torch.autograd.Function):
    """Rotary positions. The gradient of a rotation is the rotation back, so only the angles are kept, once for all layers."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return kernels.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return kernels.rotate(dy, cos, sin, back=True), None, None


class _ProjectAdd(torch.autograd.Function):
    """residual + a W^T."""

    @staticmethod
    def forward(ctx, a, residual, scale, *linear):
        y, low = project(a, scale, *linear, residual=residual)
        ctx.save_for_backward(a, low, *linear)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        a, low, *linear = ctx.saved_tensors
        weight, _, lora_A, lora_B = linear
        d_low = low_gradient(dy, ctx.scale, lora_B)
        da = input_gradient(dy, d_low, weight, lora_A)
        return da, dy, None, *part_gradients(dy, d_low, a, low, ctx.needs_input_grad[3:], ctx.scale, *linear)


class _SwiGLUProjectAdd(torch.autograd.Function):
    """residual + (silu(gate) * up) W^T."""

    @staticmethod
    def forward(ctx, gate, up, residual, scale, *linear):
        y, low = project(kernels.swiglu(gate, up), scale, *linear, residual=residual)
        ctx.save_for_backward(gate, up, low, *linear)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up, low, *linear = ctx.saved_tensors
        weight, _, lora_A, lora_B = linear
        d_low = low_gradient(dy, ctx.scale, lora_B)
        d_gate, d_up, inner = kernels.swiglu_backward(input_gradient(dy, d_low, weight, lora_A), gate, up)
        return d_gate, d_up, dy, None, *part_gradients(dy, d_low, inner, low, ctx.needs_input_grad[4:], ctx.scale, *linear)
