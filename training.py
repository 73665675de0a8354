"""What both training scripts do with the model around their loop: load, sample, save."""

import dataclasses
import math
from pathlib import Path

import torch

from data import TEMPLATES, end_of_turn, resolve_template
from model import Llama, LlamaConfig, apply_fused, apply_lora, apply_recompute, generate, init_lora
from optim import keep_masters
from plumbing import hub, parallel
from plumbing.files import UserError, read_json, write_json
from plumbing.tensors import open_safetensors
from plumbing.weights import check_vocabulary, fingerprint, load_weights, save_adapter, save_pretrained, weight_files
from reports import card

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # fp8: float8 lives inside the blocks' matmuls only
SAMPLE_PROMPTS, SAMPLE_TOKENS = 4, 64


def read_model_config(config, directory, tokenizer, device):
    """The LlamaConfig of a Hugging Face folder; no weight is read, so that what cannot be trained is found before the data are tokenised.

    ValueError when tokenizer and model do not fit together, a weight file is missing or cut short, or the model cannot read documents of
    max_seq_len or multiply in float8.
    """
    model_config = LlamaConfig.from_hf(directory)
    check_vocabulary(model_config, tokenizer)
    for path in weight_files(Path(directory)):
        open_safetensors(path)  # its header and its size
    for key in ("sliding_window", "max_position_embeddings"):
        limit = getattr(model_config, key)
        if limit and config.max_seq_len > limit:
            raise UserError(f"max_seq_len={config.max_seq_len}: expected at most the model's {key}={limit}")
    if config.precision == "fp8":
        check_float8(model_config, device)
    return model_config


def load_model(config, directory, model_config, device):
    """The model of a Hugging Face folder, ready to train: LoRA, kernels, recompute, sharding, in this order; then weights are streamed in.

    Nothing is allocated before it is sharded. Parameters are float32: sharded over several processes; on one process, unless it computes
    in fp32, as split masters. Under LoRA the frozen weights are kept in the compute precision.
    model_config: what read_shape found. ValueError when the folder's weights do not fit it.
    """
    with torch.device("meta"):
        model = Llama(model_config)
        if config.lora_rank or parallel.world_size() == 1:
            model.to(DTYPES[config.precision])
        if config.lora_rank:
            apply_lora(model, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
    model.attention_kernel = config.attention
    if config.kernels == "fused":
        apply_fused(model, fp8=config.precision == "fp8")
    apply_recompute(model, config.recompute)
    if parallel.world_size() > 1:
        parallel.shard(model, config.precision)
    parallel.materialize(model, device)
    if next(model.parameters()).dtype == torch.bfloat16 and not config.lora_rank:
        keep_masters(model, DTYPES[config.gradients])
    load_weights(model, directory)
    init_lora(model, config.seed, parallel.assign)
    return model


def check_float8(model_config, device):
    """ValueError where precision="fp8" cannot run: its matmuls need sizes that are multiples of 16 and, on a GPU, an Ada or Hopper card."""
    heads = model_config.num_attention_heads, model_config.num_key_value_heads
    sizes = (model_config.hidden_size, model_config.intermediate_size, *(n * model_config.head_dim for n in heads))
    if any(size % 16 for size in sizes):
        raise UserError(f"precision='fp8': expected linears whose sizes are multiples of 16, the model has {sizes}")
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise UserError(f"precision='fp8': expected a GPU of compute capability 8.9 (Ada, Hopper) or newer, got {capability}")


def sample(model, documents, tokenizer, config):
    """(prompts, answers): the first SAMPLE_PROMPTS different prompts of `documents` and what the model answers greedily, as texts.

    Under a sliding window the prompts are taken from those that leave room for SAMPLE_TOKENS in it, and may be fewer, or none.
    A prompt is what stands before a document's first trained token; an answer ends before the end-of-turn token, or after SAMPLE_TOKENS.
    Every rank calls this and does the same work, because every forward gathers the blocks from all ranks: SAMPLE_TOKENS forwards, not
    fewer when all answers have ended, so that a rank which rounds differently cannot leave the others waiting.
    """
    stop, prompts = _stop_id(config, tokenizer), {}
    longest = (model.config.sliding_window or math.inf) - SAMPLE_TOKENS
    for ids, mask in (documents[i] for i in range(len(documents))):
        if len(prompt := tuple(ids[: mask.argmax()].tolist())) <= longest:
            prompts[prompt] = None
        if len(prompts) == SAMPLE_PROMPTS:
            break
    if not prompts:
        return [], []
    parallel.gather(model)
    answers = generate(model, list(prompts), SAMPLE_TOKENS)
    parallel.release(model)
    answers = [ids[: ids.index(stop)] if stop in ids else ids for ids in answers]
    return [tokenizer.decode(ids) for ids in prompts], [tokenizer.decode(ids) for ids in answers]


def save_model(model, tokenizer, config):
    """Write out_dir/final, a Hugging Face folder in the compute precision with adapters merged, and out_dir/adapter under LoRA.

    Returns the folder `final`."""
    final = Path(config.out_dir) / "final"
    # generation must stop at the token that was trained, also on a base model
    model.config = dataclasses.replace(model.config, eos_token_id=_stop_id(config, tokenizer))
    template = TEMPLATES[resolve_template(config.template, tokenizer)]
    save_pretrained(model, tokenizer, final, dtype=DTYPES[config.precision], chat_template=template)
    if config.lora_rank:
        save_adapter(model, Path(config.out_dir) / "adapter", config.model_path)
    return final


def finish(model, tokenizer, config, world):
    """Export the model, record the hash of its weights in the manifest, write the model card, push where asked to."""
    final = save_model(model, tokenizer, config)
    world.say(f"wrote {final}")
    if world.main:
        manifest = Path(config.out_dir) / "manifest.json"
        # what was trained from this model, or steered along it, names this hash: reports/ladder.py joins them
        write_json(manifest, read_json(manifest) | {"exported": fingerprint(final)})
        card.write(config.out_dir)
        if config.push:
            hub.push(config.out_dir, config.push)
            world.say(f"pushed to {config.push}")


def _stop_id(config, tokenizer):
    return tokenizer.single_id(end_of_turn(resolve_template(config.template, tokenizer), tokenizer))
