"""plumbing/hub.py and who uses it: pinned names, the commits in the manifest, interrupted copies, pushing. The hub is a fake one."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from tiny_models import random_llama, tiny_config
from world import launch, metrics, write_config

import data
import steer
from plumbing import hub, weights
from tools import push

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def commits(monkeypatch):
    """The record of this process, empty before every test."""
    monkeypatch.setattr(hub, "COMMITS", {})
    return hub.COMMITS


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


def test_a_pinned_model_is_asked_for_by_its_revision_and_its_commit_recorded(monkeypatch, commits, tmp_path):
    asked = []

    def snapshot(repository, revision, **_):
        asked.append((repository, revision))
        return str(tmp_path / "snapshots" / COMMIT)

    monkeypatch.setattr(weights, "snapshot_download", snapshot)
    assert weights.resolve("org/name@v1").name == weights.resolve("org/name").name == COMMIT
    assert asked == [("org/name", "v1"), ("org/name", None)] and commits == {"org/name@v1": COMMIT, "org/name": COMMIT}


def test_a_refused_connection_is_a_message(monkeypatch):
    def refuse(*_, **__):
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(weights, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="model_path='org/name@v1': no such folder, and no such download from the hub: refused"):
        weights.resolve("org/name@v1")


@pytest.fixture
def cached(monkeypatch, tmp_path, world):
    """A hub cache, offline, that an interrupted download left: the index and one of two shards of org/name, the other incomplete."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--org--name/snapshots" / COMMIT
    for folder, name, text in (("refs", "main", COMMIT), ("blobs", "0123.incomplete", "half of it")):
        (tmp_path / "models--org--name" / folder).mkdir(parents=True)
        (tmp_path / "models--org--name" / folder / name).write_text(text)
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 10_000)
    model, tokenizer = weights.load_pretrained(world / "base")
    weights.save_pretrained(model, tokenizer, snapshot)
    return snapshot


