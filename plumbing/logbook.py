"""The run folder and what a run says of itself.

config.json, manifest.json, metrics.jsonl, samples.jsonl and the step line.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from plumbing import hub, parallel, watchdog
from plumbing.config import config_dict
from plumbing.files import finite, named, progress_bar, read_json, write_json
from plumbing.health import Health

ROOT = Path(__file__).parent.parent
_PACKAGES = ("torch", "triton", "flash-attn-4", "numpy", "safetensors", "tokenizers", "datasets")
# (metric, label, format) in the order of the step line; metrics that a stage does not have are left out
_STEP_LINE = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/margins", "margin", "{:.4f}"),
    ("rewards/accuracies", "acc", "{:.3f}"),
    ("grad_norm", "gnorm", "{:.3g}"),
    ("lr", "lr", "{:.2e}"),
    ("step_s", "", "{:.2f} s"),
    ("tokens_per_s", "", "{:,.0f} tok/s"),
    ("mfu", "mfu", "{:.1%}"),
    ("peak_mem_gib", "", "{:.2f} GiB"),
)


class Logbook:
    """Writes the run folder from rank 0; every rank may call every method."""

    def __init__(self, config, world, total_steps, implicit):
        """implicit: values that no key states; they go into the manifest.

        Reduction, eps, data fingerprints and the like.
        """
        self.world, self.total_steps, self.log_every = world, total_steps, config.log_every
        self.folder, self.fresh = Path(config.out_dir), config.fresh
        self.peak = measured_matmul_peak(world.device)
        self.tensorboard = config.tensorboard
        self.health = Health(config.loss_spike)
        self._metrics = self._events = None
        if world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", config_dict(config))
            self._manifest = self._describe() | implicit
            self._manifest["processes"] = [] if self.fresh else _processes(self.folder)
            write_json(self.folder / "manifest.json", self._manifest)
        self._first_step = 0  # of this process
        self._start = self._resumed = time.perf_counter()

    def _describe(self):
        """What the manifest says of program and machine.

        Where tracked files differ from the commit, also changes.diff.
        """
        manifest = {
            "command": shlex.join(sys.argv),
            "commit": commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "hardware": platform.machine(),
            "world_size": self.world.size,
            "matmul_peak_flops": self.peak,
            "versions": _versions(),
            "hub": hub.COMMITS,
        }
        if self.world.device.type == "cuda":
            manifest["hardware"] = torch.cuda.get_device_name(self.world.device)
        changes = changed_files()
        (self.folder / "changes.diff").unlink(missing_ok=True)
        if changes:
            (self.folder / "changes.diff").write_text(changes)
            manifest["changes_sha256"] = hashlib.sha256(changes.encode()).hexdigest()
        return manifest

    def resume_at(self, step, checkpoint=None):
        """Say what is left after `step`, and open metrics.jsonl for more.

        checkpoint holds that step (None: the start). Lines of steps that will be trained again are dropped.
        The manifest's `processes` say who trained which steps: an entry trained those after its step.
        """
        left = self.total_steps - step
        final = self.folder / "final"
        if checkpoint:
            nothing = "" if left else "; nothing is left to train"
            self.world.say(f"{checkpoint}: goes on after step {step} of {self.total_steps}{nothing}")
        if left and final.is_dir() and not self.fresh:
            reason = "of a finished run whose last step is in no checkpoint (save_every)"
            self.world.say(f"{final}: {reason}: {left} steps are trained again, then it is replaced")
        # With loss_spike="stop" a restart stops at the same loss again, and on all ranks.
        earlier = parallel.from_main(self.world, lambda: json.dumps(self._open_files(step, left)))
        self.health.take_up(json.loads(earlier))
        self._first_step = step
        self._start = self._resumed = time.perf_counter()
        watchdog.start(self.world, step)

    def _open_files(self, step, left):
        """Open what is appended to; return what Health reads of the metrics lines up to `step`."""
        if left:
            earlier = [process for process in self._manifest["processes"] if process["after_step"] < step]
            this = {key: self._manifest[key] for key in ("started", "commit", "hardware", "world_size")}
            self._manifest["processes"] = [*earlier, {"after_step": step, **this}]
            write_json(self.folder / "manifest.json", self._manifest)
        path = self.folder / "metrics.jsonl"
        if step == 0 and path.exists() and not self.fresh:
            if count := len(path.read_bytes().splitlines()):
                self.world.say(f"{path}: {count:,} lines of a run without a checkpoint are written over")
        kept = _forget_after(step, path, self.world.say)
        # distinct: a line that stands twice makes up for none that is lost
        missing = step - len({entry["step"] for entry in kept if "loss" in entry})
        if missing:  # of a power cut, a torn line, or an editor
            lost = f"{missing} of the {step} steps before are not in it, nor will they be in the card"
            self.world.say(f"{path}: {lost}")
        _forget_after(step, self.folder / "samples.jsonl", self.world.say)
        self._metrics = path.open("a")
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

            # TensorBoard forgets what an earlier process wrote of the steps that are trained again
            purge = step + 1 if step else 0
            self._events = SummaryWriter(self.folder / "tensorboard", purge_step=purge)
        wanted = {"step", "loss", "grad_norm", "eval/loss"}
        return [{key: entry[key] for key in entry.keys() & wanted} for entry in kept]

    def step(self, step, metrics, tokens, flops):
        """Record finished optimizer step number `step` (1-based).

        tokens, flops: of all ranks; the time runs from the previous call.
        """
        now = time.perf_counter()
        elapsed = now - self._start
        metrics = {"step": step, **metrics, "step_s": elapsed, "tokens_per_s": tokens / elapsed}
        metrics["peak_mem_gib"] = peak_memory_gib(self.world.device)
        if self.peak:
            metrics["mfu"] = flops / elapsed / (self.peak * self.world.size)
        self.write(metrics)
        if step % self.log_every == 0 or step in (1, self.total_steps):
            self.world.say(self._step_line(metrics, now - self._resumed))
        watchdog.beat(step)
        for warning in self.health.after_step(metrics):
            self.world.say(warning)
        self._start = time.perf_counter()

    def _step_line(self, metrics, seconds):
        """`step 00120/02500 | loss 0.6421 | .. | 3:51 < 1:16:24`.

        At the end, as tqdm has it, the time so far and the time left. seconds: since this process has begun
        to train. What is left takes as long as its steps, evaluations and saves did.
        """
        step = metrics["step"]
        parts = [f"step {step:05d}/{self.total_steps:05d}"]
        for key, label, form in _STEP_LINE:
            if key in metrics:
                parts.append(f"{label} {form.format(metrics[key])}".strip())
        left = seconds / (step - self._first_step) * (self.total_steps - step)
        parts.append(f"{_clock(seconds)} < {_clock(left)}")
        return " | ".join(parts)

    def evaluation(self, step, metrics):
        """Record held-out metrics after `step` optimizer steps; their time is not the next step's."""
        self.write({"step": step, **metrics})
        parts = [f"eval {step:05d}/{self.total_steps:05d}"]
        for key in ("eval/loss", "eval/perplexity", "eval/rewards/margins", "eval/rewards/accuracies"):
            if key in metrics:
                half = f" +- {metrics[key + '_ci95']:.4f}" if key + "_ci95" in metrics else ""
                parts.append(f"{key.split('/')[-1]} {metrics[key]:.4f}{half}")
        self.world.say(" | ".join(parts))
        for warning in self.health.after_evaluation(step, metrics):
            self.world.say(warning)
        self._start = time.perf_counter()

    def samples(self, step, prompts, answers):
        """Append the answers after `step` optimizer steps to samples.jsonl.

        Their time is not the next step's.
        """
        if self.world.main:
            with (self.folder / "samples.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "prompts": prompts, "answers": answers}) + "\n")
        watchdog.beat()
        self._start = time.perf_counter()

    def progress(self, label, items):
        """Iterate over a list with a bar that shows rate and ETA on rank 0."""
        for item in progress_bar(items, desc=label, disable=not self.world.main, unit="batch"):
            yield item
            watchdog.beat()

    def write(self, metrics):
        """Append one line to metrics.jsonl and flush it; with `tensorboard` also one scalar per metric."""
        if self.world.main:
            with named(self._metrics.name):
                self._metrics.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
                self._metrics.flush()
        if self._events:
            for name in metrics.keys() - {"step"}:
                self._events.add_scalar(name, metrics[name], metrics["step"])
            self._events.flush()


# ---------------------------------------------------------------- files of a run


def _clock(seconds):
    """`1:16:24`, or `3:51` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _processes(folder):
    """The processes that have trained the run in `folder`, of its manifest; none without one."""
    path = folder / "manifest.json"
    return read_json(path).get("processes", []) if path.exists() else []


def _forget_after(step, path, say):
    """Drop the lines of a .jsonl file that will be written again.

    Those after `step`, an evaluation or a sample at it. Lines that are torn are named and dropped, too.
    Returns what the others hold.
    """
    if step == 0 or not path.exists():
        path.unlink(missing_ok=True)
        return []
    kept = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        entry = _parse(line)
        if entry is None:
            say(f"{path}: line {number} is torn, and is left out from now on: {line[:60]!r}")
        elif entry["step"] < step or (entry["step"] == step and "loss" in entry):
            kept.append(entry)
    # By a rename: a kill here must not cost the steps that are not trained again.
    temporary = path.with_suffix(".tmp")
    with named(path), temporary.open("w") as file:
        for entry in kept:
            file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return kept


def _parse(line):
    """The entry of a line of metrics.jsonl or samples.jsonl; None for a torn one."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


# ---------------------------------------------------------------- the machine and the checkout


def peak_memory_gib(device):
    """The most memory in use so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def measured_matmul_peak(device):
    """FLOP/s of a bf16 8192^3 product of random numbers on this GPU, which mfu is a share of. None on a CPU:
    no mfu is reported.
    """
    if device.type != "cuda":
        return None
    size, repeats = 8192, 10
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        a @ b
    end.record()
    end.synchronize()
    return 2 * size**3 * repeats / (start.elapsed_time(end) / 1000)


def _versions():
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        for package in importlib.metadata.distributions(name=name):
            versions[name] = package.version
    return versions


def commit():
    """The commit of this checkout, with "+changes" when tracked files differ from it.

    "unknown: .." where git knows none.
    """
    if shutil.which("git") is None:
        return "unknown: git is not installed"
    head = _git("rev-parse", "HEAD")
    if head.returncode:
        return f"unknown: {head.stderr.strip()}"
    return head.stdout.strip() + ("+changes" if changed_files() else "")


def changed_files():
    """The diff of this checkout's tracked files from its commit, as text.

    Empty without changes, or without git.
    """
    if shutil.which("git") is None:
        return ""
    return _git("diff", "HEAD").stdout


def _git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, errors="replace")
