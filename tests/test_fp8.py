"""precision="fp8": how numbers are rounded to float8, the products of a linear layer, a model's gradients,
whole runs beside bf16.
"""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_models import OLMO2, QWEN3, gradients, nll_sum, random_documents, random_llama, tiny_config
from torch import nn
from world import SilentLog, final_weights, launch, metrics, stage_parts, trace, write_config, write_model

import train_dpo
from kernels.float8 import matmul_float8, quantize, quantize_gradient, quantize_transposed
from kernels.fused_block import project_add
from kernels.reference import float8_scale
from model import LlamaConfig, adapters_disabled, apply_fused, apply_lora, apply_recompute, init_lora
from optim import keep_masters
from packing import in_order
from plumbing.files import UserError
from training import check_float8, read_model_config

DOCUMENTS = random_documents(97)
SIZES = dict(hidden_size=48, intermediate_size=64, head_dim=16)  # multiples of 16
NOISE = (
    0.02,
    0.05,
)  # e4m3 is off by at most 1/16 of a number, 1/38 in the root mean square, and a product has two factors: 3.7 %


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def values_of(float8):
    return float8.values.float() * float8.scale[:, None]


def relative_norm(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# ---------------------------------------------------------------- rounding, by hand


def test_quantize_by_hand():
    """3.5 = 448 / 2^7 goes to the largest number; 0.4 * 2^7 = 51.2 lies between 48 and 52, 4 apart; 3.515625
    is over 448 / 2^7, so its row is scaled by 2^6: to 225, between 224 and 240; 2^-16 of 3.5 * 2^7 is 2^-9,
    the smallest number, and a tie with 0 at half of it."""
    x = torch.tensor(
        [[1, -3.5, 0.4, 0], [3.515625, 0, 0, -1], [0, 0, 0, 0], [3.5, 2**-16, 2**-17, 1.5 * 2**-17]]
    )
    x8 = quantize(x)
    assert x8.values.dtype == torch.float8_e4m3fn and x8.scale.dtype == torch.float32
    assert x8.scale.tolist() == [2**-7, 2**-6, 2**-100, 2**-7]
    expected = [[128, -448, 52, 0], [224, 0, 0, -64], [0, 0, 0, 0], [448, 2**-9, 0, 2**-9]]
    assert x8.values.float().tolist() == expected


def test_columns_are_multiplied_in_before_rounding():
    x, columns = randn(5, 32), 2.0 ** torch.arange(-16, 16)
    a, b = quantize(x, columns), quantize(x.float() * columns)
    assert torch.equal(a.scale, b.scale) and torch.equal(a.values.float(), b.values.float())


def test_scales_use_the_range():
    """Over all magnitudes, also beside the edge at 1.75 * 2^k: a power of two that leaves the largest number
    in (224, 448].
    """
    edges = 1.75 * 2.0 ** torch.arange(-90, 120)
    tops = torch.cat(
        (
            edges,
            edges.nextafter(torch.tensor(0.0)),
            edges.nextafter(torch.tensor(math.inf)),
            randn(10_000).float().exp(),
        )
    )
    scale = float8_scale(tops)
    assert torch.equal(scale.frexp().mantissa, torch.full_like(scale, 0.5))
    assert (224 < tops / scale).all() and (tops / scale <= 448).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_visible(bad):
    """Casts saturate on some devices: an infinite number must not become a large one."""
    x = randn(3, 16)
    x[1, 2] = bad
    y = matmul_float8(quantize(x), quantize(randn(16, 16)))
    assert y.isnan().any(dim=1).tolist() == [False, True, False]


def test_transposed_copies_hold_the_same_numbers():
    """37 rows are followed by zeros up to 48."""
    x = randn(37, 32)
    x8 = quantize(x)
    x8t = quantize_transposed(x, x8.scale)
    assert x8t.values.shape == (32, 48) and torch.equal(x8t.scale, torch.ones(32))
    assert (
        torch.equal(x8t.values[:, :37].float(), x8.values.float().T) and not x8t.values[:, 37:].float().any()
    )


def test_gradient_is_rounded_for_both_products():
    """Each within 1/16 of dy times the other factor's scales (below 2^-15 of a row's largest number: within
    2^-19 of that).
    """
    dy, w_scale, x_scale = (
        randn(37, 32),
        2.0 ** torch.randint(-9, -4, (32,)),
        2.0 ** torch.randint(-9, -4, (37,)),
    )
    rows, columns = quantize_gradient(dy, w_scale, x_scale)
    for float8, expected in ((rows, dy.float() * w_scale), (columns, (dy.float() * x_scale[:, None]).T)):
        values = values_of(float8)
        assert not values[:, expected.shape[1] :].any()
        off = (values[:, : expected.shape[1]] - expected).abs()
        assert (
            off <= torch.maximum(expected.abs() / 16, expected.abs().amax(1, keepdim=True) * 2**-18)
        ).all() and off.any()


# ---------------------------------------------------------------- a linear layer


def linear_and_gradients(a, residual, linear, dy, fp8):
    a, residual = (x.clone().requires_grad_() for x in (a, residual))
    y = project_add(a, residual, fp8, linear)
    return y.detach(), *torch.autograd.grad(y, (a, residual, *linear.parameters()), dy)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_exact_where_float8_is(bias):
    """Small whole numbers times powers of two per row: no rounding anywhere, so float8 must equal bf16, in a
    stream of 37 tokens.
    """
    torch.manual_seed(0)
    linear = nn.Linear(32, 48, bias=bias).bfloat16()
    with torch.no_grad():
        for param in linear.parameters():
            param.copy_(torch.randint(-2, 3, param.shape))
        linear.weight.mul_(2.0 ** torch.randint(-1, 2, (48, 1)))
    a, residual, dy = (torch.randint(-1, 2, shape).bfloat16() for shape in ((37, 32), (37, 48), (37, 48)))
    a = a * 2.0 ** torch.randint(0, 2, (37, 1))
    for got, expected in zip(
        *(linear_and_gradients(a.bfloat16(), residual, linear, dy, fp8) for fp8 in (True, False)), strict=True
    ):
        assert got.dtype == torch.bfloat16 and torch.equal(got, expected) and expected.any()


def test_linear_error_is_that_of_three_bits():
    """Against float32 products of the same bf16 numbers; token norms differ by 2^10, as activations' and
    gradients' do.
    """
    T, D, O = 301, 512, 256
    linear = nn.Linear(D, O, bias=False).bfloat16()
    linear.weight.data = randn(O, D, seed=3) / 16
    spread = 2.0 ** torch.randint(-5, 6, (T, 1), generator=torch.Generator().manual_seed(4))
    a, dy = (randn(T, D) * spread).bfloat16(), (randn(T, O, seed=1) / spread).bfloat16()
    y, da, _, dw = linear_and_gradients(a, torch.zeros(T, O).bfloat16(), linear, dy, fp8=True)
    w, a, dy = linear.weight.detach().float(), a.float(), dy.float()
    for got, expected in ((y, a @ w.T), (da, dy @ w), (dw, dy.T @ a)):
        assert NOISE[0] < relative_norm(got, expected) < NOISE[1]
    for got, expected in (
        (y, a @ w.T),
        (da, dy @ w),
    ):  # a token's error is a share of its own size, not of the largest token's
        assert ((got.float() - expected).norm(dim=1) / expected.norm(dim=1)).max() < 2 * NOISE[1]


def test_matrices_take_their_gradients_in_float32():
    """Two micro-batches: the float32 sum of the products that a model without masters rounds to bf16, bit for
    bit.
    """
    model, plain = (build(True) for _ in range(2))
    keep_masters(model, torch.float32)
    sums = {}
    for half in (DOCUMENTS[:2], DOCUMENTS[2:]):
        nll_sum(model, half).backward()
        nll_sum(plain, half).backward()
        sums = {name: sums.get(name, 0) + grad.float() for name, grad in gradients(plain).items()}
        plain.zero_grad()
    grads = gradients(model)
    names = [name for name in grads if "_proj" in name]
    assert len(names) == 21
    assert all(grads[name].dtype == torch.float32 and torch.equal(grads[name], sums[name]) for name in names)


# ---------------------------------------------------------------- a model


def build(fp8, lora=False, **config):
    model = random_llama(tiny_config(**SIZES | config), std=0.05).bfloat16()
    if lora:
        apply_lora(model, rank=3, alpha=6.0)
        init_lora(model, seed=4)
        for name, param in model.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(param, std=0.1, generator=torch.Generator().manual_seed(5))
    apply_fused(model, fp8)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=("full", "lora"))
