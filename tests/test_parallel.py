"""Sharding, sums and clipping: the checks of parallel_ranks.py in this process, a group of one, and on 2 and 3 processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parallel_ranks import CHECKS

from plumbing import parallel
from plumbing.weights import resolve

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_one_process(check, ranks):
    assert ranks.size == 1 and ranks.main
    check(ranks)


def test_what_a_user_can_mend_is_one_line(capsys):
    """Our UserErrors are messages; everything else may be a mistake of ours and keeps its traceback."""
    assert parallel.run(lambda argv: resolve("nowhere"), []) == 1
    ours = capsys.readouterr().err
    assert ours.startswith("error: ") and "nowhere" in ours and ours.count("\n") == 1
    with pytest.raises(json.JSONDecodeError):
        parallel.run(lambda argv: json.loads("{"), [])


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes(num_ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "tests/parallel_ranks.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    assert result.stdout.count(f"holds on {num_ranks} rank(s)") == len(CHECKS)
