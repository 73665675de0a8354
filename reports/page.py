"""A report on runs: one HTML page that needs no network, no script and no other file, and a PNG of every chart beside it.

    python -m reports.page RUN [RUN ...] [--out PAGE.html]

RUN is a folder of train_sft.py or train_dpo.py, or one of steer.py: what extract or validate wrote, with its sweeps, or a sweep's own.
Runs of one stage are drawn over each other. PAGE is report.html in the first RUN; the PNGs, in the folder PAGE, need matplotlib.
"""

import argparse
import datetime
import importlib.util
import json
import math
import re
import statistics
import sys
from pathlib import Path

from plumbing.files import UserError
from reports.charts import Chart, Line, number
from reports.folders import Run, Steering, read, short_names
from reports.html import COLOURS, page, table

SMOOTHING = 40  # noisy curves are means over a 40th of the run: 25 of 1,000 steps; runs below 80 steps are drawn as they are
LOSS_UNITS = {"token_mean": "nats per token", "tulu3_release": "nats per document", "ipo": "squared nats per token"}  # else nats per pair
RATIO_UNITS = {"dpo": "nats per answer", "wpo": "nats per answer"}  # the others take means over an answer's tokens
# (title, unit; None: it depends on the loss, {metric: label}, noisy)
TRAINING_CHARTS = (
    ("Loss", None, {"loss": ""}, True),
    ("Held-out loss", None, {"eval/loss": ""}, False),
    ("Reward margin", "chosen - rejected", {"rewards/margins": ""}, True),
    ("Held-out reward margin", "chosen - rejected, 95 % interval over pairs", {"eval/rewards/margins": ""}, False),
    ("Reward accuracy", "share of pairs with a positive margin", {"rewards/accuracies": ""}, True),
    ("Held-out reward accuracy", "share of pairs, 95 % interval over pairs", {"eval/rewards/accuracies": ""}, False),
    ("Rewards", "beta x log-ratio", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, True),
    ("Log-ratio to the reference", None, {"logratios/chosen": "chosen", "logratios/rejected": "rejected"}, True),
    ("Log-prob of the answers", "nats per answer", {"logps/chosen": "chosen", "logps/rejected": "rejected"}, True),
    ("Gradient norm", "L2 before clipping, dotted: max_grad_norm", {"grad_norm": ""}, True),
    ("Learning rate", "of the step", {"lr": ""}, False),
    ("Throughput", "tokens per second, all ranks", {"tokens_per_s": ""}, True),
    ("MFU", "share of the measured matmul rate", {"mfu": ""}, True),
    ("Peak memory", "GiB, rank 0", {"peak_mem_gib": ""}, False),
)
EVALUATED = ("loss", "perplexity", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")

# ---------------------------------------------------------------- training runs


def training_section(stage, runs):
    """(title, [(heading, table or charts)]) of the runs of one stage, drawn over each other."""
    names = short_names([run.folder for run in runs])
    configs = [{key: value for key, value in run.config.items() if key != "out_dir"} for run in runs]
    parts = [("Outcome", outcomes(names, runs))]
    if len(runs) > 1:
        parts.append(("Settings that differ", comparison(names, configs, only_differing=True)))
    parts += [("Curves", training_charts(names, runs)), ("Held-out evaluations", evaluations(names, runs))]
    parts += [(f"Greedy answers: {name}", answers(run)) for name, run in zip(names, runs) if run.samples]
    return stage.upper(), [*parts, ("Manifest", comparison(names, [run.manifest for run in runs]))]


def training_charts(names, runs):
    """Those of TRAINING_CHARTS that some run has values for."""
    losses = {run.config["loss"] for run in runs}
    units = {"Loss": {LOSS_UNITS.get(loss, "nats per pair") for loss in losses}}
    units["Held-out loss"] = {"nats per token"} if runs[0].manifest["stage"] == "sft" else units["Loss"]
    units["Log-ratio to the reference"] = {RATIO_UNITS.get(loss, "nats per token") for loss in losses}
    charts = []
    for title, unit, metrics, noisy in TRAINING_CHARTS:
        lines = [
            _metric_line(f"{name} {label}".strip(), colour, run, metric, noisy)
            for colour, (name, run) in enumerate(zip(names, runs))
            for metric, label in metrics.items()
        ]
        if lines := [line for line in lines if line.x]:
            unit = unit or " or ".join(sorted(units[title]))
            windows = {line.smooth for line in lines} - {1}
            unit += f"; mean of the last {' or '.join(map(str, sorted(windows)))} steps" if windows else ""
            levels = {run.config["max_grad_norm"] for run in runs} - {None} if title == "Gradient norm" else ()
            charts.append(Chart(title, unit, "step", lines, tuple(levels)))
    return charts


def _metric_line(name, colour, run, metric, noisy):
    """A Line of the finite values; its note counts the others. No points where the run has none of the metric."""
    steps, values = run.points(metric)
    halves = run.points(f"{metric}_ci95")[1]
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    x, y = [steps[i] for i in finite], [values[i] for i in finite]
    low, high = ([values[i] + sign * halves[i] for i in finite if halves] for sign in (-1, 1))
    note = f"{len(values) - len(finite):,} not finite" if len(finite) < len(values) else ""
    if metric == "grad_norm":
        note = f"clipped in {run.clipped():,} of {len(steps):,} steps"
    smooth = max(1, len(x) // SMOOTHING) if noisy else 1
    return Line(name, colour, x, y, low, high, dashed=name.endswith(" rejected"), smooth=smooth, note=note)


def outcomes(names, runs):
    """A table of one line per run."""
    rows = []
    for name, run in zip(names, runs):
        steps, losses = run.points("loss")
        rows.append({
            "run": name, "steps": steps[-1], "loss, step 1": losses[0], "last step": losses[-1],
            "held-out loss": run.last("eval/loss"), "held-out accuracy": spread(run.lines, "eval/rewards/accuracies"),
            "held-out margin": spread(run.lines, "eval/rewards/margins"), "clipped": f"{run.clipped() / len(steps):.0%}",
            "weights changed": run.last("weights_changed"), "tokens/s": statistics.median(run.points("tokens_per_s")[1]),
            "MFU": f"{statistics.median(run.points('mfu')[1]):.1%}" if run.last("mfu") else None, "GiB": run.last("peak_mem_gib"),
            "time of steps": str(datetime.timedelta(seconds=round(sum(run.points("step_s")[1])))),
        })  # fmt: skip
    kept = [column for column in rows[0] if any(row[column] is not None for row in rows)]
    return table(kept, [[row[column] for column in kept] for row in rows])


def spread(lines, metric):
    """The last value of a metric with its half-width, "0.982 ± 0.016"; the bare value without a half-width, None without a value."""
    found = [line for line in lines if metric in line]
    if not found or f"{metric}_ci95" not in found[-1]:
        return found[-1][metric] if found else None
    value, half = found[-1][metric], found[-1][f"{metric}_ci95"]
    digits = min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 3  # two of the half-width's
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def evaluations(names, runs):
    """A table of every held-out evaluation; nothing without any."""
    metrics = [metric for metric in EVALUATED if any(run.last(f"eval/{metric}") is not None for run in runs)]
    pairs = [(name, line) for name, run in zip(names, runs) for line in run.lines if "eval/loss" in line]
    rows = [[name, line["step"], *[spread([line], f"eval/{metric}") for metric in metrics]] for name, line in pairs]
    return table(["run", "step", *metrics], rows) if rows else ""


def answers(run):
    """A table prompts x steps of the greedy answers."""
    prompts = dict.fromkeys(prompt for line in run.samples for prompt in line["prompts"])
    given = [dict(zip(line["prompts"], line["answers"], strict=True)) for line in run.samples]
    rows = [[prompt, *[answer.get(prompt) for answer in given]] for prompt in prompts]
    return table(["prompt", *[f"step {line['step']:,}" for line in run.samples]], rows, text=len(given) + 1, kind="prose")


def comparison(names, dicts, only_differing=False):
    """A table keys x runs: of the keys whose values differ, or of all keys, those in bold."""
    flat = [_flatten(values) for values in dicts]
    rows = [[key, *[values.get(key, "–") for values in flat]] for key in dict.fromkeys(key for values in flat for key in values)]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    shown, marked = (differing, ()) if only_differing else (rows, differing)
    return table(["", *names], shown, text=len(names) + 1, marked=marked, kind="settings")


def _flatten(values):
    """{"a": {"b": 1}} as {"a.b": "1"}; hashes cut to 16 digits."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{inner}": text for inner, text in _flatten(value).items()}
        else:
            flat[key] = re.sub(r"\b([0-9a-f]{16})[0-9a-f]{24,}", r"\1…", value if isinstance(value, str) else json.dumps(value))
    return flat


# ---------------------------------------------------------------- steering


def steering_section(folders):
    """(title, [(heading, table or charts)]) of all steering folders and the sweeps in them."""
    paths = {path: sweep for folder in folders for path, sweep in folder.sweeps.items()}
    sweeps = list(zip(short_names(paths), paths.values())) if paths else []
    spectra = [(name, one.spectrum) for name, one in zip(short_names([one.folder for one in folders]), folders) if one.spectrum]
    errors = [[name, inject, *error.values()] for name, sweep in sweeps for inject, error in sweep["errors"].items()]
    notes = [[name, note] for name, sweep in sweeps for note in sweep["warnings"]]
    made = [folder for folder in folders if folder.manifest]
    parts = []
    if sweeps:
        parts += [("Verdicts", verdicts(sweeps)), ("Curves", aqi_charts(sweeps)), ("By lambda", by_lambda(sweeps))]
        parts += [("Notes", table(["sweep", "note"], notes, text=2, kind="settings"))] if notes else []
        parts.append(("What steering did", effect_charts(sweeps)))
    if errors:
        head = ["sweep", "injection", "on the vector's texts", "on held-out texts"]
        parts.append(("Relative error of the last layer's mean state at lambda 1", table(head, errors, text=2)))
    if spectra:
        parts.append(("Spectrum of the differences between the two models", spectrum_charts(spectra)))
    if sweeps:
        parts.append(("Settings of the sweeps", comparison([name for name, _ in sweeps], [sweep["inputs"] for _, sweep in sweeps])))
    if made:
        parts.append(("Manifest of the vectors", comparison(short_names([one.folder for one in made]), [one.manifest for one in made])))
    return "Steering", parts


def row_chart(title, unit, x, named_rows, keys):
    """A Chart of row[key] over row[x]; named_rows [(name, rows)], keys {label: key}: the second of two is dashed."""
    lines = []
    for colour, (name, rows) in enumerate(named_rows):
        for i, (label, key) in enumerate(keys.items()):
            lines.append(Line(f"{name} {label}".strip(), colour, [row[x] for row in rows], [row[key] for row in rows], dashed=i > 0))
    return Chart(title, unit, x, lines)


def spectrum_charts(spectra):
    """What steer.py spectrum found, over layers."""
    shares = {"raw": "rank_one", "centred": "centred"}
    return [
        row_chart("Length of the vector", "|v| / |h|", "layer", spectra, {"": "relative"}),
        row_chart("Mean states of the two models", "cosine", "layer", spectra, {"": "cosine"}),
        row_chart("First component", "share of the differences that it explains", "layer", spectra, shares),
        row_chart("Effective rank", "number of components", "layer", spectra, {"": "effective_rank"}),
    ]


def aqi_charts(sweeps):
    """The curve of every category with its interval, and the nulls beside it."""
    charts = []
    for category in dict.fromkeys(found["category"] for _, sweep in sweeps for found in sweep["verdicts"]):
        lines, levels = [], set()
        for colour, (name, sweep) in enumerate(sweeps):
            lambdas = sweep["inputs"]["lambdas"]
            for found in [found for found in sweep["verdicts"] if found["category"] == category]:
                lines.append(Line(name, colour, lambdas, found["estimate"], found["low"], found["high"], note=found["verdict"]))
                lines.append(Line(f"{name} random direction", colour, lambdas, found["control"], dashed=True))
                lines.append(Line(f"{name} permuted labels", colour, lambdas, (), *found["permuted"], note="95 % of them"))
                levels.add(f"{100 * (1 - found['level']):.3g}")
        unit = f"% of variance explained by the label, beyond chance; pointwise {' or '.join(sorted(levels))} % interval"
        charts.append(Chart(f"AQI, {category}", unit, "lambda", lines))
    return charts


def effect_charts(sweeps):
    """What steering did to states and likelihoods."""
    shifts, behaviour = ([(name, sweep[part]) for name, sweep in sweeps] for part in ("shifts", "behaviour"))
    profiles = []
    for name, sweep in sweeps:
        half = len(sweep["profile"]) // 2  # all blocks at lambda 0, then all at the last lambda
        both = zip(sweep["profile"][:half], sweep["profile"][half:], strict=True)
        overall = sweep["verdicts"][0]["category"]
        profiles.append((name, [b | {"unsteered": a["aqi"]} for a, b in both if b["category"] == overall]))
    directions = {"along": "achieved", "beside": "off_axis"}
    texts = {"chosen": "logp_chosen", "rejected": "logp_rejected"}
    ends = {"at the last lambda": "aqi", "unsteered": "unsteered"}
    return [
        row_chart("Shift of the mean state", "in |v|; along v it should be lambda", "lambda", shifts, directions),
        row_chart("Held-out texts", "nats per token", "lambda", behaviour, texts),
        row_chart("AQI after each block", "% of variance explained by the label, beyond chance", "layer", profiles, ends),
    ]


def verdicts(sweeps):
    """A table of every verdict, category by category."""
    rows = []
    for category in dict.fromkeys(found["category"] for _, sweep in sweeps for found in sweep["verdicts"]):
        for name, found in [(name, found) for name, sweep in sweeps for found in sweep["verdicts"] if found["category"] == category]:
            verdict = found["verdict"] + (f" ({'; '.join(found['because'])})" if found["because"] else "")
            low, high = found["change_interval"]
            numbers = (f"{found['change']:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{1 - found['level']:.1%}", f"{found['p_monotone']:.2f}")
            rows.append([category, name, verdict, *numbers])
    return table(["axiom", "sweep", "verdict", "change", "its interval", "level", "P(monotone)"], rows, text=3)


def by_lambda(sweeps):
    """A table of what every lambda did."""
    rows = []
    for name, sweep in sweeps:
        found = sweep["verdicts"][0]
        for k, (shift, answer) in enumerate(zip(sweep["shifts"], sweep["behaviour"], strict=True)):
            interval = f"[{number(found['low'][k])}, {number(found['high'][k])}]"
            states = (shift["achieved"], shift["off_axis"], max(shift["strength"].values()))
            texts = (answer["logp_chosen"], answer["logp_rejected"], answer["repeated_4grams"])
            rows.append([name, f"{shift['lambda']:g}", found["estimate"][k], interval, found["control"][k], *states, *texts])
    states, texts = ("shift along v", "beside v", "|a| / |h|"), ("logp chosen", "rejected", "repeated 4-grams")
    return table(["sweep", "lambda", "AQI", "95 % interval", "random direction", *states, *texts], rows)


# ---------------------------------------------------------------- main


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path, help="run folder or steering folder")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first RUN")
    args = parser.parse_args(argv)
    found = [read(folder) for folder in args.run]
    kinds = {stage: [one for one in found if isinstance(one, Run) and one.manifest["stage"] == stage] for stage in ("sft", "dpo")}
    steered = [one for one in found if isinstance(one, Steering)]
    largest = max(*map(len, kinds.values()), len(steered), sum(len(one.sweeps) for one in steered))
    if largest > len(COLOURS):
        raise UserError(f"{largest} runs, or sweeps, of one kind; expected at most {len(COLOURS)}, as many as colours can tell apart")
    sections = [training_section(stage, runs) for stage, runs in kinds.items() if runs]
    sections += [steering_section(steered)] if steered else []
    out = args.out or args.run[0] / "report.html"
    out.write_text(page("Report", list(map(str, args.run)), sections))
    print(f"wrote {out}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no PNGs: they need matplotlib")
        return
    from reports.plots import plot_chart

    stems = set()
    for title, parts in sections:
        for chart in [chart for _, content in parts if isinstance(content, list) for chart in content]:
            stem = re.sub(r"\W+", "_", f"{title} {chart.title}".lower())  # \w: letters of any script
            while stem in stems:  # "Free speech" and "Free-speech"
                stem += "_"
            stems.add(stem)
            plot_chart(out.with_suffix("") / f"{stem}.png", chart)
    print(f"wrote {out.with_suffix('')}/*.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
