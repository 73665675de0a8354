"""What a checkpoint and tokenised data cost: `python bench/checkpoint.py [GB]`.

Seconds on this disk, and what hashing adds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

from plumbing import checkpoint, files, parallel, tensors, token_cache
from plumbing.checkpoint import Checkpointer


def timed(label, size, work):
    """cpu: seconds of all threads, which a busy machine does not change."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f"{label:<48} {seconds:6.2f} s  {size / seconds / 1e9:5.2f} GB/s  cpu {cpu:5.2f} s", flush=True)


class NoHash:
    """In the place of sha256, for the time before it."""

    def __init__(self, data=b""):
        pass

    def update(self, data):
        pass

    def hexdigest(self):
        return "0" * 64


def measure(folder, model, optimizer, size, name):
    """Two saves, the second into the host memory of the first, and one load of `size` bytes."""
    checkpointer = Checkpointer(folder, 1, {})
    timed(f"save, until training goes on ({name})", size, lambda: checkpointer.save(1, model, optimizer))
    timed(f"save, the rest, in the background ({name})", size, checkpointer._wait)
    timed(f"save again, the same ({name})", size, lambda: checkpointer.save(2, model, optimizer))
    checkpointer.wait()
    path = checkpointer.latest()
    timed(f"load ({name})", size, lambda: checkpointer.load(path, model, optimizer))
    return path / "rank_00000.safetensors"


def read_tokens(folder, size):
    """Tokenised columns of `size` bytes: checked at every start, then memory-mapped."""
    token_cache.write(folder / "columns", {"ids": np.zeros(size // 4, dtype=np.int32)}, {})
    timed("tokenised data, memory-mapped (without)", size, lambda: np.load(folder / "columns/ids.npy", "r"))
    timed("tokenised data (with sha256)", size, lambda: token_cache.is_intact(folder / "columns", print))


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gb", metavar="GB", type=float, nargs="?", default=1.0, help="(default: %(default)s)")
    size = int(parser.parse_args(argv).gb * 1e9)
    world = parallel.init()
    # weights are a third of it, beside two moments
    model = torch.nn.Linear(4096, size // 3 // 4 // 4096, bias=False, device=world.device)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        sha256, damage_of = tensors.hashlib.sha256, checkpoint._damage_of
        tensors.hashlib.sha256, checkpoint._damage_of = NoHash, lambda *args: None
        measure(Path(folder) / "without", model, optimizer, size, "without")
        tensors.hashlib.sha256, checkpoint._damage_of = sha256, damage_of
        path = measure(Path(folder) / "with", model, optimizer, size, "with sha256")
        timed("sha256 alone, one file (an export, a base)", size, lambda: files.sha256_of(path))
        read_tokens(Path(folder), size)
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
