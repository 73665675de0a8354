"""Gemma 2 against transformers' on random weights: logits, hidden states, log-probs, generation; folders, and
what it refuses.
"""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from tiny_models import next_token_targets, random_documents, stream
from torch.nn.functional import log_softmax
from world import WORDS, write_rows

import steer
from analysis.behaviour import final_logits
from analysis.steering import document_logps, packed_batches
from families import load_pretrained
from families.gemma import Gemma, GemmaConfig
from kernels import IGNORE_INDEX, reference, token_logps
from model import generate, next_logits
from plumbing.tokenizer import Tokenizer
from plumbing.weights import save_pretrained

pytestmark = pytest.mark.slow

# a head of 10 is not D / H; windows of 5 are shorter than every document but the smallest
SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=10, query_pre_attn_scalar=7, sliding_window=5, max_position_embeddings=128, attn_logit_softcapping=2.0,
             final_logit_softcapping=3.0, bos_token_id=2, eos_token_id=1, pad_token_id=0)  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}  # fmt: skip
GRID = {
    "gemma-2": {},
    "no-caps": dict(attn_logit_softcapping=None, final_logit_softcapping=None),
    "no-window": dict(layer_types=["full_attention"] * 3),
    "other-layers": dict(
        layer_types=["full_attention", "sliding_attention", "sliding_attention"], sliding_window=2
    ),
    "biases-untied": dict(attention_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-2),
    "ungrouped-rope": dict(num_key_value_heads=4, rope_parameters=LLAMA3_ROPE),
}
DOCUMENTS = random_documents(97, (40, 1, 17, 2))
# google/gemma-2-9b's config.json as published, smaller
PUBLISHED = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
    "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
    "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def oracle():
    """Imported when a test here runs, not when tests are collected."""
    global transformers
    transformers = pytest.importorskip("transformers")


def theirs_of(name="gemma-2", std=0.2):
    """A transformers model with every parameter random; norms' weights are w of 1 + w."""
    config = transformers.Gemma2Config(**SHAPE | GRID[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * std)
    return model


def ours_of(theirs, directory):
    """Our model from the config.json that transformers writes, with the same weights under the same names."""
    theirs.config.save_pretrained(directory)
    model = Gemma(GemmaConfig.from_hf(directory))
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


# ---------------------------------------------------------------- the same numbers


@torch.no_grad()
@pytest.mark.parametrize("name", GRID)
def test_logits(name, tmp_path):
    """To 1e-5 where logits are within 3 (1e-4 where nothing caps them), each document alone and all
    packed.
    """
    theirs = theirs_of(name)
    ours = ours_of(theirs, tmp_path)
    expected = [theirs(document[None]).logits[0] for document in DOCUMENTS]
    bound = 1e-4 if name == "no-caps" else 1e-5
    assert expected[0].std() > 0.5
    for document, logits in zip(DOCUMENTS, expected, strict=True):
        assert (next_logits(ours, ours(*stream([document]))) - logits).abs().max() < bound
    assert (next_logits(ours, ours(*stream(DOCUMENTS))) - torch.cat(expected)).abs().max() < bound


@torch.no_grad()
def test_every_switch_matters(tmp_path):
    """Caps, windows and the scalar change these logits by more than 0.01: the test above would see a switch
    that is not read.
    """
    theirs = theirs_of()
    ours = ours_of(theirs, tmp_path)
    logits = next_logits(ours, ours(*stream(DOCUMENTS)))
    for key in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "sliding_window",
        "query_pre_attn_scalar",
    ):
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/config.json").write_text(json.dumps(raw | {key: 9}))
        other = Gemma(GemmaConfig.from_hf(tmp_path / "other"))
        other.load_state_dict(ours.state_dict())
        assert (next_logits(other, other(*stream(DOCUMENTS))) - logits).abs().max() > 0.01, key


