"""open-instruct's training YAML, for tools/from_open_instruct.py.

How it is read, what each key is called here or why it has no name here.

The facts hold for its commit e6c3044aa (2026-08-20); a date and a commit say since when a value has been what
it is.
"""

from pathlib import Path

from plumbing.files import UserError

DPO_ONLY = {
    f"{prefix}{key}"
    for key in ("loss_type", "beta", "label_smoothing", "gamma_beta_ratio")
    for prefix in ("", "dpo_")
}
DPO_ONLY |= {"num_epochs", "concatenated_forward"}

# What open-instruct takes when the YAML is silent. Defaults that changed over time are in DATED.
DEFAULTS = {
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "output_dir": "output/",
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
}
DEFAULTS_SFT = {"warmup_ratio": 0.03, "num_train_epochs": 2}
# {key of DPO: (day, commit, default before that day, default since)}
DATED = {
    "loss_type": ("2026-03-20", "7917d4173", "dpo", "dpo_norm"),
    "beta": ("2026-03-20", "7917d4173", 0.1, 5.0),
    "num_epochs": ("2026-03-20", "7917d4173", 2, 1),
    "warmup_ratio": ("2026-03-20", "7917d4173", 0.03, 0.1),
}
# {behaviour without a key: [(day, commit, what it is since)]}, the first without a day
CHANGED = {
    "rows": [
        ("", "", "shuffle"), ("2025-01-28", "45fd51f99", "first"), ("2025-07-21", "de8a14f3f", "choice"),
    ],  # fmt: skip
    "supervise": [("", "", "all"), ("2025-06-26", "8699c789b", "last")],
    "template": [("", "", "tulu"), ("2025-09-24", "d880e8610", None)],
    "one": [("", "", 1.0), ("2025-01-28", "45fd51f99", 1)],
}

NO_EQUIVALENT = {
    "no tracker is called; metrics.jsonl holds every step, tensorboard=True writes event files": "report_to "
    "with_tracking wandb_project "
    "wandb_project_name wandb_entity "
    "wandb_group_name exp_name run_name do_not_randomize_output_dir verbose",
    "no key of a config: --push=org/name uploads a run; nothing is launched or announced": "push_to_hub "
    "hf_entity hf_repo_id hf_repo_revision "
    "hf_repo_url save_to_hub "
    "hf_metadata_dataset try_launch_beaker_eval_jobs try_auto_save_to_beaker gs_bucket_path oe_eval_tasks "
    "oe_eval_max_length "
    "oe_eval_gpu_multiplier eval_workspace eval_priority send_slack_alerts",
    "tokenised data are cached by content": "preprocessing_num_workers overwrite_cache dataset_mix_dir "
    "dataset_cache_mode cache_mode "
    "dataset_local_cache_dir local_cache_dir dataset_config_hash config_hash dataset_skip_cache skip_cache "
    "cache_dataset_only "
    "dataset_target_columns target_columns",
    "the tokenizer is always the fast one": "use_slow_tokenizer use_fast",
    "speed and memory only; here precision, recompute, sharding and tokens_per_microbatch": "use_flash_attn "
    "low_cpu_mem_usage attn_implementation "
    "use_liger_kernel fused_optimizer sync_each_batch packing concatenated_forward zero_stage "
    "offload_optimizer offload_param "
    "zero_hpz_partition_size fsdp_shard_degree fsdp_num_replicas dpo_use_paged_optimizer "
    "loss_implementation activation_checkpointing_mode "
    "activation_checkpointing_modules timeout profiling",
    "the same command goes on from the last checkpoint; --fresh starts over": "resume_from_checkpoint "
    "overwrite_output_dir "
    "clean_checkpoints_at_end ephemeral_save_interval",
    "acts only with load_balancing_loss, which is refused": "load_balancing_weight",
}
WHY_NOT = {key: why for why, keys in NO_EQUIVALENT.items() for key in keys.split()}

# {key: (values that change nothing, what it would mean)}; null is always one of them.
ONLY_NEUTRAL = {
    "config_name": ((), "the config comes from model_path"),
    "additional_model_arguments": (({}, "{}"), "the model is what its config.json says"),
    "rope_scaling_factor": ((), "the model is what its config.json says"),
    "trust_remote_code": ((False,), "no code is taken from a hub"),
    "dataset_config_name": ((), "expected it in the data set's name, as org/name[config/split]"),
    "max_train_samples": (
        (),
        "state a row count in the data mixture (SFT ignores this key since 2025-01-28)",
    ),
    "use_qlora": ((False,), "no quantisation here"),
    "use_8bit_optimizer": ((False,), "AdamW's state is fp32 here, or bf16 with moments='bf16'"),
    "optimizer_type": (("adamw",), "AdamW only"),
    "optimizer_kwargs": (({}, "{}"), "AdamW only, betas 0.9, 0.999"),
    "load_balancing_loss": ((False,), "no mixture-of-experts model here"),
    "final_lr_ratio": ((0,), "the rate decays to 0 here"),
    "data_loader_seed": ((), "one seed here"),
    "cache_logprobs_only": ((False,), "no such mode here"),
    "tensor_parallel_degree": (
        (1,),
        "it changes how many processes share a batch; state the equivalent run without it",
    ),
    "context_parallel_degree": (
        (1,),
        "it changes how many processes share a batch; state the equivalent run without it",
    ),
}
# Text by definition, also where it reads as a number; so are the amounts of a mixer list.
TEXT = {"checkpointing_steps", "model_revision", "tokenizer_revision"}
TRANSFORMS = {"sft_tulu_tokenize_and_truncate_v1": "all", "last_turn_tulu_tokenize_and_truncate_v1": "last",
              "preference_tulu_tokenize_and_truncate_v1": "all"}  # fmt: skip
