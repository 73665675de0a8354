"""triton_tsne.py against reference.py, for test_tsne.py, which runs it under TRITON_INTERPRET=1: prints
{what: relative error}.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from analysis import tsne
from kernels import reference, triton_tsne

errors = {}


def compare(name, value, expected):
    errors[name] = ((value - expected).norm() / expected.norm()).item()


for n, exaggeration in ((5, 1.0), (130, 12.0)):  # under and over a tile of 128 columns
    generator = torch.Generator().manual_seed(n)
    X, Y = torch.randn(n, 20, generator=generator), torch.randn(n, 3, generator=generator)
    perplexity = min(n / 3, 10.0)
    P = tsne.joint_probabilities(X, perplexity)
    compare(
        f"gradient {n}",
        triton_tsne.gradient(Y, P, exaggeration),
        reference.tsne_gradient(Y.double(), P.double(), exaggeration),
    )
    rows = torch.arange(0, n, 30)
    d2 = torch.cdist(X[rows].double(), X.double()).square()
    plain = reference.tsne_probabilities(d2, rows, perplexity)
    compare(f"perplexity {n}", triton_tsne.conditional_probabilities(d2, rows, perplexity), plain)

d2 = 2.0 * (1 - torch.eye(50, dtype=torch.float64))  # no beta gives another perplexity
compare(
    "equal distances",
    triton_tsne.conditional_probabilities(d2[:2], torch.arange(2), 10.0, max_steps=3),
    d2[:2] / 98,
)
json.dump(errors, sys.stdout)
