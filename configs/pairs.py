"""SFT -> DPO pairs that `steer.py validate NAME` knows: the ladder's and the published comparison's.

The ladder's pairs have the names of their configs, and are there when both training scripts have run.
pku_lora is for the published Llama31_PKU_Custom, tulu10 for the published 10 % run, whose weights are not at
hand. A config as the target (`steer.py validate configs/tulu10.py`) is the same pair with the config's own
template, texts and prompts. template: renders the texts of the vector; None: Human / Assistant transcripts as
they are, as in the published comparison. That names its models but not their checkpoints, except Tulu's and
Zephyr's: the others are our reading.
"""

_RUNGS = (
    "olmo1b_10", "olmo1b_lora", "olmo1b", "pku_lora", "tulu10_lora", "tulu10", "tulu10_asrun",
    "tulu_full_lora", "tulu_full",
)  # fmt: skip

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
    "Gemma2_9B": dict(sft="google/gemma-2-9b", dpo="google/gemma-2-9b-it", template=None),
}

# True pairs of the public hub: the DPO model was trained from the SFT model. `made` is how, `source` who says
# so; "not checked" marks names taken from a list, not from a card or a script. Template None: as they are.
_SIMPO = "github.com/princeton-nlp/SimPO README, list of released models"
_INSTRUCT = "github.com/allenai/open-instruct"
_TULU3 = f"{_INSTRUCT} docs/tulu3.md"
_LOSSES = {"DPO": "DPO", "IPO": "IPO", "KTO": "KTO", "CPO": "CPO", "RDPO": "R-DPO", "SimPO": "SimPO"}
# the heads of their main branches, as eight public repositories name them; `--check` resolves them
_1B_SFT = "allenai/OLMo-2-0425-1B-SFT@0d85a3d037876ce6ac7d4311d994400fc66ac27f"
_1B_DPO = "allenai/OLMo-2-0425-1B-DPO@c4b0485961ab24c2433b090f3b922f0913a9290f"


def _row(sft, dpo, made, source, template=None):
    return dict(sft=sft, dpo=dpo, template=template, made=made, source=source)


PAIRS |= {
    "Tulu2_7B": _row(
        "allenai/tulu-2-7b", "allenai/tulu-2-dpo-7b", "DPO on UltraFeedback, Zephyr's recipe",
        "card of tulu-2-dpo-70b; the name of the SFT model not checked", "tulu",
    ),
    "Tulu2_13B": _row(
        "allenai/tulu-2-13b", "allenai/tulu-2-dpo-13b", "DPO on UltraFeedback, Zephyr's recipe",
        "card of tulu-2-dpo-70b; the name of the SFT model not checked", "tulu",
    ),
    "Tulu2_70B": _row(
        "allenai/tulu-2-70b", "allenai/tulu-2-dpo-70b", "DPO on UltraFeedback, Zephyr's recipe",
        "card of tulu-2-dpo-70b; the name of the SFT model not checked", "tulu",
    ),
    "Tulu3_70B": _row(
        "allenai/Llama-3.1-Tulu-3-70B-SFT", "allenai/Llama-3.1-Tulu-3-70B-DPO", "dpo_norm, beta 5, lr 2e-7",
        _TULU3, "tulu",
    ),
    "Tulu3_405B": _row(
        "allenai/Llama-3.1-Tulu-3-405B-SFT", "allenai/Llama-3.1-Tulu-3-405B-DPO",
        "dpo_norm, beta 5, lr 2e-7", _TULU3, "tulu",
    ),
    "ZephyrFull_7B": _row(
        "alignment-handbook/zephyr-7b-sft-full", "alignment-handbook/zephyr-7b-dpo-full",
        "DPO on UltraFeedback",
        "tags of zephyr-7b-dpo-full's card; that it starts from zephyr-7b-sft-full not checked",
    ),
    "Llama31_PKU_Custom": _row(
        "anonymousML123/llama3-8b-pku-SFT-NoInstruct-Baseline-NoInstruct",
        "anonymousML123/llama3-8b-pku-DPO-NoInstruct-SFT-NoInstruct",
        "the published comparison's own PKU pair", "names given with the comparison; not checked",
    ),
    "Llama31_Tulu10pct": _row(
        "anonymousML123/Llama-3.1-8B-Tulu10pct-SFT-MAHALS",
        "anonymousML123/Llama-3.1-8B-Tulu10pct-DPO-MAHALS",
        "the published comparison's own 10 % pair", "names given with the comparison; not checked",
    ),
    "OLMo2_1B": _row(
        _1B_SFT, _1B_DPO, "dpo_norm, beta 5, lr 2.5e-6, 1 epoch",
        f"{_INSTRUCT} docs/olmo2.md", "tulu_bos",
    ),
    "OLMo2_7B": _row(
        "allenai/OLMo-2-1124-7B-SFT", "allenai/OLMo-2-1124-7B-DPO", "dpo_norm, beta 5, lr 1e-6, 1 epoch",
        f"{_INSTRUCT} scripts/train/olmo2/dpo_7b.sh", "tulu_bos",
    ),
    "OLMo2_13B": _row(
        "allenai/OLMo-2-1124-13B-SFT", "allenai/OLMo-2-1124-13B-DPO", "dpo_norm, beta 5, lr 8e-7, 1 epoch",
        f"{_INSTRUCT} scripts/train/olmo2/dpo_13b.sh", "tulu_bos",
    ),
    "OLMo2_32B": _row(
        "allenai/OLMo-2-0325-32B-SFT", "allenai/OLMo-2-0325-32B-DPO", "DPO",
        "card of OLMo-2-0325-32B-Instruct; the SFT model's name and the numbers not checked", "tulu_bos",
    ),
    "Llama3_ORPO": _row(
        "princeton-nlp/Llama-3-Base-8B-SFT", "princeton-nlp/Llama-3-Base-8B-SFT-ORPO",
        "ORPO on UltraFeedback", f"{_SIMPO}; that it starts from the SFT model not checked",
    ),
    # Controls, of models that are trained here (docs/your_own_pair.md): two seeds of one SFT are no
    # preference; swapped labels are the opposite one. A model with itself has no vector, and extract says so.
    "tiny_seeds": _row(
        "runs/tiny/sft/final", "runs/tiny/sft_seed1/final", "SFT with another seed, no DPO", "made here",
        "tulu",
    ),
    "tiny_swapped": _row(
        "runs/tiny/sft/final", "runs/tiny/dpo_swapped/final", "dpo_norm, chosen and rejected exchanged",
        "made here", "tulu",
    ),
}  # fmt: skip
# Of one SFT model, and but for the seeds of one set of pairs in one order: demo/objectives.py makes them.
_OBJECTIVES = {
    "dpo_norm": "dpo_norm, beta 5",
    "dpo": "dpo, beta 0.1",
    "ipo": "ipo, beta 0.1",
    "simpo": "simpo, beta 2, gamma 1",
    "smoothed": "dpo_norm, label smoothing 0.1",
    "last_turn": "dpo_norm, last turns only",
    "swapped": "dpo_norm, chosen and rejected exchanged",
    "dpo_seed": "dpo_norm, another seed",
    "sft_seed": "SFT with another seed, no DPO",
}
for _name, _made in _OBJECTIVES.items():
    PAIRS[f"smol_{_name}"] = _row(
        "runs/smol/sft/final", f"runs/smol/objectives/{_name}/final", _made, "made here", "chatml"
    )
