"""Configs: one frozen dataclass per stage, read from a Python file of plain dicts and from `--key=value`.

    configs/x.py:   common = dict(...)   sft = dict(...)   dpo = dict(...)
    precedence:     dataclass default < common < the stage's section < --key=value

Every section is checked whichever script starts (a typo in `dpo` should not wait for SFT to end), and every
problem is named at once. No string becomes None, a tuple or a dict: what the command line cannot say, the file says.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import runpy
import traceback
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Literal, Union, get_args, get_origin

from plumbing.files import UserError

GROUPS = ("model", "data", "optimizer", "loss", "machine", "run")  # in the order of --help
COMMAND_LINE_ONLY = {"fresh": "restart the run at every start", "push": "upload it at every end"}
# {their name: ours}, of TRL, peft and open-instruct, where the spelling alone would suggest no key or another one
THEIR_NAMES = {
    "learning_rate": "lr", "per_device_train_batch_size": "global_batch_size", "gradient_accumulation_steps": "global_batch_size",
    "logging_steps": "log_every", "eval_steps": "eval_every", "save_steps": "save_every", "checkpointing_steps": "save_every",
    "save_total_limit": "keep_last", "keep_last_n_checkpoints": "keep_last", "gradient_checkpointing": "recompute",
    "dataset_name": "data", "dataset_mixer": "data", "dataset_mixer_list": "data", "dpo_loss_type": "loss", "reduce_loss": "loss",
    "rpo_alpha": "sft_weight", "r": "lora_rank", "target_modules": "lora_targets",
    "bf16": "precision", "fp16": "precision", "dtype": "precision", "torch_dtype": "precision",
}  # fmt: skip
SIGNS = {"above": ">", "minimum": ">=", "below": "<"}
Template = Literal["tulu", "zephyr", "llama3", "chatml"]
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def setting(group, unit, help, default=MISSING, above=None, minimum=None, below=None, identity=True):
    """A dataclass field; above < value, minimum <= value and value < below. A key without identity may change when a run is resumed."""
    bounds = {"above": above, "minimum": minimum, "below": below}
    return dataclasses.field(default=default, metadata={"group": group, "unit": unit, "help": help, "identity": identity, **bounds})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What both stages know. A parent class and not a nested part, so that scripts read `config.lr` and a key has one name everywhere."""

    model_path: str = setting("model", "path or org/name[@revision]", "Hugging Face folder to start from (DPO: also the reference)")
    template: Template | None = setting("model", "name", "chat template; None: the tokenizer's own, if it is one of these", default="tulu")
    lora_rank: int = setting("model", "columns", "rank of the LoRA adapters; 0: full fine-tuning", default=0, minimum=0)
    lora_alpha: float | None = setting("model", "-", "LoRA scale: adapters are multiplied by lora_alpha / lora_rank", default=None, above=0)
    lora_targets: tuple[Linear, ...] = setting("model", "names", "linear layers that get an adapter", default=get_args(Linear))

    data: dict[str, float | int] = setting(
        "data", "fraction | rows", "{path or org/name[@revision], [split] may follow: float fraction or int count}"
    )
    data_eval: dict[str, float | int] | float | None = setting(
        "data", "fraction | rows", "held-out sources as in data, or the share of data's prompts to hold out", default=None, above=0, below=1
    )
    supervise: Literal["all", "last"] = setting("data", "turns", "assistant turns that are trained on", default="all")
    max_seq_len: int = setting("data", "tokens", "longer conversations (DPO: each of the two) are truncated", minimum=2)
    cache_dir: str = setting("data", "path", "tokenised data and reference log-probs, by content", default="runs/cache", identity=False)
    seed: int = setting("data", "-", "order of the examples, adapter initialisation", default=42, minimum=0, below=2**32)

    global_batch_size: int = setting("optimizer", "examples", "documents (DPO: pairs) of one optimizer step, over all GPUs", minimum=1)
    num_epochs: int = setting("optimizer", "epochs", "passes over the data", default=1, minimum=1)
    max_steps: int | None = setting("optimizer", "steps", "stop after so many steps; the schedule ends there too", default=None, minimum=1)
    lr: float = setting("optimizer", "-", "peak learning rate of AdamW", above=0)
    lr_schedule: Literal["linear", "cosine"] = setting("optimizer", "name", "decay from the peak to 0 at the last step", default="linear")
    warmup_ratio: float = setting("optimizer", "share of steps", "linear warm-up", default=0.0, minimum=0, below=1)
    warmup_steps: int | None = setting("optimizer", "steps", "linear warm-up, instead of warmup_ratio", default=None, minimum=0)
    weight_decay: float = setting("optimizer", "-", "decoupled, as in AdamW", default=0.0, minimum=0)
    max_grad_norm: float | None = setting("optimizer", "-", "clip the global gradient norm to this; None: never", default=1.0, above=0)

    tokens_per_microbatch: int = setting("machine", "tokens", "packed stream of one GPU: sets memory, not results", minimum=2, identity=False)
    recompute: Literal["none", "half", "full"] = setting(
        "machine", "blocks", "whose activations are computed again in backward: less memory, more time", default="none", identity=False
    )
    kernels: Literal["fused", "plain"] = setting(
        "machine", "name", "fused: blocks with a hand-written backward; plain: their twin, by autograd", default="fused", identity=False
    )
    attention: Literal["flash2", "flash4"] = setting(
        "machine", "name", "on GPUs; flash4: of the package flash-attn-4, long documents 6 to 9 % faster", default="flash2", identity=False
    )
    moments: Literal["fp32", "bf16"] = setting(
        "machine", "name", "of AdamW; bf16 (one process, full fine-tuning): 4 bytes a weight less, rounded stochastically", default="fp32"
    )
    gradients: Literal["fp32", "bf16"] = setting(
        "machine", "name", "bf16 (one process, full fine-tuning): 2 bytes a weight less, rounded every micro-batch (lm_head: 2,048 rows)",
        default="fp32",
    )  # fmt: skip
    precision: Literal["fp32", "bf16", "fp8"] = setting(
        "machine", "name", "of compute; fp8: bf16, but float8 in the blocks' linears; parameters and AdamW are fp32 in all", default="bf16"
    )

    out_dir: str = setting("run", "path", "run folder: config, manifest, metrics, checkpoints, final model", identity=False)
    log_every: int = setting("run", "steps", "between step lines", default=1, minimum=1, identity=False)
    eval_every: int | None = setting(
        "run", "steps", "between evaluations on data_eval; None: at start and end only", default=None, minimum=1, identity=False
    )
    save_every: int | None = setting(
        "run", "steps", "between resumable checkpoints; None: only when stopped", default=None, minimum=1, identity=False
    )
    sample_every: int | None = setting(
        "run", "steps", "between greedy answers to four fixed prompts, in samples.jsonl; None: never", default=None, minimum=1, identity=False
    )
    tensorboard: bool = setting("run", "flag", "also write the metrics as TensorBoard events, in out_dir", default=False, identity=False)
    keep_last: int = setting("run", "checkpoints", "older ones are deleted", default=2, minimum=1, identity=False)
    fresh: bool = setting("run", "flag", "start over although out_dir has a checkpoint (command line only)", default=False, identity=False)
    push: str | None = setting(
        "run", "org/name", "hub repository that gets final/ and adapter/ after the run (command line only)", default=None, identity=False
    )

    def __post_init__(self):
        """A config that exists is a valid one, also when a test or dataclasses.replace makes it."""
        values, problems = _check_keys(type(self), vars(self))
        if problems := problems + _check_rules(type(self), values):
            raise UserError("\n".join(problems))
        vars(self).update(values)  # 5 became 5.0 where the key is a float


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Config):
    """Keys of train_sft.py."""

    loss: Literal["token_mean", "tulu3_release"] = setting(
        "loss", "name", "token_mean: NLL sum / supervised tokens of the step; tulu3_release: NLL sum / its sequences", default="token_mean"
    )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(Config):
    """Keys of train_dpo.py."""

    loss: Literal["dpo_norm", "dpo", "simpo", "ipo", "wpo"] = setting(
        "loss", "name", "dpo_norm: DPO on per-token mean log-probs", default="dpo_norm"
    )
    beta: float = setting(
        "loss", "1/nat", "strength of the tie to the reference; about 5 for means (dpo_norm), 0.1 for sums (dpo)", default=5.0, above=0
    )
    label_smoothing: float = setting("loss", "probability", "that a label is wrong; dpo_norm, dpo and simpo", default=0.0, minimum=0, below=0.5)
    gamma_beta_ratio: float | None = setting("loss", "nat/token", "target margin / beta; simpo only", default=None, minimum=0)
    share_prefix: bool = setting(
        "machine", "flag", "compute what chosen and rejected begin with once: faster, the same to rounding", default=True, identity=False
    )
    sft_weight: float = setting("loss", "-", "weight of an added token-mean NLL of the chosen answers", default=0.0, minimum=0)


