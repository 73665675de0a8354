"""The process group and the sharding. Nothing outside plumbing/ imports `torch.distributed`.

A single process is a group of one, and its parameters are plain tensors. On several, rank r owns rows
[r*ceil(n/W), (r+1)*ceil(n/W)) of each trained parameter (dim 0), in one of three ways:

"optimizer"  every rank holds all weights and gradients, and of the optimizer's state its rows (exchange.py).
             One exchange a step.
"full"       every rank holds its rows of everything: FSDP2 DTensors. For what does not fit otherwise: weights
             are gathered, and gradients reduced, in every micro-batch.
"hybrid"     "full" among the W ranks of each machine; gradients are summed over machines once a step. What
             every micro-batch sends stays inside a machine, and each machine has to hold all of the model.
"""

import errno
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing import lock, watchdog
from plumbing.device import pick_device
from plumbing.files import UserError

_background_group = None
background_work = []  # functions that wait for it; `run` calls them before a command that has failed ends


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


def init(deterministic=False):
    """Join torchrun's process group, or make a group of one; returns the World.

    NCCL on GPUs, gloo on CPUs. deterministic: torch's kernels repeat bit for bit, the backward of flash
    attention included. Our kernels always do, and so do sums over the same ranks.
    """
    global _background_group
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        # Else torch fills new memory with NaN, to find bugs: a pass over all of it.
        torch.utils.deterministic.fill_uninitialized_memory = False
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = pick_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    where = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    patience = timedelta(hours=2)  # the others wait while rank 0 tokenises, hashes, or writes to a slow disk
    if _restarts_on_one_machine():
        size = int(os.environ["WORLD_SIZE"])
        where = {"store": _store_of_this_attempt(patience), "rank": rank, "world_size": size}
    dist.init_process_group(backend, timeout=patience, **where)
    _background_group = dist.new_group(backend="gloo", timeout=patience)
    return World(rank, dist.get_world_size(), device)


def _restarts_on_one_machine():
    """Whether torchrun has started these processes again (--max-restarts) with a store of its own.

    All of them are then on one machine.
    """
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return count > 0 and keeps_store and os.environ.get("GROUP_WORLD_SIZE") == "1"


