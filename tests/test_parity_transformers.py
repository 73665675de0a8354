"""Our Llama against transformers' on random float32 weights: logits, gradients, hidden states, greedy
generation, config.json both ways.
"""

import json

import pytest
import torch
from tiny_models import (
    gradients,
    next_token_targets,
    nll_sum,
    random_documents,
    random_llama,
    relative_error,
    stream,
)

from model import Llama, LlamaConfig, generate

pytestmark = pytest.mark.slow

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128, rms_norm_eps=1e-5)  # fmt: skip
# an original context of 16 positions: documents of 40 tokens reach past it, and a head of 12 has kept,
# blended and stretched frequencies
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}  # fmt: skip
FAMILIES = {
    "llama-2": ("llama", dict(num_key_value_heads=4)),
    "llama-3": ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})),
    "llama-3.1": ("llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama-3.2": ("llama", dict(rope_parameters=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True)),
    "smollm2": ("llama", dict(num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-head-dim": ("llama", dict(head_dim=20, rms_norm_eps=1e-2)),  # 4 heads of 20 in a stream of 48
    "mistral": ("mistral", dict(sliding_window=None)),
    "zephyr": (
        "mistral",
        dict(sliding_window=40),
    ),  # as long as the longest document: not one position is masked by the window
    "mistral-head-dim": ("mistral", dict(sliding_window=None, head_dim=8)),
    "qwen2": ("qwen2", dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=40, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=20, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3-tied": ("qwen3", dict(head_dim=12, tie_word_embeddings=True, rms_norm_eps=1e-2)),
    "qwen3-biases": ("qwen3", dict(head_dim=12, attention_bias=True)),
    "qwen3-window": (
        "qwen3",
        dict(head_dim=12, use_sliding_window=True, sliding_window=40, max_window_layers=1),
    ),
    "olmo2": (
        "olmo2",
        dict(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    ),
    "olmo2-grouped": ("olmo2", dict(rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-2)),
    "olmo2-biases": ("olmo2", dict(attention_bias=True, tie_word_embeddings=True)),
    "olmo3": ("olmo3", dict(num_hidden_layers=4, sliding_window=40)),
}
OTHERS_DEFAULTS = dict(
    pad_token_id=None, eos_token_id=None
)  # an OLMo pads with token 1, whose embedding then has no gradient there
LENGTHS = (40, 1, 17, 2)


@pytest.fixture(scope="module", autouse=True)
def oracle():
    """Imported when a test here runs, not when tests are collected."""
    global transformers
    transformers = pytest.importorskip("transformers")


def theirs_of(name, std=0.2):
    """A transformers model with every parameter random, biases and norms too."""
    model_type, changes = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **SHAPE | OTHERS_DEFAULTS | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(
                torch.randn(param.shape, generator=generator) * std + (1.0 if param.ndim == 1 else 0.0)
            )
    return model


def ours_of(theirs, directory):
    """Our model from the config.json that transformers writes, with the same weights under the same names."""
    theirs.config.save_pretrained(directory)
    model = Llama(LlamaConfig.from_hf(directory))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def logits_of(model, documents):
    return model(*stream(documents)) @ model.lm_head.weight.T


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients(name, tmp_path):
    """Logits to 1e-4, each document alone and all packed; gradients of the summed token NLL of the packed
    stream to 1e-4 of their size.
    """
    theirs = theirs_of(name)
    ours = ours_of(theirs, tmp_path)
    documents = random_documents(SHAPE["vocab_size"], LENGTHS)
    expected = [theirs(document[None]).logits[0] for document in documents]
    assert expected[0].std() > 0.5  # or 1e-4 would be no test
    for document, logits in zip(documents, expected, strict=True):
        assert (logits_of(ours, [document]) - logits).abs().max() < 1e-4
    assert (logits_of(ours, documents) - torch.cat(expected)).abs().max() < 1e-4

    torch.nn.functional.cross_entropy(
        torch.cat(expected), next_token_targets(documents), reduction="sum"
    ).backward()
    nll_sum(ours, documents).backward()
    grads, expected_grads = gradients(ours), gradients(theirs)
    assert grads.keys() == expected_grads.keys() == dict(ours.named_parameters()).keys()
    assert max(relative_error(grads[key], expected_grads[key]) for key in grads) < 1e-4


def test_the_rope_scaling_matters(tmp_path):
    """Guards the grid above: without Llama 3.1's scaling the same weights give other logits."""
    ours = ours_of(theirs_of("llama-3.1"), tmp_path)
    plain = Llama(LlamaConfig(**vars(ours.config) | {"rope_scaling": None}))
    plain.load_state_dict(ours.state_dict(), strict=True)
    documents = random_documents(SHAPE["vocab_size"], LENGTHS)
    assert (logits_of(ours, documents) - logits_of(plain, documents)).abs().max() > 0.1


def test_llama_31_frequencies_equal_transformers():
    """The real numbers: head size 128, theta 500,000, 8,192 original positions, factor 8."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from model import rope_frequencies

    config = LlamaConfig.preset("llama-3.1-8b")
    theirs = transformers.LlamaConfig(
        **{key: value for key, value in config.to_hf().items() if key != "architectures"}
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    torch.testing.assert_close(rope_frequencies(config, torch.device("cpu")), expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- config.json

LLAMA_31_TRANSFORMERS_4 = {  # meta-llama/Llama-3.1-8B's config.json as published, smaller
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3],
    "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 56, "max_position_embeddings": 128,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
    "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_type": "llama3"}, "rope_theta": 1000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 97,
}  # fmt: skip
LLAMA_1_TRANSFORMERS_4 = {  # the oldest spelling: no rope keys, no key/value heads, no head size
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_scaling": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "raw", [LLAMA_31_TRANSFORMERS_4, LLAMA_1_TRANSFORMERS_4], ids=["llama-3.1", "llama-1"]
)
def test_config_of_transformers_4(raw, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = random_llama(LlamaConfig.from_hf(tmp_path))
    theirs = (
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
        .float()
        .eval()
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    (document,) = random_documents(97, (40,))
    assert (logits_of(ours, [document]) - theirs(document[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name, default", [("mistral", 4096), ("qwen2-window", 4096), ("qwen2", None)])
def test_a_window_that_config_json_does_not_state(name, default, tmp_path):
    """A Mistral has one of 4,096 tokens unless its file says null; so has a Qwen2 that uses one."""
    theirs_of(name).config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["sliding_window"]
    raw.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert (
        LlamaConfig.from_hf(tmp_path).sliding_window
        == transformers.AutoConfig.from_pretrained(tmp_path).sliding_window
        == default
    )


def test_transformers_4_and_5_spell_the_same_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_TRANSFORMERS_4))
    old = LlamaConfig.from_hf(tmp_path)
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    assert LlamaConfig.from_hf(tmp_path) == old
    assert old.rope_theta == 1000.0 and old.rope_scaling.factor == 8.0 and old.eos_token_id == (2, 3)


@pytest.mark.parametrize(
    "model_type, switched_on", [("mistral", {}), ("qwen2", {"use_sliding_window": True}), ("olmo3", {})]
)
def test_a_window_that_config_json_leaves_out(model_type, switched_on, tmp_path):
    """It is transformers' default, not none: a document that is longer would silently be read without the
    window.
    """
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA_1_TRANSFORMERS_4 | {"model_type": model_type, **switched_on})
    )
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert LlamaConfig.from_hf(tmp_path).sliding_window == theirs.sliding_window == 4096


@pytest.mark.parametrize("name", FAMILIES)
def test_config_to_hf(name, tmp_path):
    """Our config.json read back by us is the same config, and transformers builds the same model from it."""
    original = theirs_of(name)
    ours = ours_of(original, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(ours.config.to_hf()))
    assert LlamaConfig.from_hf(tmp_path) == ours.config
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert getattr(config, "layer_types", None) == getattr(original.config, "layer_types", None)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert [type(theirs).__name__] == config.architectures
    theirs.load_state_dict(ours.state_dict(), strict=True)
    (document,) = random_documents(97, (40,))
    assert (logits_of(ours, [document]) - theirs(document[None]).logits[0]).abs().max() < 1e-4


# ---------------------------------------------------------------- taps and generation


@pytest.mark.parametrize("name", ["llama-3.1", "qwen3", "olmo2"])
def test_tap_sees_transformers_hidden_states(name, tmp_path):
    """hidden_states is (embedding, after block 1, ..., after block L-1, after block L and the norm)."""
    theirs = theirs_of(name)
    ours = ours_of(theirs, tmp_path)
    (document,) = random_documents(97, (40,))
    expected = theirs(document[None], output_hidden_states=True).hidden_states
    seen = {}
    output = ours(*stream([document]), tap=lambda layer, hidden: seen.setdefault(layer, hidden))
    assert list(seen) == [0, 1, 2] and len(expected) == 4
    for layer in (0, 1):
        assert (seen[layer] - expected[layer + 1][0]).abs().max() < 1e-4
    assert (ours.model.norm(seen[2]) - expected[-1][0]).abs().max() < 1e-4
    assert (output - expected[-1][0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama-3.1", "mistral", "qwen2", "qwen3", "olmo2", "olmo3"])
def test_greedy_generation(name, tmp_path):
    theirs = theirs_of(name, std=0.4)
    ours = ours_of(theirs, tmp_path)
    prompts = random_documents(97, (9, 1, 17))
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = [
        theirs.generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert generate(ours, [p.tolist() for p in prompts], max_new_tokens=20) == expected
    assert len(set(sum(expected, []))) > 10  # not one token over and over


def test_presets_build_in_transformers():
    """The published shapes: parameter counts of the model cards."""
    counts = {"llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "mistral-7b": 7_241_732_096}
    for name, count in counts.items():
        config = LlamaConfig.preset(name)
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**config.to_hf())
            )
            ours = Llama(config)
        assert (
            sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == count
        )
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
