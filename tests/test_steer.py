"""steer.py: its commands on tiny model folders, what they write, what they skip, and what they refuse."""

import csv
import itertools
import json
import random
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_steering import changed
from tiny_models import random_llama, relative_error, stream, tiny_config
from world import (
    WORDS,
    change_weights,
    killed_before,
    make_world,
    write_model,
    write_rows,
    write_tokenizer,
)

import families
import steer
from analysis import behaviour
from analysis import sweep as sweeps
from analysis import vector as vectors
from analysis.curves import bootstrap, permute
from analysis.nulls import sign_flipped_directions
from analysis.steering import POOLINGS, additions, mean_states, read_states, steering_tap
from analysis.verdict import DECISIONS, judge
from data import encode_chat, load_preferences
from model import apply_lora, init_lora, merge_lora
from packing import pack
from plumbing import adapters, parallel, weights
from plumbing.files import verify_hashes
from plumbing.tokenizer import Tokenizer
from reports import ladder

L, D, COUNT, HELD_OUT = 4, 32, 8, 2
SHORT = ("--max_new_tokens=6",)


def words(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def write_prompts(path, axioms=("calm", "kind"), count=6):
    """Unsafe texts begin with bad, safe ones with good."""
    rng = random.Random(1)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["axiom", "safety_label", "input"])
        for axiom in axioms:
            for label, word in (("unsafe", "bad"), ("safe", "good")):
                writer.writerows([axiom, label, f"{word} {words(rng, 2, 8)}"] for _ in range(count))
    return path


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Folder with sft/, dpo/ and far/ (every weight moved), texts.jsonl, prompts.csv, and steer/, what
    extract made of sft/ and dpo/.
    """
    root, rng = tmp_path_factory.mktemp("lab"), random.Random(0)
    (root / "sft").mkdir()
    write_tokenizer(root / "sft", rng)
    size = dict(hidden_size=D, num_hidden_layers=L, head_dim=8, bos_token_id=0, eos_token_id=1)
    model = random_llama(tiny_config(vocab_size=Tokenizer.from_dir(root / "sft").vocab_size, **size))
    write_model(root / "sft", model)
    for name, size in (("dpo", 0.02), ("far", 0.05)):
        shutil.copytree(root / "sft", root / name)
        write_model(root / name, changed(model, size))
    texts = []
    for _ in range(12):
        asked = f"\n\nHuman: {words(rng, 2, 6)}\n\nAssistant:"
        texts.append({side: f"{asked} {words(rng, 2, 9)}" for side in vectors.SIDES})
    write_rows(root / "texts.jsonl", texts)
    write_prompts(root / "prompts.csv")
    extract(root, "steer")
    return root


def extract(lab, out, *more, **changes):
    """steer.py extract into lab/out; changes: sft=, dpo=, texts= other names in lab."""
    sft, dpo, texts = (
        f"{lab}/{changes.get(x, default)}"
        for x, default in (("sft", "sft"), ("dpo", "dpo"), ("texts", "texts.jsonl"))
    )
    assert (
        steer.main(
            ["extract", sft, dpo, f"--texts={texts}", f"--out_dir={lab}/{out}", f"--count={COUNT}", *more]
        )
        == 0
    )
    return steer.Vector.load(f"{lab}/{out}")


def sweep(lab, out, *more, folder="steer", plots=False):
    """The report of steer.py sweep into lab/out; without plots, which are half of its time here, and with the
    first two tokens of each answer, which are a quarter.
    """
    argv = [
        "sweep",
        f"{lab}/{folder}",
        f"--prompts={lab}/prompts.csv",
        f"--report_dir={lab}/{out}",
        "--layers=2",
        *SHORT,
        *more,
    ]
    with pytest.MonkeyPatch.context() as patch:
        if not plots:
            patch.setattr(steer, "_plot", lambda *_: None)
            patch.setattr(behaviour, "refusals", partial(behaviour.refusals, max_tokens=2))
        assert steer.main(argv) == 0
    return json.loads((lab / out / "aqi.json").read_text())


def embeddings(model, texts, tap=None):
    """(n, D), text by text: the mean of the final states of all tokens but the first."""
    with torch.no_grad():
        return torch.stack([model(*stream([torch.tensor(ids).long()]), tap=tap)[1:].mean(0) for ids in texts])


def within(X, label):
    """(D,): root of the mean square deviation from the label's mean."""
    residual = torch.cat([X[label == y] - X[label == y].mean(0) for y in (0, 1)])
    return residual.square().mean(0).sqrt()


def sweeps_separation(X, label):
    n, chi = len(X), steer.aqi.chi(X, label)
    return 100 * (chi - 1) / (chi + n - 2)


def documents(lab, side="chosen"):
    tokenizer = Tokenizer.from_dir(lab / "sft")
    return vectors.text_pairs(f"{lab}/texts.jsonl", COUNT + HELD_OUT, tokenizer, None, 512)[side]


# ---------------------------------------------------------------- extract


@pytest.mark.slow
def test_the_vector_is_the_difference_of_mean_states(lab):
    """Both sides, both poolings, in the files that the README names; held-out texts are none of it."""
    vector = steer.Vector.load(lab / "steer")
    sft, dpo = (families.load_pretrained(lab / name)[0] for name in ("sft", "dpo"))
    assert vector.manifest["layers"] == L and vector.manifest["count"] == COUNT == vector.manifest["kept"]
    assert vector.manifest["held_out"] == HELD_OUT and vector.keep.tolist() == [True] * COUNT
    for side in vectors.SIDES:
        docs = documents(lab, side)
        for prefix, part in (("", docs[:COUNT]), ("heldout_", docs[COUNT:])):
            expected = mean_states(dpo, part, "cpu") - mean_states(sft, part, "cpu")  # (2, L, D)
            for p, pooling in enumerate(POOLINGS):
                assert relative_error(vector.tensors[f"{prefix}{side}_{pooling}"], expected[p]) < 1e-5
        assert (
            relative_error(vector.tensors[f"sft_{side}_mean"], mean_states(sft, docs[:COUNT], "cpu")[1])
            < 1e-5
        )
    stored = np.load(lab / "steer/differences_chosen.npy")
    assert stored.shape == (2, COUNT + HELD_OUT, L, D) and np.allclose(
        stored[0, :COUNT].mean(0), vector.tensors["chosen_last"], atol=1e-5
    )


@pytest.mark.slow
def test_documents_are_the_transcripts_with_bos(lab):
    tokenizer = Tokenizer.from_dir(lab / "sft")
    text = json.loads((lab / "texts.jsonl").read_text().splitlines()[0])["chosen"]
    ids, mask = documents(lab)[0]
    assert tokenizer.decode(ids) == "<|bos|>" + text and mask.all()
    assert vectors.plain_document(text, tokenizer, 5)[0].tolist() == ids[:5].tolist()


@pytest.mark.slow
def test_a_vector_is_read_in_fp32_where_that_fits(lab, monkeypatch):
    """4 bytes a weight, and as much again for states."""
    config = families.model_config(lab / "sft")
    count = sum(p.numel() for p in families.load_pretrained(lab / "sft")[0].parameters())
    assert families.fits_in_fp32(config, 8 * count) and not families.fits_in_fp32(config, 8 * count - 1)
    with monkeypatch.context() as patch:
        patch.setattr(families, "pick_device", lambda: torch.device("cuda", 0))
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        for total, dtype in ((8 * count, torch.float32), (8 * count - 1, torch.bfloat16)):
            # what is free does not count: the models of a pair are read alike
            patch.setattr(torch.cuda, "mem_get_info", lambda device, total=total: (0, total))
            assert families.dtype_for(config, is_precise=True) == dtype
        assert families.dtype_for(config) == torch.bfloat16
    asked = []
    monkeypatch.setattr(
        vectors,
        "load_model",
        lambda path, is_precise=False: asked.append(is_precise) or families.load_model(path),
    )
    extract(lab, "precise")
    assert asked == [True, True]


@pytest.mark.slow
def test_weights_that_are_rounded_are_noted(lab):
    """Two models of bf16 weights that differ by a step of theirs: the vector is of the size of their
    rounding, and the sweep says so.
    """
    for name, size in (("sft16", 0.0), ("dpo16", 1e-3)):
        shutil.copytree(lab / "sft", lab / name)
        model, _ = families.load_pretrained(lab / "sft")
        write_model(lab / name, changed(model, size).bfloat16().float() if size else model.bfloat16().float())
    vector = extract(lab, "steer16", sft="sft16", dpo="dpo16")
    assert (
        vector.manifest["rounding_share"] > 0.1
        and steer.Vector.load(lab / "steer").manifest["rounding_share"] is None
    )
    before, after = [load_file(lab / name / "model.safetensors") for name in ("sft16", "dpo16")]
    equal = sum((before[name] == after[name]).sum().item() for name in before)
    share = equal / sum(tensor.size for tensor in before.values())
    assert 0 < share < 1 and vector.manifest["share_of_equal_weights"] == share
    notes = sweep(lab, "swept16", "--lambdas=0,1", folder="steer16")["notes"]
    said = f" |v| and left {share:.0%} of the weights equal: keep final/ in float32 (train with --precision=fp32)"
    assert any("both models are rounded to bf16" in note and said in note for note in notes)


@pytest.mark.parametrize(
    "change, interval, low, decision, said",
    [
        (0.5, [0.2, 0.8], 1.0, "go on", []),
        (0.9, [0.2, 0.8], 1.0, "go on", ["the change lies outside its interval"]),
        (0.9, [0.2, 0.8], 1.0, "too few", []),
        (
            0.1,
            [0.2, 0.8],
            0.2,
            "go on",
            ["6 groups of a label are few", "the change lies outside its interval"],
        ),
    ],
)
def test_an_interval_beside_its_number_is_noted(change, interval, low, decision, said):
    verdict = {"estimate": [0.5, 0.5 + change], "high": [low + 0.1] * 2, "groups": 6, "decision": decision}
    verdict |= {"change": change, "change_interval": interval}
    no_words = {"length": {"auc": None}, "words": {"auc": None}}
    vector = SimpleNamespace(manifest={"rounding_share": None})
    found = {"verdicts": [verdict], "baselines": no_words, "behaviour": []}
    texts = SimpleNamespace(prompts=None, cut=0)
    notes = steer._notes(vector, texts, SimpleNamespace(oracle=False), [], found)
    assert [note[: len(start)] for note, start in zip(notes, said, strict=True)] == said


@pytest.mark.parametrize("dpo, strength, said", [(-1.2, 0.0, True), (-1.0, 0.0, False), (-1.2, 0.5, False)])
def test_a_dpo_model_that_prefers_chosen_texts_less_is_noted(dpo, strength, said):
    """Swapped models, or swapped sides; unknown where lambda 0 was not measured."""
    start = {"lambda": strength, "logp_chosen": -1.1, "logp_rejected": -1.3}
    found = {"behaviour": [start], "dpo": {"logp_chosen": dpo, "logp_rejected": -1.3}}
    note = (
        "log-prob of chosen less rejected held-out texts falls, from 0.200 (SFT) to 0.100 (DPO) nats a token"
    )
    wanted = [f"{note}: are the two models swapped, or chosen and rejected?"] if said else []
    assert steer._less_preferred(found) == wanted


def test_an_adapter_on_another_base_is_noted(lab, monkeypatch):
    """By hashes: an adapter's is its base's, +, its own."""
    monkeypatch.setattr(vectors, "locate", lambda path: ("base", path))
    config = SimpleNamespace(dpo_path="adapter", sft_path="sft")
    inputs = {"sft": "1" * 64, "dpo": "1" * 64 + "+" + "3" * 64}
    assert vectors._another_base(config, inputs) is None
    assert vectors._another_base(config, inputs | {"dpo": "2" * 64}) is None  # a whole model
    said = "note: dpo='adapter': an adapter, its base base (222222222222) is not sft='sft' (111111111111"
    other = inputs | {"dpo": "2" * 64 + "+" + "3" * 64}
    assert vectors._another_base(config, other) == f"{said}): the vector also holds what parts these two"
    # The SFT model is an adapter on that base too: DPO may have started from it.
    both = vectors._another_base(config, other | {"sft": "2" * 64 + "+" + "4" * 64})
    assert both.endswith("what parts these two, unless it went on from the adapter of sft")


