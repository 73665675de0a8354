"""Model folders and adapters of other people: what could mean two models, or no model, is refused by file and
key.
"""

import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from checkpoint_ranks import assert_equal, whole_tensors
from safetensors.torch import load_file, save_file
from tiny_models import random_llama, tiny_config
from world import write_model, write_tokenizer

import families
from families import load_pretrained
from model import apply_lora
from planner import atlas, plan
from plumbing import weights
from plumbing.adapters import save_adapter
from plumbing.files import UserError
from plumbing.tokenizer import Tokenizer
from plumbing.weights import resolve


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    write_tokenizer(folder, random.Random(0))
    write_model(folder, random_llama(tiny_config(vocab_size=380, num_hidden_layers=2)))
    return folder


@pytest.fixture
def base(intact, tmp_path):
    """A model folder to spoil."""
    return shutil.copytree(intact, tmp_path / "base")


# ---------------------------------------------------------------- one folder, one model

ADDED = torch.ones(2, 2)


def write_index(base, files):
    """Split model.safetensors into {file: names or a test of names}, with an index."""
    weight_map, whole = {}, load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    for file, wanted in files.items():
        part = {name: tensor for name, tensor in whole.items() if wanted(name)}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, base / file)
    (base / weights.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda base: (base / "adapter_config.json").write_text("{}"),
            r"a LoRA adapter \(.*\) beside a whole model",
        ),
        (
            lambda base: save_file({"x": ADDED}, base / "adapter_model.safetensors"),
            "adapter .* beside a whole model; expected one",
        ),
        (
            lambda base: save_file({"x": ADDED}, base / "model.safetensors"),
            "model.safetensors beside model.safetensors.index.json",
        ),
        (
            lambda base: save_file(
                load_file(base / "b.safetensors") | {"model.norm.weight": ADDED}, base / "b.safetensors"
            ),
            "model.norm.weight is in a.safetensors and in b.safetensors; expected one",
        ),
    ],
)
def test_a_folder_that_could_mean_two_models_is_refused_by_every_reader(base, tmp_path, spoil, message):
    write_index(
        base,
        {"a.safetensors": lambda name: "layers" not in name, "b.safetensors": lambda name: "layers" in name},
    )
    load_pretrained(base)
    spoil(base)
    for read in (resolve, load_pretrained, families.locate, families.weights_hash, atlas.look_up):
        with pytest.raises(ValueError, match=f"{base}.*{message}"):
            read(base)


def test_sizes_that_do_not_fit_the_weights_are_refused_by_a_plan_and_a_check(base):
    """As by a run, from the files' headers."""
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"intermediate_size": 999}))
    config = SimpleNamespace(model_path=str(base))
    for read in (load_pretrained, atlas.look_up, lambda _: plan.find_model("sft", config, "none.py")):
        with pytest.raises(
            ValueError, match=f"{base}/config.json does not fit the weights: intermediate_size"
        ):
            read(base)


