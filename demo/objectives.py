"""One SFT model, several preference objectives: what each does to held-out pairs and to the separation.

    python -m demo.objectives [--small] [--prompts=FILE]

After `make smol`. Every variant starts from runs/smol/sft/final and takes the steps of configs/smol.py on the
same pairs in the same order, at the same learning rate: only its row of VARIANTS differs. Three rows are
controls, exchanged answers and other seeds of DPO and of SFT; the model with itself is two lines below them.
On a GPU the runs share it, 8 GiB each; on a CPU they come one after another.
--prompts: labelled texts of the sweeps; default XSTest's, of make smol's --xstest. --small: as in make smol.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import steer
from demo import common, smol
from plumbing import parallel
from plumbing.config import load, load_sections
from plumbing.device import pick_device
from plumbing.files import UserError, read_json, read_jsonl, read_verified_json, table, write_json
from reports.summary import OVERALL, two_digits
from tools import compare

ROOT = smol.ROOT / "objectives"
SFT = smol.ROOT / "sft/final"
RUN_BYTES = 8 * 2**30  # of a GPU's memory: weights, AdamW and activations in float32 are some 4 GiB
RECIPE = "dpo_norm"
# {variant: what it changes in configs/smol.py}; configs/pairs.py knows each as smol_VARIANT
VARIANTS = {
    RECIPE: (),
    "dpo": ("--loss=dpo", "--beta=none"),
    "ipo": ("--loss=ipo", "--beta=none"),
    "simpo": ("--loss=simpo", "--beta=none", "--gamma_beta_ratio=0.5"),
    "smoothed": ("--label_smoothing=0.1",),
    "last_turn": ("--supervise=last",),
    "swapped": (),  # SWAPPED_CONFIG's data
    "dpo_seed": ("--seed=1",),
    "sft_seed": ("--seed=1",),  # no DPO: SFT once more
}
SWAPPED_CONFIG = """
import runpy

_smol = runpy.run_path("configs/smol.py")
common = _smol["common"]
dpo = _smol["dpo"] | dict(data={{"{rows}": 1.0}})
"""
HEAD = (
    "variant", "accuracy", "margin, nats a token", "chosen", "|log-ratio|", "KL", "cosine", "least", "change",
    "p", "DPO", "decision", "s",
)  # fmt: skip
LEGEND = """\
accuracy, margin: held-out pairs; (chosen - rejected) of log(model / SFT) a token, 95 % intervals over prompts
chosen, |log-ratio|, KL: of held-out chosen answers beside SFT, nats a token: mean, mean absolute, of 8 texts
cosine, least: of the steering vector with the recipe's, mean over layers and smallest
change, p: of the separation at lambda 1, 95 % interval, rank among random directions; DPO: the model's own"""


# ---------------------------------------------------------------- training


def write_swapped(root, source):
    """Write the rows of `source` with chosen and rejected exchanged, in its order, and the config of them.

    Returns the config's path.
    """
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in Path(source).read_text().splitlines():
        row = json.loads(line)
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        lines.append(json.dumps(row) + "\n")
    (root / "swapped.jsonl").write_text("".join(lines))
    config = root / "swapped.py"
    config.write_text(SWAPPED_CONFIG.format(rows=root / "swapped.jsonl"))
    return config


def has_several_answers(source):
    """Whether any conversation of these preference rows has more than one turn of the assistant."""
    for line in Path(source).read_text().splitlines():
        roles = [message["role"] for message in json.loads(line)["chosen"]]
        if roles.count("assistant") > 1:
            return True
    return False


def training_commands(names, swapped, changes):
    """{variant: the words after `python` that train it}.

    swapped: config of the exchanged pairs. changes {script: options}: of smol.SMALL, or empty.
    """
    commands = {}
    for name in names:
        script = "train_sft.py" if name == "sft_seed" else "train_dpo.py"
        config = str(swapped) if name == "swapped" else smol.CONFIG
        options = (f"--out_dir={ROOT}/{name}", *VARIANTS[name], *changes.get(script, ()))
        commands[name] = (script, config, *options)
    return commands


