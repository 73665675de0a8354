"""bench/trace.py: the arithmetic by hand, and a step of two processes."""

import gzip
import json
import os
import runpy
import shutil
import sys
from functools import partial

import pytest
import torch
from world import ROOT, spawn, write_config

import training
from bench import session
from plumbing import parallel
from plumbing.config import load
from plumbing.tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "bench"))

from trace import shares, union  # noqa: E402


def test_shares_by_hand():
    """A gather of 4 s, 1 s of it before any matmul; one of 2 s beside a matmul; a pause; a reduction of 3 s,
    1 s of it beside a kernel.
    """
    events = [("ncclDevKernel_AllGather", 0, 4), ("gemm", 1, 6), ("ncclDevKernel_AllGather", 4, 6), ("norm", 5, 7),
              ("ncclDevKernel_ReduceScatter", 10, 13), ("gemm", 9, 11)]  # fmt: skip
    assert shares(events) == {"compute": 6 + 2, "exchange": 6 + 3, "exposed": 1 + 2}
    assert shares([]) == {"compute": 0, "exchange": 0, "exposed": 0}
    assert union([(0, 5), (1, 2), (3, 8), (9, 10)]) == 9


def traced(argv):
    """bench/trace.py as the work of world.spawn. By its path: the standard library has a module of this
    name.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return parallel.run(runpy.run_path(str(ROOT / "bench/trace.py"))["main"], argv)


@pytest.mark.slow
def test_a_step_of_two_processes(world, tmp_path):
    printed = (
        spawn(partial(traced, [str(write_config(tmp_path, world))]), tmp_path / "logs", ranks=2).ok().out[0]
    )
    lines = {name: float(line.split()[1]) for line in printed.splitlines() for name in ("compute", "exchange", "exposed")
             if line.startswith(name)}  # fmt: skip
    assert 0 < lines["compute"] and 0 <= lines["exposed"] <= lines["exchange"] and lines["exchange"] > 0, (
        printed
    )
    names = {
        event["name"] for event in json.loads(gzip.open(tmp_path / "sft/trace.json.gz").read())["traceEvents"]
    }
    assert any(name.startswith("gloo:") for name in names), names


def test_a_session_needs_no_weights(world, tmp_path, monkeypatch):
    """bench/session.py draws its weights: with its stand-ins, a folder without any is enough for all that a
    run reads of it.
    """
    folder = tmp_path / "base"
    shutil.copytree(world / "base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, stand_in in session.WITHOUT_WEIGHTS.items():
        assert hasattr(training, name)
        monkeypatch.setattr(training, name, stand_in)
    path = write_config(tmp_path, world, model_path=str(folder))
    config, tokenizer = load("sft", [str(path)]), Tokenizer.from_dir(training.resolve(str(folder)))
    model_config = training.read_model_config(config, folder, tokenizer, torch.device("cpu"))
    assert model_config.vocab_size == tokenizer.vocab_size
    # A reference cache's key holds it: two shapes in one session must not share their log-probs.
    assert training.fingerprint(folder) == training.fingerprint(str(folder))
    assert training.fingerprint(folder) != training.fingerprint(tmp_path / "other/base")
