"""Falcon against transformers' on random float32 weights: logits, hidden states, generation, folders; and
what it refuses.
"""

import json

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_documents, stream

from families import load_pretrained
from families.falcon import Falcon, FalconConfig
from model import apply_lora, generate
from plumbing.weights import save_pretrained

pytestmark = pytest.mark.slow

SHAPE = dict(
    vocab_size=97, hidden_size=60, num_hidden_layers=3, num_attention_heads=5, max_position_embeddings=128
)  # 5 heads of 12
# an original context of 16 positions: documents of 40 tokens reach past it
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}  # fmt: skip
GRID = {
    "falcon-7b": {},
    "untied": dict(tie_word_embeddings=False, layer_norm_epsilon=1e-2),
    "narrow-mlp": dict(ffn_hidden_size=56),
    "one-head": dict(num_attention_heads=1, num_kv_heads=1),
    "theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama3-rope": dict(rope_parameters=LLAMA3_ROPE),
}
DOCUMENTS = random_documents(97, (40, 1, 17, 2))
# tiiuae/falcon-7b's config.json as published, smaller
PUBLISHED = {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0,
    "bias": False, "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size": 60, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "falcon", "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 5,
    "num_hidden_layers": 3, "parallel_attn": True, "torch_dtype": "bfloat16", "transformers_version": "4.27.4", "use_cache": True,
    "vocab_size": 97,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def oracle():
    """Imported when a test here runs, not when tests are collected."""
    global transformers
    transformers = pytest.importorskip("transformers")


def theirs_of(name="falcon-7b", std=0.2):
    """A transformers model with every parameter random, LayerNorm's biases too."""
    config = transformers.FalconConfig(**SHAPE | GRID[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, param in model.named_parameters():
            one = 1.0 if param.ndim == 1 and key.endswith("weight") else 0.0
            param.copy_(torch.randn(param.shape, generator=generator) * std + one)
    return model


def ours_of(theirs, directory):
    """Our model from the config.json that transformers writes, with the same weights under the same names."""
    theirs.config.save_pretrained(directory)
    model = Falcon(FalconConfig.from_hf(directory))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def logits_of(model, documents):
    return model(*stream(documents)) @ model.lm_head.weight.T


@pytest.fixture
def folder(tmp_path):
    """A model folder as transformers writes it, with a tokenizer of 92 tokens."""
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {"<s>": 0, "</s>": 1} | {chr(33 + i): 2 + i for i in range(90)}, unk_token="!"
        )
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "falcon")
    theirs_of().save_pretrained(tmp_path / "falcon")
    return tmp_path / "falcon"


# ---------------------------------------------------------------- the same numbers


@torch.no_grad()
@pytest.mark.parametrize("name", GRID)
def test_logits(name, tmp_path):
    """To 1e-4, each document alone and all packed."""
    theirs = theirs_of(name)
    ours = ours_of(theirs, tmp_path)
    expected = [theirs(document[None]).logits[0] for document in DOCUMENTS]
    assert expected[0].std() > 0.5  # or 1e-4 would be no test
    for document, logits in zip(DOCUMENTS, expected, strict=True):
        assert (logits_of(ours, [document]) - logits).abs().max() < 1e-4
    assert (logits_of(ours, DOCUMENTS) - torch.cat(expected)).abs().max() < 1e-4


@torch.no_grad()
def test_tap_sees_transformers_hidden_states(tmp_path):
    """hidden_states is (embedding, after block 1, ..., after block L-1, after block L and the norm)."""
    theirs = theirs_of()
    ours = ours_of(theirs, tmp_path)
    expected = theirs(DOCUMENTS[0][None], output_hidden_states=True).hidden_states
    seen = {}
    output = ours(*stream(DOCUMENTS[:1]), tap=lambda layer, hidden: seen.setdefault(layer, hidden))
    assert list(seen) == [0, 1, 2] and len(expected) == 4
    for layer in (0, 1):
        assert (seen[layer] - expected[layer + 1][0]).abs().max() < 1e-4
    assert (ours.transformer.ln_f(seen[2]) - expected[-1][0]).abs().max() < 1e-4
    assert (output - expected[-1][0]).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("first", range(4))
def test_resume_equals_the_full_forward_bitwise(first, tmp_path):
    """From the stream that enters any block, or from the last block's output (first = L: the final norm
    alone).
    """
    ours = ours_of(theirs_of(), tmp_path)
    streams = [ours.transformer.word_embeddings(torch.cat(DOCUMENTS))]  # streams[i] enters block i
    expected = ours(*stream(DOCUMENTS), tap=lambda layer, hidden: streams.append(hidden) or hidden)
    seen = []
    output = ours(
        *stream(DOCUMENTS),
        tap=lambda layer, hidden: seen.append(layer) or hidden,
        resume=(first, streams[first]),
    )
    assert torch.equal(output, expected) and seen == list(range(first, 3))


@torch.no_grad()
def test_tap_replaces_the_stream(tmp_path):
    """A shift of the last block's output is a shift of the final norm's input."""
    ours = ours_of(theirs_of(), tmp_path)
    shift = torch.linspace(-1, 1, 60)
    last = []
    ours(*stream(DOCUMENTS), tap=lambda layer, hidden: last.append(hidden) or hidden)
    steered = ours(*stream(DOCUMENTS), tap=lambda layer, hidden: hidden + shift if layer == 2 else hidden)
    assert torch.equal(steered, ours.transformer.ln_f(last[2] + shift))


def test_greedy_generation(tmp_path):
    theirs = theirs_of(std=0.4)
    ours = ours_of(theirs, tmp_path)
    prompts = random_documents(97, (9, 1, 17))
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = [
        theirs.generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert generate(ours, [p.tolist() for p in prompts], max_new_tokens=20) == expected
    assert len(set(sum(expected, []))) > 10  # not one token over and over


# ---------------------------------------------------------------- folders


@torch.no_grad()
def test_load_pretrained_reads_what_transformers_wrote(folder):
    ours, tokenizer = load_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert isinstance(ours, Falcon) and tokenizer.vocab_size == 92
    assert ours.lm_head.weight is ours.transformer.word_embeddings.weight
    for document in DOCUMENTS:
        assert (logits_of(ours, [document]) - theirs(document[None]).logits[0]).abs().max() < 1e-4


def test_tied_weights_under_either_name_or_both(folder):
    file = folder / "model.safetensors"
    embedding = load_file(file)["transformer.word_embeddings.weight"]
    for names in (["lm_head.weight"], ["lm_head.weight", "transformer.word_embeddings.weight"]):
        others = {
            name: tensor
            for name, tensor in load_file(file).items()
            if name != "transformer.word_embeddings.weight"
        }
        save_file(others | {name: embedding.clone() for name in names}, file)
        model, _ = load_pretrained(folder)
        assert model.lm_head.weight is model.transformer.word_embeddings.weight and torch.equal(
            model.lm_head.weight, embedding
        )
    save_file(load_file(file) | {"lm_head.weight": embedding + 1e-3}, file)
    with pytest.raises(ValueError, match="lm_head.weight differs from transformer.word_embeddings.weight"):
        load_pretrained(folder)


def test_published_config(tmp_path):
    """Keys that falcon-7b's config.json leaves out have transformers' defaults."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    ours, theirs = FalconConfig.from_hf(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    for key in set(FalconConfig.__dataclass_fields__) - {"rope_theta", "rope_scaling"}:
        assert getattr(ours, key) == getattr(theirs, key), key
    assert (
        theirs.rope_parameters == {"rope_type": "default", "rope_theta": ours.rope_theta}
        and ours.rope_scaling is None
    )
    assert (ours.ffn_hidden_size, ours.head_dim, ours.num_key_value_heads, ours.tie_word_embeddings) == (
        240,
        12,
        1,
        True,
    )


def test_falcon_7b_has_transformers_shapes(tmp_path):
    """The published shape: 6,921,720,704 parameters, every name and shape as transformers'."""
    raw = PUBLISHED | dict(vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        ours = Falcon(FalconConfig.from_hf(tmp_path))
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert (
        sum(p.numel() for p in ours.parameters())
        == sum(p.numel() for p in theirs.parameters())
        == 6_921_720_704
    )


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "RefinedWebModel"}, "model_type='RefinedWebModel': expected 'falcon'"),
        ({"new_decoder_architecture": True}, "new_decoder_architecture=True: expected False"),  # Falcon-40B
        ({"alibi": True}, "alibi=True: expected False"),
        ({"bias": True}, "bias=True: expected False"),
        ({"parallel_attn": False}, "parallel_attn=False: expected True"),
        ({"multi_query": False}, "multi_query=False: expected True"),
        ({"multi_query": None}, "multi_query=None: expected True"),
        ({"activation": "gelu_new"}, "activation='gelu_new': expected 'gelu'"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2: expected None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*: expected None"),
        (
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm=True: expected False",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type='dynamic'"),
        (
            {"n_layer": 2},
            "n_layer=2: expected it renamed to num_hidden_layers",
        ),  # transformers 5 would build num_hidden_layers
        (
            {"n_layer": 2, "num_hidden_layers": None},
            "num_hidden_layers: missing; n_layer=2: expected it renamed",
        ),
        ({"vocab_size": None}, "vocab_size: missing"),
        ({"num_attention_heads": 7}, "hidden_size=60: expected an even head size"),
        ({"num_attention_heads": 4}, "hidden_size=60: expected an even head size"),  # 15
        ({"alibi": True, "bias": True}, "alibi=True: expected False; bias=True: expected False"),
    ],
)
def test_config_refusals(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changes))
    with pytest.raises(ValueError, match=message) as caught:
        FalconConfig.from_hf(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_inference_only(folder, tmp_path):
    model, tokenizer = load_pretrained(folder)
    with pytest.raises(ValueError, match="model_type='falcon': inference only"):
        save_pretrained(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="query_key_value.*expected a choice of"):
        apply_lora(model, rank=4, alpha=8, targets=["query_key_value"])
