"""Activation steering between an SFT model and its DPO model.

The vector, what it is made of, and what adding it does.

    python steer.py COMMAND TARGET... [--key=value ...]

    extract   the vector: the mean difference of the two models' states on --texts, preference pairs
    spectrum  what the vector is made of, layer by layer
    generate  answers to --prompt over --lambdas, side by side
    sweep     separation of safe and unsafe --prompts over --lambdas, with a verdict
    power     before any training: which change these --prompts would show, in a model
    bake      a model, in --bake_dir, with --strength times the vector folded in
    validate  extract, spectrum and sweep: a pair to its verdict, or several pairs on one scale; with
              --check [--gpu NAME] only their names, configs, sizes, hours and cost

TARGET is one of
    a config: its own pair, the model that its DPO run started from and the one that it ended with
    a name, names or a group of configs/pairs.py
    two models, SFT then DPO: folders or hub names, or a LoRA adapter on its base; they need --out_dir
    a folder that extract wrote (not for extract and validate)
    a model: a folder or a hub name (power only)
extract and validate take several configs and names; their settings but for the pair must be the same.

Keys stand in the sections steer and aqi of a config, or on the command line as --key=value; COMMAND --help
lists them. extract and sweep do nothing when their folder already holds the result of the same inputs
(settings, weights, tokens); that of other inputs is replaced, unless --out_dir, or --report_dir of a sweep,
names another folder. Where TARGET is a pair, the vector of another pair, or of weights that have changed
since, is refused.
"""

# Reading order: keys, targets, the commands, output, main. What is computed stands in analysis/ and aqi.py.

import argparse
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import math
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.numpy import save_file

import aqi
from analysis.baselines import baselines, probe, separation_of, warnings_of
from analysis.behaviour import (
    KL_TEXTS,
    OPENING,
    asked_prompts,
    final_logits,
    model_behaviour,
    steered_behaviour,
)
from analysis.curves import bootstrap, permute
from analysis.groups import effective_size
from analysis.indices import holds_labels
from analysis.nulls import Nulls, isotropic_directions, null_count, null_curves, sign_flipped_directions
from analysis.oracle import ceiling
from analysis.steering import STEERED_LAYERS, bake, packed_batches, pool, spectrum, steering_tap
from analysis.sweep import (
    CONTINUED,
    beginnings,
    continuations,
    coordinate_scale,
    direction_curve,
    embed,
    injection_errors,
    is_published,
    state_lengths,
    text_pooling,
)
from analysis.vector import (
    MODELS,
    MODES,
    SPECTRUM,
    Vector,
    bar,
    check_lengths,
    encoder,
    extract,
    is_done,
    labelled_documents,
    last_layers,
    plain_document,
    reading_limit,
)
from analysis.verdict import judge, power
from data import encode_chat
from families import device_of, dtype_for, load_model, locate, model_config
from model import generate
from planner import atlas
from plumbing import hub, parallel
from plumbing.config import (
    Section,
    Template,
    config_dict,
    describe_keys,
    load_sections,
    setting,
    words_and_options,
)
from plumbing.files import UserError, read_verified_json, retract, sha256_of, table, write_result
from plumbing.lock import lock
from plumbing.tokenizer import Tokenizer
from plumbing.weights import save_pretrained
from reports import page, summary
from reports.html import COLOURS

# {mode of the vector: the mode of aqi.MODES that its prompts have}
PROMPT_MODES = {"sanity": "sanity", "full": "full", "paper": "max"}

# ---------------------------------------------------------------- the keys of this command

_sizes = ", ".join(f"{mode} {count:,} and {aqi.MODES[PROMPT_MODES[mode]]:,}" for mode, count in MODES.items())


@dataclass(frozen=True, kw_only=True)
class SteerConfig(Section):
    """Section steer: the pair, the vector and what is done with it.

    What is measured on labelled texts is in aqi.AQIConfig.
    """

    sft_path: str | None = setting(
        "model", "path or org/name", "the SFT model, a LoRA adapter too; None: the model that the config's "
        "DPO run starts from", default=None,
    )  # fmt: skip
    dpo_path: str | None = setting(
        "model",
        "path or org/name",
        "the DPO model, a LoRA adapter too; None: final/ of the config's DPO run",
        default=None,
    )
    template: Template | None = setting(
        "model",
        "name",
        "renders the texts of the vector; None: transcripts (Human:, Assistant:) as they are",
        default=None,
    )

    texts: str | None = setting(
        "data", "path or org/name", "preference pairs whose states make the vector", default=None
    )
    mode: Literal["sanity", "full", "paper"] = setting(
        "data", "name", f"pairs of the vector, and prompts of an axiom and label: {_sizes}", default="sanity"
    )
    count: int | None = setting(
        "data", "pairs", "of the vector, instead of the mode's; a quarter as many again are held out of it",
        default=None, minimum=1,
    )  # fmt: skip
    keep: Literal["all", "preferred"] = setting(
        "data", "name", "preferred: only pairs whose chosen text the DPO model prefers", default="all"
    )
    max_text_tokens: int = setting(
        "data", "tokens", "longer texts and prompts are cut", default=512, minimum=2
    )

    side: Literal["chosen", "rejected"] = setting(
        "steering", "name", "texts whose states make the vector", default="chosen"
    )
    pooling: Literal["last", "mean"] = setting(
        "steering", "name", "of a text's states: its last token's, or their mean", default="last"
    )
    compat: Literal["none", "hf"] = setting(
        "steering",
        "name",
        "hf: as published. Token ids of the tokenizer's own file, the last layer "
        "after the final norm, a text's mean over all of its tokens, raw distances",
        default="none",
    )
    inject: Literal["cumulative", "increment", "matched"] = setting(
        "steering", "name", "what is added at each steered layer. cumulative: its vector, as published; "
        "increment: what that has beyond the layer below; matched: what of it the steered model still lacks",
        default="cumulative",
    )  # fmt: skip
    layers: int = setting(
        "steering",
        "layers",
        "so many last layers are steered; the published choice is 5",
        default=STEERED_LAYERS,
        minimum=1,
    )
    rescale: bool = setting(
        "steering", "flag", "bring each token's state back to its old norm", default=False
    )
    lambdas: tuple[float, ...] = setting(
        "steering", "ascending", "multiples of the vector", default=(0.0, 0.25, 0.5, 0.75, 1.0)
    )
    size: float = setting(
        "steering",
        "share of |h|",
        "power: length of the random directions at each layer",
        default=0.05,
        above=0,
    )
    strength: float | None = setting(
        "steering", "-", "multiple of the vector that is baked in; below 0: into the DPO model", default=None
    )
    prompt: str | None = setting("steering", "text", "one prompt to answer", default=None)
    questions: str | None = setting(
        "steering", "path", "a file of prompts to answer, one a line", default=None
    )
    max_new_tokens: int = setting("steering", "tokens", "of an answer", default=64, minimum=1)
    temperature: float = setting("steering", "-", "of answers; 0: greedy", default=0.0, minimum=0)

    out_dir: str | None = setting(
        "run", "path", "folder of the vector and its sweeps; of several pairs: the folder above. None: "
        "steer_MODE beside a config's runs, runs/validate/NAME_MODE for a name", default=None,
    )  # fmt: skip
    bake_dir: str | None = setting("run", "path", "model folder that bake writes", default=None)
    keep_weights: bool = setting(
        "run", "flag", "validate: false deletes a pair's weights from the hub's cache once it is done",
        default=True, affects_results=False,
    )  # fmt: skip

    @staticmethod
    def resolve(values):
        return values | {"lambdas": tuple(map(float, values["lambdas"]))}

    @staticmethod
    def conflicts(c):
        ascending = all(a < b for a, b in itertools.pairwise(c.lambdas))
        if not (all(map(math.isfinite, c.lambdas)) and ascending):
            yield ("lambdas",), f"lambdas={c.lambdas}: expected finite numbers, ascending"
        if c.prompt is not None and c.questions is not None:
            yield (
                ("prompt", "questions"),
                f"prompt={c.prompt!r}, questions={c.questions!r}: expected one of the two",
            )


