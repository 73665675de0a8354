"""DPO: every loss by hand, pairs in any cut, the reference cache, and ten whole steps against a plain
transformers loop.
"""

import errno
import json
import math
import os
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from world import (
    SilentLog,
    assert_gradients_equal,
    final_weights,
    largest_difference,
    launch,
    plain_adamw,
    save_gradients,
    spawn,
    stage_parts,
    trace,
    whole_gradients,
    write_config,
    write_rows,
)

import train_dpo
from data import load_preferences
from packing import in_order, local_batches, step_examples
from planner import plan
from plumbing.config import load
from plumbing.tokenizer import Tokenizer
from reports import figures, folders
from train_dpo import answer_logps, dpo_loss, ipo_loss, preference_loss, simpo_loss, wpo_weights

EIGHT = np.array([3, 0, 7, 12, 30, 21, 5, 6])
LN2 = math.log(2)


def tensors(*values):
    return [torch.tensor([value]) for value in values]


# ---------------------------------------------------------------- the losses by hand


def test_dpo_loss():
    """beta 0.1; log-ratios: chosen -10 - -12 = 2, rejected -15 - -14 = -1; logit 0.1 * 3 = 0.3: -ln sigmoid =
    ln(1 + e^-0.3) = 0.554355.

    Smoothing 0.1: 0.9 * 0.554355 + 0.1 * ln(1 + e^0.3) = 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355. Rewards
    0.2 and -0.1.
    """
    losses, chosen, rejected = dpo_loss(*tensors(-10.0, -15.0, -12.0, -14.0), 0.1)
    assert (losses.item(), chosen.item(), rejected.item()) == pytest.approx((0.554355, 0.2, -0.1), abs=1e-6)
    assert dpo_loss(*tensors(-10.0, -15.0, -12.0, -14.0), 0.1, 0.1)[0].item() == pytest.approx(
        0.584355, abs=1e-6
    )


def test_dpo_gradient():
    """d loss / d chosen = -beta sigmoid(-0.3) = -0.1 * 0.425557; the opposite for rejected (Rafailov et al.,
    section 4).
    """
    policy = [t.requires_grad_() for t in tensors(-10.0, -15.0)]
    losses, *rewards = dpo_loss(*policy, *tensors(-12.0, -14.0), 0.1)
    losses.sum().backward()
    assert [t.grad.item() for t in policy] == pytest.approx([-0.0425557, 0.0425557], abs=1e-7)
    assert not any(reward.requires_grad for reward in rewards)


def test_ipo_loss():
    """beta 0.1: (2 - -1 - 1 / 0.2)^2 = (3 - 5)^2 = 4; rewards as in DPO."""
    values = [value.item() for value in ipo_loss(*tensors(-10.0, -15.0, -12.0, -14.0), 0.1)]
    assert values == pytest.approx([4.0, 0.2, -0.1])


def test_simpo_loss():
    """beta 2, gamma / beta 0.5, means -1 and -1.75: logit 2 * (0.75 - 0.5) = 0.5, ln(1 + e^-0.5) = 0.474077;
    rewards -2 and -3.5.

    Smoothing 0.2: 0.8 * 0.474077 + 0.2 * 0.974077 = 0.574077.
    """
    losses, chosen, rejected = simpo_loss(*tensors(-1.0, -1.75), 2.0, 0.5)
    assert (losses.item(), chosen.item(), rejected.item()) == pytest.approx((0.474077, -2.0, -3.5), abs=1e-6)
    assert simpo_loss(*tensors(-1.0, -1.75), 2.0, 0.5, 0.2)[0].item() == pytest.approx(0.574077, abs=1e-6)


def loss_of(policy, reference, counts, **keys):
    config = SimpleNamespace(
        **dict(loss="dpo_norm", beta=5.0, label_smoothing=0.0, gamma_beta_ratio=None) | keys
    )
    policy, reference, counts = (torch.tensor(values).view(2, -1) for values in (policy, reference, counts))
    return preference_loss(config, policy, reference, counts)[0].tolist()


def test_wpo_weights_the_pair():
    """Sums -10 and -15 over 10 and 20 tokens: means -1 and -0.75; weight e^-1.75 = 0.173774; times the DPO
    loss 0.554355: 0.096332.

    The weight has no gradient: that of the chosen sum is 0.173774 * -0.0425557 = -0.0073951.
    """
    assert wpo_weights(*tensors(-1.0, -0.75)).item() == pytest.approx(0.173774, abs=1e-6)
    policy, reference = torch.tensor([[-10.0], [-15.0]], requires_grad=True), torch.tensor([[-12.0], [-14.0]])
    config = SimpleNamespace(loss="wpo", beta=0.1, label_smoothing=0.0)
    losses, *_ = preference_loss(config, policy, reference, torch.tensor([[10], [20]]))
    losses.sum().backward()
    assert losses.item() == pytest.approx(0.096332, abs=1e-6)
    assert policy.grad[0].item() == pytest.approx(-0.0073951, abs=1e-7)


