"""An open-instruct training YAML as one of our configs.

    python -m tools.from_open_instruct FILE.yaml [--stage sft|dpo] [--processes N] [--out CONFIG.py]
        [--date YYYY-MM-DD | --checkout DIR]

With a date, or that of a checkout's commit, what the YAML does not say is what open-instruct did on that day.

Every key of the YAML ends up in one of three places: a key of ours, a comment that says why it has none, or
the error that lists whatever cannot be represented. No text is converted: `None`, `5e-7` (a string in YAML
1.1) and `"true"` are named. docs/open_instruct.md has more.
"""

import argparse
import datetime
import difflib
import itertools
import sys
import textwrap
from pathlib import Path

from plumbing import hub
from plumbing.config import section
from plumbing.files import UserError
from tools import open_instruct_yaml as theirs
from tools.arguments import at_least
from tools.checkout import Checkout


class Translation:
    """The YAML's keys, taken one by one, and what became of them.

    `values` of ours, comments, problems. At the end `given` is empty.
    """

    def __init__(self, given, stage, date=None):
        self.given, self.stage, self.date = dict(given), stage, date
        self.values = {"precision": "bf16"}
        self.differs, self.unused, self.asked = [], [], {}
        self.per_device = None
        self.problems = []
        for key, value in given.items():
            self.problems += theirs.unparsed(key, value)
        self.defaults = theirs.DEFAULTS | (theirs.DEFAULTS_SFT if stage == "sft" else {})

    def pop(self, names):
        """{name: value} of those of `names` that the YAML has and that are not null there."""
        found = {}
        for name in names:
            value = self.given.pop(name, None)
            if value is not None:
                found[name] = value
        return found

    def take(self, *names):
        """The value of whichever of `names` the YAML has.

        Else open-instruct's default, with a comment; else None.
        """
        self.asked |= dict.fromkeys(names)
        found = self.pop(names)
        if len(found) > 1:
            self.problems.append(f"{', '.join(found)}: expected one of them")
        if found:
            return next(iter(found.values()))
        for name in names:
            if name in self.defaults:
                self.differs.append(
                    f"{name} is not in the YAML: open-instruct's default, {self.defaults[name]!r}"
                )
                return self.defaults[name]
        return None

    def note(self, name, *values):
        """A comment on an implicit value, by its name in NOTES."""
        self.differs.append(theirs.NOTES[name].format(*values))

    def default_by_date(self, key):
        """The default of a key of theirs.DATED on the day, with a comment; None without a day."""
        day, commit, before, since = theirs.DATED[key]
        if self.date is None:
            self.problems.append(
                f"{key}: not in the YAML, and open-instruct's default changed: it was {before!r} before "
                f"{day} ({commit}) and is {since!r} since; expected a value, or --date"
            )
            return None
        is_before = self.date < day
        value, other = (before, since) if is_before else (since, before)
        self.note("dated", key, self.date, value, other, "since" if is_before else "before", day, commit)
        return value

    def behaviour(self, name, note, undated):
        """What open-instruct did on the day about `name` of theirs.CHANGED.

        Without a day `undated`, and the comment `note`, which names the days.
        """
        if self.date is None:
            self.note(note)
            return undated
        day, commit, value = [change for change in theirs.CHANGED[name] if change[0] <= self.date][-1]
        self.note("behaviour", name, value, self.date, f", since {day} ({commit})" if day else "")
        return value

    def said(self):
        """`values` without those that are left to our defaults; a template of None is the tokenizer's own."""
        return {key: value for key, value in self.values.items() if value is not None or key == "template"}

    def refuse(self, key, value, why):
        """A value that has no meaning here."""
        self.problems.append(f"{key}={value!r}: cannot be represented: {why}")


