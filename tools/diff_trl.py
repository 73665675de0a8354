"""Pair losses, log-probs and gradients of the installed TRL on the same rows and weights.

They are what its DPOTrainer computes from a batch. As a command, whole optimizer steps of both:

    python -m tools.diff_trl --model FOLDER --data FILE --train N

N steps of ours and of TRL's trainer side by side, twice: padded with EOS and with an id that is not in the
data. Exit code 0: equal, or different as intended.
"""

import argparse
import copy
import importlib.metadata
import itertools
import sys
import tempfile
from types import SimpleNamespace
from unittest import mock
from unittest.mock import MagicMock

import torch

from data import TEMPLATES
from kernels import fused_block
from optim import adamw, apply_gradients
from plumbing import parallel
from plumbing.files import UserError
from tools.agreement import DIFFERS, EQUAL, INTENDED, NotCompared, Row, call, numbers, print_table
from tools.arguments import above_zero, at_least
from tools.quantities import TOLERANCE, gradient, gradients, our_pairs
from tools.same_rows import Case, by_side
from train_dpo import LOSSES, answer_logps, preference_loss

LOSS_TYPES = {"dpo_norm": "sigmoid_norm", "dpo": "sigmoid"}


def version():
    """The version of TRL. ValueError when it is not installed."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("--trl: TRL is not installed; expected `pip install trl`") from error


def padded(case):
    """input_ids, attention_mask, completion_mask (2N, T), padded on the right.

    The chosen documents, then the rejected ones.
    """
    documents = by_side(case.their_documents, case.kept, len(case.sides))
    batch = torch.zeros(3, len(documents), max(len(ids) for ids, _ in documents), dtype=torch.int64)
    for i, (ids, mask) in enumerate(documents):
        batch[:, i, : len(ids)] = torch.tensor([ids, [1] * len(ids), mask])
    return dict(zip(("input_ids", "attention_mask", "completion_mask"), batch))


def rows(case):
    """Rows for the answers' log-probs and, per loss that both have, for its values and gradient.

    The losses are those of single pairs, the gradient that of their mean.
    """
    try:
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.utils import selective_log_softmax
    except ImportError as error:
        raise NotCompared(f"TRL {version()}: {error}") from error

    def forward(input_ids, attention_mask, labels, **_):
        logits = case.their_model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        log_probs = call(selective_log_softmax, logits, input_ids[:, 1:]) * (labels[:, 1:] != -100)
        logged = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=logged,
            entropy=logged,
            mean_logits=logged,
            is_top1=logged.bool(),
            logits=logits,
        )

    batch, n = padded(case), len(case.kept)
    with torch.no_grad():
        ours, _ = answer_logps(case.model, case.packed(case.kept), n)
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        theirs = forward(batch["input_ids"], batch["attention_mask"], labels).log_probs.sum(dim=1)
    yield numbers("TRL: answers' log-probs", "answer", ours.flatten(), theirs, TOLERANCE["log-probs"])
    for loss, loss_type in LOSS_TYPES.items():
        expected, our_gradient = our_pairs(case, loss)
        trainer = _trainer(loss_type, LOSSES[loss].beta)

        def their_pairs(trainer=trainer):
            case.their_model.zero_grad(set_to_none=True)  # what a failed comparison left
            losses = []
            for pair in range(n):
                picked = {name: values[[pair, n + pair]] for name, values in batch.items()}
                chosen, rejected = case.reference[:, pair : pair + 1]
                picked |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
                value = call(
                    DPOTrainer._compute_loss,
                    trainer,
                    MagicMock(side_effect=forward),
                    picked,
                    return_outputs=False,
                )
                (value / n).backward()
                losses.append(value.item())
            return losses, gradient(case.their_model)

        yield numbers(f"TRL: {loss} losses", "pair", expected, their_pairs()[0], TOLERANCE["pair losses"])
        yield gradients(case, f"TRL: {loss} gradient", our_gradient, lambda theirs=their_pairs: theirs()[1])


def _trainer(loss_type, beta):
    """What DPOTrainer._compute_loss reads of its trainer.

    One process, the reference's log-probs in the batch.
    """
    fixed = dict(
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer = MagicMock(loss_types=[loss_type], beta=beta, **fixed)
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda tensor: tensor
    return trainer


# ---------------------------------------------------------------- whole steps: --train

# of losses and norms relative to the largest, of the weights the share of the update; 2.6e-6 and 1.3e-5 were
# seen
STEP_TOLERANCE, UPDATE_TOLERANCE = 2e-5, 1e-3
EXCEPT_PADDING = "transformers gives the embedding of pad_token_id no gradient (docs/loss.md)"


def batches(case, args):
    """[rows of a step]: the rows in their order, again and again."""
    size = min(args.batch, len(case.kept))
    whole = len(case.kept) // size * size
    steps = []
    for step in range(args.train):
        first = step * size % whole
        steps.append(case.kept[first : first + size])
    return steps


def our_steps(case, args, pad=None):
    """(losses, gradient norms, final weights) of ours.

    pad: leave the embedding of this id without gradient.
    """
    model, config = copy.deepcopy(case.model), SimpleNamespace(loss="dpo_norm", label_smoothing=0.0, beta=5.0)
    optimizer = adamw(model, weight_decay=0.0)
    losses, norms = [], []
    with mock.patch.object(fused_block, "embed", embed_without(pad)):
        for rows in batches(case, args):
            batch, count = case.packed(rows), len(rows)
            with torch.no_grad():
                reference, _ = answer_logps(case.model, batch, count)
            policy, counts = answer_logps(model, batch, count)
            loss = preference_loss(config, policy, reference, counts)[0].mean()
            loss.backward()
            losses.append(loss.item())
            norms.append(apply_gradients(optimizer, args.lr, max_grad_norm=1.0))
    return losses, norms, named_weights(model)


def embed_without(pad, embed=fused_block.embed):
    """fused_block.embed that gives the row `pad` no gradient."""

    def without(weight, ids):
        found = embed(weight, ids)
        return found if pad is None else torch.where((ids == pad)[:, None], found.detach(), found)

    return without


def their_steps(case, args, pad):
    """(losses, gradient norms, final weights) of TRL's DPOTrainer, on the same ids and masks."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_options):
            return dataset  # rows are tokenised already, several turns among them

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    models = []
    for _ in ("policy", "reference"):
        models.append(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, pad_token_id=pad))
    steps = batches(case, args)
    with tempfile.TemporaryDirectory() as folder:
        options = dict(max_steps=args.train, per_device_train_batch_size=len(steps[0]), max_grad_norm=1.0)
        options |= dict(learning_rate=args.lr, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0)
        options |= dict(loss_type="sigmoid_norm", beta=5.0, train_sampling_strategy="sequential")
        options |= dict(bf16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1)
        options |= dict(report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False)
        trainer = Trainer(
            models[0],
            models[1],
            args=DPOConfig(folder, **options),
            data_collator=lambda rows: padded_batch(case, [row["row"] for row in rows], pad),
            train_dataset=Dataset.from_dict({"row": list(itertools.chain(*steps))}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses, norms = [], []
    for line in trainer.state.log_history:
        if "grad_norm" in line:
            losses.append(line["loss"])
            norms.append(line["grad_norm"])
    return losses, norms, named_weights(models[0])


def padded_batch(case, rows, pad):
    """What TRL's collator makes of these rows."""
    picked = SimpleNamespace(their_documents=case.their_documents, sides=case.sides, kept=rows)
    batch = padded(picked)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    return batch


def named_weights(model):
    """{name: float32 copy}, a tied one once."""
    return {name: param.detach().float().clone() for name, param in model.named_parameters()}


def step_rows(case, args, label, pad):
    """Rows for losses, gradient norms and final weights of N steps, padded with that id."""
    ours, known = our_steps(case, args), our_steps(case, args, pad)
    theirs = their_steps(case, args, pad)
    print(f"{label}\n{'step':>6}{'loss: ours':>14}{'theirs':>12}{'norm: ours':>14}{'theirs':>12}")
    for step, values in enumerate(zip(ours[0], theirs[0], ours[1], theirs[1], strict=True), 1):
        print(f"{step:>6}{values[0]:>14.6f}{values[1]:>12.6f}{values[2]:>14.6f}{values[3]:>12.6f}")
    print()
    for i, quantity in enumerate(("losses", "gradient norms")):
        name = f"{label}: {quantity}"
        yield numbers(name, "step", ours[i], theirs[i], STEP_TOLERANCE, (known[i], EXCEPT_PADDING))
    yield weights_row(f"{label}: final weights", named_weights(case.model), ours[2], known[2], theirs[2])


def weights_row(name, start, ours, known, theirs):
    """Row for |ours - theirs| / |ours - start| over all weights."""

    def distance(a, b):
        return sum((a[key] - b[key]).double().square().sum().item() for key in start) ** 0.5

    share, rest = (
        distance(ours, theirs) / distance(ours, start),
        distance(known, theirs) / distance(known, start),
    )
    size, difference = f"{len(start)} tensors", f"{share:.1e} of the update"
    if share <= UPDATE_TOLERANCE:
        return Row(name, size, difference, EQUAL)
    if rest <= UPDATE_TOLERANCE:
        note = f"{EXCEPT_PADDING} (computed that way, ours differs by {rest:.1e})"
        return Row(name, size, difference, INTENDED, note)
    return Row(name, size, difference, DIFFERS, f"without the padding row's gradient {rest:.1e}")


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.diff_trl", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder; fp32 on the CPU, so a small one")
    parser.add_argument("--data", required=True, help="pairs, as in a config's data")
    steps = "optimizer steps of both"
    parser.add_argument("--train", type=at_least(1), required=True, metavar="N", help=steps)
    parser.add_argument("--rows", type=at_least(1), default=16, help="of the data (default: %(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=4, help="pairs a step (default: %(default)s)")
    parser.add_argument("--lr", type=above_zero, default=1e-5, help="(default: %(default)s)")
    template = "of both sides (default: %(default)s)"
    parser.add_argument("--template", choices=list(TEMPLATES), default="tulu", help=template)
    length = "tokens of each (default: %(default)s)"
    parser.add_argument("--max-seq-len", type=at_least(2), default=512, help=length)
    args = parser.parse_args(argv)
    args.stage = "dpo"
    print(f"TRL {version()}, {args.train} steps of {args.batch} pairs, dpo_norm, beta 5, lr {args.lr:g}\n")
    parallel.init()
    return print_table(compare_steps(args))


def compare_steps(args):
    """Rows for both paddings."""
    case = Case(args, checkout=None)
    used = set()
    for ids, _ in case.their_documents:
        used |= set(ids)
    end = case.tokenizer.eos_id
    unused = max(set(range(case.tokenizer.vocab_size)) - used)
    rows = list(step_rows(case, args, f"pad = EOS ({end})", end))
    return rows + list(step_rows(case, args, f"pad = {unused}, not in the data", unused))


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