SECTIONS = {"common": Config, "sft": SFTConfig, "dpo": DPOConfig}

# (what must not be, what to say). A rule reads the keys that its parameters name, and is skipped while one of them is itself wrong.
COMMON_RULES = (
    (lambda model_path, out_dir: Path(model_path).resolve() == (Path(out_dir) / "final").resolve(),
     "out_dir={out_dir!r}: its final/ is model_path, which the end of the run would replace; expected another folder"),
    (lambda eval_every, data_eval: eval_every and data_eval is None, "eval_every={eval_every}: needs data_eval"),
    (lambda warmup_ratio, warmup_steps: warmup_ratio > 0 and warmup_steps is not None,
     "warmup_ratio={warmup_ratio}, warmup_steps={warmup_steps}: expected one of the two"),
    (lambda lora_rank, lora_alpha: (lora_rank > 0) != (lora_alpha is not None),
     "lora_rank={lora_rank}, lora_alpha={lora_alpha}: expected both (the scale is lora_alpha / lora_rank) or neither"),
    (lambda moments, gradients, precision, lora_rank: "bf16" in (moments, gradients) and (precision == "fp32" or lora_rank > 0),
     "moments={moments!r}, gradients={gradients!r}: bf16 needs precision='bf16' or 'fp8' and full fine-tuning (lora_rank=0)"),
    (lambda kernels, precision: kernels == "plain" and precision == "fp8",
     "kernels='plain', precision='fp8': float8 is in the fused blocks only; expected kernels='fused'"),
    (lambda attention, precision: attention == "flash4" and precision == "fp32",
     "attention='flash4', precision='fp32': flash kernels take 16 bits; expected precision='bf16' or 'fp8'"),
    (lambda attention: attention == "flash4" and not _is_installed("flash_attn.cute"),
     "attention={attention!r}: expected the package flash-attn-4, which is not installed (pip install --pre flash-attn-4)"),
    (lambda tensorboard: tensorboard and not _is_installed("tensorboard"),
     "tensorboard={tensorboard}: expected the package, which is not installed (pip install tensorboard)"),
)  # fmt: skip
RULES = {
    Config: (),
    SFTConfig: COMMON_RULES + (
        (lambda max_seq_len, tokens_per_microbatch: max_seq_len > tokens_per_microbatch,
         "tokens_per_microbatch={tokens_per_microbatch}: expected at least max_seq_len={max_seq_len} (a document must fit one stream)"),
    ),
    DPOConfig: COMMON_RULES + (
        (lambda max_seq_len, tokens_per_microbatch: 2 * max_seq_len > tokens_per_microbatch,
         "tokens_per_microbatch={tokens_per_microbatch}: expected at least twice max_seq_len={max_seq_len} (a pair must fit one stream)"),
        (lambda loss, gamma_beta_ratio: (loss == "simpo") != (gamma_beta_ratio is not None),
         "loss={loss!r}, gamma_beta_ratio={gamma_beta_ratio}: simpo needs one, no other loss has one"),
        (lambda loss, label_smoothing: label_smoothing > 0 and loss not in ("dpo_norm", "dpo", "simpo"),
         "label_smoothing={label_smoothing}: defined for dpo_norm, dpo and simpo, not for loss={loss!r}"),
    ),
}  # fmt: skip