def translate(given, stage, processes, date=None):
    """The Translation of `given`, as open-instruct was on `date` ("2026-01-15") where one is given.

    ValueError, one line per problem, when a key or a value cannot be represented.
    """
    t = Translation(given, stage, date)
    for key in given:
        if key in theirs.WHY_NOT:
            t.unused.append(f"{key}: {t.given.pop(key)!r} ({theirs.WHY_NOT[key]})")
        elif key in theirs.ONLY_NEUTRAL:
            value, (neutral, why) = t.given.pop(key), theirs.ONLY_NEUTRAL[key]
            if value is not None and value not in neutral:
                t.refuse(key, value, why)
    _model(t)
    _data(t)
    _batch(t, processes)
    _schedule(t)
    _sft_loss(t) if stage == "sft" else _dpo_loss(t)
    _run(t)
    for key in t.given:
        near = difflib.get_close_matches(key, [*t.asked, *theirs.WHY_NOT, *theirs.ONLY_NEUTRAL], n=1)
        t.problems.append(
            f"{key}: no key of stage {stage!r} that this tool knows"
            + (f", did you mean {near[0]!r}?" if near else "")
        )
    if not t.problems:
        try:
            section(stage)(**t.said())
        except ValueError as error:
            t.problems.append(f"as a config of ours: {error}")
    if t.problems:
        raise UserError("\n".join(t.problems))
    return t


def _model(t):
    model = t.take("model_name_or_path")
    if model is None:
        t.problems.append("model_name_or_path: not in the YAML; expected a model")
    tokenizer = t.take("tokenizer_name", "tokenizer_name_or_path")
    if tokenizer not in (None, model):
        t.refuse("tokenizer_name", tokenizer, f"the tokenizer is that of model_path={model!r}")
    t.values["model_path"] = _with_revision(t, model)
    template = t.take("chat_template_name")
    if template is None:
        template = t.behaviour("template", "template", "tulu")
    elif template not in ("tulu", "zephyr"):
        t.refuse("chat_template_name", template, "expected tulu or zephyr")
    if t.take("add_bos"):
        if template != "tulu":
            t.refuse("add_bos", True, f"expected chat_template_name tulu with it, not {template!r}")
        template = "tulu_bos"
    t.values["template"] = template
    if template == "zephyr":
        t.note("zephyr")
    if t.take("use_lora"):
        t.values |= {"lora_rank": t.take("lora_rank"), "lora_alpha": t.take("lora_alpha")}
        if dropout := t.take("lora_dropout"):
            t.note("dropout", dropout)
    else:
        for key in list(t.given):
            if key.startswith("lora_"):
                t.unused.append(f"{key}: {t.given.pop(key)!r} (acts only with use_lora)")
    saves_memory = [
        t.take("gradient_checkpointing") not in (None, False),
        t.take("activation_memory_budget") not in (None, 1),
    ]
    t.values["recompute"] = "full" if any(saves_memory) else "none"
    t.note("weights")


def _with_revision(t, model):
    """The model's name, with the commit, tag or branch of the YAML where that is not main."""
    revision, of_tokenizer = t.take("model_revision") or "main", t.take("tokenizer_revision")
    if of_tokenizer not in (None, revision):
        t.refuse("tokenizer_revision", of_tokenizer, f"the tokenizer is that of model_revision={revision!r}")
    if revision == "main":
        return model
    name = f"{model}@{revision}"
    if not isinstance(revision, str) or Path(str(model)).is_dir() or hub.parse(name) is None:
        t.refuse("model_revision", revision, "expected text, for a model org/name of the hub")
    return name


def _mixture(t):
    """[((name, amount), split)] of the data sources, or None when there is a problem."""
    keys = ("dataset_mixer", "dataset_mixer_list", "mixer_list", "dataset_name", "train_file")
    found = t.pop(keys)
    splits = t.take("dataset_mixer_list_splits", "mixer_list_splits") or ["train"]
    if len(found) != 1:
        return t.problems.append(f"data: found {list(found)}; expected one of {', '.join(keys)}")
    ((key, value),) = found.items()
    if isinstance(value, dict):
        value = list(itertools.chain(*value.items()))
    elif not isinstance(value, list):
        value = [value, 1.0]
    pairs = list(zip(value[::2], value[1::2]))
    splits = splits * len(pairs) if len(splits) == 1 else splits
    if len(value) % 2 or len(splits) != len(pairs) or len(dict(pairs)) < len(pairs):
        return t.refuse(
            key,
            value,
            "expected name, amount, name, amount, .. with every name once; one split, or one for each: "
            f"{splits}",
        )
    return list(zip(pairs, splits))


