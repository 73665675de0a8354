"""The hand-written block and AdamW on split masters, each against its plain twin; their Triton kernels in
Triton's interpreter.
"""

import importlib.util

import pytest
import torch
from tiny_models import (
    OLMO2,
    QWEN3,
    gradients,
    nll_sum,
    random_documents,
    random_llama,
    relative_error,
    stream,
    tiny_config,
)
from torch.autograd.graph import saved_tensors_hooks
from world import interpreted

import kernels
from kernels import block, join_master, reference, split_master
from kernels.fused_block import embed
from model import Llama, adapters_disabled, apply_fused, apply_lora, apply_recompute, init_lora
from optim import SplitAdamW, adamw, apply_gradients, keep_masters

DOCUMENTS = random_documents(97)
pytestmark = pytest.mark.usefixtures("ranks")  # gradient norms are summed over a process group, here of one
BIASES = dict(qkv_bias=True, o_bias=True, mlp_bias=True)


def build(fused, lora=(), dtype=torch.float32, **config):
    model = random_llama(tiny_config(**config)).to(dtype)
    if lora:
        apply_lora(model, rank=3, alpha=6.0, targets=lora)
        init_lora(model, seed=4)
        for name, param in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(5))
    if fused:
        apply_fused(model)
    return model


def loss_and_gradients(model):
    loss = nll_sum(model, DOCUMENTS)
    loss.backward()
    return loss.item(), gradients(model)


# ---------------------------------------------------------------- the block


@pytest.mark.parametrize(
    "config",
    [{}, BIASES, dict(tie_word_embeddings=True), QWEN3, OLMO2 | BIASES],
    ids=("plain", "biases", "tied", "qwen3", "olmo2"),
)
@pytest.mark.parametrize(
    "lora",
    [(), ("q_proj", "down_proj"), ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")],
    ids=" ".join,
)
@pytest.mark.parametrize(
    "recompute",
    ["none", pytest.param("half", marks=pytest.mark.slow), pytest.param("full", marks=pytest.mark.slow)],
)
def test_fused_equals_plain(config, lora, recompute):
    """Loss and every gradient; under LoRA the frozen weights have none in either."""
    (loss, grads), (expected_loss, expected) = (
        loss_and_gradients(build(fused, lora, **config)) for fused in (True, False)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-6) and grads.keys() == expected.keys()
    assert max(relative_error(grads[name], expected[name]) for name in expected) < 1e-5
    model = build(True, lora, **config)
    apply_recompute(model, recompute)
    _, again = loss_and_gradients(model)
    assert max(relative_error(again[name], grads[name]) for name in grads) < 1e-6


@pytest.mark.parametrize("config", [{}, QWEN3, OLMO2], ids=("llama", "qwen3", "olmo2"))
def test_fused_in_bf16(config):
    """Both round to bf16 on the way, in different places; a formula that is wrong is off by far more."""
    (loss, grads), (expected_loss, expected) = (
        loss_and_gradients(build(fused, dtype=torch.bfloat16, **config)) for fused in (True, False)
    )
    exact = loss_and_gradients(build(False, **config))[1]

    def error(some):
        return max(((some[name].float() - exact[name]).norm() / exact[name].norm()).item() for name in exact)

    assert loss == pytest.approx(expected_loss, rel=5e-3) and error(grads) < max(0.08, 1.2 * error(expected))


def test_swiglu_is_rounded_once():
    gate, up = (
        torch.randn(50, 40, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1)
    )
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    assert (
        block.swiglu(gate, up) == exact.bfloat16()
    ).float().mean() > 0.999  # with silu rounded too, three in four


def test_a_wide_sum_of_narrow_factors_is_never_rounded():
    """257 ones are 256 in bf16, whose next number is 258; then once more, on top of it."""
    ones = torch.ones(1, 257, dtype=torch.bfloat16)
    total = block.matmul(ones, ones.T, torch.float32)
    assert total.item() == 257 and block.matmul(ones, ones.T, torch.float32, into=total).item() == 514


def test_adapters_of_a_bf16_model_take_gradients_that_are_no_bf16_numbers():
    model = build(True, ("q_proj", "o_proj", "down_proj"), dtype=torch.bfloat16)
    _, grads = loss_and_gradients(model)
    assert len(grads) == 2 * 3 * 3 and not any(
        torch.equal(grad, grad.bfloat16().float()) for grad in grads.values()
    )


def test_fused_without_adapters_is_the_base():
    model, base = build(True, ("q_proj", "gate_proj")), build(True)
    with adapters_disabled(model):
        assert torch.equal(model(*stream(DOCUMENTS)), base(*stream(DOCUMENTS)))


@pytest.mark.parametrize("config", [{}, QWEN3, OLMO2], ids=("llama", "qwen3", "olmo2"))
def test_fused_keeps_less_for_the_backward(config):
    """Bytes per token and layer, in float32: x D, q and out HK, k and v GK, the middle D, gate and up I.

    Norms of q and k: both once more. Norms behind attention and MLP: D each.
    """
    D, HK, GK, inner = 40, 48, 24, 56
    kept = {}
    for fused in (True, False):
        sizes = {}
        model = build(fused, num_hidden_layers=6, **config)

        params = {p.data_ptr() for p in model.parameters()}

        def pack(x, sizes=sizes, params=params):
            if x.data_ptr() not in params:
                sizes[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            loss = nll_sum(model, DOCUMENTS)
            kept[fused] = sum(sizes.values()) / sum(map(len, DOCUMENTS)) / 6
        loss.backward()
    block = 4 * (2 * D + 2 * HK + 2 * GK + 2 * inner)
    block += 4 * (HK + GK) * ("qk_norm" in config) + 4 * 2 * D * ("post_norm" in config)
    # On a CPU attention keeps copies of each document's q, k, v too. Plain blocks keep silu(gate), the product
    # and, where norms come first, both results.
    plain_too = 4 * (2 * inner + 2 * D * ("post_norm" not in config))
    assert block <= kept[True] < 1.4 * block and kept[False] - kept[True] > plain_too, (kept, block)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "half", "full"])
