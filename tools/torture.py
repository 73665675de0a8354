"""Faults on purpose, on a tiny model: `python -m tools.torture`.

Prints what each did to a run, and exits 1 when any is wrong.

A fault is survived when the same command, given again, ends with the weights, the adapter and the metrics of
a run that nothing has disturbed, bit for bit; a corrupted file when its reader refuses it by name.
"""

import argparse
import copy
import errno
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import world as tiny  # noqa: E402  the world of the tests: a Llama of 2 layers, 35 rows, runs of a second

from data import load_preferences, load_sft  # noqa: E402
from families import load_pretrained  # noqa: E402
from optim import adamw  # noqa: E402
from plumbing import parallel, token_cache, watchdog, weights  # noqa: E402
from plumbing.adapters import merge_adapter  # noqa: E402
from plumbing.checkpoint import Checkpointer  # noqa: E402
from plumbing.files import UserError, table  # noqa: E402
from plumbing.tensors import read_verified  # noqa: E402
from plumbing.tokenizer import Tokenizer  # noqa: E402
from tools.arguments import at_least  # noqa: E402

KEYS = dict(max_steps=4, save_every=1, keep_last=1, lora_rank=4, lora_alpha=8.0, data_eval=None)
ALL_BITS = 600  # bytes: of smaller files every bit is flipped
Tried = namedtuple("Tried", "runs wrong")


# ---------------------------------------------------------------- the run that is disturbed


class Campaign:
    """A folder with the tiny world, and the result of the undisturbed run."""

    def __init__(self, folder, seed):
        self.folder, self.rng = Path(folder), random.Random(seed)
        self.world = tiny.make_world(self.folder / "world")
        self.count = 0
        self.whole = self.new_run()
        self.train(self.whole).ok()  # the first one waits for the fork server to import torch
        began = time.perf_counter()
        self.train(self.new_run()).ok()
        self.seconds = time.perf_counter() - began

    def new_run(self, keys=KEYS):
        """The config of a run that has not begun, in a folder and with a cache of its own."""
        self.count += 1
        return tiny.write_config(self.folder / f"run_{self.count:05d}", self.world, **keys)

    def train(self, config, prepare=None, ranks=1):
        """One process, or several, of that run; prepare() is called in each first."""
        return tiny.launch("dpo", config, prepare=prepare, ranks=ranks)

    def ends_well(self, config, whole=None):
        """Give the command until it ends by itself; is the result that of the undisturbed run?

        Its folder is deleted then. whole: the undisturbed run, where it is not the campaign's.
        """
        outcome = self.train(config)
        problem = f"exit codes {outcome.codes}"
        if not any(outcome.codes):
            problem = differences(config, whole or self.whole)
        if problem:
            print(f"{config.parent}: {problem}\n{outcome.err[0][-500:]}", file=sys.stderr)
            return False
        shutil.rmtree(config.parent)
        return True


def differences(config, whole):
    """In words, what the run has unlike the undisturbed one; "" for nothing."""
    expected, found = result_of(whole), result_of(config)
    different = [name for name in expected if found[name] != expected[name]]
    if "metrics" in different:
        different.append(f"{found['metrics']} unlike {expected['metrics']}")
    return ", ".join(different)


def result_of(config):
    """{name: weights or adapter as bytes, or the metrics that are no measurement}."""
    run = config.parent / "dpo"
    measured = {"step_s", "tokens_per_s", "peak_mem_gib"}
    steps = []
    for line in tiny.metrics(run):
        steps.append({key: value for key, value in line.items() if key not in measured})
    found = {"metrics": steps}
    for name in ("final/model.safetensors", "adapter/adapter_model.safetensors"):
        found[name] = (run / name).read_bytes() if (run / name).exists() else None
    return found


# ---------------------------------------------------------------- kills


