"""OLMo-2-0425-1B's published recipe with LoRA: for one GPU of 24 GB.

    python train_sft.py configs/olmo1b_lora.py
    python train_dpo.py configs/olmo1b_lora.py

Numbers: data, batches, epochs and loss as configs/olmo1b.py. Rank, alpha and rates are our own choice, not
tuned, as in configs/tulu10_lora.py. DPO's reference is the merged SFT model.
Hardware: one GPU of 24 GB. Time: not measured here.
"""

_root = "runs/olmo1b_lora"

common = dict(
    template="tulu_bos",  # open-instruct's tulu with --add_bos
    global_batch_size=128,  # SFT 2 x 8 accumulated x 8 GPUs, DPO 8 x 2 x 8
    lr_schedule="linear",
    lora_rank=64,
    lora_alpha=128.0,
    tokens_per_microbatch=4096,
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
    lr=3e-4,
    warmup_ratio=0.03,
    loss="tulu3_release",
)
dpo = dict(
    model_path=f"{_root}/sft/final",
    out_dir=f"{_root}/dpo",
    data={"allenai/olmo-2-0425-1b-preference-mix": 1.0},
    data_eval=0.0013,  # of the picked rows: 490 pairs if it has as many as the 7B's
    seed=111,
    max_seq_len=2048,
    lr=2.5e-5,
    warmup_ratio=0.1,
    beta=5.0,  # and loss="dpo_norm", num_epochs=1, max_grad_norm=1.0: the defaults
)
