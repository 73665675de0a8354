"""The quantities that tools/diff_open_instruct.py compares on the same rows and weights.

Each function takes a Case and yields Rows.

Tokens are compared first. The numbers that follow are of their tokens and masks on both sides, so they differ
for their own reasons only.
"""

import ast
import dataclasses
import itertools
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch

from data import render
from kernels import token_logps
from optim import adamw
from tools.agreement import (
    DIFFERS,
    EQUAL,
    INTENDED,
    Row,
    call,
    first_difference,
    gap,
    items,
    numbers,
    text_context,
)
from tools.same_rows import TOKENIZERS, by_side, masks_of
from train_dpo import LOSSES, answer_logps, preference_loss
from train_sft import nll_sum

COMPARED = ("dpo_norm", "dpo", "simpo")  # the losses, at our default betas
GAMMA_BETA_RATIO = 0.3
# Relative to the largest number, for two fp32 implementations of one forward. A pair's loss is a difference
# of sums of thousands of nats.
TOLERANCE = {"log-probs": 1e-5, "loss": 1e-5, "pair losses": 1e-4, "gradient": 1e-4}


# ---------------------------------------------------------------- tokens

LAST_TURN = (
    "equal to supervise='last': since 2025-06-26 (8699c789b) open-instruct's DPO trains on the last turn "
    "only; ours, like the released "
    "Tulu 3 models, on all turns unless told otherwise"
)
MORE_ROWS = (
    "the padding token that open-instruct adds has no row in the embeddings, so it adds rows up to a "
    "multiple of 8, and they take a share "
    "of every softmax; nothing is padded here, and no row is added. The numbers below are without these "
    "rows on both sides"
)
MEAN_OF_MEANS = "theirs is a mean of the micro-batches' means: a token of a short one weighs more; "
MEAN_OF_MEANS += "ours divides once, by all tokens of the step"
SUM = "theirs divides the step's sum by its micro-batches, ours (loss='tulu3_release') by its sequences"


def texts(case):
    """The conversations as one string each: their template against `data.render`."""
    ours, theirs = [], []
    for messages in case.documents:
        theirs.append(call(case.their_tokenizer.apply_chat_template, messages, tokenize=False))
        ours.append(render(messages, case.args.template, case.tokenizer)[0])
    yield items(
        "rendered text", "text", ours, theirs, lambda i: f"{case.name(i)}, {text_context(ours[i], theirs[i])}"
    )


def ids(case):
    """Token ids, truncated, of whole conversations."""
    ours = [ids for ids, _ in case.our_documents("all")]
    theirs = [ids for ids, _ in case.their_documents]

    def near(ids, at):
        return ids[at : at + 5], case.tokenizer.decode(ids[max(0, at - 5) : at + 5])

    def context(i):
        at = first_difference(ours[i], theirs[i])
        both = f"ours {near(ours[i], at)}, theirs {near(theirs[i], at)}"
        return f"{case.name(i)}, token {at}: {both}; lengths {len(ours[i])}, {len(theirs[i])}"

    yield items("token ids", "document", ours, theirs, context)


def supervised(case):
    """The mask: which tokens are trained on. Equal to our supervise='last' only is the known difference."""
    ours, theirs = case.our_documents(case.supervise), case.their_documents

    def context(i):
        (ids, mask), (_, other) = ours[i], theirs[i]
        at = next((k for k, (a, b) in enumerate(zip(mask, other)) if a != b), 0)
        text = case.tokenizer.decode(ids[at : at + 1])
        return f"{case.name(i)}, token {at}, {text!r}: ours {mask[at]}, theirs {other[at]}"

    row = items("supervised tokens", "document", masks_of(ours), masks_of(theirs), context)
    if row.verdict == EQUAL and case.supervise == "last":
        row = dataclasses.replace(row, verdict=INTENDED, note=LAST_TURN)
    yield row


def rows_kept(case):
    """Rows that still have an answer after truncation: their filter against ours."""
    keeps = case.checkout.find(
        [f"{'sft' if case.stage == 'sft' else 'preference'}_tulu_filter_v1"], ["dataset_transformation"]
    )
    theirs = [bool(call(keeps, row, case.their_tokenizer)) for row in case.their_rows]
    answered = list(map(any, masks_of(case.our_documents(case.supervise))))
    ours = np.reshape(answered, (-1, len(case.sides))).all(axis=1).tolist()
    yield items("rows kept", "row", ours, theirs, lambda i: f"row {i}: ours {ours[i]}, theirs {theirs[i]}")


# ---------------------------------------------------------------- numbers


def gradient(model):
    """{name: gradient}, and none left on the model."""
    found = {}
    for name, param in model.named_parameters():
        if param.grad is not None:
            found[name] = param.grad.clone()
    model.zero_grad(set_to_none=True)
    return found


