"""What a direction that knows nothing of the data does to a curve.

Random directions of the vector's length, their separations, and where a curve ranks among them.

The spread between directions is up to three times the error within one, so one random direction says little.
Two kinds are drawn: isotropic ones, and sums of the pair's own differences with random signs, which lie where
states of text lie. Letters: M directions, K lambdas, n texts, T tokens of a packed stream, N documents in it,
D hidden size, A axioms.
"""

from dataclasses import dataclass

import torch

from analysis.curves import explained
from analysis.indices import OVERALL, SEED, Moments
from analysis.steering import TOKENS_PER_BATCH, add_vector, packed_batches, pool
from plumbing.files import UserError


@dataclass(frozen=True)
class Nulls:
    """Ends of random directions' curves, on the texts of the curve that they are compared with.

    At the first and the last lambda only: each lambda between them would cost as much as the last one.
    """

    curves: dict  # {kind: (M, 2, A + 1) float64}

    def __post_init__(self):
        for kind, curves in self.curves.items():
            if curves.ndim != 3 or curves.shape[1] != 2 or not torch.isfinite(curves).all():
                shape = tuple(curves.shape)
                raise UserError(f"nulls: {kind}: {shape}; expected finite numbers (M, 2, A + 1)")


# ---------------------------------------------------------------- directions


def null_count(mode):
    """Directions of each kind where --nulls says none: p is as small as 1 / 20, or 1 / 100."""
    return 19 if mode == "sanity" else 99


def isotropic_directions(additions, count, seed=SEED):
    """{layer: (M, D)}: directions uniform on the sphere, the same at every layer.

    |direction| = |addition| at each layer.
    """
    size = next(iter(additions.values())).shape[0]
    directions = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return {layer: _with_length(directions, addition.norm()) for layer, addition in additions.items()}


