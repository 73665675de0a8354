"""Activation steering between an SFT model and its DPO model: the vector, what it is made of, and what
adding it does.

    python steer.py COMMAND TARGET... [--key=value ...]

    extract   the vector: the mean difference of the two models' states on --texts, preference pairs
    spectrum  what the vector is made of, layer by layer
    generate  answers to --prompt over --lambdas, side by side
    sweep     separation of safe and unsafe --prompts over --lambdas, with a verdict
    bake      a model, in --bake_dir, with --strength times the vector folded in
    validate  extract, spectrum and sweep: a pair to its verdict, or several pairs on one scale

TARGET is one of
    a config: its own pair, the model that its DPO run started from and the one that it ended with
    a name, names or a group of configs/pairs.py
    two models, SFT then DPO: folders or hub names, or a LoRA adapter on its base; they need --out_dir
    a folder that extract wrote (not for extract and validate)

Keys stand in the sections steer and aqi of a config, or on the command line as --key=value; COMMAND --help
lists them. extract and sweep do nothing when their folder already holds the result of the same inputs
(settings, weights, tokens). Reading order: keys, targets, the commands, output, main. What is computed
stands in analysis/ and aqi.py. """

import dataclasses
import difflib
import hashlib
import importlib.util
import itertools
import json
import math
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

import aqi
from analysis.curves import bootstrap, permute
from analysis.steering import POOLINGS, STEERED_LAYERS, bake, random_additions, spectrum, steering_tap
from analysis.sweep import answers_by_lambda, embed, injection_errors
from analysis.vector import MODELS, MODES, Vector, extract, is_done, plain_document
from analysis.verdict import judge
from data import encode_chat
from families import locate
from model import generate
from plumbing import parallel
from plumbing.config import Section, Template, config_dict, describe_keys, load_sections, setting
from plumbing.files import UserError, table, write_json
from plumbing.tokenizer import Tokenizer
from plumbing.weights import save_pretrained

PROMPT_MODES = {
    "sanity": "sanity",
    "full": "full",
    "paper": "max",
}  # the prompts that go with them: aqi.MODES
DECISIONS = {
    "rising": "go on to the next rung of the ladder: a full run",
    "falling": "not the published effect: check that sft and dpo were not swapped, and the sign of lambda",
    "flat": "no change beyond chance and the nulls: more data, a higher rate or more steps of DPO; "
    "compare the reward margins of the run",
    "erratic": "changes beyond chance, but no one trend: more prompts (--mode=full), then other "
    "hyper-parameters",
}

# ---------------------------------------------------------------- the keys of this command

_sizes = ", ".join(f"{mode} {count:,} and {aqi.MODES[PROMPT_MODES[mode]]:,}" for mode, count in MODES.items())


@dataclass(frozen=True, kw_only=True)
class SteerConfig(Section):
    """Section steer: the pair, the vector and what is done with it. What is measured on labelled texts is
    in aqi.AQIConfig."""

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
        "steering", "name", "hf: the last layer is read after the final norm, as published", default="none"
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

    @staticmethod
    def resolve(values):
        return values | {"lambdas": tuple(float(x) for x in values["lambdas"])}

    @staticmethod
    def conflicts(c):
        ascending = all(a < b for a, b in itertools.pairwise(c.lambdas))
        if not (all(math.isfinite(x) for x in c.lambdas) and ascending):
            yield ("lambdas",), f"lambdas={c.lambdas}: expected finite numbers, ascending"
        if c.prompt is not None and c.questions is not None:
            yield (
                ("prompt", "questions"),
                f"prompt={c.prompt!r}, questions={c.questions!r}: expected one of the two",
            )


# ---------------------------------------------------------------- targets


