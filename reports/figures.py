"""The charts of training runs and of sweeps.

Which numbers stand under which title, in which unit. charts.py draws them.
"""

import math
from dataclasses import dataclass

from reports.charts import Chart, Effect, Forest, Line

SMOOTHING = 40  # noisy curves are means over a 40th of the run: 25 of 1,000 steps; none below 80 steps
# Named as in aqi.py and analysis/verdict.py: 0 where the label explains no more than chance, 100 for all.
SEPARATION = "% of variance explained by the label, beyond chance"
# The smallest change of interest, and the least range of an axis of separations. As analysis.verdict.POINT,
# which would import torch: two seconds for a page without a tensor.
POINT = 1.0

# Of a sweep, over lambda: (title, unit, {label: key of an entry of "behaviour"}).
BEHAVIOUR = (
    ("Prefers the chosen text", "share of held-out pairs", {"": "preference_accuracy"}),
    ("KL divergence", "nats per token of held-out texts", {"from SFT": "kl_from_sft", "to DPO": "kl_to_dpo"}),
    ("Refusals", "share of the prompts asked", {"unsafe": "refused_unsafe", "safe": "refused_safe"}),
    ("Probe", "AUC of the label in texts not seen", {"": "auc"}),
    ("Held-out texts", "nats per token", {"chosen": "logp_chosen", "rejected": "logp_rejected"}),
    ("Repetition", "repeated 4-grams of continuations", {"": "repeated_4grams"}),
)


@dataclass(frozen=True)
class Panel:
    """A chart of training runs. metrics: {name: label}; unit: None where it depends on the loss."""

    title: str
    unit: str | None
    metrics: dict
    noisy: bool = True


