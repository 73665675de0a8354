"""A sweep in words and tables.

The terminal's summary, all tables of a sweep, several pairs beside each other.

`report` is what a sweep's aqi.json holds.
"""

import statistics

from plumbing.files import table

OVERALL = "overall"  # as analysis.indices, without torch: a laptop shows a report
# {key of a sweep's "baselines": what it is of}
BASELINES = {
    "model": "this model",
    "untrained": "untrained network",
    "words": "words",
    "length": "length",
    "shuffled": "shuffled labels",
}


# Decisions whose advice is the reason why a curve is called flat.
SAYS_WHY = ("any direction", "too few")


def words(verdict):
    """The verdict, with the reason why a curve is called flat where the decision does not say it."""
    if not verdict["because"] or verdict["decision"] in SAYS_WHY:
        return verdict["verdict"]
    return f"{verdict['verdict']} ({'; '.join(verdict['because'])})"


def numbers(report):
    """What the verdict rests on, in sentences."""
    overall = report["verdicts"][0]
    lambdas, ranks = report["inputs"]["lambdas"], overall["nulls"]
    low, high = map(two_digits, overall["change_interval"])
    said = f"From lambda {lambdas[0]:g} to {lambdas[-1]:g} the separation changes by "
    said += f"{two_digits(overall['change'])} of 100, 95 % interval [{low}, {high}]; a change matters from "
    said += f"{overall['relevant']:.2g} on. That is {two_digits(ranks['size_sd'])} sd of "
    said += f"{_per_kind(ranks)} random directions of each of two kinds, p {ranks['p_change']:.2f}"
    return f"{said}{_beside_oracle(report)}. {_texts(report['texts'])}."


def summary(report):
    """The verdict and what it rests on, in at most 20 lines."""
    overall, *axioms = report["verdicts"]
    lines = [
        "",
        _texts(report["texts"]),
        _by_lambda(report),
        behaviour_counts(report),
        "",
        f"{_change(overall)}{_beside_oracle(report)}",
        _baseline_line(report),
    ]
    moved = [f"{found['category']} {found['verdict']}" for found in axioms if found["verdict"] != "flat"]
    more = ", .." if len(moved) > 6 else ""
    lines.append(f"axioms that are not flat: {', '.join(moved[:6]) or 'none'}{more}")
    notes = report["notes"] + report["warnings"]
    lines += [f"note: {note}" for note in notes[:4]]
    if len(notes) > 4:
        lines.append(f"note: {len(notes) - 4} more in tables.txt")
    lines.append(f"verdict: {words(overall)}")
    lines.append(f"-> {overall['decision']}: {overall['advice']}")
    return "\n".join(lines)


def _change(overall):
    low, high = overall["change_interval"]
    ranks = overall["nulls"]
    change = f"{two_digits(overall['change'])} of 100 [{two_digits(low)}, {two_digits(high)}]"
    size = f"{two_digits(ranks['size_sd'])} sd of {_per_kind(ranks)} random directions of each kind"
    return f"change of the separation: {change}; {size}, p {ranks['p_change']:.2f}"


def _per_kind(ranks):
    return len(next(iter(ranks["null_changes"].values())))


def _texts(texts):
    groups = f"{texts['groups']:,} groups ({texts['grouped_by']}), worth {texts['effective']:,.0f}"
    return f"{texts['texts']:,} texts in {groups}"


def _beside_oracle(report):
    if "oracle" not in report:
        return ""
    best = two_digits(report["oracle"]["change"])
    share = report["verdicts"][0]["oracle_share"]
    made = "none" if share is None else f"{share:.0%}"
    return f"; {made} of what the best direction of this length does ({best}, on texts it was not found on)"


def two_digits(value):
    """A signed number with two significant digits, also where it is 0.0033."""
    if value is None:
        return "none"
    return f"{value:+.2g}" if abs(value) < 10 else f"{value:+.0f}"


def _by_lambda(report):
    """A row for each lambda, and one for the DPO model."""
    overall = report["verdicts"][0]
    head = ["lambda", "separation", "95 % interval", "AUC", "shift", "prefers chosen", "KL sft", "KL dpo",
            "refuses unsafe", "safe", "logp chosen", "repeats"]  # fmt: skip
    rows = []
    for k, (shift, entry) in enumerate(zip(report["shifts"], report["behaviour"], strict=True)):
        interval = "none covers"
        if overall["low"]:
            interval = f"[{overall['low'][k]:.2f}, {overall['high'][k]:.2f}]"
        rows.append(
            [
                f"{shift['lambda']:g}",
                f"{overall['estimate'][k]:.2f}",
                interval,
                *_behaviour_cells(entry, shift["achieved"]),
            ]
        )
    dpo = report["dpo"]
    rows.append(["DPO", f"{dpo['separation'][OVERALL]:.2f}", "", *_behaviour_cells(dpo, 1.0)])
    return table(head, rows)


def behaviour_counts(report):
    """What the shares and means of the columns of behaviour are of, in words."""
    counts = report.get("behaviour_of")
    if counts is None:
        return "behaviour: a sweep before 2026-11-29, whose numbers of pairs and prompts are not known"
    asked = f"refusals of {counts['unsafe']:,} unsafe and {counts['safe']:,} safe prompts"
    texts = f"KL of {counts['kl_texts']} texts, repeats of {counts['continued']} continuations"
    return f"behaviour of {counts['pairs']:,} held-out pairs; {asked}; {texts}"


