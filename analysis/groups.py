"""Texts that are not independent.

Those written from one template, or copied with small changes, count as one group.

A bootstrap that draws single texts treats five paraphrases as five observations. Letters: n texts, G groups.
"""

import re

import numpy as np
import torch

from plumbing.files import UserError

SHARED = 0.4  # Jaccard similarity of shingles from which two texts are one group
HASHES, BAND = 128, 2  # MinHash: 64 bands of 2 hashes; two texts at 0.4 meet in one with probability 0.99999
ROUNDS = 4  # texts of a bucket that the others are compared with


def find_groups(texts):
    """(n,) int64: the group of each text, numbered by first appearance.

    Deterministic; O(n) for texts of bounded length. Two texts belong together when they share SHARED of their
    shingles, the distinct words and pairs of neighbouring words (any case, no punctuation): texts equal but
    for a slot do, as does a text with a few words changed. Groups are connected components, so a template
    with several slots is one group although its two furthest texts share little.
    """
    signatures = _signatures(texts)  # (n, HASHES)
    roots = list(range(len(texts)))
    for bucket in _buckets(signatures):
        # Compare with the first text, then the rest with their first, and so on: linear for one large group.
        for _ in range(ROUNDS):
            # The share of equal hashes estimates the Jaccard similarity; its standard error is at most 0.044.
            agreement = (signatures[bucket] == signatures[bucket[0]]).mean(1)
            is_near = agreement >= SHARED
            for row in bucket[is_near]:
                _join(roots, bucket[0], row)
            bucket = bucket[~is_near]
            if len(bucket) < 2:
                break
    return number_groups([_root(roots, row) for row in range(len(texts))])


def number_groups(names):
    """(n,) int64, numbered by first appearance, of any hashable names, for example a column of a file."""
    numbers, group = {}, []
    for name in names:
        group.append(numbers.setdefault(name, len(numbers)))
    return torch.tensor(group, dtype=torch.int64)


def effective_size(group):
    """(sum m)^2 / sum m^2 over the sizes m of the groups: how many equally large groups the texts are worth.

    n where every text stands alone; G for equal groups. The right size when the texts of a group say the
    same, and a lower bound otherwise (Kish 1965).
    """
    sizes = torch.bincount(group).double()
    return (sizes.sum().square() / sizes.square().sum()).item()


def check_groups(group, n):
    """group as int64 0 to G - 1, or one group a text for None. UserError for another length than n."""
    if group is None:
        return torch.arange(n)
    if len(group) != n:
        raise UserError(f"group: {len(group)} values; expected one for each of {n} texts")
    return torch.unique(torch.as_tensor(group), return_inverse=True)[1].cpu()


def _shingles(text):
    words = re.findall(r"\w+", str(text).lower())
    if not words:
        return [str(text)]  # punctuation only: equal texts still meet
    pairs = [f"{first} {second}" for first, second in zip(words, words[1:])]
    return sorted({*words, *pairs})  # in an order that does not depend on the process


def _signatures(texts):
    """(n, HASHES): for each hash the smallest value over a text's shingles (MinHash; Broder 1997)."""
    numbers, rows = {}, []
    for text in texts:
        row = []
        for shingle in _shingles(text):
            row.append(numbers.setdefault(shingle, len(numbers)))
        rows.append(row)
    values = np.random.RandomState(0).randint(1 << 31, size=(len(numbers), HASHES), dtype=np.int32)
    return np.stack([values[row].min(0) for row in rows])


def _buckets(signatures):
    """Arrays of two or more rows whose signatures agree in a band; bands in order, rows ascending."""
    for start in range(0, HASHES, BAND):
        first, second = signatures[:, start : start + BAND].T.astype(np.int64)
        keys = first << 32 | second
        order = keys.argsort(kind="stable")
        ends = np.flatnonzero(np.diff(keys[order])) + 1
        for bucket in np.split(order, ends):
            if len(bucket) > 1:
                yield bucket


def _root(roots, row):
    while roots[row] != row:
        roots[row] = roots[roots[row]]  # halve the path
        row = roots[row]
    return row


def _join(roots, one, other):
    one, other = _root(roots, one), _root(roots, other)
    roots[max(one, other)] = min(one, other)
