"""The other side of our training measurements: transformers, peft, TRL and torchtitan.

On the rows of bench/world.py, one GPU, steady state.

    [torchrun --nproc-per-node 2] python bench/peers.py NAME --world runs/bench [--data FILE] [--out FILE]

hf_sft, hf_lora        transformers in a bare loop: no trainer, no logging, nothing but the step
trl_sft                TRL's SFTTrainer
trl_dpo, trl_dpo_lora  TRL's DPOTrainer with precomputed reference log-probs
titan_sft, titan_fp8   torchtitan's Trainer, compiled: float32 masters and FSDP2, on one GPU pure bf16;
                       titan_fp8 with torchao's float8 matmuls, a scale per tensor or per row (--fp8)

Full fine-tuning with transformers and TRL is pure bf16 (weights, gradients, AdamW's states), less than ours
keeps. LoRA: r = 64, alpha = 128 on all linears of a bf16 model, float32 adapters under autocast, the defaults
of peft and TRL. On several GPUs each of these has the whole model (torch's DistributedDataParallel, which TRL
takes by itself): 8 bytes a parameter leave room for it, and it exchanges least; torchtitan's is sharded.
Rates are per GPU. Weights are random, made on the device. `bench/record.py --peer NAME --peer-file
FILE.jsonl` puts what this measured beside a run of ours.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.clocks import Clocks
from data import encode_chat
from model import LINEARS, LlamaConfig
from plumbing.files import read_jsonl
from plumbing.tokenizer import Tokenizer

WARMUP = 3  # steps: the allocator, compilation, and the clocks under load
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = (
    torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if torch.cuda.is_available()
    else torch.device("cpu")
)
SFT = dict(data="sft_fixed.jsonl", max_seq_len=4096, micro_batch=2, accumulate=6, recompute="full")
DPO = dict(data="dpo_fixed.jsonl", max_seq_len=2048, micro_batch=16, accumulate=2, recompute="full")
TITAN = SFT | dict(micro_batch=3, accumulate=4, recompute="selective")
DEFAULTS = {
    "hf_sft": SFT,
    "hf_lora": SFT | {"recompute": "best"},
    "trl_sft": SFT,
    "trl_dpo": DPO,
    "trl_dpo_lora": DPO,
    "titan_sft": TITAN,
    "titan_fp8": TITAN,
}
TITAN_FLAVORS = {"llama-3.1-8b": "8B", "tiny": "debugmodel"}


class Stopwatch:
    """tick() ends an optimizer step and says whether `seconds` have been measured after the warm-up."""

    def __init__(self, seconds):
        self.seconds, self.ticks, self.clocks, self.done = seconds, [], Clocks(), False

    def tick(self):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())
        if len(self.ticks) == WARMUP and DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.clocks.start()
        self.done = len(self.ticks) > WARMUP and self.ticks[-1] - self.ticks[WARMUP - 1] >= self.seconds
        if dist.is_initialized():  # rank 0's clock ends it for all
            self.done = bool(broadcast(self.done))
        if self.done:
            self.clocks.stop()
        return self.done

    def result(self):
        steps = np.diff(self.ticks[WARMUP - 1 :]).tolist()
        result = {
            "step_s": statistics.median(steps),
            "mean_step_s": statistics.mean(steps),
            "steps": len(steps),
        }
        result["peak_mem_gib"] = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
        return result | {"clocks": self.clocks.median()}


def broadcast(flag):
    tensor = torch.tensor([float(flag)], device=DEVICE)
    dist.broadcast(tensor, src=0)
    return tensor.item()


# ---------------------------------------------------------------- the model and the rows


def build_model(args):
    """A bf16 Llama in training mode with random weights on the device."""
    config = LlamaConfig.preset(args.preset)
    # For the tiny preset.
    config = dataclasses.replace(config, vocab_size=max(config.vocab_size, args.tokenizer.vocab_size))
    hf_config = transformers.LlamaConfig.from_dict(config.to_hf() | {"use_cache": False})
    torch.manual_seed(0)
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    assert {(param.dtype, param.device.type) for param in model.parameters()} == {
        (torch.bfloat16, DEVICE.type)
    }
    if args.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        is_trl = args.name.startswith("trl_")  # TRL projects in chunks by itself
        apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=not is_trl)
    return model.train()


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=64, lora_alpha=128, target_modules=list(LINEARS), task_type="CAUSAL_LM")


def read_rows(args):
    """The documents as our training reads them.

    One list of (ids, mask), or two, of the chosen and of the rejected answers.
    """
    sides = []
    for conversations in zip(*map(find_conversations, read_jsonl(args.world / args.data))):
        sides.append([encode_chat(each, args.tokenizer, "tulu", args.max_seq_len) for each in conversations])
    return sides


def find_conversations(row):
    """[messages] of an SFT row, [chosen, rejected] of a preference row."""
    if "messages" in row:
        return [row["messages"]]
    return [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for side in ("chosen", "rejected")
    ]


def labels(ids, mask):
    return [token if is_answer else -100 for token, is_answer in zip(ids, mask)]


# ---------------------------------------------------------------- transformers in a bare loop


def collate(documents):
    """Right-padded (N, longest) tensors.

    Without padding no attention_mask either: SDPA may then use its causal kernel.
    """
    lengths = [len(ids) for ids, _ in documents]
    widest = max(lengths)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, mask in documents:
        gap = widest - len(ids)
        batch["input_ids"].append(ids + [0] * gap)
        batch["labels"].append(labels(ids, mask) + [-100] * gap)
        batch["attention_mask"].append([1] * len(ids) + [0] * gap)
    if min(lengths) == widest:
        del batch["attention_mask"]
    return {key: torch.tensor(value).to(DEVICE) for key, value in batch.items()}


def run_hf(args, documents, recompute, micro_batch):
    """Stopwatch.result() of one way to train."""
    model, precision, watch = build_model(args), nullcontext(), Stopwatch(args.seconds)
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.name == "hf_lora":
        from peft import get_peft_model

        model, precision = get_peft_model(model, lora_config()), torch.autocast(DEVICE.type, torch.bfloat16)
    if args.compile:
        model.compile()
    if RANKS > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=DEVICE.type == "cuda")
    rng, examples = np.random.default_rng(RANK), args.micro_batch * args.accumulate
    while not watch.done:
        parts = np.split(rng.choice(len(documents), examples, replace=False), examples // micro_batch)
        for turn, ids in enumerate(parts):
            # DistributedDataParallel exchanges gradients once a step
            with model.no_sync() if RANKS > 1 and turn + 1 < len(parts) else nullcontext():
                with precision:
                    loss = model(**collate([documents[i] for i in ids])).loss * micro_batch / examples
                loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.tick()
    return watch.result() | {"recompute": recompute, "micro_batch": micro_batch}


def fastest_hf(args, documents):
    """The faster of with and without recompute ("best"), or the one asked for.

    Each at the largest micro-batch that fits.
    """
    if RANKS > 1:
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    results = []
    for recompute in ("none", "full") if args.recompute == "best" else (args.recompute,):
        micro_batch, fits = args.micro_batch, False
        while micro_batch and not fits:
            try:
                results.append(run_hf(args, documents, recompute, micro_batch))
                fits = True
            except torch.OutOfMemoryError:
                pass  # said below
            outcome = f"{results[-1]['step_s']:.3f} s a step" if fits else "out of memory"
            print(f"recompute {recompute}, micro-batch {micro_batch}: {outcome}", flush=True)
            micro_batch //= 2
            gc.collect()
            torch.cuda.empty_cache()
    return min(results, key=lambda result: result["step_s"])


# ---------------------------------------------------------------- TRL's trainers


def build_trainer(args, folder, tokenizer, sides):
    import trl
    from datasets import Dataset, disable_progress_bars
    from trl.trainer import dpo_trainer

    class DPOTrainer(trl.DPOTrainer):
        def _precompute_ref_logps(self, dataset, name, batch_size):
            """Any numbers in place of the reference's log-probs.

            A step takes equally long, and the pass over all pairs, which is not measured, none.
            """
            return dataset.map(lambda row: {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0})

    # Else a minute for the sha256 of 32 GB, the name of a cache that is not written.
    dpo_trainer.hash_module = lambda model: ""
    disable_progress_bars()
    options = dict(
        output_dir=folder,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.accumulate,
        gradient_checkpointing=args.recompute == "full",
        max_length=args.max_seq_len,
        torch_compile=args.compile,
        bf16=args.name == "trl_dpo_lora",
        optim="adamw_torch_fused" if DEVICE.type == "cuda" else "adamw_torch",
        learning_rate=1e-5,
        max_steps=10**6,
        dataloader_drop_last=True,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu",
    )
    if len(sides) == 1:
        rows = [{"input_ids": ids, "labels": labels(ids, mask)} for ids, mask in sides[0]]
        config = trl.SFTConfig(**options)
        return trl.SFTTrainer(
            build_model(args), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    decode = args.tokenizer.decode
    rows = []
    for (chosen, is_chosen), (rejected, is_rejected) in zip(*sides):
        start = is_chosen.index(True)
        row = {"prompt": decode(chosen[:start])}
        # without EOS, which TRL adds
        row["chosen"] = decode(chosen[start:-1])
        row["rejected"] = decode(rejected[is_rejected.index(True) : -1])
        rows.append(row)
    config = trl.DPOConfig(**options, precompute_ref_log_probs=True)
    trainer = DPOTrainer(
        build_model(args),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config() if args.name == "trl_dpo_lora" else None,
    )
    for i, row in enumerate(trainer.train_dataset):
        for name, side in zip(("chosen", "rejected"), sides):
            theirs = row["prompt_ids"] + row[f"{name}_ids"]
            assert theirs == side[i][0], f"row {i}: TRL trains on other tokens"
    return trainer


def run_trl(args, sides):
    """Stopwatch.result() of a TRL trainer."""
    watch = Stopwatch(args.seconds)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, _, state, control, **rest):
            control.should_training_stop = watch.tick()

    eos = args.tokenizer.eos_token
    # No BOS, as ours.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=args.tokenizer.core, eos_token=eos, pad_token=eos
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder, tokenizer, sides)
        trainer.add_callback(Stop())
        trainer.train()
    return watch.result() | {"recompute": args.recompute, "micro_batch": args.micro_batch}


# ---------------------------------------------------------------- torchtitan's trainer


def run_titan(args, documents):
    """Stopwatch.result() of torchtitan's Trainer, 0.2.2, the last release for stable versions of torch.

    Documents must be of one length: its batches are (micro_batch, seq_len) without padding.
    """
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    seq_len = len(documents[0][0])
    assert {len(ids) for ids, _ in documents} == {seq_len}, "torchtitan needs documents of one length"
    watch, flavor = Stopwatch(args.seconds), TITAN_FLAVORS[args.preset]

    class Timed(Trainer):
        def should_continue_training(self):
            # asked before the first step too
            return self.step == 0 or not watch.tick()

    def batches(**ignored):
        rng = np.random.default_rng(RANK)
        while True:
            ids, targets = [], []
            for i in rng.choice(len(documents), args.micro_batch, replace=False):
                ids.append(documents[i][0])
                targets.append(labels(*documents[i])[1:] + [-100])  # the model predicts the next token
            yield {"input": torch.tensor(ids)}, torch.tensor(targets)

    spec = get_train_spec()
    spec.build_dataloader_fn, spec.build_tokenizer_fn = batches, None
    shape = spec.model_args[flavor]
    shape.vocab_size = max(shape.vocab_size, args.tokenizer.vocab_size)  # for the tiny preset
    register_train_spec("ours", spec)
    job = JobConfig()
    job.model.name, job.model.flavor = "ours", flavor
    job.training.seq_len, job.training.local_batch_size = seq_len, args.micro_batch
    job.training.global_batch_size = args.micro_batch * args.accumulate * RANKS
    job.training.steps = 10**6
    if RANKS == 1:
        job.training.dtype = "bfloat16"  # 8B's float32 masters and moments do not fit on one GPU
    job.optimizer.lr, job.lr_scheduler.warmup_steps = 1e-5, 0
    job.metrics.log_freq = 10**6
    job.compile.enable = DEVICE.type == "cuda"
    job.activation_checkpoint.mode = args.recompute
    job.activation_checkpoint.selective_ac_option = "op"  # as its own configs of Llama 3 say
    job.parallelism.fsdp_reshard_after_forward = args.reshard
    if args.name == "titan_fp8":
        job.model.converters = ["quantize.linear.float8"]
        fp8 = job.quantize.linear.float8
        fp8.filter_fqns = ["output"]  # the head stays bf16, as ours
        if args.fp8 == "rowwise":
            fp8.recipe_name = "rowwise"
        else:  # as its documentation runs it on several GPUs
            fp8.enable_fsdp_float8_all_gather = fp8.precompute_float8_dynamic_scale_for_fsdp = RANKS > 1
    with tempfile.TemporaryDirectory() as folder:
        job.job.dump_folder = folder
        trainer = Timed(job)
        trainer.train()
        trainer.close()
    return watch.result() | {"recompute": args.recompute, "micro_batch": args.micro_batch}


# ---------------------------------------------------------------- one line


def main():
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=DEFAULTS)
    parser.add_argument(
        "--world",
        type=Path,
        required=True,
        help="folder of bench/world.py: its rows, and the tokenizer of base/",
    )
    parser.add_argument("--data", help="file in it (default: the rows of fixed length)")
    parser.add_argument(
        "--preset", default="llama-3.1-8b", help="shape, of LlamaConfig.preset (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of steady steps (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, help="examples (default: 2, torchtitan 3, DPO 16 pairs)")
    parser.add_argument(
        "--accumulate", type=int, help="micro-batches a step (default: 6, torchtitan 4, DPO 2)"
    )
    parser.add_argument(
        "--no-recompute", dest="recompute", action="store_const", const="none", help="keep all activations"
    )
    parser.add_argument(
        "--reshard",
        choices=("default", "never"),
        default="default",
        help="torchtitan: FSDP2's blocks after forward",
    )
    parser.add_argument(
        "--fp8", choices=("tensorwise", "rowwise"), default="tensorwise", help="titan_fp8: one scale for what"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--liger", action="store_true", help="with Liger's kernels")
    parser.add_argument("--out", type=Path, help="file to append the line to")
    args = parser.parse_args()
    settings = DEFAULTS[args.name] | {key: value for key, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**settings, tokenizer=Tokenizer.from_dir(args.world / "base"))

    sides = read_rows(args)
    if args.name.startswith("titan_"):
        result = run_titan(args, sides[0])
    else:
        result = run_trl(args, sides) if args.name.startswith("trl_") else fastest_hf(args, sides[0])
    # Per document or pair, without padding.
    tokens = sum(len(ids) for side in sides for ids, _ in side) / len(sides[0])
    unit, per_example = ("pairs_per_s", 1.0) if len(sides) == 2 else ("tokens_per_s", tokens)
    step = args.micro_batch * args.accumulate * per_example
    line = {
        "name": args.name,
        unit: step / result["step_s"],
        f"mean_{unit}": step / result["mean_step_s"],
        **result,
    }
    line["settings"] = {key: value for key, value in settings.items() if key not in line}
    peers = ("torch", "transformers", "peft", "trl", "liger_kernel")
    if args.name.startswith("titan_"):
        peers = ("torch", "torchtitan", "torchao")
    used = [name for name in peers if name in sys.modules]
    line["versions"] = {name: importlib.metadata.version(name) for name in used}
    line |= {
        "tokens_per_example": tokens,
        "hardware": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
    }
    line["gpus"] = RANKS
    if RANK:
        return
    for key, value in line.items():
        print(f"{key:18} {value}")
    if "out" in settings:
        with args.out.open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


if __name__ == "__main__":
    main()