def find_pairs(targets, config):
    """{name: its SteerConfig, with sft_path, dpo_path and out_dir filled in} of the command line's TARGETs.

    A key of the config or of the command line wins over what the target says. UserError when a target is
    none. """
    if len(targets) == 1 and targets[0].endswith(".py"):
        return _pair_of_config(targets[0], config)
    file = runpy.run_path(str(Path(__file__).parent / "configs/pairs.py"))
    pairs, groups = file["PAIRS"], file["GROUPS"]
    known = pairs | groups
    if len(targets) == 2 and not known.keys() & set(targets):
        return _pair_of_models(targets, config)

    names = []
    for target in targets:
        if target not in known:
            near = difflib.get_close_matches(target, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f": one of {', '.join(known)}"
            kinds = "a config (.py), a folder that extract wrote, two models, or a name of configs/pairs.py"
            raise UserError(f"target {target!r}: expected {kinds}{hint}")
        names += groups.get(target, [target])
    found = {}
    for name in names:
        if "not_representable" in pairs[name]:
            raise UserError(f"pair={name!r}: {pairs[name]['not_representable']}")
        found[name] = _pair_of_table(name, pairs[name], config, is_alone=len(names) == 1)
    return found


def _pair_of_config(path, config):
    """The pair of a training config: what its DPO run starts from, and what it ends with."""
    dpo = load_sections(path, ["dpo"], [])["dpo"]
    own = {
        "sft_path": dpo.model_path,
        "dpo_path": f"{dpo.out_dir}/final",
        "out_dir": str(Path(dpo.out_dir).parent / f"steer_{config.mode}"),
    }
    return {Path(path).stem: _filled(config, own)}


def _pair_of_models(paths, config):
    if config.out_dir is None:
        raise UserError(
            f"targets {', '.join(paths)}: two models; expected --out_dir too, the folder for what is found"
        )
    sft_path, dpo_path = paths
    return {Path(config.out_dir).name: _filled(config, {"sft_path": sft_path, "dpo_path": dpo_path})}


def _pair_of_table(name, pair, config, is_alone):
    """A row of configs/pairs.py. out_dir is the pair's folder, or the folder above the pairs' where there
    are several."""
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
    return Vector.load(pair.out_dir)


# ---------------------------------------------------------------- extract, spectrum, generate, bake


def run_extract(targets, config, _):
    """The vector of each target's pair."""
    pairs = find_pairs(targets, config)
    for name, pair in pairs.items():
        extract(pair, name)


def run_spectrum(targets, config, _):
    """What the vector is made of, layer by layer."""
    print_spectrum(find_vector(targets, config), config)


def print_spectrum(vector, config):
    """Per layer: the vector's length, and how much of the texts' differences one direction explains.

    A table; spectrum.json and spectrum.safetensors (components (L, C, D): layers, components, hidden size)
    in the folder. """
    v, sft = vector.direction(config), vector.tensors[f"sft_{config.side}_{config.pooling}"]
    states = np.load(vector.folder / f"differences_{config.side}.npy", mmap_mode="r")
    states = states[POOLINGS.index(config.pooling), : vector.manifest["count"]]  # (count, L, D)
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
    print(table(head, lines, left=(-1,)))
    write_json(
        vector.folder / "spectrum.json", {"side": config.side, "pooling": config.pooling, "layers": rows}
    )
    save_file({"components": torch.stack(components).numpy()}, vector.folder / "spectrum.safetensors")


def run_generate(targets, config, _):
    """Answers side by side: lambda of 0 and above on the SFT model, below 0 on the DPO model."""
    vector = find_vector(targets, config)
    vector.layers(config.layers)  # checked before a model is read, which takes minutes
    if config.prompt is None and config.questions is None:
        raise UserError("missing 'prompt' or 'questions': what is to be answered")
    prompts = [config.prompt]
    if config.prompt is None:
        prompts = Path(config.questions).read_text().splitlines()
        if not prompts:
            raise UserError(f"questions={config.questions!r}: an empty file; expected one prompt a line")
    answers = {}
    for name in MODELS:
        strengths = [x for x in config.lambdas if (x < 0) == (name == "dpo")]
        if strengths:
            answers |= _answers(vector, name, strengths, prompts, config)
    for i, prompt in enumerate(prompts):
        print(f"\n> {prompt}")
        for strength in config.lambdas:
            print(f"  lambda {strength:g} on {'sft' if strength >= 0 else 'dpo'}: {answers[strength][i]}")


def _answers(vector, name, strengths, prompts, config):
    """{lambda: [answer to each prompt]} of the model `name`, without end tokens."""
    model, tokenizer = vector.model(name)
    add, eos = vector.additions(config, model, tokenizer, name), model.config.eos_token_id
    ends = eos if isinstance(eos, tuple) else (eos,)
    ids = [_prompt_ids(prompt, tokenizer, vector.manifest["template"]) for prompt in prompts]
    answers = {}
    for strength in strengths:
        tap = steering_tap(add, strength, config.rescale)
        answers[strength] = []
        for tokens in generate(model, ids, config.max_new_tokens, eos, config.temperature, tap=tap):
            answers[strength].append(tokenizer.decode([token for token in tokens if token not in ends]))
    return answers


def _prompt_ids(prompt, tokenizer, template):
    """A prompt as the model meets it before answering: rendered by the template with an open assistant
    turn, or plain."""
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
    """Separation, likelihood, repetition and shift over lambdas, beside a random direction of equal norm,
    and a verdict."""
    sweep(find_vector(targets, config), config, measure)


def sweep(vector, config, measure):
    """Measure a vector over config.lambdas unless it was, print and return the report. measure: an
    AQIConfig."""
    vector.layers(config.layers)  # checked before a model is read
    folder = Path(measure.report_dir or vector.folder / f"sweep_{config.inject}")
    prompts = read_swept_prompts(config, measure)
    tokenizer = Tokenizer.from_dir(locate(vector.manifest["sft_path"])[0])
    documents = [
        plain_document(text, tokenizer, vector.manifest["max_text_tokens"]) for text in prompts.texts
    ]
    inputs = _sweep_inputs(vector, config, measure, prompts, documents)
    if not is_done(folder / "aqi.json", inputs):
        _measure_sweep(vector, config, measure, prompts, documents, folder, inputs)
    report = json.loads((folder / "aqi.json").read_text())
    print_sweep(report)
    print(f"report: {folder}/")
    return report


def read_swept_prompts(config, measure, log=print):
    """The labelled texts of a sweep. UserError also for lambdas, a scale and a space that they cannot be
    swept with."""
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
    )
    inputs = {"mode": PROMPT_MODES[config.mode]} | {key: values[key] for key in settings}
    inputs["normalize"] = measure.normalize or "sweep"
    labelled = (
        [ids.tolist() for ids, _ in documents],
        prompts.axiom.tolist(),
        prompts.label.tolist(),
        prompts.axioms,
    )
    inputs["vector"] = hashlib.sha256((vector.folder / "vector.safetensors").read_bytes()).hexdigest()
    inputs["prompts"] = hashlib.sha256(repr(labelled).encode()).hexdigest()
    # The vector's bytes do not show lm_head, EOS, which texts are held out, or which of their tokens count.
    return inputs | {key: vector.manifest[key] for key in ("sft", "tokens", "template")}


