"""The learning-rate schedule and AdamW, with every number that frameworks leave implicit."""

import math

import torch

import kernels
from plumbing import parallel
from plumbing.files import UserError

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
IMPLICIT = {  # what no key states; it goes into every run's manifest
    "adam_betas": ADAM_BETAS,
    "adam_eps": ADAM_EPS,
    "weight_decay_on": "matrices",
    "warmup_rounding": "down",
    "first_warmup_rate": 0.0,
    "clipping": "global L2 norm of the step's gradient, after accumulation, over all ranks",
    "loss_reduction": "sum over the step's examples on all ranks and micro-batches, divided once by their global count",
    "parameter_dtype": "fp32 (one process in bf16 or fp8: as a bf16 weight and its 16 low bits); frozen weights: the compute precision",
}
IMPLICIT_FP8 = {
    "fp8": "e4m3 for inputs, weights and gradients of the blocks' linears, a power-of-two scale a row, from the numbers at hand"
}


def implicit(config):
    """What the manifest of a run of this config says beside its keys."""
    return IMPLICIT | IMPLICIT_FP8 if config.precision == "fp8" else IMPLICIT


def warmup_steps(config, total_steps):
    """Warm-up in steps: config.warmup_steps, or warmup_ratio of the run rounded *down* as in open-instruct (the HF Trainer: up).

    ValueError for a warm-up that the run does not outlast: it would never reach its rate."""
    if (config.warmup_steps or 0) > total_steps:
        raise UserError(f"warmup_steps={config.warmup_steps}: expected at most the {total_steps} steps of the run, whose rate it delays")
    return config.warmup_steps if config.warmup_steps is not None else int(config.warmup_ratio * total_steps)


def learning_rate(step, total_steps, peak, schedule, warmup):
    """Rate of optimizer step `step` (0-based): a pure function, so no process can step it twice.

    Linear from 0 to `peak` over `warmup` steps (the first step of a warm-up has rate 0, as in transformers), then "linear" or "cosine"
    to 0 at step == total_steps, which is the step after the last.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * ((1 - progress) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def keep_masters(model, grad_dtype):
    """Make every bf16 parameter of an unsharded model a split master, and keep its gradient in grad_dtype.

    Matrices take theirs inside the matmul (kernels.masters).
    """
    for param in model.parameters():
        low_bits = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
        param.master = kernels.Master(low_bits, accumulates=param.ndim == 2)
        param.grad_dtype = grad_dtype


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on split masters (kernels.adamw), with the groups and states of torch.optim.AdamW. moments: dtype of exp_avg and exp_avg_sq."""

    def __init__(self, groups, moments):
        super().__init__(groups, {"lr": 0.0})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": torch.zeros(())} | {key: torch.zeros_like(p, dtype=moments) for key in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, grad_scale=1.0):
        """One step with the gradients multiplied by grad_scale, which spares a pass over them."""
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, (p, group) in enumerate(params):
            state = self.state[p]
            state["step"] += 1
            step = int(state["step"])
            kernels.adamw(p, p.master.low_bits, state["exp_avg"], state["exp_avg_sq"], p.grad, grad_scale, group["lr"], group["weight_decay"],
                          *ADAM_BETAS, ADAM_EPS, step, seed=(step << 12) + index)  # fmt: skip


def adamw(model, weight_decay, moments=torch.float32):
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters. Decay touches matrices only, not norms and biases.

    moments: dtype of the optimizer's state; only split masters (keep_masters) can have another than float32.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if all(kernels.is_split(p) for p in trainable):
        return SplitAdamW(groups, moments)
    assert moments == torch.float32, moments
    # lr is set before every step; fused is one kernel over all tensors
    return torch.optim.AdamW(groups, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)


def apply_gradients(optimizer, lr, max_grad_norm, row_ids=()):
    """Clip, check, step, clear. Returns the global gradient norm before clipping.

    A norm that is not finite raises FloatingPointError, naming the step's rows, on every rank before any weight has changed.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scales_itself = isinstance(optimizer, SplitAdamW)
    grad_norm = parallel.clip_grad_norm(params, None if scales_itself else max_grad_norm)
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm}; no step was taken. Examples of the step: {list(map(str, row_ids))}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    if scales_itself and max_grad_norm is not None and grad_norm > max_grad_norm:
        optimizer.step(grad_scale=max_grad_norm / grad_norm)
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def sample_weights(model, per_tensor=1 << 16):
    """Copies of the first elements of every trainable parameter's local rows, to see after a step whether they moved."""

    def master(p):
        local = parallel.local_rows(p)[1].flatten()[:per_tensor]
        if kernels.is_split(p):
            return kernels.join_master(local, p.master.low_bits.flatten()[:per_tensor])
        return local.clone()

    return [master(p) for p in model.parameters() if p.requires_grad]


def weights_changed(before, model):
    """Share of the sampled weights that differ from `before`: near 1 after a step at the peak rate, unless updates are lost to rounding."""
    after = sample_weights(model)
    moved = sum((a != b).sum().item() for a, b in zip(after, before, strict=True))
    moved, total = parallel.sum_across_ranks([moved, sum(b.numel() for b in before)])
    return moved / total
