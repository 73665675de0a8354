"""Configs: one frozen dataclass per stage, read from a Python file of plain dicts and from `--key=value`.

    configs/x.py:   common = dict(...)  sft = dict(...)  dpo = dict(...)  steer = dict(...)  aqi = dict(...)
    precedence:     dataclass default < common < the command's section < --key=value

Every section is checked whichever command starts (a typo in `dpo` should not wait for SFT to end), and every
problem is named at once. A file's values are taken as they are: no string of it is converted. The command
line has only strings, which are read by the key's type: --max_steps=none is None where the key may be None, a
tuple of numbers is --lambdas=0,0.5,1, and a dict or a tuple of names can only stand in the file.
"""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import os
import runpy
import sys
import traceback
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace, UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin

from plumbing.files import UserError

# in the order of --help
GROUPS = ("model", "data", "optimizer", "loss", "steering", "measure", "machine", "run")
# The commands own their keys: DPOConfig stands beside the losses in train_dpo.py. They are named here and
# imported when a config is read: plumbing is below the commands, and all sections are checked.
SECTIONS = {
    "sft": "train_sft.SFTConfig",
    "dpo": "train_dpo.DPOConfig",
    "steer": "steer.SteerConfig",
    "aqi": "aqi.AQIConfig",
}
COMMAND_LINE_ONLY = {"fresh": "restart the run at every start", "push": "upload it at every end"}
# {our key: names of TRL, peft and open-instruct whose spelling would suggest no key of ours, or another one}
ALIASES = {
    "data": ("dataset_name", "dataset_mixer", "dataset_mixer_list"),
    "eval_every": ("eval_steps",),
    "global_batch_size": ("per_device_train_batch_size", "gradient_accumulation_steps"),
    "keep_last": ("save_total_limit", "keep_last_n_checkpoints"),
    "log_every": ("logging_steps",),
    "lora_rank": ("r",),
    "lora_targets": ("target_modules",),
    "loss": ("dpo_loss_type", "reduce_loss"),
    "lr": ("learning_rate",),
    "precision": ("bf16", "fp16", "dtype", "torch_dtype"),
    "recompute": ("gradient_checkpointing",),
    "save_every": ("save_steps", "checkpointing_steps"),
    "sft_weight": ("rpo_alpha",),
}
THEIR_NAMES = {}
for _ours, _theirs in ALIASES.items():
    THEIR_NAMES |= dict.fromkeys(_theirs, _ours)
SIGNS = {"above": ">", "minimum": ">=", "below": "<"}
Template = Literal["tulu", "tulu_bos", "zephyr", "llama3", "chatml", "gemma"]
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def setting(group, unit, help, default=MISSING, above=None, minimum=None, below=None, affects_results=True):
    """A dataclass field; above < value, minimum <= value, value < below.

    affects_results=False: the key may change when a run is resumed.
    """
    about = {"group": group, "unit": unit, "help": help, "affects_results": affects_results}
    bounds = {"above": above, "minimum": minimum, "below": below}
    return dataclasses.field(default=default, metadata=about | bounds)


