"""The checks of gpu_checks.py, where there is a GPU."""

import pytest
import torch
from gpu_checks import CHECKS, check_attention_fp32, check_fp8_linear, why_skipped


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_gpu(check):
    if reason := why_skipped(check):
        pytest.skip(reason)
    check()


def test_a_check_is_skipped_where_its_gpu_cannot_run_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert why_skipped(check_fp8_linear) == "needs compute capability 8.9, this GPU has 8.6"
    assert why_skipped(check_attention_fp32) is None
