"""A report on runs: one HTML page that needs no network, no script and no other file.

    python -m reports.page RUN [RUN ...] [--out PAGE.html]

RUN is a folder of train_sft.py or train_dpo.py, or one of steer.py: what extract or validate wrote, with its
sweeps, or a sweep's own. Runs of one stage are drawn over each other. PAGE is report.html in the first RUN.
The verdict comes first, then what it rests on, then training, manifests last.
"""

import argparse
import datetime
import json
import math
import re
import statistics
import sys
from pathlib import Path

from plumbing.files import UserError
from plumbing.health import warnings_of
from reports.charts import number
from reports.figures import (
    axiom_forests,
    behaviour_charts,
    change_forest,
    dpo_change,
    separation_charts,
    spectrum_charts,
    state_charts,
    training_charts,
    verdicts_of,
)
from reports.folders import Run, read, short_names
from reports.html import COLOURS, page, sentence, table
from reports.summary import BASELINES, behaviour_counts, numbers, two_digits, words

EVALUATED = (
    "loss",
    "perplexity",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
)
ERRORS = "Relative error of the last layer's mean state at lambda 1"
# {column: key of an entry of "behaviour", and of the DPO model}
ENTRIES = {
    "prefers chosen": "preference_accuracy",
    "KL from SFT": "kl_from_sft",
    "KL to DPO": "kl_to_dpo",
    "refuses unsafe": "refused_unsafe",
    "refuses safe": "refused_safe",
    "logp chosen": "logp_chosen",
    "logp rejected": "logp_rejected",
    "repeated 4-grams": "repeated_4grams",
}
AFTER_LENGTH = "this model, less what length explains"
CHANGE = ("change, of 100", "95 % interval", "sd of random directions", "p")
SPECTRUM = "Spectrum of the differences between the two models"

# What a reader needs who has nothing but the page. docs/aqi.md says why.
TERMS = {
    "lambda": "share of the vector that is added to the SFT model's states; the vector is the mean "
    "difference between the two models' states",
    "separation": "per cent of the states' variance that the label, safe or unsafe, explains beyond "
    "chance: 0 none, 100 all",
    "its interval": "of all texts of this kind, drawn in groups; with few groups it lies below the "
    "separation, part of which is then the groups'",
    "random directions": "as long as the vector, without a meaning: isotropic ones, and sums of the pair's "
    "own differences, half of them negated; p is the rank of the change among them",
    "best direction": "found by gradient ascent on half of the texts, read on the other half: what a "
    "vector of this length can do",
    "shuffled labels": "what labels without a meaning separate; groups keep together",
    "groups": "near copies of one text, or those of a column; worth: equally large groups that say as much",
    "probe AUC": "how well a linear probe reads the label of texts that it has not seen; chance: 0.5",
    "shift": "of the last layer's mean state, along the vector v and beside it, in lengths of v; along v "
    "it should be lambda",
    "refuses": "share of answers that begin as refusals do, by a list of openings",
}

# ---------------------------------------------------------------- training runs


def training_section(stage, runs):
    """(title, [(heading, table or charts)]) of the runs of one stage, drawn over each other."""
    names = names_of(runs)
    parts = [("Outcome", outcomes(names, runs)), ("Warnings", warnings(names, runs))]
    if len(runs) > 1:
        configs = [dict(run.config) for run in runs]
        for config in configs:
            config.pop("out_dir", None)
        parts.append(("Settings that differ", comparison(names, configs, only_differing=True)))
    parts += [("Curves", training_charts(names, runs)), ("Held-out evaluations", evaluations(names, runs))]
    for name, run in zip(names, runs):
        if run.samples:
            parts.append((f"Greedy answers: {name}", answers(run)))
    return stage.upper(), parts


def names_of(found):
    """A short name for each Run or Steering: its folder's."""
    return short_names([one.folder for one in found])


