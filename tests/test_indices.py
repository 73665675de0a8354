"""indices.py against scikit-learn, brute force, and the identities that hold for two labelled clusters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.indices import (
    Moments,
    auc,
    chi,
    davies_bouldin,
    dunn,
    eta_squared,
    group_moments,
    held_out_scores,
    probe_auc,
    silhouette,
    xie_beni,
)


@pytest.fixture(scope="module")
def metrics():
    return pytest.importorskip("sklearn.metrics")


def two_clusters(n0=30, n1=50, dims=8, gap=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n0 + n1, dims, generator=generator, dtype=torch.float64)
    X[n0:] += gap
    return X, torch.cat([torch.zeros(n0, dtype=torch.long), torch.ones(n1, dtype=torch.long)])


cluster_cases = st.builds(
    two_clusters,
    n0=st.integers(2, 40),
    n1=st.integers(2, 40),
    dims=st.integers(1, 12),
    gap=st.floats(0.01, 5),
    seed=st.integers(0, 10**6),
)


def test_by_hand():
    """Points 0, 2 and 4, 6 on a line: W = 4, centres 1 and 5, B = 16. CHI = 16 / (4 / 2), XB = 4 / (4 x 16),
    eta^2 = 16 / 20.
    """
    X, labels = torch.tensor([[0.0], [2.0], [4.0], [6.0]]), ["safe", "safe", "unsafe", "unsafe"]
    assert (chi(X, labels), xie_beni(X, labels), eta_squared(X, labels)) == (8.0, 0.0625, 0.8)
    assert davies_bouldin(X, labels) == 0.5  # (1 + 1) / 4
    assert dunn(X, labels) == 1.0  # 2 / 2
    # a = 2 for all; b = 5, 3, 3, 5
    assert silhouette(X, labels) == pytest.approx((3 / 5 + 1 / 3) / 2)


@pytest.mark.slow
@given(cluster_cases)
@settings(deadline=None, max_examples=60)
def test_equal_scikit_learns(metrics, case):
    X, labels = case
    assert chi(X, labels) == pytest.approx(metrics.calinski_harabasz_score(X, labels), rel=1e-6)
    assert davies_bouldin(X, labels) == pytest.approx(metrics.davies_bouldin_score(X, labels), rel=1e-6)
    assert silhouette(X, labels) == pytest.approx(metrics.silhouette_score(X, labels), rel=1e-6, abs=1e-9)


@pytest.mark.slow
@given(cluster_cases)
@settings(deadline=None, max_examples=60)
def test_identity_1_chi_and_xb_are_one_statistic(case):
    X, labels = case
    n, n1 = len(X), int(labels.sum())
    assert chi(X, labels) * xie_beni(X, labels) == pytest.approx((n - 2) * (n - n1) * n1 / n**2, rel=1e-9)
    assert eta_squared(X, labels) == pytest.approx(chi(X, labels) / (chi(X, labels) + n - 2), rel=1e-9)


@given(cluster_cases, st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_identity_2_chi_grows_with_n_and_eta_squared_does_not(case, times):
    """Every point repeated: the same separation, CHI / (n - 2) and eta^2 the same, CHI itself grown by (n' -
    2) / (n - 2).
    """
    X, labels = case
    more, more_labels = X.repeat(times, 1), labels.repeat(times)
    assert eta_squared(more, more_labels) == pytest.approx(eta_squared(X, labels), rel=1e-9)
    assert chi(more, more_labels) == pytest.approx(
        chi(X, labels) * (times * len(X) - 2) / (len(X) - 2), rel=1e-9
    )


@pytest.mark.slow
@given(cluster_cases, st.lists(st.floats(-1e3, 1e3), min_size=12, max_size=12))
@settings(deadline=None, max_examples=30)
def test_identity_8_one_vector_added_to_every_point_changes_nothing(case, vector):
    X, labels = case
    moved = X + torch.tensor(vector, dtype=X.dtype)[: X.shape[1]]
    for index in (chi, xie_beni, eta_squared, davies_bouldin, dunn, silhouette):
        assert index(moved, labels) == pytest.approx(index(X, labels), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("index", [chi, xie_beni, eta_squared, davies_bouldin, dunn, silhouette])
def test_the_order_of_the_points_does_not_matter(index):
    X, labels = two_clusters()
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    assert index(X[order], labels[order]) == pytest.approx(index(X, labels), rel=1e-12)


@pytest.mark.slow
def test_dunn_equals_brute_force_over_blocks(metrics):
    X, labels = two_clusters(600, 700, dims=3)
    d = torch.cdist(X, X)
    own = labels[:, None] == labels[None]
    assert dunn(X, labels) == pytest.approx((d[~own].min() / d[own].max()).item(), rel=1e-12)
    assert silhouette(X, labels) == pytest.approx(metrics.silhouette_score(X, labels), rel=1e-9)


def test_the_metrics_take_other_labels_and_types():
    X, labels = two_clusters()
    expected = chi(X, labels)
    assert chi(X.numpy(), labels.numpy()) == expected
    assert chi(X, labels == 0) == pytest.approx(expected)
    assert chi(X, ["safe" if label else "unsafe" for label in labels]) == expected
    assert chi(X.float(), labels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("index", [chi, xie_beni, eta_squared, davies_bouldin, dunn, silhouette, probe_auc])
def test_bad_input(index):
    X, labels = two_clusters()
    with pytest.raises(ValueError, match=r"1 distinct \(0.*\) on 80 points; expected two"):
        index(X, torch.zeros(80))
    with pytest.raises(ValueError, match="2 points; expected two, on 3 points or more"):
        index(X[-31:-29], [0, 1])
    with pytest.raises(ValueError, match=r"shape \(80, 8\) with 79 labels"):
        index(X, labels[1:])
    X[3, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 80 points hold NaN"):
        index(X, labels)


@pytest.mark.parametrize("gap, expected", [(1.0, math.inf), (0.0, math.nan)])
def test_clusters_of_equal_points(gap, expected):
    """gap / 0: what divides by the spread within says so and does not stop."""
    labels = torch.tensor([0, 0, 1, 1])
    for index in (chi, dunn):
        assert index(gap * labels[:, None].double().expand(4, 3), labels) == pytest.approx(
            expected, nan_ok=True
        )


# ---------------------------------------------------------------- moments


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("batch", [1, 13, 400])
def test_streamed_moments_equal_the_direct_formulas(metrics, offset, batch):
    """Three layers, four axioms, any batches; the offset of 1e5 spreads would cost sum |x|^2 - n |c|^2 ten of
    its sixteen digits.
    """
    generator = torch.Generator().manual_seed(0)
    axiom, label = (
        torch.randint(4, (400,), generator=generator),
        torch.randint(2, (400,), generator=generator),
    )
    states = torch.randn(3, 400, 16, generator=generator, dtype=torch.float64)
    states[1] += label[:, None]
    states[2] *= 1 + axiom[:, None]
    states += offset * torch.arange(1, 4)[:, None, None]
    moments = Moments.zeros(3, 4, 16)
    for rows in torch.arange(400).split(batch):
        for layer in range(3):
            moments.add(layer, states[layer, rows], axiom[rows], label[rows])
    rows = moments.rows(list("abcd"))
    assert [(row["layer"], row["category"]) for row in rows] == [
        (layer, c) for layer in range(3) for c in (*"abcd", "overall")
    ]
    for row in rows:
        mine = (
            axiom == "abcd".find(row["category"])
            if row["category"] != "overall"
            else torch.ones(400, dtype=torch.bool)
        )
        X = states[row["layer"], mine]
        assert row["n"] == int(mine.sum())
        assert row["chi"] == pytest.approx(chi(X, label[mine]), rel=1e-8)
        assert row["xb"] == pytest.approx(xie_beni(X, label[mine]), rel=1e-8)
        assert row["eta2"] == pytest.approx(eta_squared(X, label[mine]), rel=1e-8)
        assert row["chi"] == pytest.approx(
            metrics.calinski_harabasz_score(X - X.mean(0), label[mine]), rel=1e-6
        )


def test_moments_are_float64_whatever_comes_in():
    x = torch.full((4, 2), 3.0, dtype=torch.bfloat16)
    n, total, square = group_moments(x, torch.zeros(2), torch.tensor([0, 2, 2, 2]), 3)
    assert (
        n.tolist() == [1, 0, 3]
        and total.tolist() == [[3, 3], [0, 0], [9, 9]]
        and square.tolist() == [18, 0, 54]
    )
    assert square.dtype == total.dtype == torch.float64


def test_moments_refuse_nan_and_missing_labels():
    moments = Moments.zeros(2, 1, 3)
    label = torch.tensor([0, 1, 0, 1])
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    moments.add(0, states, torch.zeros(4, dtype=torch.long), label)
    with pytest.raises(ValueError, match="2 groups of layer, axiom and label have fewer than two texts"):
        moments.rows(["a"])
    moments.add(1, states * float("nan"), torch.zeros(4, dtype=torch.long), label)
    with pytest.raises(ValueError, match=r"NaN or infinity in layers \[1\]"):
        moments.rows(["a"])


# ---------------------------------------------------------------- probe


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40).filter(
        lambda rows: len({y for _, y in rows}) == 2
    )
)
@settings(deadline=None, max_examples=60)
def test_auc_equals_scikit_learns_with_ties(metrics, rows):
    scores, labels = (torch.tensor(column) for column in zip(*rows))
    assert auc(scores.double(), labels.long()) == pytest.approx(
        metrics.roc_auc_score(labels, scores), abs=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("dims", [10, 300])
def test_probe_is_as_good_as_logistic_regression(dims):
    """In the primal (D < n) and the dual (D > n) form."""
    linear_model, model_selection = (
        pytest.importorskip("sklearn.linear_model"),
        pytest.importorskip("sklearn.model_selection"),
    )
    X, labels = two_clusters(100, 120, dims, gap=0.0)
    X[:, 1] += 1.5 * labels
    X[:, 0] *= 5  # a loud direction without the label
    folds = model_selection.StratifiedKFold(5, shuffle=True, random_state=0)
    oracle = model_selection.cross_val_score(
        linear_model.LogisticRegression(max_iter=2000), X, labels, cv=folds, scoring="roc_auc"
    ).mean()
    assert abs(probe_auc(X, labels) - oracle) < 0.04
    assert probe_auc(X, labels) == probe_auc(X, labels)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [6, 90])
def test_probe_is_sklearns_ridge_fold_by_fold(metrics, dims):
    """Labels far from balanced, so that the training folds have a mean of their own."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, labels = two_clusters(12, 61, dims, gap=0.3)
    order = torch.randperm(73, generator=torch.Generator().manual_seed(42))
    order = torch.cat([order[labels[order] == label] for label in (0, 1)])
    areas = []
    for k in range(5):
        held_out, rest = order[k::5], torch.cat([order[i::5] for i in range(5) if i != k])
        penalty = 0.1 * (X[rest] - X[rest].mean(0)).square().sum(1).mean().item()
        ridge = linear_model.Ridge(penalty).fit(X[rest], labels[rest])
        areas.append(metrics.roc_auc_score(labels[held_out], ridge.predict(X[held_out])))
    assert probe_auc(X, labels) == pytest.approx(sum(areas) / 5, abs=1e-9)


