"""The steering vector: the texts whose states it is made of, reading them in both models, and what was found, on disk and back."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from analysis.steering import POOLINGS, additions, document_logps, match_additions, packed_batches, read_states
from data import encode_chat, find_schema, resolve_template
from families import device_of, load_model, locate, model_config, weights_hash
from plumbing import hub
from plumbing.files import UserError, progress_bar, write_json
from plumbing.sources import open_source
from plumbing.tensors import open_safetensors
from plumbing.tokenizer import Tokenizer

SIDES = ("chosen", "rejected")
MODES = {"sanity": 100, "full": 1000, "paper": 10000}  # texts of the vector; a quarter as many again are held out


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
            raise UserError(f"texts {source!r}, row {number}: {error}") from error
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
        raise UserError(f"texts {source!r}: {usable} usable pairs{said}; {needed}")
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
        raise UserError(f"no transcript; {how}")
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


def extract(args):
    """The vector: mean differences of the two models' states; vector.safetensors, and what it was made from in manifest.json, in --out."""
    folder, count = Path(args.out), args.count or MODES[args.mode]
    documents, inputs = _inputs(args, count, count + max(1, count // 4))
    if is_done(folder / "manifest.json", inputs):
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
                    raise UserError(
                        f"{name}={inputs[f'{name}_path']!r}: its states of {side} texts hold NaN or infinity; expected finite ones"
                    )
                if name == "dpo":
                    _accumulate(sums, side, states[:, rows], new, keep[rows], rows >= count)
                states[:, rows] = new - states[:, rows] if name == "dpo" else new
            states.flush()
        del model
    kept = int(keep.sum())
    if kept == 0:
        raise UserError(
            "keep='preferred': the DPO model prefers the rejected text of every pair; expected --keep all, or another DPO model"
        )
    held_out = total - count
    tensors = {key: (value / (held_out if key.startswith("heldout_") else kept)).astype(np.float32) for key, value in sums.items()}
    if not tensors["chosen_last"].any():
        raise UserError(f"dpo={args.dpo!r}: its states equal those of sft={args.sft!r} on all texts; expected a model that training moved")
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
            raise UserError(f"dpo={args.dpo!r}: its tokenizer gives other ids than that of sft={args.sft!r}; expected the same")
        inputs |= {f"{name}_path": str(path), name: weights_hash(path)}
    sft, dpo = ((config.num_hidden_layers, config.hidden_size) for config in configs.values())
    if sft != dpo:
        raise UserError(f"dpo={args.dpo!r}: {dpo} layers and hidden size; expected those of sft={args.sft!r}, {sft}")
    if inputs["sft"] == inputs["dpo"]:
        raise UserError(f"dpo={args.dpo!r}: the same weights as sft={args.sft!r}; expected a model that training moved")
    return documents, inputs


def _check_room(folder, needed):
    """OSError now; a memory-mapped file that finds no room when it is written to is a SIGBUS, which says nothing."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"{folder}: {needed:,} bytes needed for the states of all texts, {free:,} free; expected more room, or fewer texts")


def is_done(path, inputs):
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
            raise UserError(f"{folder}: no manifest.json; expected a folder that steer.py extract wrote")
        file = open_safetensors(folder / "vector.safetensors")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        keep = tensors.pop("keep").numpy().astype(bool)
        manifest = json.loads((folder / "manifest.json").read_text())
        return cls(folder, tensors, keep, manifest | manifest["inputs"])

    def model(self, name):
        """(model, tokenizer) of "sft" or "dpo". ValueError when the folder no longer holds the weights that the vector was made from."""
        path, wanted = self.manifest[f"{name}_path"], self.manifest[name]
        found = weights_hash(path)
        if found != wanted:
            raise UserError(f"{path}: its weights hash to {found}, those of the vector in {self.folder} to {wanted}; extract again")
        return load_model(path)

    def layers(self, count):
        """The last `count` layers, ascending."""
        total = self.manifest["layers"]
        if not 1 <= count <= total:
            raise UserError(f"layers={count} (--layers; default: the published 5): expected 1 to {total}, the model's number of layers")
        return list(range(total - count, total))

    def texts(self, tokenizer):
        """{side: (documents that the vector is the mean of, documents held out)}. ValueError when the file no longer holds them."""
        m = self.manifest
        pairs = text_pairs(m["texts"], m["count"] + m["held_out"], tokenizer, m["template"], m["max_seq_len"])
        if hash_documents(pairs) != m["tokens"]:
            raise UserError(f"texts {m['texts']!r}: not the token ids of the vector in {self.folder}; expected the file unchanged")
        return {side: (list(itertools.compress(pairs[side], self.keep)), pairs[side][m["count"] :]) for side in SIDES}

    def additions(self, args, model, tokenizer, name="sft"):
        """What args.inject adds at the last args.layers layers of the model `name`: "sft", or "dpo" for lambdas below 0."""
        v, layers = self.tensors[f"{args.side}_{args.pooling}"], self.layers(args.layers)
        if args.inject != "matched":
            return additions(args.inject, v, layers)
        if self.manifest["compat"] == "hf":
            raise UserError("inject='matched': needs states of the space it writes to; expected a vector extracted without --compat hf")
        documents, _ = self.texts(tokenizer)[args.side]
        return match_additions(model, documents, v, layers, args.pooling, device_of(model), strength=1 if name == "sft" else -1)
