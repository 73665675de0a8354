"""triton_block.py against reference.py, for test_fused.py, which runs it under TRITON_INTERPRET=1: prints
{what: relative error}.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import kernels
from kernels import reference, triton_block

errors = {}
torch.manual_seed(0)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(name, values, expected):
    values, expected = ((x,) if torch.is_tensor(x) else x for x in (values, expected))
    for i, (a, b) in enumerate(zip(values, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        errors[f"{name} {i}"] = ((a.double() - b.double()).norm() / b.double().norm()).item()


for dtype in (torch.float32, torch.bfloat16):
    label = str(dtype).replace("torch.", "").replace("bfloat16", "bf16")
    x, dy, d_residual = (randn(5, 40, seed=s, dtype=dtype) for s in range(3))
    weight = randn(40, seed=3, dtype=dtype)
    compare(f"rms_norm {label}", triton_block.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    backward = (dy, x, weight, 1e-5, d_residual)
    compare(
        f"rms_norm_backward {label}",
        triton_block.rms_norm_backward(*backward),
        reference.rms_norm_backward(*backward),
    )
    behind = x, weight, 1e-5, d_residual
    compare(f"rms_norm, residual {label}", triton_block.rms_norm(*behind), reference.rms_norm(*behind))
    compare(
        f"rms_norm_backward, no residual {label}",
        triton_block.rms_norm_backward(*backward[:4]),
        reference.rms_norm_backward(*backward[:4]),
    )
    q, angles = randn(5, 3, 12, dtype=dtype), randn(5, 1, 6, seed=1)
    for kind, size in (("head", 12), ("width", 36)):
        about = q, randn(size, seed=3, dtype=dtype), 1e-5, angles.cos(), angles.sin()
        d_turned = randn(5, 3, 12, seed=2, dtype=dtype)
        compare(
            f"{kind} norm_rotate {label}", triton_block.norm_rotate(*about), reference.norm_rotate(*about)
        )
        compare(
            f"{kind} norm_rotate_backward {label}",
            triton_block.norm_rotate_backward(d_turned, *about),
            reference.norm_rotate_backward(d_turned, *about),
        )
    compare(
        f"rotate {label}",
        triton_block.rotate(q, angles.cos(), angles.sin(), 1),
        reference.rotate(q, angles.cos(), angles.sin()),
    )
    compare(
        f"rotate back {label}",
        triton_block.rotate(q, angles.cos(), angles.sin(), -1),
        reference.rotate(q, angles.cos(), -angles.sin()),
    )
    gate, up, dout = (randn(3, 1000, seed=s, dtype=dtype) for s in range(3))
    compare(f"swiglu {label}", triton_block.swiglu(gate, up), reference.swiglu(gate, up))
    compare(
        f"swiglu_backward {label}",
        triton_block.swiglu_backward(dout, gate, up),
        reference.swiglu_backward(dout, gate, up),
    )
    logits, targets = 5 * randn(4, 9000), torch.tensor([0, 8999, 17, 4096])
    if dtype == torch.float32:
        compare("pick_logps", triton_block.pick_logps(logits, targets), reference.pick_logps(logits, targets))
    rest = (logits, logits.logsumexp(-1), targets, randn(4, seed=8), dtype)
    compare(f"logits_gradient {label}", triton_block.logits_gradient(*rest), reference.logits_gradient(*rest))
    states = []
    for adamw in (triton_block.adamw, reference.adamw):
        split = kernels.split_master(randn(3000, seed=5))
        m, v = randn(3000, seed=6).mul(0.1).to(dtype), randn(3000, seed=7).square().to(dtype)
        adamw(*split, m, v, randn(3000, seed=9, dtype=dtype), 0.5, 1e-3, 0.1, 0.9, 0.999, 1e-8, 7, 12345)
        states.append((kernels.join_master(*split), m, v))
    compare(f"adamw {label}", *states)
# a GPU's NaN is 0x7FFFFFFF, whose upper half would round up to a zero
nan = torch.full((4,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
split = kernels.split_master(randn(4, seed=5))
triton_block.adamw(*split, nan, torch.ones(4), torch.ones(4), 1.0, 1e-3, 0.1, 0.9, 0.999, 1e-8, 7, 1)
lost = ~(split[0].isnan() & kernels.join_master(*split).isnan())
errors["NaN of adamw"] = lost.float().mean().item()
# numbers that e4m3 holds: the interpreter's cast rounds ties away from zero and loses carries, which GPUs do
# not (tests/gpu_checks.py)
for M, N in ((5, 48), (130, 80), (257, 64)):  # one tile; over one in rows; in columns
    signs, exponents = torch.randint(2, (M, N)) * 2 - 1, torch.randint(4, (M, N))
    x = (signs * torch.randint(8, 16, (M, N)) * 2.0**exponents).bfloat16()
    x[3], x[4, 7] = 0, 120
    rows, columns = (2.0 ** torch.randint(-2, 2, (n,)) for n in (M, N))
    plain, scaled = reference.quantize(x), reference.quantize(x, columns)
    both = zip(
        triton_block.quantize_gradient(x, columns, rows),
        reference.quantize_gradient(x, columns, rows),
        strict=True,
    )
    pairs = ((triton_block.quantize(x, None), plain), (triton_block.quantize(x, columns), scaled), *both)
    transposed = (
        triton_block.quantize_transposed(x, plain.scale),
        reference.quantize_transposed(x, plain.scale),
    )
    for i, (a, b) in enumerate([*((u, v) for pair in pairs for u, v in zip(*pair, strict=True)), transposed]):
        assert a.shape == b.shape and a.dtype == b.dtype
        errors[f"float8 {M} {N} {i}"] = (a.float() != b.float()).float().mean().item()
dout, gate, up = (randn(130, 80, seed=s, dtype=torch.bfloat16) for s in range(3))
weight, inner8 = randn(80, seed=3, dtype=torch.bfloat16), reference.swiglu_float8(gate, up)
for name, *inputs in (("rms_norm_float8", gate, weight, 1e-5), ("swiglu_float8", gate, up)):
    a, b = reference.Float8(*getattr(triton_block, name)(*inputs)), getattr(reference, name)(*inputs)
    compare(f"bf16 {name}", *(x.values.float() * x.scale[:, None] for x in (a, b)))
inputs = dout, gate, up, inner8.scale
*fast, values = triton_block.swiglu_backward_float8(*inputs)
*slow, expected = reference.swiglu_backward_float8(*inputs)
compare("bf16 swiglu_backward_float8", (*fast, values.float()), (*slow, expected.float()))
json.dump(errors, sys.stdout)