def test_dpo_norm_takes_means():
    """CHECKS 10: sums 2 over 4 tokens and -1 over 10: means 0.5 and -0.1, logit 5 * 0.6: ln(1 + e^-3) =
    0.048587. ipo: (0.6 - 0.1)^2.
    """
    arguments = ([-10.0, -15.0], [-12.0, -14.0], [4, 10])
    assert loss_of(*arguments) == pytest.approx([0.048587], abs=1e-6)
    assert loss_of(*arguments, loss="ipo") == pytest.approx([0.25])


def test_preference_loss_hands_every_key_on():
    """The smoothed losses above: dpo of sums; simpo of -4 over 4 tokens and -3.5 over 2, means -1 and
    -1.75.
    """
    keys = dict(loss="dpo", beta=0.1, label_smoothing=0.1)
    assert loss_of([-10.0, -15.0], [-12.0, -14.0], [4, 10], **keys) == pytest.approx([0.584355], abs=1e-6)
    keys = dict(loss="simpo", beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.2)
    assert loss_of([-4.0, -3.5], [0.0, 0.0], [4, 2], **keys) == pytest.approx([0.574077], abs=1e-6)


@pytest.mark.parametrize("n", [1, 7, 50])
def test_dpo_norm_is_dpo_with_beta_over_n(n):
    """CHECKS 10: when both answers have n tokens; unlike otherwise."""
    policy, reference = [-10.0, -3.0, -15.0, -2.5], [-12.0, -3.5, -14.0, -2.0]
    assert loss_of(policy, reference, [n] * 4) == pytest.approx(
        loss_of(policy, reference, [n] * 4, loss="dpo", beta=5.0 / n)
    )
    assert loss_of(policy, reference, [n, n, n + 1, n]) != pytest.approx(
        loss_of(policy, reference, [n] * 4, loss="dpo", beta=5.0 / n)
    )


def test_shared_earlier_turns_do_not_cancel_in_a_mean():
    """An earlier answer has 8 tokens and log-ratio 0.7; then the chosen one has 2 tokens and 0.1, the
    rejected one 8 and 0.

    Last turn only: 5 * (0.1 / 2 - 0 / 8) = 0.25, loss 0.5759. All turns: 5 * (0.8 / 10 - 0.7 / 16) = 0.18125,
    loss 0.6066. For sums, beta 1: 0.8 - 0.7 = 0.1 - 0, the same loss with and without the earlier turn.
    """
    assert loss_of([0.1, 0.0], [0.0, 0.0], [2, 8]) == pytest.approx([0.5759], abs=5e-5)
    assert loss_of([0.8, 0.7], [0.0, 0.0], [10, 16]) == pytest.approx([0.6066], abs=5e-5)
    last, all_turns = ([0.1, 0.0], [2, 8]), ([0.8, 0.7], [10, 16])
    sums = [loss_of(ratios, [0.0, 0.0], counts, loss="dpo", beta=1.0) for ratios, counts in (last, all_turns)]
    assert sums[0] == pytest.approx(sums[1])


@pytest.mark.parametrize(
    "loss, value", [("dpo", LN2), ("dpo_norm", LN2), ("ipo", 0.01), ("simpo", None), ("wpo", None)]
)
def test_losses_of_equal_models(loss, value):
    """CHECKS 5: ln 2, and (1 / 10)^2 for ipo at beta 5; simpo takes no reference, wpo is ln 2 times its
    weight.
    """
    policy, counts = [-10.0, -15.0], [4, 10]
    actual = loss_of(policy, policy, counts, loss=loss, gamma_beta_ratio=0.0)
    if loss == "wpo":
        value = LN2 * math.exp(-2.5 - 1.5)
    if loss == "simpo":  # means -2.5 and -1.5, logit 5 * -1
        value = math.log1p(math.exp(5))
    assert actual == pytest.approx([value], rel=1e-6)


# ---------------------------------------------------------------- a new loss is one row


def hinge_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """SLiC's ranking loss (Zhao et al. 2023) on log-ratios, as TRL's loss_type="hinge": max(0, 1 - beta *
    difference).
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    losses = torch.relu(1 - beta * (chosen_logratios - rejected_logratios))
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def add_hinge():
    """The row; and the key's choices, which were read from the table before it was there."""
    train_dpo.LOSSES["hinge"] = train_dpo.Loss(
        hinge_loss, "sum", beta=0.05, usual_beta=(0.01, 1.0), unit="hinges per pair"
    )
    train_dpo.DPOConfig.__dataclass_fields__["loss"].type = Literal[tuple(train_dpo.LOSSES)]


@pytest.fixture
def hinge(monkeypatch):
    monkeypatch.setattr(train_dpo, "LOSSES", dict(train_dpo.LOSSES))
    field = train_dpo.DPOConfig.__dataclass_fields__["loss"]
    monkeypatch.setattr(field, "type", field.type)
    add_hinge()


