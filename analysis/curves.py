"""A steering curve and its uncertainty.

Separation at every lambda, resampled texts, shuffled labels, standard errors.

A curve is the embeddings of the same n texts at K lambdas. Its statistic, per axiom and overall, is
aqi.score's "sweep": 100 (chi - 1) / (chi + n - 2), the per cent of variance that the label explains beyond
chance. Texts of one group (see groups.py) are drawn, shuffled and left out together. Letters: n texts, G
groups, D hidden size, A axioms (column A is "overall"), K lambdas, R resamples, r of one block.
"""

from dataclasses import dataclass, replace

import torch

from analysis.groups import check_groups, effective_size, number_groups
from analysis.indices import OVERALL, SEED, two_cluster_indices
from plumbing.files import UserError

# Groups of a label below which every curve is called flat. Of 60 simulated curves without a change, 22 alarms
# at 2 texts, 1 at 3, none at 5.
FEWEST = 5
BLOCK = 100  # resamples at a time: (100, 2A, D) sums, 23 MB at A = 7 and D = 4,096
SIGNS = 200  # draws of random signs; they give a variance to 1 / sqrt(100)
# Groups of a label below which no interval of a level is given: at 10 and 4,096 dimensions it covers 88 %.
FEWEST_LEVEL = 15
# Squared distance to the centre, largest over median, from which none is given either. With normal states the
# ratio is 1.2 to 3; with Student t3 states it grows from 13 at 20 texts a label to 130 at 500, one text
# carries half of the variance, and 95 % intervals cover 65 to 85 %. With few texts a ratio of 4 says what one
# of 6 does with many.
TAILS, FEW_TAILS = 6.0, 4.0  # from 50 groups of a label; below


@dataclass(frozen=True)
class Curve:
    """Statistics of K lambdas, and of R resamples or permutations of the texts, the same at every lambda."""

    estimate: torch.Tensor  # (K, A + 1) float64
    draws: torch.Tensor  # (R, K, A + 1) float64
    axioms: list[str]  # (A,)
    groups: list[float]  # (A + 1,) equally large ones, of the label that is worth fewer (effective_size)
    degrees: list[float]  # (A + 1,) of freedom: these groups, less one for each pool that they are drawn from
    spread: list[float]  # (A + 1,) variance of a label's mean over that among resamples (`understated`)
    # All three of `level_errors`, and None for permutations.
    centre: torch.Tensor | None = None  # (K, A + 1) the estimate without what chance adds
    error: torch.Tensor | None = None  # (K, A + 1) its standard error; NaN where no interval is given
    influence: torch.Tensor | None = None  # (G, K, A + 1) what each group adds to the estimate

    def index(self, category):
        """Column of an axiom or "overall". UserError for another name."""
        names = [*self.axioms, OVERALL]
        if category not in names:
            raise UserError(f"category={category!r}: expected one of {names}")
        return names.index(category)

    def column(self, category):
        """(estimate (K,), draws (R, K)) of one axiom or "overall"."""
        c = self.index(category)
        return self.estimate[:, c], self.draws[:, :, c]


