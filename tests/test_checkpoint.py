"""Checkpoints: nothing is lost, nothing is approximately right, and what is wrong on the disk is named."""

import concurrent.futures
import errno
import json
import math
import os
import random
import re
import shutil
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from checkpoint_ranks import (
    IDENTITY,
    assert_equal,
    build,
    fill_the_disk,
    life,
    live,
    scramble,
    train_step,
    whole_tensors,
)
from safetensors.torch import load_file, save_file
from tiny_models import random_documents, random_llama, stream, tiny_config
from world import spawn, write_tokenizer

from families import load_pretrained, locate
from model import apply_lora
from plumbing import checkpoint, parallel, tensors, weights
from plumbing.adapters import merge_adapter, save_adapter
from plumbing.checkpoint import Checkpointer
from plumbing.files import sha256_of, write_hashes
from plumbing.tokenizer import Tokenizer
from plumbing.weights import fingerprint, load_weights, resolve, save_pretrained
from training import Run, read_model_config

DOCUMENTS = random_documents(97, (21, 1, 9))
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """90 words of one character each, <s> and </s>: ids 0..91 of the model's 97 rows."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(33 + i): 2 + i for i in range(90)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="!"))
    core.add_special_tokens(["<s>", "</s>"])
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer):
    """ROOT/base: a pretrained model whose rows divide by no number of ranks, some tensors with fewer rows
    than three ranks can share.
    """
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(num_hidden_layers=2, num_key_value_heads=1, head_dim=4, intermediate_size=53)
    save_pretrained(random_llama(config), tokenizer, folder / "base")
    return folder


@pytest.fixture
def base(root, tmp_path):
    """A copy of the pretrained folder, to spoil; like the folders of others without hashes.json."""
    folder = Path(shutil.copytree(root / "base", tmp_path / "base"))
    (folder / "hashes.json").unlink()
    return folder


def logits(model):
    return model(*stream(DOCUMENTS)) @ model.lm_head.weight.T  # (T, V)


def transformers_logits(model):
    return torch.cat([model(document[None]).logits[0] for document in DOCUMENTS])


# ---------------------------------------------------------------- resume


@pytest.mark.slow
def test_ranks_1_to_2_to_3_to_1(root, ranks, tmp_path):
    """Each life starts from the last one's checkpoint on another number of ranks and finds it bit for bit,
    Adam's state included; it trains, saves, and overwrites its tensors at once, which the save does not see.
    Full fine-tuning and LoRA."""
    life(root, "", "one", ranks)
    spawn(partial(live, root, "one", "two"), tmp_path / "two ranks", ranks=2).ok()
    spawn(partial(live, root, "two", "three"), tmp_path / "three ranks", ranks=3).ok()
    life(root, "three", "again", ranks)
    life(root, "two", "two_to_one", ranks)
    for kind in ("full", "lora"):
        whole = load_file(root / "three" / f"{kind}.safetensors")
        model, _ = load_pretrained(root / "three" / kind / "final")
        if kind == "full":
            assert_equal(
                whole_tensors(model),
                {key: tensor for key, tensor in whole.items() if key.startswith("param/")},
            )
        else:
            adapted, _ = load_pretrained(root / "base")
            stored = load_file(root / "three/lora/adapter/adapter_model.safetensors")
            expected = {
                key: tensor for key, tensor in whole.items() if key.startswith("param/") and "lora_" in key
            }
            assert_equal(
                {
                    f"param/{key.removeprefix('base_model.model.').removesuffix('.weight')}": stored[key]
                    for key in stored
                },
                expected,
            )
            merge_adapter(adapted, root / "three/lora/adapter")
            torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_either_sharding_reads_the_other(root, ranks, tmp_path):
    """The same through ranks that share the optimizer and ranks that share all, bf16's split masters with all
    32 bits among them.
    """
    kinds = ("full", "lora", "bf16")
    life(root, "", "first", ranks, "optimizer", kinds)  # on one process: a plain model
    lives = (
        (3, "first", "second", "optimizer"), (2, "second", "third", "full"), (2, "third", "fourth", "optimizer"),
    )  # fmt: skip
    for count, source, target, sharding in lives:
        spawn(
            partial(live, root, source, target, sharding, kinds), tmp_path / f"logs {target}", ranks=count
        ).ok()
    life(root, "fourth", "last", ranks, "optimizer", kinds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_training_is_bitwise_the_uninterrupted_one(root, ranks, tmp_path, kind):
    model, optimizer = build(kind, root / "base")
    checkpointer = Checkpointer(tmp_path, 2, IDENTITY)
    for step in range(4):
        if step == 2:
            checkpointer.save(step, model, optimizer)
        train_step(model, optimizer)
    checkpointer.wait()
    resumed, resumed_optimizer = build(kind, root / "base")
    assert checkpointer.load(checkpointer.latest(), resumed, resumed_optimizer) == 2
    assert resumed_optimizer.param_groups[0]["lr"] == 0.0  # untouched by the allocation of its state
    for _ in range(2):
        train_step(resumed, resumed_optimizer)
    assert_equal(whole_tensors(resumed, resumed_optimizer), whole_tensors(model, optimizer))


def test_lora_checkpoint_holds_only_what_is_trained(root, ranks, tmp_path):
    checkpointer = Checkpointer(tmp_path, 2, IDENTITY)
    checkpointer.save(1, *build("lora", root / "base"))
    checkpointer.wait()
    stored = load_file(checkpointer.latest() / "rank_00000.safetensors")
    assert stored and all(".lora_" in key for key in stored)


@pytest.fixture
def run(request, root, ranks, tmp_path):
    """(checkpointer, model, optimizer, whole tensors) of a run with one finished checkpoint, step 1, and one
    more step trained: of LoRA, or of a test's own (kind, sharding).
    """
    kind, sharding = getattr(request, "param", ("lora", "full"))
    model, optimizer = build(kind, root / "base", sharding)
    train_step(model, optimizer)
    checkpointer = Checkpointer(tmp_path / "run", 1, IDENTITY)
    checkpointer.save(1, model, optimizer)
    checkpointer.wait()
    saved = whole_tensors(model, optimizer)
    train_step(model, optimizer)
    return checkpointer, model, optimizer, saved


def restart(tmp_path, model, optimizer):
    """What the next process finds: (step, whole tensors)."""
    checkpointer = Checkpointer(tmp_path / "run", 1, IDENTITY)
    scramble(model, optimizer)
    step = checkpointer.load(checkpointer.latest(), model, optimizer)
    assert all(
        (path / "COMPLETED").exists() for path in checkpointer.folder.iterdir()
    )  # nothing unfinished is left
    return step, whole_tensors(model, optimizer)


@pytest.mark.slow
def test_save_is_asynchronous_and_isolated(run, monkeypatch, tmp_path):
    """The writer is held until the live tensors have changed: what it writes is what they were at save()."""
    checkpointer, model, optimizer, _ = run
    changed, write_rows = threading.Event(), checkpoint._write_rows
    monkeypatch.setattr(checkpoint, "_write_rows", lambda *args: changed.wait(60) and write_rows(*args))
    expected = whole_tensors(model, optimizer)
    checkpointer.save(2, model, optimizer)
    scramble(model, optimizer)
    changed.set()
    checkpointer.wait()
    step, found = restart(tmp_path, model, optimizer)
    assert step == 2
    assert_equal(found, expected)


@pytest.mark.slow
def test_a_save_takes_the_memory_of_the_one_before_once_that_is_written(run, monkeypatch, tmp_path):
    """The second save is asked for while the first is being written: both hold their own step's numbers."""
    checkpointer, model, optimizer, _ = run
    checkpointer.keep_last = 3
    write_rows, expected, memory = checkpoint._write_rows, {}, {}
    monkeypatch.setattr(checkpoint, "_write_rows", lambda *args: time.sleep(0.3) or write_rows(*args))
    for step in (2, 3):
        expected[step] = whole_tensors(model, optimizer)
        checkpointer.save(step, model, optimizer)
        memory[step] = {key: copy.data_ptr() for key, copy in checkpointer._copies.items()}
        train_step(model, optimizer)
    assert memory[2] and memory[2] == memory[3]
    checkpointer.wait()
    assert not checkpointer._copies  # the export needs it
    for step in (2, 3):
        scramble(model, optimizer)
        assert checkpointer.load(checkpointer.folder / f"step_{step:06d}", model, optimizer) == step
        assert_equal(whole_tensors(model, optimizer), expected[step])


