"""tools/diff_open_instruct.py on a checkout that is known to agree, and on copies of it that are known not
to.
"""

import json
import math

import pytest
from fake_open_instruct import write

from optim import learning_rate
from tools.agreement import DIFFERS, EQUAL, INTENDED, SKIPPED, numbers
from tools.checkout import Checkout, NotFound
from tools.diff_open_instruct import main


@pytest.fixture
def compared(tmp_path, world, capsys):
    """compared(edits, stage, *arguments) -> (exit code, {quantity: verdict}, everything printed)."""

    def compare(*edits, stage="dpo", args=()):
        data = world / ("sft.jsonl" if stage == "sft" else "pref.jsonl")
        rows = [
            "--model",
            str(world / "base"),
            "--data",
            str(data),
            "--stage",
            stage,
            "--rows",
            "5",
            "--max-seq-len",
            "64",
        ]
        code = main(["--checkout", str(write(tmp_path / "checkout", *edits)), *rows, *args])
        out = capsys.readouterr().out
        table = out.split("verdict\n")[1].split("\n\n")[0].splitlines()
        every = (EQUAL, INTENDED, DIFFERS, SKIPPED)
        verdicts = {
            line[: line.index("  ")]: next(verdict for verdict in every if line.endswith(verdict))
            for line in table
        }
        return code, verdicts, out

    return compare


@pytest.mark.slow
def test_known_agreement_on_pairs(compared):
    code, verdicts, out = compared()
    assert (
        code == 0
        and {"dpo_norm gradient", "log-probs per token", "weight decay", "vocabulary"} < verdicts.keys()
    )
    assert [name for name, verdict in verdicts.items() if verdict != EQUAL] == [
        "rate: linear, warm-up 0.03, 8 processes"
    ]
    assert "a_library_that_nobody_has" not in out


