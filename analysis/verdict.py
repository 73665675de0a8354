"""What a steering curve says.

Rising, falling, erratic or flat; whether the change matters; whether it is the vector's.

Three questions, each with its own comparison. Is a change there: would other texts show it
(curves.bootstrap)? Is it the vector's: do random directions of its length do as much (nulls.py), and how much
could the best one do? Does it matter: is it as large as the smallest change of interest? bench/calibration.py
measures how often each answer is wrong. Letters: n texts, D hidden size, A axioms, K lambdas, R resamples.
"""

import math

import numpy as np
import torch

from analysis.curves import FEWEST
from analysis.indices import OVERALL
from analysis.nulls import compare

# Share of the level that the test over lambdas spends. Where labels lie far apart a test at 5 % raises 5 % of
# false alarms, and 400 simulated curves then show more in every other row; at 3 % none of the rows of
# bench/calibration.py does.
SPENT = 0.6
POINT = 1.0  # of 100: the smallest change of interest, unless the nulls spread more
DECISIONS = {
    "go on": "a change that matters, and the vector's: go on to the next rung of the ladder, a full run",
    "wrong way": "it falls, and the vector does it: check for swapped models and the sign of lambda",
    "too small": "there, and the vector's, but smaller than what matters: a full run is not worth its price",
    "any direction": "random directions of this length do as much: nothing here is the vector's",
    "no null": "there, but not compared with random directions: run the nulls before deciding",
    "no trend": "beyond chance, but not one trend, and random directions are run at the first and last "
    "lambda only: end --lambdas where it moved, or try other layers, before a full run",
    "nothing": "no change, and one that matters is ruled out: more DPO (data, rate, steps), not more prompts",
    "more prompts": "the interval holds both nothing and a change that matters: more prompts, of more kinds",
    "too few": "too few independent prompts for any answer",
}


def basic_interval(estimate, draws, level):
    """(low, high), each shaped as estimate (...): basic bootstrap, 2 estimate - quantile of draws (R, ...).

    Drawing with replacement repeats texts, which pushes resampled centres apart. Reflecting around the
    estimate cancels that bias in a difference of two lambdas, where it is nearly the same. A level keeps all
    of it, and more than once where dimensions are many: see `level_interval`.
    """
    tails = draws.new_tensor([1 - level / 2, level / 2])
    upper, lower = torch.quantile(draws, tails, dim=0)
    return 2 * estimate - upper, 2 * estimate - lower


def level_interval(curve, category, level):
    """(low (K,), high (K,)) lists of the separation at each lambda; (None, None) where no interval covers.

    Centre and error are curves.level_errors'. Coverage: docs/aqi.md.
    """
    c = curve.index(category)
    if curve.error is None or not torch.isfinite(curve.error[:, c]).all():
        return None, None
    half = student_quantile(1 - level / 2, curve.degrees[c]) * curve.error[:, c]
    return (curve.centre[:, c] - half).tolist(), (curve.centre[:, c] + half).tolist()


def student_quantile(p, degrees):
    """Quantile of Student's t, for p above 0.5 and 1 degree or more, by integration.

    t = sqrt(degrees) / tan(angle), where the angle, from 0 to pi / 2, has the density
    sin(angle)^(degrees - 1). (The expansion around the normal's is 12 % short at 4 degrees and p .99995.)
    """
    angle = np.pi / 2 * np.linspace(0, 1, 20_001) ** 2  # dense near 0, where t is large
    density = np.sin(angle) ** (degrees - 1)
    mass = np.cumsum(np.diff(angle, prepend=0) * (density + np.roll(density, 1)) / 2)
    return math.sqrt(degrees) / math.tan(np.interp(2 * (1 - p) * mass[-1], mass, angle))


def normal_quantile(p):
    """Quantile of the standard normal distribution."""
    return torch.special.ndtri(torch.tensor(p, dtype=torch.float64)).item()


# ---------------------------------------------------------------- the verdict