def _data(t):
    amounts = {}
    for (name, amount), split in _mixture(t) or ():
        if isinstance(amount, str) and theirs.is_number(
            amount
        ):  # the mixer list's own grammar: with a point a share, without one a count
            amount = float(amount) if "." in amount else int(amount)
        if type(amount) is int and amount == 1 and t.date is None:
            t.refuse(name, amount, theirs.NOTES["one"])
        elif type(amount) is int and amount == 1:
            amount = t.behaviour("one", "one", 1)
        amounts[name if split == "train" else f"{name}[{split}]"] = amount
    t.values["data"] = amounts
    if any(amount != 1.0 for amount in amounts.values()):
        t.values["rows"] = t.behaviour("rows", "rows", "choice")
    transforms = t.take("dataset_transform_fn", "transform_fn") or []
    turns = [theirs.TRANSFORMS.get(name) for name in transforms if name not in theirs.FILTERS]
    if transforms and (len(turns) != 1 or turns[0] is None):
        t.refuse(
            "transform_fn",
            transforms,
            f"expected one of {list(theirs.TRANSFORMS)}, and {sorted(theirs.FILTERS)}",
        )
    t.values["supervise"] = turns[0] if turns else "all"
    if t.stage == "dpo":
        t.values["supervise"] = t.behaviour("supervise", "turns", t.values["supervise"])
    t.note("order")


