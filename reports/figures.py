"""The charts of training runs and of sweeps.

Which numbers stand under which title, in which unit. charts.py draws them.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from reports.charts import Chart, Effect, Forest, Line, Mark, scattered
from reports.summary import two_digits

SMOOTHING = 40  # noisy curves are means over a 40th of the run: 25 of 1,000 steps; none below 80 steps
# Named as in aqi.py and analysis/verdict.py: 0 where the label explains no more than chance, 100 for all.
SEPARATION = "% of variance explained by the label, beyond chance"
# The smallest change of interest, and the least range of an axis of separations. As analysis.verdict.POINT,
# which would import torch: two seconds for a page without a tensor.
POINT = 1.0
STRIP = 1 / 30  # of the lambdas' range: a step to the right of the last one, where other models stand
ENDS = "last lambda less first, of 100"


@dataclass(frozen=True)
class Behaviour:
    """A chart of a sweep over lambda.

    keys: {label: key of an entry of "behaviour"}; intervals {key: key}. counted: names of numbers in
    "behaviour_of" that the unit has places for. The rest is of the Chart.
    """

    title: str
    unit: str
    keys: dict
    counted: tuple = ()
    intervals: dict = field(default_factory=dict)
    covers: tuple = ()
    levels: tuple = ()
    least_range: float = 0.0


SHARE = (0.0, 1.0)
BEHAVIOUR = (
    Behaviour(
        "Prefers the chosen text",
        "share of {} held-out pairs",
        {"": "preference_accuracy"},
        counted=("pairs",),
        intervals={"preference_accuracy": "preference_interval"},
        covers=SHARE,
        levels=(0.5,),
    ),
    Behaviour(
        "KL divergence",
        "nats per token of {} held-out texts",
        {"from SFT": "kl_from_sft", "to DPO": "kl_to_dpo"},
        counted=("kl_texts",),
        covers=(0.0, 0.01),  # or a thousandth of a nat fills the axis
    ),
    Behaviour(
        "Refusals",
        "share of {} unsafe and {} safe prompts",
        {"unsafe": "refused_unsafe", "safe": "refused_safe"},
        counted=("unsafe", "safe"),
        intervals={name: f"{name}_interval" for name in ("refused_unsafe", "refused_safe")},
        covers=SHARE,
    ),
    Behaviour(
        "Probe",
        "AUC of the label in texts not seen; chance: 0.5",
        {"": "auc"},
        intervals={"auc": "auc_interval"},
        covers=SHARE,
        levels=(0.5,),
    ),
    Behaviour(
        "Log-prob of held-out texts",
        "nats per token, {} pairs",
        {"chosen": "logp_chosen", "rejected": "logp_rejected"},
        counted=("pairs",),
        least_range=0.1,
    ),
    Behaviour(
        "Repetition",
        "share of 4-grams that repeat, in {} continuations",
        {"": "repeated_4grams"},
        counted=("continued",),
        covers=SHARE,
    ),
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
    """Those of PANELS that some run has values for, every run a colour; losses of two units in two charts."""
    charts = []
    for panel in PANELS:
        by_unit = {}
        for colour, (name, run) in enumerate(zip(names, runs)):
            for metric, label in panel.metrics.items():
                line = _metric_line(f"{name} {label}".strip(), colour, run, metric, panel.noisy)
                if line.x:
                    by_unit.setdefault(panel.unit or _unit_of(panel.title, run), []).append(line)
        for unit, lines in by_unit.items():
            charts.append(Chart(panel.title, _windows(unit, lines), "step", lines, _levels(panel, runs)))
    return charts


def _metric_line(name, colour, run, metric, noisy):
    """A Line of the finite values; its note counts the others.

    No points where the run has none of the metric.
    """
    steps, values = run.points(metric)
    _, halves = run.points(f"{metric}_ci95")
    x, y, low, high = [], [], [], []
    for i, value in enumerate(values):
        if not math.isfinite(value):
            continue
        x.append(steps[i])
        y.append(value)
        if halves:
            low.append(value - halves[i])
            high.append(value + halves[i])
    note = f"{len(values) - len(y):,} not finite" if len(y) < len(values) else ""
    if metric == "grad_norm":
        note = f"clipped in {run.clipped():,} of {len(steps):,} steps"
    smooth = max(1, len(x) // SMOOTHING) if noisy else 1
    return Line(name, colour, x, y, low, high, dashed=name.endswith(" rejected"), smooth=smooth, note=note)


def _windows(unit, lines):
    """The unit with the windows that the lines are smoothed over."""
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


def row_chart(title, unit, x, named_rows, keys, intervals=None, **about):
    """A Chart of row[key] over row[x].

    named_rows [(name, rows)], keys {label: key}: lines after the first are dashed. intervals {key: key of its
    [low, high]}, drawn where there is one name; of several names only the first line of each is in the
    legend, and the chart's marks say what the dashed ones are.
    """
    lines, marks = [], []
    is_alone = len(named_rows) == 1
    for colour, (name, rows) in enumerate(named_rows):
        across = [row[x] for row in rows]
        for i, (label, key) in enumerate(keys.items()):
            values = [row[key] for row in rows]
            if None in values:  # an AUC needs five groups
                continue
            shown = f"{name} {label}".strip()
            if not is_alone:
                shown = "" if i else name
            low, high = (), ()
            # eight sweeps' whiskers at every lambda would hide the curves
            if is_alone and intervals and key in intervals:
                low, high = zip(*[row[intervals[key]] for row in rows])
            lines.append(Line(shown, colour, across, values, low, high, dashed=i > 0))
    if len(keys) > 1 and not is_alone:
        for i, label in enumerate(keys):
            marks.append(Mark("dashed", label) if i else Mark("", f"{label}, whose last values these are"))
    return Chart(title, unit, x, lines, marks=tuple(marks), **about)


def spectrum_charts(spectra):
    """What steer.py spectrum found, over layers."""
    shares = {"raw": "rank_one", "centred": "centred"}
    return [
        row_chart("Length of the vector", "|v| / |h|", "layer", spectra, {"": "relative"}, covers=(0.0,)),
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
    """The curve of every category beside the DPO model itself.

    sweeps: [(name, what its aqi.json holds)]. A single one has its intervals, random directions, best
    direction and shuffled labels around it; eight of them would hide each other.
    """
    charts = []
    is_alone = len(sweeps) == 1
    first, last = _lambdas(sweeps)
    for category, found in verdicts_of(sweeps).items():
        lines, unit = [], SEPARATION
        for colour, name, sweep, verdict in found:
            x = sweep["inputs"]["lambdas"]
            shown = {"note": verdict["verdict"]}
            if is_alone and verdict["low"]:
                shown |= {"low": verdict["low"], "high": verdict["high"]}
                unit += f"; pointwise {100 * (1 - verdict['level']):.3g} % interval"
            curve = "steered" if is_alone else name
            lines.append(Line(curve, colour, x, verdict["estimate"], **shown))
            if is_alone:
                lines += _beside(sweep, verdict)
            dpo = sweep["dpo"]["separation"][category]
            # beyond the cloud of a single sweep; those of several side by side, for they are nearly equal
            place = _strip(first, last, 9 if is_alone else 2 + colour)
            lines.append(Line("DPO model" if is_alone else "", colour, [place], [dpo], square=True))
        marks = () if is_alone else (Mark("square", "the DPO model itself"),)
        title = f"Separation, {category}"
        about = {"least_range": POINT, "marks": marks, "last_x": last}
        charts.append(Chart(title, unit, "lambda", lines, **about))
    return charts


def _lambdas(sweeps):
    """The first and the last lambda of all sweeps."""
    firsts, lasts = [], []
    for _, sweep in sweeps:
        firsts.append(sweep["inputs"]["lambdas"][0])
        lasts.append(sweep["inputs"]["lambdas"][-1])
    return min(firsts), max(lasts)


def _strip(first, last, steps):
    """x of so many steps to the right of the last lambda."""
    return last + steps * STRIP * (last - first)


def _beside(sweep, verdict):
    """What the curve of a single sweep is to be read beside.

    Random directions of the vector's length as a cloud to the right of the last lambda, the best direction of
    that length, shuffled labels.
    """
    x, lines = sweep["inputs"]["lambdas"], []
    side, ends = [], []
    changes = null_changes(verdict)
    for i, change in enumerate(changes):
        side.append(_strip(x[0], x[-1], 1.5 + 6 * scattered(i)))
        ends.append(verdict["estimate"][0] + change)
    note = f"{len(changes)}, of its length"
    lines.append(Line("random directions", 0, side, ends, note=note, cloud=True))
    is_overall = verdict["category"] == sweep["verdicts"][0]["category"]
    if "oracle" in sweep and is_overall:
        best = sweep["oracle"]
        # Its curve begins at another value than the sweep's: it is of half of the texts.
        note = "of its length, on the half of the texts it was not found on"
        values = best["lambdas"], best["separation"]
        lines.append(Line("best direction", 0, *values, dashed=True, note=note))
    low, high = verdict["permuted"]
    lines.append(Line("shuffled labels", 0, x, (), low, high, note="95 % of them"))
    return lines


def null_changes(verdict):
    """The changes of the random directions of both kinds."""
    changes = []
    for of_kind in verdict["nulls"]["null_changes"].values():
        changes += of_kind
    return changes


def change_forest(sweeps):
    """The change of all texts of every sweep, among random directions, the best one and the DPO model."""
    effects = []
    for colour, (name, sweep) in enumerate(sweeps):
        overall = sweep["verdicts"][0]
        best = sweep["oracle"]["change"] if "oracle" in sweep else None
        about = {"cloud": null_changes(overall), "square": dpo_change(sweep), "diamond": best}
        about["relevant"] = overall["relevant"]
        effects.append(_effect(name, colour, overall, **about))
    return Forest("Change of the separation, all texts", ENDS, effects, _forest_marks(sweeps))


def dpo_change(sweep):
    """By how much the DPO model's own separation differs from that at lambda 0, or the first lambda."""
    overall = sweep["verdicts"][0]
    return sweep["dpo"]["separation"][overall["category"]] - overall["estimate"][0]


