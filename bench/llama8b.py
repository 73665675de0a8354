"""The 8B shape on rows of known length (bench/world.py writes them to runs/bench): a config for timing, not a rung of the ladder."""

_root = "runs/bench"

common = dict(
    model_path=f"{_root}/base",
    template="tulu",
    precision="bf16",
    recompute="full",
    max_steps=20,
)
sft = dict(
    out_dir=f"{_root}/sft",
    data={f"{_root}/sft_fixed.jsonl": 1.0},
    max_seq_len=4096,
    global_batch_size=16,
    tokens_per_microbatch=16384,
    lr=5e-6,
    warmup_ratio=0.03,
)
dpo = dict(
    out_dir=f"{_root}/dpo",
    data={f"{_root}/dpo_fixed.jsonl": 1.0},
    max_seq_len=2048,
    global_batch_size=32,
    tokens_per_microbatch=16384,
    lr=5e-7,
    warmup_ratio=0.1,
    beta=5.0,
)
