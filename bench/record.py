"""Keep a measurement: `python bench/record.py RUN_FOLDER --metric sft_full`.

Appends to bench/results.jsonl and renders bench/RESULTS.md.

RUN_FOLDER is a finished run of train_sft.py or train_dpo.py. Throughput is the median over the steps after
the first SKIP, per GPU, and in pairs/s for DPO. A peer is measured in the same session on the same machine
and given with --peer NAME --peer-value X or, when bench/peers.py measured it, with --peer NAME --peer-file
FILE.jsonl. A ratio above 1 is in our favour, for memory too.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.clocks import median_clocks
from plumbing import logbook
from plumbing.files import read_jsonl

HERE = Path(__file__).parent
SKIP = 3  # the allocator, compilation, and the clocks under load
COLUMNS = (
    "metric",
    "value",
    "unit",
    "peer",
    "peer_value",
    "ratio",
    "hardware",
    "gpus",
    "torch",
    "commit",
    "date",
    "command",
    "clocks",
)


def measure(folder):
    """({tokens_per_s, pairs_per_s (DPO), mfu, peak_mem_gib}, names of the data, manifest) of a run.

    The numbers are of its steady state, per GPU.
    """
    config = json.loads((folder / "config.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    steps = [line for line in read_jsonl(folder / "metrics.jsonl") if "step_s" in line][SKIP:]
    if not steps:
        raise ValueError(
            f"{folder}: fewer than {SKIP + 1} steps; expected a run long enough to have a steady state"
        )
    gpus = manifest["world_size"]
    values = {}
    for key in ("tokens_per_s", "mfu", "step_s"):
        if key in steps[0]:  # no mfu on a CPU
            values[key] = statistics.median([line[key] for line in steps])
    values["tokens_per_s"] /= gpus
    if manifest["stage"] == "dpo":
        values["pairs_per_s"] = config["global_batch_size"] / values["step_s"] / gpus
    values["data"] = [Path(name).name for name in config["data"]]
    return values | {"peak_mem_gib": max(line["peak_mem_gib"] for line in steps)}, manifest


def round_4(value):
    return float(f"{value:.4g}")


def append(
    metric, value, unit, peer, hardware, gpus, torch, command, clocks=None, commit=None, date=None, path=None
):
    """Add a measurement to `path`, or to results.jsonl, which is then rendered.

    peer: (name, value, ratio), or None. clocks: the GPU's, and behind a semicolon the peer's, as of
    bench/clocks.py; None of a CPU.
    """
    rounded = (peer[0], *map(round_4, peer[1:])) if peer else (None, None, None)
    about = (
        hardware,
        gpus,
        torch.partition("+")[0],
        commit or logbook.commit(),
        date or time.strftime("%Y-%m-%d"),
        command,
        clocks,
    )
    with (path or HERE / "results.jsonl").open("a") as file:
        file.write(
            json.dumps(dict(zip(COLUMNS, (metric, round_4(value), unit, *rounded, *about), strict=True)))
            + "\n"
        )
    if path is None:
        render()


def fastest_peer(path, name, data, key):
    """The line of FILE.jsonl with the largest `key` for the rows of our run.

    Among those that bench/peers.py wrote as `name`.
    """
    lines = []
    for line in read_jsonl(path):
        if line["name"] == name and line["settings"]["data"] in data:
            lines.append(line)
    if not lines:
        raise ValueError(
            f"{path}: no line of {name!r} on {data}; expected one from bench/peers.py in the same session"
        )
    return max(lines, key=lambda line: line[key])


def render():
    """bench/RESULTS.md from bench/results.jsonl."""
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in read_jsonl(HERE / "results.jsonl"):
        cells = ["" if row.get(key) is None else str(row[key]) for key in COLUMNS]
        table.append("| " + " | ".join(cells) + " |")
    head = """# Measurements

Rendered from results.jsonl by bench/record.py. Rates are per GPU, medians over the steady state. Clocks are
medians of the last minute: ours; the peer's. Lines without them are older than the column (bench/NOTES.md has
some), or of a CPU.

"""
    (HERE / "RESULTS.md").write_text(head + "\n".join(table) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", type=Path, help="a finished run")
    parser.add_argument(
        "--metric",
        required=True,
        help="name of the measurement, as in bench/training.sh: sft_full, dpo_lora, ...",
    )
    parser.add_argument("--commit", help="where the run's manifest does not know it")
    parser.add_argument("--peer", help="name of what it is compared with")
    parser.add_argument("--peer-value", type=float, help="the peer's rate, in our unit")
    parser.add_argument(
        "--peer-file",
        type=Path,
        help="what bench/peers.py wrote; the fastest line of --peer on the same rows counts",
    )
    args = parser.parse_args()

    values, manifest = measure(args.folder)
    key, unit = ("pairs_per_s", "pairs/s") if "pairs_per_s" in values else ("tokens_per_s", "tokens/s")
    peer, peer_value, peer_memory, clocks = args.peer, args.peer_value, None, []
    samples = args.folder.with_name(f"{args.folder.name}.clocks.csv")
    if samples.exists():
        clocks.append(median_clocks(samples.read_text().splitlines()))
    if args.peer_file:
        line = fastest_peer(args.peer_file, args.peer, values["data"], key)
        options = [name for name in ("compile", "liger") if line["settings"][name]]
        about = [f"{name} {version}" for name, version in line["versions"].items() if name != "torch"]
        peer = ", ".join([args.peer, *options, f"recompute {line['recompute']}", *about])
        peer_value, peer_memory = line[key], line["peak_mem_gib"]
        clocks.append(line["clocks"])
    rows = {
        args.metric: (values[key], unit, peer_value, 1),
        f"mfu_{args.metric}": (values["mfu"], "of matmul peak", None, 1),
    }
    rows[f"mem_{args.metric}"] = (values["peak_mem_gib"], "GiB", peer_memory, -1)
    for metric, (value, unit, theirs, sign) in rows.items():
        beside = (peer, theirs, (value / theirs) ** sign) if theirs else None
        about = (
            manifest["hardware"],
            manifest["world_size"],
            manifest["versions"]["torch"],
            manifest["command"],
        )
        about += (
            "; ".join(filter(None, clocks)) or None,
            args.commit or manifest["commit"],
            manifest["started"][:10],
        )
        append(metric, value, unit, beside, *about)


if __name__ == "__main__":
    main()