def _batch(t, processes):
    said = t.take("num_processes")
    if None not in (said, processes) and said != processes:
        t.problems.append(
            f"num_processes={said}, --processes {processes}: expected one of them, or equal numbers"
        )
    processes = processes or said
    t.per_device, accumulation = t.take("per_device_train_batch_size"), t.take("gradient_accumulation_steps")
    parallel = t.take("sequence_parallel_size") or 1  # so many processes share one sequence
    if processes is None:
        t.problems.append(
            "the batch is per_device_train_batch_size * gradient_accumulation_steps * processes: expected "
            "--processes N"
        )
    elif (
        not all(type(n) is int and n > 0 for n in (processes, t.per_device, accumulation, parallel))
        or processes % parallel
    ):
        t.problems.append(
            f"the batch: {t.per_device} * {accumulation} * {processes} / {parallel}: expected whole numbers"
        )
    else:
        t.values["global_batch_size"] = t.per_device * accumulation * processes // parallel
        t.note("batch", t.per_device, accumulation, processes // parallel)


def _schedule(t):
    t.values |= {"lr": t.take("learning_rate"), "lr_schedule": (schedule := t.take("lr_scheduler_type"))}
    if schedule not in (None, "linear", "cosine"):
        t.refuse("lr_scheduler_type", schedule, "expected linear or cosine, to 0 at the last step")
    for key in ("warmup_ratio", "weight_decay", "seed"):
        t.values[key] = t.take(key)
    epochs = ("num_train_epochs", "num_epochs")
    t.values["max_steps"] = steps = t.take("max_train_steps")
    if type(steps) is int and steps > 0:
        # Ours ends with the epochs or with max_steps, whichever is first. The rows are not known here, but an
        # epoch has at least one step, so max_steps epochs never end the run before max_steps does.
        t.asked |= dict.fromkeys(epochs)
        said = "".join(f" ({key}: {value!r} in the YAML)" for key, value in t.pop(epochs).items())
        t.values["num_epochs"] = steps
        t.note("steps", steps, said)
    else:
        t.values["num_epochs"] = t.take(*epochs)
    t.note("warmup")
    t.values["max_grad_norm"] = t.take("clip_grad_norm", "max_grad_norm")
    if t.values["max_grad_norm"] in (None, -1, 0):  # switches off the script's own clipping, not DeepSpeed's
        t.values["max_grad_norm"] = 1.0
        t.note("clip")


def _sft_loss(t):
    reduction = t.take("reduce_loss")
    if reduction not in (None, "mean", "sum"):
        t.refuse("reduce_loss", reduction, "expected mean or sum")
    t.values["loss"] = "tulu3_release" if reduction == "sum" else "token_mean"
    if reduction != "sum":
        t.note("mean")
    elif t.per_device != 1:
        t.note("sum", t.per_device)


def _dpo_loss(t):
    t.values |= {"loss": (loss := t.take("loss_type", "dpo_loss_type")), "beta": t.take("beta", "dpo_beta")}
    t.values |= {"label_smoothing": t.take("label_smoothing", "dpo_label_smoothing")}
    for key in theirs.DATED:
        ours = "loss" if key == "loss_type" else key
        if t.values[ours] is None:
            t.values[ours] = t.default_by_date(key)
    if loss not in (None, "dpo", "dpo_norm", "simpo", "wpo"):
        t.refuse("loss_type", loss, "expected dpo, dpo_norm, simpo or wpo")
    if loss == "wpo":
        t.note("wpo")
    ratio = t.take("gamma_beta_ratio", "dpo_gamma_beta_ratio")
    if loss == "simpo":
        t.values["gamma_beta_ratio"] = 0.3 if ratio is None else ratio  # its default in all versions
    elif ratio is not None:
        t.unused.append(f"gamma_beta_ratio: {ratio!r} (acts only with loss_type simpo)")
    if reduction := t.take("reduce_loss"):
        t.unused.append(f"reduce_loss: {reduction!r} (the DPO loss is a mean over pairs whatever it says)")


def _run(t):
    t.values |= {
        "max_seq_len": (length := t.take("max_seq_length")),
        "out_dir": t.take("output_dir"),
        "log_every": t.take("logging_steps"),
    }
    if length is None:
        t.problems.append(
            "max_seq_length: not in the YAML (open-instruct then cuts nothing); expected a number of tokens"
        )
    elif type(length) is not int:
        t.refuse("max_seq_length", length, "expected a whole number of tokens")
    else:
        t.values["tokens_per_microbatch"] = 2 * length  # sets memory, not results
    every, kept = t.take("checkpointing_steps"), t.take("keep_last_n_checkpoints")
    if every is not None and str(every).isdecimal():
        t.values["save_every"] = int(every)
    elif every is not None:
        t.unused.append(
            f"checkpointing_steps: {every!r} (save_every counts steps; a run that is stopped saves anyway)"
        )
    t.values["keep_last"] = None if kept == -1 else kept
    if kept == -1:
        t.unused.append("keep_last_n_checkpoints: -1 (keep_last is a number; the default is kept)")


def config_text(t, source):
    """The config file: what differs and what has no equivalent as comments, then the section."""

    def comment(title, lines):
        wrapped = [
            textwrap.fill(
                line, 130, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False
            )
            for line in lines
        ]
        return ["#", f"# {title}", *wrapped] if lines else []

    head = [f"# From open-instruct's {Path(source).name!r} by `python -m tools.from_open_instruct`."]
    head += comment("What the YAML does not say, or what differs:", t.differs) + comment(
        "Keys without an equivalent:", t.unused
    )
    section = (
        [f"{t.stage} = dict("]
        + [f"    {key}={value!r}," for key, value in t.said().items()]
        + [")"]
    )
    return "\n".join([*head, "", *section, ""])


def _day(text):
    """`text` if it is None or a day. UserError otherwise."""
    try:
        return text and datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise UserError(f"--date {text}: expected a day, YYYY-MM-DD") from error


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.from_open_instruct", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "yaml", metavar="FILE.yaml", help="a training config of open-instruct, of finetune or DPO"
    )
    parser.add_argument("--stage", choices=["sft", "dpo"], help="default: the one that the keys belong to")
    parser.add_argument("--processes", type=at_least(1), help="GPUs of the run, over all nodes")
    parser.add_argument("--out", help="file to write; default: print it")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--date", help="YYYY-MM-DD, of the open-instruct that ran it: some defaults changed")
    when.add_argument("--checkout", metavar="DIR", help="its checkout: the day of its commit")
    args = parser.parse_args(argv)
    try:
        date = Checkout(args.checkout).date if args.checkout else _day(args.date)
        given = theirs.read_yaml(args.yaml)
        stage = args.stage or theirs.stage_of(given)
        text = config_text(translate(given, stage, args.processes, date), args.yaml)
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            Path(args.out).write_text(text)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {args.yaml}: {line}", file=sys.stderr)
        return 1
    if not args.out:
        print(text, end="")
        return 0
    print(f"wrote {args.out}; the comments at its top say what differs and which keys have no equivalent")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
