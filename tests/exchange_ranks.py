"""Checks of plumbing/exchange.py on any number of ranks, for test_parallel.py: whole models with a shared
optimizer beside one process.

Every rank runs every check and asserts.
"""

import copy
import hashlib
import itertools

import torch
from parallel_ranks import DOCUMENTS, VARIANTS, plain_model
from tiny_models import nll_sum, random_documents, stream, whole

import optim
from model import apply_fused, apply_recompute
from plumbing import checkpoint, parallel

# AdamW's own, 1e-8, is of the size of the smallest clipped gradient here, which is all rounding: by the step of
# that one weight two orders of one process's sums parted by 1.5e-6 of the weights' norm; with this, by 4e-8.
EPS = 1e-5


def trainee(plain, dtype=torch.float32, moments=torch.float32, grads=torch.float32, fused=False, shared=True):
    """(a copy of the plain model, its optimizer), as load_trainee makes them; not shared: as on one process,
    whatever the world size.
    """
    model = copy.deepcopy(plain)
    lora = any("lora_" in name for name, _ in model.named_parameters())
    for name, param in model.named_parameters():
        param.data = param.data if "lora_" in name else param.data.to(dtype)
    if fused:
        apply_fused(model)
    if shared:
        parallel.share_optimizer(model)
    if dtype == torch.bfloat16 and not lora:
        optim.keep_masters(model, grads)
    optimizer = optim.adamw(model, 0.1, moments)
    for group in optimizer.param_groups:
        group["eps"] = EPS
    return model, optimizer


def take_steps(model, optimizer, documents, steps=3, turns=2):
    """[(loss, gradient norm)] of steps of `turns` micro-batches; documents: this rank's, or all."""
    trace = []
    for step in range(steps):
        total = 0.0
        for turn in parallel.micro_batches(model, range(turns)):
            loss = (
                nll_sum(model, documents[turn::turns]) / len(DOCUMENTS)
                if documents[turn::turns]
                else nothing(model)
            )
            (loss * parallel.loss_scale(model)).backward()
            total += loss.item()
        (total,) = parallel.sum_across_ranks([total]) if parallel.sharding_of(model) != "none" else [total]
        trace.append((total, clipped_step(model, optimizer, step)))
    return trace


