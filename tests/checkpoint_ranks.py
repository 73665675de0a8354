"""One life of a run, for test_checkpoint.py, on any number of ranks: resume, compare with whole tensors,
train a step, save, export.

A life resumes one folder under ROOT and writes the next one; ROOT/base is the pretrained model.
"""

import torch
from safetensors.torch import load_file, save_file
from tiny_models import nll_sum, random_documents, stream, whole

from kernels import is_split, join_master
from model import Llama, LlamaConfig, apply_lora, init_lora
from optim import adamw, apply_gradients, keep_masters
from plumbing import parallel
from plumbing.adapters import save_adapter
from plumbing.checkpoint import Checkpointer
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load_weights, save_pretrained, sharded_parameters

IDENTITY = {"lr": 0.01, "lora_targets": ("q_proj", "v_proj")}
DOCUMENTS = random_documents(97)


def build(kind, base, sharding="full", device="cpu"):
    """("full" | "lora" | "bf16") -> a sharded model with base's weights and its optimizer.

    bf16: split masters, or FSDP2 that computes in bf16.
    """
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_hf(base))
        if kind == "lora":
            apply_lora(model, rank=4, alpha=6.0)
    if sharding == "full":
        parallel.shard(model, "bf16" if kind == "bf16" else "fp32")
    elif kind == "bf16":
        model.bfloat16()
    parallel.materialize(model, device)
    if sharding == "optimizer":
        parallel.share_optimizer(model)
        if kind == "bf16":
            keep_masters(model, torch.float32)
    if kind == "lora":
        init_lora(model, 0, parallel.assign)
    load_weights(model, base)
    return model, adamw(model, weight_decay=0.1)


def train_step(model, optimizer):
    for documents in parallel.micro_batches(model, [DOCUMENTS]):
        nll_sum(model, documents).backward()
    apply_gradients(optimizer, lr=0.01, max_grad_norm=1.0)


@torch.no_grad()
def evaluate(model):
    """A forward without a backward, which leaves the root's parameters gathered: no save may take the copies
    for the parameters.
    """
    model(*stream(DOCUMENTS))


def whole_tensors(model, optimizer=None):
    """Every parameter and all of its Adam state, gathered, on every rank."""
    parallel.settle(model)
    tensors = {}
    for name, shard in parallel.shards(model).items():
        states = optimizer.state.get(shard, {}) if optimizer else {}
        master = join_master(shard.detach(), shard.master.low_bits) if is_split(shard) else shard
        for key, tensor in {"param": master, **states}.items():
            tensors[f"{key}/{name}"] = parallel.of_all_ranks(model, name, tensor) if tensor.ndim else tensor
    return whole(tensors)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    different = [key for key in expected if not torch.equal(actual[key], expected[key])]
    assert not different, different


def scramble(model, optimizer):
    """What the next optimizer steps would do to everything that is trained, worse."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            for tensor in (param, *optimizer.state.get(param, {}).values()):
                parallel.local_rows(tensor)[1].fill_(7.0)
            if is_split(param):
                param.master.low_bits.fill_(7)


def fill_the_disk(checkpointer, step, rank):
    """Make rank's next write fail as on a full disk, by the kernel's own device for it."""
    folder = checkpointer.folder / f".tmp_step_{step:06d}"
    folder.mkdir(exist_ok=True)
    (folder / f"rank_{rank:05d}.safetensors").symlink_to("/dev/full")


def expect_failure_everywhere(checkpointer, model, optimizer, ranks):
    """Rank 1's disk is full: it says so, rank 0 does not wait for it, and the checkpoint before is the latest
    one.
    """
    before = checkpointer.latest()
    if ranks.rank == 1:
        fill_the_disk(checkpointer, 99, rank=1)
    checkpointer.save(99, model, optimizer)
    try:
        checkpointer.wait()
    except (OSError, RuntimeError) as error:
        assert ("No space left" if ranks.rank == 1 else "failed on 1 other rank") in str(error), error
    else:
        raise AssertionError("the failure was not reported")
    assert checkpointer.latest() == before


def life(root, source, target, ranks, sharding="full", kinds=("full", "lora")):
    """Everything in ROOT/TARGET: <kind>/checkpoints, <kind>.safetensors (whole tensors at the save),
    <kind>/final, lora/adapter.
    """
    base = load_file(root / "base/model.safetensors")
    for kind in kinds:
        model, optimizer = build(kind, root / "base", sharding)
        loaded = {name: tensor for name, tensor in whole_tensors(model).items() if "lora_" not in name}
        assert_equal(loaded, {f"param/{name}": tensor for name, tensor in base.items()})
        if ranks.size == 3 and (kind, sharding) != (
            "lora",
            "optimizer",
        ):  # 4 rows over 3 ranks: 2, 2 and 0; frozen ones are whole there
            small = sharded_parameters(model)["model.layers.0.self_attn.k_proj.weight"]
            assert len(parallel.local_rows(small)[1]) == (2, 2, 0)[ranks.rank]
        step = 0
        if source:
            old = Checkpointer(root / source / kind, 2, IDENTITY)
            step = old.load(old.latest(), model, optimizer)
            assert_equal(whole_tensors(model, optimizer), load_file(root / source / f"{kind}.safetensors"))
        train_step(model, optimizer)
        expected = whole_tensors(model, optimizer)
        checkpointer = Checkpointer(root / target / kind, 2, IDENTITY)
        evaluate(model)
        checkpointer.save(step + 1, model, optimizer)
        scramble(model, optimizer)
        checkpointer.wait()
        checkpointer.load(checkpointer.latest(), model, optimizer)
        assert_equal(whole_tensors(model, optimizer), expected)
        if ranks.size == 2:
            expect_failure_everywhere(checkpointer, model, optimizer, ranks)
        evaluate(model)
        save_pretrained(model, Tokenizer.from_dir(root / "base"), root / target / kind / "final")
        if kind == "lora":
            save_adapter(model, root / target / "lora/adapter", root / "base")
        if ranks.main:
            save_file(expected, root / target / f"{kind}.safetensors")
    parallel.barrier()


def live(root, source, target, *how):
    """`life` as the work of world.spawn, on every rank of a group."""
    life(root, source, target, parallel.init(), *how)
    parallel.shutdown()
    return 0