@pytest.mark.slow
def test_a_new_loss_is_one_row(world, tmp_path, hinge):
    """It is trained at its own beta, planned with a pass over the reference, refused smoothing, and drawn in
    its units.
    """
    path = write_config(tmp_path, world, dpo=dict(lr=3e-2))
    out = launch("dpo", path, "--loss=hinge", prepare=add_hinge).ok().out[0]
    assert "step 1: loss 1.000000, largest |policy - reference| 0.0e+00" in out
    losses = trace(tmp_path / "dpo", "loss")[:, 0]
    assert losses[0] == 1.0 and losses[-1] < 0.9
    assert json.loads((tmp_path / "dpo/config.json").read_text())["beta"] == 0.05

    planned, *_ = plan.make("dpo", str(path), ["--loss=hinge"], "h100", 1, log=lambda line: None)
    assert "reference log-probs" in planned.seconds
    with pytest.raises(
        ValueError, match="label_smoothing=0.1: defined for dpo_norm, dpo and simpo, not for loss='hinge'"
    ):
        load("dpo", [str(path), "--loss=hinge", "--label_smoothing=0.1"])

    charts = {
        chart.title: chart for chart in figures.training_charts(["run"], [folders.read(tmp_path / "dpo")])
    }
    assert charts["Loss"].unit == "hinges per pair"
    assert charts["Log-ratio to the reference"].unit == "nats per answer"
    # beta * log-ratio is the reward, so the report's log-ratios are the rewards over the row's beta
    ratios = charts["Log-ratio to the reference"].lines[0].y
    assert ratios == pytest.approx([reward / 0.05 for reward in charts["Rewards"].lines[0].y])


def test_default_betas_are_usual():
    for loss in train_dpo.LOSSES.values():
        low, high = loss.usual_beta
        assert low <= loss.beta <= high


@pytest.mark.parametrize(
    "loss, beta, is_said",
    [("dpo", 0.1, False), ("dpo", 5.0, True), ("dpo_norm", 0.1, True), ("dpo_norm", 5.0, False)],
)
def test_an_unusual_beta_is_said(ranks, capsys, loss, beta, is_said):
    """5 on sums, 0.1 on means: the two that are easily confused."""
    train_dpo.say_unusual_beta(SimpleNamespace(loss=loss, beta=beta), ranks)
    assert (f"beta={beta}: unusual for loss={loss!r}" in capsys.readouterr().out) == is_said


# ---------------------------------------------------------------- one step in any cut


@pytest.fixture
def stage(world, tmp_path, ranks):
    config, pairs, model = stage_parts("dpo", write_config(tmp_path, world), ranks)
    return SimpleNamespace(config=config, pairs=pairs, model=model, ranks=ranks)


def fake_reference(pairs):
    """A reference unlike the policy, so that losses and weights differ by pair: (n, 2) float32."""
    counts = np.stack([pairs.chosen.num_targets, pairs.rejected.num_targets], axis=1)
    return (-5.5 * counts + np.random.RandomState(0).randn(*counts.shape)).astype(np.float32)


def step_gradients(config, pairs, model, ranks, ids=EIGHT, **changes):
    config = SimpleNamespace(**vars(config) | changes)
    metrics, _ = train_dpo.forward_backward(model, pairs, fake_reference(pairs), ids, config, ranks)
    return metrics, whole_gradients(model)


@pytest.mark.slow
@pytest.mark.parametrize("loss, sft_weight", [("dpo_norm", 0.0), ("dpo", 0.5), ("wpo", 0.0)])
def test_any_accumulation_is_one_batch(stage, loss, sft_weight):
    """CHECKS 1: 8 unequal pairs as 1 x 8, in several micro-batches, and against one plain graph over
    documents run alone.
    """
    keys = dict(loss=loss, sft_weight=sft_weight, beta=0.5)
    lengths = stage.pairs.lengths[EIGHT]
    whole, gradients = step_gradients(
        stage.config, stage.pairs, stage.model, stage.ranks, tokens_per_microbatch=lengths.sum(), **keys
    )
    for room in (int(lengths.sum() / 2.5), lengths.max()):
        assert len(list(local_batches(stage.pairs, EIGHT, stage.model.config, room, stage.ranks))) >= 3
        cut, cut_gradients = step_gradients(
            stage.config, stage.pairs, stage.model, stage.ranks, tokens_per_microbatch=room, **keys
        )
        assert {k: v for k, v in cut.items() if k != "padding_waste"} == pytest.approx(
            {k: v for k, v in whole.items() if k != "padding_waste"}, rel=1e-6, abs=1e-6
        )
        assert_gradients_equal(cut_gradients, gradients)

    plain = plain_loss(
        stage.model, stage.pairs, fake_reference(stage.pairs), SimpleNamespace(**vars(stage.config) | keys)
    )
    plain.backward()
    assert whole["loss"] == pytest.approx(plain.item(), rel=5e-6)
    assert_gradients_equal(whole_gradients(stage.model), gradients, 5e-6)


def plain_loss(model, pairs, reference, config):
    """Each document alone, full logits, the loss of its pair, the mean over EIGHT."""
    losses, chosen_sums = [], []
    for i in EIGHT:
        sums = [plain_sum(model, *side[i]) for side in (pairs.chosen, pairs.rejected)]
        counts = torch.tensor([[int(side[i][1][1:].sum())] for side in (pairs.chosen, pairs.rejected)])
        losses.append(
            preference_loss(
                config, torch.stack(sums)[:, None], torch.from_numpy(reference[i])[:, None], counts
            )[0]
        )
        chosen_sums.append(sums[0])
    tokens = sum(int(pairs.chosen[i][1][1:].sum()) for i in EIGHT)
    return torch.cat(losses).mean() - config.sft_weight * torch.stack(chosen_sums).sum() / tokens