@pytest.mark.parametrize(
    "config", [{}, dict(tie_word_embeddings=True), QWEN3, OLMO2], ids=("llama", "tied", "qwen3", "olmo2")
)
def test_matrices_take_their_gradients_in_float32(config, recompute):
    """bf16 weights, two micro-batches: what fp32 accumulation of each micro-batch's product gives, not a sum
    rounded to bf16; in every matrix, also in blocks that recompute."""
    model, plain = (build(True, dtype=torch.bfloat16, **config) for _ in range(2))
    keep_masters(model, torch.float32)
    apply_recompute(model, recompute)
    halves, sums = (DOCUMENTS[:2], DOCUMENTS[2:]), {}
    for half in halves:
        nll_sum(model, half).backward()
        nll_sum(plain, half).backward()
        for name, grad in gradients(plain).items():
            sums[name] = sums.get(name, 0) + grad.float()
        plain.zero_grad()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        assert (grad - sums[name]).norm() / sums[name].norm() < 6e-3, (
            name
        )  # the plain ones are rounded once a micro-batch
    matrices = [p.grad for p in model.parameters() if p.ndim == 2]
    assert len(matrices) == 3 * 7 + 2 - model.config.tie_word_embeddings and not any(
        torch.equal(grad, grad.bfloat16().float()) for grad in matrices
    )


def test_bf16_gradients_of_a_frequent_token():
    """A token that occurs 4,000 times, every time with the gradient 1: added one by one, bf16 would stop at
    256, where 257 rounds back.
    """
    weight = torch.nn.Parameter(torch.zeros(5, 2, dtype=torch.bfloat16))
    weight.grad_dtype = torch.bfloat16
    weight.master = kernels.Master(low_bits=None, accumulates=True)
    ids = torch.tensor([3] * 4000 + [1])
    for _ in range(2):
        embed(weight, ids).sum().backward()
    assert weight.grad.tolist() == [[0, 0], [2, 2], [0, 0], [8000, 8000], [0, 0]]