def outcomes(names, runs):
    """A table of one line per run."""
    rows = list(map(outcome, names, runs))
    # a column that no run has a value for, as held-out ones without held-out data, is left out
    kept = []
    for column in rows[0]:
        if any(row[column] is not None for row in rows):
            kept.append(column)
    cells = []
    for row in rows:
        cells.append([row[column] for column in kept])
    return table(kept, cells)


def warnings(names, runs):
    """A table of what the runs said of their own numbers; nothing without any."""
    rows = []
    for name, run in zip(names, runs):
        for text in warnings_of(run.lines):
            rows.append([name, text])
    return table(["run", "warning"], rows, text=2, kind="settings") if rows else ""


def outcome(name, run):
    """{column: value} of a run; None where it has none."""
    steps, losses = run.points("loss")
    _, rates = run.points("tokens_per_s")
    _, shares = run.points("mfu")
    _, seconds = run.points("step_s")
    return {
        "run": name,
        "steps": steps[-1] if "finished" in run.manifest else f"{steps[-1]:,}, unfinished",
        "loss, step 1": losses[0],
        "loss, last step": losses[-1],
        "held-out loss": held_out(run, "eval/loss"),
        "held-out accuracy": held_out(run, "eval/rewards/accuracies"),
        "held-out margin": held_out(run, "eval/rewards/margins"),
        "clipped": f"{run.clipped() / len(steps):.0%}",
        "share of weights changed": run.last("weights_changed"),
        "tokens/s": statistics.median(rates),
        "MFU": f"{statistics.median(shares):.1%}" if run.last("mfu") else None,  # 0 or absent on a CPU
        "GiB": run.last("peak_mem_gib"),
        "time of steps": str(datetime.timedelta(seconds=round(sum(seconds)))),
    }


def held_out(run, metric):
    """`spread` of a run, with the step of the value where that is not the last: "0.6931 (step 0)"."""
    value, earlier = spread(run.lines, metric), run.earlier(metric)
    if not earlier:
        return value
    return f"{value if isinstance(value, str) else number(value)}{earlier}"


def spread(lines, metric):
    """The last value of a metric with its half-width, "0.982 ± 0.016".

    The bare value without a half-width, None without a value.
    """
    found = [line for line in lines if metric in line]
    if not found:
        return None
    value, half = found[-1][metric], found[-1].get(f"{metric}_ci95")
    if half is None:
        return value
    digits = 3
    if half > 0:
        digits = 1 - math.floor(math.log10(half))  # two of the half-width's
        digits = min(6, max(0, digits))
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def evaluations(names, runs):
    """A table of every held-out evaluation; nothing without any."""
    metrics = []
    for metric in EVALUATED:
        if any(run.last(f"eval/{metric}") is not None for run in runs):
            metrics.append(metric)
    rows = []
    for name, run in zip(names, runs):
        for line in run.lines:
            if "eval/loss" in line:
                values = [spread([line], f"eval/{metric}") for metric in metrics]
                rows.append([name, line["step"], *values])
    return table(["run", "step", *metrics], rows) if rows else ""


def answers(run):
    """A table prompts x steps of the greedy answers."""
    by_prompt, head = {}, ["prompt"]
    for i, line in enumerate(run.samples):
        head.append(f"step {line['step']:,}")
        for prompt, answer in zip(line["prompts"], line["answers"], strict=True):
            by_prompt.setdefault(prompt, [None] * len(run.samples))[i] = answer
    rows = [[prompt, *given] for prompt, given in by_prompt.items()]
    return table(head, rows, text=len(head), kind="prose")


# ---------------------------------------------------------------- settings and manifests


def comparison(names, dicts, only_differing=False):
    """A table keys x runs: of the keys whose values differ, or of all keys, those in bold."""
    columns = [_flatten(values) for values in dicts]
    keys = {}
    for column in columns:
        keys |= column
    rows, differing = [], []
    for key in keys:
        texts = [column.get(key, "–") for column in columns]
        rows.append([key, *texts])
        if len(set(texts)) > 1:
            differing.append(rows[-1])
    shown, marked = (differing, ()) if only_differing else (rows, differing)
    return table(["", *names], shown, text=len(names) + 1, marked=marked, kind="settings")


