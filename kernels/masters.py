"""What a trained bf16 parameter carries beside its weight.

The rest of its float32 master, and how it takes its gradient. `param.master`, a Master, is the one attribute
that this project adds to a parameter. `param.grad_dtype` is torch's own: the dtype of param.grad. Nothing
outside this file asks a parameter whether it has them.
"""

from typing import NamedTuple

import torch


class Master(NamedTuple):
    """How a process keeps one parameter, or the rows of it that this process updates."""

    # int16, in the shape of those rows: what bf16 cuts off (reference.split_master). None: kept elsewhere.
    low_bits: torch.Tensor | None
    # True: the kernels add the gradient to param.grad themselves, in param.grad_dtype, inside the matmul, and
    # give autograd None: a pass over all gradients less in every micro-batch. param.grad is then a plain
    # tensor of all rows, never a DTensor.
    accumulates: bool


def is_split(tensor):
    """Whether the tensor is the upper half of float32 masters, whose lower half is tensor.master.low_bits."""
    master = getattr(tensor, "master", None)
    return master is not None and master.low_bits is not None


def accumulates(tensor):
    """Whether the kernels add to tensor.grad themselves.

    False for a parameter whose gradient autograd collects.
    """
    master = getattr(tensor, "master", None)
    return master is not None and master.accumulates