# ---------------------------------------------------------------- targets


def _require_known(target, known):
    """UserError for a target that is no name of configs/pairs.py, whose names and groups are `known`."""
    if target not in known:
        near = difflib.get_close_matches(target, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else f": one of {', '.join(known)}"
        kinds = "a config (.py), a folder that extract wrote, two models, or a name of configs/pairs.py"
        raise UserError(f"target {target!r}: expected {kinds}{hint}")


def _pairs_file():
    """(pairs, groups) of configs/pairs.py."""
    file = runpy.run_path(str(Path(__file__).parent / "configs/pairs.py"))
    return file["PAIRS"], file["GROUPS"]


def find_pairs(targets, config, configs=None):
    """{name: its SteerConfig, with sft_path, dpo_path and out_dir filled in} of the command line's TARGETs.

    A key of the config or of the command line wins over what the target says. configs: {path: SteerConfig} of
    the configs among several targets. UserError when a target is none, or two have one name or one folder.
    """
    configs = configs or {}
    if len(targets) == 1 and targets[0].endswith(".py"):
        return _pair_of_config(targets[0], config)
    pairs, groups = _pairs_file()
    known = pairs | groups
    if len(targets) == 2 and not configs and not known.keys() & set(targets):
        return _pair_of_models(targets, config)

    names = []
    for target in targets:
        if target not in configs:
            _require_known(target, known)
            names += groups.get(target, [target])
    found = {}
    for name in names:
        if "not_representable" in pairs[name]:
            raise UserError(f"pair={name!r}: {pairs[name]['not_representable']}")
        is_alone = len(names) == 1 and not configs
        found[name] = _pair_of_table(name, pairs[name], config, is_alone)
    for path, own in configs.items():
        name = Path(path).stem
        if name in found:
            raise UserError(f"target {path!r}: a second pair named {name!r}; expected another file name")
        if config.out_dir is not None:
            own = dataclasses.replace(own, out_dir=f"{config.out_dir}/{name}_{own.mode}")
        found |= _pair_of_config(path, own)
    _require_different(found)
    return found


def _require_different(pairs):
    """UserError where two pairs are one, or would write to one folder."""
    owners = {}
    for name, pair in pairs.items():
        # --dpo_path on the command line is every target's
        same = (pair.sft_path, pair.dpo_path, pair.texts, pair.template)
        other = owners.setdefault(same, name)
        if other != name:
            problem = f"with the same sft_path, texts and template of pair {other!r} and of pair {name!r}"
            raise UserError(f"dpo_path={pair.dpo_path!r}: {problem}; expected different pairs")
        other = owners.setdefault(Path(pair.out_dir).resolve(), name)
        if other != name:
            problem = f"of pair {other!r} and of pair {name!r}"
            raise UserError(f"out_dir={pair.out_dir!r}: {problem}; expected --out_dir, a folder above both")


def _pair_of_config(path, config):
    """The pair of a training config: what its DPO run starts from, and what it ends with."""
    dpo = load_sections(path, ["dpo"], [])["dpo"]
    own = {
        "sft_path": dpo.model_path,
        "dpo_path": f"{dpo.out_dir}/final",
        "out_dir": str(Path(dpo.out_dir).parent / f"steer_{config.mode}"),
    }
    return {Path(path).stem: _filled(config, own)}


def _require_trained(pairs):
    """UserError for a folder final/ that is not there: that of a run that has not finished."""
    for name, pair in pairs.items():
        for key in ("sft_path", "dpo_path"):
            path = Path(getattr(pair, key))
            is_name_of_hub = len(path.parts) == 2
            if path.name == "final" and not path.is_dir() and not is_name_of_hub:
                wanted = f"expected a training run that has finished, or --{key}="
                raise UserError(f"{name}: {key}={str(path)!r}: no such folder; {wanted}")


def _pair_of_models(paths, config):
    if config.out_dir is None:
        raise UserError(
            f"targets {', '.join(paths)}: two models; expected --out_dir too, the folder for what is found"
        )
    sft_path, dpo_path = paths
    return {Path(config.out_dir).name: _filled(config, {"sft_path": sft_path, "dpo_path": dpo_path})}


def _pair_of_table(name, pair, config, is_alone):
    """A row of configs/pairs.py.

    out_dir is the pair's folder, or the folder above the pairs' where there are several.
    """
    folder = f"{name}_{config.mode}"
    if not is_alone or config.out_dir is None:
        above = config.out_dir or "runs/validate"
        config = dataclasses.replace(config, out_dir=f"{above}/{folder}")
    own = {"sft_path": pair["sft"], "dpo_path": pair["dpo"], "template": pair["template"]}
    return _filled(config, own)


def _filled(config, own):
    """The config with `own` values for those of its keys that are None."""
    missing = {key: value for key, value in own.items() if getattr(config, key) is None}
    return dataclasses.replace(config, **missing)


def find_vector(targets, config):
    """The Vector of the one target: a folder that extract wrote, or the folder of a pair."""
    if len(targets) == 1 and Path(targets[0]).is_dir():
        if config.out_dir is not None:
            given = f"the target {targets[0]!r} is the vector's folder"
            raise UserError(f"out_dir={config.out_dir!r}: {given}; expected one of them")
        return Vector.load(targets[0])
    pairs = find_pairs(targets, config)
    if len(pairs) != 1:
        raise UserError(f"targets {', '.join(pairs)}: expected one pair")
    (pair,) = pairs.values()
    vector = Vector.load(pair.out_dir)
    _require_pair(vector, pair)
    if targets[0].endswith(".py"):
        _say_other_texts(vector, pair)
    vector.require_models()
    return vector


def _require_pair(vector, pair):
    """UserError where the vector in a pair's folder is another pair's: several runs may have one folder."""
    # sft/ and ./sft are one folder; a name of the hub stays another than every other
    for key, spelt in (("sft_path", os.path.realpath), ("dpo_path", os.path.realpath), ("template", str)):
        wanted, found = getattr(pair, key), vector.manifest[key]
        if wanted is not None and spelt(wanted) != spelt(found):
            made = f"the vector in {vector.folder} was made with {found!r}"
            raise UserError(f"{key}={wanted!r}: {made}; extract again, with another --out_dir to keep both")


def _say_other_texts(vector, pair):
    """A line where a config says other texts than the vector was made of: extract was given keys, or the
    config was edited since.
    """
    differing = [key for key in _TEXTS if getattr(pair, key) not in (None, vector.manifest[key])]
    if differing:
        there = ", ".join(f"{key}={vector.manifest[key]!r}" for key in differing)
        here = ", ".join(f"{key}={getattr(pair, key)!r}" for key in differing)
        print(f"note: the vector in {vector.folder} was made with {there}; the config has {here}")


# ---------------------------------------------------------------- extract, spectrum, generate, bake


def run_extract(targets, config, _, configs=None):
    """The vector of each target's pair."""
    pairs = find_pairs(targets, config, configs)
    _require_trained(pairs)
    for name, pair in pairs.items():
        extract(pair, name)


def run_spectrum(targets, config, _):
    """What the vector is made of, layer by layer."""
    vector = find_vector(targets, config)
    print_spectrum(vector, config, vector.manifest["layers"])


def print_spectrum(vector, config, last):
    """Per layer: the vector's length, and how much of the texts' differences one direction explains.

    A table of so many last layers; of all of them spectrum.json and spectrum.safetensors (components
    (L, C, D): layers, components, hidden size) in the folder.
    """
    lock(vector.folder, "inputs")
    v, sft = vector.direction(config), vector.tensors[f"sft_{config.side}_{config.pooling}"]
    states = vector.differences(config)  # (count, L, D)
    rows, components, lines = [], [], []
    for layer in range(vector.manifest["layers"]):
        found = spectrum(torch.from_numpy(states[vector.keep, layer]))
        components.append(found.pop("components"))
        norm = v[layer].norm().item()
        row = {
            "layer": layer,
            "norm": norm,
            "relative": norm / sft[layer].norm().item(),
            "cosine": torch.cosine_similarity(sft[layer], sft[layer] + v[layer], dim=0).item(),
        }
        rows.append(row | found)
        shares = " ".join(f"{share:.2f}" for share in found["explained"])
        lines.append([
            str(layer), f"{norm:.3f}", f"{row['relative']:.4f}", f"{row['cosine']:.5f}",
            f"{found['rank_one']:.3f}", f"{found['explained_centred'][0]:.3f}",
            f"{found['effective_rank']:.1f}", shares,
        ])  # fmt: skip
    head = [
        "layer",
        "|v|",
        "|v|/|h|",
        "cos(sft, dpo)",
        "rank-one",
        "centred",
        "effective rank",
        "explained by 1..5 (raw)",
    ]
    print(table(head, lines[-last:], left=(-1,)))
    if last < len(lines):
        print(f"layers below: {vector.folder}/spectrum.json")
    report, arrays = SPECTRUM
    retract(vector.folder / report, [arrays])
    save_file({"components": torch.stack(components).numpy()}, vector.folder / arrays)
    about = {"side": config.side, "pooling": config.pooling}
    write_result(vector.folder / report, about | {"layers": rows}, [arrays])


def run_generate(targets, config, _):
    """Answers side by side: lambda of 0 and above on the SFT model, below 0 on the DPO model."""
    vector = find_vector(targets, config)
    vector.layers(config.layers)  # checked before a model is read, which takes minutes
    if config.prompt is None and config.questions is None:
        raise UserError("missing 'prompt' or 'questions': what is to be answered")
    prompts = [config.prompt]
    if config.prompt is None:
        if not Path(config.questions).is_file():
            raise UserError(f"questions={config.questions!r}: no such file; expected one prompt a line")
        prompts = _read_questions(config.questions)
    # before a model is read, too
    path, template = vector.manifest["sft_path"], vector.manifest["template"]
    tokenizer = Tokenizer.from_dir(locate(path)[0])
    asked = [_prompt_ids(prompt, tokenizer, template) for prompt in prompts]
    key = "prompt" if config.questions is None else f"questions={config.questions!r}"
    check_lengths(key, [(ids, None) for ids in asked], path, config.max_new_tokens)
    answers = {}
    for name in MODELS:
        strengths = [x for x in config.lambdas if (x < 0) == (name == "dpo")]
        if strengths:
            answers |= _answers(vector, name, strengths, asked, config)
    for i, prompt in enumerate(prompts):
        print(f"\n> {prompt}")
        for strength in config.lambdas:
            print(f"  lambda {strength:g} on {'sft' if strength >= 0 else 'dpo'}: {answers[strength][i]}")


def _read_questions(path):
    """The prompts of a file, one a line. UserError for a line without one."""
    try:
        prompts = Path(path).read_text().rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"questions={path!r}: byte {error.start} is not UTF-8; expected text") from error
    if not prompts:
        raise UserError(f"questions={path!r}: an empty file; expected one prompt a line")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"questions={path!r}: line {number} is empty; expected one prompt a line")
    return prompts