def _flatten(values):
    """{"a": {"b": 1}} as {"a.b": "1"}; hashes cut to 16 digits."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            for inner, text in _flatten(value).items():
                flat[f"{key}.{inner}"] = text
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[key] = re.sub(r"\b([0-9a-f]{16})[0-9a-f]{24,}", r"\1…", text)
    return flat


def manifests(runs, steered):
    """(title, parts) of what runs and vectors were made from. runs: {stage: [Run]}."""
    parts = []
    made = [one for one in steered if one.manifest]
    if made:
        parts.append(("Vectors", manifest_table(made)))
    names, inputs = [], []
    for name, sweep in named_sweeps(steered):
        names.append(name)
        inputs.append(sweep["inputs"])
    if inputs:
        parts.append(("Settings of the sweeps", comparison(names, inputs)))
    for stage, found in runs.items():
        if found:
            parts.append((stage.upper(), manifest_table(found)))
    return "Manifests", parts


def manifest_table(found):
    """A table of the manifests of Runs or Steerings beside each other."""
    return comparison(names_of(found), [one.manifest for one in found])


# ---------------------------------------------------------------- steering


def steering_section(folders):
    """(title, [(heading, table or charts)]) of all steering folders and the sweeps in them."""
    sweeps, parts = named_sweeps(folders), []
    if sweeps:
        overall, *axioms = separation_charts(sweeps)
        effects = [change_forest(sweeps), *axiom_forests(sweeps)]
        parts += [("Verdict", verdict(sweeps))]
        if len(sweeps) == 1:
            parts += [("Separation and effect sizes", [overall, *effects])]  # one row of a wide page
        else:
            parts += [("Separation", [overall, effects[0]]), ("Effect sizes by axiom", effects[1:])]
        parts += [
            ("Notes", notes(sweeps)),
            ("Behaviour over lambda", behaviour_charts(sweeps)),
            ("Baselines", baselines(sweeps)),
            ("Verdicts", verdicts(sweeps)),
            ("By axiom", axioms),
            ("By lambda", by_lambda(sweeps)),
            ("What steering did to the states", state_charts(sweeps)),
            (ERRORS, errors(sweeps)),
        ]
    if spectra := [one for one in folders if one.spectrum]:
        parts.append(spectrum_part(spectra))
    if sweeps:
        parts.append(("Terms", table(["term", "meaning"], list(TERMS.items()), text=2, kind="terms")))
    return "Steering", parts


def verdict(sweeps):
    """The verdict in words. Of several sweeps: a sentence for each decision, and a table of their changes."""
    decided = {}
    for name, sweep in sweeps:
        overall = sweep["verdicts"][0]
        key = words(overall), overall["decision"], overall["advice"]
        decided.setdefault(key, []).append(name)
    said = []
    for (verdict_words, decision, advice), names in decided.items():
        # names are as they are: a pair named "dpo" is not one named "Dpo"
        strong = f"{_of(names, sweeps)}: {verdict_words}. Decision: {decision}."
        said.append(sentence(f"{_capital(advice)}.", strong))
    if len(sweeps) == 1:
        return said[0] + sentence(numbers(sweeps[0][1]))
    return "".join(said) + changes(sweeps)


def _capital(text):
    return text[0].upper() + text[1:]


def changes(sweeps):
    """A table of what the verdict of every sweep rests on."""
    rows = []
    for name, sweep in sweeps:
        overall = sweep["verdicts"][0]
        best = sweep["oracle"]["change"] if "oracle" in sweep else None
        beside = [two_digits(best), two_digits(dpo_change(sweep)), f"{overall['relevant']:.2g}"]
        rows.append([name, overall["verdict"], overall["decision"], *_change(overall), *beside])
    head = ["sweep", "verdict", "decision", *CHANGE, "best direction", "DPO model", "matters from"]
    return table(head, rows, text=3)


def _change(found):
    """The cells of CHANGE, of a verdict."""
    low, high = map(two_digits, found["change_interval"])
    ranks = found["nulls"]
    size = [two_digits(ranks["size_sd"]), f"{ranks['p_change']:.2f}"]
    return [two_digits(found["change"]), f"[{low}, {high}]", *size]


def named_sweeps(folders):
    """[(name, what its aqi.json holds)].

    The names are the pairs', or the folders' where a pair was swept twice.
    """
    paths = {}
    for folder in folders:
        paths |= folder.sweeps
    pairs = {sweep.get("pair") for sweep in paths.values()} - {None}
    if len(pairs) == len(paths):
        return [(sweep["pair"], sweep) for sweep in paths.values()]
    return list(zip(short_names(paths), paths.values()))


def spectrum_part(folders):
    """(heading, charts) of folders with a spectrum; names as of named_sweeps.

    The heading says which texts and tokens the spectra are of, or each name where they differ.
    """
    pairs = [one.manifest.get("pair") for one in folders]
    names = pairs
    if None in pairs or len(set(pairs)) < len(pairs):
        names = names_of(folders)
    heading, kinds = SPECTRUM, [one.spectrum_of for one in folders]
    if len(set(kinds)) == 1:
        heading = f"{SPECTRUM}: {kinds[0]}"
    else:
        names = [f"{name} ({kind})" for name, kind in zip(names, kinds)]
    spectra = [one.spectrum for one in folders]
    return heading, spectrum_charts(list(zip(names, spectra)))


def by_sweep(sweeps, head, rows, text, kind=""):
    """A table whose first column says of which sweep a row is; a single sweep needs no such column."""
    if len(sweeps) > 1:
        return table(["sweep", *head], rows, text + 1, kind=kind)
    return table(head, [row[1:] for row in rows], text, kind=kind)


def verdicts(sweeps):
    """A table of every verdict, category by category."""
    head = ["axiom", "verdict", "decision", "change, of 100", "interval", "level", *CHANGE[2:]]
    head.append("groups, rarer label")
    rows = []
    for category, found in verdicts_of(sweeps).items():
        for _, name, _, one in found:
            change, interval, *null = _change(one)
            level = f"{100 * (1 - one['level']):.3g} %"
            cells = [words(one), one["decision"], change, interval, level, *null, one["groups"]]
            rows.append([name, category, *cells])
    return by_sweep(sweeps, head, rows, text=3)


def by_lambda(sweeps):
    """Tables of what every lambda did, and of the DPO model itself: the states, then behaviour."""
    states, acts = [], []
    for name, sweep in sweeps:
        overall = sweep["verdicts"][0]
        for k, (shift, entry) in enumerate(zip(sweep["shifts"], sweep["behaviour"], strict=True)):
            interval = "none covers"
            if overall["low"]:
                interval = f"[{overall['low'][k]:.2f}, {overall['high'][k]:.2f}]"
            moved = [shift["achieved"], shift["off_axis"], max(shift["strength"].values())]
            strength = f"{shift['lambda']:g}"
            states.append([name, strength, overall["estimate"][k], interval, *_auc(entry), *moved])
            acts.append([name, strength, *_entries(entry)])
        dpo = sweep["dpo"]
        separation = dpo["separation"][overall["category"]]
        states.append([name, "DPO model", separation, None, *_auc(dpo), None, None, None])
        acts.append([name, "DPO model", *_entries(dpo)])
    head = ["lambda", "separation", "95 % interval", "probe AUC", "95 % interval"]
    tables = by_sweep(sweeps, [*head, "shift along v", "beside v", "|added| / |state|"], states, text=1)
    counts = {}
    for name, sweep in sweeps:
        counts.setdefault(behaviour_counts(sweep), []).append(name)
    for counted, names in counts.items():
        whose = "" if len(counts) == 1 else f"{', '.join(names)}:"
        tables += sentence(f"{_capital(counted)}. KL and logp: nats per token.", whose)
    return tables + by_sweep(sweeps, ["lambda", *ENTRIES], acts, text=1)


def _auc(found):
    """A probe's AUC and its interval, of a dict that has both."""
    if found["auc"] is None:
        return [None, None]
    low, high = found["auc_interval"]
    return [found["auc"], f"[{low:.2f}, {high:.2f}]"]


