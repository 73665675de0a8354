"""Exact t-SNE in plain torch: the 3-D space of the published AQI. No tree and no neighbour lists, so its divergence is the exact one.

Letters: n points, D dimensions in, d dimensions out (3), r rows of one block. The largest tensors are P, (n, n) float32 (196 MB at
n = 7,000, 3.1 GB at 28,000), and a handful of (r, n) blocks. Leaf to root: P at a given perplexity, the gradient, the descent.
What is slow here, the search for beta and the gradient, has a fast path in triton_tsne.py.
"""

import math

import torch

from plumbing.files import UserError

# scikit-learn's defaults, so that both descend alike from the same start
EXAGGERATION, EXAGGERATED_STEPS = 12.0, 250  # p is 12 p in the first 250 steps, in which the clusters form
MOMENTUM, MIN_GAIN = (0.5, 0.8), 0.01  # during and after exaggeration
START_STD = 1e-4


def conditional_probabilities(d2, own, perplexity, tolerance=1e-5, max_steps=100):
    """p(j|i) ~ exp(-beta_i d2_ij), each row with entropy log(perplexity) (van der Maaten & Hinton 2008, eq. 1): (r, n), 0 at j = i.

    d2 (r, n) squared distances, own (r,): the column of each row's own point. beta_i by bisection, doubled or halved until bracketed, to
    `tolerance` nats. A row of equal distances, or of more duplicates than `perplexity`, has no such beta and keeps the last one tried.
    """
    own = own[:, None]
    d2 = d2 - d2.scatter(1, own, math.inf).amin(1, keepdim=True)  # p does not change, and the nearest point cannot underflow
    d2.scatter_(1, own, 0.0)
    d2 /= d2.mean(1, keepdim=True).clamp(min=1e-300)  # so that beta starts at 1
    beta = torch.ones_like(d2[:, :1])
    low, high = torch.zeros_like(beta), torch.full_like(beta, math.inf)
    for _ in range(max_steps):
        p = (-beta * d2).exp_().scatter_(1, own, 0.0)
        total = p.sum(1, keepdim=True)
        excess = total.log() + beta * (p * d2).sum(1, keepdim=True) / total - math.log(perplexity)  # entropy above the wanted one
        found = excess.abs() < tolerance
        if found.all():
            break
        low, high = torch.where(excess > 0, beta, low), torch.where(excess > 0, high, beta)
        beta = torch.where(found, beta, torch.where(high.isinf(), 2 * beta, (low + high) / 2))
    return p / total


def joint_probabilities(X, perplexity, chunk=1024, conditional=conditional_probabilities):
    """(n, D) -> P (n, n) float32, P_ij = (p(j|i) + p(i|j)) / 2n: symmetric, zero diagonal, sum 1. Distances are float64.

    (On an H200 a product in float64 is as fast as one in float32.) conditional: the plain search for beta or triton_tsne'.
    """
    n = len(X)
    X = X.double() - X.double().mean(0)  # |x_i|^2 + |x_j|^2 - 2 x_i x_j loses digits to an offset
    norms, index = X.square().sum(1), torch.arange(n, device=X.device)
    P = torch.empty(n, n, dtype=torch.float32, device=X.device)
    for rows in index.split(chunk):
        d2 = (norms[rows, None] + norms - 2 * X[rows] @ X.T).clamp_(min=0)
        P[rows] = conditional(d2, rows, perplexity).float()
    for a in range(0, n, chunk):  # block by block in place: P + P.T would be a second (n, n)
        for b in range(a, n, chunk):
            upper, lower = P[a : a + chunk, b : b + chunk], P[b : b + chunk, a : a + chunk]
            block = (upper + lower.T) / (2 * n)
            upper.copy_(block)
            lower.copy_(block.T)
    return P


def gradient_reference(Y, P, exaggeration=1.0, negentropy=None, chunk=1024):
    """(gradient (n, d), KL(P || Q)) of t-SNE, in one pass over (r, n) blocks: what a fused kernel must compute.

    Q_ij = u_ij / Z, u = w^((nu+1)/2), w_ij = 1 / (1 + |y_i - y_j|^2 / nu), nu = d - 1 degrees of freedom, Z = sum of u over i != j;
    dKL/dy_i = 2 (nu+1)/nu sum_j (P_ij - Q_ij) w_ij (y_i - y_j)   (van der Maaten 2009; for nu = 1 eq. 5 of 2008).
    scikit-learn multiplies by u where this has w, which for d = 3 is not the gradient of its KL: it ends higher (see `tsne`).
    Y (n, d) float; P (n, n), scaled by `exaggeration` in the gradient only. negentropy = sum P log P, the same at all steps; None: no KL.
    """
    nu = max(Y.shape[1] - 1, 1)
    ones = torch.cat([Y, torch.ones_like(Y[:, :1])], 1)  # one product gives sum_j m_ij y_j and sum_j m_ij
    pull, push, Z, fit = torch.empty_like(ones), torch.empty_like(ones), 0.0, 0.0
    for rows in torch.arange(len(Y), device=Y.device).split(chunk):
        p = P[rows]
        d2 = sum((Y[rows, k, None] - Y[:, k]).square_() for k in range(Y.shape[1]))  # by differences: exact zeros at i = j
        w = d2.div_(nu).add_(1).reciprocal_()
        u = w.pow((nu + 1) / 2)
        Z = Z + u.sum(dtype=torch.float64) - len(rows)  # u_ii = 1
        if negentropy is not None:
            fit = fit + (p * u.log()).sum(dtype=torch.float64)
        push[rows] = u.mul_(w) @ ones
        pull[rows] = w.mul_(p) @ ones
    total = exaggeration * pull - push / Z
    gradient = (2 * (nu + 1) / nu) * (total[:, -1:] * Y - total[:, :-1])
    return gradient.to(Y.dtype), None if negentropy is None else negentropy - fit + Z.log()