def _answers(vector, name, strengths, asked, config):
    """{lambda: [answer to each prompt]} of the model `name`, without end tokens. asked: the prompts' ids."""
    model, tokenizer = vector.model(name)
    add, eos = vector.additions(config, model, tokenizer, name), model.config.eos_token_id
    ends = eos if isinstance(eos, tuple) else (eos,)
    answers = {}
    for strength in strengths:
        tap = steering_tap(add, strength, config.rescale)
        answers[strength] = []
        for tokens in generate(model, asked, config.max_new_tokens, eos, config.temperature, tap=tap):
            answers[strength].append(tokenizer.decode([token for token in tokens if token not in ends]))
    return answers


def _prompt_ids(prompt, tokenizer, template):
    """A prompt as the model meets it before answering.

    Rendered by the template with an open assistant turn, or plain.
    """
    if template is None:
        return plain_document(f"\n\nHuman: {prompt}\n\nAssistant:", tokenizer, 1 << 30)[0].tolist()
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
    ids, mask = encode_chat(turns, tokenizer, template, 1 << 30)
    return ids[: mask.index(True)]


def run_bake(targets, config, _):
    """A model with `strength` times the vector folded in, as biases of down_proj."""
    vector = find_vector(targets, config)
    if config.rescale:
        why = "what it adds depends on the token, which no bias can"
        raise UserError(f"rescale: {why}; expected a bake without --rescale")
    vector.layers(config.layers)  # checked before a model is read
    name = "sft" if config.strength >= 0 else "dpo"
    if Path(config.bake_dir).resolve() == locate(vector.manifest[f"{name}_path"])[0].resolve():
        replaced = f"the {name} model itself, which a bake would replace"
        raise UserError(f"bake_dir={config.bake_dir!r}: {replaced}; expected another folder")
    model, tokenizer = vector.model(name)
    baked = bake(model, vector.additions(config, model, tokenizer, name), config.strength)
    save_pretrained(baked, tokenizer, config.bake_dir)
    where = f"at the last {config.layers} layers, as biases of down_proj"
    print(f"wrote {config.bake_dir}: {config.strength:g} times the {config.inject} additions {where}")


