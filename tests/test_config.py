"""plumbing/config.py: what a config may say, what it says back when it is wrong, and that every file in
configs/ loads.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from data import TEMPLATES
from plumbing import config as config_module
from plumbing.config import (
    THEIR_NAMES,
    Template,
    check_world_size,
    config_dict,
    config_hash,
    help_text,
    load,
    load_sections,
    resume_dict,
    unused_flash4,
)
from train_dpo import LOSSES, DPOConfig
from train_sft import SFTConfig

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(
    path for path in FOLDER.glob("*.py") if path.stem != "pairs"
)  # which holds no training config
# The smallest file that works; what a test adds stands behind it and wins.
MINIMAL = """
common = dict(model_path="base", data={"a.jsonl": 1.0}, max_seq_len=16, global_batch_size=8, tokens_per_microbatch=64, lr=1e-3)
sft = dict(out_dir="runs/sft")
dpo = dict(out_dir="runs/dpo")
"""
VALUES = dict(
    model_path="base",
    out_dir="o",
    data={"a.jsonl": 1.0},
    max_seq_len=16,
    global_batch_size=8,
    tokens_per_microbatch=64,
    lr=1e-3,
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(text) puts MINIMAL + text where `x.py` finds it."""
    monkeypatch.chdir(tmp_path)
    return lambda text: Path("x.py").write_text(MINIMAL + text)


def problems(stage, *argv):
    with pytest.raises(ValueError) as error:
        load(stage, ["x.py", *argv])
    return str(error.value).splitlines()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path, stage):
    config = load(stage, [str(path)])
    assert config.out_dir == f"runs/{path.stem}/{stage}"
    assert path.read_text().startswith('"""') and 20 <= len(path.read_text().splitlines()) <= 50
    if stage == "dpo":
        assert config.model_path == f"runs/{path.stem}/sft/final", (
            "DPO starts from (and is compared with) the SFT model"
        )


@pytest.mark.parametrize("name", ["tulu10", "tulu10_lora", "tulu_full", "tulu_full_lora", "pku_lora"])
def test_paid_runs_hold_pairs_out(name):
    """Some 500 of the pairs, so that the ladder has an accuracy: 1.96 sqrt(0.7 * 0.3 / 500) is 4 %."""
    rows = {"tulu10": 27_140, "tulu_full": 271_409, "pku": 12_000}[name.removesuffix("_lora")]
    config = load("dpo", [str(FOLDER / f"{name}.py")])
    assert 450 < config.data_eval * rows < 600


def test_the_seed_run_is_as_recorded():
    sft, dpo = (load(stage, [str(FOLDER / "tulu10.py")]) for stage in ("sft", "dpo"))
    assert (sft.lr, sft.warmup_ratio, sft.num_epochs, sft.global_batch_size, sft.max_seq_len) == (
        5e-6,
        0.03,
        2,
        128,
        4096,
    )
    assert (dpo.lr, dpo.warmup_ratio, dpo.num_epochs, dpo.global_batch_size, dpo.max_seq_len) == (
        5e-7,
        0.1,
        1,
        128,
        2048,
    )
    assert (dpo.loss, dpo.beta, sft.lr_schedule, dpo.lr_schedule) == ("dpo_norm", 5.0, "linear", "linear")
    assert sft.data == {"allenai/tulu-3-sft-mixture": 0.1} and dpo.data == {
        "allenai/llama-3.1-tulu-3-8b-preference-mixture": 0.1
    }


def test_the_failed_run_is_as_recorded():
    sft, dpo = (load(stage, [str(FOLDER / "pku_lora.py")]) for stage in ("sft", "dpo"))
    assert (sft.lora_rank, sft.lora_alpha, len(sft.lora_targets), sft.max_seq_len) == (16, 16.0, 7, 2048)
    assert (sft.lr, dpo.lr, dpo.warmup_steps, dpo.num_epochs, dpo.loss, dpo.beta) == (
        2e-4,
        1e-5,
        5,
        1,
        "dpo",
        0.1,
    )


# ---------------------------------------------------------------- precedence


