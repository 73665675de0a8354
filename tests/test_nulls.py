"""nulls.py: directions of the right length and span, curves against steering one by one, ranks that are
exact.
"""

import numpy as np
import pytest
import torch
from tiny_models import random_documents, random_llama, tiny_config

from analysis import nulls as nulls_module
from analysis.curves import Curve, Design, cell_sums, separation
from analysis.nulls import Nulls, compare, isotropic_directions, null_curves, rank, sign_flipped_directions
from analysis.steering import pool, steered_runs
from analysis.verdict import judge

CONFIG = tiny_config(num_hidden_layers=4)
D = CONFIG.hidden_size


def additions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {layer: (layer + 1) * torch.randn(D, generator=generator) for layer in (1, 2, 3)}


def test_isotropic_directions_have_the_vectors_length_and_no_preference():
    add = additions()
    found = isotropic_directions(add, 400)
    for layer, directions in found.items():
        torch.testing.assert_close(directions.norm(dim=1), add[layer].norm().expand(400))
        assert (
            torch.nn.functional.cosine_similarity(directions, found[1], dim=1) > 0.99999
        ).all()  # one for all layers
    unit = found[1] / found[1].norm(dim=1, keepdim=True)
    assert unit.mean(0).norm() < 0.1 and (unit.T @ unit / 400 * D - torch.eye(D)).abs().mean() < 0.1
    assert torch.equal(isotropic_directions(add, 400)[2], found[2])
    assert not torch.equal(isotropic_directions(add, 400, seed=1)[2], found[2])


