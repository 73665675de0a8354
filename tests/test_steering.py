"""steering.py: reading states, the vector's spectrum, what is added where, many lambdas in one pass, folding
it into the weights.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_documents, random_llama, relative_error, stream, tiny_config

from analysis.steering import (
    additions,
    bake,
    document_logps,
    match_additions,
    mean_states,
    packed_batches,
    pool_all,
    read_states,
    spectrum,
    steered_runs,
    steering_tap,
)
from families.falcon import Falcon, FalconConfig
from families.gemma import Gemma, GemmaConfig
from model import generate

CONFIG = tiny_config(num_hidden_layers=4)
LAST, MEAN = 0, 1  # read_states' first axis
LAYERS = [1, 2, 3]


def documents(lengths=(7, 1, 12, 3), seed=1):
    ids = random_documents(CONFIG.vocab_size, lengths, seed)
    return [(x.numpy(), np.ones(len(x), dtype=bool)) for x in ids]


def changed(model, size=0.02, seed=7):
    """A copy with every weight moved a little: what DPO does to an SFT model."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in other.parameters():
            param += size * torch.randn(param.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def sft():
    return random_llama(CONFIG)


@pytest.fixture(scope="module")
def dpo(sft):
    return changed(sft)


@pytest.fixture(scope="module")
def vector(sft, dpo):
    """(L, D) of the last tokens of `documents()`."""
    return (mean_states(dpo, documents(), "cpu") - mean_states(sft, documents(), "cpu"))[LAST].float()


def states_of(model, docs, tap=None):
    """(2, n, L, D) in the documents' order, through packed batches."""
    out = torch.zeros(2, len(docs), CONFIG.num_hidden_layers, CONFIG.hidden_size)
    for rows, batch in packed_batches(docs, "cpu"):
        out[:, rows] = read_states(model, batch, tap)
    return out


# ---------------------------------------------------------------- reading


def test_pooling_by_hand():
    """Documents (1, 3) and (8): last 3 and 8, mean 2 and 8, without the first token 3 and 8."""
    hidden, cu_seqlens = torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 2, 3], dtype=torch.int32)
    pooled = pool_all(hidden, cu_seqlens, ("last", "mean", "text"))
    found = {pooling: states.flatten().tolist() for pooling, states in pooled.items()}
    assert found == {"last": [3, 8], "mean": [2, 8], "text": [3, 8]}


def test_mean_states_weigh_documents_not_batches(sft, monkeypatch):
    """Batches of one and of three documents."""
    expected = states_of(sft, documents()).double().mean(1)
    monkeypatch.setattr("analysis.steering.TOKENS_PER_BATCH", 12)
    assert sorted(len(rows) for rows, _ in packed_batches(documents(), "cpu")) == [1, 3]
    assert relative_error(mean_states(sft, documents(), "cpu"), expected) < 1e-5


@pytest.mark.slow
def test_states_are_transformers_hidden_states(sft):
    """Every layer but the last is an entry of output_hidden_states; the last is read before the final norm,
    with compat_hf after it.
    """
    import transformers

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).eval()
    theirs.load_state_dict(sft.state_dict())
    (ids, mask) = documents()[0]
    with torch.no_grad():
        hidden = torch.stack(
            theirs(torch.tensor(ids)[None], output_hidden_states=True).hidden_states[1:], dim=1
        )[0]  # (L, T, D)
    ((_, batch),) = packed_batches([(ids, mask)], "cpu")
    raw, compat = read_states(sft, batch), read_states(sft, batch, compat_hf=True)
    assert (
        relative_error(compat[LAST, 0], hidden[:, -1]) < 1e-5
        and relative_error(compat[MEAN, 0], hidden.mean(1)) < 1e-5
    )
    assert torch.equal(raw[:, :, :-1], compat[:, :, :-1]) and not torch.allclose(
        raw[:, :, -1], compat[:, :, -1]
    )
    assert relative_error(sft.model.norm(raw[LAST, 0, -1]), hidden[-1, -1]) < 1e-5


