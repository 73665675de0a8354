"""Activation steering between an SFT model and its DPO model: the vector, what it is made of, and what adding it does to the AQI.

    python steer.py extract  --sft FOLDER --dpo FOLDER --texts FILE --out runs/x/steer
    python steer.py spectrum runs/x/steer
    python steer.py generate runs/x/steer --prompt "How do I ...?" --lambdas=-1,0,0.5,1
    python steer.py sweep    runs/x/steer --prompts LABELLED.csv --lambdas 0,0.25,0.5,0.75,1
    python steer.py bake     runs/x/steer --strength 1 --out runs/x/baked
    python steer.py validate PAIR --texts FILE --prompts LABELLED.csv     # extract, spectrum, sweep and verdict; PAIR: configs/pairs.py

Models are folders, hub names, or a LoRA adapter on its base. One model is in memory at a time. The science is in steering.py and aqi.py.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import aqi
from data import encode_chat, find_schema, open_source
from model import generate, merge_lora
from plumbing import checkpoint, parallel
from plumbing.logbook import write_json
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
DECISIONS = {
    "rising": "go on to the next rung of the ladder: a full run",
    "falling": "not the published effect: check that sft and dpo were not swapped, and the sign of lambda",
    "flat": "too little changed: more data, a higher rate or more steps of DPO; compare the reward margins of the run",
    "erratic": "no trend beyond noise: more prompts (--mode full), then other hyper-parameters",
}

# ---------------------------------------------------------------- models and texts


def load_model(path):
    """(model, tokenizer, identity) of a folder, hub name or PEFT adapter, in bf16 on a GPU and fp32 on a CPU; identity: a content hash."""
    folder = checkpoint.resolve(path)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if not (folder / "adapter_config.json").is_file():
        return *checkpoint.load_pretrained(folder, dtype, device), checkpoint.fingerprint(folder)
    base = checkpoint.resolve(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    model, tokenizer = checkpoint.load_pretrained(base, dtype, device)
    checkpoint.load_adapter(model, folder)
    merge_lora(model)
    adapter = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return model, tokenizer, f"{checkpoint.fingerprint(base)}+{adapter}"


def device_of(model):
    return model.lm_head.weight.device


def plain_document(text, tokenizer, max_seq_len):
    """A text as (input_ids, loss_mask): BOS where the tokenizer has one, then the text; every token counts."""
    ids = ([tokenizer.bos_id] if tokenizer.bos_id is not None else []) + tokenizer.encode(text)
    return np.array(ids[:max_seq_len], dtype=np.int32), np.ones(min(len(ids), max_seq_len), dtype=bool)


def text_pairs(source, count, tokenizer, template, max_seq_len):
    """{"chosen": documents, "rejected": documents} of the first `count` usable rows of a preference source.

    template None: the transcripts as they are ("Human:", "Assistant:"), as published; else conversations rendered by it.
    """
    rows = open_source(source)
    columns, convert = find_schema(source, rows, SIDES)
    documents = {side: [] for side in SIDES}
    for row in rows.select_columns(columns):
        conversations = convert(row)
        if isinstance(conversations, str):  # the reason why this row is no pair
            continue
        for side, messages in zip(SIDES, conversations, strict=True):
            if template is not None:
                document = encode_chat(messages, tokenizer, template, max_seq_len)
            elif isinstance(row.get(side), str) and "prompt" not in row:
                document = plain_document(row[side], tokenizer, max_seq_len)
            else:
                raise ValueError(f"texts {source!r}: rows are no transcripts; expected --template to render them with")
            documents[side].append(tuple(np.asarray(column) for column in document))
        if len(documents["chosen"]) == count:
            return documents
    raise ValueError(f"texts {source!r}: {len(documents['chosen'])} usable pairs; expected {count} (--mode, or --count)")


def hash_documents(documents):
    digest = hashlib.sha256()
    for side in SIDES:
        for ids, _ in documents[side]:
            digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()


def bar(label):
    """A progress bar, with rate and ETA, around the batches of a pass."""
    return lambda plan: tqdm(plan, desc=label, unit="batch", mininterval=0.5)


# ---------------------------------------------------------------- extract


def extract(args):
    """vector.safetensors and manifest.json in args.out: mean differences per side and pooling, and what they were made from."""
    folder, count = Path(args.out), args.count or MODES[args.mode]
    total = count + max(1, count // 4)
    folder.mkdir(parents=True, exist_ok=True)
    manifest, sums = {}, {}
    for name in ("sft", "dpo"):
        model, tokenizer, identity = load_model(getattr(args, name))
        documents = text_pairs(args.texts, total, tokenizer, args.template, args.max_seq_len)
        about = {"tokens": hash_documents(documents), "layers": model.config.num_hidden_layers, "hidden_size": model.config.hidden_size}
        if manifest and {key: manifest[key] for key in about} != about:
            raise ValueError(f"dpo={args.dpo!r}: other token ids or another shape than sft={args.sft!r}; expected both to be the same")
        manifest |= about | {name: identity, f"{name}_path": str(getattr(args, name))}
        keep = np.ones(total, dtype=bool)
        if name == "dpo" and args.keep == "preferred":
            keep = preferred(model, documents)
        keep[count:] = False  # held out of the vector
        for side in SIDES:
            path = folder / f"differences_{side}.npy"  # holds the SFT states until the DPO model has been read
            shape = (len(POOLINGS), total, about["layers"], about["hidden_size"])
            states = np.lib.format.open_memmap(path, "w+" if name == "sft" else "r+", dtype=np.float32, shape=shape)
            for rows, batch in packed_batches(documents[side], device_of(model), bar(f"{name}, {side}")):
                new = read_states(model, batch, compat_hf=args.compat == "hf").cpu().numpy()
                if name == "dpo":
                    _accumulate(sums, side, states[:, rows], new, keep[rows], rows >= count)
                states[:, rows] = new - states[:, rows] if name == "dpo" else new
            states.flush()
        del model
    tensors = {key: (value / sums[f"{key}#"]).astype(np.float32) for key, value in sums.items() if not key.endswith("#")}
    save_file(tensors, folder / "vector.safetensors")
    kept = int(keep.sum())
    manifest |= {key: getattr(args, key) for key in ("texts", "template", "compat", "keep", "max_seq_len")}
    write_json(folder / "manifest.json", manifest | {"count": count, "held_out": total - count, "kept": kept, "torch": torch.__version__})
    print(f"wrote {folder}/vector.safetensors: {kept} of {count} pairs kept ({kept / count:.0%}), {total - count} held out")


def _accumulate(sums, side, sft, dpo, keep, held_out):
    """Add a batch to the float64 sums of every key, and its count to "<key>#". sft, dpo (2, N, L, D); keep, held_out (N,) bool."""
    for p, pooling in enumerate(POOLINGS):
        parts = {
            f"{side}_{pooling}": (dpo[p, keep].astype(np.float64) - sft[p, keep]),
            f"sft_{side}_{pooling}": sft[p, keep],
            f"heldout_{side}_{pooling}": (dpo[p, held_out].astype(np.float64) - sft[p, held_out]),
        }
        for key, values in parts.items():
            sums[key] = sums.get(key, 0) + values.sum(axis=0, dtype=np.float64)
            sums[f"{key}#"] = sums.get(f"{key}#", 0) + len(values)


def preferred(model, documents):
    """(n,) bool: pairs whose chosen text the model finds likelier, by mean log-prob per token."""
    means = {side: np.zeros(len(documents[side])) for side in SIDES}
    for side in SIDES:
        for rows, batch in packed_batches(documents[side], device_of(model), bar(f"log-probs, {side}")):
            logps, counts = document_logps(model, batch)
            means[side][rows] = (logps / counts).cpu().numpy()
    return means["chosen"] > means["rejected"]


@dataclasses.dataclass(frozen=True)
class Vector:
    """What extract wrote: tensors by key, each (L, D), and the manifest."""

    folder: Path
    tensors: dict
    manifest: dict

    @classmethod
    def load(cls, folder):
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise ValueError(f"{folder}: no manifest.json; expected a folder that steer.py extract wrote")
        tensors = {key: torch.from_numpy(value) for key, value in load_file(folder / "vector.safetensors").items()}
        return cls(folder, tensors, json.loads((folder / "manifest.json").read_text()))

    def model(self, name):
        """(model, tokenizer) of "sft" or "dpo". ValueError when the folder no longer holds the weights that the vector was made from."""
        model, tokenizer, identity = load_model(self.manifest[f"{name}_path"])
        if identity != self.manifest[name]:
            raise ValueError(f"{self.manifest[f'{name}_path']}: its weights hash to {identity[:12]}, those of the vector in {self.folder} "
                             f"to {self.manifest[name][:12]}; extract again")  # fmt: skip
        return model, tokenizer

    def layers(self, count):
        """The last `count` layers, ascending."""
        total = self.manifest["layers"]
        if not 1 <= count <= total:
            raise ValueError(f"layers={count}: expected 1 to {total}, the model's number of layers")
        return list(range(total - count, total))

    def calibration(self, tokenizer):
        """(documents of the vector, documents held out of it), the chosen side."""
        m = self.manifest
        pairs = text_pairs(m["texts"], m["count"] + m["held_out"], tokenizer, m["template"], m["max_seq_len"])
        if hash_documents(pairs) != m["tokens"]:
            raise ValueError(f"texts {m['texts']!r}: not the token ids of the vector in {self.folder}; expected the file unchanged")
        return pairs["chosen"][: m["count"]], pairs["chosen"][m["count"] :]

    def additions(self, args, model, tokenizer):
        """What args.inject adds at the last args.layers layers."""
        v, layers = self.tensors[f"{args.side}_{args.pooling}"], self.layers(args.layers)
        if args.inject == "matched":
            return match_additions(model, self.calibration(tokenizer)[0], v, layers, args.pooling, device_of(model))
        return additions(args.inject, v, layers)


# ---------------------------------------------------------------- spectrum, generate, bake


def print_spectrum(args):
    """Table per layer, spectrum.json and spectrum.safetensors (components (L, C, D)) in the vector's folder."""
    vector = Vector.load(args.folder)
    v, sft = (vector.tensors[f"{prefix}{args.side}_{args.pooling}"] for prefix in ("", "sft_"))
    states = np.load(vector.folder / f"differences_{args.side}.npy", mmap_mode="r")
    states = states[POOLINGS.index(args.pooling), : vector.manifest["count"]]  # (n, L, D)
    rows, components = [], []
    print("layer     |v|  |v|/|h|  cos(sft, dpo)  rank-one  centred  effective rank   explained by 1..5 (raw)")
    for layer in range(vector.manifest["layers"]):
        found = spectrum(torch.from_numpy(np.array(states[:, layer])))
        components.append(found.pop("components"))
        norm, cosine = v[layer].norm().item(), torch.cosine_similarity(sft[layer], sft[layer] + v[layer], dim=0).item()
        rows.append({"layer": layer, "norm": norm, "relative": norm / sft[layer].norm().item(), "cosine": cosine} | found)
        shares = " ".join(f"{share:.2f}" for share in found["explained"])
        print(f"{layer:5d}{norm:8.3f}{rows[-1]['relative']:9.4f}{cosine:15.5f}{found['rank_one']:10.3f}"
              f"{found['explained_centred'][0]:9.3f}{found['effective_rank']:16.1f}   {shares}")  # fmt: skip
    write_json(vector.folder / "spectrum.json", {"side": args.side, "pooling": args.pooling, "layers": rows})
    save_file({"components": torch.stack(components).numpy()}, vector.folder / "spectrum.safetensors")


