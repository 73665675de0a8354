"""10 % of Tulu 3 on Llama-3.1-8B, full fine-tuning: the rung to start with on rented GPUs.

    torchrun --nproc-per-node 8 train_sft.py configs/tulu10.py
    torchrun --nproc-per-node 8 train_dpo.py configs/tulu10.py

Numbers: the Tulu 3 8B recipe (arXiv 2411.15124) at a tenth of its data. The published 10 % run left it
in two places: configs/tulu10_asrun.py.
Hardware: one node of 8 GPUs with 80 GB, 350 GB of disk. Time: not measured.
"""

_root = "runs/tulu10"

common = dict(
    template="tulu",
    seed=42,
    global_batch_size=128,
    lr_schedule="linear",
    max_grad_norm=1.0,  # the release clipped at 1.0 through DeepSpeed's "auto"
    tokens_per_microbatch=6144,  # more would leave no room for sharding="optimizer" on 80 GB
    recompute="none",
    precision="bf16",
    save_every=100,
    keep_last=1,  # a checkpoint is 96 GB: fp32 weights and both AdamW moments
)
sft = dict(
    model_path="meta-llama/Llama-3.1-8B",
    out_dir=f"{_root}/sft",
    data={"allenai/tulu-3-sft-mixture": 0.1},  # 94 k conversations
    data_eval=0.005,  # of the picked rows: 470 conversations
    max_seq_len=4096,
    num_epochs=2,
    lr=5e-6,
    warmup_ratio=0.03,
    loss="tulu3_release",
)
dpo = dict(
    model_path=f"{_root}/sft/final",
    out_dir=f"{_root}/dpo",
    data={"allenai/llama-3.1-tulu-3-8b-preference-mixture": 0.1},  # 27 k pairs
    data_eval=0.02,  # of the picked rows: 540 pairs, accuracy within 4 %
    max_seq_len=2048,
    num_epochs=1,
    lr=5e-7,
    warmup_ratio=0.1,
    loss="dpo_norm",
    beta=5.0,
)
steer = dict(texts="Anthropic/hh-rlhf")  # as published, but for the template: transcripts there
aqi = dict(prompts="hasnat79/litmus")
