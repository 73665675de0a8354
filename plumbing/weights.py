"""Hugging Face folders in and out of (sharded) models: weights and tokenizer.

safetensors and JSON only.

Sharded means that a parameter is a DTensor here, split over the ranks by rows of dimension 0. Reading, each
rank reads its own rows of the files. Writing, one full parameter at a time exists on rank 0. Neither holds a
whole model in host memory.
"""

import hashlib
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist

from kernels import is_split, split_master
from plumbing import hub, kinds, parallel, watchdog
from plumbing.files import (
    HASHERS,
    HASHES,
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
_LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.")

# ---------------------------------------------------------------- finding and identifying a model folder


def resolve(path_or_repo, key="model_path"):
    """The folder of a model, as find_folder gives it, once it is sure to hold one model.

    UserError for a LoRA adapter, which needs its base, for a run folder, and for what different readers would
    take for different models. key: what named it.
    """
    folder = find_folder(path_or_repo, key)
    # before parsing them; load_weights does the rest
    verify_hashes(folder, lambda name: not _is_weights(name))
    key = f"{key}={str(path_or_repo)!r}"
    if has_weights(folder):
        if has_adapter(folder):
            problem = f"{key}: a LoRA adapter ({ADAPTER_CONFIG}, {ADAPTER_WEIGHTS}) beside a whole model"
            raise UserError(f"{problem}; expected one of them: move the adapter to a folder of its own")
        stored_weights(folder)
    elif has_adapter(folder):
        whole = "a whole model: of a run its final/, where the adapter is merged, or the adapter's base"
        raise UserError(f"{key}: a LoRA adapter ({ADAPTER_CONFIG}, no {WEIGHTS}); expected {whole}")
    elif (folder / "final/config.json").is_file():
        raise UserError(f"{key}: a run folder; expected a model, here {folder}/final")
    elif (folder / "manifest.json").is_file() and (folder / "metrics.jsonl").is_file():
        raise UserError(f"{key}: a run folder without its final/; expected a run that has ended")
    elif hint := pickle_hint(folder):  # a plan, too, reads folders without weights
        raise UserError(f"{key}: no {WEIGHTS}{hint}")
    return folder


def pickle_hint(folder):
    """What to say of weights that are there as a pickle only; "" when there are none."""
    for path in sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model*.bin")])[:1]:
        return f"; {path.name} is a pickle, and pickles are never loaded: convert it to safetensors"
    return ""


def has_weights(folder):
    """Whether the folder holds a whole model's weights."""
    return (folder / WEIGHTS).exists() or (folder / WEIGHTS_INDEX).exists()


def has_adapter(folder):
    """Whether the folder holds a PEFT adapter, or half of one."""
    return (folder / ADAPTER_CONFIG).exists() or (folder / ADAPTER_WEIGHTS).exists()


def find_folder(path_or_repo, key="model_path"):
    """The local folder, or the hub's snapshot of its weights, configs and chat template.

    A hub name is "org/name" or "org/name@revision". Downloaded once; an interrupted download goes on with the
    unfinished files. The commit goes into hub.COMMITS.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    key = f"{key}={str(path_or_repo)!r}"
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

    UserError when one is missing or lies elsewhere, or the index is torn or not the only description.
    """
    weight_map = _weight_map(directory)
    names = sorted(set(weight_map.values())) or [WEIGHTS]
    if names != [WEIGHTS] and (directory / WEIGHTS).exists():
        problem = f"{directory}: {WEIGHTS} beside {WEIGHTS_INDEX}, which names other files"
        raise UserError(f"{problem}: two models; expected one, delete the other")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory}: missing weight files: {', '.join(missing)}{pickle_hint(directory)}")
    for name in names:
        _check_inside(directory, name)
    return [directory / name for name in names]


def _weight_map(directory):
    """{tensor: file name} of the index; {} without one."""
    path = directory / WEIGHTS_INDEX
    if not path.exists():
        return {}
    index = read_json(path)
    kinds.check(path, index, {"weight_map": kinds.map_to(kinds.TEXT)})
    if not index.get("weight_map"):
        raise UserError(f"{path}: no weight_map; expected an index of weights")
    return index["weight_map"]


def _check_inside(directory, name):
    """UserError for a weight file outside the folder.

    The hub's cache has links into its own blobs/.
    """
    folder, target = directory.resolve(), (directory / name).resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if Path(name).name != name or target.parent not in (folder, blobs):
        expected = "expected a file of that folder: copy it there, or name the folder where it is"
        raise UserError(f"{directory}: {name} is {target}; {expected}")


def stored_weights(directory):
    """({name: slice}, {name: file}) of a model folder's tensors.

    slice[a:b] reads rows, slice.get_shape() only the header. UserError when two files hold one name, or
    another file holds it than the index says.
    """
    slices, places = {}, {}
    for path in weight_files(directory):
        for name, tensor in tensor_slices(path).items():
            if name in slices:
                raise UserError(f"{directory}: {name} is in {places[name]} and in {path.name}; expected one")
            slices[name], places[name] = tensor, path.name
    for name, file in _weight_map(directory).items():
        if places.get(name, file) != file:
            raise UserError(f"{directory / WEIGHTS_INDEX}: {name} in {file}; it is in {places[name]}")
    return slices, places


def tensor_slices(path):
    """{name: slice} of one safetensors file."""
    file = open_safetensors(path)
    return {name: file.get_slice(name) for name in file.keys()}


