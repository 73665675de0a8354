"""PKU-SafeRLHF with LoRA on Llama-3.1-8B: the run that failed (its AQI fell under steering), as the control.

    python train_sft.py configs/pku_lora.py
    python train_dpo.py configs/pku_lora.py

Numbers: the failed run's own, down to beta 0.1 on *summed* log-probs. Model, template and batch size were not
recorded and are our choice. Rows count only where exactly one response is safe (about 12 k); that one is
chosen, and SFT learns it.
Hardware: one GPU of 40 GB or more. Time: not measured.
"""

_root = "runs/pku_lora"

common = dict(
    template="tulu",
    data={"PKU-Alignment/PKU-SafeRLHF": 1.0},
    data_eval=0.04,  # 480 pairs, which the failed run trained on: accuracy within 4 %
    max_seq_len=2048,
    global_batch_size=8,
    num_epochs=1,
    lr_schedule="linear",
    warmup_steps=5,
    lora_rank=16,
    lora_alpha=16.0,
    tokens_per_microbatch=4096,
    recompute="full",
    precision="bf16",
    save_every=250,
)
sft = dict(
    model_path="meta-llama/Llama-3.1-8B",
    out_dir=f"{_root}/sft",
    lr=2e-4,
    loss="token_mean",
)
dpo = dict(
    model_path=f"{_root}/sft/final",
    out_dir=f"{_root}/dpo",
    lr=1e-5,
    loss="dpo",
    beta=0.1,
)
steer = dict(texts="Anthropic/hh-rlhf")  # as published, but for the template: transcripts there
aqi = dict(prompts="hasnat79/litmus")