@pytest.mark.slow
def test_a_save_that_waits_for_the_one_before_says_how_long(run, monkeypatch, capsys):
    checkpointer, model, optimizer, _ = run
    write_rows = checkpoint._write_rows
    monkeypatch.setattr(checkpoint, "_write_rows", lambda *args: time.sleep(0.3) or write_rows(*args))
    monkeypatch.setattr(checkpoint, "SLOW", 0.2)
    checkpointer.save(2, model, optimizer)
    assert not capsys.readouterr().out
    checkpointer.save(3, model, optimizer)
    (said,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"step 3: waited 0\.[3-9] s to save, because the checkpoint of step 2 was still being written", said
    )


@pytest.mark.slow
def test_a_save_says_how_long_its_copy_took(run, monkeypatch, capsys):
    checkpointer, model, optimizer, _ = run
    monkeypatch.setattr(checkpoint, "SLOW", 0.0)
    checkpointer.save(2, model, optimizer)
    _, said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 2: \d+\.\d s to copy 0\.0 GB a rank to host memory", said)


def test_wider_dtypes_are_copied_and_written_first(ranks, tmp_path):
    """safetensors needs an offset that is a multiple of the width."""
    checkpointer = Checkpointer(tmp_path, 1, IDENTITY)
    rows = checkpointer._copy({
        "odd": torch.zeros(3, dtype=torch.bfloat16), "none": torch.zeros(0, 4), "a": torch.ones(2),
        "b": torch.ones(1),
    })  # fmt: skip
    assert list(rows) == ["a", "b", "odd"]


