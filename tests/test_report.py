"""report.py: the right numbers at the right places of the page, from folders made by hand."""

import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from world import ROOT, launch, write_config

import train_dpo
import train_sft
from analysis import verdict as judged
from reports import page as report
from reports import plots
from reports.charts import BUCKETS, Chart, Effect, Forest, Line, forest_svg, number, smoothed, svg, ticks
from reports.figures import PANELS, POINT, axiom_forests, axioms_chart, separation_charts
from reports.folders import read, short_names
from reports.html import COLOURS, figure, table
from reports.summary import BASELINES, words

CONFIG = {
    "out_dir": "o",
    "loss": "dpo_norm",
    "beta": 2.0,
    "max_grad_norm": 1.0,
    "lr": 1e-3,
    "data": {"a.jsonl": 1.0},
}
LOSSES = {name: loss.facts() for name, loss in train_dpo.LOSSES.items()}
MANIFEST = {"stage": "dpo", "loss": LOSSES["dpo_norm"], "weights": "0123456789abcdef" * 4, "versions": {"torch": "2.13"},
            "commit": "a" * 40 + "+changes", "finished": "2026-11-30T01:38:42+0000"}  # fmt: skip
NORMS = (0.5, 1.5, 1.0)  # one of three is clipped: 1.0 is not above 1.0
PROMPT = "<|user|>\n<script>alert(\"x\")</script> & 'more'\n"


def step(number, norm):
    rewards = {
        "rewards/chosen": 0.1 * number,
        "rewards/rejected": -0.3 * number,
        "rewards/margins": 0.4 * number,
    }
    rest = {"lr": 1e-3, "step_s": 20.0 * number, "tokens_per_s": 1000.0 * number**2, "peak_mem_gib": 2.0}
    means = {"rewards/accuracies": 0.5, "logps/chosen": -10.0, "logps/rejected": -20.0}
    return {"step": number, "loss": 1 / number, "grad_norm": norm, **rewards, **means, **rest}


def evaluation(number, accuracy, half):
    held_out = {
        "loss": 0.6,
        "rewards/accuracies": accuracy,
        "rewards/margins": 2.0,
        "rewards/chosen": 1.0,
        "rewards/rejected": -1.0,
    }
    held_out |= {"rewards/accuracies_ci95": half, "rewards/margins_ci95": 0.5}
    return {"step": number} | {f"eval/{name}": value for name, value in held_out.items()}


LINES = [
    evaluation(0, 0.0, 0.0),
    *[step(i + 1, norm) for i, norm in enumerate(NORMS)],
    evaluation(3, 0.98214, 0.01551),
]


