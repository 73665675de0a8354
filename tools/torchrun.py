"""torchrun that takes --nproc 8 as well, and whose restarts begin with a new store.

The real one refuses --nproc: two of its options begin so. In the old store, restarts (--max-restarts) on
several machines find the addresses of processes that are gone, and lose the attempt.

`make` writes this file over .venv/bin/torchrun. With another torchrun, write --nproc-per-node.
"""

import os
import runpy
import sys


def expand(argv):
    """The arguments of torchrun with --nproc spelt out; those behind the script's name are the script's."""
    expanded = []
    for i, arg in enumerate(argv):
        if arg.endswith(".py"):
            return [*expanded, *argv[i:]]
        flag, equals, value = arg.partition("=")
        expanded.append(f"--nproc-per-node{equals}{value}" if flag == "--nproc" else arg)
    return expanded


if __name__ == "__main__":
    sys.argv[1:] = expand(sys.argv[1:])
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    runpy.run_module("torch.distributed.run", run_name="__main__")