FILTERS = {"sft_tulu_filter_v1", "preference_tulu_filter_v1"}

# Implicit values and ambiguities, each said where it applies.
NOTES = {
    "dated": "{} is not in the YAML: open-instruct's default on {}, {!r} ({!r} {} {}, {})",
    "behaviour": "{}: {!r}, as open-instruct did on {}{}",
    "one": "1 meant all rows before 2025-01-28 (45fd51f99) and means one row since; expected 1.0, or a "
    "count above 1",
    "template": "chat_template_name is not in the YAML: taken as tulu, the default before 2025-09-24 "
    "(d880e8610). Since then it is the "
    "tokenizer's own; here template=None says that",
    "zephyr": "chat_template_name=zephyr: open-instruct also trains the newline after every answer; here "
    "an answer ends with its EOS",
    "weights": "open-instruct loads the weights as bf16 and leaves fp32 copies to DeepSpeed; here "
    "what AdamW updates is fp32 and compute is bf16",
    "dropout": "lora_dropout={}: no dropout here, so that log-probs can be compared",
    "rows": "data: a share or count picks the rows that open-instruct picks since 2025-07-21 (de8a14f3f). "
    "From 2025-01-28 (45fd51f99) "
    "it took the first ones, here rows='first'; before, the first ones of a shuffle, here rows='shuffle'",
    "turns": "supervise: all assistant turns, as for the released Tulu 3 models. Since 2025-06-26 "
    "(8699c789b) open-instruct's DPO takes "
    "only the last one, under the same transform name; here supervise='last' says that",
    "order": "the order of the rows: another shuffle, so the losses of single steps are of other rows",
    "batch": "global_batch_size = {} per device * {} accumulation * {} processes",
    "steps": "num_epochs: {}, as many as max_steps, so that max_steps decides whatever the data: "
    "open-instruct's max_train_steps overrides its epochs{}",
    "warmup": "warm-up: int(steps * ratio) steps here. In open-instruct the schedule counts processes, "
    "int(processes * steps * ratio) / "
    "processes steps: up to one step longer",
    "mean": "loss: here every supervised token of the step weighs the same; open-instruct averages the "
    "means of its micro-batches. The "
    "released Tulu 3 models took sums (reduce_loss: sum, removed 2025-09-19 in bb98dbcac); here "
    "loss='tulu3_release' says that",
    "sum": "loss: open-instruct divides the step's sum by its micro-batches, here by its sequences: {} "
    "times smaller here",
    "wpo": "wpo: open-instruct weights a pair by the exponential of its summed log-probs, here of their "
    "means, as in the paper (eq. 4)",
    "clip": "max_grad_norm: no clipping in the YAML, but open-instruct's DeepSpeed configs say "
    "gradient_clipping 'auto': accelerate "
    "sets 1.0",
}


def read_yaml(path):
    """{key: value} of the file.

    ValueError for a key that occurs twice (YAML would keep the last one) and for a file that is no mapping.
    """
    import yaml  # comes with datasets and huggingface_hub

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value]
            if twice := sorted({str(name) for name in names if names.count(name) > 1}):
                raise UserError(f"{', '.join(twice)}: given twice; expected once (YAML would keep the last)")
            return super().construct_mapping(node, deep)

    try:
        given = yaml.load(Path(path).read_text(), Loader)
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {error}") from error
    if not isinstance(given, dict):
        raise UserError(f"a {type(given).__name__}; expected a mapping of keys to values")
    return given


def unparsed(key, value):
    """Yield what is wrong with every string that was meant to be something else."""
    if isinstance(value, list | dict):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from unparsed(f"{key}[{name!r}]", item)
    if not isinstance(value, str):
        return
    if value.strip().lower() in ("none", "null"):
        yield f"{key}: the string {value!r} is not null; expected null, or no such line"
    elif value.strip().lower() in ("true", "false"):
        yield f"{key}: the string {value!r} is no bool; expected it without quotes"
    elif "mixer_list" not in key and key not in TEXT and is_number(value):
        number = f"{float(value):.1e}"
        yield f"{key}: {value!r} is a string in YAML 1.1; expected a number with a point, like {number}"


def is_number(text):
    """Whether a string could be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def stage_of(given):
    """The stage that the YAML's keys belong to. ValueError when they do not say it."""
    if DPO_ONLY & given.keys():
        return "dpo"
    if "num_train_epochs" not in given:
        raise UserError("the keys do not say which stage this is: expected --stage sft or --stage dpo")
    return "sft"
