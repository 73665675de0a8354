"""Supervised fine-tuning: `python train_sft.py configs/tiny.py`; on 8 GPUs `torchrun --nproc-per-node 8`.

The loss is a sum over this rank's tokens divided by a count over *all* ranks, so the gradient does not depend
on how a step's examples are spread over ranks and micro-batches. Reading order: the keys, the loss, one
optimizer step, held-out evaluation, main.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

import training
from data import load_sft
from kernels import token_logps
from packing import in_order, local_batches, step_examples
from planner import plan
from plumbing import parallel
from plumbing.config import Config, load, setting

# {loss: the unit of its value}, for the report
UNITS = {"token_mean": "nats per token", "tulu3_release": "nats per document"}

# ---------------------------------------------------------------- the keys of this command


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Config):
    """Keys of train_sft.py."""

    loss: Literal[tuple(UNITS)] = setting(
        "loss", "name", "token_mean: NLL sum / supervised tokens; tulu3_release: NLL sum / sequences",
        default="token_mean")  # fmt: skip


# ---------------------------------------------------------------- the loss


def nll_sum(model, batch):
    """Summed negative log-likelihood of a packed batch's supervised tokens, in nats: a float32 scalar."""
    hidden = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)  # (T, D)
    # Unsupervised positions are dropped before the vocabulary matmul, the largest of the model. Its logits
    # (S, V), 4 GB for 8,192 tokens of Llama 3, are never held: token_logps goes through them in chunks.
    hidden = hidden.index_select(0, batch.supervised)  # (S, D)
    return -token_logps(hidden, model.lm_head.weight, batch.targets).sum()


def loss_denominator(loss, num_tokens, num_sequences):
    """The divisor of the step's summed NLL: its supervised tokens or its documents, counted over all ranks.

    "token_mean": every supervised token weighs the same. "tulu3_release": the sum over tokens per *sequence*,
    as the released Tulu 3 models were trained: the value is in nats per document, and the gradient is larger
    by the mean number of tokens.
    """
    return {"token_mean": num_tokens, "tulu3_release": num_sequences}[loss]


# ---------------------------------------------------------------- one step, and evaluation


def forward_backward(model, documents, ids, config, world):
    """Accumulate the gradient of the loss over the examples `ids` (B,) of one optimizer step.

    Returns its metrics, equal on all ranks.
    """
    # One division by a count of the whole step. A mean of micro-batch means would weigh the tokens of a small
    # micro-batch more, and would change with the number of ranks.
    denominator = loss_denominator(config.loss, int(documents.num_targets[ids].sum()), len(ids))
    losses = []  # of the micro-batches, with the rows behind each
    micro_batches = local_batches(documents, ids, model.config, config.tokens_per_microbatch, world)
    for micro_batch_ids, batch, padding_waste in parallel.micro_batches(model, micro_batches):  # noqa: B007
        loss = nll_sum(model, batch) / denominator  # this rank's share of the global mean
        (loss * parallel.loss_scale(model)).backward()  # gradients are sums over ranks
        losses.append((loss.detach(), documents.row_ids[micro_batch_ids]))
    return {"loss": training.sum_losses(losses), "padding_waste": padding_waste}


@torch.no_grad()
def evaluate(model, documents, config, world, log):
    """Token-mean NLL (nats) and perplexity of the held-out documents."""
    total = 0.0
    for ids in log.progress("evaluate", in_order(len(documents), config.global_batch_size)):
        micro_batches = local_batches(documents, ids, model.config, config.tokens_per_microbatch, world)
        for _, batch, _ in micro_batches:
            total += nll_sum(model, batch).item()
    parallel.release(model)
    (total,) = parallel.sum_across_ranks([total])
    nll = total / int(documents.num_targets.sum())
    perplexity = torch.tensor(nll, dtype=torch.float64).exp()  # inf above 709 nats, where float64 ends
    return {"eval/loss": nll, "eval/perplexity": perplexity.item()}


# ---------------------------------------------------------------- the run


def main(argv):
    if "--plan" in argv:
        return plan.main("sft", argv)
    config = load("sft", argv)
    run = training.start("sft", config, load_sft, {"loss": {"unit": UNITS[config.loss]}})
    documents, held_out = run.data, run.held_out
    run.world.say(f"SFT: {len(documents):,} documents, {run.pace}")

    # Step and seed alone decide which examples a step has, so a resumed run sees those of an unbroken one.
    for step in range(run.resume(), run.total_steps):
        if run.evaluates_before(step):
            run.log.evaluation(step, evaluate(run.model, held_out, config, run.world, run.log))
        run.sample(step, held_out or documents)

        ids = step_examples(step, len(documents), config.global_batch_size, config.seed)
        metrics = forward_backward(run.model, documents, ids, config, run.world)
        run.update(step, metrics, ids)
        if exit_code := run.save(step + 1):
            return exit_code

    if held_out:
        run.log.evaluation(run.total_steps, evaluate(run.model, held_out, config, run.world, run.log))
    run.sample(run.total_steps, held_out or documents)
    return run.finish()


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
