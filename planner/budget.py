"""What a training step takes, by arithmetic: bytes on one GPU, term by term, and seconds.

Pure functions; no GPU is touched.

Calibrated on the 8B shape on one and two H200s with torch 2.11, and on OLMo 2's 1B shape on one:
tests/test_plan.py holds the measured peaks (met within 1.5 % on one GPU, 3 % on two) and seconds of a step
(within 4.5 %). Other GPUs are scaled by their datasheets: estimates.

Letters as in model.py; sizes are bytes, rates per second. Reading order: the GPUs, a model's size, a pass
over data, memory, time.
"""

import dataclasses
import difflib
import functools
import inspect
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

import families
from kernels import token_logps
from model import Llama, apply_lora, training_flops
from plumbing.config import are_equal_machines
from plumbing.files import UserError

# ---------------------------------------------------------------- the GPUs


@dataclass(frozen=True)
class GPU:
    """One card. All but `gib` is from NVIDIA's datasheets, or assumed."""

    gib: float  # memory, as torch reports it: 2 to 8 % less than on the datasheet
    tflops: float  # dense bf16 matmul with float32 sums, datasheet
    fp32_tflops: float  # float32 without tensor cores (no TF32), datasheet
    tb_s: float  # memory bandwidth, datasheet
    link_gb_s: float  # to the other cards, one direction, datasheet: NVLink, or PCIe x16 where there is none
    capability: tuple[int, int]  # compute capability, for check_capability
    usd_per_hour: tuple[float, float]  # an assumption: what clouds ask for one card, from cheap to dear

    @property
    def pcie(self):
        """Whether cards exchange over PCIe, which is 5 to 20 times slower than NVLink."""
        return self.link_gb_s < 100

    @property
    def network_gb_s(self):
        """To GPUs of other machines, GB/s a direction for each card: an assumption.

        400 Gb/s a card beside Hopper and Blackwell, 200 beside Ampere; 100 Gb/s for eight cards on PCIe.
        """
        if self.pcie:
            return 1.5
        return 50 if self.capability >= (9, 0) else 25


# The GeForce cards' TFLOP/s are of the whitepapers of GA102, AD102 and GB202: 71, 165.2 and 209.5 (half of
# their "sparse" rates), and in float32 35.6, 82.6 and 104.8. The B200's are those in an HGX B200. PCIe is 4.0
# (32 GB/s a direction), 5.0 (64) on the RTX 5090; an NVLink bridge between RTX 3090s is not counted.
GPUS = {
    "rtx3090": GPU(23.6, 71, 35.6, 0.936, 32, (8, 6), (0.20, 0.50)),
    "rtx4090": GPU(23.5, 165.2, 82.6, 1.008, 32, (8, 9), (0.35, 0.80)),
    "rtx5090": GPU(31.4, 209.5, 104.8, 1.792, 64, (12, 0), (0.50, 1.20)),
    "a40": GPU(44.4, 149.7, 37.4, 0.696, 32, (8, 6), (0.40, 1.30)),
    "l40s": GPU(44.4, 362.1, 91.6, 0.864, 32, (8, 9), (0.80, 1.90)),
    "a100-40": GPU(39.4, 312, 19.5, 1.555, 300, (8, 0), (1.00, 2.00)),
    "a100-80": GPU(79.2, 312, 19.5, 2.039, 300, (8, 0), (1.20, 2.80)),
    "h100": GPU(79.1, 989.4, 67, 3.35, 450, (9, 0), (2.00, 4.50)),
    "h200": GPU(139.8, 989.4, 67, 4.8, 450, (9, 0), (2.50, 5.50)),
    "b200": GPU(178.3, 2250, 75, 7.7, 900, (10, 0), (4.00, 8.00)),
}