def principal_components(X, dims):
    """(n, D) -> (n, dims) float64 scores of the largest principal components, each with its largest loading positive.

    Block Krylov iteration (Musco & Musco 2015, algorithm 2): the best fit in the span of five iterates. At n = 1,400, D = 1,024, CHI of 3
    to 50 components is right to 1e-5 where variances fall as 1 / i (in the last of eight iterates alone, to 6e-4), to 1 % where all are
    equal.
    """
    X = X.double() - X.double().mean(0)
    basis = torch.randn(X.shape[1], min(dims + 7, *X.shape), dtype=X.dtype, generator=torch.Generator().manual_seed(0)).to(X.device)
    blocks = []
    for _ in range(5):
        basis = torch.linalg.qr(X.T @ (X @ basis)).Q
        blocks.append(basis)
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
    scores = X @ basis
    rotation = torch.linalg.eigh(scores.T @ scores).eigenvectors.flip(1)[:, :dims]
    loadings = basis @ rotation
    return scores @ rotation * loadings.gather(0, loadings.abs().argmax(0, keepdim=True)).sign()


def _descend(Y, P, steps, exaggeration, momentum, gradient, recorded):
    """Take `steps` steps of gradient descent with momentum and a gain per coordinate, moving Y in place.

    recorded: as a CUDA graph. A step is twenty short kernels, which the GPU finishes sooner than Python launches them.
    """
    # P_ij is about 1 / n^2: with few points 50 would overshoot at any gain, out to where Z is 0
    learning_rate = max(len(Y) / EXAGGERATION / 4, min(len(Y), 50.0))
    velocity, gains = torch.zeros_like(Y), torch.ones_like(Y)

    def step():
        grad = gradient(Y, P, exaggeration)
        gains.copy_(torch.where(velocity * grad < 0, gains + 0.2, gains * 0.8)).clamp_(min=MIN_GAIN)
        velocity.mul_(momentum).sub_(learning_rate * gains * grad)
        Y.add_(velocity)

    for _ in range(min(steps, 1) if recorded else steps):  # the first one compiles the kernel, which a recording cannot
        step()
    if recorded and steps > 1:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(steps - 1):
            graph.replay()
        torch.cuda.synchronize()  # the graph owns the memory that its replays use


def _path(X, dims, path):
    """(conditional probabilities, gradient) of a path. Imported here: a torch for CPUs comes without Triton."""
    if path == "plain":
        return conditional_probabilities, lambda Y, P, exaggeration: gradient_reference(Y, P, exaggeration)[0]
    if path != "fused" or not X.is_cuda or dims != 3:
        raise UserError(f"tsne: path={path!r} for {dims} dimensions on {X.device}; expected 'plain', or 'fused' for 3 on CUDA")
    from kernels import triton_tsne

    return triton_tsne.conditional_probabilities, triton_tsne.gradient


def tsne(X, perplexity=30.0, dims=3, steps=500, seed=None, start=None, path=None):
    """Embedding (n, dims) float32 of X (n, D), and its KL divergence (nats) as a float.

    Starts from the principal components, the first with a standard deviation of 1e-4; from a normal sample of that size where a seed is
    given; from `start` (n, dims) where that is. Gradient descent with momentum and a gain per coordinate, learning rate n / 48, at
    least min(n, 50). KL after 500 steps from one start, here and scikit-learn's exact and tree codes (same formula): n = 200: 0.99, 1.77,
    1.72; 400: 1.64, 2.00, 2.33; 1,400: 2.42, 3.54, 2.45. path: "plain", "fused" (triton_tsne.py), or None: fused for three dimensions
    on CUDA.
    ValueError for values that are not finite, fewer points than 2 + perplexity, points that are all the same (they have no principal
    component to start from), or a path that cannot run.
    """
    n = len(X)
    if not torch.isfinite(X).all():
        raise UserError(f"tsne: X has {int((~torch.isfinite(X)).sum())} values that are NaN or infinite; expected none")
    if n < perplexity + 2:
        raise UserError(f"tsne: {n} points at perplexity {perplexity:g}; expected at least {math.ceil(perplexity) + 2} points")
    if (X == X[0]).all():
        raise UserError(f"tsne: all {n} points are the same; expected two that differ")
    path = path or ("fused" if X.is_cuda and dims == 3 else "plain")
    conditional, gradient = _path(X, dims, path)
    P = joint_probabilities(X, perplexity, conditional=conditional)
    negentropy = sum(torch.xlogy(rows, rows).sum(dtype=torch.float64) for rows in P.split(1024))
    if start is not None:
        Y = start.to(P).clone()
    elif seed is not None:
        Y = START_STD * torch.randn(n, dims, generator=torch.Generator().manual_seed(seed)).to(P)
    else:
        Y = principal_components(X, dims)
        Y = (Y * (START_STD / Y[:, 0].std(correction=0))).float()
    _descend(Y, P, min(steps, EXAGGERATED_STEPS), EXAGGERATION, MOMENTUM[0], gradient, path == "fused")
    _descend(Y, P, steps - EXAGGERATED_STEPS, 1.0, MOMENTUM[1], gradient, path == "fused")
    return Y, gradient_reference(Y, P, 1.0, negentropy)[1].item()