def check_sizes(config, directory):
    """UserError when config.json says other sizes than the weights have, naming key and tensor.

    By the files' headers, before a model is built: a wrong vocab_size could ask for any amount of memory.
    """
    stored, _ = stored_weights(directory)
    problems = []
    layers = {match[1] for match in map(_LAYER.match, stored) if match}
    if len(layers) != config.num_hidden_layers:
        problems.append(
            f"num_hidden_layers={config.num_hidden_layers}: the weights have {len(layers)} layers"
        )
    shapes = config.weight_shapes()
    tied = {"lm_head.weight", next(iter(shapes))} if config.tie_word_embeddings else set()
    if tied & stored.keys():
        shapes = {name: sizes for name, sizes in shapes.items() if name in stored or name not in tied}
    for name, sizes in shapes.items():
        found = tuple(stored[name].get_shape()) if name in stored else "missing"
        if found != tuple(sizes.values()):
            expected = ", ".join(f"{key}={size}" for key, size in sizes.items())
            problems.append(f"{expected}: {name} is {found}")
    if problems:
        raise UserError(f"{directory}/config.json does not fit the weights: " + "; ".join(problems))


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
    return progress_bar(iterable, delay=5, disable=rank() != 0, **options)


def rank():
    """This process's number, 0 without a group."""
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
    return {name: param for name, param in sharded_parameters(model).items() if not is_adapter(name)}


def is_adapter(name):
    """Whether a parameter of that name belongs to a LoRA adapter."""
    return name.endswith((".lora_A", ".lora_B"))


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
    stored, places = stored_weights(directory)
    if model.config.tie_word_embeddings and "lm_head.weight" in stored:  # tied, yet stored twice
        names = {param: name for name, param in model.named_parameters()}
        embedding = names[model.lm_head.weight]
        stored.setdefault(embedding, stored["lm_head.weight"])  # or once, under either name
        _check_tied(embedding, stored, directory)
        del stored["lm_head.weight"]
    for name in list(stored):
        if name.endswith("rotary_emb.inv_freq"):  # old exports hold it; config.json determines it
            del stored[name]
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    check_fit(shapes, stored, directory, places)
    with ThreadPoolExecutor(1) as beside:
        verified = beside.submit(verify_hashes, directory, _is_weights, _sha256) if rank() == 0 else None
        for name, param in _bar(params.items(), desc="reading weights", unit="tensor"):
            copy_rows(param, stored[name])
            watchdog.beat()
        if verified:
            verified.result()
    parallel.share_weights(model)


def check_fit(shapes, stored, source, places=None):
    """UserError naming every tensor that is missing, unexpected, of another shape or of no known dtype.

    shapes {name: tuple}, stored {name: slice}, places {name: file}, where there are several.
    """
    problems = [(name, "missing") for name in shapes if name not in stored]
    problems += [(name, "unexpected") for name in stored if name not in shapes]
    for name in shapes.keys() & stored.keys():
        shape = tuple(stored[name].get_shape())
        if shape != shapes[name]:
            problems.append((name, f"shape {shape}, expected {shapes[name]}"))
        dtype = stored[name].get_dtype()
        if dtype not in DTYPES.values():
            problems.append((name, f"dtype {dtype}, expected one of {', '.join(DTYPES.values())}"))
    if problems:
        listed = [f"{source}: {len(problems)} tensors do not fit the model:"]
        for name, problem in sorted(problems)[:20]:
            file = f" ({places[name]})" if places and name in places else ""
            listed.append(f"  {name}: {problem}{file}")
        raise UserError("\n".join(listed))


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
    with published(Path(directory), "config.json") as folder:
        hashes = {}
        for file_name, tensors in plan.items():
            read = partial(_full_weight, model, params)
            hashes[file_name] = write_gathered(folder / file_name, tensors, read)
        if rank() == 0:
            _write_configs(folder, model.config, tokenizer, plan, chat_template)
            write_hashes(folder, known=hashes)


def check_replaceable(directory, config_name):
    """UserError when `directory` holds anything but an earlier export.

    A new export replaces nothing else.
    """
    contents = [path.name for path in directory.iterdir()] if directory.exists() else []
    ours = (".safetensors", ".json", ".jinja", ".model", "README.md")
    foreign = [name for name in contents if not name.endswith(ours)]
    is_export = config_name in contents and HASHES in contents  # others write no such file
    if contents and (foreign or not is_export):
        listed = ", ".join(sorted(foreign or contents)[:5])
        raise UserError(f"{directory}: holds {listed}, which no export wrote, so it is not replaced")


@contextmanager
def published(directory, config_name):
    """A temporary folder that becomes `directory` when the block ends well, in place of an earlier export."""
    check_replaceable(directory, config_name)
    folder = directory.with_name(f".tmp_{directory.name}")
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    yield folder
    if rank() == 0:
        publish(folder, directory)
    if dist.is_initialized():
        parallel.barrier()


def write_gathered(path, tensors, read):
    """write_safetensors on rank 0; returns the file's sha256.

    The other ranks make the same calls of read, which gathers. FloatingPointError on every rank for a tensor
    that is not finite: what is exported can be used.
    """

    def read_finite(name):
        watchdog.beat()
        if dist.is_initialized():
            parallel.barrier()  # where read gathers nothing, too: a rank that waits at the end does not beat
        tensor = read(name)
        if not is_finite(tensor):
            raise FloatingPointError(f"{path.parent.name}: {name} is not finite, so nothing is exported")
        return tensor

    if rank() == 0:
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
    return gather(param)


def gather(tensor):
    """All ranks' rows of a tensor."""
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