def _behaviour_cells(entry, shift):
    cells = [_number(entry["auc"]), _number(shift), _number(entry["preference_accuracy"])]
    for key in ("kl_from_sft", "kl_to_dpo"):
        cells.append(_number(entry.get(key), 3))
    cells += [
        _number(entry["refused_unsafe"]),
        _number(entry["refused_safe"]),
        _number(entry["logp_chosen"], 3),
    ]
    return [*cells, _number(entry.get("repeated_4grams"))]


def _number(value, decimals=2):
    return "" if value is None else f"{value:.{decimals}f}"


def _baseline_line(report):
    parts = []
    for name, text in BASELINES.items():
        found = report["baselines"][name]
        area = "none" if found["auc"] is None else f"{found['auc']:.2f}"
        # none: texts that do not differ at all, as lengths may
        parts.append(f"{text} {_number(found['separation']) or 'none'}, {area}")
    return f"separation, AUC without steering: {'; '.join(parts)}"


def tables(report, indices):
    """Every table of a sweep, as text. indices: aqi.table of its rows."""
    rows = [row for row in report["rows"] if row["category"] == OVERALL]
    lines = [summary(report), "", indices]
    if report["inputs"]["seeds"] > 1:
        for strength in report["inputs"]["lambdas"]:
            scores = [row["aqi"] for row in rows if row["lambda"] == strength]
            spread = f"sd {statistics.stdev(scores):.2f} over {len(scores)} seeds"
            lines.append(f"lambda {strength:g}: AQI {statistics.fmean(scores):.2f}, {spread}")
    lines += [f"note: {note}" for note in report["notes"] + report["warnings"]]
    lines += ["", *_effect_lines(report), *_profile_lines(report["profile"]), ""]
    verdicts = []
    for found in report["verdicts"]:
        low, high = found["change_interval"]
        interval = f"[{two_digits(low)}, {two_digits(high)}]"
        verdicts.append(
            [
                found["category"],
                found["verdict"],
                two_digits(found["change"]),
                interval,
                f"{found['nulls']['p_change']:.2f}",
                two_digits(found["nulls"]["size_sd"]),
                f"{found['p_monotone']:.2f}",
                str(found["groups"]),
                found["decision"],
                "; ".join(found["because"]),
            ]
        )
    head = [
        "axiom",
        "verdict",
        "change",
        "interval",
        "p",
        "sd",
        "P(monotone)",
        "groups of rarer label",
        "decision",
        "because",
    ]
    lines.append(table(head, verdicts, left=(0, 1, -2, -1)))
    return "\n".join(lines) + "\n"


def _effect_lines(report):
    """Shift beside v, strength, log-probs of rejected texts; errors of the three injections."""
    rows = []
    for shift, entry in zip(report["shifts"], report["behaviour"], strict=True):
        strength = max(shift["strength"].values())
        rows.append(
            [
                f"{shift['lambda']:g}",
                f"{shift['off_axis']:.3f}",
                f"{strength:.3f}",
                f"{entry['logp_rejected']:.4f}",
            ]
        )
    lines = [table(["lambda", "off axis", "|a|/|h|", "logp rejected"], rows)]
    if report["errors"]:
        lines.append(
            "relative error of the last layer's mean state at lambda 1, on the vector's texts / on "
            "held-out ones:"
        )
    for injection, error in report["errors"].items():
        lines.append(f"  {injection:<12}{error['calibration']:.4f} / {error['held_out']:.4f}")
    return lines


def _profile_lines(profile):
    """The raw separation after each block: a line for lambda 0 and one for the last lambda."""
    values = {}
    for row in profile:
        if row["category"] == OVERALL:
            # keyed by layer, because both ends are one lambda where the last is 0
            values.setdefault(row["lambda"], {})[row["layer"]] = f"{row['separation']:.2f}"
    lines = []
    for strength, by_layer in values.items():
        lines.append(f"raw separation after each block, lambda {strength:g}: {' '.join(by_layer.values())}")
    return lines


def comparison(reports, lambdas):
    """Several sweeps as a table, a line per pair: the separation is one absolute scale for all."""
    lines = []
    for name, report in reports.items():
        found = report["verdicts"][0]
        low, high = found["change_interval"]
        values = [f"{x:.2f}" for x in found["estimate"]]
        change = f"{two_digits(found['change'])} [{two_digits(low)}, {two_digits(high)}]"
        p = f"{found['nulls']['p_change']:.2f}"
        lines.append([name, *values, change, p, found["verdict"], found["decision"]])
    head = [
        "pair",
        *[f"lambda {x:g}" for x in lambdas],
        "change and 95 % interval",
        "p",
        "verdict",
        "decision",
    ]
    return f"\nseparation\n{table(head, lines, left=(0, -2, -1))}"


def power(found, texts, config):
    """What verdict.power found, in words."""
    where = f"{config.size:g} |h| at the last {config.layers} layers"
    error = (
        f"standard error of a change {found['error']:.2g} points, largest change {found['largest_null']:.2g}"
    )
    lines = [
        _texts(texts),
        f"random directions of {where}: {error}",
        f"a change of {found['detectable']:.2g} points is found in 80 % of runs",
    ]
    for size, groups in found["groups_needed"].items():
        needed = "never: random directions change as much"
        if groups is not None:
            needed = f"{groups:,} groups of a label"
        lines.append(f"  to find {size:g} points: {needed}")
    return "\n".join(lines)