# Shares of the datasheet's rates, measured on the H200.
# 790 of 989 TFLOP/s: large bf16 products, what mfu is a share of; FULL to STATES and ATTENTION are of this
MATMUL = 0.80
# Forward and backward of blocks and lm_head, full fine-tuning and LoRA; forward only.
FULL, LORA, FORWARD = 0.76, 0.69, 0.82
# Texts of up to 512 tokens in bf16, attention included, over the blocks' FLOPs: a sweep's passes; extract,
# which pools states after every block. The 8B shape extracted 40,000 to 42,500 tokens/s in four sessions.
SWEEP, STATES = 0.79, 0.73
# Extract in float32, a share of that datasheet rate. Tokens/s of texts of 512, 200 and 60 tokens: 8B 3,448,
# 3,383, 3,447; Llama 3.2 1B 23,336, 22,491, 22,265.
STATES_FP32 = 0.69
# What a block does beside its matmuls grows with the hidden size, its matmuls with the square. So a FLOP of a
# matmul takes so much longer at 2,048 than at 4,096, where the shares above were fitted (see slowed). OLMo 2
# 1B, all weights: SFT 59,180 and 60,180 tokens/s, a step planned 2.5 and 4.2 % too long; DPO 84.5 pairs/s,
# 4.4 % too short. LoRA, forward passes and sweeps are assumed to lose as much.
NARROW = 0.125
# Extract in bf16 loses more, to its pooling: Llama 3.2 1B read 239,356 tokens/s in a full batch of 16,384
# tokens, planned 237,500. Batches of 12,800 and 8,160 are planned 7 and 12 % too fast, but only the last one
# of a pass is partial.
NARROW_STATES = 0.25
# varlen_attn over long documents; tokens of a document at which it has half of that.
ATTENTION, ATTENTION_HALF = 0.434, 916
OPTIMIZER = 0.82  # of the memory bandwidth: 49 ms for 24 bytes a parameter, 8.03 B parameters
LINK = 0.60  # all-gather and reduce-scatter: 250 to 290 of 450 GB/s
# With sharding="full" a GPU computes at this share of its rate alone: NCCL's kernels take SMs from the
# matmuls, gradients are added outside, weights are copied in and out. 2 x H200 over NVLink, 8B, 49,152 tokens
# a GPU and step, micro-batches of 12,288 (2026-11-28, 982dfe7): full 4.75 s a step beside 4.20 alone, LoRA
# 3.67 beside 3.35. Other counts and links were not measured.
SHARDED_FULL, SHARDED_LORA = 0.885, 0.91
# With sharding="optimizer" a step waits for its slowest GPU: this spread of their rates, times what the
# largest of `count` normal numbers is on average. And its exchange, beside computing, takes a share
# of its own time from that. Measured on H200s over NVLink, beside one of the same machine: 8B full on two
# 0.987, LoRA 0.981 and 0.987; full on four 0.979, DPO (twice the exchange for its computing) 0.977. The wait
# is extrapolated: 1.5 % on two, 3.6 % on eight, 8 % on 1,024.
SPREAD, INTERFERENCE = 0.025, 0.2
MACHINE = 8  # GPUs of one machine; more are taken to be several of them

ERROR = 0.05
GIB = 2**30
CONTEXT_GIB = 0.6  # CUDA context and libraries, beside what the allocator counts

HEAD_ROWS = inspect.signature(token_logps).parameters["chunk"].default


def find_gpu(name):
    """The GPU of that name. ValueError with a suggestion when there is none."""
    if name not in GPUS:
        lower = (name or "").lower()
        near = [gpu for gpu in GPUS if lower and gpu.startswith(lower)] or difflib.get_close_matches(
            lower, GPUS, n=1
        )
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"gpu={name!r} (--gpu): expected one of {', '.join(GPUS)}{hint}")
    return GPUS[name]


# ---------------------------------------------------------------- a model's size


def skeleton(model_config, config):
    """The trained model on the meta device: names and shapes, no memory."""
    return _skeleton(model_config, config.lora_rank, config.lora_alpha, config.lora_targets)


@functools.cache  # 0.1 s for 32 blocks, and a plan that does not fit asks for it ten times
def _skeleton(model_config, rank, alpha, targets):
    with torch.device("meta"):
        model = Llama(model_config)
        if rank:
            apply_lora(model, rank, alpha, targets=targets)
    return model


