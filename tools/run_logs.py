"""What an open-instruct run printed, beside the metrics.jsonl of a run of ours: steps, rates, losses."""

import json
import math
import re
from pathlib import Path

import numpy as np

from optim import learning_rate
from plumbing.files import UserError, read_jsonl
from tools.agreement import DIFFERS, EQUAL, NotCompared, Row, items, numbers

NUMBER = r"([-+]?(?:[\d.]+(?:e[-+]?\d+)?|nan|inf))"
STEP_LINE = re.compile(rf"Step: (\d+), LR: {NUMBER}, Loss: {NUMBER}")
SETTINGS = ("Total train batch size", "Instantaneous batch size per device", "Gradient Accumulation steps")
STANDARD_ERRORS = 4


def read_theirs(path):
    """([(step, rate, loss)], processes or None) of a printed log. ValueError when it has no step lines."""
    text = Path(path).read_text(errors="replace")
    lines = {}  # by step: many ranks may print one
    for step, rate, loss in STEP_LINE.findall(text):
        lines[int(step)] = int(step), float(rate), float(loss)
    if not lines:
        raise UserError(
            f"--their-log {path}: no line like 'Step: 1, LR: 1e-05, Loss: 0.69'; expected what an "
            "open-instruct run printed"
        )
    settings = []
    for name in SETTINGS:
        if match := re.search(rf"{name}[^=\n]*= (\d+)", text):
            settings.append(int(match[1]))
    processes = None
    if len(settings) == len(SETTINGS):
        total, per_device, accumulation = settings
        processes = total // (per_device * accumulation)
    return sorted(lines.values()), processes


def read_ours(folder):
    """({step: its metrics}, config, manifest) of a run folder. ValueError when it has no metrics."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"--our-run {folder}: no metrics.jsonl in it; expected the out_dir of a run")
    lines = read_jsonl(folder / "metrics.jsonl")
    config = json.loads((folder / "config.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    return {line["step"]: line for line in lines if "loss" in line}, config, manifest


def rows(their_log, our_run):
    """Rows for the last step, the rates, the first DPO loss, and the losses on average.

    On average, because their order of the rows is another one.
    """
    theirs, processes = read_theirs(their_log)
    ours, config, manifest = read_ours(our_run)
    last = (max(ours), theirs[-1][0])
    why = f"ours {last[0]}, theirs {last[1]}: another batch, or a run that was cut short"
    yield items("last step", "run", [last[0]], [last[1]], lambda _: why)
    yield from _rates(theirs, ours, config, manifest, processes)
    if (
        manifest["stage"] == "dpo"
        and config["loss"] in ("dpo", "dpo_norm")
        and theirs[0][0] == 1
        and not config["sft_weight"]
    ):
        # before the first update policy and reference are one model; 1e-2: theirs keeps bf16 log-probs
        yield numbers("first loss: ln 2", "run of theirs", [math.log(2)], [theirs[0][2]], 1e-2)
    yield from _losses(theirs, ours, config)


def _rates(theirs, ours, config, manifest, processes):
    """What theirs prints after step n is the rate of step n + 1."""
    steps, our_rates, their_rates = [], [], []
    for step, rate, _ in theirs:
        if step + 1 in ours:
            steps.append(step)
            our_rates.append(ours[step + 1]["lr"])
            their_rates.append(rate)
    if not steps:
        raise NotCompared("learning rates: no step is in both logs")
    total, intended = theirs[-1][0], None
    if processes and config["warmup_steps"] is None:
        warmup = int(config["warmup_ratio"] * total * processes) / processes
        known = [learning_rate(step, total, config["lr"], config["lr_schedule"], warmup) for step in steps]
        why = f"their schedule counts {processes} processes: a warm-up of {warmup:g} steps"
        intended = known, f"{why}, ours {manifest['warmup_steps']}"
    yield numbers("learning rate", "step", our_rates, their_rates, 1e-5, intended)


def _losses(theirs, ours, config):
    """Losses averaged over the same steps: theirs is a mean over those since the last line.

    They are of other rows, so only the mean difference can be judged, by its standard error over windows.
    """
    previous, windows = 0, []
    for step, _, loss in theirs:
        window = range(previous + 1, step + 1)
        if ours.keys() >= set(window):
            windows.append((step, np.mean([ours[inner]["loss"] for inner in window]), loss))
        previous = step
    if len(windows) < 10:
        raise NotCompared(f"losses: {len(windows)} windows of steps are in both logs; expected at least 10")
    gaps = np.array([mean - loss for _, mean, loss in windows])
    error = gaps.std(ddof=1) / math.sqrt(len(gaps))
    fits = abs(gaps.mean()) <= STANDARD_ERRORS * error
    step, mean, loss = windows[int(np.abs(gaps).argmax())]
    note = f"mean difference {gaps.mean():+.4g}, standard error {error:.2g}; "
    note += f"largest at step {step}: ours {mean:.5g}, theirs {loss:.5g}"
    if config["loss"] in ("token_mean", "tulu3_release"):
        unit = "tokens" if config["loss"] == "token_mean" else "sequences"
        note += f". loss={config['loss']!r} divides by {unit}: is theirs the same?"
    yield Row(
        "losses on average",
        f"{len(windows):,} windows",
        f"{gaps.mean():+.2g}",
        EQUAL if fits else DIFFERS,
        "" if fits else note,
    )
