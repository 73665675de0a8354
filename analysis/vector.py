"""The steering vector: the texts it is made of, reading them in both models, and its files.

Shapes: n texts, N of a batch, L layers, D hidden size; states of both poolings are (2, n, L, D). `config`
is a steer.SteerConfig.
"""

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.numpy import save

from analysis.steering import (
    POOLINGS,
    additions,
    document_logps,
    match_additions,
    mean_states,
    packed_batches,
    read_states,
)
from data import PairReader, resolve_template
from families import device_of, dtype_for, load_model, locate, model_config, weights_hash
from model import LlamaConfig
from plumbing import hub
from plumbing.files import (
    UserError,
    progress_bar,
    read_verified_json,
    retract,
    verify_hashes,
    write_result,
    write_whole,
)
from plumbing.lock import lock
from plumbing.tensors import open_safetensors
from plumbing.tokenizer import Tokenizer
from plumbing.weights import stored_weights

SIDES = ("chosen", "rejected")
MODELS = ("sft", "dpo")
FILES = ("vector.safetensors", *(f"differences_{side}.npy" for side in SIDES))  # beside manifest.json
SPECTRUM = ("spectrum.json", "spectrum.safetensors")  # what `steer.py spectrum` writes: report, arrays
MODES = {
    "sanity": 100,
    "full": 1000,
    "paper": 10000,
}  # texts of the vector; a quarter as many again are held out

# ---------------------------------------------------------------- texts


def plain_document(text, tokenizer, max_tokens):
    """A text as (input_ids, loss_mask).

    BOS where the tokenizer has one, then the text; every token counts.
    """
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = (ids + tokenizer.encode(text))[:max_tokens]
    return np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)


def published_document(text, tokenizer, max_tokens):
    """A text with the token ids of the published scripts.

    BOS and EOS only where the tokenizer's own file adds them.
    """
    ids = published_core(tokenizer.files["tokenizer.json"]).encode(text).ids[:max_tokens]
    return np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)


@functools.cache
def published_core(file):
    """The tokenizer of a tokenizer.json (bytes) with its post-processor, as transformers runs it."""
    core = tokenizers.Tokenizer.from_str(file.decode())
    core.no_truncation()
    core.no_padding()
    return core


def encoder(compat):
    """How a text becomes a document: published_document for compat "hf", else plain_document."""
    return published_document if compat == "hf" else plain_document


def labelled_documents(texts, tokenizer, max_tokens, encode=plain_document, log=print):
    """The documents of labelled texts, cut at max_tokens; those that were cut are counted through `log`."""
    documents, truncated = [], 0
    for text in texts:
        ids, mask = encode(text, tokenizer, 1 << 30)
        documents.append((ids[:max_tokens], mask[:max_tokens]))
        truncated += len(ids) > max_tokens
    if truncated:
        log(f"prompts: {truncated:,} of {len(texts):,} texts truncated at max_text_tokens={max_tokens}")
    return documents


def check_lengths(key, documents, path, answer=0):
    """UserError for documents of config key `key` that the model at `path` cannot read, as in training.

    answer: so many tokens are written behind each of them.
    """
    limit, name = reading_limit(path)
    longest = max(len(ids) for ids, _ in documents)
    if longest + answer > limit:
        found = f"the longest text has {longest:,} tokens"
        wanted = f"expected at most {name}={limit} of {path!r}"
        if answer:
            raise UserError(f"{key}: {found}, and {answer:,} are written behind it; {wanted}")
        raise UserError(f"{key}: {found}; {wanted}, by --max_text_tokens={limit}")


def reading_limit(path):
    """(tokens, name of the config.json key) that a text may have for the model at `path`; inf without any."""
    config = model_config(locate(path)[0])
    # Gemma 2's windows are masked; a Llama's (Mistral's) are not.
    names = ["max_position_embeddings"] + ["sliding_window"] * isinstance(config, LlamaConfig)
    limits = [(getattr(config, name), name) for name in names if getattr(config, name)]
    return min(limits, default=(math.inf, ""))