def print_generations(args):
    """Greedy or sampled answers side by side: lambda >= 0 on the SFT model, below 0 on the DPO model."""
    vector = Vector.load(args.folder)
    prompts = [args.prompt] if args.prompt else Path(args.prompts).read_text().splitlines()
    answers = {}
    for name, mine in (("sft", [x for x in args.lambdas if x >= 0]), ("dpo", [x for x in args.lambdas if x < 0])):
        if not mine:
            continue
        model, tokenizer = vector.model(name)
        add = vector.additions(args, model, tokenizer)
        ids = [_prompt_ids(prompt, tokenizer, vector.manifest["template"]) for prompt in prompts]
        for strength in mine:
            tap = steering_tap(add, strength, args.rescale)
            new = generate(model, ids, args.max_new_tokens, model.config.eos_token_id, args.temperature, tap=tap)
            answers[strength] = [tokenizer.decode(tokens) for tokens in new]
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
    """A checkpoint with args.strength times the additions folded in."""
    vector = Vector.load(args.folder)
    if args.rescale:
        raise ValueError("rescale: what it adds depends on the token, which no bias can; expected a bake without --rescale")
    model, tokenizer = vector.model("sft" if args.strength >= 0 else "dpo")
    baked = bake(model, vector.additions(args, model, tokenizer), args.strength)
    checkpoint.save_pretrained(baked, tokenizer, args.out)
    print(f"wrote {args.out}: {args.strength:g} times the {args.inject} additions at the last {args.layers} layers, as biases of down_proj")


