"""Checks of plumbing/parallel.py that hold on any number of ranks, for test_parallel.py: a sharded model
against the same plain model.

Every rank runs every check and asserts. On several machines the model is sharded in each ("hybrid").
"""

import copy
import math
import os
import signal
import sys
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from tiny_models import (
    OLMO2,
    gradients,
    nll_sum,
    random_documents,
    random_llama,
    relative_error,
    stream,
    tiny_config,
    whole,
)

from model import Llama, adapters_disabled, apply_fused, apply_lora, apply_recompute, init_lora
from plumbing import parallel

DOCUMENTS = random_documents(
    97, (5, 12, 3, 9, 2, 7, 11, 4)
)  # 8 unequal documents: 4 + 4 on two ranks, 3 + 3 + 2 on three


@torch.no_grad()
def plain_model(lora=False, **config):
    model = random_llama(tiny_config(**config))
    if lora:
        apply_lora(model, rank=2, alpha=6.0)  # lora_A has 2 rows: the third rank owns none
        init_lora(model, seed=4)
        generator = torch.Generator().manual_seed(5)
        for name, param in model.named_parameters():
            if name.endswith("lora_B"):
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model


def sharded(plain, precision="fp32"):
    model = copy.deepcopy(plain)
    is_one_machine = parallel.machine_size() == parallel.world_size()
    parallel.shard(model, precision, "full" if is_one_machine else "hybrid")
    return model


def backward(model, ranks):
    """The summed NLL of all documents, each rank its own, in two micro-batches."""
    mine = DOCUMENTS[ranks.rank :: ranks.size]
    total = 0.0
    for part in parallel.micro_batches(model, (mine[:1], mine[1:])):
        loss = nll_sum(model, part)
        (loss * ranks.size).backward()
        total += loss.item()
    return parallel.sum_across_ranks([total])[0]


VARIANTS = {
    "full": {}, "tied": {"tie_word_embeddings": True}, "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "lora": {"lora": True}, "lora-tied": {"lora": True, "tie_word_embeddings": True},
}  # fmt: skip


def check_gradients_and_clipping(ranks):
    """CHECKS 1 and 18: loss, gradients and their norm over 8 unequal documents are those of one plain
    process; what SGD subtracts after clipping has the clipped norm and the gradient's direction."""
    for variant, config in VARIANTS.items():
        plain = plain_model(**config)
        model = sharded(plain)
        before = whole(dict(model.named_parameters()))
        expected_loss = nll_sum(plain, DOCUMENTS)
        expected_loss.backward()
        assert abs(backward(model, ranks) / expected_loss.item() - 1) < 1e-6, variant
        assert_gradients(model, plain)

        params = [p for p in model.parameters() if p.requires_grad]
        expected = torch.stack([g.double().norm() for g in gradients(plain).values()]).norm().item()
        for max_norm in (None, expected * 2, expected / 8):  # never, not reached, reached
            norm = parallel.clip_grad_norm(params, max_norm)
            assert abs(norm / expected - 1) < 1e-4, (variant, norm, expected)
        torch.optim.SGD(params, lr=1.0).step()
        after = whole(dict(model.named_parameters()))
        update = {name: before[name] - after[name] for name in before}
        norm = torch.stack([u.double().norm() for u in update.values()]).norm().item()
        assert abs(norm / (expected / 8) - 1) < 1e-4, (variant, norm, expected / 8)
        for name, grad in gradients(plain).items():  # the update of a weight of about 1 is rounded at 1e-7
            assert (update[name] - grad / 8).abs().max() < 1e-5 * grad.abs().max() + 1e-6, (variant, name)


def assert_gradients(model, plain):
    grads, expected = whole(gradients(model)), gradients(plain)
    assert grads.keys() == expected.keys()
    worst = max(relative_error(grads[name], expected[name]) for name in expected)
    assert worst < 1e-5, worst


def check_recompute(ranks):
    """Blocks that are gathered again in the backward pass, fused or with their activations recomputed, give
    the same gradients.
    """
    for config, is_fused in ({}, False), ({}, True), (OLMO2, True):
        plain = plain_model(**config)
        nll_sum(plain, DOCUMENTS).backward()
        for mode in ("none", "half", "full"):
            model = sharded(plain)
            if is_fused:
                apply_fused(model)
            apply_recompute(model, mode)
            backward(model, ranks)
            assert_gradients(model, plain)


