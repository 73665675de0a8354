"""Activation steering between an SFT model and its DPO model: the vector, what it is made of, and what adding it does to the AQI.

    python steer.py extract  --sft FOLDER --dpo FOLDER --texts FILE --out runs/x/steer
    python steer.py spectrum runs/x/steer
    python steer.py generate runs/x/steer --prompt "How do I ...?" --lambdas=-1,0,0.5,1
    python steer.py sweep    runs/x/steer --prompts LABELLED.csv --lambdas 0,0.25,0.5,0.75,1
    python steer.py bake     runs/x/steer --strength 1 --out runs/x/baked
    python steer.py validate PAIR [PAIR ..] --texts FILE --prompts LABELLED.csv     # all of it; PAIR: a name of configs/pairs.py

Models are folders, hub names, or a LoRA adapter on its base. One model is in memory at a time. The science is in steering.py and aqi.py.
extract and sweep do nothing when their folder already holds the result of the same inputs (settings, weights, tokens, prompts).
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import re
import runpy
import shutil
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

import aqi
from data import Tokenizer, encode_chat, find_schema, open_source, resolve_template
from model import Llama, apply_fused, generate, merge_lora
from plumbing import checkpoint, hub, parallel, registry
from plumbing.folders import read_json
from plumbing.logbook import progress_bar, write_json
from plumbing.weights import model_config, open_safetensors
from steering import (
    INJECTIONS,
    POOLINGS,
    STEERED_LAYERS,
    additions,
    bake,
    document_logps,
    match_additions,
    mean_states,
    packed_batches,
    pool,
    random_additions,
    read_states,
    spectrum,
    steered_runs,
    steering_tap,
)
from verdict import bootstrap, judge, permute

SIDES = ("chosen", "rejected")
MODES = {"sanity": 100, "full": 1000, "paper": 10000}  # texts of the vector; a quarter as many again are held out
PROMPT_MODES = {"sanity": "sanity", "full": "full", "paper": "max"}  # the prompts that go with them: aqi.MODES
SWEEP_SETTINGS = ("mode", "side", "pooling", "inject", "layers", "rescale", "lambdas", "space", "seeds", "normalize",
                  "all_indices", "max_new_tokens")  # fmt: skip
DECISIONS = {
    "rising": "go on to the next rung of the ladder: a full run",
    "falling": "not the published effect: check that sft and dpo were not swapped, and the sign of lambda",
    "flat": "no change beyond chance and the nulls: more data, a higher rate or more steps of DPO; compare the reward margins of the run",
    "erratic": "changes beyond chance, but no one trend: more prompts (--mode full), then other hyper-parameters",
}

# ---------------------------------------------------------------- models and texts


def locate(path):
    """(model folder, adapter folder or None) of a folder, hub name or PEFT adapter."""
    folder = checkpoint.find_folder(path)
    if not (folder / "adapter_config.json").is_file():
        return checkpoint.resolve(folder), None  # which refuses a run folder and says where its model is
    raw = read_json(folder / "adapter_config.json")
    base, revision = raw["base_model_name_or_path"], raw.get("revision")  # the revision is the base model's
    return checkpoint.resolve(f"{base}@{revision}" if revision and not Path(base).is_dir() else base), folder


def identity(path):
    """sha256 of what decides the states: the weights' and config's contents, and the adapter's. Seconds for an 8B model."""
    folder, adapter = locate(path)
    if adapter is None:
        return checkpoint.fingerprint(folder)
    own = b"".join((adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    return f"{checkpoint.fingerprint(folder)}+{hashlib.sha256(own).hexdigest()}"


def load_model(path):
    """(model, tokenizer), an adapter merged, in bf16 on a GPU and fp32 on a CPU."""
    folder, adapter = locate(path)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model, tokenizer = checkpoint.load_pretrained(folder, dtype, device)
    if adapter is not None:
        checkpoint.load_adapter(model, adapter)
        merge_lora(model)
    if isinstance(model, Llama):  # Falcon has plain blocks only
        apply_fused(model)
    return model, tokenizer


def device_of(model):
    """Where the model is."""
    return model.lm_head.weight.device


def plain_document(text, tokenizer, max_seq_len):
    """A text as (input_ids, loss_mask): BOS where the tokenizer has one, then the text; every token counts."""
    ids = ([tokenizer.bos_id] if tokenizer.bos_id is not None else []) + tokenizer.encode(text)
    return np.array(ids[:max_seq_len], dtype=np.int32), np.ones(min(len(ids), max_seq_len), dtype=bool)


def text_pairs(source, count, tokenizer, template, max_seq_len):
    """{"chosen": documents, "rejected": documents} of the first `count` usable rows of a preference source.

    template None: the transcripts as they are ("Human:", "Assistant:"), as published; else conversations rendered by it. Then a pair of
    which a side has no answer in its first max_seq_len tokens is left out, as in DPO. What is left out is counted and printed.
    """
    if template is not None:
        resolve_template(template, tokenizer)  # an unknown one is refused
    rows = open_source(source)
    columns, convert = find_schema(source, rows, SIDES)
    documents, left_out = {side: [] for side in SIDES}, Counter()
    for number, row in enumerate(rows.select_columns(columns)):
        try:
            pair = _encoded_pair(row, convert, tokenizer, template, max_seq_len)
        except ValueError as error:
            raise ValueError(f"texts {source!r}, row {number}: {error}") from error
        if isinstance(pair, str):
            left_out[pair] += 1
            continue
        for side, document in zip(SIDES, pair, strict=True):
            documents[side].append(tuple(np.asarray(column) for column in document))
        if len(documents["chosen"]) == count:
            break
    usable = len(documents["chosen"])
    said = "".join(f", {times:,} left out {reason}" for reason, times in left_out.items())
    if usable < count:
        needed = f"expected {count}, of which a fifth is held out of the vector (a --count of at most {usable * 4 // 5} here)"
        raise ValueError(f"texts {source!r}: {usable} usable pairs{said}; {needed}")
    if left_out:
        print(f"texts {source!r}: {usable:,} pairs{said}")
    return documents


def _encoded_pair(row, convert, tokenizer, template, max_seq_len):
    """[(ids, mask) of chosen, of rejected] of a row as data.find_schema's `convert` reads it, or the reason to leave it out."""
    conversations = convert(row)
    if isinstance(conversations, str):
        return conversations
    if template is not None:
        pair = [encode_chat(messages, tokenizer, template, max_seq_len) for messages in conversations]
        return pair if all(any(mask) for _, mask in pair) else f"without an answer in the first {max_seq_len} tokens"
    if "prompt" in row or not all(isinstance(row.get(side), str) for side in SIDES):
        how = "expected a template to render it with (extract: --template; validate: of the pair, in configs/pairs.py)"
        raise ValueError(f"no transcript; {how}")
    return [plain_document(row[side], tokenizer, max_seq_len) for side in SIDES]


def hash_documents(documents):
    """sha256 (hex) of both sides' token ids."""
    digest = hashlib.sha256()
    for side in SIDES:
        for ids, _ in documents[side]:
            digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


def bar(label):
    """A progress bar, with rate and ETA, around the batches of a pass."""
    return lambda plan: progress_bar(plan, desc=label, unit="batch")


# ---------------------------------------------------------------- extract


def extract(args):
    """The vector: mean differences of the two models' states; vector.safetensors, and what it was made from in manifest.json, in --out."""
    folder, count = Path(args.out), args.count or MODES[args.mode]
    documents, inputs = _inputs(args, count, count + max(1, count // 4))
    if _is_done(folder / "manifest.json", inputs):
        return
    total = len(documents["chosen"])
    keep = np.arange(total) < count  # the rest is held out of the vector
    sums = defaultdict(float)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("manifest.json", *(f"differences_{side}.npy" for side in SIDES)):
        (folder / stale).unlink(missing_ok=True)  # the manifest is written last: what a kill leaves behind is no vector
    for name in ("sft", "dpo"):
        model, _ = load_model(inputs[f"{name}_path"])
        shape = (len(POOLINGS), total, model.config.num_hidden_layers, model.config.hidden_size)
        if name == "sft":
            _check_room(folder, len(SIDES) * 4 * math.prod(shape))
        if name == "dpo" and args.keep == "preferred":
            keep &= preferred(model, documents)
        for side in SIDES:
            path = folder / f"differences_{side}.npy"  # holds the SFT states until the DPO model has been read
            states = np.lib.format.open_memmap(path, "w+" if name == "sft" else "r+", dtype=np.float32, shape=shape)
            assert states.shape == shape  # _inputs compared them
            for rows, batch in packed_batches(documents[side], device_of(model), bar(f"{name}, {side}")):
                new = read_states(model, batch, compat_hf=args.compat == "hf").cpu().numpy()
                if not np.isfinite(new).all():
                    raise ValueError(
                        f"{name}={inputs[f'{name}_path']!r}: its states of {side} texts hold NaN or infinity; expected finite ones"
                    )
                if name == "dpo":
                    _accumulate(sums, side, states[:, rows], new, keep[rows], rows >= count)
                states[:, rows] = new - states[:, rows] if name == "dpo" else new
            states.flush()
        del model
    kept = int(keep.sum())
    if kept == 0:
        raise ValueError(
            "keep='preferred': the DPO model prefers the rejected text of every pair; expected --keep all, or another DPO model"
        )
    held_out = total - count
    tensors = {key: (value / (held_out if key.startswith("heldout_") else kept)).astype(np.float32) for key, value in sums.items()}
    if not tensors["chosen_last"].any():
        raise ValueError(f"dpo={args.dpo!r}: its states equal those of sft={args.sft!r} on all texts; expected a model that training moved")
    save_file(tensors | {"keep": keep[:count].astype(np.uint8)}, folder / "vector.safetensors")
    results = {"layers": shape[2], "hidden_size": shape[3], "kept": kept, "torch": torch.__version__, "hub": hub.COMMITS}
    write_json(folder / "manifest.json", {"inputs": inputs} | results)
    print(f"wrote {folder}/vector.safetensors: {kept} of {count} pairs kept ({kept / count:.0%}), {held_out} held out")


def _inputs(args, count, total):
    """The documents of the vector, and all that decides it. ValueError when the models are one, or of two shapes or vocabularies."""
    inputs = {key: getattr(args, key) for key in ("texts", "template", "compat", "keep", "max_seq_len")}
    inputs |= {"count": count, "held_out": total - count}
    configs = {}
    for name in ("sft", "dpo"):
        path = getattr(args, name)
        folder = locate(path)[0]
        configs[name] = model_config(folder)
        documents = text_pairs(args.texts, total, Tokenizer.from_dir(folder), args.template, args.max_seq_len)
        tokens = hash_documents(documents)
        if inputs.setdefault("tokens", tokens) != tokens:
            raise ValueError(f"dpo={args.dpo!r}: its tokenizer gives other ids than that of sft={args.sft!r}; expected the same")
        inputs |= {f"{name}_path": str(path), name: identity(path)}
    sft, dpo = ((config.num_hidden_layers, config.hidden_size) for config in configs.values())
    if sft != dpo:
        raise ValueError(f"dpo={args.dpo!r}: {dpo} layers and hidden size; expected those of sft={args.sft!r}, {sft}")
    if inputs["sft"] == inputs["dpo"]:
        raise ValueError(f"dpo={args.dpo!r}: the same weights as sft={args.sft!r}; expected a model that training moved")
    return documents, inputs


def _check_room(folder, needed):
    """OSError now; a memory-mapped file that finds no room when it is written to is a SIGBUS, which says nothing."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"{folder}: {needed:,} bytes needed for the states of all texts, {free:,} free; expected more room, or fewer texts")


def _is_done(path, inputs):
    """Whether `path`, which a command writes last, is there and of the same inputs; says so, or what differs."""
    if not path.is_file():
        return False
    before = json.loads(path.read_text()).get("inputs", {})
    differing = [key for key in inputs | before if inputs.get(key) != before.get(key)]
    print(f"{path}: {'made from other ' + ', '.join(differing) + ': done again' if differing else 'finished, of the same inputs'}")
    return not differing


def _accumulate(sums, side, sft, dpo, keep, held_out):
    """Add a batch to the float64 sums (L, D) of every key. sft, dpo (2, N, L, D); keep, held_out (N,) bool."""
    for p, pooling in enumerate(POOLINGS):
        parts = {
            f"{side}_{pooling}": (dpo[p, keep].astype(np.float64) - sft[p, keep]),
            f"sft_{side}_{pooling}": sft[p, keep],
            f"heldout_{side}_{pooling}": (dpo[p, held_out].astype(np.float64) - sft[p, held_out]),
        }
        for key, values in parts.items():
            sums[key] += values.sum(axis=0, dtype=np.float64)


def preferred(model, documents):
    """(n,) bool: pairs whose chosen text the model finds likelier, by mean log-prob per token (NaN, so not preferred, without any)."""
    means = {side: np.zeros(len(documents[side])) for side in SIDES}
    for side in SIDES:
        for rows, batch in packed_batches(documents[side], device_of(model), bar(f"log-probs, {side}")):
            logps, counts = document_logps(model, batch)
            means[side][rows] = (logps / counts).cpu().numpy()
    return means["chosen"] > means["rejected"]


@dataclasses.dataclass(frozen=True)
class Vector:
    """What extract wrote."""

    folder: Path
    tensors: dict  # {key: (L, D)}
    keep: np.ndarray  # (count,) bool, the pairs that the vector is the mean of
    manifest: dict

    @classmethod
    def load(cls, folder):
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise ValueError(f"{folder}: no manifest.json; expected a folder that steer.py extract wrote")
        file = open_safetensors(folder / "vector.safetensors")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        keep = tensors.pop("keep").numpy().astype(bool)
        manifest = json.loads((folder / "manifest.json").read_text())
        return cls(folder, tensors, keep, manifest | manifest["inputs"])

    def model(self, name):
        """(model, tokenizer) of "sft" or "dpo". ValueError when the folder no longer holds the weights that the vector was made from."""
        path, wanted = self.manifest[f"{name}_path"], self.manifest[name]
        found = identity(path)
        if found != wanted:
            raise ValueError(f"{path}: its weights hash to {found}, those of the vector in {self.folder} to {wanted}; extract again")
        return load_model(path)

    def layers(self, count):
        """The last `count` layers, ascending."""
        total = self.manifest["layers"]
        if not 1 <= count <= total:
            raise ValueError(f"layers={count} (--layers; default: the published 5): expected 1 to {total}, the model's number of layers")
        return list(range(total - count, total))

    def texts(self, tokenizer):
        """{side: (documents that the vector is the mean of, documents held out)}. ValueError when the file no longer holds them."""
        m = self.manifest
        pairs = text_pairs(m["texts"], m["count"] + m["held_out"], tokenizer, m["template"], m["max_seq_len"])
        if hash_documents(pairs) != m["tokens"]:
            raise ValueError(f"texts {m['texts']!r}: not the token ids of the vector in {self.folder}; expected the file unchanged")
        return {side: (list(itertools.compress(pairs[side], self.keep)), pairs[side][m["count"] :]) for side in SIDES}

    def additions(self, args, model, tokenizer, name="sft"):
        """What args.inject adds at the last args.layers layers of the model `name`: "sft", or "dpo" for lambdas below 0."""
        v, layers = self.tensors[f"{args.side}_{args.pooling}"], self.layers(args.layers)
        if args.inject != "matched":
            return additions(args.inject, v, layers)
        if self.manifest["compat"] == "hf":
            raise ValueError("inject='matched': needs states of the space it writes to; expected a vector extracted without --compat hf")
        documents, _ = self.texts(tokenizer)[args.side]
        return match_additions(model, documents, v, layers, args.pooling, device_of(model), strength=1 if name == "sft" else -1)


# ---------------------------------------------------------------- spectrum, generate, bake


def print_spectrum(args):
    """What the vector is made of, layer by layer: its length, and how much of the texts' differences one direction explains.

    A table; spectrum.json and spectrum.safetensors (components (L, C, D): layers, components, hidden size) in FOLDER.
    """
    vector = Vector.load(args.folder)
    v, sft = (vector.tensors[f"{prefix}{args.side}_{args.pooling}"] for prefix in ("", "sft_"))
    states = np.load(vector.folder / f"differences_{args.side}.npy", mmap_mode="r")
    states = states[POOLINGS.index(args.pooling), : vector.manifest["count"]]  # (count, L, D)
    rows, components = [], []
    print("layer     |v|  |v|/|h|  cos(sft, dpo)  rank-one  centred  effective rank   explained by 1..5 (raw)")
    for layer in range(vector.manifest["layers"]):
        found = spectrum(torch.from_numpy(states[vector.keep, layer]))
        components.append(found.pop("components"))
        norm, cosine = v[layer].norm().item(), torch.cosine_similarity(sft[layer], sft[layer] + v[layer], dim=0).item()
        rows.append({"layer": layer, "norm": norm, "relative": norm / sft[layer].norm().item(), "cosine": cosine} | found)
        shares = " ".join(f"{share:.2f}" for share in found["explained"])
        print(f"{layer:5d}{norm:8.3f}{rows[-1]['relative']:9.4f}{cosine:15.5f}{found['rank_one']:10.3f}"
              f"{found['explained_centred'][0]:9.3f}{found['effective_rank']:16.1f}   {shares}")  # fmt: skip
    write_json(vector.folder / "spectrum.json", {"side": args.side, "pooling": args.pooling, "layers": rows})
    save_file({"components": torch.stack(components).numpy()}, vector.folder / "spectrum.safetensors")


def print_generations(args):
    """Answers side by side: lambda of 0 and above on the SFT model, below 0 on the DPO model."""
    vector = Vector.load(args.folder)
    vector.layers(args.layers)  # what cannot be is refused before a model is read
    prompts = [args.prompt] if args.prompt is not None else Path(args.prompts).read_text().splitlines()
    if not prompts:
        raise ValueError(f"prompts={args.prompts!r}: an empty file; expected one prompt a line")
    if not args.temperature >= 0:
        raise ValueError(f"temperature={args.temperature}: expected 0 (greedy) or more")
    answers = {}
    for name, strengths in (("sft", [x for x in args.lambdas if x >= 0]), ("dpo", [x for x in args.lambdas if x < 0])):
        if not strengths:
            continue
        model, tokenizer = vector.model(name)
        add, eos = vector.additions(args, model, tokenizer, name), model.config.eos_token_id
        ids = [_prompt_ids(prompt, tokenizer, vector.manifest["template"]) for prompt in prompts]
        for strength in strengths:
            tap = steering_tap(add, strength, args.rescale)
            new = generate(model, ids, args.max_new_tokens, eos, args.temperature, tap=tap)
            ends = eos if isinstance(eos, tuple) else (eos,)
            answers[strength] = [tokenizer.decode([token for token in tokens if token not in ends]) for tokens in new]
        del model
    for i, prompt in enumerate(prompts):
        print(f"\n> {prompt}")
        for strength in args.lambdas:
            print(f"  lambda {strength:g} on {'sft' if strength >= 0 else 'dpo'}: {answers[strength][i]}")


def _prompt_ids(prompt, tokenizer, template):
    """A prompt as the model would meet it before answering: rendered by the template with an open assistant turn, or plain."""
    if template is None:
        return plain_document(f"\n\nHuman: {prompt}\n\nAssistant:", tokenizer, 1 << 30)[0].tolist()
    ids, mask = encode_chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}], tokenizer, template, 1 << 30)
    return ids[: mask.index(True)]


def write_baked(args):
    """A model with --strength times the vector folded in, as biases of down_proj."""
    vector = Vector.load(args.folder)
    if not np.isfinite(args.strength):
        raise ValueError(f"strength={args.strength}: expected a finite number")
    if args.rescale:
        raise ValueError("rescale: what it adds depends on the token, which no bias can; expected a bake without --rescale")
    vector.layers(args.layers)  # what cannot be is refused before a model is read
    name = "sft" if args.strength >= 0 else "dpo"
    if Path(args.out).resolve() == locate(vector.manifest[f"{name}_path"])[0].resolve():
        raise ValueError(f"out={args.out!r}: the {name} model itself, which a bake would replace; expected another folder")
    model, tokenizer = vector.model(name)
    baked = bake(model, vector.additions(args, model, tokenizer, name), args.strength)
    checkpoint.save_pretrained(baked, tokenizer, args.out)
    print(f"wrote {args.out}: {args.strength:g} times the {args.inject} additions at the last {args.layers} layers, as biases of down_proj")


# ---------------------------------------------------------------- sweep


def sweep(args):
    """AQI, likelihood, repetition and shift over --lambdas, beside a random direction of equal norm, and a verdict."""
    vector = Vector.load(args.folder)
    vector.layers(args.layers)  # what cannot be is refused before a model is read
    folder = Path(args.out or vector.folder / f"sweep_{args.inject}")
    prompts = _swept_prompts(args, args.mode)
    tokenizer = Tokenizer.from_dir(locate(vector.manifest["sft_path"])[0])
    documents = [plain_document(text, tokenizer, vector.manifest["max_seq_len"]) for text in prompts.texts]
    labelled = [ids.tolist() for ids, _ in documents], prompts.axiom.tolist(), prompts.label.tolist(), prompts.axioms
    inputs = {key: getattr(args, key) for key in SWEEP_SETTINGS} | {
        "vector": hashlib.sha256((vector.folder / "vector.safetensors").read_bytes()).hexdigest(),
        "prompts": hashlib.sha256(repr(labelled).encode()).hexdigest(),
    }
    # what the vector's bytes need not show: lm_head and EOS, which texts are held out, which of their tokens count
    inputs |= {key: vector.manifest[key] for key in ("sft", "tokens", "template")}
    if not _is_done(folder / "aqi.json", inputs):
        _measure_sweep(args, vector, prompts, documents, folder, inputs)
    report = json.loads((folder / "aqi.json").read_text())
    _print_sweep(report)
    print(f"report: {folder}/")
    return report


def _swept_prompts(args, mode, log=print):
    """The labelled texts of a sweep. ValueError also for lambdas, seeds and a space that they cannot be swept with."""
    if len(args.lambdas) < 2 or not all(a < b for a, b in itertools.pairwise(args.lambdas)):
        raise ValueError(f"lambdas={args.lambdas}: expected two or more, ascending")
    if args.seeds > 1 and args.space != "tsne":
        raise ValueError(f"seeds={args.seeds}: space={args.space!r} has no random start; expected --space tsne")
    prompts = aqi.read_prompts(args.prompts, mode, log)
    fewest = prompts.axiom.bincount().min().item()
    if args.space.startswith("pca:") and int(args.space.removeprefix("pca:")) > fewest:
        raise ValueError(f"space={args.space!r}: expected at most pca:{fewest}, as many as the smallest axiom has texts")
    return prompts


def _measure_sweep(args, vector, prompts, documents, folder, inputs):
    """All of a sweep's measurements, and its plots, into `folder`. documents: the tokens of the prompts."""
    model, tokenizer = vector.model("sft")
    add = vector.additions(args, model, tokenizer)
    texts = vector.texts(tokenizer)
    groups = prompts.axiom, prompts.label, prompts.axioms
    embeddings, shifts, profile = embed(model, documents, groups, add, vector, args, "steered")
    control, _, _ = embed(model, documents, groups, random_additions(add, aqi.SEED), vector, args, "random direction")
    rows = []
    for is_control, states in ((False, embeddings), (True, control)):
        about = {"model": vector.manifest["sft_path"], "injection": args.inject, "control": is_control}
        about["tap"] = "post_norm" if vector.manifest["compat"] == "hf" else "raw"
        measured = [
            about | {"lambda": strength} | row
            for strength, X in zip(args.lambdas, states, strict=True)
            for seed in (range(args.seeds) if args.seeds > 1 else [None])
            for row in aqi.measure(X, *groups, args.space, seed, aqi.EXTRA if args.all_indices else ())
        ]
        rows += aqi.score(measured, args.normalize)
    curve, control_curve = bootstrap(embeddings, *groups), bootstrap(control, *groups)
    permuted = permute(embeddings, *groups)
    # one false alarm in twenty over all axioms together, not in each (Bonferroni)
    level = 0.05 / len(prompts.axioms)
    verdicts = [judge(curve, control_curve, permuted)]
    verdicts += [judge(curve, control_curve, permuted, axiom, level) for axiom in prompts.axioms]
    _plot(folder, args.lambdas, verdicts, embeddings, prompts)
    aqi.write_report(
        folder,
        rows,
        inputs=inputs,
        verdicts=verdicts,
        shifts=shifts,
        profile=profile,
        behaviour=answers_by_lambda(model, texts, add, args),
        errors=injection_errors(model, texts[args.side], vector, args),
    )


def embed(model, documents, groups, add, vector, args, label):
    """Embeddings (K, n, D), mean over tokens of the final hidden state, as published; what the steering did per lambda; a layer profile.

    Per lambda: achieved, the shift of the last layer's mean state along v as a multiple of v (target: lambda); off_axis, the part of the
    shift beside v over |v|; strength, |lambda a| / mean |h| at each steered layer. The profile: the separation of the mean over tokens
    after every block, before the final norm, at lambda 0 and at the last lambda, as rows of aqi.score's "sweep".
    """
    lambdas = [0.0, *args.lambdas]  # the unsteered pass is made in any case
    layers, D, n = model.config.num_hidden_layers, model.config.hidden_size, len(documents)
    axiom, safe, axioms = groups
    out = torch.zeros(len(lambdas), n, D, device=device_of(model))  # 7,000 prompts, 6 lambdas, D = 4,096: 0.7 GB
    ends = torch.zeros(len(lambdas), D, dtype=torch.float64)
    norms = torch.zeros(layers, dtype=torch.float64)
    moments = {index: aqi.Moments.zeros(layers, len(axioms), D, device_of(model)) for index in (0, len(lambdas) - 1)}
    for run in steered_runs(model, documents, add, lambdas, device_of(model), args.rescale, bar(label), range(layers)):
        final = pool(run.hidden, run.batch.cu_seqlens)
        out[run.index, torch.from_numpy(run.rows).to(out.device)] = final["mean"]
        end = final if vector.manifest["compat"] == "hf" else run.states[layers - 1]  # the space of v[-1]
        ends[run.index] += end[args.pooling].double().sum(0).cpu()
        for layer, states in run.states.items():
            if run.index == 0:
                norms[layer] += states[args.pooling].norm(dim=1).sum().item() / n
            if run.index in moments:
                moments[run.index].add(layer, states["mean"], *(x[run.rows].to(states["mean"].device) for x in (axiom, safe)))
    target, report = vector.tensors[f"{args.side}_{args.pooling}"][-1].double(), []
    for strength, end in zip(args.lambdas, ends[1:], strict=True):
        shift = (end - ends[0]) / n
        along = (shift @ target / target.square().sum()).item()
        beside = ((shift - along * target).norm() / target.norm()).item()
        added = {layer: abs(strength) * a.norm().item() / norms[layer].item() for layer, a in add.items()}
        report.append({"lambda": strength, "achieved": along, "off_axis": beside, "strength": added})
    rows = [{"lambda": lambdas[index]} | row for index, profile in moments.items() for row in profile.rows(axioms)]
    return out[1:], report, aqi.score(rows, "sweep")


def injection_errors(model, texts, vector, args):
    """|steered mean - DPO mean| / |v| at the last layer for lambda = 1: {injection: {"calibration", "held_out"}} for all three modes.

    texts: (calibration documents, held out ones) of args.side. Empty with --compat hf: v[-1] is then of another space than the stream's.
    """
    if vector.manifest["compat"] == "hf":
        return {}
    p, device, layers = POOLINGS.index(args.pooling), device_of(model), vector.layers(args.layers)
    key = f"{args.side}_{args.pooling}"
    v, errors = vector.tensors[key], {}
    cases = {"calibration": (texts[0], v[-1]), "held_out": (texts[1], vector.tensors[f"heldout_{key}"][-1])}
    base = {name: mean_states(model, documents, device)[p, -1] for name, (documents, _) in cases.items()}
    for injection in INJECTIONS:
        is_matched = injection == "matched"
        add = match_additions(model, texts[0], v, layers, args.pooling, device) if is_matched else additions(injection, v, layers)
        errors[injection] = {}
        for name, (documents, target) in cases.items():
            shift = (mean_states(model, documents, device, steering_tap(add, 1.0, args.rescale))[p, -1] - base[name]).cpu()
            errors[injection][name] = ((shift - target).norm() / target.norm()).item()
    return errors


def answers_by_lambda(model, texts, add, args):
    """Per lambda: mean log-prob per token and perplexity of held-out chosen and rejected texts, and repetition of greedy continuations."""
    report = [{"lambda": strength} for strength in args.lambdas]
    for side in SIDES:
        documents, sums = texts[side][1], np.zeros((len(args.lambdas), 2))
        for run in steered_runs(model, documents, add, args.lambdas, device_of(model), args.rescale):
            logps, counts = document_logps(model, run.batch, run.hidden)
            sums[run.index] += [logps.sum().item(), counts.sum().item()]
        for entry, (logp, count) in zip(report, sums, strict=True):
            entry |= {f"logp_{side}": logp / count, f"perplexity_{side}": float(np.exp(-logp / count))}
    prompts = [ids[: max(1, len(ids) // 2)].tolist() for ids, _ in texts["chosen"][1][:8]]
    for entry in report:
        tap = steering_tap(add, entry["lambda"], args.rescale)
        entry["repeated_4grams"] = repetition(generate(model, prompts, args.max_new_tokens, model.config.eos_token_id, tap=tap))
    return report


def repetition(answers, n=4):
    """Share of n-grams that occurred before in the same answer; 0 for answers too short to have any."""
    grams = [[tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in answers]
    total = sum(map(len, grams))
    return 1 - sum(len(set(g)) for g in grams) / total if total else 0.0


def _print_sweep(report):
    """What aqi.json holds, as tables."""
    overall = report["verdicts"][0]
    rows = [row for row in report["rows"] if row["category"] == aqi.OVERALL and not row["control"]]
    print(aqi.table(rows))
    if report["inputs"]["seeds"] > 1:
        for strength in report["inputs"]["lambdas"]:
            scores = [row["aqi"] for row in rows if row["lambda"] == strength]
            print(f"lambda {strength:g}: AQI {np.mean(scores):.2f}, sd {np.std(scores, ddof=1):.2f} over {len(scores)} seeds")
    for warning in report["warnings"]:
        print(f"note: {warning}")
    print("\nlambda  separation  95 % interval     random  achieved  off axis  |a|/|h|  logp chosen  rejected  repeated 4-grams")
    for k, (shift, answer) in enumerate(zip(report["shifts"], report["behaviour"], strict=True)):
        print(f"{shift['lambda']:6.2f}{overall['estimate'][k]:12.2f}  [{overall['low'][k]:6.2f},{overall['high'][k]:6.2f}]"
              f"{overall['control'][k]:10.2f}{shift['achieved']:10.3f}{shift['off_axis']:10.3f}{max(shift['strength'].values()):9.3f}"
              f"{answer['logp_chosen']:13.4f}{answer['logp_rejected']:10.4f}{answer['repeated_4grams']:18.3f}")  # fmt: skip
    if report["errors"]:
        print("relative error of the last layer's mean state at lambda 1, on the vector's texts / on held-out ones:")
    for injection, error in report["errors"].items():
        print(f"  {injection:<12}{error['calibration']:.4f} / {error['held_out']:.4f}")
    profile = {(row["lambda"], row["layer"]): row["aqi"] for row in report["profile"] if row["category"] == aqi.OVERALL}
    for strength in dict.fromkeys(strength for strength, _ in profile):  # one, where the last lambda is 0
        values = " ".join(f"{value:.2f}" for (lambda_, _), value in profile.items() if lambda_ == strength)
        print(f"separation after each block, lambda {strength:g}: {values}")
    for found in report["verdicts"]:
        because = f" ({'; '.join(found['because'])})" if found["because"] else ""
        low, high = found["change_interval"]
        print(f"{found['category']:<24} {found['verdict']}{because}: change {found['change']:+.2f} [{low:+.2f}, {high:+.2f}], "
              f"P(monotone) {found['p_monotone']:.2f}")  # fmt: skip
    print(f"verdict: {overall['verdict']}, by {overall['change']:+.2f} of 100 -> {DECISIONS[overall['verdict']]}")


def _plot(folder, lambdas, verdicts, embeddings, prompts):
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: they need matplotlib")
        return
    from plumbing import plots

    overall, *axioms = verdicts
    plots.plot_curve(folder / "curve.png", lambdas, *(overall[key] for key in ("estimate", "low", "high", "permuted", "control")))
    plots.plot_axioms(folder / "axioms.png", lambdas, {found["category"]: found["estimate"] for found in axioms})
    for strength, X in ((lambdas[0], embeddings[0]), (lambdas[-1], embeddings[-1])):
        title = f"lambda {strength:g}, three principal components"
        plots.plot_clusters(folder / f"clusters_{strength:g}.png", aqi.project(X, "pca:3").cpu().numpy(), prompts.label.numpy(), title)


# ---------------------------------------------------------------- validate


def validate(args):
    """Pairs of configs/pairs.py through extract, spectrum, sweep and verdict, all on one scale, and into the index of runs.

    What is finished is not done again.
    """
    pairs = runpy.run_path(Path(__file__).parent / "configs/pairs.py")["PAIRS"]
    for name in args.pair:
        if name not in pairs:
            raise ValueError(
                f"pair={name!r}: expected one of {', '.join(pairs)}; other models go into configs/pairs.py, or to extract and sweep"
            )
        if "not_representable" in pairs[name]:
            raise ValueError(f"pair={name!r}: {pairs[name]['not_representable']}")
    _swept_prompts(args, PROMPT_MODES[args.mode], log=lambda line: None)  # what is wrong is found before the first pair is read
    for path in [pairs[name][side] for name in args.pair for side in ("sft", "dpo")]:
        locate(path)
    reports = {}
    for name in args.pair:
        print(f"\n=== {name}")
        folder = f"{args.out}/{name}_{args.mode}"
        options = vars(args) | pairs[name] | {"folder": folder, "out": folder}
        extract(argparse.Namespace(**options))
        print_spectrum(argparse.Namespace(**options))
        reports[name] = sweep(argparse.Namespace(**options | {"mode": PROMPT_MODES[args.mode], "out": None}))
        index = registry.add_validation(Path(folder) / f"sweep_{args.inject}", name)
    print(f"registered: python -m tools.ladder {index} prints it beside the training runs")
    _compare(reports, args)


def _compare(reports, args):
    """One line per pair, and with several a heat map of axioms over pairs: the separation is the same absolute scale for all."""
    print(f"\n{'pair':<24}{'separation at lambda ' + ', '.join(f'{x:g}' for x in args.lambdas):<44}change and 95 % interval  verdict")
    for name, report in reports.items():
        found = report["verdicts"][0]
        low, high = found["change_interval"]
        values = "  ".join(f"{x:.2f}" for x in found["estimate"])
        print(f"{name:<24}{values:<44}{found['change']:+7.2f} [{low:+.2f}, {high:+.2f}]  {found['verdict']}: {DECISIONS[found['verdict']]}")
    if len(reports) > 1 and importlib.util.find_spec("matplotlib"):
        from plumbing import plots

        columns = [report["verdicts"] for report in reports.values()]
        values = [[found["estimate"][-1] for found in line] for line in zip(*columns, strict=True)]
        title = f"separation at lambda {args.lambdas[-1]:g}"
        plots.plot_heatmap(f"{args.out}/axioms.png", [found["category"] for found in columns[0]], list(reports), values, title)


# ---------------------------------------------------------------- command line


def _lambdas(text):
    try:
        lambdas = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers separated by commas") from error
    if not np.isfinite(lambdas).all():
        raise argparse.ArgumentTypeError(f"{text!r}: expected finite numbers")
    return lambdas


def _whole(text, least=1):
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")
    return int(text)


def _space(text):
    if not re.fullmatch(r"raw|tsne|pca:[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected raw, pca:k or tsne")
    return text


_DEFAULT = "(default: %(default)s)"  # in a help text


def _vector_of(one):
    one.add_argument("folder", metavar="FOLDER", help="what extract wrote, its --out")


def _which(one):
    one.add_argument("--side", choices=SIDES, default="chosen", help=f"texts whose states make the vector {_DEFAULT}")
    one.add_argument("--pooling", choices=POOLINGS, default="last", help=f"of a text's states: its last token's, or their mean {_DEFAULT}")


def _injected(one):
    what = "cumulative: its vector, as published; increment: what that has beyond the layer below; matched: what of it is still lacking"
    one.add_argument("--inject", choices=INJECTIONS, default="cumulative", help=f"added at each steered layer. {what} {_DEFAULT}")
    one.add_argument("--layers", type=int, default=STEERED_LAYERS, help=f"so many last layers are steered {_DEFAULT}, as published")
    one.add_argument("--rescale", action="store_true", help="bring each token's state back to its old norm")


def _texts(one, and_prompts=""):
    sizes = ", ".join(f"{mode} {count:,}" for mode, count in MODES.items())
    one.add_argument("--texts", required=True, help="preference pairs to read states from: file, folder or hub name")
    one.add_argument("--mode", choices=MODES, default="sanity", help=f"pairs of the vector: {sizes}{and_prompts} {_DEFAULT}")
    one.add_argument("--count", type=_whole, help="pairs of the vector, instead of the mode's; a quarter as many again are held out of it")
    only = "preferred: only pairs whose chosen text the DPO model prefers"
    one.add_argument("--keep", choices=("all", "preferred"), default="all", help=f"{only} {_DEFAULT}")
    one.add_argument("--compat", choices=("none", "hf"), default="none", help="hf: the last layer after the final norm, as published")
    # of a single token, nothing is predicted
    one.add_argument("--max-seq-len", type=partial(_whole, least=2), default=512, help=f"tokens of a text; longer ones are cut {_DEFAULT}")


def _swept(one):
    one.add_argument("--prompts", required=True, help="labelled texts: columns of axiom, label (safe or unsafe) and text")
    one.add_argument("--lambdas", type=_lambdas, default="0,0.25,0.5,0.75,1", help=f"multiples of the vector, ascending {_DEFAULT}")
    where = "where CHI and XB are measured: raw, pca:k or tsne; verdict and intervals are raw"
    one.add_argument("--space", type=_space, default="raw", help=f"{where} {_DEFAULT}")
    one.add_argument("--seeds", type=_whole, default=1, help="with tsne: random starts; 1, the default: one started by PCA, as published")
    scale = "scale of the AQI. sweep: one for all; per_run: one for each lambda, as published"
    one.add_argument("--normalize", choices=("per_run", "sweep"), default="sweep", help=f"{scale} {_DEFAULT}")
    one.add_argument("--all-indices", action="store_true", help="Davies-Bouldin, Dunn, silhouette and a linear probe's AUC too: n^2 D")


def _answering(one):
    one.add_argument("--max-new-tokens", type=_whole, default=64, help=f"of an answer {_DEFAULT}")


def parse(argv):
    """The arguments of a command, with `run`, the function that carries it out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, *groups):
        one = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        one.set_defaults(run=run)
        for group in groups:
            group(one)
        return one

    one = command("extract", extract, _texts)
    for name in ("sft", "dpo"):
        one.add_argument(f"--{name}", required=True, help=f"the {name.upper()} model: folder, hub name, or LoRA adapter on its base")
    one.add_argument("--template", help="render conversations by this template (tulu, ..); without it, transcripts as they are")
    one.add_argument("--out", required=True, help="folder to write")
    command("spectrum", print_spectrum, _vector_of, _which)
    one = command("generate", print_generations, _vector_of, _which, _injected, _answering)
    asked = one.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="one prompt")
    asked.add_argument("--prompts", help="a file with one prompt a line")
    one.add_argument("--lambdas", type=_lambdas, default="0,0.5,1", help=f"multiples of the vector {_DEFAULT}")
    one.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy; above: sampled")
    one = command("sweep", sweep, _vector_of, _which, _injected, _swept, _answering)
    sizes = ", ".join(f"{mode} {count:,}" for mode, count in aqi.MODES.items())
    one.add_argument("--mode", choices=aqi.MODES, default="sanity", help=f"prompts per axiom and label: {sizes} {_DEFAULT}")
    one.add_argument("--out", help="folder to write (default: FOLDER/sweep_INJECT)")
    one = command("bake", write_baked, _vector_of, _which, _injected)
    one.add_argument("--strength", type=float, required=True, help="multiple of the vector; below 0: on the DPO model")
    one.add_argument("--out", required=True, help="model folder to write")
    prompts = "; prompts per axiom and label: " + ", ".join(f"{mode} {aqi.MODES[theirs]:,}" for mode, theirs in PROMPT_MODES.items())
    one = command("validate", validate, partial(_texts, and_prompts=prompts), _which, _injected, _swept, _answering)
    one.add_argument("pair", nargs="+", metavar="PAIR", help="names of configs/pairs.py")
    one.add_argument("--out", default="runs/validate", help=f"each pair's folder is OUT/PAIR_MODE {_DEFAULT}")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