@torch.no_grad()
def test_bf16_is_as_near_as_bf16_is(tmp_path):
    """sqrt(48) = 6.9282 is 6.9375 in bf16, and transformers multiplies by that: its own float32 logits are no
    nearer to its bf16 ones.
    """
    theirs = theirs_of()
    exact = theirs(DOCUMENTS[0][None]).logits[0]
    ours = ours_of(theirs, tmp_path).bfloat16()
    rounded = theirs.bfloat16()(DOCUMENTS[0][None]).logits[0].float()
    embedded = []
    ours(*stream(DOCUMENTS[:1]), tap=lambda layer, hidden: embedded.append(hidden) or hidden)
    hidden_states = theirs(DOCUMENTS[0][None], output_hidden_states=True).hidden_states
    scaled = ours.model.embed_tokens(DOCUMENTS[0]) * torch.tensor(6.9375, dtype=torch.bfloat16)
    assert torch.equal(scaled, hidden_states[0][0])
    found = next_logits(ours, ours(*stream(DOCUMENTS[:1])))
    assert (found - rounded).square().mean() < 1.5 * (exact - rounded).square().mean()


@torch.no_grad()
def test_tap_sees_transformers_hidden_states_and_resume_is_bitwise(tmp_path):
    theirs = theirs_of()
    ours = ours_of(theirs, tmp_path)
    expected = theirs(DOCUMENTS[0][None], output_hidden_states=True).hidden_states
    seen = []
    output = ours(*stream(DOCUMENTS[:1]), tap=lambda layer, hidden: seen.append(hidden) or hidden)
    assert len(seen) == 3
    for layer in (0, 1):
        assert (seen[layer] - expected[layer + 1][0]).abs().max() < 1e-4
    assert (output - expected[-1][0]).abs().max() < 1e-4
    for first in (1, 2, 3):
        assert torch.equal(ours(*stream(DOCUMENTS[:1]), resume=(first, seen[first - 1])), output)


@torch.no_grad()
def test_log_probs_and_logits_of_the_analysis_are_capped(tmp_path):
    """token_logps, document_logps and final_logits beside log-softmax of transformers' logits."""
    theirs = theirs_of()
    ours = ours_of(theirs, tmp_path)
    documents = [(document.numpy(), np.ones(len(document), dtype=bool)) for document in DOCUMENTS[::2]]
    ((_, batch),) = packed_batches(documents, "cpu")
    sums, counts = document_logps(ours, batch)
    logits = final_logits(ours, documents)
    for n, document in enumerate(DOCUMENTS[::2]):
        expected = theirs(document[None]).logits[0]
        picked = log_softmax(expected[:-1], -1).gather(1, document[1:, None]).sum()
        assert counts[n] == len(document) - 1 and abs(sums[n] - picked) < 1e-4
        assert (logits[n] - expected[: len(logits[n])]).abs().max() < 1e-5
    hidden, targets = ours(*stream(DOCUMENTS)), next_token_targets(DOCUMENTS)
    capped = reference.soft_cap(hidden @ ours.lm_head.weight.T, 3.0).log_softmax(-1)
    found = token_logps(hidden, ours.lm_head.weight, targets, chunk=7, soft_cap=3.0)
    picked = capped.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(targets == IGNORE_INDEX, 0)
    assert (found - picked).abs().max() < 1e-5


def test_soft_cap_by_hand():
    """3 tanh(3 / 3) = 2.2848; no cap is no change."""
    x = torch.tensor([0.0, 3.0, -300.0])
    assert torch.allclose(reference.soft_cap(x, 3.0), torch.tensor([0.0, 2.2848, -3.0]), atol=1e-4)
    assert reference.soft_cap(x, None) is x


