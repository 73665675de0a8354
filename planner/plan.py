"""Plan before renting: memory, time and cost of a config on a named GPU.

No GPU is touched and no run folder is written.

    python train_dpo.py configs/tulu10.py --plan --gpu a100-80 --count 8 [--usd-per-hour 16] [--key=value ...]
    python -m planner.plan configs/*.py --gpu a100-80 --count 8 [--usd-per-hour 16]    all, and their total

The arithmetic is budget.py's. Reading order: the counts, the plan, what to turn when it does not fit, the
text, the command line.
"""

import argparse
import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import huggingface_hub.constants
import numpy as np

from data import load_preferences, load_sft
from model import LlamaConfig, training_flops
from packing import steps_per_epoch
from planner.budget import (
    CONTEXT_GIB,
    ERROR,
    GIB,
    GPUS,
    MACHINE,
    Pass,
    Sizes,
    checkpoint_bytes,
    choose_sharding,
    compute_width,
    exchange_seconds,
    extract_seconds,
    extracts_in_fp32,
    find_gpu,
    forward_seconds,
    is_whole,
    optimizer_seconds,
    overlaps,
    peak_bytes,
    seconds_between_machines,
    sharded_seconds,
    sharers,
    skeleton,
    sweep_seconds,
    training_seconds,
)
from plumbing import hub, parallel
from plumbing.config import check_capability, check_world_size, load, sections_of, words_and_options
from plumbing.files import UserError, table
from plumbing.tokenizer import Tokenizer
from plumbing.weights import check_sizes, has_weights, resolve

# ---------------------------------------------------------------- the counts


@dataclass(frozen=True)
class Estimate:
    """Rows of a hub dataset that is not on this machine, and their mean tokens."""

    rows: int
    prompt: int
    answer: int
    source: str


# num_examples and num_bytes are the dataset cards'. Assumed: 4 bytes a Llama-3 token, and how prompt and
# answers share the bytes.
ESTIMATES = {
    "allenai/tulu-3-sft-mixture": Estimate(
        939_343, 190, 560, "the card's rows and 3,102 bytes a row; assumed: 4 bytes a token"
    ),
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": Estimate(
        271_409,
        250,
        384,
        "the card's rows and 6,192 bytes a row (three prompts, two answers); assumed: 4 bytes a token",
    ),
    "allenai/tulu-3-sft-olmo-2-mixture-0225": Estimate(
        866_138, 190, 560, "rows as counted by others; tokens assumed, those of Tulu 3's mixture"
    ),
    "allenai/olmo-2-0425-1b-preference-mix": Estimate(
        378_341,
        302,
        440,
        "assumed: the 7B mix's rows, 7,239 bytes a row (three prompts, two answers) and 4 bytes a token",
    ),
    "PKU-Alignment/PKU-SafeRLHF": Estimate(
        12_000, 40, 110, "rows with one safe answer as in configs/pku_lora.py; tokens assumed"
    ),
}
# The sweep's labelled texts: of an axiom and label by mode, as aqi.py takes them. Assumed: as many axioms as
# were published, and the mean length of bench/sweep.py's prompts.
PROMPTS = {"sanity": 100, "full": 500, "paper": 2000}
AXIOMS, PROMPT_TOKENS = 7, 60
# Shapes of models that a plan may name without having them.
SHAPES = {
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "allenai/OLMo-2-0425-1B": "olmo-2-1b",
}


