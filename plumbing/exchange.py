"""Training on several ranks that each hold the whole model: what they send one another, and when.

Rank r of W owns rows [r * ceil(n / W), (r + 1) * ceil(n / W)) of every trained parameter. It alone keeps
their low bits and AdamW's moments, and updates them. One optimizer step:

    micro-batches but the last   nothing is sent: gradients add up in param.grad, as on one process
    the last backward pass       on leaving a unit, the reduce-scatter of its gradients starts: sums over
                                 ranks, in the rows of their owner
    gradient norm, AdamW         each rank on its own rows
    after AdamW                  all-gathers of the weights start, unit by unit; a forward pass waits for a
                                 unit's weights on entering it

A unit is the embedding, a block, or the final norm with lm_head (a tied lm_head belongs to the embedding).
What is under way for one unit runs beside the computation of others. A rank sends (W - 1) / W of its
gradients and weights a step, however many micro-batches the step has.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from kernels import is_split


def reduce_scatter(owns, wholes):
    """Start to sum each of `wholes` over ranks, this rank's rows into `owns`. Returns the work."""
    return dist.group.WORLD.reduce_scatter_tensor_coalesced(owns, wholes)


def all_gather(wholes, owns):
    """Start to collect `wholes` out of every rank's `owns`. Returns the works to wait for.

    In one kernel on GPUs. Under gloo coalesced all-gathers that are under way together corrupt the heap
    (torch 2.11 and 2.13: bench/NOTES.md), so on CPUs each tensor goes alone.
    """
    if wholes[0].is_cuda:
        return [dist.group.WORLD.allgather_into_tensor_coalesced(wholes, owns)]
    works = []
    for whole, own in zip(wholes, owns, strict=True):
        parts = list(whole.chunk(dist.get_world_size()))
        works.append(dist.all_gather(parts, own, async_op=True))
    return works


@dataclass
class Unit:
    """Parameters that are exchanged together.

    `module` is the first to read their weights, and their gradients are complete when a backward pass leaves
    it.
    """

    module: nn.Module
    names: list
    sums: tuple | None = None  # (work, this rank's rows, one tensor a name) of the reduce-scatter under way
    arriving: tuple | None = None  # (works, whole weights, one a name) of the all-gather under way


class Exchange:
    """The exchanges of one model.

    shards: {name: what the optimizer of this rank updates}: its rows of a trained parameter, in the
    parameter's own memory. A frozen parameter is there whole.
    """

    def __init__(self, model):
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.params = dict(model.named_parameters())
        self.mesh = init_device_mesh(next(model.parameters()).device.type, (self.world_size,))
        self.shards = {}
        for name, param in self.params.items():
            self.shards[name] = nn.Parameter(self._own(param.detach())) if param.requires_grad else param
        self.in_last_backward = False
        self.units = self._units(model)
        for unit in self.units:
            unit.module.register_forward_pre_hook(lambda module, args, unit=unit: self._enter(unit, args[0]))

    def _units(self, model):
        """In the order of the forward pass."""
        left = [name for name, param in self.params.items() if param.requires_grad]
        entries = [(model, "model.embed_tokens.")]
        entries += [(block, f"model.layers.{i}.") for i, block in enumerate(model.model.layers)]
        units = []
        for module, prefix in entries:
            names = [name for name in left if name.startswith(prefix)]
            units.append(Unit(module, names))
            left = [name for name in left if name not in names]
        units.append(Unit(model.model.norm, left))
        return [unit for unit in units if unit.names]  # under LoRA the first and the last have none

    # ------------------------------------------------------------ gradients

    def _enter(self, unit, hidden):
        """A forward pass is about to read the unit's weights; hidden (T, D) is what it reads them for."""
        self._receive(unit)
        if self.in_last_backward and torch.is_grad_enabled() and hidden.requires_grad:
            # of a unit's gradients, its parameters' included, that of its input is the last
            hidden.register_hook(lambda _: self._sum(unit))

    def _sum(self, unit):
        """Start summing the unit's gradients over ranks. A rank without an example may have none: zeros."""
        wholes = []
        for param in map(self.params.get, unit.names):
            grad = torch.zeros_like(param, dtype=param.grad_dtype) if param.grad is None else param.grad
            param.grad = None
            wholes.append(self._padded(grad))
        owns = [self._own(whole) for whole in wholes]  # in place: the other rows are not needed any more
        unit.sums = reduce_scatter(owns, wholes), owns

    def finish_gradients(self):
        """After the last backward pass: every shard's .grad is its rows of the sum over all ranks."""
        self.in_last_backward = False
        self.wait()  # no weight may be under way when the optimizer changes it; after a forward pass, none is
        for unit in reversed(self.units):
            if unit.sums is None:  # the embedding, or under LoRA the first block: no gradient enters them
                self._sum(unit)
        for unit in self.units:
            work, owns = unit.sums
            work.wait()
            for name, own in zip(unit.names, owns, strict=True):
                assert self.params[name].grad is None, f"{name}: a gradient came after its sum had started"
                self.shards[name].grad = own[: len(self.shards[name])]
            unit.sums = None

    # ------------------------------------------------------------ weights

    def send_weights(self):
        """Start sending this rank's rows to all ranks, and receiving theirs; none changes before `wait`."""
        for unit in self.units:
            wholes = [self._padded(self.params[name].detach()) for name in unit.names]
            owns = [self._own(whole) for whole in wholes]
            unit.arriving = all_gather(wholes, owns), wholes

    def wait(self):
        """For all weights: call it before anything but the model's forward pass reads them."""
        for unit in self.units:
            self._receive(unit)

    def _receive(self, unit):
        """On a GPU it is the stream that waits, not the host."""
        if unit.arriving is None:
            return
        works, wholes = unit.arriving
        for work in works:
            work.wait()
        for param, whole in zip(map(self.params.get, unit.names), wholes, strict=True):
            if whole.data_ptr() != param.data_ptr():
                param.detach().copy_(whole[: len(param)])
        unit.arriving = None

    # ------------------------------------------------------------ rows

    def _own(self, tensor):
        """This rank's rows, a view: fewer, or none, where rows do not divide evenly."""
        per_rank = -(-len(tensor) // self.world_size)
        first = min(self.rank * per_rank, len(tensor))
        return tensor[first : first + per_rank]

    def _padded(self, tensor):
        """The tensor itself, or a copy with zero rows up to a multiple of the ranks: shares must be equal."""
        missing = -len(tensor) % self.world_size
        return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing)) if missing else tensor

    def of_all_ranks(self, name, rows):
        """The tensor of which `rows` is this rank's part, split as parameter `name` is: for code of files."""
        from torch.distributed.tensor import DTensor, Shard

        whole = self.params[name]
        if not whole.requires_grad:
            return rows
        like = {"shape": whole.shape, "stride": whole.stride()}
        tensor = DTensor.from_local(rows.detach(), self.mesh, [Shard(0)], run_check=False, **like)
        if is_split(rows):
            tensor.master = rows.master
        return tensor
