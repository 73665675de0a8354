"""analysis/baselines.py, behaviour.py and oracle.py: probes, words, length, refusals, KL, the best
direction.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import random_documents, random_llama, tiny_config

from analysis import baselines
from analysis.behaviour import asked_prompts, is_refusal, mean_kl, preferences, wilson
from analysis.oracle import explained_share, find_oracle, oracle_curve, split_groups
from analysis.steering import steered_runs, text_mean
from analysis.sweep import coordinate_scale

LABELS = torch.arange(40) % 2
ALONE = torch.arange(40)


def test_a_probe_on_what_tells_and_what_does_not():
    X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    none = baselines.probe(X, LABELS, ALONE)
    low, high = none["auc_interval"]
    assert low <= none["auc"] <= high and low < 0.5 < high
    some = baselines.probe(X + 3 * LABELS[:, None], LABELS, ALONE)
    assert some["auc"] > 0.99 and some["auc_interval"][0] > 0.9
    assert baselines.probe(X, LABELS, ALONE // 10)["auc"] is None  # four groups


def test_a_template_of_both_labels_counts_for_both():
    """20 templates, unsafe text first, are enough; beside them one of one label may be held out too."""
    X = torch.randn(41, 8, generator=torch.Generator().manual_seed(0))
    templates, label = torch.arange(41) // 2, torch.arange(41) % 2
    assert baselines.probe(X[:40] + 3 * LABELS[:, None], LABELS, templates[:40])["auc"] > 0.99
    label[40] = 1
    assert baselines.probe(X + 3 * label[:, None], label, templates)["auc"] > 0.99
    few = baselines.probe(X[:8], LABELS[:8], templates[:8])
    assert few == {"auc": None, "auc_interval": None}


def test_the_interval_leaves_out_draws_of_one_label():
    """Five groups of a label, one a fold: some of the draws have no fold with both."""
    X = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    low, high = baselines.probe(X, LABELS[:10], ALONE[:10])["auc_interval"]
    assert 0 <= low < high <= 1


def test_redrawn_auc_by_hand():
    """Scores 1, 2 unsafe and 3, 0 safe: 2 of 4 pairs in order; a draw of text 3 and both unsafe ones has all
    in order.
    """
    scores, labels = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0, 0, 1, 1])
    values = baselines._redrawn_auc(scores, labels, torch.arange(4), 400, torch.Generator().manual_seed(0))
    assert (
        set(np.round(values[~values.isnan()].tolist(), 6)) <= {0, 0.333333, 0.5, 0.666667, 1}
        and values.isnan().any()
    )
    assert values.nanmean().item() == pytest.approx(0.5, abs=0.05)


def test_words_and_length_are_warned_about():
    texts = [
        f"{'bad' if label == 0 else 'good'} text {i} of {i % 7}" for i, label in enumerate(LABELS.tolist())
    ]
    words = baselines.probe(baselines.bag_of_words(texts), LABELS, ALONE)
    documents = [(np.arange(3 + 9 * label + i % 3), None) for i, label in enumerate(LABELS.tolist())]
    X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) + 2 * LABELS[:, None]
    length = baselines.probe(baselines.length_features(documents), LABELS, ALONE)
    assert words["auc"] > 0.99 and length["auc"] > 0.99
    after = baselines.separation_of(baselines.without_length(X, documents), LABELS)
    assert abs(after) < 3 < baselines.separation_of(X, LABELS)
    notes = baselines.warnings_of({"words": words, "length": length, "after_length": after})
    assert (
        len(notes) == 2
        and "the number of tokens alone tells" in notes[0]
        and "a bag of words alone" in notes[1]
    )
    assert (
        baselines.warnings_of({"words": {"auc": 0.7}, "length": {"auc": None}, "after_length": after}) == []
    )


def prompts_of(axiom, label, group):
    """What `baselines` reads of an aqi.Prompts."""
    axioms = [str(a) for a in range(int(axiom.max()) + 1)]
    return SimpleNamespace(axiom=axiom, label=label, axioms=axioms, group=group)


def test_labels_are_shuffled_by_group():
    """Groups of 4 safe, 4 unsafe and 2 mixed texts: pure groups keep one label, and as many of them are safe
    as before.
    """
    group = torch.arange(40) // 4
    label = (group < 4).long()
    label[-8:] = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    moved = False
    for seed in range(5):
        prompts = prompts_of(torch.zeros_like(label), label, group)
        shuffled = baselines.labels_without_meaning(prompts, seed)
        sums = torch.bincount(group, weights=shuffled.double())
        assert sorted(sums[:8].tolist()) == [0] * 4 + [4] * 4 and sums[8:].tolist() == [1, 3]
        moved = moved or not torch.equal(shuffled, label)
    assert moved


def test_labels_are_never_shuffled_between_axioms():
    """Three templates of two texts a cell: a trade between the axioms would tell them apart."""
    cell = torch.arange(24) // 6 % 4
    prompts = prompts_of(cell // 2, cell % 2, torch.arange(24) // 2)
    for seed in range(20):
        shuffled = baselines.labels_without_meaning(prompts, seed)
        assert torch.bincount(prompts.axiom, weights=shuffled.double()).tolist() == [6, 6]


def test_the_first_token_is_no_part_of_a_text():
    """Documents (9, 1, 3) and (8), the latter being all there is."""
    hidden = torch.tensor([[9e8], [1.0], [3.0], [8.0]])
    assert text_mean(hidden, torch.tensor([0, 3, 4], dtype=torch.int32)).flatten().tolist() == [2, 8]


def test_coordinates_are_measured_in_deviations_within_labels():
    X = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 100.0], [12.0, 300.0]])
    assert coordinate_scale(X, torch.tensor([0, 0, 1, 1])).tolist() == pytest.approx([1.0, 5000**0.5])


@pytest.mark.parametrize(
    "answer",
    ("I'm sorry, but I can't help.", " I cannot do that", "I can\u2019t", '"Sorry, no."', "As an AI, I"),
)
def test_openings_that_refuse(answer):
    assert is_refusal(answer) and not is_refusal(f"Of course. {answer}")


def test_prompts_of_each_label_are_asked_evenly_spaced():
    labels = torch.tensor([1, 0, 0, 1, 0, 0, 0])
    assert asked_prompts(labels, count=2) == {"unsafe": [1, 6], "safe": [0, 3]}


def test_intervals_and_divergences_by_hand():
    """Wilson's interval of 8 of 10; KL of (1/2, 1/2) from (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2 = 0.1438."""
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4) and wilson(0, 5)[0] == pytest.approx(
        0, abs=1e-12
    )
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert mean_kl([p], [q]) == pytest.approx(0.14384, abs=1e-5) and mean_kl([p], [p]) == 0
    found = preferences({"chosen": np.array([1.0, 2.0]), "rejected": np.array([0.0, 3.0])})
    assert found["preference_accuracy"] == 0.5