def text_pairs(source, count, tokenizer, template, max_tokens, encode=plain_document, held_out=0, log=print):
    """{"chosen": documents, "rejected": documents} of a preference source.

    Of the first `count` usable rows, then of the next `held_out` ones whose prompts are not among these.
    template None: the transcripts as they are ("Human:", "Assistant:"), as published; else conversations
    rendered by it. Rows are checked, dropped and counted as in DPO (data.PairReader), in one line of `log`.
    """
    if template is not None:
        resolve_template(template, tokenizer)  # an unknown one is refused
    reader = PairReader("texts", source, tokenizer, template, max_tokens, encode)
    documents, prompts, seen = {side: [] for side in SIDES}, set(), set()
    for prompt, pair in reader.pairs(seen):
        for side, document in zip(SIDES, pair, strict=True):
            documents[side].append(document)
        prompts.add(prompt)
        usable = len(documents["chosen"])
        if usable == count + held_out:
            break
        # No prompt on both sides: what is measured on held-out pairs would be of the vector's own.
        if usable == count:
            seen |= prompts
    usable = len(documents["chosen"])
    kept = {"of the vector" if held_out else "pairs": min(count, usable)}
    if held_out:
        kept["held out"] = usable - kept["of the vector"]
    if usable < count + held_out:
        needed = f"expected {count} pairs, and {held_out} of other prompts to hold out"
        raise UserError(f"{reader.describe(kept)}; {needed} (--count=N asks for N and a quarter of N)")
    reader.check(kept)
    log(reader.describe(kept))
    return documents


def hash_documents(documents):
    """sha256 (hex) of both sides' token ids."""
    digest = hashlib.sha256()
    for side in SIDES:
        for ids, _ in documents[side]:
            digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


# ---------------------------------------------------------------- extract


def bar(label):
    """A progress bar, with rate and ETA, around the batches of a pass."""
    return lambda plan: progress_bar(plan, desc=label, unit="batch")