def plain_sum(model, input_ids, mask):
    input_ids, mask, T = (
        torch.from_numpy(input_ids.astype(np.int64)),
        torch.from_numpy(np.array(mask)),
        len(input_ids),
    )
    hidden = model(input_ids, torch.arange(T), torch.tensor([0, T], dtype=torch.int32), T)
    logps = (hidden @ model.lm_head.weight.T).log_softmax(-1)[torch.arange(T - 1), input_ids[1:]]
    return logps[mask[1:]].sum()


@pytest.mark.slow
def test_gap_is_per_root_of_an_answers_tokens(stage):
    """The unit of TOLERANCE: the largest of both answers of all pairs, in whatever micro-batch."""
    reference = fake_reference(stage.pairs)
    config = SimpleNamespace(**vars(stage.config) | {"tokens_per_microbatch": stage.pairs.lengths.max()})
    _, gap = train_dpo.forward_backward(stage.model, stage.pairs, reference, EIGHT, config, stage.ranks)
    with torch.no_grad():
        answers = [(plain_sum(stage.model, *side[i]).item() - reference[i, k], side.num_targets[i])
                   for k, side in enumerate((stage.pairs.chosen, stage.pairs.rejected)) for i in EIGHT]  # fmt: skip
    assert gap == pytest.approx(
        max(abs(difference) / tokens**0.5 for difference, tokens in answers), rel=1e-5
    )


def dpo_step(config_path, ids, ranks):
    config, pairs, model = stage_parts("dpo", config_path, ranks)
    metrics, gradients = step_gradients(config, pairs, model, ranks, np.array(ids))
    return metrics["loss"], gradients


@pytest.mark.slow
@pytest.mark.parametrize("ids", [EIGHT, EIGHT[:1]], ids=["8 pairs", "fewer pairs than ranks"])
def test_two_ranks_have_the_gradient_of_one(world, tmp_path, ranks, ids):
    """CHECKS 1, 2."""
    config_path = write_config(tmp_path, world)
    loss, gradients = dpo_step(config_path, ids, ranks)
    spawn(
        partial(save_gradients, dpo_step, config_path, ids.tolist(), tmp_path / "g.safetensors"),
        tmp_path / "logs",
        ranks=2,
    ).ok()
    other = load_tensors(tmp_path / "g.safetensors")
    assert other.pop("loss").item() == pytest.approx(loss, rel=1e-6)
    assert_gradients_equal(other, gradients)


@pytest.mark.slow
def test_train_mode_forwards_are_bit_equal(world, tmp_path, ranks):
    """CHECKS 8: with LoRA too, whose adapters are made to count."""
    config_path = write_config(tmp_path, world, lora_rank=4, lora_alpha=8.0)
    config, pairs, model = stage_parts("dpo", config_path, ranks)
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            param.data.fill_(0.02)
    model.train()
    ((micro_batch_ids, batch, _),) = local_batches(pairs, EIGHT[:3], model.config, 192, ranks)
    first, second = (answer_logps(model, batch, len(micro_batch_ids))[0] for _ in range(2))
    assert torch.equal(first, second)
    with train_dpo.adapters_disabled(model):
        assert not torch.allclose(first, answer_logps(model, batch, len(micro_batch_ids))[0])


def test_reference_is_without_adapters(world, tmp_path, ranks):
    """CHECKS 6, 22: whatever the adapters have become."""
    plain_config, pairs, base = stage_parts("dpo", write_config(tmp_path, world), ranks)
    with torch.no_grad():
        expected = train_dpo._compute_reference(base, pairs, EIGHT, plain_config, ranks)
    config, pairs, model = stage_parts(
        "dpo", write_config(tmp_path, world, lora_rank=4, lora_alpha=8.0), ranks
    )
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            param.data.fill_(0.02)
    with torch.no_grad():
        assert (
            train_dpo._compute_reference(model, pairs, EIGHT, config, ranks).tobytes() == expected.tobytes()
        )


# ---------------------------------------------------------------- evaluation


