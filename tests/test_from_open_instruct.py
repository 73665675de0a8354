"""tools/from_open_instruct.py: what it writes loads and means the same; what has no meaning here is refused
by key.
"""

import os
import re
import subprocess

import pytest

from plumbing.config import load
from tools.from_open_instruct import main

SFT = """
model_name_or_path: meta-llama/Llama-3.1-8B
tokenizer_name: meta-llama/Llama-3.1-8B
model_revision: main
use_slow_tokenizer: true
dataset_mixer: {allenai/tulu-3-sft-mixture: 0.1, other/set: 5000}
max_seq_length: 4096
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 5.0e-06
lr_scheduler_type: linear
warmup_ratio: 0.03
weight_decay: 0.0
num_train_epochs: 2
output_dir: output/sft
report_to: [wandb]
logging_steps: 1
checkpointing_steps: epoch
"""
DPO = """
model_name_or_path: runs/sft/final
gradient_checkpointing: true
dataset_mixer_list: [allenai/pairs, "1.0", other/pairs, "300"]
dataset_mixer_list_splits: [train, test]
max_seq_length: 2048
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 5.0e-7
warmup_ratio: 0.1
num_epochs: 1
loss_type: dpo_norm
beta: 5
use_lora: true
lora_rank: 16
output_dir: output/dpo
checkpointing_steps: 1000
"""


@pytest.fixture
def translated(tmp_path, capsys):
    """translated(yaml text, *arguments) -> (exit code, the loaded config or None, its text, what went to
    stderr).
    """

    def translate(yaml, *args):
        (tmp_path / "in.yaml").write_text(yaml)
        code = main([str(tmp_path / "in.yaml"), *args])
        out, err = capsys.readouterr()
        if code:
            return code, None, out, err
        (tmp_path / "out.py").write_text(out)
        return code, load("dpo" if "dpo = dict(" in out else "sft", [str(tmp_path / "out.py")]), out, err

    return translate


def test_sft(translated):
    """The published SFT recipe on 64 GPUs: 1 * 2 * 64 = 128 conversations a step."""
    code, config, text, _ = translated(SFT, "--processes", "64")
    assert code == 0
    expected = dict(model_path="meta-llama/Llama-3.1-8B", template="tulu", data={"allenai/tulu-3-sft-mixture": 0.1, "other/set": 5000},
                    max_seq_len=4096, global_batch_size=128, lr=5e-6, lr_schedule="linear", warmup_ratio=0.03, num_epochs=2, seed=42,
                    loss="token_mean", max_grad_norm=1.0, out_dir="output/sft", save_every=None, recompute="none")  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    for said in (
        "1 per device * 2 accumulation * 64 processes",
        "averages the means",
        "gradient_clipping 'auto'",
        "another shuffle",
    ):
        assert said in " ".join(text.replace("\n#", "").split()), said
    for unused in ("use_slow_tokenizer: True", "report_to: ['wandb']", "checkpointing_steps: 'epoch'"):
        assert f"#   {unused} (" in text


def test_dpo(translated):
    code, config, text, _ = translated(DPO, "--processes", "8")
    assert code == 0
    expected = dict(data={"allenai/pairs": 1.0, "other/pairs[test]": 300}, global_batch_size=128, lr=5e-7, loss="dpo_norm", beta=5.0,
                    supervise="all", lora_rank=16, lora_alpha=16.0, recompute="full", save_every=1000, out_dir="output/dpo")  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    assert (
        "supervise='last'" in text
        and "lora_dropout=0.1: no dropout here" in text
        and "lora_alpha is not in the YAML" in text
    )


@pytest.mark.parametrize(
    "yaml, said",
    [
        (SFT, "overrides its epochs (num_train_epochs: 2 in the YAML) warm-up"),
        (SFT.replace("num_train_epochs: 2\n", ""), "overrides its epochs warm-up"),
        (DPO, "overrides its epochs (num_epochs: 1 in the YAML) warm-up"),
        (DPO.replace("num_epochs: 1\n", ""), "overrides its epochs warm-up"),
    ],
)
def test_max_train_steps_overrides_the_epochs(translated, yaml, said):
    """The run has 5000 steps whatever its data: with one step an epoch, the fewest, and with 2,121."""
    stage = "dpo" if "beta" in yaml else "sft"
    options = ("--processes", "8", "--stage", stage)
    code, config, text, _ = translated(yaml + "max_train_steps: 5000\n", *options)
    assert code == 0 and config.max_steps == 5000
    assert [min(config.num_epochs * steps, config.max_steps) for steps in (1, 2121)] == [5000, 5000]
    words = " ".join(text.replace("\n#", "").split())
    assert said in words and "default, 2" not in words
    code, _, _, err = translated(yaml + "max_train_steps: 0\n", *options, "--date", "2026-08-20")
    assert code == 1 and err.count("\n") == 1 and "max_steps=0: expected int >= 1" in err


