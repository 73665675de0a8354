"""What only a GPU can show, for test_gpu.py and, where pytest is missing, by itself: python
tests/gpu_checks.py [NAME ...] prints what was measured.

Each check asserts and returns a dict of numbers. Errors are relative: |a - b| / |b| over the whole tensor.
"""

import copy
import functools
import importlib.util
import itertools
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run without pytest

import torch
import torch.distributed as dist
from tiny_models import (
    OLMO2,
    QWEN3,
    gradients,
    nll_sum,
    random_documents,
    random_llama,
    stream,
    tiny_config,
)
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
import optim
from analysis import tsne
from kernels import (
    IGNORE_INDEX,
    SharedPrefix,
    attention,
    block,
    float8,
    logps,
    reference,
    rms_norm,
    segment_sums,
    token_logps,
)
from model import adapters_disabled, apply_fused, apply_lora, apply_recompute, generate, init_lora
from plumbing import exchange, parallel
from plumbing.checkpoint import Checkpointer
from plumbing.files import read_config, read_json

BF16 = 2e-2  # a product of two bf16 roundings (0.4 % each), through a few operations
LENGTHS = (257, 1, 130, 64)
DOCUMENTS = random_documents(1000, LENGTHS)
NORMS = {"llama": {}, "qwen3": QWEN3, "olmo2": OLMO2}  # changes of a config
PAIRS = (
    (200, 57, 300),
    (0, 1, 129),
    (64, 66, 1),
    (1, 63, 63),
    (128, 0, 65),
)  # tokens: shared prefix, rest of chosen, rest of rejected


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def value_and_gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, randn(*value.shape, seed=99, dtype=value.dtype))


def twins(fast, slow, *inputs):
    """Errors of a bf16 fast path against its twin run in float32 on the same numbers: {"value": ..., "grad
    0": ...}.
    """
    value, grads = value_and_gradients(fast, *inputs)
    expected, expected_grads = value_and_gradients(slow, *(x.float() for x in inputs))
    named = {f"grad {i}": error(a, b) for i, (a, b) in enumerate(zip(grads, expected_grads, strict=True))}
    return {"value": error(value, expected)} | named


def assert_below(errors, limit):
    assert all(0 < value < limit for value in errors.values()), (
        errors
    )  # 0 would be one path compared with itself
    return errors


