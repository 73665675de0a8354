"""TRL 1.16 as oracle: its per-token log-probs, and the losses and gradients that its DPO and CPO trainers
compute from them.
"""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from world import assert_gradients_equal, stage_parts, whole_gradients, write_config, write_rows

import train_dpo
from packing import local_batches
from tools import diff_trl
from tools.agreement import EQUAL, INTENDED
from train_dpo import answer_logps, dpo_loss, simpo_loss

pytestmark = pytest.mark.slow  # importing trl takes seconds

PAIRS = np.array([3, 0, 7, 12, 30, 21])


@pytest.fixture(scope="module")
def trl():
    import trl.trainer.dpo_trainer
    import trl.trainer.utils

    return trl


@pytest.fixture
def stage(world, tmp_path, ranks):
    config, pairs, model = stage_parts("dpo", write_config(tmp_path, world, tokens_per_microbatch=600), ranks)
    reference = np.stack([pairs.chosen.num_targets, pairs.rejected.num_targets], axis=1) * -5.5
    reference += np.random.RandomState(0).randn(
        *reference.shape
    )  # unlike the policy: losses and gradients differ by pair
    return SimpleNamespace(
        config=config, pairs=pairs, model=model, ranks=ranks, reference=reference.astype(np.float32)
    )


def padded(pairs):
    """input_ids, attention_mask, completion_mask (2N, T): the chosen documents, then the rejected ones,
    padded on the right.
    """
    documents = [side[i] for side in (pairs.chosen, pairs.rejected) for i in PAIRS]
    shape = (len(documents), max(len(ids) for ids, _ in documents))
    batch = {
        name: torch.zeros(shape, dtype=torch.int64)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (ids, mask) in enumerate(documents):
        for name, values in (
            ("input_ids", ids),
            ("attention_mask", np.ones_like(ids)),
            ("completion_mask", mask),
        ):
            batch[name][row, : len(ids)] = torch.from_numpy(np.array(values))
    return batch


def transformers_model(world):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)


def fake_trainer(loss_type, beta, label_smoothing=0.0, use_weighting=False):
    """What DPOTrainer._compute_loss reads of its trainer, on one process with the reference's log-probs in
    the batch.
    """
    fixed = dict(precompute_ref_logps=True, ld_alpha=None, aux_loss_enabled=False, f_divergence_type="reverse_kl", loss_weights=[1.0],
                 _total_train_tokens=0, _tp_size=1)  # fmt: skip
    trainer = MagicMock(
        loss_types=[loss_type],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=use_weighting,
        **fixed,
    )
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda tensor: tensor
    return trainer


def trl_loss(trl, model, batch, reference, loss_type, beta, use_weighting=False):
    """The number that TRL's DPOTrainer would call backward on, from a transformers model."""

    def forward(input_ids, attention_mask, labels, **_):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        log_probs = trl.trainer.utils.selective_log_softmax(logits, input_ids[:, 1:]) * (
            labels[:, 1:] != -100
        )
        zeros = torch.zeros_like(
            log_probs
        )  # log_sum_sq_probs is WPO's alignment term, which ours goes without; the rest is only logged
        return SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=zeros,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            logits=logits,
        )

    trainer = fake_trainer(loss_type, beta, use_weighting=use_weighting)
    ref = {
        f"ref_{side}_logps": torch.from_numpy(reference[PAIRS, column])
        for column, side in enumerate(("chosen", "rejected"))
    }
    return trl.trainer.dpo_trainer.DPOTrainer._compute_loss(
        trainer, MagicMock(side_effect=forward), batch | ref, return_outputs=False
    )


def test_logps_of_answers(world, stage, trl):
    """Packed and summed per answer here; padded, per token and masked there."""
    batch = padded(stage.pairs)
    ((members, packed, _),) = local_batches(stage.pairs, PAIRS, stage.model.config, 600, stage.ranks)
    assert members.tolist() == PAIRS.tolist()
    with torch.no_grad():
        ours, counts = answer_logps(stage.model, packed, len(PAIRS))
        logits = transformers_model(world)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, :-1]
    theirs = (
        trl.trainer.utils.selective_log_softmax(logits, batch["input_ids"][:, 1:])
        * batch["completion_mask"][:, 1:]
    )
    torch.testing.assert_close(ours.flatten(), theirs.sum(dim=1), rtol=1e-5, atol=1e-4)
    assert counts.flatten().tolist() == batch["completion_mask"][:, 1:].sum(dim=1).tolist()


