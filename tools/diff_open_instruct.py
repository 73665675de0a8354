"""Glassbox beside the user's own open-instruct checkout (or installed TRL).

The same rows, the same weights, quantity by quantity.

    python -m tools.diff_open_instruct --checkout DIR [--model FOLDER --data FILE] [--stage sft|dpo]
    python -m tools.diff_open_instruct --trl --model FOLDER --data FILE
    python -m tools.diff_open_instruct --their-log FILE --our-run FOLDER

Functions of the checkout are run: use one that you trust. Exit code 0: all equal, or different as intended;
1: a disagreement; 2: something was not compared. docs/open_instruct.md says what each row means.
"""

import argparse
import ast
import functools
import itertools
import sys
from types import SimpleNamespace

import torch

from data import TEMPLATES, mixture_rows
from optim import learning_rate
from plumbing.files import UserError
from tools import diff_trl, quantities, run_logs
from tools.agreement import DIFFERS, SKIPPED, NotCompared, Row, call, items, numbers, print_table
from tools.arguments import at_least
from tools.checkout import Checkout, NotFound
from tools.same_rows import SCRIPT, Case


def learning_rates(checkout, stage, total=50, peak=1e-5):
    """Their scheduler, stepped as accelerate does.

    Once per process in every optimizer step, over so many times as many steps.
    """

    def assigns(name):
        return lambda node: (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == name
            and isinstance(node.value, ast.Call)
        )

    module, schedules = checkout.main_part(SCRIPT[stage], "lr_scheduler = ..", assigns("lr_scheduler"))
    statements = [schedules]
    if any(isinstance(part, ast.Name) and part.id == "num_warmup_steps" for part in ast.walk(schedules)):
        # from July 2025 to January 2026 an argument of the call is set a statement earlier
        _, warms_up = checkout.main_part(SCRIPT[stage], "num_warmup_steps = ..", assigns("num_warmup_steps"))
        statements.insert(0, warms_up)
    settings = (("linear", 0.03), ("cosine", 0.1), ("linear", 0.0))
    for processes, (schedule, ratio) in itertools.product((1, 8), settings):
        args = SimpleNamespace(lr_scheduler_type=schedule, warmup_ratio=ratio, final_lr_ratio=None)
        optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=peak)
        call(
            module.run,
            statements,
            args=args,
            optimizer=optimizer,
            num_training_steps_for_scheduler=total * processes,
        )
        theirs = []
        for _ in range(total):
            theirs.append(module["lr_scheduler"].get_last_lr()[0])
            optimizer.step()
            for _ in range(processes):
                module["lr_scheduler"].step()
        ours = [learning_rate(step, total, peak, schedule, int(ratio * total)) for step in range(total)]
        warmup = int(ratio * total * processes) / processes
        known = [learning_rate(step, total, peak, schedule, warmup) for step in range(total)]
        why = (
            f"their schedule counts processes, so its warm-up is {warmup:g} steps, ours {int(ratio * total)}"
        )
        name = f"rate: {schedule}, warm-up {ratio:g}, {processes} process{'es' if processes > 1 else ''}"
        yield numbers(name, "step", ours, theirs, 1e-9, (known, why))


def _their_rule(checkout, rows):
    """(the name of their rule here, amount as text -> the rows that their code picks).

    Of whichever revision it is.
    """
    instead = dict(load_dataset=lambda *_, **__: rows, get_commit_hash=lambda *_, **__: None)

    def find(name, file):
        try:
            found = checkout.find([name], [file])
        except NotFound:
            return None
        checkout.module(file).update(instead)
        return found

    def updated(amount):
        config = kind.__new__(kind)  # __init__ asks the hub for a commit
        config.dataset, config.dataset_name = rows, "rows"
        config.update_range(int(float(amount) * len(rows)) if "." in amount else int(amount))
        return list(config.dataset["row"])

    def shuffled(amount):
        mixture = {"rows": float(amount) if "." in amount else int(amount)}
        return list(call(get, mixture, splits=["train"], columns_to_keep=["row"])["train"]["row"])

    if load := find("load_dataset_configs", "dataset_transformation"):  # since 2025-11-03
        return "choice", lambda amount: list(
            call(load, ["rows", amount], ["train"], [], [])[0].dataset["row"]
        )
    if kind := find("DatasetConfig", "dataset_transformation"):  # since 2025-01-28; repeats since 2025-07-21
        return "choice" if hasattr(kind, "select_samples") else "first", updated
    if get := find("get_datasets", "utils"):
        return "shuffle", shuffled
    raise NotFound("not found in this checkout: load_dataset_configs, DatasetConfig, get_datasets")


