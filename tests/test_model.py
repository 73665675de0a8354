"""model.py by itself: what it refuses, packing, recompute, LoRA, taps, generation. Parity with transformers
and peft has its own files.
"""

import json
from functools import partial

import pytest
import torch
from tiny_models import gradients, nll_sum, random_documents, random_llama, stream, tiny_config

from kernels import reference
from model import (
    LINEARS,
    LlamaConfig,
    LoRALinear,
    adapters_disabled,
    apply_lora,
    apply_recompute,
    generate,
    init_lora,
    merge_lora,
    rope_frequencies,
    training_flops,
)

DOCUMENTS = random_documents(97)


def logits_of(model, documents, **kwargs):
    return model(*stream(documents), **kwargs) @ model.lm_head.weight.T


def assert_same_gradients(a, b, tolerance):
    """Relative to each tensor's largest gradient."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * b[name].abs().max(), name


# ---------------------------------------------------------------- config.json: what is refused


def config_error(tmp_path, remove=(), **changes):
    """The message with which from_hf refuses a good config.json that was changed."""
    raw = tiny_config().to_hf() | changes
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in raw.items() if key not in remove})
    )
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_hf(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "gemma2"),
        ("model_type", "mixtral"),
        ("model_type", None),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("partial_rotary_factor", 0.5),
        ("pretraining_tp", 2),
        ("original_max_position_embeddings", 64),  # transformers would take it for the one in rope_parameters
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ],
)
def test_config_refuses(key, value, tmp_path):
    message = config_error(tmp_path, **{key: value})
    assert f"{key}={value!r}: expected" in message


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope"])
def test_config_refuses_rope_types(kind, tmp_path):
    """In the spelling of transformers 5, and in both of transformers 4's (`type` is the older)."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    assert f"rope_parameters: rope_type={kind!r}" in config_error(tmp_path, rope_parameters=rope)
    for key in ("rope_type", "type"):
        message = config_error(tmp_path, remove=["rope_parameters"], rope_scaling={key: kind, "factor": 2.0})
        assert f"rope_scaling: rope_type={kind!r}" in message


