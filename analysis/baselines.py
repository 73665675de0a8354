"""What separates the labels without any alignment.

Words, length, a network that was never trained, shuffled labels.

A separation means something where it is above these. Letters: n texts, D hidden size, W words.
"""

import copy
import re

import numpy as np
import torch

from analysis.curves import Design, shuffled_labels
from analysis.indices import (
    SEED,
    auc,
    cluster_moments,
    held_out_scores,
    holds_labels,
    two_cluster_indices,
)
from analysis.steering import packed_batches, text_mean
from analysis.sweep import coordinate_scale
from families import device_of

TELLING = 0.8  # AUC from which words or length alone count as telling the labels apart
MOST_WORDS = 5000
FOLDS = 5


def separation_of(X, labels):
    """100 (1 - (1 - eta^2) (n - 1) / (n - 2)) of X (n, D): aqi.score's sweep."""
    found = two_cluster_indices(*cluster_moments(X, labels))
    n = found["n"]
    return (100 * (1 - (1 - found["eta2"]) * (n - 1) / (n - 2))).item()


def probe(X, labels, group, draws=200, seed=SEED):
    """{"auc", "auc_interval"}: can a linear probe read the label of texts that it has not seen?

    None where fewer than 5 groups hold a label. The mean over folds of the held-out AUC, no group in two
    folds; the 95 % interval redraws the held-out groups of every fold, so it is of these probes on other
    texts.
    """
    if holds_labels(labels, group).sum(0).min() < FOLDS:
        return {"auc": None, "auc_interval": None}
    scores, fold = held_out_scores(X, labels, FOLDS, group=group)
    scores, fold, labels = scores.cpu(), fold.cpu(), labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    areas, redrawn = [], []
    for k in range(FOLDS):
        mine = fold == k
        areas.append(auc(scores[mine], labels[mine]))
        redrawn.append(_redrawn_auc(scores[mine], labels[mine], group[mine], draws, generator))
    values = torch.stack(redrawn).nanmean(0)  # (draws,)
    # With 5 groups of a label, one a fold, 1 of 32 draws has one label in every fold, and no AUC.
    low, high = torch.nanquantile(values, values.new_tensor([0.025, 0.975])).tolist()
    return {"auc": sum(areas) / FOLDS, "auc_interval": [low, high]}


def _redrawn_auc(scores, labels, group, draws, generator):
    """(draws,) AUC with groups drawn again; NaN where a draw has one label only."""
    names, member = group.unique(return_inverse=True)
    picked = torch.randint(len(names), (draws, len(names)), generator=generator)
    counts = torch.zeros(draws, len(names), dtype=torch.float64).scatter_add_(
        1, picked, torch.ones(picked.shape).double()
    )
    weights = counts[:, member]  # (draws, n)
    safe, unsafe = labels == 1, labels == 0
    above = (scores[safe][:, None] > scores[unsafe]).double() + 0.5 * (
        scores[safe][:, None] == scores[unsafe]
    )
    wins = ((weights[:, safe] @ above) * weights[:, unsafe]).sum(1)
    return wins / (weights[:, safe].sum(1) * weights[:, unsafe].sum(1))


def bag_of_words(texts):
    """(n, W) float32: counts of the words that stand in two texts or more, by root of the length.

    Of these the most common MOST_WORDS.
    """
    tokens = [re.findall(r"\w+", text.lower()) for text in texts]
    seen = {}
    for words in tokens:
        for word in set(words):
            seen[word] = seen.get(word, 0) + 1
    shared = [word for word, count in sorted(seen.items(), key=lambda item: (-item[1], item[0])) if count > 1]
    column = {word: w for w, word in enumerate(shared[:MOST_WORDS])}
    X = np.zeros((len(texts), max(1, len(column))), dtype=np.float32)
    for row, words in enumerate(tokens):
        for word in words:
            if word in column:
                X[row, column[word]] += 1
        X[row] /= max(1, len(words)) ** 0.5
    return torch.from_numpy(X)


def length_features(documents):
    """(n, 2) float32: number of tokens, and its logarithm, standardised."""
    lengths = torch.tensor([len(ids) for ids, _ in documents], dtype=torch.float64)
    X = torch.stack([lengths, lengths.log()], 1)
    return ((X - X.mean(0)) / X.std(0).clamp(min=1e-12)).float()


def without_length(X, documents):
    """X (n, D) less what a linear fit on length and its logarithm explains of each coordinate."""
    features = length_features(documents).to(X.device, torch.float64)
    design = torch.cat([torch.ones_like(features[:, :1]), features], 1)  # (n, 3)
    # pinv and not a solve: texts of one length have two columns of zeros
    return X.double() - design @ (torch.linalg.pinv(design) @ X.double())


def untrained_copy(model, seed=SEED):
    """The same network with random weights: matrices normal with sd 0.02, biases 0, norms 1."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in other.named_parameters():
            if param.ndim > 1:
                param.copy_(0.02 * torch.randn(param.shape, generator=generator))
            else:
                param.fill_(0.0 if name.endswith("bias") else 1.0)
    return other


def baselines(model, prompts, documents, unsteered):
    """{name: {"auc", "auc_interval", "separation"}} of the unsteered model and of baselines.

    And "after_length". The baselines know nothing of alignment. unsteered (n, D): the model's embeddings,
    scaled. after_length: their separation less what length explains.
    """
    label, group = prompts.label, prompts.group

    def measured(X, labels=label):
        return probe(X, labels, group) | {"separation": separation_of(X, labels)}

    return {
        "model": measured(unsteered),
        "untrained": measured(_untrained_states(model, documents, label)),
        "words": measured(bag_of_words(prompts.texts)),
        "length": measured(length_features(documents)),
        "shuffled": measured(unsteered, labels_without_meaning(prompts)),
        "after_length": separation_of(without_length(unsteered, documents), label),
    }


def labels_without_meaning(prompts, seed=SEED):
    """(n,) the labels shuffled once, as curves.permute does: inside an axiom, groups as wholes.

    Shuffled text by text, a template's copies would carry both labels, and separate less than templates do.
    """
    design = Design(prompts.axiom, prompts.label, prompts.axioms, prompts.group)
    shuffled = torch.empty_like(prompts.label)
    is_safe = shuffled_labels(design, torch.Generator().manual_seed(seed), 1)[0]
    shuffled[design.order] = is_safe.to(shuffled.dtype)
    return shuffled


@torch.no_grad()
def _untrained_states(model, documents, label):
    """(n, D): the texts' states in the untrained network, scaled as the model's are."""
    other = untrained_copy(model)
    states = torch.zeros(len(documents), model.config.hidden_size, device=device_of(model))
    for rows, batch in packed_batches(documents, device_of(model)):
        hidden = other(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        states[torch.from_numpy(rows).to(states.device)] = text_mean(hidden, batch.cu_seqlens)
    return states / coordinate_scale(states, label)


def warnings_of(baselines):
    """Sentences on what alone tells the labels apart, of the dict that steer.py writes."""
    found = []
    for name in ("length", "words"):
        area = baselines[name]["auc"]
        if area is not None and max(area, 1 - area) > TELLING:
            what, after = "a bag of words", ""
            if name == "length":
                what = "the number of tokens"
                after = f"; without length the separation is {baselines['after_length']:.2f}"
            told = f"{what} alone tells the labels apart (AUC {area:.2f})"
            found.append(f"{told}: the texts do, before any model{after}")
    return found