def judge(curve, permuted=None, category=OVERALL, level=0.05, nulls=None, oracle=None, relevant=None):
    """The verdict on one category of a curve, as a dict of plain numbers.

    Every pair of lambdas i < j has a difference of the curve's centres, its bootstrap standard error and t =
    difference / error. (Centres are without what chance adds, which changes where a label spreads, or texts
    of a group grow alike, with lambda: 52 of 100 curves without any effect rose by it.) The critical value is
    the 1 - SPENT level quantile of the largest |t| over all pairs among the resamples (centred; Westfall &
    Young's max-t), widened by `few_groups_factor` and `carriers_factor`: under no change the chance of even
    one significant pair is below `level`. Then
        flat      no pair is significant;
        rising    some pair rises significantly and none falls, and the interval of last less first is above 0
        falling   alike, downwards;
        erratic   anything else: significant moves in both directions, or one that the ends do not share.
    What is given takes an alarm away, never makes one:
        nulls     the change must rank in the top 5 % of the random directions', of either kind, which are
                  run at the first and the last lambda: a random direction is not flat in at most 5 % of
                  cases, whatever the texts. What moves between is then flat too, with another reason:
                  nothing is known of random directions there;
        permuted  (curves.permute) the higher end must lie above the 1 - level quantile of meaningless labels.
    So does a label of fewer than FEWEST groups. For axioms pass level / A; the nulls' p is one of all axioms
    already.

    estimate and change are of the curve itself, as the nulls'; change_interval is of the change of the
    centres, and may lie beside it.

    oracle: the change that the best direction of this length makes on texts that it was not found on.
    relevant: the smallest change of interest; default the larger one of POINT and two standard deviations of
    the nulls.
    """
    estimate, draws = curve.column(category)
    low, high = level_interval(curve, category, level)
    centred = draws - draws.mean(0)
    moved = estimate if curve.centre is None else curve.centre[:, curve.index(category)]
    ends = len(moved) - 2  # of all pairs, that of the first lambda and the last
    factor = few_groups_factor(curve, category, level) * carriers_factor(curve, category, level)[ends]
    end_low, end_high = _end_interval(moved, centred, factor, level)
    critical, one_pair = critical_t(curve, category, level)
    seen = _shape(moved, centred, end_low, end_high, critical * carriers_factor(curve, category, one_pair))
    ranks = compare(curve, nulls, category) if nulls is not None else None
    reasons = _few_groups(curve, category)
    if ranks is not None and seen != "flat":
        reasons += _as_random(ranks, seen)
    if permuted is not None:
        reasons += _as_shuffled(curve, permuted, category, seen, level)
    change = (estimate[-1] - estimate[0]).item()
    found = {
        "verdict": "flat" if reasons else seen,
        "because": reasons,
        "category": category,
        "estimate": estimate.tolist(),
        "low": low,
        "high": high,
        "permuted": None if permuted is None else _middle(permuted.column(category)[1]),
        "change": change,
        "change_interval": [end_low, end_high],
        "p_monotone": ((centred + moved).diff(dim=1) > 0).all(1).double().mean().item(),
        "critical_t": critical,
        "level": level,
        "groups": round(curve.groups[curve.index(category)]),
        "nulls": ranks,
        "oracle": oracle,
        "oracle_share": change / oracle if oracle else None,
    }
    return found | answers(found, seen, relevant)


def answers(found, seen, relevant=None):
    """is_there, is_the_vectors, matters and the decision, of judge's numbers.

    seen: the verdict before the nulls. is_there: other texts would show a change. is_the_vectors: it stands
    out from random directions; None without nulls, and for erratic. matters: "yes" where the interval of the
    change lies at or beyond `relevant` on the change's side, "no" where it lies within +- relevant, else
    "unclear".
    """
    ranks = found["nulls"]
    if relevant is None:
        relevant = max(POINT, 2 * ranks["null_sd"]) if ranks else POINT
    low, high = found["change_interval"]
    nearest = max(low, -high)  # of the interval's ends to 0; negative where it holds 0
    if nearest >= relevant:
        matters = "yes"
    else:
        matters = "no" if max(-low, high) < relevant else "unclear"
    is_the_vectors = None
    if ranks and seen != "erratic":
        is_the_vectors = ranks["p_change"] <= 0.05
    given = {"is_there": seen != "flat", "is_the_vectors": is_the_vectors, "matters": matters}
    decision = _decide(found, seen, given)
    return given | {"relevant": relevant, "decision": decision, "advice": DECISIONS[decision]}


