"""What both demos do.

They run the training scripts as a user would, measure held-out pairs before and after DPO, and print it.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from data import HEADERS, load_preferences, render
from families import device_of, load_model, load_pretrained
from model import generate
from packing import in_order
from plumbing.files import read_jsonl, table
from train_dpo import answer_logps


def run_script(script, *arguments):
    """`python SCRIPT ARGUMENTS` in a process of its own. SystemExit when it fails."""
    print(f"\n$ python {' '.join((script, *arguments))}", flush=True)
    if status := subprocess.run([sys.executable, script, *arguments]).returncode:
        raise SystemExit(f"{script} ended with status {status}")


@torch.no_grad()
def held_out_logps(folder, config):
    """(n, 2): mean log-prob per token, in nats, of every held-out pair of a dpo `config`.

    Of the chosen and of the rejected answer.
    """
    model, tokenizer = load_model(folder, is_precise=True)
    _, pairs = load_preferences(config, tokenizer, log=lambda line: None)
    means = []
    for ids in in_order(len(pairs), 8):
        sums, counts = answer_logps(model, pairs.pack(ids).to(device_of(model)), len(ids))
        means.append((sums / counts).T)
    return torch.cat(means).double().cpu().numpy()


def greedy_answers(folder, prompts, template, max_new_tokens):
    """The greedy answers of the model in `folder` to `prompts`, as texts without the end-of-turn token."""
    model, tokenizer = load_pretrained(folder)
    questions = []
    for prompt in prompts:
        text, _ = render([dict(role="user", content=prompt)], template, tokenizer)
        questions.append(tokenizer.encode(text + HEADERS[template].format("assistant")))
    texts = []
    for ids in generate(model, questions, max_new_tokens, eos_id=tokenizer.eos_id):
        texts.append(tokenizer.decode([token for token in ids if token != tokenizer.eos_id]))
    return texts


def interval(values, groups=None, resamples=2000):
    """(mean, low, high): the mean of `values` (n,) and its 95 % percentile bootstrap interval.

    groups (n,): resampled are whole groups, because answers to one prompt are not independent of each other.
    None: every value is its own.
    """
    values = np.asarray(values, dtype=np.float64)
    _, member = np.unique(
        np.arange(len(values)) if groups is None else np.asarray(groups), return_inverse=True
    )
    sums, counts = np.bincount(member, weights=values), np.bincount(member)
    picks = np.random.RandomState(0).randint(len(sums), size=(resamples, len(sums)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    return values.mean(), *np.percentile(means, (2.5, 97.5))


def preference_table(before, after, beta, groups=None):
    """{quantity: (mean, low, high)} from the (n, 2) mean log-probs of two models.

    They are the SFT model (DPO's reference) and the DPO model. The reward is beta * (after - before); before
    DPO every reward is 0, so its margin is 0 and its accuracy a coin's.
    """
    margins = beta * ((after - before)[:, 0] - (after - before)[:, 1])
    return {
        "likelier answer is the chosen one, before": interval(before[:, 0] > before[:, 1], groups),
        "likelier answer is the chosen one, after": interval(after[:, 0] > after[:, 1], groups),
        "reward accuracy, after (chance: 0.5)": interval(margins > 0, groups),
        "reward margin, after (before: 0)": interval(margins, groups),
    }


def read_metrics(run):
    """The lines of a run folder's metrics.jsonl, as dicts."""
    return read_jsonl(Path(run) / "metrics.jsonl")


def values_of(lines, metric):
    """The values of a metric, of the lines that have it."""
    return [line[metric] for line in lines if metric in line]


def print_curve(run, rows=12):
    """Print the training curve of a run folder.

    About `rows` of its steps, one line each, with a bar as long as the loss.
    """
    steps = [line for line in read_metrics(run) if "loss" in line]
    shown = np.unique(np.linspace(0, len(steps) - 1, rows).round().astype(int))
    picked = [steps[i] for i in shown]
    highest = max(values_of(picked, "loss"))
    columns = [
        name for name in ("loss", "rewards/margins", "rewards/accuracies", "grad_norm") if name in picked[0]
    ]
    lines = []
    for line in picked:
        values = [f"{line[name]:.4f}" for name in columns]
        lines.append([str(line["step"]), *values, "#" * round(30 * line["loss"] / highest)])
    print("\n" + table(["step", *columns, ""], lines, left=(-1,)))
