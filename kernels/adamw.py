"""AdamW on split masters, one kernel a tensor."""

from kernels.block import path_of


def adamw(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed, first=0):
    """reference.adamw, in place.

    All tensors have one shape: that of a parameter, or of the rows of it that begin at `first`. weight bf16,
    low_bits int16, moments m and v float32 or bf16, grad float32 or bf16; grad_scale is the clipping. bf16
    moments are rounded stochastically: at beta2 = 0.999 a step changes v by up to 0.1 %, less than half of
    bf16's spacing, so to nearest v would stand still. step counts from 1; seed chooses the random bits.
    """
    if weight.numel():  # a rank may own no row of a short parameter
        path = path_of(weight)
        path.adamw(weight, low_bits, m, v, grad, grad_scale, lr, decay, beta1, beta2, eps, step, seed, first)
