"""SFT, DPO and the sweep on what `bench/world.py runs/journey` writes: a config for bench/journey.sh.

The 1B shape on one GPU or several; weights and texts are random, so the curve says nothing.
"""

_root = "runs/journey"

common = dict(
    template="tulu",
    precision="bf16",
    global_batch_size=64,
    tokens_per_microbatch=16384,
)
sft = dict(
    model_path=f"{_root}/base",
    out_dir=f"{_root}/sft",
    data={f"{_root}/sft_mix.jsonl": 1.0},
    max_seq_len=4096,
    lr=5e-6,
    warmup_ratio=0.03,
    max_steps=32,  # of 2,048 documents: an epoch
    save_every=16,
)
dpo = dict(
    model_path=f"{_root}/sft/final",
    out_dir=f"{_root}/dpo",
    data={f"{_root}/dpo_mix.jsonl": 1.0},
    max_seq_len=2048,
    lr=5e-7,
    warmup_ratio=0.1,
    loss="dpo_norm",
    beta=5.0,
    max_steps=16,  # of 1,024 pairs
    save_every=4,
)
steer = dict(texts=f"{_root}/dpo_mix.jsonl", out_dir=f"{_root}/steer")
aqi = dict(prompts=f"{_root}/labelled.csv")
