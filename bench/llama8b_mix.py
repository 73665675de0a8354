"""bench/llama8b.py on real-looking lengths with a long tail.

Documents have 600 tokens on average; pairs a prompt of 200 and answers of 300.
"""

import runpy

_fixed = runpy.run_path("bench/llama8b.py")
common = _fixed["common"]
dpo = _fixed["dpo"] | dict(out_dir="runs/bench/dpo_full_mix", data={"runs/bench/dpo_mix.jsonl": 1.0})
sft = _fixed["sft"] | dict(
    out_dir="runs/bench/sft_full_mix",
    data={"runs/bench/sft_mix.jsonl": 1.0},
    global_batch_size=80,  # some 49,000 tokens
    num_epochs=2,
)