def test_a_revision_becomes_part_of_the_models_name(translated):
    """Also one that reads as a number; the tokenizer is of the same revision."""
    for revision in ("v1", "'1.0'", "'1234567'"):
        yaml = SFT.replace("revision: main", f"revision: {revision}")
        for tokenizer in ("", f"tokenizer_revision: {revision}\n"):
            code, config, _, _ = translated(yaml + tokenizer, "--processes", "8")
            assert code == 0
            assert config.model_path == f"meta-llama/Llama-3.1-8B@{revision.strip(chr(39))}"


def test_a_configuration_is_part_of_the_data_sets_name(translated):
    """As the refusal of dataset_config_name says."""
    yaml = SFT.replace("other/set:", "'other/set[old/test]':")
    code, config, _, _ = translated(yaml, "--processes", "8")
    assert code == 0 and config.data["other/set[old/test]"] == 5000


def test_what_has_an_equivalent_outside_the_yaml_is_named(translated):
    _, _, text, _ = translated(SFT + "push_to_hub: true\nzero_stage: 3\n", "--processes", "8")
    words = " ".join(text.replace("\n#", "").split())
    assert "--push=org/name uploads" in words and "tensorboard=True" in words and "sharding" in words


def test_zephyr_says_that_open_instruct_trains_a_newline_more(translated):
    _, _, text, _ = translated(SFT + "chat_template_name: zephyr\n", "--processes", "8")
    assert "the newline after every answer" in " ".join(text.replace("\n#", "").split())


def test_sums_are_the_released_recipe(translated):
    """A seed of 0 stays 0, and clipping that the YAML states stays as stated."""
    yaml = SFT.replace("batch_size: 1", "batch_size: 4") + "reduce_loss: sum\nseed: 0\nclip_grad_norm: 0.5\n"
    _, config, text, _ = translated(yaml, "--processes", "16")
    assert (config.loss, config.seed, config.max_grad_norm) == ("tulu3_release", 0, 0.5)
    assert "4 times smaller here" in text and "averages the means" not in text


def test_written_to_a_file(translated, tmp_path):
    _, _, printed, _ = translated(DPO, "--processes", "8")
    written = tmp_path / "runs/written.py"  # a fresh checkout has no runs/
    assert main([str(tmp_path / "in.yaml"), "--processes", "8", "--out", str(written)]) == 0
    assert written.read_text() == printed


@pytest.mark.parametrize(
    "yaml, message",
    [
        (SFT + "dataset_mix_dir: None\n", "dataset_mix_dir: the string 'None' is not null; expected null"),
        (SFT.replace("5.0e-06", "5e-6"), "learning_rate: '5e-6' is a string in YAML 1.1; expected a number with a point"),
        (SFT + 'use_lora: "true"\n', "use_lora: the string 'true' is no bool"),
        (SFT + "logging_steps: 2\n", "logging_steps: given twice"),
        (SFT.replace("5000", "1"), "other/set=1: cannot be represented: 1 meant all rows before 2025-01-28"),
        (SFT + "add_bos: true\nchat_template_name: zephyr\n", "add_bos=True: cannot be represented: expected chat_template_name tulu"),
        (SFT + "use_qlora: true\n", "use_qlora=True: cannot be represented"),
        (SFT + "use_8bit_optimizer: true\n", "fp32 here, or bf16 with moments='bf16'"),
        (SFT + "dataset_config_name: old\n", "expected it in the data set's name, as org/name[config/split]"),
        (SFT + "tokenizer_revision: v1\n", "tokenizer_revision='v1': cannot be represented: the tokenizer is that of"),
        (SFT.replace("revision: main", "revision: 1.10"), "model_revision=1.1: cannot be represented: expected text"),
        (DPO + "model_revision: v1\n", "model_revision='v1': cannot be represented: expected text, for a model org/name"),
        (SFT + "final_lr_ratio: 0.1\n", "final_lr_ratio=0.1: cannot be represented"),
        (SFT + "chat_template_name: olmo\n", "chat_template_name='olmo': cannot be represented: expected"),
        (SFT.replace(": linear", ": constant"), "lr_scheduler_type='constant': cannot be represented"),
        (SFT + "tokenizer_name_or_path: x/y\n", "tokenizer_name, tokenizer_name_or_path: expected one of them"),
        (SFT.replace("tokenizer_name: meta", "tokenizer_name: x"), "tokenizer_name='x-llama/Llama-3.1-8B': cannot"),
        (SFT + "dataset_name: x/y\n", "data: found ['dataset_mixer', 'dataset_name']; expected one of"),
        (SFT + "sequence_parallel_size: 3\n", "the batch: 1 * 2 * 8 / 3: expected whole numbers"),
        (SFT + "warmup_ration: 0.1\n", "warmup_ration: no key of stage 'sft' that this tool knows, did you mean 'warmup_ratio'"),
        (SFT.replace("max_seq_length: 4096", ""), "max_seq_length: not in the YAML"),
        (SFT.replace("4096", "4096.0"), "max_seq_length=4096.0: cannot be represented: expected a whole number"),
        (SFT.replace("model_name_or_path: meta-llama/Llama-3.1-8B", ""), "model_name_or_path: not in the YAML; expected a model"),
        (SFT.replace("num_train_epochs: 2", "num_train_epochs: 0"), "as a config of ours: num_epochs=0: expected int >= 1"),
        (DPO.replace("loss_type: dpo_norm", ""), "loss_type: not in the YAML, and open-instruct's default changed"),
        (DPO.replace("dpo_norm", "slic"), "loss_type='slic': cannot be represented"),
    ],
)  # fmt: skip
def test_refused(translated, yaml, message):
    code, _, out, err = translated(yaml, "--processes", "8")
    assert code == 1 and not out and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "yaml, args, message",
    [
        (SFT, [], "expected --processes N"),
        (
            SFT + "num_processes: 4\n",
            ["--processes", "8"],
            "num_processes=4, --processes 8: expected one of them",
        ),
        (DPO, ["--stage", "sft", "--processes", "8"], "loss_type: no key of stage 'sft'"),
        ("- a\n", [], "a list; expected a mapping"),
        ("a: [\n", [], "not YAML"),
        ("learning_rate: 1.0e-5\n", [], "expected --stage sft or --stage dpo"),
    ],
)
def test_refused_arguments(translated, yaml, args, message):
    code, _, out, err = translated(yaml, *args)
    assert code == 1 and not out and message in err


