"""curves.py: groups are drawn, shuffled and left out together; errors of levels against plain
recomputation.
"""

import pytest
import torch

from analysis import curves
from analysis.curves import (
    Design,
    bootstrap,
    cell_sums,
    level_errors,
    permute,
    scale_excess,
    separation,
    understated,
)
from analysis.sweep import coordinate_scale


def labelled(per_cell=12, axioms=2, dims=5, seed=0):
    """(states (n, D), axiom, label) in shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 * per_cell * axioms
    order = torch.randperm(n, generator=generator)
    axiom = (torch.arange(n) // (2 * per_cell))[order]
    label = (torch.arange(n) // per_cell % 2)[order]
    return torch.randn(n, dims, generator=generator) + 0.8 * label[:, None], axiom, label


def plain(X, axiom, label, axioms):
    """(A + 1,) separations of the rows given."""
    design = Design(axiom, label, axioms)
    return separation(*cell_sums(design.centred(X), design))[0]


def test_each_text_its_own_group_is_no_group_at_all():
    X, axiom, label = labelled()
    own = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
    for resample in (bootstrap, permute):
        without = resample([X, 2 * X], axiom, label, list("ab"), draws=150)
        given = resample([X, 2 * X], axiom, label, list("ab"), draws=150, group=own)
        assert torch.equal(without.draws, given.draws) and torch.equal(without.estimate, given.estimate)
        assert without.groups == given.groups == [12, 12, 24]


def test_copies_count_once():
    """Every text five times: the draws are those of the texts alone, with the chance term of five times the
    n.
    """
    X, axiom, label = labelled()
    alone = bootstrap([X, X + 0.5 * label[:, None]], axiom, label, list("ab"), draws=60)
    times = torch.arange(len(X)).repeat_interleave(5)
    copies = [X[times], (X + 0.5 * label[:, None])[times]]
    found = bootstrap(copies, axiom[times], label[times], list("ab"), draws=60, group=times)
    assert found.groups == alone.groups
    n = torch.tensor([24.0, 24.0, 48.0], dtype=torch.float64)
    unexplained = (1 - alone.draws / 100) * (n - 2) / (n - 1)  # 1 - eta^2
    expected = 100 * (1 - unexplained * (5 * n - 1) / (5 * n - 2))
    torch.testing.assert_close(found.draws, expected, rtol=1e-4, atol=1e-4)


def test_a_permutation_keeps_groups_of_one_label_whole_and_shuffles_inside_mixed_ones():
    """One dimension that numbers the groups: a draw's sums say which texts are called safe."""
    label = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1])
    group = torch.tensor([0, 0, 1, 2, 2, 3, 3, 4, 4, 5, 5])  # the last is mixed
    axiom = torch.zeros_like(label)
    X = torch.eye(11)
    curve = permute([X, X], axiom, label, ["a"], draws=200, group=group)
    seen = set()
    for chosen in range(1 << 5):  # which of the five whole groups are safe: two of them, as in the data
        is_safe = torch.tensor([chosen >> g & 1 for g in range(5)])
        if is_safe.sum() != 2:
            continue
        for mixed in ([0, 1], [1, 0]):
            shuffled = torch.cat([is_safe[group[:9]], torch.tensor(mixed)])
            seen.add(round(plain(X, axiom, shuffled, ["a"])[0].item(), 3))
    assert {round(value, 3) for value in curve.draws[:, 0, 0].tolist()} == seen


def test_a_permutation_never_trades_labels_between_axioms():
    """Three templates of two texts a cell, axioms 50 apart: the distance is none of shuffled labels.

    With fewer than FEWEST templates a cell all of a label are drawn together, but not shuffled together.
    """
    cell = torch.arange(24) // 6
    axiom, label, group = cell // 2, cell % 2, torch.arange(24) // 2
    X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    near = permute([X, X], axiom, label, ["a", "b"], draws=100, group=group)
    X[axiom == 1] += 50
    far = permute([X, X], axiom, label, ["a", "b"], draws=100, group=group)
    torch.testing.assert_close(far.draws[:, :, :2], near.draws[:, :, :2], rtol=1e-3, atol=1e-3)
    assert far.draws[:, :, 2].max() < 1 < near.draws[:, :, 2].max()


def test_few_groups_a_cell_are_drawn_from_all_of_the_label():
    """One group a cell, drawn from itself, would show no variance at all."""
    X, axiom, label = labelled(axioms=6)
    curve = bootstrap([X, X], axiom, label, list("abcdef"), draws=50, group=2 * axiom + label)
    assert curve.groups == [1] * 6 + [6] and curve.draws[:, 0, -1].std() > 0.1


