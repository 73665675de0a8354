"""Several training measurements in one process a GPU: each start would cost 20 s of a rented machine.

    python3 bench/session.py [--seconds 30] [--tag _1gpu] NAME.. [--key=value ..]
    torchrun --nproc-per-node 2 bench/session.py [--seconds 30] [--tag _2gpu] NAME.. [--key=value ..]

NAME: a key of RUNS; with :trace behind it, a table of one step's kernels instead of a rate. Each is
train_sft.main or train_dpo.main with the keys of RUNS, and a global batch that many times larger than there
are GPUs. It is stopped after SECONDS of steps behind the first SKIP. Run folders, for bench/record.py, are
runs/bench/NAME + TAG, with the first GPU's clocks beside them. Rows and the model's shape are those of
bench/world.py --no-weights. Weights are random, drawn on the GPUs: reading 16 GB tells nothing about a step.
"""

import argparse
import gc
import sys
import time
import traceback
from pathlib import Path

import torch
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_dpo
import train_sft
import training
from bench import trace
from bench.clocks import Clocks
from bench.record import SKIP, measure
from plumbing import logbook, parallel

LORA = ["--lora_rank=64", "--lora_alpha=128", "--moments=fp32"]
FIXED, MIX, TULU10 = "bench/llama8b.py", "bench/llama8b_mix.py", "bench/tulu10.py"
ONE_B = ["--model_path=runs/bench/1b/base"]  # bench/world.py runs/bench/1b --preset llama-3.2-1b --no-weights
OLMO = ["--model_path=runs/bench/olmo1b/base"]  # bench/olmo1b.sh writes both folders
OLMO_AS_LLAMA = ["--model_path=runs/bench/olmo1b_llama"]  # of the same shape, with a Llama's norms
RUNS = {  # name: (stage, config, examples a step and GPU, keys)
    "sft_full": ("sft", FIXED, 12, []),
    "sft_full_fp32_moments": ("sft", FIXED, 12, ["--moments=fp32"]),
    "sft_full_fp8": ("sft", FIXED, 12, ["--precision=fp8"]),
    "sft_full_sharded": ("sft", FIXED, 12, ["--moments=fp32", "--sharding=full"]),
    "sft_full_mix": ("sft", MIX, 80, []),
    "sft_lora": ("sft", FIXED, 12, [*LORA, "--lr=1e-4"]),
    "sft_lora_sharded": ("sft", FIXED, 12, [*LORA, "--lr=1e-4", "--sharding=full"]),
    "dpo_full_shared": ("dpo", FIXED, 32, []),
    "dpo_lora": ("dpo", FIXED, 32, [*LORA, "--lr=5e-6"]),
    "sft_full_1b": ("sft", FIXED, 12, ONE_B),
    "sft_olmo1b": ("sft", FIXED, 12, OLMO),
    "dpo_olmo1b": ("dpo", FIXED, 32, OLMO),
    "sft_olmo1b_plain": ("sft", FIXED, 12, [*OLMO, "--kernels=plain"]),
    "sft_olmo1b_llama": ("sft", FIXED, 12, OLMO_AS_LLAMA),
    "tulu10_sft": ("sft", TULU10, 16, []),
    "tulu10_dpo": ("dpo", TULU10, 16, []),
}


class Enough(Exception):
    """Raised at the end of a step, when a measurement has what it wants."""


def watch_steps(seconds, traced, ranks):
    """Make Logbook.step end the run once it has lasted; returns the Clocks that it starts."""
    clocks, step = Clocks(), logbook.Logbook.step
    profiler = profile(activities=trace.activities(ranks.device.type))
    started = []

    def hooked(self, done, *args):
        step(self, done, *args)
        if traced and torch.cuda.is_available():
            torch.cuda.synchronize()
        started.append(time.perf_counter())
        if done == SKIP and torch.cuda.is_available():
            clocks.start()
        if traced and done == SKIP:
            profiler.start()
            self._start = started[-1] = time.perf_counter()
        elif traced and done > SKIP:
            took = time.perf_counter() - started[-2]
            profiler.stop()
            if ranks.main:
                trace.report(
                    trace.device_events(profiler, ranks.device.type), started[-3] - started[-4], took
                )
            raise Enough
        enough = done > SKIP and time.perf_counter() - started[SKIP - 1] > seconds
        if parallel.max_across_ranks(enough):
            raise Enough

    logbook.Logbook.step = hooked
    return clocks, step


@torch.no_grad()
def draw_weights(model, directory):
    """In place of weights.load_weights: random weights, as bf16 holds them.

    The same numbers on every rank that has all of them.
    """
    base = [param for name, param in model.named_parameters() if "lora_" not in name]
    for index, param in enumerate(base):
        # The same with and without adapters: their reference log-probs share a cache.
        torch.manual_seed(index)
        local = parallel.local_rows(param)[1]
        local.fill_(1.0) if param.ndim == 1 else local.normal_(std=0.02)
    parallel.share_weights(model)


# what training reads of a model's weights, and what stands in for it where there are none
WITHOUT_WEIGHTS = {
    "load_weights": draw_weights,
    "check_sizes": lambda config, folder: None,
    # With the folder's path, or the reference log-probs of two shapes would share a file.
    "fingerprint": lambda folder: f"random weights of {folder}",
}


def run(name, seconds, tag, keys_of_all, ranks):
    name, _, traced = name.partition(":")
    stage, config, batch, keys = RUNS[name]
    folder = f"runs/bench/{name}{tag}{traced and '_trace'}"  # a traced run is short: no rate is read of it
    argv = [
        config,
        f"--out_dir={folder}",
        f"--global_batch_size={batch * ranks.size}",
        "--fresh",
        *keys,
        *keys_of_all,
    ]
    sys.argv = [f"train_{stage}.py", *argv]
    ranks.say(f"== {' '.join(sys.argv)}")
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clocks, step = watch_steps(seconds, bool(traced), ranks)
    try:
        {"sft": train_sft, "dpo": train_dpo}[stage].main(argv)
    except Enough:
        pass
    finally:
        logbook.Logbook.step = step
        clocks.stop()
    if ranks.main and not traced:
        if clocks.lines:
            Path(f"{folder}.clocks.csv").write_text("".join(clocks.lines))
        values, _ = measure(Path(folder))
        shown = [f"{key} {value:,.4g}" for key, value in values.items() if key != "data"]
        print(f"RATE {name}{tag}: {', '.join(shown)}; {clocks.median()}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--tag", default="")
    args, keys_of_all = parser.parse_known_args()
    ranks = parallel.init("--deterministic" in keys_of_all)
    parallel.init = lambda deterministic=False: ranks  # one process group for all measurements
    for name, stand_in in WITHOUT_WEIGHTS.items():
        setattr(training, name, stand_in)
    for name in args.names:
        try:
            run(name, args.seconds, args.tag, keys_of_all, ranks)
        except (Exception, SystemExit):  # the others are still worth having
            traceback.print_exc()
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    parallel.shutdown()


if __name__ == "__main__":
    main()