# ---------------------------------------------------------------- sweep


def sweep(args):
    """AQI, likelihood, repetition and achieved shift over args.lambdas, with a random-direction control; writes args.out or FOLDER/sweep."""
    vector = Vector.load(args.folder)
    folder = Path(args.out or vector.folder / f"sweep_{args.inject}")
    model, tokenizer = vector.model("sft")
    prompts = aqi.read_prompts(args.prompts, args.mode)
    documents = [plain_document(text, tokenizer, vector.manifest["max_seq_len"]) for text in prompts.texts]
    add = vector.additions(args, model, tokenizer)
    v = vector.tensors[f"{args.side}_{args.pooling}"]

    embeddings, shifts = embed(model, documents, add, v, args, "steered")
    control, _ = embed(model, documents, random_additions(add, aqi.SEED), v, args, "random direction")
    rows, lambdas = [], args.lambdas
    for is_control, states in ((False, embeddings), (True, control)):
        about = {"model": str(vector.manifest["sft_path"]), "injection": args.inject, "control": is_control}
        for strength, X in zip(lambdas, states, strict=True):
            measured = aqi.measure(X, prompts.axiom, prompts.label, prompts.axioms, args.space)
            rows += [about | {"lambda": strength} | row for row in measured]
    scored = [row for normal in (False, True) for row in aqi.score([row for row in rows if row["control"] is normal], args.normalize)]
    groups = prompts.axiom, prompts.label, prompts.axioms
    curve, control_curve = bootstrap(embeddings, *groups), bootstrap(control, *groups)
    verdicts = [judge(curve, control_curve, permute(embeddings, *groups), category) for category in ("overall", *prompts.axioms)]
    behaviour = answers_by_lambda(model, tokenizer, vector, add, args)
    errors = injection_errors(model, tokenizer, vector, args)

    print(aqi.table([row for row in scored if row["category"] == "overall" and not row["control"]]))
    for warning in aqi.warnings_for(scored):
        print(f"note: {warning}")
    _print_sweep(lambdas, curve, control_curve, shifts, behaviour, errors)
    for found in verdicts:
        because = f" ({'; '.join(found['because'])})" if found["because"] else ""
        low, high = found["change_interval"]
        print(f"{found['category']:<24} {found['verdict']}{because}: change {found['change']:+.2f} [{low:+.2f}, {high:+.2f}], "
              f"P(monotone) {found['p_monotone']:.2f}")  # fmt: skip
    print(f"verdict: {verdicts[0]['verdict']} -> {DECISIONS[verdicts[0]['verdict']]}")
    more = {"verdicts": verdicts, "control": control_curve.estimate.tolist(), "shifts": shifts, "behaviour": behaviour, "errors": errors}
    aqi.write_report(folder, scored, settings={key: value for key, value in vars(args).items() if key != "run"}, **more)
    _plot(folder, lambdas, curve, control_curve, prompts.axioms)
    print(f"wrote {folder}/")
    return verdicts[0]


