"""Sharding, sums and clipping: the checks of parallel_ranks.py in this process, a group of one, and on 2 and 3 processes."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parallel_ranks import CHECKS

from plumbing import parallel
from plumbing.weights import resolve

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_one_process(check, ranks):
    assert ranks.world_size == 1 and ranks.main
    check(ranks)


def test_who_raised_decides_what_is_shown(capsys):
    """Our ValueErrors are messages; a library's come with the traceback, since they may be a mistake of ours."""
    assert parallel.run(lambda argv: resolve("nowhere"), []) == 1
    ours = capsys.readouterr().err
    assert ours.startswith("error: ") and "nowhere" in ours
    assert parallel.run(lambda argv: np.array([1.0, 2.0]).reshape(3), []) == 1
    assert parallel.run(lambda argv: json.loads("{"), []) == 1
    theirs = capsys.readouterr().err
    assert theirs.count("Traceback") == 2 and theirs.splitlines()[-1].startswith("error: Expecting property name"), theirs


def test_a_script_by_way_of_a_symbolic_link_is_ours(tmp_path, monkeypatch, capsys):
    """Python resolves the folder that it imports from, not the name of the script."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/train.py").write_text("def main(argv):\n    raise ValueError('lr=-1: expected > 0')\n")
    (tmp_path / "link").symlink_to(tmp_path / "checkout")
    monkeypatch.setattr(parallel, "ROOT", tmp_path / "checkout")
    assert parallel.run(runpy.run_path(str(tmp_path / "link/train.py"))["main"], []) == 1
    assert capsys.readouterr().err == "error: lr=-1: expected > 0\n"


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes(num_ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "tests/parallel_ranks.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    assert result.stdout.count(f"holds on {num_ranks} rank(s)") == len(CHECKS)