def find_model(stage, config, path):
    """(LlamaConfig, its folder or None, where it is from) of config.model_path.

    A folder that SFT has yet to write is taken to be as what SFT starts from. Nothing is downloaded, and of
    weights only headers are read. UserError when the shape is not known here, or a folder holds weights that
    a run would refuse; one without any .safetensors file is planned by its config.
    """
    folder = _folder(config.model_path)
    if folder is None and stage == "dpo" and "sft" in sections_of(path):
        before = load("sft", [path])
        if Path(config.model_path) == Path(before.out_dir) / "final":
            shape, folder, origin = find_model("sft", before, path)
            return shape, folder, f"{config.model_path}, to come from {origin}"
    if folder is not None:
        shape = LlamaConfig.from_hf(folder)
        if has_weights(folder):  # a config and a tokenizer alone can be planned
            check_sizes(shape, folder)
        return shape, folder, config.model_path
    name = hub.repository(config.model_path)
    if name not in SHAPES:
        known = f"a folder (its config.json is enough), or one of {', '.join(SHAPES)}"
        raise UserError(f"model_path={config.model_path!r}: not on this machine; expected {known}")
    return LlamaConfig.preset(SHAPES[name]), None, f"{config.model_path} (known shape; not on this machine)"


def _folder(model_path):
    if Path(model_path).is_dir():
        return resolve(model_path)  # refuses what a run would refuse
    name = hub.parse(model_path)
    if name is None:
        return None
    repository, revision = name
    # Looked at first, because what follows imports an HTTP client: a third of a second of a plan.
    if not Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}").is_dir():
        return None
    cached = huggingface_hub.try_to_load_from_cache(repository, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def count_data(stage, config, shape, folder, log=print):
    """(Pass over the training data, Pass over the held-out data or None, where the counts are from).

    Exact where tokenizer and rows are on this machine: the data is then tokenised into cache_dir, where the
    run will find it.
    """
    sources = list(config.data)
    if isinstance(config.data_eval, dict):
        sources += config.data_eval
    if folder is not None and all(Path(name.partition("[")[0]).exists() for name in sources):
        read = load_sft if stage == "sft" else load_preferences
        train, held_out = read(config, Tokenizer.from_dir(folder), log)
        return _pass_over(train, shape), held_out and _pass_over(held_out, shape), "exact: tokenised here"
    share = config.data_eval if isinstance(config.data_eval, float) else 0.0
    train = _estimated_pass(stage, config, config.data, 1 - share, shape)
    held_out = _estimated_pass(stage, config, config.data, share, shape) if share else None
    if isinstance(config.data_eval, dict):
        held_out = _estimated_pass(stage, config, config.data_eval, 1.0, shape)
    sourced = "; ".join(f"{name}: {ESTIMATES[hub.repository(name)].source}" for name in sources)
    return train, held_out, f"estimate, every example at the mean; {sourced}"


def _pass_over(dataset, shape):
    sides = [dataset.chosen, dataset.rejected] if hasattr(dataset, "chosen") else [dataset]
    return Pass.of(
        shape, [(side.lengths, side.num_targets) for side in sides], getattr(dataset, "prefixes", 0)
    )


def _estimated_pass(stage, config, data, share, shape):
    """Every example of `data` at the mean length, cut at max_seq_len."""
    lengths, targets, prefixes = [], [], []
    for name, amount in data.items():
        if (known := ESTIMATES.get(hub.repository(name))) is None:
            hint = f"a local file (with a model folder, for its tokenizer), or one of {', '.join(ESTIMATES)}"
            raise UserError(f"data {name!r}: cannot be counted here; expected {hint}")
        rows = int(share * (amount * known.rows if isinstance(amount, float) else amount))
        prompt = min(known.prompt, config.max_seq_len)
        length = min(known.prompt + known.answer, config.max_seq_len)
        lengths += [length] * rows
        targets += [length - prompt] * rows
        prefixes += [prompt] * rows
    if not lengths:
        raise UserError(f"data={data!r}: no rows; expected at least one")
    lengths, targets, prefixes = np.array(lengths), np.array(targets), np.array(prefixes)
    if stage == "sft":
        return Pass.of(shape, [(lengths, targets)])
    return Pass.of(shape, [(lengths, targets)] * 2, prefixes if config.share_prefix else 0)


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """One stage of a config on `count` GPUs of one kind. usd_per_hour: (low, high) of all of them."""

    stage: str
    config: object
    gpu_name: str
    count: int
    usd_per_hour: tuple[float, float]
    shape: LlamaConfig
    train: Pass
    held_out: Pass | None

    @property
    def gpu(self):
        return GPUS[self.gpu_name]

    @cached_property
    def model(self):
        return skeleton(self.shape, self.config)

    @cached_property
    def sizes(self):
        return Sizes.of(self.model)

    @property
    def steps(self):
        steps = self.config.num_epochs * steps_per_epoch(self.train.examples, self.config.global_batch_size)
        return min(steps, self.config.max_steps or steps)

    @property
    def trained(self):
        """The Pass over all examples of all steps."""
        n, batch = self.train.examples, self.config.global_batch_size
        epochs, steps = divmod(self.steps, steps_per_epoch(n, batch))
        return self.train.times(epochs + steps * batch / n)

    @property
    def microbatches(self):
        """Micro-batches of a step on one GPU, at the mean."""
        step = (
            self.train.tokens / self.train.examples * min(self.config.global_batch_size, self.train.examples)
        )
        return step / (self.count * self.config.tokens_per_microbatch)

    @property
    def peak(self):
        """(moment, {term: bytes}) on one GPU.

        For a full micro-batch of the data's mean share of answers and prefixes.
        """
        # a step that fills half of one micro-batch at the mean may now and then need two
        accumulates = self.microbatches > 0.5
        return peak_bytes(
            self.shape, self.resolved, self.sizes, self.sharers, *self.stream, accumulates=accumulates
        )

    @property
    def stream(self):
        """Tokens, targets and keys of a full micro-batch."""
        tokens = self.config.tokens_per_microbatch
        targets = round(tokens * self.train.targets / self.train.tokens)
        keys = round(tokens * self.train.keys / self.train.tokens)
        return tokens, targets, keys

    @cached_property
    def resolved(self):
        """The config with what sharding="auto" stands for on these GPUs."""
        card = self.gpu.gib * GIB
        sharding = choose_sharding(self.shape, self.config, self.sizes, self.count, MACHINE, card)
        return dataclasses.replace(self.config, sharding=sharding)

    @property
    def is_whole(self):
        """Whether each GPU holds the whole model."""
        return is_whole(self.resolved, self.count)

    @property
    def sharers(self):
        """GPUs that share out one copy of the state, and exchange it in every micro-batch or step."""
        return sharers(self.resolved, self.count)

    @property
    def gib(self):
        """GiB on one GPU, CUDA's own included."""
        return sum(self.peak[1].values()) / GIB + CONTEXT_GIB

    @property
    def fits(self):
        return self.gib <= self.gpu.gib

    @property
    def turns(self):
        """Micro-batches of a step on one GPU, the last one partial."""
        return math.ceil(self.microbatches)

    @property
    def gathered(self):
        """Bytes of all weights, as they are gathered for a pass."""
        return compute_width(self.config) * (self.sizes.trained + self.sizes.frozen)

    @property
    def step(self):
        """(seconds of one GPU's computing, seconds of its exchange with the other sharers) in one step.

        The optimizer's are not counted, nor those between machines that hold copies.
        """
        compute = training_seconds(self.trained, self.model, self.config, self.gpu) / self.count / self.steps
        if self.is_whole:  # gradients are summed and weights sent once a step
            weights = 4 if self.config.lora_rank else compute_width(self.config)
            gradients = {"fp32": 4, "bf16": 2}[self.config.gradients]
            return compute, exchange_seconds((weights + gradients) * self.sizes.trained, self.count, self.gpu)
        # weights are gathered for the forward and again for the backward, gradients summed in float32
        size = 2 * self.gathered + 4 * self.sizes.trained
        return compute, self.turns * exchange_seconds(size, self.sharers, self.gpu)

    @property
    def between_machines(self):
        """Seconds of a step in which machines that each hold all of the model sum their gradients.

        FSDP2 does so during the last backward pass; nothing is known of how much that hides.
        """
        return seconds_between_machines(
            4 * self.sizes.trained / self.sharers, self.count / self.sharers, self.gpu
        )

    @property
    def seconds(self):
        """{part: seconds}."""
        training = sharded_seconds(*self.step, self.resolved, self.count, self.gpu) + self.between_machines
        parts = {
            "training": self.steps * training,
            "optimizer": self.steps * optimizer_seconds(self.resolved, self.sizes, self.sharers, self.gpu),
        }
        if self.stage == "dpo" and self.config.needs_reference:
            # pairs of the first epoch that some step trains
            seen = min(1.0, self.trained.examples / self.train.examples)
            parts["reference log-probs"] = self._without_gradients(self.train.times(seen))
            if self.held_out:
                parts["reference log-probs"] += self._without_gradients(self.held_out)
        if self.held_out:
            every = self.config.eval_every
            evaluations = 2 + ((self.steps - 1) // every if every else 0)
            parts["evaluation"] = evaluations * self._without_gradients(self.held_out)
        return parts

    def _without_gradients(self, work):
        """Seconds of a pass that only reads the weights."""
        passes = 0 if self.is_whole else work.examples / self.config.global_batch_size * self.turns
        exchange = passes * exchange_seconds(self.gathered, self.sharers, self.gpu)
        compute = forward_seconds(work, self.shape, self.gpu) / self.count
        return sharded_seconds(compute, exchange, self.resolved, self.count, self.gpu)

    @property
    def speedup(self):
        """Times as fast as one such GPU that held the same."""
        return self.turned(count=1).hours / self.hours

    @property
    def hours(self):
        return sum(self.seconds.values()) / 3600

    @property
    def usd(self):
        """(low, high)."""
        return tuple(self.hours * price for price in self.usd_per_hour)

    def turned(self, count=None, **keys):
        """This plan with other keys of the config, or on another number of GPUs at the same price each."""
        count = count or self.count
        prices = tuple(price * count / self.count for price in self.usd_per_hour)
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, **keys), count=count, usd_per_hour=prices
        )