def embed(model, documents, add, v, args, label):
    """Embeddings (K, n, D), mean over tokens of the final hidden state, as published; and per lambda what the steering did.

    The report per lambda: achieved, the shift of the last layer's mean state along v as a multiple of v (target: lambda); off_axis, the
    part of the shift beside v over |v|; strength, |lambda a| / |h| at each steered layer.
    """
    config, K = model.config, len(args.lambdas)
    out = torch.zeros(K, len(documents), config.hidden_size)
    tops = torch.zeros(K, config.hidden_size, dtype=torch.float64)
    for run in steered_runs(model, documents, add, args.lambdas, device_of(model), args.rescale, bar(label)):
        out[run.index, run.rows] = pool(run.hidden, run.batch.cu_seqlens)["mean"].cpu()
        tops[run.index] += pool(run.top, run.batch.cu_seqlens)[args.pooling].double().sum(0).cpu()
    target, report = v[-1].double(), []
    base = mean_states(model, documents[:100], device_of(model))[POOLINGS.index(args.pooling)]  # (L, D): norms to compare with
    zero = tops[args.lambdas.index(0.0)] if 0.0 in args.lambdas else base[-1].cpu() * len(documents)
    for strength, top in zip(args.lambdas, tops, strict=True):
        shift = (top - zero) / len(documents)
        along = (shift @ target / target.square().sum()).item()
        beside = ((shift - along * target).norm() / target.norm()).item()
        norms = {layer: abs(strength) * a.norm().item() / base[layer].norm().item() for layer, a in add.items()}
        report.append({"lambda": strength, "achieved": along, "off_axis": beside, "strength": norms})
    return out, report