@pytest.mark.slow
def test_identity_9_left_padding_moves_the_position_that_is_read(sft):
    """A text of 7 tokens beside one of 12, through transformers. Position length - 1 of the batch is the
    text's last where the padding is on the right, and its second where it is on the left.
    """
    import transformers

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).eval()
    theirs.load_state_dict(sft.state_dict())
    short, _, long, _ = [torch.from_numpy(ids) for ids, _ in documents()]
    pad, length = torch.zeros(5, dtype=torch.long), len(short)

    def read(text, mask):
        batch, attended = torch.stack([text, long]), torch.stack([mask, torch.ones(12, dtype=torch.long)])
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            states = theirs.model(batch, attention_mask=attended, position_ids=positions).last_hidden_state
        return states[0]  # (12, D)

    right = read(torch.cat([short, pad]), torch.cat([torch.ones(7), torch.zeros(5)]).long())
    left = read(torch.cat([pad, short]), torch.cat([torch.zeros(5), torch.ones(7)]).long())
    ours = sft.model.norm(states_of(sft, documents()[:1])[LAST, 0, -1])
    assert relative_error(right[length - 1], ours) < 1e-5 and relative_error(left[-1], ours) < 1e-5
    assert relative_error(left[length - 1], ours) > 0.1
    assert relative_error(left[length - 1], right[1]) < 1e-5


def test_identity_10_a_bf16_forward_takes_small_differences_away(sft):
    """Weights that are values of bf16, so that the forward alone differs: of a small change of the weights
    more than half of the vector is rounding, of one twenty times as large a twentieth at most.
    """

    def vector_of(before, after):
        states = mean_states(after, documents(), "cpu") - mean_states(before, documents(), "cpu")
        return states[LAST, -1].double()

    before, shares = copy.deepcopy(sft).bfloat16().float(), {}
    for size in (1e-3, 2e-2):
        after = changed(before, size).bfloat16().float()
        in_bf16 = vector_of(copy.deepcopy(before).bfloat16(), copy.deepcopy(after).bfloat16())
        shares[size] = relative_error(in_bf16, vector_of(before, after))
    assert shares[1e-3] > 0.5 and shares[2e-2] < 0.05


@pytest.mark.parametrize("rescale", (False, True))
def test_a_batch_is_its_documents_alone_under_steering(sft, vector, rescale):
    """CHECKS 28: row 0 is not the only one that is steered."""
    tap = steering_tap(additions("cumulative", vector, LAYERS), 0.7, rescale)
    together = states_of(sft, documents(), tap)
    alone = torch.cat([states_of(sft, [document], tap) for document in documents()], dim=1)
    assert relative_error(together, alone) < 1e-5
    moved = (together - states_of(sft, documents()))[:, :, -1].norm(dim=-1)  # (2, n)
    assert moved.min() > 1e-3


