"""SFT: the loss and its gradient in any packing and on any ranks, and ten whole steps against a plain
transformers loop.
"""

import errno
import json
import math
import os
from concurrent import futures
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from world import (
    SilentLog,
    assert_gradients_equal,
    final_weights,
    largest_difference,
    launch,
    metrics,
    plain_adamw,
    save_gradients,
    spawn,
    stage_parts,
    trace,
    whole_gradients,
    write_config,
)

import train_sft
from packing import local_batches, step_examples
from plumbing.checkpoint import Checkpointer
from plumbing.config import load
from plumbing.logbook import Logbook

EIGHT = np.array([3, 0, 7, 12, 30, 21, 5, 6])  # of unequal lengths: the world's rows have 8 to 60 tokens


# ---------------------------------------------------------------- by hand


def test_loss_denominator():
    """Two documents with 3 and 1 supervised tokens, NLLs 1 + 2 + 3 and 6 nats: 12 / 4 = 3 per token, 12 / 2 =
    6 per sequence; the mean of the documents' means, (2 + 6) / 2 = 4, is neither."""
    assert 12 / train_sft.loss_denominator("token_mean", 4, 2) == 3
    assert 12 / train_sft.loss_denominator("tulu3_release", 4, 2) == 6


# ---------------------------------------------------------------- one step in any cut


def step_gradients(config, documents, model, ranks, ids=EIGHT, tokens_per_microbatch=None):
    config = SimpleNamespace(
        loss=config.loss, tokens_per_microbatch=tokens_per_microbatch or config.tokens_per_microbatch
    )
    return train_sft.forward_backward(model, documents, ids, config, ranks)["loss"], whole_gradients(model)


def plain_loss(model, documents, ids, loss):
    """Each document alone, full logits, one autograd graph."""
    nlls, tokens = [], 0
    for input_ids, mask in (documents[i] for i in ids):
        input_ids, mask = torch.from_numpy(input_ids.astype(np.int64)), torch.from_numpy(np.array(mask))
        T = len(input_ids)
        hidden = model(input_ids, torch.arange(T), torch.tensor([0, T], dtype=torch.int32), T)
        logps = (hidden @ model.lm_head.weight.T).log_softmax(-1)[torch.arange(T - 1), input_ids[1:]]
        nlls.append(-logps[mask[1:]].sum())
        tokens += int(mask[1:].sum())
    return torch.stack(nlls).sum() / (tokens if loss == "token_mean" else len(ids))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["token_mean", "tulu3_release"])
def test_any_accumulation_is_one_batch(world, tmp_path, ranks, loss):
    """CHECKS 1: 8 unequal rows as 1 x 8, as 3 micro-batches, as 8 x 1 and as one plain graph over documents
    run alone.
    """
    config, documents, model = stage_parts("sft", write_config(tmp_path, world), ranks, f"--loss={loss}")
    lengths = documents.lengths[EIGHT]
    assert len(set(lengths)) > 5
    whole, gradients = step_gradients(
        config, documents, model, ranks, tokens_per_microbatch=int(lengths.sum())
    )
    for room, least in ((int(lengths.sum() / 2.5), 3), (int(lengths.max()), 4)):
        batches = list(local_batches(documents, EIGHT, model.config, room, ranks))
        assert len(batches) >= least
        cut, cut_gradients = step_gradients(config, documents, model, ranks, tokens_per_microbatch=room)
        assert cut == pytest.approx(whole, rel=1e-6)
        assert_gradients_equal(cut_gradients, gradients)

    denominator = train_sft.loss_denominator(loss, int(documents.num_targets[EIGHT].sum()), len(EIGHT))
    for i in EIGHT:  # 8 x 1, by hand: each document's share of the global loss
        ((_, batch, _),) = local_batches(documents, np.array([i]), model.config, 64, ranks)
        (train_sft.nll_sum(model, batch) / denominator).backward()
    assert_gradients_equal(whole_gradients(model), gradients)

    plain = plain_loss(model, documents, EIGHT, loss)
    plain.backward()
    assert whole == pytest.approx(plain.item(), rel=1e-6)
    assert_gradients_equal(whole_gradients(model), gradients)


def sft_step(config_path, ids, ranks):
    config, documents, model = stage_parts("sft", config_path, ranks)
    return step_gradients(config, documents, model, ranks, np.array(ids))