def test_groups_over_axioms_and_labels_are_drawn_as_one():
    """Pairs of a safe and an unsafe text: every draw has as many of either."""
    X, axiom, label = labelled()
    pair = torch.empty_like(label)
    for cell in range(4):
        pair[2 * axiom + label == cell] = torch.arange(12) + 100 * (cell // 2)
    design = Design(axiom, label, ["a", "b"], pair)
    assert design.worth()[0] == [12, 12, 24] and design.home.tolist() == [0] * 12 + [2] * 12


@pytest.mark.parametrize("copies", [1, 3])
def test_errors_of_a_level_are_jackknife_less_random_signs(copies, monkeypatch):
    """Plain recomputation: leave each group out; then draw signs. copies: texts of a group, with a little
    noise.
    """
    monkeypatch.setattr("analysis.curves.FEW_TAILS", 100.0)
    X, axiom, label = labelled(per_cell=16, axioms=1, seed=3)
    rows = torch.arange(len(X)).repeat_interleave(copies)
    X = X[rows].double() + 0.1 * torch.randn(len(rows), 5, generator=torch.Generator().manual_seed(4))
    axiom, label = axiom[rows], label[rows]
    design = Design(axiom, label, ["a"], rows)
    centre, error, influence = level_errors(design.centred(X), design)
    without = []
    for group in range(32):
        kept = rows != group
        without.append(plain(X[kept], axiom[kept], label[kept], ["a"])[0])
    without = torch.stack(without)
    safe = label[::copies].bool()
    linear = 0.0
    for side in (without[safe], without[~safe]):
        linear = linear + 15 / 16 * (side - side.mean()).square().sum()
    torch.testing.assert_close(influence[:, 0].square().sum(), linear)
    residual = torch.where(label[:, None] == 1, X - X[label == 1].mean(0), X - X[label == 0].mean(0))
    summed = torch.zeros(32, 5, dtype=torch.float64).index_add_(0, rows, residual) / (16 * copies)
    signs = torch.randint(2, (20000, 32), generator=torch.Generator().manual_seed(5)).double() * 2 - 1
    gap = (X[label == 1].mean(0) - X[label == 0].mean(0)).square().sum()
    within = residual.square().sum() / len(X)
    slope = 25 * within / (within + gap / 4).square()
    # 16 equal groups of a label: the squared error of a mean is 16 / 15 of what their deviations show.
    chance = 16 / 15 * summed.square().sum()
    between, population = (gap - chance) / 4, within + chance / 2
    torch.testing.assert_close(centre[0], 100 * between / (between + population))
    quadratic = slope.square() * (signs @ summed).square().sum(1).var()
    variance = torch.maximum(linear - quadratic, linear / 2)
    torch.testing.assert_close(error[0], variance.sqrt(), rtol=0.08, atol=0)
    torch.testing.assert_close(error[0], error[1])  # one axiom is the whole


def test_no_error_of_a_level_with_few_groups_or_a_text_far_from_all_others():
    X, axiom, label = labelled(per_cell=20, axioms=1)
    far = X.clone()
    far[3] += 30
    for states, group, is_given in ((X, None, True), (far, None, False), (X, torch.arange(40) // 10, False)):
        design = Design(axiom, label, ["a"], group)
        assert level_errors(design.centred(states), design)[1].isfinite().all() == is_given


def test_errors_are_of_the_bootstrap_only():
    X, axiom, label = labelled()
    curve = bootstrap([X, X], axiom, label, list("ab"), draws=5)
    assert curve.centre.shape == curve.error.shape == (2, 3) and curve.influence.shape == (48, 2, 3)
    assert permute([X, X], axiom, label, list("ab"), draws=5).error is None


def test_understated_is_what_resampling_shows():
    """G / (G - 1) of equal groups; of one group with a third of the texts, the ratio of 20,000 resamples."""
    one_pool = torch.ones(1, 21).double()
    assert understated(torch.full((5,), 7.0).double(), one_pool[:, :5]) == pytest.approx(5 / 4)
    two_pools = torch.eye(2).double().repeat_interleave(5, 1)
    assert understated(torch.full((10,), 7.0).double(), two_pools) == pytest.approx(5 / 4)
    sizes = torch.tensor([10] + [1] * 20).double()
    generator = torch.Generator().manual_seed(0)
    share = sizes / sizes.sum()
    values = torch.randn(20_000, 21, generator=generator, dtype=torch.float64)
    deviations = values - (values @ share)[:, None]
    resampled = (share.square() * deviations.square()).sum(1).mean()
    expected = share.square().sum() / resampled
    assert understated(sizes, one_pool) == pytest.approx(expected.item(), rel=0.02)


def scaled_texts(copies=3):
    """(states, states of another lambda where the labels lie apart along another coordinate, axiom, label,
    group, design).

    A group holds `copies` texts, some of both labels. One coordinate is always the same.
    """
    X, axiom, label = labelled(per_cell=90, axioms=2, dims=6)
    X[:, 0] += 9 * label
    X[:, 5] = 4.0
    group = torch.arange(len(X)) // copies
    Y = X + 9 * label[:, None] * torch.tensor([-1, 1, 0, 0, 0, 0])
    return X, Y, axiom, label, group, Design(axiom, label, ["a", "b"], group)


def variance_within(X, label):
    """(D,) unbiased, within labels."""
    return coordinate_scale(X, label).double().square() * len(X) / (len(X) - 2)


def test_the_excess_of_a_scale_is_what_leaving_a_group_out_of_it_adds():
    X, _, _, label, group, design = scaled_texts()
    excess = scale_excess(X / coordinate_scale(X, label), design)
    for g in (0, 17, int(design.group.max())):
        texts = design.order[design.group == g]
        kept = group != group[texts[0]]
        expected = variance_within(X, label) / variance_within(X[kept], label[kept]) - 1
        torch.testing.assert_close(excess[g, :5], expected[:5], rtol=1e-4, atol=1e-5)
        assert excess[g, 5] == 0  # a coordinate that is the same in all texts has no scale


def test_a_text_with_all_of_a_coordinate_does_not_decide_alone():
    """Without it nothing is left: a quarter of the variance is taken for what is."""
    X, _, _, label, _, _ = scaled_texts()
    X[:, 5] = 0.0
    X[7, 5] = 1.0
    design = Design(torch.zeros_like(label), label, ["a"])
    excess = scale_excess(X / coordinate_scale(X, label), design)
    assert excess.isfinite().all() and excess[(design.order == 7).nonzero()[0, 0], 5] == 3


@pytest.mark.slow
def test_a_group_moves_the_separation_by_the_scale_too():
    """Plain recomputation to the first order in 1 / n: leave each group out of the texts and of the scale."""
    X, Y, axiom, label, group, design = scaled_texts()
    scale = coordinate_scale(X, label)
    excess = scale_excess(X / scale, design)
    changes = []
    for g in range(int(group.max()) + 1):
        kept = group != g
        unit = coordinate_scale(X[kept], label[kept])
        rest = axiom[kept], label[kept], ["a", "b"]
        changes.append(plain(Y[kept] / unit, *rest) - plain(X[kept] / unit, *rest))
    changes = torch.stack(changes)[group[design.order]]  # (n, A + 1), as the design's order of texts
    influence = level_errors(design.centred(Y / scale), design, excess)[2]
    influence = (influence - level_errors(design.centred(X / scale), design, excess)[2])[design.group]
    for c in range(3):
        both = torch.stack([changes[:, c], -influence[:, c]])
        assert torch.corrcoef(both)[0, 1] > 0.99  # the pools' means are left in `changes`
        assert influence[:, c].std() == pytest.approx(changes[:, c].std().item(), rel=0.05)


def test_a_resample_of_two_texts_of_an_axiom_has_nothing_to_explain():
    """n - 2 is 0 there, as where one of two pairs is left out: every number stays finite."""
    X, axiom, label = labelled(per_cell=3, axioms=3)
    copies = torch.arange(18).clamp(min=1)  # few groups a cell: axioms are drawn together
    curve = bootstrap([X, 1.5 * X], axiom, label, list("abc"), draws=400, group=copies)
    assert curve.draws.abs().max() < 101
    pairs = torch.tensor([0, 1, 0, 1])
    curve = bootstrap([X[:4], 2 * X[:4]], 0 * pairs, torch.tensor([0, 0, 1, 1]), ["a"], 50, group=pairs)
    assert curve.influence.abs().max() < 101


def test_degrees_of_freedom_are_at_least_one():
    """Ten templates hold most texts; 19 axioms of five texts a label are pools of their own."""
    axiom = torch.cat([torch.zeros(600), torch.arange(1, 20).repeat_interleave(10)]).long()
    label = torch.arange(790) % 2
    group = torch.cat([torch.arange(600) % 20, torch.arange(600, 790)])
    assert Design(axiom, label, [str(a) for a in range(20)], group).worth()[1][-1] == 1


@pytest.mark.slow
def test_levels_never_mix_tensors_of_two_devices(monkeypatch):
    """Meta tensors may meet none of the CPU's, as a GPU's may not."""
    axiom, label, group = torch.arange(40) % 2, torch.arange(40) // 2 % 2, torch.arange(40) // 4
    design = Design(axiom, label, ["a", "b"], group)
    states = torch.empty(40, 6, dtype=torch.float64, device="meta")
    # Whether all numbers are finite cannot be asked of them.
    monkeypatch.setattr(Design, "centred", lambda design, states: states)
    excess = scale_excess(states, design)
    influence = curves._scale_influence(states, design, excess)
    squares, missing = curves._squared_deviations(states, design, excess)
    centre, moves = curves._jackknife(states, design.columns[0], missing)
    found = [excess, influence, squares, centre, moves, curves._quadratic_variance(states, design)]
    assert {tensor.device.type for tensor in found} == {"meta"}
