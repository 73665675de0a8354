"""The learning-rate schedule against transformers', AdamW by hand, and updates that must not be lost to
rounding.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import nll_sum, random_documents, random_llama, tiny_config

from optim import (
    adamw,
    apply_gradients,
    keep_masters,
    learning_rate,
    sample_weights,
    warmup_steps,
    weights_changed,
)
from plumbing import parallel


@pytest.fixture(autouse=True, scope="module")
def group_of_one():
    parallel.init()
    yield
    parallel.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("total, warmup", [(1, 0), (10, 0), (10, 1), (35, 3), (200, 20), (7, 6)])
def test_trace_equals_transformers(schedule, total, warmup):
    """CHECKS 4: every step's rate, and 0 after the last."""
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[schedule]
    reference = make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-7), warmup, total)
    for step in range(total):
        assert learning_rate(step, total, 5e-7, schedule, warmup) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-12, abs=1e-22
        )
        reference.optimizer.step()
        reference.step()
    assert learning_rate(total, total, 5e-7, schedule, warmup) == 0.0 == reference.get_last_lr()[0]


def test_trace_by_hand():
    """Peak 8, 2 steps of warm-up of 6: 0, 8/2; then 4 steps down to 0 at step 6: 8, 6, 4, 2; cosine 4 (1 +
    cos(pi k/4)).
    """
    assert [learning_rate(step, 6, 8.0, "linear", 2) for step in range(7)] == [0, 4, 8, 6, 4, 2, 0]
    half = 2**0.5 / 2  # cos(pi/4)
    cosine = [learning_rate(step, 6, 8.0, "cosine", 2) for step in range(7)]
    assert cosine == pytest.approx([0, 4, 8, 4 + 4 * half, 4, 4 - 4 * half, 0])