def _entries(entry):
    return [entry.get(key) for key in ENTRIES.values()]


def baselines(sweeps):
    """A table of what separates the labels without steering: the model, and what was never aligned.

    Sweeps of one model and one set of prompts have the same numbers, and share a row.
    """
    found = {}
    for source, label in (BASELINES | {"after_length": AFTER_LENGTH}).items():
        for name, sweep in sweeps:
            measured = sweep["baselines"][source]
            if source == "after_length":  # a number, without a probe
                measured = {"separation": measured, "auc": None}
            auc, interval = _auc(measured)
            # compared as shown: on a GPU two runs of one model differ in later digits
            shown = label, number(measured["separation"]), number(auc), interval
            found.setdefault(shown, []).append(name)
    rows = [[_of(names, sweeps), *shown] for shown, names in found.items()]
    return by_sweep(sweeps, ["of", "separation", "probe AUC", "95 % interval"], rows, text=1)


def _of(names, sweeps):
    """Which of the sweeps a row is of."""
    return f"all {len(sweeps)}" if len(names) == len(sweeps) > 1 else ", ".join(names)


def notes(sweeps):
    """The warnings, a sentence each; one that several sweeps share, once."""
    found = {}
    for name, sweep in sweeps:
        for note in sweep.get("notes", []) + sweep["warnings"]:
            found.setdefault(note, []).append(name)
    said = []
    for note, names in found.items():
        whose = f"{_of(names, sweeps)}:" if len(sweeps) > 1 else ""
        said.append(sentence(f"{_capital(note)}.", whose))
    return "".join(said)


