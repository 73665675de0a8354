"""Greedy answers during training, TensorBoard events, progress bars: what they show, and that the training
does not notice.
"""

import dataclasses
import io
import json
import shutil
import signal
import sys
import types
from functools import partial
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_documents
from world import final_weights, largest_difference, launch, metrics, save_at_once, stage_parts, write_config

from data import load_preferences, load_sft
from families import load_pretrained
from model import generate
from plumbing import config as config_module
from plumbing import hub
from plumbing.config import check_packages, load
from plumbing.files import progress_bar
from plumbing.logbook import Logbook, commit
from plumbing.tokenizer import Tokenizer
from training import SAMPLE_PROMPTS, SAMPLE_TOKENS, read_model_config, sample

LORA = dict(lora_rank=4, lora_alpha=8.0)
MEASURED = ("step_s", "tokens_per_s", "peak_mem_gib")


def samples(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def numbers(run):
    return [
        {key: value for key, value in line.items() if key not in MEASURED} for line in metrics(run, "step")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, keys, precision",
    [("sft", {"sharding": "full"}, "fp32"), ("dpo", {}, "bf16"), ("dpo", LORA, "bf16")],
    ids=["sft", "dpo", "dpo_lora"],
)
def test_sampling_on_two_ranks_leaves_the_training_as_it_is(world, tmp_path, stage, keys, precision):
    """Every metric and the final weights are equal to the bit. The SFT case samples before any forward of
    FSDP2 has gathered a weight.
    """
    keys = keys | dict(precision=precision)
    launch(stage, write_config(tmp_path / "without", world, **keys), ranks=2).ok()
    launch(stage, write_config(tmp_path / "with", world, sample_every=3, **keys), ranks=2).ok()
    without, sampled = tmp_path / "without" / stage, tmp_path / "with" / stage
    assert numbers(without) == numbers(sampled) and len(numbers(sampled)) == 4
    assert largest_difference(final_weights(without), final_weights(sampled)) == 0
    assert [line["step"] for line in samples(sampled)] == [0, 3, 4]
    assert not (without / "samples.jsonl").exists()


@pytest.mark.slow
def test_answers_are_those_of_the_saved_models(world, tmp_path):
    """The answers before step 1 are the base model's, those after the last the final model's, on 2 ranks as
    in one process without FSDP; prompts are held-out ones, each once, though the first two rows share theirs."""
    rows = [json.loads(line) for line in (world / "pref.jsonl").read_text().splitlines()]
    held_out = [rows[0], rows[0] | {"chosen": "good answer"}, *rows[1:6]]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    config = write_config(
        tmp_path, world, dpo=dict(data_eval={f"{tmp_path}/eval.jsonl": 1.0}), sample_every=100
    )
    launch("dpo", config, ranks=2).ok()
    first, last = samples(tmp_path / "dpo")
    expected = [f"<|user|>\n{rows[i]['prompt']}\n<|assistant|>\n" for i in range(SAMPLE_PROMPTS)]
    assert (first["step"], last["step"]) == (0, 4) and first["prompts"] == last["prompts"] == expected
    for line, folder in ((first, world / "base"), (last, tmp_path / "dpo/final")):
        model, tokenizer = load_pretrained(folder)
        answers = generate(
            model, [tokenizer.encode(text) for text in expected], SAMPLE_TOKENS, eos_id=tokenizer.eos_id
        )
        assert line["answers"] == [
            tokenizer.decode([i for i in ids if i != tokenizer.eos_id]) for ids in answers
        ]
    assert first["answers"] != last["answers"]


@pytest.mark.slow
def test_samples_are_logged_once(world, tmp_path):
    """Killed once step 2 is saved, with the samples of step 2 and a torn line in the file: both are made
    again. --fresh forgets all.
    """
    config, run = write_config(tmp_path, world, save_every=2, sample_every=1), tmp_path / "sft"
    assert launch("sft", config, prepare=partial(save_at_once, kill_after=2)).codes == [-signal.SIGKILL]
    first = samples(run)
    assert [line["step"] for line in first] == [0, 1]
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps(first[1] | {"step": 2}) + '\n{"step": 3, "pro')
    launch("sft", config).ok()
    assert [line["step"] for line in samples(run)] == [0, 1, 2, 3, 4] and samples(run)[:2] == first
    shutil.rmtree(run / "checkpoints")
    launch("sft", config, "--fresh", "--sample_every=4").ok()
    assert [line["step"] for line in samples(run)] == [0, 4]


def test_an_answer_ends_before_the_end_of_turn(world, tmp_path, ranks, monkeypatch):
    """Whatever comes after the first end-of-turn token is not shown, and an answer without one is whole."""
    config, data, model = stage_parts("sft", write_config(tmp_path, world), ranks)
    tokenizer = Tokenizer.from_dir(world / "base")
    (words,) = random_documents(tokenizer.vocab_size - 10, (SAMPLE_TOKENS,))
    words = [int(i) + 5 for i in words]
    assert tokenizer.eos_id not in words
    made = [words[:3] + [tokenizer.eos_id] + words[4:], words, [tokenizer.eos_id] * SAMPLE_TOKENS, words]
    monkeypatch.setattr("training.generate", lambda model, prompts, count: made)
    _, answers = sample(model, data, tokenizer, config)
    assert answers == [tokenizer.decode(words[:3]), tokenizer.decode(words), "", tokenizer.decode(words)]