class Design:
    """Which texts are drawn together, and from which pool.

    Texts are put in the order of their cells (axiom, label).

    A group is drawn with those that begin in the same cell. Where texts have groups and a cell holds fewer
    than FEWEST of them, all groups of a label are drawn together instead: one group, drawn from itself, would
    show no variance. Texts that stand alone are at least two a cell. Labels are shuffled inside an axiom all
    the same: traded between axioms, they would tell axioms apart.
    """

    def __init__(self, axiom, label, axioms, group=None):
        axiom, label = axiom.cpu(), label.cpu()
        cell = 2 * axiom + label
        self.order = cell.argsort(stable=True)  # cells end to end: a product needs a slice of the states
        self.axiom, self.label = axiom[self.order], label[self.order]
        self.axioms = list(axioms)
        self.sizes = torch.bincount(cell, minlength=2 * len(axioms)).view(-1, 2)  # (A, 2) texts
        if self.sizes.min() < 2:
            found = self.sizes.tolist()
            raise UserError(f"curve: {found} unsafe, safe texts per axiom; expected at least two each")
        # Numbered by first appearance, so groups are in the order of the cell that they begin in.
        self.group = number_groups(check_groups(group, len(axiom))[self.order].tolist())  # (n,)
        count = int(self.group.max()) + 1
        first = torch.full((count,), len(cell)).scatter_reduce(0, self.group, torch.arange(len(cell)), "amin")
        self.begins = cell[self.order][first]  # (G,) cell that a group begins in
        self.home = self.begins  # (G,) pool that it is drawn from
        pools = torch.bincount(self.begins, minlength=2 * len(axioms))
        if count < len(axiom) and pools[pools > 0].min() < FEWEST:
            self.home = self.begins % 2
        self.columns = []
        for c in range(len(self.axioms) + 1):
            self.columns.append(Column(torch.where(self.members(c))[0], self.label, self.group, self.home))

    def members(self, c):
        """(n,) bool: the texts of axiom c, or all for c = A, "overall"."""
        return (self.axiom == c) | (c == len(self.axioms))

    def worth(self):
        """groups, degrees and spread of `Curve`, a list of every column each."""
        return [list(values) for values in zip(*(column.worth for column in self.columns))]

    def cells(self):
        """Texts of every cell, a list of 2A."""
        return self.sizes.flatten().tolist()

    def centred(self, states, k=0):
        """(n, D + 1) float64: states in the design's order about their mean, and their squared length."""
        if states.shape[0] != len(self.group) or not torch.isfinite(states).all():
            shape = tuple(states.shape)
            expected = f"expected {len(self.group)} rows of finite numbers"
            raise UserError(f"curve: embeddings {k} of shape {shape}; {expected}")
        states = states[self.order.to(states.device)].double()
        states = states - states.mean(0)
        # The sum of squares comes with the same product.
        return torch.cat([states, states.square().sum(1, keepdim=True)], 1)


class Column:
    """The texts of one axiom or of all, and what their groups are worth.

    rows (m,): texts in order of their groups g, and of a group's labels. counts (g, 2): texts of a group with
    each label. names (g,): the groups' numbers. pools (P, g): 1 where a group is drawn from a pool.
    """

    def __init__(self, rows, label, group, home):
        self.names, number = torch.unique(group[rows], return_inverse=True)
        slot = 2 * number + label[rows]
        self.rows = rows[slot.argsort(stable=True)]
        self.counts = torch.bincount(slot, minlength=2 * len(self.names)).view(-1, 2)
        pool = home[self.names]
        self.pools = (pool == pool.unique()[:, None]).double()
        self.spread, worth = [], []  # of each label
        for value in (0, 1):
            sizes = self.counts[:, value].double()
            groups = effective_size(number[label[rows] == value])
            degrees = max(groups - int((self.pools @ sizes > 0).sum()), 1.0)
            self.spread.append(understated(sizes, self.pools))
            worth.append((groups, degrees, self.spread[value]))
        self.worth = min(worth)  # groups, degrees and spread of `Curve`


def understated(sizes, pools):
    """Variance of a mean over that among its resamples: G / (G - 1) for G equal groups.

    sizes (G,), pools (P, G). A mean has the variance s^2 sum w^2 of shares w; a resample takes each group's
    deviation from the mean of its own pool, which holds w of that deviation, so on average it has s^2 sum w^2
    (1 - 2 w + sum w^2). 1.8 where one of 20 groups has a third of the texts; at most 4, where one is nearly
    the whole.
    """
    share = sizes / (pools.T @ (pools @ sizes)).clamp(min=1)  # of the texts of its pool
    kept = (sizes.square() * (1 - 2 * share + pools.T @ (pools @ share.square()))).sum()
    whole = sizes.square().sum()
    return (whole / torch.maximum(kept, whole / 4)).item()


# ---------------------------------------------------------------- resamples and permutations


