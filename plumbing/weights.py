"""Hugging Face folders in and out of (sharded) models: weights, tokenizer, adapters.

safetensors and JSON only.

Sharded means that a parameter is a DTensor here, split over the ranks by rows of dimension 0. Reading, each
rank reads its own rows of the files. Writing, one full parameter at a time exists on rank 0. Neither holds a
whole model in host memory.
"""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist

from kernels import is_split, split_master
from plumbing import hub, parallel, watchdog
from plumbing.files import (
    HASHERS,
    UserError,
    progress_bar,
    publish,
    read_json,
    sha256_of,
    verify_hashes,
    write_hashes,
    write_json,
)
from plumbing.tensors import DTYPES, is_finite, num_bytes, open_safetensors, write_safetensors

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_FILE_BYTES = 5 * 10**9

# ---------------------------------------------------------------- finding and identifying a model folder


def resolve(path_or_repo):
    """The folder of a model, as find_folder gives it.

    UserError for a LoRA adapter, which needs its base, and for a run folder.
    """
    folder = find_folder(path_or_repo)
    verify_hashes(
        folder, lambda name: not _is_weights(name)
    )  # before parsing them; load_weights does the rest
    if (folder / "config.json").is_file():
        return folder
    key = f"model_path={str(path_or_repo)!r}"
    if (folder / "final/config.json").is_file():
        raise UserError(f"{key}: a run folder; expected a model, here {folder}/final")
    if (folder / ADAPTER_CONFIG).is_file():
        problem = f"{key}: a LoRA adapter ({ADAPTER_CONFIG}, no config.json)"
        whole = "a whole model: of a run its final/, where the adapter is merged, or the adapter's base"
        raise UserError(f"{problem}; expected {whole}")
    return folder


