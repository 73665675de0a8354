"""How often the tool is wrong on data whose truth is known: `python bench/calibration.py` (no GPU).

One table in four parts, as docs/aqi.md keeps it: false alarms (anything but flat, where nothing changes)
without and with groups of texts; of random directions of toy networks against 19 others of each kind; power
for planted changes; coverage of the intervals of single points. Exit 1 if a row of false alarms is above 5 %
by more than chance. Rows run in as many processes as there are cores. bench/real_directions.py adds the rows
of real weights.
"""

import argparse
import itertools
import math
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.curves import Curve, Design, bootstrap, cell_sums, level_errors, separation
from analysis.nulls import Nulls, isotropic_directions, sign_flipped_directions
from analysis.sweep import coordinate_scale
from analysis.verdict import judge, level_interval, power
from plumbing.files import progress_bar

ALONE = {
    "defaults: 100 texts a label, 7 axioms, 32 dimensions": {},
    "separation 0": {"points": 0.0},
    "separation 20": {"points": 20.0},
    "20 texts": {"texts": 20},
    "20 texts, t3 tails": {"texts": 20, "tails": 3},
    "10 texts, 1 axiom": {"texts": 10, "axioms": 1},
    "50 texts, 1 axiom": {"texts": 50, "axioms": 1},
    "40 texts, 256 dimensions": {"texts": 40, "dims": 256},
    "t3 tails, 2 axioms": {"tails": 3, "axioms": 2},
    "lambdas nearly the same text noise (.99)": {"shared": 0.99},
    "half of the noise new at each lambda": {"shared": 0.5},
    "9 of 10 texts safe": {"safe": 0.9},
    "low rank (3 directions)": {"rank": 3.0},
    "3 of 10 labels wrong": {"wrong": 0.3},
    "9 lambdas": {"lambdas": 9},
    "separation 20, 1 axiom": {"points": 20.0, "axioms": 1},
    "the same, 1 of 100 texts ten times as far out": {"points": 20.0, "axioms": 1, "far": (0.01, 0.01)},
    "the same, 5 of 100": {"points": 20.0, "axioms": 1, "far": (0.05, 0.05)},
    "the same, 5 of 100 safe ones": {"points": 20.0, "axioms": 1, "far": (0.0, 0.05)},
    "the same, 2 of 100, half of the noise new": {
        "points": 20.0,
        "axioms": 1,
        "far": (0.02, 0.02),
        "shared": 0.5,
    },
    "21 lambdas, separation 20": {"lambdas": 21, "axioms": 1, "points": 20.0},
    "5 texts, separation 80": {"texts": 5, "axioms": 1, "points": 80.0},
    "safe, 1 of 10, grows 3 times as wide, 576 dimensions": {
        "axioms": 1,
        "dims": 576,
        "points": 0.0,
        "safe": 0.1,
        "wide": 3.0,
    },
    "in units of the first lambda, half of the noise new, 20 texts, 576 dimensions, separation 20": {
        "texts": 20,
        "axioms": 1,
        "dims": 576,
        "points": 20.0,
        "shared": 0.5,
        "scaled": True,
    },
    "the same, 5 texts, 256 dimensions, separation 50": {
        "texts": 5,
        "axioms": 1,
        "dims": 256,
        "points": 50.0,
        "shared": 0.5,
        "scaled": True,
    },
    "in units of the first lambda, apart along another coordinate at each": {
        "axioms": 1,
        "points": 20.0,
        "turns": True,
        "scaled": True,
    },
}
GROUPED = {
    "every text five times, nearly": {"templates": 20, "alike": 0.98},
    "5 templates a label, 1 axiom": {"templates": 5, "axioms": 1},
    "10 templates a label, 1 axiom": {"templates": 10, "axioms": 1},
    "20 templates a label, 1 axiom": {"templates": 20, "axioms": 1},
    "5 templates a label and axiom": {"templates": 5},
    "10 templates a label and axiom": {"templates": 10},
    "20 templates a label and axiom": {"templates": 20},
    "12 templates a label, 500 texts, 1 axiom": {"templates": 12, "texts": 500, "axioms": 1},
    "12 templates a label over 4 axioms, 500 texts": {
        "templates": 12,
        "texts": 500,
        "axioms": 4,
        "spans": True,
    },  # fmt: skip
    "6 templates of both labels, separation 80, 9 lambdas": {
        "texts": 42,
        "templates": 6,
        "axioms": 1,
        "points": 80.0,
        "lambdas": 9,
        "paired": True,
    },
    "10 templates of both labels, separation 80, 576 dimensions": {
        "texts": 50,
        "templates": 10,
        "axioms": 1,
        "dims": 576,
        "points": 80.0,
        "paired": True,
    },
    "10 templates of unequal size, 1 axiom": {"templates": 10, "axioms": 1, "unequal": True},
    "2 templates a label and axiom": {"templates": 2},
    "10 templates a label, 1 axiom, separation 20": {"templates": 10, "axioms": 1, "points": 20.0},
    "1 of 20 templates has a third of a label, separation 20": {
        "templates": 20,
        "axioms": 1,
        "points": 20.0,
        "largest": 1 / 3,
    },
    "10 templates, texts of one grow alike (0 to .9), 576 dimensions": {
        "templates": 10,
        "axioms": 1,
        "dims": 576,
        "alike": 0.0,
        "alike_last": 0.9,
    },
}
TEXT_SETTINGS = ("texts", "axioms", "safe", "templates", "spans", "paired", "unequal", "largest")
PLANTED = list(itertools.product((0.5, 1.0, 2.0, 5.0), (50, 100, 500)))  # points, texts
FAR = 10.0
# texts, dimensions, separation
LEVELS = list(itertools.product((500, 100, 20, 10), (4096, 576, 32), (0.0, 2.0, 20.0)))


