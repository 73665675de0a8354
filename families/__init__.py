"""Any model folder as the model it is: model.py's Llama, or one of the files beside this one."""

import functools
import hashlib

import torch

from families.falcon import Falcon, FalconConfig
from families.gemma import Gemma, GemmaConfig
from model import Llama, LlamaConfig, apply_fused
from plumbing import adapters, parallel, weights
from plumbing.device import check_bf16, pick_device
from plumbing.files import UserError, read_config
from plumbing.tokenizer import Tokenizer
from plumbing.weights import check_sizes, check_vocabulary, load_weights, resolve

# the others, each in a file of its own; what is neither here nor in model.py is refused there
_CONFIGS = {"falcon": FalconConfig, "gemma2": GemmaConfig}
_MODELS = {LlamaConfig: Llama, FalconConfig: Falcon, GemmaConfig: Gemma}


def model_config(directory):
    """The config of a model folder, one of _MODELS. UserError for any other model or variant."""
    model_type = read_config(directory).get("model_type")
    return _CONFIGS.get(str(model_type), LlamaConfig).from_hf(directory)


def skeleton(config):
    """The model of a config from model_config, without memory for its weights."""
    with torch.device("meta"):
        return _MODELS[type(config)](config)


# A plan asks for it several times; 32 blocks take 0.1 s.
@functools.cache
def num_parameters(config):
    """How many parameters the model of a config from model_config has."""
    return sum(param.numel() for param in skeleton(config).parameters())


def load_pretrained(path_or_repo, dtype=torch.float32, device="cpu"):
    """(model, Tokenizer) of a model folder or hub name, unsharded.

    UserError when they do not fit.
    """
    directory = resolve(path_or_repo)
    config, tokenizer = model_config(directory), Tokenizer.from_dir(directory)
    check_sizes(config, directory)
    check_vocabulary(config, tokenizer)
    model = skeleton(config).to(dtype)
    parallel.materialize(model, device)
    load_weights(model, directory)
    return model, tokenizer


def locate(path):
    """(model folder, adapter folder or None) of a folder, hub name or PEFT adapter."""
    folder = weights.find_folder(path)
    if weights.has_weights(folder) or not weights.has_adapter(folder):
        return weights.resolve(folder), None  # which refuses what is no one model
    if not (folder / weights.ADAPTER_WEIGHTS).exists():
        raise UserError(f"{folder}: no {weights.ADAPTER_WEIGHTS}{weights.pickle_hint(folder)}")
    key = f"{folder / weights.ADAPTER_CONFIG}: base_model_name_or_path"
    return weights.resolve(adapters.base_of(folder), key), folder


def weights_hash(path):
    """sha256 of what decides the states: contents of weights, config and adapter. Seconds for an 8B model."""
    folder, adapter = locate(path)
    if adapter is None:
        return weights.fingerprint(folder)
    own = b"".join(
        (adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    return f"{weights.fingerprint(folder)}+{hashlib.sha256(own).hexdigest()}"


def load_model(path, is_precise=False):
    """(model, tokenizer), an adapter merged, in bf16 on a GPU and fp32 on a CPU.

    is_precise: in fp32 on a GPU too, where that fits: bf16 loses small differences of two models' states.
    """
    folder, adapter = locate(path)
    device, dtype = pick_device(), dtype_for(model_config(folder), is_precise)
    model, tokenizer = load_pretrained(folder, dtype, device)
    if adapter is not None:
        adapters.merge_adapter(model, adapter)
    has_kernels = device.type == "cpu" or dtype == torch.bfloat16
    if isinstance(model, Llama) and has_kernels:  # the others have plain blocks only
        apply_fused(model)
    return model, tokenizer


def dtype_for(config, is_precise=False):
    """What `load_model` reads a model of this config in.

    A rule of the card's size and not of what is free now: both models of a pair must be read alike.
    """
    device = pick_device()
    if device.type == "cpu":
        return torch.float32
    check_bf16(torch.cuda.get_device_capability(device))
    _, total = torch.cuda.mem_get_info(device)
    return torch.float32 if is_precise and fits_in_fp32(config, total) else torch.bfloat16


def fits_in_fp32(config, room):
    """Whether a model's weights in fp32 take at most half of `room` bytes; the rest is for states."""
    return 8 * num_parameters(config) <= room


def device_of(model):
    """Where the model is."""
    return model.lm_head.weight.device
