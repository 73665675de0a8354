"""The process group and the sharding; nothing outside plumbing/ says `torch.distributed`.

A single process is a group of one. On several, parameters are FSDP2 DTensors, split into contiguous rows (dim 0), rank r owning
rows [r*ceil(n/W), (r+1)*ceil(n/W)). On one they stay plain tensors: gathering from and reducing to oneself would copy every weight twice
and every gradient three times.
"""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from plumbing.files import UserError

ROOT = Path(__file__).resolve().parent.parent
_background_group = None


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def say(self, text):
        """Print once, from rank 0."""
        if self.main:
            print(text, flush=True)


def init():
    """Join torchrun's process group, or make a group of one: NCCL on GPUs, gloo on CPUs. Returns Ranks."""
    global _background_group
    rank, local_rank, world_size = (int(os.environ.get(key, alone)) for key, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    where = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(hours=2)  # rank 0 may tokenise or hash, or write to a slow disk, while the others wait
    dist.init_process_group(backend, timeout=patience, **where)
    _background_group = dist.new_group(backend="gloo", timeout=patience)
    return World(rank, world_size, device)


def world_size():
    """Number of processes."""
    return dist.get_world_size()


def shutdown():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def background_group():
    """A gloo group of all ranks that only the checkpoint writer threads use, so that they never meet the training collectives."""
    return _background_group


def barrier():
    """Wait for all ranks."""
    sum_across_ranks([0.0])


def main_first(world, work):
    """work() on rank 0, then on the others, which find what rank 0 left on disk. Returns work()'s result on every rank.

    When rank 0 fails, the others raise SystemExit: the one message is rank 0's.
    """
    result, error = None, None
    if world.main:
        try:
            result = work()
        except Exception as caught:  # raised below, once the others know
            error = caught
    (failures,) = sum_across_ranks([error is not None])
    if error:
        raise error
    if failures:
        raise SystemExit(1)
    return result if world.main else work()


def from_main(world, work):
    """The text that work() returns on rank 0, on every rank."""
    text = work().encode() if world.main else b""
    (length,) = sum_across_ranks([len(text)])
    shared = torch.zeros(int(length), dtype=torch.uint8)
    if world.main:
        shared[:] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(shared, src=0)
    return bytes(shared.tolist()).decode()


def run(main, argv):
    """main(argv), then leave the process group. Returns the exit code.

    What a user can mend (UserError), numbers gone wrong and failing disks are one line; everything else keeps its traceback.
    """
    try:
        return main(argv)
    except (UserError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        shutdown()


# ---------------------------------------------------------------- sharding


def shard(model, precision):
    """Apply FSDP2 to every block and to the model itself (embedding, final norm and lm_head form the root's group).

    precision "fp32": everything in float32. "bf16" and "fp8": weights are gathered as bf16, gradients reduced in float32; shards stay as
    they are. The root stays gathered from its forward to its backward, because lm_head.weight is read in between, outside any module's
    forward.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    # inputs are not cast: cos and sin stay float32
    dtypes = {} if precision == "fp32" else {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    policy = MixedPrecisionPolicy(cast_forward_inputs=False, **dtypes)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def materialize(model, device):
    """Allocate, uninitialised, the shards of a model that was built and sharded on the meta device."""
    tied_to = next(name for name, param in model.named_parameters() if param is model.lm_head.weight)  # the embedding's, or its own
    model.to_empty(device=device)
    model.lm_head.weight = model.get_parameter(tied_to)


def gather(model):
    """Gather the root's weights, in the precision of compute, for code that reads lm_head.weight before a forward. `release` drops them."""
    if isinstance(model, FSDPModule):
        model.unshard()


def release(model):
    """Drop the root's gathered weights after a pass without a backward, which would otherwise outlive the next optimizer step."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local_rows(param):
    """(first row, local tensor): this rank's rows of dim 0. A plain tensor is all rows, from 0."""
    if not isinstance(param, DTensor):
        return 0, param.detach()
    rows = -(-param.shape[0] // param.device_mesh.size())
    local = param.to_local().detach()
    first = min(rows * param.device_mesh.get_local_rank(), param.shape[0])
    assert local.shape[0] == max(0, min(rows, param.shape[0] - first)), (local.shape, param.shape)
    return first, local


@torch.no_grad()
def assign(param, values):
    """Copy this rank's rows of a full tensor into `param`."""
    assert values.shape == param.shape, (values.shape, param.shape)
    first, local = local_rows(param)
    local.copy_(values[first : first + local.shape[0]])


# ---------------------------------------------------------------- sums and norms


def sum_across_ranks(values):
    """Element-wise sum over ranks of their lists of numbers, equally long, in float64. Returns a list of floats."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)  # on the CPU group: nothing is queued on the GPU
    return total.tolist()


def max_across_ranks(value):
    """The largest of one number per rank."""
    largest = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def require_same(world, **found):
    """ValueError on every rank, naming the keys, where a rank's text is not rank 0's: each reads data and folders by itself."""
    wanted = json.loads(from_main(world, lambda: json.dumps(found)))
    counts = sum_across_ranks([found[key] != wanted[key] for key in found])
    if differing := [key for key, count in zip(found, counts, strict=True) if count]:
        raise UserError(f"{', '.join(differing)}: not the same on all ranks; expected files that do not change while a run starts")


def require_finite(values, rows):
    """FloatingPointError on every rank when any rank's value is NaN or infinite; rows[i] names the examples behind values[i]."""
    suspects = [str(row) for value, names in zip(values, rows, strict=True) for row in names if not math.isfinite(value)]
    (count,) = sum_across_ranks([len(suspects)])
    if count:
        raise FloatingPointError(f"the loss is not finite; no step was taken. Examples of the micro-batch: {suspects or 'on another rank'}")


def clip_grad_norm(params, max_norm):
    """Scale all gradients so that their global L2 norm is at most max_norm (None: never). Returns the norm before scaling, a float.

    The norm of the *whole* gradient: squares are summed over this rank's rows in float32 per tensor, in float64 across them and over ranks.
    """
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in params if p.grad is not None]
    grads = [g for g in grads if g.numel()]  # a rank may own no row of a short parameter
    norms = torch.stack(torch._foreach_norm(grads, dtype=torch.float32)).double() if grads else torch.zeros(1, dtype=torch.float64)
    (square,) = sum_across_ranks([norms.square().sum().item()])
    norm = square**0.5
    if grads and max_norm is not None and norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)
    return norm


# ---------------------------------------------------------------- stopping


class StopSignal:
    """Remembers SIGTERM or Ctrl-C; `received()` agrees on it across ranks, so that all of them stop after the same step."""

    def __init__(self):
        self._signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self._signal = number

    def received(self):
        """The signal number seen by any rank, 0 for none."""
        return int(max_across_ranks(self._signal))
