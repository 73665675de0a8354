#!/bin/bash
# OLMo 2 1B's shape in full SFT on one GPU: its fused blocks beside a Llama's of the same shape and its own
# plain ones, and what the plan says of the first:
#     bash bench/olmo1b.sh [SECONDS [--key=value ..]]
# SECONDS of steps each (10). Keys are those of train_sft.py, for all but the plan.
cd "$(dirname "$0")/.." || exit 1
seconds=${1:-10}
shift
olmo=runs/bench/olmo1b/base llama=runs/bench/olmo1b_llama
[ -f runs/bench/sft_fixed.jsonl ] || python3 bench/world.py runs/bench --no-weights
[ -f $olmo/config.json ] || python3 bench/world.py runs/bench/olmo1b --preset olmo-2-1b --no-weights
mkdir -p $llama
cp $olmo/* $llama
python3 - $olmo > $llama/config.json << 'PYTHON'
import dataclasses, json, sys
from model import LlamaConfig

olmo = LlamaConfig.from_hf(sys.argv[1])
llama = dataclasses.replace(olmo, model_type="llama", qk_norm=None, post_norm=False)
print(json.dumps(llama.to_hf()))
PYTHON
names=(sft_olmo1b_llama sft_olmo1b sft_olmo1b_plain)
python3 bench/session.py --seconds "$seconds" "${names[@]}" "$@" 2>&1 | grep "^RATE\|rror"
python3 - "${names[@]}" << 'PYTHON'
import sys
from pathlib import Path
from bench.record import measure

llama, olmo, plain = [measure(Path("runs/bench", name))[0] for name in sys.argv[1:]]
for name, other in (("a Llama of this shape", llama), ("its plain blocks", plain)):
    rate = olmo["tokens_per_s"] / other["tokens_per_s"]
    more = olmo["peak_mem_gib"] - other["peak_mem_gib"]
    print(f"RATIO to {name}: {rate:.3f} of the tokens/s, {more:+.2f} GiB")
PYTHON
plan=(--model_path=$olmo --plan --gpu h200 --count 1)
python3 train_sft.py bench/llama8b.py "${plan[@]}" | grep "^memory\|GiB  \|tokens/s"
