"""Direct preference optimisation: `python train_dpo.py configs/tiny.py` or `torchrun --nproc-per-node 8 train_dpo.py configs/tulu10.py`.

One model in memory: the reference's log-probs are taken from the step-0 weights, before the first update, and kept in a file.
Reading order: the losses on four (N,) tensors, log-probs of answers, one optimizer step, evaluation, the reference cache, main.
"""

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data import load_preferences
from kernels import attention_path, segment_sums, token_logps
from model import adapters_disabled, training_flops
from optim import adamw, apply_gradients, implicit, learning_rate, sample_weights, warmup_steps, weights_changed
from packing import in_order, local_batches, step_examples, steps_per_epoch
from planner import plan
from plumbing import checkpoint, hub, parallel
from plumbing.config import Config, check_world_size, load, resume_dict, setting
from plumbing.files import UserError
from plumbing.logbook import Logbook
from plumbing.tensors import write_safetensors
from plumbing.tokenizer import Tokenizer
from plumbing.weights import fingerprint, resolve
from training import DTYPES, finish, load_model, read_model_config, sample

# ---------------------------------------------------------------- the keys of this command


@dataclass(frozen=True, kw_only=True)
class DPOConfig(Config):
    """Keys of train_dpo.py."""

    loss: Literal["dpo_norm", "dpo", "simpo", "ipo", "wpo"] = setting(
        "loss", "name", "dpo_norm: DPO on per-token mean log-probs", default="dpo_norm"
    )
    beta: float = setting(
        "loss", "1/nat", "strength of the tie to the reference; about 5 for means (dpo_norm), 0.1 for sums (dpo)", default=5.0, above=0
    )
    label_smoothing: float = setting("loss", "probability", "that a label is wrong; dpo_norm, dpo and simpo", default=0.0, minimum=0, below=0.5)
    gamma_beta_ratio: float | None = setting("loss", "nat/token", "target margin / beta; simpo only", default=None, minimum=0)
    share_prefix: bool = setting(
        "machine", "flag", "compute what chosen and rejected begin with once: faster, the same to rounding", default=True, affects_results=False
    )
    sft_weight: float = setting("loss", "-", "weight of an added token-mean NLL of the chosen answers", default=0.0, minimum=0)

    @staticmethod
    def conflicts(c):
        yield from Config.conflicts(c)
        if 2 * c.max_seq_len > c.tokens_per_microbatch:
            expected = f"expected at least twice max_seq_len={c.max_seq_len} (a pair must fit one stream)"
            yield ("max_seq_len", "tokens_per_microbatch"), f"tokens_per_microbatch={c.tokens_per_microbatch}: {expected}"
        if (c.loss == "simpo") != (c.gamma_beta_ratio is not None):
            both = f"loss={c.loss!r}, gamma_beta_ratio={c.gamma_beta_ratio}"
            yield ("loss", "gamma_beta_ratio"), f"{both}: simpo needs one, no other loss has one"
        if c.label_smoothing > 0 and c.loss not in ("dpo_norm", "dpo", "simpo"):
            defined = f"defined for dpo_norm, dpo and simpo, not for loss={c.loss!r}"
            yield ("label_smoothing", "loss"), f"label_smoothing={c.label_smoothing}: {defined}"


