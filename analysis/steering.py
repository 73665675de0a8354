"""Reading, splitting and adding activation vectors: what steer.py's commands are made of.

Shapes: n texts, T tokens of a packed stream, N documents in it, L layers, D hidden size, K lambdas. Layer l
means the residual stream after block l, before the final norm, for reading and for steering alike. A
document is (input_ids, loss_mask). Leaf to root: states, the vector, its spectrum, what to add where,
running many lambdas at once, folding an addition into the weights.
"""

import copy
import dataclasses

import numpy as np
import torch
from torch import nn

from kernels import segment_sums, token_logps
from packing import PackedBatch, pack, plan_step
from plumbing.files import UserError

POOLINGS = ("last", "mean")  # over a text's tokens
TOKENS_PER_BATCH = 16384
STEERED_LAYERS = 5  # the published choice: the outputs of the last five blocks

# ---------------------------------------------------------------- states of texts


def packed_batches(documents, device, log_progress=lambda plan: plan):
    """Yield (rows (N,), PackedBatch on `device`) until every document was seen once."""
    lengths = [len(ids) for ids, _ in documents]
    (plan,) = plan_step(lengths, lengths, 1, max(TOKENS_PER_BATCH, *lengths))
    for rows in log_progress(plan):
        if rows:
            yield np.array(rows), pack([documents[row] for row in rows]).to(device)


def text_mean(hidden, cu_seqlens):
    """(N, D) float32: the mean over each document's tokens but the first.

    Of a document of one token, that token. The first token of a document is a sink of attention, with
    coordinates of a thousand times the others' size, so with it in the mean the distance between two texts is
    that of 1 / length.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    is_counted = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    is_counted[starts] = lengths == 1
    counted = torch.where(is_counted[:, None], hidden.float(), 0.0)
    sums = torch.segment_reduce(counted, "sum", offsets=cu_seqlens.long(), axis=0)
    return sums / (lengths - 1).clamp(min=1)[:, None]


def pool(hidden, cu_seqlens, pooling):
    """Each document's state (N, D) float32, of hidden (T, D).

    pooling: "last", its last token's; "mean", the mean over its tokens; "text", see `text_mean`.
    """
    assert pooling in (*POOLINGS, "text"), pooling
    if pooling == "last":
        return hidden[cu_seqlens[1:].long() - 1].float()
    if pooling == "mean":
        return torch.segment_reduce(hidden.float(), "mean", offsets=cu_seqlens.long(), axis=0)
    return text_mean(hidden, cu_seqlens)


def pool_all(hidden, cu_seqlens, poolings):
    """{pooling: the documents' states (N, D)}."""
    return {pooling: pool(hidden, cu_seqlens, pooling) for pooling in poolings}


@torch.no_grad()
def read_states(model, batch, tap=None, compat_hf=False):
    """(2, N, L, D) float32: the states of a batch's documents after every block.

    They are pooled both ways, in the order of POOLINGS. tap steers while reading. compat_hf: the last layer
    after the final norm, as published scripts read it (not the space they steer in).
    """
    layers = []

    def read(layer, hidden):
        hidden = hidden if tap is None else tap(layer, hidden)
        layers.append(pool_all(hidden, batch.cu_seqlens, POOLINGS))
        return hidden

    final = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, tap=read)
    if compat_hf:
        layers[-1] = pool_all(final, batch.cu_seqlens, POOLINGS)
    pooled = []
    for pooling in POOLINGS:
        pooled.append(torch.stack([layer[pooling] for layer in layers], dim=1))  # (N, L, D)
    return torch.stack(pooled)


@torch.no_grad()
def document_logps(model, batch, hidden=None):
    """Summed log-prob of each document's supervised tokens (N,) float32 and their number (N,).

    hidden (T, D) if it is there already.
    """
    logps = supervised_logps(model, batch, hidden)
    return segment_sums(logps, batch.supervised_offsets), batch.supervised_offsets.diff()


@torch.no_grad()
def supervised_logps(model, batch, hidden=None):
    """Log-prob of each supervised token, (S,) float32. hidden (T, D) if it is there already."""
    if hidden is None:
        hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    hidden = hidden.index_select(0, batch.supervised)
    cap = model.config.final_logit_softcapping
    return token_logps(hidden, model.lm_head.weight, batch.targets, soft_cap=cap)