def test_logps_are_the_same_with_hidden_states_given(sft):
    for _, batch in packed_batches(documents(), "cpu"):
        given_hidden = document_logps(
            sft, batch, sft(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        )
        for a, b in zip(document_logps(sft, batch), given_hidden, strict=True):
            assert torch.equal(a, b)


# ---------------------------------------------------------------- the spectrum


@pytest.mark.parametrize("shape", ((9, 30), (30, 9)), ids=("wide", "tall"))
def test_spectrum_is_numpys_svd(shape):
    X = np.random.default_rng(0).normal(size=shape) * np.linspace(2, 0.1, shape[1]) + 0.5
    found, mean = spectrum(torch.from_numpy(X)), X.mean(0)
    _, s, vt = np.linalg.svd(X, full_matrices=False)
    centred = np.linalg.svd(X - mean, compute_uv=False) ** 2
    shares = s**2 / (s**2).sum()
    assert np.allclose(found["explained"], shares[:5]) and np.allclose(
        found["explained_centred"], (centred / centred.sum())[:5]
    )
    assert np.isclose(found["rank_one"], shares[0]) and np.isclose(
        found["effective_rank"], np.exp(-(shares * np.log(shares)).sum())
    )
    expected = vt[:5] * np.linalg.norm(mean) * np.where(vt[:5] @ mean < 0, -1, 1)[:, None]
    assert np.allclose(found["components"].numpy(), expected, atol=1e-5)
    assert (found["components"].double() @ torch.from_numpy(mean) > 0).all()


@pytest.mark.parametrize("size", [4, 64])
def test_components_beyond_the_rank_are_zero(size):
    """One text six times: the mean, and no rounding error blown up to the mean's length beside it."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    found = spectrum(x.repeat(6, 1))
    torch.testing.assert_close(found["components"][0], x)
    assert found["explained"][0] == pytest.approx(1) and found["effective_rank"] == pytest.approx(1)
    assert len(found["components"]) > 1 and not found["components"][1:].any()


def test_spectrum_knows_no_seed_and_no_order_of_the_texts():
    X = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    first = spectrum(X)
    torch.manual_seed(5)
    torch.randn(100)
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(first.values(), spectrum(X).values(), strict=True)
    )
    torch.testing.assert_close(spectrum(X.flip(0))["components"], first["components"])


@given(n=st.integers(1, 8), D=st.integers(2, 8), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_rank_one_differences(n, D, seed):
    """Multiples of one direction: the first share is 1, and the first component is the mean itself, sign and
    length.
    """
    rng = np.random.default_rng(seed)
    X = torch.from_numpy(rng.uniform(0.1, 2, size=(n, 1)) * rng.normal(size=(1, D)))
    found = spectrum(X)
    assert found["rank_one"] == pytest.approx(1) and found["effective_rank"] == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(found["components"][0], X.mean(0).float())


def test_no_difference_has_no_share():
    """A layer that training left alone."""
    found = spectrum(torch.zeros(4, 6))
    assert (
        found["explained"] == [0] * 4
        and found["rank_one"] == 0
        and found["effective_rank"] == 1
        and not found["components"].any()
    )


# ---------------------------------------------------------------- what is added


def test_increments_sum_to_the_last_layers_vector(vector):
    add = additions("increment", vector, LAYERS)
    torch.testing.assert_close(sum(add.values()), vector[-1])
    assert torch.equal(add[1], vector[1]) and torch.equal(add[2], vector[2] - vector[1])
    assert all(torch.equal(a, vector[layer]) for layer, a in additions("cumulative", vector, LAYERS).items())


@pytest.mark.parametrize("rescale", (False, True))
def test_lambda_zero_is_the_model_without_a_hook(sft, vector, rescale):
    """CHECKS 32, bit for bit; and additions that are all zero move nothing either."""
    add = additions("cumulative", vector, LAYERS)
    assert steering_tap(add, 0.0, rescale) is None and steering_tap({}, 1.0) is None
    plain = sft(*stream(random_documents(CONFIG.vocab_size)))
    for run in steered_runs(sft, documents(), add, [0.0, -0.0], "cpu", rescale):
        batch = run.batch
        assert torch.equal(
            run.hidden, sft(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        )
    zero = steering_tap({layer: torch.zeros(CONFIG.hidden_size) for layer in LAYERS}, 1.0)
    assert torch.equal(plain, sft(*stream(random_documents(CONFIG.vocab_size)), tap=zero))


def test_one_layer_one_token_is_the_dpo_state_and_back():
    """CHECKS 28, exact on a grid of 2^-10, where float32 differences do not round: h_sft + (h_dpo - h_sft),
    and h_dpo - (h_dpo - h_sft).
    """
    generator = torch.Generator().manual_seed(0)
    h_sft, h_dpo = (torch.randint(-4096, 4096, (1, 40), generator=generator) / 1024 for _ in range(2))
    v = {2: (h_dpo - h_sft)[0]}
    assert torch.equal(steering_tap(v, 1.0)(2, h_sft), h_dpo) and torch.equal(
        steering_tap(v, -1.0)(2, h_dpo), h_sft
    )
    assert steering_tap(v, 1.0)(1, h_sft) is h_sft


@pytest.mark.parametrize("layer", range(4))
def test_one_layer_one_token_in_the_model(sft, layer):
    """Models that differ up to `layer` only: with v there, one model's output is the other's, and the way
    back. No layer is off by one.
    """
    dpo, document = changed(sft, 0.1), documents((1,))
    for upper in range(layer + 1, 4):
        dpo.model.layers[upper].load_state_dict(sft.model.layers[upper].state_dict())
    dpo.model.norm.load_state_dict(sft.model.norm.state_dict())
    below, above = states_of(sft, document)[LAST, 0], states_of(dpo, document)[LAST, 0]
    v = {layer: (above - below)[layer]}
    there, back = (
        states_of(sft, document, steering_tap(v, 1.0))[LAST, 0],
        states_of(dpo, document, steering_tap(v, -1.0))[LAST, 0],
    )
    assert relative_error(below[layer:], above[layer:]) > 0.01
    assert (
        relative_error(there[layer:], above[layer:]) < 2e-6
        and relative_error(back[layer:], below[layer:]) < 2e-6
    )


@pytest.mark.parametrize(
    "dtype, size",
    ((torch.float32, 1.0), (torch.float32, 1e30), (torch.float16, 6e3), (torch.bfloat16, 1e30)),
    ids=str,
)
def test_rescaling_keeps_norms(dtype, size):
    """CHECKS 30: states whose squares overflow float32 (or float16) come back with their norm, in their
    dtype.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(5, 40, generator=generator) * size).to(dtype)
    v = {0: torch.randn(40, generator=generator) * size}
    steered = steering_tap(v, 0.8, rescale=True)(0, hidden)
    assert (
        steered.dtype == dtype
        and steered.isfinite().all()
        and relative_error(steered.double(), hidden.double()) > 0.1
    )
    norms = [x.double().norm(dim=-1) for x in (steered, hidden)]
    torch.testing.assert_close(*norms, rtol=1e-6 if dtype == torch.float32 else 5e-3, atol=0)


