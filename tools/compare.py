"""Did we reproduce it? A model beside a published one: weights, log-probs and KL on texts, steering vectors.

    python -m tools.compare OURS PUBLISHED [--base BASE] [--texts PAIRS] [--vectors FOLDER FOLDER]

OURS, PUBLISHED and BASE are model folders or hub names, BASE the model that both were trained from: with it,
distances are shares of the way that the published training went. PAIRS are preference pairs that neither was
trained on. --vectors are two folders that steer.py extract wrote, of our pair and of the published one. One
model is in memory at a time, and of its weights one tensor's rows.
"""

import argparse
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

from analysis.behaviour import KL_TEXTS, final_logits, mean_kl
from analysis.steering import packed_batches, supervised_logps
from analysis.vector import SIDES, Vector, bar, hash_documents, text_pairs
from data import TEMPLATES
from families import device_of, load_model
from plumbing import parallel
from plumbing.files import UserError, table
from plumbing.weights import resolve, stored_weights
from tools.arguments import at_least

ROWS = 4096  # of a tensor that are read at once: 64 MB in float32 where they are 4,096 wide


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Distance:
    """Sums over the numbers of one tensor, or of several: a of ours, b of the published model, c of the base.

    apart: (a - b)^2; size: b^2; moved: (b - c)^2; ours: (a - c)^2; product: (a - c)(b - c). Without a base
    the last three are zero.
    """

    apart: float = 0.0
    size: float = 0.0
    moved: float = 0.0
    ours: float = 0.0
    product: float = 0.0

    def __add__(self, other):
        return Distance(*[a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)])

    @property
    def relative(self):
        """|a - b| / |b|."""
        return math.sqrt(self.apart / self.size) if self.size else math.nan

    @property
    def left(self):
        """|a - b| / |b - c|: 0 is the published model, 1 is as far from it as the base."""
        return math.sqrt(self.apart / self.moved) if self.moved else math.nan

    @property
    def cosine(self):
        """Of the two ways from the base."""
        length = math.sqrt(self.ours * self.moved)
        return self.product / length if length else math.nan


def distances(ours, published, base=None):
    """({tensor: Distance}, names that only one of the models has) of model folders."""
    slices = [stored_weights(folder)[0] for folder in (ours, published, base) if folder is not None]
    names = list(map(set, slices))
    shared = set.intersection(*names)
    alone = set.union(*names) - shared
    found = {}
    for name in sorted(shared):
        shapes = [tuple(named[name].get_shape()) for named in slices]
        if len(set(shapes)) > 1:
            raise UserError(f"{name}: shapes {shapes}; expected models of one shape")
        found[name] = _distance([named[name] for named in slices], shapes[0][0])
    return found, sorted(alone)


def _distance(slices, rows):
    total = Distance()
    for start in range(0, rows, ROWS):
        ours, published, *base = [rows_of[start : start + ROWS].double() for rows_of in slices]
        part = dict(apart=_squares(ours - published), size=_squares(published))
        if base:
            our_way, their_way = ours - base[0], published - base[0]
            part |= dict(
                moved=_squares(their_way), ours=_squares(our_way), product=(our_way * their_way).sum().item()
            )
        total += Distance(**part)
    return total


def _squares(x):
    return x.square().sum().item()


def print_weights(found, alone, has_base, count):
    """A line of all tensors, and one of each of the `count` that are farthest apart."""
    overall = sum(found.values(), Distance())
    farthest = sorted(found, key=lambda name: -found[name].relative)[:count]
    head = ["tensor", "|a - b| / |b|"] + ["|a - b| / |b - c|", "cosine of the ways"] * has_base
    lines = []
    for name, distance in [("all", overall), *[(name, found[name]) for name in farthest]]:
        line = [name, f"{distance.relative:.2e}"]
        if has_base:
            line += [f"{distance.left:.3f}", f"{distance.cosine:.3f}"]
        lines.append(line)
    print(f"weights: a ours, b published{', c base' * has_base}; {len(found)} tensors")
    print(table(head, lines))
    if alone:
        print(f"not in all of them: {', '.join(alone)}")


# ---------------------------------------------------------------- log-probs on texts


def read_texts(path, count, tokenizer, template, max_tokens):
    """(documents, chosen and rejected; their hash) of `count` pairs."""
    pairs = text_pairs(path, count, tokenizer, template, max_tokens)
    return pairs["chosen"] + pairs["rejected"], hash_documents(pairs)