def test_when_a_save_is_due(ranks):
    """save_every by the step, save_minutes by the time since the last checkpoint; the last step has one if
    either is set.
    """

    def due(step, minutes_ago, **keys):
        keys = dict(save_every=None, save_minutes=None) | keys
        run = SimpleNamespace(
            config=SimpleNamespace(**keys), total_steps=10, saved_at=time.monotonic() - 60 * minutes_ago
        )
        return Run.is_save_due(run, step)

    assert not due(10, 1000)
    assert [step for step in range(1, 11) if due(step, 0, save_every=4)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 0, save_minutes=5.0)] == [10]
    assert due(3, 5.01, save_minutes=5.0) and not due(3, 4.9, save_minutes=5.0)
    assert due(3, 6, save_minutes=5.0, save_every=2) and due(4, 0, save_minutes=5.0, save_every=2)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["write_safetensors", "write_json", "publish", "sync", "_delete"])
def test_killed_before_any_write(run, monkeypatch, tmp_path, call):
    """The writer dies in front of each of its file operations (write_json is called twice): the next start
    has step 1 or step 2, whole.
    """
    checkpointer, model, optimizer, _ = run
    trained = {1: run[3], 2: whole_tensors(model, optimizer)}

    class Killed(Exception):
        pass

    for survived in range(2 if call == "write_json" else 1):
        real, calls = getattr(checkpoint, call), []

        def dies(*args, real=real, calls=calls, survived=survived):
            calls.append(args)
            if len(calls) > survived:
                raise Killed
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, call, dies)
            checkpointer.save(2, model, optimizer)
            with pytest.raises(Killed):
                checkpointer.wait()
        step, found = restart(tmp_path, model, optimizer)
        assert step == (2 if call in ("sync", "_delete") else 1)
        assert (
            len(list(checkpointer.folder.iterdir())) == 1
        )  # keep_last, also where the older one had not gone yet
        assert_equal(found, trained[step])


@pytest.mark.slow
def test_leftovers_of_a_kill_are_removed_and_ignored(run, tmp_path):
    checkpointer, model, optimizer, saved = run
    finished = checkpointer.latest()
    for torn in (".tmp_step_000002", "step_000002"):  # before the rename; after it, COMPLETED not yet written
        shutil.copytree(finished, checkpointer.folder / torn)
        (checkpointer.folder / torn / "COMPLETED").unlink()
        os.truncate(checkpointer.folder / torn / "rank_00000.safetensors", 1000)
    assert checkpointer.latest() == finished
    step, found = restart(tmp_path, model, optimizer)
    assert step == 1
    assert_equal(found, saved)


@pytest.mark.slow
def test_full_disk_loses_nothing_and_the_next_save_works(run, tmp_path):
    checkpointer, model, optimizer, saved = run
    fill_the_disk(checkpointer, 2, rank=0)
    checkpointer.save(2, model, optimizer)
    size = (checkpointer.latest() / "rank_00000.safetensors").stat().st_size
    with pytest.raises(
        OSError, match=rf"No space left on device: {size:,} bytes needed.*rank_00000"
    ) as caught:
        checkpointer.save(3, model, optimizer)
    assert caught.value.errno == errno.ENOSPC
    assert checkpointer.latest().name == "step_000001"
    checkpointer.save(2, model, optimizer)
    checkpointer.wait()
    assert restart(tmp_path, model, optimizer)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_truncated_checkpoint_is_named(run, size):
    checkpointer, model, optimizer, _ = run
    file = checkpointer.latest() / "rank_00000.safetensors"
    os.truncate(file, size % file.stat().st_size)
    with pytest.raises(ValueError, match="rank_00000.safetensors: truncated"):
        checkpointer.load(checkpointer.latest(), model, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", '{"step": 1, "run_ident'])
def test_torn_index_is_named(run, content):
    checkpointer = run[0]
    file = checkpointer.latest() / "checkpoint.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"{file}: missing or torn"):
        checkpointer.latest()


@pytest.mark.slow
def test_missing_rank_file_is_named(run):
    checkpointer, model, optimizer, _ = run
    (checkpointer.latest() / "rank_00000.safetensors").unlink()
    with pytest.raises(ValueError, match="rank_00000.safetensors: missing file"):
        checkpointer.load(checkpointer.latest(), model, optimizer)


@pytest.mark.slow
def test_rows_that_no_file_holds(run):
    checkpointer, model, optimizer, _ = run
    file = checkpointer.latest() / "rank_00000.safetensors"
    tensors, header = load_file(file), weights.open_safetensors(file).metadata()
    name = "exp_avg/model.layers.0.mlp.up_proj.lora_A"
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, file, header)
    sign_again(checkpointer.latest())
    with pytest.raises(ValueError, match=rf"{name}: rows 3\.\.4 are in none of the files"):
        checkpointer.load(checkpointer.latest(), model, optimizer)