def test_gradients_point_where_bf16_points(lora):
    """Every tensor's gradient; the base under adapters has none. A recomputed block repeats every bit."""
    (loss, grads), (bf16_loss, bf16_grads) = (loss_and_gradients(build(fp8, lora)) for fp8 in (True, False))
    assert loss == pytest.approx(bf16_loss, rel=1e-2) and loss != bf16_loss
    assert grads.keys() == bf16_grads.keys() and all(("lora_" in name) == lora for name in grads)
    cosines = {
        name: torch.cosine_similarity(*(g[name].float().flatten() for g in (grads, bf16_grads)), dim=0).item()
        for name in grads
    }
    assert min(cosines.values()) > 0.97 and sum(cosines.values()) / len(cosines) > 0.99, cosines
    whole = [torch.cat([g[name].float().flatten() for name in grads]) for g in (grads, bf16_grads)]
    assert torch.cosine_similarity(*whole, dim=0) > 0.99
    model = build(True, lora)
    apply_recompute(model, "full")
    again, again_grads = loss_and_gradients(model)
    assert again == loss and all(torch.equal(again_grads[name], grads[name]) for name in grads)


def rounded_forward(linear, x):
    """nn.Linear.forward of the numbers that float8 holds; backward, as if there were no rounding."""
    x8, w8 = (y + (values_of(quantize(y.detach())) - y.detach()).to(y.dtype) for y in (x, linear.weight))
    return nn.functional.linear(x8, w8)


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, QWEN3, OLMO2], ids=("llama", "qwen3", "olmo2"))
def test_gradients_are_those_of_the_rounded_function(config, monkeypatch):
    """Plain blocks whose linears round x and W, by autograd: what is left is the rounding of dy, and bf16's.

    Seen: least cosine 0.996, 0.993, 0.964; in bf16, whose function is another, 0.81 of the last model.
    """
    model = build(True, **config)
    loss, grads = loss_and_gradients(model)
    apply_recompute(model, "full")
    model.zero_grad()
    again, again_grads = loss_and_gradients(model)
    assert again == loss and all(torch.equal(again_grads[name], grads[name]) for name in grads)

    twin = build(False, **config)
    for layer in twin.model.layers:
        layer.fused = False
    monkeypatch.setattr(nn.Linear, "forward", rounded_forward)
    expected_loss, expected = loss_and_gradients(twin)
    assert loss == pytest.approx(expected_loss, rel=3e-3) and grads.keys() == expected.keys()
    cosines = [
        torch.cosine_similarity(grads[name].float().flatten(), expected[name].float().flatten(), dim=0).item()
        for name in expected
    ]
    assert min(cosines) > 0.95 and sum(cosines) / len(cosines) > 0.98, cosines