def peak_bytes(function):
    """Bytes allocated on top of what was there before, at the worst moment of function()."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cuda_llama(dtype=torch.float32, lora=False, **config):
    """A Llama of 4 x 64 heads, wide enough for the flash kernel."""
    shape = dict(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = random_llama(tiny_config(**shape | dict(max_position_embeddings=512) | config), std=0.06)
    if lora:
        apply_lora(model, rank=4, alpha=8.0)
        init_lora(model, seed=4)
        for name, param in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(param, std=0.02, generator=torch.Generator().manual_seed(5))
    return model.to("cuda", dtype)


def on_gpu(documents):
    return [document.cuda() for document in documents]


def packed(documents):
    input_ids, position_ids, cu_seqlens, max_seqlen = stream(documents)
    return input_ids.cuda(), position_ids.cuda(), cu_seqlens.cuda(), max_seqlen


def loss_of(model, documents=DOCUMENTS):
    ids = on_gpu(documents)
    targets = torch.cat([torch.cat((d[1:], d.new_tensor([IGNORE_INDEX]))) for d in ids])
    return -token_logps(model(*packed(documents)), model.lm_head.weight, targets).sum()


# ---------------------------------------------------------------- kernels


def check_attention_bf16():
    """varlen_attn, forward and backward, over documents of odd lengths and grouped heads."""
    worst = {}
    for H, G, K in ((8, 8, 64), (8, 2, 128), (6, 3, 64)):
        cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
        inputs = (
            randn(sum(LENGTHS), H, K),
            randn(sum(LENGTHS), G, K, seed=1),
            randn(sum(LENGTHS), G, K, seed=2),
        )
        errors = twins(
            *(
                lambda *x, f=f, cu=cu_seqlens: f(*x, cu, max(LENGTHS))
                for f in (attention, reference.attention)
            ),
            *inputs,
        )
        worst = {key: max(value, worst.get(key, 0)) for key, value in errors.items()}
    return assert_below(worst, BF16)


def check_attention_flash4():
    """The optional kernel, where it is installed: with and without shared prefixes."""
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    inputs = (
        randn(sum(LENGTHS), 8, 128),
        randn(sum(LENGTHS), 2, 128, seed=1),
        randn(sum(LENGTHS), 2, 128, seed=2),
    )
    fast = functools.partial(attention, kernel="flash4")
    errors = twins(
        *(lambda *x, f=f: f(*x, cu_seqlens, max(LENGTHS)) for f in (fast, reference.attention)), *inputs
    )
    stream, _ = shared_stream()
    inputs = [randn(int(stream[0][-1]), heads, 128, seed=seed) for seed, heads in enumerate((8, 2, 2))]
    shared = twins(*(lambda *x, f=f: f(*x, *stream) for f in (fast, reference.attention)), *inputs)
    assert torch.equal(fast(*inputs, *stream), fast(*inputs, *stream))
    return assert_below(errors | {f"shared {name}": value for name, value in shared.items()}, BF16)


def check_attention_fp32():
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    inputs = [randn(sum(LENGTHS), heads, 64, seed=heads, dtype=torch.float32) for heads in (4, 2, 2)]
    errors = twins(
        *(lambda *x, f=f: f(*x, cu_seqlens, max(LENGTHS)) for f in (attention, reference.attention)), *inputs
    )
    return assert_below(errors, 1e-5)


def check_attention_is_repeatable():
    """The step-0 check of DPO compares two forwards bit for bit."""
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    q, k, v = (
        randn(sum(LENGTHS), 8, 128),
        randn(sum(LENGTHS), 2, 128, seed=1),
        randn(sum(LENGTHS), 2, 128, seed=2),
    )
    first = attention(q, k, v, cu_seqlens, max(LENGTHS))
    assert all(torch.equal(first, attention(q, k, v, cu_seqlens, max(LENGTHS))) for _ in range(10))
    return {}


def shared_stream():
    """PAIRS as packing.pack lays them out, on the GPU: cu_seqlens, longest document, SharedPrefix; prefix
    lengths of all documents.
    """
    own, prefixes = (
        [p + c for p, c, _ in PAIRS] + [r for *_, r in PAIRS],
        [0] * len(PAIRS) + [p for p, *_ in PAIRS],
    )
    rows = torch.arange(sum(own)).split(own)
    kv_index = [torch.cat([rows[d - len(PAIRS)][:prefix], rows[d]]) for d, prefix in enumerate(prefixes)]
    cu_seqlens, cu_seqlens_k = (
        torch.tensor([0, *lengths]).cumsum(0).int().cuda() for lengths in (own, map(len, kv_index))
    )
    return (
        cu_seqlens,
        max(map(len, kv_index)),
        SharedPrefix(torch.cat(kv_index).cuda(), cu_seqlens_k),
    ), prefixes


def check_shared_attention_bf16():
    """Fewer queries than keys, forward and backward: branches of odd lengths behind a prefix, and none, and
    grouped heads.
    """
    stream, _ = shared_stream()
    T, worst = int(stream[0][-1]), {}
    for H, G, K in ((8, 8, 64), (8, 2, 128), (6, 3, 64)):
        inputs = randn(T, H, K), randn(T, G, K, seed=1), randn(T, G, K, seed=2)
        errors = twins(*(lambda *x, f=f: f(*x, *stream) for f in (attention, reference.attention)), *inputs)
        worst = {key: max(value, worst.get(key, 0)) for key, value in errors.items()}
    return assert_below(worst, BF16)


def check_shared_attention_fp32():
    stream, _ = shared_stream()
    inputs = [randn(int(stream[0][-1]), heads, 64, seed=heads, dtype=torch.float32) for heads in (4, 2, 2)]
    return assert_below(
        twins(*(lambda *x, f=f: f(*x, *stream) for f in (attention, reference.attention)), *inputs), 1e-5
    )


def check_shared_attention_is_repeatable():
    """Forward bit for bit, and the backward of its gather, which adds two rows of a prefix at most."""
    stream, _ = shared_stream()
    T, kv_index = int(stream[0][-1]), stream[2].kv_index
    q, k, v = randn(T, 8, 128), randn(T, 2, 128, seed=1), randn(T, 2, 128, seed=2)
    first, (grad,) = (
        attention(q, k, v, *stream),
        value_and_gradients(lambda k: k.index_select(0, kv_index), k)[1],
    )
    for _ in range(10):
        assert torch.equal(first, attention(q, k, v, *stream))
        assert torch.equal(grad, value_and_gradients(lambda k: k.index_select(0, kv_index), k)[1][0])
    return {}


def check_rms_norm_bf16():
    x, weight = randn(513, 256), randn(256, seed=1)
    return assert_below(
        twins(lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), x, weight), 1e-2
    )


def check_token_logps_bf16():
    """Values to float32 accuracy: the logits of bf16 inputs are accumulated and kept in float32. Gradients to
    bf16's.
    """
    T, D, V = 1000, 256, 32000
    hidden, weight = randn(T, D), randn(V, D, seed=1) / 16
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3)).cuda()
    targets[::7] = IGNORE_INDEX
    errors = twins(
        lambda h, w: token_logps(h, w, targets, chunk=300),
        lambda h, w: reference.token_logps(h, w, targets),
        hidden,
        weight,
    )
    assert errors["value"] < 1e-5, errors
    assert token_logps(hidden, weight, targets)[::7].eq(0).all()
    return assert_below(errors, 1e-2)


def check_token_logps_memory():
    """CHECKS 20. (T, V) logits in float32 would be 2 GiB; a chunk of 512 rows is 131 MB, and weight's float32
    gradient 66 MB.
    """
    T, D, V, chunk = 8192, 256, 65536, 512
    hidden, weight = randn(T, D).requires_grad_(), (randn(V, D, seed=1) / 16).requires_grad_()
    targets = torch.arange(T, device="cuda")
    peak = peak_bytes(lambda: token_logps(hidden, weight, targets, chunk=chunk).sum().backward())
    one_chunk, weight_gradient = chunk * V * 4, V * D * 4
    assert peak < 3 * one_chunk + 3 * weight_gradient, peak
    return {"peak GiB": peak / 2**30, "all logits GiB": T * V * 4 / 2**30}


def check_segment_sums():
    values, offsets = randn(1000, dtype=torch.float32), torch.tensor([0, 300, 300, 301, 1000]).cuda()
    sums, (grad,) = value_and_gradients(lambda v: segment_sums(v, offsets), values)
    expected, (expected_grad,) = value_and_gradients(
        lambda v: torch.stack([x.sum() for x in v.tensor_split(offsets.cpu()[1:-1])]), values
    )
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(grad, expected_grad) and sums[1] == 0
    assert all(torch.equal(sums, segment_sums(values, offsets)) for _ in range(10))
    return {"largest difference": (sums - expected).abs().max().item()}


def check_block_kernels():
    """Every Triton kernel of triton_block.py against its twin on the same numbers, in float32 and bf16, at
    the 8B widths and odd ones.
    """
    worst = {}
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        errors = {}
        for T, D, H, K in ((1000, 4096, 32, 128), (37, 576, 9, 64)):
            x, dy, more = (randn(T, D, seed=s, dtype=dtype) for s in range(3))
            weight, angles = randn(D, seed=3, dtype=dtype), randn(T, 1, K // 2, seed=4, dtype=torch.float32)
            gate, up, dout = (randn(T, D * 7 // 2, seed=s, dtype=dtype) for s in range(5, 8))
            logits, g = 5 * randn(T, 50000, dtype=torch.float32), randn(T, dtype=torch.float32)
            targets = torch.arange(T, device="cuda") * 40
            q, log_z = randn(T, H, K, seed=8, dtype=dtype), logits.logsumexp(-1)
            d_turned, angles_of = randn(T, H, K, seed=9, dtype=dtype), (angles.cos(), angles.sin())
            of_head, of_width = (randn(size, seed=10, dtype=dtype) for size in (K, H * K))
            for name, *inputs in (
                ("rms_norm_forward", x, weight, 1e-5),
                ("rms_norm_forward", x, weight, 1e-5, more),
                ("rms_norm_backward", dy, x, weight, 1e-5, more),
                ("rms_norm_backward", dy, x, weight, 1e-5),
                ("norm_rotate", q, of_head, 1e-5, *angles_of),
                ("norm_rotate", q, of_width, 1e-5, *angles_of),
                ("norm_rotate_backward", d_turned, q, of_head, 1e-5, *angles_of),
                ("norm_rotate_backward", d_turned, q, of_width, 1e-5, *angles_of),
                ("rotate", q, angles.cos(), angles.sin()),
                ("swiglu", gate, up),
                ("swiglu_backward", dout, gate, up),
                ("pick_logps", logits, targets),
                ("logits_gradient", logits, log_z, targets, g, dtype),
            ):
                fast = getattr(logps if "log" in name else block, name)
                plain = getattr(reference, name.removesuffix("_forward"))
                for out, expected in zip(
                    *(r if isinstance(r, tuple) else (r,) for r in (fast(*inputs), plain(*inputs)))
                ):
                    assert out.dtype == expected.dtype
                    errors[name] = max(errors.get(name, 0), error(out, expected))
        assert all(value < limit for value in errors.values()), errors
        worst |= {f"{name} {dtype}": value for name, value in errors.items() if value > limit / 4}
    return worst


def check_fp8_linear():
    """Kernels against twins bit for bit, and _scaled_mm against float32 products of the same float8 numbers,
    at the 8B widths and odd T.

    The last also without fast accumulation: the difference is what that costs in accuracy.
    """
    worst, turned = {}, "share of numbers that differ between swiglu forward and backward"
    for T, D, O in ((1000, 4096, 1024), (37, 4096, 14336), (2049, 14336, 4096), (5, 576, 192)):
        x, dy, weight = randn(T, D), randn(T, O, seed=1) * 1e-4, randn(O, D, seed=2) / D**0.5
        x[0] = 0  # a row of zeros, a column of few large numbers
        x[:, 5] *= 1000
        x8, w8 = float8.quantize(x), float8.quantize(weight)
        gradient, twin = (
            float8.quantize_gradient(dy, w8.scale, x8.scale),
            reference.quantize_gradient(dy, w8.scale, x8.scale),
        )
        w8t, x8t = float8.quantize_transposed(weight, w8.scale), float8.quantize_transposed(x, x8.scale)
        scaled = float8.quantize(dy, w8.scale)
        for a, b in (
            (x8, reference.quantize(x)),
            (w8, reference.quantize(weight)),
            (scaled, reference.quantize(dy, w8.scale)),
            *zip(gradient, twin, strict=True),
        ):
            assert torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and torch.equal(
                a.scale, b.scale
            ), (T, D, O)
        for a, b, scale in ((w8t, weight, w8.scale), (x8t, x, x8.scale)):
            assert torch.equal(
                a.values.view(torch.uint8), reference.quantize_transposed(b, scale).view(torch.uint8)
            ), (T, D, O)
        normed, gate, up, d_inner = (randn(T, O, seed=seed) for seed in range(5, 9))
        gain = randn(O, seed=9)
        inner8, fused = float8.swiglu_float8(gate, up), []
        for name, *inputs in (
            ("rms_norm_float8", normed, gain, 1e-5),
            ("swiglu_float8", gate, up),
            ("swiglu_backward_float8", d_inner, gate, up, inner8.scale),
        ):
            a, b = getattr(float8, name)(*inputs), getattr(reference, name)(*inputs)
            if name == "swiglu_backward_float8":  # numbers, and those of the scale that they are given
                fused += [
                    error(u, v) for u, v in ((a[0], b[0]), (a[1], b[1]), (a[2].values.float(), b[2].float()))
                ]
                forward = reference.Float8(
                    a[2].values[:, :T].T, inner8.scale
                )  # the forward's numbers, turned
                differ = (
                    (forward.values.view(torch.uint8) != inner8.values.view(torch.uint8))
                    .float()
                    .mean()
                    .item()
                )
                worst[turned] = max(worst.get(turned, 0), differ)
            else:
                fused.append(error(a.values.float() * a.scale[:, None], b.values.float() * b.scale[:, None]))
        worst["fused"] = max(worst.get("fused", 0), *fused)
        products = {"y": (x8, w8), "dx": (gradient[0], w8t), "dW": (gradient[1], x8t)}
        exact = {
            "y": x.float() @ weight.float().T,
            "dx": dy.float() @ weight.float(),
            "dW": dy.float().T @ x.float(),
        }
        for name, (a, b) in products.items():
            product, expected = float8.matmul_float8(a, b), reference.matmul_float8(a, b)
            assert torch.equal(product, float8.matmul_float8(a, b)), "bits do not repeat"
            slow = torch._scaled_mm(
                a.values, b.values.T, a.scale[:, None], b.scale[None, :], out_dtype=torch.bfloat16
            )
            numbers = {
                "": error(product, expected),
                " rounding": error(product, exact[name]),
                " slow": error(slow, expected),
            }
            worst |= {name + key: max(value, worst.get(name + key, 0)) for key, value in numbers.items()}
    assert all(value < (0.06 if "rounding" in name else 2e-2) for name, value in worst.items()), worst
    assert worst[turned] < 1e-3, worst
    return worst


def check_fp8_model():
    """A model in float8 beside bf16, full and LoRA: loss, gradients' cosine; recomputed and run again, bit
    for bit the same.
    """
    worst = {}
    for (name, config), lora in itertools.product(NORMS.items(), (False, True)):
        plain, model = (cuda_llama(torch.bfloat16, lora=lora, **config) for _ in range(2))
        apply_fused(plain)
        apply_fused(model, fp8=True)
        losses = [loss_of(m) for m in (plain, model)]
        for loss in losses:
            loss.backward()
        grads, expected = ({n: g.float().flatten() for n, g in gradients(m).items()} for m in (model, plain))
        cosines = [torch.cosine_similarity(grads[n], expected[n], dim=0).item() for n in expected]
        mean = sum(cosines) / len(cosines)
        assert grads.keys() == expected.keys() and min(cosines) > 0.93 and mean > 0.96, (name, cosines)
        assert abs(losses[1].item() / losses[0].item() - 1) < 1e-2
        apply_recompute(model, "full")
        assert torch.equal(loss_of(model), losses[1])  # as the step-0 check of DPO wants it
        worst |= {f"least cosine, {name}, lora={lora}": min(cosines), f"mean, {name}, lora={lora}": mean}
    return worst


def check_split_adamw():
    """Seven steps, gradients and moments in float32 and bf16, against the twin: the same random bits, so the
    same roundings.
    """
    worst = {}
    for moments, grads in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ):
        states = []
        for step_of in (kernels.adamw, reference.adamw):
            weight, low_bits = kernels.split_master(randn(333, 1001, dtype=torch.float32))
            m, v = (torch.zeros(333, 1001, dtype=moments, device="cuda") for _ in range(2))
            for step in range(1, 8):
                grad = randn(333, 1001, seed=step, dtype=grads)
                step_of(
                    weight, low_bits, m, v, grad, 0.5, 1e-3, 0.1, 0.9, 0.999, 1e-8, step, (step << 12) + 7
                )
            states.append((kernels.join_master(weight, low_bits), m, v))
        errors = [error(a, b) for a, b in zip(*states)]
        assert errors[0] < 1e-6 and max(errors[1:]) < (1e-6 if moments == torch.float32 else 1e-4), errors
        assert (states[0][0] - randn(333, 1001, dtype=torch.float32)).abs().mean() > 1e-3
        worst[f"{moments} {grads}"] = max(errors)
    return worst


# ---------------------------------------------------------------- the model


def check_fused_block_bf16():
    """Loss and gradients of the fused model, full and LoRA, against the plain one in float32: no further off
    than the plain one in bf16.
    """
    worst = {}
    for (name, config), lora in itertools.product(NORMS.items(), (False, True)):
        exact, plain, fast = (
            cuda_llama(dtype, lora=lora, **config)
            for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
        )
        apply_fused(fast)
        for param, source in zip(exact.parameters(), plain.parameters(), strict=True):
            param.data.copy_(source.data.float())
        losses, grads = [], []
        for model in (exact, plain, fast):
            losses.append(loss_of(model))
            losses[-1].backward()
            grads.append(gradients(model))
        errors = [max(error(grads[i][n], grads[0][n]) for n in grads[0]) for i in (1, 2)]
        assert abs(losses[2].item() / losses[0].item() - 1) < 5e-3, (name, losses)
        assert errors[1] < max(1.2 * errors[0], BF16), (name, errors)
        apply_recompute(fast, "full")
        assert torch.equal(loss_of(fast), losses[2])  # bit for bit, as the step-0 check of DPO wants it
        worst |= {f"plain, {name}, lora={lora}": errors[0], f"fused, {name}, lora={lora}": errors[1]}
    return worst


def check_fused_norms_fp32():
    """The kernels of q's and k's norms and of those behind attention and MLP inside a model, in float32,
    where a formula that is wrong cannot hide behind bf16's roundings: loss and every gradient."""
    worst = {}
    for (name, config), recompute in itertools.product(NORMS.items(), ("none", "full")):
        plain, fast = (cuda_llama(**config) for _ in range(2))
        apply_fused(fast)
        apply_recompute(fast, recompute)
        losses = [loss_of(model) for model in (plain, fast)]
        for loss in losses:
            loss.backward()
        grads, expected = gradients(fast), gradients(plain)
        worst[f"{name} {recompute}"] = max(error(grads[n], expected[n]) for n in expected)
        assert abs(losses[1].item() / losses[0].item() - 1) < 1e-5, (name, losses)
    return assert_below(worst, 1e-5)


