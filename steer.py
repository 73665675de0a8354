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
import hashlib
import importlib.util
import itertools
import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

import aqi
from analysis.steering import (
    INJECTIONS,
    POOLINGS,
    STEERED_LAYERS,
    additions,
    bake,
    document_logps,
    match_additions,
    mean_states,
    pool,
    random_additions,
    spectrum,
    steered_runs,
    steering_tap,
)
from analysis.vector import MODES, SIDES, Vector, bar, extract, is_done, plain_document
from analysis.verdict import bootstrap, judge, permute
from data import encode_chat
from families import device_of, locate
from model import generate
from plumbing import parallel
from plumbing.files import UserError, write_json
from plumbing.tokenizer import Tokenizer
from plumbing.weights import save_pretrained

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


# ---------------------------------------------------------------- extract


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
        raise UserError(f"prompts={args.prompts!r}: an empty file; expected one prompt a line")
    if not args.temperature >= 0:
        raise UserError(f"temperature={args.temperature}: expected 0 (greedy) or more")
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
        raise UserError(f"strength={args.strength}: expected a finite number")
    if args.rescale:
        raise UserError("rescale: what it adds depends on the token, which no bias can; expected a bake without --rescale")
    vector.layers(args.layers)  # what cannot be is refused before a model is read
    name = "sft" if args.strength >= 0 else "dpo"
    if Path(args.out).resolve() == locate(vector.manifest[f"{name}_path"])[0].resolve():
        raise UserError(f"out={args.out!r}: the {name} model itself, which a bake would replace; expected another folder")
    model, tokenizer = vector.model(name)
    baked = bake(model, vector.additions(args, model, tokenizer, name), args.strength)
    save_pretrained(baked, tokenizer, args.out)
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
    if not is_done(folder / "aqi.json", inputs):
        _measure_sweep(args, vector, prompts, documents, folder, inputs)
    report = json.loads((folder / "aqi.json").read_text())
    _print_sweep(report)
    print(f"report: {folder}/")
    return report


def _swept_prompts(args, mode, log=print):
    """The labelled texts of a sweep. ValueError also for lambdas, seeds and a space that they cannot be swept with."""
    if len(args.lambdas) < 2 or not all(a < b for a, b in itertools.pairwise(args.lambdas)):
        raise UserError(f"lambdas={args.lambdas}: expected two or more, ascending")
    if args.seeds > 1 and args.space != "tsne":
        raise UserError(f"seeds={args.seeds}: space={args.space!r} has no random start; expected --space tsne")
    prompts = aqi.read_prompts(args.prompts, mode, log)
    fewest = prompts.axiom.bincount().min().item()
    if args.space.startswith("pca:") and int(args.space.removeprefix("pca:")) > fewest:
        raise UserError(f"space={args.space!r}: expected at most pca:{fewest}, as many as the smallest axiom has texts")
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
    from reports import figures, plots

    swept = {"inputs": {"lambdas": lambdas}, "verdicts": verdicts}
    overall, *_ = figures.separation_charts([("steered", swept)])
    plots.plot_chart(folder / "curve.png", overall)
    plots.plot_chart(folder / "axioms.png", figures.axioms_chart(swept))
    for strength, X in ((lambdas[0], embeddings[0]), (lambdas[-1], embeddings[-1])):
        title = f"lambda {strength:g}, three principal components"
        plots.plot_clusters(folder / f"clusters_{strength:g}.png", aqi.project(X, "pca:3").cpu().numpy(), prompts.label.numpy(), title)


# ---------------------------------------------------------------- validate


def validate(args):
    """Pairs of configs/pairs.py through extract, spectrum, sweep and verdict, all on one scale.

    What is finished is not done again.
    """
    pairs = runpy.run_path(Path(__file__).parent / "configs/pairs.py")["PAIRS"]
    for name in args.pair:
        if name not in pairs:
            raise UserError(
                f"pair={name!r}: expected one of {', '.join(pairs)}; other models go into configs/pairs.py, or to extract and sweep"
            )
        if "not_representable" in pairs[name]:
            raise UserError(f"pair={name!r}: {pairs[name]['not_representable']}")
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
        from reports import plots

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
