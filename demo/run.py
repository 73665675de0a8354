"""`make demo`: a tiny Llama from nothing to DPO, on two CPU cores, and what to expect beside what came out.

A small world of seven axioms is generated, a tokenizer and a base model are trained on it, and then the two
scripts run as anyone would run them. Exit status 1 when a number leaves its expected range.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from demo import axioms, common, tiny
from plumbing.config import load
from plumbing.files import read_jsonl, table
from plumbing.weights import save_pretrained

CONFIG = "configs/tiny.py"
ROOT = Path("runs/tiny")
# (low, high): the extremes over eight seeds (--seed=0 to 7), widened by half their distance on either side.
EXPECTED = {
    "pretraining loss, nats/token": (0.31, 0.36),
    "SFT held-out loss before, nats/token": (1.08, 2.18),
    "SFT held-out loss after, nats/token": (0.24, 0.33),
    "DPO loss at step 1 (ln 2)": (0.69314, 0.69316),
    "DPO loss at the last step": (0.27, 0.55),
    "likelier answer is the chosen one, before": (0.46, 0.57),
    "likelier answer is the chosen one, after": (0.76, 0.84),
    "reward accuracy, after (chance: 0.5)": (0.92, 1.0),
    "reward margin, after (before: 0)": (0.64, 1.17),
    "safe greedy answers, before": (0.20, 0.56),
    "safe greedy answers, after": (0.67, 1.0),
    # 1 on the vector's texts by construction; on others 0.78 to 0.98 over the same seeds, two more machines
    # and a GPU
    "steering: achieved shift at lambda 1": (0.67, 1.09),
    "steering: error on the vector's own texts": (
        0.0,
        2e-2 if torch.cuda.is_available() else 1e-3,
    ),  # on a GPU models are read in bf16
}


def build(seed):
    """Write the small world and the pretrained base model under ROOT, which is emptied first.

    Returns the last 50 steps' mean loss.
    """
    print(f"Starting over in {ROOT}/. The small world of seven axioms:")
    shutil.rmtree(ROOT, ignore_errors=True)
    for stem, count in axioms.write(ROOT / "data").items():
        print(f"  {ROOT}/data/{stem:<18}{count:>6} rows")
    texts = (ROOT / "data/pretrain.txt").read_text().splitlines()
    tokenizer = tiny.train_tokenizer(texts)
    model, losses = tiny.pretrain(texts, tokenizer, seed=seed)
    save_pretrained(model, tokenizer, ROOT / "base")
    return sum(losses[-50:]) / 50


def greedy(run, when, template):
    """Print three greedy answers to held-out prompts.

    Returns the share of all of them that are safe, and its interval.
    """
    rows = read_jsonl(ROOT / "data/preferences_eval.jsonl")
    prompts = [row["prompt"] for row in rows]
    answers = common.greedy_answers(ROOT / run / "final", prompts, template, max_new_tokens=48)
    kinds = [axioms.kind_of(answer, row["axiom"]) for answer, row in zip(answers, rows, strict=True)]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("safe", "unsafe", "neither"))
    print(f"\nGreedy answers to {len(rows)} held-out prompts {when} DPO: {counts}. For example:")
    for i in (0, len(rows) // 3, 2 * len(rows) // 3):
        print(f"  > {rows[i]['prompt']}\n    {answers[i]}")
    return common.interval([kind == "safe" for kind in kinds])


def steer():
    """Steer the SFT model toward the DPO model.

    Prints the AQI curve and its verdict, returns the two numbers that must come out. The additions are
    matched to the DPO mean state on the vector's texts: there the error is rounding. The shift along the
    vector is measured on other texts, so it is near 1 only. The verdict has no right answer here: it says
    what these two models show.
    """
    common.run_script("steer.py", "validate", CONFIG)
    found = json.loads((ROOT / "steer_sanity/sweep_matched/aqi.json").read_text())
    return found["shifts"][-1]["achieved"], found["errors"]["matched"]["calibration"]


def results(pretrain_loss):
    """{name: (value, low, high)} of every quantity in EXPECTED.

    low and high bound its 95 % interval, or are None.
    """
    config = load("dpo", [CONFIG])
    sft, dpo = common.read_metrics(ROOT / "sft"), common.read_metrics(ROOT / "dpo")
    evaluations, steps = common.values_of(sft, "eval/loss"), common.values_of(dpo, "loss")
    single = {
        "pretraining loss, nats/token": pretrain_loss,
        "SFT held-out loss before, nats/token": evaluations[0],
        "SFT held-out loss after, nats/token": evaluations[-1],
        "DPO loss at step 1 (ln 2)": steps[0],
        "DPO loss at the last step": steps[-1],
    }
    before = common.held_out_logps(ROOT / "sft/final", config)
    after = common.held_out_logps(ROOT / "dpo/final", config)
    out = common.preference_table(before, after, config.beta)
    for when, run in (("before", "sft"), ("after", "dpo")):
        out[f"safe greedy answers, {when}"] = greedy(run, when, config.template)
    shift, error = steer()
    single["steering: achieved shift at lambda 1"] = shift
    single["steering: error on the vector's own texts"] = error
    for name, value in single.items():
        out[name] = value, None, None
    return out


def report(measured):
    """Print what to expect beside what came out; returns the names of what is out of range."""
    rows, outside = [], []
    for name, (low, high) in EXPECTED.items():
        value, lower, upper = measured[name]
        between = "" if lower is None else f"[{lower:.3f}, {upper:.3f}]"
        mark = "ok"
        if not low <= value <= high:
            mark = "OUT OF RANGE"
            outside.append(name)
        rows.append([name, f"{low:.5g} to {high:.5g}", f"{value:.4f}", between, mark])
    print("\n" + table(["", "expected", "came out", "95 % interval", ""], rows, left=(0, -2, -1)))
    return outside


def show():
    """Write the report page of the runs and the sweep.

    Prints where it and the pictures are, and the verdict in plain words.
    """
    steered = ROOT / "steer_sanity"
    folders = f"{steered}", f"{ROOT}/dpo", f"{ROOT}/sft"
    common.run_script("-m", "reports.page", *folders, f"--out={ROOT}/report.html")
    for picture in sorted((steered / "sweep_matched").glob("*.png")):
        print(f"      {picture}")
    overall, *_ = json.loads((steered / "sweep_matched/aqi.json").read_text())["verdicts"]
    first, last = overall["estimate"][0], overall["estimate"][-1]
    low, high = overall["change_interval"]
    because = f" ({'; '.join(overall['because'])})" if overall["because"] else ""
    print(
        f"\nVerdict: {overall['verdict']}{because}. Steering moved the separation of safe from unsafe texts"
    )
    print(
        f"from {first:.2f} to {last:.2f} of 100, by {overall['change']:+.2f} "
        f"with a 95 % interval of {low:+.2f} to {high:+.2f}."
    )
    if overall["verdict"] == "flat":
        print(
            "Flat is no surprise: one vector is added to safe and unsafe texts alike, "
            "and moves both groups together."
        )


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the base model's weights and of the order of all data"
    )
    seed = parser.parse_args(argv).seed
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # for the scripts: matrices this small lose more to a second thread than they gain
    )
    torch.set_num_threads(1)
    pretrain_loss = build(seed)
    for script in ("train_sft.py", "train_dpo.py"):
        common.run_script(script, CONFIG, f"--seed={seed}")
    outside = report(results(pretrain_loss))
    show()
    print(f"\nwall time {time.perf_counter() - start:.0f} s; about 90 s on two cores, more on busy ones")
    if outside:
        print(
            f"\nOut of range: {', '.join(outside)}. Something is wrong: "
            "the ranges hold for every seed that was tried."
        )
        return 1
    print(
        f"\nAll as expected. The models are in {ROOT}/{{base,sft/final,dpo/final}}; "
        "transformers loads each of them."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