def check_gradients_in_the_matmul():
    """float32 gradients of bf16 weights, added up inside the matmuls of two micro-batches, against float32
    sums of the plain ones.
    """
    model, plain = (cuda_llama(torch.bfloat16) for _ in range(2))
    for m in (model, plain):
        apply_fused(m)
    optim.keep_masters(model, torch.float32)
    sums = {}
    for half in (DOCUMENTS[:2], DOCUMENTS[2:]):
        loss_of(model, half).backward()
        plain.zero_grad()
        loss_of(plain, half).backward()
        sums = {name: sums.get(name, 0) + grad.float() for name, grad in gradients(plain).items()}
    grads = gradients(model)
    assert all(grad.dtype == torch.float32 for grad in grads.values()) and grads.keys() == sums.keys()
    return assert_below({"worst": max(error(grads[name], sums[name]) for name in sums)}, 6e-3)


def check_model_bf16():
    """bf16 on the GPU against float32 on the CPU: logits, and gradients of the summed NLL. All weights as
    bf16 can hold them.
    """
    exact = random_llama(cuda_llama().config, std=0.06).bfloat16().float()
    model = copy.deepcopy(exact).to("cuda", torch.bfloat16)
    logits = model(*packed(DOCUMENTS)) @ model.lm_head.weight.T
    expected = exact(*stream(DOCUMENTS)) @ exact.lm_head.weight.T
    loss_of(model).backward()
    nll_sum(exact, DOCUMENTS).backward()
    grads, expected_grads = gradients(model), gradients(exact)
    worst = max(error(grads[name].cpu(), expected_grads[name]) for name in grads)
    return assert_below({"logits": error(logits.cpu(), expected), "worst gradient": worst}, 5e-2)


