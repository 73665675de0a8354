"""An exported model under other people's tools: EleutherAI's lm_eval gives answers the log-probs that
training gives them.
"""

import json

import pytest
import torch

from data import TEMPLATES, encode_chat
from families import load_pretrained
from kernels import token_logps
from packing import pack
from plumbing.weights import save_pretrained

# docs/interop.md shows it as the YAML that the command line reads.
TASK = dict(
    task="pairs",
    dataset_path="json",
    test_split="test",
    output_type="multiple_choice",
    doc_to_text="{{prompt}}",
    doc_to_choice="{{[chosen, rejected]}}",
    doc_to_target=0,  # the chosen answer
    target_delimiter="",  # the template ends where the answer begins
    metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)],
)


@torch.no_grad()
def answer_logp(model, tokenizer, prompt, answer):
    """Summed log-prob of the tokens that lm_eval scores: those that training supervises, but for the end of
    turn, which no choice has, and the newline before them: lm_eval moves white space at the end of a prompt
    to the answer. It weighs on both answers alike."""
    messages = [dict(role="user", content=prompt), dict(role="assistant", content=answer)]
    ids, mask = encode_chat(messages, tokenizer, "tulu", 1 << 20)
    mask[mask.index(True) - 1] = True
    batch = pack([(ids[:-1], mask[:-1])])
    hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    return token_logps(hidden[batch.supervised], model.lm_head.weight, batch.targets).sum().item()


@pytest.mark.slow
def test_lm_eval_scores_pairs_as_training_does(world, tmp_path, monkeypatch):
    """Needs `pip install lm_eval`, which the tests do not: skipped without. Offline, on the CPU."""
    lm_eval = pytest.importorskip(
        "lm_eval", reason="lm_eval is not installed; docs/interop.md has its numbers"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_pretrained(world / "base")
    save_pretrained(model, tokenizer, tmp_path / "final", chat_template=TEMPLATES["tulu"])
    rows = [json.loads(line) for line in (world / "pref.jsonl").read_text().splitlines()]
    task = TASK | dict(dataset_kwargs=dict(data_files=dict(test=str(world / "pref.jsonl"))))
    found = lm_eval.simple_evaluate(
        "hf",
        dict(pretrained=str(tmp_path / "final"), dtype="float32"),
        [task],
        device="cpu",
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["pairs"], key=lambda sample: sample["doc_id"])
    theirs = [[logp for ((logp, _),) in sample["resps"]] for sample in samples]
    ours = [
        [answer_logp(model, tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        for row in rows
    ]
    assert torch.allclose(torch.tensor(theirs), torch.tensor(ours), atol=1e-3) and min(map(min, ours)) < -10
    assert found["results"]["pairs"]["acc,none"] == pytest.approx(
        sum(chosen > rejected for chosen, rejected in ours) / len(ours)
    )