def _effect(name, colour, verdict, **about):
    low, high = verdict["change_interval"]
    return Effect(name, colour, verdict["change"], low, high, verdict["nulls"]["null_sd"], **about)


def _forest_marks(sweeps):
    """What the marks of change_forest mean; of a single sweep with their values."""
    (_, sweep), *others = sweeps
    overall = sweep["verdicts"][0]
    low, high = overall["change_interval"]
    interval = f"{two_digits(overall['change'])} [{two_digits(low)}, {two_digits(high)}]"
    marks = [
        Mark("dot", "steering, with its 95 % interval", interval),
        Mark("cloud", "random directions of its length", f"sd {overall['nulls']['null_sd']:.2g}"),
        Mark("square", "the DPO model itself", two_digits(dpo_change(sweep))),
        Mark("limit", "the smallest change that matters", f"± {overall['relevant']:.2g}"),
    ]
    oracles = [found["oracle"]["change"] for _, found in sweeps if "oracle" in found]
    if oracles:
        best = "the best direction of its length, on texts it was not found on"
        marks.append(Mark("diamond", best, two_digits(oracles[0])))
    if others:
        # the values of several are in the table above
        marks = [Mark(mark.kind, mark.text) for mark in marks]
    return tuple(marks)


def axiom_forests(sweeps):
    """Changes of the axioms beside two deviations of the random directions.

    Of a single sweep one Forest; of several one an axiom, on one scale. It reaches to one point on both
    sides: changes that do not matter look small.
    """
    _, *axioms = verdicts_of(sweeps).items()  # the first is that of all texts
    marks = (Mark("dot", "steering; intervals hold for all axioms together in 95 % of cases"),)
    marks += (Mark("band", "± 2 sd of random directions of its length"),)
    if len(sweeps) == 1:
        effects = []
        for category, ((_, _, _, verdict),) in axioms:
            effects.append(_effect(category, 0, verdict))
        return [Forest("Change of the separation, by axiom", ENDS, effects, marks, covers=(-POINT, POINT))]
    rows, reach = {}, [-POINT, POINT]
    for category, found in axioms:
        rows[category] = [_effect(name, colour, verdict) for colour, name, _, verdict in found]
        for effect in rows[category]:
            reach += effect.reach()
    forests = []
    for category, effects in rows.items():
        forests.append(Forest(f"Change, {category}", ENDS, effects, marks, covers=(min(reach), max(reach))))
        marks = ()  # once is enough
    return forests