def test_precedence_is_default_common_section_command_line(write):
    write("common |= dict(seed=1, weight_decay=0.1)\ndpo |= dict(seed=2)")
    assert load("sft", ["x.py"]).seed == 1
    assert load("dpo", ["x.py"]).seed == 2
    assert load("dpo", ["--seed=3", "x.py"]).seed == 3
    dpo = load("dpo", ["x.py"])
    assert (dpo.weight_decay, dpo.num_epochs, dpo.fresh) == (0.1, 1, False)


def test_the_command_line_changes_the_started_stage_only(write):
    write('dpo |= dict(loss="simpo", gamma_beta_ratio=0.5)')
    assert load("sft", ["x.py", "--loss=tulu3_release"]).loss == "tulu3_release"
    assert load("dpo", ["x.py"]).loss == "simpo"


def test_values_are_read_by_the_declared_type(write):
    write("")
    config = load(
        "dpo",
        [
            "x.py",
            "--lr=5e-7",
            "--max_steps=7",
            "--beta=2",
            "--data_eval=0.1",
            "--cache_dir=12",
            "--template=chatml",
            "--fresh",
        ],
    )
    assert (config.lr, config.max_steps, config.beta, config.data_eval) == (5e-7, 7, 2.0, 0.1)
    assert (config.cache_dir, config.template, config.fresh) == ("12", "chatml", True)
    assert type(config.beta) is float
    assert (
        load("dpo", ["x.py", "--fresh=false"]).fresh is load("dpo", ["x.py", "--fresh=False"]).fresh is False
    )
    assert load("dpo", ["x.py", "--fresh=True"]).fresh is True


def test_none_on_the_command_line(write):
    """Where the key may be None; recompute has a choice of that name, and keeps it."""
    write("common |= dict(max_steps=5, data_eval=0.5, eval_every=2)")
    keys = [
        "--max_steps=none",
        "--data_eval=none",
        "--eval_every=None",
        "--template=none",
        "--recompute=none",
    ]
    config = load("sft", ["x.py", *keys])
    assert config.max_steps is config.data_eval is config.eval_every is config.template is None
    assert config.recompute == "none"


def test_private_names_and_imports_stay_private(write):
    write(
        'import math\n_root = "r"\ncommon |= dict(lr=1 / math.pi, template=None)\nsft |= dict(out_dir=f"{_root}/sft")'
    )
    config = load("sft", ["x.py"])
    assert (config.out_dir, config.template) == ("r/sft", None)


def test_a_file_may_hold_one_stage_only(write):
    write("del dpo")
    assert load("sft", ["x.py"]).out_dir == "runs/sft"
    assert problems("dpo") == ["x.py: no section 'dpo': expected dpo = dict(...)"]


def test_sections_of_steering(write):
    """Two sections with keys of their own: a missing one is its defaults, numbers of a tuple stand between
    commas.
    """
    write("steer = dict(texts='t', layers=3, lambdas=(0, 1))")
    found = load_sections("x.py", ["steer", "aqi"], ["--lambdas=-1,0.5", "--space=tsne", "--seeds=3"])
    assert (found["steer"].layers, found["steer"].lambdas, found["steer"].inject) == (
        3,
        (-1.0, 0.5),
        "cumulative",
    )
    assert (found["aqi"].space, found["aqi"].seeds, found["aqi"].prompts) == ("tsne", 3, None)
    assert load_sections("x.py", ["steer"], [])["steer"].lambdas == (0.0, 1.0)
    with pytest.raises(ValueError) as error:
        keys, required = ("layers", "texts", "prompts"), ("texts", "prompts")
        load_sections("x.py", ["steer", "aqi"], ["--seeds=2", "--layers=1"], keys, required)
    assert str(error.value).splitlines() == [
        "command line: seeds: a key that this command does not read",
        "x.py: aqi: missing 'prompts': labelled texts: columns of axiom, label (safe or unsafe) and text",
        "x.py: aqi: seeds=2: space='raw' has no random start; expected --space=tsne",
    ]


# ---------------------------------------------------------------- messages