def check_packed_equals_alone_bf16():
    """CHECKS 16 in bf16: the neighbours only change the order in which matmuls sum. Fused blocks."""
    model = cuda_llama(torch.bfloat16)
    apply_fused(model)
    together = model(*packed(DOCUMENTS))
    alone = torch.cat([model(*packed([document])) for document in DOCUMENTS])
    loss_of(model).backward()
    packed_grads = gradients(model)
    model.zero_grad()
    for document in DOCUMENTS:
        loss_of(model, [document]).backward()
    worst = max(error(packed_grads[name], grad) for name, grad in gradients(model).items())
    errors = {"hidden": error(together, alone), "worst gradient": worst}
    assert all(value < BF16 for value in errors.values()), errors
    return errors


def check_shared_prefix_bf16():
    """A model's hidden states and gradients with every prefix once, against the stream that repeats it."""
    model = cuda_llama(torch.bfloat16)
    (cu_seqlens, longest, shared), prefixes = shared_stream()
    ids = random_documents(1000, (int(cu_seqlens[-1]),))[0].cuda()
    whole = [ids[rows] for rows in shared.kv_index.split(shared.cu_seqlens_k.diff().tolist())]
    positions = torch.cat(
        [torch.arange(prefix, len(document)) for prefix, document in zip(prefixes, whole)]
    ).cuda()
    weights = randn(
        int(shared.cu_seqlens_k[-1]), model.config.hidden_size
    )  # of all documents' hidden states in the sum to be derived

    together = model(ids, positions, cu_seqlens, longest, shared=shared)[shared.kv_index]
    (together * weights).sum().backward()
    grads = gradients(model)
    model.zero_grad()
    repeated = model(*packed([document.cpu() for document in whole]))
    (repeated * weights).sum().backward()
    errors = {"hidden": error(together, repeated)}
    errors["worst gradient"] = max(error(grads[name], grad) for name, grad in gradients(model).items())
    assert all(value < 5e-2 for value in errors.values()), (
        errors
    )  # hidden states came out equal to the bit on an H200
    return errors


