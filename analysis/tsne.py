"""Exact t-SNE: the 3-D space of the published AQI.

No tree and no neighbour lists, so its divergence is the exact one.

Letters: n points, D dimensions in, d dimensions out (3), r rows of one block. The largest tensors are P, (n,
n) float32 (196 MB at n = 7,000, 3.1 GB at 28,000), and a handful of (r, n) blocks. Leaf to root: P, the
start, the descent. What is computed: kernels/reference.py. In blocks, and by Triton on CUDA: kernels/tsne.py.
"""

import math

import torch

from kernels import reference
from kernels import tsne as kernels_tsne
from plumbing.files import UserError

# scikit-learn's defaults, so that both descend alike from the same start
EXAGGERATION, EXAGGERATED_STEPS = 12.0, 250  # p is 12 p in the first 250 steps, in which the clusters form
MOMENTUM, MIN_GAIN = (0.5, 0.8), 0.01  # during and after exaggeration
START_STD = 1e-4


def joint_probabilities(X, perplexity, chunk=1024, conditional=reference.tsne_probabilities):
    """(n, D) -> P (n, n) float32, P_ij = (p(j|i) + p(i|j)) / 2n: symmetric, zero diagonal, sum 1.

    conditional: reference.tsne_probabilities or triton_tsne's.
    """
    n = len(X)
    # |x_i|^2 + |x_j|^2 - 2 x_i x_j loses digits to an offset. float64 products cost no more on an H200.
    X = X.double() - X.double().mean(0)
    norms = X.square().sum(1)  # (n,)
    P = torch.empty(n, n, dtype=torch.float32, device=X.device)
    for rows in torch.arange(n, device=X.device).split(chunk):
        d2 = (norms[rows, None] + norms - 2 * X[rows] @ X.T).clamp_(min=0)  # (r, n)
        P[rows] = conditional(d2, rows, perplexity).float()
    # block by block in place: P + P.T would be a second (n, n)
    for a in range(0, n, chunk):
        for b in range(a, n, chunk):
            upper = P[a : a + chunk, b : b + chunk]
            lower = P[b : b + chunk, a : a + chunk]
            block = (upper + lower.T) / (2 * n)
            upper.copy_(block)
            lower.copy_(block.T)
    return P


def principal_components(X, dims):
    """(n, D) -> (n, dims) float64 scores of the largest principal components.

    Each has its largest loading positive. Block Krylov iteration (Musco & Musco 2015, algorithm 2): the best
    fit in the span of five iterates. At n = 1,400, D = 1,024 the CHI of 3 to 50 components is right to 1e-5
    where variances fall as 1 / i (in the last of eight iterates alone, to 6e-4), and to 1 % where all are
    equal.
    """
    X = X.double() - X.double().mean(0)
    width = min(dims + 7, *X.shape)
    basis = torch.randn(X.shape[1], width, dtype=X.dtype, generator=torch.Generator().manual_seed(0)).to(
        X.device
    )
    blocks = []
    for _ in range(5):
        basis = torch.linalg.qr(X.T @ (X @ basis)).Q
        blocks.append(basis)
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q  # (D, 5 width)
    scores = X @ basis
    rotation = torch.linalg.eigh(scores.T @ scores).eigenvectors.flip(1)[:, :dims]  # eigh sorts upward
    loadings = basis @ rotation  # (D, dims)
    signs = loadings.gather(0, loadings.abs().argmax(0, keepdim=True)).sign()
    return scores @ rotation * signs


def _descend(Y, P, steps, exaggeration, momentum, gradient, recorded):
    """Take `steps` steps of gradient descent with momentum and a gain per coordinate, moving Y in place.

    recorded: as a CUDA graph. A step is twenty short kernels, which the GPU finishes sooner than Python
    launches them.
    """
    # P_ij is about 1 / n^2: with few points a rate of 50 would overshoot at any gain, out to where Z is 0
    learning_rate = max(len(Y) / EXAGGERATION / 4, min(len(Y), 50.0))
    velocity, gains = torch.zeros_like(Y), torch.ones_like(Y)

    def step():
        grad = gradient(Y, P, exaggeration)
        gains.copy_(torch.where(velocity * grad < 0, gains + 0.2, gains * 0.8)).clamp_(min=MIN_GAIN)
        velocity.mul_(momentum).sub_(learning_rate * gains * grad)
        Y.add_(velocity)

    # the first step compiles the kernel, which a recording cannot
    for _ in range(min(steps, 1) if recorded else steps):
        step()
    if recorded and steps > 1:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(steps - 1):
            graph.replay()
        torch.cuda.synchronize()  # the graph owns the memory that its replays use


def _start(X, dims, seed, start):
    """(n, dims) float32 of X (n, D): where the descent starts.

    `start` where it is given, a normal sample of a seed, or the principal components.
    """
    if start is not None:
        return start.to(X.device, torch.float32).clone()
    if seed is not None:
        return START_STD * torch.randn(len(X), dims, generator=torch.Generator().manual_seed(seed)).to(
            X.device
        )
    components = principal_components(X, dims)
    return (components * (START_STD / components[:, 0].std(correction=0))).float()


def tsne(X, perplexity=30.0, dims=3, steps=500, seed=None, start=None, path=None):
    """Embedding (n, dims) float32 of X (n, D), and its KL divergence (nats) as a float.

    Starts from the principal components, the first with a standard deviation of 1e-4; from a normal sample of
    that size where a seed is given; from `start` (n, dims) where that is. Gradient descent with momentum and
    a gain per coordinate, learning rate n / 48, at least min(n, 50). path: "plain", "fused" (Triton) or None:
    fused for three dimensions on CUDA.
    UserError for values that are not finite, fewer points than 2 + perplexity, points that are all the same
    (they have no principal component to start from), or a path that cannot run.
    """
    n = len(X)
    if not torch.isfinite(X).all():
        bad = int((~torch.isfinite(X)).sum())
        raise UserError(f"tsne: X has {bad} values that are NaN or infinite; expected none")
    if n < perplexity + 2:
        fewest = math.ceil(perplexity) + 2
        raise UserError(f"tsne: {n} points at perplexity {perplexity:g}; expected at least {fewest} points")
    if (X == X[0]).all():
        raise UserError(f"tsne: all {n} points are the same; expected two that differ")
    can_be_fused = X.is_cuda and dims == 3
    path = path or ("fused" if can_be_fused else "plain")
    if path != "plain" and (path != "fused" or not can_be_fused):
        where = f"{dims} dimensions on {X.device}"
        raise UserError(f"tsne: path={path!r} for {where}; expected 'plain', or 'fused' for 3 on CUDA")

    conditional, gradient = kernels_tsne.functions(path)
    P = joint_probabilities(X, perplexity, conditional=conditional)
    negentropy = sum(torch.xlogy(rows, rows).sum(dtype=torch.float64) for rows in P.split(1024))
    Y = _start(X, dims, seed, start)
    _descend(Y, P, min(steps, EXAGGERATED_STEPS), EXAGGERATION, MOMENTUM[0], gradient, path == "fused")
    _descend(Y, P, steps - EXAGGERATED_STEPS, 1.0, MOMENTUM[1], gradient, path == "fused")
    _, divergence = kernels_tsne.gradient_and_divergence(Y, P, 1.0, negentropy)
    return Y, divergence.item()