def test_an_interrupted_download_is_not_taken_for_a_model(cached):
    """Offline the cache is all there is. Whole, it loads; without one shard, or with a torn one, it is refused by file."""
    weights.load_pretrained("org/name@main")
    shards = sorted(cached.glob("model-*.safetensors"))
    assert len(shards) > 1 and hub.COMMITS == {"org/name@main": COMMIT}
    torn = shards[-1].read_bytes()
    shards[-1].write_bytes(torn[: len(torn) // 2])
    with pytest.raises(ValueError, match=f"{shards[-1].name}: truncated"):
        weights.load_pretrained("org/name")
    shards[-1].unlink()
    with pytest.raises(ValueError, match=f"missing weight files: {shards[-1].name}"):
        weights.load_pretrained("org/name")
    with pytest.raises(ValueError, match=f"model_path='org/name@{OTHER}': no such folder, and no such download"):
        weights.load_pretrained(f"org/name@{OTHER}")


def test_an_adapter_names_the_revision_of_its_base_as_peft_does(monkeypatch, tmp_path):
    model = random_llama(tiny_config())
    weights.apply_lora(model, 2, 4.0, targets=("q_proj",))
    weights.save_adapter(model, tmp_path / "adapter", "org/name@v1")
    raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("org/name", "v1")
    asked = []
    monkeypatch.setattr(weights, "snapshot_download", lambda repository, revision, **_: asked.append((repository, revision)) or "x")
    steer.locate(str(tmp_path / "adapter"))
    assert asked == [("org/name", "v1")]


# ---------------------------------------------------------------- data


@pytest.fixture
def data_hub(monkeypatch):
    """A hub with one data set: v1 is COMMIT; what can be read is of the commit in .found."""
    rows = data.datasets.Dataset.from_list([{"messages": []}])
    state = SimpleNamespace(found=COMMIT, asked=[])

    def builder(repository, revision):
        state.asked.append((repository, revision))
        splits = {"train": rows, "test": None}
        return SimpleNamespace(hash=state.found, download_and_prepare=lambda: None, as_dataset=lambda split: splits[split])

    def dataset_info(repository, revision):
        if revision != "v1":
            raise httpx.ConnectError("offline")
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(data.datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(dataset_info=dataset_info))
    return state


def test_data_is_asked_for_by_commit_and_the_commit_recorded(data_hub, commits):
    assert len(data.open_source("org/rows")) == 1 and data.open_source("org/rows@v1[test]") is None
    data.open_source(f"org/rows@{COMMIT}")
    assert data_hub.asked == [("org/rows", None), ("org/rows", COMMIT), ("org/rows", COMMIT)]
    assert commits == {"datasets/org/rows": COMMIT, "datasets/org/rows@v1": COMMIT, f"datasets/org/rows@{COMMIT}": COMMIT}


def test_another_commit_than_the_pinned_one_is_refused(data_hub, commits):
    """Offline, `datasets` falls back on whatever copy it has, with a warning."""
    data_hub.found = OTHER
    with pytest.raises(ValueError, match=f"data 'org/rows@v1': the hub cannot be reached, .* of commit {OTHER}; expected {COMMIT}"):
        data.open_source("org/rows@v1")
    with pytest.raises(ValueError, match="data 'org/rows@v2': the hub names no commit for 'v2'"):
        data.open_source("org/rows@v2")
    assert not commits


# ---------------------------------------------------------------- push


class FakeApi:
    """HfApi as far as a push needs it: writes what it is asked into `log`. `bad` may not be written to."""

    def __init__(self, log):
        self.log = Path(log)

    def __getattr__(self, name):
        def call(*args, **kwargs):
            with self.log.open("a") as file:
                file.write(json.dumps([name, *args, {key: str(value) for key, value in kwargs.items()}]) + "\n")
            if args == ("org/bad",) and name == "auth_check":
                raise HfHubHTTPError("403 Forbidden", response=httpx.Response(403, request=httpx.Request("GET", "https://x")))

        return call


def fake(log):
    hub.HfApi = partial(FakeApi, log)


def calls(log):
    return [json.loads(line) for line in Path(log).read_text().splitlines()]


def uploads(log):
    return [(kwargs["folder_path"], kwargs.get("path_in_repo")) for name, *_, kwargs in calls(log) if name == "upload_folder"]


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/name@main"])
def test_a_push_needs_a_name(name):
    with pytest.raises(ValueError, match=f"push='{name}': expected a hub name like 'org/name'"):
        hub.open_for_push(name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_push_after_the_run_and_again_without_training(world, tmp_path, ranks):
    """final/ and adapter/ go up, from rank 0 only, with the card; the same command on the finished run trains nothing and pushes again."""
    config, log = write_config(tmp_path, world, save_every=4, lora_rank=2, lora_alpha=4.0), tmp_path / "hub.log"
    done = launch("sft", config, "--push=org/good", ranks=ranks, prepare=partial(fake, log)).ok()
    expected = [(f"{tmp_path}/sft/final", None), (f"{tmp_path}/sft/adapter", "adapter")]
    assert [name for name, *_ in calls(log)] == ["whoami", "create_repo", "auth_check", "upload_folder", "upload_folder"]
    assert calls(log)[1] == ["create_repo", "org/good", {"private": "True", "exist_ok": "True"}] and uploads(log) == expected
    assert "pushed to org/good" in done.out[0] and (tmp_path / "sft/final/README.md").is_file()
    steps = metrics(tmp_path / "sft")
    again = launch("sft", config, "--push=org/good", ranks=ranks, prepare=partial(fake, log)).ok()
    assert "step 0000" not in again.out[0] and metrics(tmp_path / "sft") == steps and uploads(log) == expected * 2


@pytest.mark.slow
def test_a_wrong_token_stops_the_run_before_it_trains(world, tmp_path):
    config, log = write_config(tmp_path, world), tmp_path / "hub.log"
    failed = launch("sft", config, "--push=org/bad", ranks=2, prepare=partial(fake, log))
    assert failed.codes == [1, 1] and not (tmp_path / "sft").exists() and uploads(log) == []
    assert failed.err[0].startswith("error: push='org/bad': expected a repository that the token") and "403 Forbidden" in failed.err[0]


def test_tools_push(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "HfApi", partial(FakeApi, tmp_path / "log"))
    with pytest.raises(ValueError, match="run/final: no finished model"):
        push.main([f"{tmp_path}/run", "org/good"])
    weights.save_pretrained(*weights.load_pretrained(world / "base"), tmp_path / "run/final")
    assert push.main([f"{tmp_path}/run", "org/good"]) == 0
    assert uploads(tmp_path / "log") == [(f"{tmp_path}/run/final", None)] and "pushed" in capsys.readouterr().out


def test_data_that_is_nowhere_is_named(monkeypatch):
    """The hub's own message names neither the key nor what was asked for."""

    def unreachable(name, revision):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(data.datasets, "load_dataset_builder", unreachable)
    with pytest.raises(ValueError, match="data 'nobody/nothing': no such file or folder, and no such data from the hub: Couldn't reach"):
        data.open_source("nobody/nothing[test]")