def _is_installed(module):
    """Whether a module can be imported, of a package that may be missing itself or be of another version."""
    parent = module.rpartition(".")[0]
    return (not parent or _is_installed(parent)) and importlib.util.find_spec(module) is not None


INVALID = object()  # stands where a key was given a wrong value: neither missing nor fit for a rule


def load(stage, argv):
    """`load("dpo", sys.argv[1:])` -> the checked DPOConfig of `CONFIG.py [--key=value ...]`; `--help` prints the keys and exits.

    ValueError: every problem of the file's sections and of the command line, one per line."""
    if "--help" in argv or "-h" in argv:
        print(help_text(stage))
        raise SystemExit(0)
    if plan_flags := [arg for arg in argv if arg.partition("=")[0] in ("--gpu", "--count", "--usd-per-hour")]:
        raise UserError(f"{' '.join(plan_flags)}: expected together with --plan only")
    paths = [arg for arg in argv if not arg.startswith("-")]
    if len(paths) != 1:
        hint = " (a value goes behind =, as in --lr=1e-4)" if len(paths) > 1 else ""
        usage = f"train_{stage}.py CONFIG.py [--key=value ...]; --help lists the keys"
        raise UserError(f"expected one config file, got {paths}{hint}: {usage}")
    path = paths[0]
    sections, problems = _read_sections(path)
    overrides, unfit = _read_overrides(SECTIONS[stage], [arg for arg in argv if arg.startswith("-")])
    problems += [f"command line: {problem}" for problem in unfit]
    if stage not in sections:
        problems.append(f"{path}: no section {stage!r}: expected {stage} = dict(...)")

    checked = {"common": {}}
    for section, given in sections.items():
        checked[section], unfit = _check_keys(SECTIONS[section], given)
        problems += [f"{path}: {section}: {problem}" for problem in unfit]
    resolved = {}
    for section in [name for name in sections if name != "common"]:
        cls = SECTIONS[section]
        values = _defaults(cls) | checked["common"] | checked[section] | (overrides if section == stage else {})
        missing = [f"missing {f.name!r}: {f.metadata['help']}" for f in dataclasses.fields(cls) if f.name not in values]
        problems += [f"{path}: {section}: {problem}" for problem in missing + _check_rules(cls, values)]
        resolved[section] = values
    if problems:
        raise UserError("\n".join(problems))
    return SECTIONS[stage](**resolved[stage])