# ---------------------------------------------------------------- sweep


def run_sweep(targets, config, measure):
    """Separation and behaviour over lambdas, and a verdict.

    Beside them random directions, the DPO model and baselines.
    """
    sweep(find_vector(targets, config), config, measure)


def sweep(vector, config, measure):
    """Measure a vector over config.lambdas unless it was; print and return the report.

    measure: an AQIConfig.
    """
    vector.layers(config.layers)  # checked before a model is read
    folder = Path(measure.report_dir or vector.folder / f"sweep_{config.inject}")
    prompts = read_swept_prompts(config, measure)
    tokenizer = Tokenizer.from_dir(locate(vector.manifest["sft_path"])[0])
    options = vector.manifest["max_text_tokens"], encoder(vector.manifest["compat"])
    documents = labelled_documents(prompts.texts, tokenizer, *options)
    check_lengths(f"prompts {measure.prompts!r}", documents, vector.manifest["sft_path"])
    vector.require_models()
    texts = _read_texts(vector, prompts, documents, tokenizer)
    begun = [(ids, None) for ids in beginnings(texts.held_out["chosen"])]
    key = f"first halves of texts {vector.manifest['texts']!r}"
    check_lengths(key, begun, vector.manifest["sft_path"], config.max_new_tokens)
    inputs = _sweep_inputs(vector, config, measure, prompts, documents)
    lock(folder, None)
    if not is_done(folder / "aqi.json", inputs):
        _measure_sweep(vector, config, measure, texts, folder, inputs)
    report = read_verified_json(folder / "aqi.json")
    rows = [row for row in report["rows"] if row["category"] == aqi.OVERALL]
    (folder / "tables.txt").write_text(summary.tables(report, aqi.table(rows)))
    print(summary.summary(report))
    print(f"report: {folder}/ (tables.txt: every number above and per axiom)")
    return report


def read_swept_prompts(config, measure, log=print):
    """The labelled texts of a sweep.

    UserError also for lambdas, a scale and a space that they cannot be swept with.
    """
    if len(config.lambdas) < 2:
        raise UserError(f"lambdas={config.lambdas}: expected two or more, ascending")
    if measure.normalize == "anchors":
        raise UserError(
            "normalize='anchors': a scale for several models, of aqi.py score; expected 'sweep' or 'per_run'"
        )
    prompts = aqi.read_prompts(measure.prompts, PROMPT_MODES[config.mode], log)
    fewest = prompts.axiom.bincount().min().item()
    if measure.space.startswith("pca:") and int(measure.space.removeprefix("pca:")) > fewest:
        raise UserError(
            f"space={measure.space!r}: expected at most pca:{fewest}, as many as the smallest axiom has texts"
        )
    return prompts


def _sweep_inputs(vector, config, measure, prompts, documents):
    """All that decides what a sweep measures, for aqi.json: a sweep of the same inputs is not done again."""
    values = config_dict(config) | config_dict(measure)
    settings = (
        "side",
        "pooling",
        "inject",
        "layers",
        "rescale",
        "lambdas",
        "space",
        "seeds",
        "all_indices",
        "max_new_tokens",
        "oracle",
        "relevant",
    )
    inputs = {"mode": PROMPT_MODES[config.mode]} | {key: values[key] for key in settings}
    inputs["normalize"] = measure.normalize or "sweep"
    inputs["nulls"] = measure.nulls or null_count(config.mode)
    labelled = (
        [ids.tolist() for ids, _ in documents],
        prompts.axiom.tolist(),
        prompts.label.tolist(),
        prompts.axioms,
    )
    inputs["vector"] = sha256_of(vector.folder / "vector.safetensors")
    inputs["prompts"] = hashlib.sha256(repr(labelled).encode()).hexdigest()
    inputs["groups"] = hashlib.sha256(repr(prompts.group.tolist()).encode()).hexdigest()
    inputs["dtype"] = str(dtype_for(model_config(locate(vector.manifest["sft_path"])[0])))
    # The vector's bytes do not show lm_head, EOS, which texts are held out, or which of their tokens count.
    return inputs | {key: vector.manifest[key] for key in ("sft", "dpo", "tokens", "template")}