for _loss, _made in _LOSSES.items():
    PAIRS[f"Llama3_{_loss}"] = _row(
        "princeton-nlp/Llama-3-Base-8B-SFT",
        f"princeton-nlp/Llama-3-Base-8B-SFT-{_loss}",
        f"{_made} on UltraFeedback",
        _SIMPO,
    )
    PAIRS[f"Mistral_{_loss}"] = _row(
        "alignment-handbook/zephyr-7b-sft-full",
        f"princeton-nlp/Mistral-7B-Base-SFT-{_loss}",
        f"{_made} on UltraFeedback",
        _SIMPO,
    )
for _kind in ("7B_Instruct", "7B_Think", "32B_Think"):
    PAIRS[f"OLMo3_{_kind}"] = dict(
        not_representable="OLMo 3 stretches the rotation (yarn) of some layers only: model.py does not"
    )

# Not all of "published" are SFT -> DPO: only Llama31_Tulu and Zephyr_7B are; the others are a base model and
# its instruct model, of unlike recipes.
# Several pairs under one name, swept on one scale.
GROUPS = {
    "ladder": _RUNGS,
    "published": (
        "Llama31_Tulu", "Mistral_7B", "Zephyr_7B", "Falcon_7B", "Llama3_8B", "Qwen2_7B", "Gemma2_9B",
    ),
    "own": ("Llama31_PKU_Custom", "Llama31_Tulu10pct"),
    "tulu2": ("Tulu2_7B", "Tulu2_13B", "Tulu2_70B"),
    "tulu3": ("Llama31_Tulu", "Tulu3_70B", "Tulu3_405B"),
    "zephyr": ("Zephyr_7B", "ZephyrFull_7B"),
    "olmo2": ("OLMo2_1B", "OLMo2_7B", "OLMo2_13B", "OLMo2_32B"),
    "controls": ("tiny", "tiny_seeds", "tiny_swapped"),
    "llama3_losses": (*[f"Llama3_{loss}" for loss in _LOSSES], "Llama3_ORPO"),
    "mistral_losses": tuple(f"Mistral_{loss}" for loss in _LOSSES),
}
