"""bench/llama8b.py on pairs of real-looking lengths: prompts of 200 tokens and answers of 300 on average, both with a long tail."""

import runpy

_fixed = runpy.run_path("bench/llama8b.py")
common = _fixed["common"]
dpo = _fixed["dpo"] | dict(out_dir="runs/bench/dpo_full_mix", data={"runs/bench/dpo_mix.jsonl": 1.0})