# ---------------------------------------------------------------- the vector and its spectrum


def spectrum(differences, components=5):
    """What the differences (n, D) of one layer are made of, beside their mean.

    A dict of numbers and `components` (C, D). explained: share of sum |x|^2 in each of the first components,
    of the raw differences; explained_centred: of their deviations from the mean; effective_rank: exp of the
    entropy of the raw shares (of squared singular values; Roy & Vetterli 2007 take the values themselves);
    rank_one: the first raw share, D-STEER's claim. A full decomposition, so no seed, through the Gram matrix
    of the smaller side in float64; a component's sign is the one that agrees with the mean, its norm the
    mean's; one with less than 1e-12 of the first's share is rounding, and zero. Differences that are all zero
    have no share to give: zeros, and an effective rank of 1.
    """
    X = differences.double()
    mean = X.mean(0)

    def decompose(X):
        """Shares, descending, and the directions (D, min(n, D)) they belong to, of any length."""
        is_wide = len(X) < X.shape[1]
        values, vectors = torch.linalg.eigh(X @ X.T if is_wide else X.T @ X)
        values, vectors = values.flip(0), vectors.flip(1)
        values = torch.where(values > 1e-12 * values[0], values, 0.0)
        return values / values.sum().clamp(min=1e-300), X.T @ vectors if is_wide else vectors

    shares, directions = decompose(X)
    centred, _ = decompose(X - mean)
    directions = directions[:, :components] * (shares[:components] > 0)
    directions = directions / directions.norm(dim=0).clamp(min=1e-30) * mean.norm()
    directions = directions * torch.where(mean @ directions < 0, -1.0, 1.0)
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum()
    return {
        "explained": shares[:components].tolist(),
        "explained_centred": centred[:components].tolist(),
        "effective_rank": entropy.exp().item(),
        "rank_one": shares[0].item(),
        "components": directions.T.float(),
    }


# ---------------------------------------------------------------- what to add, and where

INJECTIONS = ("cumulative", "increment", "matched")


def additions(injection, vector, layers):
    """{layer: (D,) float32} to add once at each of `layers` (consecutive, ascending). vector (L, D).

    cumulative: v[l] at every layer, as published; v[l] already holds what the layers below changed, so that
    is added len(layers) times. increment: v[l] - v[l-1], and v[l] at the first: the parts sum to the last
    layer's v; what the blocks between make of it comes on top. ("matched" is found by match_additions,
    which runs the model.)
    """
    assert injection in ("cumulative", "increment") and list(layers) == list(range(layers[0], layers[-1] + 1))
    if injection == "cumulative":
        return {layer: vector[layer] for layer in layers}
    return {layer: vector[layer] - (vector[layer - 1] if layer > layers[0] else 0) for layer in layers}


def match_additions(model, documents, vector, layers, pooling, device, strength=1):
    """{layer: (D,)}: at each layer the part of v[l] that the model does not yet show on `documents`.

    From the bottom: at each layer the model is steered below it. At lambda = 1 the steered SFT model's mean
    pooled states then equal its own plus v, the DPO model's, on these texts; strength=-1: at lambda = -1 the
    DPO model's equal the SFT model's. One pass per layer.
    """
    found, base = {}, None
    for layer in layers:
        tap = steering_tap(found, strength)
        means = mean_states(model, documents, device, tap)[POOLINGS.index(pooling)]  # (L, D)
        base = means if base is None else base
        found[layer] = vector[layer] - strength * (means[layer] - base[layer]).float().cpu()
    return found


def mean_states(model, documents, device, tap=None):
    """(2, L, D) float64 mean over documents of read_states."""
    total = 0
    for _, batch in packed_batches(documents, device):
        total = total + read_states(model, batch, tap).double().sum(dim=1)
    return total / len(documents)


def add_vector(hidden, addition, rescale):
    """hidden (.., D) + addition (.., D), in float32. rescale: each token keeps its norm, as published."""
    old = hidden.float()
    new = old + addition
    if rescale:  # squares summed in float64: in float32 they overflow from 1.8e19 on, in float16 from 256
        before = torch.linalg.vector_norm(old, dim=-1, keepdim=True, dtype=torch.float64)
        after = torch.linalg.vector_norm(new, dim=-1, keepdim=True, dtype=torch.float64)
        new = new * (before / after).float()
    return new


