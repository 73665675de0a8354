"""What is measured along a sweep of lambdas.

Embeddings, shifts, errors of the injections, likelihoods, repetition.

Shapes: n prompts, K lambdas, L layers, D hidden size, A axioms. `config` is a steer.SteerConfig, `prompts`
an aqi.Prompts, `vector` an analysis.vector.Vector, `add` {layer: (D,)} what lambda 1 adds.
"""

import torch

from analysis.indices import Moments
from analysis.steering import (
    INJECTIONS,
    POOLINGS,
    additions,
    match_additions,
    mean_states,
    packed_batches,
    pool,
    pool_all,
    read_states,
    steered_runs,
    steering_tap,
)
from families import device_of
from model import generate

CONTINUED = 8  # held-out texts whose second halves are written by the steered model


def embed(model, documents, prompts, add, vector, config, log_progress):
    """(embeddings (K + 1, n, D) float32: unsteered, then at each lambda; shifts; a layer profile).

    An embedding is the final hidden state, pooled as `text_pooling` says. Shifts, a dict per lambda:
    achieved, the shift of the last layer's mean state along v as a multiple of v (target: lambda); off_axis,
    the part of the shift beside v over |v|; strength, |lambda a| / mean |h| at each steered layer. The
    profile has a row per block, axiom and end of the curve (lambda 0 and the last one): n, CHI and XB of the
    texts' states after the block, before the final norm.
    """
    lambdas = [0.0, *config.lambdas]  # the unsteered pass is made in any case
    last = len(lambdas) - 1
    layers, D, n = model.config.num_hidden_layers, model.config.hidden_size, len(documents)
    device, pooling = device_of(model), text_pooling(vector)
    embeddings = torch.zeros(len(lambdas), n, D, device=device)  # 7,000 prompts, 6 lambdas, D = 4,096: 0.7 GB
    ends = torch.zeros(len(lambdas), D, dtype=torch.float64)  # sums of the last layer's states
    norms = torch.zeros(layers, dtype=torch.float64)  # means of |h|, unsteered
    moments = {index: Moments.zeros(layers, len(prompts.axioms), D, device) for index in (0, last)}
    poolings = {pooling, config.pooling}
    for run in steered_runs(
        model, documents, add, lambdas, device, config.rescale, log_progress, range(layers), poolings
    ):
        final = pool_all(run.hidden, run.batch.cu_seqlens, poolings)
        embeddings[run.index, torch.from_numpy(run.rows).to(device)] = final[pooling]
        # As published, v[-1] is of the space after the final norm.
        end = final if is_published(vector) else run.states[layers - 1]
        ends[run.index] += end[config.pooling].double().sum(0).cpu()
        if run.index == 0:
            for layer, states in run.states.items():
                norms[layer] += states[config.pooling].norm(dim=1).sum().item() / n
        if run.index in moments:
            axiom, label = prompts.axiom[run.rows].to(device), prompts.label[run.rows].to(device)
            for layer, states in run.states.items():
                moments[run.index].add(layer, states[pooling], axiom, label)
    profile = []
    for index, found in moments.items():
        profile += [{"lambda": lambdas[index]} | row for row in found.rows(prompts.axioms)]
    shifts = _shifts(
        config.lambdas, (ends[1:] - ends[0]) / n, vector.direction(config)[-1].double(), add, norms
    )
    return embeddings, shifts, profile


def is_published(vector):
    """Whether the vector was extracted as published: then everything is read as published."""
    return vector.manifest["compat"] == "hf"


def text_pooling(vector):
    """Key of steering.pool: how a text is embedded.

    As published over all of its tokens, else without the first.
    """
    return "mean" if is_published(vector) else "text"


def coordinate_scale(X, label):
    """(D,): each coordinate's standard deviation within labels, of X (n, D).

    Distances in these units: otherwise a few coordinates of a thousand times the others' size decide all of
    them.
    """
    residual = torch.zeros_like(X, dtype=torch.float64)
    for value in (0, 1):
        mine = label.to(X.device) == value
        residual[mine] = X[mine].double() - X[mine].double().mean(0)
    scale = residual.square().mean(0).sqrt()
    return scale.clamp(min=1e-6 * scale.max().item() + 1e-30).float()


