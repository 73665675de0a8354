"""The ceiling of a sweep: the direction of the vector's length that separates the labels most.

It is found by gradient ascent, on half of the texts, and judged on the other half, so that what it shows is
no overfit. A steering vector that points nowhere near it leaves most of what its length could do undone.

Shapes: n texts, N of a batch, T tokens of its stream, D hidden size, K lambdas.
"""

import torch

from analysis.baselines import separation_of
from analysis.indices import SEED, holds_labels
from analysis.steering import add_vector, packed_batches
from families import device_of

STEPS = 20
PACE = 0.5  # of a step, against a direction of length 1; falls linearly to 0


def explained_share(X, labels):
    """eta^2 in [0, 1] of embeddings X (n, D), differentiable.

    It is the share of the variance that lies between the labels.
    """
    is_safe = labels.to(X.device).bool()
    gap = X[is_safe].mean(0) - X[~is_safe].mean(0)
    between = is_safe.sum() * (~is_safe).sum() / len(X) * gap.square().sum()
    return between / (X - X.mean(0)).square().sum()


def split_groups(group, labels, seed=SEED):
    """(n,) bool: one half of the groups, of each label half. No group has texts in both halves."""
    holds = holds_labels(labels, group)
    unsafe, safe = holds[:, 0], holds[:, 1]
    generator = torch.Generator().manual_seed(seed)
    is_first = torch.zeros(len(holds), dtype=torch.bool)
    # Groups of both labels are halved by themselves: one half could be left without a label otherwise.
    for is_kind in (unsafe & safe, unsafe & ~safe, safe & ~unsafe):
        names = torch.where(is_kind)[0]
        order = torch.randperm(len(names), generator=generator)
        is_first[names[order[: (len(names) + 1) // 2]]] = True
    return is_first[group]


class TopBlocks:
    """The blocks above the first steered layer, on texts whose stream below it was run once and is kept.

    7,000 prompts of 50 tokens at D = 4,096 keep 2.9 GB in bf16.
    """

    def __init__(self, model, documents, first, device, embed, rescale):
        self.model, self.first, self.embed, self.rescale = model, first, embed, rescale
        self.count = len(documents)
        self.batches = []  # (rows (N,), batch, the stream (T, D) after block `first`)
        for rows, batch in packed_batches(documents, device):
            kept = []

            def keep(layer, hidden, kept=kept):
                if layer == first:
                    kept.append(hidden)
                return hidden

            with torch.no_grad():
                model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, tap=keep)
            self.batches.append((torch.as_tensor(rows), batch, kept[0]))

    def run(self, index, additions):
        """(N, D) embeddings of a batch under {layer: (D,)}, which may be part of an autograd graph."""
        _, batch, entry = self.batches[index]

        def tap(layer, hidden):
            if layer not in additions:
                return hidden
            return add_vector(hidden, additions[layer], self.rescale).to(hidden.dtype)

        resume = self.first + 1, tap(self.first, entry)
        hidden = self.model(
            None, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, tap=tap, resume=resume
        )
        return self.embed(hidden, batch.cu_seqlens)

    @torch.no_grad()
    def embeddings(self, additions):
        """(n, D) of all texts."""
        out = None
        for index, (rows, _, _) in enumerate(self.batches):
            found = self.run(index, additions)
            if out is None:
                out = found.new_zeros(self.count, found.shape[1])
            out[rows.to(out.device)] = found
        return out


def find_oracle(model, documents, labels, additions, device, embed, rescale=False, steps=STEPS):
    """{layer: (D,)}: at each steered layer the direction that raises eta^2 of the texts.

    It is as long as the addition there. Ascent on the product of spheres, from the gradient at no steering at
    all. One step is a pass without a graph, which gives the derivative of eta^2 by every embedding, and one
    with, batch by batch, which carries that derivative down to the additions: the objective is of all texts,
    the memory of one batch. Costs 3 passes through the top blocks a step.
    """
    lengths = {layer: addition.norm().item() for layer, addition in additions.items()}
    top = TopBlocks(model, documents, min(additions), device, embed, rescale)
    model.requires_grad_(False)
    size = next(iter(additions.values())).shape[0]
    units = {layer: torch.zeros(size, device=device) for layer in additions}
    best, best_share = units, -1.0
    for step in range(steps + 1):
        scaled = {layer: lengths[layer] * unit for layer, unit in units.items()}
        share, gradients = _ascend(top, scaled, labels)
        if share > best_share and step > 0:
            best, best_share = units, share
        pace = 1.0 if step == 0 else PACE * (1 - step / (steps + 1))
        moved = {}
        for layer, unit in units.items():
            ahead = unit + pace * gradients[layer] / gradients[layer].norm().clamp(min=1e-30)
            moved[layer] = ahead / ahead.norm().clamp(min=1e-30)
        units = moved
    return {layer: (lengths[layer] * unit).cpu() for layer, unit in best.items()}


def _ascend(top, additions, labels):
    """(eta^2, {layer: its gradient (D,)}) at the additions."""
    X = top.embeddings(additions).float().requires_grad_()
    share = explained_share(X, labels)
    (by_text,) = torch.autograd.grad(share, X)  # (n, D)
    leaves, gradients = {}, {}
    for layer, addition in additions.items():
        leaves[layer] = addition.clone().requires_grad_()
        gradients[layer] = torch.zeros_like(addition)
    for index, (rows, _, _) in enumerate(top.batches):
        found = top.run(index, leaves)
        parts = torch.autograd.grad(
            found, list(leaves.values()), by_text[rows.to(by_text.device)].to(found.dtype)
        )
        for layer, part in zip(leaves, parts, strict=True):
            gradients[layer] += part
    return share.item(), gradients


def oracle_curve(model, documents, additions, lambdas, device, embed, rescale=False):
    """Embeddings (K, n, D) of texts along the oracle's additions, at each lambda."""
    top = TopBlocks(model, documents, min(additions), device, embed, rescale)
    curve = []
    for strength in lambdas:
        moved = {}
        if strength:
            for layer, addition in additions.items():
                moved[layer] = strength * addition.to(device)
        curve.append(top.embeddings(moved).float().cpu())
    return torch.stack(curve)


def ceiling(model, documents, prompts, additions, config, embed):
    """The oracle's curve on the texts that it has not seen.

    {"lambdas", "separation" (K,), "change", "cosine" {layer: with the addition}}.
    """
    device = device_of(model)
    is_seen = split_groups(prompts.group, prompts.label)
    seen, unseen = [], []
    for document, is_mine in zip(documents, is_seen.tolist(), strict=True):
        half = seen if is_mine else unseen
        half.append(document)
    best = find_oracle(model, seen, prompts.label[is_seen], additions, device, embed, config.rescale)
    curve = oracle_curve(model, unseen, best, config.lambdas, device, embed, config.rescale)
    values = [separation_of(X, prompts.label[~is_seen]) for X in curve]
    cosines = {}
    for layer, addition in additions.items():
        cosines[layer] = torch.cosine_similarity(addition, best[layer], dim=0).item()
    change = values[-1] - values[0]
    return {"lambdas": list(config.lambdas), "separation": values, "change": change, "cosine": cosines}