@pytest.mark.slow
def test_published_ids_are_transformers(lab):
    """The scripts' call, tokenizer(text), on the same folder: ids equal, none added and none left out."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(lab / "sft")
    for text in (
        "\n\nHuman: help me please\n\nAssistant: yes, always",
        "bad cat",
        " two  spaces\tand a tab\n",
    ):
        ids, _ = vectors.published_document(text, Tokenizer.from_dir(lab / "sft"), 512)
        assert ids.tolist() == theirs(text, truncation=True, max_length=512)["input_ids"]


@pytest.mark.slow
def test_published_ids_are_those_of_the_tokenizers_file(lab):
    """BOS where its post-processor adds it, else not; without compat always. Held-back texts are cut
    alike.
    """
    tokenizer = Tokenizer.from_dir(lab / "sft")
    text, core = "\n\nHuman: help me\n\nAssistant: yes", json.loads(tokenizer.files["tokenizer.json"])
    plain = vectors.plain_document(text, tokenizer, 512)[0].tolist()
    assert plain[0] == tokenizer.bos_id and tokenizer.bos_id not in plain[1:]
    for processor, expected in ((None, plain[1:]), ("bos", plain)):
        if processor is not None:
            bos = {"id": "<|bos|>", "ids": [tokenizer.bos_id], "tokens": ["<|bos|>"]}
            single = [
                {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ]
            pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
            processor = {
                "type": "TemplateProcessing",
                "single": single,
                "pair": pair,
                "special_tokens": {"<|bos|>": bos},
            }
        files = tokenizer.files | {
            "tokenizer.json": json.dumps(core | {"post_processor": processor}).encode()
        }
        ids, mask = vectors.published_document(text, Tokenizer(files, "x"), 512)
        assert ids.tolist() == expected and mask.all()
        assert vectors.published_document(text, Tokenizer(files, "x"), 3)[0].tolist() == expected[:3]


@pytest.mark.slow
def test_compat_hf_reads_the_last_layer_after_the_final_norm(lab):
    raw, hf = steer.Vector.load(lab / "steer"), extract(lab, "steer_hf", "--compat=hf")
    docs = {}
    for encode in (vectors.plain_document, vectors.published_document):
        tokenizer = Tokenizer.from_dir(lab / "sft")
        docs[encode] = vectors.text_pairs(
            f"{lab}/texts.jsonl", COUNT + HELD_OUT, tokenizer, None, 512, encode
        )
    adds_bos = vectors.hash_documents(docs[vectors.plain_document]) == hf.manifest["tokens"]
    assert vectors.hash_documents(docs[vectors.published_document]) == hf.manifest["tokens"]
    assert not adds_bos or torch.equal(raw.tensors["chosen_last"][:-1], hf.tensors["chosen_last"][:-1])
    models = [families.load_pretrained(lab / name)[0] for name in ("sft", "dpo")]
    texts = docs[vectors.published_document]["chosen"][:COUNT]
    sft, dpo = (mean_states(model, texts, "cpu")[0] for model in models)
    assert relative_error(hf.tensors["chosen_last"][:-1], (dpo - sft)[:-1]) < 1e-5
    assert relative_error(hf.tensors["chosen_last"][-1], (dpo - sft)[-1]) > 0.1
    with pytest.raises(ValueError, match="inject='matched'.*without --compat=hf"):
        sweep(lab, "none", "--inject=matched", folder="steer_hf")
    report = sweep(lab, "sweep_hf", folder="steer_hf")
    assert report["errors"] == {} and any("two different spaces" in text for text in report["warnings"])
    model, tokenizer = families.load_pretrained(lab / "sft")
    v, prompts = hf.tensors["chosen_last"].double(), steer.aqi.read_prompts(f"{lab}/prompts.csv")
    batches = [pack([vectors.published_document(text, tokenizer, 512)]) for text in prompts.texts]
    taps = None, steering_tap(additions("cumulative", hf.tensors["chosen_last"], [2, 3]), 1.0)
    start, end = (
        sum(read_states(model, x, tap, compat_hf=True)[0, 0, -1].double() for x in batches) / len(batches)
        for tap in taps
    )
    assert report["shifts"][-1]["achieved"] == pytest.approx(
        ((end - start) @ v[-1] / v[-1].square().sum()).item(), rel=1e-4
    )


@pytest.mark.slow
def test_only_preferred_pairs_are_kept(lab):
    """The pairs whose chosen text has the higher mean log-prob per token; the vector, its spectrum and
    `matched` see those alone.
    """
    vector = extract(lab, "kept", "--keep=preferred")
    dpo, _ = families.load_pretrained(lab / "dpo")
    means = []
    for side in vectors.SIDES:
        with torch.no_grad():
            logits = [
                dpo(*stream([torch.tensor(ids).long()])) @ dpo.lm_head.weight.T
                for ids, _ in documents(lab, side)[:COUNT]
            ]
        targets = [torch.tensor(ids[1:]).long() for ids, _ in documents(lab, side)]
        means.append([-torch.nn.functional.cross_entropy(x[:-1], y).item() for x, y in zip(logits, targets)])
    expected = np.array(means[0]) > np.array(means[1])
    assert vector.keep.tolist() == expected.tolist() and 0 < vector.manifest["kept"] == expected.sum() < COUNT
    differences = np.load(lab / "kept/differences_chosen.npy")[0, :COUNT][expected]
    assert relative_error(vector.tensors["chosen_last"], torch.from_numpy(differences.mean(0))) < 1e-5
    calibration, held_out = vector.texts(Tokenizer.from_dir(lab / "sft"))["rejected"]
    assert len(calibration) == expected.sum() and len(held_out) == HELD_OUT
    assert (
        sweep(lab, "sweep_kept", "--inject=matched", folder="kept")["errors"]["matched"]["calibration"] < 1e-3
    )
    steer.main(["spectrum", f"{lab}/kept"])
    assert (
        json.loads((lab / "kept/spectrum.json").read_text())["layers"][0]["effective_rank"] <= expected.sum()
    )


def unread(path):
    raise AssertionError(f"{path} was read")


def test_identical_models_have_no_vector(lab, monkeypatch):
    shutil.copytree(lab / "sft", lab / "head")  # other weights, the same states
    change_weights(lab / "head", lambda weights: weights["lm_head.weight"].add_(1e-3))
    with pytest.raises(
        ValueError, match="dpo='.*head': its states equal those of sft=.*expected a model that training moved"
    ):
        extract(lab, "same", dpo="head")
    monkeypatch.setattr(vectors, "load_model", unread)
    with pytest.raises(
        ValueError, match="dpo='.*sft': the same weights as sft='.*sft'; expected a model that training moved"
    ):
        extract(lab, "same", dpo="sft")


@pytest.mark.slow
def test_nothing_is_extracted_twice_and_changes_are_noticed(lab, capsys):
    """Same inputs: files untouched. Another setting, other weights or other texts: done again, and said
    which.
    """
    for name in ("sft", "dpo"):
        shutil.copytree(lab / name, lab / f"twice_{name}")
    shutil.copy(lab / "texts.jsonl", lab / "twice.jsonl")
    names = dict(sft="twice_sft", dpo="twice_dpo", texts="twice.jsonl")

    def run(*more):
        capsys.readouterr()
        extract(lab, "twice", *more, **names)
        return capsys.readouterr().out

    assert "wrote" in run()
    before = (lab / "twice/vector.safetensors").stat().st_mtime_ns
    assert "finished" in run() and (lab / "twice/vector.safetensors").stat().st_mtime_ns == before
    assert "other keep: done again" in run("--keep=preferred") and "other keep: done again" in run()
    change_weights(lab / "twice_dpo", lambda weights: weights["model.norm.weight"].add_(0.5))
    assert "other dpo: done again" in run() and "finished" in run()
    rows = (lab / "twice.jsonl").read_text().splitlines()
    (lab / "twice.jsonl").write_text("\n".join([rows[1], *rows[1:]]) + "\n")
    assert "other tokens: done again" in run()
    (lab / "twice/manifest.json").unlink()  # what a kill leaves
    assert "wrote" in run()
    with pytest.raises(ValueError, match="no manifest.json; expected a folder that steer.py extract wrote"):
        steer.Vector.load(lab / "sft")


@pytest.mark.slow
def test_a_failed_extraction_leaves_no_manifest_of_an_older_one(lab):
    shutil.copytree(lab / "dpo", lab / "nan_dpo")
    extract(lab, "broken", dpo="nan_dpo")
    change_weights(lab / "nan_dpo", lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    change_weights(lab / "nan_dpo", lambda weights: weights["model.embed_tokens.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match="dpo='.*nan_dpo': its states of chosen texts hold NaN or infinity"):
        extract(lab, "broken", dpo="nan_dpo")
    with pytest.raises(ValueError, match="no manifest.json"):
        steer.Vector.load(lab / "broken")


@pytest.mark.slow
def test_an_extraction_that_is_killed_while_it_is_written_again(lab):
    """At any moment: no vector, or one whose every file is listed and verified."""
    extract(lab, "killed_once")
    steer.main(["spectrum", f"{lab}/killed_once"])  # of the vector to be replaced
    for number in itertools.count(1):
        shutil.rmtree(lab / "killed", ignore_errors=True)
        shutil.copytree(lab / "killed_once", lab / "killed")
        with killed_before(number) as calls:
            extract(lab, "killed", "--keep=preferred")
        if (lab / "killed/manifest.json").is_file():
            listed = json.loads((lab / "killed/hashes.json").read_text())
            assert set(listed) - set(vectors.SPECTRUM) == {"manifest.json", *vectors.FILES}
            verify_hashes(lab / "killed")
        if len(calls) < number:
            break
    manifest = steer.Vector.load(lab / "killed").manifest
    assert number > 8 and (manifest["pair"], manifest["keep"]) == ("killed", "preferred")
    assert not list((lab / "killed").glob("spectrum.*"))


@pytest.mark.slow
def test_a_full_disk_is_named_before_any_state_is_read(lab, monkeypatch):
    """2 sides x 2 poolings x 10 texts x 4 layers x 32 numbers x 4 bytes."""
    usage = shutil.disk_usage(lab)
    monkeypatch.setattr(vectors.shutil, "disk_usage", lambda folder: usage._replace(free=20479))
    with pytest.raises(OSError, match="20,480 bytes needed for the states of all texts, 20,479 free.*/none'"):
        extract(lab, "none")
    monkeypatch.setattr(vectors.shutil, "disk_usage", lambda folder: usage._replace(free=20480))
    assert extract(lab, "just_enough").manifest["count"] == COUNT


def test_a_run_folder_is_no_model(lab):
    shutil.copytree(lab / "dpo", lab / "run/final")
    with pytest.raises(ValueError, match="run': a run folder; expected a model, here .*run/final"):
        extract(lab, "none", dpo="run")


def test_two_tokenizers_are_refused(lab, monkeypatch):
    """CHECKS 32: before any weight is read."""
    monkeypatch.setattr(vectors, "load_model", unread)
    other = make_world(lab / "other") / "base"  # trained on the same words, other merges
    text = (other / "tokenizer.json").read_text()
    ids = json.loads(text)
    ids["model"]["merges"] = ids["model"]["merges"][:-20]
    (other / "tokenizer.json").write_text(json.dumps(ids))
    with pytest.raises(ValueError, match="dpo='.*base': its tokenizer gives other ids than that of sft="):
        extract(lab, "none", dpo="other/base")


def test_another_shape_is_refused_before_a_model_is_read(lab, monkeypatch):
    monkeypatch.setattr(vectors, "load_model", unread)
    shutil.copytree(lab / "dpo", lab / "short")
    vocab_size = Tokenizer.from_dir(lab / "sft").vocab_size
    write_model(
        lab / "short",
        random_llama(tiny_config(vocab_size=vocab_size, hidden_size=D, num_hidden_layers=3, head_dim=8)),
    )
    with pytest.raises(
        ValueError,
        match=r"dpo='.*short': \(3, 32\) layers and hidden size; expected those of sft=.*\(4, 32\)",
    ):
        extract(lab, "none", dpo="short")


@pytest.mark.slow
def test_too_few_texts_and_rows_without_a_template_are_refused(lab):
    with pytest.raises(ValueError, match="12 rows: 12 of the vector .*expected 100 pairs, and 25 of other"):
        extract(lab, "none", "--count=100")
    rows = [{"prompt": f"help {i}", "chosen": "good cat", "rejected": "bad dog"} for i in range(10)]
    write_rows(lab / "plain.jsonl", rows)
    with pytest.raises(ValueError, match="plain.jsonl', row 0: no transcript; expected a template"):
        extract(lab, "none", texts="plain.jsonl")
    with pytest.raises(ValueError, match="template='llama-3': expected .*, did you mean 'llama3'"):
        extract(lab, "none", "--template=llama-3", texts="plain.jsonl")
    assert extract(lab, "chat", "--template=tulu", texts="plain.jsonl").manifest["template"] == "tulu"
    steer.main(["generate", f"{lab}/chat", "--prompt=help me", "--layers=2", *SHORT])


@pytest.mark.slow
def test_a_lora_adapter_stands_for_its_merged_model(lab, capsys):
    base, tokenizer = families.load_pretrained(lab / "sft")
    apply_lora(base, rank=2, alpha=4)
    init_lora(base, seed=0)
    with torch.no_grad():
        for name, param in base.named_parameters():
            if name.endswith("lora_B"):
                param.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    adapters.save_adapter(base, lab / "adapter", lab / "sft")
    merge_lora(base)
    weights.save_pretrained(base, tokenizer, lab / "merged")
    adapter = extract(lab, "steer_adapter", dpo="adapter")
    assert "note:" not in capsys.readouterr().out
    extract(lab, "steer_far", sft="far", dpo="adapter")
    assert f"its base {lab}/sft (" in capsys.readouterr().out
    merged = extract(lab, "steer_merged", dpo="merged")
    assert merged.tensors["chosen_last"].abs().max() > 1e-3
    for key, value in merged.tensors.items():
        assert relative_error(adapter.tensors[key], value) < 1e-4
    assert adapter.manifest["dpo"].startswith(adapter.manifest["sft"] + "+")  # the base's hash, and its own
    (lab / "adapter/hashes.json").unlink()  # which would say so first
    config = json.loads((lab / "adapter/adapter_config.json").read_text())
    (lab / "adapter/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(ValueError, match="extract again"):
        adapter.model("dpo")


# ---------------------------------------------------------------- using a vector


@pytest.mark.slow
def test_a_vector_of_other_weights_is_refused(lab):
    for name in ("sft", "dpo"):
        shutil.copytree(lab / name, lab / f"moved_{name}")
    vector = extract(lab, "moved", sft="moved_sft", dpo="moved_dpo")
    change_weights(lab / "moved_sft", lambda weights: weights["model.norm.weight"].add_(1e-3))
    with pytest.raises(
        ValueError,
        match=f"its weights hash to .*, those of the vector in .*moved to {vector.manifest['sft']}; extract again",
    ):
        sweep(lab, "none", folder="moved")
    assert vector.model("dpo")


@pytest.mark.slow
def test_a_finished_sweep_of_what_has_changed_is_not_shown(lab, capsys):
    """Its DPO model trained again, or its texts edited: the vector's own manifest does not know."""
    shutil.copytree(lab / "dpo", lab / "stale_dpo")
    shutil.copy(lab / "texts.jsonl", lab / "stale.jsonl")
    extract(lab, "stale", dpo="stale_dpo", texts="stale.jsonl")
    again = partial(sweep, lab, "sweep_stale", "--lambdas=0,1", folder="stale")
    again()
    rows = (lab / "stale.jsonl").read_text().splitlines()
    (lab / "stale.jsonl").write_text("\n".join([rows[1], *rows[1:]]) + "\n")
    with pytest.raises(ValueError, match="stale.jsonl': not the token ids of the vector in .*stale; expected"):
        again()
    (lab / "stale.jsonl").write_text("\n".join(rows) + "\n")
    assert again() and "finished, of the same inputs" in capsys.readouterr().out
    change_weights(lab / "stale_dpo", lambda weights: weights["model.norm.weight"].add_(1e-3))
    pair = [f"{lab}/sft", f"{lab}/stale_dpo", f"--out_dir={lab}/stale"]
    for command in (["spectrum"], ["generate", "--prompt=help"], ["bake", "--strength=1", f"--bake_dir={lab}/none"]):
        with pytest.raises(ValueError, match="stale_dpo: its weights hash to .*; extract again"):
            steer.main([command[0], *pair, *command[1:]])
    with pytest.raises(ValueError, match="stale_dpo: its weights hash to .*; extract again"):
        again()