QUOTED = "got a string (in the file None has no quotes, on the command line it is none)"
IN_THE_FILE = [
    ("dpo |= dict(beat=5)", "x.py: dpo: unknown key 'beat', did you mean 'beta'?"),
    ("sft |= dict(beta=5)", "x.py: sft: unknown key 'beta' (a key of dpo)"),
    ("common |= dict(beta=5)", "x.py: common: unknown key 'beta' (a key of dpo)"),
    ("common |= dict(frobnicate=5)", "x.py: common: unknown key 'frobnicate'"),
    (
        "sft |= dict(learning_rate=1e-5)",
        "x.py: sft: unknown key 'learning_rate', here 'lr': peak learning rate of AdamW",
    ),
    (
        "dpo |= dict(per_device_train_batch_size=4)",
        "x.py: dpo: unknown key 'per_device_train_batch_size', here 'global_batch_size': "
        "documents (DPO: pairs) of one optimizer step, over all GPUs",
    ),
    ("dpo |= dict(dpo_beta=0.1)", "x.py: dpo: unknown key 'dpo_beta', did you mean 'beta'?"),
    ("stf = dict()", "x.py: unknown section 'stf', did you mean 'sft'?"),
    ("common = {3: 4}", "x.py: common: key 3: expected a name"),
    ("import sys\nsys.exit(3)", "x.py, line 6: SystemExit: 3"),
    (
        "root = 'runs'",
        "x.py: unknown section 'root'; expected common, sft, dpo, steer, aqi (a private name starts with _)",
    ),
    ("sft = [1]", "x.py: sft: expected a dict, got list"),
    ("del common['lr']", "x.py: dpo: missing 'lr': peak learning rate of AdamW"),
    (
        "sft |= dict(fresh=True)",
        "x.py: sft: fresh: expected on the command line only; here it would restart the run at every start",
    ),
    (
        "sft |= dict(push='org/x')",
        "x.py: sft: push: expected on the command line only; here it would upload it at every end",
    ),
    ("sft |= dict(lr='5e-6')", "x.py: sft: lr='5e-6': expected float > 0, got str"),
    ("sft |= dict(num_epochs=2.0)", "x.py: sft: num_epochs=2.0: expected int >= 1, got float"),
    ("sft |= dict(seed=True)", "x.py: sft: seed=True: expected int >= 0 and < 4294967296, got bool"),
    (
        "sft |= dict(seed=2**32)",
        "x.py: sft: seed=4294967296: expected int >= 0 and < 4294967296",
    ),  # as numpy's RandomState has it
    ("sft |= dict(lr=10**400)", f"x.py: sft: lr={10**400}: expected float > 0"),  # no float is as large
    ("sft |= dict(lr=True)", "x.py: sft: lr=True: expected float > 0, got bool"),
    ("sft |= dict(lr=None)", "x.py: sft: lr=None: expected float > 0, got NoneType"),
    ("sft |= dict(max_steps='None')", f"x.py: sft: max_steps='None': expected int >= 1 or None, {QUOTED}"),
    (
        "sft |= dict(template='null')",
        f"x.py: sft: template='null': expected tulu | tulu_bos | zephyr | llama3 | chatml | gemma or None, {QUOTED}",
    ),
    ("sft |= dict(cache_dir='None')", f"x.py: sft: cache_dir='None': expected str, {QUOTED}"),
    ("sft |= dict(model_path='')", "x.py: sft: model_path='': expected str, got none"),
    ("sft |= dict(lr=0)", "x.py: sft: lr=0: expected float > 0"),
    ("sft |= dict(lr=float('nan'))", "x.py: sft: lr=nan: expected float > 0"),
    ("sft |= dict(lr=float('inf'))", "x.py: sft: lr=inf: expected float > 0"),
    ("sft |= dict(warmup_ratio=1.0)", "x.py: sft: warmup_ratio=1.0: expected float >= 0 and < 1"),
    ("dpo |= dict(beta=-1.0)", "x.py: dpo: beta=-1.0: expected float > 0 or None"),
    ("dpo |= dict(label_smoothing=0.5)", "x.py: dpo: label_smoothing=0.5: expected float >= 0 and < 0.5"),
    ("dpo |= dict(loss='kto')", "x.py: dpo: loss='kto': expected dpo_norm | dpo | simpo | ipo | wpo"),
    ("sft |= dict(loss='dpo')", "x.py: sft: loss='dpo': expected token_mean | tulu3_release"),
    (
        "sft |= dict(precision='fp16')",
        "x.py: sft: precision='fp16': expected fp32 | bf16 | fp8, did you mean 'bf16'?",
    ),
    (
        "sft |= dict(precision='fp8', kernels='plain')",
        "x.py: sft: kernels='plain', precision='fp8': float8 is in the fused blocks only; expected kernels='fused'",
    ),
    ("sft |= dict(data={})", "x.py: sft: data={}: expected dict {str: float or int > 0}, got none"),
    ("sft |= dict(data={'a': 0})", "x.py: sft: data={'a': 0}: expected dict {str: float or int > 0}"),
    (
        "sft |= dict(data={'a': True})",
        "x.py: sft: data={'a': True}: expected dict {str: float or int > 0}, got dict of bool",
    ),
    ("sft |= dict(data='a')", "x.py: sft: data='a': expected dict {str: float or int > 0}, got str"),
    (
        "sft |= dict(data_eval=1)",
        "x.py: sft: data_eval=1: expected dict {str: float or int > 0} or float > 0 and < 1 or None",
    ),
    ("sft |= dict(eval_every=5)", "x.py: sft: eval_every=5: needs data_eval"),
    (
        "sft |= dict(warmup_ratio=.1, warmup_steps=5)",
        "x.py: sft: warmup_ratio=0.1, warmup_steps=5: expected one of the two",
    ),
    (
        "sft |= dict(max_seq_len=65)",
        "x.py: sft: tokens_per_microbatch=64: expected at least max_seq_len=65 (a document must fit one stream)",
    ),
    (
        "dpo |= dict(max_seq_len=33)",
        "x.py: dpo: tokens_per_microbatch=64: expected at least twice max_seq_len=33 (a pair must fit one stream)",
    ),
    (
        "dpo |= dict(loss='simpo')",
        "x.py: dpo: loss='simpo', gamma_beta_ratio=None: simpo needs one, no other loss has one",
    ),
    (
        "dpo |= dict(gamma_beta_ratio=.5)",
        "x.py: dpo: loss='dpo_norm', gamma_beta_ratio=0.5: simpo needs one, no other loss has one",
    ),
    (
        "dpo |= dict(loss='ipo', label_smoothing=.1)",
        "x.py: dpo: label_smoothing=0.1: defined for dpo_norm, dpo and simpo, not for loss='ipo'",
    ),
    (
        "sft |= dict(lora_rank=4)",
        "x.py: sft: lora_rank=4, lora_alpha=None: expected both (the scale is lora_alpha / lora_rank) or neither",
    ),
    (
        "sft |= dict(lora_alpha=4)",
        "x.py: sft: lora_rank=0, lora_alpha=4.0: expected both (the scale is lora_alpha / lora_rank) or neither",
    ),
    (
        "sft |= dict(lora_targets=('q_proj', 'lm_head'))",
        "x.py: sft: lora_targets=('q_proj', 'lm_head'): expected tuple of "
        "q_proj | k_proj | v_proj | o_proj | gate_proj | up_proj | down_proj, got tuple",
    ),
]