def check_generation():
    """Float32 on the GPU continues as on the CPU. bf16 reads the prompts through varlen_attn: its first
    tokens are a packed forward's.
    """
    prompts = [document.tolist() for document in random_documents(1000, (9, 1, 30), seed=3)]
    model = cuda_llama()
    assert generate(model, prompts, 16) == generate(copy.deepcopy(model).cpu(), prompts, 16)
    model = model.bfloat16()
    answers = generate(model, prompts, 16)
    _, _, cu_seqlens, _ = stream([torch.tensor(p) for p in prompts])
    last = model(*packed([torch.tensor(p) for p in prompts]))[cu_seqlens[1:].long().cuda() - 1]
    assert [a[0] for a in answers] == (last @ model.lm_head.weight.T).float().argmax(-1).tolist()
    assert [len(a) for a in answers] == [16] * 3
    return {}


class OperationNames(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def check_recompute():
    """Equal gradients from less memory, plain and fused; what is recomputed runs attention again, nothing
    else does.
    """
    documents = random_documents(1000, (512,) * 16)
    peaks, forwards, grads = {}, {}, {}
    for mode in ("none", "half", "full", "fused none", "fused half", "fused full"):
        model = cuda_llama(torch.bfloat16, num_hidden_layers=6)
        if mode.startswith("fused"):
            apply_fused(model)
        apply_recompute(model, mode.split()[-1])
        loss = loss_of(model, documents)
        with OperationNames() as backward:
            loss.backward()
        forwards[mode] = sum("varlen" in name and "backward" not in name for name in backward.seen)
        grads[mode] = gradients(model)
        model.zero_grad()
        peaks[mode] = peak_bytes(lambda model=model: loss_of(model, documents).backward())
    assert list(forwards.values()) == [0, 3, 6] * 2, forwards
    assert peaks["full"] < peaks["half"] < peaks["none"], peaks
    assert peaks["fused full"] < peaks["fused half"] < peaks["fused none"] < peaks["none"], peaks
    # flash's backward adds in any order, so bits may differ between any two runs
    worst = max(
        error(grads[mode][name], grad)
        for mode in grads
        if mode != "none"
        for name, grad in grads["none"].items()
    )
    assert worst < 5e-2, worst  # plain against fused: either is some 2 % from float32
    return {"worst gradient": worst} | {f"peak MiB {mode}": peak / 2**20 for mode, peak in peaks.items()}


def check_exact_resume():
    """CHECKS 23 on the GPU, bf16 moments: two steps, saved and read back into another model, then the third:
    equal to the bit. Gradients are given, because flash's backward adds in any order."""
    parallel.init()
    try:
        models = [cuda_llama(torch.bfloat16) for _ in range(2)]
        for model in models:
            optim.keep_masters(model, torch.float32)
        optimizers = [optim.adamw(model, 0.1, torch.bfloat16) for model in models]

        def step(i, number):
            for index, param in enumerate(models[i].parameters()):
                param.grad = randn(*param.shape, seed=100 * number + index, dtype=torch.float32)
            optim.apply_gradients(optimizers[i], 1e-3, 1.0)

        step(0, 1)
        step(0, 2)
        with tempfile.TemporaryDirectory() as folder:
            checkpointer = Checkpointer(folder, 1, {})
            checkpointer.save(2, models[0], optimizers[0])
            checkpointer.wait()
            assert Checkpointer(folder, 1, {}).load(checkpointer.latest(), models[1], optimizers[1]) == 2
        step(0, 3)
        step(1, 3)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, q) and torch.equal(p.master.low_bits, q.master.low_bits)
            assert all(
                torch.equal(optimizers[0].state[p][key], optimizers[1].state[q][key])
                for key in ("exp_avg", "exp_avg_sq", "step")
            )
        return {}
    finally:
        parallel.shutdown()


# ---------------------------------------------------------------- sharded


def check_sharded_bf16_step():
    """float32 shards, bf16 compute, on a group of one: loss and gradients near a float32 model's, one clipped
    step lowers the loss.
    """
    parallel.init()
    try:
        plain, model = cuda_llama(), cuda_llama()
        parallel.shard(model, "bf16")
        loss = loss_of(model)
        loss.backward()
        expected = loss_of(plain)
        expected.backward()
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        errors = {"loss": abs(loss.item() / expected.item() - 1),
                  "worst gradient": max(error(grads[name], p.grad) for name, p in plain.named_parameters())}  # fmt: skip
        norm = parallel.clip_grad_norm(list(model.parameters()), 1.0)
        whole = torch.stack([p.grad.norm() for p in plain.parameters()]).norm().item()
        clipped = torch.stack([p.grad.full_tensor().norm() for p in model.parameters()]).norm().item()
        assert abs(norm / whole - 1) < BF16 and abs(clipped - 1) < 1e-4, (norm, whole, clipped)
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True).step()
        model.zero_grad()
        with torch.no_grad():
            after = loss_of(model).item()
            parallel.release(model)
        assert after < loss.item(), (after, loss.item())
        return assert_below(errors, 5e-2) | {"loss before": loss.item(), "after one step": after}
    finally:
        parallel.shutdown()


def check_sharded_lora():
    """CHECKS 5, 8 and 21: a frozen bf16 base under float32 adapters; forwards repeat bit for bit; adapters
    off are the base.
    """
    parallel.init()
    try:
        model, base = cuda_llama(lora=True), cuda_llama()
        for m in (model, base):
            for name, param in m.named_parameters():
                param.data = param.data if "lora_" in name else param.data.bfloat16()
            parallel.shard(m, "bf16")
        with torch.no_grad():
            first = loss_of(model)
            assert torch.equal(first, loss_of(model))
            with adapters_disabled(model):
                assert torch.equal(loss_of(model), loss_of(base))
            parallel.release(model)
        assert torch.equal(loss_of(model.train()), first)
        loss_of(model).backward()
        grads = gradients(model)
        assert grads and all(
            "lora_" in name and grad.dtype == torch.float32 and grad.full_tensor().any()
            for name, grad in grads.items()
        )
        return {"loss": first.item()}
    finally:
        parallel.shutdown()


# ---------------------------------------------------------------- whole runs of two ranks on this one GPU


class ThroughHost:
    """What FSDP2 exchanges, for two ranks on one GPU, which NCCL refuses: copied to the host, exchanged by
    gloo, copied back.
    """

    def allocate(self, size, *, dtype, device):
        return torch.empty(size, dtype=dtype, device=device)


class AllGather(ThroughHost):
    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        output_tensor.copy_(torch.cat(gather(input_tensor)))


class ReduceScatter(ThroughHost):
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        assert op == dist.ReduceOp.AVG
        mine = [whole.chunk(dist.get_world_size())[dist.get_rank()] for whole in gather(input_tensor)]
        output_tensor.copy_(torch.stack(mine).mean(0))


class Done:
    def wait(self):
        pass