def die_after(seconds):
    """SIGKILL this process that long from now."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def random_kills(campaign, number):
    """SIGKILL at a random moment, each run up to eight times."""
    kills = wrong = 0
    while kills < number:
        config = campaign.new_run()
        for _ in range(campaign.rng.randint(1, 8)):
            moment = campaign.rng.uniform(0, 1.2 * campaign.seconds)
            kills += campaign.train(config, functools.partial(die_after, moment)).codes != [0]
        wrong += not campaign.ends_well(config)
    return Tried(kills, wrong)


def at_operation(number, act):
    """Call act(path or handle) before this process's file operation of that number.

    The operations are fsync, rename, unlink, mkdir.
    """
    seen = 0

    def counted(real, *args, **options):
        nonlocal seen
        seen += 1
        if seen == number:
            act(args[0])
        return real(*args, **options)

    for name in ("fsync", "rename", "unlink", "mkdir"):
        setattr(os, name, functools.partial(counted, getattr(os, name)))


def kill(_place):
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_full(place):
    # As from the kernel: an fsync does not say of what.
    names = [] if isinstance(place, int) else [str(place)]
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)


def placed_kills(campaign, number):
    """SIGKILL in front of every file operation of a run, or of `number` random ones."""
    return _at_each_operation(campaign, number, kill)


def full_disks(campaign, number):
    """ENOSPC at every file operation of a run, or at `number` random ones: one line that names the path."""
    return _at_each_operation(campaign, number, disk_is_full)


def _at_each_operation(campaign, number, act):
    runs = wrong = 0
    places = campaign.rng.sample(range(1, 151), number) if number < 150 else range(1, 10**6)
    for place in places:
        config = campaign.new_run()
        outcome = campaign.train(config, functools.partial(at_operation, place, act))
        if outcome.codes == [0]:  # the run has fewer operations
            if number >= 150:
                break
            continue
        runs += 1
        said = act is kill or re.search(r"^error: /\S+: .*No space left on device", outcome.err[0], re.M)
        if not said:
            print(f"{config.parent}: operation {place}: {outcome.err[0][-500:]}", file=sys.stderr)
        wrong += not campaign.ends_well(config) or not said
    return Tried(runs, wrong)


# ---------------------------------------------------------------- two writers, a stopped rank


def two_writers(campaign, number):
    """A second process with other settings, started at a random moment: it ends naming the first."""
    wrong = 0
    for _ in range(number):
        config = campaign.new_run()
        other = config.with_name("other")
        other.mkdir()
        shutil.copy(config, other)
        thread = threading.Thread(target=campaign.train, args=(config, slow_down))
        thread.start()
        while thread.is_alive() and not (config.parent / "dpo/manifest.json").exists():
            time.sleep(0.01)
        time.sleep(campaign.rng.uniform(0, 1))
        second = tiny.launch("dpo", other / "config.py", "--lr=0.5", "--fresh")
        refused = second.codes == [1] and "in use by process" in second.err[0]
        thread.join()
        wrong += not refused or not campaign.ends_well(config)
    return Tried(number, wrong)


def slow_down():
    """Half a second a step."""
    at_step(range(9), lambda: time.sleep(0.5))


def at_step(steps, act, rank=0):
    """Call act() in that rank once one of the steps is logged."""
    logbook = tiny.logbook.Logbook
    original = logbook.step

    def hooked(self, done, *args):
        original(self, done, *args)
        if done in steps and self.world.rank == rank:
            act()

    logbook.step = hooked


def stop_itself(rank, step):
    """SIGSTOP that rank after that step.

    patience is seconds. What no watchdog has ended is killed after a minute.
    """
    watchdog.PATIENCE = 20.0  # below 15 a stopped rank is taken at its last word: that it waits
    pid = os.getpid()

    def stop():
        subprocess.Popen(["sh", "-c", f"sleep 60; kill -KILL {pid}"])
        os.kill(pid, signal.SIGSTOP)

    at_step([step], stop, rank)


def stopped_ranks(campaign, number):
    """One of two ranks is stopped: the other ends naming it, and the run goes on from its last checkpoint."""
    wrong = 0
    for _ in range(number):
        config = campaign.new_run()
        rank, step = campaign.rng.randrange(2), campaign.rng.randint(1, 3)
        outcome = campaign.train(config, functools.partial(stop_itself, rank, step), ranks=2)
        named = re.search(rf"error: no progress for .*; what hangs: rank {rank}\n", outcome.err[1 - rank])
        done = campaign.train(config, ranks=2)
        same = tiny.largest_difference(tiny.final_weights(config.parent / "dpo"), campaign.final) < 1e-5
        if not (named and not any(done.codes) and same):
            wrong += 1
            said = outcome.err[1 - rank][-500:]
            print(f"rank {rank}, step {step}: {said} {done.codes} {same}", file=sys.stderr)
    return Tried(number, wrong)


# ---------------------------------------------------------------- corruption


def readers(campaign, folder):
    """{kind: (files, read)} of a copy of the undisturbed run.

    read() raises UserError, or returns False, for a damaged file.
    """
    run = folder / "dpo"
    alone = parallel.World(0, 1, torch.device("cpu"))
    config, _, model = tiny.stage_parts("dpo", folder / "config.py", alone)
    optimizer = adamw(model, config.weight_decay)
    (step,) = run.glob("checkpoints/step_*")
    identity = json.loads((step / "checkpoint.json").read_text())["run_identity"]
    (cached,) = [path.parent for path in folder.glob("cache/**/meta.json")]
    (reference,) = folder.glob("cache/reference/*.safetensors")
    base, _ = load_pretrained(config.model_path)

    def read_checkpoint():
        checkpointer = Checkpointer(run, 1, identity)
        checkpointer.load(checkpointer.latest(), model, optimizer)

    def read_export():
        weights._digests.clear()
        load_pretrained(run / "final")

    def read_cache():
        copy = shutil.copytree(cached, folder / "copy", dirs_exist_ok=True)
        return token_cache.is_intact(Path(copy), lambda text: None)

    exported = [path for path in sorted((run / "final").iterdir()) if path.name != "README.md"]
    return {
        "checkpoint": (sorted(step.iterdir()), read_checkpoint),
        "final/": (exported, read_export),
        "adapter/": (sorted((run / "adapter").iterdir()), lambda: merge_adapter(base, run / "adapter")),
        "reference log-probs": ([reference], lambda: read_verified(reference)),
        "tokenised data": (sorted(cached.iterdir()), read_cache),
    }


def corruption(campaign, number):
    """Flip one bit at a time; returns {kind: Tried}.

    All bits of the small files, `number` random ones of the others.
    """
    parallel.init()
    found = {}
    folder = Path(shutil.copytree(campaign.whole.parent, campaign.folder / "corrupted"))
    text = (folder / "config.py").read_text().replace(str(campaign.whole.parent), str(folder))
    (folder / "config.py").write_text(text)
    for kind, (files, read) in readers(campaign, folder).items():
        runs = wrong = 0
        for path in files:
            intact = path.read_bytes()
            bits = range(8 * len(intact))
            if len(intact) > ALL_BITS:
                bits = campaign.rng.sample(bits, min(number, len(bits)))
            for bit in campaign.rng.sample(bits, min(len(bits), 8 * number)):
                path.write_bytes(flipped(intact, bit))
                runs += 1
                wrong += not refuses(read, path, bit)
            path.write_bytes(intact)
        wrong += refuses(read, files[0], "no")  # intact again
        found[kind] = Tried(runs, wrong)
    parallel.shutdown()
    return found


# Of all weights: what else is trained by default, and what a checkpoint before the newest is kept for.
SPLIT = dict(max_steps=4, save_every=1, keep_last=2, precision="bf16", data_eval=None)


def damaged_checkpoints(campaign, number):
    """A run is killed at its end, and a bit of its newest checkpoint flipped: the one before goes on."""
    whole = campaign.new_run(SPLIT)
    campaign.train(whole).ok()
    wrong = 0
    for _ in range(number):
        config = campaign.new_run(SPLIT)
        campaign.train(config, die_at_the_end)
        newest = max((config.parent / "dpo/checkpoints").glob("step_*"))
        files = sorted(newest.iterdir())
        (path,) = campaign.rng.choices(files, [file.stat().st_size for file in files])
        intact = path.read_bytes()
        path.write_bytes(flipped(intact, campaign.rng.randrange(8 * len(intact))))
        wrong += not campaign.ends_well(config, whole)
    return Tried(number, wrong)


def die_at_the_end():
    """Half a second a step, so that each checkpoint is written; SIGKILL after the last but its checkpoint."""
    slow_down()
    at_step([4], functools.partial(kill, None))


def flipped(data, bit):
    """The bytes with one bit changed."""
    data = bytearray(data)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)


def refuses(read, path, bit):
    """Whether the reader says that something is wrong, in one line that names the place."""
    try:
        if read() is False:
            return True
    except UserError:
        return True
    if bit != "no":
        print(f"{path}: bit {bit} was not noticed", file=sys.stderr)
    return False


# ---------------------------------------------------------------- fuzzed inputs

VALUES = (None, "", "x", "\ud800", -1, 0, 1, 1.5, math.inf, 2**40, True, [], {}, ["x"], [[]], {"x": None})
HANGS = 30  # seconds


def inputs(campaign, folder):
    """{kind: (file, read)}; read() is what a command does with that file."""
    model = Path(shutil.copytree(campaign.world / "base", folder / "base"))
    adapter = Path(shutil.copytree(campaign.whole.parent / "dpo/adapter", folder / "adapter"))
    (adapter / "hashes.json").unlink()
    rows = {"sft": folder / "sft.jsonl", "dpo": folder / "pref.jsonl"}
    for path in rows.values():
        path.write_text("".join((campaign.world / path.name).read_text().splitlines(keepends=True)[:6]))
    index = model / weights.WEIGHTS_INDEX
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": weights.WEIGHTS}}))
    tokenizer = Tokenizer.from_dir(model)

    def read_adapter():
        base, _ = load_pretrained(campaign.world / "base")
        merge_adapter(base, adapter)

    def read_rows(load, path):
        shape = dict(data_eval=None, template="tulu", max_seq_len=64, supervise="all", rows="choice")
        config = SimpleNamespace(
            data={str(path): 1.0}, cache_dir=folder / "cache", share_prefix=True, **shape
        )
        lines = []
        load(config, tokenizer, lines.append)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        read, *parts = map(int, re.findall(r"(\d+) (?:rows:|train|dropped)", lines[-1]))
        assert read == sum(parts) and read <= len(path.read_bytes().splitlines()), lines[-1]

    return {
        "config.json": (model / "config.json", lambda: load_pretrained(model)),
        "index": (index, lambda: load_pretrained(model)),
        "tokenizer_config.json": (model / "tokenizer_config.json", lambda: Tokenizer.from_dir(model)),
        "tokenizer.json": (model / "tokenizer.json", lambda: Tokenizer.from_dir(model)),
        "model.safetensors": (model / "model.safetensors", lambda: load_pretrained(model)),
        "adapter_config.json": (adapter / "adapter_config.json", read_adapter),
        "conversations": (rows["sft"], lambda: read_rows(load_sft, rows["sft"])),
        "pairs": (rows["dpo"], lambda: read_rows(load_preferences, rows["dpo"])),
    }


def fuzz(campaign, number):
    """Read `number` damaged inputs of each kind; returns {kind: Tried}.

    Wrong: an error that names no file, a traceback, a hang, rows that are neither read nor counted.
    """
    parallel.init()
    found, folder = {}, campaign.folder / "fuzz"
    folder.mkdir()
    for kind, (path, read) in inputs(campaign, folder).items():
        intact, wrong = path.read_bytes(), 0
        for _ in range(number):
            path.write_bytes(damaged(intact, campaign.rng))
            wrong += not ends_by_name(read, path)
        path.write_bytes(intact)
        read()
        found[kind] = Tried(number, wrong)
    parallel.shutdown()
    return found


def damaged(content, rng):
    """A value, a key or some bytes changed: in one of the file's JSON texts, or anywhere."""
    lines = content.splitlines(keepends=True)
    if rng.random() < 0.5 and lines[0].startswith(b"{"):
        at = rng.randrange(len(lines)) if len(lines) > 1 and lines[0].rstrip().endswith(b"}") else None
        value = json.loads(content if at is None else lines[at])
        text = json.dumps(replaced(value, rng)).encode()
        return text if at is None else b"".join([*lines[:at], text + b"\n", *lines[at + 1 :]])
    first, length = rng.randrange(len(content)), rng.choice([0, 0, 1, 1, 5, 100])
    inserted = rng.choice([b"", rng.randbytes(3), b"{", b'"', b"\n", b"\xff", content[first : first + 20]])
    end = len(content) if rng.random() < 0.2 else first + length
    return content[:first] + inserted + content[end:]