def remedies(plan):
    """[(what to turn, Plan)] for a plan that does not fit, in the order to try.

    Each keeps what was turned before, up to the first that fits. Where none does, on top of them LoRA, or the
    fewest GPUs that do.
    """
    config, longest = plan.config, plan.config.max_seq_len * (2 if plan.stage == "dpo" else 1)
    exact = {"moments": "fp32", "gradients": "fp32"}  # what LoRA and FSDP2 ask for
    knobs = []
    for mode in ("half", "full")[("none", "half", "full").index(config.recompute) :]:
        knobs.append({"recompute": mode})
    if config.tokens_per_microbatch > longest:
        knobs.append({"tokens_per_microbatch": longest})
    if plan.count == 1 and not config.lora_rank and config.precision != "fp32" and config.sharding != "full":
        knobs += [{name: "bf16"} for name in exact if getattr(config, name) == "fp32"]
    if plan.count > 1 and plan.resolved.sharding != "full":
        # first; last where it takes back what was asked for
        asks_for_bf16 = any(getattr(config, name) == "bf16" for name in exact)
        knobs.insert(len(knobs) if asks_for_bf16 else 0, {"sharding": "full"} | exact)
    tried = []
    for keys in knobs:
        typed, plan = _typed(plan, keys), plan.turned(**keys)
        tried.append((typed, plan))
        if plan.fits:
            return tried
    if not config.lora_rank:
        lora = {"lora_rank": 64, "lora_alpha": 128} | exact
        tried.append((f"or {_typed(plan, lora)}", plan.turned(**lora)))
    count = plan.count
    while (count := 2 * count) <= config.global_batch_size:
        more = plan.turned(count=count, **exact)
        if more.fits:
            return tried + [(f"or --count {count} {_typed(plan, exact)}".rstrip(), more)]
    return tried