@pytest.mark.slow
def test_evaluation_by_hand(stage, world):
    """Means over all held-out pairs, and 95 % intervals over their prompts, of which some occur twice: 1.96
    times the root of the sum of squares of each prompt's summed deviations, over n.
    """
    reference = fake_reference(stage.pairs)
    result = train_dpo.evaluate(stage.model, stage.pairs, reference, stage.config, stage.ranks, SilentLog())
    with torch.no_grad():
        policy = torch.tensor([[plain_sum(stage.model, *side[i]) for i in range(len(stage.pairs))] for side in
                               (stage.pairs.chosen, stage.pairs.rejected)])  # fmt: skip
    counts = np.stack([stage.pairs.chosen.num_targets, stage.pairs.rejected.num_targets])
    rewards = 5.0 * (policy.numpy() - reference.T) / counts
    margins = rewards[0] - rewards[1]
    asked = [json.loads(line)["prompt"] for line in (world / "pref.jsonl").read_text().splitlines()]
    assert len(set(asked)) < len(asked) == len(margins)

    def half(values):
        sums = dict.fromkeys(asked, 0.0)
        for prompt, value in zip(asked, values, strict=True):
            sums[prompt] += value - values.mean()
        few = len(sums) / (len(sums) - 1)
        return 1.96 * (few * sum(total**2 for total in sums.values())) ** 0.5 / len(values)

    expected = {
        "eval/loss": np.log1p(np.exp(-margins)).mean(),
        "eval/rewards/chosen": rewards[0].mean(),
        "eval/rewards/rejected": rewards[1].mean(),
        "eval/rewards/margins": margins.mean(),
        "eval/rewards/accuracies": (margins > 0).mean(),
        "eval/logps/chosen": policy[0].mean().item(),
        "eval/logps/rejected": policy[1].mean().item(),
        "eval/rewards/margins_ci95": half(margins),
        "eval/rewards/accuracies_ci95": half(margins > 0),
    }
    assert result == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_intervals_are_over_prompts(stage):
    """Every pair four times: the means stay, and so do the intervals, which would halve over pairs."""
    n, pairs = len(stage.pairs), stage.pairs
    reference = fake_reference(pairs)
    rest = stage.config, stage.ranks, SilentLog()

    def evaluated(pairs, reference):
        return train_dpo.evaluate(stage.model, pairs, reference, *rest)

    vars(pairs)["prompts"] = np.arange(n)
    alone = evaluated(pairs, reference)
    rows = np.tile(np.arange(n), 4)
    repeated = Repeated(pairs, rows)
    four = evaluated(repeated, reference[rows])
    assert four == pytest.approx(alone, rel=1e-5)
    repeated.prompts = np.zeros(len(rows), dtype=np.int64)
    assert four.keys() - evaluated(repeated, reference[rows]).keys() == {
        "eval/rewards/margins_ci95", "eval/rewards/accuracies_ci95"
    }  # fmt: skip  # one prompt has no interval


class Repeated:
    """The pairs `rows` of others, each with its prompt."""

    def __init__(self, pairs, rows):
        self.pairs, self.rows, self.prompts = pairs, rows, rows
        self.lengths, self.row_ids = pairs.lengths[rows], pairs.row_ids[rows]

    def __len__(self):
        return len(self.rows)

    def flops(self, config, ids):
        return self.pairs.flops(config, self.rows[ids])

    def pack(self, ids):
        return self.pairs.pack(self.rows[ids])


@pytest.mark.slow
def test_held_out_loss_is_the_training_loss(stage):
    """With sft_weight too: the pairs of a step, evaluated, have the loss that the step reports."""
    config = SimpleNamespace(**vars(stage.config) | dict(sft_weight=0.5))
    ids, reference = np.arange(len(stage.pairs)), fake_reference(stage.pairs)
    trained, _ = train_dpo.forward_backward(stage.model, stage.pairs, reference, ids, config, stage.ranks)
    stage.model.zero_grad()
    held_out = train_dpo.evaluate(stage.model, stage.pairs, reference, config, stage.ranks, SilentLog())
    assert held_out["eval/loss"] == pytest.approx(trained["loss"], rel=1e-6)


def dpo_evaluation(config_path, _, ranks):
    config, pairs, model = stage_parts("dpo", config_path, ranks)
    result = train_dpo.evaluate(model, pairs, fake_reference(pairs), config, ranks, SilentLog())
    return result["eval/loss"], {
        name: torch.tensor(value, dtype=torch.float64) for name, value in result.items()
    }


@pytest.mark.slow
def test_two_ranks_evaluate_as_one(world, tmp_path, ranks):
    config_path = write_config(tmp_path, world)
    _, expected = dpo_evaluation(config_path, None, ranks)
    spawn(
        partial(save_gradients, dpo_evaluation, config_path, None, tmp_path / "e.safetensors"),
        tmp_path / "logs",
        ranks=2,
    ).ok()
    actual = load_tensors(tmp_path / "e.safetensors")
    assert {name: actual[name].item() for name in expected} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-5
    )


def test_holding_out_changes_no_pick(world, tmp_path, ranks):
    """data_eval takes from the rows that are picked without it: the two sides together are the same rows, in
    order.
    """
    data = dict(data={f"{world}/pref.jsonl": 0.6})
    picked = load_pairs(write_config(tmp_path, world, dpo=data))[0].row_ids
    train, held_out = load_pairs(write_config(tmp_path, world, dpo=data | dict(data_eval=0.3)))
    is_held_out = np.isin(picked, held_out.row_ids)
    assert len(picked) == 21 and 0 < len(held_out) < 21
    assert picked[~is_held_out].tolist() == train.row_ids.tolist()
    assert picked[is_held_out].tolist() == held_out.row_ids.tolist()


def load_pairs(path):
    config = load("dpo", [str(path)])
    return load_preferences(config, Tokenizer.from_dir(config.model_path))