def _store_of_this_attempt(patience):
    """torchrun's store, with keys of their own for each attempt.

    The store outlives the processes: a rank that starts first would find the addresses of the last attempt,
    and fail after 10 s, which costs a restart. The agents of several machines count restarts apart, so there
    torchrun has to start a new store each time (docs/many_machines.md).
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=patience)
    return dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def world_size():
    """Number of processes."""
    return dist.get_world_size()


def machine_size():
    """Number of ranks of each machine, as torchrun counts them; 0 where machines differ.

    Collective. Without torchrun all ranks are taken to be on one machine.
    """
    mine = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    largest, smallest = max_across_ranks(mine), -max_across_ranks(-mine)
    return mine if smallest == largest else 0


def first_of_machine():
    """Whether this is the first rank of its machine, as torchrun counts them."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def say(text):
    """Print once, from rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def shutdown():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def background_group():
    """A gloo group of all ranks for the checkpoint writer threads.

    Their collectives run beside those of training and never mix.
    """
    return _background_group


def barrier():
    """Wait for all ranks."""
    sum_across_ranks([0.0])


def main_first(world, work):
    """Call work() on rank 0, then on the others; returns its result on every rank.

    The others find on disk what rank 0 left there. When rank 0 fails, the others raise SystemExit without a
    message: the one message is rank 0's.
    """
    result = error = None
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
    """The text that work() returns on rank 0, on every rank. Only rank 0 calls it."""
    data = torch.tensor(list(work().encode() if world.main else b""), dtype=torch.uint8)
    length = torch.tensor(len(data))
    dist.broadcast(length, 0)
    if not world.main:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()


def gather_texts(text, group=None):
    """The texts of all ranks, by rank, on every rank."""
    data = text.encode()
    length = torch.tensor(len(data))
    dist.all_reduce(length, op=dist.ReduceOp.MAX, group=group)
    mine = torch.zeros(int(length) + 1, dtype=torch.uint8)  # padded with zeros, which no text contains
    mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    texts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(texts, mine, group=group)
    return [bytes(text.tolist()).rstrip(b"\0").decode() for text in texts]


# ---------------------------------------------------------------- how a command ends

# OSErrors whose cause is outside the program: no permission, read-only, full, over quota, a file where a
# folder is expected or the reverse
DISK_REFUSES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
DISK_REFUSES |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


class OtherRankFailed(RuntimeError):
    """This rank stops because another has failed, which says why."""


def run(main, argv):
    """main(argv), then leave the process group. Returns the exit code.

    UserErrors, numbers that are not finite, refusals of the disk and Ctrl-C are one line; every other
    exception keeps its traceback. A command whose reader has gone (`--help | head -1`) ends without a word,
    but for a training, which says that it is not finished.
    """
    try:
        code = main(argv)
        sys.stdout.flush()  # else a reader that has gone is met by the interpreter's end, which prints it
        return code
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            kept = "what was finished is kept, and the same command goes on from there"
            print(f"\nstopped by Ctrl-C; {kept}", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except (Exception, SystemExit) as error:
        is_done = isinstance(error, SystemExit) and not error.code  # --help
        if _lost_reader() and (is_done or isinstance(error, BrokenPipeError)) and not dist.is_initialized():
            return 128 + signal.SIGPIPE
        if is_done:
            raise
        message = _message(error)
        _finish_background_work()
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            _yield_to_the_cause(error)
            if not isinstance(error, SystemExit):
                watchdog.write_error_file(message or traceback.format_exc())
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 1
    finally:
        watchdog.stop()
        lock.unlock()
        background_work.clear()
        shutdown()


def _lost_reader():
    """Whether stdout is a pipe that nobody reads any more. What is left of it is dropped then."""
    poll = select.poll()
    poll.register(1, 0)  # POLLERR is reported unasked
    is_lost = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_lost:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return is_lost


def _message(error):
    """The line for an error that needs no traceback; None for any other.

    An OSError has a line only with its path: without one the line could not name it.
    """
    if isinstance(error, UserError | FloatingPointError | OtherRankFailed):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return "the pipe of the output is closed; the same command goes on from what is saved"
    if isinstance(error, OSError) and error.errno in DISK_REFUSES and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


def _finish_background_work():
    """Wait for what began before the error: the checkpoint of an earlier step is not lost with this one.

    All ranks began it, and their threads go on while this one waits. Why it fails is printed, unless another
    rank is the reason.
    """
    for wait in background_work:
        try:
            wait()
        except Exception as error:
            if not _is_consequence(error):
                print(f"error: {_message(error) or repr(error)}", file=sys.stderr, flush=True)


def _is_consequence(error):
    """Whether this rank stops for another's sake: SystemExit of main_first, a connection that broke."""
    return isinstance(error, SystemExit | OtherRankFailed | dist.DistError) or "gloo" in str(error)


def _yield_to_the_cause(error):
    """Under torchrun, wait for the rank that failed first to print why.

    torchrun ends all others as soon as one has exited. Rank 0 does not wait: an error that every rank has is
    printed by it alone. A rank that stopped for another's sake waits longest, rank 0 too.
    """
    # torchrun needs one or two seconds to see an exit and to end the others
    seconds = 0 if os.environ["RANK"] == "0" else 5
    if _is_consequence(error):
        seconds = 10
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # 0: torchrun's summary then lists the cause alone
    time.sleep(seconds)


# ---------------------------------------------------------------- sharding
# FSDP2 takes a second of CPU time to import, and --help and --plan shard nothing: it is imported where used.