@dataclass(frozen=True, kw_only=True)
class Section:
    """The keys of one section of a config: fields made by `setting`.

    Every instance is checked, also one that a test or dataclasses.replace makes.
    """

    def __post_init__(self):
        values, problems = _check_keys(_fields(type(self)), vars(self))
        if problems := problems + _conflicts(type(self), values):
            raise UserError("\n".join(problems))
        vars(self).update(self.resolve(values))  # 5 became 5.0 where the key is a float

    @staticmethod
    def resolve(values):
        """The values with those filled in that follow from others."""
        return values

    @classmethod
    def conflicts(cls, c):
        """Yield ((keys), message) for every impossible combination of values. c: the values by attribute."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """The keys of both training stages. A parent class, so that scripts read `config.lr` in both."""

    # fmt: off
    model_path: str = setting(
        "model", "path or org/name[@revision]", "Hugging Face folder to start from (DPO: also the reference)")
    template: Template | None = setting(
        "model", "name", "chat template; None: the tokenizer's own, if it is one of these", default="tulu")
    lora_rank: int = setting(
        "model", "columns", "rank of the LoRA adapters; 0: full fine-tuning", default=0, minimum=0)
    lora_alpha: float | None = setting(
        "model", "-", "LoRA scale: adapters are multiplied by lora_alpha / lora_rank", default=None, above=0)
    lora_targets: tuple[Linear, ...] = setting(
        "model", "names", "linear layers that get an adapter", default=get_args(Linear))

    data: dict[str, float | int] = setting(
        "data", "fraction | rows",
        "{path, pattern or org/name[@revision], [split] or [config/split] may follow: "
        "float fraction or int count}")
    data_eval: dict[str, float | int] | float | None = setting(
        "data", "fraction | rows", "held-out sources as in data, or the share of data's prompts to hold out",
        default=None, above=0, below=1)
    rows: Literal["choice", "first", "shuffle"] = setting(
        "data", "name",
        "how a share or count picks rows: open-instruct's rule since 2025-07-21, since 2025-01-28, before",
        default="choice")
    supervise: Literal["all", "last"] = setting(
        "data", "turns", "assistant turns that are trained on", default="all")
    max_seq_len: int = setting(
        "data", "tokens", "longer conversations (DPO: each of the two) are truncated", minimum=2)
    cache_dir: str = setting(
        "data", "path", "tokenised data and reference log-probs, by content",
        default="runs/cache", affects_results=False)
    seed: int = setting(
        "data", "-", "order of the examples, adapter initialisation", default=42, minimum=0, below=2**32)

    global_batch_size: int = setting(
        "optimizer", "examples", "documents (DPO: pairs) of one optimizer step, over all GPUs", minimum=1)
    num_epochs: int = setting("optimizer", "epochs", "passes over the data", default=1, minimum=1)
    max_steps: int | None = setting(
        "optimizer", "steps", "stop after so many steps; the schedule ends there too",
        default=None, minimum=1)
    lr: float = setting("optimizer", "-", "peak learning rate of AdamW", above=0)
    lr_schedule: Literal["linear", "cosine"] = setting(
        "optimizer", "name", "decay from the peak to 0 at the last step", default="linear")
    warmup_ratio: float = setting(
        "optimizer", "share of steps", "linear warm-up", default=0.0, minimum=0, below=1)
    warmup_steps: int | None = setting(
        "optimizer", "steps", "linear warm-up, instead of warmup_ratio", default=None, minimum=0)
    weight_decay: float = setting("optimizer", "-", "decoupled, as in AdamW", default=0.0, minimum=0)
    max_grad_norm: float | None = setting(
        "optimizer", "-", "clip the global gradient norm to this; None: never", default=1.0, above=0)

    tokens_per_microbatch: int = setting(
        "machine", "tokens", "packed stream of one GPU: sets memory, not results",
        minimum=2, affects_results=False)
    recompute: Literal["none", "half", "full"] = setting(
        "machine", "blocks", "whose activations are computed again in backward: less memory, more time",
        default="none", affects_results=False)
    kernels: Literal["fused", "plain"] = setting(
        "machine", "name", "fused: blocks with a hand-written backward; plain: their twin, by autograd",
        default="fused", affects_results=False)
    attention: Literal["flash2", "flash4"] = setting(
        "machine", "name", "on GPUs; flash4: of the package flash-attn-4, long documents 6 to 9 % faster",
        default="flash2", affects_results=False)
    moments: Literal["fp32", "bf16"] = setting(
        "machine", "name",
        "of AdamW; bf16 (full fine-tuning): 4 bytes a weight less, rounded stochastically",
        default="fp32")
    gradients: Literal["fp32", "bf16"] = setting(
        "machine", "name",
        "bf16 (full fine-tuning): 2 bytes a weight less, rounded every micro-batch (lm_head: 2,048 rows) "
        "and for every rank", default="fp32")
    sharding: Literal["auto", "optimizer", "full", "hybrid"] = setting(
        "machine", "name",
        "what several GPUs share out: AdamW's state; or weights and gradients too, slower, for what does not "
        "fit otherwise (hybrid: among the GPUs of a machine); auto: by arithmetic",
        default="auto", affects_results=False)
    deterministic: bool = setting(
        "machine", "flag",
        "the same command ends in the same bytes, also killed and resumed, on as many GPUs: slower",
        default=False, affects_results=False)
    precision: Literal["fp32", "bf16", "fp8"] = setting(
        "machine", "name",
        "of compute; fp8: bf16, but float8 in the blocks' linears; what AdamW updates is fp32 in all",
        default="bf16")

    out_dir: str = setting(
        "run", "path", "run folder: config, manifest, metrics, checkpoints, final model",
        affects_results=False)
    log_every: int = setting(
        "run", "steps", "between step lines", default=1, minimum=1, affects_results=False)
    eval_every: int | None = setting(
        "run", "steps", "between evaluations on data_eval; None: at start and end only",
        default=None, minimum=1, affects_results=False)
    save_every: int | None = setting(
        "run", "steps", "between resumable checkpoints; None: only when stopped",
        default=None, minimum=1, affects_results=False)
    save_minutes: float | None = setting(
        "run", "minutes", "a checkpoint also after so many without one: what a lost machine costs at most",
        default=None, above=0, affects_results=False)
    sample_every: int | None = setting(
        "run", "steps", "between greedy answers to four fixed prompts, in samples.jsonl; None: never",
        default=None, minimum=1, affects_results=False)
    loss_spike: Literal["warn", "stop"] = setting(
        "run", "name", "when a step's loss is over twice the largest of the last 20",
        default="warn", affects_results=False)
    tensorboard: bool = setting(
        "run", "flag", "also write the metrics as TensorBoard events, in out_dir",
        default=False, affects_results=False)
    keep_last: int = setting(
        "run", "checkpoints", "older ones are deleted", default=2, minimum=1, affects_results=False)
    fresh: bool = setting(
        "run", "flag", "start over although out_dir has a checkpoint (command line only)",
        default=False, affects_results=False)
    push: str | None = setting(
        "run", "org/name", "hub repository that gets final/ and adapter/ after the run (command line only)",
        default=None, affects_results=False)
    # fmt: on

    example_documents: ClassVar = 1  # of one training example, which must lie in one stream

    @classmethod
    def conflicts(cls, c):
        if cls.example_documents * c.max_seq_len > c.tokens_per_microbatch:
            pairs = ("twice ", "a pair must fit one stream")
            times, why = pairs if cls.example_documents == 2 else ("", "a document must fit one stream")
            needs = f"expected at least {times}max_seq_len={c.max_seq_len} ({why})"
            message = f"tokens_per_microbatch={c.tokens_per_microbatch}: {needs}"
            yield ("max_seq_len", "tokens_per_microbatch"), message
        if Path(c.model_path).resolve() == (Path(c.out_dir) / "final").resolve():
            problem = "its final/ is model_path, which the end of the run would replace"
            yield ("model_path", "out_dir"), f"out_dir={c.out_dir!r}: {problem}; expected another folder"
        # silently ignored, it would leave a run without the curve that was asked for
        if c.eval_every and c.data_eval is None:
            yield ("eval_every", "data_eval"), f"eval_every={c.eval_every}: needs data_eval"
        if c.warmup_ratio > 0 and c.warmup_steps is not None:
            both = f"warmup_ratio={c.warmup_ratio}, warmup_steps={c.warmup_steps}"
            yield ("warmup_ratio", "warmup_steps"), f"{both}: expected one of the two"
        # no default for alpha: libraries differ (8, 16, rank, 2 rank), and it scales the learning rate
        if (c.lora_rank > 0) != (c.lora_alpha is not None):
            both = f"lora_rank={c.lora_rank}, lora_alpha={c.lora_alpha}"
            expected = "expected both (the scale is lora_alpha / lora_rank) or neither"
            yield ("lora_rank", "lora_alpha"), f"{both}: {expected}"
        # They are of split masters (optim.keep_masters); LoRA's adapters and fp32 weights are not split.
        if "bf16" in (c.moments, c.gradients) and (c.precision == "fp32" or c.lora_rank > 0):
            both = f"moments={c.moments!r}, gradients={c.gradients!r}"
            needs = "bf16 needs precision='bf16' or 'fp8' and full fine-tuning (lora_rank=0)"
            yield ("moments", "gradients", "precision", "lora_rank"), f"{both}: {needs}"
        if c.kernels == "plain" and c.precision == "fp8":
            needs = "float8 is in the fused blocks only; expected kernels='fused'"
            yield ("kernels", "precision"), f"kernels='plain', precision='fp8': {needs}"
        if "bf16" in (c.moments, c.gradients) and c.sharding in ("full", "hybrid"):
            both = f"moments={c.moments!r}, gradients={c.gradients!r}, sharding={c.sharding!r}"
            needs = "FSDP2 keeps both in float32; expected sharding='optimizer' or 'auto'"
            yield ("moments", "gradients", "sharding"), f"{both}: {needs}"
        if c.attention == "flash4" and c.deterministic:
            needs = "its backward adds in any order; expected attention='flash2'"
            yield ("attention", "deterministic"), f"attention='flash4', deterministic=True: {needs}"
        if c.attention == "flash4" and c.precision == "fp32":
            needs = "flash kernels take 16 bits; expected precision='bf16' or 'fp8'"
            yield ("attention", "precision"), f"attention='flash4', precision='fp32': {needs}"


def _is_installed(module):
    """Whether a module can be imported; its package may be missing, or of a version without it."""
    parent = module.rpartition(".")[0]
    # parent first: find_spec of a.b imports a, and raises where a is missing
    return (not parent or _is_installed(parent)) and importlib.util.find_spec(module) is not None


def section(name):
    """The class of a section: Config for "common", else that of its command."""
    if name == "common":
        return Config
    module, _, cls = SECTIONS[name].partition(".")
    return getattr(importlib.import_module(module), cls)


INVALID = object()  # in place of a wrong value: the key is not missing, and no rule can use it


def words_and_options(argv):
    """The arguments that begin without a dash, and those that begin with one."""
    words, options = [], []
    for arg in argv:
        if arg.startswith("-"):
            options.append(arg)
        else:
            words.append(arg)
    return words, options


def load(stage, argv):
    """`load("dpo", sys.argv[1:])` -> the checked DPOConfig of `CONFIG.py [--key=value ...]`.

    `--help` prints the keys and exits. UserError: every problem of file and command line, one per line.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(stage))
        raise SystemExit(0)
    plan_flags = [arg for arg in argv if arg.partition("=")[0] in ("--gpu", "--count", "--usd-per-hour")]
    if plan_flags:
        raise UserError(f"{' '.join(plan_flags)}: expected together with --plan only")
    paths, overrides = words_and_options(argv)
    if len(paths) != 1:
        hint = " (a value goes behind =, as in --lr=1e-4)" if len(paths) > 1 else ""
        usage = f"train_{stage}.py CONFIG.py [--key=value ...]; --help lists the keys"
        raise UserError(f"expected one config file, got {paths}{hint}: {usage}")
    return load_sections(paths[0], [stage], overrides)[stage]