# ---------------------------------------------------------------- data whose truth is known


def gap_of(points, scale, safe=0.5):
    """Distance of the labels' centres at which the label explains `points` per cent of the variance."""
    share = points / 100
    return math.sqrt(share / (1 - share) * scale.square().sum().item() / (safe * (1 - safe)))


def spectrum(dims, rank=None):
    """(D,) standard deviations: 2 to 0.2 in equal steps, or falling by e every `rank` dimensions."""
    if rank is None:
        return torch.linspace(2, 0.2, dims)
    return 2 * torch.exp(-torch.arange(dims) / rank)


def draw(generator, rows, dims, tails=None):
    """(rows, D) standard normal, or Student t with `tails` degrees and variance 1, one radius a row."""
    z = torch.randn(rows, dims, generator=generator)
    if tails is None:
        return z
    chi2 = torch.randn(rows, tails, generator=generator).square().sum(1, keepdim=True)
    return z / (chi2 / tails).sqrt() * ((tails - 2) / tails) ** 0.5


def texts_of(generator, texts=100, axioms=7, safe=0.5, templates=None, spans=False, paired=False,
             unequal=False, largest=None):  # fmt: skip
    """axiom, label and group (n,) of 2 * texts texts an axiom; group None where each stands alone.

    spans: a template has texts of all axioms; paired: of both labels. largest: share of the texts that the
    first template has.
    """
    n = 2 * texts * axioms
    axiom = torch.arange(n) // (2 * texts)
    label = (torch.arange(n) % (2 * texts) >= round(2 * texts * (1 - safe))).long()
    if templates is None:
        return axiom, label, None
    if unequal:  # sizes fall like 1 / number
        weights = 1 / torch.arange(1, templates + 1)
        template = torch.multinomial(weights, n, replacement=True, generator=generator)
    else:
        template = torch.arange(n) % templates
    if largest is not None:
        template = torch.where(torch.rand(n, generator=generator) < largest, 0, template)
    cell = 2 * axiom + label
    if spans:
        cell = label
    elif paired:
        cell = axiom
    return axiom, label, cell * templates + template