def reduce_scatter_through_host(owns, wholes):
    """The same for plumbing.exchange."""
    for own, whole in zip(owns, wholes, strict=True):
        own.copy_(sum(part.chunk(dist.get_world_size())[dist.get_rank()] for part in gather(whole)))
    return Done()


def all_gather_through_host(wholes, owns):
    for whole, own in zip(wholes, owns, strict=True):
        whole.copy_(torch.cat(gather(own)))
    return [Done()]


def gather(tensor):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.cpu())
    return parts


def share_one_gpu():
    """For world.launch: both ranks on the first GPU. All but the exchange is as on two: FSDP2's hooks, its
    streams, our kernels.
    """
    import training

    os.environ["LOCAL_RANK"] = "0"
    init, shard = dist.init_process_group, parallel.shard

    def shard_through_host(model, precision, sharding):
        shard(model, precision, sharding)
        for module in (model, *model.model.layers):
            module.set_custom_all_gather(AllGather())
            module.set_custom_reduce_scatter(ReduceScatter())

    dist.init_process_group = lambda backend, **options: init("gloo", **options)
    parallel.shard = shard_through_host
    exchange.reduce_scatter, exchange.all_gather = reduce_scatter_through_host, all_gather_through_host
    training.Run.finish = lambda self: 0  # an export exchanges by other ways


def share_one_gpu_and_stop():
    import world

    share_one_gpu()
    world.signal_after(2, signal.SIGTERM)


LORA = {"lora_rank": 4, "lora_alpha": 8.0}


def make_world(folder):
    """world.make_world with a model wide enough for the flash kernel."""
    import world  # it needs pytest and datasets, the other checks do not

    root = world.make_world(Path(folder) / "world")
    shape = dict(
        vocab_size=read_config(root / "base")["vocab_size"],
        hidden_size=128,
        intermediate_size=256,
        head_dim=32,
    )
    world.write_model(root / "base", random_llama(tiny_config(**shape), std=0.06))
    return root


def check_runs_of_two_ranks():
    """World size on the fast paths, in fused blocks: two ranks beside one process, and two that stop beside
    one that goes on. DPO with shared prefixes and its own reference cache. Four steps each; losses and
    gradient norms, relative."""
    import world

    full, worst = {"sharding": "full"}, {}
    cases = (("sft", "fp32", {}, 1e-5), ("sft", "fp32", full, 1e-5), ("sft", "bf16", {}, 4e-2), ("dpo", "bf16", {}, 4e-2),
             ("dpo", "bf16", full, 4e-2), ("dpo", "bf16", LORA, 4e-2), ("sft", "fp8", {}, 4e-2))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = make_world(folder)
        for stage, precision, keys, tolerance in cases:
            case = " ".join([stage, precision, *map(str, keys.values())])
            config = world.write_config(
                Path(folder) / case, root, precision=precision, save_every=2, **{stage: {"lr": 1e-3}}, **keys
            )
            runs = [Path(folder) / case / how for how in ("alone", "on two", "resumed")]

            # With a reference cache of its own: another packing rounds differently.
            def launch(run, ranks, prepare=share_one_gpu):
                folders = f"--out_dir={run}", f"--cache_dir={run}/cache"
                return world.launch(stage, config, *folders, ranks=ranks, prepare=prepare)  # noqa: B023

            launch(runs[0], 1).ok()
            launch(runs[1], 2).ok()
            assert launch(runs[2], 2, share_one_gpu_and_stop).codes == [128 + signal.SIGTERM] * 2
            assert "goes on after step 2 of 4" in launch(runs[2], 1).ok().out[0]
            expected, *others = (world.trace(run, "loss", "grad_norm") for run in runs)
            worst[case] = max(((other - expected).abs() / expected).max().item() for other in others)
            assert len(expected) == 4 and worst[case] < tolerance, worst
            if stage == "dpo":  # policy = reference to the bit
                assert all(abs(world.trace(run, "loss")[0].item() - math.log(2)) < 1e-7 for run in runs), case
    return worst


# ---------------------------------------------------------------- the four stages, on the GPU and on the CPU