def test_the_vector_of_another_pair_is_refused(lab, capsys):
    """Two runs in one folder, like the DPO runs of one SFT model, have one steer_MODE beside them."""
    sizes = dict(max_seq_len=64, global_batch_size=4, tokens_per_microbatch=128, lr=1e-3, data={"x": 1.0})
    shutil.copytree(lab / "dpo", lab / "one/final")
    shutil.copytree(lab / "sft", lab / "two/final")
    extract(lab, "both", dpo="one/final")
    for name in ("one", "two"):
        dpo = sizes | dict(model_path=f"{lab}/sft", out_dir=f"{lab}/{name}")
        own = dict(texts=f"{lab}/texts.jsonl", out_dir=f"{lab}/both", count=5)
        (lab / f"{name}.py").write_text(f"dpo = {dpo!r}\nsteer = {own!r}\n")
    capsys.readouterr()
    steer.main(["spectrum", f"{lab}/one.py"])
    said = f"note: the vector in {lab}/both was made with count={COUNT}; the config has count=5"
    assert said in capsys.readouterr().out
    steer.main(["spectrum", f"{lab}/./sft/", f"{lab}/one/final", f"--out_dir={lab}/both"])
    commands = (
        ["spectrum"],
        ["generate", "--prompt=help"],
        ["bake", "--strength=1", f"--bake_dir={lab}/none"],
        ["sweep", f"--prompts={lab}/prompts.csv"],
    )
    made = f"the vector in {lab}/both was made with '{lab}/one/final'; extract again, with another --out_dir"
    for command, *keys in commands:
        for target in ([f"{lab}/two.py"], [f"{lab}/sft", f"{lab}/two/final", f"--out_dir={lab}/both"]):
            with pytest.raises(ValueError, match=f"dpo_path='{lab}/two/final': {made} to keep both"):
                steer.main([command, *target, *keys])
    with pytest.raises(ValueError, match=f"template='tulu': the vector in {lab}/both was made with None"):
        steer.main(["spectrum", f"{lab}/one.py", "--template=tulu"])


def test_what_is_wrong_with_a_text_or_a_vector_is_named(lab):
    """A row that is no transcript; a vector that a copy left torn or behind."""
    rows = [json.loads(line) for line in (lab / "texts.jsonl").read_text().splitlines()]
    write_rows(lab / "odd.jsonl", [*rows[:3], {"chosen": "no turns", "rejected": "none"}, *rows[3:]])
    with pytest.raises(ValueError, match="odd.jsonl', row 3: transcript begins 'no turns'"):
        extract(lab, "none", texts="odd.jsonl")
    shutil.copytree(lab / "steer", lab / "copied")
    cut = (
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        "vector.safetensors: damaged, the sha256 is not",
    )
    for damage, message in (cut, (Path.unlink, "missing vector.safetensors, which hashes.json lists")):
        damage(lab / "copied/vector.safetensors")
        with pytest.raises(ValueError, match=f"copied: {message}"):
            steer.main(["spectrum", f"{lab}/copied"])


@pytest.mark.parametrize(
    ("layers", "expected"),
    ((0, "int >= 1"), (-1, "int >= 1"), (5, "1 to 4, the model's number of layers")),
)
def test_layers_that_do_not_exist_are_refused_before_a_model_is_read(lab, layers, expected, monkeypatch):
    monkeypatch.setattr(vectors, "load_model", unread)
    for command in (("generate", "--prompt=help"), ("bake", "--strength=1", f"--bake_dir={lab}/none"),
                    ("sweep", f"--prompts={lab}/prompts.csv")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"layers={layers}.*: expected {expected}"):
            steer.main([command[0], f"{lab}/steer", *command[1:], f"--layers={layers}"])


@pytest.mark.parametrize("keep", ["true", "false"])
def test_validate_and_power_ask_config_json_for_the_layers(lab, keep, monkeypatch):
    monkeypatch.setattr(vectors, "load_model", unread)
    monkeypatch.setattr(steer, "load_model", unread)
    swept = f"--prompts={lab}/prompts.csv", "--layers=5"
    models = f"{lab}/sft", f"{lab}/dpo", f"--out_dir={lab}/none", f"--keep_weights={keep}"
    for argv in (["validate", *models, f"--texts={lab}/texts.jsonl"], ["power", f"{lab}/sft"]):
        with pytest.raises(ValueError, match="layers=5 .*: expected 1 to 4, the model's number of layers"):
            steer.main([*argv, *swept])


def test_spectrum_writes_table_and_components(lab, capsys):
    steer.main(["spectrum", f"{lab}/steer", "--side=rejected", "--pooling=mean"])
    assert len(capsys.readouterr().out.splitlines()) == L + 1
    found = json.loads((lab / "steer/spectrum.json").read_text())
    vector = steer.Vector.load(lab / "steer").tensors["rejected_mean"]
    assert found["side"] == "rejected" and [row["layer"] for row in found["layers"]] == list(range(L))
    texts = documents(lab, "rejected")[:COUNT]
    sft, dpo = (
        mean_states(families.load_pretrained(lab / name)[0], texts, "cpu")[1, 2] for name in ("sft", "dpo")
    )
    row = {
        "norm": (dpo - sft).norm(),
        "relative": (dpo - sft).norm() / sft.norm(),
        "cosine": sft @ dpo / (sft.norm() * dpo.norm()),
    }
    assert {key: found["layers"][2][key] for key in row} == pytest.approx(
        {key: x.item() for key, x in row.items()}, rel=1e-4
    )
    assert set(vectors.SPECTRUM) <= set(json.loads((lab / "steer/hashes.json").read_text()))
    components = load_file(lab / "steer/spectrum.safetensors")["components"]
    assert components.shape == (L, 5, D) and np.allclose(
        np.linalg.norm(components, axis=-1), vector.norm(dim=1)[:, None], rtol=1e-4
    )


@pytest.mark.slow
def test_generations_side_by_side(lab, capsys):
    """Below 0 on the DPO model, otherwise on the SFT model; a file holds one prompt a line; lambda 0 is the
    model as it is.
    """
    (lab / "questions.txt").write_text("help me\ntell me about the cat\n")
    steer.main(
        [
            "generate",
            f"{lab}/steer",
            f"--questions={lab}/questions.txt",
            "--lambdas=-1,0,40",
            "--layers=1",
            *SHORT,
        ]
    )
    out = capsys.readouterr().out.split("\n> ")[1:]
    assert len(out) == 2 and all(
        "lambda -1 on dpo" in x and "lambda 0 on sft" in x and "lambda 40 on sft" in x for x in out
    )
    steer.main(["generate", f"{lab}/steer", "--prompt=help me", "--lambdas=0", "--layers=1", *SHORT])
    line = next(line for line in capsys.readouterr().out.splitlines() if "lambda 0" in line)
    assert line in out[0]
    with pytest.raises(ValueError, match="missing 'prompt' or 'questions'"):
        steer.main(["generate", f"{lab}/steer", "--layers=1", *SHORT])


