"""SmolLM2-135M-Instruct on real preference pairs: real weights and data, minutes on a laptop. `make smol`.

    python train_sft.py configs/smol.py
    python train_dpo.py configs/smol.py

demo/smol.py first puts the model into runs/smol/base and the pairs into runs/smol/data.
Numbers: our own choice for a short run. Hardware: two CPU cores, 8 GB of memory. Time: 11 minutes, 19 on a
busy machine; 50 seconds on an H200.
"""

_root = "runs/smol"

common = dict(
    template="chatml",
    data={f"{_root}/data/preferences.jsonl": 1.0},  # SFT learns the chosen answers
    max_seq_len=256,
    global_batch_size=16,
    tokens_per_microbatch=2048,
    precision="fp32",
)
sft = dict(
    model_path=f"{_root}/base",
    out_dir=f"{_root}/sft",
    max_steps=10,
    lr=1e-5,
    warmup_ratio=0.1,
)
dpo = dict(
    model_path=f"{_root}/sft/final",
    out_dir=f"{_root}/dpo",
    data_eval={f"{_root}/data/preferences_eval.jsonl": 1.0},
    max_steps=30,
    lr=1e-5,
    warmup_ratio=0.1,
    loss="dpo_norm",
    beta=5.0,
)
steer = dict(
    texts=f"{_root}/data/preferences.jsonl",
    count=40,
    max_text_tokens=192,
    inject="matched",
)