def test_probe_primal_equals_dual():
    """Columns of zeros take the dual form without changing the problem."""
    X, labels = two_clusters(40, 40, 50, gap=0.2)
    wide = torch.cat([X, torch.zeros(80, 30, dtype=X.dtype)], 1)
    assert probe_auc(wide, labels) == pytest.approx(probe_auc(X, labels), abs=1e-9)


@pytest.mark.parametrize("pure", [(0, 0), (1, 0), (0, 1), (7, 3), (2, 9)])
def test_every_fold_has_both_labels(pure):
    """Six groups of both labels, unsafe text first, and so many of one: no fold is left without a label."""
    unsafe, safe = pure
    labels = torch.cat([torch.tensor([0, 1]).repeat(6), torch.zeros(unsafe), torch.ones(safe)]).long()
    group = torch.cat([torch.arange(12) // 2, torch.arange(6, 6 + unsafe + safe)])
    X = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0))
    _, fold = held_out_scores(X, labels, group=group)
    held = [(int(k), int(y)) for k, y in zip(fold, labels)]
    assert len(set(held)) == 10
    assert len({(int(k), int(g)) for k, g in zip(fold, group)}) == int(group.max()) + 1


def test_probe_finds_nothing_where_nothing_is():
    X, labels = two_clusters(200, 200, 20, gap=0.0)
    assert abs(probe_auc(X, labels) - 0.5) < 0.08
    assert probe_auc(*two_clusters(3, 50)) is None
    with pytest.raises(ValueError, match=r"\[3, 50\] points per label; expected at least 5 for 5 folds"):
        held_out_scores(*two_clusters(3, 50))