def flatten(found, names):
    """The gradients of {name: gradient} as one vector, in the order of the names."""
    return torch.cat([found[name].flatten() for name in names])


def gradients(case, quantity, ours, theirs_of, intended=None):
    """Row for two {name: gradient}, over all parameters at once; theirs_of() computes theirs.

    Where they disagree in float32, theirs is computed once more in float64: if ours is that one to the
    tolerance, the rest is theirs' rounding. A formula of another kind is another one in float64 too.
    """
    theirs = theirs_of()
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    names, ours = list(ours), flatten(ours, ours)
    theirs = flatten(theirs, names)
    row = numbers(quantity, "number", ours, theirs, TOLERANCE["gradient"], intended)
    if row.verdict != DIFFERS:
        return row
    case.their_model.double()
    exact = flatten(theirs_of(), names)
    case.their_model.float()  # float32 -> float64 -> float32 changes no bit
    ours_off, theirs_off = gap(ours, exact), gap(theirs, exact)
    if ours_off > TOLERANCE["gradient"]:
        return row
    why = f"by theirs in float64: ours is {ours_off:.1e} from it, theirs in float32 {theirs_off:.1e}"
    return dataclasses.replace(row, verdict=EQUAL, note=why)


@torch.no_grad()
def log_probs(case):
    """log p of every supervised token, in nats.

    Their gather on transformers' logits against our packed forward and `token_logps`.
    """
    gather = case.checkout.find(["calculate_per_token_logps"], ["padding_free_collator", "dpo_utils"])
    batch = case.packed(case.kept)
    hidden = case.model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)[
        batch.supervised
    ]
    ours = token_logps(hidden, case.model.lm_head.weight, batch.targets)
    theirs = []
    for ids, mask in by_side(case.their_documents, case.kept, len(case.sides)):
        ids, mask = torch.tensor([ids]), torch.tensor([mask])
        labels = ids.masked_fill(~mask, -100)
        theirs.append(call(gather, case.their_model(ids).logits, labels)[0, :-1][mask[0, 1:]])
    yield numbers("log-probs per token", "token", ours, torch.cat(theirs), TOLERANCE["log-probs"])


def vocabulary(case):
    """Padding tokens that open-instruct adds.

    When the tokenizer outgrows the embeddings, these get rows up to a multiple of 8.
    """
    # Only these are known to add the token that main() adds.
    case.checkout.find(TOKENIZERS, ["dataset_transformation"])
    tokens, rows = len(case.their_tokenizer), case.model.lm_head.weight.shape[0]
    if tokens <= rows:
        yield Row("vocabulary", f"{rows:,} rows", "0 added", EQUAL)
        return
    yield Row(
        "vocabulary",
        f"{rows:,} rows",
        f"{-(-tokens // 8) * 8 - rows} added",
        INTENDED,
        f"{tokens:,} tokens: {MORE_ROWS}",
    )


def their_pairs(case, loss):
    """(losses per pair, gradient of their mean) of theirs, two pairs at a time, by their collator."""
    find, mean = case.checkout.find, LOSSES[loss].average == "mean"
    forward, collate = (
        find(["concatenated_forward"], ["dpo_utils"]),
        find(["DataCollatorForSeq2SeqDPO"], ["dpo_utils"]),
    )
    function = find([{"simpo": "simpo_loss"}.get(loss, "dpo_loss")], ["dpo_utils"])
    case.their_model.zero_grad(set_to_none=True)  # what a failed comparison left
    losses, counts = [], case.packed(case.kept).supervised_offsets.diff().view(2, -1)
    reference = case.reference / counts if mean else case.reference
    for start in range(0, len(case.kept), 2):
        rows = case.kept[start : start + 2]
        batch = call(
            call(collate, tokenizer=case.padding_tokenizer, model=None, padding="longest"),
            [case.their_rows[i] | {"index": i} for i in rows],
        )
        chosen, rejected, _ = call(forward, case.their_model, batch, average_log_prob=mean)
        ref, extra = reference[:, start : start + 2], {"beta": LOSSES[loss].beta}
        arguments = (chosen, rejected, *ref) if LOSSES[loss].needs_reference else (chosen, rejected)
        extra |= {"gamma_beta_ratio": GAMMA_BETA_RATIO} if "gamma_beta_ratio" in LOSSES[loss].options else {}
        values, *_ = call(function, *arguments, **extra)
        (values.sum() / len(case.kept)).backward()
        losses += values.tolist()
    return losses, gradient(case.their_model)


