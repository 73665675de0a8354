"""Supervised fine-tuning: `python train_sft.py configs/tiny.py` or `torchrun --nproc-per-node 8 train_sft.py configs/tulu10.py`.

The loss is a sum over this rank's tokens divided by a count over *all* ranks, so the gradient does not depend on how a step's examples
are spread over ranks and micro-batches. Reading order: the loss, one optimizer step, held-out evaluation, main.
"""

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from data import load_sft
from kernels import token_logps
from model import training_flops
from optim import adamw, apply_gradients, implicit, learning_rate, sample_weights, warmup_steps, weights_changed
from packing import in_order, local_batches, step_examples, steps_per_epoch
from planner import plan
from plumbing import checkpoint, hub, parallel
from plumbing.config import Config, check_world_size, load, resume_dict, setting
from plumbing.logbook import Logbook
from plumbing.tokenizer import Tokenizer
from plumbing.weights import fingerprint, resolve
from training import DTYPES, finish, load_model, read_model_config, sample

# ---------------------------------------------------------------- the keys of this command


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Config):
    """Keys of train_sft.py."""

    loss: Literal["token_mean", "tulu3_release"] = setting(
        "loss", "name", "token_mean: NLL sum / supervised tokens of the step; tulu3_release: NLL sum / its sequences", default="token_mean"
    )

    @staticmethod
    def conflicts(c):
        yield from Config.conflicts(c)
        if c.max_seq_len > c.tokens_per_microbatch:
            expected = f"expected at least max_seq_len={c.max_seq_len} (a document must fit one stream)"
            yield ("max_seq_len", "tokens_per_microbatch"), f"tokens_per_microbatch={c.tokens_per_microbatch}: {expected}"


# ---------------------------------------------------------------- the loss


def nll_sum(model, batch):
    """Summed negative log-likelihood of a packed batch's supervised tokens, in nats: a float32 scalar with gradients.

    Hidden states of unsupervised positions are dropped before the vocabulary matmul, the largest of the model.
    """
    hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)  # (T, D)
    return -token_logps(hidden.index_select(0, batch.supervised), model.lm_head.weight, batch.targets).sum()


def loss_denominator(loss, num_tokens, num_sequences):
    """What the step's summed NLL is divided by. num_tokens: supervised tokens of the step, num_sequences: its documents, over all ranks.

    "token_mean": every supervised token weighs the same. "tulu3_release": the sum over tokens per *sequence*, as the released Tulu 3 models
    were trained: the value is in nats per document, and the gradient is larger by the mean number of tokens.
    """
    return {"token_mean": num_tokens, "tulu3_release": num_sequences}[loss]


# ---------------------------------------------------------------- one step, and evaluation


def forward_backward(model, documents, ids, config, world):
    """Accumulate the gradient of the loss over the examples `ids` (B,) of one optimizer step. Returns its metrics, equal on every rank.

    FloatingPointError, naming the rows, when a micro-batch's loss is not finite: no weight has changed then.
    """
    denominator = loss_denominator(config.loss, int(documents.num_targets[ids].sum()), len(ids))
    losses, rows = [], []
    for members, batch, step_waste in local_batches(documents, ids, model.config, config.tokens_per_microbatch, world):
        loss = nll_sum(model, batch) / denominator  # this rank's share of the global mean
        (loss * world.size).backward()  # FSDP averages over ranks; we want the sum
        losses.append(loss.detach())
        rows.append([documents.row_ids[i] for i in members])
        waste = step_waste
    losses = torch.stack(losses).tolist()
    parallel.require_finite(losses, rows)
    (loss,) = parallel.sum_across_ranks([math.fsum(losses)])
    return {"loss": loss, "padding_waste": waste}