@dataclass(frozen=True)
class Sizes:
    """Parameters of a skeleton."""

    trained: int
    frozen: int
    root: int  # of all but the blocks: embedding, final norm, lm_head
    block: int  # of one block

    @classmethod
    def of(cls, model):
        trained = total = blocks = 0
        for name, parameter in model.named_parameters():  # a tied lm_head is there once
            count = parameter.numel()
            total += count
            if parameter.requires_grad:
                trained += count
            if name.startswith("model.layers."):
                blocks += count
        return cls(trained, total - trained, total - blocks, blocks // model.config.num_hidden_layers)


# ---------------------------------------------------------------- a pass over data


@dataclass(frozen=True)
class Pass:
    """What one forward pass over a dataset computes."""

    examples: int  # documents or pairs
    tokens: int  # of the packed streams
    keys: int  # of the documents, shared prefixes counted with each
    targets: int  # supervised
    flops: float  # forward: model.LlamaConfig.flops
    attention: float  # the scores and mixes in that
    # The same, each document's weighted by how much slower varlen_attn is on it than on a long one.
    slow_attention: float

    @classmethod
    def of(cls, shape, documents, prefixes=0):
        """The Pass over documents: (lengths (n,), targets (n,)) of every side.

        prefixes (n,): tokens that the second side leaves out.
        """

        def total(f):  # in float64: the FLOPs of a million documents overflow int64
            computed = 0.0
            for lengths, _ in documents:
                computed += f(np.asarray(lengths, float)).sum()
            return float(computed - np.sum(f(np.asarray(prefixes, float))))

        keys = int(sum(lengths.sum() for lengths, _ in documents))
        targets = int(sum(targets.sum() for _, targets in documents))
        flops = total(lambda length: shape.flops(length, logits=0)) + shape.flops(0, logits=targets)
        slow = total(
            lambda length: shape.attention_flops(length) / np.maximum(length, 1) * (length + ATTENTION_HALF)
        )
        examples, tokens = len(documents[0][0]), keys - int(np.sum(prefixes))
        return cls(examples, tokens, keys, targets, flops, total(shape.attention_flops), slow)

    def times(self, factor):
        """The pass made `factor` times."""
        return Pass(*(getattr(self, field.name) * factor for field in dataclasses.fields(self)))


# ---------------------------------------------------------------- memory


def is_whole(config, count):
    """Whether each GPU holds all weights and gradients, and not its rows of them.

    All: exchange.py, or one GPU. Rows: FSDP2.
    """
    assert count == 1 or config.sharding != "auto", "choose_sharding first"
    return count == 1 or config.sharding == "optimizer"


def sharers(config, count, machine=MACHINE):
    """How many of `count` GPUs share out one copy of the state: all, or with "hybrid" those of a machine."""
    return min(count, machine) if config.sharding == "hybrid" else count


def choose_sharding(shape, config, sizes, count, machine, card):
    """What config.sharding stands for on `count` GPUs, `machine` on each machine (0: unequally many).

    "auto" is "optimizer" where that fits, or where bf16 moments or gradients want it, else "hybrid" where
    that fits. card: bytes of the smallest GPU, free or not: a run goes on as it began, also where a killed
    one still holds memory. The data is not asked, so that a plan that has not read it picks as the run does.
    """
    if config.sharding != "auto":
        return config.sharding
    if "bf16" in (config.moments, config.gradients):
        return "optimizer"
    # The largest stream there can be: every token supervised, all of it a prefix that two documents share.
    tokens = config.tokens_per_microbatch
    stream = tokens, tokens, 2 * tokens
    candidates = ["optimizer"]
    if are_equal_machines(count, machine):
        candidates.append("hybrid")
    for sharding in candidates:
        tried = dataclasses.replace(config, sharding=sharding)
        holders = sharers(tried, count, machine)
        _, terms = peak_bytes(shape, tried, sizes, holders, *stream, accumulates=True)
        if sum(terms.values()) * (1 + ERROR) <= card - CONTEXT_GIB * GIB:
            return sharding
    return "full"


def state_bytes(config, sizes, count):
    """{term: bytes on one GPU} of what lives as long as the run; count: GPUs that share it out (sharers).

    The gradients too, which come and go with each step.
    """
    moments, gradients = 8, 4
    shared = {}  # over `count` GPUs, in each way of sharding
    if config.lora_rank:
        held = {"frozen weights": compute_width(config) * sizes.frozen, "adapters": 4 * sizes.trained}
    elif is_whole(config, count) and config.precision != "fp32":  # optim.keep_masters
        held = {"weights": 2 * sizes.trained}
        shared["low bits of the weights"] = 2 * sizes.trained
        moments = {"fp32": 8, "bf16": 4}[config.moments]
        gradients = {"fp32": 4, "bf16": 2}[config.gradients]
    else:
        held = {"weights": 4 * sizes.trained}
    held["gradients"] = gradients * sizes.trained
    shared["moments of AdamW"] = moments * sizes.trained
    holders = 1 if is_whole(config, count) else count
    return {term: size / holders for term, size in held.items()} | {
        term: size / count for term, size in shared.items()
    }


def checkpoint_bytes(config, sizes):
    """Of a checkpoint, over all ranks: a float32 master and two moments for each trained parameter."""
    return (4 + 2 * {"fp32": 4, "bf16": 2}[config.moments]) * sizes.trained


def block_bytes(shape, config, tokens, keys):
    """Bytes of a block: (kept for its backward, kept when it recomputes, held by its backward).

    The last are held for a moment.
    """
    width, D, inner = compute_width(config), shape.hidden_size, shape.intermediate_size
    H, G, K = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    # input, middle, q, attention's output, gate, up; softmax's float32 sums; k and v, also of shared prefixes
    kept = tokens * (width * (2 * D + 2 * H * K + 2 * inner) + 4 * H) + keys * width * 2 * G * K
    if shape.qk_norm:
        kept += tokens * width * (H + G) * K  # q and k before their norms
    if shape.post_norm:
        kept += tokens * width * 2 * D  # what attention and MLP gave, before their norms
    # The gradients of gate, up and their product, and that once more; of the MLP's result, before and behind
    # its norm.
    backward = tokens * width * (4 * inner + D + D * shape.post_norm)
    if config.kernels == "plain":
        # autograd keeps silu(gate), the product and norms' results that a linear reads; what it holds has
        # gone by then
        kept += tokens * width * (2 * inner + (0 if shape.post_norm else 2 * D))
        backward = tokens * width * (inner + D)
    return kept, tokens * width * D, backward


def peak_bytes(shape, config, sizes, count, tokens, targets, keys, *, accumulates):
    """(moment, {term: bytes on one GPU}) of a training step's peak.

    Their sum is torch.cuda.max_memory_allocated. count: GPUs that share out one copy of the state (sharers).
    tokens, targets, keys: of the largest micro-batch.
    accumulates: a step has several, so gradients are there from the second on; otherwise they appear while
    the activations go. The largest of three moments: lm_head's backward, the last block's, the end.
    """
    width, D, V, L = compute_width(config), shape.hidden_size, shape.vocab_size, shape.num_hidden_layers
    full, sharded = not config.lora_rank, not is_whole(config, count)
    state = state_bytes(config, sizes, count)
    kept, recomputed, backward = block_bytes(shape, config, tokens, keys)
    recomputing = {"none": 0, "half": -(-L // 2), "full": L}[config.recompute]
    early = state | {"gradients": state["gradients"] * accumulates}
    early |= {
        "activations": recomputing * recomputed + (L - recomputing) * kept + width * D * (tokens + targets)
    }
    if sharded:
        early["gathered weights"] = width * (sizes.root + sizes.block)
    # a split master's gradient is summed in place, any other weight's beside it, in float32
    in_place = not sharded and config.precision != "fp32"
    head = (
        min(HEAD_ROWS, targets) * V * (4 + width) + width * D * targets + 4 * V * D * (full and not in_place)
    )
    block = backward + width * D * tokens + kept * (recomputing > 0)
    block += width * V * D * (full and not (in_place and accumulates))  # lm_head's gradient
    if sharded:  # the next block's weights; this one's gradients, and in float32 to be summed over GPUs
        block += width * sizes.block + (width + 4) * sizes.block * full
    # a split master's gradient takes the stream's rows only, any other is dense
    end = 4 * tokens * D * full if in_place else (width + 4) * (sizes.root if sharded else V * D) * full
    moments = {
        "lm_head's backward": early | {"logits of a chunk": head},
        "the last block's backward": early | {"backward of a block": block},
        "the end of the backward": state | {"gradient of the embedding": end},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moment, {term: size for term, size in moments[moment].items() if size}


def compute_width(config):
    """Bytes of a number that the matmuls read."""
    return {"fp32": 4, "bf16": 2, "fp8": 2}[config.precision]


# ---------------------------------------------------------------- time


def slowed(hidden_size, narrow):
    """Time of a matmul's FLOP at this hidden size beside that at 4,096; narrow: NARROW or NARROW_STATES.

    Fitted at 2,048 and 4,096; narrower is extrapolated, wider is taken as 4,096.
    """
    return 1 + narrow * max(0, 4096 / hidden_size - 1)


def extracts_in_fp32(model_config, gpu):
    """Whether steer.py extract reads a model in float32 on this GPU, as families.dtype_for decides."""
    return families.fits_in_fp32(model_config, gpu.gib * 2**30)


def extract_seconds(model_config, tokens, gpu):
    """Seconds in which analysis.steering.read_states reads `tokens` tokens of texts, on one GPU.

    model_config: of any family.
    """
    if extracts_in_fp32(model_config, gpu):
        return _block_flops(model_config, tokens) / (gpu.fp32_tflops * 1e12 * STATES_FP32)
    flops = _block_flops(model_config, tokens) * slowed(model_config.hidden_size, NARROW_STATES)
    return flops / (gpu.tflops * 1e12 * MATMUL * STATES)


def sweep_seconds(model_config, tokens, gpu):
    """Seconds of a sweep's forward passes over `tokens` tokens of prompts, on one GPU, in bf16.

    model_config: of any family.
    """
    flops = _block_flops(model_config, tokens) * slowed(model_config.hidden_size, NARROW)
    return flops / (gpu.tflops * 1e12 * MATMUL * SWEEP)


def _block_flops(model_config, tokens):
    """Of the blocks' weights: all but embedding and lm_head."""
    tables = 1 if model_config.tie_word_embeddings else 2
    parameters = families.num_parameters(model_config)
    return 2 * tokens * (parameters - tables * model_config.vocab_size * model_config.hidden_size)


def forward_seconds(work, model_config, gpu):
    """Seconds of a forward pass without gradients, on one GPU."""
    rate = gpu.tflops * 1e12 * MATMUL
    matmuls = (work.flops - work.attention) * slowed(model_config.hidden_size, NARROW)
    return matmuls / (rate * FORWARD) + work.slow_attention / (rate * ATTENTION)


def training_seconds(work, model, config, gpu):
    """Seconds of forward and backward, on one GPU."""
    rate, matmuls = gpu.tflops * 1e12 * MATMUL, work.flops - work.attention
    flops = training_flops(model, matmuls, 0, work.tokens) * slowed(model.config.hidden_size, NARROW)
    matmuls_trained = flops / (rate * (LORA if config.lora_rank else FULL))
    # Backward: five products to forward's two, under LoRA too.
    attention = 3.5 * work.slow_attention / (rate * ATTENTION)
    # All but lm_head.
    again = dataclasses.replace(work, flops=work.flops - model.config.flops(0, logits=work.targets))
    return (
        matmuls_trained
        + attention
        + {"none": 0, "half": 0.5, "full": 1}[config.recompute] * forward_seconds(again, model.config, gpu)
    )


def optimizer_seconds(config, sizes, count, gpu):
    """Seconds of one AdamW step on one of the `count` GPUs that share it out (sharers).

    Each steps its rows, also where it holds all weights. Every byte of weights and moments is read and
    written, the gradients are read twice (norm, update).
    """
    state = state_bytes(config, sizes, 1)
    trained = sum(state.values()) - state.get("frozen weights", 0)
    return 2 * trained / count / (gpu.tb_s * 1e12 * OPTIMIZER)


def exchange_seconds(size, count, gpu):
    """Seconds of one all-gather or reduce-scatter of `size` bytes.

    Every one of `count` GPUs sends and receives its part of them.
    """
    slowest_link = gpu.link_gb_s
    if count > MACHINE:
        # NCCL runs a ring for each network card, and a ring enters and leaves a machine once: what a GPU gets
        # over NVLink in all came over eight cards.
        slowest_link = min(gpu.link_gb_s, MACHINE * gpu.network_gb_s)
    return size * (count - 1) / count / (slowest_link * 1e9 * LINK)


def seconds_between_machines(size, machines, gpu):
    """Seconds in which each GPU sums its `size` bytes over machines, by its own network card."""
    return 2 * size * (machines - 1) / machines / (gpu.network_gb_s * 1e9 * LINK)


def overlaps(gpu, count):
    """Whether an exchange of `count` GPUs is taken to run beside computing.

    It was measured over NVLink in one machine only.
    """
    return not gpu.pcie and count <= MACHINE


def slowest_of(count):
    """Time of a step that ends with the slowest of `count` GPUs, beside that of a mean one."""
    return 1 + SPREAD * NormalDist().inv_cdf((count - 0.375) / (count + 0.25))  # Blom's approximation


def sharded_seconds(compute, exchange, config, count, gpu):
    """Seconds of a part in which each of `count` GPUs computes and exchanges.

    compute: what one GPU alone would take for its share. An exchange that was not measured to run beside
    computing is added to it.
    """
    if count == 1:
        return compute
    busy = compute * slowest_of(count)
    if not is_whole(config, count):  # measured on two, so their wait and their exchange are in the share
        share = SHARDED_LORA if config.lora_rank else SHARDED_FULL
        busy = busy / slowest_of(2) / share
    if not overlaps(gpu, sharers(config, count)):
        return busy + exchange
    if is_whole(config, count):
        busy += INTERFERENCE * exchange
    return max(busy, exchange)