@pytest.mark.slow
def test_known_intended_difference_of_the_sft_loss(compared):
    """The fake takes means of micro-batches; what is left when ours is computed that way must be rounding."""
    code, verdicts, out = compared(stage="sft")
    assert code == 0 and verdicts["token ids"] == verdicts["log-probs per token"] == EQUAL
    assert (
        verdicts["SFT, mean, 1 a micro-batch: loss"]
        == verdicts["SFT, mean, 2 a micro-batch: gradient"]
        == INTENDED
    )
    assert "a mean of the micro-batches' means" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit, quantity, context",
    [
        (("dataset_transformation", "'|>\\\\n' + m", "'|> \\\\n' + m"), "rendered text", "row 0, chosen, character 8: ours '<|user|>\\n"),
        (("dataset_transformation", "start < b for", "start < a for"), "supervised tokens", ": ours True, theirs False"),
        (("dataset_transformation", "chosen_labels\"]) >= 0", "chosen_labels\"]) > 9999"), "rows kept", "row 0: ours True, theirs False"),
        (("dataset_transformation", "RandomState(42)", "RandomState(43)"), "picked rows, 0.1 of 1,009", "place 0: ours 628, theirs 416"),
        (("dataset_transformation", "int(float(amount) * len(", "round(float(amount) * len("), "picked rows, 0.1 of 1,009", "theirs 101"),
        (("dpo_utils", "margin = beta", "margin = 1.001 * beta"), "dpo_norm losses", "number 0: ours"),
        (("dpo_utils", "* gamma_beta_ratio), None", "+ gamma_beta_ratio), None"), "simpo losses", "number 0: ours"),
        (("dpo_utils", "margin = beta * (chosen", "margin = beta * (chosen.detach()"), "dpo gradient", "theirs"),
        (("padding_free_collator", "dim=-1)", "dim=-2)"), "log-probs per token", "theirs"),
        (("utils", '("norm.weight", "bias")', '("layernorm.weight", "bias")'), "weight decay", "model.norm.weight"),
        (("dpo_tune_cache", "int(args.warmup_ratio", "1 + int(args.warmup_ratio"), "rate: linear, warm-up 0, 1 process", "ours 1e-05"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_known_disagreement(compared, edit, quantity, context):
    code, verdicts, out = compared(edit)
    assert code == 1 and verdicts[quantity] == DIFFERS
    assert context in next(
        line for line in out.split("Disagreements")[1].splitlines() if line.startswith(f"  {quantity}: ")
    )


@pytest.mark.slow
def test_float64_decides_between_two_float32_gradients(compared):
    """Theirs loses the last digits of every gradient on the way, which in float64 are not the last ones."""
    noise = "chosen.register_hook(lambda g: (g + 2e3) - 2e3)\n    margin"
    code, verdicts, out = compared(("dpo_utils", "margin = beta * (chosen", f"{noise} = beta * (chosen"))
    assert code == 0 and verdicts["dpo gradient"] == EQUAL
    assert "  dpo gradient: by theirs in float64: ours is " in out.split("Decided: ")[1]


@pytest.mark.slow
def test_names_of_other_months(compared):
    """January to March 2025 a tokenizer was asked for by other names; July 2025 to January 2026 the warm-up
    was a statement of its own.
    """
    warm_up = "int(args.warmup_ratio * num_training_steps_for_scheduler)"
    edits = [
        (
            "dataset_transformation",
            "tc.tokenizer_name_or_path",
            "tc.model_name_or_path, revision=tc.revision",
        ),
        ("dpo_tune_cache", f"optimizer, {warm_up}", "optimizer, num_warmup_steps"),
        ("dpo_tune_cache", "    lr_scheduler =", f"    num_warmup_steps = {warm_up}\n    lr_scheduler ="),
    ]
    code, verdicts, _ = compared(*edits)
    assert code == 0 and verdicts["token ids"] == verdicts["rate: linear, warm-up 0.03, 1 process"] == EQUAL


@pytest.mark.slow
def test_turns_trained_on(compared, world, tmp_path):
    """A checkout that trains on the last turn only is an intended difference, and the numbers are then of the
    last turn on both sides.
    """
    said = zip(("user", "assistant") * 2, ("the cat", "runs fast", "good", "bad dog"))
    turns = [{"role": role, "content": text} for role, text in said]
    others = [{"role": "assistant", "content": answer} for answer in ("sorry", "never", "please")]
    rows = [{"chosen": turns, "rejected": [*turns[:3], other]} for other in others]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit = ("dataset_transformation", "for start, stop in spans)", "for start, stop in spans[-1:])")
    code, verdicts, _ = compared(edit, args=["--data", str(tmp_path / "turns.jsonl")])
    assert code == 0 and verdicts["supervised tokens"] == INTENDED and verdicts["dpo_norm losses"] == EQUAL


@pytest.mark.slow
def test_what_is_missing_is_not_compared(compared):
    edits = [
        ("dpo_utils", "def simpo_loss", "def simpo_loss_2"),
        ("dpo_tune_cache", "lr_scheduler =", "schedule ="),
    ]
    edits.append(("dataset_transformation", "def load_dataset_configs(mixer, ", "def load_dataset_configs("))
    code, verdicts, out = compared(*edits)
    assert code == 2 and verdicts["dpo losses"] == EQUAL
    assert {name for name, verdict in verdicts.items() if verdict == SKIPPED} == {
        "learning rate",
        "picked rows",
        "preference losses",
    }
    for why in (
        "looked for simpo_loss in dpo_utils.py",
        "looked for lr_scheduler = .. in main() of dpo_tune_cache.py",
        "raised TypeError",
    ):
        assert why in out


@pytest.mark.slow
def test_a_template_that_an_old_checkout_lacks_is_not_compared(world, tmp_path, capsys):
    """Before 2025 the templates were a dict."""
    edit = ("dataset_transformation", "get_tokenizer_tulu_v2_2", "get_tokenizer")
    root = write(tmp_path / "checkout", edit)
    (root / "open_instruct/dataset_processor.py").write_text("CHAT_TEMPLATES = {'tulu': ''}\n")
    rows = ["--model", str(world / "base"), "--data", str(world / "pref.jsonl"), "--rows", "2"]
    assert main(["--checkout", str(root), *rows, "--template", "zephyr"]) == 2
    assert "raised KeyError: 'zephyr'" in capsys.readouterr().out


UPDATE = """
class DatasetConfig:
    def update_range(self, wanted):
        self.dataset = self.dataset.select(range(wanted))
"""


@pytest.mark.parametrize("file, source", [("dataset_transformation", UPDATE), ("utils", """
def get_datasets(mixer, splits, columns_to_keep):
    ((name, amount),) = mixer.items()
    rows = load_dataset(name).shuffle(seed=42)
    return {"train": rows.select(range(int(amount * len(rows)) if isinstance(amount, float) else amount))}
""")], ids=["2025-01-28 to 2025-07-21", "before"])  # fmt: skip
@pytest.mark.slow
def test_older_rules_of_picking_rows(tmp_path, capsys, file, source):
    """Of revisions without load_dataset_configs."""
    root = write(tmp_path / "checkout", ("dataset_transformation", "def load_dataset_configs", "def configs"))
    path = root / f"open_instruct/{file}.py"
    path.write_text(f"from datasets import load_dataset\n{path.read_text()}{source}")
    main(["--checkout", str(root)])
    rule = "first" if file == "dataset_transformation" else "shuffle"
    picked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("picked rows")]
    assert len(picked) == 4 and all(f"rows='{rule}'" in line and line.endswith("equal") for line in picked)


@pytest.mark.slow
def test_trl(compared, world, capsys):
    args = ["--trl", "--model", str(world / "base"), "--data", str(world / "pref.jsonl"), "--rows", "4"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert out.count("equal") == 5 and "TRL: dpo_norm gradient" in out


# ---------------------------------------------------------------- without a model


@pytest.mark.slow
def test_rates_and_rows_need_no_model(tmp_path, capsys):
    assert main(["--checkout", str(write(tmp_path / "checkout"))]) == 0
    out = capsys.readouterr().out
    assert "warm-up is 1.5 steps, ours 1" in out and "1,500 rows" in out


def test_a_name_runs_only_its_own_statement(tmp_path):
    text = "\nimport nothing\n1 / 0\nX = 1 / 0\nK = 2\nclass A:\n    y: nothing.Type = K\nT = {}\nT[0] = K\nK += 1\ndef get"
    checkout = Checkout(write(tmp_path / "checkout", ("utils", "\ndef get", text)))
    assert (
        checkout.find(["missing", "A"], ["no_such_file", "utils"]).y == 3
    )  # as when the file is run to its end
    assert checkout.find(["T"], ["utils"]) == {0: 3}
    with pytest.raises(ZeroDivisionError):
        checkout.find(["X"], ["utils"])
    with pytest.raises(NotFound, match="looked for a or b in utils.py, x.py"):
        checkout.find(["a", "b"], ["utils", "x"])
    with pytest.raises(ValueError, match="no folder open_instruct/"):
        Checkout(tmp_path)


def test_numbers():
    """Differences are relative to the largest of theirs: 0.02 of 2 is 1e-2. A known reason counts only if it
    gives theirs.
    """
    ours, theirs = [1.0, 2.0], [1.02, 2.0]
    assert numbers("x", "step", ours, theirs, 0.011).verdict == EQUAL
    assert numbers("x", "step", ours, theirs, 0.009).verdict == DIFFERS
    assert numbers("x", "step", ours, theirs, 0.009, ([1.02, 2.0], "why")).verdict == INTENDED
    assert (
        numbers("x", "step", ours, theirs, 0.009, ([1.05, 2.0], "why")).note
        == "number 0: ours 1, theirs 1.02"
    )
    assert numbers("x", "step", [0.0], [math.nan], 0.1).verdict == DIFFERS


@pytest.mark.parametrize("args", [[], ["--trl"], ["--their-log", "x"], ["--checkout", "nowhere"], ["--checkout", ".", "--model", "x"],
                                  ["--their-log", "nowhere", "--our-run", "nowhere"]])  # fmt: skip
def test_refused_arguments(args, capsys):
    assert main(args) == 1 and capsys.readouterr().err.startswith("error: ")


# ---------------------------------------------------------------- run logs


def run_logs(folder, their_rates, their_losses, losses, warmup=1, processes=8):
    """Both logs of a run of 40 steps at 1e-5; theirs prints the rate after the step."""
    (folder / "run").mkdir()
    config = dict(
        loss="dpo_norm", sft_weight=0.0, lr=1e-5, lr_schedule="linear", warmup_ratio=0.03, warmup_steps=None
    )
    (folder / "run/config.json").write_text(json.dumps(config))
    (folder / "run/manifest.json").write_text(json.dumps(dict(stage="dpo", warmup_steps=warmup)))
    ours = [
        dict(step=i + 1, loss=loss, lr=learning_rate(i, 40, 1e-5, "linear", warmup))
        for i, loss in enumerate(losses)
    ]
    (folder / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ours))
    head = f"Instantaneous batch size per device = 1\nTotal train batch size (w. all) = {2 * processes}\nGradient Accumulation steps = 2\n"
    lines = [
        f"INFO - Step: {i + 1}, LR: {rate}, Loss: {loss}, TPS: 9\n"
        for i, (rate, loss) in enumerate(zip(their_rates, their_losses))
    ]
    (folder / "log.txt").write_text(head + "".join(lines))
    return ["--their-log", str(folder / "log.txt"), "--our-run", str(folder / "run")]


LOSSES = [math.log(2)] + [0.65 - 0.005 * i + 0.02 * (-1) ** i for i in range(1, 40)]
OTHER_LOSSES = [math.log(2)] + [
    0.65 - 0.005 * i - 0.02 * (-1) ** i for i in range(1, 40)
]  # other rows, the same curve


def test_logs_that_agree(tmp_path, capsys):
    """40 steps, 8 processes: their warm-up is int(0.03 * 40 * 8) / 8 = 1.125 steps, ours 1."""
    rates = [learning_rate(i + 1, 40, 1e-5, "linear", 1.125) for i in range(40)]
    assert main(run_logs(tmp_path, rates, OTHER_LOSSES, LOSSES)) == 0
    out = capsys.readouterr().out
    assert "a warm-up of 1.125 steps, ours 1" in out and out.count("equal") == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda rates, losses: ([2 * rate for rate in rates], losses),
            "learning rate: number 0: ours 1e-05, theirs 2e-05",
        ),
        (
            lambda rates, losses: (rates, [losses[0]] + [loss + 0.1 for loss in losses[1:]]),
            "losses on average: mean difference -0.0985",
        ),
        (lambda rates, losses: (rates, [*losses[:-1], math.nan]), "losses on average: mean difference +nan"),
        (
            lambda rates, losses: (rates, [0.8, *losses[1:]]),
            "first loss: ln 2: number 0: ours 0.69314718, theirs 0.8",
        ),
        (lambda rates, losses: (rates[:30], losses[:30]), "last step: ours 40, theirs 30"),
    ],
)
def test_logs_that_disagree(tmp_path, capsys, change, message):
    rates = [learning_rate(i + 1, 40, 1e-5, "linear", 1) for i in range(40)]
    rates, losses = change(rates, OTHER_LOSSES)
    assert main(run_logs(tmp_path, rates, losses, LOSSES)) == 1
    assert message in capsys.readouterr().out


def test_a_log_without_steps(tmp_path, capsys):
    args = run_logs(tmp_path, [], [], LOSSES)
    assert main(args) == 1 and "no line like 'Step: 1, LR: 1e-05, Loss: 0.69'" in capsys.readouterr().err
