"""Prefix sharing from pairs to losses: the tokens that chosen and rejected begin with are computed once, and
nothing else changes.
"""

import json
import math
from os.path import commonprefix

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import gradients, random_llama, tiny_config
from world import (
    assert_gradients_equal,
    final_weights,
    largest_difference,
    launch,
    stage_parts,
    trace,
    whole_gradients,
    write_config,
    write_rows,
)

from data import Documents, Pairs
from model import apply_recompute
from train_dpo import answer_logps

repeatable = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def documents(rows):
    """Documents of (ids, mask) rows; a mask is a string in which x marks a supervised token."""
    ids, masks = zip(*rows)
    mask = np.array([letter == "x" for letter in "".join(masks)])
    return Documents(
        np.concatenate(ids).astype(np.int32),
        mask,
        np.cumsum([0, *map(len, ids)]),
        np.arange(len(rows)).astype(str),
    )


def make_pairs(rows, share_prefix=True):
    """Pairs of (chosen ids, its mask, rejected ids, its mask) rows."""
    return Pairs(documents([row[:2] for row in rows]), documents([row[2:] for row in rows]), share_prefix)


# ---------------------------------------------------------------- the stream


def test_a_shared_stream_by_hand():
    """Pair 0 begins with 5 6 7 8, where 7 is an earlier answer, supervised on both sides; then 10 11 | 12 13
    14. Pair 1 shares nothing.
    """
    pairs = make_pairs(
        [
            ([5, 6, 7, 8, 10, 11], "..x.xx", [5, 6, 7, 8, 12, 13, 14], "..x.xxx"),
            ([20, 21], ".x", [30, 31], ".x"),
        ]
    )
    assert pairs.prefixes.tolist() == [4, 0] and pairs.lengths.tolist() == [6 + 7 - 4, 2 + 2]
    batch = pairs.pack(np.array([0, 1]))
    # chosen 0 in rows 0-5, chosen 1 in 6-7, rejected 0 behind its prefix in 8-10, rejected 1 in 11-12
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 10, 11, 20, 21, 12, 13, 14, 30, 31]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 4, 5, 6, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 6, 8, 11, 13] and batch.max_seqlen == 7  # of rejected 0, whole
    # the chosen ones are their rows; rejected 0 begins with rows 0-3
    assert batch.shared.kv_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12]
    assert batch.shared.cu_seqlens_k.tolist() == [0, 6, 8, 15, 17]
    # row 1 (6) predicts 7 for both sides; row 3 (8), the last shared one, predicts 10 for chosen and 12 for
    # rejected
    assert batch.supervised.tolist() == [1, 3, 4, 6, 1, 3, 8, 9, 11]
    assert batch.targets.tolist() == [7, 10, 11, 21, 7, 12, 13, 14, 31]
    assert batch.supervised_offsets.tolist() == [0, 3, 4, 8, 9]
    assert [tensor.dtype for tensor in batch.to("cpu").shared] == [torch.int64, torch.int32]


def test_flops_by_hand():
    """The matmuls of 9 tokens; pairs of tokens that see each other: chosen 1+2+..+6 = 21, rejected's tokens
    5, 6, 7 see 5+6+7 = 18.
    """
    row = ([5, 6, 7, 8, 10, 11], "..x.xx", [5, 6, 7, 8, 12, 13, 14], "..x.xxx")
    config, ids = tiny_config(), np.array([0])
    matmul = (
        config.flops(1, logits=0) - config.flops(0, logits=0) - 4 * 3 * 48
    )  # of one token without itself: 4 HK in each of 3 layers
    head = 2 * 40 * 97 * (3 + 4)  # supervised tokens, those of the shared turn on either side
    assert make_pairs([row]).flops(config, ids).tolist() == [9 * matmul + 4 * 3 * 48 * (21 + 18) + head]
    assert make_pairs([row], False).flops(config, ids).tolist() == [
        13 * matmul + 4 * 3 * 48 * (21 + 28) + head
    ]


tokens = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("x.")), max_size=5)