def _typed(plan, keys):
    """The arguments that give a plan these keys: those of them that it has not."""
    return " ".join(f"--{key}={value}" for key, value in keys.items() if getattr(plan.config, key) != value)


def make(stage, path, overrides, gpu, count, usd_per_hour=None, log=print):
    """(Plan, where the model's shape is from, where the counts are from) of one stage of a config file.

    overrides: `--key=value` arguments. usd_per_hour: of all GPUs together; None: the range of GPUS.
    ValueError as a run's, and for a model or data of which nothing is known here.
    """
    card, config = find_gpu(gpu), load(stage, [path, *overrides])
    check_world_size(config, count, min(count, MACHINE))
    check_capability(config, card.capability, gpu)
    shape, folder, origin = find_model(stage, config, path)
    shape.require_length(config.max_seq_len)
    train, held_out, counted = count_data(stage, config, shape, folder, log)
    prices = (usd_per_hour, usd_per_hour)
    if usd_per_hour is None:
        prices = tuple(price * count for price in card.usd_per_hour)
    return Plan(stage, config, gpu, count, prices, shape, train, held_out), origin, counted


# ---------------------------------------------------------------- the text


def describe(plan, origin, counted):
    """The lines of `--plan`."""
    config, sizes, work = plan.config, plan.sizes, plan.trained
    flops = training_flops(plan.model, work.flops, work.attention, work.tokens)
    kind, total = ("pairs" if plan.stage == "dpo" else "documents"), sizes.trained + sizes.frozen
    lines = [
        f"{plan.stage} on {plan.count} x {plan.gpu_name}: a plan by arithmetic, nothing is run",
        f"model    {total:,} parameters, {sizes.trained:,} of them trained; {origin}",
        f"data     {plan.train.examples:,} {kind}, {plan.train.tokens:,} tokens an epoch, "
        f"{plan.train.targets:,} supervised",
        f"         {counted}",
        f"steps    {plan.steps:,} of {config.global_batch_size} {kind}; {work.tokens:,.0f} tokens in all",
        f"FLOPs    {flops / work.tokens / 1e9:.2f} G a token, {flops:.3g} in all (the model's; recompute "
        "is time, not work)",
    ]
    return "\n".join([*lines, *_memory_lines(plan), *_disk_lines(plan), *_time_lines(plan)])