def paths(generator, axiom, label, group, dims=32, points=2.0, change=0.0, lambdas=5, shared=0.9, tails=None,
          rank=None, alike=0.9, alike_last=None, wrong=0.0, safe=0.5, wide=1.0, far=(0.0, 0.0),
          turns=False):  # fmt: skip
    """Yield states (n, D) at every lambda.

    The label explains `points` per cent at first, `change` more at last. Text i of label y at lambda k is y
    gap_k e + scale (sqrt(shared) z_i + sqrt(1 - shared) z_ik). In a group, z is sqrt(alike) of the group's
    and sqrt(1 - alike) of the text's; alike_last: alike at the last lambda. wrong: share of texts whose label
    is drawn anew. wide: how many times as wide as at first the safe texts are at last. far: the shares of
    the unsafe and of the safe texts that lie FAR times as far out as the others. turns: the labels lie apart
    along another coordinate at each lambda, by as many of its deviations.
    """
    scale = spectrum(dims, rank)
    alike_last = alike if alike_last is None else alike_last

    def noise():
        """Of each text, and of its group."""
        z = draw(generator, len(axiom), dims, tails)
        if group is None:
            return z, torch.zeros_like(z)
        return z, draw(generator, int(group.max()) + 1, dims, tails)[group]

    is_wrong = torch.rand(len(label), generator=generator) < wrong
    truth = torch.where(is_wrong, torch.randint(2, label.shape, generator=generator), label)
    radius = torch.ones(len(label))
    radius[torch.rand(len(label), generator=generator) < torch.tensor(far)[label]] = FAR
    own, common = noise()
    for k in range(lambdas):
        part = k / max(lambdas - 1, 1)
        likeness = 0.0 if group is None else alike + part * (alike_last - alike)
        width = 1 + part * (wide - 1)
        z, z_group = own, common
        if shared < 1:
            new_own, new_common = noise()
            z = shared**0.5 * own + (1 - shared) ** 0.5 * new_own
            z_group = shared**0.5 * common + (1 - shared) ** 0.5 * new_common
        x = scale * (likeness**0.5 * z_group + (1 - likeness) ** 0.5 * z)
        x *= (radius * torch.where(label == 1, width, 1.0))[:, None]
        unsafe, safe_ones = far
        variance = (1 - safe) * (1 + unsafe * (FAR**2 - 1))
        variance += safe * width**2 * (1 + safe_ones * (FAR**2 - 1))
        along = dims // 2 + (k if turns else 0)
        gap = gap_of(points + change * part, variance**0.5 * scale, safe)
        x[:, along] += gap * scale[along] / scale[dims // 2] * truth
        yield x


def simulate(settings, trials, draws=300, seed=0):
    """(Counter of the whole's verdicts, trials in which any axiom is not flat, or the change is covered).

    Without nulls: they could only turn an alarm into "flat". settings: of texts_of and paths, and `scaled`:
    in units of the first lambda's deviations, as steer.py measures.
    """
    generator = torch.Generator().manual_seed(seed)
    of_texts = {key: value for key, value in settings.items() if key in TEXT_SETTINGS}
    of_paths = {key: value for key, value in settings.items() if key not in of_texts or key == "safe"}
    is_scaled = of_paths.pop("scaled", False)
    whole, axioms_alarmed, covered = Counter(), 0, 0
    for trial in range(trials):
        axiom, label, group = texts_of(generator, **of_texts)
        names = list(map(str, range(int(axiom.max()) + 1)))
        states, scaled_by = paths(generator, axiom, label, group, **of_paths), None
        if is_scaled:
            states = list(states)
            scale = coordinate_scale(states[0], label)
            states = [x / scale for x in states]
            scaled_by = states[0]
        curve = bootstrap(states, axiom, label, names, draws, seed=trial, group=group, scaled_by=scaled_by)
        found = judge(curve)
        whole[found["verdict"]] += 1
        axioms_alarmed += any_axiom(curve)
        low, high = found["change_interval"]
        covered += low <= settings.get("change", 0.0) <= high
    return whole, axioms_alarmed, covered


def any_axiom(curve, nulls=None):
    """Whether any axiom is not flat, at 5 % over all axioms."""
    level = 0.05 / len(curve.axioms)
    verdicts = [judge(curve, category=name, level=level, nulls=nulls)["verdict"] for name in curve.axioms]
    return set(verdicts) != {"flat"}


# ---------------------------------------------------------------- random directions of toy networks


def toy_network(generator, dims):
    """Two residual blocks with random weights, states (n, D) -> (n, D).

    What a direction does depends on them.
    """
    weights = []
    for _ in range(2):
        up = torch.randn(dims, 4 * dims, generator=generator) / dims**0.5
        down = torch.randn(4 * dims, dims, generator=generator) / (4 * dims) ** 0.5
        weights.append((up, down))

    def forward(x):
        for up, down in weights:
            normed = x / x.square().mean(1, keepdim=True).sqrt()
            x = x + 2 * torch.nn.functional.gelu(normed @ up) @ down
        return x

    return forward


def random_directions(trials, others=19, texts=100, axioms=3, dims=32, length=6.0, draws=300, seed=0):
    """{kind: as `simulate`, of one random direction of that kind in a toy network}.

    It stands against `others` of each kind, which are run at the ends, as in a sweep; and how often it is not
    flat without the nulls. New texts, network and directions in every trial.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = {kind: [Counter(), 0, 0] for kind in ("isotropic", "sign-flipped")}
    for trial in range(trials):
        axiom, label, _ = texts_of(generator, texts, axioms)
        names = list(map(str, range(axioms)))
        x = spectrum(dims) * draw(generator, len(axiom), dims)
        x[:, dims // 2] += gap_of(10.0, spectrum(dims)) * label
        network = toy_network(generator, dims)
        addition = {0: torch.full((dims,), length / dims**0.5)}
        differences = {0: spectrum(dims) * draw(generator, 200, dims)}
        directions = {
            "isotropic": isotropic_directions(addition, others + 1, seed=2 * trial)[0],
            "sign-flipped": sign_flipped_directions(differences, addition, others + 1, seed=2 * trial + 1)[0],
        }
        design = Design(axiom, label, names)
        unsteered = network(x)

        def estimate(states, design=design):
            return torch.stack([separation(*cell_sums(design.centred(s), design))[0] for s in states])

        first, curves = estimate([unsteered]), {}
        for name, chosen in directions.items():
            of_each = [torch.cat([first, estimate([network(x + direction)])]) for direction in chosen[1:]]
            curves[name] = torch.stack(of_each)
        nulls = Nulls(curves)
        for kind, found in counts.items():
            direction = directions[kind][0]
            states = [unsteered, network(x + 0.5 * direction), network(x + direction)]
            curve = bootstrap(states, axiom, label, names, draws, seed=trial)
            found[0][judge(curve, nulls=nulls)["verdict"]] += 1
            found[1] += any_axiom(curve, nulls)
            found[2] += judge(curve)["verdict"] != "flat"
    return counts


# ---------------------------------------------------------------- levels


def coverage(n, dims, points, trials, tails=None, templates=None, seed=0):
    """(share of 95 % intervals that hold the truth, share of samples that get an interval, mean width).

    n texts a label, one axiom.
    """
    generator = torch.Generator().manual_seed(seed)
    held, widths = [], []
    for _ in range(trials):
        axiom, label, group = texts_of(generator, n, 1, templates=templates)
        (states,) = paths(generator, axiom, label, group, dims, points, lambdas=1, shared=1.0, tails=tails)
        design = Design(axiom, label, ["a"], group)
        centre, error, _ = level_errors(design.centred(states), design)
        none = torch.empty(0, 1, 2)
        curve = Curve(centre[None], none, ["a"], *design.worth(), centre[None], error[None])
        low, high = level_interval(curve, "a", 0.05)
        if low is not None:
            held.append(low[0] <= points <= high[0])
            widths.append(high[0] - low[0])
    given = len(held) / trials
    return (sum(held) / len(held), given, sum(widths) / len(widths)) if held else (None, 0.0, None)


# ---------------------------------------------------------------- the table


def per_cent(count, trials):
    return f"{100 * count / trials:.1f}"


def alarm_row(name, trials, whole, axioms_alarmed, covered=None):
    """(cells, alarms of the whole, of any axiom)."""
    alarms = trials - whole["flat"]
    kinds = [per_cent(whole[verdict], trials) for verdict in ("rising", "falling", "erratic")]
    cells = [name, per_cent(alarms, trials), *kinds, per_cent(axioms_alarmed, trials)]
    return [*cells, "" if covered is None else per_cent(covered, trials)], alarms, axioms_alarmed


def power_row(planted, trials):
    """Share of "rising" for a planted change, beside the change that `power` says is found with 80 %.

    And the share of "falling" where the change is turned round.
    """
    size, texts = planted
    whole, _, covered = simulate({"texts": texts, "axioms": 1, "change": size}, trials)
    mirror = {"texts": texts, "axioms": 1, "points": 2.0 + size, "change": -size}
    fallen, _, _ = simulate(mirror, trials)
    axiom, label, _ = texts_of(None, texts, 1)
    states = paths(torch.Generator().manual_seed(1), axiom, label, None)
    found = power(bootstrap(states, axiom, label, ["a"], 300))
    name = f"{size:g} points, {texts} texts a label"
    shares = [per_cent(count, trials) for count in (whole["rising"], fallen["falling"], covered)]
    return [name, *shares, f"{found['detectable']:.2f}"]


def coverage_row(setting, trials):
    """Coverage of level_interval, one axiom."""
    n, dims, points, more = setting
    name = f"{n} texts a label, {dims:,} dimensions, separation {points:g}"
    name += "".join(f", {key} {value}" for key, value in more.items())
    held, given, width = coverage(n, dims, points, trials, **more)
    if held is None:
        return [name, "", "0", ""]
    return [name, f"{100 * held:.1f}", f"{100 * given:.0f}", f"{width:.2f}"]


def print_rows(head, found, count):
    """A table in markdown of `found`, so many rows that are being computed; and the rows."""
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    rows = []
    for row in progress_bar(found, total=count, desc=head[0], unit="row"):
        cells = row[0] if isinstance(row, tuple) else row
        print(f"| {' | '.join(cells)} |", flush=True)
        rows.append(row)
    return rows


def alarm_item(trials, item):
    """A row of false alarms; item: a name with its settings, or a kind of random direction."""
    name, settings = item
    if settings is not None:
        return alarm_row(name, trials, *simulate(settings, trials))
    whole, axioms_alarmed, bare = random_directions(trials)[name]
    label = f"a random direction of a toy network, {name}, 19 nulls of each kind"
    return alarm_row(f"{label}, without nulls {per_cent(bare, trials)} %", trials, whole, axioms_alarmed)


def one_thread():
    torch.set_num_threads(1)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=400, help="data sets of each row")
    trials = parser.parse_args(argv).trials
    levels = [setting + ({},) for setting in LEVELS]
    for templates in (5, 10, 20):
        levels += [(100, 576, points, {"templates": templates}) for points in (0.0, 20.0)]
    for dims in (32, 576):
        levels += [(n, dims, 20.0, {"tails": 3}) for n in (10, 20, 100, 500)]
    alarms = [*ALONE.items(), *GROUPED.items(), ("isotropic", None), ("sign-flipped", None)]
    fewer = max(1, trials * 3 // 8)
    with ProcessPoolExecutor(initializer=one_thread) as pool:
        # All rows at once, the longest first: no core waits for the end of a table.
        covered = pool.map(partial(coverage_row, trials=trials), levels)
        alarmed = pool.map(partial(alarm_item, trials), alarms)
        powers = pool.map(partial(power_row, trials=fewer), PLANTED)
        kinds = ("not flat, %", "rising", "falling", "erratic", "any axiom, %", "change covered, %")
        rows = print_rows((f"nothing changes, {trials} trials", *kinds), alarmed, len(alarms))
        first = f"planted change, 1 axiom, from 2 points, {fewer} trials"
        head = (first, "rising, %", "falling, turned round", "change covered, %", "found with 80 %, points")
        print_rows(head, powers, len(PLANTED))
        head = (f"interval of one point, {trials} trials", "covers, %", "given, %", "mean width")
        print_rows(head, covered, len(levels))
    limit = 0.05 * trials + 2 * math.sqrt(0.05 * 0.95 * trials)  # two standard errors above a true 5 %
    return int(any(max(whole, axioms) > limit for _, whole, axioms in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