def test_generation_greedy_and_sampled(tmp_path):
    """Prompts shorter and longer than the window. A temperature of 1 samples from the capped distribution, as
    without a cache.
    """
    theirs = theirs_of("biases-untied", std=0.4)
    ours = ours_of(theirs, tmp_path)
    prompts = random_documents(97, (9, 1, 17))
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = [
        theirs.generate(p[None], attention_mask=torch.ones_like(p[None]), **options)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert generate(ours, [p.tolist() for p in prompts], max_new_tokens=12) == expected
    assert len(set(sum(expected, []))) > 8  # not one token over and over

    (answer,) = generate(ours, [prompts[0].tolist()], 6, temperature=1.0, seed=3)
    document, generator = prompts[0], torch.Generator().manual_seed(3)
    for token in answer:
        with torch.no_grad():
            logits = theirs(document[None]).logits[0, -1:]
        assert torch.multinomial(logits.softmax(-1), 1, generator=generator).item() == token
        document = torch.cat((document, torch.tensor([token])))


# ---------------------------------------------------------------- folders


@torch.no_grad()
def test_a_folder_of_transformers_is_loaded_and_not_trained(world, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.Gemma2Config(**SHAPE | dict(vocab_size=512))
    )
    folder = tmp_path / "gemma"
    theirs.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((world / "base" / name).read_bytes())
    ours, tokenizer = load_pretrained(folder)
    assert isinstance(ours, Gemma) and ours.lm_head.weight is ours.model.embed_tokens.weight
    assert (
        next_logits(ours, ours(*stream(DOCUMENTS[:1]))) - theirs.eval()(DOCUMENTS[0][None]).logits[0]
    ).abs().max() < 1e-4
    with pytest.raises(ValueError, match="model_type='gemma2': inference only"):
        save_pretrained(ours, tokenizer, tmp_path / "out")


def test_extract_and_sweep(world, tmp_path, monkeypatch):
    """A pair of folders from transformers through both commands, to aqi.json."""
    monkeypatch.setattr(steer, "_plot", lambda *_: None)
    rng, argv = random.Random(0), []
    for name in ("sft", "dpo"):
        shutil.copytree(world / "base", tmp_path / name)
        shape = SHAPE | dict(vocab_size=Tokenizer.from_dir(world / "base").vocab_size)
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**shape))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in theirs.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * (0.2 if name == "sft" else 0.21))
        theirs.save_pretrained(tmp_path / name)
        argv.append(f"{tmp_path}/{name}")
    texts = []
    for asked in WORDS[:12]:
        turns = f"\n\nHuman: {asked}\n\nAssistant:"
        texts.append({side: f"{turns} {rng.choice(WORDS)}" for side in ("chosen", "rejected")})
    write_rows(tmp_path / "texts.jsonl", texts)
    rows = [
        f"calm,{label},{word} {rng.choice(WORDS)} {i}"
        for label, word in (("unsafe", "bad"), ("safe", "good"))
        for i in range(4)
    ]
    (tmp_path / "prompts.csv").write_text("\n".join(["axiom,safety_label,input", *rows]))
    steer.main(
        ["extract", *argv, f"--texts={tmp_path}/texts.jsonl", f"--out_dir={tmp_path}/steer", "--count=8"]
    )
    steer.main(
        [
            "sweep",
            f"{tmp_path}/steer",
            f"--prompts={tmp_path}/prompts.csv",
            "--layers=2",
            "--max_new_tokens=4",
        ]
    )
    (path,) = tmp_path.glob("steer/**/aqi.json")
    report = json.loads(path.read_text())
    assert (
        report["inputs"]["lambdas"] == [0.0, 0.25, 0.5, 0.75, 1.0]
        and report["verdicts"][0]["category"] == "overall"
    )
    assert report["shifts"]


def test_gemma_2_9b_has_transformers_shapes(tmp_path):
    """The published config.json: 9,241,705,984 parameters, every name and shape as transformers', and its
    defaults.
    """
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config, others = GemmaConfig.from_hf(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        ours, theirs = Gemma(config), transformers.AutoModelForCausalLM.from_config(others)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert sum(p.numel() for p in ours.parameters()) == 9_241_705_984
    for key in set(GemmaConfig.__dataclass_fields__) - {"rope_theta", "rope_scaling", "layer_types"}:
        assert getattr(config, key) == getattr(others, key), key
    windows = [4096 if kind == "sliding_attention" else None for kind in others.layer_types]
    assert [config.window(layer) for layer in range(42)] == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu': expected 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True: expected None"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: expected 0.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*: expected None"),
        ({"model_type": "gemma3"}, "model_type='gemma3': expected 'gemma2'"),
        ({"head_dim": None}, "head_dim: missing"),
        ({"sliding_window": None}, "sliding_window=None: expected a number of tokens"),
        ({"head_dim": 9}, "head_dim=9: expected .* an even head size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3, .*: expected a multiple"),
        (
            {"layer_types": ["full_attention"]},
            "layer_types=.*: expected sliding_attention or full_attention for each",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: rope_type='yarn'"),
    ],
)
def test_config_refusals(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changes))
    with pytest.raises(ValueError, match=message) as caught:
        GemmaConfig.from_hf(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