# ---------------------------------------------------------------- the losses: four (N,) tensors in, three (N,) tensors out
# Log-probs are in nats; "dpo" and "wpo" take an answer's *sum* over its supervised tokens, "dpo_norm", "ipo" and "simpo" the *mean*.


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), per pair.

    All log-probs (N,). label_smoothing: the probability that a preference is the wrong way round (conservative DPO, Mitchell 2023, eq. 3).
    Returns (losses, chosen_rewards, rejected_rewards), each (N,); rewards are beta * log(policy / reference), detached.
    With mean log-probs it is Tulu 3's length-normalised DPO (Lambert et al. 2024, eq. 6; loss="dpo_norm").
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    logits = beta * (chosen_logratios - rejected_logratios)
    losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """IPO (Azar et al. 2023, eq. 17): (difference of log-ratios - 1 / (2 beta))^2, here on mean log-probs, as TRL takes them."""
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    losses = (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def simpo_loss(policy_chosen_logps, policy_rejected_logps, beta, gamma_beta_ratio, label_smoothing=0.0):
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(beta * (mean chosen - mean rejected) - gamma), without a reference.

    gamma = beta * gamma_beta_ratio. Rewards are beta * mean log-prob, detached.
    """
    logits = beta * (policy_chosen_logps - policy_rejected_logps - gamma_beta_ratio)
    losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    return losses, beta * policy_chosen_logps.detach(), beta * policy_rejected_logps.detach()


def wpo_weights(mean_chosen_logps, mean_rejected_logps):
    """WPO (Zhou et al. 2024, eq. 4, without its alignment term): how likely the pair is under the policy, (N,) in (0, 1], detached."""
    return (mean_chosen_logps + mean_rejected_logps).detach().exp()


def preference_loss(config, policy, reference, counts):
    """The configured loss. policy, reference: (2, N) *summed* log-probs, chosen then rejected; counts (2, N) supervised tokens.

    Returns (losses, chosen_rewards, rejected_rewards), each (N,). The reference is ignored by simpo.
    """
    if config.loss in ("dpo_norm", "ipo", "simpo"):
        policy, reference = policy / counts, reference / counts
    if config.loss == "simpo":
        return simpo_loss(*policy, config.beta, config.gamma_beta_ratio, config.label_smoothing)
    if config.loss == "ipo":
        return ipo_loss(*policy, *reference, config.beta)
    losses, chosen_rewards, rejected_rewards = dpo_loss(*policy, *reference, config.beta, config.label_smoothing)
    if config.loss == "wpo":
        losses = losses * wpo_weights(*(policy / counts))
    return losses, chosen_rewards, rejected_rewards


# ---------------------------------------------------------------- log-probs of answers


def answer_logps(model, batch, num_pairs):
    """Summed log-probs of the answers of a packed batch, (2, N) float32, chosen then rejected; and their token counts (2, N).

    The policy and the reference both come from here, so at step 0 they are the same numbers to the last bit.
    """
    hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, shared=batch.shared)  # (T, D)
    logps = token_logps(hidden.index_select(0, batch.supervised), model.lm_head.weight, batch.targets)  # (S,)
    sums = segment_sums(logps, batch.supervised_offsets)  # one per document: the chosen ones, then the rejected ones
    counts = batch.supervised_offsets.diff()
    answers = slice(2 * num_pairs)  # all documents, but for packing.PLACEHOLDER, which is no pair
    return sums[answers].view(2, num_pairs), counts[answers].view(2, num_pairs)


# ---------------------------------------------------------------- one step, and evaluation

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


def pair_metrics(losses, chosen_rewards, rejected_rewards, policy):
    """(len(METRICS), N): every metric per pair, detached."""
    margins = chosen_rewards - rejected_rewards
    return torch.stack([losses.detach(), chosen_rewards, rejected_rewards, margins, (margins > 0).float(), *policy.detach()])


def forward_backward(model, pairs, reference, ids, config, world):
    """Accumulate the gradient of the loss over the pairs `ids` (B,) of one optimizer step. reference (n, 2): summed log-probs per pair.

    Returns (metrics, gap), equal on every rank; gap is the largest |policy - reference| of an answer in the unit of TOLERANCE, rounding
    before the first update. FloatingPointError, naming the rows, when a micro-batch's loss is not finite: no weight has changed then.
    """
    chosen_tokens = int(pairs.chosen.num_targets[ids].sum())
    totals = torch.zeros(len(METRICS), device=world.device)
    gaps = [torch.zeros(1, device=world.device)]  # a rank without a pair has no gap
    losses, rows = [], []
    for members, batch, step_waste in local_batches(pairs, ids, model.config, config.tokens_per_microbatch, world):
        policy, counts = answer_logps(model, batch, len(members))
        ref = torch.from_numpy(reference[members].T).to(world.device)  # (2, N)
        pair_losses, chosen_rewards, rejected_rewards = preference_loss(config, policy, ref, counts)
        loss = pair_losses.sum() / len(ids)  # this rank's share of the global mean over pairs
        if config.sft_weight:
            loss = loss - config.sft_weight * policy[0].sum() / chosen_tokens
        (loss * world.size).backward()  # FSDP averages over ranks; we want the sum
        totals += pair_metrics(pair_losses, chosen_rewards, rejected_rewards, policy).sum(dim=1)
        gaps.append(((policy.detach() - ref).abs() / counts.sqrt()).flatten())
        losses.append(loss.detach())
        rows.append([pairs.row_ids[i] for i in members])
        waste = step_waste
    losses = torch.stack(losses).tolist()
    parallel.require_finite(losses, rows)
    loss, *totals = parallel.sum_across_ranks([math.fsum(losses), *totals.tolist()])
    metrics = {name: total / len(ids) for name, total in zip(METRICS, totals, strict=True)}
    return metrics | {"loss": loss, "padding_waste": waste}, parallel.max_across_ranks(torch.cat(gaps).max().item())


@torch.no_grad()
def evaluate(model, pairs, reference, config, world, log):
    """Means over the held-out pairs, and half-widths of 95 % intervals (1.96 standard errors over pairs) of accuracy and margin."""
    sums = torch.zeros(2, len(METRICS), dtype=torch.float64)  # of the values and of their squares
    for ids in log.progress("evaluate", in_order(len(pairs), config.global_batch_size)):
        for members, batch, _ in local_batches(pairs, ids, model.config, config.tokens_per_microbatch, world):
            policy, counts = answer_logps(model, batch, len(members))
            ref = torch.from_numpy(reference[members].T).to(world.device)
            values = pair_metrics(*preference_loss(config, policy, ref, counts), policy).double().cpu()
            sums += torch.stack([values.sum(dim=1), values.square().sum(dim=1)])
    parallel.release(model)
    sums = torch.tensor(parallel.sum_across_ranks(sums.flatten().tolist()), dtype=torch.float64)
    means, squares = sums.view(2, -1) / len(pairs)
    errors = 1.96 * ((squares - means.square()).clamp(min=0) / len(pairs)).sqrt()
    intervals = ("rewards/margins", "rewards/accuracies")
    metrics = {f"eval/{name}": mean.item() for name, mean in zip(METRICS, means, strict=True)}
    if config.sft_weight:  # as in training
        metrics["eval/loss"] -= config.sft_weight * len(pairs) * metrics["eval/logps/chosen"] / int(pairs.chosen.num_targets.sum())
    return metrics | {f"eval/{name}_ci95": errors[METRICS.index(name)].item() for name in intervals}


# ---------------------------------------------------------------- the reference cache

# By how much an answer's summed log-prob may differ between two passes of the same weights, in nats over the root of its tokens: another
# packing rounds each token differently and independently, so the sum's difference grows with the root. Largest of 48 pairs in bf16
# (SmolLM2-135M, CPU): 0.11, and 0.30 for unlikely two-token answers; between its SFT and DPO weights 1.2 and 0.8 or more in any 8 pairs.
# fp8 is not measured: what moves a bf16 number by its last bit can move a float8 one by a whole step.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.5, "fp8": 1.0}
SAVE_SECONDS = 60


def reference_key(weights, pairs, config, world):
    """sha256 of everything that the reference log-probs depend on: the weights' content, tokens and mask (hence template and supervised
    turns), compute dtype, kernels and attention path, and whether prefixes are shared: policy and reference round alike."""
    path = attention_path(world.device, config.precision, config.attention)
    parts = [weights, pairs.fingerprint, config.precision, config.kernels, path, pairs.share_prefix]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@torch.no_grad()
def reference_logps(model, pairs, steps, key, config, world, log):
    """Summed log-probs of the answers under `model`, which must still have its step-0 weights: (n, 2) float32, NaN for pairs in no step.

    steps: the id arrays (B,) that will be asked for. They are walked in the packing of the first epoch, so that step 1 compares bit for
    bit. The table lives in cache_dir/reference/<key>.safetensors, is saved every minute and goes on from there. One step of what was
    loaded is computed again, in the packing that wrote it unless that has changed: ValueError when it differs by more than rounding.
    """
    path = Path(config.cache_dir) / "reference" / f"{key[:32]}.safetensors"
    table = parallel.main_first(world, lambda: _read_table(path, len(pairs)) if world.main else np.zeros((len(pairs), 2)))
    table = _sum_of_tables(table)  # rank 0's: another run may write between two reads, and ranks of two minds would wait for ever
    known = ~np.isnan(table[:, 0])
    found = [ids for ids in steps if known[ids].all()] or [ids[known[ids]] for ids in steps if known[ids].any()]
    if found:
        _verify_reference(model, pairs, table, found[0], path, config, world)
    missing = [ids for ids in steps if not known[ids].all()]
    saved = time.monotonic()
    for done, ids in enumerate(log.progress(f"reference log-probs ({known.sum():,} of {len(pairs):,} pairs found)", missing), 1):
        table[ids] = _compute_reference(model, pairs, ids, config, world)
        if world.main and (done == len(missing) or time.monotonic() - saved > SAVE_SECONDS):
            _write_table(path, table)
            saved = time.monotonic()
    parallel.release(model)
    return table


def _read_table(path, n):
    if not path.exists():
        return np.full((n, 2), np.nan, dtype=np.float32)
    try:
        return load_file(path)["logps"]
    except SafetensorError as error:
        raise UserError(f"{path}: truncated, or no reference cache: {error}; delete it") from error


def _write_table(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # not another run's, which may fill the same table
    write_safetensors(temporary, {"logps": (torch.float32, table.shape)}, lambda _: torch.from_numpy(table))
    temporary.rename(path)


def _compute_reference(model, pairs, ids, config, world):
    """(B, 2) float32 log-probs of one step's pairs, on every rank."""
    values, position = np.zeros((len(ids), 2)), {pair: i for i, pair in enumerate(ids.tolist())}
    with adapters_disabled(model):
        for members, batch, _ in local_batches(pairs, ids, model.config, config.tokens_per_microbatch, world):
            logps, _ = answer_logps(model, batch, len(members))
            values[[position[pair] for pair in members.tolist()]] = logps.T.cpu().numpy()
    parallel.require_finite(values.sum(axis=1), [[pairs.row_ids[i]] for i in ids])
    # every pair was on one rank: a sum with zeros, exact
    return _sum_of_tables(values)


