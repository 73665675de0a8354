"""The packed stream by hand, and the plan that shares a step's examples out: everything once, balanced, the
same on any number of ranks.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config

from data import Documents, Pairs
from model import LlamaConfig
from packing import epoch_order, local_batches, pack, padding_waste, plan_step, step_examples, steps_per_epoch

repeatable = settings(max_examples=150, deadline=None, derandomize=True, database=None)

# ---------------------------------------------------------------- the stream


def test_pack_by_hand():
    """Documents 5 6 7 (6 and 7 supervised) and 8 9 (8 and 9 supervised: 8 is first, so nothing predicts it; 7
    does not predict 8).
    """
    batch = pack([([5, 6, 7], [False, True, True]), ([8, 9], [True, True])])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and batch.max_seqlen == 3
    assert (
        batch.supervised.tolist() == [0, 1, 3]
        and batch.targets.tolist() == [6, 7, 9]
        and batch.supervised_offsets.tolist() == [0, 2, 3]
    )
    assert batch.shared is None
    moved = batch.to("cpu")
    for name in ("input_ids", "position_ids", "cu_seqlens", "targets", "supervised", "supervised_offsets"):
        assert getattr(batch, name).dtype == (torch.int32 if name == "cu_seqlens" else torch.int64)
        assert torch.equal(getattr(batch, name), getattr(moved, name))
    assert moved.max_seqlen == 3


@pytest.mark.slow
@repeatable
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
def test_packed_documents_can_be_taken_apart_again(tokens):
    batch = pack([([i for i, _ in document], [keep for _, keep in document]) for document in tokens])
    starts = batch.cu_seqlens.tolist()
    for d, document in enumerate(tokens):
        span = slice(starts[d], starts[d + 1])
        assert batch.input_ids[span].tolist() == [i for i, _ in document]
        own = slice(*batch.supervised_offsets[d : d + 2].tolist())
        assert batch.supervised[own].tolist() == [
            starts[d] + t - 1 for t, (_, keep) in enumerate(document) if keep and t > 0
        ]
        assert batch.targets[own].tolist() == [i for i, keep in document[1:] if keep]
    assert len(batch.supervised) == len(batch.targets) == batch.supervised_offsets[-1]


# ---------------------------------------------------------------- step plan


def test_every_epoch_sees_every_example_once_and_carries_nothing_over():
    """10 examples by 4: steps of 4, 4 and 2; the next epoch begins anew, in another order."""
    steps = [step_examples(step, 10, 4, seed=1).tolist() for step in range(6)]
    assert steps_per_epoch(10, 4) == 3 and [len(step) for step in steps] == [4, 4, 2] * 2
    first, second = sum(steps[:3], []), sum(steps[3:], [])
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert first == epoch_order(10, 1, 0).tolist() != epoch_order(10, 2, 0).tolist()
    assert step_examples(4, 10, 4, seed=1).tolist() == steps[4], (
        "a function of the step, whatever was asked before"
    )
    assert step_examples(0, 10, 4, seed=42).tolist() == [5, 0, 6, 4], "numpy's frozen stream"


@pytest.mark.slow
@repeatable
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    world_size=st.sampled_from([1, 2, 4, 8]),
    room=st.integers(100, 300),
)
def test_a_plan_places_every_example_once_where_it_fits(lengths, world_size, room):
    plan = plan_step(lengths, [length**2 for length in lengths], world_size, room)
    bins = [members for rank in plan for members in rank]
    assert len(plan) == world_size and len({len(rank) for rank in plan}) == 1
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= room for members in bins)
    assert len(lengths) < len(bins) or all(bins), (
        "a rank goes empty only when there are fewer examples than bins"
    )
    assert 0 <= padding_waste(plan, lengths) < 1


def test_plan_by_hand():
    """Costs 9 7 6 5 4 into 2 bins by falling cost: 9, 7, 7+6=13, 9+5=14, 13+4=17; with room for 3 tokens in a
    bin, two bins per rank.
    """
    assert plan_step([1] * 5, [4, 9, 5, 7, 6], 2, 5) == [[[0, 3, 4]], [[1, 2]]]
    plan = plan_step(
        [2, 1, 2, 1, 2], [4, 9, 5, 7, 6], 2, 3
    )  # bins 1 | 3, 0 | 4 | 2: by falling cost 3+0, 1, 4, 2
    assert plan == [[[0, 3], [4]], [[1], [2]]]
    assert padding_waste(plan, [2, 1, 2, 1, 2]) == pytest.approx(1 - 8 / (2 * 3 + 2 * 2))


def test_an_example_longer_than_a_microbatch_is_refused():
    with pytest.raises(ValueError, match="tokens_per_microbatch=10: an example has 11 tokens"):
        plan_step([3, 11], [1, 1], 2, 10)


def test_the_plan_wastes_little_on_tulu_like_lengths():
    """Lognormal lengths of mean 570 up to 4,096, 128 a step on 8 ranks: under 2 % of slots wait, in the
    fewest rounds that could do.
    """
    lengths = (
        np.clip(np.random.RandomState(0).lognormal(np.log(600) - 0.4, 0.9, 128 * 20), 16, 4096)
        .astype(int)
        .reshape(20, 128)
    )
    llama = LlamaConfig.preset("llama-3.1-8b")
    for room in (8192, 16384):
        plans = [plan_step(step, llama.flops(step), 8, room) for step in lengths]
        assert np.mean([padding_waste(plan, step) for plan, step in zip(plans, lengths)]) < 0.02
        assert [len(plan[0]) for plan in plans] == [-(-step.sum() // (8 * room)) for step in lengths]


@pytest.mark.parametrize("ids", [np.arange(12), np.array([3, 1])])
def test_any_number_of_ranks_trains_the_same_examples(ids):
    lengths = np.array([5, 20, 60, 3, 9, 31, 2, 14, 48, 7, 11, 26])
    total = lengths.sum()
    documents = Documents(
        np.arange(total), np.ones(total, dtype=bool), np.cumsum([0, *lengths]), np.arange(12).astype(str)
    )
    dataset = Pairs(documents, documents)
    for world_size in (1, 2, 4, 8):
        seen, rounds = [], set()
        for rank in range(world_size):
            ranks = SimpleNamespace(rank=rank, size=world_size, device="cpu")
            batches = list(local_batches(dataset, ids, tiny_config(), 128, ranks))
            rounds.add(len(batches))
            for members, batch, _ in batches:
                seen += members.tolist()
                assert len(batch.cu_seqlens) - 1 == (2 * len(members) or 1)
        assert sorted(seen) == sorted(ids.tolist()) and len(rounds) == 1