def _disk_lines(plan):
    """A checkpoint, and what the run folder holds at its largest: while one is written, and at the end."""
    checkpoint, model = checkpoint_bytes(plan.config, plan.sizes), plan.gathered
    saves = plan.config.save_every or plan.config.save_minutes
    kept = plan.config.keep_last + 1 if saves else 1
    width = checkpoint // plan.sizes.trained
    each = f"a checkpoint {checkpoint / 1e9:.1f} GB, {width} bytes a trained parameter"
    folder = f"the run folder up to {(kept * checkpoint + model) / 1e9:.0f} GB with final/"
    return [f"disk     {each}; {folder}"]


def _memory_lines(plan):
    moment, terms = plan.peak
    tokens = f"{plan.config.tokens_per_microbatch:,} tokens, recompute={plan.config.recompute}"
    lines = [f"memory   of one GPU at its peak, {moment}, {tokens}:"]
    for term, size in terms.items():
        lines.append(f"         {size / GIB:7.2f} GiB  {term}")
    lines.append(f"         {CONTEXT_GIB:7.2f} GiB  CUDA")
    lines.append(f"         {plan.gib:7.2f} GiB  of {plan.gpu.gib} GiB: {_verdict(plan)}")
    if plan.fits:
        return lines
    lines.append("turn, in this order, each together with those above it (a key twice: the later value):")
    tried = remedies(plan)
    width = max([34, *(len(what) for what, _ in tried)])
    for what, other in tried:
        lines.append(f"         {what:<{width}} {other.gib:7.2f} GiB  {_price(other)}; {_verdict(other)}")
    if not any(other.fits for _, other in tried):
        lines.append(
            f"         nothing that this program has makes it fit on {plan.gpu_name}: take a larger GPU"
        )
    return lines