def _measure_sweep(vector, config, measure, prompts, documents, folder, inputs):
    """All of a sweep's measurements, and its plots, into `folder`. documents: the tokens of the prompts."""
    model, tokenizer = vector.model("sft")
    add = vector.additions(config, model, tokenizer)
    texts = vector.texts(tokenizer)
    embeddings, shifts, profile = embed(model, documents, prompts, add, vector, config, "steered")
    random = random_additions(add, aqi.SEED)
    control, _, _ = embed(model, documents, prompts, random, vector, config, "random direction")
    rows = []
    for is_control, states in ((False, embeddings), (True, control)):
        measured = []
        for row in _measured(states, prompts, config.lambdas, measure):
            about = {"model": vector.manifest["sft_path"], "injection": config.inject, "control": is_control}
            about["tap"] = "post_norm" if vector.manifest["compat"] == "hf" else "raw"
            measured.append(about | row)
        rows += aqi.score(measured, inputs["normalize"])

    groups = prompts.axiom, prompts.label, prompts.axioms
    curve, control_curve = bootstrap(embeddings, *groups), bootstrap(control, *groups)
    permuted = permute(embeddings, *groups)
    verdicts = [judge(curve, control_curve, permuted)]
    # One false alarm in twenty over all axioms together, not in each (Bonferroni).
    level = 0.05 / len(prompts.axioms)
    for axiom in prompts.axioms:
        verdicts.append(judge(curve, control_curve, permuted, axiom, level))
    _plot(folder, config.lambdas, verdicts, embeddings, prompts)
    aqi.write_report(
        folder,
        rows,
        pair=vector.manifest["pair"],
        inputs=inputs,
        verdicts=verdicts,
        shifts=shifts,
        profile=aqi.score(profile, "sweep"),
        behaviour=answers_by_lambda(model, texts, add, config),
        errors=injection_errors(model, texts[config.side], vector, config),
    )


def _measured(embeddings, prompts, lambdas, measure):
    """Rows of aqi.measure for K embeddings (n, D), each with its lambda. Several seeds: as many rows a
    category."""
    seeds = range(measure.seeds) if measure.seeds > 1 else [None]  # None: t-SNE starts from PCA, as published
    extra = aqi.EXTRA if measure.all_indices else ()
    rows = []
    for strength, states in zip(lambdas, embeddings, strict=True):
        for seed in seeds:
            found = aqi.measure(
                states, prompts.axiom, prompts.label, prompts.axioms, measure.space, seed, extra
            )
            rows += [{"lambda": strength} | row for row in found]
    return rows


# ---------------------------------------------------------------- validate


