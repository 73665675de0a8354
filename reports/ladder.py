"""The ladder as a table: `python -m reports.ladder [RUNS]`.

What was trained, what steering did to it, the published curves.

Read from the folders below RUNS (default: runs/): finished training runs, and sweeps beside the vector that
they steered along. They are joined by the hash of their weights, not by name. A model that was trained again
after its sweep is a line of its own, not validated.
"""

import argparse
import math
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from plumbing.files import UserError, read_json, table
from reports.folders import has_nulls, read, read_sweeps
from reports.summary import two_digits

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
# AQI at LAMBDAS as published: every lambda on its own scale (per_run), where 55.00 is
# saturation, so no curve says how much changed.
PUBLISHED = {
    "Llama31_Tulu": (58.01, 68.04, 71.51, 72.09, 79.84),
    "Llama31_PKU_Custom": (68.12, 55.00, 55.00, 58.61, 65.14),
    "Zephyr_7B": (65.86, 55.00, 59.89, 55.00, 67.78),
    "Mistral_7B": (69.30, 77.31, 62.97, 57.02, 57.94),
    "Falcon_7B": (29.50, 13.87, 16.47, 17.81, 15.29),
    "10 % of Tulu": (31.21, 55.00, 55.00, 55.00, 55.00),
}
STRENGTHS = [f"{x:g}" for x in LAMBDAS]
HEAD = [
    "pair",
    "SFT loss",
    "DPO accuracy",
    "DPO margin",
    *STRENGTHS,
    "change, 95 % interval",
    "in sd of nulls",
    "p",
]
HEAD += ["verdict", "decision"]
UNSTEERED = [""] * (len(LAMBDAS) + 3)  # the columns of a curve, its change, size and p


@dataclass(frozen=True)
class Sweep:
    """What one aqi.json holds, and the weights (hashes) of the two models that its vector lies between."""

    name: str
    sft: str
    dpo: str
    report: dict


def find(root):
    """(runs, sweeps, names of sweeps that are left out, folders that cannot be read) below `root`.

    {stage: {name: Run}}, [Sweep], [name], {name: why}. Names are folders relative to `root`. A run without an
    export, still training or stopped, is none. A sweep is left out when its vector was made anew since, a
    model of its pair is deleted, or an older version measured it.
    """
    runs, sweeps, outdated, unread = {"sft": {}, "dpo": {}}, [], [], {}
    for path in sorted(root.rglob("manifest.json")):
        folder = path.parent
        name = str(folder.relative_to(root))
        try:
            manifest = read_json(path)
            if "exported" in manifest:
                runs[manifest["stage"]][name] = read(folder)
            if (folder / "vector.safetensors").is_file():
                found, left_out = _sweeps(folder, name, manifest["inputs"])
                sweeps += found
                outdated += left_out
        except (UserError, OSError) as error:  # one torn file must not hide all other runs
            unread[name] = error
    return runs, sweeps, outdated, unread


def _sweeps(folder, name, inputs):
    """([Sweep], names of those that are left out) of a steering folder, whose vector is of `inputs`."""
    sweeps, outdated = [], []
    has_models = not any(is_deleted(inputs[key]) for key in ("sft_path", "dpo_path"))
    for _, report, is_current in read_sweeps(folder):
        named = f"{name} ({report['inputs']['inject']})"
        if has_nulls(report) and has_models and is_current:
            sweeps.append(Sweep(named, inputs["sft"], inputs["dpo"], report))
        else:
            outdated.append(named)
    return sweeps, outdated


def is_deleted(path):
    """Whether a model's path is neither a folder nor org/name of the hub."""
    return not Path(path).is_dir() and (Path(path).is_absolute() or path.count("/") != 1)


def exporter(runs, weights):
    """The Run of {name: Run} that exported these weights, of copies the first; None without any."""
    for run in runs.values():
        if run.manifest["exported"] == weights:
            return run
    return None


