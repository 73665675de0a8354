"""Sharding, sums and clipping: the checks of parallel_ranks.py in this process, a group of one, and on 2 and 3 processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from parallel_ranks import CHECKS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_one_process(check, ranks):
    assert ranks.world_size == 1 and ranks.main
    check(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes(num_ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "tests/parallel_ranks.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    assert result.stdout.count(f"holds on {num_ranks} rank(s)") == len(CHECKS)