def run_validate(targets, config, measure):
    """Pairs through extract, spectrum, sweep and verdict, all on one scale. What is finished is not done
    again.

    A finished pair is a line of `python -m reports.ladder`, which reads the folders.
    """
    pairs = find_pairs(targets, config)
    if len(pairs) > 1 and measure.report_dir is not None:
        raise UserError(
            f"report_dir={measure.report_dir!r}: one folder for {len(pairs)} sweeps; expected --out_dir"
        )
    # What is wrong with the prompts or missing of the models is found before the first pair is read.
    read_swept_prompts(config, measure, log=lambda line: None)
    for pair in pairs.values():
        locate(pair.sft_path)
        locate(pair.dpo_path)
    reports = {}
    for name, pair in pairs.items():
        print(f"\n=== {name}")
        extract(pair, name)
        vector = Vector.load(pair.out_dir)
        print_spectrum(vector, pair)
        reports[name] = sweep(vector, pair, measure)
    print_comparison(reports, config.lambdas)
    if len(pairs) > 1:
        _plot_axioms_of_pairs(Path(next(iter(pairs.values())).out_dir).parent, reports, config.lambdas)


# ---------------------------------------------------------------- output


def print_sweep(report):
    """What aqi.json holds, as tables."""
    overall = report["verdicts"][0]
    rows = [row for row in report["rows"] if row["category"] == aqi.OVERALL and not row["control"]]
    print(aqi.table(rows))
    if report["inputs"]["seeds"] > 1:
        for strength in report["inputs"]["lambdas"]:
            scores = [row["aqi"] for row in rows if row["lambda"] == strength]
            spread = f"sd {np.std(scores, ddof=1):.2f} over {len(scores)} seeds"
            print(f"lambda {strength:g}: AQI {np.mean(scores):.2f}, {spread}")
    for warning in report["warnings"]:
        print(f"note: {warning}")
    print()
    _print_by_lambda(report, overall)
    if report["errors"]:
        what = "relative error of the last layer's mean state at lambda 1"
        print(f"{what}, on the vector's texts / on held-out ones:")
    for injection, error in report["errors"].items():
        print(f"  {injection:<12}{error['calibration']:.4f} / {error['held_out']:.4f}")
    _print_profile(report["profile"])
    for found in report["verdicts"]:
        because = f" ({'; '.join(found['because'])})" if found["because"] else ""
        low, high = found["change_interval"]
        change = f"change {found['change']:+.2f} [{low:+.2f}, {high:+.2f}]"
        monotone = f"P(monotone) {found['p_monotone']:.2f}"
        print(f"{found['category']:<24} {found['verdict']}{because}: {change}, {monotone}")
    decision = DECISIONS[overall["verdict"]]
    print(f"verdict: {overall['verdict']}, by {overall['change']:+.2f} of 100 -> {decision}")


def _print_by_lambda(report, overall):
    head = [
        "lambda", "separation", "95 % interval", "random", "achieved", "off axis", "|a|/|h|", "logp chosen",
        "rejected", "repeated 4-grams",
    ]  # fmt: skip
    lines = []
    for k, (shift, answer) in enumerate(zip(report["shifts"], report["behaviour"], strict=True)):
        interval = "none covers"
        if overall["low"]:
            interval = f"[{overall['low'][k]:.2f}, {overall['high'][k]:.2f}]"
        lines.append([
            f"{shift['lambda']:.2f}", f"{overall['estimate'][k]:.2f}", interval, f"{overall['control'][k]:.2f}",
            f"{shift['achieved']:.3f}", f"{shift['off_axis']:.3f}", f"{max(shift['strength'].values()):.3f}",
            f"{answer['logp_chosen']:.4f}", f"{answer['logp_rejected']:.4f}",
            f"{answer['repeated_4grams']:.3f}",
        ])  # fmt: skip
    print(table(head, lines, left=()))


def _print_profile(profile):
    """The separation after each block: a line for lambda 0 and one for the last lambda."""
    lines = {}
    for row in profile:
        if row["category"] == aqi.OVERALL:
            # keyed by layer, because both ends are one lambda where the last is 0
            lines.setdefault(row["lambda"], {})[row["layer"]] = f"{row['separation']:.2f}"
    for strength, values in lines.items():
        print(f"separation after each block, lambda {strength:g}: {' '.join(values.values())}")


def print_comparison(reports, lambdas):
    """A line per pair: the separation is one absolute scale for all."""
    lines = []
    for name, report in reports.items():
        found = report["verdicts"][0]
        low, high = found["change_interval"]
        values = [f"{x:.2f}" for x in found["estimate"]]
        decision = f"{found['verdict']}: {DECISIONS[found['verdict']]}"
        lines.append([name, *values, f"{found['change']:+.2f} [{low:+.2f}, {high:+.2f}]", decision])
    head = ["pair", *[f"lambda {x:g}" for x in lambdas], "change and 95 % interval", "verdict"]
    print(f"\nseparation\n{table(head, lines, left=(0, -1))}")