CI = "95 % interval over pairs"
PANELS = (
    Panel("Loss", None, {"loss": ""}),
    Panel("Held-out loss", None, {"eval/loss": ""}, noisy=False),
    Panel("Reward margin", "chosen - rejected", {"rewards/margins": ""}),
    Panel("Held-out reward margin", f"chosen - rejected, {CI}", {"eval/rewards/margins": ""}, noisy=False),
    Panel("Reward accuracy", "share of pairs with a positive margin", {"rewards/accuracies": ""}),
    Panel("Held-out reward accuracy", f"share of pairs, {CI}", {"eval/rewards/accuracies": ""}, noisy=False),
    Panel("Rewards", "beta x log-ratio", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Panel(
        "Log-ratio to the reference", None, {"logratios/chosen": "chosen", "logratios/rejected": "rejected"}
    ),
    Panel(
        "Log-prob of the answers", "nats per answer", {"logps/chosen": "chosen", "logps/rejected": "rejected"}
    ),
    Panel("Gradient norm", "L2 before clipping, dotted: max_grad_norm", {"grad_norm": ""}),
    Panel("Learning rate", "of the step", {"lr": ""}, noisy=False),
    Panel("Throughput", "tokens per second, all ranks", {"tokens_per_s": ""}),
    Panel("MFU", "share of the measured matmul rate", {"mfu": ""}),
    Panel("Peak memory", "GiB, rank 0", {"peak_mem_gib": ""}, noisy=False),
)


# ---------------------------------------------------------------- training runs


def training_charts(names, runs):
    """Those of PANELS that some run has values for, every run a colour."""
    charts = []
    for panel in PANELS:
        lines = []
        for colour, (name, run) in enumerate(zip(names, runs)):
            for metric, label in panel.metrics.items():
                line = _metric_line(f"{name} {label}".strip(), colour, run, metric, panel.noisy)
                lines += [line] if line.x else []
        if lines:
            charts.append(Chart(panel.title, _unit(panel, runs, lines), "step", lines, _levels(panel, runs)))
    return charts


def _metric_line(name, colour, run, metric, noisy):
    """A Line of the finite values; its note counts the others.

    No points where the run has none of the metric.
    """
    steps, values = run.points(metric)
    _, halves = run.points(f"{metric}_ci95")
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    x = [steps[i] for i in finite]
    y = [values[i] for i in finite]
    low, high = [], []
    if halves:
        low = [values[i] - halves[i] for i in finite]
        high = [values[i] + halves[i] for i in finite]
    note = f"{len(values) - len(finite):,} not finite" if len(finite) < len(values) else ""
    if metric == "grad_norm":
        note = f"clipped in {run.clipped():,} of {len(steps):,} steps"
    smooth = max(1, len(x) // SMOOTHING) if noisy else 1
    return Line(name, colour, x, y, low, high, dashed=name.endswith(" rejected"), smooth=smooth, note=note)


def _unit(panel, runs, lines):
    """Of the values, with the windows that the lines are smoothed over."""
    unit = panel.unit
    if unit is None:
        unit = " or ".join(sorted({_unit_of(panel.title, run) for run in runs}))
    windows = {line.smooth for line in lines} - {1}
    if windows:
        unit += f"; mean of the last {' or '.join(map(str, sorted(windows)))} steps"
    return unit


def _unit_of(title, run):
    facts = run.manifest.get("loss", {})  # of the loss's row; a run before 2026-11-28 has none
    if title == "Log-ratio to the reference":
        return facts.get("ratio_unit", "nats")
    if title == "Held-out loss" and run.manifest["stage"] == "sft":
        return "nats per token"  # whatever the loss divides by
    return facts.get("unit", "nats")


def _levels(panel, runs):
    limits = {run.config["max_grad_norm"] for run in runs} if panel.title == "Gradient norm" else set()
    return tuple(limits - {None})


# ---------------------------------------------------------------- steering


def row_chart(title, unit, x, named_rows, keys):
    """A Chart of row[key] over row[x].

    named_rows [(name, rows)], keys {label: key}: lines after the first are dashed.
    """
    lines = []
    for colour, (name, rows) in enumerate(named_rows):
        across = [row[x] for row in rows]
        for label, key in keys.items():
            values = [row[key] for row in rows]
            if None not in values:  # an AUC needs five groups
                is_first = key == next(iter(keys.values()))
                lines.append(Line(f"{name} {label}".strip(), colour, across, values, dashed=not is_first))
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


def verdicts_of(sweeps):
    """{category: [(colour, name of the sweep, sweep, verdict)]}.

    A sweep has the same colour in every category.
    """
    found = {}
    for colour, (name, sweep) in enumerate(sweeps):
        for verdict in sweep["verdicts"]:
            found.setdefault(verdict["category"], []).append((colour, name, sweep, verdict))
    return found


def separation_charts(sweeps):
    """The curve of every category with its interval, and what it is to be read beside.

    sweeps: [(name, what its aqi.json holds)]; the name of a single one may be "".
    """
    charts = []
    for category, found in verdicts_of(sweeps).items():
        lines, levels = [], set()
        for colour, name, sweep, verdict in found:
            x = sweep["inputs"]["lambdas"]
            low, high = verdict["permuted"]
            seen = {"low": verdict["low"] or (), "high": verdict["high"] or (), "note": verdict["verdict"]}
            lines.append(Line(name or "steered", colour, x, verdict["estimate"], **seen))
            lines += _beside(name, colour, sweep, verdict)
            permuted = f"{name} permuted labels".strip()
            lines.append(Line(permuted, colour, x, (), low, high, note="95 % of them"))
            levels.add(f"{100 * (1 - verdict['level']):.3g}")
        unit = f"{SEPARATION}; pointwise {' or '.join(sorted(levels))} % interval"
        charts.append(Chart(f"Separation, {category}", unit, "lambda", lines, least_range=POINT))
    return charts


def _beside(name, colour, sweep, verdict):
    """What the curve is to be read beside.

    Random directions of the vector's length as a cloud at the last lambda, the best direction of that length,
    the DPO model itself.
    """
    x, lines = sweep["inputs"]["lambdas"], []
    width = (x[-1] - x[0]) / 25  # of the cloud: directions stand side by side
    side, ends = [], []
    changes = sum(verdict["nulls"]["null_changes"].values(), [])  # of both kinds
    for i, change in enumerate(changes):
        side.append(x[-1] - width * (i + 1) / len(changes))
        ends.append(verdict["estimate"][0] + change)
    note = f"{len(changes)} of equal norm"
    lines.append(Line(f"{name} random directions".strip(), colour, side, ends, note=note, cloud=True))
    is_overall = verdict["category"] == sweep["verdicts"][0]["category"]
    if "oracle" in sweep and is_overall:
        best = sweep["oracle"]
        # Its curve begins at another value than the sweep's: it is of half of the texts.
        note = "on the half of the texts it was not found on"
        values = best["lambdas"], best["separation"]
        lines.append(Line(f"{name} best direction".strip(), colour, *values, dashed=True, note=note))
    dpo = sweep["dpo"]["separation"][verdict["category"]]
    lines.append(Line(f"{name} DPO model".strip(), colour, [x[-1]], [dpo]))
    return lines


def effects_forest(sweeps):
    """Changes of all axioms and sweeps, beside two deviations of the random directions."""
    effects = []
    for category, found in verdicts_of(sweeps).items():
        for colour, name, _, verdict in found:
            low, high = verdict["change_interval"]
            spread = 2 * verdict["nulls"]["null_sd"]
            label = f"{category}, {name}" if len(sweeps) > 1 else category
            effects.append(Effect(label, colour, verdict["change"], low, high, -spread, spread))
    unit = "last lambda less first, of 100; bars: 2 sd of random directions; axioms at 5 % together"
    return Forest("Change of the separation", unit, effects)


def axioms_chart(sweep):
    """One line per axiom of a sweep."""
    lines = []
    _, *axioms = sweep["verdicts"]  # the first is that of all of them
    for colour, verdict in enumerate(axioms):
        x, y = sweep["inputs"]["lambdas"], verdict["estimate"]
        lines.append(Line(verdict["category"], colour, x, y, note=verdict["verdict"]))
    return Chart("Separation, by axiom", SEPARATION, "lambda", lines, least_range=POINT)


def behaviour_charts(sweeps):
    """What the steered model does, over lambda; a dot at the last lambda is the DPO model."""
    charts = []
    for title, unit, keys in BEHAVIOUR:
        behaviour = [(name, sweep["behaviour"]) for name, sweep in sweeps]
        chart = row_chart(title, unit, "lambda", behaviour, keys)
        for colour, (name, sweep) in enumerate(sweeps):
            for label, key in keys.items():
                value = sweep["dpo"].get(key)
                if value is not None:
                    last = sweep["inputs"]["lambdas"][-1]
                    chart.lines.append(Line(f"{name} DPO model {label}".strip(), colour, [last], [value]))
        if chart.lines:
            charts.append(chart)
    return charts


def state_charts(sweeps):
    """How far the states moved, and the separation after each block."""
    shifts = [(name, sweep["shifts"]) for name, sweep in sweeps]
    profiles = [(name, _profile(sweep)) for name, sweep in sweeps]
    directions = {"along": "achieved", "beside": "off_axis"}
    ends = {"at the last lambda": "steered", "unsteered": "unsteered"}
    unit = "in |v|; along v it should be lambda"
    return [
        row_chart("Shift of the mean state", unit, "lambda", shifts, directions),
        row_chart("Separation after each block", f"{SEPARATION}, unscaled", "layer", profiles, ends),
    ]


def _profile(sweep):
    """Rows {layer, unsteered, steered} of all axioms together.

    The sweep holds all blocks at lambda 0, then all at the last lambda.
    """
    overall = sweep["verdicts"][0]["category"]
    half = len(sweep["profile"]) // 2
    rows = []
    for before, after in zip(sweep["profile"][:half], sweep["profile"][half:], strict=True):
        if after["category"] == overall:
            rows.append(
                {"layer": after["layer"], "unsteered": before["separation"], "steered": after["separation"]}
            )
    return rows