def our_pairs(case, loss):
    """The same of ours, in one packed batch."""
    keys = dict(label_smoothing=0.0, gamma_beta_ratio=GAMMA_BETA_RATIO)
    config = SimpleNamespace(loss=loss, beta=LOSSES[loss].beta, **keys)
    policy, counts = answer_logps(case.model, case.packed(case.kept), len(case.kept))
    losses, *_ = preference_loss(config, policy, case.reference, counts)
    losses.mean().backward()
    return losses.tolist(), gradient(case.model)


def preference_losses(case):
    """Per loss: every pair's loss and the gradient of their mean, with a reference unlike the policy."""
    for loss in COMPARED:
        losses, our_gradient = our_pairs(case, loss)
        yield numbers(f"{loss} losses", "pair", losses, their_pairs(case, loss)[0], TOLERANCE["pair losses"])
        yield gradients(case, f"{loss} gradient", our_gradient, lambda loss=loss: their_pairs(case, loss)[1])


def their_sft_step(case, per_device, reduction):
    """(loss, gradient) of the body of their training step over all rows.

    What `with accelerator.accumulate(model)` holds, micro-batch by micro-batch, divided by their number as
    accelerate does.
    """
    from transformers import DataCollatorForSeq2Seq

    module, step = case.checkout.main_part(
        "finetune",
        "with accelerator.accumulate(..)",
        lambda node: isinstance(node, ast.With) and "accumulate" in ast.unparse(node.items[0]),
    )
    collate = DataCollatorForSeq2Seq(tokenizer=case.padding_tokenizer, padding="longest")
    args = SimpleNamespace(
        reduce_loss=reduction, load_balancing_loss=False, sequence_parallel_size=1, clip_grad_norm=-1
    )
    names = dict(
        args=args,
        model=case.their_model,
        optimizer=MagicMock(),
        lr_scheduler=MagicMock(),
        total_loss=0,
        total_aux_loss=0,
    )
    names |= dict(embedding_size=case.model.lm_head.weight.shape[0])
    names |= dict(accelerator=SimpleNamespace(backward=lambda loss: loss.backward(), sync_gradients=False))
    batches = [case.kept[i : i + per_device] for i in range(0, len(case.kept), per_device)]
    keys, losses = ("input_ids", "labels", "attention_mask"), []
    for rows in batches:
        examples = []
        for i in rows:
            examples.append({key: case.their_rows[i][key] for key in keys})
        call(module.run, step.body, batch=collate(examples), **names)
        losses.append(call(module.__getitem__, "loss").item())
    return (
        np.mean(losses),
        {name: grad / len(batches) for name, grad in gradient(case.their_model).items()},
        batches,
    )


def sft_losses(case):
    """Loss and gradient of one SFT step over all rows.

    Theirs by micro-batches of one and two rows, against ours divided once.
    """
    reductions = ["mean"] + ["sum"] * ("reduce_loss" in case.checkout.module("finetune").source)
    for reduction, per_device in itertools.product(reductions, (1, 2)):
        loss, _, batches = their_sft_step(case, per_device, reduction)
        # known: what theirs should be when the reduction is the only difference
        total, tokens, known = 0.0, 0, 0.0
        for rows in batches:
            batch = case.packed(rows)
            nll, count = nll_sum(case.model, batch), len(batch.supervised)
            total += nll
            tokens += count
            known += nll / (count if reduction == "mean" else 1)
        ours = total / (tokens if reduction == "mean" else len(case.kept))
        known /= len(batches)
        ours.backward(retain_graph=True)
        our_grad = gradient(case.model)
        known.backward()
        known_grad = flatten(gradient(case.model), our_grad)
        why = MEAN_OF_MEANS if reduction == "mean" else SUM
        name = f"SFT, {reduction}, {per_device} a micro-batch:"
        yield numbers(f"{name} loss", "step", [ours.item()], [loss], TOLERANCE["loss"], ([known.item()], why))

        def their_grad(per_device=per_device, reduction=reduction):
            return their_sft_step(case, per_device, reduction)[1]

        yield gradients(case, f"{name} gradient", our_grad, their_grad, (known_grad, why))


def decayed(case):
    """Which parameters AdamW decays."""
    names = {id(param): name for name, param in case.model.named_parameters()}
    every = sorted(names.values())

    def decayed_by(groups):
        """For each of `every`, whether it is in a group with weight decay."""
        found = set()
        for group in groups:
            if group["weight_decay"]:
                found |= {names[id(param)] for param in group["params"]}
        return [name in found for name in every]

    their_groups = call(case.checkout.find(["get_optimizer_grouped_parameters"], ["utils"]), case.model, 0.1)
    theirs, ours = decayed_by(their_groups), decayed_by(adamw(case.model, 0.1).param_groups)
    yield items("weight decay", "parameter", ours, theirs, lambda i: every[i])
