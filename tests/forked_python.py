#!/usr/bin/env python3
"""The Python that torchrun starts where PYTHON_EXEC names this file: `-u SCRIPT ARGUMENTS` in a process that has
imported torch already. It ends as that process does, and passes SIGTERM on to it.
"""

import os
import signal
import sys
from functools import partial

import forks

LIMIT = 300  # seconds


def become(arguments, starter):
    """SCRIPT ARGUMENTS, with the output of the process `starter`."""
    import world  # which imports torch

    for stream in (1, 2):
        os.dup2(os.open(f"/proc/{starter}/fd/{stream}", os.O_WRONLY | os.O_APPEND), stream)
    world.script_main(arguments, os.getcwd(), {})


if __name__ == "__main__":
    process = forks.Process(partial(become, sys.argv[2:], os.getpid()))
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(process.pid, number))
    code = process.wait(LIMIT)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