def test_sign_flipped_directions_lie_in_the_span_of_the_differences():
    add = additions()
    generator = torch.Generator().manual_seed(1)
    differences = {layer: torch.randn(6, D, generator=generator) for layer in add}
    found = sign_flipped_directions(differences, add, 50)
    signs = []
    for layer, directions in found.items():
        torch.testing.assert_close(directions.norm(dim=1), add[layer].norm().expand(50))
        weights = torch.linalg.lstsq(
            differences[layer].T, directions.T
        ).solution.T  # (50, 6), +- one number each
        torch.testing.assert_close(weights.abs(), weights.abs()[:, :1].expand(50, 6), rtol=1e-3, atol=1e-4)
        signs.append(weights.sign())
    assert torch.equal(signs[0], signs[1]) and torch.equal(signs[0], signs[2])  # one sign a text
    assert (signs[0].sum(1) == 0).all() and len({tuple(row) for row in signs[0].tolist()}) > 10
    common = {layer: 100 + values for layer, values in differences.items()}  # what all texts share cancels
    torch.testing.assert_close(sign_flipped_directions(common, add, 50)[1], found[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(sign_flipped_directions(differences, add, 50)[1], found[1])


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [False, True])
def test_null_curves_are_those_of_steering_one_by_one(rescale, monkeypatch):
    """Three directions, three lambdas, several batches and several copies to a pass."""
    monkeypatch.setattr("analysis.steering.TOKENS_PER_BATCH", 40)
    monkeypatch.setattr(nulls_module, "TOKENS_PER_BATCH", 90)
    model = random_llama(CONFIG)
    lengths = [3, 9, 12, 5, 7, 11, 4, 8, 6, 10, 13, 5]
    documents = [
        (ids.numpy(), np.ones(len(ids), bool)) for ids in random_documents(CONFIG.vocab_size, lengths, 2)
    ]
    axiom = torch.tensor([0] * 6 + [1] * 6)
    label = torch.arange(12) % 2
    directions = isotropic_directions(additions(), 3)
    lambdas = [0.0, 0.5, 1.0]
    found = null_curves(model, documents, directions, lambdas, axiom, label, ["a", "b"], "cpu", rescale)
    design = Design(axiom, label, ["a", "b"])
    for m in range(3):
        add = {layer: rows[m] for layer, rows in directions.items()}
        states = torch.zeros(3, 12, D)
        for run in steered_runs(model, documents, add, lambdas, "cpu", rescale):
            states[run.index, torch.as_tensor(run.rows)] = pool(run.hidden, run.batch.cu_seqlens, "mean")
        for k in range(3):
            expected = separation(*cell_sums(design.centred(states[k]), design))[0]
            torch.testing.assert_close(found[m, k], expected, rtol=1e-3, atol=1e-3)
    assert (found[:, 0] == found[0, 0]).all()  # lambda 0 is the unsteered model whatever the direction
    assert found[:, 2, -1].std() > 0.1


# ---------------------------------------------------------------- ranks


def curve_of(estimate, spread=0.05, seed=0):
    """Curve of estimate (K, A + 1) whose resamples scatter by `spread`."""
    estimate = torch.as_tensor(estimate, dtype=torch.float64)
    noise = torch.randn(
        400, *estimate.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    axioms = [str(a) for a in range(estimate.shape[1] - 1)]
    sizes = [20] * estimate.shape[1], [19] * estimate.shape[1], [20 / 19] * estimate.shape[1]
    return Curve(estimate, estimate + spread * noise, axioms, *sizes)


def test_rank():
    values = torch.tensor([0.1, 0.5, 0.5, 2.0])
    assert [rank(value, values) for value in (3.0, 2.0, 0.5, 0.0)] == [1 / 5, 2 / 5, 4 / 5, 1]


def test_the_worse_kind_counts_and_the_size_is_in_its_deviations():
    straight = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    changes = torch.linspace(-0.9, 0.9, 19, dtype=torch.float64)
    small = changes[:, None, None] * straight
    found = compare(curve_of(straight.expand(2, 2)), Nulls({"small": small.expand(19, 2, 2)}), "overall")
    assert found["p_change"] == 1 / 20
    assert found["null_sd"] == pytest.approx(changes.square().mean().sqrt().item())
    assert found["size_sd"] == pytest.approx(1 / found["null_sd"])
    both = Nulls({"small": small.expand(19, 2, 2), "large": 3 * small.expand(19, 2, 2)})
    worse = compare(curve_of(straight.expand(2, 2)), both, "overall")
    larger = (3 * changes.abs() >= 1).sum().item()
    assert (
        worse["p_by_kind"] == {"small": 1 / 20, "large": (1 + larger) / 20}
        and worse["p_change"] == (1 + larger) / 20
    )
    assert worse["null_sd"] == pytest.approx(3 * found["null_sd"])


def test_random_directions_take_the_verdict_back():
    rising = curve_of([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    signs = torch.tensor([1.0, -1.0]).repeat(10)[:19]

    def nulls(size):
        ends = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
        return Nulls({"isotropic": 1 + size * signs[:, None, None] * ends})

    small, large = judge(rising, nulls=nulls(0.3)), judge(rising, nulls=nulls(2.5))
    assert (small["verdict"], small["is_the_vectors"], small["decision"]) == ("rising", True, "go on")
    assert small["relevant"] == 1.0 and small["nulls"]["size_sd"] == pytest.approx(2 / 0.3)
    assert (large["verdict"], large["is_the_vectors"], large["decision"]) == ("flat", False, "any direction")
    assert large["because"] == [
        "random directions of equal norm change as much (p 1.00 among 19 of each kind)"
    ]
    assert judge(rising, nulls=nulls(0.8))["matters"] == "yes"  # 2 [1.9, 2.1] against 1.6
    assert judge(rising, nulls=nulls(0.8), relevant=3)["decision"] == "too small"
    assert judge(rising, relevant=3)["decision"] == judge(rising)["decision"] == "no null"


def test_nothing_is_said_of_random_directions_where_none_was_run():
    """A curve that moves and returns, and nulls, which are of the ends: there they do more than it does."""
    erratic = curve_of([[0.2, 0.2], [3.1, 3.1], [11.9, 11.9], [3.1, 3.1], [0.2, 0.2]])
    ends = torch.tensor([0.0, 0.5], dtype=torch.float64)[None, :, None].expand(19, 2, 2)
    found = judge(erratic, nulls=Nulls({"isotropic": ends}))
    assert found["nulls"]["p_change"] == 1.0
    assert (found["verdict"], found["is_the_vectors"]) == ("flat", None)
    assert found["because"] == ["it moves between the first and the last lambda, where random directions are not run"]
    assert found["decision"] == "no trend" and "first and last lambda only" in found["advice"]
    alone = judge(erratic)
    assert (alone["verdict"], alone["because"], alone["decision"]) == ("erratic", [], "no trend")


@pytest.mark.slow
def test_p_of_one_axiom_or_another_is_exact_over_all_axioms():
    """Curves that are nulls themselves: over 400 draws, 5 % have an axiom with p of 0.05, whatever the
    axioms' scales.
    """
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 5.0, 1.0], dtype=torch.float64)
    alarms = 0
    for _ in range(400):
        curves = torch.randn(20, 2, 4, generator=generator).double() * scales
        curve, nulls = curve_of(curves[0]), Nulls({"isotropic": curves[1:]})
        alarms += min(compare(curve, nulls, axiom)["p_change"] for axiom in "012") <= 0.05
    assert 8 <= alarms <= 33  # 20 expected, 3 standard deviations of 4.4


def test_nulls_refuse_other_lambdas_and_nan():
    expected = r"isotropic: \(19, 3, 3\); expected finite numbers \(M, 2, A \+ 1\)"
    with pytest.raises(ValueError, match=expected):
        Nulls({"isotropic": torch.zeros(19, 3, 3)})
    with pytest.raises(ValueError, match="expected finite numbers"):
        Nulls({"isotropic": torch.full((19, 2, 3), float("nan"))})