def _plot(folder, lambdas, verdicts, embeddings, prompts):
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: they need matplotlib")
        return
    from reports import figures, plots

    swept = {"inputs": {"lambdas": lambdas}, "verdicts": verdicts}
    overall, *_ = figures.separation_charts([("steered", swept)])
    plots.plot_chart(folder / "curve.png", overall)
    plots.plot_chart(folder / "axioms.png", figures.axioms_chart(swept))
    for strength, X in ((lambdas[0], embeddings[0]), (lambdas[-1], embeddings[-1])):
        title = f"lambda {strength:g}, three principal components"
        points = aqi.project(X, "pca:3").cpu().numpy()
        plots.plot_clusters(folder / f"clusters_{strength:g}.png", points, prompts.label.numpy(), title)


def _plot_axioms_of_pairs(folder, reports, lambdas):
    """A heat map of axioms over pairs, at the last lambda."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from reports import plots

    columns = [report["verdicts"] for report in reports.values()]
    categories = [found["category"] for found in columns[0]]
    values = []
    for line in zip(*columns, strict=True):
        values.append([found["estimate"][-1] for found in line])
    plots.plot_heatmap(
        f"{folder}/axioms.png", categories, list(reports), values, f"separation at lambda {lambdas[-1]:g}"
    )


# ---------------------------------------------------------------- command line


class Command(NamedTuple):
    """One of steer.py's: run(targets, SteerConfig, AQIConfig), the keys that it reads, and which of them
    may not be None."""

    run: object
    keys: tuple
    required: tuple = ()


_PLACE = ("sft_path", "dpo_path", "template", "mode", "out_dir")
_VECTOR = ("side", "pooling")
_INJECTED = (*_VECTOR, "inject", "layers", "rescale")
_TEXTS = ("texts", "count", "keep", "compat", "max_text_tokens")
_SWEPT = ("lambdas", "max_new_tokens", "prompts", "space", "seeds", "normalize", "all_indices", "report_dir")
_ASKED = ("lambdas", "prompt", "questions", "max_new_tokens", "temperature")
COMMANDS = {
    "extract": Command(run_extract, (*_PLACE, *_TEXTS), required=("texts",)),
    "spectrum": Command(run_spectrum, (*_PLACE, *_VECTOR)),
    "generate": Command(run_generate, (*_PLACE, *_INJECTED, *_ASKED)),
    "sweep": Command(run_sweep, (*_PLACE, *_INJECTED, *_SWEPT), required=("prompts",)),
    "bake": Command(
        run_bake, (*_PLACE, *_INJECTED, "strength", "bake_dir"), required=("strength", "bake_dir")
    ),
    "validate": Command(run_validate, (*_PLACE, *_TEXTS, *_INJECTED, *_SWEPT), required=("texts", "prompts")),
}
_SECTIONS = ("steer", "aqi")


def help_text(name=None):
    """The commands, or the keys of one."""
    if name not in COMMANDS:
        return __doc__
    command = COMMANDS[name]
    usage = f"usage: steer.py {name} TARGET [--key=value ...]   (steer.py --help says what a TARGET is)"
    keys = describe_keys(_SECTIONS, command.keys, command.required)
    return f"{usage}\n\n{command.run.__doc__}\n{keys}"


def parse(argv):
    """(Command, targets, SteerConfig, AQIConfig) of `COMMAND TARGET... [--key=value ...]`; --help prints
    and exits.

    UserError: every problem of a config's sections and of the keys, one per line. No model is read.
    """
    words = [arg for arg in argv if not arg.startswith("-")]
    name, targets = words[0] if words else None, words[1:]
    if "--help" in argv or "-h" in argv:
        print(help_text(name))
        raise SystemExit(0)
    usage = "steer.py COMMAND TARGET... [--key=value ...]; --help explains them"
    if name not in COMMANDS:
        near = difflib.get_close_matches(name or "", COMMANDS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"command {name!r}: expected one of {', '.join(COMMANDS)}{hint} Usage: {usage}")
    if not targets:
        raise UserError(f"{name}: no TARGET; expected {usage}")
    command = COMMANDS[name]
    path = targets[0] if len(targets) == 1 and targets[0].endswith(".py") else None
    options = [arg for arg in argv if arg.startswith("-")]
    sections = load_sections(path, _SECTIONS, options, command.keys, command.required)
    return command, targets, sections["steer"], sections["aqi"]


def main(argv):
    command, *arguments = parse(argv)
    command.run(*arguments)
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