def _time_lines(plan):
    seconds, config = plan.seconds, plan.config
    spent = ", ".join(f"{part} {_duration(value)}" for part, value in seconds.items())
    unless = "" if plan.fits else "if it did fit: "
    source = "an estimate: H200 measurements scaled by the datasheets"
    if plan.gpu_name == "h200":
        source = "calibrated on an H200"
    lines = [f"time     {unless}{spent}"]
    lines += [f"         {plan.trained.tokens / seconds['training']:,.0f} tokens/s in training; {source}"]
    lines += _scaling_lines(plan) if plan.count > 1 else []
    if config.precision == "fp32":
        lines.append(
            "         precision='fp32' does not run on the bf16 matmul units: expect several times these "
            "hours"
        )
    if config.precision == "fp8":
        lines.append("         precision='fp8' is planned as bf16: expect fewer hours on Hopper")
    assumed = " (assumed: see --usd-per-hour)" if plan.usd_per_hour[0] < plan.usd_per_hour[1] else ""
    lines += [
        f"total    {unless}{_price(plan)}, at {_usd(plan.usd_per_hour)} an hour for {plan.count} x "
        f"{plan.gpu_name}{assumed}"
    ]
    lines += [
        "         not counted: loading, tokenising, checkpoints (in the background, after a copy to host "
        "memory), the final save,"
    ]
    lines.append("         and ranks that wait for the longest stream of a micro-batch")
    return [
        *lines,
        "         SFT, DPO, extract and sweep with one total: python -m planner.plan CONFIG --gpu NAME "
        "--count N",
    ]


def _scaling_lines(plan):
    """How many GPUs compare with one, and what their link takes of a step."""
    compute, exchange = plan.step
    share = f"{plan.speedup:.2f} times one {plan.gpu_name}, {plan.speedup / plan.count:.0%} of {plan.count}"
    fitted = "fitted to 2 and 4 x H200 over NVLink"
    if plan.gpu_name != "h200" or plan.count not in (2, 4):
        fitted += ", other cards and counts not measured"
    lines = [f"scaling  {share}, sharding={plan.resolved.sharding}; {fitted}"]
    times = f"exchange {exchange:.2f} s a step beside {compute:.2f} s of computing"
    if not overlaps(plan.gpu, plan.sharers):
        times += ": the GPUs wait for it, as far as is known"
    else:
        times += ": hidden behind it" if exchange < compute else ": the GPUs wait for it"
    lines.append(f"         {_link(plan)}: {times}")
    if not overlaps(plan.gpu, plan.sharers):
        where = "where that was measured, over NVLink in one machine"
        lines.append(f"         assumed: an exchange overlaps only {where}")
    if plan.between_machines:
        link = f"{plan.gpu.network_gb_s} GB/s a card between machines of {MACHINE}"
        summed = f"gradients are summed in {plan.between_machines:.2f} s a step"
        lines.append(f"         {link} (assumed): {summed}; hybrid was not measured")
    if plan.speedup < 1:
        lines.append(
            f"         SLOWER THAN ONE {plan.gpu_name}: larger steps or --lora_rank exchange less; NVLink "
            "cards exchange faster"
        )
    return lines


def _link(plan):
    """The slowest link between GPUs that share out one copy of the state, with its rate."""
    gpu = plan.gpu
    if plan.sharers > MACHINE:
        return f"machines of {MACHINE}, {gpu.network_gb_s} GB/s a card between them (assumed)"
    return f"{'PCIe' if gpu.pcie else 'NVLink'}, {gpu.link_gb_s} GB/s by the datasheet"


def _verdict(plan):
    spare = plan.gpu.gib - plan.gib
    if spare < 0:
        return f"does not fit, {-spare:.1f} GiB too much"
    if spare > ERROR * plan.gib:
        return "fits"
    return f"fits with {spare:.1f} GiB to spare: tight, within the error of this estimate"