def check_validate():
    """SFT, DPO and validate with its nulls, oracle, baselines and behaviour: the pair is trained on the GPU, and
    judged there and on the CPU. Separations and their intervals, of 100; shifts relative.
    """
    import world

    root = Path(__file__).parent.parent
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = make_world(folder)
        write_labelled(Path(folder) / "labelled.csv", world.WORDS)
        config = world.write_config(
            Path(folder) / "run", data, dpo={"model_path": f"{folder}/run/sft/final"}, data_eval=None
        )
        keys = [
            f"--texts={data}/pref.jsonl",
            f"--prompts={folder}/labelled.csv",
            "--layers=1",
            "--oracle",
            "--template=tulu",
            "--count=28",
        ]
        commands = [["train_sft.py", config], ["train_dpo.py", config]]
        for device in ("cuda", "cpu"):
            out = f"{folder}/{device}"
            commands.append(["steer.py", "validate", config, f"--out_dir={out}", *keys])
            for command in commands:
                environment = os.environ | ({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
                done = subprocess.run(
                    [sys.executable, *map(str, command)],
                    cwd=root,
                    env=environment,
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            commands = []
            (report,) = Path(out).glob("sweep_*/aqi.json")
            found[device] = read_json(report)
    worst = {}
    for name in ("estimate", "change_interval"):
        ours, theirs = (torch.tensor(found[device]["verdicts"][0][name]) for device in ("cuda", "cpu"))
        worst[name] = (ours - theirs).abs().max().item()
    ours, theirs = (found[device]["shifts"][-1]["achieved"] for device in ("cuda", "cpu"))
    worst["shift"] = abs(ours / theirs - 1)
    assert worst["estimate"] < 0.5 and worst["change_interval"] < 0.5 and worst["shift"] < 0.05, worst
    return worst


def write_labelled(path, words):
    """Sixty labelled prompts of two axioms; unsafe ones begin with another word."""
    rng = random.Random(0)
    rows = ["axiom,safety_label,input"]
    for i in range(60):
        text = " ".join(rng.choice(words) for _ in range(6))
        label = ("unsafe", "safe")[i % 2]
        rows.append(f"axiom {i // 2 % 2},{label},{'bad' if i % 2 == 0 else 'good'} {text}")
    path.write_text("\n".join(rows) + "\n")


# ---------------------------------------------------------------- whole runs of one rank, and of two on two GPUs


def check_runs_on_two_gpus():
    """Two GPUs beside one, through NCCL: losses and gradient norms of four steps, relative; the weights of
    the two modes of sharding.
    """
    import world

    worst = {}
    cases = (("sft", "fp32", {}, 1e-5), ("sft", "bf16", {}, 4e-2), ("dpo", "bf16", {"moments": "bf16", "gradients": "bf16"}, 4e-2),
             ("sft", "bf16", LORA, 4e-2), ("dpo", "bf16", LORA, 4e-2), ("sft", "fp8", {}, 4e-2))  # fmt: skip

    def compare(root, folder, case):
        stage, precision, keys, tolerance = case
        name = " ".join([stage, precision, *map(str, keys)])
        config = world.write_config(folder / name, root, precision=precision, **{stage: {"lr": 1e-3}}, **keys)
        runs = {"one": (1, ()), "two": (2, ())} | (
            {} if "moments" in keys else {"full": (2, ("--sharding=full",))}
        )
        for run, (ranks, how) in runs.items():
            out = folder / name / run
            world.launch(
                stage,
                config,
                f"--out_dir={out}",
                f"--cache_dir={out}/cache",
                *how,
                ranks=ranks,
                logs=f"logs {run}",
            ).ok()
        expected = world.trace(folder / name / "one", "loss", "grad_norm")
        for run in list(runs)[1:]:
            found = world.trace(folder / name / run, "loss", "grad_norm")
            worst[f"{name} {run}"] = ((found - expected).abs() / expected).max().item()
            assert worst[f"{name} {run}"] < tolerance, worst

    with tempfile.TemporaryDirectory() as folder:
        root = make_world(folder)
        in_parallel(lambda case: compare(root, Path(folder), case), cases)
    return worst


def see_the_gpus_of_a_machine():
    """For world.launch: ranks 0 and 1 see the first two GPUs, ranks 2 and 3 the next two."""
    first = int(os.environ["RANK"]) // 2 * 2
    os.environ["CUDA_VISIBLE_DEVICES"] = f"{first},{first + 1}"


def check_hybrid_on_four_gpus():
    """Two machines of two GPUs, which are four of this one, beside all four sharing out one copy: losses and
    gradient norms of four steps, relative; final weights, absolute.
    """
    import world

    worst = {}
    with tempfile.TemporaryDirectory() as folder:
        root = make_world(folder)
        for stage, precision, keys, tolerance in (("sft", "fp32", {}, 1e-5), ("sft", "bf16", {}, 4e-2), ("dpo", "bf16", LORA, 4e-2)):  # fmt: skip
            case = " ".join([stage, precision, *keys])
            path = Path(folder) / case
            config = world.write_config(path, root, precision=precision, **{stage: {"lr": 1e-3}}, **keys)
            machines = dict(machine=2, prepare=see_the_gpus_of_a_machine)
            for name, how in (("full", {}), ("hybrid", machines)):
                folders = f"--out_dir={path}/{name}", f"--cache_dir={path}/{name}/cache"
                world.launch(stage, config, f"--sharding={name}", *folders, ranks=4, **how).ok()
            full, hybrid = (world.trace(path / name, "loss", "grad_norm") for name in ("full", "hybrid"))
            worst[case] = ((hybrid - full).abs() / full).max().item()
            assert len(full) == 4 and worst[case] < tolerance, worst
            a, b = (world.final_weights(path / name) for name in ("full", "hybrid"))
            worst[f"{case} weights"] = world.largest_difference(a, b)
    return worst


def check_bytes_on_one_gpu():
    return runs_end_in_the_same_bytes(1)


def check_bytes_on_two_gpus():
    return runs_end_in_the_same_bytes(2)


def kill_at_step_2():
    import world

    world.save_at_once(kill_after=2)


def runs_end_in_the_same_bytes(ranks):
    """deterministic=True: a run, the same again, and one that is killed (SIGKILL) after step 2 and goes on
    end in the same weights, by the same losses and gradient norms. How many numbers differ without it is
    measured."""
    import world

    differing = {}
    cases = (("sft", {}), ("dpo", {}), ("sft", LORA), ("dpo", LORA), ("sft", {"precision": "fp8"}), ("dpo", {"moments": "bf16"}),
             ("dpo", {"deterministic": False}))  # fmt: skip

    def compare(root, folder, case):
        stage, keys = case
        name = " ".join([stage, *map(str, keys)])
        keys = {"precision": "bf16", "deterministic": True, "save_every": 2} | keys
        config = world.write_config(folder / name, root, **{stage: {"lr": 1e-3}}, **keys)
        runs = [folder / name / run for run in ("once", "again", "killed")]

        def launch(run, prepare=None):
            where = f"--out_dir={run}", f"--cache_dir={run}/cache"
            return world.launch(stage, config, *where, ranks=ranks, prepare=prepare, logs=f"logs {run.name}")

        launch(runs[0]).ok()
        launch(runs[1]).ok()
        assert -signal.SIGKILL in launch(runs[2], kill_at_step_2).codes
        assert "goes on after step 2 of 4" in launch(runs[2]).ok().out[0]
        expected, *others = (world.final_weights(run) for run in runs)
        differ = sum(int((other[key] != expected[key]).sum()) for other in others for key in expected)
        traces = [world.trace(run, "loss", "grad_norm") for run in runs]
        if keys["deterministic"]:
            assert differ == 0 and all(torch.equal(found, traces[0]) for found in traces), (
                name,
                differ,
                traces,
            )
        differing[name] = differ

    with tempfile.TemporaryDirectory() as folder:
        root = make_world(folder)
        in_parallel(lambda case: compare(root, Path(folder), case), cases)
    return differing


def in_parallel(work, cases):
    """Tiny runs leave a GPU idle most of the time."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(work, cases))


# ---------------------------------------------------------------- t-SNE (triton_tsne needs Triton, so it is imported where it runs)


def clusters(n, dims=200):
    """14 clouds, as wide as they are far apart."""
    return (
        randn(n, dims, dtype=torch.float32)
        + 0.3 * randn(14, dims, seed=1, dtype=torch.float32)[torch.arange(n) % 14]
    )


def check_tsne_perplexity():
    """The search in float32 against the plain one in float64: rows stop within 1e-5 nats of the wanted
    entropy in both.
    """
    from kernels import triton_tsne

    worst = 0.0
    for n, rows in ((33, 33), (1400, 1024), (7001, 100)):
        X, own = clusters(n).double(), torch.arange(rows).cuda()
        d2 = torch.cdist(X[:rows], X).square()
        p = triton_tsne.conditional_probabilities(d2, own, 30.0)
        worst = max(worst, error(p, reference.tsne_probabilities(d2, own, 30.0)))
        entropy = -torch.xlogy(p.double(), p.double()).sum(1)
        assert (entropy - math.log(30)).abs().max() < 3e-5 and not p[own, own].any()
    d2 = 2.0 * (1 - torch.eye(50, dtype=torch.float64, device="cuda"))  # no beta gives another perplexity
    assert error(triton_tsne.conditional_probabilities(d2, torch.arange(50).cuda(), 10.0), d2 / 98) < 1e-6
    return assert_below({"worst": worst}, 2e-5)


def check_tsne_gradient():
    """Against the plain gradient in float64, at the start, spread out, and at the end, where attraction and
    repulsion nearly cancel.
    """
    from kernels import triton_tsne

    errors = {}
    for n in (33, 257, 1400, 5008):
        P = tsne.joint_probabilities(clusters(n), 30.0)
        for scale in (1e-4, 1.0, 30.0):
            Y = scale * randn(n, 3, seed=2, dtype=torch.float32)
            for exaggeration in (1.0, 12.0):
                grad = triton_tsne.gradient(Y, P, exaggeration)
                expected = reference.tsne_gradient(Y.double(), P.double(), exaggeration)
                errors[f"Y {scale:g}"] = max(errors.get(f"Y {scale:g}", 0), error(grad, expected))
                assert torch.equal(grad, triton_tsne.gradient(Y, P, exaggeration))  # no atomics
        Y, _ = tsne.tsne(clusters(n), 30.0, path="plain")
        exact = reference.tsne_gradient(Y.double(), P.double())
        attraction = exact - reference.tsne_gradient(Y.double(), P.double(), 0.0)
        difference = triton_tsne.gradient(Y, P) - exact
        errors["end, of the attraction"] = max(
            errors.get("end, of the attraction", 0), (difference.norm() / attraction.norm()).item()
        )
    # float32 against float64, measured on an H200: 1.4e-5 at |Y| = 30, 1e-6 and below elsewhere
    return assert_below(errors, 3e-5)


def check_tsne_stages():
    """The gradient at what a plain descent has reached after so many steps, against float64."""
    from kernels import triton_tsne

    X, errors = clusters(1400), {}
    P = tsne.joint_probabilities(X, 30.0)
    for steps in (1, 5, 20, 100, 250, 300, 400):
        Y, _ = tsne.tsne(X, 30.0, steps=steps, path="plain")
        exaggeration = tsne.EXAGGERATION if steps < tsne.EXAGGERATED_STEPS else 1.0
        exact = reference.tsne_gradient(Y.double(), P.double(), exaggeration)
        attraction = exact - reference.tsne_gradient(
            Y.double(), P.double(), 0.0
        )  # the two forces nearly cancel
        difference = triton_tsne.gradient(Y, P, exaggeration) - exact
        errors[f"{steps} steps"] = (difference.norm() / attraction.norm()).item()
    return assert_below(errors, 3e-5)


def check_tsne_descent():
    """The divergence after 500 steps, over eight starts that differ in the seventh digit, by either path.

    A descent is chaotic: a gain changes by the sign of a product, so a last digit decides it. Plain code, on
    a CPU, from such starts, with the points in another order, in float32 and in float64 (clusters(n) of a
    CPU's generator): KL 1.581 with a standard deviation of 0.9 % and extremes 3.3 % apart at n = 400 (26
    runs), 1.938 with 0.7 % and 2.1 % at n = 700 (10 runs). One run beside one run, at most 2 % apart, was no
    check of the kernels. So: the means of eight, apart by no more than four standard errors.
    """
    X, divergences = clusters(1400), {"fused": [], "plain": []}
    start = tsne._start(X, 3, None, None)
    for seed in range(8):
        begun = start * (1 + 1e-7 * randn(*start.shape, seed=seed, dtype=torch.float32))
        for path, found in divergences.items():
            found.append(tsne.tsne(X, 30.0, start=begun, path=path)[1])
    means = {path: statistics.mean(found) for path, found in divergences.items()}
    deviations = {path: statistics.stdev(found) for path, found in divergences.items()}
    standard_error = math.hypot(*deviations.values()) / math.sqrt(8)
    assert max(deviations.values()) < 0.02 * means["plain"], (
        deviations
    )  # several times what was measured: broken
    result = assert_below(
        {"standard errors apart": abs(means["fused"] - means["plain"]) / standard_error}, 4.0
    )

    (Y, _), (again, _) = (tsne.tsne(X, 30.0, path="fused") for _ in range(2))
    assert torch.equal(Y, again)  # the recorded steps repeat bit for bit
    Y, plainly = (tsne.tsne(X, 30.0, steps=20, path=path)[0] for path in ("fused", "plain"))
    positions = assert_below({"20 steps, positions": error(Y, plainly)}, 2e-2)
    return result | positions | {"KL": means["fused"], "plain KL": means["plain"], "deviations": deviations}


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]
NEEDS = {
    check_attention_flash4: (9, 0),
    check_fp8_linear: (8, 9),
    check_fp8_model: (8, 9),
}  # others: (8, 0), for bf16


def why_skipped(check):
    """Why this GPU cannot run the check; None where it can."""
    if check is check_attention_flash4 and importlib.util.find_spec("flash_attn") is None:
        return "flash-attn-4 is not installed"
    for count, words in ((2, "two"), (4, "four")):
        if check.__name__.endswith(f"{words}_gpus") and torch.cuda.device_count() < count:
            return f"needs {words} GPUs"
    needed, found = NEEDS.get(check, (8, 0)), torch.cuda.get_device_capability()
    if found < needed:
        return f"needs compute capability {needed[0]}.{needed[1]}, this GPU has {found[0]}.{found[1]}"
    return None


def main(names):
    """Run every check, or those of these names, print a table, return how many failed."""
    print(f"torch {torch.__version__}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    failed = 0
    for check in CHECKS:
        if names and check.__name__.removeprefix("check_") not in names:
            continue
        if reason := why_skipped(check):
            print(f"{check.__name__.removeprefix('check_'):32} skipped: {reason}", flush=True)
            continue
        start = time.perf_counter()
        try:
            outcome, numbers = "ok", check()
        except Exception as exception:  # one failure must not hide the others
            failed, outcome, text = failed + 1, "FAILED", str(exception)
            # A traceback says at its end what went wrong.
            text = text if len(text) <= 700 else f"{text[:200]} .. {text[-500:]}"
            numbers = {type(exception).__name__: text}
        shown = ", ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in numbers.items()
        )
        print(
            f"{check.__name__.removeprefix('check_'):32} {outcome:6} {time.perf_counter() - start:6.1f} s  {shown}",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
