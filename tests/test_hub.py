"""plumbing/hub.py and who uses it, with the real clients against a hub on 127.0.0.1 (local_hub.py): names,
pins, downloads, pushing.
"""

import json
import os
import shutil
import subprocess
import sys
import types
from functools import partial

import local_hub
import pytest
import torch
from huggingface_hub import constants
from tiny_models import random_documents, random_llama, stream, tiny_config
from world import ROOT, change_weights, launch, metrics, write_config

import families
import steer
from model import LlamaConfig, apply_lora
from planner import atlas
from planner.budget import find_gpu
from plumbing import adapters, hub, weights
from plumbing.files import UserError
from plumbing.sources import open_source
from tools import push

UNKNOWN = "f" * 40


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An empty hub, an empty cache, a token that may write, and no commit recorded yet."""
    server = local_hub.LocalHub()
    local_hub.use(server.url, tmp_path / "cache", local_hub.WRITER, monkeypatch.setattr, monkeypatch.setenv)
    monkeypatch.setattr(hub, "COMMITS", {})
    yield server
    server.close()
    assert not [one for one in server.requests if one.get("status") == 501], (
        "asked for what this hub does not have"
    )


@pytest.fixture
def sharded(monkeypatch, tmp_path, world):
    """run/final of a finished run, world/base in eleven shards."""
    with monkeypatch.context() as patch:
        patch.setattr(weights, "MAX_FILE_BYTES", 10_000)
        weights.save_pretrained(*families.load_pretrained(world / "base"), tmp_path / "run/final")
    (tmp_path / "run/manifest.json").write_text('{"finished": "now"}')
    return tmp_path / "run/final"


def contents(folder, prefix=""):
    return {prefix + path.name: path.read_bytes() for path in folder.iterdir()}


def logits(path):
    model, tokenizer = families.load_pretrained(path)
    with torch.no_grad():
        return model.lm_head(model(*stream(random_documents(tokenizer.vocab_size))))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", ("org/name", None)),
        ("allenai/Llama-3.1-Tulu-3-8B@v1.0", ("allenai/Llama-3.1-Tulu-3-8B", "v1.0")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("org/name@", None),
        ("name", None),
        ("a/b/c", None),
        ("/a/b@c", None),
    ],
)
def test_names(name, expected):
    assert hub.parse(name) == expected


# ---------------------------------------------------------------- models


@pytest.mark.slow
def test_a_pinned_model_keeps_its_weights(server, sharded, world, tmp_path):
    """By tag and by commit, after main went on; each name's commit is recorded."""
    old = server.commit("models/org/name", sharded, tag="v1")
    (tmp_path / "new").mkdir()
    for name, content in contents(world / "base").items():
        (tmp_path / "new" / name).write_bytes(content)
    change_weights(tmp_path / "new", lambda tensors: tensors["model.norm.weight"].mul_(2))
    new = server.commit("models/org/name", tmp_path / "new")
    expected, changed = logits(world / "base"), logits(tmp_path / "new")
    assert not torch.equal(expected, changed)
    assert torch.equal(logits("org/name@v1"), expected) and torch.equal(logits(f"org/name@{old}"), expected)
    assert torch.equal(logits("org/name"), changed)
    assert hub.COMMITS == {"org/name@v1": old, f"org/name@{old}": old, "org/name": new}
    for name, reason in (("org/name@v2", "Revision Not Found"), ("org/none", "Repository Not Found")):
        with pytest.raises(
            ValueError,
            match=f"(?s)model_path='{name}': no such folder, and no such download from the hub: .*{reason}",
        ):
            weights.resolve(name)


