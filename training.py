"""What both training scripts do around their loss.

That is everything before the first step, the update, samples and the end. Reading order: start and Run,
loading a model, sampling, saving.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import TEMPLATES, count_trained_openings, end_of_turn, resolve_template
from model import (
    Llama,
    LlamaConfig,
    apply_fused,
    apply_lora,
    apply_recompute,
    generate,
    init_lora,
    training_flops,
)
from optim import (
    adamw,
    apply_gradients,
    implicit,
    keep_masters,
    learning_rate,
    sample_weights,
    warmup_steps,
    weights_changed,
)
from packing import steps_per_epoch
from planner import budget
from plumbing import hub, parallel, restarts, watchdog
from plumbing.adapters import save_adapter
from plumbing.checkpoint import Checkpointer
from plumbing.config import (
    Config,
    check_capability,
    check_packages,
    check_world_size,
    config_dict,
    resume_dict,
    unused_flash4,
)
from plumbing.files import UserError, read_json, remove_tree, write_json
from plumbing.lock import lock
from plumbing.logbook import Logbook
from plumbing.tokenizer import Tokenizer
from plumbing.weights import (
    check_sizes,
    check_vocabulary,
    fingerprint,
    load_weights,
    resolve,
    save_pretrained,
)
from reports import card

# fp8: float8 lives inside the blocks' matmuls only
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
SAMPLE_PROMPTS, SAMPLE_TOKENS = 4, 64


# ---------------------------------------------------------------- a run


@dataclass
class Run:
    """A run between `start` and `finish`. Every rank has one; all of them call its methods together."""

    config: Config
    world: parallel.World
    tokenizer: Tokenizer
    model: Llama
    optimizer: torch.optim.Optimizer
    data: object  # data.Documents or data.Pairs, in the order of their rows
    held_out: object  # the same, or None
    weights: str  # sha256 of the step-0 weights
    total_steps: int
    warmup: int  # steps
    checkpointer: Checkpointer
    latest: Path | None  # the checkpoint that the run goes on from
    log: Logbook
    stop: parallel.StopSignal | None = None  # listens from `resume` on
    saved_at: float = 0.0  # by time.monotonic: of the last checkpoint, or of the start

    @property
    def pace(self):
        """Text: examples a step, steps, ranks."""
        where = f"on {self.world.size} rank(s) of {self.world.device.type}"
        return f"{self.config.global_batch_size} a step; {self.total_steps} steps {where}"

    def resume(self):
        """Load the latest checkpoint, if there is one; return the number of optimizer steps done."""
        done = 0
        if self.latest:
            done = self.checkpointer.load(self.latest, self.model, self.optimizer)
            # an earlier one, where the newest was damaged
            self.latest = self.latest.with_name(f"step_{done:06d}")
        self.log.resume_at(done, self.latest)
        self.stop = parallel.StopSignal()
        self.saved_at = time.monotonic()
        return done

    def evaluates_before(self, step):
        """Whether the held-out data are evaluated before optimizer step `step` (0-based)."""
        every = self.config.eval_every
        is_due = step == 0 or (every is not None and step % every == 0)
        return self.held_out is not None and is_due

    def sample(self, step, documents):
        """Answers to the first prompts of `documents` after `step` optimizer steps, where they are due."""
        every = self.config.sample_every
        if every and (step % every == 0 or step == self.total_steps):
            self.log.samples(step, *sample(self.model, documents, self.tokenizer, self.config))

    def update(self, step, metrics, ids):
        """Clip, take one step of AdamW at the schedule's rate, and print the step line.

        ids (B,): the examples of the gradient.
        """
        lr = learning_rate(step, self.total_steps, self.config.lr, self.config.lr_schedule, self.warmup)
        # Once, at the peak rate: of weights that are only bf16, a step of 5e-7 moves under 1 %.
        before = sample_weights(self.model) if step == self.warmup else None
        norm = apply_gradients(self.optimizer, lr, self.config.max_grad_norm, self.data.row_ids[ids])
        metrics = metrics | {"grad_norm": norm, "lr": lr}
        if before:
            metrics["weights_changed"] = weights_changed(before, self.model)
        # of the whole step, from lengths alone: no rank has to ask the others what they computed
        tokens = self.data.lengths[ids].sum()
        forward = self.data.flops(self.model.config, ids).sum()
        attention = self.data.attention_flops(self.model.config, ids).sum()
        flops = training_flops(self.model, forward, attention, tokens)
        self.log.step(step + 1, metrics, tokens, flops)

    def save(self, step):
        """Write a checkpoint after `step` steps, where one is due.

        Returns the exit code of a run that was told to stop, else 0.
        """
        self.checkpointer.check()
        # Every rank must take the same branch here: a save is collective.
        stopped = self.stop.received()
        if stopped or self.is_save_due(step):
            self.checkpointer.save(step, self.model, self.optimizer)
            self.saved_at = time.monotonic()
        if stopped or step == self.total_steps:
            self.checkpointer.wait()
        if not stopped:
            return 0
        goes_on = "saved; the same command goes on from there"
        self.world.say(f"stopped by signal {stopped} after step {step}, {goes_on}")
        return 128 + stopped

    def is_save_due(self, step):
        """Whether save_every or save_minutes asks for a checkpoint after `step` steps.

        The last step has one if any has.
        """
        every, minutes = self.config.save_every, self.config.save_minutes
        if every is None and minutes is None:
            return False
        if step == self.total_steps or (every and step % every == 0):
            return True
        if minutes is None:
            return False
        passed = parallel.max_across_ranks(time.monotonic() - self.saved_at)  # ranks measure it a bit apart
        return passed >= 60 * minutes

    def finish(self):
        """Export the model, record its hash, write its card, and push it if asked to.

        Returns 0, or the exit code of a run that was told to stop meanwhile, which has not pushed.
        """
        final = save_model(self.model, self.tokenizer, self.config)
        self.world.say(f"wrote {final}")
        watchdog.stop()  # an upload may take hours
        if self.world.main:
            out_dir = Path(self.config.out_dir)
            if not self.config.lora_rank and (out_dir / "adapter").is_dir():
                remove_tree(out_dir / "adapter")  # an earlier run's (--fresh): it would be pushed with final/
            manifest = out_dir / "manifest.json"
            # what was trained from this model, or steered along it, names this hash: the ladder joins them
            write_json(manifest, read_json(manifest) | {"exported": fingerprint(final)})
            card.write(self.config.out_dir)
            # last: a run that is killed before this line is exported again by the same command
            write_json(manifest, read_json(manifest) | {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        if stopped := self.stop.end():
            self.world.say(f"stopped by signal {stopped} after the export; nothing is pushed")
            return 128 + stopped
        if self.world.main:
            push_if_asked(self.config)
        return 0


def start(stage, config, load_data, facts):
    """Everything before the first step, in the order of its price.

    What can fail fails before what takes long. load_data: data.load_sft or data.load_preferences. facts: what
    only the stage knows, for the manifest. Returns a Run whose checkpoint is found and not yet loaded: DPO
    needs the step-0 weights first.
    """
    # First what takes milliseconds: names, keys, headers; then data and weights, which take minutes.
    # main_first: rank 0 does what writes to a shared disk, and the others find it done.
    world = parallel.init(config.deterministic)
    # Every rank reads the config by itself: ranks with two rates, say, would train a mixture of two runs.
    parallel.require_same(world, **config_dict(config))
    check_world_size(config, world.size, parallel.machine_size())
    watchdog.start(world, 0, watchdog.PREPARING)
    if config.fresh and restarts.started_over(config.out_dir, world):
        world.say("--fresh: not again, this is a restart; the run goes on from its checkpoints")
        config = dataclasses.replace(config, fresh=False)
    if config.push:  # a wrong name or token is found out before training, not after it
        parallel.main_first(world, lambda: hub.open_for_push(config.push) if world.main else None)

    directory = parallel.main_first(world, lambda: resolve(config.model_path))
    tokenizer = Tokenizer.from_dir(directory)
    model_config = parallel.main_first(
        world, lambda: read_model_config(config, directory, tokenizer, world.device)
    )
    if world.device.type == "cuda":
        if hint := unused_flash4(config, torch.cuda.get_device_capability(world.device)):
            world.say(hint)
    # Before anything is written: a second process on this folder ends here, naming the first.
    parallel.main_first(world, lambda: lock(config.out_dir, "stage") if world.main else None)
    data, held_out = parallel.main_first(world, lambda: load_data(config, tokenizer, world.say))
    watchdog.start(world, 0)
    if world.main:
        say_padding(model_config.pad_token_id, data, world)
    model = load_model(config, directory, model_config, world.device)

    steps_of_epochs = config.num_epochs * steps_per_epoch(len(data), config.global_batch_size)
    total_steps = min(steps_of_epochs, config.max_steps or math.inf)
    warmup = warmup_steps(config, total_steps)
    optimizer = adamw(model, config.weight_decay, DTYPES[config.moments])

    # What a run is: the settings that change its numbers, and hashes of its weights and data. A checkpoint of
    # another identity is refused, so the same command always goes on with what it began. This comes after the
    # model: --fresh deletes checkpoints, and should not for a run that then finds no memory.
    # One rank a machine hashes: where disks are not shared, one path may hold two models.
    found = fingerprint(directory) if parallel.first_of_machine() else None
    weights = parallel.from_main(world, lambda: found)
    data_eval = held_out and held_out.fingerprint
    parallel.require_same(world, weights=found or weights, data=data.fingerprint, data_eval=data_eval)
    provenance = {"weights": weights, "data": data.fingerprint, "held_out": data_eval}
    identity = resume_dict(config) | provenance
    checkpointer = Checkpointer(config.out_dir, config.keep_last, identity, fresh=config.fresh)
    parallel.background_work.append(checkpointer.wait)
    if config.fresh:
        restarts.record(config.out_dir, world)
    latest = checkpointer.latest()  # another configuration's is refused before anything is written over
    if done := parallel.from_main(world, checkpointer.finished):
        world.say(done)
        if world.main:
            push_if_asked(config)
        raise SystemExit(0)
    parallel.require_same(world, checkpoint=str(latest))  # else each would go on from what it found
    # what no key states: two runs with equal keys and unequal numbers differ in one of these
    manifest = provenance | {"stage": stage, "warmup_steps": warmup, **implicit(config, model), **facts}
    if held_out:
        trained = count_trained_openings(data, held_out)
        manifest["held_out_rows"] = {"all": len(held_out), "with_a_trained_prompt": trained}
    log = Logbook(config, world, total_steps, manifest)
    return Run(config, world, tokenizer, model, optimizer, data, held_out, weights, total_steps, warmup,
               checkpointer, latest, log)  # fmt: skip


def push_if_asked(config):
    """Upload the run to the hub repository that --push names, if it names one."""
    if config.push:
        hub.push(config.out_dir, config.push)
        print(f"pushed to {config.push}", flush=True)


def say_padding(pad_token_id, data, world):
    """One line where transformers trains another model: the embedding of pad_token_id has no gradient there.

    Here nothing is padded, and the id, often EOS, has the gradient that the loss gives it.
    """
    if pad_token_id is None:
        return
    sides = [data.chosen, data.rejected] if hasattr(data, "chosen") else [data]
    count = sum(np.count_nonzero(side.input_ids == pad_token_id) for side in sides)
    if count:
        theirs = "transformers gives its embedding no gradient, here it has the loss's (docs/loss.md)"
        world.say(f"pad_token_id={pad_token_id} occurs {count:,} times in the data: {theirs}")


def sum_losses(losses):
    """The step's loss, over all ranks, of this rank's [(loss of a micro-batch, its row ids)].

    FloatingPointError, naming the rows, when one is not finite: no weight has changed then.
    """
    # One copy to the host a step: asking each loss as it is made would stop the GPU at every micro-batch.
    values = torch.stack([loss for loss, _ in losses]).tolist()
    parallel.require_finite(values, [rows for _, rows in losses])
    (total,) = parallel.sum_across_ranks([math.fsum(values)])
    return total


# ---------------------------------------------------------------- loading a model


def read_model_config(config, directory, tokenizer, device):
    """The LlamaConfig of a Hugging Face folder.

    No weight is read: tokenising, which takes minutes, comes after this. UserError when a GPU is too old or a
    package missing for a key, tokenizer and model do not fit together, a weight file is missing or cut short,
    or the model cannot read documents of max_seq_len, run in fused blocks or multiply in float8.
    """
    if device.type == "cuda":
        check_capability(config, torch.cuda.get_device_capability(device))
    check_packages(config)  # behind it: no package mends an older card
    # Everything below reads headers only, a few KB, however large the model.
    model_config = LlamaConfig.from_hf(directory)
    check_sizes(model_config, Path(directory))
    check_vocabulary(model_config, tokenizer)
    model_config.require_length(config.max_seq_len)
    if config.precision == "fp8":
        check_float8(model_config)
    return model_config


def load_model(config, directory, model_config, device):
    """The model of a Hugging Face folder, ready to train.

    In this order: LoRA, kernels, recompute, sharding, then the weights. Nothing is allocated before it is
    sharded (plumbing/parallel.py says how). Parameters are float32: as split masters where a rank holds the
    whole model and does not compute in fp32. Under LoRA the frozen weights are kept in the compute precision.
    model_config: of read_model_config. UserError when the folder's weights do not fit it.
    """
    # On the meta device a parameter has a shape and no memory: 70B are laid out in milliseconds, and a rank
    # only ever allocates its own rows.
    with torch.device("meta"):
        model = Llama(model_config).to(DTYPES[config.precision])
        if config.lora_rank:
            apply_lora(model, config.lora_rank, config.lora_alpha, targets=config.lora_targets)
    # The order matters: kernels replace forwards, recompute wraps those, sharding wraps the result.
    sharding = pick_sharding(config, model, device)
    uses_fsdp = sharding in ("full", "hybrid")
    if uses_fsdp and not config.lora_rank:
        model.float()
    model.attention_kernel = config.attention
    if config.kernels == "fused":
        apply_fused(model, fp8=config.precision == "fp8")
    apply_recompute(model, config.recompute)
    if uses_fsdp:
        parallel.shard(model, config.precision, sharding)
    parallel.materialize(model, device)
    if sharding == "optimizer":
        parallel.share_optimizer(model)
    # LoRA's adapters are float32 by themselves, and its frozen weights are never updated.
    if next(model.parameters()).dtype == torch.bfloat16 and not config.lora_rank:
        keep_masters(model, DTYPES[config.gradients])
    # Before load_weights, which starts to send what is trained.
    init_lora(model, config.seed, parallel.assign)
    load_weights(model, directory)
    return model


def pick_sharding(config, model, device):
    """What the ranks share out: config.sharding, or what "auto" stands for here; "none" on one process.

    The same on every rank, and said once. model: on the meta device, with its adapters. Without a GPU, "auto"
    is "optimizer".
    """
    count = parallel.world_size()
    if count == 1:
        return "none"
    card = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else math.inf
    card = -parallel.max_across_ranks(-card)  # the smallest decides for all
    sizes, machine = budget.Sizes.of(model), parallel.machine_size()
    sharding = budget.choose_sharding(model.config, config, sizes, count, machine, card)
    if config.sharding == "auto":
        where = f"GPUs of {card / budget.GIB:.1f} GiB" if card < math.inf else "CPUs"
        parallel.say(f"sharding={sharding}, picked for {where}")
    return sharding


def check_float8(model_config):
    """UserError where precision="fp8" cannot run: sizes that are not multiples of 16."""
    queries = model_config.num_attention_heads * model_config.head_dim
    keys = model_config.num_key_value_heads * model_config.head_dim
    sizes = (model_config.hidden_size, model_config.intermediate_size, queries, keys)
    # torch._scaled_mm takes no other sizes.
    if any(size % 16 for size in sizes):
        expected = "expected linears whose sizes are multiples of 16"
        raise UserError(f"precision='fp8': {expected}, the model has {sizes}")


# ---------------------------------------------------------------- sampling and saving


def sample(model, documents, tokenizer, config):
    """(prompts, answers), as texts: the first different prompts of `documents`, answered greedily.

    There are SAMPLE_PROMPTS of them. A prompt ends before a document's first trained token; an answer ends
    before the end-of-turn token, or after SAMPLE_TOKENS. Under a sliding window a prompt leaves room for
    SAMPLE_TOKENS in it, so there may be fewer, or none.
    """
    prompts = _first_prompts(documents, (model.config.sliding_window or math.inf) - SAMPLE_TOKENS)
    if not prompts:
        return [], []
    # Every rank does the same work, because every forward gathers the blocks from all ranks: always
    # SAMPLE_TOKENS forwards. Were they to stop once all answers have ended, a rank that rounds differently
    # would deadlock the others.
    parallel.gather(model)
    answers = generate(model, prompts, SAMPLE_TOKENS)
    parallel.release(model)
    # the end of turn that was trained, which a base model's config does not name
    stop = _stop_id(config, tokenizer)
    answers = [ids[: ids.index(stop)] if stop in ids else ids for ids in answers]
    return [tokenizer.decode(ids) for ids in prompts], [tokenizer.decode(ids) for ids in answers]


def _first_prompts(documents, longest):
    """Up to SAMPLE_PROMPTS different prompts, in the order of the documents.

    Tuples of at most `longest` ids.
    """
    prompts = []
    for i in range(len(documents)):
        ids, mask = documents[i]
        prompt = tuple(ids[: mask.argmax()].tolist())  # argmax of a bool array: its first True
        if len(prompt) <= longest and prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == SAMPLE_PROMPTS:
            break
    return prompts


def save_model(model, tokenizer, config):
    """Write out_dir/final, a Hugging Face folder in the compute precision, adapters merged; returns it.

    Under LoRA also out_dir/adapter.
    """
    final = Path(config.out_dir) / "final"
    # generation must stop at the token that was trained, also on a base model
    model.config = dataclasses.replace(model.config, eos_token_id=_stop_id(config, tokenizer))
    template = TEMPLATES[resolve_template(config.template, tokenizer)]
    save_pretrained(model, tokenizer, final, dtype=DTYPES[config.precision], chat_template=template)
    if config.lora_rank:
        save_adapter(model, Path(config.out_dir) / "adapter", config.model_path)
    return final


def _stop_id(config, tokenizer):
    return tokenizer.single_id(end_of_turn(resolve_template(config.template, tokenizer), tokenizer))