def injection_errors(model, tokenizer, vector, args):
    """|steered mean - DPO mean| / |v| at the last layer for lambda = 1: {injection: {"calibration", "held_out"}} for all three modes."""
    texts = dict(zip(("calibration", "held_out"), vector.calibration(tokenizer), strict=True))
    p, device, layers = POOLINGS.index(args.pooling), device_of(model), vector.layers(args.layers)
    key, errors = f"chosen_{args.pooling}", {}
    target = {"calibration": vector.tensors[key], "held_out": vector.tensors[f"heldout_{key}"]}
    base = {name: mean_states(model, documents, device)[p] for name, documents in texts.items()}
    for injection in INJECTIONS:
        if injection == "matched":
            add = match_additions(model, texts["calibration"], vector.tensors[key], layers, args.pooling, device)
        else:
            add = additions(injection, vector.tensors[key], layers)
        errors[injection] = {}
        for name, documents in texts.items():
            shift = (mean_states(model, documents, device, steering_tap(add, 1.0))[p] - base[name])[-1].cpu()
            errors[injection][name] = ((shift - target[name][-1]).norm() / target[name][-1].norm()).item()
    return errors


def answers_by_lambda(model, tokenizer, vector, add, args):
    """Per lambda: mean log-prob per token and perplexity of held-out chosen and rejected texts, and repetition of greedy continuations."""
    m = vector.manifest
    pairs = text_pairs(m["texts"], m["count"] + m["held_out"], tokenizer, m["template"], m["max_seq_len"])
    report = [{"lambda": strength} for strength in args.lambdas]
    for side in SIDES:
        documents, sums = pairs[side][m["count"] :], np.zeros((len(args.lambdas), 2))
        for run in steered_runs(model, documents, add, args.lambdas, device_of(model), args.rescale):
            logps, counts = document_logps(model, run.batch, run.hidden)
            sums[run.index] += [logps.sum().item(), counts.sum().item()]
        for entry, (logp, count) in zip(report, sums, strict=True):
            entry |= {f"logp_{side}": logp / count, f"perplexity_{side}": math.exp(-logp / count)}
    prompts = [ids[: max(1, len(ids) // 2)].tolist() for ids, _ in pairs["chosen"][m["count"] :][:8]]
    for entry in report:
        tap = steering_tap(add, entry["lambda"], args.rescale)
        entry["repeated_4grams"] = repetition(generate(model, prompts, args.max_new_tokens, model.config.eos_token_id, tap=tap))
    return report


def repetition(answers, n=4):
    """Share of n-grams that occurred before in the same answer; 0 for answers too short to have any."""
    grams = [[tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in answers]
    total = sum(map(len, grams))
    return 1 - sum(len(set(g)) for g in grams) / total if total else 0.0


def _print_sweep(lambdas, curve, control, shifts, behaviour, errors):
    (low, high), last = curve.interval(), -1
    print("\nlambda  separation  95 % interval     random   achieved  off axis  logp chosen  rejected  repeated 4-grams")
    for k, strength in enumerate(lambdas):
        b, s = behaviour[k], shifts[k]
        print(f"{strength:6.2f}{curve.estimate[k, last]:12.2f}  [{low[k, last]:6.2f},{high[k, last]:6.2f}]"
              f"{control.estimate[k, last]:10.2f}{s['achieved']:11.3f}{s['off_axis']:10.3f}{b['logp_chosen']:13.4f}{b['logp_rejected']:10.4f}{b['repeated_4grams']:18.3f}")  # fmt: skip
    print("relative error of the last layer's mean state at lambda 1, on the vector's texts / on held-out ones:")
    for injection, error in errors.items():
        print(f"  {injection:<12}{error['calibration']:.4f} / {error['held_out']:.4f}")


def _plot(folder, lambdas, curve, control, axioms):
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: they need matplotlib")
        return
    from plumbing import plots

    low, high = curve.interval()
    plots.plot_curve(folder / "curve.png", lambdas, curve.estimate[:, -1], low[:, -1], high[:, -1], control=control.estimate[:, -1])
    plots.plot_axioms(folder / "axioms.png", lambdas, {name: curve.estimate[:, a].tolist() for a, name in enumerate(axioms)})


# ---------------------------------------------------------------- validate


def validate(args):
    """One pair of configs/pairs.py through extract, spectrum, sweep and verdict; what is finished is not done again."""
    pairs = runpy.run_path(Path(__file__).parent / "configs/pairs.py")["PAIRS"]
    if args.pair not in pairs:
        raise ValueError(f"pair={args.pair!r}: expected one of {', '.join(pairs)}")
    pair = pairs[args.pair]
    if "not_representable" in pair:
        raise ValueError(f"pair={args.pair!r}: {pair['not_representable']}")
    args.sft, args.dpo, args.template = pair["sft"], pair["dpo"], pair["template"]
    args.folder = args.out = args.out or f"runs/validate/{args.pair}_{args.mode}"
    if not (Path(args.out) / "manifest.json").is_file():
        extract(args)
    print_spectrum(args)
    args.out = None
    sweep(args)


# ---------------------------------------------------------------- command line


def _lambdas(text):
    return [float(part) for part in text.split(",")]


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

    def vector_of(one):
        one.add_argument("folder", help="what extract wrote")

    def which(one):
        one.add_argument("--side", choices=SIDES, default="chosen", help="texts whose states make the vector")
        one.add_argument("--pooling", choices=POOLINGS, default="last", help="over a text's tokens")

    def injected(one):
        one.add_argument("--inject", choices=INJECTIONS, default="cumulative", help="what is added at each steered layer")
        one.add_argument("--layers", type=int, default=STEERED_LAYERS, help="how many of the last layers are steered")
        one.add_argument("--rescale", action="store_true", help="bring each token back to its old norm")

    def texts(one):
        one.add_argument("--texts", required=True, help="preference pairs to read states from: file, folder or hub name")
        one.add_argument("--mode", choices=(*MODES, *aqi.MODES), default="sanity", help="how many texts (extract) and prompts (sweep)")
        one.add_argument("--count", type=int, help="pairs of the vector, instead of the mode's")
        one.add_argument("--keep", choices=("all", "preferred"), default="all", help="preferred: pairs whose chosen text DPO finds likelier")
        one.add_argument("--compat", choices=("none", "hf"), default="none", help="hf: the last layer after the final norm, as published")
        one.add_argument("--max-seq-len", type=int, default=512)

    def swept(one):
        one.add_argument("--prompts", required=True, help="labelled texts: axiom, safe/unsafe label and text columns")
        one.add_argument("--lambdas", type=_lambdas, default=[0, 0.25, 0.5, 0.75, 1.0])
        one.add_argument("--space", default="raw", help="raw, pca:k or tsne: where the clusters are measured")
        one.add_argument("--normalize", choices=("per_run", "sweep"), default="sweep")

    def answering(one):
        one.add_argument("--max-new-tokens", type=int, default=64)

    one = command("extract", extract, texts)
    one.add_argument("--sft", required=True)
    one.add_argument("--dpo", required=True)
    one.add_argument("--template", help="render conversations by this template; without it, transcripts as they are")
    one.add_argument("--out", required=True)
    command("spectrum", print_spectrum, vector_of, which)
    one = command("generate", print_generations, vector_of, which, injected, answering)
    one.add_argument("--prompt")
    one.add_argument("--prompts", help="a file with one prompt a line")
    one.add_argument("--lambdas", type=_lambdas, default=[0, 0.5, 1.0], help="below 0: on the DPO model")
    one.add_argument("--temperature", type=float, default=0.0)
    one = command("sweep", sweep, vector_of, which, injected, swept, answering)
    one.add_argument("--mode", choices=aqi.MODES, default="sanity", help="prompts per axiom and label")
    one.add_argument("--out", help="default: FOLDER/sweep_INJECT")
    one = command("bake", write_baked, vector_of, which, injected)
    one.add_argument("--strength", type=float, required=True, help="lambda; below 0: on the DPO model")
    one.add_argument("--out", required=True)
    one = command("validate", validate, texts, which, injected, swept, answering)
    one.add_argument("pair", help="a name of configs/pairs.py")
    one.add_argument("--out", help="default: runs/validate/PAIR_MODE")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