def load_sections(path, stages, overrides, keys=None, required=()):
    """{stage: its checked section} of a config file. path None: of defaults and overrides alone.

    overrides: `--key=value` arguments; each goes to those of `stages` that have the key. Every section of the
    file is checked, also those that are not asked for. keys: what the command reads, where that is less than
    all keys of `stages`: an override of another is refused. required: keys that may be None, but not for this
    command. UserError: every problem of file and overrides, one per line.
    """
    sections, problems = ({}, []) if path is None else _read_sections(path)
    given, unfit = _read_overrides([section(stage) for stage in stages], overrides)
    if keys is not None:
        unfit += [f"{name}: a key that this command does not read" for name in given if name not in keys]
    problems += [f"command line: {problem}" for problem in unfit]
    for stage in stages:
        if path is not None and stage not in sections and _missing(section(stage), {}, ()):
            problems.append(f"{path}: no section {stage!r}: expected {stage} = dict(...)")
        elif stage not in sections:
            sections[stage] = {}  # every key has a default

    checked = {"common": {}}
    for name, values in sections.items():
        checked[name], unfit = _check_keys(_fields(section(name)), values)
        problems += [f"{path}: {name}: {problem}" for problem in unfit]

    resolved = {}
    for name in sections:
        if name == "common":
            continue
        cls = section(name)
        # A section takes from `common` the keys that it has: not every command has all of them.
        values = _defaults(cls)
        for source in (checked["common"], checked[name], given if name in stages else {}):
            values |= {key: value for key, value in source.items() if key in _fields(cls)}
        missing = _missing(cls, values, required if name in stages else ())
        where = f"{path}: {name}: " if path else ""
        problems += [f"{where}{problem}" for problem in missing + _conflicts(cls, values)]
        resolved[name] = values
    if problems:
        raise UserError("\n".join(problems))
    return {stage: section(stage)(**resolved[stage]) for stage in stages}