def is_sharded(part):
    """Whether a module is an FSDPModule, or a tensor a DTensor: split over the ranks by `shard`."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return isinstance(part, (FSDPModule, DTensor))


def shard(model, precision, sharding="full"):
    """Apply FSDP2 to every block and to the model itself; sharding: "full" or "hybrid".

    The embedding, the final norm and lm_head form the root's group. precision "fp32": all in float32. "bf16"
    and "fp8": weights are gathered as bf16, gradients reduced in float32, shards keep their dtype. The root
    stays gathered from its forward to its backward: lm_head.weight is read in between, outside of any
    module's forward.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.mesh = mesh = _mesh(sharding)  # sharding_of reads it
    dtypes = {} if precision == "fp32" else {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    # inputs are not cast: cos and sin stay float32
    policy = MixedPrecisionPolicy(cast_forward_inputs=False, **dtypes)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def _mesh(sharding):
    """The ranks in a row, or for "hybrid" (machines, ranks of a machine)."""
    from torch.distributed.device_mesh import init_device_mesh

    device_type, ranks = "cuda" if torch.cuda.is_available() else "cpu", dist.get_world_size()
    if sharding == "full":
        return init_device_mesh(device_type, (ranks,))
    # torchrun numbers the ranks of a machine in a row
    per_machine = machine_size()
    shape = (ranks // per_machine, per_machine)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def materialize(model, device):
    """Allocate, uninitialised, the shards of a model that was built and sharded on the meta device."""
    names = {param: name for name, param in model.named_parameters()}
    tied_to = names[model.lm_head.weight]  # the embedding's, or its own
    model.to_empty(device=device)
    model.lm_head.weight = model.get_parameter(tied_to)


def share_optimizer(model):
    """Leave the whole model on every rank; split the optimizer's work and state by rows.

    On one process there is nothing to do. Frozen parameters must be the same on all ranks. Call share_weights
    once the trained ones are filled.
    """
    from plumbing.exchange import Exchange

    if dist.get_world_size() > 1:
        model.exchange = Exchange(model)


def sharding_of(model):
    """How the ranks share out this model: "none", "optimizer", "full" or "hybrid"."""
    if _exchanges(model):
        return "optimizer"
    if not is_sharded(model):
        return "none"
    return "hybrid" if model.mesh.ndim == 2 else "full"


def shards(model):
    """{name: tensor} of what this rank's optimizer updates: its rows of each parameter."""
    return model.exchange.shards if _exchanges(model) else dict(model.named_parameters())


def share_weights(model):
    """After this rank's rows have changed: send them to the ranks, if all of them hold the whole model."""
    if _exchanges(model):
        model.exchange.send_weights()


def share_weights_after(optimizer, model):
    """share_weights after each step of the optimizer."""
    optimizer.register_step_post_hook(lambda *_: share_weights(model))


def micro_batches(model, batches):
    """Yield the micro-batches of one optimizer step, for one backward pass each.

    After the last of them, shards(model) have the gradients: sums over micro-batches and ranks.
    """
    batches = iter(batches)
    batch = next(batches)
    _set_last_backward(model, False)
    for following in batches:
        yield batch
        batch = following
    _set_last_backward(model, True)
    yield batch
    if _exchanges(model):
        model.exchange.finish_gradients()


def _set_last_backward(model, is_last):
    """Whether the next backward pass is the last of its step: that one sends what is sent once a step."""
    if _exchanges(model):
        model.exchange.in_last_backward = is_last
    elif is_sharded(model):
        # between machines; FSDP2 adds up each machine's sums until then
        model.set_requires_all_reduce(is_last)


def loss_scale(model):
    """What a rank's loss is multiplied by, so that gradients are sums over ranks: FSDP2 takes means."""
    return dist.get_world_size() if is_sharded(model) else 1


def settle(model):
    """Make model.named_parameters() what was trained.

    Waits for weights under way, and drops those that FSDP2 gathered for a forward pass and left in the place
    of the root's parameters.
    """
    if _exchanges(model):
        model.exchange.wait()
    for module in model.modules():
        if is_sharded(module):
            module.reshard()


def of_all_ranks(model, name, rows):
    """A rank's rows as the tensor of all ranks: a DTensor where it is split.

    rows: shards(model)[name], or a tensor like it of the optimizer.
    """
    return model.exchange.of_all_ranks(name, rows) if _exchanges(model) else rows


def _exchanges(model):
    return hasattr(model, "exchange")


def gather(model):
    """Gather the root's weights in the compute precision.

    For code that reads lm_head.weight before a forward. `release` drops them.
    """
    if _exchanges(model):
        model.exchange.wait()
    if is_sharded(model):
        model.unshard()


def release(model):
    """Drop the root's gathered weights after a pass without a backward.

    They would outlive the next optimizer step, and be stale.
    """
    if is_sharded(model):
        model.reshard()


def local_rows(param):
    """(first row, local tensor): this rank's rows of dim 0. A plain tensor is all rows, from 0."""
    if not is_sharded(param):
        return 0, param.detach()
    mesh, last = param.device_mesh, param.device_mesh.ndim - 1  # split over the last dimension of the mesh
    rows = -(-param.shape[0] // mesh.size(last))  # rounded up: the last ranks may own fewer, or none
    local = param.to_local().detach()
    first = min(rows * mesh.get_local_rank(last), param.shape[0])
    assert local.shape[0] == max(0, min(rows, param.shape[0] - first)), (local.shape, param.shape)
    return first, local


def own_rows(param):
    """local_rows, but each row of a sharded tensor on one rank only: for what is counted or written once.

    With "hybrid" every machine holds each row, and owns an equal part of them: so each copies and writes only
    its part of a checkpoint.
    """
    first, local = local_rows(param)
    if not is_sharded(param) or param.device_mesh.ndim == 1:
        return first, local
    per_machine = -(-len(local) // param.device_mesh.size(0))
    skipped = min(per_machine * param.device_mesh.get_local_rank(0), len(local))
    return first + skipped, local[skipped : skipped + per_machine]


@torch.no_grad()
def assign(param, values):
    """Copy this rank's rows of a full tensor into `param`."""
    assert values.shape == param.shape, (values.shape, param.shape)
    first, local = local_rows(param)
    local.copy_(values[first : first + local.shape[0]])


# ---------------------------------------------------------------- sums and norms


def sum_across_ranks(values):
    """Element-wise sum over ranks of their lists of numbers, in float64.

    The lists are equally long. Returns a list of floats.
    """
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)  # on the CPU group: nothing is queued on the GPU
    return total.tolist()


def max_across_ranks(value):
    """The largest of one number per rank."""
    largest = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def require_same(world, **found):
    """UserError on every rank, naming the keys, where a rank found another value (of JSON) than rank 0.

    Each rank reads config, data and folders by itself.
    """
    wanted = json.loads(from_main(world, lambda: json.dumps(found)))
    # ...: a key that is missing on one side differs, as other versions of the program have other keys
    differing = [key for key in wanted | found if found.get(key, ...) != wanted.get(key, ...)]
    names = set(",".join(gather_texts(",".join(differing))).split(",")) - {""}
    if names:
        expected = "expected the same command and files on every machine, unchanged while a run starts"
        raise UserError(f"{', '.join(sorted(names))}: not the same on all ranks; {expected}")


def require_finite(values, rows, what="the loss is not finite; no step was taken"):
    """FloatingPointError, saying `what`, on every rank when any rank's value is NaN or infinite.

    rows[i] names the examples behind values[i].
    """
    suspects = []
    for value, names in zip(values, rows, strict=True):
        if not math.isfinite(value):
            suspects += map(str, names)
    # Every rank must take the same branch here: one that goes on alone deadlocks in the next collective.
    (count,) = sum_across_ranks([len(suspects)])
    if count:
        examples = suspects or "on another rank"
        raise FloatingPointError(f"{what}. Examples of the micro-batch: {examples}")


def clip_grad_norm(params, max_norm):
    """Scale all gradients so that their global L2 norm is at most max_norm (None: never).

    Returns the norm before scaling, a float. Squares are summed in float32 within a tensor's rows of this
    rank, in float64 across tensors and ranks.
    """
    grads, owned = [], []
    for param in params:
        if param.grad is not None:
            grads.append(local_rows(param.grad)[1])
            owned.append(own_rows(param.grad)[1])
    # a rank may own no row of a short parameter
    grads = [rows for rows in grads if rows.numel()]
    owned = [rows for rows in owned if rows.numel()]
    square = 0.0
    if owned:
        norms = torch._foreach_norm(owned, dtype=torch.float32)
        square = torch.stack(norms).double().square().sum().item()
    (square,) = sum_across_ranks([square])
    norm = square**0.5
    if grads and max_norm is not None and norm > max_norm:
        torch._foreach_mul_(grads, max_norm / norm)
    return norm


# ---------------------------------------------------------------- stopping


class StopSignal:
    """Records SIGTERM or Ctrl-C.

    received() takes the maximum over ranks, so that all of them stop after the same step.
    """

    def __init__(self):
        self._signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        if not self._signal and os.environ.get("RANK", "0") == "0":
            text = f"\nsignal {number}: what runs now, a step or the export, is finished first\n"
            os.write(2, text.encode())  # not print, which the signal may have interrupted
        self._signal = number

    def received(self):
        """The signal number seen by any rank, 0 for none."""
        return int(max_across_ranks(self._signal))

    def end(self):
        """received(), for the last time: from here on a signal ends the process at once."""
        stopped = self.received()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return stopped