def steering_tap(additions, strength, rescale=False):
    """tap(layer, hidden) adding strength * additions[layer] to every token, in float32.

    None when there is nothing to add. rescale: as in `add_vector`.
    """
    if strength == 0 or not additions:
        return None
    on_device = {}

    def tap(layer, hidden):
        if layer not in additions:
            return hidden
        if layer not in on_device:
            on_device[layer] = strength * additions[layer].to(hidden.device, torch.float32)
        return add_vector(hidden, on_device[layer], rescale).to(hidden.dtype)

    return tap


# ---------------------------------------------------------------- many lambdas in one pass


@dataclasses.dataclass
class Steered:
    """One batch at one lambda."""

    rows: np.ndarray  # (N,) of the documents
    batch: PackedBatch
    index: int  # of the lambda
    hidden: torch.Tensor  # (T, D) after the final norm
    states: dict  # {layer: pool_all(...)} of the layers and poolings that were asked for


@torch.no_grad()
def steered_runs(
    model,
    documents,
    additions,
    lambdas,
    device,
    rescale=False,
    log_progress=lambda plan: plan,
    read_layers=(),
    poolings=POOLINGS,
):
    """Yield a Steered per batch and lambda.

    The blocks up to the first steered one run once; a lambda costs the blocks above it. Five lambdas on the
    last five of 32 layers are 1 + 5 * 4/32 forwards' worth of blocks instead of 5. Lambda 0 is the unsteered
    model, bit for bit, and costs nothing more: its tap adds nothing. read_layers: those whose states
    are wanted, pooled as `poolings` say.
    """
    first = min(additions)
    taps = [steering_tap(additions, strength, rescale) for strength in lambdas]
    for rows, batch in packed_batches(documents, device, log_progress):
        unsteered, below, entry = _watched_run(model, batch, None, first, read_layers, poolings)
        for index, tap in enumerate(taps):
            hidden, states = unsteered, {}
            if tap is not None:
                hidden, states, _ = _watched_run(model, batch, tap, first, read_layers, poolings, entry)
            yield Steered(rows, batch, index, hidden, below | states)


def _watched_run(model, batch, tap, first, read_layers, poolings, entry=None):
    """(hidden after the final norm, {layer: pooled states}, entry).

    entry: what block `first` gave, before its tap; given one, start there.
    """
    states = {}

    def watch(layer, hidden):
        nonlocal entry
        if layer == first:
            entry = hidden
        hidden = hidden if tap is None else tap(layer, hidden)
        if layer in read_layers:
            states[layer] = pool_all(hidden, batch.cu_seqlens, poolings)
        return hidden

    resume = None if entry is None else (first + 1, watch(first, entry))
    hidden = model(
        batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, tap=watch, resume=resume
    )
    return hidden, states, entry


# ---------------------------------------------------------------- a steered checkpoint


def bake(model, additions, strength):
    """A copy of a Llama whose down_proj biases hold strength * additions.

    transformers runs it (`mlp_bias`) with the steered logits. ValueError where that cannot be said exactly:
    Qwen, OLMo, Falcon, Gemma. A Mistral is written as a Llama that ends where its window does. A
    norm-rescaling tap cannot be baked: what it adds depends on the token.
    """
    config = model.config
    if config.model_type not in ("llama", "mistral"):
        why = "its Hugging Face class has no bias on down_proj"
        raise UserError(f"model_type={config.model_type!r}: {why}; expected a Llama or Mistral")
    longest = min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    baked = copy.deepcopy(model)
    baked.config = dataclasses.replace(
        config, mlp_bias=True, model_type="llama", sliding_window=None, max_position_embeddings=longest
    )
    for index, block in enumerate(baked.model.layers):
        for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            if linear.bias is None:
                linear.bias = nn.Parameter(
                    torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
                )
        if index in additions:
            bias = block.mlp.down_proj.bias
            bias.data = (bias.float() + strength * additions[index].to(bias.device)).to(bias.dtype)
    return baked
