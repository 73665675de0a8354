"""Qwen3 and OLMo 2, whose norms differ from Llama's, through whole runs: tests/test_parity_transformers.py
has their logits.
"""

import shutil
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import OLMO2, QWEN3, random_documents, random_llama, stream, tiny_config
from world import final_weights, launch, metrics, save_at_once, write_config, write_model

from families import load_model, load_pretrained
from plumbing.tokenizer import Tokenizer
from plumbing.weights import save_pretrained

KINDS = {
    "qwen3": QWEN3 | dict(tie_word_embeddings=True),
    "olmo2": OLMO2,
}
LORA = dict(lora_rank=4, lora_alpha=8.0)


@pytest.fixture(params=KINDS)
def base(request, world, tmp_path):
    """A folder with a random model of the kind and the world's tokenizer."""
    shutil.copytree(world / "base", tmp_path / "base")
    rows = Tokenizer.from_dir(tmp_path / "base").vocab_size
    write_model(
        tmp_path / "base",
        random_llama(tiny_config(vocab_size=rows, num_hidden_layers=2, **KINDS[request.param]), std=0.1),
    )
    return tmp_path / "base"


def largest_error(ours, theirs):
    (document,) = random_documents(300, (30,))
    with torch.no_grad():
        logits = ours(*stream([document])) @ ours.lm_head.weight.T
        return (logits - theirs(document[None]).logits[0]).abs().max()


@pytest.mark.slow
def test_an_export_is_what_transformers_reads(base, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_pretrained(base)
    save_pretrained(model, tokenizer, tmp_path / "final")
    assert largest_error(model, AutoModelForCausalLM.from_pretrained(tmp_path / "final")) < 1e-4
    # for extract and sweep
    analysed, _ = load_model(tmp_path / "final")
    assert all(layer.fused for layer in analysed.model.layers)
    assert largest_error(analysed, AutoModelForCausalLM.from_pretrained(tmp_path / "final")) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("lora, ranks", [({}, 2), (LORA, 1)], ids=("full", "lora"))
def test_sft_then_dpo_with_a_resume(base, world, tmp_path, lora, ranks):
    """Both stages train; DPO killed after step 2 ends in the bytes of the uninterrupted run; transformers
    reads what they export.
    """
    from transformers import AutoModelForCausalLM

    keys = dict(model_path=str(base), **lora)
    config = write_config(tmp_path, world, **keys, dpo=dict(model_path=f"{tmp_path}/sft/final", save_every=2))
    launch("sft", config, ranks=ranks).ok()
    losses = [line["loss"] for line in metrics(tmp_path / "sft")]
    assert losses[-1] < losses[0] - 0.1
    trained, before = final_weights(tmp_path / "sft"), load_file(base / "model.safetensors")
    is_moved = {name: not torch.equal(trained[name], before[name]) for name in before}
    assert all(is_moved.values()) if not lora else not is_moved["model.layers.0.self_attn.q_norm.weight"]

    assert set(launch("dpo", config, ranks=ranks, prepare=partial(save_at_once, kill_after=2)).codes) <= {
        -signal.SIGKILL,
        1,
    }
    launch("dpo", config, ranks=ranks).ok()
    resumed = final_weights(tmp_path / "dpo")
    launch("dpo", config, "--fresh", ranks=ranks).ok()
    whole = final_weights(tmp_path / "dpo")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    ours, _ = load_pretrained(tmp_path / "dpo/final")
    assert largest_error(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "dpo/final")) < 1e-4