def sign_again(path, **index_changes):
    """Make the hashes of an edited checkpoint those of its files."""
    index = json.loads((path / "checkpoint.json").read_text()) | index_changes
    for name, about in index["files"].items():
        about |= {"bytes": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    (path / "checkpoint.json").write_text(json.dumps(index))
    (path / "COMPLETED").write_text(json.dumps({"checkpoint.json": sha256_of(path / "checkpoint.json")}))


def flipped(data, bit):
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


@pytest.mark.slow
def test_flipped_bits_of_the_small_files_are_found(run):
    """checkpoint.json and COMPLETED: the checkpoint is not taken for what was written."""
    path = run[0].latest()
    for name in ("checkpoint.json", "COMPLETED"):
        whole = (path / name).read_bytes()
        for bit in range(0, 8 * len(whole), 5 if name == "COMPLETED" else 257):  # `make torture` tries all
            (path / name).write_bytes(flipped(whole, bit))
            with pytest.raises(checkpoint.Damaged, match=str(path)):
                run[0]._read_index(path)
        (path / name).write_bytes(whole)
    assert run[0]._read_index(path)["step"] == 1


@pytest.mark.slow
def test_flipped_bits_of_a_rank_file_are_found(run):
    """Of the first 64 bytes, length and header, and of the tensors, which are read already when their hash
    says so.
    """
    checkpointer, model, optimizer, _ = run
    file = checkpointer.latest() / "rank_00000.safetensors"
    whole, rng = file.read_bytes(), random.Random(0)
    bits = [*range(0, 512, 17), *(rng.randrange(8 * len(whole)) for _ in range(30))]
    for bit in bits:
        file.write_bytes(flipped(whole, bit))
        with pytest.raises(ValueError, match="rank_00000.safetensors: damaged"):
            checkpointer.load(checkpointer.latest(), model, optimizer)
        checkpointer._damaged.clear()
    file.write_bytes(whole)
    assert checkpointer.load(checkpointer.latest(), model, optimizer) == 1


def two_checkpoints(run, tmp_path):
    """The run, keeping two: step 1, and step 2 with other tensors."""
    _, model, optimizer, saved = run
    checkpointer = Checkpointer(tmp_path / "run", 2, IDENTITY)
    checkpointer.save(2, model, optimizer)
    checkpointer.wait()
    return checkpointer, model, optimizer, saved


@pytest.mark.slow
@pytest.mark.parametrize("run", [("lora", "full"), ("full", "full"), ("bf16", "optimizer")], indirect=True)
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "checkpoint.json", "COMPLETED"])
def test_the_newest_intact_checkpoint_is_used_and_the_lost_steps_are_said(run, tmp_path, name, capsys):
    checkpointer, model, optimizer, saved = two_checkpoints(run, tmp_path)
    newest = checkpointer.latest()
    (newest / name).write_bytes(flipped((newest / name).read_bytes(), 300))
    again = Checkpointer(tmp_path / "run", 1, IDENTITY)
    scramble(model, optimizer)
    assert again.load(again.latest(), model, optimizer) == 1
    assert_equal(whole_tensors(model, optimizer), saved)
    said = capsys.readouterr().out
    assert f"{newest}/" in said and "step_000001 is used instead: 1 steps are trained again" in said
    again.save(2, model, optimizer)  # the damaged one is not in its way
    again.wait()
    assert sorted(path.name for path in again.folder.iterdir()) == ["step_000002", "step_000002.damaged"]
    after = Checkpointer(tmp_path / "run", 1, IDENTITY)
    assert [path.name for path in after.folder.iterdir()] == ["step_000002"]


@pytest.mark.slow
def test_steps_are_numbers_not_names(run, tmp_path):
    """step_999999 is before step_1000000, though its name is behind."""
    _, model, optimizer, _ = run
    checkpointer = Checkpointer(tmp_path / "long", 2, IDENTITY)
    for step in (999_999, 1_000_000):
        checkpointer.save(step, model, optimizer)
        checkpointer.wait()
    newest = checkpointer.latest()
    assert newest.name == "step_1000000"
    file = newest / "rank_00000.safetensors"
    file.write_bytes(flipped(file.read_bytes(), 300))
    assert checkpointer.load(newest, model, optimizer) == 999_999