def test_pairs_that_teach_nothing_are_counted(world, tmp_path):
    """One pair of three has equal answers; the held-out file's line says that it is held out, and the next one
    that its prompt is not.
    """
    rows = [
        {"prompt": "the cat", "chosen": answer, "rejected": "a dog"} for answer in ("a dog", "fast", "slow")
    ]
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dict(data={str(tmp_path / "train.jsonl"): 1.0}, data_eval={str(tmp_path / "held_out.jsonl"): 1.0})
    config, lines = load("dpo", [str(write_config(tmp_path, world, dpo=data))]), []
    load_preferences(config, Tokenizer.from_dir(config.model_path), lines.append)
    assert [line.split(",")[0] for line in lines] == [
        "data: 3 rows: 3 train",
        "data_eval: 3 rows: 3 held out",
        "data_eval: 3 of 3 rows have a prompt that is trained on too: in eval/",
    ]
    assert all(line.endswith("; 1 pairs with two equal answers (they teach nothing)") for line in lines[:2])


# ---------------------------------------------------------------- the reference cache


def test_reference_key_is_content():
    """CHECKS 7: change any part, a miss; the model's path, the batch size or the learning rate are not
    parts.
    """
    cpu = SimpleNamespace(device=torch.device("cpu"))

    def key(weights="w", tokens="t", share_prefix=True, ranks=cpu, **keys):
        pairs = SimpleNamespace(fingerprint=tokens, share_prefix=share_prefix)
        config = SimpleNamespace(**dict(precision="fp32", kernels="fused", attention="flash2") | keys)
        return train_dpo.reference_key(weights, pairs, config, ranks)

    cuda = SimpleNamespace(device=torch.device("cuda"))
    keys = [
        key(),
        key(weights="x"),
        key(tokens="x"),
        key(share_prefix=False),
        key(kernels="plain"),
        key(ranks=cuda),
    ]
    keys += [key(precision=precision, ranks=ranks) for precision in ("bf16", "fp8") for ranks in (cpu, cuda)]
    keys.append(key(precision="bf16", ranks=cuda, attention="flash4"))
    assert len(set(keys)) == len(keys)
    assert key(model_path="elsewhere", global_batch_size=7, lr=1.0) == key()


@pytest.mark.parametrize("change", [dict(supervise="last"), dict(template="zephyr"), dict(max_seq_len=50)])
def test_pairs_fingerprint_covers_what_is_compared(world, tmp_path, ranks, change):
    """CHECKS 7: tokens and label turns reach the key through the pairs' fingerprint."""
    path = tmp_path / "pref.jsonl"
    texts = zip(("user", "assistant") * 2, ("the cat", "a dog", "the cat", "good answer"))
    turns = [{"role": role, "content": text} for role, text in texts]
    rejected = turns[:3] + [{"role": "assistant", "content": "never always bad"}]
    pairs = [(turns, rejected), (turns[2:], rejected[2:])]  # the second differs within 50 tokens too
    write_rows(path, [{"chosen": chosen, "rejected": other} for chosen, other in pairs])
    data = dict(data={str(path): 1.0})
    before, after = (
        stage_parts("dpo", write_config(tmp_path, world, dpo=data, **keys), ranks)[1] for keys in ({}, change)
    )
    assert before.fingerprint != after.fingerprint


@pytest.fixture
def reference(stage, monkeypatch):
    """reference() computes or loads the table of all pairs; reference.computed lists the pairs that were run
    through the model.
    """
    steps, computed = [step_examples(step, 35, 16, 42) for step in range(3)], []
    original = train_dpo._compute_reference

    def counted(model, pairs, ids, config, ranks):
        if len(computed) >= run.stop_after:
            raise KeyboardInterrupt
        computed.append(ids)
        return original(model, pairs, ids, config, ranks)

    def run(key="k"):
        computed.clear()
        return train_dpo.reference_logps(
            stage.model, stage.pairs, steps, key, stage.config, stage.ranks, SilentLog()
        )

    run.computed, run.steps, run.stop_after, run.path = (
        computed,
        steps,
        math.inf,
        f"{stage.config.cache_dir}/reference/k.safetensors",
    )
    monkeypatch.setattr(train_dpo, "_compute_reference", counted)
    monkeypatch.setattr(train_dpo, "SAVE_SECONDS", -1)  # save after every step
    return run


@pytest.mark.slow
def test_reference_values_and_hit(stage, reference):
    """CHECKS 6, 7: the table holds each answer's summed log-prob; the second time one step is computed again,
    and no more.
    """
    table = reference()
    assert [len(ids) for ids in reference.computed] == [16, 16, 3]
    with torch.no_grad():
        expected = [
            [plain_sum(stage.model, *side[i]).item() for side in (stage.pairs.chosen, stage.pairs.rejected)]
            for i in EIGHT
        ]
    np.testing.assert_allclose(table[EIGHT], expected, rtol=1e-5)
    again = reference()
    assert [ids.tolist() for ids in reference.computed] == [reference.steps[0].tolist()]
    assert again.tobytes() == table.tobytes()
    reference("another key")
    assert [len(ids) for ids in reference.computed] == [16, 16, 3]