def picked_rows(checkout, _stage, n=1009):
    """Rows that their mixture code picks of n numbered rows; ours by the same rule.

    Their code is given a data set of these rows in place of a download.
    """
    import datasets  # takes a second, which not every comparison needs

    rows = datasets.Dataset.from_dict({"row": list(range(n))})
    rule, pick = _their_rule(checkout, rows)
    for amount in ("0.1", "0.5", "1.0", "2.3", "100", "1500"):
        wanted = float(amount) if "." in amount else int(amount)
        if rule != "choice" and (wanted > n or amount == "2.3"):
            continue  # no repeats before 2025-07-21
        name = f"picked rows, {amount} of {n:,}" + (f", rows={rule!r}" if rule != "choice" else "")
        ours, theirs = mixture_rows(n, wanted, rule).tolist(), pick(amount)
        if len(ours) != len(theirs):
            yield Row(
                name,
                f"{len(ours):,} rows",
                "",
                DIFFERS,
                f"ours picks {len(ours):,} rows, theirs {len(theirs):,}",
            )
        else:
            yield items(
                name,
                "row",
                ours,
                theirs,
                lambda i, a=ours, b=theirs: f"place {i}: ours {a[i]}, theirs {b[i]}",
            )


ANY_RUN = {"learning rate": learning_rates, "picked rows": picked_rows}  # of (checkout, stage)
ON_ROWS = {
    "rendered text": quantities.texts,
    "token ids": quantities.ids,
    "supervised tokens": quantities.supervised,
    "rows kept": quantities.rows_kept,
    "vocabulary": quantities.vocabulary,
    "log-probs per token": quantities.log_probs,
    "weight decay": quantities.decayed,
}
ON_ROWS_OF = {
    "sft": {"SFT loss": quantities.sft_losses},
    "dpo": {"preference losses": quantities.preference_losses},
}


def compare(parts):
    """[Row] of {quantity: () -> Rows}; what cannot be run is a row too."""
    rows = []
    for quantity, rows_of in parts.items():
        try:
            rows += rows_of()
        except (NotFound, NotCompared) as error:
            rows.append(Row(quantity, "", "", SKIPPED, str(error)))
    return rows


def parts_of(args):
    """{quantity: () -> Rows} that the arguments ask for, and what is compared, in words.

    ValueError when they do not fit together.
    """
    if bool(args.model) != bool(args.data) or (args.trl and (not args.data or args.stage != "dpo")):
        raise UserError(
            "--model and --data: expected both, or for --checkout neither; --trl needs both, and stage dpo"
        )
    if bool(args.their_log) != bool(args.our_run) or not (args.checkout or args.trl or args.their_log):
        raise UserError("expected --checkout DIR, or --trl, or both --their-log FILE and --our-run FOLDER")
    parts, about = {}, []
    checkout = Checkout(args.checkout) if args.checkout else None
    case = Case(args, checkout) if args.data else None
    if checkout:
        about.append(f"open-instruct at {checkout.commit}")
        for name, part in ANY_RUN.items():
            parts[name] = functools.partial(part, checkout, args.stage)
        on_rows = ON_ROWS | ON_ROWS_OF[args.stage] if case else {}
        for name, part in on_rows.items():
            parts[name] = functools.partial(part, case)
    if args.trl:
        about.append(f"TRL {diff_trl.version()}")
        parts["TRL"] = lambda: diff_trl.rows(case)
    if args.their_log:
        about.append(f"{args.their_log} and {args.our_run}")
        parts["run logs"] = lambda: run_logs.rows(args.their_log, args.our_run)
    if case:
        about.append(
            f"{len(case.documents)} conversations of {args.data} ({case.dropped} rows dropped), "
            f"{args.max_seq_len} tokens of each"
        )
    return parts, "; ".join(about)


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.diff_open_instruct", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--checkout", help="folder of an open-instruct checkout; its functions are run")
    parser.add_argument("--trl", action="store_true", help="compare with the installed TRL (stage dpo)")
    parser.add_argument("--model", help="Hugging Face folder; fp32 on the CPU, so a small one")
    parser.add_argument("--data", help="rows, as in a config's data")
    parser.add_argument("--stage", choices=["sft", "dpo"], default="dpo", help="(default: %(default)s)")
    template = "of both sides (default: %(default)s)"
    parser.add_argument("--template", choices=list(TEMPLATES), default="tulu", help=template)
    parser.add_argument(
        "--rows", type=at_least(1), default=8, help="of the data, so many are compared (default: %(default)s)"
    )
    length = "tokens of each (default: %(default)s)"
    parser.add_argument("--max-seq-len", type=at_least(2), default=512, help=length)
    parser.add_argument("--their-log", help="what an open-instruct run printed")
    parser.add_argument("--our-run", help="the run folder of ours beside it")
    args = parser.parse_args(argv)
    try:
        parts, about = parts_of(args)
        print(f"{about}\n")
        return print_table(compare(parts))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