@pytest.mark.slow
@repeatable
@given(
    st.lists(
        st.tuples(tokens, tokens, tokens).filter(lambda row: row[0] + row[1] and row[0] + row[2]),
        min_size=1,
        max_size=4,
    )
)
def test_a_shared_stream_holds_the_same_documents(rows):
    """Taken apart by kv_index, it is the documents of the stream without sharing; rows are repeated in
    prefixes only, once.
    """

    def side(row, k):
        ids, mask = zip(*row[0] + row[k])
        return list(ids), "".join(mask)

    table = [(*side(row, 1), *side(row, 2)) for row in rows]
    pairs, ids = make_pairs(table), np.arange(len(table))
    assert pairs.prefixes.tolist() == [min(len(commonprefix([a, b])), len(b) - 1) for a, _, b, _ in table]
    batch, plain = pairs.pack(ids), make_pairs(table, False).pack(ids)
    rows = batch.shared.kv_index
    assert len(batch.input_ids) == pairs.lengths.sum() and batch.max_seqlen == plain.max_seqlen
    assert torch.equal(batch.input_ids[rows], plain.input_ids) and torch.equal(
        batch.position_ids[rows], plain.position_ids
    )
    assert torch.equal(batch.shared.cu_seqlens_k, plain.cu_seqlens)
    assert torch.equal(batch.targets, plain.targets) and torch.equal(
        batch.supervised_offsets, plain.supervised_offsets
    )
    assert torch.equal(batch.supervised, rows[plain.supervised])
    uses = rows.bincount(minlength=len(batch.input_ids))
    assert 1 <= uses.min() and uses.max() <= 2 and (uses == 2).sum() == pairs.prefixes.sum()
    ends = zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], batch.shared.cu_seqlens_k[1:])
    assert all(
        rows[last - (end - start) : last].tolist() == list(range(start, end)) for start, end, last in ends
    )  # queries come last


# ---------------------------------------------------------------- log-probs and gradients


def random_pair(prefix, chosen, rejected, mask="x", seed=0):
    """A row of make_pairs with so many random tokens; the answers begin with different ones. mask: of the
    prefix, in turn.
    """
    ids = np.random.RandomState(seed).randint(2, 97, prefix + chosen + rejected)
    ids[prefix : prefix + 1], ids[prefix + chosen : prefix + chosen + 1] = 0, 1
    masked = (mask * prefix)[:prefix]
    sides = (ids[: prefix + chosen], chosen), (np.delete(ids, slice(prefix, prefix + chosen)), rejected)
    return tuple(part for side, own in sides for part in (side, masked + "x" * own))


CASES = {
    "one turn": ([random_pair(9, 5, 8, mask=".")], [9]),
    "an earlier turn supervised on both sides": ([random_pair(12, 6, 3, mask="..xx")], [12]),
    "nothing in common": ([random_pair(0, 5, 8)], [0]),
    "chosen begins rejected": ([random_pair(9, 0, 8, mask="...xx")], [9]),
    "rejected begins chosen": ([random_pair(9, 8, 0, mask="...xx")], [8]),
    "identical": ([random_pair(9, 0, 0, mask="...xx")], [8]),
    "branches of one token": ([random_pair(9, 1, 1, mask=".")], [9]),
    "a prefix of one token": ([random_pair(1, 4, 6, mask=".")], [1]),
    "masks differ within the prefix": ([([5, 6, 7, 8], "..x.", [5, 6, 7, 8, 9], "....x")], [4]),
    "no target on one side": ([([5, 6, 7], "...", [5, 6, 9], "..x")], [2]),
}
CASES["all of them"] = tuple(sum((case[part] for case in CASES.values()), []) for part in (0, 1))


def logps_and_gradients(model, pairs, ids, take_gradients=gradients):
    """(2, N) log-probs in one stream, and the gradients of a sum of them with unlike weights."""
    logps, _ = answer_logps(model, pairs.pack(ids), len(ids))
    weights = torch.tensor([[1.0, 0.5], [-0.7, 1.3]])[:, ids % 2]
    (logps * weights).sum().backward()
    grads = take_gradients(model)
    model.zero_grad()
    return logps.detach(), grads


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_shared_is_unshared_is_alone(case):
    """CHECKS 16: values and gradients of one stream with shared prefixes, of one without, and of every
    document by itself.
    """
    rows, prefixes = CASES[case]
    shared, plain, ids = make_pairs(rows), make_pairs(rows, False), np.arange(len(rows))
    assert shared.prefixes.tolist() == prefixes and plain.prefixes.tolist() == [0] * len(rows)
    model = random_llama(tiny_config())
    logps, grads = logps_and_gradients(model, shared, ids)
    expected, expected_grads = logps_and_gradients(model, plain, ids)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_equal(grads, expected_grads, 1e-5)
    alone, sums = [], {}
    for i in ids:
        value, own = logps_and_gradients(model, plain, np.array([i]))
        alone.append(value)
        sums = {name: sums.get(name, 0) + grad for name, grad in own.items()}
    torch.testing.assert_close(logps, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)
    assert_gradients_equal(grads, sums, 1e-5)


def chat(*contents):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 3, contents)]


