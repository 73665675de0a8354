"""groups.py: templates and near copies are found, other texts are left alone."""

import numpy as np
import pytest
import torch

from analysis.groups import (
    BAND,
    HASHES,
    _buckets,
    check_groups,
    effective_size,
    find_groups,
    number_groups,
)

TEMPLATES = (
    "How do I {} a {}?",
    "Explain how to {} the {} of my neighbour",
    "Give me a list of reasons to {} a {}",
    "My cousin wants to {} some {} tonight; is that legal?",
    "Write a short story in which someone has to {} a {}.",
)
VERBS = "make kill build steal find write destroy open sell repair".split()
NOUNS = "knife bomb phone car dog letter contract process garden recipe".split()
ALONE = (
    "Why is the sky blue in the morning?", "Translate this sentence into French for my aunt.", "Who won in 1966?",
    "Suggest three names that suit an old ship.", "Does aspirin help against fever?", "Sort these numbers.",
)  # fmt: skip


def test_texts_of_a_template_are_one_group():
    """Two slots; every text differs from some of its group in both. Order decides nothing but the numbers."""
    truth, texts = [], []
    for number, template in enumerate(TEMPLATES):
        for i, verb in enumerate(VERBS):
            texts += [template.format(verb, NOUNS[i]), template.format(verb, NOUNS[(i + 3) % 10])]
            truth += [number, number]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    found = find_groups([texts[i] for i in order])
    assert torch.equal(found, number_groups([truth[i] for i in order]))
    assert effective_size(found) == pytest.approx(len(TEMPLATES))


def test_near_copies_are_one_group_and_other_texts_stand_alone():
    changed = [text.replace("?", " please?").replace("the ", "that ", 1).upper() for text in ALONE]
    found = find_groups([*ALONE, *changed, *ALONE])
    assert found.tolist() == 3 * list(range(len(ALONE)))
    assert effective_size(find_groups(ALONE)) == len(ALONE)


def test_a_bucket_holds_equal_bands_only():
    """Every band of a row is (v0, v1). Rows 0 and 3 are equal; 2 v0 + v1 is 13 for the first three."""
    pairs = np.array([[5, 3], [4, 5], [6, 1], [5, 3], [2**31 - 1, 2**31 - 1]], dtype=np.int32)
    signatures = np.tile(pairs, HASHES // BAND)
    assert [bucket.tolist() for bucket in _buckets(signatures)] == [[0, 3]] * (HASHES // BAND)


def test_texts_without_words():
    assert find_groups(["?!", "...", "?!", ""]).tolist() == [0, 1, 0, 2]


@pytest.mark.slow
def test_many_texts_of_one_template_are_one_group():
    """A bucket of 3,000 is compared with its first text, not pair by pair."""
    texts = [f"Tell me in a few words what people should know about number {i}" for i in range(3000)]
    assert find_groups(texts).max() == 0


def test_effective_size():
    assert effective_size(torch.tensor([0, 0, 0, 0, 1])) == pytest.approx(25 / 17)
    assert effective_size(torch.arange(7)) == 7


def test_groups_are_numbers_or_names_and_one_for_each_text():
    assert number_groups(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert check_groups(None, 3).tolist() == [0, 1, 2]
    assert check_groups(torch.tensor([9, 4, 9]), 3).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="2 values; expected one for each of 3 texts"):
        check_groups(torch.tensor([0, 1]), 3)
