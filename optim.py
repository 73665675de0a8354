"""The learning-rate schedule and AdamW, with every number that frameworks leave implicit."""

import math

import torch

import kernels
from plumbing import parallel
from plumbing.files import UserError

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
# what no key states; it goes into every run's manifest
IMPLICIT = {
    "adam_betas": ADAM_BETAS,
    "adam_eps": ADAM_EPS,
    "weight_decay_on": "matrices",
    "warmup_rounding": "down",
    "first_warmup_rate": 0.0,
    "clipping": "global L2 norm of the step's gradient, after accumulation, over all ranks",
    "loss_reduction": "sum over the step's examples on all ranks and micro-batches, divided once "
    "by their global count",
    "parameter_dtype": "fp32 (in bf16 or fp8, unless sharding is full or hybrid: a bf16 weight and its "
    "16 low bits); frozen weights: the compute precision",
}
IMPLICIT_FP8 = {
    "fp8": "e4m3 for inputs, weights and gradients of the blocks' linears, a power-of-two scale a row, "
    "from the numbers at hand"
}


def implicit(config, model):
    """What the manifest of a run of this config and model says beside its keys."""
    precision = IMPLICIT_FP8 if config.precision == "fp8" else {}
    return IMPLICIT | precision | {"sharding": parallel.sharding_of(model)}


# ---------------------------------------------------------------- the schedule
# Trainers differ in rounding and in the first step's rate, which shifts every later one: both are recorded.


def warmup_steps(config, total_steps):
    """Warm-up in steps: config.warmup_steps, or warmup_ratio of the run, rounded *down*.

    open-instruct rounds down too, the HF Trainer up. UserError for a warm-up as long as the run or longer:
    the step after the warm-up is the first one at the peak rate.
    """
    if config.warmup_steps is not None:
        if config.warmup_steps >= total_steps:
            fewer = f"expected fewer than the {total_steps} steps of the run"
            raise UserError(f"warmup_steps={config.warmup_steps}: {fewer}, or none is at the peak rate")
        return config.warmup_steps
    return int(config.warmup_ratio * total_steps)


def learning_rate(step, total_steps, peak, schedule, warmup):
    """Rate of optimizer step `step`, counted from 0. A pure function: no process can step a scheduler twice.

    Linear from 0 to `peak` over `warmup` steps (the first step of a warm-up has rate 0, as in transformers),
    then "linear" or "cosine" to 0 at step == total_steps, which is the step after the last.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * ((1 - progress) if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


# ---------------------------------------------------------------- AdamW
# At lr 5e-7 a unit step of Adam changes under 1 % of bf16 weights: the rest is rounded away. So weights are
# float32: sharded over ranks, or, where a rank holds the whole model, split masters: the bf16 weight that
# matmuls read, and the 16 bits below it.


def keep_masters(model, grad_dtype):
    """Make every bf16 parameter a split master, and keep its gradient in grad_dtype.

    The model is whole on every rank; the low bits are those of this rank's rows. Matrices take their gradient
    inside the matmul (kernels.masters).
    """
    shards = parallel.shards(model)
    for name, param in model.named_parameters():
        shard = shards[name]  # the parameter itself, on one process
        low_bits = torch.zeros_like(shard, dtype=torch.int16, requires_grad=False)
        accumulates = param.ndim == 2
        param.master = kernels.Master(None, accumulates)
        shard.master = kernels.Master(low_bits, accumulates)
        shard.grad_dtype = param.grad_dtype = grad_dtype


class SplitAdamW(torch.optim.Optimizer):
    """AdamW on split masters (kernels.adamw), with the groups and states of torch.optim.AdamW.

    moments: dtype of exp_avg and exp_avg_sq.
    """

    def __init__(self, groups, moments):
        super().__init__(groups, {"lr": 0.0})
        # a seed is (step << 12) + index: from here on two tensors would share one
        assert sum(1 for _ in self._params()) <= 1 << 12, "more tensors than seeds a step"
        # torch's names: a checkpoint of split masters resumes as a sharded one, and back
        for param, _ in self._params():
            self.state[param] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(param, dtype=moments),
                "exp_avg_sq": torch.zeros_like(param, dtype=moments),
            }

    def _params(self):
        """(parameter, its group), in the order that seeds their random bits."""
        for group in self.param_groups:
            for param in group["params"]:
                yield param, group

    @torch.no_grad()
    def step(self, grad_scale=1.0):
        """One step with the gradients multiplied by grad_scale, which spares a pass over them."""
        for index, (param, group) in enumerate(self._params()):
            state = self.state[param]
            state["step"] += 1
            step = int(state["step"])
            rates = group["lr"], group["weight_decay"], *ADAM_BETAS, ADAM_EPS
            moments = state["exp_avg"], state["exp_avg_sq"]
            # bits of its own for every tensor and step: with the same ones, a rounded moment would drift
            seed = (step << 12) + index
            # a shard is a view of the whole parameter: from its offset on it draws the bits of one process
            first = param.storage_offset()
            kernels.adamw(
                param,
                param.master.low_bits,
                *moments,
                param.grad,
                grad_scale,
                *rates,
                step,
                seed=seed,
                first=first,
            )


def adamw(model, weight_decay, moments=torch.float32):
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters.

    Decay touches matrices only, not norms and biases. moments: dtype of the optimizer's state; only split
    masters (keep_masters) can have another than float32. A model that is whole on several ranks has its
    weights sent to all of them after each step.
    """
    trainable = [p for p in parallel.shards(model).values() if p.requires_grad]
    matrices = {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]  # adapters are matrices only
    if all(kernels.is_split(p) for p in trainable):
        optimizer = SplitAdamW(groups, moments)
    else:
        assert moments == torch.float32, moments
        # lr is set before every step; fused is one kernel over all tensors
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
    parallel.share_weights_after(optimizer, model)
    return optimizer


