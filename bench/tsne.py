"""t-SNE to three dimensions beside scikit-learn's, on this machine: `python bench/tsne.py`.

One GPU, 16 cores: four minutes.

n = 1,400, 7,000 and 28,000 points of 4,096 dimensions in 14 clusters, perplexity 30, 50 and 50, 500 steps
from the principal components. A time is the whole of tsne(): components, P, descent, divergence; the median
of three after one to warm up. The peer is what a user of scikit-learn gets (its tree code, on all cores, from
X in host memory); its exact code is shown too, for n = 1,400. All divergences by our formula. Prints a table
and appends to bench/results.jsonl, or to --out FILE.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder: both have a tsne.py

import torch

from analysis.tsne import joint_probabilities, principal_components, tsne
from bench.clocks import Clocks
from bench.record import append
from kernels import triton_tsne
from kernels.tsne import gradient_and_divergence

HERE = Path(__file__).parent
SIZES = {1400: 30.0, 7000: 50.0, 28000: 50.0}  # points: perplexity
PLAIN_UP_TO = 7000
CORES = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def mixture(n, dims=4096, clusters=14):
    """(n, dims): noise of width 1 around centres 0.2 wide.

    So a centre is sqrt(2) 0.2 = 0.28 of a noise vector from the next.
    """
    generator = torch.Generator("cuda").manual_seed(n)
    centres = 0.2 * torch.randn(clusters, dims, generator=generator, device="cuda")
    return (
        torch.randn(n, dims, generator=generator, device="cuda")
        + centres[torch.arange(n, device="cuda") % clusters]
    )


def timed(function):
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def ours(X, perplexity, path, repeats):
    """(median seconds, all seconds, KL, peak GiB beyond X)."""
    tsne(X, perplexity, path=path, steps=252)  # compiles the kernel, opens the libraries
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runs = [timed(lambda: tsne(X, perplexity, path=path)) for _ in range(repeats)]
    seconds = [s for s, _ in runs]
    return (
        statistics.median(seconds),
        seconds,
        runs[-1][1][1],
        (torch.cuda.max_memory_allocated() - before) / 2**30,
    )


def peer(X, perplexity, method):
    """(seconds, KL) of scikit-learn's t-SNE; KL of its embedding by our formula, over all pairs."""
    from sklearn.manifold import TSNE

    X = X.cpu().numpy()
    estimator = TSNE(
        3, perplexity=perplexity, max_iter=500, init="pca", random_state=42, method=method, n_jobs=-1
    )
    seconds, Y = timed(lambda: estimator.fit_transform(X))
    P = joint_probabilities(torch.tensor(X, device="cuda"), perplexity)
    negentropy = torch.xlogy(P, P).sum(dtype=torch.float64)
    return seconds, gradient_and_divergence(torch.tensor(Y, device="cuda"), P, 1.0, negentropy)[1].item()


def show(n, what, seconds, kl, note=""):
    print(f"{n:6}  {what:36} {seconds:9.4f} s   KL {kl:.4f}   {note}", flush=True)


def parts(X, perplexity):
    """Where the time goes, in ms; "gradient" is one step's."""
    P = joint_probabilities(X, perplexity, conditional=triton_tsne.conditional_probabilities)
    Y = torch.randn(len(X), 3, device="cuda")
    work = {
        "components": lambda: principal_components(X, 3),
        "P": lambda: joint_probabilities(X, perplexity, conditional=triton_tsne.conditional_probabilities),
        "gradient": lambda: [triton_tsne.gradient(Y, P) for _ in range(20)],
        "divergence": lambda: gradient_and_divergence(Y, P, 1.0, torch.zeros((), device="cuda")),
    }
    times = []
    for name, function in work.items():
        for _ in range(3):  # the last one counts
            seconds = timed(function)[0]
        calls = 20 if name == "gradient" else 1
        times.append(f"{name} {seconds * 1e3 / calls:.3f} ms")
    return ", ".join(times)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="another jsonl file than bench/results.jsonl")
    parser.add_argument("--commit", help="where the checkout has no git")
    args = parser.parse_args()
    has_peer = importlib.util.find_spec("sklearn") is not None
    found = "found" if has_peer else "not installed"
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {CORES} cores, scikit-learn {found}",
        flush=True,
    )

    for n, perplexity in SIZES.items():
        X = mixture(n)
        with Clocks() as clocks:
            seconds, runs, kl, peak = ours(X, perplexity, "fused", repeats=3)
        show(n, "fused", seconds, kl, f"{', '.join(f'{s:.4f}' for s in runs)}; peak {peak:.2f} GiB")
        print(f"{'':8}{parts(X, perplexity)}", flush=True)
        if n <= PLAIN_UP_TO:
            plain, _, plain_kl, plain_peak = ours(X, perplexity, "plain", repeats=1)
            show(n, "plain", plain, plain_kl, f"{plain / seconds:.1f} times fused; peak {plain_peak:.2f} GiB")
        theirs = None
        if has_peer:
            s, peer_kl = peer(X, perplexity, "barnes_hut")
            show(n, f"scikit-learn barnes_hut ({CORES} cores)", s, peer_kl, f"{s / seconds:.0f} times fused")
            theirs = (f"scikit-learn barnes_hut ({CORES} cores)", s, s / seconds)
        if has_peer and n == min(SIZES):
            s, peer_kl = peer(X, perplexity, "exact")
            show(n, f"scikit-learn exact ({CORES} cores)", s, peer_kl, f"{s / seconds:.0f} times fused")
        about = (torch.cuda.get_device_name(), 1, torch.__version__, "bench/tsne.py", clocks.median())
        append(f"tsne_{n}", seconds, "s", theirs, *about, commit=args.commit, path=args.out)


if __name__ == "__main__":
    main()
