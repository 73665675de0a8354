"""AdamW on split masters, one kernel a tensor."""

from kernels import reference
from kernels.block import gpu_kernels


def adamw(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed):
    """One AdamW step (Loshchilov & Hutter 2019, algorithm 2) of a split master, in place.

    weight bf16, low_bits int16, moments m and v float32 or bf16, grad float32 or bf16, all of one shape. The gradient is multiplied by
    grad_scale (clipping). bf16 moments are rounded stochastically: at beta2 = 0.999 a step changes v by up to 0.1 %, less than half of
    bf16's spacing, so to nearest v would stand still. step counts from 1; seed chooses the random bits.
    """
    function = gpu_kernels().adamw if weight.is_cuda else reference.adamw
    function(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed)
