"""Does a steering curve rise, fall or stay flat? A paired bootstrap over texts, nulls, and a verdict with a known false-alarm rate.

A curve is the embeddings of the same n texts at K lambdas. Its statistic at each of them, per axiom and overall, is aqi.score's "sweep":
100 (chi - 1) / (chi + n - 2), the per cent of variance that the label explains beyond chance.
Letters: n texts, D hidden size, A axioms (column A is "overall"), K lambdas, R resamples, r of one block.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from analysis.indices import OVERALL, SEED, two_cluster_indices
from plumbing.files import UserError

FEWEST = 5  # texts of a label; with fewer no change is called one: of 60 simulated curves without any, 22 alarms at 2, 1 at 3, 0 at 5
BLOCK = 100  # resamples at a time: (100, 2A, D) sums, 23 MB at A = 7 and D = 4,096


def basic_interval(estimate, draws, level):
    """(low, high), each shaped as estimate (...): the basic bootstrap's 2 estimate - quantile of draws (R, ...).

    Not the quantiles themselves: a resample holds texts twice, so its centres lie further apart, by as much again as chance had
    pushed the sample's own. The reflection takes that shift out.
    """
    upper, lower = torch.quantile(draws, draws.new_tensor([1 - level / 2, level / 2]), dim=0)
    return 2 * estimate - upper, 2 * estimate - lower


@dataclass(frozen=True)
class Curve:
    """Separations of K lambdas, and of each of R resamples or permutations of the texts, the same ones at every lambda."""

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
    """Curve of K embeddings (n, D), any iterable; each resample draws texts with replacement inside every axiom and label.

    A resample is a vector of how often each text counts, so its moments are one float32 product of counts and centred states:
    2 R n D FLOPs per lambda (57 G at n = 7,000, R = 1,000, D = 4,096: 3.4 s on one CPU core with everything around it), exact, and only one
    lambda's states are copied. Less work would need a linearised statistic, which fails at weak separation, or a Gram matrix (n^2 D).
    """

    def counts(generator, sizes, draws):
        drawn = [torch.randint(size, (draws, size), generator=generator) for size in sizes.flatten().tolist()]
        return torch.cat([torch.zeros(rows.shape).scatter_add_(1, rows, torch.ones(rows.shape)) for rows in drawn], 1)

    def totals(weights, states, sizes):
        sums = [w @ x for w, x in zip(weights.split(sizes.flatten().tolist(), 1), states.split(sizes.flatten().tolist()))]
        return torch.stack(sums, 1).unflatten(1, (-1, 2))  # (r, A, 2, D + 1)

    return _curve(embeddings, axiom, label, axioms, draws, seed, counts, totals)


def permute(embeddings, axiom, label, axioms, draws=200, seed=SEED):
    """As `bootstrap`, but each draw shuffles the labels inside every axiom: what the curve would be if safe and unsafe meant nothing."""

    def shuffled(generator, sizes, draws):
        """1 where a text is called safe: as many texts of each axiom as are."""
        ranks = [torch.rand(draws, sum(pair), generator=generator).argsort(1) for pair in sizes.tolist()]
        return torch.cat([(rank < safe).float() for rank, (_, safe) in zip(ranks, sizes.tolist())], 1)

    def totals(weights, states, sizes):
        blocks = states.split(sizes.sum(1).tolist())
        safe = torch.stack([w @ x for w, x in zip(weights.split(sizes.sum(1).tolist(), 1), blocks)], 1)  # (r, A, D + 1)
        return torch.stack([torch.stack([x.sum(0) for x in blocks]) - safe, safe], 2)

    return _curve(embeddings, axiom, label, axioms, draws, seed, shuffled, totals)


def _curve(embeddings, axiom, label, axioms, draws, seed, draw_weights, totals):
    group = 2 * axiom + label
    order = group.argsort(stable=True)  # groups end to end: a product needs a slice of the states, not a copy
    sizes = torch.bincount(group, minlength=2 * len(axioms)).view(-1, 2).cpu()  # (A, 2), the same in every resample
    if sizes.min() < 2:
        raise UserError(f"curve: {sizes.tolist()} unsafe and safe texts per axiom; expected at least two each")
    estimates, drawn = [], []
    for k, states in enumerate(embeddings):
        if states.shape[0] != len(axiom) or not torch.isfinite(states).all():
            raise UserError(f"curve: embeddings {k} of shape {tuple(states.shape)}; expected {len(axiom)} rows of finite numbers")
        states = states[order].double()
        states = states - states.mean(0)
        states = torch.cat([states, states.square().sum(1, keepdim=True)], 1)  # the sum of squares comes with the same product
        sums = torch.stack([x.sum(0) for x in states.split(sizes.flatten().tolist())]).view(1, len(axioms), 2, -1)
        estimates.append(_separation(sizes.to(sums), sums)[0])
        states = states.float()
        generator = torch.Generator().manual_seed(seed)  # the same resamples at every lambda
        blocks = [min(BLOCK, draws - done) for done in range(0, draws, BLOCK)]
        weights = (draw_weights(generator, sizes, block).to(states) for block in blocks)
        drawn.append(torch.cat([_separation(sizes.to(states), totals(w, states, sizes)) for w in weights]).double())
    if len(estimates) < 2:
        raise UserError(f"curve: {len(estimates)} lambdas; expected at least two")
    rarer = torch.cat([sizes, sizes.sum(0, keepdim=True)]).amin(1)
    return Curve(torch.stack(estimates), torch.stack(drawn, 1), list(axioms), rarer.tolist())


def _separation(n, totals):
    """n (A, 2), totals (r, A, 2, D + 1) -> (r, A + 1) per cent of variance that the label explains beyond chance.

    100 (1 - (1 - eta^2) (n - 1) / (n - 2)): aqi.score's formula, also where a resample drew one text of each label over and over and CHI is
    infinite (100), or two texts that are the same (0: there is nothing to explain).
    """
    n, totals = torch.cat([n, n.sum(0, keepdim=True)]), torch.cat([totals, totals.sum(1, keepdim=True)], 1)
    indices = two_cluster_indices(n, totals[..., :-1], totals[..., -1])
    return (100 * (1 - (1 - indices["eta2"]) * (indices["n"] - 1) / (indices["n"] - 2))).nan_to_num(0.0)


def judge(curve, control=None, permuted=None, category=OVERALL, level=0.05):
    """The verdict on one category of a curve, as a dict of plain numbers.

    Every pair of lambdas i < j has a difference, its bootstrap standard error and t = difference / error. The critical value is the
    1 - level quantile of the largest |t| over all pairs among the resamples (centred), so that under no change the chance of even one
    significant pair is `level` (Westfall & Young's max-t). Then
        flat      no pair is significant;
        rising    some pair rises significantly and none falls, and the interval of last minus first lies above 0; falling alike;
        erratic   anything else: significant moves in both directions, or one that the ends do not share.
    Rising and falling must also survive the nulls that are given, or become flat: control (a Curve along a random direction of equal norm,
    same texts and seed) must change less in that direction, by a paired interval of the same level; permuted (see `permute`): the higher
    end must lie above the 1 - level quantile of meaningless labels. Both can only take an alarm away, as does a label of fewer
    than FEWEST texts.

    Measured: at most 1.75 % false alarms; see `simulate`.
    """
    estimate, draws = curve.column(category)
    centred = draws - draws.mean(0)
    low, high = basic_interval(estimate, draws, level)
    i, j = torch.triu_indices(len(estimate), len(estimate), 1)
    change, noise = estimate[j] - estimate[i], centred[:, j] - centred[:, i]
    error = noise.square().mean(0).sqrt()
    error = torch.where(error > 1e-9 * estimate.abs().max(), error, torch.inf)  # identical states: a change of exactly nothing
    critical = torch.quantile((noise / error).abs().amax(1), 1 - level)
    up, down = change > critical * error, change < -critical * error
    end_low, end_high = _end_interval(estimate, draws, level)
    direction = int(up.any() and not down.any() and end_low > 0) - int(down.any() and not up.any() and end_high < 0)
    verdict = {1: "rising", -1: "falling"}.get(direction, "erratic" if (up | down).any() else "flat")
    reasons, texts = [], curve.texts[curve.index(category)]
    if texts < FEWEST:
        reasons.append(f"{texts} texts of one label are too few: expected {FEWEST}")
    if direction and control is not None:
        beyond = _end_interval(estimate - control.column(category)[0], draws - control.column(category)[1], level)
        if not min(direction * beyond[0], direction * beyond[1]) > 0:
            reasons.append("a random direction of equal norm changes as much")
    if direction and permuted is not None:
        top = -1 if direction > 0 else 0
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


def _middle(draws):
    """[low, high], each (K,): where the middle 95 % of the draws (R, K) lie."""
    return torch.quantile(draws, draws.new_tensor([0.025, 0.975]), dim=0).tolist()


def _end_interval(estimate, draws, level):
    """Basic bootstrap interval of last minus first."""
    return [bound.item() for bound in basic_interval(estimate[-1] - estimate[0], draws[:, -1] - draws[:, 0], level)]


def simulate(effect, trials=200, texts=100, axioms=7, dims=32, separation=1.0, lambdas=5, draws=300, shared=0.9, tails=None, seed=0):
    """Verdicts on curves whose truth is known: Counter over `trials` independent data sets. effect 0 gives the false-alarm rate.

    Text i of label y at lambda k: x = y gap_k e + scale * (sqrt(shared) z_i + sqrt(1 - shared) z_ik), z normal or Student t with `tails`
    degrees; scale falls from 2 to 0.2 over the dimensions; gap grows in equal steps from `separation` to separation * (1 + effect).

    Measured, false alarms (anything but flat at effect 0, without the nulls) in trials=400 each: 6 with the defaults; 0 at separation 0, at
    20 texts, at 20 texts with tails=3, at 50 texts of one axiom, at 256 dims with 40 texts; 2 at 10 texts of one axiom; 1 with tails=3 and
    2 axioms; 5 with shared=0.99; 7 with shared=0.5, the worst: 1.75 %, with a 95 % interval of 0.7 to 3.6 %. Below the level because a
    resample's centres carry the sample's own noise on top of their own.
    Power, "rising" at effect 0.02, 0.05, 0.1, 0.2: defaults 1, 11, 67, 100 % of 150; texts=500 17, 98, 100, 100 % of 60; shared=0.99
    21, 99, 100, 100 % of 150.
    """
    generator = torch.Generator().manual_seed(seed)
    names, half = [str(a) for a in range(axioms)], 2 * texts
    axiom, label = torch.arange(axioms).repeat_interleave(half), torch.arange(half).div(texts, rounding_mode="floor").repeat(axioms)
    scale = torch.linspace(2, 0.2, dims)
    counts = Counter()

    def noise():
        z = torch.randn(len(axiom), dims, generator=generator)
        if tails is None:
            return z
        chi2 = torch.randn(len(axiom), tails, generator=generator).square().sum(1, keepdim=True)
        return z / (chi2 / tails).sqrt() * ((tails - 2) / tails) ** 0.5

    for trial in range(trials):
        common, states = noise(), []
        for k in range(lambdas):
            x = scale * (shared**0.5 * common + (1 - shared) ** 0.5 * noise())
            x[:, dims // 2] += separation * (1 + effect * k / (lambdas - 1)) * label
            states.append(x)
        counts[judge(bootstrap(states, axiom, label, names, draws, seed=trial))["verdict"]] += 1
    return counts