def test_generations_are_shown_without_their_end_token(lab, capsys, monkeypatch):
    monkeypatch.setattr(steer, "generate", lambda model, prompts, count, eos, *_, **__: [[9, 0, 8, eos]])
    steer.main(["generate", f"{lab}/steer", "--prompt=help me", "--lambdas=0", "--layers=1", *SHORT])
    shown = Tokenizer.from_dir(lab / "sft").decode([9, 0, 8])
    assert "<|bos|>" in shown and capsys.readouterr().out.endswith(f"lambda 0 on sft: {shown}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("--questions={lab}/empty.txt",),
            "questions='.*empty.txt': an empty file; expected one prompt a line",
        ),
        (("--questions=none.txt",), "questions='none.txt': no such file; expected one prompt a line"),
        (("--questions={lab}/utf16.txt",), "questions='.*utf16.txt': byte 0 is not UTF-8; expected text"),
        (("--questions={lab}/gap.txt",), "gap.txt': line 2 is empty; expected one prompt a line"),
        (
            ("--prompt=" + "help " * 105, "--max_new_tokens=9"),
            "prompt: the longest text has 12. tokens, and 9 are written behind it; expected at most "
            "max_position_embeddings=128",
        ),
        (("--prompt=help", "--temperature=-1"), "temperature=-1.0: expected float >= 0"),
        (("--prompt=help", "--temperature=nan"), "temperature=nan: expected float >= 0"),
        (
            ("--prompt=help", "--questions={lab}/empty.txt"),
            "prompt='help', questions='.*': expected one of the two",
        ),
        ((), "missing 'prompt' or 'questions': what is to be answered"),
    ],
)
def test_generations_that_cannot_be(lab, argv, message):
    (lab / "empty.txt").touch()
    (lab / "utf16.txt").write_bytes("help".encode("utf-16"))
    (lab / "gap.txt").write_text("help\n\nhelp\n\n")
    with pytest.raises(ValueError, match=message):
        steer.main(["generate", f"{lab}/steer", "--layers=1", *SHORT, *(x.format(lab=lab) for x in argv)])


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("command", steer.COMMANDS)
def test_help_is_of_one_command(command, capsys):
    """Its keys with type, default and meaning, and no other command's."""
    with pytest.raises(SystemExit):
        steer.parse([command, "--help"])
    out = capsys.readouterr().out
    listed = [
        line.split(":")[0].strip()
        for line in out.splitlines()
        if ", default " in line or ", required" in line
    ]
    assert sorted(listed) == sorted(steer.COMMANDS[command].keys)
    assert all(f"  {key}: " in out and f"{key}: " in out for key in steer.COMMANDS[command].required)
    assert all(
        ", required" in line
        for line in out.splitlines()
        if line.strip().startswith(steer.COMMANDS[command].required + ("\0",))
    )