def test_config_refuses_partial_rotation_inside_rope_parameters(tmp_path):
    """Where transformers 5 writes it."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert "partial_rotary_factor=0.5: expected 1" in config_error(tmp_path, rope_parameters=rope)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 4, 12), (6, 4, 12), (4, 2, 5)])
def test_config_refuses_heads_that_do_not_fit(heads, kv_heads, head_dim, tmp_path):
    """Two query heads on four key/value heads would run, and mean nothing: no head is repeated zero times."""
    message = config_error(
        tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim
    )
    assert (
        f"num_attention_heads={heads}, num_key_value_heads={kv_heads}, head_dim={head_dim}: expected a multiple"
        in message
    )


def test_config_refuses_two_rope_spellings_that_differ(tmp_path):
    """A model card says "add this rope_scaling", and the file has rope_parameters already: transformers 5
    would go by rope_scaling.
    """
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    assert "rope_scaling={'rope_type': 'llama3'" in config_error(tmp_path, rope_scaling=llama3)
    assert "rope_scaling: rope_type='yarn'" in config_error(
        tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0}
    )


def two_ropes(full):
    return dict(rope_parameters={"sliding_attention": {"rope_theta": 1e4}, "full_attention": full})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(layer_types=["full_attention"] * 4),
            "layer_types=['full_attention', .*: expected the window in three of four",
        ),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 8.0}),
            "rope_scaling={'rope_type': 'yarn', .*: expected null",
        ),
        (
            dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
            "rope_parameters=.*: expected the same",
        ),
        (
            two_ropes({"rope_theta": 1e5}),
            "rope_parameters=.*: expected the same for each of sliding_attention",
        ),
        (two_ropes({"rope_type": "yarn"}), "full_attention: rope_type='yarn': expected"),
    ],
)
def test_config_refuses_an_olmo3_with_two_ropes(changes, message, tmp_path):
    """As the published ones have: their layers without a window are stretched."""
    olmo = tiny_config(
        model_type="olmo3", qk_norm="width", post_norm=True, sliding_window=8, num_hidden_layers=4
    )
    (tmp_path / "config.json").write_text(json.dumps(olmo.to_hf()))
    assert LlamaConfig.from_hf(tmp_path) == olmo
    (tmp_path / "config.json").write_text(json.dumps(olmo.to_hf() | changes))
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: {message}".replace("[", r"\[")):
        LlamaConfig.from_hf(tmp_path)


def test_config_names_missing_keys(tmp_path):
    assert "vocab_size" in config_error(tmp_path, remove=["vocab_size"])
    assert "head_dim: missing; expected in every qwen3 config" in config_error(
        tmp_path, remove=["head_dim"], model_type="qwen3"
    )
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    message = config_error(tmp_path, rope_parameters=llama3)
    assert (
        "rope_parameters" in message
        and "high_freq_factor" in message
        and "original_max_position_embeddings" in message
    )


def test_config_of_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        LlamaConfig.from_hf(tmp_path)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset='llama-9': expected one of .*llama-3.1-8b"):
        LlamaConfig.preset("llama-9")


def test_documents_longer_than_the_sliding_window_are_refused():
    model = random_llama(tiny_config(model_type="mistral", sliding_window=8))
    logits_of(model, random_documents(97, (8, 8)))  # a stream may be longer
    with pytest.raises(ValueError, match="sliding_window=8: a document of 9 tokens"):
        logits_of(model, random_documents(97, (3, 9)))


def test_generation_past_the_sliding_window_is_refused():
    """With a KV cache each forward sees a single token: the check must count the cached ones."""
    model = random_llama(tiny_config(model_type="mistral", sliding_window=8))
    assert len(generate(model, [[1, 2, 3]], max_new_tokens=5)[0]) == 5
    with pytest.raises(ValueError, match="sliding_window=8"):
        generate(model, [[1, 2, 3]], max_new_tokens=6)


def test_every_prompt_has_a_token():
    with pytest.raises(AssertionError, match="every prompt has a token"):
        generate(random_llama(tiny_config()), [[5], []], 2)


# ---------------------------------------------------------------- packing and positions


@pytest.mark.parametrize(
    "config",
    [{}, dict(qk_norm="head"), dict(qk_norm="width", post_norm=True)],
    ids=("llama", "qwen3", "olmo2"),
)
def test_packed_equals_alone(config):
    """CHECKS 16: values, and gradients of the summed NLL."""
    model = random_llama(tiny_config(**config))
    packed = logits_of(model, DOCUMENTS)
    alone = torch.cat([logits_of(model, [document]) for document in DOCUMENTS])
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()

    nll_sum(model, DOCUMENTS).backward()
    packed_grads = gradients(model)
    model.zero_grad()
    for document in DOCUMENTS:
        nll_sum(model, [document]).backward()
    assert_same_gradients(packed_grads, gradients(model), 1e-5)


def test_a_document_does_not_see_its_neighbours():
    """Bit for bit: other tokens before and after, of the same lengths, change nothing."""
    model = random_llama(tiny_config())
    before, document, after = random_documents(97, (5, 9, 4))
    others = random_documents(97, (5, 4), seed=2)
    first, second = (
        logits_of(model, [before, document, after]),
        logits_of(model, [others[0], document, others[1]]),
    )
    assert torch.equal(first[5:14], second[5:14]) and not torch.equal(first[:5], second[:5])


def test_the_model_is_causal():
    model = random_llama(tiny_config())
    (document,) = random_documents(97, (12,))
    changed = document.clone()
    changed[8] = (changed[8] + 1) % 97
    first, second = logits_of(model, [document]), logits_of(model, [changed])
    assert torch.equal(first[:8], second[:8]) and not torch.isclose(first[8:], second[8:]).all(dim=1).any()


def test_rotate_by_hand():
    """Head size 4, theta 100: pairs (0, 2) and (1, 3) turn by 1 and 1/10 radian per position. At position 2
    pair (1, 0) becomes (cos 2, sin 2) and pair (0, 1) becomes (-sin 0.2, cos 0.2)."""
    config = tiny_config(head_dim=4, rope_theta=100.0)
    angles = torch.tensor([[[2.0]]]) * rope_frequencies(config, torch.device("cpu"))
    out = reference.rotate(torch.tensor([[[1.0, 0.0, 0.0, 1.0]]]), angles.cos(), angles.sin())
    two, fifth = torch.tensor(2.0), torch.tensor(0.2)
    torch.testing.assert_close(out.flatten(), torch.stack([two.cos(), -fifth.sin(), two.sin(), fifth.cos()]))


def test_reference_attention_gives_the_same_model(monkeypatch):
    model = random_llama(tiny_config())
    fast = logits_of(model, DOCUMENTS)
    monkeypatch.setattr(
        "model.attention", lambda *inputs, shared, kernel: reference.attention(*inputs, shared)
    )
    slow = logits_of(model, DOCUMENTS)
    assert (fast - slow).abs().max() <= 1e-5 * slow.abs().max()


def test_init_weights_are_the_same_for_the_same_seed():
    models = [
        random_llama(tiny_config(qkv_bias=True), seed=seed) for seed in (1, 2)
    ]  # whatever was there before
    for model in models:
        model.init_weights(7)
    first, second = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (
        first["model.norm.weight"].eq(1).all() and first["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
    )
    assert 0.018 < first["lm_head.weight"].std() < 0.022
    assert 0.007 < first["model.layers.1.mlp.down_proj.weight"].std() < 0.0095  # 0.02 / sqrt(2 * 3) = 0.0082


def test_flops_by_hand():
    """D 8, inner 16, 2 query heads and 1 key/value head of 4, V 10, 1 layer, 3 tokens. Matmul weights: q, o
    8x8 each, k, v 8x4 each, three 8x16: 576 per layer; lm_head 80. 2 * 3 * (576 + 80) = 3,936. Attention: 6
    visible pairs, 4 * 2 heads * 4 = 32 each: 192."""
    config = tiny_config(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=10,
                         num_hidden_layers=1)  # fmt: skip
    assert config.flops(3) == 3936 + 192
    assert config.flops(3, logits=1) == 3936 + 192 - 2 * 2 * 80  # logits of one position only
    model = random_llama(config)
    assert training_flops(model, 1000, 100, tokens=3) == 3000
    apply_lora(
        model, rank=2, alpha=2.0, targets=("q_proj", "k_proj")
    )  # A 2x8 and B 8x2, A 2x8 and B 4x2: 56 weights
    assert training_flops(model, 1000, 100, tokens=3) == 2000 + 100 + 6 * 56 * 3


def without_products(q, k, v, *_, **__):
    """In the place of attention: as dependent on queries, keys and values, and of no product."""
    return q + (k + v).repeat_interleave(q.shape[1] // k.shape[1], dim=1)


@pytest.mark.slow  # the counter imports a compiler
def test_flops_are_those_that_torch_counts(monkeypatch):
    """Forward, and forward with backward. Attention stands aside: torch counts it without the causal half,
    and not on CPUs.
    """
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr("model.attention", without_products)
    llama, length = random_llama(tiny_config()), 11
    batch = stream([torch.arange(length)])
    with FlopCounterMode(display=False) as forward:
        logits = llama(*batch) @ llama.lm_head.weight.T
    expected = llama.config.flops(length) - llama.config.attention_flops(length)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert expected + backward.get_total_flops() == training_flops(llama, expected, 0, tokens=length)


@pytest.mark.slow
@pytest.mark.parametrize("lora", (False, True))
def test_flops_of_attention_are_three_forwards_also_under_lora(monkeypatch, lora):
    """Of one document, in plain products, which torch counts without the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    def products(q, k, v, *_, **__):  # (T, H, K), (T, G, K)
        q, k, v = (x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], dim=0) for x in (q, k, v))
        return (q @ k.transpose(1, 2) @ v).transpose(0, 1)

    def counted(attention):
        monkeypatch.setattr("model.attention", attention)
        with FlopCounterMode(display=False) as counter:
            (llama(*stream([torch.arange(11)])) @ llama.lm_head.weight.T).sum().backward()
        return counter.get_total_flops()

    llama = random_llama(tiny_config())
    if lora:
        apply_lora(llama, rank=2, alpha=2.0)
    heads = llama.config.num_attention_heads * llama.config.head_dim
    forward = llama.config.num_hidden_layers * 2 * 2 * 11 * 11 * heads
    added = counted(products) - counted(without_products)
    assert added == training_flops(llama, forward, forward, tokens=0) == 3 * forward