@pytest.mark.slow
@pytest.mark.parametrize("ids", [EIGHT, EIGHT[:1]], ids=["8 rows", "fewer rows than ranks"])
def test_two_ranks_have_the_gradient_of_one(world, tmp_path, ranks, ids):
    """CHECKS 1, 2."""
    config_path = write_config(tmp_path, world)
    loss, gradients = sft_step(config_path, ids, ranks)
    spawn(
        partial(save_gradients, sft_step, config_path, ids.tolist(), tmp_path / "g.safetensors"),
        tmp_path / "logs",
        ranks=2,
    ).ok()
    other = load_file(tmp_path / "g.safetensors")
    assert other.pop("loss").item() == pytest.approx(loss, rel=1e-6)
    assert_gradients_equal(other, gradients)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_a_step_out(world, tmp_path, ranks, world_size):
    """CHECKS 3: the same ids per step for 1, 2, 4 and 8 ranks, each once, in equally many micro-batches; the
    last step has 3 of 16.
    """
    config, documents, model = stage_parts("sft", write_config(tmp_path, world), ranks)
    sizes = []
    for step in range(3):
        ids = step_examples(step, len(documents), 16, config.seed)
        shares = []
        for rank in range(world_size):
            here = SimpleNamespace(rank=rank, size=world_size, device="cpu")
            shares.append(
                [
                    micro_batch_ids
                    for micro_batch_ids, *_ in local_batches(documents, ids, model.config, 192, here)
                ]
            )
        assert len({len(share) for share in shares}) == 1
        assert sorted(
            np.concatenate([micro_batch_ids for share in shares for micro_batch_ids in share])
        ) == sorted(ids)
        sizes.append(len(ids))
    assert sizes == [16, 16, 3]


# ---------------------------------------------------------------- ten steps