def _price(plan):
    return f"{plan.hours:.2f} h, {_usd(plan.usd)}"


def _usd(prices):
    low, high = prices
    return f"${low:,.2f}" if low == high else f"${low:,.2f}-{high:,.2f}"


def _duration(seconds):
    if seconds >= 360:
        return f"{seconds / 3600:.2f} h"
    if seconds >= 6:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.2f} s"


# ---------------------------------------------------------------- the command line


def main(stage, argv):
    """Print the plan of `train_<stage>.py CONFIG.py --plan --gpu NAME --count N`; returns 0.

    Also read: [--usd-per-hour X] [--key=value ...].
    """
    options, rest = _options(argv)
    paths, overrides = words_and_options(rest)
    if len(paths) != 1:
        raise UserError(
            f"expected one config file, got {paths}: train_{stage}.py CONFIG.py --plan --gpu NAME --count N"
        )
    print(describe(*make(stage, paths[0], overrides, options.gpu, options.count, options.usd_per_hour)))
    return 0


def ladder(argv):
    """Print the stages of each config of `python -m planner.plan CONFIG.py ...`; returns 0.

    Further arguments: --gpu NAME --count N [--usd-per-hour X].
    """
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    options, paths = _options(argv)
    if not paths or any(path.startswith("-") for path in paths):
        raise UserError(f"expected config files, --gpu, --count and --usd-per-hour, got {paths}")
    find_gpu(options.gpu)
    prices = f"at {options.usd_per_hour} USD an hour"
    if options.usd_per_hour is None:
        prices = "prices are assumed: see --usd-per-hour"
    print(f"{options.count} x {options.gpu}; tokens* are estimates; {prices}")
    rows = []
    for path in paths:
        rows += _rows(path, options)
    print(
        table(["config", "stage", "steps", "tokens", "GiB", "hours", "cost", "memory"], rows, left=(0, 1, -1))
    )
    return 0


def _rows(path, options):
    """The table's lines of one config.

    Both trainings, the vector and the sweep of steer.py validate, and their total.
    """
    stages = [stage for stage in ("sft", "dpo") if stage in sections_of(path)]
    if not stages:
        return [[path, *[""] * 6, "not a training config"]]
    rows, plans = [], {}
    for stage in stages:
        try:
            plan, _, counted = make(
                stage, path, [], options.gpu, options.count, options.usd_per_hour, log=lambda line: None
            )
        except UserError as error:  # one config's; the others have their lines
            rows.append([path, stage, *[""] * 5, f"error: {error}"])
            continue
        plans[stage] = plan
        tokens = f"{plan.trained.tokens:,.0f}{'' if counted.startswith('exact') else '*'}"
        verdict = _verdict(plan)
        if plan.count > 1 and plan.speedup < 1:
            verdict += f"; slower than one {plan.gpu_name}"
        rows.append(
            [
                path,
                stage,
                f"{plan.steps:,}",
                tokens,
                f"{plan.gib:.1f}",
                f"{plan.hours:.2f}",
                _usd(plan.usd),
                verdict,
            ]
        )
    if len(plans) < 2:
        return rows
    return rows + _steering_rows(path, plans)


