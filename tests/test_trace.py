"""bench/trace.py: the arithmetic by hand, and a step of two processes."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from world import ROOT, write_config

sys.path.insert(0, str(ROOT / "bench"))

from trace import shares, union  # noqa: E402


def test_shares_by_hand():
    """A gather of 4 s, 1 s of it before any matmul; one of 2 s beside a matmul; a pause; a reduction of 3 s, 1 s of it beside a kernel."""
    events = [("ncclDevKernel_AllGather", 0, 4), ("gemm", 1, 6), ("ncclDevKernel_AllGather", 4, 6), ("norm", 5, 7),
              ("ncclDevKernel_ReduceScatter", 10, 13), ("gemm", 9, 11)]  # fmt: skip
    assert shares(events) == {"compute": 6 + 2, "exchange": 6 + 3, "exposed": 1 + 2}
    assert shares([]) == {"compute": 0, "exchange": 0, "exposed": 0}
    assert union([(0, 5), (1, 2), (3, 8), (9, 10)]) == 9


@pytest.mark.slow
def test_a_step_of_two_processes(world, tmp_path):
    config = write_config(tmp_path, world)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "bench/trace.py", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = {name: float(line.split()[1]) for line in result.stdout.splitlines() for name in ("compute", "exchange", "exposed")
             if line.startswith(name)}  # fmt: skip
    assert 0 < lines["compute"] and 0 <= lines["exposed"] <= lines["exchange"] and lines["exchange"] > 0, result.stdout
    names = {event["name"] for event in json.loads(gzip.open(tmp_path / "sft/trace.json.gz").read())["traceEvents"]}
    assert any(name.startswith("gloo:") for name in names), names