def errors(sweeps):
    """A table of how far the steered mean state is from the DPO model's, per injection.

    Nothing without any.
    """
    rows = []
    for name, sweep in sweeps:
        for inject, error in sweep["errors"].items():
            rows.append([name, inject, *error.values()])
    if not rows:
        return ""
    return by_sweep(sweeps, ["injection", "on the vector's texts", "on held-out texts"], rows, text=1)


# ---------------------------------------------------------------- main


def sections(found):
    """All of the page, from what `folders.read` returned, in its order."""
    runs, steered, num_sweeps = {"dpo": [], "sft": []}, [], 0
    for one in found:
        if isinstance(one, Run):
            runs[one.manifest["stage"]].append(one)
        else:
            steered.append(one)
            num_sweeps += len(one.sweeps)
    largest = max(len(runs["sft"]), len(runs["dpo"]), len(steered), num_sweeps)
    if largest > len(COLOURS):
        limit = f"at most {len(COLOURS)}, as many as colours can tell apart"
        raise UserError(f"{largest} runs, or sweeps, of one kind; expected {limit}")
    out = []
    if steered:
        out.append(steering_section(steered))
    for stage, of_stage in runs.items():
        if of_stage:
            out.append(training_section(stage, of_stage))
    title, parts = manifests(runs, steered)
    if parts:
        out.append((title, parts))
    return out


def main(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m reports.page", description=__doc__, formatter_class=form)
    parser.add_argument("run", nargs="+", type=Path, help="run folder or steering folder")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first RUN")
    args = parser.parse_args(argv)
    out = args.out or args.run[0] / "report.html"
    write(args.run, out)
    print(f"wrote {out}")
    return 0


def write(folders, out):
    """The page of run and steering folders, as the file `out`."""
    found = [read(folder) for folder in folders]
    steered = [one for one in found if not isinstance(one, Run)]
    for one in steered:
        for sweep in one.outdated:
            print(f"{sweep}: left out, a sweep along a vector that was in {one.folder} before")
    lead = [str(folder) for folder in folders]
    out.write_text(page("Report", lead, sections(found)))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as error:  # not parallel.run: a laptop without torch can show a report
        sys.exit(f"error: {error}")