@pytest.mark.slow
def test_a_rank_file_of_another_step_is_not_read(run, tmp_path):
    """Also when its hash was written into checkpoint.json: its own header says which step it is of."""
    checkpointer, model, optimizer, _ = two_checkpoints(run, tmp_path)
    first, second = sorted(checkpointer.folder.iterdir())
    shutil.copy(first / "rank_00000.safetensors", second)
    assert checkpointer.load(second, model, optimizer) == 1
    shutil.rmtree(checkpointer.folder / "step_000002.damaged")
    shutil.copytree(first, second)
    sign_again(second, step=2)
    assert checkpointer.load(second, model, optimizer) == 1
    shutil.copytree(first, second)  # and a folder under another step's name
    assert checkpointer.latest() == first


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("where", ["param", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_saved(run, where, value):
    checkpointer, model, optimizer, _ = run
    param = next(param for param in model.parameters() if param.requires_grad)
    tensor = param if where == "param" else optimizer.state[param][where]
    parallel.local_rows(tensor)[1][1, 1] = value
    with pytest.raises(
        FloatingPointError, match=rf"step 2: not finite, so not saved: {where}/model.layers.0"
    ):
        checkpointer.save(2, model, optimizer)
    assert checkpointer.latest().name == "step_000001"


@pytest.mark.slow
def test_a_save_that_failed_is_an_error_at_the_next_step(run):
    checkpointer, model, optimizer, _ = run
    checkpointer.check()
    fill_the_disk(checkpointer, 2, rank=0)
    checkpointer.save(2, model, optimizer)
    concurrent.futures.wait([checkpointer._pending])
    with pytest.raises(OSError, match="No space left"):
        checkpointer.check()
    checkpointer.check()  # once


def test_another_configuration_is_refused_by_its_keys(run, tmp_path):
    other = Checkpointer(tmp_path / "run", 1, IDENTITY | {"lr": 0.02, "beta": 5.0})
    with pytest.raises(ValueError, match=r"beta=None there, 5\.0 now; lr=0\.01 there, 0\.02 now"):
        other.latest()
    older = Checkpointer(tmp_path / "run", 1, {key: value for key, value in IDENTITY.items() if key != "lr"})
    with pytest.raises(ValueError, match=r"lr=0\.01 there, None now"):
        older.latest()


def test_another_model_is_refused_by_its_tensors(run, root):
    checkpointer = run[0]
    with pytest.raises(
        ValueError, match=r"param/model.embed_tokens.weight: nothing stored, \[97, 40\] expected"
    ):
        checkpointer.load(checkpointer.latest(), *build("full", root / "base"))


@pytest.mark.slow
def test_keep_last_and_fresh(run, tmp_path):
    _, model, optimizer, _ = run
    checkpointer = Checkpointer(tmp_path / "run", 2, IDENTITY)
    for step in (9, 10, 11, 11):  # a step that is already there is not written again
        checkpointer.save(step, model, optimizer)
    checkpointer.wait()
    assert sorted(path.name for path in checkpointer.folder.iterdir()) == ["step_000010", "step_000011"]
    assert Checkpointer(tmp_path / "run", 2, IDENTITY, fresh=True).latest() is None


@pytest.mark.slow
def test_copies_by_other_names_are_left_alone(run, tmp_path):
    """`cp -r step_000001 step_000001_good` is no checkpoint to go on from, and no later save and no --fresh
    deletes it.
    """
    checkpointer, model, optimizer, _ = run
    for name in ("step_000001_good", "best_step_000001"):
        shutil.copytree(checkpointer.latest(), checkpointer.folder / name)
    assert checkpointer.latest().name == "step_000001"
    for step in (2, 3, 4):
        checkpointer.save(step, model, optimizer)
    checkpointer.wait()
    assert Checkpointer(tmp_path / "run", 2, IDENTITY, fresh=True).latest() is None
    assert sorted(path.name for path in checkpointer.folder.iterdir()) == [
        "best_step_000001",
        "step_000001_good",
    ]


# ---------------------------------------------------------------- reading Hugging Face folders


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra: unexpected"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(41)}),
            r"model.norm.weight: shape \(41,\), expected \(40,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(40, dtype=torch.int8)}),
            r"norm.weight: dtype I8.* \(model.safetensors\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_read(base, change, message):
    model, _ = load_pretrained(base)
    rewrite(base / "model.safetensors", change)
    before = whole_tensors(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, base)
    assert str(base) in str(caught.value)
    assert_equal(whole_tensors(model), before)


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_truncated_weights_are_named(base, size):
    file = base / "model.safetensors"
    os.truncate(file, size % file.stat().st_size)
    with pytest.raises(ValueError, match="model.safetensors: truncated, or not a safetensors file"):
        load_pretrained(base)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("content", [b'{"a": ', b"\xff"])
def test_torn_files_beside_the_weights_are_named(base, name, content):
    (base / name).write_bytes(content)
    named = (
        f"{base}/tokenizer.json: torn, or of a version"
        if name == "tokenizer.json"
        else f"{base / name}: missing or torn"
    )
    with pytest.raises(ValueError, match=re.escape(named)):
        load_pretrained(base)


def test_a_tokenizer_at_which_the_library_panics_is_named(base):
    """Merged words shorter than the prefix that the library takes off them: Rust slices past their end."""
    write_tokenizer(base, random.Random(0))
    core = json.loads((base / "tokenizer.json").read_text())
    core["model"]["continuing_subword_prefix"] = "#" * 10
    (base / "tokenizer.json").write_text(json.dumps(core))
    with pytest.raises(ValueError, match=re.escape(f"{base}/tokenizer.json: torn, or of a version")):
        load_pretrained(base)


def test_missing_weight_files_are_named_and_pickles_refused(base, tokenizer, monkeypatch):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    for read in (load_pretrained, resolve):  # --plan resolves
        with pytest.raises(ValueError, match="no model.safetensors; pytorch_model.bin is a pickle"):
            read(base)
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 40_000)
    save_pretrained(random_llama(tiny_config()), tokenizer, base.with_name("several"))
    (base.parent / "several/hashes.json").unlink()
    next(base.parent.glob("several/model-00002-of-*")).unlink()
    with pytest.raises(ValueError, match="missing weight files: model-00002-of-"):
        load_pretrained(base.parent / "several")
    (base.parent / "several" / weights.WEIGHTS_INDEX).write_text("{}")
    with pytest.raises(ValueError, match="several/model.safetensors.index.json: no weight_map"):
        load_pretrained(base.parent / "several")


def test_broken_model_folders_are_refused_before_the_data_are_read(base, tokenizer):
    """read_model_config comes before tokenising, load_weights after it."""
    config = SimpleNamespace(max_seq_len=8, precision="fp32", attention="flash2", tensorboard=False)
    assert read_model_config(config, base, tokenizer, torch.device("cpu")).hidden_size == 40
    os.truncate(base / "model.safetensors", 500)
    with pytest.raises(ValueError, match="model.safetensors: truncated"):
        read_model_config(config, base, tokenizer, torch.device("cpu"))
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing weight files: model.safetensors"):
        read_model_config(config, base, tokenizer, torch.device("cpu"))
    (base / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: missing or torn"):
        read_model_config(config, base, tokenizer, torch.device("cpu"))


def test_tokenizer_larger_than_the_embedding(tokenizer, tmp_path):
    model = random_llama(tiny_config(vocab_size=91))
    with pytest.raises(
        ValueError, match="tokenizer's ids go up to 91, the model's embedding only has vocab_size=91 rows"
    ):
        save_pretrained(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_with_a_gap_in_its_ids(tmp_path):
    """Three tokens, but one of them is row 97 of an embedding that ends at row 96."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 97}, unk_token="a"))
    sparse = Tokenizer({"tokenizer.json": core.to_str().encode(), "tokenizer_config.json": b"{}"}, "sparse")
    with pytest.raises(
        ValueError, match="tokenizer's ids go up to 97, the model's embedding only has vocab_size=97 rows"
    ):
        save_pretrained(random_llama(tiny_config()), sparse, tmp_path / "out")
    save_pretrained(random_llama(tiny_config(vocab_size=98)), sparse, tmp_path / "out")
    assert load_pretrained(tmp_path / "out")[1].encode("c") == [97]


def test_tied_weights_stored_twice_must_agree_and_rope_tables_are_recomputed(tokenizer, tmp_path):
    model = random_llama(tiny_config(tie_word_embeddings=True))
    save_pretrained(model, tokenizer, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    (tmp_path / "out/hashes.json").unlink()
    assert "lm_head.weight" not in load_file(file)
    rewrite(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(file, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    loaded, _ = load_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_equal(whole_tensors(loaded), whole_tensors(model))
    rewrite(file, lambda t: t["lm_head.weight"][96].add_(1e-3))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_pretrained(tmp_path / "out")


def test_fingerprint_sees_a_single_bit(base):
    before = fingerprint(base)
    assert before == fingerprint(base) and len(before) == 64
    rewrite(base / "model.safetensors", lambda t: t["model.norm.weight"][0].mul_(1 + 2**-23))
    assert fingerprint(base) != before


def test_resolve(base):
    assert resolve(str(base)) == base
    with pytest.raises(ValueError, match="model_path='/no/such/folder': no such folder, and not a hub name"):
        resolve("/no/such/folder")


def test_an_adapter_is_no_model(base, tmp_path):
    save_adapter(with_adapters(base), tmp_path / "adapter", base)
    with pytest.raises(
        ValueError,
        match=f"model_path='{tmp_path}/adapter': a LoRA adapter .*; expected a whole model: .* final/",
    ):
        resolve(tmp_path / "adapter")


def test_an_adapter_whose_base_or_weights_are_not_there(base, tmp_path):
    """peft writes the base's path as it was typed, and older versions a pickle."""
    adapter = tmp_path / "adapter"
    save_adapter(with_adapters(base), adapter, "./sft_merged")
    with pytest.raises(ValueError, match="base_model_name_or_path='./sft_merged': no such folder"):
        locate(adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="no adapter_model.safetensors; adapter_model.bin is a pickle"):
        locate(adapter)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "hashes.json"]
)
def test_a_flipped_bit_of_our_export_is_refused(base, name):
    """Every file that load_pretrained reads; a folder without hashes.json, of others, is read as it is."""
    write_hashes(base)
    whole, rng = (base / name).read_bytes(), random.Random(1)
    for _ in range(8):
        (base / name).write_bytes(flipped(whole, rng.randrange(8 * len(whole))))
        with pytest.raises(ValueError, match=str(base)):
            load_pretrained(base)
    (base / name).write_bytes(whole)
    load_pretrained(base)
    if name == "model.safetensors":
        (base / "hashes.json").unlink()
        (base / name).write_bytes(flipped(whole, 8 * len(whole) - 20))
        load_pretrained(base)


def test_a_flipped_bit_of_our_adapter_is_refused(base, tmp_path):
    model = with_adapters(base)
    save_adapter(model, tmp_path / "adapter", base)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole = (tmp_path / "adapter" / name).read_bytes()
        (tmp_path / "adapter" / name).write_bytes(flipped(whole, 4 * len(whole)))
        with pytest.raises(ValueError, match=f"adapter: {name}: damaged"):
            merge_adapter(load_pretrained(base)[0], tmp_path / "adapter")
        (tmp_path / "adapter" / name).write_bytes(whole)
    merge_adapter(load_pretrained(base)[0], tmp_path / "adapter")


@torch.no_grad()
def test_what_is_not_finite_is_not_exported(base, tokenizer, tmp_path):
    model = with_adapters(base)
    model.model.layers[1].mlp.up_proj.lora_B[2, 1] = math.inf
    with pytest.raises(FloatingPointError, match="mlp.up_proj.weight is not finite, so nothing is exported"):
        save_pretrained(model, tokenizer, tmp_path / "out")
    with pytest.raises(FloatingPointError, match="up_proj.lora_B.weight is not finite"):
        save_adapter(model, tmp_path / "adapter", base)
    assert not (tmp_path / "out").exists() and not (tmp_path / "adapter").exists()


# ---------------------------------------------------------------- writing Hugging Face folders


@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize(
    "config", [dict(tie_word_embeddings=True), dict(qkv_bias=True, model_type="qwen2", eos_token_id=7)]
)
def test_transformers_reads_our_folder(tokenizer, tmp_path, monkeypatch, config):
    """Several files with an index; equal logits; the trained end of turn stops generation; the chat template
    and its ids.
    """
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 40_000)
    model = random_llama(tiny_config(**config))
    save_pretrained(model, tokenizer, tmp_path / "out", chat_template=TEMPLATE)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 40_000 + 5_000 for file in files)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(transformers_logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == ([7, 1] if "eos_token_id" in config else 1)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rendered = their_tokenizer.apply_chat_template([{"role": "user", "content": "A B </s>"}], tokenize=False)
    assert rendered == "A B </s>"
    ours, our_tokenizer = load_pretrained(tmp_path / "out")
    assert_equal(whole_tensors(ours), whole_tensors(model))
    assert our_tokenizer.chat_template == TEMPLATE


def test_export_casts_once_and_replaces_only_an_export(base, tokenizer, tmp_path):
    """A model that others wrote is not replaced: it has no hashes.json."""
    before = fingerprint(base)
    model, _ = load_pretrained(base)
    with pytest.raises(ValueError, match="holds config.json, .*, which no export wrote"):
        save_pretrained(model, tokenizer, base)
    assert fingerprint(base) == before
    for dtype in (torch.float32, torch.bfloat16):
        save_pretrained(model, tokenizer, tmp_path / "export", dtype=dtype)
    assert_equal(
        load_file(tmp_path / "export/model.safetensors"),
        {name: param.detach().bfloat16() for name, param in model.named_parameters()},
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "export"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds thesis.txt, which no export wrote"):
        save_pretrained(model, tokenizer, tmp_path / "notes")


def test_export_on_a_full_disk_leaves_the_old_one(base, tokenizer, monkeypatch, tmp_path):
    model, _ = load_pretrained(base)
    export = tmp_path / "export"
    save_pretrained(model, tokenizer, export)
    before = fingerprint(export)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensors.os, "fsync", full)
    with pytest.raises(OSError, match="bytes needed, .* free; what was saved earlier is untouched"):
        save_pretrained(model, tokenizer, export)
    assert fingerprint(export) == before


def test_writer_holds_one_tensor_at_a_time(tmp_path):
    alive = weakref.WeakSet()

    def read(name):
        assert not alive
        tensor = torch.full((3, 5), float(name))
        alive.add(tensor)
        return tensor

    weights.write_safetensors(
        tmp_path / "x.safetensors", {str(i): (torch.float32, (3, 5)) for i in range(4)}, read
    )
    assert_equal(
        load_file(tmp_path / "x.safetensors"), {str(i): torch.full((3, 5), float(i)) for i in range(4)}
    )


# ---------------------------------------------------------------- adapters


def with_adapters(base, rank=3, alpha=7.0, targets=("q_proj", "up_proj")):
    model, _ = load_pretrained(base)
    apply_lora(model, rank, alpha, targets=targets)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.2)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
