"""The 8B shape on rows of known length: a config for timing, not a rung of the ladder.

bench/world.py writes the rows to runs/bench.

As it stands it is full fine-tuning on one H200; bench/training.sh says with which keys the other measurements
are made.
"""

_root = "runs/bench"

common = dict(
    model_path=f"{_root}/base",
    template="tulu",
    precision="bf16",
    moments="bf16",
)
sft = dict(
    out_dir=f"{_root}/sft_full",
    data={f"{_root}/sft_fixed.jsonl": 1.0},
    max_seq_len=4096,
    global_batch_size=12,
    tokens_per_microbatch=12288,
    lr=5e-6,
    warmup_ratio=0.03,
    max_steps=60,
)
dpo = dict(
    out_dir=f"{_root}/dpo_full",
    data={f"{_root}/dpo_fixed.jsonl": 1.0},
    max_seq_len=2048,
    global_batch_size=32,
    tokens_per_microbatch=8320,  # 11 pairs of 756 tokens: 252 + 252 + 252
    lr=5e-7,
    warmup_ratio=0.1,
    beta=5.0,
    num_epochs=2,
    max_steps=60,  # of 64 in two epochs: a minute and more of steps after the reference pass
)