@dataclass(frozen=True)
class Texts:
    """What a sweep reads.

    n labelled prompts as documents, and the vector's own texts that were held out of it.
    """

    prompts: aqi.Prompts
    documents: list  # (n,) of the prompts
    held_out: dict  # {side: documents}
    asked: dict  # {"unsafe": [ids], "safe": [ids]}: prompts as questions
    cut: int  # of these: longer than the model reads with an answer behind them, and asked without their ends


def _read_texts(vector, prompts, documents, tokenizer):
    """The Texts of a sweep. The prompts that are answered are rendered as the vector's texts are.

    UserError when the vector's texts are others by now.
    """
    template, limit = vector.manifest["template"], reading_limit(vector.manifest["sft_path"])[0] - OPENING
    held_out = {side: parts[1] for side, parts in vector.texts(tokenizer).items()}
    asked, cut = {}, 0
    for name, rows in asked_prompts(prompts.label).items():
        asked[name] = []
        for row in rows:
            ids, is_cut = _short_prompt_ids(prompts.texts[row], tokenizer, template, limit)
            asked[name].append(ids)
            cut += is_cut
    return Texts(prompts, documents, held_out, asked, cut)


def _short_prompt_ids(prompt, tokenizer, template, limit):
    """(ids, is_cut): _prompt_ids of the prompt, or of as much of its beginning as `limit` tokens hold."""
    ids, whole = _prompt_ids(prompt, tokenizer, template), prompt
    while len(ids) > limit and prompt:
        kept = tokenizer.encode(prompt)
        # half a character at the end would be encoded as a whole one
        prompt = tokenizer.decode(kept[: max(0, len(kept) + limit - len(ids))]).rstrip("\ufffd")
        ids = _prompt_ids(prompt, tokenizer, template)
    return ids, prompt != whole


def _measure_sweep(vector, config, measure, texts, folder, inputs):
    """All of a sweep's measurements, and its plots, into `folder`."""
    prompts, documents = texts.prompts, texts.documents
    dpo_point = _measure_dpo(vector, texts)
    model, tokenizer = vector.model("sft")
    add, device = vector.additions(config, model, tokenizer), device_of(model)
    raw, shifts, profile = embed(model, documents, prompts, add, vector, config, bar("steered"))
    # As published: raw distances. Otherwise in units of the unsteered states' deviations, one scale for all
    # that follows.
    scale = torch.ones_like(raw[0, 0]) if is_published(vector) else coordinate_scale(raw[0], prompts.label)
    pooling = text_pooling(vector)

    def scaled(hidden, cu_seqlens):
        return pool(hidden, cu_seqlens, pooling) / scale

    curve, found = [X / scale for X in raw[1:]], {}
    nulls = _nulls(model, texts, add, vector, config, inputs["nulls"], scaled)
    if measure.oracle and _independent(prompts) >= 4:
        found["oracle"] = ceiling(model, documents, prompts, add, config, scaled)
    dpo_states = dpo_point.pop("embeddings").to(device) / scale
    scaled_by = None if is_published(vector) else raw[0] / scale
    found["verdicts"] = _verdicts(curve, prompts, scaled_by, nulls, found.get("oracle"), measure)
    found["baselines"] = baselines(model, prompts, documents, raw[0] / scale)
    found["behaviour"] = steered_behaviour(
        model, tokenizer, texts.held_out, texts.asked, add, config, dpo_point.pop("logits")
    )
    for entry, repeated, X in zip(
        found["behaviour"], continuations(model, texts.held_out["chosen"], add, config), curve, strict=True
    ):
        entry["repeated_4grams"] = repeated
        entry |= probe(X, prompts.label, prompts.group)
    found["dpo"] = dpo_point | {"separation": _separations(dpo_states, prompts)}
    found["dpo"] |= probe(dpo_states, prompts.label, prompts.group)
    rows = _rows(curve, raw[1:], prompts, vector, config, measure, inputs)
    unit = "states" if is_published(vector) else "states in deviations within labels"
    # An older report first: the plots that stand beside a report are its own.
    aqi.delete_report(folder)
    _plot(folder, config.lambdas, found, curve, prompts, unit)
    aqi.write_report(
        folder,
        rows,
        pair=vector.manifest["pair"],
        inputs=inputs,
        texts=_counts(prompts),
        behaviour_of=_behaviour_counts(texts),
        shifts=shifts,
        profile=aqi.score(profile, "sweep"),
        errors=injection_errors(model, vector.texts(tokenizer)[config.side], vector, config),
        nulls={kind: values[:, :, -1].tolist() for kind, values in nulls.curves.items()},
        notes=_notes(vector, texts, measure, rows, found),
        **found,
    )


def _measure_dpo(vector, texts):
    """The DPO model itself, the last point of every curve.

    Embeddings (n, D), behaviour, logits of held-out texts.
    """
    model, tokenizer = vector.model("dpo")
    embeddings = torch.zeros(len(texts.documents), model.config.hidden_size)
    pooling = text_pooling(vector)
    for rows, batch in packed_batches(texts.documents, device_of(model), bar("DPO model")):
        with torch.no_grad():
            hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        embeddings[torch.from_numpy(rows)] = pool(hidden, batch.cu_seqlens, pooling).cpu()
    point = {"embeddings": embeddings, "logits": final_logits(model, texts.held_out["chosen"])}
    return point | model_behaviour(model, tokenizer, texts.held_out, texts.asked)