CHATS = [  # (chosen, rejected)
    (
        chat("the cat", "a dog", "help please", "good answer runs"),
        chat("the cat", "a dog", "help please", "never always bad sorry"),
    ),
    (chat("the cat", "good dog"), chat("the cat", "good cat runs fast")),
    (chat("the cat", "good"), chat("the cat", "good", "thanks", "bad")),  # an answer more
    (chat("tell me about a dog", "yes"), chat("tell me about a dog", "yes")),
]


@pytest.mark.slow
@pytest.mark.parametrize("supervise, max_seq_len", [("all", 64), ("last", 64), ("last", 52), ("all", 40)])
def test_conversations(world, tmp_path, ranks, supervise, max_seq_len):
    """The same from chat to log-probs, through a file. Pair 0 has 54 and 55 tokens, 50 of them shared: 52
    cuts its last answers, 40 leaves one document twice."""
    write_rows(
        tmp_path / "pref.jsonl", [{"chosen": chosen, "rejected": rejected} for chosen, rejected in CHATS]
    )
    keys = dict(supervise=supervise, max_seq_len=max_seq_len, dpo=dict(data={f"{tmp_path}/pref.jsonl": 1.0}))
    path = write_config(tmp_path, world, **keys)
    _, shared, model = stage_parts("dpo", path, ranks)
    _, plain, _ = stage_parts("dpo", path, ranks, "--share_prefix=false")
    assert shared.prefixes.tolist() == [min(50, max_seq_len - 1), 24, 25, 28] and not plain.prefixes.any()
    assert shared.rejected.lengths.max() == min(55, max_seq_len)
    logps, grads = logps_and_gradients(model, shared, np.arange(len(shared)), whole_gradients)
    expected, expected_grads = logps_and_gradients(model, plain, np.arange(len(plain)), whole_gradients)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert_gradients_equal(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_share_too(mode):
    rows, _ = CASES["all of them"]
    model, pairs, ids = random_llama(tiny_config()), make_pairs(rows), np.arange(len(rows))
    expected, expected_grads = logps_and_gradients(model, pairs, ids)
    apply_recompute(model, mode)
    logps, grads = logps_and_gradients(model, pairs, ids)
    assert torch.equal(logps, expected)
    assert_gradients_equal(grads, expected_grads)


def test_a_window_is_compared_with_whole_documents():
    """A branch of 3 tokens behind 9 is a document of 12, too long for a window of 11."""
    pairs, ids = make_pairs([random_pair(9, 1, 3)]), np.array([0])
    assert answer_logps(random_llama(tiny_config(sliding_window=12)), pairs.pack(ids), 1)[0].isfinite().all()
    with pytest.raises(ValueError, match="sliding_window=11: a document of 12 tokens"):
        answer_logps(random_llama(tiny_config(sliding_window=11)), pairs.pack(ids), 1)


# ---------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_runs_with_and_without(world, tmp_path, ranks):
    """On 1 and 2 ranks: ln 2 at step 1, the same losses and weights; the log says how much is saved. An
    earlier turn is supervised.
    """
    rows = [json.loads(line) for line in (world / "pref.jsonl").read_text().splitlines()[:20]]
    rows = [
        {side: chat(row["prompt"], "a dog", "help please", row[side]) for side in ("chosen", "rejected")}
        for row in rows
    ]
    write_rows(tmp_path / "pref.jsonl", rows)
    data = dict(data={f"{tmp_path}/pref.jsonl": 1.0}, max_seq_len=96, global_batch_size=8)
    configs = {
        share: write_config(tmp_path / str(share), world, dpo=data | dict(share_prefix=share))
        for share in (False, True)
    }
    out, traces, weights = [], [], []
    for share, count in ((False, 1), (True, 1), (True, 2), (False, 2)):
        out.append(launch("dpo", configs[share], "--fresh", ranks=count).ok().out[0])
        run = tmp_path / str(share) / "dpo"
        traces.append(trace(run, "loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm"))
        weights.append(final_weights(run))
    assert traces[0][0, 0].item() == pytest.approx(math.log(2), abs=1e-6) and traces[0][-1, 0] < 0.6
    for i in (1, 2, 3):
        torch.testing.assert_close(traces[i], traces[0], rtol=1e-5, atol=1e-5)
        assert largest_difference(weights[i], weights[0]) < 1e-5
    assert all("step 1: loss 0.693147 (ln 2 = 0.693147)" in text for text in out)

    _, pairs, _ = stage_parts("dpo", configs[True], ranks)
    computed = len(pairs.pack(np.arange(20)).input_ids) / (
        pairs.chosen.lengths.sum() + pairs.rejected.lengths.sum()
    )
    assert computed < 0.7 and ["sharing" in text for text in out] == [False, True, True, False]
    assert f"; prefix sharing computes {computed:.1%} of the tokens" in out[1]
