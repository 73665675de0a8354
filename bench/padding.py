"""Token slots that do nothing, on a Tulu-like length mix: `python bench/padding.py`, no GPU.

Mean 600 tokens, long tail, cut at 4,096.

Ours: packed streams of at most 8,192 tokens on 8 GPUs, 128 documents a step; a slot is wasted where a GPU
waits for the longest stream of its micro-batch. Padded: micro-batches of 4 documents in random order, each as
long as its longest, as a trainer without packing has them.
"""

import argparse
import platform
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.record import append
from bench.world import tulu_like_lengths
from model import LlamaConfig
from packing import padding_waste, plan_step, step_examples

RANKS, GLOBAL_BATCH, TOKENS, MICRO_BATCH, STEPS = 8, 128, 8192, 4, 100


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    lengths = tulu_like_lengths(np.random.default_rng(0), STEPS * GLOBAL_BATCH)
    ours, padded, config = [], [], LlamaConfig.preset("llama-3.1-8b")
    for step in range(STEPS):
        these = lengths[step_examples(step, len(lengths), GLOBAL_BATCH, seed=42)]
        ours.append(padding_waste(plan_step(these, config.flops(these), RANKS, TOKENS), these))
        rows = these.reshape(-1, MICRO_BATCH)
        padded.append(1 - these.sum() / (rows.max(axis=1).sum() * MICRO_BATCH))
    waste, theirs = float(np.mean(ours)), float(np.mean(padded))
    peer = f"padded, {MICRO_BATCH} documents a micro-batch"
    print(
        f"padding waste over {STEPS} steps: ours {waste:.2%} (worst step {max(ours):.2%}); {peer}: "
        f"{theirs:.2%}"
    )
    append(
        "padding_waste",
        waste,
        "of token slots",
        (peer, theirs, theirs / waste),
        platform.machine(),
        0,
        "-",
        "bench/padding.py",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