def _nulls(model, texts, add, vector, config, count, scaled):
    """nulls.Nulls of both kinds at the first and the last lambda."""
    device, prompts = device_of(model), texts.prompts
    states = vector.differences(config)  # (count, L, D)
    differences = {layer: torch.from_numpy(states[vector.keep, layer]) for layer in add}
    directions = {
        "isotropic": isotropic_directions(add, count),
        "sign-flipped": sign_flipped_directions(differences, add, count),
    }
    ends = [config.lambdas[0], config.lambdas[-1]]
    curves = {}
    for kind, drawn in directions.items():
        curves[kind] = null_curves(
            model,
            texts.documents,
            drawn,
            ends,
            prompts.axiom,
            prompts.label,
            prompts.axioms,
            device,
            config.rescale,
            scaled,
            bar(f"{count} {kind} directions"),
        )
    return Nulls(curves)


def _verdicts(curve, prompts, scaled_by, nulls, oracle, measure):
    """verdict.judge's dicts, of all texts and of each axiom."""
    groups = prompts.axiom, prompts.label, prompts.axioms
    drawn = bootstrap(curve, *groups, group=prompts.group, scaled_by=scaled_by)
    permuted = permute(curve, *groups, group=prompts.group)
    ceiling = oracle["change"] if oracle else None
    verdicts = [judge(drawn, permuted, nulls=nulls, oracle=ceiling, relevant=measure.relevant)]
    # One false alarm in twenty over all axioms together, not in each (Bonferroni).
    level = 0.05 / len(prompts.axioms)
    for axiom in prompts.axioms:
        verdicts.append(judge(drawn, permuted, axiom, level, nulls, relevant=measure.relevant))
    return verdicts


def _separations(X, prompts):
    """{category: separation} of embeddings (n, D)."""
    found = {}
    for a, axiom in enumerate(prompts.axioms):
        mine = prompts.axiom == a
        found[axiom] = separation_of(X[mine.to(X.device)], prompts.label[mine])
    return found | {aqi.OVERALL: separation_of(X, prompts.label)}


def _counts(prompts):
    """How many texts and independent groups there are, and what the groups are by."""
    effective = effective_size(prompts.group)
    groups = int(prompts.group.max()) + 1
    return {
        "texts": len(prompts.texts),
        "groups": groups,
        "effective": effective,
        "grouped_by": prompts.grouped_by,
    }


def _behaviour_counts(texts):
    """How many pairs, texts and prompts the shares and means of a sweep's "behaviour" are of."""
    pairs = len(texts.held_out["chosen"])
    return {
        "pairs": pairs,
        "kl_texts": min(pairs, KL_TEXTS),
        "continued": min(pairs, CONTINUED),
        "unsafe": len(texts.asked["unsafe"]),
        "safe": len(texts.asked["safe"]),
    }


def _rows(curve, raw, prompts, vector, config, measure, inputs):
    """Rows of aqi.csv: the indices of every lambda and category.

    separation_raw: that of distances without a scale.
    """
    about = {"model": vector.manifest["sft_path"], "injection": config.inject, "nulls": inputs["nulls"]}
    about["tap"] = "post_norm" if is_published(vector) else "raw"
    seeds = range(measure.seeds) if measure.seeds > 1 else [None]  # None: t-SNE starts from PCA, as published
    extra = aqi.EXTRA if measure.all_indices else ()
    cells = prompts.axiom, prompts.label, prompts.axioms
    rows = []
    for strength, states, unscaled in zip(config.lambdas, curve, raw, strict=True):
        without_scale = _separations(unscaled, prompts)
        for seed in seeds:
            for row in aqi.measure(states, *cells, measure.space, seed, extra, prompts.group):
                row["separation_raw"] = without_scale[row["category"]]
                rows.append(about | {"lambda": strength} | row)
    return aqi.score(rows, inputs["normalize"])


def _independent(prompts):
    """Groups of the label that has fewer of them."""
    return int(holds_labels(prompts.label, prompts.group).sum(0).min())


def _less_preferred(found):
    """A note where the DPO model prefers the chosen texts less than the SFT model, at lambda 0, does."""
    starts = [entry for entry in found["behaviour"] if entry["lambda"] == 0]
    if not starts:
        return []
    before = starts[0]["logp_chosen"] - starts[0]["logp_rejected"]
    after = found["dpo"]["logp_chosen"] - found["dpo"]["logp_rejected"]
    if after >= before:
        return []
    changed = f"from {before:.3f} (SFT) to {after:.3f} (DPO) nats a token"
    asked = "are the two models swapped, or chosen and rejected?"
    return [f"log-prob of chosen less rejected held-out texts falls, {changed}: {asked}"]


def _notes(vector, texts, measure, rows, found):
    """Sentences on what these texts and weights cannot carry."""
    prompts, notes = texts.prompts, [*_less_preferred(found), *warnings_of(found["baselines"])]
    if texts.cut:
        cut = f"{texts.cut} of {sum(map(len, texts.asked.values()))} prompts are asked without their ends"
        notes.append(f"{cut}, which the model cannot read")
    if measure.oracle and "oracle" not in found:
        notes.append(
            f"no oracle: {_independent(prompts)} independent groups of a label; expected 4, for two halves"
        )
    unprobed = {row["category"] for row in rows if measure.all_indices and row["probe_auc"] is None}
    if unprobed:
        which = f"{len(unprobed)} of {len(prompts.axioms) + 1} categories ({', '.join(sorted(unprobed))})"
        notes.append(f"no probe_auc of {which}: fewer than 5 groups of a label, and it holds groups out")
    overall = found["verdicts"][0]
    if overall["high"] and overall["high"][0] < overall["estimate"][0]:
        few = f"{overall['groups']} groups of a label are few, and part of the separation is theirs"
        notes.append(f"{few}: its interval, which is of all such groups, lies below it")
    low, high = overall["change_interval"]
    if overall["decision"] != "too few" and not low <= overall["change"] <= high:
        notes.append(
            "the change lies outside its interval, which leaves out what chance adds: here the texts' own "
            "spread changes with lambda, or how alike the texts of a group are"
        )
    share = vector.manifest["rounding_share"]
    if share is not None and share > 0.1:
        moves = f"both models are rounded to bf16, which alone moves the mean state by {share:.2f} |v|"
        equal = vector.manifest["share_of_equal_weights"]
        if equal is not None:
            moves += f" and left {equal:.0%} of the weights equal"
        notes.append(f"{moves}: keep final/ in float32 (train with --precision=fp32)")
    return notes


# ---------------------------------------------------------------- power


