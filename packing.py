"""The packed stream, and which examples are in it.

Documents lie end to end; the examples of a step are shared out to ranks.

Letters: T tokens of a stream, N documents in it, S supervised tokens, B examples of one optimizer step, n
documents or pairs of a dataset, P pairs whose documents share a prefix.
"""

import dataclasses
import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kernels import SharedPrefix
from plumbing.files import UserError

# ---------------------------------------------------------------- the stream
# One stream without padding: a batch costs what its tokens cost, and a document's numbers do not depend on
# its neighbours. Targets are shifted within each document, before packing, so that none predicts another.


@dataclass(frozen=True)
class PackedBatch:
    """N documents end to end in one stream of T tokens.

    Two that begin alike may share the rows of that prefix.
    """

    input_ids: torch.Tensor  # (T,) int64
    # (T,) int64, from 0 in each document, or from the length of the prefix that it leaves out
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor  # (N + 1,) int32, document d is [cu_seqlens[d], cu_seqlens[d + 1])
    max_seqlen: int  # tokens of the longest document, prefix included
    targets: torch.Tensor  # (S,) int64, the supervised tokens, document by document
    # (S,) int64, the positions that predict them; one in a shared prefix is there once for each document
    supervised: torch.Tensor
    # (N + 1,) int64, document d owns entries [offsets[d], offsets[d + 1]) of both
    supervised_offsets: torch.Tensor
    shared: SharedPrefix | None  # None where every document is whole

    def to(self, device) -> "PackedBatch":
        """The batch on `device`; to a GPU from pinned memory and without waiting."""
        is_cuda = torch.device(device).type == "cuda"

        def move(value):
            if isinstance(value, SharedPrefix):
                return SharedPrefix(*map(move, value))
            if not torch.is_tensor(value):
                return value
            # from memory that is not pinned, even a non_blocking copy makes the host wait
            value = value.pin_memory() if is_cuda else value
            return value.to(device, non_blocking=is_cuda)

        return PackedBatch(*[move(getattr(self, field.name)) for field in dataclasses.fields(self)])


def pack(documents: list[tuple[np.ndarray, np.ndarray]], prefixes=()) -> PackedBatch:
    """One stream of (input_ids, loss_mask) documents. A document's first token is never a target.

    prefixes (P,), for 2P documents: document P + i begins with the first prefixes[i] tokens of document i,
    and leaves them out.
    """
    P = len(prefixes)
    assert documents and P in (0, len(documents) / 2), "pack needs a document, or two for each prefix"
    ids, positions, targets, supervised = [], [], [], []
    rows = []  # of the stream, with all of a document's tokens: those of its prefix are another document's
    starts, offsets, lengths = [0], [0], []
    for d, (input_ids, mask) in enumerate(documents):
        input_ids = np.asarray(input_ids)
        has_target = np.asarray(mask)[1:].astype(bool)  # of tokens 1, 2, ..
        left_out = int(prefixes[d - P]) if P and d >= P else 0
        assert left_out < len(input_ids), "a document needs a token of its own"
        # A prefix is in the stream once, as the first rows of the other document: attention reads it there,
        # and a supervised token of it is predicted from there.
        own = starts[-1] + np.arange(len(input_ids) - left_out)
        rows.append(np.concatenate([rows[d - P][:left_out], own]) if left_out else own)
        ids.append(input_ids[left_out:])
        positions.append(np.arange(left_out, len(input_ids)))
        targets.append(input_ids[1:][has_target])
        supervised.append(rows[d][:-1][has_target])
        starts.append(starts[-1] + len(own))
        offsets.append(offsets[-1] + len(targets[d]))
        lengths.append(len(input_ids))
    shared = None
    if P:
        shared = SharedPrefix(_joined(rows), torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32))
    return PackedBatch(
        input_ids=_joined(ids),
        position_ids=_joined(positions),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_seqlen=max(lengths),
        targets=_joined(targets),
        supervised=_joined(supervised),
        supervised_offsets=torch.tensor(offsets),
        shared=shared,
    )


