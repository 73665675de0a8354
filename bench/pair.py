"""A pair of models of a real shape to its verdict: how long that takes, and the most memory.

    python bench/pair.py [--preset llama-3.1-8b] [--key=value ..]

Keys are those of `steer.py validate`. Weights are random: the SFT model is bench/world.py's, the DPO model is
that one with a little noise on its matrices. The host's memory is read off the process while it runs: `all`
counts pages of mapped weight files, which the kernel may drop; `own` does not. On a CPU, to try it:
--preset tiny --count=20 --layers=2.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
FOLDER = Path("runs/bench/pair")
NOISE = 1e-3  # beside weights of .02
FIELDS = {"VmHWM": "all", "RssAnon": "own"}  # of /proc/PID/status, in KiB


def write_moved(source, target):
    """A copy of a model folder whose matrices have moved. The hashes stay behind: they are of the source."""
    target.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    for path in sorted(source.iterdir()):
        if path.suffix == ".json" and path.name != "hashes.json":
            (target / path.name).write_bytes(path.read_bytes())
        if path.suffix != ".safetensors":
            continue
        weights = load_file(path, device=device)
        for weight in weights.values():
            if weight.ndim == 2:
                weight.add_(torch.randn_like(weight), alpha=NOISE)
        save_file(weights, target / path.name, metadata={"format": "pt"})


def gpu_memory():
    """GiB in use on the first GPU, 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) / 2**10


def peaks(process):
    """Sample a process until it ends: {"all", "own", "gpu"} in GiB, the most of each."""
    most = dict.fromkeys((*FIELDS.values(), "gpu"), 0.0)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in FIELDS:
                most[FIELDS[name]] = max(most[FIELDS[name]], int(value.split()[0]) / 2**20)
        most["gpu"] = max(most["gpu"], gpu_memory())
        time.sleep(0.2)
    return most


def gib_on_disk(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**30


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-3.1-8b", help="shape (default: %(default)s)")
    args, keys = parser.parse_known_args()

    start = time.perf_counter()
    world = [sys.executable, ROOT / "bench/world.py", FOLDER, "--preset", args.preset]
    subprocess.run(world, check=True)
    sft, dpo, out = FOLDER / "base", FOLDER / "moved", FOLDER / "out"
    write_moved(sft, dpo)
    print(f"world {time.perf_counter() - start:.0f} s, {gib_on_disk(FOLDER):.1f} GiB on the disk")

    start = time.perf_counter()
    command = [sys.executable, ROOT / "steer.py", "validate", sft, dpo, f"--out_dir={out}"]
    command += [f"--texts={FOLDER}/dpo_fixed.jsonl", f"--prompts={FOLDER}/labelled.csv", "--template=tulu"]
    process = subprocess.Popen([*command, *keys])
    most = peaks(process)
    print(f"validate {time.perf_counter() - start:.0f} s, exit code {process.returncode}")
    print(f"host {most['all']:.1f} GiB, of which its own {most['own']:.1f}; GPU {most['gpu']:.1f} GiB")
    print(f"{gib_on_disk(out):.2f} GiB written")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
