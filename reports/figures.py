"""The charts of training runs and of sweeps.

Which numbers stand under which title, in which unit. charts.py draws them.
"""

import math
from dataclasses import dataclass

from reports.charts import Chart, Line

SMOOTHING = 40  # noisy curves are means over a 40th of the run: 25 of 1,000 steps; none below 80 steps
# Named as in aqi.py and analysis/verdict.py: 0 where the label explains no more than chance, 100 where it
# explains all.
SEPARATION = "% of variance explained by the label, beyond chance"


@dataclass(frozen=True)
class Panel:
    """A chart of training runs. metrics: {name: label}; unit: None where it depends on the loss."""

    title: str
    unit: str | None
    metrics: dict
    noisy: bool = True


PANELS = (
    Panel("Loss", None, {"loss": ""}),
    Panel("Held-out loss", None, {"eval/loss": ""}, noisy=False),
    Panel("Reward margin", "chosen - rejected", {"rewards/margins": ""}),
    Panel(
        "Held-out reward margin",
        "chosen - rejected, 95 % interval over pairs",
        {"eval/rewards/margins": ""},
        noisy=False,
    ),
    Panel("Reward accuracy", "share of pairs with a positive margin", {"rewards/accuracies": ""}),
    Panel(
        "Held-out reward accuracy",
        "share of pairs, 95 % interval over pairs",
        {"eval/rewards/accuracies": ""},
        noisy=False,
    ),
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
            lines.append(
                Line(
                    f"{name} {label}".strip(), colour, across, values, dashed=key != next(iter(keys.values()))
                )
            )
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
    """The curve of every category with its interval, and the nulls beside it.

    sweeps: [(name, what its aqi.json holds)].
    """
    charts = []
    for category, found in verdicts_of(sweeps).items():
        lines, levels = [], set()
        for colour, name, sweep, verdict in found:
            x = sweep["inputs"]["lambdas"]
            low, high = verdict["permuted"]
            lines.append(
                Line(
                    name,
                    colour,
                    x,
                    verdict["estimate"],
                    verdict["low"] or (),
                    verdict["high"] or (),
                    note=verdict["verdict"],
                )
            )
            lines += _null_lines(name, colour, sweep, verdict)
            lines.append(Line(f"{name} permuted labels", colour, x, (), low, high, note="95 % of them"))
            levels.add(f"{100 * (1 - verdict['level']):.3g}")
        unit = f"{SEPARATION}; pointwise {' or '.join(sorted(levels))} % interval"
        charts.append(Chart(f"Separation, {category}", unit, "lambda", lines))
    return charts


def _null_lines(name, colour, sweep, verdict):
    """What the curve is to be read beside.

    Random directions, the best direction of that length, the DPO model itself.
    """
    x, lines = sweep["inputs"]["lambdas"], []
    if verdict.get("control"):
        lines.append(Line(f"{name} random direction", colour, x, verdict["control"], dashed=True))
    if verdict.get("nulls"):
        changes = sorted(c for kind in verdict["nulls"]["null_changes"].values() for c in kind)
        start = verdict["estimate"][0]
        ends = [start, start + changes[0]], [start, start + changes[-1]]
        note = f"all {len(changes)} of equal norm"
        lines.append(Line(f"{name} random directions", colour, [x[0], x[-1]], (), *ends, note=note))
    if "oracle" in sweep and verdict["category"] == sweep["verdicts"][0]["category"]:
        best = sweep["oracle"]
        lines.append(
            Line(
                f"{name} best direction",
                colour,
                best["lambdas"],
                best["separation"],
                dashed=True,
                note="other texts",
            )
        )
    if "dpo" in sweep:
        value = sweep["dpo"]["separation"][verdict["category"]]
        lines.append(Line(f"{name} DPO model", colour, [x[-1]], [value]))
    return lines


def axioms_chart(sweep):
    """One line per axiom of a sweep."""
    lines = []
    _, *axioms = sweep["verdicts"]  # the first is that of all of them
    for colour, verdict in enumerate(axioms):
        lines.append(
            Line(
                verdict["category"],
                colour,
                sweep["inputs"]["lambdas"],
                verdict["estimate"],
                note=verdict["verdict"],
            )
        )
    return Chart("Separation, by axiom", SEPARATION, "lambda", lines)


def effect_charts(sweeps):
    """What steering did to states and likelihoods."""
    shifts = [(name, sweep["shifts"]) for name, sweep in sweeps]
    behaviour = [(name, sweep["behaviour"]) for name, sweep in sweeps]
    profiles = [(name, _profile(sweep)) for name, sweep in sweeps]
    directions = {"along": "achieved", "beside": "off_axis"}
    texts = {"chosen": "logp_chosen", "rejected": "logp_rejected"}
    ends = {"at the last lambda": "steered", "unsteered": "unsteered"}
    return [
        row_chart(
            "Shift of the mean state", "in |v|; along v it should be lambda", "lambda", shifts, directions
        ),
        row_chart("Held-out texts", "nats per token", "lambda", behaviour, texts),
        row_chart("Separation after each block", SEPARATION, "layer", profiles, ends),
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
            rows.append({"layer": after["layer"], "unsteered": before["aqi"], "steered": after["aqi"]})
    return rows