def test_masters_that_are_not_finite_stay_so():
    """0x7FFFFFFF is a NaN whose upper half would round up to a zero."""
    master = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000], dtype=torch.int32).view(
        torch.float32
    )
    weight, low_bits = split_master(master)
    assert (
        weight.isnan().tolist()
        == join_master(weight, low_bits).isnan().tolist()
        == [True, True, True, False, False]
    )
    assert weight[3:].tolist() == [float("inf"), float("-inf")]


# ---------------------------------------------------------------- split masters


def test_split_masters_hold_every_bit():
    """Random patterns of all magnitudes, a tie (0x8000), both signs, zeros and the largest number that rounds
    to a finite bf16.
    """
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator().manual_seed(0)).to(
        torch.int32
    )
    special = torch.tensor([0, 0x3F808000, 0x3F807FFF, 0x3F808001, 0x7F7F7FFF, 0x00008000], dtype=torch.int32)
    master = torch.cat((bits, special, special | -(2**31))).view(torch.float32)
    master = master[master.isfinite() & (master.abs() < 3.3e38)]
    weight, low_bits = split_master(master)
    assert torch.equal(join_master(weight, low_bits).view(torch.int32), master.view(torch.int32))
    nearest = master.bfloat16()
    differs = weight != nearest
    assert torch.equal(
        (weight.float() - master).abs(), (nearest.float() - master).abs()
    )  # to nearest, also where a tie goes the other way
    assert differs.sum() < 20


def split_and_whole(moments):
    """A bf16 model with split masters, and a float32 one of the same weights, with their optimizers."""
    split, whole = (random_llama(tiny_config(), std=0.02).bfloat16() for _ in range(2))
    keep_masters(split, torch.float32)
    whole = whole.float()
    return split, whole, adamw(split, 0.1, moments), adamw(whole, 0.1)


def step_both(split, whole, optimizers, step):
    for (name, p), q in zip(split.named_parameters(), whole.parameters(), strict=True):
        generator = torch.Generator().manual_seed(1000 * step + len(name))
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
        q.grad = p.grad.clone()
    return [
        apply_gradients(optimizer, 1e-3, 0.05) for optimizer in optimizers
    ]  # clipped: the norm is about 0.2


def test_split_adamw_is_torch_adamw():
    """Five clipped steps with decay: masters and moments equal torch's fused AdamW on float32 weights to
    rounding.
    """
    split, whole, *optimizers = split_and_whole(torch.float32)
    assert isinstance(optimizers[0], SplitAdamW)
    start = [q.detach().clone() for q in whole.parameters()]
    for step in range(5):
        norms = step_both(split, whole, optimizers, step)
        assert norms[0] == norms[1] > 0.05
    for p, q, before in zip(split.parameters(), whole.parameters(), start, strict=True):
        torch.testing.assert_close(
            join_master(p.detach(), p.master.low_bits), q.detach(), rtol=1e-6, atol=1e-8
        )
        assert (q - before).abs().max() > 1e-3
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert relative_error(optimizers[0].state[p][key], optimizers[1].state[q][key]) < 1e-6


def test_bf16_moments_follow_float32_ones():
    """200 steps of a gradient that is always 1: v grows by 0.1 % of what is missing and to nearest would stop
    at the first value whose spacing is twice that; stochastic rounding goes on, without bias."""
    n, steps = 4096, 200
    weight, low_bits = split_master(torch.zeros(n))
    m, v = (torch.zeros(n, dtype=torch.bfloat16) for _ in range(2))
    for step in range(1, steps + 1):
        kernels.adamw(
            weight, low_bits, m, v, torch.ones(n), 1.0, 1e-3, 0.0, 0.9, 0.999, 1e-8, step, seed=step
        )
    assert v.float().mean().item() == pytest.approx(1 - 0.999**steps, rel=1e-3)
    assert m.float().mean().item() == pytest.approx(1.0, rel=1e-3)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(steps):
        nearest = (0.999 * nearest.float() + 0.001).bfloat16()
    assert nearest.item() < 0.999 * (1 - 0.999**steps) or nearest.item() > 1.001 * (1 - 0.999**steps)
    assert join_master(weight, low_bits).mean().item() == pytest.approx(
        -1e-3 * steps, rel=1e-2
    )  # each step moves by lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_moments_are_kept_as_asked_for(dtype):
    model = build(True, dtype=torch.bfloat16)
    keep_masters(model, dtype)
    optimizer = adamw(model, 0.1, dtype)
    nll_sum(model, DOCUMENTS).backward()
    assert {p.grad.dtype for p in model.parameters() if p.ndim == 2} == {dtype}
    apply_gradients(optimizer, 1e-3, None)
    assert {state[key].dtype for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")} == {
        dtype
    }


