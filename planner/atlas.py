"""The pairs of `steer.py validate` before the first weight is read.

    python steer.py validate NAME ... --check [--gpu NAME] [--key=value ...]

Every model's name is looked up, its config and tokenizer are read (KBs, from the hub where it is there), and
what the hub says of the size of its weights; with a GPU, the hours and dollars of the whole.
"""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

import families
from data import end_of_turn, resolve_template
from planner.budget import extracts_in_fp32, find_gpu
from planner.plan import CONTEXT_GIB, GIB, steering_passes, vector_texts
from plumbing import adapters, hub
from plumbing.files import UserError, table
from plumbing.tokenizer import Tokenizer
from plumbing.weights import ADAPTER_CONFIG, check_sizes, check_vocabulary

GB = 1e9
TEXT_TOKENS = 250  # of a text of the vector: assumed, hh-rlhf's mean


@dataclass(frozen=True)
class Model:
    """What is known of a model whose weights are not here."""

    path: str
    commit: str  # the hub's; "" of a folder
    config: object
    tokenizer: Tokenizer
    parameters: int
    gb: float  # of its weights on disk
    base: str | None  # of a LoRA adapter: the model that it adapts


def look_up(path):
    """The Model at a folder, hub name or LoRA adapter. UserError for what could not be loaded."""
    folder, commit, sizes = _small_files(path)
    is_local = not commit
    if is_local:
        families.locate(folder)  # which refuses what is no one model
    weights = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    if not weights:
        raise UserError(f"model_path={path!r}: no .safetensors file; pickles are never loaded")
    base = None
    if (folder / ADAPTER_CONFIG).is_file():
        base = str(adapters.base_of(folder))
        known = look_up(base)
        config, tokenizer, parameters = known.config, known.tokenizer, known.parameters
    else:
        config, tokenizer = families.model_config(folder), Tokenizer.from_dir(folder)
        check_vocabulary(config, tokenizer)
        if is_local:
            check_sizes(config, folder)
        parameters = families.num_parameters(config)
    return Model(path, commit, config, tokenizer, parameters, sum(weights.values()) / GB, base)