def _missing(cls, values, required):
    """Messages for the keys that have no value; `required` ones may not be None either."""
    values = _defaults(cls) | values
    messages = []
    for name, field in _fields(cls).items():
        if name not in values or (name in required and values[name] is None):
            messages.append(f"missing {name!r}: {field.metadata['help']}")
    return messages


def are_equal_machines(world_size, machine_size):
    """Whether the ranks are several machines of `machine_size` each, and more than one on each."""
    return 1 < machine_size < world_size and world_size % machine_size == 0


def check_world_size(config, world_size, machine_size):
    """UserError if a step has fewer examples than the `world_size` ranks, or sharding does not suit them.

    machine_size: ranks of each machine; 0 where machines differ.
    """
    if config.sharding == "hybrid" and not are_equal_machines(world_size, machine_size):
        found = f"{world_size} ranks, {machine_size or 'not equally many'} a machine"
        expected = "expected several machines with the same number of GPUs, two or more; or sharding='full'"
        raise UserError(f"sharding='hybrid' on {found}: {expected}")
    if config.global_batch_size < world_size:
        problem = f"a batch that cannot be formed on {world_size} ranks"
        expected = f"expected at least {world_size}, or fewer ranks"
        raise UserError(f"global_batch_size={config.global_batch_size}: {problem}; {expected}")