def test_their_names_lead_to_keys_of_ours():
    keys = {field.name for field in dataclasses.fields(DPOConfig)}
    assert set(THEIR_NAMES.values()) <= keys and not keys & THEIR_NAMES.keys()


@pytest.mark.parametrize("text, expected", IN_THE_FILE, ids=[text for text, _ in IN_THE_FILE])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_wrong_file_is_refused_whichever_stage_starts(write, stage, text, expected):
    write(text)
    assert expected in problems(stage)


ON_THE_COMMAND_LINE = [
    ("--beat=1", "command line: unknown key 'beat', did you mean 'beta'?"),
    ("--beta", "command line: --beta: expected --beta=value"),
    ("-beta=1", "command line: unknown key '-beta', did you mean 'beta'?"),
    ("--max_steps=null", f"command line: max_steps='null': expected int >= 1 or None, {QUOTED}"),
    ("--num_epochs=none", f"command line: num_epochs='none': expected int >= 1, {QUOTED}"),
    ("--model_path=none", f"command line: model_path='none': expected str, {QUOTED}"),
    ("--max_steps=1e3", "command line: max_steps='1e3': expected int >= 1 or None, got str"),
    ("--lr=fast", "command line: lr='fast': expected float > 0, got str"),
    ("--lr=-1", "command line: lr=-1.0: expected float > 0"),
    ("--fresh=yes", "command line: fresh='yes': expected bool, got str"),
    (
        "--data=a.jsonl",
        "command line: data: no string is read as dict {str: float or int > 0}: put it into the config file",
    ),
    (
        "--lora_targets=q_proj",
        "command line: lora_targets: no string is read as tuple of q_proj | k_proj | v_proj | o_proj | gate_proj | up_proj | down_proj: "
        "put it into the config file",
    ),
    (
        "--model_path=./runs/../runs/dpo/final",
        "x.py: dpo: out_dir='runs/dpo': its final/ is model_path, which the end of the run would replace; expected another folder",
    ),
    (
        "--max_seq_len=64",
        "x.py: dpo: tokens_per_microbatch=64: expected at least twice max_seq_len=64 (a pair must fit one stream)",
    ),
]