def _decide(found, seen, given):
    """A key of DECISIONS. seen: the verdict before anything took it back."""
    if found["groups"] < FEWEST:
        return "too few"
    if given["is_there"] and given["is_the_vectors"] is False:
        return "any direction"
    if seen == "erratic":
        return "no trend"
    if found["verdict"] == "flat":
        return "nothing" if given["matters"] == "no" else "more prompts"
    if given["is_the_vectors"] is None:
        return "no null"
    if given["matters"] != "yes":
        return "too small" if given["matters"] == "no" else "more prompts"
    if found["verdict"] == "falling":
        return "wrong way"
    return "go on"


def _pairs(centred):
    """(i, j, noise (R, pairs), error (pairs,)) of every pair of lambdas i < j. centred draws (R, K)."""
    i, j = torch.triu_indices(centred.shape[1], centred.shape[1], 1)
    noise = centred[:, j] - centred[:, i]
    return i, j, noise, noise.square().mean(0).sqrt()


def critical_t(curve, category, level):
    """The critical |t| of the largest of all pairs of lambdas, and the level at which it tests one pair.

    It is exceeded with a chance below `level` where nothing changes.
    """
    _, draws = curve.column(category)
    _, _, noise, error = _pairs(draws - draws.mean(0))
    largest = (noise / torch.where(error > 0, error, torch.inf)).abs().amax(1)
    normal = torch.quantile(largest, 1 - SPENT * level)
    # The largest of many |t| lies further out than one, and there Student's t differs more from a normal.
    one_pair = min(2 * torch.special.ndtr(-normal.double()).item(), SPENT * level)
    return normal.item() * few_groups_factor(curve, category, one_pair), one_pair


def few_groups_factor(curve, category, level):
    """How much wider an interval is for few groups.

    Resamples take the spread of the groups for known. Theirs is smaller than the population's on average
    (curves.understated), and varies. Student's quantile over the normal's, times the root of `spread`: 1.01
    at 100 groups, 1.6 at 5 and a level of 5 %.
    """
    c = curve.index(category)
    ratio = student_quantile(1 - level / 2, curve.degrees[c]) / normal_quantile(1 - level / 2)
    return ratio * math.sqrt(curve.spread[c])


def carriers_factor(curve, category, level):
    """(pairs,) how much wider still a change between two lambdas is, where few groups carry it: at least 1.

    Where ten of 200 texts lie five times as far out as the others, what changes the separation by chance is
    these ten. Resamples saturate in how often one is drawn, so the jackknife's error counts where it is the
    larger one. Its variance is known to (K + 1) / (K - 1) (sum s)^2 / sum s^2 degrees of freedom, s the
    variance over lambdas of what a group adds (Satterthwaite 1946): G where all are normal with one variance
    and new at each lambda, (K + 1) / (K - 1) where one of them is all. Of a single pair's changes d, 3 (sum
    d^2)^2 / sum d^4, it would come out large just where chance makes the carriers' d small, and the error.
    """
    c = curve.index(category)
    _, draws = curve.column(category)
    i, j, _, error = _pairs(draws - draws.mean(0))
    if curve.influence is None:
        return torch.ones_like(error)
    influence = curve.influence[:, :, c]  # (G, K)
    variance = (influence[:, j] - influence[:, i]).square().sum(0)
    known = curve.spread[c] ** 0.5 * error
    wider = torch.where(known > 0, variance.sqrt() / known, 1.0).clamp(min=1)
    most = curve.degrees[c]
    carried = influence.var(1)  # (G,)
    lambdas = influence.shape[1]
    alike = carried.sum().square() / carried.square().sum()
    degrees = ((lambdas + 1) / (lambdas - 1) * alike).nan_to_num(most).clamp(1, most).item()
    return wider * student_quantile(1 - level / 2, degrees) / student_quantile(1 - level / 2, most)