def check_packages(config):
    """UserError if a key needs a package that is not installed. A plan, which needs none, does not ask."""
    if config.attention == "flash4" and not _is_installed("flash_attn.cute"):
        needs = "expected the package flash-attn-4, not installed here (pip install .[fast])"
        raise UserError(f"attention={config.attention!r}: {needs}")
    if config.tensorboard and not _is_installed("tensorboard"):
        needs = "expected the package, which is not installed (pip install tensorboard)"
        raise UserError(f"tensorboard={config.tensorboard}: {needs}")


def check_capability(config, capability, device="this GPU"):
    """UserError if a key needs a newer compute capability, (major, minor), than the GPU's."""
    needs = (
        ("precision", "bf16", (8, 0), "Ampere, Ada, Hopper"),  # flash attention, and bf16 matmuls
        ("precision", "fp8", (8, 9), "Ada, Hopper"),
        ("attention", "flash4", (9, 0), "Hopper, Blackwell"),  # older cards fail in its backward
    )
    for key, value, needed, cards in needs:
        if getattr(config, key) == value and capability < needed:
            wanted = f"expected a GPU of compute capability {needed[0]}.{needed[1]} ({cards}) or newer"
            raise UserError(f"{key}={value!r} on {device}, {capability[0]}.{capability[1]}: {wanted}")


