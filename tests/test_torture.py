"""The short form of `make torture`: some faults of every kind, none of which loses or changes anything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["random kills", "placed kills", "full disk", "two writers", "stopped rank", "flipped bits"])
def test_faults(fault):
    number = {"placed kills": 6, "full disk": 6, "two writers": 1, "stopped rank": 1}.get(fault, 3)
    command = [sys.executable, "-m", "tools.torture", fault, f"--number={number}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert fault in result.stdout