def extract(config, name):
    """Write the vector of a pair into config.out_dir.

    vector.safetensors, and in manifest.json what it was made from. The vector is the mean difference of the
    states of config.dpo_path and config.sft_path. name: the pair's, for the manifest. One model is in memory
    at a time: the SFT model's states of every text wait in differences_SIDE.npy.
    """
    folder = Path(config.out_dir)
    count = config.count or MODES[config.mode]
    documents, inputs = _inputs(config, count, count + max(1, count // 4))
    lock(folder, "inputs")
    if is_done(folder / "manifest.json", inputs):
        return
    # The manifest is written last: without it, what a killed extraction left behind is no vector.
    of_another = (*FILES, *SPECTRUM)
    retract(folder / "manifest.json", of_another)
    for stale in of_another:
        (folder / stale).unlink(missing_ok=True)

    layers, hidden_size = _shape(config.sft_path)
    shape = (len(POOLINGS), count + inputs["held_out"], layers, hidden_size)
    _check_room(folder, len(SIDES) * 4 * math.prod(shape))
    model, _ = load_model(config.sft_path, is_precise=True)
    for side in SIDES:
        states = np.lib.format.open_memmap(
            folder / f"differences_{side}.npy", "w+", dtype=np.float32, shape=shape
        )
        for rows, new in _states_of(model, documents, side, "sft", config):
            states[:, rows] = new
        states.flush()
    del model

    model, _ = load_model(config.dpo_path, is_precise=True)
    keep = np.arange(shape[1]) < count  # the rest is held out of the vector
    if config.keep == "preferred":
        keep &= preferred(model, documents)
    sums = defaultdict(float)
    for side in SIDES:
        states = np.lib.format.open_memmap(
            folder / f"differences_{side}.npy", "r+", dtype=np.float32, shape=shape
        )
        for rows, new in _states_of(model, documents, side, "dpo", config):
            _accumulate(sums, side, states[:, rows], new, keep[rows], rows >= count)
            states[:, rows] = new - states[:, rows]
        states.flush()
    rounding = {"share_of_equal_weights": None, "noise": None}
    if _is_rounded(model):
        rounding["share_of_equal_weights"] = share_of_equal_weights(model, config.sft_path)
        rounding["noise"] = rounding_noise(model, documents["chosen"][:count])  # last: it changes the model
    _write_vector(config, name, sums, keep[:count], inputs, shape, rounding)


def _states_of(model, documents, side, name, config):
    """Yield (rows (N,), states (2, N, L, D) float32) of the texts of a side.

    UserError for NaN or infinity.
    """
    for rows, batch in packed_batches(documents[side], device_of(model), bar(f"{name}, {side}")):
        states = read_states(model, batch, compat_hf=config.compat == "hf").cpu().numpy()
        if not np.isfinite(states).all():
            path = getattr(config, f"{name}_path")
            raise UserError(
                f"{name}={path!r}: its states of {side} texts hold NaN or infinity; expected finite ones"
            )
        yield rows, states


def _write_vector(config, name, sums, keep, inputs, shape, rounding):
    """Means of the sums, which pairs were kept (count,), then hashes and manifest, into config.out_dir."""
    folder, count, kept = Path(config.out_dir), len(keep), int(keep.sum())
    if kept == 0:
        preferring = "the DPO model prefers the rejected text of every pair"
        raise UserError(f"keep='preferred': {preferring}; expected --keep=all, or another DPO model")
    tensors = {"keep": keep.astype(np.uint8)}
    for key, total in sums.items():
        number = inputs["held_out"] if key.startswith("heldout_") else kept
        tensors[key] = (total / number).astype(np.float32)
    if not tensors["chosen_last"].any():
        equal = f"its states equal those of sft={config.sft_path!r} on all texts"
        raise UserError(f"dpo={config.dpo_path!r}: {equal}; expected a model that training moved")
    write_whole(folder / "vector.safetensors", save(tensors))
    noise = rounding["noise"]
    made = {
        "pair": name,
        "layers": shape[2],
        "hidden_size": shape[3],
        "kept": kept,
        "share_of_equal_weights": rounding["share_of_equal_weights"],
        "rounding_share": noise and noise / float(np.linalg.norm(tensors["chosen_last"][-1])),
        "torch": torch.__version__,
        "hub": hub.COMMITS,
    }
    write_result(folder / "manifest.json", {"inputs": inputs} | made, FILES)
    said = f"{kept} of {count} pairs kept ({kept / count:.0%}), {inputs['held_out']} held out"
    print(f"wrote {folder}/vector.safetensors: {said}")


def _inputs(config, count, total):
    """The documents of the vector, and all that decides it.

    UserError when the models are one, or of two shapes or vocabularies.
    """
    inputs = {key: getattr(config, key) for key in ("texts", "template", "compat", "keep", "max_text_tokens")}
    inputs |= {"count": count, "held_out": total - count}
    shapes = {}
    for name in MODELS:
        path = getattr(config, f"{name}_path")
        shapes[name] = _shape(path)
        tokenizer = Tokenizer.from_dir(locate(path)[0])
        encode = encoder(config.compat)
        # Said once, of the SFT model's: the DPO model's are refused below where they are not the same.
        log = print if name == "sft" else _silent
        options = config.template, config.max_text_tokens, encode, total - count, log
        documents = text_pairs(config.texts, count, tokenizer, *options)
        for side in SIDES:
            check_lengths(f"texts {config.texts!r}", documents[side], path)
        tokens = hash_documents(documents)
        inputs |= {f"{name}_path": path, name: weights_hash(path)}
        if inputs.setdefault("tokens", tokens) != tokens:
            other = f"its tokenizer gives other ids than that of sft={config.sft_path!r}"
            raise UserError(f"dpo={config.dpo_path!r}: {other}; expected the same")
    if shapes["sft"] != shapes["dpo"]:
        wanted = f"those of sft={config.sft_path!r}, {shapes['sft']}"
        raise UserError(f"dpo={config.dpo_path!r}: {shapes['dpo']} layers and hidden size; expected {wanted}")
    inputs["dtype"] = str(dtype_for(model_config(locate(config.sft_path)[0]), is_precise=True))
    if inputs["sft"] == inputs["dpo"]:
        same = f"the same weights as sft={config.sft_path!r}"
        raise UserError(f"dpo={config.dpo_path!r}: {same}; expected a model that training moved")
    if note := _another_base(config, inputs):
        print(note)
    return documents, inputs


def _another_base(config, inputs):
    """A line where the DPO model is an adapter whose base is not the SFT model, else None.

    inputs: of _inputs. The hash of an adapter is its base's, +, its own.
    """
    base, plus, _ = inputs["dpo"].partition("+")
    if not plus or base == inputs["sft"]:
        return None
    # Training may have gone on from the SFT model's own adapter, which the weights do not show.
    unless = ", unless it went on from the adapter of sft" * inputs["sft"].startswith(f"{base}+")
    bases = f"its base {locate(config.dpo_path)[0]} ({base[:12]}) is not sft={config.sft_path!r}"
    holds = f"({inputs['sft'][:12]}): the vector also holds what parts these two"
    return f"note: dpo={config.dpo_path!r}: an adapter, {bases} {holds}{unless}"


def _silent(line):
    """A log for what was said before."""


def _shape(path):
    """(layers, hidden size) of the model at a path."""
    config = model_config(locate(path)[0])
    return config.num_hidden_layers, config.hidden_size


def last_layers(count, total):
    """The last `count` of `total` layers, ascending. UserError where there are fewer."""
    if not 1 <= count <= total:
        wanted = f"expected 1 to {total}, the model's number of layers"
        raise UserError(f"layers={count} (default: the published 5): {wanted}")
    return list(range(total - count, total))


def _check_room(folder, needed):
    """OSError where the disk has no room for a memory-mapped file.

    Later, when it is written to, this would be a SIGBUS, without a message.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        wanted = f"{needed:,} bytes needed for the states of all texts, {free:,} free"
        raise OSError(errno.ENOSPC, f"{wanted}; expected more room, or fewer texts", str(folder))


def is_done(path, inputs):
    """Whether `path`, the report of a result, is there and of the same inputs. Says so, or what differs."""
    if not path.is_file():
        return False
    before = read_verified_json(path).get("inputs", {})
    differing = [key for key in inputs | before if inputs.get(key) != before.get(key)]
    found = "finished, of the same inputs"
    if differing:
        found = f"made from other {', '.join(differing)}: done again, in its place"
    print(f"{path}: {found}")
    return not differing


def _is_rounded(model):
    """Whether every weight is a value of bf16."""
    return all(torch.equal(param, param.bfloat16().to(param.dtype)) for param in model.parameters())


@torch.no_grad()
def share_of_equal_weights(model, sft_path):
    """Share of the model's weights that have the same value in the SFT model's files; None for an adapter.

    A step of DPO that is smaller than half of bf16's spacing leaves a rounded weight where it was.
    """
    folder, adapter = locate(sft_path)
    if adapter is not None:
        return None
    stored, _ = stored_weights(folder)
    equal = total = 0
    for name, param in model.named_parameters():
        if name in stored:  # one of two tied weights is in no file
            before = stored[name][:].to(param.device, param.dtype)
            equal += (param == before).sum().item()
            total += param.numel()
    return equal / total


@torch.no_grad()
def rounding_noise(model, documents):
    """By how much rounding to bf16 of two models' weights moves a mean state.

    It is the last layer's mean last-token state. A bf16 weight stands for all values within half a step of
    it. Moving each weight by a uniform draw from that interval and reading again shows one rounding; two
    independent ones are sqrt(2) of it. The model is changed: the caller is done with it.
    """
    device = device_of(model)
    before = mean_states(model, documents, device)[0, -1]
    generator = torch.Generator(device).manual_seed(0)
    for param in model.parameters():
        # bf16 keeps 8 significant bits.
        step = torch.exp2(param.float().abs().clamp(min=2.0**-126).log2().floor() - 7)
        noise = torch.rand(param.shape, generator=generator, device=device) - 0.5
        param.copy_(param.float() + noise * step)
    after = mean_states(model, documents, device)[0, -1]
    return 2**0.5 * (after - before).norm().item()


def _accumulate(sums, side, sft, dpo, keep, held_out):
    """Add a batch to the float64 sums (L, D) of every key.

    sft, dpo (2, N, L, D); keep, held_out (N,) bool.
    """
    for p, pooling in enumerate(POOLINGS):
        parts = {
            f"{side}_{pooling}": (dpo[p, keep].astype(np.float64) - sft[p, keep]),
            f"sft_{side}_{pooling}": sft[p, keep],
            f"heldout_{side}_{pooling}": (dpo[p, held_out].astype(np.float64) - sft[p, held_out]),
        }
        for key, values in parts.items():
            sums[key] += values.sum(axis=0, dtype=np.float64)


def preferred(model, documents):
    """(n,) bool: pairs whose chosen text the model finds likelier, by mean log-prob per token.

    NaN, so not preferred, for a text without any token.
    """
    means = {side: np.zeros(len(documents[side])) for side in SIDES}
    for side in SIDES:
        for rows, batch in packed_batches(documents[side], device_of(model), bar(f"log-probs, {side}")):
            logps, counts = document_logps(model, batch)
            means[side][rows] = (logps / counts).cpu().numpy()
    return means["chosen"] > means["rejected"]


# ---------------------------------------------------------------- on disk and back


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
        # not the differences: they are GBs, and read by few
        verify_hashes(folder, lambda name: name in ("manifest.json", "vector.safetensors"))
        file = open_safetensors(folder / "vector.safetensors")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        keep = tensors.pop("keep").numpy().astype(bool)
        manifest = json.loads((folder / "manifest.json").read_text())
        return cls(folder, tensors, keep, manifest | manifest["inputs"])

    def differences(self, config):
        """(count, L, D) float32, memory-mapped: each text's difference of states.

        DPO model less SFT model, of config.pooling.
        """
        name = f"differences_{config.side}.npy"
        verify_hashes(self.folder, lambda listed: listed == name)
        states = np.load(self.folder / name, mmap_mode="r")
        return states[POOLINGS.index(config.pooling), : self.manifest["count"]]

    def model(self, name):
        """(model, tokenizer) of "sft" or "dpo".

        UserError when the folder no longer holds the weights that the vector was made from.
        """
        self._require_weights(name)
        return load_model(self.manifest[f"{name}_path"])

    def require_models(self):
        """As model(), of both, which are not read.

        Of folders: a model of the hub changes here with its revision only, and may be deleted (keep_weights).
        """
        for name in MODELS:
            if Path(self.manifest[f"{name}_path"]).is_dir():
                self._require_weights(name)

    def _require_weights(self, name):
        path, wanted = self.manifest[f"{name}_path"], self.manifest[name]
        found = weights_hash(path)
        if found != wanted:
            vector = f"those of the vector in {self.folder} to {wanted}"
            raise UserError(f"{path}: its weights hash to {found}, {vector}; extract again")

    def layers(self, count):
        """The last `count` layers, ascending."""
        return last_layers(count, self.manifest["layers"])

    def direction(self, config):
        """(L, D): the vector of config.side and config.pooling."""
        return self.tensors[f"{config.side}_{config.pooling}"]

    def texts(self, tokenizer):
        """{side: (documents that the vector is the mean of, documents held out)}.

        UserError when the file no longer holds them.
        """
        m = self.manifest
        options = m["template"], m["max_text_tokens"], encoder(m["compat"]), m["held_out"], _silent
        pairs = text_pairs(m["texts"], m["count"], tokenizer, *options)
        if hash_documents(pairs) != m["tokens"]:
            found = f"not the token ids of the vector in {self.folder}"
            raise UserError(f"texts {m['texts']!r}: {found}; expected the file unchanged")
        parts = {}
        for side in SIDES:
            kept = list(itertools.compress(pairs[side], self.keep))
            parts[side] = kept, pairs[side][m["count"] :]
        return parts

    def additions(self, config, model, tokenizer, name="sft"):
        """What config.inject adds at the last config.layers layers of the model `name`.

        name: "sft", or "dpo" for lambdas below 0.
        """
        v, layers = self.direction(config), self.layers(config.layers)
        if config.inject != "matched":
            return additions(config.inject, v, layers)
        if self.manifest["compat"] == "hf":
            needs = "needs states of the space it writes to"
            raise UserError(f"inject='matched': {needs}; expected a vector extracted without --compat=hf")
        documents, _ = self.texts(tokenizer)[config.side]
        strength = 1 if name == "sft" else -1
        return match_additions(model, documents, v, layers, config.pooling, device_of(model), strength)