def test_a_file_that_cannot_be_written_is_named(translated, tmp_path):
    code, _, out, err = translated(DPO, "--processes", "8", "--out", str(tmp_path))
    assert code == 1 and not out and err.startswith("error: ") and f"{str(tmp_path)!r}" in err


def test_all_problems_at_once(translated):
    _, _, _, err = translated(SFT + "final_lr_ratio: 0.1\nuse_qlora: true\nresume_from_checkpoint: None\n")
    assert len(err.splitlines()) == 4 and all(line.startswith("error: ") for line in err.splitlines())


SILENT = re.sub(
    "^(loss_type|beta|num_epochs|warmup_ratio).*\n", "", DPO, flags=re.M
)  # leaves all four to the defaults


@pytest.mark.parametrize(
    ("date", "expected"),
    [
        ("2024-11-24", ("dpo", 0.1, 2, 0.03, "all", "shuffle", "tulu")),
        ("2025-01-28", ("dpo", 0.1, 2, 0.03, "all", "first", "tulu")),
        ("2026-01-15", ("dpo", 0.1, 2, 0.03, "last", "choice", None)),  # the plan's YAMLs, read as they are
        ("2026-08-20", ("dpo_norm", 5.0, 1, 0.1, "last", "choice", None)),
    ],
)
def test_what_the_yaml_does_not_say_is_that_days(translated, date, expected):
    """Four defaults and three behaviours, each in a comment with its commit."""
    code, c, text, _ = translated(SILENT, "--stage", "dpo", "--processes", "8", "--date", date)
    assert code == 0
    assert (c.loss, c.beta, c.num_epochs, c.warmup_ratio, c.supervise, c.rows, c.template) == expected
    said = " ".join(text.replace("#", "").split())
    assert (
        f"loss_type is not in the YAML: open-instruct's default on {date}, {expected[0]!r}" in said
        and "7917d4173" in said
    )
    assert f"supervise: {expected[4]!r}, as open-instruct did on {date}" in said


def test_the_day_of_a_checkout(translated, tmp_path):
    """Its commit's; an amount of 1 was all rows then, and a BOS has a template."""
    (tmp_path / "theirs/open_instruct").mkdir(parents=True)
    options = ["--processes", "8", "--checkout", str(tmp_path / "theirs")]
    code, _, _, err = translated(SFT, *options)
    assert code == 1 and "git knows no commit there; expected a clone, or --date" in err
    day = {"GIT_AUTHOR_DATE": "2024-11-24T12:00:00", "GIT_COMMITTER_DATE": "2024-11-24T12:00:00"}
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path / "theirs"), *command], check=True, env=os.environ | day)
    code, config, _, _ = translated(SFT.replace("5000", "1") + "add_bos: true\n", *options)
    assert (
        code == 0
        and config.data["other/set"] == 1.0
        and (config.rows, config.template) == ("shuffle", "tulu_bos")
    )
    code, _, _, err = translated(SFT, "--processes", "8", "--date", "January")
    assert code == 1 and "--date January: expected a day, YYYY-MM-DD" in err
