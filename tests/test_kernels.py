"""Each fast path against its slow twin, values and gradients, and what it must never allocate."""

import pytest
import torch
from tiny_models import relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import (
    IGNORE_INDEX,
    Master,
    SharedPrefix,
    attention,
    block,
    reference,
    rms_norm,
    segment_sums,
    token_logps,
)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_gradients(function, inputs, seed=99):
    """function(*inputs) and the gradients of a random weighting of it, with respect to every input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(
        value, leaves, randn(*value.shape, seed=seed, dtype=value.dtype)
    )


def assert_twins(fast, slow, inputs, tolerance=1e-5):
    """Same values and same gradients, to tolerance * (1 + |expected|)."""
    value, grads = value_and_gradients(fast, inputs)
    expected, expected_grads = value_and_gradients(slow, inputs)
    torch.testing.assert_close(value, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(grads, expected_grads, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("lengths", [(1,), (9,), (5, 1, 8), (1, 1, 1), (3, 13), (5, 3, 5, 1, 3)])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 8), (6, 2, 5), (3, 1, 16)])
def test_attention_equals_reference(lengths, heads, kv_heads, head_dim):
    T = sum(lengths)
    q, k, v = (
        randn(T, heads, head_dim),
        randn(T, kv_heads, head_dim, seed=1),
        randn(T, kv_heads, head_dim, seed=2),
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def with_stream(function):
        return lambda q, k, v: function(q, k, v, cu_seqlens, max(lengths))

    assert_twins(with_stream(attention), with_stream(reference.attention), (q, k, v))


def test_documents_of_one_size_have_the_bits_that_each_has_alone():
    """They run as one batch."""
    lengths = [5, 3, 40, 5, 3, 40, 5]
    stream = [randn(sum(lengths), heads, 8, seed=heads) for heads in (4, 2, 2)]
    alone = []
    for document in zip(*(part.split(lengths) for part in stream), strict=True):
        length = len(document[0])
        alone.append(attention(*document, torch.tensor([0, length], dtype=torch.int32), length))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    assert torch.equal(attention(*stream, cu_seqlens, 40), torch.cat(alone))


def test_attention_reference_by_hand():
    """Two documents of 2 and 1 tokens, one head of size 1, scale 1. Token 0 sees itself: 10. Token 1 has
    scores 1*0 and 1*ln 3, so weights 1/4 and 3/4: 10/4 + 3*20/4 = 17.5. Token 2 is alone: 30."""
    q, k, v = (
        torch.ones(3, 1, 1),
        torch.tensor([0.0, 3.0, 5.0]).view(3, 1, 1),
        torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1),
    )
    k[1] = torch.tensor(3.0).log()
    out = reference.attention(q, k, v, torch.tensor([0, 2, 3], dtype=torch.int32), 2)
    torch.testing.assert_close(out.flatten(), torch.tensor([10.0, 17.5, 30.0]))


@pytest.mark.slow
def test_attention_gradcheck():
    q, k, v = (randn(5, heads, 3, seed=heads, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, cu_seqlens, 3), (q, k, v))


def shared_stream(*documents):
    """(T, cu_seqlens, longest document, SharedPrefix) of documents given as (whose prefix, its length, own
    tokens), laid end to end.
    """
    own = [count for _, _, count in documents]
    rows = torch.arange(sum(own)).split(own)
    kv_index = [torch.cat([rows[whose][:prefix], rows[d]]) for d, (whose, prefix, _) in enumerate(documents)]
    cu_seqlens, cu_seqlens_k = (
        torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (own, [len(rows) for rows in kv_index])
    )
    return sum(own), cu_seqlens, max(map(len, kv_index)), SharedPrefix(torch.cat(kv_index), cu_seqlens_k)


# whole documents of 5, 1 and 4 tokens; branches behind 3, all 1 and no tokens of theirs
BRANCHES = shared_stream((0, 0, 5), (1, 0, 1), (2, 0, 4), (0, 3, 7), (1, 1, 2), (2, 0, 1))


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 4, 8), (6, 2, 5), (3, 1, 16)])
def test_attention_behind_a_shared_prefix_equals_reference(heads, kv_heads, head_dim):
    T, *stream = BRANCHES
    q, k, v = (
        randn(T, heads, head_dim),
        randn(T, kv_heads, head_dim, seed=1),
        randn(T, kv_heads, head_dim, seed=2),
    )
    assert_twins(
        *(lambda q, k, v, f=f: f(q, k, v, *stream) for f in (attention, reference.attention)), (q, k, v)
    )


def test_attention_behind_a_shared_prefix_is_that_of_the_repeated_prefix():
    """The same numbers with every document whole: its own copy of the prefix, whose queries are then
    dropped.
    """
    T, cu_seqlens, longest, shared = BRANCHES
    q, k, v = randn(T, 6, 5), randn(T, 2, 5, seed=1), randn(T, 2, 5, seed=2)
    last = torch.cat(
        [torch.arange(end - own, end) for own, end in zip(cu_seqlens.diff(), shared.cu_seqlens_k[1:])]
    )

    def repeated(q, k, v):
        return reference.attention(*(x[shared.kv_index] for x in (q, k, v)), shared.cu_seqlens_k, longest)[
            last
        ]

    assert_twins(lambda q, k, v: attention(q, k, v, cu_seqlens, longest, shared), repeated, (q, k, v))


def test_attention_behind_a_shared_prefix_by_hand():
    """A document of rows 0 and 1 and a branch of row 2 behind row 0. As above, rows 0 and 1 give 10 and 17.5.
    Row 2 sees row 0, score 0, and itself, ln 3: 10/4 + 3*30/4 = 25. It does not see row 1."""
    q, k, v = (
        torch.ones(3, 1, 1),
        torch.tensor([1.0, 3.0, 3.0]).log().view(3, 1, 1),
        torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1),
    )
    shared = SharedPrefix(torch.tensor([0, 1, 0, 2]), torch.tensor([0, 2, 4], dtype=torch.int32))
    for function in (attention, reference.attention):
        out = function(q, k, v, torch.tensor([0, 2, 3], dtype=torch.int32), 2, shared)
        torch.testing.assert_close(out.flatten(), torch.tensor([10.0, 17.5, 25.0]))


def test_this_torch_accepts_grouped_heads_on_a_gpu():
    """Shapes only, no device needed: releases differ in whether varlen_attn must be asked for grouped
    heads.
    """
    with FakeTensorMode():
        q, kv = (torch.empty(10, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
        cu_seqlens = torch.empty(3, device="cuda", dtype=torch.int32)
        assert attention(q, kv, kv, cu_seqlens, 6).shape == (10, 4, 64)
        shared = SharedPrefix(torch.empty(13, device="cuda", dtype=torch.int64), cu_seqlens)
        assert attention(q, kv, kv, cu_seqlens, 6, shared).shape == (10, 4, 64)


# ---------------------------------------------------------------- rms_norm


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 64)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_equals_reference(shape, eps):
    x, weight = randn(*shape) * 3, randn(shape[-1], seed=1)
    assert_twins(lambda x, w: rms_norm(x, w, eps), lambda x, w: reference.rms_norm(x, w, eps), (x, weight))


def test_rms_norm_bf16_is_rounded_once():
    """1/256 relative is half a bf16 step of rounding: what one rounding of a float32 result may differ from
    another's.
    """
    x, weight = randn(11, 48).bfloat16(), randn(48, seed=1).bfloat16()
    exact = reference.rms_norm(x.float(), weight.float(), 1e-5)
    assert rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    assert ((rms_norm(x, weight, 1e-5).float() - exact) / exact).abs().max() <= 1 / 256
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), exact.bfloat16())


def test_rms_norm_by_hand():
    """x = (3, 4): mean square 12.5, so with eps = 12.5 the divisor is 5; weights 1 and 2."""
    out = reference.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 12.5)
    torch.testing.assert_close(out, torch.tensor([[0.6, 1.6]]))


def test_rms_norm_gradcheck():
    inputs = [
        randn(3, 5, dtype=torch.float64).requires_grad_(),
        randn(5, seed=1, dtype=torch.float64).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), inputs)


# ---------------------------------------------------------------- weight gradients


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_add_up_in_the_dtype_asked_for(grad_dtype):
    """Two micro-batches of a weight that accumulates, and of one whose gradients autograd collects."""
    weight = torch.nn.Parameter(randn(6, 4).bfloat16())
    dy, x = randn(5, 6, seed=1).bfloat16(), randn(5, 4, seed=2).bfloat16()
    once = reference.weight_gradient(dy, x, grad_dtype)
    assert torch.equal(block.weight_gradient(weight, dy, x), reference.weight_gradient(dy, x, torch.bfloat16))
    weight.grad_dtype, weight.master = grad_dtype, Master(low_bits=None, accumulates=True)
    for _ in range(2):
        assert block.weight_gradient(weight, dy, x) is None
    assert weight.grad.dtype == grad_dtype
    torch.testing.assert_close(
        weight.grad, 2 * once, rtol=1e-2 if grad_dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )


# ---------------------------------------------------------------- token_logps

T, D, V = 13, 8, 31


def logps_inputs():
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3))
    targets[[0, 4, 12]] = IGNORE_INDEX
    return randn(T, D), randn(V, D, seed=1), targets


@pytest.mark.parametrize("chunk", [1, 4, 6, 12, 13, 100])
def test_token_logps_equals_reference(chunk):
    hidden, weight, targets = logps_inputs()
    assert_twins(
        lambda h, w: token_logps(h, w, targets, chunk=chunk),
        lambda h, w: reference.token_logps(h, w, targets),
        (hidden, weight),
    )


def test_token_logps_by_hand():
    """Logits 0 and ln 3: probabilities 1/4 and 3/4. The third row is ignored."""
    hidden, weight = torch.ones(3, 1), torch.tensor([[0.0], [3.0]])
    weight[1] = weight[1].log()
    targets = torch.tensor([0, 1, IGNORE_INDEX])
    expected = torch.tensor([0.25, 0.75, 1.0]).log()
    torch.testing.assert_close(token_logps(hidden, weight, targets), expected)
    torch.testing.assert_close(reference.token_logps(hidden, weight, targets), expected)


def test_token_logps_gradients_against_float64():
    """The kernel works in float32, too coarse for gradcheck: its analytic gradients are compared with
    autograd's through float64.
    """
    hidden, weight, targets = logps_inputs()
    _, grads = value_and_gradients(lambda h, w: token_logps(h, w, targets, chunk=5), (hidden, weight))

    def exact(h, w):
        return -torch.nn.functional.cross_entropy(
            h @ w.T, targets, ignore_index=IGNORE_INDEX, reduction="none"
        )

    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    exact_grads = torch.autograd.grad(exact(*leaves), leaves, randn(T, seed=99).double())
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert relative_error(grad.double(), exact_grad) < 2e-6


def test_token_logps_ignored_positions_have_no_value_and_no_gradient():
    hidden, weight, targets = logps_inputs()
    values, (grad_hidden, _) = value_and_gradients(
        lambda h, w: token_logps(h, w, targets, chunk=5), (hidden, weight)
    )
    ignored = targets == IGNORE_INDEX
    assert (values[ignored] == 0).all() and (values[~ignored] < 0).all()
    assert (grad_hidden[ignored] == 0).all() and (grad_hidden[~ignored] != 0).any(dim=1).all()


def test_token_logps_all_ignored():
    hidden, weight, _ = logps_inputs()
    nothing = torch.full((T,), IGNORE_INDEX)
    values, grads = value_and_gradients(lambda h, w: token_logps(h, w, nothing, chunk=5), (hidden, weight))
    assert not values.any() and not grads[0].any() and not grads[1].any()


def test_token_logps_of_an_empty_stream():
    values, grads = value_and_gradients(
        lambda h, w: token_logps(h, w, torch.empty(0, dtype=torch.int64)), (randn(0, D), randn(V, D))
    )
    assert values.shape == (0,) and grads[0].shape == (0, D) and not grads[1].any()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_token_logps_gives_no_gradient_to_what_is_frozen(frozen):
    """LoRA freezes lm_head: its (V, D) gradient must not even be allocated."""
    hidden, weight, targets = logps_inputs()
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    token_logps(hidden, weight, targets).sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_token_logps_survive_logits_of_a_thousand():
    """softmax of +-1000 overflows unless the maximum is taken out first: the likely token has log p = 0, the
    other -2000.
    """
    values, grads = value_and_gradients(
        lambda h, w: token_logps(h, w, torch.tensor([0, 1])),
        (torch.full((2, 1), 1000.0), torch.tensor([[1.0], [-1.0]])),
    )
    assert values.tolist() == [0.0, -2000.0]
    assert all(grad.isfinite().all() for grad in grads)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def largest_tensor(function, hidden, weight):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    with LargestTensor() as forward:
        value = function(*leaves).sum()
    with LargestTensor() as backward:
        value.backward()
    return forward.numel, backward.numel


def test_token_logps_never_hold_all_logits():
    """CHECKS 20. T = 96, V = 64, D = 4, chunk = 8: one chunk's logits are 512 numbers, (T, V) would be 6,144;
    the reference shows that the recorder sees such a tensor in both passes."""
    hidden, weight, targets = randn(96, 4), randn(64, 4, seed=1), torch.arange(96) % 64
    assert largest_tensor(lambda h, w: token_logps(h, w, targets, chunk=8), hidden, weight) == (
        8 * 64,
        8 * 64,
    )
    assert largest_tensor(lambda h, w: reference.token_logps(h, w, targets), hidden, weight) == (
        96 * 64,
        96 * 64,
    )


# ---------------------------------------------------------------- segment_sums


@pytest.mark.parametrize("lengths", [(4,), (2, 0, 3), (0, 5, 0), (0, 0), (1, 1, 1, 7)])
def test_segment_sums_equal_reference(lengths):
    values = randn(sum(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    assert_twins(lambda v: segment_sums(v, offsets), lambda v: reference.segment_sums(v, offsets), (values,))


def test_segment_sums_gradcheck():
    offsets = torch.tensor([0, 2, 2, 5])
    assert torch.autograd.gradcheck(
        lambda v: segment_sums(v, offsets), randn(5, dtype=torch.float64).requires_grad_()
    )
