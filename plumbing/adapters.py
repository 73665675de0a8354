"""LoRA adapters in PEFT's format: those of our runs written, anybody's merged into a model.

An adapter is read as what it does to the weights: W + scale B A for its targets, another W for the modules
that were trained whole. That needs no LoRA layer, so it covers embeddings, lm_head, single layers and ranks
that differ, and its oracle is PEFT's own merge.
"""

import math
import re
from pathlib import Path

import torch
from torch import nn

from plumbing import hub, kinds
from plumbing.files import UserError, read_json, verify_hashes, write_hashes, write_json
from plumbing.weights import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_fit,
    gather,
    is_adapter,
    published,
    rank,
    sharded_parameters,
    tensor_slices,
    write_gathered,
)

PREFIX = "base_model.model."  # of every name in PEFT's files

# ---------------------------------------------------------------- writing


@torch.no_grad()
def save_adapter(model, directory, base):
    """Write the LoRA adapters as PEFT does.

    adapter_model.safetensors, adapter_config.json; base: the base model's path or hub name. Collective,
    replaces and refuses as weights.save_pretrained does.
    """
    name = None if Path(base).is_dir() else hub.parse(base)
    origin, revision = name or (str(base), None)
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    source = {"base_model_name_or_path": origin, "revision": revision}
    params = {}
    for name, param in sharded_parameters(model).items():
        if is_adapter(name):
            params[f"{PREFIX}{name}.weight"] = param
    assert params, "save_adapter needs a model with adapters"
    specs = {name: (param.dtype, param.shape) for name, param in params.items()}
    with published(Path(directory), ADAPTER_CONFIG) as folder:
        digest = write_gathered(folder / ADAPTER_WEIGHTS, specs, lambda name: gather(params[name]))
        if rank() == 0:
            write_json(folder / ADAPTER_CONFIG, fixed | source | _settings_of(model))
            write_hashes(folder, known={ADAPTER_WEIGHTS: digest})


def _settings_of(model):
    """adapter_config.json's keys that describe the model's LoRA layers, which apply_lora made alike."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    layer = next(iter(layers.values()))
    alpha = int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha
    targets = sorted({name.rpartition(".")[2] for name in layers})
    return {
        "r": layer.lora_A.shape[0],
        "lora_alpha": alpha,
        "lora_dropout": layer.dropout,
        "target_modules": targets,
    }


# ---------------------------------------------------------------- reading adapter_config.json

NAMES = kinds.TEXT | kinds.list_of(kinds.TEXT)
# the keys that decide what an adapter does
_KINDS = {
    "base_model_name_or_path": kinds.TEXT | kinds.NULL,
    "revision": kinds.TEXT | kinds.NULL,
    "peft_type": kinds.TEXT,
    "r": kinds.SIZE,
    "lora_alpha": kinds.NUMBER,
    "use_rslora": kinds.SWITCH | kinds.NULL,
    "target_modules": NAMES,
    "exclude_modules": NAMES | kinds.NULL,
    "modules_to_save": kinds.list_of(kinds.TEXT) | kinds.NULL,
    "layers_to_transform": kinds.LAYER | kinds.list_of(kinds.LAYER) | kinds.NULL,
    "rank_pattern": kinds.map_to(kinds.SIZE) | kinds.NULL,
    "alpha_pattern": kinds.map_to(kinds.NUMBER) | kinds.NULL,
}
# keys with one value that can be merged
_FIXED = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False}
# Initialisations that leave the base's weights as they are; others (PiSSA, OLoRA, ..) subtract the adapter
# from them
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# keys that do not change what a finished adapter does: about training, the initialisation, the file
_WITHOUT_EFFECT = (
    "lora_dropout", "inference_mode", "task_type", "auto_mapping", "peft_version", "megatron_core",
    "runtime_config", "qalora_group_size", "ensure_weight_tying", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
)  # fmt: skip


def read_adapter_config(directory):
    """adapter_config.json of a PEFT adapter's folder, as a dict.

    UserError for what is no change of weights (DoRA, prompts, repeated layers), for keys that are not known
    here, and for an initialisation that changed the base's weights.
    """
    path = Path(directory) / ADAPTER_CONFIG
    verify_hashes(path.parent)
    raw = read_json(path)
    problems = []
    for key, expected in _FIXED.items():
        if raw.get(key, expected) != expected:
            problems.append(f"{key}={raw[key]!r}, expected {expected!r}")
    init = raw.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        reason = "made for a base with other weights; expected it converted to a plain LoRA (see peft)"
        problems.append(f"init_lora_weights={init!r}: {reason}")
    known = {*_KINDS, *_FIXED, *_WITHOUT_EFFECT, "init_lora_weights"}
    for key in raw:
        if key not in known and raw[key]:
            problems.append(f"{key}={raw[key]!r}, expected it off: it is not implemented here")
    problems += [f"{key}: missing" for key in ("r", "lora_alpha", "target_modules") if key not in raw]
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    kinds.check(path, raw, _KINDS)
    _check_patterns(path, raw)
    return raw


def _check_patterns(path, raw):
    """UserError for a text that is no regular expression."""
    patterns = [*(raw.get("rank_pattern") or ()), *(raw.get("alpha_pattern") or ())]
    patterns += raw.get("modules_to_save") or []
    for key in ("target_modules", "exclude_modules"):
        if isinstance(raw.get(key), str):
            patterns.append(raw[key])
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}: {pattern!r}: expected a regular expression: {error}") from error


def base_of(directory):
    """Path or hub name, with its revision, of the model that the adapter was trained on."""
    raw = read_adapter_config(directory)
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not base:
        path = Path(directory) / ADAPTER_CONFIG
        raise UserError(f"{path}: base_model_name_or_path={base!r}: expected the model it was trained on")
    is_pinned = revision and not Path(base).expanduser().is_dir()
    return f"{base}@{revision}" if is_pinned else base


# ---------------------------------------------------------------- merging


@torch.no_grad()
def merge_adapter(model, directory):
    """Change the weights of an unsharded model as a PEFT LoRA adapter says.

    W + scale B A in float32, rounded once. UserError as read_adapter_config, and when the adapter's tensors
    are not those of its config and the model.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    stored = tensor_slices(directory / ADAPTER_WEIGHTS)
    targets = _targets(model, config, directory / ADAPTER_CONFIG)
    whole = _trained_whole(model, config, directory / ADAPTER_CONFIG)
    shapes = {f"{PREFIX}{name}": tuple(param.shape) for name, param in whole.items()}
    for name, module in targets.items():
        shapes |= _lora_shapes(name, module, _setting(config, "r", "rank_pattern", name))
        # PEFT also saves the weight of the base where an embedding or lm_head is a target
        if f"{PREFIX}{name}.base_layer.weight" in stored:
            whole[f"{name}.base_layer.weight"] = module.weight
            shapes[f"{PREFIX}{name}.base_layer.weight"] = tuple(module.weight.shape)
    check_fit(shapes, stored, directory / ADAPTER_WEIGHTS)
    for name, param in whole.items():
        param.copy_(stored[f"{PREFIX}{name}"][:])
    for name, module in targets.items():
        module.weight.copy_(module.weight.float() + _update(name, module, config, stored))