@pytest.mark.parametrize("arg, expected", ON_THE_COMMAND_LINE, ids=[arg for arg, _ in ON_THE_COMMAND_LINE])
def test_a_wrong_argument_is_refused(write, arg, expected):
    write("")
    assert problems("dpo", arg) == [expected]


def test_all_problems_come_at_once_and_only_once(write):
    write(
        "common |= dict(lr='x')\nsft |= dict(warmup_ratio=2.0, warmup_steps=5)\ndpo |= dict(beat=1, lora_rank=4)\nstf = {}"
    )
    assert (
        problems("sft", "--num_epoch=1")
        == [
            "x.py: unknown section 'stf', did you mean 'sft'?",
            "command line: unknown key 'num_epoch', did you mean 'num_epochs'?",
            "x.py: common: lr='x': expected float > 0, got str",  # not reported again as missing, nor once per stage
            "x.py: sft: warmup_ratio=2.0: expected float >= 0 and < 1",  # so the rule about warmup_steps has nothing to say
            "x.py: dpo: unknown key 'beat', did you mean 'beta'?",
            "x.py: dpo: lora_rank=4, lora_alpha=None: expected both (the scale is lora_alpha / lora_rank) or neither",
        ]
    )


def test_the_file_itself(write):
    write("")
    with pytest.raises(ValueError, match="^y.py: no such config file, did you mean 'x.py'\\?$"):
        load("sft", ["y.py"])
    for text, message in (("lr = 1e-5\nsft |= ltr", "line 6: NameError: name 'ltr' is not defined"),
                          ("import nowhere_at_all", "line 5: ModuleNotFoundError: No module named 'nowhere_at_all'"),
                          ("sft = dict(", "line 5: '\\(' was never closed")):  # fmt: skip
        write(text)
        with pytest.raises(ValueError, match=f"^x.py, {message}$"):
            load("sft", ["x.py"])
    with pytest.raises(ValueError, match="expected one config file, got \\[\\]: train_sft.py CONFIG.py"):
        load("sft", [])
    with pytest.raises(ValueError, match="expected one config file, got \\['x.py', '5'\\]"):
        load("sft", ["x.py", "--seed", "5"])


# ---------------------------------------------------------------- the dataclasses, --help, the hash