def unused_flash4(config, capability):
    """A line where flash-attn-4 is installed and could run, but is not asked for; else ""."""
    could_run = capability >= (9, 0) and config.precision != "fp32" and not config.deterministic
    if config.attention == "flash4" or not could_run or not _is_installed("flash_attn.cute"):
        return ""
    return "flash-attn-4 is there and fits this GPU: --attention=flash4 is 6 to 9 % faster on long documents"


def config_dict(config):
    """Every key as JSON holds it: for the run folder's config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def resume_dict(config):
    """The keys that must be equal for a run to go on from a checkpoint.

    All but those that only say where, how often or on what machine.
    """
    values = config_dict(config)
    fields = dataclasses.fields(config)
    return {field.name: values[field.name] for field in fields if field.metadata["affects_results"]}


def config_hash(config):
    """sha256 (hex) of the stage and its resume_dict."""
    text = json.dumps([type(config).__name__, resume_dict(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def help_text(stage):
    """Every key of the stage by group, with type, bounds, unit, default and meaning."""
    command = f"train_{stage}.py CONFIG.py [--key=value ...]"
    lines = [
        f"usage: {command} [--fresh] [--push=org/name]",
        f"       {command} --plan --gpu a100-80 --count 8 [--usd-per-hour 16]: no run, only its cost",
        f"CONFIG.py holds the dicts common, {', '.join(SECTIONS)}.",
        f"Precedence: default < common < {stage} < --key=value. --key=none is None where a key may be None.",
    ]
    return "\n".join([*lines, describe_keys([stage])])


def describe_keys(stages, keys=None, required=()):
    """The keys of the stages by group, two lines each. keys: only these; required: may not stay None."""
    fields = []
    for stage in stages:
        for field in dataclasses.fields(section(stage)):
            if keys is None or field.name in keys:
                fields.append(field)
    lines = []
    for group in GROUPS:
        members = [field for field in fields if field.metadata["group"] == group]
        lines += [f"\n{group}"] if members else []
        for field in members:
            is_required = field.default is MISSING or field.name in required
            default = "required" if is_required else f"default {field.default!r}"
            place = "" if _scalars(field.type) or _is_numbers(field.type) else " (in the file only)"
            lines.append(f"  {field.name}: {_describe(field)}, {default}{place}")
            lines.append(f"      [{field.metadata['unit']}] {field.metadata['help']}")
    return "\n".join(lines)


def _fields(cls):
    return {field.name: field for field in dataclasses.fields(cls)}


def _defaults(cls):
    return {field.name: field.default for field in dataclasses.fields(cls) if field.default is not MISSING}


def sections_of(path):
    """Names of the sections that a config file has; their values are not checked. UserError: no such file."""
    return set(_read_sections(path)[0])


def _read_sections(path):
    """-> ({section: dict}, problems). Underscore names and modules are private; any other name is a typo."""
    if not Path(path).is_file():
        there = map(str, Path(path).parent.glob("*.py"))
        raise UserError(f"{path}: no such config file{_did_you_mean(path, there)}")
    sections, problems = {}, []
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # the file is a program: it may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == path][-1]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, ModuleType):
            continue
        if name not in ("common", *SECTIONS):
            expected = f"; expected common, {', '.join(SECTIONS)} (a private name starts with _)"
            hint = _did_you_mean(name, ("common", *SECTIONS)) or expected
            problems.append(f"{path}: unknown section {name!r}{hint}")
        elif not isinstance(value, dict):
            problems.append(f"{path}: {name}: expected a dict, got {type(value).__name__}")
        else:
            sections[name] = {key: value[key] for key in value if isinstance(key, str)}
            for key in value.keys() - sections[name].keys():
                problems.append(f"{path}: {name}: key {key!r}: expected a name")
            for only, why in COMMAND_LINE_ONLY.items():
                if only in value:
                    expected = f"expected on the command line only; here it would {why}"
                    problems.append(f"{path}: {name}: {only}: {expected}")
    return sections, problems


def _read_overrides(classes, args):
    """`--key=value` by the key's type, `--key=none` where it may be None, `--key` for a true bool.

    -> (values, problems)
    """
    fields = {}
    for cls in classes:
        fields |= _fields(cls)
    given, problems = {}, []
    for arg in args:
        name, equals, text = arg.removeprefix("--").partition("=")
        types = _scalars(fields[name].type) if name in fields else [str]
        if types == [bool] and not equals:
            given[name] = True
        elif name in fields and not equals:
            problems.append(f"{arg}: expected --{name}=value")
        elif text.lower() == "none" and name in fields and type(None) in _members(fields[name].type):
            given[name] = None
        elif name in fields and _is_numbers(fields[name].type):
            given[name] = tuple(_parse(part, [float]) for part in text.split(","))
            if str in map(type, given[name]):
                problems.append(f"{arg}: expected numbers between commas, as in --{name}=0,0.5,1")
                given[name] = INVALID
        elif not types:
            problem = f"no string is read as {_describe(fields[name])}: put it into the config file"
            problems.append(f"{name}: {problem}")
            given[name] = INVALID
        else:
            given[name] = _parse(text, types)
    values, unfit = _check_keys(fields, given)
    return values, problems + unfit


def _parse(text, types):
    """The text as the first type that reads it, else as text, which the check of the key then refuses."""
    for convert in types:
        try:
            return {"true": True, "false": False}[text.lower()] if convert is bool else convert(text)
        except (ValueError, KeyError):
            continue
    return text


def _check_keys(fields, given):
    """-> (the known keys, floats as float, INVALID in place of a wrong value; problems).

    fields: {name: dataclass field}.
    """
    values, problems = {}, []
    for name, value in given.items():
        if name not in fields:
            problems.append(f"unknown key {name!r}{_hint(name, fields)}")
            continue
        problem = None if value is INVALID else _unfit(fields[name], value)
        if problem:
            problems.append(problem)
            value = INVALID
        elif type(value) is int and float in _scalars(fields[name].type):
            value = float(value)  # 5 and 5.0 are one config, so they have one hash
        elif isinstance(value, str) and fields[name].metadata["unit"].startswith("path"):
            value = os.path.expanduser(value)  # no shell expands --out_dir=~/runs: it would be ./~/runs
        elif isinstance(value, dict):
            expanded = {os.path.expanduser(source): amount for source, amount in value.items()}
            if len(expanded) < len(value):
                problems.append(f"{name}={value!r}: one source twice, with ~ and without; expected it once")
            value = expanded
        values[name] = value
    return values, problems


def _hint(name, fields):
    """What an unknown key may have meant: a key of another section, a peer's name of ours, a typo."""
    # First the surest: a key of another section. A near spelling comes last, for it may be a coincidence.
    others = [stage for stage in SECTIONS if name in _fields(section(stage))]
    if others:
        return f" (a key of {' and '.join(others)})"
    ours = THEIR_NAMES.get(name)
    if ours in fields:
        return f", here {ours!r}: {fields[ours].metadata['help']}"
    return _did_you_mean(name, fields)