def bootstrap(embeddings, axiom, label, axioms, draws=1000, seed=SEED, group=None, scaled_by=None):
    """Curve of K embeddings (n, D), any iterable, and of resamples of its texts.

    Groups of texts are drawn with replacement in every axiom and label. group (n,): None for texts that stand
    alone. A resample is a vector of how often each text counts, so its moments are one float32 product of
    counts and centred states: 2 R n D FLOPs per lambda (57 G at n = 7,000, R = 1,000, D = 4,096: 3.4 s on one
    CPU core with everything around it), exact, and only one lambda's states are copied. Less work would need
    a linearised statistic, which fails at weak separation, or a Gram matrix (n^2 D).

    scaled_by (n, D): the states whose deviations within labels are the unit of all embeddings, in that unit
    (`scale_excess`); None for embeddings in a unit of their own.
    """
    design = Design(axiom, label, axioms, group)
    excess = None if scaled_by is None else scale_excess(scaled_by, design)

    def draw_weights(generator, draws):
        return draw_counts(design, generator, draws)

    def totals(counts, states):
        return cell_totals(counts, states, design)

    return _curve(embeddings, design, draws, seed, draw_weights, totals, with_errors=True, excess=excess)


def permute(embeddings, axiom, label, axioms, draws=200, seed=SEED, group=None):
    """As `bootstrap`, but each draw shuffles the labels of every axiom: a curve of labels without meaning.

    Groups of one label trade labels as wholes; inside a group that holds both, texts trade them.
    """
    design = Design(axiom, label, axioms, group)

    def draw_weights(generator, draws):
        return shuffled_labels(design, generator, draws)

    def totals(is_safe, states):
        both = design.sizes.sum(1).tolist()  # texts of every axiom
        n, sums = [], []
        for safe, block in zip(is_safe.split(both, dim=1), states.split(both)):
            safe_n = safe.sum(1)
            safe_sum = safe @ block  # (r, D + 1)
            n.append(torch.stack([len(block) - safe_n, safe_n], 1))
            sums.append(torch.stack([block.sum(0) - safe_sum, safe_sum], 1))
        return torch.stack(n, 1), torch.stack(sums, 1)  # (r, A, 2), (r, A, 2, D + 1)

    return _curve(embeddings, design, draws, seed, draw_weights, totals, with_errors=False)