def clipped_step(model, optimizer, step):
    """optim.apply_gradients; of a model that is not shared, without the other ranks."""
    if parallel.sharding_of(model) != "none":
        return optim.apply_gradients(optimizer, 0.01 / (step + 1), 1.0)
    norm = (
        torch.stack([p.grad.double().norm() for g in optimizer.param_groups for p in g["params"]])
        .norm()
        .item()
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.01 / (step + 1)
    scale = min(1.0, 1.0 / norm)
    if isinstance(optimizer, optim.SplitAdamW):
        optimizer.step(grad_scale=scale)
    else:
        for group in optimizer.param_groups:
            torch._foreach_mul_([p.grad for p in group["params"]], scale)
        optimizer.step()
    optimizer.zero_grad()
    return norm


def nothing(model):
    """The loss of a rank without an example: a graph through all of the model, and zero."""
    return nll_sum(model, [DOCUMENTS[0][:1]])


def masters(model):
    """{name: (whole) float32 value} of everything."""
    tensors = {}
    for name, shard in parallel.shards(model).items():
        first = shard.detach().float()
        if optim.kernels.is_split(shard):
            first = optim.kernels.join_master(shard.detach(), shard.master.low_bits)
        tensors[name] = parallel.of_all_ranks(model, name, first)
    return whole(tensors)


def optimizer_tensors(model, optimizer):
    """{key in a checkpoint: whole tensor}."""
    return whole(checkpoint._trained_tensors(model, optimizer))


def assert_same_everywhere(model, trace):
    """Every rank has the same losses, norms and whole weights, and of its rows those that its optimizer has."""
    parallel.settle(model)
    params, shards = dict(model.named_parameters()), parallel.shards(model)
    digest = hashlib.sha256(repr(trace).encode())
    for param in params.values():
        digest.update(param.detach().view(torch.uint8).numpy())
    assert len(set(parallel.gather_texts(digest.hexdigest()))) == 1
    owned = whole({name: parallel.of_all_ranks(model, name, shards[name]) for name in params})
    for name, param in params.items():
        assert torch.equal(owned[name], param.detach()), name


# {variant: with the fused block}. Tied, with adapters and neither: each with it and without.
STEPPED = {"full": False, "tied": True, "biases": True, "lora": True, "lora-tied": False}


def check_steps_are_those_of_one_process(ranks):
    """CHECKS 1: losses, gradient norms and weights of three clipped steps. Rows divide by no number of ranks;
    adapters have 2 rows.
    """
    mine = DOCUMENTS[ranks.rank :: ranks.size]
    for variant, fused in STEPPED.items():
        plain = plain_model(**VARIANTS[variant])
        model, optimizer = trainee(plain, fused=fused)
        trace = take_steps(model, optimizer, mine)
        assert_same_everywhere(model, trace)
        # All ranks have the same numbers: one of them compares.
        if not ranks.main:
            continue
        alone, its_optimizer = trainee(plain, fused=fused, shared=False)
        expected = take_steps(alone, its_optimizer, DOCUMENTS)
        assert_close(trace, expected, 1e-6, 1e-5)
        weights = torch.cat([param.detach().flatten() for param in model.parameters()])
        expected_weights = torch.cat([param.detach().flatten() for param in alone.parameters()])
        worst = ((weights - expected_weights).norm() / expected_weights.norm()).item()
        assert worst < 1e-6, (variant, fused, worst)


def assert_close(trace, expected, of_losses, of_norms):
    """Losses and norms of two runs, by their relative differences."""
    for (loss, norm), (its_loss, its_norm) in zip(trace, expected, strict=True):
        assert abs(loss / its_loss - 1) < of_losses and abs(norm / its_norm - 1) < of_norms, (trace, expected)


def check_recompute(ranks):
    """A block that runs forward again in its backward leaves it once."""
    mine, plain = DOCUMENTS[ranks.rank :: ranks.size], plain_model()
    expected = take_steps(*trainee(plain), mine, steps=2)
    for mode, fused in itertools.product(("half", "full"), (False, True)):
        model, optimizer = trainee(plain, fused=fused)
        apply_recompute(model, mode)
        assert_close(take_steps(model, optimizer, mine, steps=2), expected, 1e-6, 1e-5)


def check_bf16_steps(ranks):
    """Split masters, gradients and moments in either precision. Sums over ranks round as sums over
    micro-batches do, so losses agree to bf16's rounding; and in both the weights of all ranks are the same
    bits."""
    mine = DOCUMENTS[ranks.rank :: ranks.size]
    for moments, grads in itertools.permutations((torch.float32, torch.bfloat16)):
        plain = plain_model()
        model, optimizer = trainee(plain, torch.bfloat16, moments, grads, fused=True)
        trace = take_steps(model, optimizer, mine)
        assert_same_everywhere(model, trace)
        if ranks.main:
            alone, its_optimizer = trainee(plain, torch.bfloat16, moments, grads, fused=True, shared=False)
            assert_close(trace, take_steps(alone, its_optimizer, DOCUMENTS), 3e-3, 3e-2)


def check_bits_where_sums_are_exact(ranks):
    """Gradients that are multiples of 2^-6 below 4 add up exactly, in float32 and in bf16: masters and
    moments, stochastically rounded ones too, are those of one process to the bit."""
    for moments, grads in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        plain = plain_model()
        model, optimizer = trainee(plain, torch.bfloat16, moments, grads)
        alone, its_optimizer = trainee(plain, torch.bfloat16, moments, grads, shared=False)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for name, param in model.named_parameters():
                parts = torch.randint(-8, 9, (ranks.size, *param.shape), generator=generator) / 64
                param.grad = parts[ranks.rank].to(grads)
                dict(alone.named_parameters())[name].grad = parts.sum(0).to(grads)
            model.exchange.finish_gradients() if ranks.size > 1 else None
            for each in (optimizer, its_optimizer):
                for group in each.param_groups:
                    group["lr"] = 0.01
                each.step()
        found, expected = masters(model), masters(alone)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        states, its_states = optimizer_tensors(model, optimizer), optimizer_tensors(alone, its_optimizer)
        assert states.keys() == its_states.keys() and all(
            torch.equal(states[key], its_states[key]) for key in states
        )


def check_a_rank_without_examples(ranks):
    """Its gradients are zeros, also where it has none at all (lm_head: no supervised position)."""
    plain = plain_model()
    model, optimizer = trainee(plain, torch.bfloat16, fused=True)
    trace = take_steps(model, optimizer, DOCUMENTS if ranks.main else [], steps=2)
    assert_same_everywhere(model, trace)
    if ranks.main:
        alone, its_optimizer = trainee(plain, torch.bfloat16, fused=True, shared=False)
        assert_close(trace, take_steps(alone, its_optimizer, DOCUMENTS, steps=2), 1e-6, 1e-5)


def check_what_leaves_when(ranks):
    """Nothing is sent before the last backward pass; there units leave from the last to the first, while the
    pass still runs.
    """
    if ranks.size == 1:
        return
    model, _ = trainee(plain_model(), torch.bfloat16, fused=True)
    left, sum_unit = [], model.exchange._sum

    def noted(unit):
        left.append(model.exchange.units.index(unit))
        sum_unit(unit)

    model.exchange._sum = noted
    for turn in parallel.micro_batches(model, range(2)):
        nll_sum(model, DOCUMENTS).backward()
        assert left == ([] if turn == 0 else [4, 3, 2, 1]), left  # final norm and lm_head, three blocks
    assert left == [4, 3, 2, 1, 0]  # and the embedding
    assert all(param.grad is None for param in model.parameters())
    assert all(shard.grad.shape == shard.shape for shard in parallel.shards(model).values())


def check_gathers_go_alone(ranks):
    """Coalesced ones would corrupt the heap once in some minutes, which no comparison of values finds."""
    if ranks.size == 1:
        return
    model, _ = trainee(plain_model())
    model.exchange.send_weights()
    assert [len(unit.arriving[0]) for unit in model.exchange.units] == [1, 9, 9, 9, 2]
    parallel.settle(model)


def check_evaluation_between_steps(ranks):
    """A forward pass right after a step reads the new weights, of all ranks."""
    mine, plain = DOCUMENTS[ranks.rank :: ranks.size], plain_model()
    model, optimizer = trainee(plain)
    take_steps(model, optimizer, mine, steps=1)
    with torch.no_grad():
        hidden = model(*stream(random_documents(97)))
        parallel.settle(model)
        assert torch.equal(hidden, model(*stream(random_documents(97))))
    before = optim.sample_weights(model)
    assert optim.weights_changed(before, model) == 0.0
    take_steps(model, optimizer, mine, steps=1)
    assert optim.weights_changed(before, model) > 0.9


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]