@pytest.mark.parametrize(
    "loss, beta, theirs",
    [
        ("dpo", 0.1, dict(loss_type="sigmoid")),
        ("dpo_norm", 5.0, dict(loss_type="sigmoid_norm")),
        ("ipo", 0.5, dict(loss_type="ipo")),
        ("wpo", 0.1, dict(loss_type="sigmoid", use_weighting=True)),
    ],
)
def test_loss_and_gradient(world, stage, trl, loss, beta, theirs):
    """CHECKS 10: which losses take means. A step's loss to 1e-5, the gradient of every parameter to 2e-5 of
    the largest.
    """
    config = SimpleNamespace(**vars(stage.config) | dict(loss=loss, beta=beta))
    metrics, _ = train_dpo.forward_backward(
        stage.model, stage.pairs, stage.reference, PAIRS, config, stage.ranks
    )
    model = transformers_model(world)
    expected = trl_loss(trl, model, padded(stage.pairs), stage.reference, beta=beta, **theirs)
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: param.grad for name, param in model.named_parameters()}
    assert_gradients_equal(whole_gradients(stage.model), gradients, 2e-5)


def test_sft_term(world, stage, trl):
    """sft_weight times the token mean over the chosen answers."""
    config = SimpleNamespace(**vars(stage.config) | dict(loss="dpo_norm", beta=5.0, sft_weight=0.3))
    metrics, _ = train_dpo.forward_backward(
        stage.model, stage.pairs, stage.reference, PAIRS, config, stage.ranks
    )
    model, batch = transformers_model(world), padded(stage.pairs)
    preference, sft = (
        trl_loss(trl, model, batch, stage.reference, kind, 5.0) for kind in ("sigmoid_norm", "sft")
    )
    (preference + 0.3 * sft).backward()
    assert metrics["loss"] == pytest.approx((preference + 0.3 * sft).item(), rel=1e-5)
    assert_gradients_equal(
        whole_gradients(stage.model), {name: param.grad for name, param in model.named_parameters()}, 2e-5
    )


def test_whole_steps_beside_trls_trainer(world, tmp_path, ranks):
    """Three AdamW steps on chats of two answers: equal with a padding token of its own; with EOS as padding
    TRL's embedding of EOS, which ends the first answer, gets no gradient, and ours without it agrees."""
    turns = [
        {"role": "user", "content": "help me"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "tell me"},
    ]
    rows = []
    for i in range(8):
        chosen, rejected = (
            {"role": "assistant", "content": f"{word} {'cat ' * i}runs"} for word in ("good", "bad")
        )
        rows.append({"chosen": [*turns, chosen], "rejected": [*turns, rejected]})
    write_rows(tmp_path / "pairs.jsonl", rows)
    shape = dict(train=3, rows=8, batch=4, lr=1e-5, template="tulu", max_seq_len=128, stage="dpo")
    found = diff_trl.compare_steps(
        SimpleNamespace(model=str(world / "base"), data=str(tmp_path / "pairs.jsonl"), **shape)
    )
    assert [row.verdict for row in found[3:]] == [EQUAL] * 3
    assert [row.verdict for row in found[1:3]] == [INTENDED] * 2


def random_logps(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(-torch.rand(8, generator=generator) * 40).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_and_label_smoothing(monkeypatch, smoothing):
    """TRL's CPO trainer has SimPO, with gamma = beta * gamma_beta_ratio, and the same smoothing."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=1.0,
        beta=2.0,
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    ours, theirs = random_logps(2), random_logps(2)
    losses, chosen, rejected = simpo_loss(*ours, 2.0, 0.5, smoothing)
    expected, *rewards = CPOTrainer.cpo_loss(trainer, *theirs)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close([chosen, rejected], rewards)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


def test_dpo_label_smoothing(trl):
    """TRL smooths plain DPO no more, but its "aot" of one pair is the smoothed loss: sorting one number does
    nothing.
    """
    values = [t.detach() for t in random_logps(4, seed=1)]
    for pair in zip(*values):
        pair = torch.stack(pair)[:, None]
        ours = dpo_loss(*pair, 0.1, 0.2)[0]
        assert ours.item() == pytest.approx(aot_of_one(trl, pair, 0.1, 0.2), rel=1e-5)


def aot_of_one(trl, pair, beta, smoothing):
    mask = torch.tensor([[0, 1], [0, 1]])
    batch = {
        "input_ids": torch.zeros(2, 2, dtype=torch.int64),
        "attention_mask": torch.ones(2, 2),
        "completion_mask": mask,
    }
    batch |= {"ref_chosen_logps": pair[2], "ref_rejected_logps": pair[3]}
    zeros = torch.zeros(2, 1)
    outputs = SimpleNamespace(log_probs=pair[:2], entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = fake_trainer("aot", beta, label_smoothing=smoothing)
    return trl.trainer.dpo_trainer.DPOTrainer._compute_loss(
        trainer, MagicMock(return_value=outputs), batch, False
    ).item()