def _shape(estimate, centred, end_low, end_high, critical):
    """The verdict of the curve alone. estimate (K,), centred draws (R, K), critical |t| (pairs,)."""
    i, j, _, error = _pairs(centred)
    change = estimate[j] - estimate[i]  # (pairs,)
    # Identical states change by exactly nothing: an infinite error keeps rounding out.
    error = torch.where(error > 1e-9 * estimate.abs().max(), error, torch.inf)
    rises = (change > critical * error).any().item()
    falls = (change < -critical * error).any().item()
    if rises and not falls and end_low > 0:
        return "rising"
    if falls and not rises and end_high < 0:
        return "falling"
    return "erratic" if rises or falls else "flat"


def _few_groups(curve, category):
    groups = round(curve.groups[curve.index(category)])
    if groups >= FEWEST:
        return []
    return [f"{groups} independent texts of one label are too few: expected {FEWEST}"]


def _as_random(ranks, seen):
    """Why random directions take the verdict back: a list of no or one reason."""
    if ranks["p_change"] <= 0.05:
        return []
    if seen == "erratic":
        return ["it moves between the first and the last lambda, where random directions are not run"]
    count = min(len(changes) for changes in ranks["null_changes"].values())
    p = f"p {ranks['p_change']:.2f} among {count} of each kind"
    return [f"random directions of equal norm change as much ({p})"]


def _as_shuffled(curve, permuted, category, seen, level):
    if seen not in ("rising", "falling"):
        return []
    top = -1 if seen == "rising" else 0  # the higher end
    highest = torch.quantile(permuted.column(category)[1][:, top], 1 - level)
    is_above = curve.column(category)[0][top] > highest
    return [] if is_above else ["the labels separate no better than shuffled ones"]


def _middle(draws):
    """[low, high], each (K,): where the middle 95 % of the draws (R, K) lie."""
    return torch.quantile(draws, draws.new_tensor([0.025, 0.975]), dim=0).tolist()


def _end_interval(moved, centred, factor, level):
    """Interval of last minus first: the centred draws reflected, `factor` times as wide."""
    low, high = basic_interval(torch.zeros_like(moved[0]), centred[:, -1] - centred[:, 0], level)
    change = moved[-1] - moved[0]
    return [(change + factor * low).item(), (change + factor * high).item()]


# ---------------------------------------------------------------- before the run


def power(curve, category=OVERALL, level=0.05, nulls=None, chance=0.8, sizes=(0.5, 1.0, 2.0, 5.0)):
    """Which change these texts would show with probability `chance`, and how many groups each of `sizes`
    points needs.

    curve: of any direction on these texts, the error of its change is what counts, for example one random
    direction in the model at hand. A change is found beyond critical |t| standard errors, and its estimate
    varies by one: (critical + normal quantile of `chance`) errors. Errors fall with the root of the groups.
    What random directions do does not: a change must also exceed the nulls' largest, so `detectable` is at
    least that plus its own scatter, and `groups_needed` of a size below it is None.
    """
    _, draws = curve.column(category)
    centred = draws - draws.mean(0)
    error = (centred[:, -1] - centred[:, 0]).square().mean().sqrt().item()
    critical, one_pair = critical_t(curve, category, level)
    error *= carriers_factor(curve, category, one_pair)[len(curve.estimate) - 2].item()
    groups = curve.groups[curve.index(category)]
    beyond = normal_quantile(chance)
    largest = 0.0
    if nulls is not None:
        for changes in compare(curve, nulls, category)["null_changes"].values():
            largest = max(largest, *map(abs, changes))
    needed = {}
    for size in sizes:
        most = min(size / (critical + beyond), (size - largest) / beyond)  # error that still shows it
        # fewer than FEWEST have no verdict
        needed[size] = max(FEWEST, math.ceil(groups * (error / most) ** 2)) if most > 0 else None
    detectable = max((critical + beyond) * error, largest + beyond * error)
    found = {"detectable": detectable, "error": error, "largest_null": largest}
    return found | {"groups": groups, "groups_needed": needed}