def check_world_size(config, world_size):
    """ValueError if the optimizer step cannot give every one of `world_size` ranks an example, or a key is for one rank only."""
    if config.global_batch_size < world_size:
        raise UserError(
            f"global_batch_size={config.global_batch_size}: a batch that cannot be formed on {world_size} ranks; "
            f"expected at least {world_size}, or fewer ranks"
        )
    if world_size > 1 and "bf16" in (config.moments, config.gradients):
        raise UserError(
            f"moments={config.moments!r}, gradients={config.gradients!r} on {world_size} ranks: bf16 is for one process; "
            "expected 'fp32', which sharding makes small enough"
        )


def config_dict(config):
    """Every key as JSON holds it: for the run folder's config.json."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def resume_dict(config):
    """The keys that must be equal for a run to go on from a checkpoint: all but those that only say where, how often or on what machine."""
    values = config_dict(config)
    return {f.name: values[f.name] for f in dataclasses.fields(config) if f.metadata["identity"]}


def config_hash(config):
    """sha256 (hex) of the stage and its resume_dict."""
    return hashlib.sha256(json.dumps([type(config).__name__, resume_dict(config)], sort_keys=True).encode()).hexdigest()


def help_text(stage):
    """Every key of the stage by group, with type, bounds, unit, default and meaning."""
    lines = [
        f"usage: train_{stage}.py CONFIG.py [--key=value ...] [--fresh] [--push=org/name]",
        f"       train_{stage}.py CONFIG.py [--key=value ...] --plan --gpu a100-80 --count 8 [--usd-per-hour 16]: no run, only its cost",
        f"CONFIG.py holds the dicts common, sft and dpo. Precedence: default < common < {stage} < --key=value.",
    ]
    for group in GROUPS:
        lines.append(f"\n{group}")
        for field in dataclasses.fields(SECTIONS[stage]):
            if field.metadata["group"] == group:
                default = "required" if field.default is MISSING else f"default {field.default!r}"
                place = "" if _scalars(field.type) else " (in the file only)"
                lines.append(f"  {field.name}: {_describe(field)}, {default}{place}")
                lines.append(f"      [{field.metadata['unit']}] {field.metadata['help']}")
    return "\n".join(lines)


def _defaults(cls):
    return {field.name: field.default for field in dataclasses.fields(cls) if field.default is not MISSING}


def sections_of(path):
    """Names of the sections that a config file has, common, sft and dpo; their values are not checked. ValueError: no such file."""
    return set(_read_sections(path)[0])


def _read_sections(path):
    """-> ({section: dict}, problems). Underscore names and imported modules are private to the file; any other name is a typo."""
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path(path).parent.glob("*.py")], n=1)
        raise UserError(f"{path}: no such config file" + (f", did you mean {near[0]!r}?" if near else ""))
    sections, problems = {}, []
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # the file is a program: it may raise anything
        line = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path][-1]
        raise UserError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    for name, value in names.items():
        if name.startswith("_") or isinstance(value, ModuleType):
            continue
        if name not in SECTIONS:
            hint = _did_you_mean(name, SECTIONS) or "; expected common, sft or dpo (a private name starts with _)"
            problems.append(f"{path}: unknown section {name!r}{hint}")
        elif not isinstance(value, dict):
            problems.append(f"{path}: {name}: expected a dict, got {type(value).__name__}")
        else:
            sections[name] = value
            for only, why in COMMAND_LINE_ONLY.items():
                if only in value:
                    problems.append(f"{path}: {name}: {only}: expected on the command line only; here it would {why}")
    return sections, problems


def _read_overrides(cls, args):
    """`--key=value` by the key's declared type, a bare `--key` for a true bool -> (values, problems)."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given, problems = {}, []
    for arg in args:
        name, equals, text = arg.removeprefix("--").partition("=")
        types = _scalars(fields[name].type) if name in fields else [str]
        if types == [bool] and not equals:
            given[name] = True
        elif name in fields and not equals:
            problems.append(f"{arg}: expected --{name}=value")
        elif not types:
            problems.append(f"{name}: no string is read as {_describe(fields[name])}: put it into the config file")
            given[name] = INVALID
        else:
            given[name] = _parse(text, types)
    values, unfit = _check_keys(cls, given)
    return values, problems + unfit


