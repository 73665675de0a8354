"""How far apart two labels lie in a cloud of embeddings: indices, moments in one pass, a linear probe.

Letters: n points, D hidden size, L layers, A axioms, G groups, B points of a batch. Labels: 0 unsafe, 1 safe.
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis.groups import check_groups
from plumbing.files import UserError

SEED = 42
OVERALL = "overall"  # the category of all axioms together

# ---------------------------------------------------------------- indices of two clusters


def chi(X, labels):
    """Calinski-Harabasz index B / (W / (n - 2)) of two labelled clusters; X (n, D). Higher is better.

    UserError as `_checked`.
    """
    return two_cluster_indices(*cluster_moments(X, labels))["chi"].item()


def xie_beni(X, labels):
    """Xie-Beni index W / (n |c1 - c0|^2) of two labelled clusters; X (n, D). Lower is better.

    UserError as `_checked`.
    """
    return two_cluster_indices(*cluster_moments(X, labels))["xb"].item()


def eta_squared(X, labels):
    """B / (B + W), in [0, 1]: share of variance between the labels. Unlike CHI it does not grow with n."""
    return two_cluster_indices(*cluster_moments(X, labels))["eta2"].item()


def davies_bouldin(X, labels):
    """(s0 + s1) / |c1 - c0|, s the mean distance of a cluster to its centre. Lower is better."""
    X, labels = _checked(X, labels)
    unsafe, safe = X[labels == 0], X[labels == 1]
    unsafe_spread = (unsafe - unsafe.mean(0)).norm(dim=1).mean()
    safe_spread = (safe - safe.mean(0)).norm(dim=1).mean()
    gap = (safe.mean(0) - unsafe.mean(0)).norm()
    return ((unsafe_spread + safe_spread) / gap).item()


def dunn(X, labels):
    """Smallest distance between points of two clusters over the largest within one (Dunn 1974). O(n^2 D).

    Higher is better. As with chi, infinite where each cluster is one point, NaN where the two are the same.
    """
    X, labels = _checked(X, labels)
    nearest, diameter = torch.inf, 0.0
    for d, own in _distance_blocks(X, labels):  # (r, n) each
        nearest = min(nearest, d.masked_fill(own, torch.inf).min().item())
        diameter = max(diameter, d.masked_fill(~own, 0.0).max().item())
    return (torch.tensor(nearest, dtype=torch.float64) / diameter).item()


def silhouette(X, labels):
    """Mean of (b - a) / max(a, b) over points, in [-1, 1]; a point alone in its cluster counts 0. O(n^2 D).

    a: a point's mean distance to the rest of its own cluster; b: to the other cluster.
    """
    X, labels = _checked(X, labels)
    sizes = torch.bincount(labels, minlength=2)
    total, start = 0.0, 0
    for d, own in _distance_blocks(X, labels):
        mine = labels[start : start + len(d)]
        a = (d * own).sum(1) / (sizes[mine] - 1).clamp(min=1)
        b = (d * ~own).sum(1) / sizes[1 - mine]
        widths = (b - a) / torch.maximum(a, b)
        total += widths.masked_fill(sizes[mine] == 1, 0.0).nan_to_num(0.0).sum().item()
        start += len(d)
    return total / len(X)


def _distance_blocks(X, labels):
    """(distances (r, n), same cluster (r, n)) of r = 1,024 rows at a time."""
    for x, own in zip(X.split(1024), labels.split(1024)):
        yield torch.cdist(x, X, compute_mode="donot_use_mm_for_euclid_dist"), own[:, None] == labels


def _checked(X, labels):
    """X float64 and labels int64 0 / 1.

    UserError for NaN or infinity, other than two labels, or fewer than three points.
    """
    X = torch.as_tensor(X).double()
    values, labels = np.unique(np.asarray(labels), return_inverse=True)
    if X.ndim != 2 or len(X) != len(labels):
        shape = tuple(X.shape)
        raise UserError(f"X has shape {shape} with {len(labels)} labels; expected (n, D) with n labels")
    if len(values) != 2 or len(X) < 3:
        found = f"{len(values)} distinct ({', '.join(map(str, values[:5]))}) on {len(X)} points"
        raise UserError(f"labels: {found}; expected two, on 3 points or more")
    if not torch.isfinite(X).all():
        bad = int((~torch.isfinite(X)).any(1).sum())
        raise UserError(f"X: {bad} of {len(X)} points hold NaN or infinity; expected finite embeddings")
    return X, torch.as_tensor(labels, device=X.device).long()


def cluster_moments(X, labels):
    """n (2,), sum (2, D) and sum of squares (2,) of two labelled clusters about their common mean, float64.

    UserError as `_checked`.
    """
    X, labels = _checked(X, labels)
    return group_moments(X, X.mean(0), labels, 2)


def group_moments(x, centre, group, num_groups):
    """n (G,), sum (x - centre) (G, D), sum |x - centre|^2 (G,) of the points of each group, float64.

    x (B, D), group (B,) int64.
    The centre is any fixed point near the data: sum |x|^2 - |sum x|^2 / n would lose all digits to an offset
    of 1e8 spreads. A product with a one-hot matrix and not index_add: that one is not deterministic on CUDA.
    """
    x = x.double() - centre
    member = torch.nn.functional.one_hot(group, num_groups).double().T  # (G, B)
    return member.sum(1), member @ x, member @ x.square().sum(1)


def two_cluster_indices(n, total, square):
    """CHI, XB, eta^2 of two clusters: n (..., 2), total (..., 2, D), square (..., 2) -> dict of (...).

    W = sum |x|^2 - sum_c |S_c|^2 / n_c,  B = n0 n1 / n |c1 - c0|^2. So CHI * XB = (n - 2) n0 n1 / n^2: the
    two are one statistic.
    """
    centre = total / n[..., None]
    within = (square - (centre * total).sum(-1)).sum(-1).clamp(min=0)
    gap = (centre[..., 1, :] - centre[..., 0, :]).square().sum(-1)
    size = n.sum(-1)
    between = n.prod(-1) / size * gap
    return {
        "n": size,
        "chi": between * (size - 2) / within,
        "xb": within / (size * gap),
        "eta2": between / (between + within),
    }


# ---------------------------------------------------------------- moments of many layers


@dataclass
class Moments:
    """n, sum x and sum |x|^2 for every layer, axiom and label: all that CHI, XB and eta^2 need.

    float64, about the mean of each layer's first batch. L = 32, A = 7, D = 4096: 15 MB.
    """

    n: torch.Tensor  # (L, A, 2)
    total: torch.Tensor  # (L, A, 2, D)
    square: torch.Tensor  # (L, A, 2)
    centre: torch.Tensor  # (L, D)

    @classmethod
    def zeros(cls, layers, axioms, hidden_size, device="cpu"):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        total = zeros(layers, axioms, 2, hidden_size)
        return cls(zeros(layers, axioms, 2), total, zeros(layers, axioms, 2), zeros(layers, hidden_size))

    def add(self, layer, pooled, axiom, label):
        """Take in the pooled states (B, D) of one layer; axiom and label (B,) int64."""
        if not self.n[layer].any():  # the first batch
            self.centre[layer] = pooled.double().mean(0)
        n, total, square = group_moments(pooled, self.centre[layer], 2 * axiom + label, self.n[layer].numel())
        self.n[layer] += n.view(-1, 2)
        self.total[layer] += total.view_as(self.total[layer])
        self.square[layer] += square.view(-1, 2)

    def rows(self, axioms):
        """One dict (layer, category, n, chi, xb, eta2) per layer and category, "overall" last.

        UserError for NaN, or for an axiom with fewer than two texts of a label.
        """
        if not torch.isfinite(self.square).all():
            layers = (~torch.isfinite(self.square)).flatten(1).any(1).nonzero().flatten().tolist()
            raise UserError(f"embeddings hold NaN or infinity in layers {layers}; expected finite ones")
        if not (self.n >= 2).all():
            few = int((self.n < 2).sum())
            found = f"{few} groups of layer, axiom and label have fewer than two texts"
            raise UserError(f"moments: {found}; expected none")
        sums = []
        for x in (self.n, self.total, self.square):
            sums.append(torch.cat([x, x.sum(1, keepdim=True)], 1))  # (L, A + 1, ...)
        indices = two_cluster_indices(*sums)
        found = []
        for layer in range(len(self.n)):
            for c, category in enumerate([*axioms, OVERALL]):
                values = {name: index[layer, c].item() for name, index in indices.items()}
                found.append({"layer": layer, "category": category} | values)
        return found


# ---------------------------------------------------------------- linear probe


def auc(scores, labels):
    """Area under the ROC curve: the chance that a safe text scores above an unsafe one, ties half.

    scores (n,), labels (n,) 0 / 1.
    """
    _, inverse, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    # 1-based; tied scores share the mean of their ranks.
    ranks = (counts.cumsum(0) - (counts - 1).double() / 2)[inverse]
    n1 = int(labels.sum())
    n0 = len(labels) - n1
    return ((ranks[labels == 1].sum() - n1 * (n1 + 1) / 2) / (n0 * n1)).item()


def probe_auc(X, labels, folds=5, penalty=0.1, group=None):
    """Mean AUC over folds of `held_out_scores`: does any direction of the states show the label?

    None where fewer groups than folds hold a label. UserError as `_checked`.
    """
    X, labels = _checked(X, labels)
    if holds_labels(labels.cpu(), check_groups(group, len(X))).sum(0).min() < folds:
        return None
    scores, fold = held_out_scores(X, labels, folds, penalty, group)
    return sum(auc(scores[fold == k], labels[fold == k]) for k in range(folds)) / folds


def held_out_scores(X, labels, folds=5, penalty=0.1, group=None):
    """(scores (n,), fold (n,)): each text scored by a ridge classifier of the other folds. X (n, D).

    Folds are stratified by label and never split a group (n,): a copy of a training text is not held out.
    UserError where fewer groups than folds hold a label.
    Closed form, w = X' (X X' + a I)^-1 y on centred X and y = +-1, in whichever of n and D is smaller;
    a = penalty * mean |x|^2. Scores of two folds do not compare.
    """
    X, labels = _checked(X, labels)
    fold = _folds(labels.cpu(), check_groups(group, len(X)), folds).to(X.device)
    scores = torch.empty_like(X[:, 0])
    for k in range(folds):
        centre = X[fold != k].mean(0)
        train = X[fold != k] - centre
        y = 2 * labels[fold != k].double() - 1
        y = y - y.mean()
        is_dual = len(train) < train.shape[1]
        gram = train @ train.T if is_dual else train.T @ train
        gram.diagonal().add_(penalty * train.square().sum() / len(train) + 1e-12)
        if is_dual:
            w = train.T @ torch.linalg.solve(gram, y)
        else:
            w = torch.linalg.solve(gram, train.T @ y)
        scores[fold == k] = (X[fold == k] - centre) @ w
    return scores, fold


def holds_labels(labels, group):
    """(G, 2) bool: whether a group holds an unsafe text, a safe one. labels, group (n,) int64 from 0."""
    slots = 2 * (int(group.max()) + 1)
    return torch.bincount(2 * group + labels, minlength=slots).view(-1, 2) > 0


def _folds(labels, group, folds):
    """(n,) fold of every text: whole groups, shuffled among those that hold the same labels."""
    holds = holds_labels(labels, group)
    count, found = len(holds), holds.sum(0).tolist()
    if min(found) < folds:
        what = "points" if count == len(group) else "groups"
        raise UserError(f"probe: {found} {what} per label; expected at least {folds} for {folds} folds")
    # Groups of both labels are dealt between those of one. So the groups that hold a label are neighbours,
    # and every fold gets one of them.
    kind = 1 + holds[:, 1].long() - holds[:, 0].long()  # 0 unsafe, 1 both, 2 safe
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))
    order = order[kind[order].argsort(stable=True)]  # kind by kind, shuffled inside
    group_fold = torch.empty(count, dtype=torch.int64)
    group_fold[order] = torch.arange(count) % folds
    return group_fold[group]


# (X, labels) -> float, or None where the texts are too few
EXTRA = {"davies_bouldin": davies_bouldin, "dunn": dunn, "silhouette": silhouette, "probe_auc": probe_auc}