def write_run(folder, lines=LINES, samples=(), **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    loss = LOSSES.get(config.get("loss", "dpo_norm"))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | {"loss": loss}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


def write_steering(folder, side="chosen", pooling="last"):
    """A spectrum of two layers, of that side and pooling, and a sweep over two lambdas with one axiom."""
    (folder / "sweep_matched").mkdir(parents=True)
    (folder / "vector.safetensors").touch()
    (folder / "manifest.json").write_text(
        json.dumps({"inputs": {"texts": "t.jsonl", "sft": "f" * 64}, "layers": 2})
    )
    layer = {
        "relative": 0.5,
        "cosine": 0.9,
        "explained_centred": [0.25],
        "rank_one": 0.75,
        "effective_rank": 3.0,
    }
    about = {"side": side, "pooling": pooling}
    layers = [layer | {"layer": i} for i in range(2)]
    (folder / "spectrum.json").write_text(json.dumps(about | {"layers": layers}))
    verdict = {
        "verdict": "rising",
        "because": [],
        "estimate": [1.0, 2.0],
        "low": [0.5, 1.5],
        "high": [1.5, 2.5],
        "change": 1.0,
    }
    verdict |= {
        "change_interval": [0.5, 1.5],
        "permuted": [[-0.5, -0.5], [0.25, 0.25]],
        "groups": 40,
        "oracle_share": 0.5,
        "relevant": 1.0,
    }
    ranks = {
        "null_changes": {"isotropic": [-0.5, 0.25], "sign-flipped": [0.0, 0.5]},
        "null_sd": 0.25,
        "size_sd": 4.0,
        "p_change": 0.05,
    }
    verdict |= {"nulls": ranks, "decision": "go on", "advice": "a change that matters"}
    axiom = verdict | {
        "category": "Privacy",
        "level": 0.01,
        "verdict": "flat",
        "because": ["random directions change as much"],
    }
    profile = [
        {"lambda": x, "layer": i, "category": c, "separation": x + i}
        for x in (0.0, 1.0)
        for i in range(2)
        for c in ("Privacy", "overall")
    ]
    done = {
        "auc": 0.75,
        "auc_interval": [0.5, 1.0],
        "preference_accuracy": 0.5,
        "preference_interval": [0.25, 0.75],
        "refused_unsafe": 0.25,
        "refused_unsafe_interval": [0.125, 0.5],
        "refused_safe": 0.0,
        "refused_safe_interval": [0.0, 0.25],
        "logp_chosen": -1.5,
        "logp_rejected": -2.5,
    }
    entry = done | {"kl_from_sft": 0.125, "kl_to_dpo": 0.5, "repeated_4grams": 0.0}
    sweep = {
        "inputs": {"lambdas": [0, 1.0], "inject": "matched", "vector": hashlib.sha256().hexdigest()}, "verdicts": [verdict | {"category": "overall", "level": 0.05}, axiom],
        "texts": {"texts": 80, "groups": 60, "effective": 50.0, "grouped_by": "words"},
        "behaviour_of": {"pairs": 25, "kl_texts": 8, "continued": 7, "unsafe": 16, "safe": 15},
        "warnings": ["saturated at 55.00"], "notes": [], "profile": profile, "oracle": {"lambdas": [0, 1.0], "separation": [1.0, 3.0], "change": 2.0},
        "shifts": [{"lambda": x, "achieved": 0.875 * x, "off_axis": 0.125, "strength": {"0": 0.0, "1": 0.0625}} for x in (0, 1.0)],
        "behaviour": [{"lambda": x} | entry for x in (0, 1.0)],
        "errors": {"matched": {"calibration": 0.0, "held_out": 0.2214}},
        "dpo": done | {"separation": {"overall": 2.5, "Privacy": 0.5}, "preference_accuracy": 1.0},
        "baselines": {name: {"separation": 1.0, "auc": 0.75, "auc_interval": [0.5, 1.0]} for name in BASELINES} | {"after_length": 0.125},
    }  # fmt: skip
    (folder / "sweep_matched/aqi.json").write_text(json.dumps(sweep))
    return folder


class Reader(HTMLParser):
    """A page as its reader sees it: tables {(h2, h3): rows of texts}, figures {(h2, title): {legend entry:
    last value}}, units {title}.
    """

    def __init__(self, text):
        super().__init__()
        self.tables, self.figures, self.units, self.open, self.tags = {}, {}, {}, [], []
        self.feed(text)
        assert not self.open, "unbalanced tags"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append([tag, ""])
        if tag == "table":
            self.tables[self.h2, self.h3] = self.rows = []  # of two under one heading the second
        elif tag == "tr":
            self.rows.append([])
        elif tag == "figure":
            self.figures[self.h2, None] = self.legend = {}

    def handle_data(self, data):
        for element in self.open:
            element[1] += data

    def handle_endtag(self, tag):
        name, text = self.open.pop()
        assert name == tag
        if tag in ("h2", "h3"):
            setattr(self, tag, text)
        elif tag in ("td", "th"):
            self.rows[-1].append(text)
        elif tag == "b" and self.open[-1][0] == "figcaption":
            self.title = text
            self.figures[self.h2, text] = self.figures.pop((self.h2, None))
        elif tag == "span" and self.open[-1][0] == "figcaption":
            self.units[self.title] = text
        elif tag == "span":
            self.entry = text.strip()
            self.legend[self.entry] = None
        elif tag == "b" and self.open[-1][0] == "li":
            self.legend[self.entry] = text


def show(tmp_path, *folders):
    """(text of the page, Reader of it)."""
    out = tmp_path / "page.html"
    report.main([*map(str, folders), f"--out={out}"])
    return out.read_text(), Reader(out.read_text())


# ---------------------------------------------------------------- training runs


def test_one_run(tmp_path, capsys):
    """Last rewards 0.3 and -0.9 over beta 2 are log-ratios 0.15 and -0.45; 20 + 40 + 60 s are 2 minutes; a
    median of 4,000.
    """
    _, page = show(tmp_path, write_run(tmp_path / "one"))
    head, row = page.tables["DPO", "Outcome"]
    assert dict(zip(head, row)) == {
        "run": "one", "steps": "3", "loss, step 1": "1.000", "loss, last step": "0.3333", "held-out loss": "0.6000",
        "held-out accuracy": "0.982 ± 0.016", "held-out margin": "2.00 ± 0.50", "clipped": "33%",
        "tokens/s": "4,000", "GiB": "2.000", "time of steps": "0:02:00",
    }  # fmt: skip
    figures = {title: legend for (_, title), legend in page.figures.items()}
    assert figures["Loss"] == {"one": "0.3333"} and page.units["Loss"] == "nats per pair"
    assert figures["Rewards"] == {"one chosen": "0.3000", "one rejected": "-0.9000"}
    assert figures["Log-ratio to the reference"] == {"one chosen": "0.1500", "one rejected": "-0.4500"}
    assert page.units["Log-ratio to the reference"] == "nats per token"
    assert figures["Gradient norm"] == {"one clipped in 1 of 3 steps": "1.000"}
    assert "MFU" not in figures, "a CPU has none"
    assert page.tables["DPO", "Held-out evaluations"] == [
        [
            "run",
            "step",
            "loss",
            "rewards/accuracies",
            "rewards/margins",
            "rewards/chosen",
            "rewards/rejected",
        ],
        ["one", "0", "0.6000", "0.000 ± 0.000", "2.00 ± 0.50", "1.000", "-1.000"],
        ["one", "3", "0.6000", "0.982 ± 0.016", "2.00 ± 0.50", "1.000", "-1.000"],
    ]
    manifest = dict(page.tables["Manifests", "DPO"][1:])
    assert (
        manifest["weights"] == "0123456789abcdef…"
        and manifest["versions.torch"] == "2.13"
        and manifest["commit"] == "a" * 16 + "…+changes"
    )
    assert ("DPO", "Settings that differ") not in page.tables
    assert capsys.readouterr().out == f"wrote {tmp_path}/page.html\n"


def test_a_half_finished_run_is_said_to_be_one(tmp_path):
    """Beside a finished run: its steps so far, and of which step its held-out numbers are. One that was
    evaluated after its last step has numbers of that step, finished or not."""
    done, half, paused = (write_run(tmp_path / name, lines) for name, lines in
                          (("done", LINES), ("half", LINES[:-1]), ("paused", LINES)))  # fmt: skip
    started = {key: value for key, value in MANIFEST.items() if key != "finished"}
    for folder in (half, paused):
        (folder / "manifest.json").write_text(json.dumps(started))
    _, page = show(tmp_path, done, half, paused)
    head, *rows = page.tables["DPO", "Outcome"]
    names = ("run", "steps", "held-out loss", "held-out accuracy", "held-out margin")
    last = ["0.6000", "0.982 ± 0.016", "2.00 ± 0.50"]
    assert [[row[head.index(name)] for name in names] for row in rows] == [
        ["done", "3", *last],
        ["half", "3, unfinished", "0.6000 (step 0)", "0.000 ± 0.000 (step 0)", "2.00 ± 0.50 (step 0)"],
        ["paused", "3, unfinished", *last],
    ]


def test_what_a_run_was_warned_of(tmp_path):
    """A loss of 2.1 after twenty of 1.0, in one of two runs; the other, with one of 1.9, has no line."""
    lines = [step(i, 1.0) | {"loss": 1.0} for i in range(1, 21)]
    fine = write_run(tmp_path / "fine", [*lines, step(21, 1.0) | {"loss": 1.9}])
    _, page = show(tmp_path, fine)
    assert ("DPO", "Warnings") not in page.tables
    jumps = write_run(tmp_path / "jumps", [*lines, step(21, 1.0) | {"loss": 2.1}])
    _, page = show(tmp_path, fine, jumps)
    (row,) = page.tables["DPO", "Warnings"][1:]
    assert row[0] == "jumps" and row[1].startswith(
        "step 21: loss 2.1 is over 2 times the largest of the last 20 steps"
    )


def test_runs_are_drawn_over_each_other(tmp_path):
    """Of one stage, with the settings that differ; a key that one run lacks is a dash; sft runs are a section
    of their own.
    """
    one = write_run(tmp_path / "x/one")
    two = write_run(tmp_path / "y/two", beta=4.0, data={"b.jsonl": 1.0}, out_dir="elsewhere", loss="dpo")
    sft = write_run(tmp_path / "sft", [{"step": 0, "eval/loss": 2.0}, *LINES[1:-1]], loss="tulu3_release")
    facts = {"unit": train_sft.UNITS["tulu3_release"]}
    (sft / "manifest.json").write_text(json.dumps(MANIFEST | {"stage": "sft", "loss": facts}))
    text, page = show(tmp_path, one, two, sft)
    assert page.figures["DPO", "Loss"] == {"x/one": "0.3333", "y/two": "0.3333"}
    assert page.figures["DPO", "Log-ratio to the reference"]["y/two rejected"] == "-0.2250"
    assert page.tables["DPO", "Settings that differ"] == [
        ["", "x/one", "y/two"], ["loss", "dpo_norm", "dpo"], ["beta", "2.0", "4.0"],
        ["data.a.jsonl", "1.0", "–"], ["data.b.jsonl", "–", "1.0"],
    ]  # fmt: skip
    (loss,) = re.findall(r"<svg[^>]*aria-label=\"Loss, nats per pair: .*?</svg>", text)
    assert re.findall(r'class="curve" style="--c:var\((--c\d)\)', loss) == ["--c0", "--c1"]
    assert page.figures["SFT", "Loss"] == {"sft": "0.3333"} and page.figures["SFT", "Held-out loss"] == {
        "sft": "2.000"
    }
    assert 'aria-label="Loss, nats per document: sft 1.000 to 0.3333"' in text
    assert 'aria-label="Held-out loss, nats per token: sft 2.000 to 2.000"' in text
    # each of the two losses has its unit: one chart for both would be of none
    units = re.findall(r'aria-label="Log-ratio to the reference, ([^:]*): ([^;]*);', text)
    assert units == [
        ("nats per token", "x/one chosen 0.0500 to 0.1500"),
        ("nats per answer", "y/two chosen 0.0250 to 0.0750"),
    ]


def test_simpo_has_no_reference_and_a_gpu_an_mfu(tmp_path):
    lines = [line | {"mfu": share} for line, share in zip(LINES[1:-1], (0.1, 0.2, 0.6))]
    _, page = show(tmp_path, write_run(tmp_path / "one", lines, loss="simpo"))
    assert dict(zip(*page.tables["DPO", "Outcome"]))["MFU"] == "20.0%"  # the median
    assert ("DPO", "Rewards") in page.figures and ("DPO", "Log-ratio to the reference") not in page.figures


def test_smoothing_is_stated(tmp_path):
    """Of 80 steps the last two are averaged: of 1/79 and 1/80, 0.0126; the learning rate is as it is."""
    text, page = show(tmp_path, write_run(tmp_path / "one", [step(i, 1.0) for i in range(1, 81)]))
    assert (
        page.figures["DPO", "Loss"] == {"one": "0.0126"}
        and page.units["Loss"] == "nats per pair; mean of the last 2 steps"
    )
    assert page.units["Learning rate"] == "of the step"
    (loss,) = re.findall(r"<svg[^>]*aria-label=\"Loss,.*?</svg>", text)
    assert loss.count('class="raw"') == 1


def test_answers_side_by_side_and_escaped(tmp_path):
    """What a model writes is text, never markup."""
    samples = [{"step": i, "prompts": [PROMPT, "b"], "answers": [f"<b>{i}</b>", "&amp;"]} for i in (0, 1000)]
    text, page = show(tmp_path, write_run(tmp_path / "one", samples=samples))
    assert page.tables["DPO", "Greedy answers: one"] == [
        ["prompt", "step 0", "step 1,000"],
        [PROMPT, "<b>0</b>", "<b>1000</b>"],
        ["b", "&amp;", "&amp;"],
    ]
    assert "<script" not in text


def test_the_page_stands_alone(tmp_path):
    """Nothing is fetched, nothing is run; it fits a phone and follows the dark mode."""
    text, page = show(tmp_path, write_run(tmp_path / "one"), write_steering(tmp_path / "steer"))
    assert re.findall("<h2>(.*?)</h2>", text) == ["Steering", "DPO", "Manifests"], (
        "verdicts first, manifests last"
    )
    assert not re.search(r"https?:|//|url\(|@import|javascript", text)
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not attributes & {"src", "href", "srcset", "data", "action"} and not [
        name for name in attributes if name.startswith("on")
    ]
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img", "base"}
    assert ("meta", {"name": "viewport", "content": "width=device-width,initial-scale=1"}) in page.tags
    assert "prefers-color-scheme:dark" in text


# ---------------------------------------------------------------- steering


def test_steering(tmp_path):
    """The verdict as a sentence, the curve among its nulls, effect sizes, behaviour, baselines; manifests
    last.
    """
    text, page = show(tmp_path, write_steering(tmp_path / "steer"))
    order = re.findall("<h3>([^<]*)</h3>", text)
    first = ["Verdict", "Separation and effect sizes", "Notes", "Behaviour over lambda", "Baselines"]
    assert order[:5] == first and order[-3:] == ["Terms", "Vectors", "Settings of the sweeps"]
    assert {name for name, _ in page.tables["Steering", "Terms"]} >= {
        "lambda",
        "separation",
        "random directions",
    }
    said = "<b>sweep_matched: rising. Decision: go on.</b> A change that matters.</p><p class=said>From lambda 0 to 1 the "
    said += "separation changes by +1 of 100, 95 % interval [+0.5, +1.5]; a change matters from 1 on. That is +4 sd of 2 "
    said += "random directions of each of two kinds, p 0.05; 50% of what the best direction of this length does (+2, on "
    said += "texts it was not found on). 80 texts in 60 groups (words), worth 50.</p>"
    assert f"<p class=said>{said}" in text
    assert "<p class=said>Saturated at 55.00.</p>" in text
    head = ["axiom", "verdict", "decision", "change, of 100", "interval", "level", "sd of random directions"]
    numbers = ["+1", "[+0.5, +1.5]"]
    assert page.tables["Steering", "Verdicts"] == [
        [*head, "p", "groups, rarer label"],
        ["overall", "rising", "go on", *numbers, "95 %", "+4", "0.05", "40"],
        ["Privacy", "flat (random directions change as much)", "go on", *numbers, "99 %", "+4", "0.05", "40"],
    ]
    assert page.tables["Steering", "By lambda"] == [
        ["lambda", *report.ENTRIES],
        ["0", "0.5000", "0.1250", "0.5000", "0.2500", "0", "-1.500", "-2.500", "0"],
        ["1", "0.5000", "0.1250", "0.5000", "0.2500", "0", "-1.500", "-2.500", "0"],
        ["DPO model", "1.000", "–", "–", "0.2500", "0", "-1.500", "-2.500", "–"],
    ]
    states = "<td>1</td><td class=n>2.000</td><td class=n>[1.50, 2.50]</td><td class=n>0.7500</td>"
    states += (
        "<td class=n>[0.50, 1.00]</td><td class=n>0.8750</td><td class=n>0.1250</td><td class=n>0.0625</td>"
    )
    assert states in text
    assert page.tables["Steering", "Baselines"][1] == ["this model", "1.000", "0.7500", "[0.50, 1.00]"]
    error = page.tables["Steering", "Relative error of the last layer's mean state at lambda 1"][1]
    assert error == ["matched", "0", "0.2214"]
    assert ["inputs.sft", "f" * 16 + "…"] in page.tables["Manifests", "Vectors"]


def test_charts_of_a_sweep(tmp_path):
    """One sweep with all that it is to be read beside, and n and intervals of what it does."""
    text, page = show(tmp_path, write_steering(tmp_path / "steer"))
    beside = {"random directions 4, of its length": None, "shuffled labels 95 % of them": None}
    best = {"best direction of its length, on the half of the texts it was not found on": "3.000"}
    overall = {"steered rising": "2.000", "DPO model": "2.500"} | beside | best
    assert page.figures["Steering", "Separation, overall"] == overall
    axiom = {"steered flat": "2.000", "DPO model": "0.5000"} | beside
    assert page.figures["Steering", "Separation, Privacy"] == axiom
    assert "99 % interval" in page.units["Separation, Privacy"]
    assert page.figures["Steering", "Change of the separation, all texts"] == {
        "steering, with its 95 % interval": "+1 [+0.5, +1.5]",
        "random directions of its length": "sd 0.25",
        "the DPO model itself": "+1.5",
        "the smallest change that matters": "± 1",
        "the best direction of its length, on texts it was not found on": "+2",
    }
    assert text.count('class="dot cloud"') == 3, "both curves, and the change of all texts"
    assert page.figures["Steering", "Prefers the chosen text"] == {"steered": "0.5000", "DPO model": "1.000"}
    kl = {"steered from SFT": "0.1250", "steered to DPO": "0.5000"}
    assert page.figures["Steering", "KL divergence"] == kl
    logps = {"steered chosen": "-1.500", "steered rejected": "-2.500"}
    assert page.figures["Steering", "Log-prob of held-out texts"].items() >= logps.items()
    assert {page.units[title] for title in ("Refusals", "Prefers the chosen text", "Repetition")} == {
        "share of 16 unsafe and 15 safe prompts; 95 % intervals",
        "share of 25 held-out pairs; 95 % intervals",
        "share of 4-grams that repeat, in 7 continuations",
    }
    said = "Behaviour of 25 held-out pairs; refusals of 16 unsafe and 15 safe prompts; KL of 8 texts, repeats of 7"
    assert said in text
    (refusals,) = re.findall(r"<svg[^>]*aria-label=\"Refusals,.*?</svg>", text)
    # Three whiskers of each label, the DPO model's in one path with its square, a share's axis of 0 to 1.
    assert refusals.count('class="whisker"') == 3 and refusals.count('class="whisker dashed"') == 1
    assert ">0</text>" in refusals and ">1</text>" in refusals and ">-" not in refusals
    blocks = {"sweep_matched at the last lambda": "2.000", "sweep_matched unsteered": "1.000"}
    assert page.figures["Steering", "Separation after each block"] == blocks
    assert page.figures["Steering", "First component"] == {"steer raw": "0.7500", "steer centred": "0.2500"}


def test_a_spectrum_says_which_texts_and_tokens_it_is_of(tmp_path):
    """In the heading; of folders that differ, in each curve's name."""
    chosen = write_steering(tmp_path / "a")
    rejected = write_steering(tmp_path / "b", "rejected", "mean")
    again = write_steering(tmp_path / "c", "rejected", "mean")
    text, page = show(tmp_path, chosen)
    assert f"<h3>{report.SPECTRUM}: chosen texts, last token</h3>" in text
    text, page = show(tmp_path, rejected, again)
    assert f"<h3>{report.SPECTRUM}: rejected texts, mean of the tokens</h3>" in text
    assert page.figures["Steering", "Effective rank"].keys() == {"b", "c"}
    text, page = show(tmp_path, chosen, rejected)
    assert f"<h3>{report.SPECTRUM}</h3>" in text
    names = {"a (chosen texts, last token)", "b (rejected texts, mean of the tokens)"}
    assert page.figures["Steering", "Effective rank"].keys() == names


def test_a_reason_is_given_once():
    """Where the decision says why a curve is called flat, the verdict does not."""
    found = {"verdict": "flat", "because": ["random directions of equal norm change as much (p 0.40)"]}
    assert words(found | {"decision": "any direction"}) == "flat"
    assert words(found | {"decision": "more prompts"}) == f"flat ({found['because'][0]})"
    assert words({"verdict": "rising", "because": [], "decision": "go on"}) == "rising"


def test_several_sweeps(tmp_path):
    """Eight pairs of one model and one set of prompts: one sentence for one decision, what is the same once,
    and a legend of one line a pair.
    """
    folders = []
    for i in range(8):
        folders.append(write_steering(tmp_path / f"pair{i}") / "sweep_matched")
    other = folders[7] / "aqi.json"
    sweep = json.loads(other.read_text())
    sweep["verdicts"][0] |= {"verdict": "flat", "decision": "nothing", "advice": "no change"}
    sweep["baselines"]["untrained"]["separation"] = 0.25
    other.write_text(json.dumps(sweep))
    text, page = show(tmp_path, *folders)
    names = [f"pair{i}" for i in range(8)]
    first = ", ".join(names[:7])
    verdicts = re.findall("<p class=said><b>(.*?)</b> (.*?)</p>", text)
    assert verdicts[:2] == [
        (f"{first}: rising. Decision: go on.", "A change that matters."),
        (f"{names[7]}: flat. Decision: nothing.", "No change."),
    ]
    assert ("all 8:", "Saturated at 55.00.") in verdicts
    head = ["sweep", "verdict", "decision", "change, of 100", "95 % interval", "sd of random directions", "p"]
    row = [names[0], "rising", "go on", "+1", "[+0.5, +1.5]", "+4", "0.05", "+2", "+1.5", "1"]
    changes = page.tables["Steering", "Verdict"]
    assert changes[:2] == [[*head, "best direction", "DPO model", "matters from"], row] and len(changes) == 9
    assert [row[:3] for row in page.tables["Steering", "Baselines"][1:]] == [
        ["all 8", "this model", "1.000"],
        [first, "untrained network", "1.000"],
        [names[7], "untrained network", "0.2500"],
        ["all 8", "words", "1.000"],
        ["all 8", "length", "1.000"],
        ["all 8", "shuffled labels", "1.000"],
        ["all 8", "this model, less what length explains", "0.1250"],
    ]
    legend = page.figures["Steering", "Separation, overall"]
    assert len(legend) == 8 + 1 and legend["pair0 rising"] == "2.000"
    assert len(page.figures["Steering", "Refusals"]) == 8 + 3, "unsafe, safe, the DPO model"
    assert text.count('class="dot cloud"') == 8, "a row a pair"
    assert page.figures["Steering", "Change, Privacy"].keys() == {
        "steering; intervals hold for all axioms together in 95 % of cases",
        "± 2 sd of random directions of its length",
    }


def test_a_sweep_that_does_not_say_its_counts(tmp_path):
    """As of before 2026-11-29: units without numbers, and a sentence that says so."""
    folder = write_steering(tmp_path / "steer")
    path = folder / "sweep_matched/aqi.json"
    sweep = json.loads(path.read_text())
    del sweep["behaviour_of"]
    path.write_text(json.dumps(sweep))
    text, page = show(tmp_path, folder)
    assert page.units["Refusals"] == "share of unsafe and safe prompts; 95 % intervals"
    assert "whose numbers of pairs and prompts are not known" in text


def test_a_forest_plot_by_hand():
    """Values of -1 to 1 over the 202 units right of the names, widened by 0.04: 1 is at 150 + 202 * 2.08 /
    2.16 = 344.5.
    """
    text = forest_svg(Forest("a < b", "unit", [Effect("calm", 2, 0.0, -1.0, 1.0, 0.25)]))
    assert 'class="whisker" style="--c:var(--c2)" d="M157.5,8.5H344.5"' in text
    assert 'class="band" style="--c:var(--c2)" x="204.2" y="2.5" height="12" width="93.5"' in text
    assert 'class="dot" style="--c:var(--c2)" d="M251.0,8.5h0"' in text and ">calm</text>" in text
    assert 'aria-label="a &lt; b, unit: calm +0 [-1, +1]"' in text


def test_a_forest_row_among_single_directions():
    """A row of 96 units around 48. A square 7 wide at 0, a diamond 10 wide at 1, rules at -1 and 1, no bar."""
    about = {"cloud": (-1.0, 1.0), "square": 0.0, "diamond": 1.0, "relevant": 1.0}
    text = forest_svg(Forest("t", "u", [Effect("calm", 0, 0.0, -1.0, 1.0, 0.25, **about)]))
    assert 'd="M247.5,44.5h7v7h-7z"' in text and 'd="M339.5,48l5,-5l5,5l-5,5z"' in text
    assert re.findall('class="limit" d="(.*?)"', text) == ["M157.5,1V95", "M344.5,1V95"]
    (dots,) = re.findall('class="dot cloud" .*? d="(.*?)"', text)
    assert dots.startswith("M157.5,14.4h0M344.5,") and 'class="band"' not in text


def test_a_sweeps_own_folder(tmp_path):
    """Two sweeps of different vectors in one chart, without their spectra."""
    folders = [write_steering(tmp_path / name) / "sweep_matched" for name in ("a", "b")]
    _, page = show(tmp_path, *folders)
    curves = {"a flat": "2.000", "b flat": "2.000"}
    assert page.figures["Steering", "Separation, Privacy"] == curves | {"the DPO model itself": None}
    assert ("Steering", "Effective rank") not in page.figures


def test_sweeps_are_named_by_their_pairs_where_these_differ(tmp_path):
    folders = [write_steering(tmp_path / name) for name in ("a", "b")]
    for folder, pair in zip(folders, ("dpo", "ipo"), strict=True):
        path = folder / "sweep_matched/aqi.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pair": pair}))
    found = [read(folder) for folder in folders]
    assert [name for name, _ in report.named_sweeps(found)] == ["dpo", "ipo"]
    assert [name for name, _ in report.named_sweeps([found[0], found[0]])] == ["dpo"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pair": "dpo"}))
    found = [read(folder) for folder in folders]
    assert [name for name, _ in report.named_sweeps(found)] == ["a", "b"]
    assert report.named_sweeps([]) == []


# ---------------------------------------------------------------- errors


def break_line(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')


def test_a_number_that_was_not_finite_is_shown(tmp_path):
    folder = write_run(tmp_path / "one", [LINES[0] | {"eval/perplexity": None}, *LINES[1:]])
    assert math.isnan(read(folder).last("eval/perplexity"))
    report.main([str(folder)])
    assert ">nan</td>" in (folder / "report.html").read_text()


def test_a_run_that_diverged_is_drawn_up_to_there(tmp_path):
    """The last update broke the model: its evaluation has no number, which the legend says."""
    last = evaluation(3, 0.0, 0.0) | dict.fromkeys(
        ("eval/loss", "eval/rewards/margins", "eval/rewards/margins_ci95")
    )
    _, page = show(tmp_path, write_run(tmp_path / "one", [*LINES[:-1], last]))
    assert page.figures["DPO", "Held-out loss"] == {"one 1 not finite": "0.6000"}
    assert page.figures["DPO", "Held-out reward margin"] == {"one 1 not finite": "2.000"}
    head, row = page.tables["DPO", "Outcome"]
    assert (row[head.index("held-out loss")], row[head.index("held-out margin")]) == ("nan", "nan ± nan")
    never = [line | {"eval/loss": None} if "eval/loss" in line else line for line in LINES]
    _, page = show(tmp_path, write_run(tmp_path / "never", never))
    assert ("DPO", "Held-out loss") not in page.figures


BROKEN = {
    "torn": (break_line, "metrics.jsonl: line 6 is torn; the run is finished, so delete that line"),
    "torn, unfinished": (
        lambda folder: (break_line(folder), (folder / "manifest.json").write_text("{}")),
        "line 6 is torn; going on with the run mends it",
    ),
    "no steps": (
        lambda folder: (folder / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n"),
        "no step yet",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: missing or torn"),
    "torn manifest": (
        lambda folder: (folder / "manifest.json").write_text("{"),
        "manifest.json: missing or torn",
    ),
    "neither": (lambda folder: (folder / "metrics.jsonl").unlink(), "expected a run folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_named(tmp_path, case):
    change, message = BROKEN[case]
    change(folder := write_run(tmp_path / "one"))
    with pytest.raises(ValueError, match=message) as error:
        read(folder)
    assert str(folder) in str(error.value)


def test_a_vector_alone_shows_nothing(tmp_path):
    (tmp_path / "vector.safetensors").touch()
    with pytest.raises(ValueError, match="a vector and nothing on it"):
        read(tmp_path)


def test_a_sweep_along_another_vector_is_left_out(tmp_path, capsys):
    """As reports.ladder leaves it out: the vector was made anew since."""
    folder = write_steering(tmp_path / "steer")
    (folder / "vector.safetensors").write_bytes(b"another")
    assert read(folder).sweeps == {}
    report.write([folder], tmp_path / "page.html")
    said = f"{folder}/sweep_matched: left out, a sweep along a vector that was in {folder} before\n"
    assert capsys.readouterr().out == said


def test_more_runs_than_colours(tmp_path):
    folders = [write_run(tmp_path / str(i)) for i in range(len(COLOURS) + 1)]
    with pytest.raises(ValueError, match="9 runs, or sweeps, of one kind; expected at most 8"):
        report.main(list(map(str, folders)))


@pytest.mark.slow
def test_command_line(tmp_path):
    """A mistake is a message; the page goes into the first run; neither it nor the ladder loads torch, so that a
    laptop without it will do.
    """
    command = [sys.executable, "-X", "importtime", "-m", "reports.page"]
    failed = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (
        failed.returncode == 1
        and f"error: {tmp_path}: expected a run folder" in failed.stderr
        and "Traceback" not in failed.stderr
    )
    folder = write_run(tmp_path / "one")
    done = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (folder / "report.html").is_file()
    command[-1] = "reports.ladder"
    ladder = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert ladder.returncode == 0 and "finished runs" in ladder.stdout
    for run in (done, ladder):
        assert not re.search(r"\| +torch$", run.stderr, re.MULTILINE)


# ---------------------------------------------------------------- pictures


@pytest.mark.slow
def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    sweep = json.loads((write_steering(tmp_path / "steer") / "sweep_matched/aqi.json").read_text())
    charts = [*separation_charts([("", sweep)]), axioms_chart(sweep)]
    long = list(range(100))
    charts.append(
        Chart("Loss", "nats", "step", [Line("run", 0, long, long, long, long, smooth=2)], (50, 1000))
    )
    for i, chart in enumerate(charts):
        plots.plot_chart(tmp_path / f"png/{i}.png", chart)
    plots.plot_heatmap(
        tmp_path / "png/heat.png", ["a", "b"], ["x", "y", "z"], [[1, 2, 3], [4, 5, 6]], "title"
    )
    plots.plot_clusters(
        tmp_path / "png/clusters.png", np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 0, 1]), "title"
    )
    files = list((tmp_path / "png").iterdir())
    assert len(files) == len(charts) + 2 and all(path.read_bytes().startswith(b"\x89PNG") for path in files)


# ---------------------------------------------------------------- charts


def test_a_chart_by_hand():
    """360 x 190 with margins 46, 8, 8, 22: x from 46 to 352; y of 0 .. 1, widened by 0.04, over the 160 above
    168: 168 - 160 * 0.04 / 1.08 = 162.1 and 168 - 160 * 1.04 / 1.08 = 13.9."""
    text = svg(
        Chart(
            "a < b",
            "unit",
            "step",
            [Line("run", 3, [0, 10], [0.0, 1.0], low=[0.0, 0.5], high=[0.0, 1.0])],
            levels=(0.5, 7.0),
        )
    )
    assert 'class="curve" style="--c:var(--c3)" points="46.0,162.1 352.0,13.9"' in text
    assert 'd="M46.0,162.1L46.0,162.1M352.0,88.0L352.0,13.9"' in text, "whiskers"
    assert text.count('class="level"') == 1 and 'd="M46.0,88.0L352.0,88.0"' in text, (
        "a level outside the chart is not drawn"
    )
    assert 'aria-label="a &lt; b, unit: run 0 to 1.000"' in text
    assert re.findall(r'class="x"[^>]*>([^<]*)', text) == ["0", "5", "10"]


def test_numbers_of_an_axis_end_at_the_last_lambda():
    """At 0.5; the square beyond it is no lambda. Without an end 0.6 would be one of the numbers."""
    lines = [Line("run", 0, [0, 0.5], [0.0, 1.0]), Line("DPO model", 0, [0.65], [0.5], square=True)]
    for last, shown in ((0.5, ["0", "0.2", "0.4"]), (math.inf, ["0", "0.2", "0.4", "0.6"])):
        text = svg(Chart("t", "u", "lambda", lines, last_x=last))
        assert re.findall(r'class="x"[^>]*>([^<]*)', text) == shown


def test_whiskers_of_many_runs_stay_near_their_x():
    """Two are 3 units apart, eight 9 / 8: within 4 of where they belong."""
    for count, first in ((1, "0"), (2, "-1.5"), (8, "-3.9375")):
        lines = [Line(f"{i}", i, [0, 1], [0.0, 1.0], [0.0, 0.5], [0.5, 1.0]) for i in range(count)]
        places = re.findall(r'class="dot"[^>]*translate\(([^)]*)\)', svg(Chart("t", "u", "x", lines)))
        assert len(places) == count and float(places[0]) == pytest.approx(float(first), abs=1e-4)


def test_a_long_interval_is_a_band_and_a_constant_has_a_range():
    x = list(range(13))
    text = svg(Chart("t", "u", "step", [Line("run", 0, x, [2.0] * 13, [2.0] * 13, [2.0] * 13)]))
    assert text.count('class="band"') == 1 and 'class="whisker"' not in text and "nan" not in text
    assert 'points="46.0,88.0 ' in text, "in the middle of 1.8 .. 2.2"


def test_a_single_value_is_a_square_around_a_dot():
    """As the DPO model beside a curve's last dot; (352, 88) is its middle, 7 its side, 0.4 at 102.8, 0.6 at 73.2."""
    curve = Line("run", 0, [0, 1], [0.0, 1.0])
    dpo = Line("DPO model", 0, [1], [0.5], [0.4], [0.6], square=True)
    chart = Chart("t", "u", "x", [curve, dpo])
    text = svg(chart)
    assert 'd="M348.5,84.5h7v7h-7zM352.0,102.8L352.0,73.2"' in text and text.count('class="dot"') == 1
    assert figure(chart).count('class="square "') == 1


def test_a_change_that_does_not_matter_looks_flat():
    """0.002 of a least range of 1: (168 - 14) * 0.002 = 0.3 of 154 units of height, in the middle."""
    assert POINT == judged.POINT
    text = svg(Chart("t", "u", "lambda", [Line("run", 0, [0, 1], [1.000, 1.002])], least_range=1.0))
    (points,) = re.findall(r'class="curve"[^>]* points="([^"]*)"', text)
    first, last = [float(point.split(",")[1]) for point in points.split()]
    assert 0 < first - last < 0.5 and abs(first + last - 2 * 88) < 0.5


def test_axioms_are_on_an_axis_of_a_point_at_least(tmp_path):
    """As of one sweep, so of two, whose axis is one for all axioms: intervals of +-1.5 widen it."""
    sweep = json.loads((write_steering(tmp_path / "steer") / "sweep_matched/aqi.json").read_text())
    for verdict in sweep["verdicts"]:
        verdict |= {"change": 0.01, "change_interval": [-0.02, 0.04]}
        verdict["nulls"]["null_sd"] = 0.01
    (forest,) = axiom_forests([("a", sweep)])
    assert forest.covers == (-POINT, POINT) and forest.effects[0].reach() == [0.01, -0.02, 0.04, -0.02, 0.02]
    wide = json.loads(json.dumps(sweep))
    wide["verdicts"][1]["change_interval"] = [-1.5, 1.5]
    (forest,) = axiom_forests([("a", sweep), ("b", wide)])
    assert forest.covers == (-1.5, 1.5) and [effect.name for effect in forest.effects] == ["a", "b"]


def test_no_spike_is_thinned_away():
    """10,000 points are drawn as at most two per bucket, among them the one that stands out, and both
    ends.
    """
    values = [0.0] * 10_000
    values[6789] = 5.0
    (points,) = re.findall(
        r'class="curve"[^>]* points="([^"]*)"',
        svg(Chart("t", "u", "x", [Line("run", 0, list(range(10_000)), values)])),
    )
    points = points.split()
    assert (
        len(points) <= 2 * BUCKETS + 2 and points[0].startswith("46.0,") and points[-1].startswith("352.0,")
    )
    assert sum(point.endswith(",13.9") for point in points) == 1


def test_smoothed():
    assert (
        smoothed([2.0, 4.0, 6.0, 1.0], 2) == [2.0, 3.0, 5.0, 3.5]
        and smoothed([3.0, 1.0], 1) == [3.0, 1.0]
        and smoothed([], 1) == []
    )


@pytest.mark.parametrize(
    "low, high, whole, expected",
    [
        (0, 33, True, [0, 10, 20, 30]),
        (1, 4, True, [1, 2, 3, 4]),
        (-0.04, 1.04, False, [0, 0.5, 1]),
        (4e-7, 5e-7, False, [4e-7, 4.5e-7, 5e-7]),
    ],
)
def test_ticks_are_round(low, high, whole, expected):
    assert ticks(low, high, whole=whole) == pytest.approx(expected)


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0.0, "0"),
        (12103, "12,103"),
        (12103.4, "12,103"),
        (999.96, "1,000"),
        (-14.218, "-14.22"),
        (0.693147, "0.6931"),
        (5e-7, "5.00e-07"),
        (1.5, "1.500"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_tables():
    """Text left, numbers right; a long one is folded behind the number of its rows."""
    assert "<td>a</td><td class=n>1.500</td>" in table(["x", "y"], [["a", 1.5]])
    assert "<summary>1,000 rows</summary>" in table(["x"], [["a"]] * 1000)
    assert "<tr class=strong><td>b</td>" in table(["x"], [["a"], ["b"]], marked=[["b"]])


def test_short_names(tmp_path):
    assert short_names([tmp_path / "a/dpo"]) == ["dpo"]
    assert short_names([tmp_path / "a/dpo", tmp_path / "b/dpo"]) == ["a", "b"]
    assert short_names([tmp_path / "a/dpo", tmp_path / "b/dpo_2"]) == ["a/dpo", "b/dpo_2"]
    assert short_names([tmp_path / "dpo", tmp_path / "b/dpo"]) == ["dpo", "b/dpo"]


@pytest.mark.slow
def test_real_runs(world, tmp_path):
    """What the training scripts write is what the report reads: every chart that a CPU has numbers for."""
    config = write_config(tmp_path, world, data_eval=0.2, sample_every=2)
    for stage in ("sft", "dpo"):
        launch(stage, config).ok()
    _, page = show(tmp_path, tmp_path / "sft", tmp_path / "dpo")
    titles = {panel.title for panel in PANELS} - {"MFU"}
    assert {title for section, title in page.figures if section == "DPO"} == titles
    preferences = {"Reward margin", "Held-out reward margin", "Reward accuracy", "Held-out reward accuracy", "Rewards",
                   "Log-ratio to the reference", "Log-prob of the answers"}  # fmt: skip
    assert {title for section, title in page.figures if section == "SFT"} == titles - preferences
    assert [row[:3] for row in page.tables["DPO", "Greedy answers: dpo"][:1]] == [
        ["prompt", "step 0", "step 2"]
    ]