def _small_files(path):
    """(folder that holds the configs, commit, {file of the top folder: bytes}) of a folder or hub name."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        sizes = {}
        for file in folder.iterdir():
            if file.is_file():
                sizes[file.name] = file.stat().st_size
        return folder, "", sizes
    if (name := hub.parse(path)) is None:
        raise UserError(f"model_path={path!r}: no such folder, and not a hub name")
    repository, revision = name
    files = {"allow_patterns": ["*.json", "*.jinja"], "ignore_patterns": "*/*"}
    try:
        snapshot = Path(huggingface_hub.snapshot_download(repository, revision=revision, **files))
        listed = huggingface_hub.HfApi().list_repo_tree(repository, revision=snapshot.name)
        sizes = {entry.path: entry.size for entry in listed if hasattr(entry, "size")}
    except hub.errors() as error:
        raise UserError(f"model_path={path!r}: {str(error).splitlines()[0]}") from error
    return snapshot, snapshot.name, sizes


def problem_of(pair, sft, dpo):
    """Why a pair (SteerConfig) of two Models cannot be validated, or None."""
    sft_shape = (sft.config.num_hidden_layers, sft.config.hidden_size)
    dpo_shape = (dpo.config.num_hidden_layers, dpo.config.hidden_size)
    if sft_shape != dpo_shape:
        return f"layers and hidden size {sft_shape} and {dpo_shape}; expected the same"
    try:
        if pair.template is not None:
            for model in (sft, dpo):
                end_of_turn(resolve_template(pair.template, model.tokenizer), model.tokenizer)
    except UserError as error:
        return str(error)
    return None


def check(pairs, gpu, nulls, oracle):
    """Print every model and pair of {name: SteerConfig}, and the plan; returns 1 if one cannot be loaded.

    gpu: name or None; nulls: random directions of each of two kinds that a sweep runs; oracle: whether it
    finds the best direction.
    """
    card = gpu and find_gpu(gpu)
    models, problems, lines = {}, [], []
    paths = []
    for pair in pairs.values():
        paths += [pair.sft_path, pair.dpo_path]
    for path in dict.fromkeys(paths):
        try:
            model = models[path] = look_up(path)
        except UserError as error:
            problems.append(str(error))
            lines.append([path, "", "", "", "", "see below"])
            continue
        kind = model.config.model_type + (f", LoRA on {model.base}" if model.base else "")
        lines.append([path, model.commit[:10], kind, f"{model.parameters:,}", f"{model.gb:.2f}", "ok"])
    print(table(["model", "commit", "kind", "parameters", "GB", ""], lines, left=(0, 1, 2, -1)))
    whole = {}
    for name, pair in pairs.items():
        if pair.sft_path in models and pair.dpo_path in models:
            sft, dpo = models[pair.sft_path], models[pair.dpo_path]
            if problem := problem_of(pair, sft, dpo):
                problems.append(f"pair {name!r}: {problem}")
            whole[name] = pair, sft, dpo
    if whole:
        print("\n".join(_plan(whole, models, card, gpu, nulls, oracle)))
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print(f"{len(pairs)} pairs: no problem found")
    return 1 if problems else 0


def _plan(whole, models, card, gpu, nulls, oracle):
    """Lines: disk, memory and, with a card, time and cost of {name: (SteerConfig, Model, Model)}."""
    files = {}  # {folder or name: GB}; a base that several adapters share counts once
    for model in models.values():
        if model.base:
            files[model.base] = look_up(model.base).gb
    for path, model in models.items():
        files[path] = model.gb
    pair_gb, state_bytes = [], 0
    for pair, sft, dpo in whole.values():
        pair_gb.append(sft.gb + dpo.gb)
        state_bytes += _state_bytes(pair, sft.config)
    lines = [
        f"disk     {sum(files.values()):.1f} GB of weights, or {max(pair_gb):.1f} at a time with "
        f"--keep_weights=false; {state_bytes / GB:.2f} GB of states",
        _memory_line(max(models.values(), key=lambda model: model.parameters), card),
    ]
    if card is None:
        return [*lines, "time     --gpu NAME says hours and dollars"]
    hours = {}
    for name, (pair, sft, _) in whole.items():
        passes = steering_passes(pair, sft.config, card, TEXT_TOKENS, nulls, oracle)
        hours[name] = sum(seconds for _, seconds, _ in passes.values()) / 3600
        dtype = "fp32" if extracts_in_fp32(sft.config, card) else "bf16"
        lines.append(f"         {hours[name]:7.3f} h  {name}; extract in {dtype}")
        if 2 * sft.parameters / GIB + CONTEXT_GIB > card.gib:
            lines[-1] += f"; does not fit on one {gpu}"
    total = sum(hours.values())
    low, high = card.usd_per_hour
    price = f"${total * low:.2f}-{total * high:.2f} (prices assumed)"
    return [
        *lines,
        f"time     {total:.2f} h on one {gpu}, {price}; not counted: downloads, loading, answers",
    ]


def _memory_line(model, card):
    """What the largest model takes. families.load_model decides on fp32 by the card's size."""
    fp32 = f"{4 * model.parameters / GIB + CONTEXT_GIB:.1f} GiB"
    bf16 = f"{2 * model.parameters / GIB + CONTEXT_GIB:.1f} GiB"
    extract = f"{fp32} in fp32 on a card of {8 * model.parameters / GIB:.1f} GiB, else as sweep"
    if card is not None:
        extract = f"{bf16} in bf16, too large for fp32"
        if extracts_in_fp32(model.config, card):
            extract = f"{fp32} in fp32"
    one = f"one model at a time, the largest {model.path}"
    return f"memory   of GPU beside activations, {one}: extract {extract}; sweep {bf16} in bf16"


def _state_bytes(pair, config):
    """Of both sides' differences, pooled in two ways, in float32."""
    return 2 * 2 * 4 * vector_texts(pair) * config.num_hidden_layers * config.hidden_size