def test_no_group_is_in_both_halves():
    group, labels = torch.arange(40) // 2, torch.arange(40) // 20
    is_first = split_groups(group, labels)
    assert not set(group[is_first].tolist()) & set(group[~is_first].tolist())
    assert [is_first[labels == y].sum().item() for y in (0, 1)] == [10, 10]


def test_each_half_has_both_labels_where_most_groups_are_of_one():
    """Four pure unsafe groups, three of both labels and one safe: any seed leaves safe texts to both halves."""
    group = torch.tensor([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 1])
    for seed in range(40):
        is_first = split_groups(group, labels, seed)
        assert labels[is_first].unique().numel() == labels[~is_first].unique().numel() == 2


@pytest.fixture(scope="module")
def steered():
    """(model, documents, {layer: addition}) of four blocks, ten texts and the last two layers."""
    config = tiny_config(num_hidden_layers=4)
    ids = random_documents(config.vocab_size, [5, 9, 7, 6, 8, 4, 9, 5, 7, 6], seed=3)
    documents = [(x.numpy(), np.ones(len(x), dtype=bool)) for x in ids]
    add = {
        layer: torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(layer))
        for layer in (2, 3)
    }
    return random_llama(config), documents, add


@pytest.mark.parametrize("rescale", [False, True])
def test_the_oracle_is_added_as_a_sweep_adds(steered, rescale):
    model, documents, add = steered
    expected = torch.zeros(3, len(documents), model.config.hidden_size)
    for run in steered_runs(model, documents, add, [0.0, 0.5, 1.0], "cpu", rescale):
        expected[run.index, torch.from_numpy(run.rows)] = text_mean(run.hidden, run.batch.cu_seqlens)
    curve = oracle_curve(model, documents, add, [0.0, 0.5, 1.0], "cpu", text_mean, rescale)
    torch.testing.assert_close(curve, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [False, True])
def test_the_oracle_climbs(steered, rescale):
    """On its own texts far above any random direction of its length; its gradient is autograd's through the
    whole model.
    """
    model, documents, add = steered
    config, labels = model.config, torch.arange(10) % 2

    def share(additions):
        start, end = oracle_curve(model, documents, additions, [0.0, 1.0], "cpu", text_mean, rescale)
        return explained_share(start, labels).item(), explained_share(end, labels).item()

    best = find_oracle(model, documents, labels, add, "cpu", text_mean, rescale)
    assert all(
        best[layer].norm().item() == pytest.approx(add[layer].norm().item(), rel=1e-5) for layer in add
    )
    generator = torch.Generator().manual_seed(9)
    others = []
    for _ in range(10):
        drawn = {layer: torch.randn(config.hidden_size, generator=generator) for layer in add}
        others.append(share({layer: d / d.norm() * add[layer].norm() for layer, d in drawn.items()})[1])
    start, end = share(best)
    assert end > max(others) > 0 and end > start + 2 * (max(others) - start)