def loss_and_gradients(model):
    loss = nll_sum(model, DOCUMENTS)
    loss.backward()
    return loss.item(), gradients(model)


def test_without_adapters_it_is_the_base():
    model, base = build(True, lora=True), build(True)
    with adapters_disabled(model), torch.no_grad():
        assert torch.equal(nll_sum(model, DOCUMENTS), nll_sum(base, DOCUMENTS))


def test_only_scales_are_kept_for_the_backward():
    """On top of what bf16 keeps: 4 bytes a token for each of the four inputs of a block, and a number a row
    of weights.
    """
    kept = {}
    for fp8 in (True, False):
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = nll_sum(build(fp8), DOCUMENTS)
        kept[fp8] = sum(sizes.values())
        del loss
    T, D, HK, GK, inner = sum(map(len, DOCUMENTS)), 48, 64, 32, 64
    assert 0 < kept[True] - kept[False] <= 3 * 4 * (4 * T + HK + 2 * GK + D + 2 * inner + D)


def test_what_cannot_run_is_refused():
    check_float8(LlamaConfig.preset("llama-3.1-8b"))
    check_float8(tiny_config(**SIZES))
    with pytest.raises(UserError, match=r"multiples of 16, the model has \(40, 56, 48, 24\)"):
        check_float8(tiny_config())