def _unfit(field, value):
    """What is wrong with the value by itself, or None."""
    expected = f"{field.name}={value!r}: expected {_describe(field)}"
    fits_type = _is_a(value, field.type)
    # "None" in quotes is a string and would pass for a path or a name.
    is_none = isinstance(value, str) and value.lower() in ("none", "null")
    if is_none and (field.type is str or not fits_type):
        return f"{expected}, got a string (in the file None has no quotes, on the command line it is none)"
    choices = _choices(field.type)
    if not fits_type and choices and isinstance(value, str):
        return f"{expected}{_did_you_mean(value, choices)}"
    if not fits_type and isinstance(value, dict):
        kinds = {type(amount).__name__ for amount in value.values()}
        return f"{expected}, got dict of {' and '.join(sorted(kinds))}"
    if not fits_type:
        return f"{expected}, got {type(value).__name__}"
    if isinstance(value, (dict, tuple, str)) and not value:
        return f"{expected}, got none"
    if isinstance(value, dict):
        return None if all(0 < amount < math.inf for amount in value.values()) else expected
    if type(value) in (int, float) and not _within(value, field.metadata):
        return expected
    return None


def _within(value, bounds):
    # NaN is neither below nor above anything, so every comparison but this one would let it pass.
    if not abs(value) <= sys.float_info.max:
        return False
    if bounds["above"] is not None and value <= bounds["above"]:
        return False
    if bounds["minimum"] is not None and value < bounds["minimum"]:
        return False
    return bounds["below"] is None or value < bounds["below"]


