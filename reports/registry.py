"""The index of what was trained and validated: `runs/index.json`, an entry per folder, which `python -m reports.ladder` prints.

Entries are joined by content, not by name: a DPO run's `start` is the `weights` of its SFT run, a validation's `sft` and `dpo` are the
weights that it steered. A model that was trained again has other weights, so an old validation no longer counts as its own.
"""

import fcntl
import hashlib
import json
import time
from pathlib import Path

from plumbing.config import config_hash
from plumbing.files import UserError, write_json
from plumbing.weights import fingerprint
from reports.folders import read

METRICS = ("loss", "eval/loss", "eval/perplexity", "eval/rewards/accuracies", "eval/rewards/margins")


def index_of(folder):
    """The index that a folder belongs to: in the nearest folder above it that is called runs; without one, beside it."""
    folder = Path(folder).absolute()
    return next((above for above in folder.parents if above.name == "runs"), folder.parent) / "index.json"


def read_index(path):
    """{folder below the index: entry}; empty without a file. ValueError when the file is torn or something else."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())
        fits = all("stage" in entry for entry in entries.values())
    except (json.JSONDecodeError, AttributeError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: expected an index of runs, or no such file; move it away, the same commands register again")
    return entries


def add(path, folder, entry):
    """Put the entry of a folder into the index at `path`, in place of an earlier one. Returns `path`, if below the working directory as
    relative to it.

    Readers see the old file or the new one; of two writers one waits for the other.
    """
    with open(path.with_name(".index.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        name = str(Path(folder).absolute().relative_to(path.parent))
        write_json(path, read_index(path) | {name: entry | {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}})
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def add_run(config):
    """Register the run whose config this is, finished and exported. Returns the index's path."""
    run = read(Path(config.out_dir))
    metrics = {}
    for name in [name for name in METRICS if run.last(name) is not None]:
        metrics[name] = {"first": run.points(name)[1][0], "last": run.last(name)}
        if (half := run.last(f"{name}_ci95")) is not None:
            metrics[name]["ci95"] = half  # half of the last value's 95 % interval
    manifest = {key: run.manifest[key] for key in ("stage", "data", "commit")}
    weights = {"start": run.manifest["weights"], "weights": fingerprint(run.folder / "final")}
    entry = manifest | weights | {"config": config_hash(config), "steps": run.points("loss")[0][-1], "metrics": metrics}
    return add(index_of(run.folder), run.folder, entry)


def add_validation(folder, pair):
    """Register a finished sweep (folder, in the vector's) of `pair`, a name of configs/pairs.py. Returns the index's path."""
    report = json.loads((folder / "aqi.json").read_text())
    vector = json.loads((folder.parent / "manifest.json").read_text())["inputs"]
    inputs, overall = report["inputs"], report["verdicts"][0]
    curve = {key: overall[key] for key in ("estimate", "low", "high", "change", "change_interval", "p_monotone")}
    settings = hashlib.sha256(json.dumps([vector, inputs], sort_keys=True).encode()).hexdigest()
    entry = {"stage": "validate", "pair": pair, "inject": inputs["inject"], "sft": vector["sft"], "dpo": vector["dpo"], "config": settings}
    return add(index_of(folder.parent), folder, entry | {"metrics": {"lambdas": inputs["lambdas"], **curve}, "verdict": overall["verdict"]})
