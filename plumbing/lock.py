"""One writer a folder.

An flock on `<folder>/.lock`, which the kernel drops when the process ends, however it ends.
"""

import fcntl
import os
import socket
import time
from pathlib import Path

from plumbing.files import UserError, sweep

_held = {}  # {folder: open file}: an flock belongs to the open file, so it must stay open


def lock(folder, say=print):
    """Make this process the only one that writes to the folder, until it ends.

    Removes what a killed one left half-written. Creates the folder. UserError, naming the other's machine,
    process and start, when one has it already. A file system without locks is said: nothing can stop a second
    process there.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    if folder in _held and path.exists() and os.path.samestat(path.stat(), os.fstat(_held[folder].fileno())):
        return
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        expected = "expected one writer: wait for it, stop it, or take another folder"
        raise UserError(f"{folder}: in use by {owner}; {expected}") from None
    except OSError as error:
        say(f"{folder}: no locks on this file system ({error.strerror}); do not start a second process in it")
        file.close()
        return
    file.truncate(0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n")
    file.flush()
    _held[folder] = file
    sweep(folder)


def unlock():
    """Let go of every folder that this process has locked."""
    while _held:
        _held.popitem()[1].close()