def test_an_index_that_names_another_file_is_refused(base):
    weight_map = write_index(
        base, {"a.safetensors": lambda name: "norm" in name, "b.safetensors": lambda name: "norm" not in name}
    )
    swapped = weight_map | {"model.norm.weight": "b.safetensors"}
    (base / weights.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(
        ValueError, match="index.json: model.norm.weight in b.safetensors; it is in a.safetensors"
    ):
        resolve(base)


@pytest.mark.parametrize("kind", ["absolute", "parent", "link"])
def test_weights_stay_in_their_folder(base, tmp_path, kind):
    """An index, or a link, that leads to the weights of another folder. The hub's cache links to its own
    blobs/.
    """
    (tmp_path / "other").mkdir()
    outside = tmp_path / "other/model-1.safetensors"
    name = {
        "absolute": str(outside),
        "parent": "../other/model-1.safetensors",
        "link": "model-1.safetensors",
    }[kind]
    (base / "model.safetensors").rename(outside)
    if kind == "link":
        (base / name).symlink_to(outside)
    names = load_file(outside)
    (base / weights.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(ValueError, match=f"{base}: {name} is {outside}; expected a file of that folder"):
        resolve(base)


def test_the_hubs_cache_links_to_its_blobs(base, tmp_path):
    snapshot, blobs = tmp_path / "models--org--name/snapshots/abc", tmp_path / "models--org--name/blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for file in base.iterdir():
        shutil.copy(file, blobs / f"hash_of_{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash_of_{file.name}")
    assert_equal(whole_tensors(load_pretrained(snapshot)[0]), whole_tensors(load_pretrained(base)[0]))


def test_run_folders_say_where_their_model_is(base, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "manifest.json", "metrics.jsonl"):
        (run / name).write_text("{}")
    with pytest.raises(ValueError, match="model_path='.*run': a run folder without its final/"):
        resolve(run)
    shutil.copytree(base, run / "final")
    with pytest.raises(
        ValueError, match="model_path='.*run': a run folder; expected a model, here .*run/final"
    ):
        resolve(run)


@pytest.mark.parametrize(
    "key, value, size",
    [
        ("vocab_size", 2**31 - 1, 2**31 - 1),
        ("hidden_size", 2**31 - 1, 2**31 - 1),
        ("intermediate_size", 2**31 - 1, 2**31 - 1),
        ("num_hidden_layers", 10_000, 10_000),
        ("num_attention_heads", 2**30, 2**30 * 12),
        ("head_dim", 2**30, 4 * 2**30),
    ],
)
def test_sizes_are_compared_with_the_headers_first(base, monkeypatch, key, value, size):
    """vocab_size=2**40 tried to allocate 281 TB."""
    monkeypatch.setattr(families, "Llama", None)  # nothing is built
    change_config(base, {key: value})
    with pytest.raises(ValueError, match=f"base/config.json.* {key}.*{size}"):
        load_pretrained(base)


# ---------------------------------------------------------------- JSON of others, each key in turn of a wrong type or size

WRONG = (None, "x", "\ud800", -1, 0, math.inf, [], {}, True, 2**40, 1.5)


def change_config(folder, changes, name="config.json"):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def accepted(folder, name, read):
    """{key: values} of WRONG that are read; every other is refused in one line that names the file and the
    key.
    """
    path = folder / name
    whole, found = json.loads(path.read_text()), {}
    for key in whole:
        for value in WRONG:
            path.write_text(json.dumps(whole | {key: value}))
            try:
                read()
            except UserError as error:
                line, *tensors = str(error).splitlines()
                assert str(folder) in line and (key in line or tensors), (key, value, line)
            else:
                found.setdefault(key, []).append(value)
    path.write_text(json.dumps(whole))
    read()
    return found


@pytest.mark.slow
def test_every_key_of_a_config(base):
    """What is read is what the key may be, or nothing that counts: 10 values for each key."""
    read = accepted(base, "config.json", lambda: load_pretrained(base))
    unread = {"architectures"}
    assert {key for key in read if len(read[key]) == len(WRONG)} == unread
    assert {key: values for key, values in read.items() if key not in unread} == {
        "rms_norm_eps": [0, 2**40, 1.5],
        "bos_token_id": [None, -1, 0],
        "eos_token_id": [None, -1, 0, []],
        "attention_dropout": [None, 0],
        "rope_theta": [2**40, 1.5],
        "rope_scaling": [None, {}],
        "rope_parameters": [None, {}],
    }


ADAPTER_KEYS = dict.fromkeys(
    (
        "use_rslora",
        "layers_to_transform",
        "exclude_modules",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
    )
)


@pytest.mark.slow
def test_every_key_of_an_adapter_config(base, tmp_path):
    model, _ = load_pretrained(base)
    apply_lora(model, 2, 4.0, targets=("q_proj",))
    save_adapter(model, tmp_path / "adapter", base)
    (tmp_path / "adapter/hashes.json").unlink()
    change_config(tmp_path / "adapter", ADAPTER_KEYS, "adapter_config.json")
    read = accepted(
        tmp_path / "adapter", "adapter_config.json", lambda: families.load_model(tmp_path / "adapter")
    )
    unread = {"lora_dropout", "inference_mode", "task_type"}
    assert {key for key in read if len(read[key]) == len(WRONG)} == unread
    assert {key: values for key, values in read.items() if key not in unread} == {
        "revision": [None, "x"],  # of a hub repository; the base is a folder here
        "lora_alpha": [-1, 0, 2**40, 1.5],
        "use_rslora": [None, True],
        "layers_to_transform": [None, []],
        "exclude_modules": [None, "x", []],
        "modules_to_save": [None, []],
        "rank_pattern": [None, {}],
        "alpha_pattern": [None, {}],
    }


def test_every_key_of_an_index(base):
    write_index(base, {"a.safetensors": lambda name: True})
    read = accepted(base, weights.WEIGHTS_INDEX, lambda: load_pretrained(base))
    assert read == {}
    (base / weights.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": 1}}))
    with pytest.raises(
        UserError,
        match=f"{base}/{weights.WEIGHTS_INDEX}: weight_map=.*: expected an object, each value a text",
    ):
        resolve(base)


def test_every_key_of_a_tokenizer(base):
    templates = [{"name": "default", "template": "x"}]
    change_config(base, {"chat_template": templates}, "tokenizer_config.json")
    read = accepted(base, "tokenizer_config.json", lambda: Tokenizer.from_dir(base))
    assert read == {
        "tokenizer_class": list(WRONG),
        "bos_token": [None, "x"],
        "eos_token": [None, "x"],
        "chat_template": [None, "x", []],
    }
    for wrong in ({"name": "default"}, {"template": "x"}, "x"):
        change_config(base, {"chat_template": [wrong]}, "tokenizer_config.json")
        with pytest.raises(
            UserError,
            match=f"{base}/tokenizer_config.json: chat_template=.*: expected a text or a list, each an object with",
        ):
            Tokenizer.from_dir(base)


def test_no_value_in_tokenizer_json_is_a_traceback(base):
    """Its keys are the library's, whose messages name a type and a place."""
    path = base / "tokenizer.json"
    whole = json.loads(path.read_text())
    for key in whole:
        for value in WRONG:
            path.write_text(json.dumps(whole | {key: value}))
            try:
                Tokenizer.from_dir(base)
            except UserError as error:
                assert str(base) in str(error) and "\n" not in str(error)