def _update(name, module, config, stored):
    """scale B A, float32, in the layout of the module's weight."""
    name_A, name_B = _lora_shapes(name, module, 1)
    lora_A = stored[name_A][:].to(module.weight.device).float()
    lora_B = stored[name_B][:].to(module.weight.device).float()
    rank, alpha = lora_A.shape[0], _setting(config, "lora_alpha", "alpha_pattern", name)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    update = scale * (lora_B @ lora_A)
    return update.T if isinstance(module, nn.Embedding) else update


def _lora_shapes(name, module, rank):
    """{tensor: shape} of A and B for one target. An embedding's are those of its transpose."""
    rows, columns = module.weight.shape
    name = PREFIX + name
    if isinstance(module, nn.Embedding):
        return {f"{name}.lora_embedding_A": (rank, rows), f"{name}.lora_embedding_B": (columns, rank)}
    return {f"{name}.lora_A.weight": (rank, columns), f"{name}.lora_B.weight": (rows, rank)}


# ---------------------------------------------------------------- which modules, by PEFT's rules


def _targets(model, config, source):
    """{name: module} of the linears and embeddings that have A and B.

    UserError for a target that is neither or whose weight is tied, and when there is none.
    """
    targets = {}
    for name, module in model.named_modules():
        if _is_target(name, module, config):
            targets[name] = module
            if not isinstance(module, nn.Linear | nn.Embedding):
                raise UserError(f"{source}: target_modules names {name}, which is no linear and no embedding")
    if not targets:
        raise UserError(
            f"{source}: target_modules={config['target_modules']!r}: the model has no such module"
        )
    _check_untied(model, "target_modules", targets, source)
    return targets


def _is_target(name, module, config):
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if _matches(excluded, name) or _is_saved(name, config):
        return False
    if targets == "all-linear":
        return isinstance(module, nn.Linear) and name != "lm_head"
    layers = config.get("layers_to_transform")
    if isinstance(targets, list) and layers not in (None, []):
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        if not layer or int(layer[1]) not in (layers if isinstance(layers, list) else [layers]):
            return False
    return _matches(targets, name)


def _matches(modules, name):
    """A text is a regular expression of the whole name; a list holds names and ends of names."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in modules)


def _is_saved(name, config):
    """Whether the module, or one that it is in, is named by modules_to_save."""
    saved = config.get("modules_to_save") or []
    return any(re.match(rf"(^|.*\.){end}($|\..*)", name) for end in saved)


def _trained_whole(model, config, source):
    """{name: parameter} of the modules in modules_to_save.

    There PEFT compares the last letters: "norm" is every norm.
    """
    ends = tuple(config.get("modules_to_save") or [])
    params = {}
    for name, module in model.named_modules():
        if ends and name.endswith(ends):
            params |= dict(module.named_parameters(prefix=name))
    _check_untied(model, "modules_to_save", params, source)
    return params


def _check_untied(model, key, names, source):
    """UserError where an adapter would change one of two uses of a tied weight: PEFT unties them."""
    tied = [name for name in names if name.startswith("lm_head") or "embed" in name]
    if model.config.tie_word_embeddings and tied:
        reason = "the model ties embedding and lm_head, and the adapter has them apart"
        raise UserError(f"{source}: {key} names {tied[0]}: {reason}; expected a model merged by PEFT")


def _setting(config, key, pattern_key, name):
    """A number for one target: that of the first pattern that ends its name, else that for all."""
    for pattern, value in (config.get(pattern_key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config[key]