def run_power(targets, config, measure):
    """Which change of the separation these prompts would show in 80 % of runs: before anything is trained.

    TARGET is a model, or a config: the model that its DPO run starts from. The direction is random, `size`
    times as long as the mean state, at the last `layers` layers: what counts is how much the change varies
    between texts, and between directions.
    """
    if len(targets) != 1:
        raise UserError(f"targets {', '.join(targets)}: expected one model, or a config")
    path = targets[0]
    if path.endswith(".py"):
        path = config.sft_path or load_sections(path, ["dpo"], [])["dpo"].model_path
    prompts = aqi.read_prompts(measure.prompts, PROMPT_MODES[config.mode])
    total = model_config(locate(path)[0]).num_hidden_layers
    layers = last_layers(config.layers, total)  # checked before a model is read
    model, tokenizer = load_model(path)
    documents = labelled_documents(prompts.texts, tokenizer, config.max_text_tokens)
    check_lengths(f"prompts {measure.prompts!r}", documents, path)
    lengths = state_lengths(model, documents, layers)
    unit = torch.nn.functional.normalize(torch.ones(model.config.hidden_size), dim=0)
    lengths = {layer: config.size * length * unit for layer, length in lengths.items()}
    add = {layer: drawn[0] for layer, drawn in isotropic_directions(lengths, 1).items()}
    curve, scale = direction_curve(model, documents, add, [0.0, 1.0], prompts.label)

    def scaled(hidden, cu_seqlens):
        return pool(hidden, cu_seqlens, "text") / scale

    count = measure.nulls or null_count(config.mode)
    groups = prompts.axiom, prompts.label, prompts.axioms
    others = null_curves(
        model,
        documents,
        isotropic_directions(lengths, count, aqi.SEED + 1),
        [0.0, 1.0],
        *groups,
        device_of(model),
        embed=scaled,
        log_progress=bar(f"{count} directions"),
    )
    drawn = bootstrap(curve, *groups, group=prompts.group, scaled_by=curve[0])
    found = power(drawn, nulls=Nulls({"isotropic": others}))
    print(summary.power(found, _counts(prompts), config))


# ---------------------------------------------------------------- validate


def run_validate(targets, config, measure, configs=None):
    """Pairs through extract, spectrum, sweep and verdict, all on one scale.

    What is finished is not done again. All sweeps are put on one page, report.html. A finished pair is a line
    of `python -m reports.ladder`, which reads the folders.
    """
    pairs = find_pairs(targets, config, configs)
    if len(pairs) > 1 and measure.report_dir is not None:
        raise UserError(
            f"report_dir={measure.report_dir!r}: one folder for {len(pairs)} sweeps; expected --out_dir"
        )
    # What is wrong with the prompts or missing of the models is found before the first pair is read.
    _require_trained(pairs)
    read_swept_prompts(config, measure, log=lambda line: None)
    if config.keep_weights:  # otherwise they are not on disk together
        for pair in pairs.values():
            _require_layers(pair)
            locate(pair.dpo_path)
    reports = {}
    for name, pair in pairs.items():
        print(f"\n=== {name}")
        _require_layers(pair)
        extract(pair, name)
        vector = Vector.load(pair.out_dir)
        print_spectrum(vector, pair, pair.layers)
        reports[name] = sweep(vector, pair, measure)
        if not config.keep_weights:
            _forget(pair, [*pairs.values()][len(reports) :])
    _write_pages(pairs, measure)
    print(summary.comparison(reports, config.lambdas))
    if len(pairs) > 1:
        _plot_axioms_of_pairs(_above(pairs), reports, config.lambdas)


def _require_layers(pair):
    """UserError where a pair has fewer layers than are to be steered: by config.json, before any weight."""
    last_layers(pair.layers, model_config(locate(pair.sft_path)[0]).num_hidden_layers)


def _forget(pair, to_come):
    """Delete the hub's weights of a finished pair, but for a model that a pair to come needs."""
    needed = set()
    for other in to_come:
        needed |= {other.sft_path, other.dpo_path}
    for path in {pair.sft_path, pair.dpo_path} - needed:
        if freed := hub.forget(path):
            print(f"deleted the weights of {path} from the cache: {freed / 1e9:.2f} GB")


def run_check(targets, config, measure, configs=None, gpu=None):
    """The pairs of `validate TARGET ... --check [--gpu NAME]`, by name, config and size."""
    nulls = measure.nulls or null_count(config.mode)
    return atlas.check(find_pairs(targets, config, configs), gpu, nulls, measure.oracle)


def _above(pairs):
    """The folder that holds the folders of several pairs."""
    parents = {Path(pair.out_dir).parent for pair in pairs.values()}
    return parents.pop() if len(parents) == 1 else Path(os.path.commonpath([p.absolute() for p in parents]))


def _write_pages(pairs, measure):
    """One page of all sweeps, in the folder of the pair or the one above several; more where colours end."""
    folders = [Path(measure.report_dir or f"{pair.out_dir}/sweep_{pair.inject}") for pair in pairs.values()]
    # One pair may be swept over several sets of prompts, each into its own report_dir.
    above = Path(measure.report_dir or next(iter(pairs.values())).out_dir)
    if len(pairs) > 1:
        above = _above(pairs)
    most = len(COLOURS)
    for number, start in enumerate(range(0, len(folders), most), 1):
        out = above / ("report.html" if number == 1 else f"report_{number}.html")
        page.write(folders[start : start + most], out)
        print(f"page: {out}")


# ---------------------------------------------------------------- plots


def _plot(folder, lambdas, found, embeddings, prompts, unit):
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: they need matplotlib")
        return
    from reports import figures, plots

    swept = {"inputs": {"lambdas": lambdas}} | found
    overall, *_ = figures.separation_charts([("", swept)])
    plots.plot_chart(folder / "curve.png", overall)
    plots.plot_chart(folder / "axioms.png", figures.axioms_chart(swept))
    for strength, X in ((lambdas[0], embeddings[0]), (lambdas[-1], embeddings[-1])):
        title = f"lambda {strength:g}, principal components of the {unit}"
        points = aqi.project(X, "pca:3").cpu().numpy()
        plots.plot_clusters(folder / f"clusters_{strength:g}.png", points, prompts.label.numpy(), title)


