"""OLMo-2-0425-1B by its published recipe: a true pair beside published checkpoints of both stages.

    torchrun --nproc-per-node 8 train_sft.py configs/olmo1b.py
    torchrun --nproc-per-node 8 train_dpo.py configs/olmo1b.py
    python -m tools.compare runs/olmo1b/sft/final allenai/OLMo-2-0425-1B-SFT --texts=TEXTS

Numbers: allenai/open-instruct docs/olmo2.md, "1B", as added in 89b4f62a5 (2025-06-03). b5dd5621d (2026-04-14)
corrects two tokenizer names there. DPO supervises all turns: the last alone only since 2025-06-26. Not
checked, for want of the hub: the rows of the preference mix, the tokenizer's files.
Hardware: one GPU of 48 GB or more, 70 GB of disk. Time: not measured here; theirs 9 + 2 hours on 8 H100s.
"""

_root = "runs/olmo1b"

common = dict(
    template="tulu_bos",  # open-instruct's tulu with --add_bos
    global_batch_size=128,  # SFT 2 x 8 accumulated x 8 GPUs, DPO 8 x 2 x 8
    lr_schedule="linear",
    tokens_per_microbatch=8192,
    precision="bf16",
    save_every=500,
    keep_last=1,
)
sft = dict(
    model_path="allenai/OLMo-2-0425-1B",
    out_dir=f"{_root}/sft",
    data={"allenai/tulu-3-sft-olmo-2-mixture-0225": 1.0},  # 866 k conversations
    data_eval=0.0005,  # of the picked rows: 430 conversations
    seed=1,
    max_seq_len=4096,
    num_epochs=2,
    lr=3e-5,
    warmup_ratio=0.03,
    loss="tulu3_release",  # --reduce_loss sum, over micro-batches of two: twice this loss, clipped at 1.0
    max_grad_norm=0.5,
)
dpo = dict(
    model_path=f"{_root}/sft/final",
    out_dir=f"{_root}/dpo",
    data={"allenai/olmo-2-0425-1b-preference-mix": 1.0},
    data_eval=0.0013,  # of the picked rows: 490 pairs if it has as many as the 7B's
    seed=111,
    max_seq_len=2048,
    lr=2.5e-6,
    warmup_ratio=0.1,
    beta=5.0,  # and loss="dpo_norm", num_epochs=1, max_grad_norm=1.0: the defaults
)