def run_all(commands, at_once):
    """Run {name: words after `python`}, `at_once` at a time; SystemExit when one fails.

    One at a time they print here. Several print to ROOT/logs/NAME.log, and share the CPU's cores.
    """
    if at_once == 1:
        for words in commands.values():
            common.run_script(*words)
        return
    logs = ROOT / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, os.cpu_count() // min(at_once, len(commands)))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def run(name):
        print(f"$ python {' '.join(commands[name])}", flush=True)
        with open(logs / f"{name}.log", "w") as log:
            words = [sys.executable, *commands[name]]
            return subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode

    with ThreadPoolExecutor(at_once) as pool:
        statuses = list(pool.map(run, commands))
    failed = [f"{logs}/{name}.log" for name, status in zip(commands, statuses, strict=True) if status]
    if failed:
        raise SystemExit(f"these did not end well: {', '.join(failed)}")


def runs_at_once(device):
    """How many runs share a GPU; on a CPU one has all cores."""
    if device.type == "cpu":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, free // RUN_BYTES)


def say_data(names):
    """Print which DPO runs read the same pairs, by the fingerprint of tokens and masks in their manifests."""
    readers = {}
    for name in names:
        manifest = read_json(ROOT / name / "manifest.json")
        if manifest["stage"] == "dpo":
            readers.setdefault(manifest["data"], []).append(name)
    for fingerprint, same in readers.items():
        print(f"pairs {fingerprint[:12]}: {', '.join(same)}")


# ---------------------------------------------------------------- held-out pairs


def held_out(after, before, prompts):
    """What a model does to the held-out pairs, beside the SFT model; one measure for every objective.

    after, before: (log-probs of each token, per text; logits) of tools.compare.measure: chosen texts, then
    rejected ones. prompts (n,): of the pairs. A dict: "accuracy" and "margin" (mean, low, high), of the
    difference of the two log-ratios per token; on chosen answers, in nats per token, "chosen", the mean
    log-ratio, "drift", its mean absolute, and "kl", KL(model || SFT).
    """
    n = len(prompts)
    means = []
    for logps, *_ in (before, after):
        means.append(np.array([[logps[i].mean(), logps[n + i].mean()] for i in range(n)]))
    *_, accuracy, margin = common.preference_table(*means, beta=1.0, groups=prompts).values()
    tokens = compare.compare_logps(after[0][:n], before[0][:n])
    return {
        "accuracy": accuracy,
        "margin": margin,
        "chosen": tokens["ours"] - tokens["published"],
        "drift": tokens["difference"],
        "kl": compare.mean_kl(after[1], before[1]),
    }


def measure_models(names):
    """{variant: held_out's dict}, one more for the SFT model with itself."""
    config = load("dpo", [smol.CONFIG])
    (source,) = config.data_eval
    prompts = [row["prompt"] for row in read_jsonl(source)]
    texts = (source, len(prompts), config.template, config.max_seq_len)
    before = compare.measure(SFT, *texts)
    found = {}
    for name in names:
        found[name] = held_out(compare.measure(ROOT / name / "final", *texts), before, prompts)
    return found | {"itself": held_out(before, before, prompts)}


# ---------------------------------------------------------------- steering


def validate(names, settings, options, at_once):
    """Every variant's pair to its verdict, and one page of all of them; settings: of section steer."""
    pairs = [f"smol_{name}" for name in names]
    if at_once > 1:
        # each pair in a process of its own; the command for all of them then finds them finished
        alone = {}
        for pair in pairs:
            folder = f"--out_dir={ROOT}/pairs/{pair}_{settings.mode}"
            alone[pair] = ("steer.py", "validate", pair, folder, *options)
        run_all(alone, at_once)
    common.run_script("steer.py", "validate", *pairs, f"--out_dir={ROOT}/pairs", *options)


