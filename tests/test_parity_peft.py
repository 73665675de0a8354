"""Our LoRA against peft's: the same A and B give the same logits, the same adapter gradients and the same
merged weights.
"""

import pytest
import torch
from tiny_models import (
    next_token_targets,
    nll_sum,
    random_documents,
    random_llama,
    relative_error,
    stream,
    tiny_config,
)

from model import LINEARS, LoRALinear, apply_lora, merge_lora
from plumbing.adapters import merge_adapter

pytestmark = pytest.mark.slow

RANK, ALPHA = 3, 7.0  # alpha / rank is not a round number
DOCUMENTS = random_documents(97, (21, 1, 9))


@pytest.fixture(scope="module", autouse=True)
def oracle():
    """Imported when a test here runs, not when tests are collected."""
    global peft, transformers
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")


def pair(targets, **config):
    """(ours, peft's) with the same base weights and the same random A and B on `targets`."""
    ours = random_llama(tiny_config(**config))
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**ours.config.to_hf())
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    options = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(theirs, options)
    apply_lora(ours, RANK, ALPHA, targets=targets)
    generator = torch.Generator().manual_seed(5)
    ours_by_name = dict(ours.named_parameters())
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_" in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
                ours_by_name[our_name(name)].copy_(param)
    return ours, theirs


def our_name(name):
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def logits_of(ours):
    return ours(*stream(DOCUMENTS)) @ ours.lm_head.weight.T


def their_logits(theirs):
    return torch.cat([theirs(document[None]).logits[0] for document in DOCUMENTS])


@pytest.mark.parametrize("targets", [LINEARS, ("q_proj", "v_proj"), ("down_proj",)], ids=" ".join)
def test_logits_and_adapter_gradients(targets):
    ours, theirs = pair(targets)
    logits = their_logits(theirs)
    assert (logits_of(ours) - logits).abs().max() < 1e-4
    with theirs.disable_adapter():
        assert (logits - their_logits(theirs)).abs().max() > 0.1  # the adapters do something

    torch.nn.functional.cross_entropy(logits, next_token_targets(DOCUMENTS), reduction="sum").backward()
    nll_sum(ours, DOCUMENTS).backward()
    expected = {our_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys() and len(grads) == 2 * 3 * len(targets)  # A and B, 3 blocks
    assert max(relative_error(grads[name], expected[name]) for name in grads) < 1e-4


@pytest.mark.parametrize(
    "init, fits",
    [
        (True, True),
        ("gaussian", True),
        ("orthogonal", True),
        ("mica", True),
        ("pissa", False),
        ("olora", False),
    ],
)
@torch.no_grad()
def test_adapters_of_every_initialisation(init, fits, tmp_path):
    """PiSSA and OLoRA take B A off the base's weights before training: on the weights of the file their
    adapters are another model.
    """
    ours = random_llama(tiny_config())
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**ours.config.to_hf())
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs = peft.get_peft_model(
        theirs,
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=init),
    )
    for param in (param for name, param in theirs.named_parameters() if "lora_" in name):
        param.add_(0.1)  # as if trained
    theirs.save_pretrained(tmp_path)
    if not fits:
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
            merge_adapter(ours, tmp_path)
        return
    merge_adapter(ours, tmp_path)
    assert (logits_of(ours) - their_logits(theirs)).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "v_proj"], use_rslora=True),
        dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        dict(
            target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head", "1.mlp", "norm"]
        ),  # every norm
        dict(target_modules="all-linear", exclude_modules=["k_proj", "1.mlp.up_proj"]),
        dict(target_modules=["model.layers.1.mlp.up_proj", "self_attn.k_proj"]),
        dict(target_modules=["up_proj", "q_proj"], layers_to_transform=[0, 2]),
        dict(
            target_modules=r"model\.layers\.[01]\..*_proj",
            rank_pattern={"v_proj": 2},
            alpha_pattern={"1.self_attn.k_proj": 5},
        ),
    ],
    ids=lambda options: " ".join(options),
)
@torch.no_grad()
def test_adapters_that_people_have(options, tmp_path):
    """peft's own model and its folder merged by us: equal logits."""
    ours = random_llama(tiny_config())
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**ours.config.to_hf())
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(3)
    for param in theirs.parameters():
        if param.requires_grad:
            param.add_(torch.randn(param.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path)
    before, expected = logits_of(ours), their_logits(theirs)
    merge_adapter(ours, tmp_path)
    assert (expected - before).abs().max() > 0.5
    assert (logits_of(ours) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": True}, {"qkv_bias": True, "o_bias": True}],
    ids=["plain", "tied", "biases"],
)
def test_merged_weights(config):
    ours, theirs = pair(LINEARS, **config)
    merge_lora(ours)
    expected = theirs.merge_and_unload().state_dict()
    assert not any(isinstance(module, LoRALinear) for module in ours.modules())
    assert ours.state_dict().keys() == expected.keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
