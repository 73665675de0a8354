"""SFT -> DPO pairs that `steer.py validate NAME` knows: the ladder's and the published comparison's.

The ladder's pairs have the names of their configs, and are there when both training scripts have run.
pku_lora is for the published Llama31_PKU_Custom, tulu10 for the published 10 % run, whose weights are not at
hand. A config as the target (`steer.py validate configs/tulu10.py`) is the same pair with the config's own
template, texts and prompts. template: renders the texts of the vector; None: Human / Assistant transcripts as
they are, as in the published comparison. That names its models but not their checkpoints, except Tulu's and
Zephyr's: the others are our reading.
"""

_RUNGS = ("pku_lora", "tulu10_lora", "tulu10", "tulu_full_lora", "tulu_full")

PAIRS = {
    "tiny": dict(sft="runs/tiny/sft/final", dpo="runs/tiny/dpo/final", template="tulu"),
    "smol": dict(sft="runs/smol/sft/final", dpo="runs/smol/dpo/final", template="chatml"),
    **{
        rung: dict(sft=f"runs/{rung}/sft/final", dpo=f"runs/{rung}/dpo/final", template=None)
        for rung in _RUNGS
    },
    "Llama31_Tulu": dict(
        sft="allenai/Llama-3.1-Tulu-3-8B-SFT",
        dpo="allenai/Llama-3.1-Tulu-3-8B-DPO",
        template=None,
    ),
    "Mistral_7B": dict(
        sft="mistralai/Mistral-7B-v0.1",
        dpo="mistralai/Mistral-7B-Instruct-v0.1",
        template=None,
    ),
    "Zephyr_7B": dict(
        sft="HuggingFaceH4/mistral-7b-sft-beta",
        dpo="HuggingFaceH4/zephyr-7b-beta",
        template=None,
    ),
    "Falcon_7B": dict(sft="tiiuae/falcon-7b", dpo="tiiuae/falcon-7b-instruct", template=None),
    "Llama3_8B": dict(
        sft="meta-llama/Meta-Llama-3-8B",
        dpo="meta-llama/Meta-Llama-3-8B-Instruct",
        template=None,
    ),
    "Qwen2_7B": dict(sft="Qwen/Qwen2-7B", dpo="Qwen/Qwen2-7B-Instruct", template=None),
    "Gemma2_9B": dict(
        not_representable="Gemma 2 caps its logits and alternates window masks: model.py does neither",
    ),
}

# Several pairs under one name, swept on one scale.
GROUPS = {
    "ladder": _RUNGS,
    "published": ("Llama31_Tulu", "Mistral_7B", "Zephyr_7B", "Falcon_7B", "Llama3_8B", "Qwen2_7B"),
}
