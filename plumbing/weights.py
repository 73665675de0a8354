"""Hugging Face folders in and out of (sharded) models: weights, tokenizer, adapters. safetensors and JSON only.

Sharded means FSDP2: every parameter is a DTensor, split over the ranks by rows of dimension 0. When reading, each rank touches its own rows
of the files and nothing else; when writing, one full parameter at a time exists on rank 0. Neither ever holds a model in host memory.
"""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kernels import is_split, split_master
from plumbing import hub, parallel
from plumbing.files import UserError, progress_bar, publish, read_json, write_json
from plumbing.tensors import DTYPES, num_bytes, open_safetensors, write_safetensors

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_FILE_BYTES = 5 * 10**9
# ---------------------------------------------------------------- finding and identifying a model folder


def resolve(path_or_repo):
    """The folder of a model, as find_folder gives it. ValueError for a LoRA adapter, which is no model without its base."""
    folder = find_folder(path_or_repo)
    if (folder / "final/config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"model_path={str(path_or_repo)!r}: a run folder; expected a model, here {folder}/final")
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        problem = f"model_path={str(path_or_repo)!r}: a LoRA adapter ({ADAPTER_CONFIG}, no config.json)"
        raise UserError(f"{problem}; expected a whole model: of a run its final/, where the adapter is merged, or the adapter's base")
    return folder


def find_folder(path_or_repo):
    """The local folder, or, for "org/name" or "org/name@revision", the hub's snapshot of its weights, configs and chat template.

    Downloaded once; one that broke off goes on with the files that are not finished. The commit goes into hub.COMMITS.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    key = f"model_path={str(path_or_repo)!r}"
    if (name := hub.parse(path_or_repo)) is None:
        raise UserError(f"{key}: no such folder, and not a hub name like 'org/name' or 'org/name@revision'")
    repository, revision = name
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja"]
        folder = snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns="*/*")  # the top folder only
    except hub.ERRORS as error:
        raise UserError(f"{key}: no such folder, and no such download from the hub: {error}") from error
    hub.COMMITS[str(path_or_repo)] = Path(folder).name  # snapshots are kept by commit
    return Path(folder)


def weight_files(directory):
    """The safetensors files of a model folder, by its index. ValueError when one is missing, or the index is torn."""
    index = directory / WEIGHTS_INDEX
    weight_map = read_json(index).get("weight_map") if index.exists() else {"": WEIGHTS}
    if not weight_map:
        raise UserError(f"{index}: no weight_map; expected an index of weights")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, and pickles are never loaded: convert it to safetensors" if pickles else ""
        raise UserError(f"{directory}: missing weight files: {', '.join(missing)}{hint}")
    return [directory / name for name in names]


def fingerprint(directory):
    """sha256 (hex) of config.json and the weight files' contents: other weights under the same path are another model."""
    paths = [Path(directory) / "config.json", *weight_files(Path(directory))]
    with _bar(total=sum(path.stat().st_size for path in paths), desc="hashing weights", unit="B", unit_scale=True) as bar:
        with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
            digests = pool.map(lambda path: _sha256(path, bar), paths)
    return hashlib.sha256("".join(f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True)).encode()).hexdigest()


def _sha256(path, bar):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _bar(iterable=None, **options):
    return progress_bar(iterable, delay=5, disable=_rank() != 0, **options)  # appears once a pass has taken 5 s


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


# ---------------------------------------------------------------- reading


