"""All of Tulu 3's SFT and preference data on Llama-3.1-8B with LoRA: for one 48 GB A40 or one 40 GB A100.

    python train_sft.py configs/tulu_full_lora.py
    python train_dpo.py configs/tulu_full_lora.py

Numbers: data, batches, epochs and loss as configs/tulu_full.py. Rank, alpha and rates are our own choice, not
tuned: adapters take some 10-20 times the rate of full fine-tuning. DPO's reference is the merged SFT model.
Hardware: one GPU of 40 GB or more. Time: not measured.
"""

_root = "runs/tulu_full_lora"

common = dict(
    template="tulu",
    seed=42,
    global_batch_size=128,
    lr_schedule="linear",
    max_grad_norm=1.0,
    lora_rank=64,
    lora_alpha=128.0,  # adapters are scaled by alpha / rank = 2
    tokens_per_microbatch=4096,  # one longest document, or one longest pair
    recompute="none",  # 32 GiB at the peak; "full" takes 21 and 1.3 times as long
    precision="bf16",
    save_every=250,
)
sft = dict(
    model_path="meta-llama/Llama-3.1-8B",
    out_dir=f"{_root}/sft",
    data={"allenai/tulu-3-sft-mixture": 1.0},  # 939 k conversations
    data_eval=0.0005,  # of the picked rows: 470 conversations
    max_seq_len=4096,
    num_epochs=2,
    lr=1e-4,
    warmup_ratio=0.03,
    loss="tulu3_release",
)
dpo = dict(
    model_path=f"{_root}/sft/final",
    out_dir=f"{_root}/dpo",
    data={"allenai/llama-3.1-tulu-3-8b-preference-mixture": 1.0},  # 270 k pairs
    data_eval=0.002,  # of the picked rows: 540 pairs, accuracy within 4 %
    max_seq_len=2048,
    num_epochs=1,
    lr=5e-6,
    warmup_ratio=0.1,
    loss="dpo_norm",
    beta=5.0,
)
steer = dict(texts="Anthropic/hh-rlhf")  # as published, but for the template: transcripts there
aqi = dict(prompts="hasnat79/litmus")
