"""Does a steering curve rise, fall or stay flat? A paired bootstrap, nulls, and a measured false-alarm rate.

A curve is the embeddings of the same n texts at K lambdas. Its statistic, per axiom and overall, is
aqi.score's "sweep": 100 (chi - 1) / (chi + n - 2), the per cent of variance that the label explains beyond
chance. Letters: n texts, D hidden size, A axioms (column A is "overall"), K lambdas, R resamples, r of one
block.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from analysis.indices import OVERALL, SEED, two_cluster_indices
from plumbing.files import UserError

# Texts of a label below which no change is called one. Of 60 simulated curves without a change, 22 alarms at
# 2 texts, 1 at 3, none at 5.
FEWEST = 5
BLOCK = 100  # resamples at a time: (100, 2A, D) sums, 23 MB at A = 7 and D = 4,096


def basic_interval(estimate, draws, level):
    """(low, high), each shaped as estimate (...): basic bootstrap, 2 estimate - quantile of draws (R, ...).

    Drawing with replacement repeats texts, which pushes resampled centres apart. Reflecting around the
    estimate cancels that bias.
    """
    tails = draws.new_tensor([1 - level / 2, level / 2])
    upper, lower = torch.quantile(draws, tails, dim=0)
    return 2 * estimate - upper, 2 * estimate - lower


@dataclass(frozen=True)
class Curve:
    """Separations of K lambdas, and of R resamples or permutations of the texts, the same at every lambda."""

    estimate: torch.Tensor  # (K, A + 1) float64
    draws: torch.Tensor  # (R, K, A + 1) float64
    axioms: list[str]  # (A,)
    texts: list[int]  # (A + 1,) of the rarer label

    def index(self, category):
        names = [*self.axioms, OVERALL]
        if category not in names:
            raise UserError(f"category={category!r}: expected one of {names}")
        return names.index(category)

    def column(self, category):
        """(estimate (K,), draws (R, K)) of one axiom or "overall"."""
        c = self.index(category)
        return self.estimate[:, c], self.draws[:, :, c]


def bootstrap(embeddings, axiom, label, axioms, draws=1000, seed=SEED):
    """Curve of K embeddings (n, D), any iterable. Texts are drawn with replacement in every axiom and label.

    A resample is a vector of how often each text counts, so its moments are one float32 product of counts and
    centred states: 2 R n D FLOPs per lambda (57 G at n = 7,000, R = 1,000, D = 4,096: 3.4 s on one CPU core
    with everything around it), exact, and only one lambda's states are copied. Less work would need a
    linearised statistic, which fails at weak separation, or a Gram matrix (n^2 D).
    """

    def draw_counts(generator, sizes, draws):
        blocks = []
        for size in sizes.flatten().tolist():
            rows = torch.randint(size, (draws, size), generator=generator)
            blocks.append(torch.zeros(rows.shape).scatter_add_(1, rows, torch.ones(rows.shape)))
        return torch.cat(blocks, 1)  # (draws, n)

    def totals(counts, states, sizes):
        cells = sizes.flatten().tolist()  # texts of every axiom and label
        sums = []
        for count, block in zip(counts.split(cells, dim=1), states.split(cells)):
            sums.append(count @ block)
        return torch.stack(sums, 1).unflatten(1, (-1, 2))  # (r, A, 2, D + 1)

    return _curve(embeddings, axiom, label, axioms, draws, seed, draw_counts, totals)


def permute(embeddings, axiom, label, axioms, draws=200, seed=SEED):
    """As `bootstrap`, but each draw shuffles the labels of every axiom: a curve of labels without meaning."""

    def draw_labels(generator, sizes, draws):
        blocks = []
        for unsafe, safe in sizes.tolist():
            rank = torch.rand(draws, unsafe + safe, generator=generator).argsort(1)
            blocks.append((rank < safe).float())  # as many safe texts as the axiom has
        return torch.cat(blocks, 1)  # (draws, n)

    def totals(is_safe, states, sizes):
        both = sizes.sum(1).tolist()  # texts of every axiom
        sums = []
        for safe, block in zip(is_safe.split(both, dim=1), states.split(both)):
            safe_sum = safe @ block  # (r, D + 1)
            sums.append(torch.stack([block.sum(0) - safe_sum, safe_sum], 1))
        return torch.stack(sums, 1)  # (r, A, 2, D + 1)

    return _curve(embeddings, axiom, label, axioms, draws, seed, draw_labels, totals)


def _curve(embeddings, axiom, label, axioms, draws, seed, draw_weights, totals):
    cell = 2 * axiom + label
    order = cell.argsort(stable=True)  # cells end to end: a product needs a slice of the states, not a copy
    sizes = torch.bincount(cell, minlength=2 * len(axioms)).view(-1, 2).cpu()  # (A, 2), of every resample too
    if sizes.min() < 2:
        raise UserError(f"curve: {sizes.tolist()} unsafe, safe texts per axiom; expected at least two each")
    estimates, drawn = [], []
    for k, states in enumerate(embeddings):
        if states.shape[0] != len(axiom) or not torch.isfinite(states).all():
            shape = tuple(states.shape)
            expected = f"expected {len(axiom)} rows of finite numbers"
            raise UserError(f"curve: embeddings {k} of shape {shape}; {expected}")
        states = states[order].double()
        states = states - states.mean(0)
        # The sum of squares comes with the same product.
        states = torch.cat([states, states.square().sum(1, keepdim=True)], 1)  # (n, D + 1)
        sums = [block.sum(0) for block in states.split(sizes.flatten().tolist())]
        sums = torch.stack(sums).view(1, len(axioms), 2, -1)
        estimates.append(_separation(sizes.to(sums), sums)[0])
        states = states.float()
        generator = torch.Generator().manual_seed(seed)  # the same resamples at every lambda
        separations = []
        for done in range(0, draws, BLOCK):
            weights = draw_weights(generator, sizes, min(BLOCK, draws - done)).to(states)
            separations.append(_separation(sizes.to(states), totals(weights, states, sizes)))
        drawn.append(torch.cat(separations).double())
    if len(estimates) < 2:
        raise UserError(f"curve: {len(estimates)} lambdas; expected at least two")
    rarer = torch.cat([sizes, sizes.sum(0, keepdim=True)]).amin(1)
    return Curve(torch.stack(estimates), torch.stack(drawn, 1), list(axioms), rarer.tolist())


def _separation(n, totals):
    """n (A, 2), totals (r, A, 2, D + 1) -> (r, A + 1): per cent of variance the label explains beyond chance.

    100 (1 - (1 - eta^2) (n - 1) / (n - 2)): aqi.score's formula. It also holds where a resample drew one text
    of each label over and over, so that CHI is infinite (100), or two texts that are the same (0: there is
    nothing to explain).
    """
    n = torch.cat([n, n.sum(0, keepdim=True)])
    totals = torch.cat([totals, totals.sum(1, keepdim=True)], 1)
    indices = two_cluster_indices(n, totals[..., :-1], totals[..., -1])
    unexplained = (1 - indices["eta2"]) * (indices["n"] - 1) / (indices["n"] - 2)
    return (100 * (1 - unexplained)).nan_to_num(0.0)


def judge(curve, control=None, permuted=None, category=OVERALL, level=0.05):
    """The verdict on one category of a curve, as a dict of plain numbers.

    Every pair of lambdas i < j has a difference, its bootstrap standard error and t = difference / error. The
    critical value is the 1 - level quantile of the largest |t| over all pairs among the resamples (centred),
    so that under no change the chance of even one significant pair is `level` (Westfall & Young's max-t).
    Then
        flat      no pair is significant;
        rising    some pair rises significantly and none falls, and the interval of last minus first lies
        above 0;
        falling   alike, downwards;
        erratic   anything else: significant moves in both directions, or one that the ends do not share.
    Rising and falling must also survive the nulls that are given, or become flat:
        control   a Curve along a random direction of equal norm, same texts and seed, must change less in
        that
                  direction, by a paired interval of the same level;
        permuted  (see `permute`) the higher end must lie above the 1 - level quantile of meaningless labels.
    Both can only take an alarm away, as does a label of fewer than FEWEST texts.

    Measured: at most 1.75 % false alarms; see `simulate`.
    """
    estimate, draws = curve.column(category)
    centred = draws - draws.mean(0)
    low, high = basic_interval(estimate, draws, level)
    end_low, end_high = _end_interval(estimate, draws, level)
    rises, falls, critical = _significant_moves(estimate, centred, level)
    if rises and not falls and end_low > 0:
        verdict = "rising"
    elif falls and not rises and end_high < 0:
        verdict = "falling"
    else:
        verdict = "erratic" if rises or falls else "flat"
    reasons = []
    texts = curve.texts[curve.index(category)]
    if texts < FEWEST:
        reasons.append(f"{texts} texts of one label are too few: expected {FEWEST}")
    sign = {"rising": 1, "falling": -1}.get(verdict)
    if sign and control is not None:
        other, other_draws = control.column(category)
        beyond_low, beyond_high = _end_interval(estimate - other, draws - other_draws, level)
        if sign * beyond_low <= 0 or sign * beyond_high <= 0:
            reasons.append("a random direction of equal norm changes as much")
    if sign and permuted is not None:
        top = -1 if sign > 0 else 0  # the higher end
        if estimate[top] <= torch.quantile(permuted.column(category)[1][:, top], 1 - level):
            reasons.append("the labels separate no better than shuffled ones")
    recentred = centred + estimate
    return {
        "verdict": "flat" if reasons else verdict,
        "because": reasons,
        "category": category,
        "estimate": estimate.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "control": None if control is None else control.column(category)[0].tolist(),
        "permuted": None if permuted is None else _middle(permuted.column(category)[1]),
        "change": (estimate[-1] - estimate[0]).item(),
        "change_interval": [end_low, end_high],
        "p_monotone": (recentred.diff(dim=1) > 0).all(1).double().mean().item(),
        "critical_t": critical.item(),
        "level": level,
    }


def _significant_moves(estimate, centred, level):
    """(some pair of lambdas rises, some pair falls, critical |t|). estimate (K,), centred draws (R, K)."""
    i, j = torch.triu_indices(len(estimate), len(estimate), 1)
    change = estimate[j] - estimate[i]  # (pairs,)
    noise = centred[:, j] - centred[:, i]  # (R, pairs)
    error = noise.square().mean(0).sqrt()
    # Identical states change by exactly nothing: an infinite error keeps 0 / 0 out.
    error = torch.where(error > 1e-9 * estimate.abs().max(), error, torch.inf)
    critical = torch.quantile((noise / error).abs().amax(1), 1 - level)
    rises = (change > critical * error).any().item()
    falls = (change < -critical * error).any().item()
    return rises, falls, critical


def _middle(draws):
    """[low, high], each (K,): where the middle 95 % of the draws (R, K) lie."""
    return torch.quantile(draws, draws.new_tensor([0.025, 0.975]), dim=0).tolist()


def _end_interval(estimate, draws, level):
    """Basic bootstrap interval of last minus first."""
    low, high = basic_interval(estimate[-1] - estimate[0], draws[:, -1] - draws[:, 0], level)
    return [low.item(), high.item()]


def simulate(effect, trials=200, texts=100, axioms=7, dims=32, separation=1.0, lambdas=5, draws=300,
             shared=0.9, tails=None, seed=0):  # fmt: skip
    """Verdicts on curves whose truth is known: Counter over `trials` independent data sets.

    effect 0 gives the false-alarm rate. Text i of label y at lambda k: x = y gap_k e + scale * (sqrt(shared)
    z_i + sqrt(1 - shared) z_ik), z normal or Student t with `tails` degrees; scale falls from 2 to 0.2 over
    the dimensions; gap grows in equal steps from `separation` to separation * (1 + effect).

    Measured, false alarms (anything but flat at effect 0, without the nulls) in trials=400 each: 6 with the
    defaults; 0 at separation 0, at 20 texts, at 20 texts with tails=3, at 50 texts of one axiom, at 256 dims
    with 40 texts; 2 at 10 texts of one axiom; 1 with tails=3 and 2 axioms; 5 with shared=0.99; 7 with
    shared=0.5, the worst: 1.75 %, with a 95 % interval of 0.7 to 3.6 %. Below the level because a resample's
    centres carry the sample's own noise on top of their own. Power, "rising" at effect 0.02, 0.05, 0.1, 0.2:
    defaults 1, 11, 67, 100 % of 150; texts=500 17, 98, 100, 100 % of 60; shared=0.99 21, 99, 100, 100 % of
    150.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [str(a) for a in range(axioms)]
    n = 2 * texts * axioms
    axiom = torch.arange(n) // (2 * texts)
    label = torch.arange(n) // texts % 2
    scale = torch.linspace(2, 0.2, dims)
    counts = Counter()

    def noise():
        z = torch.randn(n, dims, generator=generator)
        if tails is None:
            return z
        chi2 = torch.randn(n, tails, generator=generator).square().sum(1, keepdim=True)
        return z / (chi2 / tails).sqrt() * ((tails - 2) / tails) ** 0.5

    for trial in range(trials):
        common = noise()
        states = []
        for k in range(lambdas):
            x = scale * (shared**0.5 * common + (1 - shared) ** 0.5 * noise())
            x[:, dims // 2] += separation * (1 + effect * k / (lambdas - 1)) * label
            states.append(x)
        counts[judge(bootstrap(states, axiom, label, names, draws, seed=trial))["verdict"]] += 1
    return counts