@torch.no_grad()
def evaluate(model, documents, config, world, log):
    """Token-mean NLL (nats) and perplexity of the held-out documents; perplexity is infinite above 709 nats, where float64 ends."""
    total = 0.0
    for ids in log.progress("evaluate", in_order(len(documents), config.global_batch_size)):
        for _, batch, _ in local_batches(documents, ids, model.config, config.tokens_per_microbatch, world):
            total += nll_sum(model, batch).item()
    parallel.release(model)
    (total,) = parallel.sum_across_ranks([total])
    nll = total / int(documents.num_targets.sum())
    return {"eval/loss": nll, "eval/perplexity": torch.tensor(nll, dtype=torch.float64).exp().item()}


# ---------------------------------------------------------------- the run


def main(argv):
    if "--plan" in argv:
        return plan.main("sft", argv)
    config = load("sft", argv)
    world = parallel.init()
    check_world_size(config, world.size)
    if config.push:  # a wrong name or token is found out before training, not after it
        parallel.main_first(world, lambda: hub.open_for_push(config.push) if world.main else None)

    directory = parallel.main_first(world, lambda: resolve(config.model_path))
    tokenizer = Tokenizer.from_dir(directory)
    shape = parallel.main_first(world, lambda: read_model_config(config, directory, tokenizer, world.device))
    documents, held_out = parallel.main_first(world, lambda: load_sft(config, tokenizer, world.say))
    model = load_model(config, directory, shape, world.device)

    total_steps = min(config.num_epochs * steps_per_epoch(len(documents), config.global_batch_size), config.max_steps or math.inf)
    warmup = warmup_steps(config, total_steps)
    optimizer = adamw(model, config.weight_decay, DTYPES[config.moments])

    weights = parallel.from_main(world, lambda: fingerprint(directory))
    provenance = {"weights": weights, "data": documents.fingerprint}
    checkpointer = checkpoint.Checkpointer(config.out_dir, config.keep_last, resume_dict(config) | provenance, fresh=config.fresh)
    latest = checkpointer.latest()  # another configuration's is refused before anything is written over
    parallel.require_same(world, data=documents.fingerprint, data_eval=held_out and held_out.fingerprint, checkpoint=str(latest))
    log = Logbook(config, world, total_steps, provenance | {"stage": "sft", "warmup_steps": warmup, **implicit(config)})
    size = f"{len(documents):,} documents, {config.global_batch_size} a step"
    world.say(f"SFT: {size}; {total_steps} steps on {world.size} rank(s) of {world.device.type}")
    first_step = checkpointer.load(latest, model, optimizer) if latest else 0
    log.resume_at(first_step, latest)

    stop = parallel.StopSignal()
    for step in range(first_step, total_steps):
        if held_out and (step == 0 or (config.eval_every and step % config.eval_every == 0)):
            log.evaluation(step, evaluate(model, held_out, config, world, log))
        if config.sample_every and step % config.sample_every == 0:
            log.samples(step, *sample(model, held_out or documents, tokenizer, config))
        ids = step_examples(step, len(documents), config.global_batch_size, config.seed)
        lr = learning_rate(step, total_steps, config.lr, config.lr_schedule, warmup)
        before = sample_weights(model) if step == warmup else None  # at the peak rate

        metrics = forward_backward(model, documents, ids, config, world)
        metrics |= {"grad_norm": apply_gradients(optimizer, lr, config.max_grad_norm, documents.row_ids[ids]), "lr": lr}
        if before:
            metrics["weights_changed"] = weights_changed(before, model)
        tokens = documents.lengths[ids].sum()
        log.step(step + 1, metrics, tokens, training_flops(model, documents.flops(model.config, ids).sum(), tokens))

        stopped, last = stop.received(), step + 1 == total_steps
        if stopped or (config.save_every and (last or (step + 1) % config.save_every == 0)):
            checkpointer.save(step + 1, model, optimizer)
        if stopped:
            checkpointer.wait()
            world.say(f"stopped by signal {stopped} after step {step + 1}, saved; the same command goes on from there")
            return 128 + stopped

    checkpointer.wait()
    if held_out:
        log.evaluation(total_steps, evaluate(model, held_out, config, world, log))
    if config.sample_every:
        log.samples(total_steps, *sample(model, held_out or documents, tokenizer, config))
    finish(model, tokenizer, config, world)
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