def answer_logps(model, documents):
    """[(S,) float64 of each document]: log-probs, in nats, of its supervised tokens."""
    found = [None] * len(documents)
    for rows, batch in packed_batches(documents, device_of(model), bar("log-probs")):
        parts = supervised_logps(model, batch).double().cpu().split(batch.supervised_offsets.diff().tolist())
        for row, part in zip(rows, parts, strict=True):
            found[row] = part.numpy()
    return found


def measure(path, texts, count, template, max_tokens):
    """(log-probs, logits of the first texts, hash of the token ids) of a model, which is then let go.

    In float32 where that fits: in bf16, rounding is as large as what a short run changes. Log-probs are
    answer_logps' list, of `count` chosen texts, then as many rejected ones; logits of the first chosen ones.
    """
    model, tokenizer = load_model(path, is_precise=True)
    documents, digest = read_texts(texts, count, tokenizer, template, max_tokens)
    return answer_logps(model, documents), final_logits(model, documents), digest


def compare_logps(ours, published):
    """How two lists of log-probs (S,) of tokens agree: a dict of numbers.

    {"tokens": S; "ours", "published": mean log-prob of a token; "difference": mean absolute; "root": root of
    the mean square; "correlation"}.
    """
    a, b = np.concatenate(ours), np.concatenate(published)
    return {
        "tokens": len(a),
        "ours": a.mean(),
        "published": b.mean(),
        "difference": np.abs(a - b).mean(),
        "root": math.sqrt(np.square(a - b).mean()),
        "correlation": np.corrcoef(a, b)[0, 1],
    }


def print_texts(args):
    texts = (args.texts, args.count, args.template, args.max_text_tokens)
    our_logps, our_logits, our_ids = measure(args.ours, *texts)
    their_logps, their_logits, their_ids = measure(args.published, *texts)
    if our_ids != their_ids:
        raise UserError(f"texts {args.texts!r}: the two tokenizers give other ids; expected the same")
    found = compare_logps(our_logps, their_logps)
    print(
        f"\nlog-probs of {found['tokens']:,} tokens, in nats: ours {found['ours']:.4f}, published "
        f"{found['published']:.4f}; mean |difference| {found['difference']:.4f}, root mean square "
        f"{found['root']:.4f}, correlation {found['correlation']:.4f}"
    )
    kl = mean_kl(their_logits, our_logits)
    print(f"KL(published || ours) {kl:.5f} nats a token, over the first {KL_TEXTS} texts")


# ---------------------------------------------------------------- steering vectors


def vector_cosines(ours, published, side, pooling):
    """[(cosine, |ours| / |published|) of each layer] of two folders that extract wrote."""
    directions = []
    for folder in (ours, published):
        directions.append(Vector.load(folder).tensors[f"{side}_{pooling}"].double())
    if directions[0].shape != directions[1].shape:
        shapes = ", ".join(str(tuple(direction.shape)) for direction in directions)
        raise UserError(f"vectors {ours}, {published}: shapes {shapes}; expected vectors of one shape")
    cosines = torch.cosine_similarity(*directions, dim=1)
    lengths = directions[0].norm(dim=1) / directions[1].norm(dim=1)
    return list(zip(cosines.tolist(), lengths.tolist(), strict=True))


def print_vectors(found):
    print("\nsteering vectors: a ours, b published")
    lines = [[str(layer), f"{cosine:.4f}", f"{ratio:.3f}"] for layer, (cosine, ratio) in enumerate(found)]
    print(table(["layer", "cosine", "|a| / |b|"], lines))


# ---------------------------------------------------------------- command line


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("ours")
    parser.add_argument("published")
    parser.add_argument("--base", help="the model that both were trained from")
    parser.add_argument("--texts", help="preference pairs, as for steer.py extract")
    parser.add_argument("--template", choices=list(TEMPLATES), help="renders them; none: transcripts")
    parser.add_argument("--count", type=at_least(1), default=100, help="of the pairs")
    parser.add_argument("--max-text-tokens", type=at_least(2), default=512)
    parser.add_argument("--vectors", nargs=2, metavar="FOLDER", help="of our pair and of the published one")
    parser.add_argument("--side", choices=SIDES, default="chosen")
    parser.add_argument("--pooling", choices=("last", "mean"), default="last")
    tensors = "that are farthest apart, to print"
    parser.add_argument("--tensors", type=at_least(0), default=8, help=tensors)
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    base = args.base and resolve(args.base)
    found, alone = distances(resolve(args.ours), resolve(args.published), base)
    print_weights(found, alone, base is not None, args.tensors)
    if args.texts:
        print_texts(args)
    if args.vectors:
        print_vectors(vector_cosines(*args.vectors, args.side, args.pooling))
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