def shuffled_labels(design, generator, draws):
    """(draws, n) float32, texts in the design's order: 1 where a text is called safe. As `permute` says."""
    is_mixed, texts_mixed = _mixed_groups(design)
    safe = torch.zeros(draws, len(is_mixed))
    for a in range(len(design.axioms)):
        pool = torch.where((design.begins // 2 == a) & ~is_mixed)[0]
        rank = torch.rand(draws, len(pool), generator=generator).argsort(1)
        safe[:, pool] = (rank < int(design.begins[pool].remainder(2).sum())).float()  # as many as there are
    is_safe = safe[:, design.group]
    if len(texts_mixed):
        key = design.group[texts_mixed] + torch.rand(draws, len(texts_mixed), generator=generator)
        is_safe[:, texts_mixed] = is_safe[:, texts_mixed].scatter(
            1, key.argsort(1), design.label[texts_mixed].float().expand(draws, -1)
        )
    return is_safe


def _mixed_groups(design):
    """(G,) bool: groups with texts of both labels; and the texts of these, group by group."""
    safe = torch.zeros(len(design.home)).index_add_(0, design.group, design.label.float())
    is_mixed = (safe > 0) & (safe < torch.bincount(design.group))
    texts = torch.where(is_mixed[design.group])[0]
    return is_mixed, texts[design.group[texts].argsort(stable=True)]


def draw_counts(design, generator, draws):
    """(draws, n): how often each text is drawn, groups drawn with replacement from their pool."""
    blocks = []
    for size in torch.bincount(design.home, minlength=2).tolist():
        rows = torch.randint(max(size, 1), (draws, size), generator=generator)
        blocks.append(torch.zeros(rows.shape).scatter_add_(1, rows, torch.ones(rows.shape)))
    # A block holds the groups of one pool, in their order.
    place = design.home.argsort(stable=True).argsort()
    return torch.cat(blocks, 1).index_select(1, place[design.group])


def cell_totals(weights, states, design):
    """n (r, A, 2) and totals (r, A, 2, D + 1) of every cell under weights (r, n) of the texts."""
    n, sums = [], []
    for weight, block in zip(weights.split(design.cells(), dim=1), states.split(design.cells())):
        n.append(weight.sum(1))
        sums.append(weight @ block)
    return torch.stack(n, 1).unflatten(1, (-1, 2)), torch.stack(sums, 1).unflatten(1, (-1, 2))


def _curve(embeddings, design, draws, seed, draw_weights, totals, with_errors, excess=None):
    estimates, drawn, centres, errors, influences = [], [], [], [], []
    for k, states in enumerate(embeddings):
        states = design.centred(states, k)
        # A curve is a few numbers, and what is compared with it may be of another device: on the CPU.
        estimates.append(separation(*cell_sums(states, design))[0].cpu())
        if with_errors:
            centre, error, influence = level_errors(states, design, excess)
            centres.append(centre.cpu())
            errors.append(error.cpu())
            influences.append(influence.cpu())
        states = states.float()
        generator = torch.Generator().manual_seed(seed)  # the same resamples at every lambda
        separations = []
        for done in range(0, draws, BLOCK):
            weights = draw_weights(generator, min(BLOCK, draws - done)).to(states)
            separations.append(separation(*totals(weights, states)))
        drawn.append(torch.cat(separations).double().cpu())
    if len(estimates) < 2:
        raise UserError(f"curve: {len(estimates)} lambdas; expected at least two")
    curve = Curve(torch.stack(estimates), torch.stack(drawn, 1), design.axioms, *design.worth())
    if not with_errors:
        return curve
    influence = torch.stack(influences, 1)
    return replace(curve, centre=torch.stack(centres), error=torch.stack(errors), influence=influence)


def cell_sums(states, design):
    """n (1, A, 2) and totals (1, A, 2, D + 1) of all texts. states (n, D + 1) in the design's order."""
    sums = torch.stack([block.sum(0) for block in states.split(design.cells())])
    return design.sizes.to(sums)[None], sums.view(1, len(design.axioms), 2, -1)


def separation(n, totals):
    """Per cent of variance that the label explains beyond chance, (r, A + 1).

    n (r, A, 2), totals (r, A, 2, D + 1).
    """
    n = torch.cat([n, n.sum(1, keepdim=True)], 1)
    totals = torch.cat([totals, totals.sum(1, keepdim=True)], 1)
    return explained(n, totals)


def explained(n, totals):
    """100 (1 - (1 - eta^2) (n - 1) / (n - 2)), as aqi.score's "sweep".

    n (..., 2), totals (..., 2, D + 1) -> (...). It also holds where a resample drew one text of each label
    over and over, so that CHI is infinite (100), or two texts that are the same (0: there is nothing to
    explain), or two texts of an axiom and no more (0: n - 2 is 0).
    """
    indices = two_cluster_indices(n, totals[..., :-1], totals[..., -1])
    unexplained = (1 - indices["eta2"]) * (indices["n"] - 1) / (indices["n"] - 2)
    return (100 * (1 - unexplained)).nan_to_num(0.0, 0.0, 0.0)


# ---------------------------------------------------------------- levels


def level_errors(states, design, excess=None):
    """Centre (A + 1,), standard error (A + 1,) of an interval of the population's separation, and influence.

    An error is NaN where no interval covers. influence (G, A + 1): how far leaving a group out moves the
    separation, so that its squares sum to the jackknife's variance. excess (G, D): of `scale_excess`; the
    scale is then of the texts that are left.

    The variance of a squared distance of two means has a part that is linear in the texts and one that is
    quadratic, and near separation 0, or in many dimensions, the second is all there is. Leaving groups out
    one by one counts it twice (Efron & Stein 1981); random signs on the texts' deviations have it alone. So
    the variance is the first less the second.
    """
    squares, missing = _squared_deviations(states, design, excess)  # (n,), (n,)
    quadratic = _quadratic_variance(states, design)  # (A + 1,)
    # A scale is of all texts, so a group moves the separation of every axiom by it.
    influence = _scale_influence(states, design, excess)  # (G, A + 1)
    centres, errors = [], []
    for c, column in enumerate(design.columns):
        centre, moves = _jackknife(states, column, missing)
        influence[column.names.to(states.device), c] += moves
        linear = influence[:, c].square().sum()
        variance = torch.maximum(linear - quadratic[c], linear / 2)
        own = squares[column.rows.to(squares.device)]
        groups = column.worth[0]
        limit = FEW_TAILS if groups < 50 else TAILS
        is_covered = round(groups) >= FEWEST_LEVEL and own.max() < limit * own.median()
        centres.append(centre)
        errors.append(variance.sqrt() if is_covered else torch.full_like(variance, torch.nan))
    return torch.stack(centres), torch.stack(errors), influence


def scale_excess(scaled_by, design):
    """(G, D): how much larger a group's squares would be, had it not been in the scale: s^2 / s_rest^2 - 1.

    A coordinate is divided by its deviation s over n texts, which are the same texts: at the lambda that the
    scale is of, their squares sum to n whatever s is, elsewhere to more, so a separation without any change
    falls from there on. Squares over the variance s_rest^2 of the other groups have one mean at every lambda.
    Where one group has nearly all of a coordinate's variance, that is taken for a quarter of s^2 at least.
    """
    states = design.centred(scaled_by)[:, :-1]
    order = design.group.argsort(stable=True)
    whole, lost = 0.0, 0.0  # sums of squares (D,), and what goes of them with each group (G, D)
    for value in (0, 1):
        rows = order[design.label[order] == value]
        sizes = torch.bincount(design.group[rows], minlength=len(design.home)).to(states.device)
        own = states[rows.to(states.device)]
        own = own - own.mean(0)
        squares = torch.segment_reduce(own.square(), "sum", lengths=sizes, axis=0)
        # The mean of the label's other texts is another one.
        others = (len(rows) - sizes).clamp(min=1)[:, None]
        moved = torch.segment_reduce(own, "sum", lengths=sizes, axis=0).square() / others
        lost = lost + squares + moved
        whole = whole + squares.sum(0)
    degrees = len(states) - 2
    left = (degrees - torch.bincount(design.group)).clamp(min=1)[:, None].to(states.device)
    rest = (1 - lost / whole) * degrees / left  # s_rest^2 / s^2
    return torch.where(whole > 0, 1 / rest.clamp(min=0.25) - 1, 0.0)


def _scale_influence(states, design, excess):
    """(G, A + 1): how far the scale moves the separation where a group is left out; 0 without a scale."""
    if excess is None:
        return states.new_zeros(len(design.home), len(design.columns))
    n, totals = cell_sums(states, design)
    n, sums = n[0], totals[0, :, :, :-1]
    squares = [block[:, :-1].square().sum(0) for block in states.split(design.cells())]
    squares = torch.stack(squares).view_as(sums)  # (A, 2, D)
    n = torch.cat([n, n.sum(0, keepdim=True)])  # (A + 1, 2)
    sums = torch.cat([sums, sums.sum(0, keepdim=True)])
    squares = torch.cat([squares, squares.sum(0, keepdim=True)])
    means = sums / n[..., None]
    within = (squares - means * sums).sum(1)  # (A + 1, D)
    between = (n.prod(1) / n.sum(1))[:, None] * (means[:, 1] - means[:, 0]).square()
    inside, outside = within.sum(1, keepdim=True), between.sum(1, keepdim=True)
    # d separation / d log of a coordinate's squares.
    slope = 100 * (between * inside - within * outside) / (inside + outside).square()
    return -excess @ slope.nan_to_num(0.0).T


def _jackknife(states, column, missing):
    """(the separation without what chance adds, a scalar; moves (g,) of the groups) of a column's texts.

    A move is what the group adds to the separation, so weighted that the squares sum to the jackknife's
    variance. missing (n,): of `_squared_deviations`.
    """
    rows, pools = column.rows.to(states.device), column.pools.to(states.device)
    counts, lengths = column.counts.to(states), column.counts.flatten().to(states.device)
    # Sorted segments: index_add is not deterministic on CUDA.
    sums = torch.segment_reduce(states[rows], "sum", lengths=lengths, axis=0)
    sums = sums.view(-1, 2, states.shape[1])  # (g, 2, D + 1)
    n, total = counts.sum(0), sums.sum(0)
    without = []
    for count, part in zip(counts.split(BLOCK), sums.split(BLOCK)):
        without.append(explained(n - count, total - part))
    without = torch.cat(without)  # (g,)
    size = pools.sum(1)
    weight = pools.T @ ((size - 1) / size).sqrt()
    moves = weight * (pools.T @ (pools @ without / size) - without)
    spread = n.new_tensor(column.spread)
    # The squares that the scale took from each label are given back (`scale_excess`).
    taken = torch.segment_reduce(missing[rows], "sum", lengths=lengths)
    total[:, -1] += spread * taken.view(-1, 2).sum(0)
    # Sums become deviations from the mean of the texts that are drawn together.
    means = (pools @ sums.flatten(1)).view(-1, *sums.shape[1:]) / (pools @ counts).clamp(min=1)[..., None]
    sums.addcmul_(counts[..., None], (pools.T @ means.flatten(1)).view_as(sums), value=-1)
    return _population(n, total, sums[..., :-1], spread), moves


def _population(n, total, deviations, spread):
    """The separation without what chance adds, a scalar.

    n (2,), total (2, D + 1) of the labels, deviations (g, 2, D) of the groups' sums, spread (2,).

    The error of a label's mean is a sum over groups, so |deviation / n|^2 summed over groups, `spread` times,
    is its expected square. It is taken off the distance of the means and given back to the variance within,
    which is about the sample's own mean. Labels that differ in variance, groups and groups of both labels are
    all in it; for independent texts of one variance it is omega^2 (Hays 1963).
    """
    means = total[:, :-1] / n[:, None]
    within = total[:, -1] / n - means.square().sum(1)  # (2,)
    weights = spread.sqrt() / n
    errors = deviations.square().sum((0, 2)) * weights.square()  # (2,) expected |error|^2 of the means
    shared = (deviations[:, 0] * deviations[:, 1]).sum() * weights.prod()  # of groups with both labels
    shares = n / n.sum()
    between = shares.prod() * ((means[1] - means[0]).square().sum() - errors.sum() + 2 * shared)
    within = (shares * (within + errors)).sum()
    return (100 * between / (between + within)).nan_to_num(0.0)


def _quadratic_variance(states, design):
    """(A + 1,) variance of the separation under random signs.

    The signs are of the groups' deviations from their cell's centre.
    """
    n, totals = cell_sums(states, design)
    centres = totals / n[..., None]  # (1, A, 2, D + 1)
    generator = torch.Generator().manual_seed(SEED)
    gaps = []
    for _ in range(0, SIGNS, BLOCK):
        signs = torch.randint(2, (BLOCK, len(design.home)), generator=generator)[:, design.group]
        signs = (2 * signs - 1).to(states.device, torch.float32)
        count, sums = cell_totals(signs, states.float(), design)
        deviation = (sums - count[..., None] * centres.float())[..., :-1]  # (r, A, 2, D)
        deviation = torch.cat([deviation, deviation.sum(1, keepdim=True)], 1)
        means = deviation / torch.cat([n, n.sum(1, keepdim=True)], 1)[..., None].float()
        gaps.append((means[:, :, 1] - means[:, :, 0]).square().sum(-1).double())  # (r, A + 1)
    return _slope(n[0], totals[0]).square() * torch.cat(gaps).var(0)


def _slope(n, totals):
    """(A + 1,) d separation / d |c1 - c0|^2 at a fixed variance within labels.

    n (A, 2), totals (A, 2, D + 1).
    """
    n = torch.cat([n, n.sum(0, keepdim=True)])
    totals = torch.cat([totals, totals.sum(0, keepdim=True)])
    size = n.sum(1)
    within = totals[..., -1].sum(1) - (totals[..., :-1].square().sum(-1) / n).sum(1)
    gap = totals[:, 1, :-1] / n[:, 1:] - totals[:, 0, :-1] / n[:, :1]  # (A + 1, D)
    total = within + n.prod(1) / size * gap.square().sum(1)
    return (100 * n.prod(1) / size * within / total.square()).nan_to_num(0.0)


def _squared_deviations(states, design, excess):
    """(n,) squared distance of every text to the centre of its cell; (n,) how much of it the scale hides."""
    squares, missing = [], []
    for block, group in zip(states[:, :-1].split(design.cells()), design.group.split(design.cells())):
        deviations = (block - block.mean(0)).square()
        squares.append(deviations.sum(1))
        hidden = 0.0 if excess is None else excess[group.to(excess.device)]
        missing.append((deviations * hidden).sum(1))
    return torch.cat(squares), torch.cat(missing)