@pytest.mark.slow
def test_reference_goes_on_part_way(reference):
    """CHECKS 6: killed after 2 of 3 steps; the next run verifies a step and computes the third. The table is
    the same to the bit.
    """
    reference.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        reference()
    assert np.isnan(load_file(reference.path)["logps"]).any(axis=1).sum() == 3
    reference.stop_after = math.inf
    table = reference()
    assert [ids.tolist() for ids in reference.computed] == [
        reference.steps[0].tolist(),
        reference.steps[2].tolist(),
    ]
    assert reference("fresh").tobytes() == table.tobytes()


@pytest.mark.parametrize("change", [1e-3, -1.0])
def test_wrong_reference_is_refused(reference, change):
    """CHECKS 6: and not replaced by something else."""
    table = reference() + np.float32(change)
    train_dpo._write_table(Path(reference.path), table)
    with pytest.raises(ValueError, match="not this model's log-probs.*delete the file"):
        reference()
    assert load_file(reference.path)["logps"].tobytes() == table.tobytes()


@pytest.mark.slow
def test_every_bit_of_the_reference_is_verified(reference):
    """Issue 13: in the pairs that are computed again and in those that are not, in the header, in the
    length.
    """
    reference()
    path = Path(reference.path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(64):
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="reference/k.safetensors: .*"):
            reference()
    path.write_bytes(whole)
    reference()


@pytest.mark.parametrize("value", [-7e20, 5.0])
def test_a_number_that_is_no_log_prob_is_refused(reference, value):
    """Whatever the hash says, and in a pair that is not computed again; its row is named."""
    table = reference()
    last = reference.steps[2][0]
    table[last, 1] = value
    train_dpo._write_table(Path(reference.path), table)
    with pytest.raises(
        ValueError,
        match=rf"nats for \d+ tokens of .*pref.jsonl#{last}, expected -1000 to 0 a token; delete it",
    ):
        reference()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("difference, is_fine", [(0.3, True), (0.8, False)])
def test_bf16_rounding_is_no_wrong_reference(stage, reference, difference, is_fine):
    """What SmolLM2 showed between two packings of the same weights, and between its SFT and DPO weights, per
    root of an answer's tokens.
    """
    table, ids = reference(), EIGHT
    counts = np.stack([side.num_targets for side in (stage.pairs.chosen, stage.pairs.rejected)], axis=1)
    other = table + np.where(np.arange(len(table))[:, None] % 2, 1, -1) * difference * np.sqrt(counts)
    config = SimpleNamespace(**vars(stage.config) | {"precision": "bf16"})
    arguments = stage.model, stage.pairs, other, ids, reference.path, config, stage.ranks
    if is_fine:
        train_dpo._verify_reference(*arguments)
    else:
        with pytest.raises(ValueError, match=r"largest difference 8.0e-01 nats.sqrt\(tokens\), expected at most 0.5"):
            train_dpo._verify_reference(*arguments)


def test_reference_must_be_finite(stage, reference):
    """CHECKS 24: the pairs are named, nothing is stored."""
    stage.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="pref.jsonl#"):
        reference()
    assert not list(Path(stage.config.cache_dir).glob("reference/*"))


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 0.5), ("fp8", 1.0)])
@pytest.mark.parametrize("share, is_fine", [(0.9, True), (2.0, False)])
def test_check_first_step(ranks, capsys, precision, tolerance, share, is_fine):
    """CHECKS 5: the largest difference is printed, and more than rounding stops the run."""
    config, gap = (
        SimpleNamespace(loss="dpo_norm", sft_weight=0.0, precision=precision, model_path="base"),
        share * tolerance,
    )
    if is_fine:
        train_dpo.check_first_step({"loss": LN2}, gap, config, ranks)
    else:
        with pytest.raises(ValueError, match="not of model_path='base'"):
            train_dpo.check_first_step({"loss": LN2}, gap, config, ranks)
    assert "ln 2 = 0.693147" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_1_is_ln_2(world, tmp_path, ranks, precision):
    """CHECKS 5: fp32 within 1e-6, and through the same batches the difference is exactly 0, in bf16 too."""
    config, pairs, model = stage_parts("dpo", write_config(tmp_path, world, precision=precision), ranks)
    steps = in_order(len(pairs), config.global_batch_size)
    table = train_dpo.reference_logps(model, pairs, steps, "k", config, ranks, SilentLog())
    for ids in steps:
        metrics, gap = train_dpo.forward_backward(model, pairs, table, ids, config, ranks)
        assert gap == 0.0
        assert metrics["loss"] == pytest.approx(LN2, abs=1e-6)
        assert (
            metrics["rewards/margins"] == metrics["rewards/chosen"] == metrics["rewards/accuracies"] == 0.0
        )  # a tie is no win


# ---------------------------------------------------------------- ten steps