def transformers_sft(world, documents, ids_of_step, lrs, loss):
    """[(loss, grad_norm) per step], weights: transformers' model, one document at a time, torch's AdamW and
    clip_grad_norm_.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    optimizer = plain_adamw(model, 0.1)
    steps = []
    for lr, ids in zip(lrs, ids_of_step, strict=True):
        tokens = sum(int(documents[i][1][1:].sum()) for i in ids)
        total = 0.0
        for input_ids, mask in (documents[i] for i in ids):
            input_ids = torch.from_numpy(input_ids.astype(np.int64))
            labels = input_ids.masked_fill(~torch.from_numpy(np.array(mask)), -100)
            logits = model(input_ids[None]).logits[0, :-1]
            nll = F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            share = nll / (tokens if loss == "token_mean" else len(ids))
            share.backward()
            total += share.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        steps.append((total, norm))
    return torch.tensor(steps, dtype=torch.float64), {
        name: param.detach() for name, param in model.named_parameters()
    }


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["token_mean", "tulu3_release"])
def test_ten_steps_equal_a_plain_transformers_loop(world, tmp_path, ranks, loss):
    """CHECKS 1, 2, 4, 18: losses to 1e-5, norms, final weights. Steps of 16, 16 and 3 rows; 3 steps of
    warm-up, linear to 0; another seed and decay than the defaults."""
    keys = dict(loss=loss, lr=3e-3, warmup_steps=3, weight_decay=0.1, seed=7)
    config_path = write_config(tmp_path, world, sft=keys, max_steps=10, num_epochs=4)
    launch("sft", config_path).ok()
    config, documents, _ = stage_parts("sft", config_path, ranks)
    lrs = [3e-3 * factor for factor in (0, 1 / 3, 2 / 3, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7)]
    ids_of_step = [step_examples(step, len(documents), 16, seed=7) for step in range(10)]
    expected, weights = transformers_sft(world, documents, ids_of_step, lrs, loss)
    actual = trace(tmp_path / "sft", "loss", "grad_norm", "lr")
    assert actual[:, 2].tolist() == pytest.approx(lrs, rel=1e-12)
    assert actual[-1, 0] < actual[0, 0]
    torch.testing.assert_close(actual[:, 0], expected[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(actual[:, 1], expected[:, 1], rtol=1e-4, atol=0)
    assert largest_difference(final_weights(tmp_path / "sft"), weights) < 1e-5


# ---------------------------------------------------------------- evaluation


@pytest.mark.slow
def test_evaluation_is_the_token_mean(world, tmp_path, ranks):
    """Over all held-out documents at once, not a mean of steps; perplexity is its exponential."""
    config, documents, model = stage_parts("sft", write_config(tmp_path, world), ranks)
    result = train_sft.evaluate(model, documents, config, ranks, SilentLog())
    with torch.no_grad():
        expected = plain_loss(model, documents, range(len(documents)), "token_mean").item()
    assert result == pytest.approx({"eval/loss": expected, "eval/perplexity": math.exp(expected)}, rel=1e-6)


def sft_evaluation(config_path, _, ranks):
    config, documents, model = stage_parts("sft", config_path, ranks)
    return train_sft.evaluate(model, documents, config, ranks, SilentLog())["eval/loss"], {}


@pytest.mark.slow
def test_two_ranks_evaluate_as_one(world, tmp_path, ranks):
    config_path = write_config(tmp_path, world)
    loss, _ = sft_evaluation(config_path, None, ranks)
    spawn(
        partial(save_gradients, sft_evaluation, config_path, None, tmp_path / "e.safetensors"),
        tmp_path / "logs",
        ranks=2,
    ).ok()
    assert load_file(tmp_path / "e.safetensors")["loss"].item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
def test_evaluations_of_a_run(world, tmp_path):
    """Before the first step, every eval_every steps, at the end; the held-out prompts are in no training
    step.
    """
    config_path = write_config(tmp_path, world, data_eval=0.3, eval_every=2, max_steps=3)
    launch("sft", config_path).ok()
    evaluations = metrics(tmp_path / "sft", "eval/loss")
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]


def fill_the_disk_at_step_2():
    """In the process of a run, before it starts. Its steps take as long as it takes to find that out."""

    def write(self, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def check_once_written(self):
        if self._pending:
            futures.wait([self._pending])
        check(self)

    check = Checkpointer.check
    Checkpointer._write, Checkpointer.check = write, check_once_written


@pytest.mark.slow
def test_a_save_that_fails_ends_the_run_at_its_next_step(world, tmp_path):
    """Not at its next save, which may be hours of training later."""
    config_path = write_config(tmp_path, world, save_every=2, num_epochs=4, max_steps=8)
    done = launch("sft", config_path, prepare=fill_the_disk_at_step_2)
    assert done.codes == [1] and os.strerror(errno.ENOSPC) in done.err[0]
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [1, 2, 3]


def test_a_kill_while_metrics_are_cut_back_costs_none(world, tmp_path, ranks, monkeypatch):
    """The next start has the lines of all steps that it does not train again, whatever the earlier one had
    written by then.
    """
    log = Logbook(load("sft", [str(write_config(tmp_path, world))]), ranks, 4, {})
    path = tmp_path / "sft/metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3)))

    def killed(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("sft/metrics.tmp"):
            os.ftruncate(handle, 30)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        log.resume_at(2)
    log.resume_at(2)
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [1, 2]


def test_steps_that_metrics_lacks_are_said(world, tmp_path, ranks, capsys):
    """A checkpoint is on the disk before it counts; metrics.jsonl, which is not, may be the shorter one after
    a power cut.
    """
    log = Logbook(load("sft", [str(write_config(tmp_path, world))]), ranks, 4, {})
    for steps, said in (
        ((1, 2, 3), ""),
        ((1,), "metrics.jsonl: 2 of the 3 steps before are not in it"),
        ((), "3 of the 3 steps"),
    ):
        (tmp_path / "sft/metrics.jsonl").write_text(
            "".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in steps)
        )
        log.resume_at(3)
        printed = capsys.readouterr().out
        assert said in printed and bool(said) == bool(printed)


def test_a_torn_manifest_is_named_and_fresh_does_without(world, tmp_path, ranks):
    """It is read for its `processes`, which a run that starts over has none of yet."""
    argv, manifest = [str(write_config(tmp_path, world))], tmp_path / "sft/manifest.json"
    Logbook(load("sft", argv), ranks, 4, {}).resume_at(0)
    (process,) = json.loads(manifest.read_text())["processes"]
    assert (process["after_step"], process["world_size"]) == (0, 1)
    Logbook(load("sft", [*argv, "--fresh"]), ranks, 4, {})
    assert json.loads(manifest.read_text())["processes"] == []
    manifest.write_text('{"processes": [')
    with pytest.raises(ValueError, match=rf"{manifest}: missing or torn"):
        Logbook(load("sft", argv), ranks, 4, {})
    Logbook(load("sft", [*argv, "--fresh"]), ranks, 4, {})


def test_a_hopeless_model_is_evaluated(world, tmp_path, ranks):
    """Above 709 nats e^nll is no float64: the perplexity is infinite, which metrics.jsonl has as null."""
    config, documents, model = stage_parts("sft", write_config(tmp_path, world), ranks)
    with torch.no_grad():
        model.model.norm.weight.mul_(4000)
    result = train_sft.evaluate(model, documents, config, ranks, SilentLog())
    assert 709 < result["eval/loss"] < math.inf and result["eval/perplexity"] == math.inf
    log = Logbook(config, ranks, 4, {})
    log.resume_at(0)
    log.evaluation(0, result)
    assert metrics(tmp_path / "sft", "eval/loss") == [
        {"step": 0, "eval/loss": result["eval/loss"], "eval/perplexity": None}
    ]