def test_a_config_made_in_code_is_checked_too():
    config = SFTConfig(**VALUES)
    with pytest.raises(ValueError, match="^lr=0: expected float > 0$"):
        dataclasses.replace(config, lr=0)
    with pytest.raises(ValueError, match="a document must fit one stream"):
        dataclasses.replace(config, tokens_per_microbatch=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


@pytest.mark.parametrize("stage, cls", [("sft", SFTConfig), ("dpo", DPOConfig)])
def test_help_lists_every_key_with_type_default_unit_and_meaning(stage, cls, capsys):
    with pytest.raises(SystemExit) as leave:
        load(stage, ["nowhere.py", "--help"])
    assert leave.value.code == 0
    printed = capsys.readouterr().out
    assert printed == help_text(stage) + "\n"
    for field in dataclasses.fields(cls):
        assert f"\n  {field.name}: " in printed
        assert f"[{field.metadata['unit']}] {field.metadata['help']}" in printed
    assert "  lr: float > 0, required\n      [-] peak learning rate of AdamW" in printed
    assert "  max_steps: int >= 1 or None, default None\n" in printed
    assert "  data: dict {str: float or int > 0}, required (in the file only)\n" in printed


def test_a_loss_has_its_own_beta(write):
    """None and no beta are the loss's own, in the hash too; a beta of the file or of the command line
    stays.
    """
    write("")
    losses = {"dpo": 0.1, "dpo_norm": 5.0, "ipo": 0.1, "wpo": 0.01}
    betas = {loss: load("dpo", ["x.py", f"--loss={loss}"]).beta for loss in losses}
    assert betas == losses == {loss: LOSSES[loss].beta for loss in losses}
    assert load("dpo", ["x.py", "--loss=simpo", "--gamma_beta_ratio=0.5"]).beta == 2.0
    assert load("dpo", ["x.py", "--loss=dpo", "--beta=5"]).beta == 5.0
    assert config_hash(DPOConfig(**VALUES, beta=None)) == config_hash(DPOConfig(**VALUES, beta=5.0))
    assert config_dict(DPOConfig(**VALUES, loss="dpo"))["beta"] == 0.1


def test_hash_is_of_what_the_result_depends_on():
    config = SFTConfig(**VALUES)
    same = dict(
        out_dir="p",
        cache_dir="c",
        log_every=2,
        save_every=3,
        keep_last=4,
        fresh=True,
        recompute="full",
        tokens_per_microbatch=128,
    )
    assert config_hash(dataclasses.replace(config, **same)) == config_hash(config)
    other = [
        dict(seed=1),
        dict(lr=2e-3),
        dict(data={"a.jsonl": 1}),
        dict(max_steps=5),
        dict(precision="fp32"),
        dict(global_batch_size=4),
    ]
    assert (
        len({config_hash(dataclasses.replace(config, **change)) for change in [{}, *other]}) == len(other) + 1
    )
    dpo = DPOConfig(**VALUES)
    assert (
        config_hash(dataclasses.replace(dpo, share_prefix=False)) == config_hash(dpo) != config_hash(config)
    )


def test_hash_does_not_depend_on_how_it_was_written():
    """5 and 5.0, and the order of the keys, are one config; so are the file's values and the resolved ones in
    config.json.
    """
    five, again = DPOConfig(**VALUES, beta=5), DPOConfig(beta=5.0, **dict(reversed(VALUES.items())))
    assert config_hash(five) == config_hash(again) and len(config_hash(five)) == 64
    assert resume_dict(five).items() <= config_dict(five).items()
    assert (
        config_dict(five)["lora_targets"] == list(five.lora_targets) and config_dict(five)["out_dir"] == "o"
    )


def test_check_world_size():
    config = SFTConfig(**VALUES)
    check_world_size(config, 8, 8)
    with pytest.raises(ValueError, match="global_batch_size=8: a batch that cannot be formed on 9 ranks"):
        check_world_size(config, 9, 9)


@pytest.mark.parametrize(
    "ranks, machine, found",
    [
        (8, 8, "8 ranks, 8 a machine"),
        (6, 4, "6 ranks, 4 a machine"),
        (3, 0, "3 ranks, not equally many a machine"),
        (2, 1, "2 ranks, 1 a machine"),
    ],
)
def test_hybrid_needs_several_equal_machines(ranks, machine, found):
    config = SFTConfig(**VALUES, sharding="hybrid")
    check_world_size(config, 8, 4)
    with pytest.raises(ValueError, match=f"sharding='hybrid' on {found}: expected several machines with the"):
        check_world_size(config, ranks, machine)


def test_names_agree_with_the_modules_that_own_them():
    assert set(get_args(Template)) == set(TEMPLATES)


# ---------------------------------------------------------------- the price of an answer

# Each takes a third of a second to three seconds of CPU time, and none is needed before a run starts.
LATE = {
    "datasets",
    "pyarrow",
    "pandas",
    "httpx",
    "sympy",
    "triton",
    "scipy",
    "matplotlib",
    "torch._dynamo",
    "torch.distributed.fsdp",
}


# Each line of arguments is run in a fork of a process that has imported torch. Printed are torch's CPU seconds;
# then, of each line, the exit code, the CPU seconds behind torch's, and the modules.
ANSWERS = """
import gc, os, runpy, sys, time
import torch

gc.freeze()
print(time.process_time(), flush=True)
printed = os.dup(1)
for line in sys.argv[1:]:
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv, code = line.split(), 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        os.write(printed, " ".join([str(code), str(time.process_time()), *sys.modules, "\\n"]).encode())
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_an_answer_costs_what_torch_costs():
    """1.1 of 1.2 s of CPU time are torch's on an idle machine; the ratio holds on a busy one too."""
    codes = {
        "train_sft.py --help": 0,
        "train_dpo.py configs/tulu10.py --beat=1": 1,
        "train_dpo.py configs/tulu10.py --plan --gpu=h100 --count=8": 0,
    }
    command = [sys.executable, "-c", ANSWERS, *codes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True)
    torch_seconds, *answers = done.stdout.splitlines()
    assert len(answers) == len(codes), done.stderr
    for (line, code), answer in zip(codes.items(), answers, strict=True):
        returned, seconds, *imported = answer.split()
        assert int(returned) == code, line
        assert not LATE & set(imported), line
        assert float(seconds) < 0.5 + 0.5 * float(torch_seconds), line


def test_flash4_is_named_where_it_could_run(monkeypatch):
    """Installed, a Hopper or newer, 16 bits, not deterministic, and not asked for already."""
    monkeypatch.setattr(config_module, "_is_installed", lambda module: module == "flash_attn.cute")
    config = SFTConfig(**VALUES)
    assert "--attention=flash4" in unused_flash4(config, (9, 0)) == unused_flash4(config, (12, 0))
    assert not unused_flash4(config, (8, 9))
    for keys in (dict(attention="flash4"), dict(precision="fp32"), dict(deterministic=True)):
        assert not unused_flash4(dataclasses.replace(config, **keys), (9, 0))
    monkeypatch.setattr(config_module, "_is_installed", lambda module: False)
    assert not unused_flash4(config, (9, 0))


def test_a_tilde_is_the_home_folder(write, monkeypatch):
    """No shell expands it behind `=`, and ./~/runs is nobody's wish."""
    monkeypatch.setenv("HOME", "/home/somebody")
    write("")
    config = load("sft", ["x.py", "--out_dir=~/runs", "--model_path=~/base", "--cache_dir=a~b"])
    assert (config.out_dir, config.model_path, config.cache_dir) == (
        "/home/somebody/runs",
        "/home/somebody/base",
        "a~b",
    )
    write("sft |= dict(data={'~/a.jsonl[train]': 3, '~': 1.0, 'a~b': 1}, data_eval={'~/b/*.jsonl': 9})")
    config = load("sft", ["x.py"])
    assert config.data == {"/home/somebody/a.jsonl[train]": 3, "/home/somebody": 1.0, "a~b": 1}
    assert config.data_eval == {"/home/somebody/b/*.jsonl": 9}
    write("sft |= dict(data={'~/a.jsonl': 3, '/home/somebody/a.jsonl': 4})")
    with pytest.raises(ValueError, match="sft: data=.*: one source twice, with ~ and without"):
        load("sft", ["x.py"])
