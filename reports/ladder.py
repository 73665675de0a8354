"""The ladder as a table, `python -m reports.ladder [runs/index.json]`: what was trained, what steering did to it, the published curves.

Every finished run and every pair that `steer.py validate` has measured is in the index (reports/registry.py); they are joined by the hash
of their weights. A model that was trained again after its validation is a line of its own, not validated.
"""

import argparse
import runpy
import sys
from pathlib import Path

from plumbing import parallel
from plumbing.files import UserError
from reports import registry

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
# AQI at LAMBDAS as published: every lambda on its own scale (per_run), where 55.00 is saturation, so no curve says how much changed.
PUBLISHED = {
    "Llama31_Tulu": (58.01, 68.04, 71.51, 72.09, 79.84),
    "Llama31_PKU_Custom": (68.12, 55.00, 55.00, 58.61, 65.14),
    "Zephyr_7B": (65.86, 55.00, 59.89, 55.00, 67.78),
    "Mistral_7B": (69.30, 77.31, 62.97, 57.02, 57.94),
    "Falcon_7B": (29.50, 13.87, 16.47, 17.81, 15.29),
    "10 % of Tulu": (31.21, 55.00, 55.00, 55.00, 55.00),
}
HEAD = ("pair", "SFT loss", "DPO accuracy", "DPO margin", *(f"{x:g}" for x in LAMBDAS), "change, 95 % interval", "verdict")


def rows(entries, pairs):
    """A line per validated pair, per trained run that none of them is of, and per rung of `pairs` that was not run. entries: the index."""
    runs, lines, seen = {"sft": {}, "dpo": {}}, [], set()
    for name, entry in entries.items():
        if entry["stage"] in runs:
            runs[entry["stage"]][entry["weights"]] = name, entry
    for entry in [entry for entry in entries.values() if entry["stage"] == "validate"]:
        (sft_name, sft), (dpo_name, dpo) = (runs[stage].get(entry[stage], (None, None)) for stage in ("sft", "dpo"))
        seen |= {sft_name, dpo_name}
        lines.append([f"{entry['pair']} ({entry['inject']})", *_training(sft, dpo), *_steering(entry)])
    for name, dpo in [found for found in runs["dpo"].values() if found[0] not in seen]:
        sft_name, sft = runs["sft"].get(dpo["start"], (None, None))
        seen |= {sft_name, name}
        lines.append([name, *_training(sft, dpo), *[""] * 6, "not validated"])
    lines += [[name, *_training(sft, None), *[""] * 6, "no DPO yet"] for name, sft in runs["sft"].values() if name not in seen]
    own = {name: Path(pair["dpo"]).parent for name, pair in pairs.items() if pair.get("dpo", "").startswith("runs/")}
    return lines + [[name, *[""] * 9, "not run"] for name, run in own.items() if str(run.relative_to("runs")) not in entries]


def _training(sft, dpo):
    """Last SFT loss, DPO accuracy and margin: held out where the run held any out, else of the last step, marked."""
    return [_last(sft, "eval/loss", "loss"), *(_last(dpo, f"eval/{name}", name) for name in ("rewards/accuracies", "rewards/margins"))]


def _last(entry, held_out, training):
    if entry is None:
        return "-"
    name = held_out if held_out in entry["metrics"] else training
    if name not in entry["metrics"]:
        return "-"
    found = entry["metrics"][name]
    if found["last"] is None:  # the index has no NaN
        return "not finite"
    half = f" ± {found['ci95']:.3f}" if "ci95" in found else ""
    return f"{found['last']:.3f}{half}{'' if name == held_out else ' (train)'}"


def _steering(entry):
    found = entry["metrics"]
    curve = dict(zip(found["lambdas"], found["estimate"]))
    low, high = found["change_interval"]
    values = [f"{curve[x]:.2f}" if x in curve else "-" for x in LAMBDAS]
    return [*values, f"{found['change']:+.2f} [{low:+.2f}, {high:+.2f}]", entry["verdict"]]


def table(lines):
    """The rows in columns, text to the left and numbers to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = (0, len(widths) - 1)

    def padded(line):
        return [value.ljust(width) if i in text else value.rjust(width) for i, (width, value) in enumerate(zip(widths, line))]

    return "\n".join("  ".join(padded(line)).rstrip() for line in lines)


def main(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m reports.ladder", description=__doc__, formatter_class=form)
    parser.add_argument("index", nargs="?", type=Path, help="default: runs/index.json, if it is there")
    given = parser.parse_args(argv).index
    if given and not given.is_file():
        raise UserError(f"{given}: no such index; a run or a validation that ends writes it")
    path = given or Path("runs/index.json")
    pairs = runpy.run_path(str(Path(__file__).parent.parent / "configs/pairs.py"))["PAIRS"]
    entries = registry.read_index(path)
    published = [[name, "", "", "", *(f"{x:.2f}" for x in curve), "", "published, per_run"] for name, curve in PUBLISHED.items()]
    print(f"{path}: {len(entries)} entries. Columns 0 to 1: separation at that lambda; in published lines AQI")
    print(table([list(HEAD), *rows(entries, pairs), *published]))
    print("per_run: every lambda on its own scale, 55.00 is saturation; compare verdicts, not values, with the lines above.")
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
