"""What a training step's time is made of on each GPU.

torchrun --nproc-per-node 2 bench/trace.py bench/llama8b.py [--key=value ...]

Takes STEPS steps of train_sft.py (rows by bench/world.py), profiles the last and prints, for rank 0, how long
something ran: compute, the exchange with other ranks, and what of the exchange no compute hid; and the
kernels' time by kind. OUT_DIR/trace.json.gz is the same as a picture, for ui.perfetto.dev.
"""

import re
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
    """{"compute", "exchange", "exposed"}: time in which each ran, of (name, start, end).

    Exposed: an exchange ran and no compute did.
    """
    exchange, compute = [], []
    for name, start, end in events:
        (exchange if "nccl" in name.lower() or name.startswith("gloo:") else compute).append((start, end))
    alone = union(compute)
    return {"compute": alone, "exchange": union(exchange), "exposed": union(compute + exchange) - alone}


KINDS = {  # the first whose pattern is in a kernel's name counts
    "exchange": "nccl|^gloo:",
    "attention": "flash|fmha",
    "matmul": "gemm|nvjet|cutlass|xmma|cublas|splitk",
    "float8 roundings": "quantize|float8",
    "SwiGLU": "swiglu",
    "norms": "rms_norm|norm_kernel|layer_norm",
    "rotary": "rotate",
    "softmax over words": "logps|logits",
    "AdamW": "adam",
    "additions": "add",
    "casts, copies, zeros": "copy|memcpy|memset|fill|cat|cast",
}


def kernel_table(events):
    """[(kind, summed seconds, kernels)] of (name, start, end), the longest first.

    Concurrent kernels count twice.
    """
    sums = {}
    for name, start, end in events:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")
        seconds, count = sums.get(kind, (0.0, 0))
        sums[kind] = (seconds + end - start, count + 1)
    return sorted(((kind, *sums[kind]) for kind in sums), key=lambda row: -row[1])


def device_events(profiler, device_type):
    """[(name, start, end)] in seconds of what ran on the device."""
    events = []
    for event in profiler.events():
        is_span = event.is_user_annotation and not event.name.startswith("gloo:")  # around kernels
        if event.device_type.name.lower() == device_type and not is_span:
            events.append((event.name, event.time_range.start / 1e6, event.time_range.end / 1e6))
    return events


def report(events, plain, profiled):
    """Print what a step is made of, that took `plain` seconds, and `profiled` under the profiler."""
    print(f"a step takes {plain:.3f} s, under the profiler {profiled:.3f} s, of which")
    for name, seconds in shares(events).items():
        print(f"{name:22} {seconds:8.3f} s {seconds / profiled:7.1%}")
    for kind, seconds, count in kernel_table(events):
        print(f"  {kind:20} {seconds * 1000:8.1f} ms {count:7,} kernels", flush=True)


def activities(device_type):
    """What to profile: the device, not the host beside it, which that would slow."""
    return [ProfilerActivity.CUDA if device_type == "cuda" else ProfilerActivity.CPU]


def main(argv):
    config = load("sft", argv)
    world = parallel.init(config.deterministic)
    directory = parallel.main_first(world, lambda: resolve(config.model_path))
    tokenizer = Tokenizer.from_dir(directory)
    documents, _ = parallel.main_first(world, lambda: load_sft(config, tokenizer, world.say))
    model = load_model(
        config, directory, read_model_config(config, directory, tokenizer, world.device), world.device
    )
    optimizer = adamw(model, config.weight_decay, DTYPES[config.moments])

    def take(step):
        """Wall seconds of a step, up to the last kernel's end."""
        start = time.perf_counter()
        ids = step_examples(step, len(documents), config.global_batch_size, config.seed)
        forward_backward(model, documents, ids, config, world)
        apply_gradients(optimizer, config.lr, config.max_grad_norm, documents.row_ids[ids])
        # Weights are still on their way to the other ranks. On CPUs they are sent by threads of gloo, and the
        # profiler, stopped while one of them records, ends the process: 1 of 10 runs.
        parallel.settle(model)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    plain = [take(step) for step in range(STEPS - 1)][-1]
    with profile(activities=activities(world.device.type)) as profiler:
        profiled = take(STEPS - 1)
    if world.main:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(f"{config.out_dir}/trace.json.gz")
        print(f"{world.size} x {world.device.type}:", end=" ")
        report(device_events(profiler, world.device.type), plain, profiled)
        print(f"wrote {config.out_dir}/trace.json.gz")
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