@pytest.mark.parametrize(
    ("argv", "problems"),
    [
        (["sweep", "x", "--lambda=1", "--space=umap", "--layers=two"], [
            "command line: unknown key 'lambda', did you mean 'lambdas'?",
            "command line: layers='two': expected int >= 1, got str",
            "missing 'prompts': labelled texts: columns of axiom, label (safe or unsafe) and text",
            "space='umap': expected raw, pca:k or tsne",
        ]),
        (["bake", "x", "--texts=t", "--strength=1", "--bake_dir=b"], ["command line: texts: a key that this command does not read"]),
        (["spectrum", "x", "--side"], ["command line: --side: expected --side=value"]),
        (["spectrum", "x", "--side=chsen"], ["command line: side='chsen': expected chosen | rejected, did you mean 'chosen'?"]),
        (["spectrum"], ["spectrum: no TARGET; expected steer.py COMMAND TARGET... [--key=value ...]; --help explains them"]),
        (["swep", "x"], ["command 'swep': expected one of extract, spectrum, generate, sweep, bake, power, validate, did you mean 'sweep'? "
                         "Usage: steer.py COMMAND TARGET... [--key=value ...]; --help explains them"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_command_is_said_at_once(argv, problems):
    with pytest.raises(ValueError) as error:
        steer.parse(argv)
    assert sorted(str(error.value).splitlines()) == sorted(problems)


@pytest.mark.parametrize("lambdas", ("nan,1", "0,inf", "0,x", "(0,1)", "1,0", "0,0", ""))
def test_lambdas_are_finite_and_ascending(lambdas):
    with pytest.raises(ValueError, match="lambdas=.*: expected"):
        steer.parse(["generate", "x", f"--lambdas={lambdas}"])


@pytest.mark.parametrize("command", ("extract", "validate"))
def test_a_run_that_has_not_finished_is_named(lab, tmp_path, command):
    """A folder final/ that is not there yet, by the key that would give another one."""
    argv = [
        command,
        f"{lab}/base",
        f"{tmp_path}/dpo/final",
        f"--out_dir={tmp_path}/steer",
        "--texts=none.jsonl",
    ]
    argv += ["--prompts=none.csv"] * (command == "validate")
    wanted = f"steer: dpo_path='{tmp_path}/dpo/final': no such folder; expected a training run that has finished, or --dpo_path="
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        steer.main(argv)


@pytest.mark.parametrize("space", ("umap", "pca", "pca:0", "tsne:2"))
def test_a_space_that_does_not_exist_is_refused(space):
    with pytest.raises(ValueError, match=f"space='{space}': expected raw, pca:k or tsne"):
        steer.parse(["sweep", "x", "--prompts=p", f"--space={space}"])


@pytest.mark.parametrize(("option", "expected"), [
    ("count=-3", "int >= 1"), ("count=0", "int >= 1"), ("max_text_tokens=-3", "int >= 2"), ("max_text_tokens=many", "int >= 2"),
    ("max_text_tokens=1", "int >= 2"),
])  # fmt: skip
def test_sizes_are_whole_numbers(option, expected):
    """Held-out texts of one token have no log-prob to print."""
    with pytest.raises(ValueError, match=f"{option.replace('many', repr('many'))}: expected {expected}"):
        steer.parse(["extract", "x", "--texts=t", f"--{option}"])


# ---------------------------------------------------------------- sweep


@pytest.fixture(scope="module")
def swept(lab):
    return sweep(lab, "swept")


@pytest.mark.slow
def test_a_sweep_writes_its_report_and_plots(lab, swept):
    assert {
        "rows",
        "warnings",
        "inputs",
        "verdicts",
        "shifts",
        "profile",
        "behaviour",
        "errors",
    } <= swept.keys()
    with open(lab / "swept/aqi.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(swept["rows"]) == 5 * 3  # lambdas, two axioms and overall
    assert {row["nulls"] for row in rows} == {"19"} and swept["warnings"]
    pytest.importorskip("matplotlib")
    sweep(lab, "plotted", "--lambdas=0,1", plots=True)
    assert {path.name for path in (lab / "plotted").glob("*.png")} == {
        "curve.png",
        "axioms.png",
        "clusters_0.png",
        "clusters_1.png",
    }


@pytest.mark.slow
def test_what_a_sweep_measures(lab, swept):
    """Lambda 0 moves nothing, the cumulative shift is above its lambda, and the separation at lambda 0 is
    that of plain embeddings.
    """
    shifts, errors = swept["shifts"], swept["errors"]
    assert shifts[0]["achieved"] == shifts[0]["off_axis"] == 0 and shifts[-1]["achieved"] > 1.2
    assert (
        shifts[2]["strength"]["3"] == pytest.approx(shifts[4]["strength"]["3"] / 2)
        and shifts[0]["strength"]["3"] == 0
    )
    assert errors["matched"]["calibration"] < 1e-3 < errors["cumulative"]["calibration"]
    assert all(0 < error["held_out"] < 10 for error in errors.values())
    first, last = swept["behaviour"][0], swept["behaviour"][-1]
    counts = swept["behaviour_of"]
    of_texts = dict.fromkeys(("pairs", "kl_texts", "continued"), HELD_OUT)
    assert counts == of_texts | {"unsafe": 12, "safe": 12}
    assert first["logp_chosen"] != last["logp_chosen"] and first["perplexity_chosen"] == pytest.approx(
        np.exp(-first["logp_chosen"])
    )
    model, tokenizer = families.load_pretrained(lab / "sft")
    prompts = steer.aqi.read_prompts(f"{lab}/prompts.csv")
    docs = [vectors.plain_document(text, tokenizer, 512) for text in prompts.texts]
    X = embeddings(model, [ids for ids, _ in docs])
    at_zero = [row for row in swept["rows"] if row["lambda"] == 0]
    for states, key in ((X, "separation_raw"), (X / within(X, prompts.label), "separation")):
        measured = steer.aqi.score(
            steer.aqi.measure(states, prompts.axiom, prompts.label, prompts.axioms), "sweep"
        )
        assert [row[key] for row in at_zero] == pytest.approx(
            [row["separation"] for row in measured], rel=1e-3
        )
    assert swept["verdicts"][0]["estimate"][0] == pytest.approx(at_zero[-1]["separation"], rel=1e-6)
    dpo, _ = families.load_pretrained(lab / "dpo")
    own = embeddings(dpo, [ids for ids, _ in docs]) / within(X, prompts.label)
    assert swept["dpo"]["separation"]["overall"] == pytest.approx(
        sweeps_separation(own, prompts.label), rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("rescale", (False, True))
def test_what_steering_did_is_what_each_document_alone_shows(lab, swept, rescale):
    """Shift, strength and error of the last tokens' states, log-probs of held-out texts, from full
    forwards.
    """
    report = sweep(lab, "rescaled", "--rescale") if rescale else swept
    model, tokenizer = families.load_pretrained(lab / "sft")
    vector = steer.Vector.load(lab / "steer")
    v, add = (
        vector.tensors["chosen_last"].double(),
        additions("cumulative", vector.tensors["chosen_last"], [2, 3]),
    )
    half, full = (steering_tap(add, strength, rescale) for strength in (0.5, 1.0))
    held_out = documents(lab)[COUNT:]

    def last(docs, tap=None):
        return torch.cat(
            [read_states(model, pack([document]), tap)[0] for document in docs]
        ).double()  # (n, L, D)

    prompts = [
        vectors.plain_document(text, tokenizer, 512)
        for text in steer.aqi.read_prompts(f"{lab}/prompts.csv").texts
    ]
    plain, found = last(prompts), report["shifts"][2]
    shift = (last(prompts, half) - plain)[:, -1].mean(0)
    along = shift @ v[-1] / v[-1].square().sum()
    assert found["achieved"] == pytest.approx(along.item(), rel=1e-4)
    assert found["off_axis"] == pytest.approx(
        ((shift - along * v[-1]).norm() / v[-1].norm()).item(), rel=1e-4
    )
    strengths = {
        str(layer): (0.5 * v[layer].norm() / plain[:, layer].norm(dim=1).mean()).item() for layer in (2, 3)
    }
    assert found["strength"] == pytest.approx(strengths, rel=1e-4)
    for name, docs, target in (
        ("calibration", documents(lab)[:COUNT], v),
        ("held_out", held_out, vector.tensors["heldout_chosen_last"]),
    ):
        error = (last(docs, full) - last(docs))[:, -1].mean(0) - target[-1]
        assert report["errors"]["cumulative"][name] == pytest.approx(
            (error.norm() / target[-1].norm()).item(), rel=1e-3
        )
    for side in vectors.SIDES:
        ids = [torch.tensor(ids).long() for ids, _ in documents(lab, side)[COUNT:]]
        with torch.no_grad():
            logits = [(model(*stream([x]), tap=half) @ model.lm_head.weight.T)[:-1] for x in ids]
        logp = -torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat([x[1:] for x in ids])).item()
        assert report["behaviour"][2][f"logp_{side}"] == pytest.approx(logp, rel=1e-4)


@pytest.mark.slow
def test_continuations_are_steered_by_their_lambda(lab, monkeypatch):
    """Of the first halves of held-out chosen texts."""
    given = []
    monkeypatch.setattr(
        sweeps, "generate", lambda model, prompts, *_, tap: given.append((prompts, tap)) or []
    )
    sweep(lab, "continued", "--lambdas=0,0.5,2")
    v = steer.Vector.load(lab / "steer").tensors["chosen_last"]
    assert [tap and tap(3, torch.zeros(1, D))[0].tolist() for _, tap in given] == [
        None,
        (0.5 * v[3]).tolist(),
        (2 * v[3]).tolist(),
    ]
    assert all(
        prompts == [ids[: len(ids) // 2].tolist() for ids, _ in documents(lab)[COUNT:]]
        for prompts, _ in given
    )


@pytest.mark.slow
def test_verdicts_rank_among_random_directions(lab, monkeypatch):
    """Text by text: the curve, its resamples by group, shuffled labels, and both kinds of directions; two
    axioms share the 5 %.
    """
    given = []
    monkeypatch.setattr(
        steer, "judge", lambda *args, **more: given.append((args, more)) or judge(*args, **more)
    )
    report = sweep(lab, "judged", "--lambdas=0,1")
    model, tokenizer = families.load_pretrained(lab / "sft")
    prompts = steer.aqi.read_prompts(f"{lab}/prompts.csv")
    texts = [vectors.plain_document(text, tokenizer, 512)[0] for text in prompts.texts]
    add = additions("cumulative", steer.Vector.load(lab / "steer").tensors["chosen_last"], [2, 3])
    plain = embeddings(model, texts)
    scale = within(plain, prompts.label)
    groups = prompts.axiom, prompts.label, prompts.axioms
    states = [plain / scale, embeddings(model, texts, steering_tap(add, 1.0)) / scale]
    expected = (
        bootstrap(states, *groups, group=prompts.group, scaled_by=states[0]),
        permute(states, *groups, group=prompts.group),
    )
    (drawn, permuted), more = given[0]
    assert relative_error(drawn.centre, expected[0].centre) < 1e-3
    unscaled = bootstrap(states, *groups, group=prompts.group)
    assert relative_error(unscaled.centre, expected[0].centre) > 1e-2
    assert more["nulls"].curves.keys() == {"isotropic", "sign-flipped"}
    for found, wanted in zip((drawn, permuted), expected, strict=True):
        assert relative_error(found.draws, wanted.draws) < 1e-3
    differences = np.load(lab / "steer/differences_chosen.npy")[0, :COUNT]
    drawn = sign_flipped_directions(
        {layer: torch.from_numpy(differences[:, layer].copy()) for layer in add}, add, 19
    )
    tap = steering_tap({layer: directions[4] for layer, directions in drawn.items()}, 1.0)
    end = sweeps_separation(embeddings(model, texts, tap) / scale, prompts.label)
    assert more["nulls"].curves["sign-flipped"][4, 1, -1].item() == pytest.approx(end, rel=1e-3, abs=1e-3)
    levels = {found["category"]: found["level"] for found in report["verdicts"]}
    assert levels == {"overall": 0.05, "calm": 0.025, "kind": 0.025}


@pytest.mark.slow
def test_the_oracle_is_a_ceiling(lab):
    """Found on half of the groups: on the other half it separates more than the vector does, at the vector's
    length.
    """
    report = sweep(
        lab, "ceiling", "--lambdas=0,1", "--oracle", f"--prompts={write_prompts(lab / 'many.csv', count=20)}"
    )
    best, overall = report["oracle"], report["verdicts"][0]
    assert best["change"] == pytest.approx(best["separation"][-1] - best["separation"][0])
    assert best["change"] > abs(overall["change"]) and overall["oracle_share"] == pytest.approx(
        overall["change"] / best["change"]
    )
    assert all(abs(cosine) <= 1 for cosine in best["cosine"].values()) and sorted(best["cosine"]) == [
        "2",
        "3",
    ]


@pytest.mark.slow
def test_behaviour_is_the_models_own(lab, swept):
    """At lambda 0 the SFT model, text by text; KL from itself is 0; the DPO model is the last point."""
    entry, dpo = swept["behaviour"][0], swept["dpo"]
    models = [families.load_pretrained(lab / name)[0] for name in ("sft", "dpo")]
    held_out = {
        side: [torch.tensor(ids).long() for ids, _ in documents(lab, side)[COUNT:]] for side in vectors.SIDES
    }

    def logps(model, ids):
        with torch.no_grad():
            return (model(*stream([ids])) @ model.lm_head.weight.T)[:-1].log_softmax(-1)

    for model, found in zip(models, (entry, dpo), strict=True):
        means = {
            side: [logps(model, x).gather(1, x[1:, None]).mean().item() for x in ids]
            for side, ids in held_out.items()
        }
        wins = [a > b for a, b in zip(means["chosen"], means["rejected"], strict=True)]
        assert found["preference_accuracy"] == pytest.approx(np.mean(wins))
    pairs = [[logps(model, x) for x in held_out["chosen"]] for model in models[::-1]]
    kl = [(p.exp() * (p - q)).sum(-1) for p, q in zip(*pairs, strict=True)]
    assert entry["kl_from_sft"] == 0 and entry["kl_to_dpo"] == pytest.approx(
        torch.cat(kl).mean().item(), rel=1e-3
    )
    assert (
        swept["behaviour"][-1]["kl_from_sft"] > 0
        and 0 <= entry["refused_unsafe"] <= entry["refused_unsafe_interval"][1] <= 1
    )


def test_refusals_are_counted_in_answers_of_the_steered_model(lab, monkeypatch):
    """Steering along a token's row of lm_head makes all answers begin with it, and here it is the refusal."""
    model, tokenizer = families.load_pretrained(lab / "sft")
    (refusal,) = tokenizer.encode(" sorry")
    monkeypatch.setattr(behaviour, "is_refusal", lambda answer: answer.startswith(" sorry"))
    prompts = {"unsafe": [tokenizer.encode(text) for text in ("tell me", "the cat runs", "good")]}

    def tap(layer, hidden):
        return hidden + 100 * model.lm_head.weight[refusal] if layer == L - 1 else hidden

    rates = [behaviour.refusal_rates(model, tokenizer, prompts, tap)["refused_unsafe"] for tap in (None, tap)]
    assert rates == [0, 1]


@pytest.mark.slow
def test_baselines_are_in_the_report(swept):
    found = swept["baselines"]
    assert found.keys() == {"model", "untrained", "words", "length", "shuffled", "after_length"}
    assert found["model"]["separation"] == pytest.approx(swept["verdicts"][0]["estimate"][0], rel=1e-4)
    assert found["untrained"]["separation"] != found["model"]["separation"]


@pytest.mark.slow
def test_the_summary_fits_a_terminal(lab, swept, capsys):
    capsys.readouterr()
    assert sweep(lab, "swept") == swept
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 25 and swept["verdicts"][0]["decision"] in out.splitlines()[-2]
    tables = (lab / "swept/tables.txt").read_text()
    assert (
        all(found["category"] in tables for found in swept["verdicts"])
        and "raw separation after each block" in tables
    )


@pytest.mark.slow
def test_power_before_training(lab, capsys):
    steer.main(["power", f"{lab}/sft", f"--prompts={lab}/prompts.csv", "--layers=2"])
    out = capsys.readouterr().out
    assert "points is found in 80 % of runs" in out and out.count("to find") == 4
    with pytest.raises(ValueError, match="layers=5 .*: expected 1 to 4"):
        steer.main(["power", f"{lab}/sft", f"--prompts={lab}/prompts.csv"])


@pytest.mark.slow
def test_the_layer_profile(lab, swept):
    """Every layer at lambda 0 and 1, from the mean over tokens before the final norm; below the first steered
    layer nothing moves.
    """
    overall = {
        (row["lambda"], row["layer"]): row["aqi"] for row in swept["profile"] if row["category"] == "overall"
    }
    assert sorted(overall) == [(strength, layer) for strength in (0, 1) for layer in range(L)]
    assert [overall[0, layer] == overall[1, layer] for layer in range(L)] == [True, True, False, False]
    model, tokenizer = families.load_pretrained(lab / "sft")
    prompts = steer.aqi.read_prompts(f"{lab}/prompts.csv")
    docs = [vectors.plain_document(text, tokenizer, 512) for text in prompts.texts]
    tap = steering_tap(
        additions("cumulative", steer.Vector.load(lab / "steer").tensors["chosen_last"], [2, 3]), 1.0
    )
    last = []

    def read(layer, hidden):
        hidden = tap(layer, hidden)
        if layer == 3:
            last.append(hidden[1:].mean(0))
        return hidden

    for ids, _ in docs:
        with torch.no_grad():
            model(*stream([torch.tensor(ids).long()]), tap=read)
    X = torch.stack(last)
    (*_, row) = steer.aqi.score(steer.aqi.measure(X, prompts.axiom, prompts.label, prompts.axioms), "sweep")
    assert overall[1, 3] == pytest.approx(row["aqi"], rel=1e-4)


@pytest.mark.slow
def test_the_side_is_followed_throughout(lab):
    """On the rejected side `matched` calibrates on rejected texts, and the error table is about them."""
    report = sweep(
        lab, "sweep_rejected", "--side=rejected", "--pooling=mean", "--inject=matched", "--lambdas=0,1"
    )
    assert report["errors"]["matched"]["calibration"] < 1e-3
    vector = steer.Vector.load(lab / "steer")
    sft, tokenizer = vector.model("sft")
    config = steer.SteerConfig(side="rejected", pooling="mean", layers=2)
    other = sweeps.injection_errors(sft, vector.texts(tokenizer)["rejected"], vector, config)
    assert other["cumulative"] == report["errors"]["cumulative"]


@pytest.mark.slow
def test_a_sweep_is_not_done_twice(lab, swept, capsys):
    before = (lab / "swept/aqi.json").stat().st_mtime_ns
    assert sweep(lab, "swept") == swept
    out = capsys.readouterr().out
    assert "finished" in out and "verdict: " in out and (lab / "swept/aqi.json").stat().st_mtime_ns == before
    shutil.copytree(lab / "swept", lab / "swept_again")
    sweep(lab, "swept_again", "--rescale")
    assert "other rescale: done again" in capsys.readouterr().out


@pytest.mark.slow
def test_new_plots_do_not_stand_beside_an_older_report(lab, swept, monkeypatch):
    """Killed between the two, a sweep of the old settings would take the report for its own, plots and all."""

    def killed(*_):
        raise KeyboardInterrupt

    shutil.copytree(lab / "swept", lab / "replotted")
    monkeypatch.setattr(steer, "_plot", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(lab, "replotted", "--rescale", plots=True)
    assert (lab / "replotted/aqi.csv").exists() and not (lab / "replotted/aqi.json").exists()


@pytest.mark.slow
def test_prompts_that_are_cut_elsewhere_are_another_sweep(lab, capsys):
    """All texts fit either length, so the vector is the same to the bit; a prompt of 100 words does not.

    It is asked without its end: an answer to all of it would lie beyond what the model reads.
    """
    rows = (lab / "prompts.csv").read_text().splitlines()
    (lab / "long.csv").write_text("\n".join([*rows, "calm,safe," + "good " * 100]) + "\n")
    for length in (512, 64):
        vector = extract(lab, "cut", f"--max_text_tokens={length}")
        report = sweep(lab, "sweep_cut", f"--prompts={lab}/long.csv", "--lambdas=0,1", folder="cut")
        assert "1 of 25 prompts are asked without their ends, which the model cannot read" in report["notes"]
    assert (
        all(len(ids) < 64 for side in vectors.SIDES for ids, _ in documents(lab, side))
        and vector.manifest["max_text_tokens"] == 64
    )
    assert "sweep_cut/aqi.json: made from other prompts: done again" in capsys.readouterr().out


@pytest.mark.parametrize("template", [None, "tulu"])
@pytest.mark.parametrize("word", ["good ", "é", "🙂"])
def test_a_prompt_is_cut_to_what_the_model_reads(lab, word, template):
    tokenizer = Tokenizer.from_dir(lab / "sft")
    whole = steer._prompt_ids(word * 90, tokenizer, template)
    assert steer._short_prompt_ids(word * 90, tokenizer, template, len(whole)) == (whole, False)
    for limit in (len(whole) - 1, 70):
        ids, is_cut = steer._short_prompt_ids(word * 90, tokenizer, template, limit)
        assert is_cut and limit - 8 <= len(ids) <= limit
        assert ids[:8] == whole[:8] and ids[-3:] == whole[-3:]  # the template's own


@pytest.mark.slow
def test_what_the_vector_does_not_show_is_another_sweep(lab, capsys):
    """Its bytes stay with another lm_head, which decides log-probs; so do the prompts' texts with other names
    of axioms or tokens.
    """
    for name in ("sft", "dpo"):
        shutil.copytree(lab / name, lab / f"unseen_{name}")
    shutil.copy(lab / "prompts.csv", lab / "unseen.csv")

    def run():
        vector = extract(lab, "unseen", sft="unseen_sft", dpo="unseen_dpo")
        capsys.readouterr()
        report = sweep(lab, "sweep_unseen", f"--prompts={lab}/unseen.csv", "--lambdas=0,1", folder="unseen")
        return vector.folder.joinpath("vector.safetensors").read_bytes(), report, capsys.readouterr().out

    before, first, _ = run()
    change_weights(lab / "unseen_sft", lambda weights: weights["lm_head.weight"].mul_(2))
    after, second, out = run()
    assert before == after and "made from other sft: done again" in out
    assert first["behaviour"][0]["logp_chosen"] != second["behaviour"][0]["logp_chosen"]
    (lab / "unseen.csv").write_text((lab / "unseen.csv").read_text().replace("calm,", "cool,"))
    _, third, out = run()
    assert "made from other prompts: done again" in out and [
        found["category"] for found in third["verdicts"]
    ][1:] == ["cool", "kind"]
    (lab / "unseen.csv").write_text((lab / "unseen.csv").read_text().replace("good ", "good 9 "))
    run()
    for name in ("sft", "dpo"):
        core = json.loads((lab / f"unseen_{name}/tokenizer.json").read_text())
        core["normalizer"] = {
            "type": "Replace",
            "pattern": {"String": "9"},
            "content": "8",
        }  # no text of the vector has a 9
        (lab / f"unseen_{name}/tokenizer.json").write_text(json.dumps(core))
    assert "made from other prompts: done again" in run()[2] and "finished" in run()[2]


@pytest.mark.slow
def test_a_sweep_in_another_precision_is_another(lab, swept, monkeypatch, capsys):
    """What a GPU has measured in bf16 is not finished on a CPU, which reads float32."""
    shutil.copytree(lab / "swept", lab / "swept_elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(steer, "dtype_for", lambda config: torch.bfloat16)
        assert sweep(lab, "swept_elsewhere")["inputs"]["dtype"] == "torch.bfloat16"
    capsys.readouterr()
    assert sweep(lab, "swept_elsewhere")["inputs"]["dtype"] == "torch.float32"
    assert "made from other dtype: done again" in capsys.readouterr().out


@pytest.mark.slow
def test_lambdas_without_zero(lab, swept):
    """The shift is still measured from the unsteered model, and the profile still begins there."""
    report = sweep(lab, "no_zero", "--lambdas=0.5,1")
    for shift, expected in zip(report["shifts"], swept["shifts"][2::2], strict=True):
        assert shift.pop("strength") == pytest.approx(expected["strength"])
        assert shift == pytest.approx({key: expected[key] for key in shift})
    assert report["verdicts"][0]["estimate"] == pytest.approx(swept["verdicts"][0]["estimate"][2::2])
    assert {row["lambda"] for row in report["profile"]} == {0, 1}


@pytest.mark.slow
def test_the_profile_is_written_once_where_the_last_lambda_is_zero(lab):
    sweep(lab, "to_zero", "--lambdas=-1,0")
    lines = (lab / "to_zero/tables.txt").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("raw separation after each block, lambda 0:")]
    assert len(line.partition(": ")[2].split()) == L


def test_one_lambda_makes_no_curve(lab, monkeypatch):
    monkeypatch.setattr(vectors, "load_model", unread)
    with pytest.raises(ValueError, match="lambdas=.*expected two or more, ascending"):
        sweep(lab, "none", "--lambdas=1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--space=pca:13",),
            "space='pca:13': expected at most pca:12, as many as the smallest axiom has texts",
        ),
        (("--seeds=2",), "seeds=2: space='raw' has no random start; expected --space=tsne"),
        (("--normalize=anchors",), "normalize='anchors': a scale for several models, of aqi.py score"),
    ],
)
def test_spaces_that_cannot_be_are_refused_before_a_model_is_read(lab, monkeypatch, options, message):
    monkeypatch.setattr(vectors, "load_model", unread)
    with pytest.raises(ValueError, match=message):
        sweep(lab, "none", *options)


@pytest.mark.slow
def test_one_axiom(lab):
    write_prompts(lab / "one.csv", axioms=("calm",))
    report = sweep(lab, "one", f"--prompts={lab}/one.csv", "--lambdas=0,1")
    axiom, overall = (
        next(v for v in report["verdicts"] if v["category"] == name) for name in ("calm", "overall")
    )
    assert axiom["estimate"] == pytest.approx(overall["estimate"])


def test_one_label_only_is_refused(lab):
    rows = (lab / "prompts.csv").read_text().splitlines()
    (lab / "unsafe.csv").write_text("\n".join(row for row in rows if ",safe," not in row) + "\n")
    with pytest.raises(
        ValueError, match=r"calm \(0 safe, 6 unsafe\).*expected at least two texts of either label"
    ):
        sweep(lab, "none", f"--prompts={lab}/unsafe.csv")


@pytest.mark.slow
def test_embeddings_with_nan_are_refused(lab):
    """An addition that overflows float32 on its way through the last norm."""
    with pytest.raises(ValueError, match="NaN or infinity"):
        sweep(lab, "none", "--lambdas=0,1e38")


@pytest.mark.slow
def test_changed_texts_are_refused(lab):
    shutil.copy(lab / "texts.jsonl", lab / "edited.jsonl")
    extract(lab, "edited", texts="edited.jsonl")
    rows = (lab / "edited.jsonl").read_text().splitlines()
    (lab / "edited.jsonl").write_text("\n".join(rows[1:]) + "\n")
    with pytest.raises(
        ValueError, match="not the token ids of the vector in .*edited; expected the file unchanged"
    ):
        sweep(lab, "none", folder="edited")


def test_rows_that_are_no_pair_are_left_out_and_counted(lab, capsys):
    """As in DPO: PKU rows with two safe responses or none say nothing about which one to prefer."""
    rows = [{"prompt": "help", "response_0": "yes", "response_1": "no", "is_response_0_safe": safe, "is_response_1_safe": True}
            for safe in (True, False, True, False)]  # fmt: skip
    write_rows(lab / "pku.jsonl", rows)
    found = vectors.text_pairs(f"{lab}/pku.jsonl", 2, Tokenizer.from_dir(lab / "sft"), "tulu", 64)
    assert [len(found[side]) for side in vectors.SIDES] == [2, 2]
    said = capsys.readouterr().out
    assert "pku.jsonl': 4 rows: 2 pairs, 2 dropped for not exactly one safe response; " in said


def test_a_pair_without_an_answer_is_left_out_and_counted(lab, capsys):
    """As in DPO: under a template, a side that is cut before its answer leaves nothing to read."""
    tokenizer = Tokenizer.from_dir(lab / "sft")
    rows = [{"prompt": "good " * length, "chosen": "yes", "rejected": "no"} for length in (1, 200, 2, 3)]
    write_rows(lab / "long.jsonl", rows)
    found = vectors.text_pairs(f"{lab}/long.jsonl", 3, tokenizer, "tulu", 64)
    said = capsys.readouterr().out
    assert "long.jsonl': 4 rows: 3 pairs, 1 dropped without an answer in the first 64 tokens; " in said
    assert [len(found[side]) for side in vectors.SIDES] == [3, 3] and all(
        mask.any() for side in vectors.SIDES for _, mask in found[side]
    )
    with pytest.raises(ValueError, match="3 pairs, 1 dropped without .*; expected 4 pairs"):
        vectors.text_pairs(f"{lab}/long.jsonl", 4, tokenizer, "tulu", 64)


def faulty_pairs(kept=12):
    """Pairs of which one has equal answers, one an empty answer, one a rendered prompt, one was there before,
    and one answers two prompts.
    """
    rows = [{"prompt": f"help {i} me", "chosen": "yes", "rejected": "no"} for i in range(kept)]
    rows[1]["rejected"], rows[2]["rejected"] = "yes", ""
    rows[3]["prompt"] = "<|user|>\nhelp"
    rows[4] = rows[0]
    rows[5]["rejected"] = "good " * 100  # cut at 64 tokens
    turns = [[{"role": "user", "content": word}, {"role": "assistant", "content": "a"}] for word in WORDS[:2]]
    messages = [[row["prompt"], row["chosen"], row["rejected"]] for row in rows]
    rows = []
    for prompt, *answers in messages:
        asked = {"role": "user", "content": prompt}
        sides = [[asked, {"role": "assistant", "content": answer}] for answer in answers]
        rows.append({"chosen": sides[0], "rejected": sides[1], "score": 1})
    return [*rows, {"chosen": turns[0], "rejected": turns[1], "score": 1}]


def test_the_vectors_texts_are_counted_as_in_training(lab, capsys):
    """The same findings in the same words as load_preferences on the same file; transcripts too."""
    tokenizer, said = Tokenizer.from_dir(lab / "sft"), []
    path = str(lab / "faulty.jsonl")
    write_rows(Path(path), faulty_pairs())
    config = SimpleNamespace(
        data={path: 1.0}, data_eval=None, rows="choice", template="tulu", max_seq_len=64, supervise="all",
        cache_dir=f"{lab}/cache", share_prefix=True,
    )  # fmt: skip
    load_preferences(config, tokenizer, said.append)
    (line,) = said
    assert all(finding in line for finding in (
        "1 dropped for sides that answer different prompts", "1 conversations truncated",
        "1 pairs with two equal answers", "1 empty answer, 1 duplicate",
        "WARNING: 1 prompts hold a rendered template", "columns not read: score",
    ))  # fmt: skip
    with pytest.raises(ValueError) as refused:
        vectors.text_pairs(path, 13, tokenizer, "tulu", 64)
    found = line.removeprefix("data: ").replace("12 train", "12 pairs")
    assert str(refused.value).startswith(f"texts {path!r}: {found}; expected 13 pairs")

    transcripts = []
    for row in faulty_pairs():
        sides = {}
        for side in vectors.SIDES:
            (_, asked), (_, answer) = (turn.values() for turn in row[side])
            sides[side] = f"\n\nHuman: {asked}\n\nAssistant: {answer}"
        transcripts.append(sides)
    write_rows(Path(path), transcripts)
    vectors.text_pairs(path, 12, tokenizer, None, 64)
    (line,) = capsys.readouterr().out.splitlines()
    assert all(finding in line for finding in (
        "12 rows: 12 pairs, 0 dropped", "1 conversations truncated", "1 pairs with two equal answers",
        "1 empty answer, 1 duplicate", "WARNING: 1 prompts hold a rendered template",
    ))  # fmt: skip


def test_no_prompt_is_both_the_vectors_and_held_out(lab):
    """The vector's pairs are the first ones; held out are the next ones of other prompts, blanks aside."""
    tokenizer, path = Tokenizer.from_dir(lab / "sft"), f"{lab}/repeated.jsonl"
    asked = ["help", "cat", "dog", "help ", "\ndog", "slow", "cat", "fast"]
    rows = [{"prompt": prompt, "chosen": f"good {i}", "rejected": "bad"} for i, prompt in enumerate(asked)]
    write_rows(Path(path), rows)
    found = vectors.text_pairs(path, 4, tokenizer, "tulu", 64, held_out=2)["chosen"]
    expected = []
    for i in (0, 1, 2, 3, 5, 7):
        turns = [{"role": "user", "content": asked[i]}, {"role": "assistant", "content": f"good {i}"}]
        expected.append(encode_chat(turns, tokenizer, "tulu", 64)[0])
    assert [ids.tolist() for ids, _ in found] == expected
    write_rows(Path(path), rows[:3] * 40)
    wanted = "4 of the vector .* 0 held out, 116 dropped for a prompt that the .*; expected 4 pairs, and 1 of other"
    with pytest.raises(ValueError, match=wanted):
        vectors.text_pairs(path, 4, tokenizer, "tulu", 64, held_out=1)


def test_pairs_that_are_none_are_refused(lab):
    tokenizer, path = Tokenizer.from_dir(lab / "sft"), f"{lab}/refused.jsonl"
    write_rows(Path(path), [{"prompt": f"help {i}", "chosen": "yes", "rejected": "yes"} for i in range(5)])
    with pytest.raises(ValueError, match="5 pairs with two equal answers .*; expected pairs of different"):
        vectors.text_pairs(path, 5, tokenizer, "tulu", 64)
    sides = [{side: f"\n\nHuman: {i} {side}\n\nAssistant: a" for side in vectors.SIDES} for i in range(5)]
    same = {side: f"\n\nHuman: me\n\nAssistant: {side}" for side in vectors.SIDES}
    write_rows(Path(path), [*sides, same])
    with pytest.raises(ValueError, match="5 of 6 rows dropped for sides that answer different prompts"):
        vectors.text_pairs(path, 1, tokenizer, None, 64)


def test_labelled_texts_that_are_cut_are_counted(lab, capsys):
    tokenizer = Tokenizer.from_dir(lab / "sft")
    documents = vectors.labelled_documents(["help me", "good " * 100, "bad " * 100], tokenizer, 64)
    plain = [vectors.plain_document(text, tokenizer, 64)[0].tolist() for text in ("help me", "good " * 100)]
    assert [ids.tolist() for ids, _ in documents[:2]] == plain
    assert capsys.readouterr().out == "prompts: 2 of 3 texts truncated at max_text_tokens=64\n"


def test_texts_that_the_model_cannot_read_are_refused(lab, monkeypatch):
    """The model's max_position_embeddings is 128; training refuses a longer max_seq_len."""
    monkeypatch.setattr(vectors, "load_model", unread)
    rows = [json.loads(line) for line in (lab / "texts.jsonl").read_text().splitlines()]
    rows[3]["rejected"] += " good" * 200
    write_rows(lab / "long_texts.jsonl", rows)
    wanted = "expected at most max_position_embeddings=128 of '.*sft', by --max_text_tokens=128"
    with pytest.raises(ValueError, match=f"long_texts.jsonl': the longest text has 2.. tokens; {wanted}"):
        extract(lab, "none", texts="long_texts.jsonl")
    prompts = (lab / "prompts.csv").read_text().splitlines()
    (lab / "long.csv").write_text("\n".join([*prompts, "calm,safe," + "good " * 200]) + "\n")
    with pytest.raises(ValueError, match=f"prompts '.*long.csv': the longest text has 2.. tokens; {wanted}"):
        sweep(lab, "none", f"--prompts={lab}/long.csv")


@pytest.mark.slow
def test_per_run_warns_about_its_scales(lab):
    report = sweep(lab, "per_run", "--normalize=per_run", "--lambdas=0,1")
    out = (lab / "per_run/tables.txt").read_text()
    assert (
        "puts each of the 2 runs on its own scale" in out
        and "CHI and XB of two clusters are one statistic" in out
    )
    assert {row["normalize"] for row in report["rows"]} == {"per_run"}


@pytest.mark.slow
def test_all_indices(lab):
    """In the table, the csv and the json."""
    report = sweep(lab, "indices", "--all_indices", "--lambdas=0,1")
    assert all(
        -1 <= row["silhouette"] <= 1 and 0 <= row["probe_auc"] <= 1 and row["dunn"] > 0
        for row in report["rows"]
    )
    printed, written = (lab / "indices/tables.txt").read_text(), (lab / "indices/aqi.csv").read_text()
    assert all(name in printed and name in written for name in steer.aqi.EXTRA)


@pytest.mark.slow
def test_all_indices_of_a_small_axiom_are_measured_and_noted(lab):
    """Axiom kind has four texts of a label, and the probe's folds are five."""
    lines = write_prompts(lab / "uneven.csv").read_text().splitlines()
    uneven = [line for number, line in enumerate(lines) if number not in (13, 14, 19, 20)]
    (lab / "uneven.csv").write_text("\n".join(uneven))
    report = sweep(lab, "uneven", f"--prompts={lab}/uneven.csv", "--all_indices", "--lambdas=0,1")
    unprobed = [row["category"] for row in report["rows"] if row["probe_auc"] is None]
    assert unprobed == ["kind"] * 2 and all(row["dunn"] > 0 for row in report["rows"])
    assert any("no probe_auc of 1 of 3 categories (kind)" in note for note in report["notes"])


@pytest.mark.slow
def test_tsne_over_several_seeds(lab):
    """Mean and sd of each lambda beside the table; one draw is warned about."""
    write_prompts(lab / "tsne.csv", axioms=("calm",))
    report = sweep(lab, "tsne", f"--prompts={lab}/tsne.csv", "--space=tsne", "--seeds=3", "--lambdas=0,1")
    assert {row["seed"] for row in report["rows"]} == {0, 1, 2} and len(report["rows"]) == 2 * 2 * 3
    scores = [row["aqi"] for row in report["rows"] if row["lambda"] == 1 and row["category"] == "overall"]
    line = f"lambda 1: AQI {np.mean(scores):.2f}, sd {np.std(scores, ddof=1):.2f} over 3 seeds"
    assert line in (lab / "tsne/tables.txt").read_text() and not any(
        "t-SNE is one draw" in text for text in report["warnings"]
    )


def test_repetition_by_hand():
    """1 2 1 2 1 2 1 has four 4-grams, two of them distinct; another answer's are its own; a text of three
    tokens has none.
    """
    assert sweeps.repetition([[1, 2, 1, 2, 1, 2, 1]]) == 0.5
    assert sweeps.repetition([[1, 2, 1, 2, 1, 2, 1], [1, 2, 1, 2], [5, 6, 7]]) == pytest.approx(2 / 5)
    assert sweeps.repetition([[1, 2, 3]]) == 0 == sweeps.repetition([[1, 2, 3, 4, 5]])


# ---------------------------------------------------------------- bake


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ("llama", "mistral"))
def test_transformers_runs_the_baked_checkpoint(lab, model_type):
    """The exported folder's logits are the steered ones, to 1e-5."""
    import transformers

    for name in ("sft", "dpo"):
        shutil.copytree(lab / name, lab / model_type / name, dirs_exist_ok=True)
        path = lab / model_type / name / "config.json"
        config = json.loads(path.read_text()) | {
            "model_type": model_type,
            "architectures": None,
            "sliding_window": None,
        }
        path.write_text(json.dumps(config))
    vector = extract(lab, f"{model_type}/steer", sft=f"{model_type}/sft", dpo=f"{model_type}/dpo")
    out = lab / model_type / "baked"
    steer.main(["bake", str(vector.folder), "--strength=0.7", "--layers=3", f"--bake_dir={out}"])
    sft, _ = vector.model("sft")
    assert sft.config.model_type == model_type
    tap = steering_tap(additions("cumulative", vector.tensors["chosen_last"], [1, 2, 3]), 0.7)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours, _ = families.load_pretrained(out)
    for ids, _ in documents(lab)[:3]:
        ids = torch.tensor(ids).long()
        with torch.no_grad():
            expected = sft(*stream([ids]), tap=tap) @ sft.lm_head.weight.T
            plain = sft(*stream([ids])) @ sft.lm_head.weight.T
            assert (
                relative_error(theirs(ids[None]).logits[0], expected)
                < 1e-5
                < 1e-2
                < relative_error(plain, expected)
            )
            assert relative_error(ours(*stream([ids])) @ ours.lm_head.weight.T, expected) < 1e-5


@pytest.mark.slow
def test_baking_a_negative_strength_starts_from_the_dpo_model(lab):
    steer.main(
        [
            "bake",
            f"{lab}/steer",
            "--strength=-1",
            "--inject=matched",
            "--layers=2",
            f"--bake_dir={lab}/unbaked",
        ]
    )
    baked, _ = families.load_pretrained(lab / "unbaked")
    sft, _ = families.load_pretrained(lab / "sft")
    texts = documents(lab)[:COUNT]
    assert relative_error(*(mean_states(model, texts, "cpu")[0, -1] for model in (baked, sft))) < 1e-4


def test_a_bake_that_cannot_be_exact_is_refused(lab, capsys):
    """Also as a command: a message and exit code 1."""
    argv = ["bake", f"{lab}/steer", "--strength=1", "--rescale", f"--bake_dir={lab}/none"]
    with pytest.raises(ValueError, match="rescale: what it adds depends on the token"):
        steer.main(argv)
    assert parallel.run(steer.main, argv) == 1 and capsys.readouterr().err.startswith("error: rescale")
    for strength in ("nan", "inf"):
        with pytest.raises(ValueError, match=f"strength={strength}: expected float"):
            steer.main(["bake", f"{lab}/steer", f"--strength={strength}", f"--bake_dir={lab}/none"])


def test_a_bake_does_not_replace_its_model(lab):
    before = (lab / "dpo/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="the dpo model itself, which a bake would replace"):
        steer.main(["bake", f"{lab}/steer", "--strength=-1", "--layers=1", f"--bake_dir={lab}/steer/../dpo"])
    assert (lab / "dpo/model.safetensors").read_bytes() == before


# ---------------------------------------------------------------- validate


@pytest.fixture
def pairs(lab, monkeypatch, tmp_path):
    """PAIRS of the test's own in configs/pairs.py's place."""
    table = {
        name: dict(sft=f"{lab}/sft", dpo=f"{lab}/{dpo}", template=None)
        for name, dpo in (("near", "dpo"), ("far", "far"))
    }
    table |= {"odd": dict(not_representable="it is odd")}
    monkeypatch.setattr(steer, "_plot", lambda *_: None)  # half of the time of a sweep here
    monkeypatch.setattr(
        steer.runpy, "run_path", lambda path: {"PAIRS": table, "GROUPS": {"both": ("near", "far")}}
    )
    return [
        f"--texts={lab}/texts.jsonl",
        f"--prompts={lab}/prompts.csv",
        "--count=8",
        "--layers=2",
        f"--out_dir={tmp_path}/v",
        *SHORT,
    ]


@pytest.mark.slow
def test_validate_compares_pairs_on_one_scale_and_resumes(pairs, capsys, tmp_path):
    """Both begin at the same SFT model and so at the same separation; the second call measures nothing
    again.
    """
    steer.main(["validate", "near", "far", *pairs, "--lambdas=0,1"])
    first = capsys.readouterr().out
    head, near, far = first.splitlines()[-3:]
    assert (
        "wrote" in first
        and head.startswith("pair")
        and near.split()[1] == far.split()[1]
        and near.split()[2] != far.split()[2]
    )
    assert near.startswith("near") and far.startswith("far")
    assert first.count("layers below: ") == 2  # of a model of 32 the table would be longer than the verdict
    assert all(any(line.endswith(decision) for decision in DECISIONS) for line in (near, far))
    report = tmp_path / "v/near_sanity/sweep_cumulative/aqi.json"
    before = report.stat().st_mtime_ns
    steer.main(["validate", "both", *pairs, "--lambdas=0,1"])
    again = capsys.readouterr().out
    assert (
        "wrote" not in again
        and again.count("finished, of the same inputs") == 4
        and report.stat().st_mtime_ns == before
    )
    assert again.splitlines()[-3:] == first.splitlines()[-3:]
    found = json.loads(report.read_text())
    _, (far, near), *_ = ladder.find(tmp_path / "v")
    assert (near.name, far.name) == ("near_sanity (cumulative)", "far_sanity (cumulative)")
    assert near.report["verdicts"] == found["verdicts"] and near.sft == far.sft and near.dpo != far.dpo
    assert (near.report["pair"], far.report["pair"]) == ("near", "far")
    text = (tmp_path / "v/report.html").read_text()
    assert (
        f"page: {tmp_path}/v/report.html" in first
        and "near_sanity/sweep_cumulative" in text
        and "far_sanity/sweep_cumulative" in text
    )
    pytest.importorskip("matplotlib")
    assert (tmp_path / "v/axioms.png").is_file()


def test_two_sweeps_of_a_pair_have_a_page_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steer.page, "write", lambda folders, out: out.write_text(str(folders)))
    pairs = {"one": SimpleNamespace(out_dir=str(tmp_path), inject="matched")}
    for name in ("xstest", "own"):
        (tmp_path / name).mkdir()
        steer._write_pages(pairs, SimpleNamespace(report_dir=f"{tmp_path}/{name}"))
    steer._write_pages(pairs, SimpleNamespace(report_dir=None))
    pages = [f"{tmp_path}/{name}report.html" for name in ("xstest/", "own/", "")]
    assert capsys.readouterr().out.splitlines() == [f"page: {path}" for path in pages]


@pytest.mark.slow
def test_a_config_is_its_own_pair(lab, capsys, monkeypatch):
    """What its DPO run starts from and what it ends with, its own template, texts and prompts; a key on the
    command line wins.
    """
    shutil.copytree(lab / "dpo", lab / "own/dpo/final")
    run = f"max_seq_len=64, data={{'x.jsonl': 1.0}}, global_batch_size=2, tokens_per_microbatch=256, lr=1e-5, out_dir='{lab}/own/"
    (lab / "own.py").write_text(
        f"common = dict(template='tulu')\n"
        f"sft = dict(model_path='base', {run}sft')\n"
        f"dpo = dict(model_path='{lab}/sft', {run}dpo')\n"
        f"steer = dict(texts='{lab}/chats.jsonl', count=8, layers=2, max_new_tokens=6, lambdas=(0, 1), inject='matched')\n"
        f"aqi = dict(prompts='{lab}/prompts.csv')\n"
    )
    write_rows(
        lab / "chats.jsonl",
        [{"prompt": f"help {word}", "chosen": "good", "rejected": "bad"} for word in WORDS[:12]],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steer, "_plot", lambda *_: None)
        steer.main(["validate", f"{lab}/own.py", "--inject=increment"])
    folder = lab / "own/steer_sanity"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["pair"] == "own"
        and manifest["inputs"]["template"] == "tulu"
        and manifest["inputs"]["count"] == 8
    )
    assert (
        manifest["inputs"]["sft_path"] == f"{lab}/sft"
        and manifest["inputs"]["dpo_path"] == f"{lab}/own/dpo/final"
    )
    assert json.loads((folder / "sweep_increment/aqi.json").read_text())["inputs"]["lambdas"] == [0, 1]
    capsys.readouterr()
    steer.main(["spectrum", f"{lab}/own.py"])
    assert len(capsys.readouterr().out.splitlines()) == L + 1
    with pytest.raises(ValueError, match="own/dpo/final.*nowhere' layers|nowhere': no such folder"):
        steer.main(["extract", f"{lab}/own.py", f"--sft_path={lab}/nowhere", f"--out_dir={lab}/none"])


def write_own(root, name, lab, dpo, **steer_keys):
    """root/name.py, whose DPO run went from lab's sft to its `dpo`."""
    steer_keys = dict(texts=f"{lab}/texts.jsonl", count=8, layers=2, max_new_tokens=6) | steer_keys
    run = dict(
        max_seq_len=64, data={"x.jsonl": 1.0}, global_batch_size=2, tokens_per_microbatch=256, lr=1e-5,
        model_path=f"{lab}/sft", out_dir=f"{root}/{name}/dpo",
    )  # fmt: skip
    shutil.copytree(lab / dpo, root / name / "dpo/final")
    path = root / f"{name}.py"
    path.write_text(f"dpo = {run!r}\nsteer = {steer_keys!r}\n")
    return str(path)


def patched_pairs(monkeypatch, lab):
    """configs/pairs.py with one pair of the test's own; other files are read as they are."""
    run_path, table = steer.runpy.run_path, {"far": dict(sft=f"{lab}/sft", dpo=f"{lab}/far", template=None)}
    monkeypatch.setattr(
        steer.runpy,
        "run_path",
        lambda path: dict(PAIRS=table, GROUPS={}) if Path(path).name == "pairs.py" else run_path(path),
    )


@pytest.mark.slow
def test_validate_compares_configs_and_registered_pairs(lab, monkeypatch, tmp_path, capsys):
    """One's own two runs and a registered pair on one page, each in its own folder."""
    monkeypatch.setattr(steer, "_plot", lambda *_: None)
    patched_pairs(monkeypatch, lab)
    paths = [write_own(tmp_path, "one", lab, "dpo"), write_own(tmp_path, "two", lab, "far")]
    keys = [
        f"--prompts={lab}/prompts.csv",
        "--lambdas=0,1",
        f"--texts={lab}/texts.jsonl",
        "--count=8",
        "--layers=2",
    ]
    steer.main(["validate", *paths, *keys, *SHORT])
    out = capsys.readouterr().out
    one, two = (line.split() for line in out.splitlines()[-2:])
    assert (one[0], two[0]) == ("one", "two") and one[1] == two[1] and one[2] != two[2]
    text = (tmp_path / "report.html").read_text()
    assert f"page: {tmp_path}/report.html" in out, "in the folder of both, and in no run of theirs"
    assert "one/steer_sanity/sweep_cumulative" in text and "two/steer_sanity/sweep_cumulative" in text

    steer.main(["validate", paths[0], "far", *keys, *SHORT, f"--out_dir={tmp_path}/v"])
    far, again = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert (far[0], far[1:]) == ("far", two[1:]) and again == one
    text = (tmp_path / "v/report.html").read_text()
    assert "far_sanity/sweep_cumulative" in text and "one_sanity/sweep_cumulative" in text


def test_configs_that_cannot_be_compared_are_refused(lab, monkeypatch, tmp_path):
    patched_pairs(monkeypatch, lab)
    one, two = write_own(tmp_path, "one", lab, "dpo"), write_own(tmp_path, "two", lab, "far", layers=3)
    far = str(shutil.copy(one, tmp_path / "far.py"))
    same = str(shutil.copy(one, tmp_path / "same.py"))
    other = tmp_path / "other.py"
    other.write_text(Path(one).read_text().replace("texts.jsonl", "others.jsonl"))
    prompts, given = (
        f"--prompts={lab}/prompts.csv",
        [f"--texts={lab}/texts.jsonl", "--count=8", "--max_new_tokens=6"],
    )
    for argv, message in (
        (["validate", one, two, prompts], f"layers=2 in {one}, 3 in {two}: expected the same, .* by --layers="),
        (["validate", one, "far", prompts, *given], f"layers=2 in {one}, 5 in the other targets"),
        (["validate", one, "far", prompts], "missing 'texts'"),
        (["validate", one, two], f"{one}: aqi: missing 'prompts'"),
        (["validate", one, two, prompts, "--layers=2", "--texts=none"], f"{one}: steer: missing 'texts'"),
        (["validate", one, "nowhere", prompts, *given, "--layers=2"], "target 'nowhere': expected a config"),
        (["validate", one, str(lab / "dpo"), prompts, *given, "--layers=2"], "target '.*dpo': expected a config"),
        (["validate", one, "nowhere", prompts], "target 'nowhere': expected a config"),
        (["validate", one, same, prompts], "dpo_path='.*one/dpo/final': .* of pair 'one' and of pair 'same'"),
        (["validate", one, two, prompts, "--layers=2", "--dpo_path=x"], "dpo_path='x': with the same sft_path"),
        (["validate", one, str(other), prompts], "out_dir='.*one/steer_sanity': of pair 'one' and of pair 'other'"),
        (["extract", far, "far", *given], "max_new_tokens: a key that this command does not read"),
        (["extract", far, "far", *given[:2]], "target '.*far.py': a second pair named 'far'"),
        (["sweep", one, two, prompts], "targets .*one.py, .*two.py: expected one; extract and validate"),
        (["validate", one, two, prompts, "--layers=2", "--report_dir=x"], "report_dir='x': one folder for 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            steer.main(argv)


def test_targets_that_are_none(pairs, lab):
    with pytest.raises(
        ValueError, match="target 'nowhere': expected a config .*: one of near, far, odd, both"
    ):
        steer.main(["validate", "near", "nowhere", *pairs])
    with pytest.raises(ValueError, match="target 'nar': expected a config .*, did you mean 'near'?"):
        steer.main(["validate", "nar", *pairs])
    with pytest.raises(ValueError, match="pair='odd': it is odd"):
        steer.main(["validate", "odd", *pairs])
    with pytest.raises(ValueError, match="two models; expected --out_dir too"):
        steer.main(["extract", f"{lab}/sft", f"{lab}/dpo", "--texts=x"])
    with pytest.raises(ValueError, match="the target '.*steer' is the vector's folder; expected one of them"):
        steer.main(["spectrum", f"{lab}/steer", "--out_dir=x"])
    with pytest.raises(ValueError, match="targets near, far: expected one pair"):
        steer.main(["spectrum", "both"])
    with pytest.raises(ValueError, match="report_dir='x': one folder for 2 sweeps; expected --out_dir"):
        steer.main(["validate", "both", *pairs, "--report_dir=x"])


def test_what_is_missing_is_found_before_the_first_pair_is_read(pairs, lab, monkeypatch):
    monkeypatch.setattr(vectors, "load_model", unread)
    with pytest.raises(ValueError, match="data 'none.csv': no such file"):
        steer.main(["validate", "near", *pairs, "--prompts=none.csv"])
    (lab / "far").rename(lab / "away")
    with pytest.raises(ValueError, match="model_path='.*far': no such folder"):
        steer.main(["validate", "near", "far", *pairs])
    (lab / "away").rename(lab / "far")


def test_registered_pairs_are_complete():
    """The names of the published comparison and of the ladder; a pair is two models and a template, or says
    why it cannot be.
    """
    table = steer.runpy.run_path(Path(steer.__file__).parent / "configs/pairs.py")
    pairs, groups = table["PAIRS"], table["GROUPS"]
    wanted = {"Llama31_Tulu", "Mistral_7B", "Zephyr_7B", "Falcon_7B", "Llama3_8B", "Qwen2_7B", "Gemma2_9B"}
    assert wanted <= pairs.keys()
    kinds = {"sft", "dpo", "template"}, {"sft", "dpo", "template", "made", "source"}, {"not_representable"}
    assert all(pair.keys() in kinds for pair in pairs.values())
    assert not groups.keys() & pairs.keys() and all(
        "sft" in pairs[name] for group in groups.values() for name in group
    )