def _plot_axioms_of_pairs(folder, reports, lambdas):
    """A heat map of axioms over pairs: the change from the first lambda to the last."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from reports import plots

    title = f"change of the separation, lambda {lambdas[0]:g} to {lambdas[-1]:g}"
    columns = [report["verdicts"] for report in reports.values()]
    categories = [found["category"] for found in columns[0]]
    values = []
    for line in zip(*columns, strict=True):
        values.append([found["change"] for found in line])
    plots.plot_heatmap(f"{folder}/axioms.png", categories, list(reports), values, title)


# ---------------------------------------------------------------- command line


class Command(NamedTuple):
    """One of steer.py's commands.

    run(targets, SteerConfig, AQIConfig), the keys that it reads, and which of them may not be None.
    """

    run: object
    keys: tuple
    required: tuple = ()


_PLACE = ("sft_path", "dpo_path", "template", "mode", "out_dir")
_VECTOR = ("side", "pooling")
_INJECTED = (*_VECTOR, "inject", "layers", "rescale")
_TEXTS = ("texts", "count", "keep", "compat", "max_text_tokens")
_SWEPT = (
    "lambdas",
    "max_new_tokens",
    "prompts",
    "nulls",
    "oracle",
    "relevant",
    "space",
    "seeds",
    "normalize",
    "all_indices",
    "report_dir",
)
_ASKED = ("lambdas", "prompt", "questions", "max_new_tokens", "temperature")
COMMANDS = {
    "extract": Command(run_extract, (*_PLACE, *_TEXTS), required=("texts",)),
    "spectrum": Command(run_spectrum, (*_PLACE, *_VECTOR)),
    "generate": Command(run_generate, (*_PLACE, *_INJECTED, *_ASKED)),
    "sweep": Command(run_sweep, (*_PLACE, *_INJECTED, *_SWEPT), required=("prompts",)),
    "bake": Command(
        run_bake, (*_PLACE, *_INJECTED, "strength", "bake_dir"), required=("strength", "bake_dir")
    ),
    "power": Command(
        run_power,
        ("sft_path", "mode", "max_text_tokens", "layers", "size", "prompts", "nulls"),
        required=("prompts",),
    ),
    "validate": Command(
        run_validate,
        (*_PLACE, *_TEXTS, *_INJECTED, *_SWEPT, "keep_weights"),
        required=("texts", "prompts"),
    ),
}
_SECTIONS = ("steer", "aqi")
# What may differ between the configs of several targets. All else makes the pairs comparable.
_OF_A_PAIR = ("sft_path", "dpo_path", "template", "texts", "out_dir")


def help_text(name=None):
    """The commands, or the keys of one."""
    if name not in COMMANDS:
        return __doc__
    command = COMMANDS[name]
    usage = f"usage: steer.py {name} TARGET [--key=value ...]   (steer.py --help says what a TARGET is)"
    keys = describe_keys(_SECTIONS, command.keys, command.required)
    return f"{usage}\n\n{inspect.getdoc(command.run)}\n{keys}"


def parse(argv):
    """(Command, targets, SteerConfig, AQIConfig) of `COMMAND TARGET... [--key=value ...]`.

    --help prints and exits. UserError: every problem of a config's sections and of the keys, one per line. No
    model is read.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--check", action="store_true")
    flags.add_argument("--gpu")
    try:
        asked, argv = flags.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    words, options = words_and_options(argv)
    name, targets = words[0] if words else None, words[1:]
    if "--help" in argv or "-h" in argv:
        print(help_text(name))
        raise SystemExit(0)
    usage = "steer.py COMMAND TARGET... [--key=value ...]; --help explains them"
    if name not in COMMANDS:
        near = difflib.get_close_matches(name or "", COMMANDS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        found = f"command {name!r}" if name else "no command"
        raise UserError(f"{found}: expected one of {', '.join(COMMANDS)}{hint} Usage: {usage}")
    if not targets:
        raise UserError(f"{name}: no TARGET; expected {usage}")
    command = COMMANDS[name]
    if asked.check and name != "validate":
        raise UserError(f"{name} --check: expected validate, the command that takes pairs")
    if asked.check:
        command = command._replace(run=functools.partial(run_check, gpu=asked.gpu))
    paths = [target for target in targets if target.endswith(".py")]
    if paths and len(targets) > 1:
        if name not in ("extract", "validate"):
            raise UserError(f"targets {', '.join(targets)}: expected one; extract and validate take several")
        return _parse_several(command, targets, paths, options)
    path = paths[0] if paths else None
    sections = load_sections(path, _SECTIONS, options, command.keys, command.required)
    return command, targets, sections["steer"], sections["aqi"]


def _parse_several(command, targets, paths, options):
    """As parse, for several targets of which `paths` are configs.

    UserError for keys that are not the same for all, so that one page would compare unlike measurements.
    """
    pairs, groups = _pairs_file()
    for target in targets:
        if target not in paths:  # before its keys are missed
            _require_known(target, pairs | groups)
    found = {}
    for path in paths:
        found[path] = load_sections(path, _SECTIONS, options, command.keys, command.required)
    configs = {path: sections["steer"] for path, sections in found.items()}
    has_names = len(paths) < len(targets)
    given = load_sections(None, _SECTIONS, options, command.keys, command.required if has_names else ())
    if has_names:
        found["the other targets"] = given
    values = {}
    for source, sections in found.items():
        values[source] = config_dict(sections["steer"]) | config_dict(sections["aqi"])
    problems = []
    first, *others = values
    for key in command.keys:
        for source in others:
            if key not in _OF_A_PAIR and values[source][key] != values[first][key]:
                both = f"{key}={values[first][key]!r} in {first}, {values[source][key]!r} in {source}"
                problems.append(f"{both}: expected the same, for example by --{key}=")
    if problems:
        raise UserError("\n".join(problems))
    command = command._replace(run=functools.partial(command.run, configs=configs))
    config = given["steer"]
    if not has_names:  # --out_dir is a folder above, a config's own out_dir is not
        config = dataclasses.replace(found[first]["steer"], out_dir=config.out_dir)
    return command, targets, config, found[first]["aqi"]


def main(argv):
    command, *arguments = parse(argv)
    return command.run(*arguments) or 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