def rows(runs, sweeps, pairs, unread=()):
    """A line per sweep, per trained run that none of them is of, and per rung of `pairs` that was not run.

    runs, sweeps, unread: of `find`. A pair that says how it was made is a published one or a control, no
    rung.
    """
    lines, seen = [], set()
    for sweep in sweeps:
        sft, dpo = exporter(runs["sft"], sweep.sft), exporter(runs["dpo"], sweep.dpo)
        seen |= {sweep.sft, sweep.dpo}
        lines.append([sweep.name, *_training(sft, dpo), *_steering(sweep.report)])
    for name, dpo in runs["dpo"].items():
        if dpo.manifest["exported"] not in seen:
            start = dpo.manifest["weights"]
            seen.add(start)
            training = _training(exporter(runs["sft"], start), dpo)
            lines.append([name, *training, *UNSTEERED, "not validated", ""])
    for name, sft in runs["sft"].items():
        if sft.manifest["exported"] not in seen:
            lines.append([name, *_training(sft, None), *UNSTEERED, "no DPO yet", ""])
    for name, pair in pairs.items():
        folder = Path(pair.get("dpo", "")).parent  # runs/tulu10/dpo/final -> runs/tulu10/dpo
        if folder.parts[:1] != ("runs",) or "made" in pair:
            continue
        run = str(folder.relative_to("runs"))
        if run not in runs["dpo"]:
            lines.append([name, "", "", "", *UNSTEERED, "not readable" if run in unread else "not run", ""])
    return lines


def _training(sft, dpo):
    """Last SFT loss, DPO accuracy and margin.

    Held out where the run held any out, else of the last step, marked; so is the step of an earlier value.
    """
    return [_last(sft, "loss"), _last(dpo, "rewards/accuracies"), _last(dpo, "rewards/margins")]


def _last(run, metric):
    if run is None:
        return "-"
    held_out = run.last(f"eval/{metric}") is not None
    name = f"eval/{metric}" if held_out else metric
    value, half = run.last(name), run.last(f"{name}_ci95")
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    interval = "" if half is None else f" ± {half:.3f}"
    return f"{value:.3f}{interval}{run.earlier(name) if held_out else ' (train)'}"


def _steering(report):
    overall = report["verdicts"][0]  # of all axioms
    curve = dict(zip(report["inputs"]["lambdas"], overall["estimate"]))
    values = [f"{curve[x]:.2f}" if x in curve else "-" for x in LAMBDAS]
    low, high = overall["change_interval"]
    ranks = overall["nulls"]
    change = f"{overall['change']:+.2f} [{low:+.2f}, {high:+.2f}]"
    null = [two_digits(ranks["size_sd"]), f"{ranks['p_change']:.2f}"]
    return [*values, change, *null, overall["verdict"], overall["decision"]]


def main(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m reports.ladder", description=__doc__, formatter_class=form
    )
    parser.add_argument("runs", nargs="?", type=Path, help="folder; default: runs, if it is there")
    given = parser.parse_args(argv).runs
    if given and not given.is_dir():
        raise UserError(f"{given}: no such folder; expected one that holds run folders")
    root = given or Path("runs")
    pairs = runpy.run_path(str(Path(__file__).parent.parent / "configs/pairs.py"))["PAIRS"]
    runs, sweeps, outdated, unread = find(root)
    published = []
    for name, curve in PUBLISHED.items():
        published.append(
            [name, "", "", "", *(f"{x:.2f}" for x in curve), "", "", "", "published, per_run", ""]
        )
    count = len(runs["sft"]) + len(runs["dpo"])
    counts = f"finished runs {count}, sweeps {len(sweeps)}"
    if unread:
        counts += f", folders that cannot be read {len(unread)}"
    print(f"{root}/: {counts}. Columns 0 to 1: separation at that lambda; in published lines AQI")
    print(table(HEAD, [*rows(runs, sweeps, pairs, unread), *published], left=(0, -2, -1)))
    for name, error in unread.items():
        print(f"cannot be read, {name}: {error}")
    if outdated:
        why = "of a vector or a model that is there no more, or of an older version"
        print(f"left out, {why}: {', '.join(outdated)}")
    print(
        "per_run: every lambda on its own scale, 55.00 is saturation; compare verdicts, not values, with "
        "the lines above."
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:  # not parallel.run: a laptop without torch can show the ladder
        sys.exit(f"error: {error}")