def _sum_of_tables(values):
    """(n, 2) float32, on every rank, of one table (n, 2) per rank."""
    return np.array(parallel.sum_across_ranks(values.flatten().tolist()), dtype=np.float32).reshape(-1, 2)


def _verify_reference(model, pairs, table, ids, path, config, world):
    counts = np.stack([pairs.chosen.num_targets[ids], pairs.rejected.num_targets[ids]], axis=1)
    gap = (np.abs(_compute_reference(model, pairs, ids, config, world) - table[ids]) / np.sqrt(counts)).max()
    world.say(f"{path}: {len(ids)} pairs computed again, largest difference {gap:.1e} nats/sqrt(tokens)")
    if gap > TOLERANCE[config.precision]:
        raise UserError(f"{path}: not this model's log-probs, expected at most {TOLERANCE[config.precision]:.0e}; delete the file")


def check_first_step(metrics, gap, config, world):
    """Before any update policy and reference are one model, so the DPO loss is ln 2. ValueError when they differ by more than rounding."""
    expected = f" (ln 2 = {math.log(2):.6f})" if config.loss in ("dpo", "dpo_norm") and not config.sft_weight else ""
    world.say(f"step 1: loss {metrics['loss']:.6f}{expected}, largest |policy - reference| {gap:.1e} nats/sqrt(tokens)")
    if gap > TOLERANCE[config.precision]:
        raise UserError(
            f"policy and reference differ by {gap:.1e} nats/sqrt(tokens) before the first update, expected at most "
            f"{TOLERANCE[config.precision]:.0e}: the reference is not of model_path={config.model_path!r}"
        )