def check_norm_where_a_rank_owns_nothing(ranks):
    """One row over several ranks: all but the first have no gradient at all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks.size,))
    param = torch.nn.Parameter(distribute_tensor(torch.zeros(1, 2), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.tensor([[3.0, 4.0]]), mesh, [Shard(0)])
    assert parallel.clip_grad_norm([param], 1.0) == 5.0
    torch.testing.assert_close(param.grad.full_tensor(), torch.tensor([[0.6, 0.8]]))
    assert parallel.clip_grad_norm([], 1.0) == 0.0


def check_rows(ranks):
    """The ranks' rows lie end to end and cover every parameter: 97 and 40 rows do not divide evenly, 2 rows
    leave the third rank none. Each machine has all of them, and all machines together own them once.
    """
    plain = plain_model(lora=True)
    model, machine = sharded(plain), parallel.machine_size()
    expected = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        first, local = parallel.local_rows(param)
        per_rank = -(-param.shape[0] // machine)
        assert first == min(ranks.rank % machine * per_rank, param.shape[0])
        assert torch.equal(local, expected[name][first : first + per_rank]), name
        (covered,) = parallel.sum_across_ranks([local.shape[0]])
        assert covered == param.shape[0] * ranks.size / machine
        first, own = parallel.own_rows(param)
        assert torch.equal(own, expected[name][first : first + len(own)]), name
        counts = torch.zeros(param.shape[0])
        counts[first : first + len(own)] = 1
        assert parallel.sum_across_ranks(counts.tolist()) == [1.0] * param.shape[0], name
    first, local = parallel.local_rows(expected["lm_head.weight"])
    assert first == 0 and torch.equal(local, expected["lm_head.weight"])


def machines_sum_once_a_step(ranks):
    """Summing over machines after the last of two micro-batches alone: one all-reduce for each block and one
    for the root, and the gradients of summing after each, which are those of one plain process. Each row
    counts once in the norm. Machines end with the same bits."""
    from torch.distributed.fsdp import FSDPModule

    plain, all_reduce, calls = plain_model(), dist.all_reduce, []
    once, each = sharded(plain), sharded(plain)
    assert parallel.sharding_of(once) == "hybrid"
    between, in_each = once.mesh.get_group("replicate"), each.mesh.get_group("replicate")
    groups = len(plain.model.layers) + 1

    def counted(tensor, **how):
        calls.append(how.get("group"))
        return all_reduce(tensor, **how)

    with mock.patch.object(dist, "all_reduce", counted):
        backward(once, ranks)
        assert calls.count(between) == groups
        with mock.patch.object(FSDPModule, "set_requires_all_reduce"):
            backward(each, ranks)
        assert calls.count(in_each) == 2 * groups
    nll_sum(plain, DOCUMENTS).backward()
    assert_gradients(once, plain)
    assert_gradients(each, plain)

    expected = torch.stack([g.double().norm() for g in gradients(plain).values()]).norm().item()
    for norm in (expected, expected / 8):
        assert abs(parallel.clip_grad_norm(once.parameters(), expected / 8) / norm - 1) < 1e-5
    for name, grad in gradients(once).items():
        _, rows = parallel.local_rows(grad)
        of_first = rows.clone()
        dist.broadcast(of_first, group=between, group_src=0)
        assert torch.equal(rows, of_first), name


def check_materialize_and_assign(ranks):
    """A model built on the meta device, sharded, allocated and filled row by row is the plain one; tied stays
    tied after a step.
    """
    for config in ({}, {"tie_word_embeddings": True}):
        plain = plain_model(**config)
        with torch.device("meta"):
            model = Llama(plain.config)
        parallel.shard(model, "fp32")
        parallel.materialize(model, ranks.device)
        for name, param in model.named_parameters():
            parallel.assign(param, dict(plain.named_parameters())[name].detach())
        for _ in range(2):
            for m in (model, plain):
                optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
                backward(model, ranks) if m is model else nll_sum(plain, DOCUMENTS).backward()
                optimizer.step()
                optimizer.zero_grad()
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == plain.config.tie_word_embeddings
        for name, param in whole(dict(model.named_parameters())).items():
            assert relative_error(param, dict(plain.named_parameters())[name]) < 1e-5, name


def check_lora_with_a_bf16_base(ranks):
    """CHECKS 21: a frozen bf16 base under float32 adapters, computed in bf16: float32 adapter gradients,
    close to the float32 model's.
    """
    plain = plain_model(lora=True)
    model = copy.deepcopy(plain)
    for param in model.parameters():
        if not param.requires_grad:
            param.data = param.data.bfloat16()
    parallel.shard(model, "bf16")
    loss = backward(model, ranks)
    expected = nll_sum(plain, DOCUMENTS)
    expected.backward()
    assert abs(loss / expected.item() - 1) < 0.02, (loss, expected.item())
    grads, expected_grads = whole(gradients(model)), gradients(plain)
    assert grads.keys() == expected_grads.keys() and all("lora_" in name for name in grads)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    flat = [torch.cat([g[name].flatten() for name in sorted(g)]) for g in (grads, expected_grads)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(
        p.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
        for name, p in model.named_parameters()
    )


def check_full_bf16_compute_keeps_float32_shards(ranks):
    """Gradients are summed over ranks in float32: the sum of several bf16 numbers is mostly not a bf16
    number.
    """
    model = sharded(plain_model(), "bf16")
    nll_sum(model, DOCUMENTS[ranks.rank :: ranks.size]).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    grad = model.model.layers[0].mlp.up_proj.weight.grad.full_tensor()
    assert (grad != grad.bfloat16()).float().mean() > 0.3 or ranks.size == 1
    assert model(*stream(DOCUMENTS)).dtype == torch.bfloat16


def check_forwards_are_bit_equal(ranks):
    """CHECKS 8: twice the same in train mode; with adapters off the bits of the base."""
    for precision in ("fp32", "bf16"):
        base, model = sharded(plain_model(), precision), sharded(plain_model(lora=True), precision).train()
        with torch.no_grad():
            first, second = model(*stream(DOCUMENTS)), model(*stream(DOCUMENTS))
            assert torch.equal(first, second)
            with adapters_disabled(model):
                assert torch.equal(model(*stream(DOCUMENTS)), base(*stream(DOCUMENTS)))
            assert not torch.equal(first, base(*stream(DOCUMENTS)))


def check_release(ranks):
    """After a pass without backward, release() makes the next forward gather the weights of the step in
    between.
    """
    plain = plain_model()
    model = sharded(plain)
    shards = list(
        model.parameters()
    )  # what an optimizer holds; while gathered, model.parameters() are the gathered ones
    with torch.no_grad():
        nll_sum(model, DOCUMENTS)
        parallel.release(model)
        for param in (*shards, *plain.parameters()):
            param.mul_(0.5)
        assert abs(nll_sum(model, DOCUMENTS) / nll_sum(plain, DOCUMENTS) - 1) < 1e-6
    parallel.release(model)


def check_sums(ranks):
    world, rank = ranks.size, ranks.rank
    assert parallel.sum_across_ranks([1.0, rank, 1 + 2**-40]) == [
        world,
        world * (world - 1) / 2,
        world * (1 + 2**-40),
    ]
    assert parallel.max_across_ranks(-rank) == 0 and parallel.max_across_ranks(rank) == world - 1
    assert parallel.from_main(ranks, lambda: f"déjà {rank}") == "déjà 0"
    assert parallel.main_first(ranks, lambda: rank) == rank


def check_same(ranks):
    """Texts that one rank has otherwise stop all of them, by name."""
    parallel.require_same(ranks, data="a", data_eval=None)
    try:
        parallel.require_same(ranks, data="a", data_eval=f"déjà {min(ranks.rank, 1)}")
    except ValueError as error:
        assert str(error).startswith("data_eval: not the same on all ranks") and ranks.size > 1
    else:
        assert ranks.size == 1
    more, fewer = ({"b": None, "a": 1}, {"a": 1}) if ranks.main else ({"a": 1}, {"a": 1, "b": None})
    for found in (more, fewer):  # keys of two versions of the program
        try:
            parallel.require_same(ranks, **found)
        except ValueError as error:
            assert str(error).startswith("b: not the same on all ranks") and ranks.size > 1
        else:
            assert ranks.size == 1


def check_finite(ranks):
    """CHECKS 24: NaN or infinity on one rank stops all of them; the rank that has it names the examples."""
    rows = [["a"], list(np.array(["b", "c"]))]  # as Documents.row_ids has them
    parallel.require_finite([1.0, 2.0], rows)
    last = ranks.rank == ranks.size - 1
    for bad in (math.nan, math.inf, -math.inf):
        try:
            parallel.require_finite([1.0, bad if last else 2.0], rows)
        except FloatingPointError as error:
            assert ("['b', 'c']" if last else "on another rank") in str(error) and "'a'" not in str(error)
        else:
            raise AssertionError("not raised")


def check_stop_signal(ranks):
    """A signal that only the last rank gets reaches all of them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = parallel.StopSignal()
        assert stop.received() == 0
        if ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received() == signal.SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]
ON_MACHINES = [check_rows, machines_sum_once_a_step]


def run_checks(checks):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ranks = parallel.init()
    for check in checks:
        check(ranks)
        parallel.barrier()
        ranks.say(f"{check.__name__} holds on {ranks.size} rank(s)")
    parallel.shutdown()
    sys.stdout.flush()
    os._exit(
        0
    )  # all held: on a busy machine the interpreter's own exit has aborted ("terminate called") with torch's threads alive
