"""Host memory of loading weights: each rank holds its own rows and little besides, never a model."""

import json
import random
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from world import spawn, write_tokenizer

from model import Llama, LlamaConfig
from plumbing import parallel
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load_weights, save_pretrained, sharded_parameters

STATUS = Path("/proc/self/status")


def resident(key):
    """A line of /proc/self/status in bytes: RssAnon, the anonymous pages, or VmHWM, the peak of all resident
    ones.
    """
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def load(folder):
    """In each rank: print its share of the weights and the peaks while they are read, in bytes, less what the
    process held before.

    anonymous: read every millisecond. resident: the kernel's mark, which counts mapped pages of the files
    too; those belong to the page cache, one copy for all ranks, and are dropped when memory is short.
    """
    parallel.init()
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_hf(folder))
    parallel.shard(model, "fp32")
    parallel.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark starts again
    before, before_all = resident("RssAnon"), resident("VmHWM")
    anonymous, done = [before], threading.Event()

    def watch():
        while not done.wait(0.001):
            anonymous.append(resident("RssAnon"))

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    parallel.materialize(model, "cpu")
    load_weights(model, folder)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    anonymous.append(resident("RssAnon"))
    share = sum(parallel.local_rows(param)[1].nbytes for param in sharded_parameters(model).values())
    peaks = {"anonymous": max(anonymous) - before, "resident": resident("VmHWM") - before_all}
    print(json.dumps({"share": share, **peaks, "seconds": seconds}))
    parallel.shutdown()
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """58 M parameters in bfloat16, 117 MB: the 234 MB of float32 are large beside what an allocator keeps."""
    path = tmp_path_factory.mktemp("load")
    (path / "tokenizer").mkdir()
    write_tokenizer(path / "tokenizer", random.Random(0))
    config = LlamaConfig(vocab_size=1024, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5, num_attention_heads=16,
                         num_key_value_heads=4, head_dim=64)  # fmt: skip
    save_pretrained(
        Llama(config), Tokenizer.from_dir(path / "tokenizer"), path / "model", dtype=torch.bfloat16
    )
    return path / "model"


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_holds_its_share(folder, tmp_path, num_ranks):
    outcome = spawn(partial(load, folder), tmp_path / "logs", num_ranks).ok()
    for peak in map(json.loads, outcome.out):
        assert 0.9 * peak["share"] < peak["anonymous"] < 1.3 * peak["share"], (
            peak
        )  # below one by what the allocator had free
        assert peak["resident"] < 1.8 * peak["share"], peak  # a half more: the bfloat16 rows of the file