def _parse(text, types):
    """Text as the first of the types that reads it, else still as text, which the check of the key then refuses."""
    for convert in types:
        try:
            return {"true": True, "false": False}[text.lower()] if convert is bool else convert(text)
        except (ValueError, KeyError):
            continue
    return text


def _check_keys(cls, given):
    """-> (the known keys, floats as float and WRONG in place of a wrong value; problems)."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values, problems = {}, []
    for name, value in given.items():
        if name not in fields:
            others = [section for section, other in SECTIONS.items() if name in {field.name for field in dataclasses.fields(other)}]
            ours = THEIR_NAMES.get(name)
            if others:
                hint = f" (a key of {' and '.join(others)})"
            else:
                hint = f", here {ours!r}: {fields[ours].metadata['help']}" if ours in fields else _did_you_mean(name, fields)
            problems.append(f"unknown key {name!r}{hint}")
            continue
        values[name] = value
        if value is not INVALID and (problem := _unfit(fields[name], value)):
            problems.append(problem)
            values[name] = INVALID
        elif type(value) is int and float in _scalars(fields[name].type):
            values[name] = float(value)  # 5 and 5.0 are one config, so they have one hash
    return values, problems


def _unfit(field, value):
    """What is wrong with the value by itself, or None."""
    fits_type = _is_a(value, field.type)
    quoted_none = isinstance(value, str) and value.lower() in ("none", "null") and (field.type is str or not fits_type)
    choices = [choice for member in _members(field.type) if get_origin(member) is Literal for choice in get_args(member)]
    if choices and isinstance(value, str) and not (quoted_none or fits_type):
        return f"{field.name}={value!r}: expected {_describe(field)}{_did_you_mean(value, choices)}"
    if quoted_none or not fits_type:
        got = "a string (None is written without quotes, in the config file)" if quoted_none else type(value).__name__
        if isinstance(value, dict):
            got = f"dict of {' and '.join(sorted({type(amount).__name__ for amount in value.values()}))}"
        return f"{field.name}={value!r}: expected {_describe(field)}, got {got}"
    if isinstance(value, (dict, tuple, str)) and not value:
        return f"{field.name}={value!r}: expected {_describe(field)}, got none"
    if isinstance(value, dict) and not all(0 < amount < math.inf for amount in value.values()):
        return f"{field.name}={value!r}: expected {_describe(field)}"
    if type(value) not in (int, float):
        return None
    bounds = field.metadata
    fits = (
        math.isfinite(value)
        and (bounds["above"] is None or value > bounds["above"])
        and (bounds["minimum"] is None or value >= bounds["minimum"])
        and (bounds["below"] is None or value < bounds["below"])
    )
    return None if fits else f"{field.name}={value!r}: expected {_describe(field)}"


def _check_rules(cls, values):
    problems = []
    for fails, message in RULES[cls]:
        read = {name: values.get(name, INVALID) for name in inspect.signature(fails).parameters}
        if INVALID not in read.values() and fails(**read):
            problems.append(message.format(**values))
    return problems


def _did_you_mean(name, known):
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _members(annotation):
    return get_args(annotation) if get_origin(annotation) in (UnionType, Union) else (annotation,)


def _scalars(annotation):
    """The types that the command line can write: a dict, a tuple or None has no text."""
    types = [str if get_origin(member) is Literal else member for member in _members(annotation)]
    return [member for member in types if member in (bool, int, float, str)]


def _describe(field):
    """`float > 0 or None`: what the key accepts, for --help and for messages."""
    bounds = [f" {sign} {field.metadata[bound]}" for bound, sign in SIGNS.items() if field.metadata[bound] is not None]
    texts = []
    for member in _members(field.type):
        if get_origin(member) is Literal:
            texts.append(" | ".join(get_args(member)))
        elif get_origin(member) is tuple:
            texts.append(f"tuple of {' | '.join(get_args(get_args(member)[0]))}")
        elif get_origin(member) is dict:
            texts.append("dict {str: float or int > 0}")
        else:
            texts.append("None" if member is type(None) else member.__name__ + (" and".join(bounds) if member in (int, float) else ""))
    return " or ".join(texts)


def _is_a(value, annotation):
    """Does the value have the annotated type? Exact: True is not an int; but an int will do for a float."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (UnionType, Union):
        return any(_is_a(value, member) for member in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(k, args[0]) and _is_a(v, args[1]) for k, v in value.items())
    return type(value) in ((int, float) if annotation is float else (annotation,))
