"""Direct preference optimisation: `python train_dpo.py configs/tiny.py`, or under `torchrun`.

One model is in memory. The reference's log-probs are those of the step-0 weights; they are computed before
the first update and kept in a file. Reading order: the losses on four (N,) tensors, their table, the keys,
log-probs of answers, one optimizer step, evaluation, the reference cache, main.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F

import training
from data import load_preferences
from kernels import attention_path, segment_sums, token_logps
from model import adapters_disabled
from packing import in_order, local_batches, step_examples, steps_per_epoch
from planner import plan
from plumbing import parallel
from plumbing.config import Config, load, setting
from plumbing.files import UserError
from plumbing.tensors import read_verified, write_verified

# ---------------------------------------------------------------- the losses: (N,) tensors in and out
# Log-probs are in nats, of an answer's supervised tokens: their sum or their mean, as LOSSES says.


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    label_smoothing=0.0,
):
    """DPO (Rafailov et al. 2023, eq. 7): -log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)).

    All log-probs (N,). label_smoothing: the probability that a label is wrong (conservative DPO, Mitchell
    2023, eq. 3). Returns (losses, chosen_rewards, rejected_rewards), each (N,); rewards are
    beta * log(policy / reference), detached. On mean log-probs it is Tulu 3's length-normalised DPO
    (Lambert et al. 2024, eq. 6; loss="dpo_norm").
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    logits = beta * (chosen_logratios - rejected_logratios)
    # logsigmoid(x) and not log(sigmoid(x)), which is -inf below x = -89 and has no gradient there
    losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """IPO (Azar et al. 2023, eq. 17): (difference of log-ratios - 1 / (2 beta))^2; on means, as in TRL."""
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    # a distance from a target, where DPO's loss goes on falling as the margin grows
    losses = (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def simpo_loss(policy_chosen_logps, policy_rejected_logps, beta, gamma_beta_ratio, label_smoothing=0.0):
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(beta * (mean chosen - mean rejected) - gamma).

    It has no reference. gamma = beta * gamma_beta_ratio. Rewards are beta * mean log-prob, detached.
    """
    # only the difference of the two means counts: nothing holds their level, which may fall
    logits = beta * (policy_chosen_logps - policy_rejected_logps - gamma_beta_ratio)
    losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    return losses, beta * policy_chosen_logps.detach(), beta * policy_rejected_logps.detach()


def wpo_weights(mean_chosen_logps, mean_rejected_logps):
    """WPO (Zhou et al. 2024, eq. 4, without its alignment term): the pairs' likelihoods, (N,), detached."""
    return (mean_chosen_logps + mean_rejected_logps).detach().exp()


# ---------------------------------------------------------------- the table of losses


@dataclass(frozen=True)
class Loss:
    """One preference loss. A row of LOSSES is all that config, plan, report and tools know of it."""

    function: Callable  # of log-probs (N,), policy chosen and rejected, the reference's two; beta, options
    average: Literal["sum", "mean"]  # over an answer's supervised tokens
    beta: float  # where the config gives none
    usual_beta: tuple[float, float]  # what lies outside is trained, and said at the start
    options: tuple[str, ...] = ()  # further keys of the config that the function takes
    weights: Callable | None = None  # of the pairs' losses; a function of the policy's two mean log-probs
    needs_reference: bool = True
    unit: str = "nats per pair"

    @property
    def ratio_unit(self):
        """The unit of the log-ratios, which is the inverse of beta's."""
        return {"sum": "nats per answer", "mean": "nats per token"}[self.average]

    def facts(self):
        """What the run's manifest says of the loss, for the report."""
        return {"unit": self.unit, "ratio_unit": self.ratio_unit, "needs_reference": self.needs_reference}


# Where the betas are from. A beta for sums is that for means divided by the answer's length (docs/loss.md).
LOSSES = {
    # Tulu 3 (Lambert et al. 2024, section 5): 5; usual: 0.01 to 0.1 on sums of 200 tokens
    "dpo_norm": Loss(dpo_loss, "mean", beta=5.0, usual_beta=(2.0, 20.0), options=("label_smoothing",)),
    # Rafailov et al. 2023, appendix B: 0.1; usual: the sweep of Hugging Face's "Preference tuning LLMs", 2024
    "dpo": Loss(dpo_loss, "sum", beta=0.1, usual_beta=(0.01, 0.9), options=("label_smoothing",)),
    # Meng et al. 2024, README of their code: 2.0 to 10
    "simpo": Loss(
        simpo_loss, "mean", beta=2.0, usual_beta=(2.0, 10.0), options=("gamma_beta_ratio", "label_smoothing"),
        needs_reference=False,
    ),
    # TRL, which takes means: 0.1; usual: the same sweep as for "dpo"
    "ipo": Loss(ipo_loss, "mean", beta=0.1, usual_beta=(0.01, 0.9), unit="squared nats per token"),
    # Zhou et al. 2024, the model cards of their Llama-3 and Gemma-2: 0.01
    "wpo": Loss(dpo_loss, "sum", beta=0.01, usual_beta=(0.01, 0.9), weights=wpo_weights),
}  # fmt: skip


def preference_loss(config, policy_logps, ref_logps, counts):
    """The configured loss of N pairs. policy_logps, ref_logps (2, N): *sums*, chosen then rejected.

    counts (2, N): the answers' tokens. Returns (losses, chosen_rewards, rejected_rewards), each (N,).
    A loss without a reference ignores ref_logps.
    """
    loss = LOSSES[config.loss]
    # Sums grow with an answer's length and means do not: under one beta they are different losses.
    means = policy_logps / counts
    if loss.average == "mean":
        policy_logps, ref_logps = means, ref_logps / counts
    logps = [*policy_logps, *ref_logps] if loss.needs_reference else [*policy_logps]
    options = {key: getattr(config, key) for key in loss.options}
    losses, chosen_rewards, rejected_rewards = loss.function(*logps, config.beta, **options)
    if loss.weights:
        losses = losses * loss.weights(*means)
    return losses, chosen_rewards, rejected_rewards


# ---------------------------------------------------------------- the keys of this command


@dataclass(frozen=True, kw_only=True)
class DPOConfig(Config):
    """Keys of train_dpo.py."""

    loss: Literal[tuple(LOSSES)] = setting(
        "loss", "name", "dpo_norm: DPO on per-token mean log-probs", default="dpo_norm"
    )
    beta: float | None = setting(
        "loss",
        "1/nat",
        "strength of the tie to the reference; None: the loss's own (dpo_norm 5, dpo 0.1)",
        default=None,
        above=0,
    )
    label_smoothing: float = setting(
        "loss",
        "probability",
        "that a label is wrong; dpo_norm, dpo and simpo",
        default=0.0,
        minimum=0,
        below=0.5,
    )
    gamma_beta_ratio: float | None = setting(
        "loss", "nat/token", "target margin / beta; simpo only", default=None, minimum=0
    )
    share_prefix: bool = setting(
        "machine",
        "flag",
        "compute what chosen and rejected begin with once: faster, the same to rounding",
        default=True,
        affects_results=False,
    )
    sft_weight: float = setting(
        "loss", "-", "weight of an added token-mean NLL of the chosen answers", default=0.0, minimum=0
    )  # fmt: skip

    example_documents: ClassVar = 2

    @classmethod
    def conflicts(cls, c):
        yield from super().conflicts(c)
        options = LOSSES[c.loss].options
        if ("gamma_beta_ratio" in options) != (c.gamma_beta_ratio is not None):
            takers = _losses_with("gamma_beta_ratio")
            both = f"loss={c.loss!r}, gamma_beta_ratio={c.gamma_beta_ratio}"
            yield ("loss", "gamma_beta_ratio"), f"{both}: {takers} needs one, no other loss has one"
        if c.label_smoothing > 0 and "label_smoothing" not in options:
            defined = f"defined for {_losses_with('label_smoothing')}, not for loss={c.loss!r}"
            yield ("label_smoothing", "loss"), f"label_smoothing={c.label_smoothing}: {defined}"

    @staticmethod
    def resolve(values):
        """A beta of None is the loss's own: config.json, manifest and hashes hold the number."""
        own = LOSSES[values["loss"]].beta
        return values | {"beta": own if values["beta"] is None else values["beta"]}

    @property
    def needs_reference(self):
        """Whether a pass over all pairs precedes the training."""
        return LOSSES[self.loss].needs_reference


def _losses_with(option):
    """`dpo_norm, dpo and simpo`: the losses that take a key."""
    *names, last = [name for name, loss in LOSSES.items() if option in loss.options]
    return f"{', '.join(names)} and {last}" if names else last


def say_unusual_beta(config, world):
    """One line where beta is outside its usual range: 5 on sums is a tie 50 times tighter than 0.1."""
    loss = LOSSES[config.loss]
    low, high = loss.usual_beta
    if not low <= config.beta <= high:
        what = f"loss={config.loss!r} (log-ratios in {loss.ratio_unit})"
        usual = f"usual are {low} to {high}, default {loss.beta}"
        world.say(f"beta={config.beta}: unusual for {what}; {usual}")


# ---------------------------------------------------------------- log-probs of answers


def answer_logps(model, batch, num_pairs):
    """Summed log-probs (2, N) float32 of a packed batch's answers, chosen then rejected, and token counts.

    The policy's and the reference's both come from here, so at step 0 they are equal to the last bit.
    """
    # Chosen and rejected answers of all pairs lie in one stream without padding. With batch.shared a pair's
    # prompt is in it once: a quarter of the tokens less, where it is as long as an answer.
    stream = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    hidden = model(*stream, shared=batch.shared)  # (T, D)
    logps = token_logps(hidden.index_select(0, batch.supervised), model.lm_head.weight, batch.targets)  # (S,)
    sums = segment_sums(logps, batch.supervised_offsets)  # a document each: all chosen, then all rejected
    counts = batch.supervised_offsets.diff()
    answers = slice(2 * num_pairs)  # all documents, except packing.PLACEHOLDER, which is no pair
    return sums[answers].view(2, num_pairs), counts[answers].view(2, num_pairs)


# ---------------------------------------------------------------- one step, and evaluation

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
BOUNDED = ("rewards/margins", "rewards/accuracies")  # whose held-out means have an interval


def pair_metrics(losses, chosen_rewards, rejected_rewards, policy_logps):
    """(len(METRICS), N): every metric per pair, detached."""
    margins = chosen_rewards - rejected_rewards
    accuracies = (margins > 0).float()  # a tie, as at step 1, is no win
    rows = [losses.detach(), chosen_rewards, rejected_rewards, margins, accuracies, *policy_logps.detach()]
    return torch.stack(rows)


def forward_backward(model, pairs, reference, ids, config, world):
    """Accumulate the gradient of the loss over the pairs `ids` (B,) of one optimizer step.

    reference (n, 2): summed log-probs of every pair. Returns (metrics, gap), equal on every rank; gap is the
    largest |policy - reference| of an answer in the unit of TOLERANCE: before the first update, rounding.
    """
    chosen_tokens = int(pairs.chosen.num_targets[ids].sum())
    # kept on the device and read once a step: asking for a number makes the host wait for the GPU
    totals = torch.zeros(len(METRICS), device=world.device)
    gaps = [torch.zeros(1, device=world.device)]  # a rank without a pair has no gap
    losses = []
    micro_batches = local_batches(pairs, ids, model.config, config.tokens_per_microbatch, world)
    for micro_batch_ids, batch, padding_waste in parallel.micro_batches(model, micro_batches):  # noqa: B007
        policy_logps, counts = answer_logps(model, batch, len(micro_batch_ids))
        ref_logps = torch.from_numpy(reference[micro_batch_ids].T).to(world.device)  # (2, N)
        pair_losses, *rewards = preference_loss(config, policy_logps, ref_logps, counts)
        # This rank's share of the mean over the step's pairs: the shares' sum is exact, whatever their size.
        loss = pair_losses.sum() / len(ids)
        if config.sft_weight:
            loss = loss - config.sft_weight * policy_logps[0].sum() / chosen_tokens
        (loss * parallel.loss_scale(model)).backward()  # gradients are sums over ranks
        totals += pair_metrics(pair_losses, *rewards, policy_logps).sum(dim=1)
        # the policy's distance from the reference, per answer; only step 1 asks for it
        gaps.append(((policy_logps.detach() - ref_logps).abs() / counts.sqrt()).flatten())
        losses.append((loss.detach(), pairs.row_ids[micro_batch_ids]))
    loss = training.sum_losses(losses)
    totals = parallel.sum_across_ranks(totals.tolist())
    metrics = {name: total / len(ids) for name, total in zip(METRICS, totals, strict=True)}
    gap = parallel.max_across_ranks(torch.cat(gaps).max().item())
    return metrics | {"loss": loss, "padding_waste": padding_waste}, gap


def sum_of_tables(values):
    """One float64 table of the ranks' tables `values`, whose rows are one rank's and zeros on the others.

    So the sum is exact, and NaN stays NaN.
    """
    return np.reshape(parallel.sum_across_ranks(values.flatten().tolist()), values.shape)


@torch.no_grad()
def evaluate(model, pairs, reference, config, world, log):
    """Means over the held-out pairs; of accuracy and margin also half of a 95 % interval (1.96 errors).

    Prompts count as independent, the pairs of one prompt do not: standard errors are cluster-robust (Liang &
    Zeger 1986). With few prompts they are still too small: an interval of 5 covers 88 %. Of one there is
    none.
    """
    # each pair's own values: the pairs of one prompt may be on several ranks
    table = np.zeros((len(pairs), len(METRICS)))
    for ids in log.progress("evaluate", in_order(len(pairs), config.global_batch_size)):
        micro_batches = local_batches(pairs, ids, model.config, config.tokens_per_microbatch, world)
        for micro_batch_ids, batch, _ in micro_batches:
            policy_logps, counts = answer_logps(model, batch, len(micro_batch_ids))
            ref_logps = torch.from_numpy(reference[micro_batch_ids].T).to(world.device)
            losses_and_rewards = preference_loss(config, policy_logps, ref_logps, counts)
            table[micro_batch_ids] = pair_metrics(*losses_and_rewards, policy_logps).T.cpu().numpy()
    parallel.release(model)
    table = sum_of_tables(table)
    means = table.mean(axis=0)
    metrics = {f"eval/{name}": mean for name, mean in zip(METRICS, means.tolist(), strict=True)}
    if config.sft_weight:  # as in training: the token mean over all chosen answers
        tokens = int(pairs.chosen.num_targets.sum())
        metrics["eval/loss"] -= config.sft_weight * len(pairs) * metrics["eval/logps/chosen"] / tokens
    prompts = int(pairs.prompts.max()) + 1
    if prompts == 1:  # of one prompt nothing is known about others
        return metrics
    for name in BOUNDED:
        column = METRICS.index(name)
        # Deviations add up within a prompt. The spread of G prompts is (G - 1) / G of the population's.
        sums = np.bincount(pairs.prompts, weights=table[:, column] - means[column])
        variance = prompts / (prompts - 1) * np.square(sums).sum() / len(pairs) ** 2
        metrics[f"eval/{name}_ci95"] = 1.96 * variance.item() ** 0.5
    return metrics


# ---------------------------------------------------------------- the reference cache

# Rounding errors of tokens are independent, so the error of an answer's sum grows with sqrt(tokens):
# tolerances are nats per sqrt(token), between two passes of the same weights in different packings. Largest
# of 48 pairs in bf16 (SmolLM2-135M, CPU): 0.11, and 0.30 for unlikely two-token answers. Between its SFT and
# DPO weights the difference is 1.2, and 0.8 or more in any 8 pairs. fp8 is not measured: the last bit of a
# bf16 number can move a float8 number by a whole step.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.5, "fp8": 1.0}
UNLIKELIEST = -1000  # nats a token; a model that knows nothing gives -ln(vocabulary), about -12
SAVE_SECONDS = 60


def reference_key(weights, pairs, config, world):
    """sha256 of everything that the reference log-probs depend on.

    The content of the weights; tokens and mask (hence template and supervised turns); dtype, kernels and
    attention path, and whether prefixes are shared, because policy and reference must round alike.
    """
    # beta, loss, lr, seed, batch sizes and the number of GPUs are left out: they change a log-prob by
    # rounding at most, so a sweep over beta computes its reference once.
    path = attention_path(world.device, config.precision, config.attention)
    parts = [weights, pairs.fingerprint, config.precision, config.kernels, path, pairs.share_prefix]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@torch.no_grad()
def reference_logps(model, pairs, steps, key, config, world, log):
    """Summed log-probs of the answers under the step-0 weights: (n, 2) float32, NaN for pairs in no step.

    steps: the id arrays (B,) that will be asked for, in the packing of the first epoch: step 1 compares bit
    for bit. The table lives in cache_dir/reference/<key>.safetensors with its sha256, is saved every minute
    and goes on from there. One step of what was loaded is computed again: UserError beyond rounding.
    """
    path = Path(config.cache_dir) / "reference" / f"{key[:32]}.safetensors"
    # Use rank 0's copy everywhere: ranks with different tables disagree on what is missing, and deadlock.
    nothing = np.zeros((len(pairs), 2))
    table = parallel.main_first(world, lambda: _read_table(path, len(pairs)) if world.main else nothing)
    table = sum_of_tables(table).astype(np.float32)
    _require_plausible(path, table, pairs)
    known = ~np.isnan(table[:, 0])
    # A whole step, if there is one, is compared in the packing that wrote it: its difference is 0 to the bit.
    found = [ids for ids in steps if known[ids].all()]
    if not found:
        found = [ids[known[ids]] for ids in steps if known[ids].any()]
    if found:
        _verify_reference(model, pairs, table, found[0], path, config, world)
    missing = [ids for ids in steps if not known[ids].all()]
    label = f"reference log-probs ({known.sum():,} of {len(pairs):,} pairs found)"
    saved = time.monotonic()
    for done, ids in enumerate(log.progress(label, missing), 1):
        table[ids] = _compute_reference(model, pairs, ids, config, world)
        if world.main and (done == len(missing) or time.monotonic() - saved > SAVE_SECONDS):
            _write_table(path, table)
            saved = time.monotonic()
    parallel.release(model)
    return table


def _read_table(path, n):
    """(n, 2) of an earlier run, NaN where it was not computed. UserError when a bit is not as written."""
    if not path.exists():
        return np.full((n, 2), np.nan, dtype=np.float32)
    return read_verified(path)["logps"].numpy()


def _require_plausible(path, table, pairs):
    """UserError for a number that is no summed log-prob, whatever the file's hash says."""
    tokens = np.stack([pairs.chosen.num_targets, pairs.rejected.num_targets], axis=1)
    is_wrong = (table > tokens * 1e-3) | (table < tokens * UNLIKELIEST)  # NaN, not computed, is neither
    if is_wrong.any():
        row, side = np.argwhere(is_wrong)[0]
        what = f"{table[row, side]:.1e} nats for {tokens[row, side]} tokens of {pairs.row_ids[row]}"
        raise UserError(f"{path}: {what}, expected {UNLIKELIEST} to 0 a token; delete it")


def _write_table(path, table):
    # A rename replaces the old table, so two runs that fill one at once never read a torn file.
    write_verified(path, {"logps": torch.from_numpy(table)})


def _compute_reference(model, pairs, ids, config, world):
    """(B, 2) float32 log-probs of one step's pairs, on every rank."""
    values = np.zeros((len(ids), 2))
    row_of = {pair: row for row, pair in enumerate(ids.tolist())}
    # Under LoRA the reference is the frozen model below the adapters, whatever these have become.
    with adapters_disabled(model):
        micro_batches = local_batches(pairs, ids, model.config, config.tokens_per_microbatch, world)
        for micro_batch_ids, batch, _ in micro_batches:
            logps, _ = answer_logps(model, batch, len(micro_batch_ids))
            values[[row_of[pair] for pair in micro_batch_ids.tolist()]] = logps.T.cpu().numpy()
    rows = [[pairs.row_ids[i]] for i in ids]
    what = "the reference's log-probs are not finite; no step was taken"
    parallel.require_finite(values.sum(axis=1), rows, what)
    return sum_of_tables(values).astype(np.float32)


def _verify_reference(model, pairs, table, ids, path, config, world):
    """UserError when the pairs `ids`, computed again, differ from the table by more than rounding."""
    counts = np.stack([pairs.chosen.num_targets[ids], pairs.rejected.num_targets[ids]], axis=1)
    differences = np.abs(_compute_reference(model, pairs, ids, config, world) - table[ids])
    gap = (differences / np.sqrt(counts)).max()
    world.say(f"{path}: {len(ids)} pairs computed again, largest difference {gap:.1e} nats/sqrt(tokens)")
    tolerance = TOLERANCE[config.precision]
    if gap > tolerance:
        found = f"largest difference {gap:.1e} nats/sqrt(tokens), expected at most {tolerance:g}"
        raise UserError(f"{path}: not this model's log-probs: {found}; delete the file")


def check_first_step(metrics, gap, config, world):
    """Before the first update policy and reference are one model, so the DPO loss is ln 2.

    UserError when they differ by more than rounding.
    """
    # A number that is known beforehand: template, mask, packing, kernels and cache must agree to give it.
    loss = LOSSES[config.loss]
    is_ln2 = loss.function is dpo_loss and not loss.weights and not config.sft_weight
    expected = f" (ln 2 = {math.log(2):.6f})" if is_ln2 else ""
    difference = f"{gap:.1e} nats/sqrt(tokens)"
    world.say(f"step 1: loss {metrics['loss']:.6f}{expected}, largest |policy - reference| {difference}")
    tolerance = TOLERANCE[config.precision]
    if gap > tolerance:
        problem = f"policy and reference differ by {difference} before the first update"
        reason = f"the reference is not of model_path={config.model_path!r}"
        raise UserError(f"{problem}, expected at most {tolerance:g}: {reason}")


# ---------------------------------------------------------------- the run


def describe_sharing(pairs):
    """Text: the share of the tokens that are computed when chosen and rejected share their prompt's rows."""
    if not pairs.share_prefix:
        return ""
    computed = pairs.lengths.sum() / (pairs.chosen.lengths.sum() + pairs.rejected.lengths.sum())
    return f"; prefix sharing computes {computed:.1%} of the tokens"


def reference_of(run, pairs, steps):
    """(n, 2) float32: the reference's log-probs of the pairs in `steps`; zeros where the loss has none."""
    if not run.config.needs_reference:
        return np.zeros((len(pairs), 2), dtype=np.float32)
    key = reference_key(run.weights, pairs, run.config, run.world)
    return reference_logps(run.model, pairs, steps, key, run.config, run.world, run.log)


def main(argv):
    if "--plan" in argv:
        return plan.main("dpo", argv)
    config = load("dpo", argv)
    run = training.start("dpo", config, load_preferences, {"loss": LOSSES[config.loss].facts()})
    pairs, held_out, world = run.data, run.held_out, run.world
    world.say(f"DPO: {len(pairs):,} pairs, {run.pace}{describe_sharing(pairs)}")
    say_unusual_beta(config, world)

    def ids_of(step):  # (B,), of any epoch
        return step_examples(step, len(pairs), config.global_batch_size, config.seed)

    def evaluate_after(steps):
        metrics = evaluate(run.model, held_out, held_out_reference, config, world, run.log)
        run.log.evaluation(steps, metrics)

    # Computed here, from the step-0 weights, also when a checkpoint is about to be loaded.
    # Only for pairs that a step asks for: of a run with max_steps that may be a few.
    epoch = min(run.total_steps, steps_per_epoch(len(pairs), config.global_batch_size))
    reference = reference_of(run, pairs, [ids_of(step) for step in range(epoch)])
    if held_out:
        held_out_reference = reference_of(run, held_out, in_order(len(held_out), config.global_batch_size))

    # Step and seed alone decide which pairs a step has, so a resumed run sees those of an unbroken one.
    for step in range(run.resume(), run.total_steps):
        if run.evaluates_before(step):
            evaluate_after(step)
        run.sample(step, (held_out or pairs).chosen)

        ids = ids_of(step)
        metrics, gap = forward_backward(run.model, pairs, reference, ids, config, world)
        if step == 0 and config.needs_reference:
            check_first_step(metrics, gap, config, world)
        run.update(step, metrics, ids)
        if exit_code := run.save(step + 1):
            return exit_code

    if held_out:
        evaluate_after(run.total_steps)
    run.sample(run.total_steps, (held_out or pairs).chosen)
    return run.finish()


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