def transformers_dpo(world, pairs, ids_of_step, lrs, loss, beta):
    """[(loss, margin, grad_norm) per step], weights: a policy and a frozen reference, one document at a time,
    torch's AdamW and clip.
    """
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32) for _ in range(2)
    )
    optimizer = plain_adamw(policy, 0.1)

    def logp(model, input_ids, mask):
        input_ids = torch.from_numpy(input_ids.astype(np.int64))
        labels = input_ids.masked_fill(~torch.from_numpy(np.array(mask)), -100)[1:]
        total = -F.cross_entropy(
            model(input_ids[None]).logits[0, :-1], labels, ignore_index=-100, reduction="sum"
        )
        return total / (labels != -100).sum() if loss == "dpo_norm" else total

    steps = []
    for lr, ids in zip(lrs, ids_of_step, strict=True):
        losses, margins = [], []
        for i in ids:
            chosen, rejected = (logp(policy, *side[i]) for side in (pairs.chosen, pairs.rejected))
            with torch.no_grad():
                ref_chosen, ref_rejected = (
                    logp(reference, *side[i]) for side in (pairs.chosen, pairs.rejected)
                )
            margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
            pair_loss = torch.log1p(torch.exp(-margin)) / len(ids)
            pair_loss.backward()
            losses.append(pair_loss.item())
            margins.append(margin.item() / len(ids))
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        steps.append((sum(losses), sum(margins), norm))
    return torch.tensor(steps, dtype=torch.float64), {
        name: param.detach() for name, param in policy.named_parameters()
    }


@pytest.mark.slow
@pytest.mark.parametrize("loss, beta, peak", [("dpo_norm", 5.0, 1e-3), ("dpo", 0.1, 1e-3)])
def test_ten_steps_equal_a_plain_transformers_loop(world, tmp_path, ranks, loss, beta, peak):
    """CHECKS 1, 2, 4, 5, 10, 18: losses to 1e-5 of step 1's, norms, final weights. Steps of 16, 16 and 3
    pairs; cosine after 2 steps; another seed and decay than the defaults."""
    keys = dict(loss=loss, beta=beta, lr=peak, lr_schedule="cosine", warmup_steps=2, weight_decay=0.1, seed=7)
    config_path = write_config(tmp_path, world, dpo=keys, max_steps=10, num_epochs=4)
    launch("dpo", config_path).ok()
    config, pairs, _ = stage_parts("dpo", config_path, ranks)
    lrs = [0, peak / 2] + [peak * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    ids_of_step = [step_examples(step, len(pairs), 16, seed=7) for step in range(10)]
    expected, weights = transformers_dpo(world, pairs, ids_of_step, lrs, loss, beta)
    actual = trace(tmp_path / "dpo", "loss", "rewards/margins", "grad_norm", "lr")
    assert actual[:, 3].tolist() == pytest.approx(lrs, rel=1e-12)
    assert actual[0, 0].item() == pytest.approx(LN2, abs=1e-6) and actual[-1, 0] < 0.6
    torch.testing.assert_close(actual[:, 0], expected[:, 0], rtol=1e-5, atol=LN2 * 1e-5)
    torch.testing.assert_close(actual[:, 1:3], expected[:, 1:], rtol=1e-4, atol=1e-5)
    assert largest_difference(final_weights(tmp_path / "dpo"), weights) < 1e-5


def test_torn_reference_cache_names_the_file(tmp_path):
    """A file that a power loss cut short is refused by name, not read and not silently computed again."""
    path = tmp_path / "table.safetensors"
    path.write_bytes(b"\x08\x00\x00")
    with pytest.raises(ValueError, match="table.safetensors: truncated"):
        train_dpo._read_table(path, 3)
    assert np.isnan(train_dpo._read_table(tmp_path / "none.safetensors", 3)).all()


def write_tables(path):
    for value in range(200):
        train_dpo._write_table(path, np.full((35, 2), value, dtype=np.float32))
    return 0


@pytest.mark.slow
def test_runs_that_share_a_cache_do_not_disturb_each_other(tmp_path):
    """Two write one table over and over: both succeed, and what is there is whole."""
    path = tmp_path / "reference/k.safetensors"
    spawn(partial(write_tables, path), tmp_path / "logs", ranks=2).ok()
    assert [found.name for found in path.parent.iterdir()] == ["k.safetensors"]
    assert (train_dpo._read_table(path, 35) == 199).all()


def other_run_writes_between():
    """Rank 1 finds the table that another run has finished since rank 0 looked."""
    read = train_dpo._read_table
    train_dpo._read_table = lambda path, n: (
        np.zeros((n, 2), np.float32) if os.environ["RANK"] == "1" else read(path, n)
    )


@pytest.mark.slow
def test_ranks_agree_on_what_the_cache_holds(world, tmp_path):
    """Else rank 0 computes what is missing and waits for rank 1, which verifies."""
    config = write_config(tmp_path, world, max_steps=1, warmup_steps=0)
    assert "ln 2 = 0.693147" in launch("dpo", config, ranks=2, prepare=other_run_writes_between).ok().out[0]


def test_reference_on_a_full_disk(reference, monkeypatch):
    """Named as the error that a user can mend, OSError, with the file; nothing torn stays."""

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .* bytes needed.*reference/.*k"):
        reference()
    assert not list(Path(reference.path).parent.iterdir())