def _steering_rows(path, plans):
    """Lines of the passes of steer.py validate, and the total of all stages.

    plans: {stage: Plan} of the trainings.
    """
    from analysis.nulls import null_count  # here: `--plan` of a training starts without it

    dpo = plans["dpo"]
    hours, rows = sum(plan.hours for plan in plans.values()), []
    all_fit = all(plan.fits for plan in plans.values())
    config, measure = load("steer", [path]), load("aqi", [path])
    nulls, mean = measure.nulls or null_count(config.mode), dpo.train.keys // (2 * dpo.train.examples)
    passes = steering_passes(config, dpo.shape, dpo.gpu, mean, nulls, measure.oracle)
    for stage, (tokens, seconds, width) in passes.items():
        hours += seconds / 3600
        gib = width * (dpo.sizes.trained + dpo.sizes.frozen) / GIB + CONTEXT_GIB  # one model at a time
        said = "on one GPU" if gib < dpo.gpu.gib else f"does not fit, {gib - dpo.gpu.gib:.1f} GiB too much"
        all_fit &= gib < dpo.gpu.gib
        # The others are rented meanwhile.
        price = _usd([seconds / 3600 * price for price in dpo.usd_per_hour])
        rows.append([path, stage, "", f"{tokens:,.0f}*", f"{gib:.1f}", f"{seconds / 3600:.2f}", price, said])
    total = _usd([hours * price for price in dpo.usd_per_hour])
    said = f"{'' if all_fit else 'if it did fit; '}loading, tokenising and saving not counted"
    return [*rows, [path, "total", "", "", "", f"{hours:.2f}", total, said]]


def steering_passes(config, shape, gpu, text_tokens, nulls, oracle):
    """{stage: (tokens read, seconds, bytes of a weight)} of the section steer, on one GPU.

    shape: the config of the pair's models, of any family; text_tokens: mean of a text of the vector; nulls:
    random directions of each kind; oracle: whether a sweep finds the best direction. extract reads both texts
    of every pair with both models; sweep reads the prompts as `sweep_forwards` says.
    """
    extracted = 2 * 2 * vector_texts(config) * min(config.max_text_tokens, text_tokens)
    prompts = 2 * AXIOMS * PROMPTS[config.mode] * PROMPT_TOKENS
    swept = prompts * sweep_forwards(config, shape.num_hidden_layers, nulls, oracle)
    width = 4 if extracts_in_fp32(shape, gpu) else 2
    return {
        "extract": (extracted, extract_seconds(shape, extracted, gpu), width),
        "sweep": (swept, sweep_seconds(shape, swept, gpu), 2),
    }


def sweep_forwards(config, layers, nulls, oracle):
    """Full forward passes over the prompts that a sweep's blocks amount to. layers: the model's.

    One each of the DPO model and the untrained network; one for the curve, and the top blocks for each
    lambda; one for each of two kinds of null directions, and the top blocks for each direction at the first
    and the last lambda, where 0 is one point for all. With `oracle`, one half of the prompts is read once and
    three times by the top blocks in each step of the ascent, the other once and by them for each lambda; that
    was not timed. Not counted: answers and held-out texts.
    """
    from analysis.oracle import STEPS  # here: `--plan` of a training starts without it

    # What runs again is the blocks above the first steered one. Adding directions and pooling take about one
    # block more: on an H200, 7,000 prompts of the 8B shape, 99 nulls of one kind took 151.7 s, planned 155.9.
    again = min(config.layers, layers) / layers
    directions = sum(nulls if strength else 1 for strength in (config.lambdas[0], config.lambdas[-1]))
    forwards = 2 + (1 + len(config.lambdas) * again) + 2 * (1 + directions * again)
    if oracle:  # the ascent begins with a step at no steering
        forwards += 1 + (3 * (STEPS + 1) + len(config.lambdas)) / 2 * again
    return forwards


def vector_texts(config):
    """Texts of each side that extract reads: as many as the vector's, and a quarter that is held out."""
    from analysis.vector import MODES  # here: `--plan` of a training starts without it

    count = config.count or MODES[config.mode]
    return count + max(1, count // 4)


def _options(argv):
    """(gpu, count, usd_per_hour; the other arguments). ValueError naming what is missing or wrong."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpu")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--usd-per-hour", type=float)
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if options.count < 1:
        raise UserError(f"count={options.count}: expected at least 1 GPU")
    if options.usd_per_hour is not None and not 0 <= options.usd_per_hour < math.inf:
        raise UserError(
            f"usd-per-hour={options.usd_per_hour}: expected a price of 0 or more, of all GPUs together"
        )
    return options, rest


if __name__ == "__main__":
    sys.exit(parallel.run(ladder, sys.argv[1:]))