def steering(folder, recipe, settings):
    """What the sweep in `folder` says, and how its vector lies beside the recipe's; a dict."""
    report = read_verified_json(folder / f"sweep_{settings.inject}/aqi.json")
    overall = report["verdicts"][0]
    cosines = []
    for cosine, _ in compare.vector_cosines(folder, recipe, settings.side, settings.pooling):
        cosines.append(cosine)
    return {
        "cosine": sum(cosines) / len(cosines),
        "least_cosine": min(cosines),
        "change": (overall["change"], *overall["change_interval"]),
        "p": overall["nulls"]["p_change"],
        "separation": report["dpo"]["separation"][OVERALL],
        "decision": overall["decision"],
    }


def refusal_of_itself(texts):
    """What extract says to a model and itself; SystemExit when it does not refuse them."""
    try:
        steer.main(["extract", str(SFT), str(SFT), f"--out_dir={ROOT}/itself", *texts])
    except UserError as error:
        return str(error)
    raise SystemExit("extract took a model and itself; expected it to refuse equal weights")


# ---------------------------------------------------------------- the table


def line(name, found):
    """A row of the table, as text: of the dicts of held_out and steering, and "seconds" of the steps."""
    measured = [with_interval(found["accuracy"], "{:.3f}"), with_interval(found["margin"], "{:+.4f}")]
    measured += [f"{found['chosen']:+.4f}", f"{found['drift']:.4f}", f"{found['kl']:.5f}"]
    cosines = [f"{found['cosine']:.3f}", f"{found['least_cosine']:.3f}"]
    value, low, high = map(two_digits, found["change"])
    swept = [f"{value} [{low}, {high}]", f"{found['p']:.2f}", f"{found['separation']:.2f}"]
    return [name, *measured, *cosines, *swept, found["decision"], f"{found['seconds']:.0f}"]


def with_interval(values, form):
    """`0.725 [0.614, 0.828]` of (mean, low, high)."""
    value, low, high = [form.format(number) for number in values]
    return f"{value} [{low}, {high}]"


def parse(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m demo.objectives", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    parser.add_argument("--prompts", type=Path, default=smol.ROOT / "data/xstest.csv")
    parser.add_argument("--small", action="store_true", help="short texts, 12 steps of 8 pairs")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    changes = smol.SMALL if args.small else {}
    (source,) = load("dpo", [smol.CONFIG]).data
    for path in (SFT / "config.json", Path(source), args.prompts):
        if not path.exists():
            raise UserError(f"{path}: not there; expected `make smol` to have run, with --xstest=FILE")
    names = list(VARIANTS)
    if not has_several_answers(source):
        print(f"{source}: one answer a conversation, so its last turn is every turn: no last_turn")
        names.remove("last_turn")

    at_once = runs_at_once(pick_device())
    run_all(training_commands(names, write_swapped(ROOT, source), changes), at_once)
    say_data(names)

    settings = load_sections(smol.CONFIG, ["steer"], changes.get("steer.py", ()))["steer"]
    texts = (f"--texts={settings.texts}", f"--count={settings.count}")
    texts += (f"--max_text_tokens={settings.max_text_tokens}",)
    swept = (f"--inject={settings.inject}", f"--max_new_tokens={settings.max_new_tokens}")
    validate(names, settings, (*texts, *swept, f"--prompts={args.prompts}"), at_once)

    found = measure_models(names)
    folders = {name: ROOT / f"pairs/smol_{name}_{settings.mode}" for name in names}
    for name, folder in folders.items():
        found[name] |= steering(folder, folders[RECIPE], settings)
        found[name]["seconds"] = sum(common.values_of(common.read_metrics(ROOT / name), "step_s"))
    write_json(ROOT / "objectives.json", found)
    print("\n" + table(HEAD, [line(name, found[name]) for name in names]))
    print(LEGEND)
    itself = found["itself"]
    print(f"the SFT model with itself: |log-ratio| {itself['drift']:.4f}, KL {itself['kl']:.5f}")
    print(f"extract of the two: {refusal_of_itself((*texts, '--template=chatml'))}")
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
