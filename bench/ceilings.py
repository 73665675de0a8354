"""What this GPU gives at best, at the 8B shapes: `python bench/ceilings.py` (90 seconds).

Matmuls, attention by every path, the head.

Matmuls in bf16 at 8,192 rows: forward, the input's gradient and the weight's, each repeated for SECONDS so
that the clock is the one of a training step and not of a pause before it. Attention: 32 query and 8 key/value
heads of 128, 16,384 tokens in documents of one length, forward and backward; TFLOP/s count the causal half (4
H K per visible pair forward, 2.5 times that backward). Head: token_logps of 8,192 rows, forward and backward,
by the rows of a chunk. Prints three tables.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

from kernels import Master, attention, token_logps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS, ROWS, TOKENS = 2.0, 8192, 16384
MATMULS = {
    "q, o": (4096, 4096),
    "k, v": (4096, 1024),
    "gate, up": (4096, 14336),
    "down": (14336, 4096),
    "head": (4096, 128256),
}  # in, out
HEADS, GROUPS, SIZE = 32, 8, 128


def sustained(work, flops):
    """FLOP/s of work() repeated for SECONDS, after as long to warm up."""
    for _ in range(2):
        count, start = 0, time.perf_counter()
        while count < 3 or time.perf_counter() - start < SECONDS:
            work()
            count += 1
            if count % 8 == 0 and DEVICE.type == "cuda":
                torch.cuda.synchronize()  # else the queue runs ahead of the clock
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        rate = count * flops / (time.perf_counter() - start)
    return rate


def normal(*shape, requires_grad=False):
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=requires_grad)


def matmul_table():
    print(f"{'matmul, ' + str(ROWS) + ' rows':<22}{'forward':>10}{'dgrad':>10}{'wgrad':>10}  TFLOP/s")
    for name, (inner, outer) in MATMULS.items():
        x, w, dy = normal(ROWS, inner), normal(outer, inner), normal(ROWS, outer)
        ways = (lambda: x @ w.T, lambda: dy @ w, lambda: dy.T @ x)  # noqa: B023  called before the next turn
        rates = [sustained(way, 2 * ROWS * inner * outer) / 1e12 for way in ways]
        print(f"{name:<22}" + "".join(f"{rate:>10.0f}" for rate in rates), flush=True)


def dense(backend, length):
    """scaled_dot_product_attention of equal documents as a batch.

    A packed stream of unequal ones is no such batch.
    """

    def attend(q, k, v, cu_seqlens, max_seqlen):
        batch = [x.view(-1, length, x.shape[1], SIZE).transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


def attention_table(lengths=(500, 1000, 4096)):
    print(f"\n{'attention, tokens a document':<34}{'forward':>10}{'with backward':>15}  TFLOP/s")
    for length in lengths:
        documents = TOKENS // length
        tokens = documents * length
        cu_seqlens = torch.arange(documents + 1, device=DEVICE, dtype=torch.int32) * length
        q = normal(tokens, HEADS, SIZE, requires_grad=True)
        k = normal(tokens, GROUPS, SIZE, requires_grad=True)
        v = normal(tokens, GROUPS, SIZE, requires_grad=True)
        flops = documents * 2 * HEADS * SIZE * length * (length + 1)
        paths = {"flash2 (varlen_attn)": attention, "cuDNN, dense": dense(SDPBackend.CUDNN_ATTENTION, length)}
        if importlib.util.find_spec("flash_attn"):
            paths["flash4"] = lambda *inputs: attention(*inputs, kernel="flash4")
        if DEVICE.type == "cpu":
            paths = {"documents one by one": attention, "dense": dense(SDPBackend.MATH, length)}
        for name, path in paths.items():

            def both(path=path):
                torch.autograd.grad(path(q, k, v, cu_seqlens, length).sum(), (q, k, v))  # noqa: B023

            with torch.no_grad():
                forward = sustained(lambda path=path: path(q, k, v, cu_seqlens, length), flops)  # noqa: B023
            print(
                f"{length:>6}  {name:<26}{forward / 1e12:>10.0f}{sustained(both, 3.5 * flops) / 1e12:>15.0f}",
                flush=True,
            )


def head_table(chunks=(1024, 2048, 4096, 8192)):
    inner, vocabulary = MATMULS["head"]
    hidden = normal(ROWS, inner, requires_grad=True)
    weight = normal(vocabulary, inner, requires_grad=True)
    targets = torch.randint(vocabulary, (ROWS,), device=DEVICE)
    # As training has it on one GPU.
    weight.grad_dtype, weight.master = (
        torch.float32,
        Master(low_bits=None, accumulates=True),
    )
    flops = 8 * ROWS * inner * vocabulary  # logits twice, and two gradients
    print(f"\n{'token_logps, rows a chunk':<28}{'ms':>6}  TFLOP/s   GiB beside the gradients")
    for chunk in chunks:

        def both(chunk=chunk):
            torch.autograd.backward(
                token_logps(hidden * 0.01, weight, targets, chunk).sum(), inputs=(hidden, weight)
            )  # noqa: B023

        both()
        before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = sustained(both, flops)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if DEVICE.type == "cuda" else float("nan")
        print(f"{chunk:>8}{'':<20}{flops / rate * 1e3:>6.1f}{rate / 1e12:>9.0f}{peak:>12.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    about = (
        torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU: only to see that this script runs"
    )
    print(f"{about}, torch {torch.__version__}")
    matmul_table()
    attention_table()
    head_table()


if __name__ == "__main__":
    main()