# ---------------------------------------------------------------- the run


def main(argv):
    if "--plan" in argv:
        return plan.main("dpo", argv)
    config = load("dpo", argv)
    world = parallel.init()
    check_world_size(config, world.size)
    if config.push:  # a wrong name or token is found out before training, not after it
        parallel.main_first(world, lambda: hub.open_for_push(config.push) if world.main else None)

    directory = parallel.main_first(world, lambda: resolve(config.model_path))
    tokenizer = Tokenizer.from_dir(directory)
    shape = parallel.main_first(world, lambda: read_model_config(config, directory, tokenizer, world.device))
    pairs, held_out = parallel.main_first(world, lambda: load_preferences(config, tokenizer, world.say))
    model = load_model(config, directory, shape, world.device)

    epoch_steps = steps_per_epoch(len(pairs), config.global_batch_size)
    total_steps = min(config.num_epochs * epoch_steps, config.max_steps or math.inf)
    warmup = warmup_steps(config, total_steps)
    optimizer = adamw(model, config.weight_decay, DTYPES[config.moments])

    weights = parallel.from_main(world, lambda: fingerprint(directory))
    provenance = {"weights": weights, "data": pairs.fingerprint}
    checkpointer = checkpoint.Checkpointer(config.out_dir, config.keep_last, resume_dict(config) | provenance, fresh=config.fresh)
    latest = checkpointer.latest()  # another configuration's is refused before anything is written over
    parallel.require_same(world, data=pairs.fingerprint, data_eval=held_out and held_out.fingerprint, checkpoint=str(latest))
    log = Logbook(config, world, total_steps, provenance | {"stage": "dpo", "warmup_steps": warmup, **implicit(config)})
    computed = pairs.lengths.sum() / (pairs.chosen.lengths.sum() + pairs.rejected.lengths.sum())
    sharing = f"; prefix sharing computes {computed:.1%} of the tokens" if pairs.share_prefix else ""
    size = f"{len(pairs):,} pairs, {config.global_batch_size} a step"
    world.say(f"DPO: {size}; {total_steps} steps on {world.size} rank(s) of {world.device.type}{sharing}")

    def batch_ids(step):
        return step_examples(step, len(pairs), config.global_batch_size, config.seed)

    def reference_of(dataset, steps):
        if config.loss == "simpo":  # has none
            return np.zeros((len(dataset), 2), dtype=np.float32)
        return reference_logps(model, dataset, steps, reference_key(weights, dataset, config, world), config, world, log)

    # taken here, from the step-0 weights, also when a checkpoint is about to be loaded
    reference = reference_of(pairs, [batch_ids(step) for step in range(min(total_steps, epoch_steps))])
    held_out_reference = reference_of(held_out, in_order(len(held_out), config.global_batch_size)) if held_out else None
    first_step = checkpointer.load(latest, model, optimizer) if latest else 0
    log.resume_at(first_step, latest)

    stop = parallel.StopSignal()
    for step in range(first_step, total_steps):
        if held_out and (step == 0 or (config.eval_every and step % config.eval_every == 0)):
            log.evaluation(step, evaluate(model, held_out, held_out_reference, config, world, log))
        if config.sample_every and step % config.sample_every == 0:
            log.samples(step, *sample(model, (held_out or pairs).chosen, tokenizer, config))
        ids = batch_ids(step)
        lr = learning_rate(step, total_steps, config.lr, config.lr_schedule, warmup)
        before = sample_weights(model) if step == warmup else None  # at the peak rate

        metrics, gap = forward_backward(model, pairs, reference, ids, config, world)
        if step == 0 and config.loss != "simpo":
            check_first_step(metrics, gap, config, world)
        metrics |= {"grad_norm": apply_gradients(optimizer, lr, config.max_grad_norm, pairs.row_ids[ids]), "lr": lr}
        if before:
            metrics["weights_changed"] = weights_changed(before, model)
        tokens = pairs.lengths[ids].sum()
        log.step(step + 1, metrics, tokens, training_flops(model, pairs.flops(model.config, ids).sum(), tokens))

        stopped, last = stop.received(), step + 1 == total_steps
        if stopped or (config.save_every and (last or (step + 1) % config.save_every == 0)):
            checkpointer.save(step + 1, model, optimizer)
        if stopped:
            checkpointer.wait()
            world.say(f"stopped by signal {stopped} after step {step + 1}, saved; the same command goes on from there")
            return 128 + stopped

    checkpointer.wait()
    if held_out:
        log.evaluation(total_steps, evaluate(model, held_out, held_out_reference, config, world, log))
    if config.sample_every:
        log.samples(total_steps, *sample(model, (held_out or pairs).chosen, tokenizer, config))
    finish(model, tokenizer, config, world)
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
