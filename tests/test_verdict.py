"""verdict.py and curves.py: resampled moments against plain recomputation, verdicts on curves whose truth is
known.
"""

import numpy as np
import pytest
import torch

from analysis.curves import Curve, bootstrap, permute
from analysis.indices import chi, xie_beni
from analysis.verdict import (
    SPENT,
    carriers_factor,
    few_groups_factor,
    judge,
    level_interval,
    student_quantile,
)
from aqi import score


def texts(per_group=40, axioms=3, dims=6, seed=0):
    """Embeddings without any label in them, and axiom and label of each text, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 * per_group * axioms
    order = torch.randperm(n, generator=generator)
    return (
        torch.randn(n, dims, generator=generator),
        (torch.arange(n) % axioms)[order],
        (torch.arange(n) // axioms % 2)[order],
    )


def steered(gaps, **kwargs):
    """Embeddings with the safe texts moved by each gap along the first axis."""
    X, axiom, label = texts(**kwargs)
    along = torch.zeros_like(X)
    along[:, 0] = label.float()
    return [X + gap * along for gap in gaps], axiom, label, list("abc")


def separation(X, label):
    row = {"category": "", "n": len(X), "chi": chi(X, label), "xb": xie_beni(X, label)}
    return score([row], "sweep")[0]["aqi"]


def test_estimates_are_the_sweep_scores():
    curve = bootstrap(*steered((0.0, 1.0, 3.0)), draws=3)
    states, axiom, label, _ = steered((0.0, 1.0, 3.0))
    for k, X in enumerate(states):
        expected = [separation(X[axiom == a], label[axiom == a]) for a in range(3)] + [separation(X, label)]
        torch.testing.assert_close(
            curve.estimate[k], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )


def test_every_resample_is_what_recomputing_it_gives():
    """The same draws as index lists: rows picked inside each group, in the order in which `bootstrap` draws
    them.
    """
    states, axiom, label, names = steered((0.5, 2.0), per_group=7)
    curve = bootstrap(states, axiom, label, names, draws=2, seed=9)
    generator = torch.Generator().manual_seed(9)
    groups = [torch.where(2 * axiom + label == g)[0] for g in range(6)]
    picked = [rows[torch.randint(7, (2, 7), generator=generator)] for rows in groups]  # 6 x (2, 7)
    for r in range(2):
        rows = torch.cat([p[r] for p in picked])
        for k, X in enumerate(states):
            torch.testing.assert_close(
                curve.draws[r, k, -1].item(), separation(X[rows], label[rows]), rtol=1e-4, atol=1e-4
            )
            one = picked[2][r].tolist() + picked[3][r].tolist()  # axiom 1
            torch.testing.assert_close(
                curve.draws[r, k, 1].item(), separation(X[one], label[one]), rtol=1e-4, atol=1e-4
            )


def test_every_permutation_keeps_how_many_texts_of_an_axiom_are_safe():
    """Axiom 0 has 3 unsafe and 6 safe texts, axiom 1 has 8 and 2; `permute`'s ranks, drawn again."""
    axiom, label = torch.tensor([0] * 9 + [1] * 10), torch.tensor([0] * 3 + [1] * 6 + [0] * 8 + [1] * 2)
    X = torch.randn(19, 4, generator=torch.Generator().manual_seed(0))
    curve = permute([X, X + label[:, None]], axiom, label, ["a", "b"], draws=3, seed=9)
    generator = torch.Generator().manual_seed(9)
    ranks = [torch.rand(3, n, generator=generator).argsort(1) for n in (9, 10)]
    shuffled = torch.cat([ranks[0] < 6, ranks[1] < 2], 1).long()
    assert curve.groups == [3, 2, 8] and torch.equal(shuffled.sum(1), torch.tensor([8, 8, 8]))
    for draw, y in zip(curve.draws[:, 0], shuffled):
        expected = [separation(X[axiom == 0], y[:9]), separation(X[axiom == 1], y[9:]), separation(X, y)]
        torch.testing.assert_close(draw, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_resamples_are_paired_over_lambdas_and_follow_the_seed():
    states, *rest = steered((1.0,))
    for resample in (bootstrap, permute):
        curve = resample([states[0], states[0] + 5.0], *rest, draws=200)  # 200: more than one block
        torch.testing.assert_close(curve.draws[:, 0], curve.draws[:, 1], rtol=1e-3, atol=1e-3)
        assert curve.draws.shape == (200, 2, 4) and curve.draws.std(0).min() > 0
        assert not torch.equal(curve.draws[:100], curve.draws[100:])  # the second block's are its own
        assert torch.equal(curve.draws, resample([states[0], states[0] + 5.0], *rest, draws=200).draws)
        assert not torch.equal(
            curve.draws, resample([states[0], states[0] + 5.0], *rest, draws=200, seed=1).draws
        )


@pytest.mark.slow
def test_shuffled_labels_separate_nothing_on_average():
    """E[sweep] = 0 exactly under permutation, because eta^2 averages 1 / (n - 1): that is what the scale
    takes off.
    """
    curve = permute(*steered((0.0, 3.0)), draws=2000)
    error = curve.draws.std(0) / 1500**0.5
    assert (curve.draws.mean(0).abs() < 4 * error).all()


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """Truth from 200,000 texts; 95 % intervals of 60 samples of 60 texts per label hold it in 53 or more
    (less: chance 0.01).
    """
    X, _, label = texts(per_group=100_000, axioms=1)
    X[:, 0] += 1.5 * label
    truth, covered = separation(X, label), 0
    for seed in range(60):
        states, axiom, label, _ = steered((1.5, 1.5), seed=seed, axioms=1, per_group=60)
        curve = bootstrap(states, axiom, label, ["a"], draws=2)
        low, high = level_interval(curve, "overall", 0.05)
        covered += int(low[0] <= truth <= high[0])
    assert 53 <= covered < 60  # all: chance 0.05, and it would be no 95 % interval


@pytest.mark.parametrize("gaps, expected", [
    ((1.0, 1.5, 2.0, 2.5, 3.0), "rising"), ((3.0, 2.5, 2.0, 1.5, 1.0), "falling"), ((2.0, 2.0, 2.0, 2.0, 2.0), "flat"),
    ((1.0, 3.0, 1.0, 3.0, 1.0), "erratic"), ((1.0, 3.0, 3.0, 3.0, 1.0), "erratic"), ((1.0, 3.0, 3.0, 3.0, 3.0), "rising"),
])  # fmt: skip
def test_verdicts(gaps, expected):
    result = judge(bootstrap(*steered(gaps), draws=300))
    assert result["verdict"] == expected
    assert result["low"][0] < result["estimate"][0] < result["high"][0]
    assert (result["change_interval"][0] > 0) == (expected == "rising")


def curve_of(estimate, draws):
    """A Curve of one axiom and "overall", both the same: estimate (K,), draws (R, K)."""
    estimate, draws = (
        torch.as_tensor(x, dtype=torch.float64)[..., None].expand(*np.shape(x), 2) for x in (estimate, draws)
    )
    return Curve(estimate, draws, ["a"], [10, 10], [9, 9], [10 / 9, 10 / 9])


@pytest.mark.slow
@pytest.mark.parametrize("level", (0.05, 0.2))
def test_numbers_of_a_verdict_are_numpys(level):
    """Skewed draws that lie off the estimate, with a spread of their own at each lambda."""
    from scipy import stats  # half a second of CPU time, which no other test here needs

    rng = np.random.default_rng(0)
    estimate = np.array([3.0, 2.9, 3.4, 5.0])
    draws = (
        estimate
        + 1
        + (rng.exponential(size=(500, 4)) + rng.exponential(size=(500, 1))) * [0.1, 0.2, 0.3, 0.4]
    )
    found = judge(curve_of(estimate, draws), permuted=curve_of(estimate, draws - 4), level=level)
    tails = [level / 2, 1 - level / 2]
    changes = draws[:, 3] - draws[:, 0]
    top, bottom = 2.0 - np.quantile(changes - changes.mean(), tails)
    noise = np.stack([draws[:, j] - draws[:, i] for j in range(4) for i in range(j)], 1)
    noise -= noise.mean(0)
    # Ten groups: their spread is 9 / 10 of the population's and known to 9 degrees of freedom.
    wider = few_groups_factor(curve_of(estimate, draws), "overall", level)
    assert wider == pytest.approx(
        stats.t.ppf(1 - level / 2, 9) / stats.norm.ppf(1 - level / 2) * (10 / 9) ** 0.5, rel=1e-3
    )
    top, bottom = 2 + wider * (top - 2), 2 + wider * (bottom - 2)
    normal = np.quantile(np.abs(noise / noise.std(0)).max(1), 1 - SPENT * level)
    one_pair = 2 * stats.norm.sf(normal)
    expected = {
        "change": 2.0, "change_interval": [bottom, top], "level": level,
        "critical_t": normal * few_groups_factor(curve_of(estimate, draws), "overall", one_pair),
        "p_monotone": (np.diff(draws - draws.mean(0) + estimate) > 0).all(1).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(np.asarray(value).tolist(), rel=1e-9), name
    assert found["low"] is None and found["high"] is None  # draws without a standard error of the level
    assert 0.1 < found["p_monotone"] < 0.9
    np.testing.assert_allclose(found["permuted"], np.quantile(draws - 4, [0.025, 0.975], axis=0))


def test_degrees_of_a_change_are_of_the_groups_that_move_at_any_lambda():
    """Four of 60 groups move ten times as far as the others, but hardly between the first two lambdas."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 5, 2, generator=generator, dtype=torch.float64)
    influence = torch.randn(60, 5, 2, generator=generator, dtype=torch.float64) / 60**0.5
    curve = Curve(draws[0], draws, ["a"], [30, 30], [28.0, 28.0], [1.0, 1.0], influence=influence)
    known = carriers_factor(curve, "a", 0.05)
    influence[:4] *= 10
    influence[:4, 1] = influence[:4, 0]
    factor = carriers_factor(curve, "a", 0.05)
    s = influence[:, :, 0].var(1)
    degrees = 6 / 4 * s.sum() ** 2 / (s**2).sum()
    t = student_quantile(0.975, degrees.item()) / student_quantile(0.975, 28.0)
    assert 3 < degrees < 9 and t > 1.1 and factor[0] == pytest.approx(known[0].item() * t, rel=0.1)
    assert factor[1] > 2 * factor[0]


@pytest.mark.parametrize("sign", (1, -1))
def test_a_move_that_the_ends_do_not_share_is_erratic(sign):
    """Differences of 3, -1.5 and, between the ends, 1.5, each +- 0.85; the critical |t| is 3.3: ten
    groups.
    """
    estimate = sign * np.array([0.0, 3.0, 1.5])
    found = judge(curve_of(estimate, estimate + np.random.default_rng(0).normal(size=(1000, 3), scale=0.6)))
    assert found["verdict"] == "erratic" and found["change_interval"][0] < 0 < found["change_interval"][1]
    assert 3.2 < found["critical_t"] < 3.5


@pytest.mark.parametrize("ends, verdict", [((1.0, 11.0), "rising"), ((11.0, 1.0), "falling")])
def test_shuffled_labels_are_compared_with_the_higher_end(ends, verdict):
    """At the lower end of a curve the labels may separate as little as they like."""
    noise = np.random.default_rng(0).normal(size=(400, 2))
    curve = curve_of(ends, np.array(ends) + noise)
    assert judge(curve, permuted=curve_of(ends, noise + 2))["verdict"] == verdict
    assert judge(curve, permuted=curve_of(ends, noise + 12))["verdict"] == "flat"


def test_a_steady_rise_is_monotone_and_in_every_axiom():
    curve = bootstrap(*steered((1.0, 1.5, 2.0, 2.5, 3.0)), draws=300)
    assert judge(curve)["p_monotone"] > 0.95
    assert [judge(curve, category=axiom)["verdict"] for axiom in "abc"] == ["rising"] * 3


def test_identical_states_are_flat():
    result = judge(bootstrap(*steered((1.0, 1.0, 1.0)), draws=50))
    assert result["verdict"] == "flat" and result["change"] == 0 and result["change_interval"] == [0, 0]
    assert result["p_monotone"] == 0


@pytest.mark.parametrize("per_group, verdict", [(2, "flat"), (4, "flat"), (5, "rising")])
def test_few_texts_are_never_called_a_change(per_group, verdict):
    """All numbers are finite where a resample draws one text of each label over and over."""
    curve = bootstrap(*steered((1.0, 20.0, 100.0), per_group=per_group), draws=300)
    assert curve.draws.isfinite().all() and curve.groups == [per_group] * 3 + [3 * per_group]
    found = judge(curve, category="a")
    assert found["verdict"] == verdict and np.isfinite(found["change_interval"]).all()
    few = [f"{per_group} independent texts of one label are too few: expected 5"]
    assert found["because"] == (few if verdict == "flat" else [])
    assert (found["decision"] == "too few") == (verdict == "flat") and found["low"] is None


def test_equal_texts_have_nothing_to_explain():
    X, axiom, label, names = steered((0.0, 0.0), per_group=2)
    same = [torch.zeros_like(x) for x in X]
    assert bootstrap(same, axiom, label, names, draws=20).draws.eq(0).all()


def test_shuffled_labels_take_the_verdict_back():
    """A curve judged against a null that separates as well as it does."""
    curve = bootstrap(*steered((1.0, 2.0, 3.0)), draws=200)
    assert judge(curve, permuted=permute(*steered((1.0, 2.0, 3.0)), draws=200))["verdict"] == "rising"
    assert judge(curve, permuted=curve)["because"] == ["the labels separate no better than shuffled ones"]


def test_bad_input():
    states, axiom, label, names = steered((1.0, 2.0))
    with pytest.raises(ValueError, match="1 lambdas; expected at least two"):
        bootstrap(states[:1], axiom, label, names)
    with pytest.raises(ValueError, match=r"category='d': expected one of \['a', 'b', 'c', 'overall'\]"):
        judge(bootstrap(states, axiom, label, names, draws=5), category="d")
    with pytest.raises(ValueError, match=r"expected at least two each"):
        bootstrap(states, axiom, torch.zeros_like(label), names)
    states[1][4, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"embeddings 1 of shape \(240, 6\); expected 240 rows of finite numbers"
    ):
        bootstrap(states, axiom, label, names)