def sharded_parameters(model):
    """{name: parameter}, this rank's shards; a tied one once.

    FSDP2 leaves the root's parameters gathered after a forward without a backward: put them back first, or the gathered copies would be
    taken for the parameters.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def copy_rows(tensor, rows):
    """Fill this rank's rows of a sharded or plain tensor with rows[first:stop], cast to its dtype; rows: what reads when sliced.

    A split master (optim.keep_masters) takes all 32 bits."""
    first, local = parallel.local_rows(tensor)
    if not local.numel():  # with more ranks than rows, the last ranks own none
        return
    values = rows[first : first + local.shape[0]]
    if is_split(tensor):
        weight, low_bits = split_master(values.to(local.device).float())
        local.copy_(weight)
        tensor.master.low_bits.copy_(low_bits)
    else:
        local.copy_(values)


@torch.no_grad()
def load_weights(model, directory):
    """Stream a folder's safetensors into the model's parameters, sharded or plain, each rank its own rows; adapters are left alone.

    ValueError lists every missing, unexpected or misshapen tensor with its file, before anything is copied.
    """
    directory = Path(directory)
    params = {name: param for name, param in sharded_parameters(model).items() if not _is_adapter(name)}
    files = weight_files(directory)
    stored = _tensors(files)
    if model.config.tie_word_embeddings and "lm_head.weight" in stored:  # tied, yet stored twice
        embedding = next(name for name, param in params.items() if param is model.lm_head.weight)
        stored.setdefault(embedding, stored["lm_head.weight"])  # or once, under either name
        _check_tied(embedding, stored, directory)
        del stored["lm_head.weight"]
    for name in [name for name in stored if name.endswith("rotary_emb.inv_freq")]:  # in old exports; config.json determines it
        del stored[name]
    _check_fit(params, stored, files)
    for name, param in _bar(params.items(), desc="reading weights", unit="tensor"):
        copy_rows(param, stored[name])


def _tensors(paths):
    """{name: slice} of several safetensors files; slice[a:b] reads rows, slice.get_shape() the header."""
    files = [open_safetensors(path) for path in paths]
    return {name: file.get_slice(name) for file in files for name in file.keys()}


def _check_fit(params, stored, files):
    problems = [(name, "missing") for name in params if name not in stored]
    problems += [(name, "unexpected") for name in stored if name not in params]
    for name in params.keys() & stored.keys():
        shape, expected = tuple(stored[name].get_shape()), tuple(params[name].shape)
        if shape != expected:
            problems.append((name, f"shape {shape}, expected {expected}"))
        if stored[name].get_dtype() not in DTYPES.values():
            problems.append((name, f"dtype {stored[name].get_dtype()}, expected one of {', '.join(DTYPES.values())}"))
    if problems:
        places = {name: f" ({path.name})" for path in files for name in open_safetensors(path).keys()}
        listed = [f"{name}: {problem}{places.get(name, '')}" for name, problem in sorted(problems)[:20]]
        raise UserError(f"{files[0].parent}: {len(problems)} tensors do not fit the model:\n  " + "\n  ".join(listed))


def _check_tied(name, stored, source):
    embedding, head = stored[name], stored["lm_head.weight"]
    parts = [slice(i, i + 4096) for i in range(0, embedding.get_shape()[0], 4096)]
    if embedding.get_shape() != head.get_shape() or not all(torch.equal(embedding[part], head[part]) for part in parts):
        raise UserError(f"{source}: lm_head.weight differs from {name}, yet config.json says tie_word_embeddings=true")


def check_vocabulary(config, tokenizer):
    """ValueError when the tokenizer makes ids that the embedding has no row for (fewer ids than rows is common padding)."""
    last, rows = tokenizer.vocab_size - 1, config.vocab_size
    if last >= rows:
        raise UserError(f"the tokenizer's ids go up to {last}, the model's embedding only has vocab_size={rows} rows")


# ---------------------------------------------------------------- writing


@torch.no_grad()
def save_pretrained(model, tokenizer, directory, dtype=None, chat_template=None):
    """Write a folder that transformers, vLLM and load_pretrained read: weights in files of at most 5 GB, config, tokenizer, template.

    Collective: all ranks call it, rank 0 writes. dtype None keeps the parameters' own; adapters are merged in float32 and cast once. The
    folder appears by a rename when it is whole. It replaces an earlier export; ValueError when anything else is in its place.
    """
    if not hasattr(model.config, "to_hf"):
        raise UserError(f"model_type={model.config.model_type!r}: inference only; expected a Llama to write")
    check_vocabulary(model.config, tokenizer)
    params = {name: param for name, param in sharded_parameters(model).items() if not _is_adapter(name)}
    plan = _plan_files({name: (dtype or param.dtype, param.shape) for name, param in params.items()})
    with _published(Path(directory), "config.json") as folder:
        for file_name, tensors in plan.items():
            _write_gathered(folder / file_name, tensors, lambda name: _full_weight(model, name, params[name]))
        if _rank() == 0:
            _write_configs(folder, model.config, tokenizer, plan, chat_template)


def check_replaceable(directory, config_name):
    """ValueError when `directory` holds anything but an earlier export, the only thing that a new one replaces."""
    contents = [path.name for path in directory.iterdir()] if directory.exists() else []
    foreign = [name for name in contents if not name.endswith((".safetensors", ".json", ".jinja", ".model")) and name != "README.md"]
    if contents and (foreign or config_name not in contents):
        raise UserError(f"{directory}: holds {', '.join(sorted(foreign or contents)[:5])}, which no export wrote, so it is not replaced")


@contextmanager
def _published(directory, config_name):
    """A temporary folder that becomes `directory` when the block ends well; an earlier export there is replaced, other files are not."""
    check_replaceable(directory, config_name)
    folder = directory.with_name(f".tmp_{directory.name}")
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    yield folder
    if _rank() == 0:
        publish(folder, directory)
    if dist.is_initialized():
        parallel.barrier()


def _write_gathered(path, tensors, read):
    """write_safetensors on rank 0; the other ranks make the same calls of read, which gathers."""
    if _rank() == 0:
        write_safetensors(path, tensors, read)
    else:
        for name in tensors:
            read(name)


def _full_weight(model, name, param):
    """The whole of one parameter, its adapters merged."""
    module = model.get_submodule(name.rpartition(".")[0])
    return _gather(module.merged_weight() if hasattr(module, "lora_A") and param is module.weight else param)


def _gather(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plan_files(tensors):
    """{file name: {name: (dtype, shape)}} with at most MAX_FILE_BYTES per file (or one tensor); wider dtypes first, as the writer wants."""
    groups, size = [{}], 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        size += num_bytes(dtype, shape)
        if groups[-1] and size > MAX_FILE_BYTES:
            groups.append({})
            size = num_bytes(dtype, shape)
        groups[-1][name] = (dtype, shape)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return dict(zip(names if len(groups) > 1 else [WEIGHTS], groups, strict=True))


def _write_configs(folder, config, tokenizer, plan, chat_template):
    if len(plan) > 1:
        total = sum(num_bytes(*spec) for tensors in plan.values() for spec in tensors.values())
        weight_map = {name: file_name for file_name, tensors in plan.items() for name in tensors}
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    stops = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or ())
    stops += [tokenizer.eos_id] if tokenizer.eos_id not in (None, *stops) else []  # the end of turn that was trained
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops or None}
    (dtype, _), *_ = next(iter(plan.values())).values()
    write_json(folder / "config.json", config.to_hf() | ids | {"torch_dtype": str(dtype).removeprefix("torch.")})
    write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    tokenizer.save(folder, chat_template)


# ---------------------------------------------------------------- adapters, in PEFT's format


def _is_adapter(name):
    return name.endswith((".lora_A", ".lora_B"))


def _peft_name(name):
    return f"base_model.model.{name}.weight"


def _adapter_config(model):
    """adapter_config.json's keys that describe the model's LoRA layers; None without any."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if not layers:
        return None
    layer = next(iter(layers.values()))
    rank, alpha = layer.lora_A.shape[0], layer.alpha
    targets = sorted({name.rpartition(".")[2] for name in layers})
    return {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": layer.dropout, "target_modules": targets}


@torch.no_grad()
def save_adapter(model, directory, base):
    """Write the LoRA adapters as PEFT does (adapter_model.safetensors, adapter_config.json); base: the base model's path or hub name.

    Collective, replaces and refuses as save_pretrained does.
    """
    config = _adapter_config(model)
    assert config, "save_adapter needs a model with adapters"
    origin, revision = (None if Path(base).is_dir() else hub.parse(base)) or (str(base), None)
    params = {_peft_name(name): param for name, param in sharded_parameters(model).items() if _is_adapter(name)}
    with _published(Path(directory), ADAPTER_CONFIG) as folder:
        specs = {name: (param.dtype, param.shape) for name, param in params.items()}
        _write_gathered(folder / ADAPTER_WEIGHTS, specs, lambda name: _gather(params[name]))
        if _rank() == 0:
            fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
            write_json(folder / ADAPTER_CONFIG, fixed | {"base_model_name_or_path": origin, "revision": revision} | config)


def adapter_settings(directory):
    """{"rank", "alpha", "dropout", "targets"} of a PEFT adapter's folder: the arguments of model.apply_lora.

    ValueError for what LoRALinear cannot represent (DoRA, rsLoRA, trained biases, ranks that differ by layer), and for an initialisation
    that took something off the base's weights (PiSSA, OLoRA, ..).
    """
    directory = Path(directory)
    raw = read_json(directory / ADAPTER_CONFIG)
    plain = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False}
    off = ("use_dora", "use_rslora", "use_qalora", "alora_invocation_tokens", "modules_to_save", "rank_pattern", "alpha_pattern")
    problems = [f"{key}={raw[key]!r}, expected {value!r}" for key, value in plain.items() if raw.get(key, value) != value]
    problems += [f"{key}={raw[key]!r}, expected it off" for key in off if raw.get(key)]
    if (init := raw.get("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal", "eva", "mica"):
        problems.append(f"init_lora_weights={init!r}: made for a base with other weights; expected it converted to a plain LoRA (see peft)")
    targets = raw["target_modules"]
    if not isinstance(targets, list):
        problems.append(f"target_modules={targets!r}, expected a list of layer names")
    if problems:
        raise UserError(f"{directory / ADAPTER_CONFIG}: " + "; ".join(problems))
    return {"rank": raw["r"], "alpha": raw["lora_alpha"], "dropout": raw.get("lora_dropout", 0.0), "targets": targets}


@torch.no_grad()
def load_adapter(model, directory):
    """Read PEFT LoRA adapters into a model that has LoRA layers, sharded or not.

    ValueError as adapter_settings, and for another rank, alpha or choice of layers than the model's.
    """
    directory, settings = Path(directory), adapter_settings(directory)
    there = {"r": settings["rank"], "lora_alpha": settings["alpha"], "target_modules": sorted(settings["targets"])}
    here = _adapter_config(model)
    differing = [f"{key}={value!r}, the model has {here[key]!r}" for key, value in there.items() if here[key] != value]
    if differing:
        raise UserError(f"{directory / ADAPTER_CONFIG}: " + "; ".join(differing))
    params = {_peft_name(name): param for name, param in sharded_parameters(model).items() if _is_adapter(name)}
    stored = _tensors([directory / ADAPTER_WEIGHTS])
    _check_fit(params, stored, [directory / ADAPTER_WEIGHTS])
    for name, param in params.items():
        copy_rows(param, stored[name])
