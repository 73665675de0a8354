"""Keep a measurement: `python bench/record.py RUN_FOLDER --metric sft_full` appends to bench/results.jsonl and renders bench/RESULTS.md.

RUN_FOLDER is a finished run of train_sft.py or train_dpo.py. Throughput is the median over the steps after the first SKIP, per GPU, and in
pairs/s for DPO. A peer is measured by its own script in the same session on the same machine and given with --peer NAME --peer-value X.
"""

import argparse
import json
import statistics
from pathlib import Path

HERE = Path(__file__).parent
SKIP = 5  # the allocator and the clocks settle
COLUMNS = ("metric", "value", "unit", "peer", "peer_value", "ratio", "hardware", "gpus", "torch", "commit", "date", "command")


def measure(folder):
    """What a run folder says of its steady state: {tokens_per_s, pairs_per_s (DPO), mfu, peak_mem_gib, padding_waste}, per GPU."""
    config, manifest = (json.loads((folder / name).read_text()) for name in ("config.json", "manifest.json"))
    steps = [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "step_s" in line][SKIP:]
    if not steps:
        raise ValueError(f"{folder}: fewer than {SKIP + 1} steps; expected a run long enough to have a steady state")
    gpus = manifest["world_size"]
    values = {key: statistics.median(line[key] for line in steps) for key in ("tokens_per_s", "mfu", "padding_waste", "step_s")}
    values["tokens_per_s"] /= gpus
    if manifest["stage"] == "dpo":
        values["pairs_per_s"] = config["global_batch_size"] / values["step_s"] / gpus
    return values | {"peak_mem_gib": max(line["peak_mem_gib"] for line in steps)}, manifest


def render():
    """bench/RESULTS.md from bench/results.jsonl."""
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    table += ["| " + " | ".join("" if row[key] is None else str(row[key]) for key in COLUMNS) + " |" for row in rows]
    head = "# Measurements\n\nRendered from results.jsonl by bench/record.py. Rates are per GPU, medians over the steady state.\n\n"
    (HERE / "RESULTS.md").write_text(head + "\n".join(table) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metric", required=True, help="name of the measurement, see PERF's list: sft_full, dpo_lora, ...")
    parser.add_argument("--commit", help="where the run's manifest does not know it")
    parser.add_argument("--peer")
    parser.add_argument("--peer-value", type=float)
    args = parser.parse_args()

    values, manifest = measure(args.folder)
    key, unit = ("pairs_per_s", "pairs/s") if "pairs_per_s" in values else ("tokens_per_s", "tokens/s")
    rows = {args.metric: (values[key], unit), f"mfu_{args.metric}": (values["mfu"], "of matmul peak")}
    rows[f"mem_{args.metric}"] = (values["peak_mem_gib"], "GiB")
    with (HERE / "results.jsonl").open("a") as file:
        for metric, (value, unit) in rows.items():
            peer = (args.peer, args.peer_value, value / args.peer_value) if args.peer and metric == args.metric else (None, None, None)
            about = (manifest["hardware"], manifest["world_size"], manifest["versions"]["torch"], args.commit or manifest["commit"])
            line = (metric, float(f"{value:.4g}"), unit, *peer, *about, manifest["started"][:10], manifest["command"])
            file.write(json.dumps(dict(zip(COLUMNS, line, strict=True))) + "\n")
    render()


if __name__ == "__main__":
    main()
