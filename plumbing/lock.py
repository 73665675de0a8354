"""One writer a folder.

An flock on `<folder>/.lock`, which the kernel drops when the process ends, however it ends.
"""

import fcntl
import os
import socket
import time
from pathlib import Path

from plumbing.files import UserError, read_json, sweep

_held = {}  # {folder: open file}: an flock belongs to the open file, so it must stay open


def lock(folder, manifest_key, say=print):
    """Make this process the only one that writes to the folder, until it ends.

    manifest_key: a key of the manifest.json that the caller writes there; None of a caller that writes none.
    Removes what a killed one left half-written. Creates the folder. UserError when the folder holds a model,
    or what another command wrote; or, naming the other's machine, process and start, when one has it already.
    A file system without locks is said: nothing can stop a second process there.
    """
    _require_own(Path(folder), manifest_key)
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


def _require_own(folder, manifest_key):
    config, manifest = _keys(folder / "config.json"), _keys(folder / "manifest.json")
    if "model_type" in config or (folder / "adapter_config.json").exists():
        holds = "a model"
    elif manifest and manifest_key not in manifest:
        holds = "the manifest.json of another command"
    else:
        return
    raise UserError(f"{folder}: holds {holds}, which would be written over; expected another folder")


def _keys(path):
    """The keys of a JSON file; none of one that is not there, or cut short, which its reader names."""
    is_whole = path.is_file() and path.read_bytes().rstrip().endswith(b"}")
    return read_json(path).keys() if is_whole else ()


def unlock():
    """Let go of every folder that this process has locked."""
    while _held:
        _held.popitem()[1].close()