def find_folder(path_or_repo):
    """The local folder, or the hub's snapshot of its weights, configs and chat template.

    A hub name is "org/name" or "org/name@revision". Downloaded once; an interrupted download goes on with the
    unfinished files. The commit goes into hub.COMMITS.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    key = f"model_path={str(path_or_repo)!r}"
    name = hub.parse(path_or_repo)
    if name is None:
        raise UserError(f"{key}: no such folder, and not a hub name like 'org/name' or 'org/name@revision'")
    repository, revision = name
    # of the top folder only
    files = {"allow_patterns": ["*.json", "*.safetensors", "*.jinja"], "ignore_patterns": "*/*"}
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, **files))
    except hub.errors() as error:
        raise UserError(f"{key}: no such folder, and no such download from the hub: {error}") from error
    hub.COMMITS[str(path_or_repo)] = folder.name  # snapshots are named by their commit
    return folder


def weight_files(directory):
    """The safetensors files of a model folder, by its index.

    UserError when one is missing, or the index is torn.
    """
    index = directory / WEIGHTS_INDEX
    weight_map = read_json(index).get("weight_map") if index.exists() else {"": WEIGHTS}
    if not weight_map:
        raise UserError(f"{index}: no weight_map; expected an index of weights")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        hint = ""
        for pickled in sorted(directory.glob("*.bin"))[:1]:
            hint = f"; {pickled.name} is a pickle, and pickles are never loaded: convert it to safetensors"
        raise UserError(f"{directory}: missing weight files: {', '.join(missing)}{hint}")
    return [directory / name for name in names]


def _is_weights(name):
    return name.endswith(".safetensors")


def fingerprint(directory):
    """sha256 (hex) of config.json and the weight files' contents.

    Other weights under the same path are another model.
    """
    paths = [Path(directory) / "config.json", *weight_files(Path(directory))]
    total = sum(path.stat().st_size for path in paths)
    with _bar(total=total, desc="hashing weights", unit="B", unit_scale=True) as bar:
        with ThreadPoolExecutor(HASHERS) as pool:  # hashlib releases the GIL
            digests = list(pool.map(lambda path: _sha256(path, bar.update), paths))
    listing = "".join(f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


# {(path, inode, size, time of the last change): sha256}: load_weights and fingerprint hash a file once
_digests = {}


def _sha256(path, advance=None):
    status = path.stat()
    key = (path, status.st_ino, status.st_size, status.st_ctime_ns)
    if key not in _digests:
        _digests[key] = sha256_of(path, advance)
    elif advance:
        advance(status.st_size)
    return _digests[key]


def _bar(iterable=None, **options):
    """A progress bar on rank 0 that appears once a pass has taken 5 s."""
    return progress_bar(iterable, delay=5, disable=_rank() != 0, **options)


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


# ---------------------------------------------------------------- reading


def sharded_parameters(model):
    """{name: parameter}, this rank's shards; a tied one once.

    Call parallel.share_weights after filling them.
    """
    parallel.settle(model)
    params = {}
    for name, shard in parallel.shards(model).items():
        params[name] = parallel.of_all_ranks(model, name, shard)
    return params


def _base_parameters(model):
    """sharded_parameters without the adapters."""
    return {name: param for name, param in sharded_parameters(model).items() if not _is_adapter(name)}


def _adapter_parameters(model):
    """{name in PEFT's files: parameter} of the LoRA adapters."""
    return {_peft_name(name): param for name, param in sharded_parameters(model).items() if _is_adapter(name)}


def copy_rows(tensor, rows):
    """Fill this rank's rows of a sharded or plain tensor with rows[first:stop], cast to its dtype.

    rows: anything with rows[a:b], for example a safetensors slice. A split master (optim.keep_masters) keeps
    all 32 bits of a float32 source.
    """
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
    """Stream a folder's safetensors into the model's parameters, sharded or plain.

    Each rank reads its own rows; adapters stay as they are. UserError lists every missing, unexpected or
    misshapen tensor with its file, before anything is copied. A folder with a hashes.json, which our exports
    have, is verified by rank 0 while the ranks read.
    """
    directory = Path(directory)
    params = _base_parameters(model)
    files = weight_files(directory)
    stored = _tensors(files)
    if model.config.tie_word_embeddings and "lm_head.weight" in stored:  # tied, yet stored twice
        names = {param: name for name, param in model.named_parameters()}
        embedding = names[model.lm_head.weight]
        stored.setdefault(embedding, stored["lm_head.weight"])  # or once, under either name
        _check_tied(embedding, stored, directory)
        del stored["lm_head.weight"]
    for name in list(stored):
        if name.endswith("rotary_emb.inv_freq"):  # old exports hold it; config.json determines it
            del stored[name]
    _check_fit(params, stored, files)
    with ThreadPoolExecutor(1) as beside:
        verified = beside.submit(verify_hashes, directory, _is_weights, _sha256) if _rank() == 0 else None
        for name, param in _bar(params.items(), desc="reading weights", unit="tensor"):
            copy_rows(param, stored[name])
        if verified:
            verified.result()
    parallel.share_weights(model)


def _tensors(paths):
    """{name: slice} of several safetensors files.

    slice[a:b] reads rows, slice.get_shape() only the header.
    """
    slices = {}
    for path in paths:
        file = open_safetensors(path)
        for name in file.keys():
            slices[name] = file.get_slice(name)
    return slices


def _check_fit(params, stored, files):
    """UserError naming every tensor that is missing, unexpected, or of another shape or of no known dtype."""
    problems = [(name, "missing") for name in params if name not in stored]
    problems += [(name, "unexpected") for name in stored if name not in params]
    for name in params.keys() & stored.keys():
        shape, expected = tuple(stored[name].get_shape()), tuple(params[name].shape)
        if shape != expected:
            problems.append((name, f"shape {shape}, expected {expected}"))
        dtype = stored[name].get_dtype()
        if dtype not in DTYPES.values():
            problems.append((name, f"dtype {dtype}, expected one of {', '.join(DTYPES.values())}"))
    if not problems:
        return
    places = {}
    for path in files:
        places |= dict.fromkeys(open_safetensors(path).keys(), f" ({path.name})")
    listed = [f"  {name}: {problem}{places.get(name, '')}" for name, problem in sorted(problems)[:20]]
    head = f"{files[0].parent}: {len(problems)} tensors do not fit the model:"
    raise UserError("\n".join([head, *listed]))


def _check_tied(name, stored, source):
    """UserError unless lm_head.weight, which a tied model need not store, equals the embedding."""
    embedding, head = stored[name], stored["lm_head.weight"]
    same = embedding.get_shape() == head.get_shape()
    # Some rows at a time: a vocabulary of 128,256 of an 8B model is 2 GB in one piece.
    for first in range(0, embedding.get_shape()[0], 4096):
        part = slice(first, first + 4096)
        same = same and torch.equal(embedding[part], head[part])
    if not same:
        problem = f"{source}: lm_head.weight differs from {name}"
        raise UserError(f"{problem}, yet config.json says tie_word_embeddings=true")


def check_vocabulary(config, tokenizer):
    """UserError when the tokenizer makes ids that the embedding has no row for.

    Fewer ids than rows is common padding.
    """
    last, rows = tokenizer.vocab_size - 1, config.vocab_size
    if last >= rows:
        problem = f"the tokenizer's ids go up to {last}"
        raise UserError(f"{problem}, the model's embedding only has vocab_size={rows} rows")


# ---------------------------------------------------------------- writing


@torch.no_grad()
def save_pretrained(model, tokenizer, directory, dtype=None, chat_template=None):
    """Write a folder that transformers, vLLM and load_pretrained read.

    Weights in files of at most 5 GB, config, tokenizer, template. Collective: all ranks call it, rank 0
    writes. dtype None keeps the parameters' own; adapters are merged in float32 and cast once. The folder
    appears by a rename when it is whole. It replaces an earlier export; UserError when anything else is in
    its place.
    """
    if not hasattr(model.config, "to_hf"):
        raise UserError(f"model_type={model.config.model_type!r}: inference only; expected a Llama to write")
    check_vocabulary(model.config, tokenizer)
    params = _base_parameters(model)
    plan = _plan_files({name: (dtype or param.dtype, param.shape) for name, param in params.items()})
    with _published(Path(directory), "config.json") as folder:
        hashes = {}
        for file_name, tensors in plan.items():
            read = partial(_full_weight, model, params)
            hashes[file_name] = _write_gathered(folder / file_name, tensors, read)
        if _rank() == 0:
            _write_configs(folder, model.config, tokenizer, plan, chat_template)
            write_hashes(folder, known=hashes)


def check_replaceable(directory, config_name):
    """UserError when `directory` holds anything but an earlier export.

    A new export replaces nothing else.
    """
    contents = [path.name for path in directory.iterdir()] if directory.exists() else []
    ours = (".safetensors", ".json", ".jinja", ".model", "README.md")
    foreign = [name for name in contents if not name.endswith(ours)]
    if contents and (foreign or config_name not in contents):
        listed = ", ".join(sorted(foreign or contents)[:5])
        raise UserError(f"{directory}: holds {listed}, which no export wrote, so it is not replaced")


@contextmanager
def _published(directory, config_name):
    """A temporary folder that becomes `directory` when the block ends well, in place of an earlier export."""
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
    """write_safetensors on rank 0; returns the file's sha256.

    The other ranks make the same calls of read, which gathers. FloatingPointError on every rank for a tensor
    that is not finite: what is exported can be used.
    """

    def read_finite(name):
        watchdog.beat()
        tensor = read(name)
        if not is_finite(tensor):
            raise FloatingPointError(f"{path.parent.name}: {name} is not finite, so nothing is exported")
        return tensor

    if _rank() == 0:
        return write_safetensors(path, tensors, read_finite)
    for name in tensors:
        read_finite(name)
    return None


def _full_weight(model, params, name):
    """The whole of one parameter, its adapters merged."""
    param = params[name]
    module = model.get_submodule(name.rpartition(".")[0])
    if hasattr(module, "lora_A") and param is module.weight:
        param = module.merged_weight()
    return _gather(param)


def _gather(tensor):
    return tensor.full_tensor() if parallel.is_sharded(tensor) else tensor


def _plan_files(tensors):
    """{file name: {name: (dtype, shape)}} with at most MAX_FILE_BYTES, or one tensor, a file.

    Wider dtypes first, as the writer needs.
    """
    groups, size = [{}], 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        size += num_bytes(dtype, shape)
        if groups[-1] and size > MAX_FILE_BYTES:
            groups.append({})
            size = num_bytes(dtype, shape)
        groups[-1][name] = (dtype, shape)
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_configs(folder, config, tokenizer, plan, chat_template):
    """The JSON files of an export: index, config.json, generation_config.json, tokenizer."""
    total, weight_map, dtypes = 0, {}, []
    for file_name, tensors in plan.items():
        for name, (dtype, shape) in tensors.items():
            weight_map[name] = file_name
            total += num_bytes(dtype, shape)
            dtypes.append(dtype)
    if len(plan) > 1:
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": _stop_ids(config, tokenizer)}
    about = ids | {"torch_dtype": str(dtypes[0]).removeprefix("torch.")}
    write_json(folder / "config.json", config.to_hf() | about)
    known = {key: value for key, value in ids.items() if value is not None}
    write_json(folder / "generation_config.json", known)
    tokenizer.save(folder, chat_template)


def _stop_ids(config, tokenizer):
    """eos_token_id for generation.

    The config's, which a trained model has set to its end of turn, and the tokenizer's EOS. One id, or a list
    of several, or None.
    """
    stops = config.eos_token_id
    if stops is None or isinstance(stops, int):
        stops = [] if stops is None else [stops]
    stops = list(stops)
    if tokenizer.eos_id not in (None, *stops):
        stops.append(tokenizer.eos_id)
    return stops[0] if len(stops) == 1 else stops or None


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
    alpha = int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha
    targets = sorted({name.rpartition(".")[2] for name in layers})
    rank = layer.lora_A.shape[0]
    return {"r": rank, "lora_alpha": alpha, "lora_dropout": layer.dropout, "target_modules": targets}


@torch.no_grad()
def save_adapter(model, directory, base):
    """Write the LoRA adapters as PEFT does.

    adapter_model.safetensors, adapter_config.json; base: the base model's path or hub name. Collective,
    replaces and refuses as save_pretrained does.
    """
    config = _adapter_config(model)
    assert config, "save_adapter needs a model with adapters"
    name = None if Path(base).is_dir() else hub.parse(base)
    origin, revision = name or (str(base), None)
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    source = {"base_model_name_or_path": origin, "revision": revision}
    params = _adapter_parameters(model)
    specs = {name: (param.dtype, param.shape) for name, param in params.items()}
    with _published(Path(directory), ADAPTER_CONFIG) as folder:
        digest = _write_gathered(folder / ADAPTER_WEIGHTS, specs, lambda name: _gather(params[name]))
        if _rank() == 0:
            write_json(folder / ADAPTER_CONFIG, fixed | source | config)
            write_hashes(folder, known={ADAPTER_WEIGHTS: digest})


# Keys of adapter_config.json that LoRALinear has no counterpart for
UNSUPPORTED = (
    "use_dora", "use_rslora", "use_qalora", "alora_invocation_tokens", "modules_to_save", "rank_pattern",
    "alpha_pattern"
)  # fmt: skip
# Initialisations that leave the base's weights as they are; others (PiSSA, OLoRA, ..) subtract the adapter
# from them
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")


def adapter_settings(directory):
    """{"rank", "alpha", "dropout", "targets"} of a PEFT adapter's folder: the arguments of model.apply_lora.

    UserError for what LoRALinear cannot represent (DoRA, rsLoRA, trained biases, ranks that differ by layer),
    and for an initialisation that changed the base's weights.
    """
    path = Path(directory) / ADAPTER_CONFIG
    verify_hashes(path.parent)
    raw = read_json(path)
    problems = []
    for key, expected in {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False}.items():
        if raw.get(key, expected) != expected:
            problems.append(f"{key}={raw[key]!r}, expected {expected!r}")
    problems += [f"{key}={raw[key]!r}, expected it off" for key in UNSUPPORTED if raw.get(key)]
    init = raw.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        reason = "made for a base with other weights; expected it converted to a plain LoRA (see peft)"
        problems.append(f"init_lora_weights={init!r}: {reason}")
    targets = raw["target_modules"]
    if not isinstance(targets, list):
        problems.append(f"target_modules={targets!r}, expected a list of layer names")
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    dropout = raw.get("lora_dropout", 0.0)
    return {"rank": raw["r"], "alpha": raw["lora_alpha"], "dropout": dropout, "targets": targets}


@torch.no_grad()
def load_adapter(model, directory):
    """Read PEFT LoRA adapters into a model that has LoRA layers, sharded or not.

    UserError as adapter_settings, and for another rank, alpha or choice of layers than the model's.
    """
    directory = Path(directory)
    settings = adapter_settings(directory)
    targets = sorted(settings["targets"])
    there = {"r": settings["rank"], "lora_alpha": settings["alpha"], "target_modules": targets}
    here = _adapter_config(model)
    differing = []
    for key, value in there.items():
        if here[key] != value:
            differing.append(f"{key}={value!r}, the model has {here[key]!r}")
    if differing:
        raise UserError(f"{directory / ADAPTER_CONFIG}: " + "; ".join(differing))
    files = [directory / ADAPTER_WEIGHTS]
    params = _adapter_parameters(model)
    stored = _tensors(files)
    _check_fit(params, stored, files)
    for name, param in params.items():
        copy_rows(param, stored[name])
    parallel.share_weights(model)
