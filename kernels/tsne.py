"""t-SNE's probabilities and gradient without (n, n, d) tensors.

Computed block by block in torch, or by the Triton kernels on CUDA.
"""

import torch

from kernels import reference


def functions(path):
    """(probabilities, gradient) of a path, "plain" or "fused".

    The first is reference.tsne_probabilities, the second maps Y, P, exaggeration to (n, d). Imported here,
    because a torch for CPUs comes without Triton.
    """
    if path == "plain":
        return reference.tsne_probabilities, lambda Y, P, exaggeration: gradient_and_divergence(
            Y, P, exaggeration
        )[0]
    from kernels import triton_tsne

    return triton_tsne.conditional_probabilities, triton_tsne.gradient


def gradient_and_divergence(Y, P, exaggeration=1.0, negentropy=None, chunk=1024):
    """(reference.tsne_gradient, reference.tsne_divergence) in one pass over blocks of rows.

    A block has `chunk` rows and takes a handful of (r, n) tensors. negentropy = sum of P log P, the same at
    all steps of a descent; None: no divergence. `exaggeration` is the gradient's alone.
    """
    nu = max(Y.shape[1] - 1, 1)
    # (n, d + 1): one product gives sum_j m_ij y_j and sum_j m_ij.
    ones = torch.cat([Y, torch.ones_like(Y[:, :1])], 1)
    pull, push = torch.empty_like(ones), torch.empty_like(ones)
    Z, fit = 0.0, 0.0
    for rows in torch.arange(len(Y), device=Y.device).split(chunk):
        p = P[rows]
        # By differences: exact zeros at i = j.
        d2 = sum((Y[rows, k, None] - Y[:, k]).square_() for k in range(Y.shape[1]))
        w = d2.div_(nu).add_(1).reciprocal_()
        u = w.pow((nu + 1) / 2)
        Z = Z + u.sum(dtype=torch.float64) - len(rows)  # u_ii = 1
        if negentropy is not None:
            fit = fit + (p * u.log()).sum(dtype=torch.float64)
        push[rows] = u.mul_(w) @ ones
        pull[rows] = w.mul_(p) @ ones
    total = exaggeration * pull - push / Z
    gradient = (2 * (nu + 1) / nu) * (total[:, -1:] * Y - total[:, :-1])
    divergence = None if negentropy is None else negentropy - fit + Z.log()
    return gradient.to(Y.dtype), divergence