def _joined(pieces):
    """Numbers of all documents, end to end, int64."""
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements a and b have in common before they first differ or one of them ends."""
    shorter = min(len(a), len(b))
    differing = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differing[0]) if len(differing) else shorter


# ---------------------------------------------------------------- which examples a step has
# No state goes from one step to the next: a resumed run reads the same examples on any number of ranks.


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64 permutation of an epoch; RandomState, whose streams numpy keeps frozen across versions."""
    order = np.random.RandomState([seed, epoch]).permutation(n).astype(np.int64)
    order.flags.writeable = False  # shared through the cache
    return order


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Optimizer steps in which every example is seen once; the last may be partial."""
    return math.ceil(n / global_batch_size)


def step_examples(step: int, n: int, global_batch_size: int, seed: int) -> np.ndarray:
    """(B,) int64 ids of optimizer step `step`, counted from 0: a function of these four numbers alone."""
    epoch, step = divmod(step, steps_per_epoch(n, global_batch_size))
    return epoch_order(n, seed, epoch)[step * global_batch_size : (step + 1) * global_batch_size]


def in_order(n: int, size: int) -> list[np.ndarray]:
    """0..n-1 in consecutive pieces of `size`: the steps of a pass without training."""
    return [np.arange(start, min(start + size, n)) for start in range(0, n, size)]


# ---------------------------------------------------------------- the step plan
# Every rank computes the same plan from the same lengths, so nothing is sent. Sharded parameters are gathered
# in every micro-batch, so ranks wait for each other there: its costliest bin is what it takes.


def plan_step(lengths, costs, world_size: int, tokens_per_microbatch: int) -> list[list[list[int]]]:
    """Assign a step's examples to ranks and micro-batches, balanced by cost.

    Returns plan[rank][micro-batch] = indices into the B examples, in as few micro-batches as this rule
    allows. Longest processing time first (Graham 1969): by falling cost, each example goes to the cheapest
    bin with room; bins of similar cost form one micro-batch. First-fit decreasing would save one micro-batch
    in 3 % of long-tailed steps. UserError for an example that never fits.
    """
    lengths, costs = np.asarray(lengths), np.asarray(costs, dtype=np.float64)
    if lengths.max() > tokens_per_microbatch:
        raise UserError(
            f"tokens_per_microbatch={tokens_per_microbatch}: an example has {lengths.max()} tokens; "
            "expected at least that many"
        )
    order = np.argsort(-costs, kind="stable").tolist()
    lengths, costs = lengths.tolist(), costs.tolist()
    # the fewest that could hold all tokens; where a bin would overflow, one micro-batch more for every rank
    rounds = math.ceil(sum(lengths) / (world_size * tokens_per_microbatch))
    while (bins := _fill(order, lengths, costs, rounds * world_size, tokens_per_microbatch)) is None:
        rounds += 1
    bins.sort(key=lambda filled: -filled[0])  # stable: equal costs stay in order
    examples = [sorted(micro_batch_ids) for _, micro_batch_ids in bins]
    return [examples[rank::world_size] for rank in range(world_size)]


def _fill(order, lengths, costs, num_bins: int, room: int) -> list[tuple[float, list[int]]] | None:
    """(cost, examples) of each bin, or None when an example found no bin with room."""
    heap = [(0.0, i, 0, []) for i in range(num_bins)]  # cost, bin (breaks ties), tokens, examples
    for example in order:
        # the cheapest bin may be full and a dearer one not: set full ones aside
        full = []
        while heap and heap[0][2] + lengths[example] > room:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, i, tokens, examples = heap[0]
        heapq.heapreplace(heap, (cost + costs[example], i, tokens + lengths[example], [*examples, example]))
        for entry in full:
            heapq.heappush(heap, entry)
    heap.sort(key=lambda entry: entry[1])
    return [(cost, examples) for cost, _, _, examples in heap]


def padding_waste(plan: list[list[list[int]]], lengths) -> float:
    """Share of token slots in which a rank waits for the longest stream of its micro-batch.

    1 - tokens / slots.
    """
    tokens = np.zeros((len(plan), len(plan[0])), dtype=np.int64)  # (world_size, micro-batches)
    for rank, micro_batches in enumerate(plan):
        for turn, micro_batch_ids in enumerate(micro_batches):
            tokens[rank, turn] = sum(int(lengths[i]) for i in micro_batch_ids)
    return float(1 - tokens.sum() / (len(plan) * tokens.max(axis=0).sum()))


# one unsupervised token, for a rank without an example in a micro-batch: it must take part in every gather
PLACEHOLDER = (np.zeros(1, np.int32), np.zeros(1, bool))


def local_batches(dataset, ids, model_config, tokens_per_microbatch: int, world):
    """Yield this rank's share of a step, micro-batch by micro-batch.

    Each is (ids of the micro-batch, PackedBatch on the device, the step's padding_waste). dataset: Documents
    or Pairs; ids (B,), the same on every rank. Every rank gets equally many micro-batches, if need be without
    ids.
    """
    # FLOPs are balanced and tokens bounded: time grows with the square of a length, memory with the length
    lengths = dataset.lengths[ids]
    plan = plan_step(lengths, dataset.flops(model_config, ids), world.size, tokens_per_microbatch)
    waste = padding_waste(plan, lengths)
    for micro_batch_ids in plan[world.rank]:
        batch = dataset.pack(ids[micro_batch_ids]) if micro_batch_ids else pack([PLACEHOLDER])
        yield ids[micro_batch_ids], batch.to(world.device), waste