def axioms_chart(sweep):
    """One line per axiom of a sweep."""
    lines = []
    _, *axioms = sweep["verdicts"]  # the first is that of all of them
    for colour, verdict in enumerate(axioms):
        x, y = sweep["inputs"]["lambdas"], verdict["estimate"]
        lines.append(Line(verdict["category"], colour, x, y, note=verdict["verdict"]))
    return Chart("Separation, by axiom", SEPARATION, "lambda", lines, least_range=POINT)


def behaviour_charts(sweeps):
    """What the steered model does, over lambda; squares on the right are the DPO model.

    A single sweep has its 95 % intervals.
    """
    charts = []
    is_alone = len(sweeps) == 1
    named = [("steered" if is_alone else name, sweep["behaviour"]) for name, sweep in sweeps]
    for shown in BEHAVIOUR:
        # split and joined: a place that nothing fills leaves two spaces
        unit = " ".join(shown.unit.format(*_counts(sweeps, shown.counted)).split())
        if is_alone and shown.intervals:
            unit += "; 95 % intervals"
        _, last = _lambdas(sweeps)
        about = {"covers": shown.covers, "levels": shown.levels, "intervals": shown.intervals}
        about |= {"last_x": last, "least_range": shown.least_range}
        chart = row_chart(shown.title, unit, "lambda", named, shown.keys, **about)
        points = _dpo_points(sweeps, shown)
        marks = chart.marks
        if points and not is_alone:
            marks += (Mark("square", "the DPO model itself"),)
        if chart.lines:
            charts.append(dataclasses.replace(chart, lines=chart.lines + points, marks=marks))
    return charts


def _counts(sweeps, names):
    """What a unit's places are filled with: "25", "25 or 40"; nothing where a sweep does not say."""
    texts = []
    for name in names:
        # a sweep before 2026-11-29 has none
        counts = {sweep.get("behaviour_of", {}).get(name) for _, sweep in sweeps} - {None}
        texts.append(" or ".join(f"{count:,}" for count in sorted(counts)))
    return texts


def _dpo_points(sweeps, shown):
    """A square for each value of the DPO model, side by side to the right of the last lambda."""
    points = []
    is_alone = len(sweeps) == 1
    first, last = _lambdas(sweeps)
    for colour, (_, sweep) in enumerate(sweeps):
        for i, (label, key) in enumerate(shown.keys.items()):
            value = sweep["dpo"].get(key)
            if value is None:
                continue
            place = _strip(first, last, 2 + (2 * i if is_alone else colour))
            about = {"dashed": i > 0, "square": True}
            if is_alone and key in shown.intervals:
                low, high = sweep["dpo"][shown.intervals[key]]
                about |= {"low": [low], "high": [high]}
            name = f"DPO model {label}".strip() if is_alone else ""
            points.append(Line(name, colour, [place], [value], **about))
    return points


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
