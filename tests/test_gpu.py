"""The checks of gpu_checks.py, where there is a GPU."""

import os
import re
import shutil
import subprocess
import sys

import forks
import gpu_checks
import pytest
import torch
from gpu_checks import CHECKS, check_attention_fp32, check_fp8_linear, why_skipped

NAMES = [check.__name__.removeprefix("check_") for check in CHECKS]
VISIBLE = os.environ["VISIBLE_TO_GPU_CHECKS"]  # of conftest.py
HAS_GPU = shutil.which("nvidia-smi") is not None and VISIBLE not in ("", "-1")


@pytest.fixture(scope="module")
def lines(request):
    """What gpu_checks.py prints, line by line, of a process that sees the GPUs: the tests do not."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": VISIBLE}
    if VISIBLE == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    del environment[forks.ADDRESS]  # that server interprets Triton's kernels
    items = [item for item in request.session.items if item.get_closest_marker("gpu")]
    names = [item.callspec.params["name"] for item in items]
    command = [sys.executable, gpu_checks.__file__, *names]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipe) as process:
        yield process.stdout
        process.kill()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: no nvidia-smi, or CUDA_VISIBLE_DEVICES hides it")
@pytest.mark.parametrize("name", NAMES)
def test_gpu(name, lines):
    printed = []
    for line in lines:
        printed.append(line)
        if line.startswith(f"{name} "):
            break
    found = "".join(printed[-1:])
    if reason := re.match(rf"{name} +skipped: (.*)", found):
        pytest.skip(reason[1])
    assert re.match(rf"{name} +ok ", found), "".join(printed) or "gpu_checks.py has ended"


def test_a_check_is_skipped_where_its_gpu_cannot_run_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert why_skipped(check_fp8_linear) == "needs compute capability 8.9, this GPU has 8.6"
    assert why_skipped(check_attention_fp32) is None