def replaced(value, rng):
    """The value with one of its parts, at any depth, replaced or removed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    value = copy.copy(value)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.2:
        del value[key]
    else:
        value[key] = replaced(value[key], rng)
    return value


def ends_by_name(read, path):
    """Whether the file is read, or refused in a message that names it or its folder, in time."""
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("hangs"))
    signal.alarm(HANGS)
    try:
        read()
        return True
    except UserError as error:
        if str(path.parent) in str(error) or str(error).startswith("data: "):  # of all data together
            return True
        told = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a library's Rust code, too
        told = traceback.format_exc()
    finally:
        signal.alarm(0)
    kept = path.with_name(f"wrong_{time.time_ns()}_{path.name}")
    shutil.copy(path, kept)
    print(f"{kept}: {path.read_bytes()[:1500]}\n{told[-1500:]}", file=sys.stderr)
    return False


# ---------------------------------------------------------------- the table

FAULTS = {
    "random kills": (random_kills, 100),
    "placed kills": (placed_kills, 150),
    "full disk": (full_disks, 150),
    "two writers": (two_writers, 10),
    "stopped rank": (stopped_ranks, 4),
    "flipped bits": (corruption, 300),
    "damaged checkpoint": (damaged_checkpoints, 100),
    "fuzzed inputs": (fuzz, 1000),
}


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.torture", description=__doc__)
    parser.add_argument("faults", nargs="*", help=f"default: all of {', '.join(FAULTS)}")
    parser.add_argument("--number", type=at_least(1), help="of kills, of runs, of bits of a large file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    unknown = [name for name in args.faults if name not in FAULTS]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no such fault; expected of {', '.join(FAULTS)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        campaign = Campaign(folder, args.seed)
        campaign.final = tiny.final_weights(campaign.whole.parent / "dpo")
        for name in args.faults or FAULTS:
            inflict, number = FAULTS[name]
            number = args.number or number
            command = f'python -m tools.torture "{name}" --number={number} --seed={args.seed}'
            tried = inflict(campaign, number)
            for kind, (runs, wrong) in (tried if isinstance(tried, dict) else {"": tried}).items():
                rows.append([f"{name}: {kind}" if kind else name, f"{runs:,}", f"{wrong:,}", command])
                print(f"{rows[-1][0]}: {runs:,} tried, {wrong:,} wrong", file=sys.stderr, flush=True)
    print(table(["fault", "runs", "lost or wrong", "command"], rows, left=(0, -1)))
    return 1 if any(row[2] != "0" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
