"""The embedded default: a tiny Llama in a small world of seven axioms, all made here. `make demo` runs it.

    python train_sft.py configs/tiny.py
    python train_dpo.py configs/tiny.py        (or torchrun --nproc-per-node 8: the same losses)
    python steer.py validate configs/tiny.py

demo/run.py first pretrains runs/tiny/base and writes runs/tiny/data. In its pairs the safe answer is chosen.
Numbers: our own choice, by eight seeds of demo/run.py. Hardware: one CPU core. Time: 6 to 20 s each.
Raise the dpo lr to 1e-3 to see over-optimisation: reward accuracy 1.0, answers that are no longer sentences.
"""

_root = "runs/tiny"

common = dict(
    seed=0,  # as demo/run.py: these two commands make what it made
    cache_dir=f"{_root}/cache",
    template="tulu",
    max_seq_len=96,
    global_batch_size=32,
    tokens_per_microbatch=2048,
    precision="fp32",
    log_every=10,
)
sft = dict(
    model_path=f"{_root}/base",
    out_dir=f"{_root}/sft",
    data={f"{_root}/data/sft.jsonl": 1.0},
    data_eval=0.1,
    num_epochs=2,
    lr=2e-3,
    warmup_ratio=0.1,
)
dpo = dict(
    model_path=f"{_root}/sft/final",
    out_dir=f"{_root}/dpo",
    data={f"{_root}/data/preferences.jsonl": 1.0},
    data_eval={f"{_root}/data/preferences_eval.jsonl": 1.0},
    num_epochs=1,
    lr=3e-4,
    warmup_ratio=0.1,
    loss="dpo_norm",
    beta=5.0,
)
steer = dict(
    texts=f"{_root}/data/preferences_eval.jsonl",
    inject="matched",
    layers=2,
)
aqi = dict(prompts=f"{_root}/data/aqi.jsonl")
