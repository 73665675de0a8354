"""Fixtures of the tests that train."""

import pytest
from world import make_world

from plumbing import parallel


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with base/, sft.jsonl and pref.jsonl, for everyone to read and no one to write to."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ranks():
    """A process group of one."""
    yield parallel.init()
    parallel.shutdown()
