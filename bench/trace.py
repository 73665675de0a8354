"""What a training step's time is made of on each GPU: torchrun --nproc-per-node 2 bench/trace.py bench/llama8b.py [--key=value ...]

Takes STEPS steps of train_sft.py (rows by bench/world.py), profiles the last and prints, for rank 0, how long something ran: compute, the
exchange with other ranks, and what of the exchange no compute hid. OUT_DIR/trace.json.gz is the same as a picture, for ui.perfetto.dev.
"""

import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import load_sft
from optim import adamw, apply_gradients
from packing import step_examples
from plumbing import parallel
from plumbing.config import load
from plumbing.tokenizer import Tokenizer
from plumbing.weights import resolve
from train_sft import forward_backward
from training import DTYPES, load_model, read_model_config

STEPS = 4  # the allocator and the kernels' compilation are done by then


def union(intervals):
    """Length of what (start, end) pairs cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def shares(events):
    """{"compute", "exchange", "exposed"}: time in which each ran, of (name, start, end). Exposed: an exchange ran and no compute did."""
    exchange, compute = [], []
    for name, start, end in events:
        (exchange if "nccl" in name.lower() or name.startswith("gloo:") else compute).append((start, end))
    alone = union(compute)
    return {"compute": alone, "exchange": union(exchange), "exposed": union(compute + exchange) - alone}


def main(argv):
    config = load("sft", argv)
    world = parallel.init()
    directory = parallel.main_first(world, lambda: resolve(config.model_path))
    tokenizer = Tokenizer.from_dir(directory)
    documents, _ = parallel.main_first(world, lambda: load_sft(config, tokenizer, world.say))
    model = load_model(config, directory, read_model_config(config, directory, tokenizer, world.device), world.device)
    optimizer = adamw(model, config.weight_decay, DTYPES[config.moments])

    def take(step):
        """Wall seconds of a step, up to the last kernel's end."""
        start = time.perf_counter()
        ids = step_examples(step, len(documents), config.global_batch_size, config.seed)
        forward_backward(model, documents, ids, config, world)
        apply_gradients(optimizer, config.lr, config.max_grad_norm, documents.row_ids[ids])
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    plain = [take(step) for step in range(STEPS - 1)][-1]
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (world.device.type == "cuda")]) as profiler:
        profiled = take(STEPS - 1)
    if world.main:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(f"{config.out_dir}/trace.json.gz")
        here = [event for event in profiler.events() if event.device_type.name.lower() == world.device.type]
        here = [event for event in here if not event.is_user_annotation or event.name.startswith("gloo:")]  # spans around kernels
        parts = shares([(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in here])
        print(f"{world.size} x {world.device.type}: a step takes {plain:.3f} s, under the profiler {profiled:.3f} s, of which")
        for name, seconds in parts.items():
            print(f"{name:10} {seconds:8.3f} s {seconds / profiled:7.1%}")
        print(f"wrote {config.out_dir}/trace.json.gz")
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