def test_every_tensor_and_step_draws_bits_of_its_own(monkeypatch):
    """With those of the step before, a moment would be rounded the same way every time, and drift."""
    split, _, optimizer, _ = split_and_whole(torch.bfloat16)
    seeds = []
    monkeypatch.setattr(kernels, "adamw", lambda *numbers, seed, first: seeds.append(seed))
    for p in split.parameters():
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
    for _ in range(3):
        optimizer.step()
    assert len(set(seeds)) == len(seeds) == 3 * len(list(split.parameters()))


def test_both_moments_of_a_weight_are_rounded_independently():
    """One step from zero with the gradient 1.5: of m = 0.15 60 % round up, of v = 0.00225 46 %, and not the
    same ones.
    """
    weight, low_bits = split_master(torch.zeros(10_000))
    m, v = (torch.zeros(10_000, dtype=torch.bfloat16) for _ in range(2))
    kernels.adamw(
        weight, low_bits, m, v, torch.full((10_000,), 1.5), 1.0, 1e-3, 0.0, 0.9, 0.999, 1e-8, 1, seed=1 << 12
    )
    ups = torch.stack([m.float() > 0.15, v.float() > 0.00225]).double()
    assert ups.mean(dim=1).tolist() == pytest.approx([0.60, 0.456], abs=0.02)
    assert torch.corrcoef(ups)[0, 1].abs() < 0.05


@pytest.mark.parametrize(("moments", "draws"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_only_bf16_moments_draw_random_bits(monkeypatch, moments, draws):
    """They are more than half of a step on a CPU."""
    drawn, random_bits = [], reference.random_bits
    monkeypatch.setattr(reference, "random_bits", lambda *place: drawn.append(place) or random_bits(*place))
    weight, low_bits = split_master(torch.zeros(8))
    m, v = (torch.zeros(8, dtype=moments) for _ in range(2))
    reference.adamw(weight, low_bits, m, v, torch.ones(8), 1.0, 1e-3, 0.0, 0.9, 0.999, 1e-8, 1, seed=1 << 12)
    assert len(drawn) == draws and m.float().min() > 0.09


def test_random_bits_are_uniform_and_new_every_step():
    first, second = (reference.random_bits(100_000, seed, "cpu") for seed in (1 << 12, 2 << 12))
    for bits in (first & 0xFFFF, first >> 16, (first ^ second) & 0xFFFF):
        assert abs(bits.double().mean() / 32767.5 - 1) < 0.01 and bits.min() < 10 and bits.max() > 65525
    assert (
        torch.corrcoef(torch.stack([first & 0xFFFF, first >> 16, second & 0xFFFF, second >> 16]).double())[
            0, 1:
        ]
        .abs()
        .max()
        < 0.02
    )


# ---------------------------------------------------------------- Triton


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, whose interpreter runs on a CPU"
)
def test_kernels_in_the_interpreter():
    errors = interpreted("block_interpreted.py")
    assert len(errors) > 50 and all(value < 2e-6 for name, value in errors.items() if "bf16" not in name), (
        errors
    )
    # the interpreter's cast to e4m3 loses the carry of a mantissa that rounds up to the next power of two
    assert all(value < (8e-2 if "float8" in name else 1e-2) for name, value in errors.items()), errors


def test_presets_can_be_fused():
    with torch.device("meta"):
        model = Llama(tiny_config())
    apply_fused(model)
    assert all(layer.fused for layer in model.model.layers)