# ---------------------------------------------------------------- injections, measured


def achieved(sft, add, vector, docs):
    """Shift of the last layer's mean state along v over |v|, at lambda 1."""
    shift = (mean_states(sft, docs, "cpu", steering_tap(add, 1.0)) - mean_states(sft, docs, "cpu"))[LAST, -1]
    return (shift @ vector[-1].double() / vector[-1].double().square().sum()).item()


@pytest.mark.parametrize("pooling", (LAST, MEAN))
@pytest.mark.parametrize("layers", ([3], [2, 3], [0, 1, 2, 3]), ids=str)
def test_matched_gives_the_dpo_models_mean_states(sft, dpo, pooling, layers):
    """To 1e-3 relative at every steered layer, by construction, and backwards on the DPO model."""
    names, v = (
        ("last", "mean"),
        (mean_states(dpo, documents(), "cpu") - mean_states(sft, documents(), "cpu"))[pooling].float(),
    )
    there = match_additions(sft, documents(), v, layers, names[pooling], "cpu")
    back = match_additions(dpo, documents(), v, layers, names[pooling], "cpu", strength=-1)
    for model, target, tap in ((sft, dpo, steering_tap(there, 1.0)), (dpo, sft, steering_tap(back, -1.0))):
        start, end, wanted = (
            mean_states(m, documents(), "cpu", t)[pooling][layers]
            for m, t in ((model, None), (model, tap), (target, None))
        )
        assert relative_error(start, wanted) > 1e-2 and relative_error(end, wanted) < 1e-5
        assert relative_error(end - start, wanted - start) < 1e-3


def test_cumulative_adds_the_change_several_times(sft, vector):
    """The document's point 7: above 1 for cumulative, least for matched, which is 1."""
    shifts = {
        name: achieved(sft, additions(name, vector, LAYERS), vector, documents())
        for name in ("cumulative", "increment")
    }
    matched = achieved(
        sft, match_additions(sft, documents(), vector, LAYERS, "last", "cpu"), vector, documents()
    )
    assert shifts["cumulative"] > 1.5 and matched == pytest.approx(1, abs=1e-4)
    assert abs(shifts["increment"] - 1) < abs(shifts["cumulative"] - 1)


# ---------------------------------------------------------------- many lambdas in one pass


@pytest.mark.slow
@pytest.mark.parametrize("rescale", (False, True))
@pytest.mark.parametrize("layers", ([3], [1], [2, 3], [0, 1, 2, 3]), ids=str)
def test_prefix_reuse_is_a_full_forward_with_a_tap(sft, vector, layers, rescale, monkeypatch):
    """Bit for bit: outputs and every layer's states, over several batches."""
    monkeypatch.setattr("analysis.steering.TOKENS_PER_BATCH", 16)
    add, lambdas, seen = additions("cumulative", vector, layers), [0.5, 0.0, -1.0, 1.0], []
    for run in steered_runs(sft, documents(), add, lambdas, "cpu", rescale, read_layers=range(4)):
        tap, batch = steering_tap(add, lambdas[run.index], rescale), run.batch
        assert torch.equal(
            run.hidden, sft(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, tap=tap)
        )
        expected = read_states(sft, batch, tap)
        assert sorted(run.states) == list(range(4))
        for layer, states in run.states.items():
            assert torch.equal(torch.stack([states["last"], states["mean"]]), expected[:, :, layer])
        seen += [(run.index, row) for row in run.rows.tolist()]
    assert (
        sorted(seen) == [(k, row) for k in range(4) for row in range(4)]
        and len(list(packed_batches(documents(), "cpu"))) > 1
    )