def apply_gradients(optimizer, lr, max_grad_norm, row_ids=()):
    """Clip, check, step, clear. Returns the global gradient norm before clipping.

    A norm that is not finite raises FloatingPointError, naming the step's rows, on every rank, before any
    weight has changed.
    """
    params = []
    for group in optimizer.param_groups:
        params += group["params"]
    # split masters are scaled inside their kernel: a pass over all gradients less
    scales_itself = isinstance(optimizer, SplitAdamW)
    grad_norm = parallel.clip_grad_norm(params, None if scales_itself else max_grad_norm)
    if not math.isfinite(grad_norm):
        # every rank has the same norm, so all of them stop here
        rows = list(map(str, row_ids))
        raise FloatingPointError(
            f"the gradient norm is {grad_norm}; no step was taken. Examples of the step: {rows}"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    if scales_itself and max_grad_norm is not None and grad_norm > max_grad_norm:
        optimizer.step(grad_scale=max_grad_norm / grad_norm)
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


# ---------------------------------------------------------------- did the weights move?
# Logged for the first step at the peak rate. Near 0 where that rate is too small for the parameters' dtype:
# training would go on, and do nothing. A sample of each tensor takes milliseconds, where all of an 8B model
# would be two passes over 32 GB.


def sample_weights(model, per_tensor=1 << 16):
    """Copies of the first elements of every trainable parameter's local rows.

    They are float32 masters where the parameter is split.
    """

    def master(p):
        local = parallel.local_rows(p)[1].flatten()[:per_tensor]
        if kernels.is_split(p):
            return kernels.join_master(local, p.master.low_bits.flatten()[:per_tensor])
        return local.clone()

    return [master(p) for p in parallel.shards(model).values() if p.requires_grad]


def weights_changed(before, model):
    """Share of the sampled weights that differ from `before`: near 1 after a step at the peak rate."""
    after = sample_weights(model)
    moved = sum((a != b).sum().item() for a, b in zip(after, before, strict=True))
    total = sum(b.numel() for b in before)
    moved, total = parallel.sum_across_ranks([moved, total])
    return moved / total