# ---------------------------------------------------------------- recompute


def gradients_and_saved_bytes(mode):
    model = random_llama(tiny_config())
    apply_recompute(model, mode)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nll_sum(model, random_documents(97, (60, 40)))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    loss.backward()
    return gradients(model), sum(size for pointer, size in saved.items() if pointer not in parameters)


@pytest.mark.slow
def test_recompute_gives_the_same_gradients_from_fewer_saved_bytes():
    expected, all_bytes = gradients_and_saved_bytes("none")
    (half, half_bytes), (full, full_bytes) = map(gradients_and_saved_bytes, ("half", "full"))
    assert all(torch.equal(some[name], expected[name]) for name in expected for some in (half, full))
    assert full_bytes < all_bytes / 3 and full_bytes < half_bytes < all_bytes / 1.4  # 2 of the 3 blocks


# ---------------------------------------------------------------- LoRA


@torch.no_grad()
def lora_model(targets=LINEARS, b_std=0.1, **config):
    model = random_llama(tiny_config(**config))
    apply_lora(model, rank=3, alpha=6.0, targets=targets)
    init_lora(model, seed=4)
    generator = torch.Generator().manual_seed(5)
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            param.copy_(torch.randn(param.shape, generator=generator) * b_std)
    return model


def test_lora_starts_from_its_seed():
    first, again, other = (random_llama(tiny_config()) for _ in range(3))
    for model, seed in ((first, 4), (again, 4), (other, 5)):
        apply_lora(model, rank=3, alpha=6.0)
        init_lora(model, seed)
    parts = zip(*(model.named_parameters() for model in (first, again, other)), strict=True)
    for (name, a), (_, b), (_, c) in parts:
        assert torch.equal(a, b) and torch.equal(a, c) == (not name.endswith("lora_A")), name