@pytest.mark.slow
def test_prompts_leave_room_in_a_sliding_window(world, tmp_path, ranks):
    """A window with room for the shorter prompts takes those, one that an answer fills takes none; neither
    stops the run.
    """
    config, data, model = stage_parts("sft", write_config(tmp_path, world), ranks)
    tokenizer = Tokenizer.from_dir(world / "base")
    lengths = [mask.argmax() for _, mask in (data[i] for i in range(len(data)))]
    room = sorted(lengths)[1]
    assert room < max(lengths[:SAMPLE_PROMPTS])
    for slots, expected in ((room, sum(length <= room for length in lengths)), (0, 0)):
        model.config = dataclasses.replace(model.config, sliding_window=SAMPLE_TOKENS + int(slots))
        prompts, answers = sample(model, data, tokenizer, config)
        assert len(prompts) == len(answers) == min(SAMPLE_PROMPTS, expected), (slots, expected)
        assert all(len(tokenizer.encode(prompt)) <= slots for prompt in prompts)


class Recorder:
    """Stands in for torch's SummaryWriter."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars = folder, purge_step, []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        self.flushed = len(self.scalars)


def test_tensorboard_gets_every_metric(world, tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Recorder))
    log = Logbook(load("sft", [str(write_config(tmp_path, world)), "--tensorboard"]), ranks, 4, {})
    log.resume_at(0)
    log.evaluation(0, {"eval/loss": 2.0})
    log.step(1, {"loss": 1.5}, 100, 0)
    events = log._events
    assert events.folder == tmp_path / "sft/tensorboard" and events.purge_step == 0
    written = [
        (name, value, line["step"])
        for line in metrics(tmp_path / "sft", "step")
        for name, value in line.items()
        if name != "step"
    ]
    assert (
        sorted(events.scalars) == sorted(written)
        and ("loss", 1.5, 1) in written
        and events.flushed == len(written)
    )
    log.resume_at(1)
    assert log._events.purge_step == 2, "step 1 is kept"


def test_tensorboard_must_be_installed(world, tmp_path, monkeypatch):
    monkeypatch.setattr("plumbing.config._is_installed", lambda module: False)
    path = str(write_config(tmp_path, world))
    check_packages(load("sft", [path]))
    config = load("sft", [path, "--tensorboard"])
    expected = "tensorboard=True: expected the package, which is not installed"
    with pytest.raises(ValueError, match=expected):  # before the folder is read
        read_model_config(config, "nowhere", None, torch.device("cpu"))


def test_a_machine_without_git_has_a_manifest_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown: git is not installed"


@pytest.mark.parametrize("is_terminal, refreshes", [(True, 200), (False, 10)])
def test_a_bar_in_a_log_file_is_short(monkeypatch, is_terminal, refreshes):
    """100 s of work: two lines a second on a terminal, one in ten seconds in a file, each with rate and ETA,
    from the first second on.
    """
    now, stream = [0.0], io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(1000), desc="work"):
        now[0] += 0.1
    _, first, *lines = stream.getvalue().split("\r")
    assert "0/1000 [00:00<?" in first and len(lines) == pytest.approx(refreshes, rel=0.1)
    assert all("<" in line and "10.00it/s" in line for line in lines if line.strip())


# ---------------------------------------------------------------- what is said before the first step


@pytest.mark.slow
def test_a_padding_id_in_the_data_is_said_and_kept(world, tmp_path):
    """With pad = EOS, which ends every answer: transformers would not train its row; the export still names
    it.
    """
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    eos = Tokenizer.from_dir(base).eos_id
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"pad_token_id": eos}))
    config = write_config(tmp_path, world, model_path=str(base), max_steps=1, warmup_steps=0)
    for stage, sides in (("sft", ["data"]), ("dpo", ["data.chosen", "data.rejected"])):
        data = stage_data(stage, config)
        count = sum(
            int((attrgetter(side)(SimpleNamespace(data=data)).input_ids == eos).sum()) for side in sides
        )
        out = launch(stage, config).ok().out[0]
        assert count > 35 and f"pad_token_id={eos} occurs {count:,} times in the data" in out
        assert json.loads((tmp_path / stage / "final/config.json").read_text())["pad_token_id"] == eos
    without = write_config(tmp_path / "without", world, max_steps=1, warmup_steps=0)
    assert "pad_token_id" not in launch("sft", without).ok().out[0]


def stage_data(stage, path):
    config = load(stage, [str(path)])
    data, _ = {"sft": load_sft, "dpo": load_preferences}[stage](config, Tokenizer.from_dir(config.model_path))
    return data


def no_upload():
    hub.open_for_push = lambda name: None
    hub.push = lambda folder, name: print(f"UPLOAD {folder} {name}", flush=True)


@pytest.mark.slow
def test_a_finished_run_is_still_pushed(world, tmp_path):
    """Trained without --push, repeated with it: nothing is trained, final/ is uploaded."""
    config = write_config(tmp_path, world, max_steps=1, warmup_steps=0)
    assert "UPLOAD" not in launch("sft", config, prepare=no_upload).ok().out[0]
    again = launch("sft", config, "--push=org/name", prepare=no_upload).ok().out[0]
    assert "nothing is trained" in again and "step 0" not in again
    assert f"UPLOAD {tmp_path}/sft org/name" in again and "pushed to org/name" in again