def sign_flipped_directions(differences, additions, count, seed=SEED):
    """{layer: (M, D)}: sums of the texts' differences (n, D), half of them negated.

    A text has one sign at all layers; an odd one is left out. differences {layer: (n, D)}: states of the DPO
    model less those of the SFT model, whose mean is the vector. As many signs of either kind cancel the mean:
    what DPO changes about single texts stays, what it changes about all goes. Independent signs would leave
    root n of the mean, and where all differences are alike that is the vector itself. |direction| =
    |addition|.
    """
    rows = len(next(iter(differences.values())))
    if rows < 2:
        raise UserError(f"vector of {rows} pair: no sign-flipped directions; expected two pairs or more")
    signs = torch.ones(rows)
    signs[rows // 2 :] = -1
    signs[2 * (rows // 2) :] = 0
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([signs[torch.randperm(rows, generator=generator)] for _ in range(count)])
    found = {}
    for layer, addition in additions.items():
        found[layer] = _with_length(drawn @ differences[layer].float().cpu(), addition.norm())
    return found


def _with_length(directions, length):
    return directions / directions.norm(dim=1, keepdim=True) * length.cpu()


# ---------------------------------------------------------------- their curves


def mean_over_tokens(hidden, cu_seqlens):
    """(N, D) of hidden (T, D), as a sweep embeds its texts."""
    return pool(hidden, cu_seqlens, "mean")


@torch.no_grad()
def null_curves(model, documents, directions, lambdas, axiom, label, axioms, device, rescale=False,
                embed=mean_over_tokens, log_progress=lambda plan: plan):  # fmt: skip
    """(M, K, A + 1) float64: separations along M directions at each lambda.

    The directions {layer: (M, D)} are of consecutive layers. The blocks up to the first steered one run once
    a batch. Then the stream is repeated, with another direction added to each copy, as many copies to a pass
    as TOKENS_PER_BATCH holds: a direction and lambda cost the blocks above, 4 of 32 for the published five
    layers. Only moments are kept: 4 M K A D numbers, no embedding. embed(hidden, cu_seqlens) -> (N, D) is the
    sweep's own.
    """
    first = min(directions)
    count, size = directions[first].shape
    moments = Moments.zeros(count * len(lambdas), len(axioms), size, device)
    for rows, batch in packed_batches(documents, device, log_progress):
        entry = _entry(model, batch, first)
        rows = torch.as_tensor(rows)
        groups = axiom[rows].to(device), label[rows].to(device)
        copies = max(1, TOKENS_PER_BATCH // len(batch.input_ids))
        for k, strength in enumerate(lambdas):
            for chosen in torch.arange(count).split(copies if strength else count):
                ran = chosen if strength else chosen[:1]  # lambda 0 is one curve's point for all directions
                added = {layer: strength * d[ran].to(device) for layer, d in directions.items()}
                pooled = _steered_copies(model, batch, entry, first, added, rescale, embed)  # (m, N, D)
                for m, states in zip(chosen.tolist(), pooled.expand(len(chosen), -1, -1)):
                    moments.add(m * len(lambdas) + k, states, *groups)
    totals = torch.cat([moments.total, moments.square[..., None]], -1)  # (M K, A, 2, D + 1)
    n = torch.cat([moments.n, moments.n.sum(1, keepdim=True)], 1)
    totals = torch.cat([totals, totals.sum(1, keepdim=True)], 1)
    return explained(n, totals).view(count, len(lambdas), -1).cpu()


def _entry(model, batch, first):
    """The residual stream (T, D) after block `first`, before anything is added."""
    found = []

    def tap(layer, hidden):
        if layer == first:
            found.append(hidden)
        return hidden

    model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, tap=tap)
    return found[0]


def _steered_copies(model, batch, entry, first, added, rescale, embed):
    """(m, N, D) pooled states of m copies of the batch, copy i steered by added[layer][i].

    added: {layer: (m, D)}.
    """
    copies = len(added[first])
    tokens = len(entry)

    def tap(layer, hidden):
        if layer not in added:
            return hidden
        new = add_vector(hidden.view(copies, tokens, -1), added[layer][:, None], rescale)
        return new.view(copies * tokens, -1).to(hidden.dtype)

    starts = batch.cu_seqlens[:-1] + tokens * torch.arange(copies, device=entry.device)[:, None]  # (m, N)
    end = batch.cu_seqlens.new_tensor([copies * tokens])
    cu_seqlens = torch.cat([starts.flatten().to(batch.cu_seqlens), end])
    resume = first + 1, tap(first, entry.repeat(copies, 1))
    position_ids = batch.position_ids.repeat(copies)
    hidden = model(None, position_ids, cu_seqlens, batch.max_seqlen, tap=tap, resume=resume)
    return embed(hidden, cu_seqlens).unflatten(0, (copies, -1))


# ---------------------------------------------------------------- ranks


def rank(value, nulls):
    """(1 + how many of `nulls` (M,) are at least `value`) / (M + 1).

    An exact p where `value` is one of them by chance.
    """
    return (1 + int((nulls >= value).sum())) / (len(nulls) + 1)


def compare(curve, nulls, category):
    """How a curve's change, last lambda less first, ranks among the nulls' changes.

    A dict of p_change, p_by_kind, null_sd, null_changes, size_sd.

    p is of absolute values, and the larger one of the kinds', so a curve must stand out from both. Axioms are
    tested together: each one's change is divided by its root mean square over the nulls and the curve, and
    ranked among the nulls' largest over all axioms, so that the chance of even one false alarm is that of p
    (Westfall & Young). null_sd is the root mean square of the nulls' changes, of the kind where it is larger.
    """
    c = curve.index(category)
    own = curve.estimate[-1] - curve.estimate[0]  # (A + 1,)
    found = {"p_change": 0.0, "p_by_kind": {}, "null_sd": 0.0, "null_changes": {}}
    for kind, others in nulls.curves.items():
        changes = torch.cat([own[None], others[:, 1] - others[:, 0]])  # (1 + M, A + 1)
        p_change = _rank_first(changes.abs(), c, category)
        found["p_by_kind"][kind] = p_change
        found["p_change"] = max(found["p_change"], p_change)
        found["null_sd"] = max(found["null_sd"], changes[1:, c].square().mean().sqrt().item())
        found["null_changes"][kind] = changes[1:, c].tolist()
    change = own[c].item()
    return found | {"size_sd": change / found["null_sd"] if found["null_sd"] else None}


def _rank_first(sizes, c, category):
    """Rank p of row 0 of sizes (1 + M, A + 1) in column c; of an axiom against the largest of all axioms."""
    if category == OVERALL:
        return rank(sizes[0, c], sizes[1:, c])
    axioms = sizes[:, :-1]
    scaled = axioms / axioms.square().mean(0).sqrt().clamp(min=1e-300)
    return rank(scaled[0, c], scaled[1:].amax(1))