def test_lora_starts_as_the_identity():
    model, base = lora_model(b_std=0.0), random_llama(tiny_config())
    assert torch.equal(logits_of(model, DOCUMENTS), logits_of(base, DOCUMENTS))
    for p in (
        p for name, p in model.named_parameters() if name.endswith("lora_A")
    ):  # uniform in +-1/sqrt(in), 3 x in numbers
        assert 0.9 < p.abs().max() * p.shape[1] ** 0.5 <= 1


def test_adapters_disabled_is_the_base_bit_for_bit():
    model, base = lora_model(), logits_of(random_llama(tiny_config()), DOCUMENTS)
    with adapters_disabled(model):
        assert torch.equal(logits_of(model, DOCUMENTS), base)
        with adapters_disabled(model):
            pass
        assert torch.equal(logits_of(model, DOCUMENTS), base)  # the inner context gives back what it found
    assert (logits_of(model, DOCUMENTS) - base).abs().max() > 0.1
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert (logits_of(model, DOCUMENTS) - base).abs().max() > 0.1  # back on after an error, too


@pytest.mark.parametrize(
    "config", [{}, {"tie_word_embeddings": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}]
)
def test_merged_equals_unmerged(config):
    model = lora_model(**config)
    expected, base = logits_of(model, DOCUMENTS), random_llama(tiny_config(**config))
    merge_lora(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert model.state_dict().keys() == base.state_dict().keys()
    assert (logits_of(model, DOCUMENTS) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_merge_of_a_bf16_base_rounds_once():
    linear = torch.nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    adapter = LoRALinear(linear, rank=2, alpha=2.0, dropout=0.0)
    torch.nn.init.normal_(adapter.lora_A)
    torch.nn.init.normal_(adapter.lora_B)
    exact = linear.weight.double() + adapter.lora_B.double() @ adapter.lora_A.double()
    assert adapter.merged_weight().dtype == torch.bfloat16 and adapter.lora_A.dtype == torch.float32
    assert ((adapter.merged_weight().double() - exact) / exact).abs().max() <= 1 / 256


@pytest.mark.parametrize("targets", [("q_proj",), ("down_proj", "k_proj"), LINEARS])
def test_lora_targets_by_name(targets):
    model = lora_model(targets)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    parents = {
        name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in targets
    }
    assert trainable == {
        f"model.layers.{i}.{parents[t]}.{t}.lora_{x}" for i in range(3) for t in targets for x in "AB"
    }
    nll_sum(model, DOCUMENTS).backward()
    assert gradients(model).keys() == trainable


@pytest.mark.parametrize("targets", [("q_proj", "qproj"), ("embed_tokens",), ()])
def test_unknown_lora_targets(targets):
    with pytest.raises(ValueError, match="lora_targets=.*expected a choice of q_proj"):
        apply_lora(random_llama(tiny_config()), rank=2, alpha=2.0, targets=targets)


def test_lora_dropout_acts_in_training_only():
    model = random_llama(tiny_config())
    apply_lora(model, rank=3, alpha=6.0, dropout=0.5)
    init_lora(model, seed=4)
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.ones_(param)
    assert not torch.equal(logits_of(model, DOCUMENTS), logits_of(model, DOCUMENTS))
    model.eval()
    assert torch.equal(logits_of(model, DOCUMENTS), logits_of(model, DOCUMENTS))


def test_a_recomputed_block_drops_what_it_dropped():
    grads = []
    for mode in ("none", "full"):
        model = random_llama(tiny_config())
        apply_lora(model, rank=3, alpha=6.0, dropout=0.5)
        init_lora(model, seed=4)
        for name, param in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.constant_(param, 0.1)
        apply_recompute(model, mode)
        torch.manual_seed(0)
        nll_sum(model, DOCUMENTS).backward()
        grads.append(gradients(model))
    assert all(
        torch.equal(*pair) and pair[0].any() for pair in zip(*(g.values() for g in grads), strict=True)
    )


@pytest.mark.parametrize("lora", [False, True])
def test_two_train_mode_forwards_are_bit_equal(lora):
    """CHECKS 8: no dropout while log-probs are compared."""
    model = (lora_model() if lora else random_llama(tiny_config())).train()
    assert torch.equal(logits_of(model, DOCUMENTS), logits_of(model, DOCUMENTS))


# ---------------------------------------------------------------- taps


def steer_layer_1(layer, hidden, amount=1.5):
    """Adds a fixed direction to the residual stream after block 1."""
    return hidden + amount * torch.linspace(-1, 1, hidden.shape[-1]) if layer == 1 else hidden


def test_a_tap_that_changes_nothing_is_bit_identical():
    model = random_llama(tiny_config())
    assert torch.equal(
        logits_of(model, DOCUMENTS, tap=lambda layer, hidden: hidden), logits_of(model, DOCUMENTS)
    )
    assert torch.equal(
        logits_of(model, DOCUMENTS, tap=partial(steer_layer_1, amount=0.0)), logits_of(model, DOCUMENTS)
    )


def test_steering_a_batch_steers_every_document():
    """CHECKS 28: four packed documents = four singles."""
    model = random_llama(tiny_config())
    steered = logits_of(model, DOCUMENTS, tap=steer_layer_1)
    alone = torch.cat([logits_of(model, [document], tap=steer_layer_1) for document in DOCUMENTS])
    assert (steered - alone).abs().max() <= 1e-5 * alone.abs().max()
    change = (steered - logits_of(model, DOCUMENTS)).abs().amax(dim=1)
    assert all(part.min() > 0.1 for part in change.split([len(d) for d in DOCUMENTS]))


def test_a_tap_acts_between_blocks():
    """Replacing the stream after block 0 by another document's gives, from there on, the other document's
    stream.
    """
    model = random_llama(tiny_config())
    one, other = random_documents(97, (6, 6))
    seen = []
    expected = model(*stream([other]), tap=lambda layer, hidden: seen.append(hidden) or hidden)
    patched = model(*stream([one]), tap=lambda layer, hidden: seen[0] if layer == 0 else hidden)
    assert torch.equal(patched, expected)


def test_gradients_flow_through_a_tap():
    model = random_llama(tiny_config())
    vector = torch.zeros(40, requires_grad=True)
    nll_sum(model, DOCUMENTS, tap=lambda layer, hidden: hidden + vector if layer == 1 else hidden).backward()
    assert vector.grad.abs().min() > 0


# ---------------------------------------------------------------- generation

PROMPTS = [d.tolist() for d in random_documents(97, (9, 1, 4, 6), seed=3)]


def chaotic_llama():
    """Weights large enough that greedy text does not settle on one token."""
    return random_llama(tiny_config(), std=0.4)


@torch.no_grad()
def generate_without_cache(model, prompts, max_new_tokens, tap=None):
    """The whole stream again for every token."""
    documents = [torch.tensor(p) for p in prompts]
    for _ in range(max_new_tokens):
        _, _, cu_seqlens, _ = stream(documents)
        last = logits_of(model, documents, tap=tap)[cu_seqlens[1:].long() - 1].argmax(-1)
        documents = [torch.cat((d, token[None])) for d, token in zip(documents, last, strict=True)]
    return [d[len(p) :].tolist() for d, p in zip(documents, prompts, strict=True)]


@pytest.mark.parametrize("tap", [None, steer_layer_1], ids=["plain", "steered"])
def test_generation_is_the_same_without_a_cache(tap):
    """CHECKS 29, over a grid of grouped heads."""
    answers = generate(chaotic_llama(), PROMPTS, max_new_tokens=16, tap=tap)
    assert answers == generate_without_cache(chaotic_llama(), PROMPTS, 16, tap=tap)
    assert len(set(sum(answers, []))) > 15


def test_steering_changes_generation():
    assert generate(chaotic_llama(), PROMPTS, 8) != generate(chaotic_llama(), PROMPTS, 8, tap=steer_layer_1)


def test_generation_of_a_batch_equals_singles():
    model = chaotic_llama()
    assert generate(model, PROMPTS, 12) == [generate(model, [prompt], 12)[0] for prompt in PROMPTS]


def test_generation_stops_after_eos():
    """Each answer ends with its first stop token; the others go on."""
    model = chaotic_llama()
    free = generate(model, PROMPTS, 12)
    stops = (free[0][3], free[1][5])
    answers = generate(model, PROMPTS, 12, eos_id=stops)
    for answer, full in zip(answers, free, strict=True):
        end = next((i + 1 for i, token in enumerate(full) if token in stops), len(full))
        assert answer == full[:end]
    assert len(answers[0]) <= 4 and max(map(len, answers)) == 12


@pytest.mark.slow
def test_sampling():
    """A seed is repeatable, another differs, and a temperature near 0 is greedy."""
    model = chaotic_llama()
    first = generate(model, PROMPTS, 12, temperature=1.0, seed=1)
    assert (
        first
        == generate(model, PROMPTS, 12, temperature=1.0, seed=1)
        != generate(model, PROMPTS, 12, temperature=1.0, seed=2)
    )
    assert generate(model, PROMPTS, 12, temperature=1e-4, seed=1) == generate(model, PROMPTS, 12)
