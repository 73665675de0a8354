"""demo/objectives.py: its commands are accepted, its numbers are those worked by hand. Its runs need a GPU, or
half an hour, and real weights.
"""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from world import write_rows

from demo import objectives, smol
from plumbing.config import load
from train_dpo import LOSSES


def turns(*contents):
    roles = ("user", "assistant") * 2
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


@pytest.fixture
def pairs(tmp_path):
    rows = []
    for i in range(3):
        rows.append({"prompt": f"{i}?", "chosen": turns(f"{i}?", "yes"), "rejected": turns(f"{i}?", "no")})
    write_rows(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_variant_is_the_recipe_but_for_its_own_keys(tmp_path, pairs):
    """Each loss with its own beta; --small wins over the config; exchanged pairs are held out as they are."""
    swapped = objectives.write_swapped(tmp_path / "root", pairs)
    commands = objectives.training_commands(list(objectives.VARIANTS), swapped, smol.SMALL)
    configs = {}
    for name, (script, *words) in commands.items():
        configs[name] = load("sft" if script == "train_sft.py" else "dpo", words)
    sft = configs.pop("sft_seed")
    assert (sft.model_path, sft.seed, sft.global_batch_size) == ("runs/smol/base", 1, 8)
    recipe = configs["dpo_norm"]
    assert (recipe.loss, recipe.beta, recipe.max_steps, recipe.lr) == ("dpo_norm", 5.0, 12, 3e-5)
    for name in ("dpo", "ipo", "simpo"):
        assert (configs[name].loss, configs[name].beta) == (name, LOSSES[name].beta)
    own = {"out_dir", "loss", "beta", "gamma_beta_ratio", "label_smoothing", "supervise", "seed", "data"}
    for config in configs.values():
        differing = {key for key, value in vars(config).items() if value != getattr(recipe, key)}
        assert differing <= own
    assert configs["swapped"].data == {str(tmp_path / "root/swapped.jsonl"): 1.0}
    assert configs["dpo_seed"].seed == 1 and configs["smoothed"].label_smoothing == 0.1
    assert configs["last_turn"].supervise == "last"


def test_every_variant_is_a_registered_pair():
    """Of what its command writes, so that steer.py validate takes its name."""
    table = runpy.run_path("configs/pairs.py")["PAIRS"]
    for name, words in objectives.training_commands(list(objectives.VARIANTS), "swapped.py", {}).items():
        pair = table[f"smol_{name}"]
        assert (
            pair["sft"] == str(objectives.SFT) and f"--out_dir={pair['dpo']}".removesuffix("/final") in words
        )
    assert {name for name in table if name.startswith("smol_")} == {
        f"smol_{name}" for name in objectives.VARIANTS
    }


def test_exchanged_pairs_keep_their_order(tmp_path, pairs):
    objectives.write_swapped(tmp_path, pairs)
    for row, other in zip(read(pairs), read(tmp_path / "swapped.jsonl"), strict=True):
        assert row["prompt"] == other["prompt"]
        assert (row["chosen"], row["rejected"]) == (other["rejected"], other["chosen"])


def test_last_turns_differ_only_where_there_are_several(tmp_path, pairs):
    assert not objectives.has_several_answers(pairs)
    rows = read(pairs)
    rows[2]["chosen"] = turns("2?", "yes", "sure?", "yes")
    write_rows(pairs, rows)
    assert objectives.has_several_answers(pairs)


def test_held_out_by_hand():
    """Two pairs of two and one tokens. Log-ratios a token of chosen +0.5, -0.25, of rejected -0.5, +0.25:
    margins 1 and -0.5. Of chosen tokens +1, 0, -0.25: mean 0.25, mean absolute 1.25 / 3.
    """
    before = [[-2.0, -2.0], [-1.0], [-1.0, -3.0], [-2.0]]
    after = [[-1.0, -2.0], [-1.25], [-2.0, -3.0], [-1.75]]
    logits = [torch.zeros(1, 4)]
    models = []
    for logps in (after, before):
        models.append(([np.array(values) for values in logps], logits))
    found = objectives.held_out(*models, ["a", "b"])
    assert (found["accuracy"][0], found["margin"][0]) == (0.5, 0.25)
    assert (found["chosen"], found["drift"]) == (pytest.approx(0.25), pytest.approx(1.25 / 3))
    assert found["kl"] == 0
    itself = objectives.held_out(models[1], models[1], ["a", "b"])
    assert itself["margin"] == (0, 0, 0) and itself["drift"] == 0


def test_a_row_of_the_table():
    found = dict(accuracy=(0.5, 0.25, 0.75), margin=(0.01, -0.002, 0.02), chosen=-0.03, drift=0.1, kl=0.002)
    found |= dict(cosine=0.9, least_cosine=0.85, change=(-0.009, -0.02, 0.005), p=0.55, separation=1.1)
    found |= dict(decision="nothing", seconds=12.4)
    cells = ["ipo", "0.500 [0.250, 0.750]", "+0.0100 [-0.0020, +0.0200]", "-0.0300", "0.1000", "0.00200"]
    cells += ["0.900", "0.850", "-0.009 [-0.02, +0.005]", "0.55", "1.10", "nothing", "12"]
    assert objectives.line("ipo", found) == cells
    assert len(cells) == len(objectives.HEAD)


def test_runs_beside_each_other_write_logs_and_name_the_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "ROOT", tmp_path)
    commands = {"good": ("-c", "print('said')"), "bad": ("-c", "raise SystemExit(3)")}
    with pytest.raises(SystemExit, match="did not end well: .*bad.log"):
        objectives.run_all(commands, 2)
    assert (tmp_path / "logs/good.log").read_text() == "said\n"
    objectives.run_all({"good": commands["good"]}, 2)


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(objectives, "SFT", tmp_path / "sft")
    with pytest.raises(ValueError, match="sft/config.json: not there; expected `make smol` to have run"):
        objectives.main([])
    with pytest.raises(SystemExit):
        objectives.main(["--help"])
    assert sys.modules["demo.objectives"].__doc__.split("\n")[0] in capsys.readouterr().out