@pytest.mark.parametrize(
    "ratio, steps, total, expected",
    [
        (0.1, None, 35, 3),
        (0.1, None, 39, 3),
        (0.03, None, 30, 0),
        (0.0, None, 35, 0),
        (0.0, 5, 35, 5),
        (0.0, 0, 35, 0),
    ],
)
def test_warmup_is_rounded_down(ratio, steps, total, expected):
    """CHECKS 4: 10 % of 35 and of 39 steps is 3; the HF Trainer would take 4."""
    assert warmup_steps(SimpleNamespace(warmup_ratio=ratio, warmup_steps=steps), total) == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warmup_as_long_as_the_run_is_refused(schedule):
    """Five steps of warm-up have 0 to 80 % of the rate, and the sixth is the first one at it."""
    config = SimpleNamespace(warmup_ratio=0.0, warmup_steps=5)
    assert warmup_steps(config, 6) == 5
    rates = [learning_rate(step, 6, 1.0, schedule, 5) for step in range(6)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    for total in (5, 4):
        message = f"warmup_steps=5: expected fewer than the {total} steps of the run"
        with pytest.raises(ValueError, match=message):
            warmup_steps(config, total)


def two_parameters():
    model = torch.nn.Module()
    model.matrix, model.bias = (
        torch.nn.Parameter(torch.tensor([[1.0]])),
        torch.nn.Parameter(torch.tensor([1.0])),
    )
    return model


def test_adamw_by_hand():
    """Two steps at lr 0.1, decay 0.1, gradients 0.5 then -0.25; m and v after bias correction.

    1: m = 0.05 / 0.1 = 0.5, v = 0.00025 / 0.001 = 0.25: step 0.1 * 0.5 / 0.5 = 0.1. Bias 0.9; matrix 1 * (1 -
    0.1 * 0.1) - 0.1 = 0.89. 2: m = (0.9 * 0.05 - 0.1 * 0.25) / 0.19 = 0.1052632, v = (0.999 * 0.00025 + 0.001
    * 0.0625) / 0.001999 = 0.1562031, its root 0.3952254:
       step 0.1 * 0.1052632 / 0.3952254 = 0.0266337. Bias 0.8733663; matrix 0.89 * 0.99 - 0.0266337 = 0.8544663.
    """
    model = two_parameters()
    optimizer = adamw(model, weight_decay=0.1)
    for grad, matrix, bias in ((0.5, 0.89, 0.9), (-0.25, 0.8544663, 0.8733663)):
        model.matrix.grad, model.bias.grad = torch.tensor([[grad]]), torch.tensor([grad])
        apply_gradients(optimizer, lr=0.1, max_grad_norm=None)
        assert (model.matrix.item(), model.bias.item()) == pytest.approx((matrix, bias), abs=1e-6)
        assert model.matrix.grad is None and model.bias.grad is None


def test_eps_by_hand():
    """A first gradient as large as eps, 1e-8, is 1e-8 / (1e-8 + 1e-8) = half a step of lr 0.1."""
    model = two_parameters()
    optimizer = adamw(model, weight_decay=0.0)
    model.matrix.grad, model.bias.grad = torch.tensor([[1e-8]]), torch.tensor([-1e-8])
    apply_gradients(optimizer, lr=0.1, max_grad_norm=None)
    assert (model.matrix.item(), model.bias.item()) == pytest.approx((0.95, 1.05), abs=1e-6)


@pytest.mark.parametrize("max_norm, scale", [(1.0, 0.2), (5.0, 1.0), (None, 1.0)])
def test_clipping_reaches_the_update(max_norm, scale):
    """CHECKS 18: gradient (3, 4) has norm 5; clipped to 1 it is (0.6, 0.8), and AdamW's first moment a tenth
    of that.
    """
    model = two_parameters()
    optimizer = adamw(model, weight_decay=0.0)
    model.matrix.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    assert apply_gradients(optimizer, 0.1, max_norm) == pytest.approx(5.0)
    moments = [optimizer.state[param]["exp_avg"].item() for param in (model.matrix, model.bias)]
    assert moments == pytest.approx([0.3 * scale, 0.4 * scale])


def test_the_norm_of_bf16_gradients_is_not_rounded_to_bf16():
    """Three gradients of 1: sqrt(3) = 1.7320508, in bf16 1.734375."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    param.grad = torch.ones(3, dtype=torch.bfloat16)
    assert parallel.clip_grad_norm([param], None) == pytest.approx(3**0.5, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_step_on_a_gradient_that_is_not_finite(bad):
    """CHECKS 24."""
    model = two_parameters()
    optimizer = adamw(model, weight_decay=0.1)
    model.matrix.grad, model.bias.grad = torch.tensor([[1.0]]), torch.tensor([bad])
    with pytest.raises(FloatingPointError, match="gradient norm"):
        apply_gradients(optimizer, 0.1, 1.0)
    assert (model.matrix.item(), model.bias.item()) == (1.0, 1.0) and not optimizer.state


def test_equal_tensors_round_their_moments_by_bits_of_their_own():
    """With the same bits they would drift alike: here two matrices of equal weights and gradients."""
    model = torch.nn.Module()
    for name in ("first", "second"):
        model.register_parameter(name, torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)))
    keep_masters(model, torch.float32)
    optimizer = adamw(model, weight_decay=0.0, moments=torch.bfloat16)
    for param in model.parameters():
        param.grad = torch.full((64, 64), 0.123)
    optimizer.step()
    first, second = (optimizer.state[param]["exp_avg"] for param in model.parameters())
    assert first.float().mean().item() == pytest.approx(second.float().mean().item(), rel=1e-3)
    assert 0.2 < (first != second).float().mean().item() < 0.8


@pytest.mark.parametrize(
    "weights, least, most", [("fp32", 0.99, 1.0), ("bf16", 0.0, 0.05), ("split", 0.99, 1.0)]
)
def test_a_step_at_5e_7_moves_the_weights(weights, least, most):
    """CHECKS 17: over 99 % of fp32 weights, kept whole or split; of bf16 ones (8 bits: 0.0200 is followed by
    0.0201) under a twentieth.
    """
    model = random_llama(tiny_config(), std=0.02).to(torch.float32 if weights == "fp32" else torch.bfloat16)
    if weights == "split":
        keep_masters(model, torch.float32)
    optimizer, before = adamw(model, weight_decay=0.0), sample_weights(model)
    documents = random_documents(
        model.config.vocab_size, lengths=[60] * 8
    )  # every id occurs, so every embedding has a gradient
    nll_sum(model, documents).backward()
    apply_gradients(optimizer, lr=5e-7, max_grad_norm=1.0)
    assert least <= weights_changed(before, model) <= most
