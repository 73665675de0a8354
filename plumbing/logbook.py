"""The run folder and what a run says of itself: config.json, manifest.json, metrics.jsonl, samples.jsonl and the step line."""

import importlib.metadata
import json
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from plumbing import hub
from plumbing.config import config_dict
from plumbing.files import finite, progress_bar, read_json, write_json

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
        """implicit: the values that no key states (reduction, eps, data fingerprints, ...); they go into the manifest."""
        self.world, self.total_steps, self.log_every = world, total_steps, config.log_every
        self.folder, self.fresh = Path(config.out_dir), config.fresh
        self.peak = measured_matmul_peak(world.device)
        self.tensorboard = config.tensorboard
        self._metrics = self._events = None
        if world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", config_dict(config))
            gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
            about = {"command": shlex.join(sys.argv), "commit": commit(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            machine = {"hardware": gpu or platform.machine(), "world_size": world.size, "matmul_peak_flops": self.peak}
            self._manifest = about | machine | {"versions": _versions(), "hub": hub.COMMITS, **implicit}
            self._manifest["processes"] = [] if self.fresh else _processes(self.folder)
            write_json(self.folder / "manifest.json", self._manifest)
        self._start = time.perf_counter()

    def resume_at(self, step, checkpoint=None):
        """Say what is left after `step`, which `checkpoint` (None: the start) holds; forget the metrics of the steps that are about to be
        trained again, and open the file for more. The manifest's `processes` say who trained which steps: an entry those after its step."""
        left, final = self.total_steps - step, self.folder / "final"
        if checkpoint:
            self.world.say(f"{checkpoint}: goes on after step {step} of {self.total_steps}{'' if left else '; nothing is left to train'}")
        if left and final.is_dir() and not self.fresh:
            self.world.say(f"{final}: of a finished run whose last step is in no checkpoint (save_every): {left} steps are trained again, "
                           "then it is replaced")  # fmt: skip
        if self.world.main:
            if left:  # those whose steps are trained again are forgotten
                earlier = [process for process in self._manifest["processes"] if process["after_step"] < step]
                this = {key: self._manifest[key] for key in ("started", "commit", "hardware", "world_size")}
                self._manifest["processes"] = [*earlier, {"after_step": step, **this}]
                write_json(self.folder / "manifest.json", self._manifest)
            path = self.folder / "metrics.jsonl"
            if missing := step - sum("loss" in entry for entry in _forget_after(step, path)):  # of a power cut, or of someone's editor
                self.world.say(f"{path}: {missing} of the {step} steps before are not in it, nor will they be in the card")
            _forget_after(step, self.folder / "samples.jsonl")
            self._metrics = path.open("a")
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

                # TensorBoard forgets what an earlier process wrote of the steps that are trained again
                self._events = SummaryWriter(self.folder / "tensorboard", purge_step=step and step + 1)
        self._start = time.perf_counter()

    def step(self, step, metrics, tokens, flops):
        """Record finished optimizer step number `step` (1-based). tokens, flops: of all ranks; the time runs from the previous call."""
        elapsed = time.perf_counter() - self._start
        metrics = {"step": step, **metrics, "step_s": elapsed, "tokens_per_s": tokens / elapsed}
        metrics["peak_mem_gib"] = peak_memory_gib(self.world.device)
        if self.peak:
            metrics["mfu"] = flops / elapsed / (self.peak * self.world.size)
        self.write(metrics)
        if step % self.log_every == 0 or step in (1, self.total_steps):
            parts = [f"{label} {form.format(metrics[key])}".strip() for key, label, form in _STEP_LINE if key in metrics]
            self.world.say(" | ".join([f"step {step:05d}/{self.total_steps:05d}", *parts]))
        self._start = time.perf_counter()

    def evaluation(self, step, metrics):
        """Record held-out metrics after `step` optimizer steps; their time is not the next step's."""
        self.write({"step": step, **metrics})
        shown = [key for key in ("eval/loss", "eval/perplexity", "eval/rewards/margins", "eval/rewards/accuracies") if key in metrics]
        spread = {key: f" +- {metrics[key + '_ci95']:.4f}" for key in shown if key + "_ci95" in metrics}
        parts = [f"{key.split('/')[-1]} {metrics[key]:.4f}{spread.get(key, '')}" for key in shown]
        self.world.say(" | ".join([f"eval {step:05d}/{self.total_steps:05d}", *parts]))
        self._start = time.perf_counter()

    def samples(self, step, prompts, answers):
        """Append the answers after `step` optimizer steps to samples.jsonl; their time is not the next step's."""
        if self.world.main:
            with (self.folder / "samples.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "prompts": prompts, "answers": answers}) + "\n")
        self._start = time.perf_counter()

    def progress(self, label, items):
        """Iterate over a list with a bar that shows rate and ETA on rank 0."""
        return progress_bar(items, desc=label, disable=not self.world.main, unit="batch")

    def write(self, metrics):
        """Append one line to metrics.jsonl and flush it; with `tensorboard` also one scalar per metric."""
        if self.world.main:
            self._metrics.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
            self._metrics.flush()
        if self._events:
            for name in [name for name in metrics if name != "step"]:
                self._events.add_scalar(name, metrics[name], metrics["step"])
            self._events.flush()


def _processes(folder):
    """The processes that have trained the run in `folder`, of its manifest; none without one."""
    path = folder / "manifest.json"
    return read_json(path).get("processes", []) if path.exists() else []


def _forget_after(step, path):
    """Drop the lines of a .jsonl file that will be written again: those after `step`, an evaluation or a sample at it, a torn last one.

    Returns what the others hold."""
    *lines, _torn = path.read_text().split("\n") if step and path.exists() else [""]
    entries = [(line, json.loads(line)) for line in lines]
    kept = [(line, entry) for line, entry in entries if entry["step"] < step or (entry["step"] == step and "loss" in entry)]
    if kept:  # by a rename: a kill here must not cost the steps that are not trained again
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line, _ in kept))
        temporary.rename(path)
    else:
        path.unlink(missing_ok=True)
    return [entry for _, entry in kept]


def peak_memory_gib(device):
    """The most memory in use so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def measured_matmul_peak(device):
    """FLOP/s of a bf16 8192^3 product of random numbers on this GPU, what mfu is a share of; None on a CPU, where mfu is not reported."""
    if device.type != "cuda":
        return None
    size, repeats = 8192, 10
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        a @ b
    end.record()
    end.synchronize()
    return 2 * size**3 * repeats / (start.elapsed_time(end) / 1000)


def _versions():
    installed = {name: dist.version for name in _PACKAGES for dist in importlib.metadata.distributions(name=name)}
    return {"python": platform.python_version()} | installed


def commit():
    """The commit of this checkout, with "+changes" when files differ from it; "unknown: .." and why where git knows none."""
    root = Path(__file__).parent.parent
    if shutil.which("git") is None:
        return "unknown: git is not installed"
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain"])
    head, status = (subprocess.run(command, cwd=root, capture_output=True, text=True) for command in commands)
    if head.returncode or status.returncode:
        return f"unknown: {(head.stderr or status.stderr).strip()}"
    return head.stdout.strip() + ("+changes" if status.stdout else "")