FAMILIES = {
    "falcon": Falcon(FalconConfig(vocab_size=97, hidden_size=40, ffn_hidden_size=80, num_hidden_layers=4, num_attention_heads=2)),
    "gemma2": Gemma(GemmaConfig(vocab_size=97, hidden_size=40, intermediate_size=80, num_hidden_layers=4, num_attention_heads=2,
                                num_key_value_heads=1, head_dim=20, query_pre_attn_scalar=20, sliding_window=4)),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_steered_like_a_llama(family, vector):
    """Prefix reuse bit for bit, and `matched` finds additions on it."""
    torch.manual_seed(0)
    model = changed(FAMILIES[family], 0.1)
    add = additions("cumulative", vector, [2, 3])
    (run,) = steered_runs(model, documents(), add, [0.5], "cpu")
    batch = run.batch
    full = model(
        batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, tap=steering_tap(add, 0.5)
    )
    assert torch.equal(run.hidden, full)
    found = match_additions(model, documents(), vector, [2, 3], "mean", "cpu")
    shift = mean_states(model, documents(), "cpu", steering_tap(found, 1.0)) - mean_states(
        model, documents(), "cpu"
    )
    assert relative_error(shift[MEAN, 2:], vector[2:]) < 1e-3


def test_prefix_reuse_runs_the_lower_blocks_once(sft, vector):
    calls = [0] * 4
    hooks = [
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, block in enumerate(sft.model.layers)
    ]
    for run in steered_runs(
        sft, documents(), additions("cumulative", vector, [2, 3]), [0.0, 0.25, 0.5, 1.0], "cpu"
    ):
        assert run.states == {}
    for hook in hooks:
        hook.remove()
    assert calls == [
        1,
        1,
        1,
        4,
    ]  # the unsteered pass, and the block above the first steered one for each of three lambdas


# ---------------------------------------------------------------- generation


@pytest.mark.slow
@pytest.mark.parametrize("rescale", (False, True))
def test_steered_generation_is_the_same_without_a_cache(sft, vector, rescale):
    """CHECKS 29: the tap sees the cached tokens' successors too. Side by side equals alone."""
    add = additions("cumulative", vector, LAYERS)
    tap = steering_tap(add, 3.0, rescale)
    prompts = [x.tolist() for x in random_documents(CONFIG.vocab_size)]
    answers = generate(sft, prompts, 8, tap=tap)
    assert answers != generate(sft, prompts, 8)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            hidden = sft(*stream([torch.tensor(ids)]), tap=tap)
            assert token == (hidden[-1] @ sft.lm_head.weight.T).argmax().item()
            ids.append(token)
    assert answers == [generate(sft, [prompt], 8, tap=tap)[0] for prompt in prompts]


# ---------------------------------------------------------------- baking


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"model_type": "mistral", "sliding_window": 64},
        {"mlp_bias": True},
        {"qkv_bias": True, "o_bias": True},
    ),
)
@pytest.mark.parametrize("strength", (1.0, -0.5))
def test_baking_is_the_tap(vector, changes, strength):
    config = tiny_config(num_hidden_layers=4, **changes)
    model, before = random_llama(config), random_documents(config.vocab_size)
    add = additions("cumulative", vector, LAYERS)
    plain, baked = model(*stream(before)), bake(model, add, strength)
    tapped = model(*stream(before), tap=steering_tap(add, strength))
    assert relative_error(baked(*stream(before)), tapped) < 1e-5 < relative_error(plain, tapped)
    assert torch.equal(model(*stream(before)), plain) and model.config == config  # a copy
    assert baked.config.model_type == "llama" and baked.config.mlp_bias
    assert baked.config.max_position_embeddings == (config.sliding_window or config.max_position_embeddings)


def test_what_cannot_be_baked_is_refused(vector):
    qwen = random_llama(tiny_config(num_hidden_layers=4, model_type="qwen2", qkv_bias=True))
    for model in (qwen, *FAMILIES.values()):
        with pytest.raises(
            ValueError, match=f"model_type='{model.config.model_type}'.*expected a Llama or Mistral"
        ):
            bake(model, additions("cumulative", vector, LAYERS), 1.0)