@pytest.mark.slow
def test_an_adapter_names_the_revision_of_its_base_as_peft_does(server, world, tmp_path):
    server.commit("models/org/name", world / "base", tag="v1")
    server.commit("models/org/name", {"config.json": b"{}"})
    model = random_llama(tiny_config())
    apply_lora(model, 2, 4.0, targets=("q_proj",))
    adapters.save_adapter(model, tmp_path / "adapter", "org/name@v1")
    raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("org/name", "v1")
    base, adapter = steer.locate(str(tmp_path / "adapter"))
    assert adapter == tmp_path / "adapter" and (base / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_dropped_connection_is_resumed_by_the_same_call(server, sharded, monkeypatch):
    """The client keeps whole chunks (10 MiB, here 1000 bytes) and asks for the rest."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.commit("models/org/name", sharded)
    shard = "model-00002-of-00011.safetensors"
    size = (sharded / shard).stat().st_size
    server.cuts[shard] = [(0.5, "close")]
    families.load_pretrained("org/name")
    kept = size // 2 // 1000 * 1000
    assert kept and server.downloads()[shard] == [(None, size // 2), (f"bytes={kept}-", size - kept)]


@pytest.mark.slow
def test_a_download_that_broke_off_keeps_its_finished_files(server, sharded, monkeypatch):
    """A reset connection ends the call. The next one takes the broken file from its start, as this client
    (1.33) keeps no part of it.
    """
    commit = server.commit("models/org/name", sharded, tag="v1")
    shard = "model-00002-of-00011.safetensors"
    size = (sharded / shard).stat().st_size
    server.cuts[shard] = [(0.5, "reset")]
    with pytest.raises(
        ValueError,
        match="model_path='org/name@v1': no such folder, and no such download from the hub: .*reset",
    ):
        families.load_pretrained("org/name@v1")
    assert hub.COMMITS == {}
    local_hub.set_offline(True, monkeypatch.setattr)
    with pytest.raises(ValueError, match=f"model_path='org/name@v1': no such .* is incomplete: .*{shard}"):
        families.load_pretrained("org/name@v1")
    local_hub.set_offline(False, monkeypatch.setattr)
    families.load_pretrained("org/name@v1")
    downloads = server.downloads()
    assert downloads.pop(shard) == [(None, size // 2), (None, size)]
    assert downloads == {
        name: [(None, len(content))] for name, content in contents(sharded).items() if name != shard
    }
    assert hub.COMMITS == {"org/name@v1": commit}


@pytest.mark.slow
def test_offline_the_cache_is_all_there_is(server, sharded, tmp_path, monkeypatch):
    """Whole, it loads; without one shard, or with a torn one, it is refused by file."""
    commit = server.commit("models/org/name", sharded)
    weights.resolve("org/name@main")
    server.close()
    weights.resolve("org/name")  # nobody answers: the client takes what it has
    with pytest.raises(
        ValueError,
        match=f"model_path='org/name@{UNKNOWN}': no such folder, and no such download from the hub: .*refused",
    ):
        weights.resolve(f"org/name@{UNKNOWN}")
    local_hub.set_offline(True, monkeypatch.setattr)
    families.load_pretrained("org/name@main")
    assert hub.COMMITS == {"org/name@main": commit, "org/name": commit}
    cache = tmp_path / "cache/hub/models--org--name"
    shard = cache / f"snapshots/{commit}/model-00011-of-00011.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard.name}: truncated"):
        families.load_pretrained("org/name")
    shard.unlink()
    with pytest.raises(ValueError, match=f"model_path='org/name': no such .* is incomplete: .*{shard.name}"):
        families.load_pretrained("org/name")


# ---------------------------------------------------------------- data


@pytest.fixture
def rows(server, world):
    """org/rows: v1 with 35 rows to train on and 3 to test, main with 5 to test. [commit of v1, of main]."""
    lines = (world / "sft.jsonl").read_bytes().splitlines(True)
    files = [{"train.jsonl": b"".join(lines), "test.jsonl": b"".join(lines[:n])} for n in (3, 5)]
    return [
        server.commit("datasets/org/rows", files[0], tag="v1"),
        server.commit("datasets/org/rows", files[1]),
    ]


@pytest.mark.slow
def test_data_is_read_at_its_commit(rows, world):
    old, new = rows
    lengths = {"org/rows@v1[test]": 3, "org/rows[test]": 5, "org/rows@v1": 35, f"org/rows@{old}[test]": 3}
    assert {name: len(open_source(name)) for name in lengths} == lengths
    assert list(open_source("org/rows@v1")) == [
        json.loads(line) for line in (world / "sft.jsonl").read_text().splitlines()
    ]
    assert hub.COMMITS == {
        "datasets/org/rows@v1": old,
        "datasets/org/rows": new,
        f"datasets/org/rows@{old}": old,
    }


@pytest.mark.slow
def test_a_key_that_some_rows_of_the_hub_lack_is_null_there(server):
    server.commit(
        "datasets/org/gaps", {"train.jsonl": b'{"text": "Hi", "label": "safe"}\n{"label": "unsafe"}\n'}
    )
    assert open_source("org/gaps")[1] == {"text": None, "label": "unsafe"}
    server.commit("datasets/org/words", {"train.csv": b"text,label\nNone,safe\n,unsafe\n"})
    assert open_source("org/words")["text"] == ["None", None]  # only an empty cell of a csv is null


@pytest.mark.slow
def test_a_configuration_is_picked_by_name(server):
    """org/name[config/split]; without one, the error lists what there is."""
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}.jsonl\n  - split: test\n    path: other.jsonl\n"
        for name in ("main", "socratic")
    )
    files = {
        f"{name}.jsonl": json.dumps({"prompt": name}).encode() + b"\n"
        for name in ("main", "socratic", "other")
    }
    server.commit("datasets/org/several", files | {"README.md": f"{card}---\n".encode()})
    read = {
        part: open_source(f"org/several[{part}]")["prompt"]
        for part in ("main/", "socratic/train", "main/test")
    }
    assert read == {"main/": ["main"], "socratic/train": ["socratic"], "main/test": ["other"]}
    for name in ("org/several", "org/several[third/test]"):
        with pytest.raises(
            UserError, match=r"^[^\n]+main.+socratic[^\n]+; expected \"org/several\[CONFIG/SPLIT\]\"$"
        ):
            open_source(name)


BROKEN = {
    "torn.jsonl": b'{"prompt": "a"}\n{"pro',
    "types.jsonl": b'{"prompt": "a"}\n{"prompt": 1}\n',
    "no.parquet": b"no parquet",
    "cells.csv": b'a,b\n1,2\n"3',
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_what_the_library_cannot_read_is_named_in_one_line(server, name):
    server.commit("datasets/org/broken", {name: BROKEN[name]})
    with pytest.raises(UserError, match="^data 'org/broken': [^\n]+$"):
        open_source("org/broken")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "org/none",
            "data 'org/none': no such file or folder, and no such data from the hub: Dataset 'org/none' doesn't exist",
        ),
        ("org/none@v1", "data 'org/none@v1': the hub names no commit for 'v1'; .*Repository Not Found"),
        ("org/rows@v2", "data 'org/rows@v2': the hub names no commit for 'v2'; .*Revision Not Found"),
        (
            "org/rows@v1[val]",
            r"data 'org/rows@v1\[val\]': no split 'val'; expected \[split\] to be one of train, test",
        ),
    ],
)
def test_data_that_is_not_there_is_named(rows, name, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        open_source(name)
    assert not hub.COMMITS


@pytest.mark.slow
def test_data_whose_download_breaks_off_is_named(server, rows):
    server.cuts["train.jsonl"] = [(0.5, "reset")]
    with pytest.raises(
        ValueError, match="data 'org/rows@v1': no such file or folder, and no such data from the hub: .*reset"
    ):
        open_source("org/rows@v1")
    assert not hub.COMMITS and len(open_source("org/rows@v1")) == 35


@pytest.mark.slow
def test_another_commit_than_the_pinned_one_is_refused(server, rows, monkeypatch):
    """Offline, `datasets` falls back on the copy it made last, with a warning."""
    old, new = rows
    open_source("org/rows")
    local_hub.set_offline(True, monkeypatch.setattr)
    assert len(open_source(f"org/rows@{new}[test]")) == 5
    with pytest.raises(
        ValueError,
        match=f"the hub cannot be reached, the latest copy here is of commit {new}; expected {old}",
    ):
        open_source(f"org/rows@{old}[test]")
    with pytest.raises(ValueError, match="data 'org/rows@v1': the hub names no commit for 'v1'"):
        open_source("org/rows@v1")
    assert hub.COMMITS == {"datasets/org/rows": new, f"datasets/org/rows@{new}": new}


# ---------------------------------------------------------------- runs and pushes


def on(server, tmp_path, token=local_hub.WRITER):
    """What `launch` does first in each process."""
    return partial(local_hub.use, server.url, tmp_path / "cache", token)


@pytest.mark.slow
def test_the_manifest_has_the_commits_of_pinned_names(server, rows, world, tmp_path):
    commit = server.commit("models/org/name", world / "base", tag="v1")
    server.commit("models/org/name", {"config.json": b"{}"})
    config = write_config(
        tmp_path,
        world,
        max_steps=1,
        warmup_steps=0,
        model_path="org/name@v1",
        sft={"data": {"org/rows@v1": 1.0}},
    )
    launch("sft", config, prepare=on(server, tmp_path)).ok()
    assert json.loads((tmp_path / "sft/manifest.json").read_text())["hub"] == {
        "org/name@v1": commit,
        "datasets/org/rows@v1": rows[0],
    }


@pytest.mark.slow
def test_a_pushed_model_comes_back(server, sharded, world, tmp_path):
    """tools.push as a user calls it: file by file, private, equal logits. Of that, the next push leaves no
    shard and no adapter behind.
    """
    (sharded / "README.md").write_text("a card\n")
    adapter = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"weights"}
    (sharded.parent / "adapter").mkdir()
    for name, content in adapter.items():
        (sharded.parent / name).write_bytes(content)
    command = [sys.executable, "-m", "tools.push", str(tmp_path / "run"), "org/name"]
    variables = os.environ | local_hub.environment(server.url, tmp_path / "cache", local_hub.WRITER)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"pushed {tmp_path}/run to org/name\n", done.stderr
    repository = server.repositories["models/org/name"]
    assert repository.files == contents(sharded) | adapter and repository.visibility == "private"
    assert torch.equal(logits("org/name"), logits(world / "base"))
    weights.save_pretrained(*families.load_pretrained(sharded), tmp_path / "again/final")
    (tmp_path / "again/manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="again/final: no finished model; expected the out_dir of a run that"):
        push.main([f"{tmp_path}/again", "org/name"])  # final/ is an earlier run's
    shutil.copy(tmp_path / "run/manifest.json", tmp_path / "again/manifest.json")
    assert push.main([f"{tmp_path}/again", "org/name"]) == 0
    assert repository.files == contents(tmp_path / "again/final") | {"README.md": b"a card\n"}
    assert torch.equal(logits("org/name"), logits(world / "base"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_push_after_the_run_and_again_without_training(server, world, tmp_path, ranks):
    """final/ and adapter/ go up, once, with the card; the same command on the finished run trains nothing and
    pushes again.
    """
    config = write_config(tmp_path, world, save_every=4, lora_rank=2, lora_alpha=4.0)
    done = launch("sft", config, "--push=org/good", ranks=ranks, prepare=on(server, tmp_path)).ok()
    assert "pushed to org/good" in done.out[0] and len(server.asked("POST .*/commit/main")) == 2
    repository = server.repositories["models/org/good"]
    assert repository.files == contents(tmp_path / "sft/final") | contents(
        tmp_path / "sft/adapter", "adapter/"
    )
    assert {
        "README.md",
        "model.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    } <= repository.files.keys()
    steps = metrics(tmp_path / "sft")
    again = launch("sft", config, "--push=org/good", ranks=ranks, prepare=on(server, tmp_path)).ok()
    assert (
        "step 0000" not in again.out[0]
        and metrics(tmp_path / "sft") == steps
        and "pushed to org/good" in again.out[0]
    )
    assert repository.files == contents(tmp_path / "sft/final") | contents(
        tmp_path / "sft/adapter", "adapter/"
    )
    assert len(server.asked("PUT .*")) == 2, "model.safetensors and adapter_model.safetensors went up twice"
    keys = "--fresh", "--lora_rank=0", "--lora_alpha=none", "--push=org/good"
    launch("sft", config, *keys, ranks=ranks, prepare=on(server, tmp_path)).ok()
    assert repository.files == contents(tmp_path / "sft/final") and not (tmp_path / "sft/adapter").exists()
    assert weights.resolve("org/good").is_dir() and "adapter/adapter_config.json" not in server.downloads()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "reason"), [(local_hub.READER, "403 Forbidden"), ("hf_wrong", "Invalid user token")]
)
def test_a_token_that_may_not_write_stops_the_run_before_it_trains(server, world, tmp_path, token, reason):
    server.commit("models/org/theirs", {"config.json": b"{}"})
    config = write_config(tmp_path, world)
    failed = launch("sft", config, "--push=org/theirs", ranks=2, prepare=on(server, tmp_path, token))
    assert failed.codes == [1, 1] and not (tmp_path / "sft").exists()
    assert (
        failed.err[0].startswith("error: push='org/theirs': expected a repository that the token")
        and reason in failed.err[0]
    )
    assert len(server.asked("GET /api/models/org/theirs/auth-check/write")) == (token == local_hub.READER)


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/name@main"])
def test_a_push_needs_a_name(name):
    with pytest.raises(ValueError, match=f"push='{name}': expected a hub name like 'org/name'"):
        hub.open_for_push(name)


@pytest.mark.slow
@pytest.mark.parametrize("uploads", ["Request has expired", "Connection refused"])
def test_an_upload_that_fails_says_how_to_try_again(server, sharded, uploads):
    run = sharded.parent
    hub.open_for_push("org/name")
    server.expired = True
    if uploads == "Connection refused":
        server.close()
    with pytest.raises(
        ValueError,
        match=rf"(?s)push='org/name': the upload failed; `python -m tools.push {run} org/name` .*{uploads}",
    ):
        hub.push(run, "org/name")
    assert server.repositories["models/org/name"].files == {}


@pytest.mark.slow
def test_only_a_finished_run_is_pushed(server, tmp_path):
    with pytest.raises(ValueError, match="run/final: no finished model"):
        push.main([f"{tmp_path}/run", "org/good"])
    assert not server.requests


# ---------------------------------------------------------------- pairs before their weights


def validate_on_hub(server, world, monkeypatch, tmp_path, **changes):
    """The arguments of validate for two pairs of the hub that share their SFT model."""
    table = dict(
        one=dict(sft="org/sft", dpo="org/dpo@v1", template="tulu"),
        two=dict(sft="org/sft", dpo="org/far", template="tulu"),
    )
    files = contents(world / "base")
    server.commit("models/org/sft", files)
    for name, factor in (("dpo", 1.05), ("far", 1.2)):
        shutil.copytree(world / "base", tmp_path / name)
        change_weights(
            tmp_path / name, lambda tensors, factor=factor: tensors["model.norm.weight"].mul_(factor)
        )
        server.commit(f"models/org/{name}", tmp_path / name, tag="v1")
    monkeypatch.setattr(
        steer.runpy, "run_path", lambda path: dict(PAIRS=table, GROUPS={"both": ("one", "two")})
    )
    return ["validate", "both", "--texts=texts.jsonl", "--prompts=prompts.csv", f"--out_dir={tmp_path}/out"]


@pytest.mark.slow
def test_check_reads_no_weights(server, world, monkeypatch, tmp_path, capsys):
    """Names, commits, kinds, sizes, the plan with and without a card; then what a wrong name, a missing
    weight and a template say.
    """
    argv = validate_on_hub(server, world, monkeypatch, tmp_path)
    assert steer.main([*argv, "--check", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    size, parameters = (world / "base/model.safetensors").stat().st_size, len(server.repositories)
    assert parameters == 3 and not [name for name in server.downloads() if name.endswith(".safetensors")]
    head, *lines = out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["org/sft", "org/dpo@v1", "org/far"]
    assert (
        server.repositories["models/org/sft"].refs["main"][:10] in lines[0]
        and f"{size / 1e9:.2f}" in lines[0]
    )
    assert (
        "one model at a time, the largest org/sft" in out
        and "h on one h100, $" in out
        and out.count("; extract in fp32\n") == 2
        and "2 pairs: no problem found" in out
    )

    server.commit(
        "models/org/dpo",
        {n: c for n, c in contents(world / "base").items() if n != "model.safetensors"},
        tag="v1",
    )
    del server.repositories["models/org/far"]
    assert steer.main([*argv, "--check"]) == 1
    out = capsys.readouterr().out
    assert (
        "problem: model_path='org/dpo@v1': no .safetensors file" in out
        and "problem: model_path='org/far': 404" in out
    )
    table = dict(llama=dict(sft="org/sft", dpo="org/sft", template="llama3"))
    monkeypatch.setattr(steer.runpy, "run_path", lambda path: dict(PAIRS=table, GROUPS={}))
    assert steer.main([argv[0], "llama", *argv[2:], "--check"]) == 1
    assert "problem: pair 'llama': template='llama3'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "gpu, said",
    [
        ("a40", "extract 15.6 GiB in bf16, too large for fp32; sweep 15.6 GiB in bf16"),
        ("h100", "extract 30.5 GiB in fp32; sweep 15.6 GiB in bf16"),
        (None, "extract 30.5 GiB in fp32 on a card of 59.8 GiB, else as sweep; sweep 15.6 GiB in bf16"),
    ],
)
def test_check_says_what_extract_reads_in(gpu, said):
    """fp32 where the weights take half of the memory: of 8.03e9 parameters 59.8 GiB."""
    shape = LlamaConfig.preset("llama-3.1-8b")
    model = atlas.Model("org/8b", "", shape, None, families.num_parameters(shape), 16.1, None)
    assert atlas._memory_line(model, gpu and find_gpu(gpu)).endswith(f"the largest org/8b: {said}")


@pytest.mark.parametrize("gpu, dtype, seconds", [("h100", "fp32", 59.4), ("a40", "bf16", 163.3)])
def test_check_counts_fp32(gpu, dtype, seconds):
    """Of 2 x 6,979,588,096 FLOPs a token. Extract reads 4 x 125 texts of 250 tokens: in fp32 at 67 TFLOP/s x
    .69, in bf16 at 149.7 x .8 x .73. The sweep reads 1,400 prompts of 60 tokens 2 + 1 + 2 x 5 / 32 + 2 x (1 +
    20 x 5 / 32) = 11.56 times, at 989.4 or 149.7 x .8 x .79. Seconds: 37.7 + 21.7, 20.0 + 143.3.
    """
    shape = LlamaConfig.preset("llama-3.1-8b")
    model = atlas.Model("org/8b", "", shape, None, 8_030_261_248, 16.1, None)
    pair = types.SimpleNamespace(mode="sanity", count=100, lambdas=(0, 1), layers=5, max_text_tokens=400)
    whole, card = {"one": (pair, model, model)}, find_gpu(gpu)
    lines = atlas._plan(whole, {"org/8b": model}, card, gpu, 19, False)
    assert lines[2].endswith(f"h  one; extract in {dtype}")
    assert float(lines[2].split()[0]) == pytest.approx(seconds / 3600, abs=6e-4)
    with_oracle = atlas._plan(whole, {"org/8b": model}, card, gpu, 19, True)
    assert float(with_oracle[2].split()[0]) > float(lines[2].split()[0])


@pytest.mark.slow
def test_weights_of_a_finished_pair_are_deleted(server, world, monkeypatch, tmp_path, capsys):
    """Not those that the next pair needs; of a pair that is there as a folder nothing."""
    argv = validate_on_hub(server, world, monkeypatch, tmp_path)
    cache = tmp_path / "cache/hub"
    there = []

    def read(pair, name):
        for path in (pair.sft_path, pair.dpo_path):
            steer.locate(path)
        there.append(
            {
                folder.name
                for folder in cache.glob("models--*")
                if list(folder.glob("snapshots/*/*.safetensors"))
            }
        )

    monkeypatch.setattr(steer, "read_swept_prompts", lambda *args, **options: None)
    monkeypatch.setattr(steer, "extract", read)
    monkeypatch.setattr(steer.Vector, "load", lambda folder: None)
    for name in ("print_spectrum", "sweep", "_plot_axioms_of_pairs"):
        monkeypatch.setattr(steer, name, lambda *args: None)
    monkeypatch.setattr(steer.summary, "comparison", lambda *args: "")
    monkeypatch.setattr(steer.page, "write", lambda *args: None)
    assert steer.main([*argv, "--keep_weights=false", "--layers=2"]) == 0
    assert there == [{"models--org--sft", "models--org--dpo"}, {"models--org--sft", "models--org--far"}]
    assert (
        not list(cache.glob("models--*/snapshots/*/*.safetensors"))
        and "deleted the weights of org/sft" in capsys.readouterr().out
    )
    assert hub.forget(str(world / "base")) == 0 and (world / "base/model.safetensors").is_file()