@pytest.mark.parametrize(
    "keys, runs_from", [({}, (8, 0)), ({"precision": "fp8"}, (8, 9)), ({"attention": "flash4"}, (9, 0))]
)
def test_a_gpu_that_a_key_does_not_run_on_is_refused_before_anything_is_read(monkeypatch, keys, runs_from):
    """A T4, an A100, an L40S and an H100. Where it runs, the folder is read, and found missing."""
    config = SimpleNamespace(**{"precision": "bf16", "attention": "flash2", "tensorboard": False} | keys)
    monkeypatch.setattr("plumbing.config._is_installed", lambda module: True)
    for major, minor in ((7, 5), (8, 0), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=(major, minor): found)
        refused = f"on this GPU, {major}.{minor}: expected a GPU of compute capability"
        with pytest.raises(UserError, match="nowhere" if (major, minor) >= runs_from else refused):
            read_model_config(config, "nowhere", None, torch.device("cuda"))


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world8(world, tmp_path_factory):
    """The world, with a model of such sizes."""
    root = shutil.copytree(world, tmp_path_factory.mktemp("world8"), dirs_exist_ok=True)
    config = LlamaConfig.from_hf(root / "base")
    config = tiny_config(vocab_size=config.vocab_size, num_hidden_layers=2, tie_word_embeddings=True, **SIZES)
    write_model(root / "base", random_llama(config, std=0.1))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, dict(lora_rank=4, lora_alpha=8.0)], ids=("full", "lora"))
def test_step_1_is_ln_2(world8, tmp_path, ranks, lora):
    """CHECKS 5: policy and reference are rounded alike, so in the same batches they are equal to the last
    bit.
    """
    config, pairs, model = stage_parts("dpo", write_config(tmp_path, world8, precision="fp8", **lora), ranks)
    assert all(layer.fp8 for layer in model.model.layers)
    steps = in_order(len(pairs), config.global_batch_size)
    table = train_dpo.reference_logps(model, pairs, steps, "k", config, ranks, SilentLog())
    for ids in steps:
        metrics, gap = train_dpo.forward_backward(model, pairs, table, ids, config, ranks)
        assert gap == 0.0 and metrics["rewards/margins"] == 0.0
        assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)


STEPS = 16
# All of a step in one micro-batch, which takes half the time.
SCHEDULE = dict(max_steps=STEPS, num_epochs=10, lr=2e-3, tokens_per_microbatch=1536)


def curves(stage, tmp_path, world8, **changes):
    """Losses per step of the two precisions, (STEPS,) each, and the run folder of fp8."""
    losses = []
    for precision in ("bf16", "fp8"):
        config = write_config(
            tmp_path / precision, world8, precision=precision, **changes, **{stage: SCHEDULE}
        )
        launch(stage, config).ok()
        losses.append(trace(tmp_path / precision / stage, "loss")[:, 0])
    return *losses, tmp_path / "fp8" / stage


@pytest.mark.slow
def test_sft_curve_beside_bf16(world8, tmp_path):
    """6.06 to 4.49 nats; 0.022 apart at the worst step, of which 0.014 are there at the first: another base
    model, so to speak.
    """
    bf16, fp8, run = curves("sft", tmp_path, world8)
    assert len(fp8) == STEPS and bf16[-1] < 0.8 * bf16[0]
    assert ((fp8 - bf16).abs() < 0.05).all() and (fp8 != bf16).any()
    assert all(weight.dtype == torch.bfloat16 for weight in final_weights(run).values())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, dict(lora_rank=4, lora_alpha=8.0)], ids=("full", "lora"))
def test_dpo_curve_beside_bf16(world8, tmp_path, lora):
    """0.6931 to 0.0045, and with LoRA to 0.13; 0.028 and 0.035 apart at the worst step."""
    bf16, fp8, run = curves("dpo", tmp_path, world8, **lora)
    assert fp8[0] == pytest.approx(math.log(2), abs=1e-6) and len(fp8) == STEPS and bf16[-1] < 0.5
    assert ((fp8 - bf16).abs() < 0.06).all()
    assert metrics(run)[-1]["rewards/accuracies"] > 0.9


@pytest.mark.slow
def test_two_ranks_are_one(world8, tmp_path):
    """Weights are gathered as bf16 and then rounded: the same forward, and gradients that differ in the order
    of their sums.
    """
    one, two = (tmp_path / name for name in "12")
    for folder, ranks in ((one, 1), (two, 2)):
        launch("sft", write_config(folder, world8, precision="fp8", sft=dict(lr=2e-3)), ranks=ranks).ok()
    a, b = (trace(folder / "sft", "loss")[:, 0] for folder in (one, two))
    assert a[0] == pytest.approx(b[0].item(), rel=1e-4)
    torch.testing.assert_close(a, b, rtol=1e-2, atol=0)
