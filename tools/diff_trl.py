"""Pair losses, log-probs and gradients of the installed TRL on the same rows and weights.

They are what its DPOTrainer computes from a batch.
"""

import importlib.metadata
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

from plumbing.files import UserError
from tools.agreement import NotCompared, call, numbers
from tools.quantities import TOLERANCE, gradient, gradients, our_pairs
from train_dpo import LOSSES, answer_logps

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
    documents, size = case.their_documents, len(case.sides)
    documents = [documents[row * size + side] for side in range(size) for row in case.kept]
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