def _conflicts(cls, values):
    """The messages of cls.conflicts, except those that name a missing or wrong key."""
    # A rule counts where all keys that it names are right, whatever is wrong elsewhere: every problem is told
    # at once. The others have stand-ins, because a rule may read them on its way.
    known = {name for name, value in values.items() if value is not INVALID}
    stand_ins = {field.name: _stand_in(field) for field in dataclasses.fields(cls) if field.name not in known}
    found = cls.conflicts(SimpleNamespace(**(values | stand_ins)))
    return [message for keys, message in found if known.issuperset(keys)]


def _stand_in(field):
    """A value that a rule can compute with, for a key that has none."""
    if field.default is not MISSING:
        return field.default
    scalars = _scalars(field.type)
    return scalars[0]() if scalars else None


def _did_you_mean(name, known):
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _members(annotation):
    return get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)


def _scalars(annotation):
    """The types that the command line can write: a dict, a tuple or None has no text."""
    types = [str if get_origin(member) is Literal else member for member in _members(annotation)]
    return [member for member in types if member in (bool, int, float, str)]


def _choices(annotation):
    choices = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            choices += get_args(member)
    return choices


def _is_numbers(annotation):
    """A tuple of numbers has a text: `0,0.5,1`."""
    return get_origin(annotation) is tuple and get_args(annotation)[0] is float


def _describe(field):
    """`float > 0 or None`: what the key accepts, for --help and for messages."""
    bounds = []
    for bound, sign in SIGNS.items():
        if field.metadata[bound] is not None:
            bounds.append(f" {sign} {field.metadata[bound]}")
    texts = []
    for member in _members(field.type):
        if get_origin(member) is Literal:
            texts.append(" | ".join(get_args(member)))
        elif get_origin(member) is tuple:
            item = get_args(member)[0]
            texts.append(f"tuple of {' | '.join(get_args(item) or [item.__name__])}")
        elif get_origin(member) is dict:
            texts.append("dict {str: float or int > 0}")
        elif member is type(None):
            texts.append("None")
        else:
            texts.append(member.__name__ + (" and".join(bounds) if member in (int, float) else ""))
    return " or ".join(texts)


def _is_a(value, annotation):
    """Whether the value has the annotated type. Exact: True is not an int; but an int will do for a float."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (UnionType, Union):
        return any(_is_a(value, member) for member in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, args[0]) for item in value)
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_is_a(key, args[0]) and _is_a(item, args[1]) for key, item in pairs)
    return type(value) in ((int, float) if annotation is float else (annotation,))
