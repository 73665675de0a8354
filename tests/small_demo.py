"""`make demo` with a tenth of the pretraining, half of the layers and fewer rows, for test_commands.py: the same
commands and files, and numbers that are none of the demo's. The demo itself is run by .ci/run.
"""

import dataclasses
import functools
import multiprocessing
import sys
from pathlib import Path

import world

import model
from demo import axioms, common, run, tiny

KEPT = {"sft": 6, "preferences": 6, "preferences_eval": 2}  # every so many rows


def generate(seed=0):
    """demo.axioms.generate, fewer rows; of the labelled prompts every tenth pair of labels."""
    files = generate_all(seed)
    for stem, step in KEPT.items():
        files[stem] = files[stem][::step]
    files["aqi"] = [row for i, row in enumerate(files["aqi"]) if i // 2 % 10 == 0]
    return files


def run_script(script, *arguments):
    """demo.common.run_script, in a fork of this process: a new Python would import torch."""
    typed = [script, *arguments]
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=world.script_main, args=(typed, Path.cwd(), {}))
    process.start()
    process.join()
    assert process.exitcode == 0, script


model.PRESETS["tiny"] = dataclasses.replace(model.PRESETS["tiny"], num_hidden_layers=2)
common.run_script = run_script
generate_all, axioms.generate = axioms.generate, generate
tiny.pretrain = functools.partial(tiny.pretrain, steps=60)
run.EXPECTED.clear()
sys.exit(run.main([]))