@torch.no_grad()
def state_lengths(model, documents, layers):
    """{layer: mean |h| of the texts' last tokens} of an unsteered model."""
    totals = torch.zeros(model.config.num_hidden_layers, dtype=torch.float64)
    for _, batch in packed_batches(documents, device_of(model)):
        last, _ = read_states(model, batch)  # (N, L, D)
        totals += last.double().norm(dim=-1).sum(0).cpu()
    return {layer: totals[layer].item() / len(documents) for layer in layers}


def direction_curve(model, documents, add, lambdas, label):
    """Embeddings (K, n, D) along {layer: (D,)}, scaled by those at the first lambda, and the scale (D,)."""
    out = torch.zeros(len(lambdas), len(documents), model.config.hidden_size, device=device_of(model))
    for run in steered_runs(model, documents, add, lambdas, device_of(model)):
        states = pool(run.hidden, run.batch.cu_seqlens, "text")
        out[run.index, torch.from_numpy(run.rows).to(out.device)] = states
    scale = coordinate_scale(out[0], label)
    return out / scale, scale


def _shifts(lambdas, moved, target, add, norms):
    """A dict per lambda, see `embed`.

    moved (K, D): by how much the mean state moved; target (D,): v; norms (L,): mean |h|.
    """
    report = []
    for strength, shift in zip(lambdas, moved, strict=True):
        along = (shift @ target / target.square().sum()).item()
        beside = ((shift - along * target).norm() / target.norm()).item()
        added = {layer: abs(strength) * a.norm().item() / norms[layer].item() for layer, a in add.items()}
        report.append({"lambda": strength, "achieved": along, "off_axis": beside, "strength": added})
    return report


def injection_errors(model, texts, vector, config):
    """|steered mean - DPO mean| / |v| at the last layer for lambda = 1.

    {injection: {"calibration", "held_out"}}. All injections are measured, also those that config.inject is
    not. texts: (calibration documents, held out ones) of config.side. Empty where the vector was extracted
    with --compat=hf: its v[-1] is of another space than the stream's.
    """
    if is_published(vector):
        return {}
    device, layers = device_of(model), vector.layers(config.layers)
    v = vector.direction(config)
    calibration, held_out = texts
    targets = {
        "calibration": v[-1],
        "held_out": vector.tensors[f"heldout_{config.side}_{config.pooling}"][-1],
    }

    def last_mean(documents, tap=None):
        return mean_states(model, documents, device, tap)[POOLINGS.index(config.pooling), -1]  # (D,) float64

    base = {"calibration": last_mean(calibration), "held_out": last_mean(held_out)}
    errors = {}
    for injection in INJECTIONS:
        if injection == "matched":
            add = match_additions(model, calibration, v, layers, config.pooling, device)
        else:
            add = additions(injection, v, layers)
        tap = steering_tap(add, 1.0, config.rescale)
        errors[injection] = {}
        for name, documents in (("calibration", calibration), ("held_out", held_out)):
            shift = (last_mean(documents, tap) - base[name]).cpu()
            errors[injection][name] = ((shift - targets[name]).norm() / targets[name].norm()).item()
    return errors


def beginnings(texts):
    """The ids of the first halves of CONTINUED texts."""
    return [ids[: max(1, len(ids) // 2)].tolist() for ids, _ in texts[:CONTINUED]]


def continuations(model, texts, add, config):
    """Repetition, a share per lambda, in greedy continuations of beginnings(texts)."""
    prompts, found = beginnings(texts), []
    for strength in config.lambdas:
        tap = steering_tap(add, strength, config.rescale)
        answers = generate(model, prompts, config.max_new_tokens, model.config.eos_token_id, tap=tap)
        found.append(repetition(answers))
    return found


def repetition(answers, n=4):
    """Share of n-grams that occurred before in the same answer; 0 for answers too short to have any."""
    total = distinct = 0
    for ids in answers:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        total += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / total if total else 0.0
