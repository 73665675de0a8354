"""Fixtures of the tests that train."""

import gc
import os

import forks
import pytest

# Tests compute on the CPU, on every machine: their bounds are a CPU's, and they start more ranks than there may
# be GPUs. test_gpu.py alone starts a process that sees the GPUs. Workers of xdist read this file once more.
os.environ.setdefault("VISIBLE_TO_GPU_CHECKS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

LONGEST = (
    "test_commands",
    "test_runs",
    "test_parallel",
    "test_steer",
    "test_triton",
    "test_checkpoint",
    "test_calibration",
    "test_fp8",
    "test_hub",
    "test_samples",
    "test_tsne",
    "test_torture",
    "test_train_dpo",
)


def pytest_configure():
    """Before there are workers: all of them fork their processes from one server."""
    forks.start()


def pytest_collection_modifyitems(items):
    """The longest files first: of two workers, one that begins a long file last keeps the other waiting."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    """What torch and the tests have made by now stays: the garbage collector need not look at it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with base/, sft.jsonl and pref.jsonl, for everyone to read and no one to write to."""
    from world import make_world  # not above: the process that hands out the tests needs no torch

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ranks():
    """A process group of one."""
    from plumbing import parallel

    yield parallel.init()
    parallel.shutdown()