@torch.no_grad()
def test_adapters_go_to_peft_and_back(base, tokenizer, tmp_path):
    """Ours written, read by peft: equal logits, and equal to our merged export. Written by peft, merged by
    ours: equal logits.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = with_adapters(base)
    save_adapter(model, tmp_path / "ours", base)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours"
    )
    torch.testing.assert_close(transformers_logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(load_pretrained(base)[0])).abs().max() > 0.1
    save_pretrained(model, tokenizer, tmp_path / "merged")
    torch.testing.assert_close(
        logits(load_pretrained(tmp_path / "merged")[0]), logits(model), rtol=1e-5, atol=1e-5
    )
    theirs.save_pretrained(tmp_path / "theirs")
    back, _ = load_pretrained(base)
    merge_adapter(back, tmp_path / "theirs")
    assert_equal(
        load_file(tmp_path / "theirs/adapter_model.safetensors"),
        load_file(tmp_path / "ours/adapter_model.safetensors"),
    )
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merge_into_bfloat16_rounds_once(base, tokenizer, tmp_path):
    """W + (alpha / rank) B A in float32, rounded at the end: not the sum of two bfloat16 numbers."""
    model = with_adapters(base).to(torch.bfloat16)
    adapters = {name: param.float() for name, param in with_adapters(base).named_parameters()}
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = adapters[name]  # as in training: float32 adapters on a bfloat16 base
    save_pretrained(model, tokenizer, tmp_path / "merged")
    merged, plain = load_file(tmp_path / "merged/model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    exact = (
        plain[f"{name}.weight"].bfloat16().float()
        + 7.0 / 3 * adapters[f"{name}.lora_B"] @ adapters[f"{name}.lora_A"]
    )
    assert torch.equal(merged[f"{name}.weight"], exact.bfloat16())
    assert not [key for key in merged if "lora_" in key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(use_dora=True), "use_dora=True, expected it off"),
        (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication=.*, expected it off"),
        (dict(not_yet_invented="x"), "not_yet_invented='x', expected it off: it is not implemented here"),
        (dict(bias="all"), "bias='all', expected 'none'"),
        (
            dict(init_lora_weights="pissa_niter_4"),
            "init_lora_weights='pissa_niter_4': made for a base with other weights",
        ),
        (dict(r=4), r"lora_A.weight: shape \(3, 40\), expected \(4, 40\)"),
        (dict(target_modules=["q_proj"]), "layers.1.mlp.up_proj.lora_B.weight: unexpected"),
        (dict(target_modules="all-linear"), "layers.1.mlp.gate_proj.lora_A.weight: missing"),
        (dict(target_modules=["query"]), r"target_modules=\['query'\]: the model has no such module"),
        (
            dict(target_modules=["self_attn"]),
            "target_modules names model.layers.0.self_attn, which is no linear",
        ),
        (dict(target_modules="("), r"'\(': expected a regular expression: missing \)"),
        (dict(lora_alpha="7"), "lora_alpha='7': expected a finite number"),
        (dict(target_modules=None), "target_modules=None: expected a text or a list, each a text"),
    ],
)
def test_adapters_that_cannot_be_merged(base, tmp_path, change, message):
    model = with_adapters(base)
    save_adapter(model, tmp_path / "adapter", base)
    (tmp_path / "adapter/hashes.json").unlink()
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"(?s){tmp_path}/adapter/adapter_.*{message}"):
        merge_adapter(load_pretrained(base)[0], tmp_path / "adapter")


@pytest.mark.parametrize("key", ["target_modules", "modules_to_save"])
def test_an_adapter_that_unties_a_tied_weight_is_refused(base, tmp_path, key):
    """Merged, it would change the embedding and lm_head alike; PEFT has changed one of them."""
    model = with_adapters(base)
    save_adapter(model, tmp_path / "adapter", base)
    (tmp_path / "adapter/hashes.json").unlink()
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: ["lm_head"]}))
    tied = random_llama(tiny_config(num_hidden_layers=2, tie_word_embeddings=True))
    with pytest.raises(
        ValueError, match="names lm_head.*: the model ties embedding and lm_head|no such module"
    ):
        merge_adapter(tied, tmp_path / "adapter")


@pytest.mark.parametrize("alpha", [22.627416997969522, 1e-10])
def test_any_alpha_comes_back(base, tmp_path, alpha):
    """Nine decimals are not all of 16 sqrt(2), and none of 1e-10."""
    model = with_adapters(base, alpha=alpha)
    save_adapter(model, tmp_path / "adapter", base)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["lora_alpha"] == alpha
    back, _ = load_pretrained(base)
    merge_adapter(back, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-5)


def test_adapter_tensors_that_do_not_fit(base, tmp_path):
    model = with_adapters(base)
    save_adapter(model, tmp_path / "adapter", base)
    (tmp_path / "adapter/hashes.json").unlink()
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    rewrite(tmp_path / "adapter/adapter_model.safetensors", lambda t: t.pop(name))
    with pytest.raises(ValueError, match="layers.1.self_attn.q_proj.lora_B.weight: missing"):
        merge_adapter(load_pretrained(base)[0], tmp_path / "adapter")
