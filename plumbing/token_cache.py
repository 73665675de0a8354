"""Tokenised columns on disk, under a key that hashes all they depend on.

Written whole or not at all, checked at every read.
"""

import ast
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from plumbing.files import HASHES, UserError, read_json, sha256_of, write_hashes


def write(folder: Path, columns: dict[str, np.ndarray], meta: dict) -> None:
    """Write beside `folder`, then rename.

    A run that shares the cache may have been faster: then its equal copy stays. OSError naming the folder and
    the space needed when the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    with _scratch(folder.parent, "tokenising") as scratch:
        new = Path(scratch) / "columns"
        new.mkdir()
        try:
            for name, column in columns.items():
                np.save(new / f"{name}.npy", column, allow_pickle=False)
            (new / "meta.json").write_text(json.dumps(meta, indent=1))
            write_hashes(new)
        except OSError as error:  # numpy's own names no file
            needed = sum(column.nbytes for column in columns.values())
            free = shutil.disk_usage(folder.parent).free
            message = f"not written, {needed:,} bytes needed, {free:,} free: {error}"
            raise OSError(error.errno or errno.ENOSPC, message, str(folder)) from error
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def is_intact(folder: Path, log) -> bool:
    """Whether `folder` holds, byte for byte, what was written.

    A damaged folder is removed, and that is said.
    """
    if not folder.is_dir():
        return False
    try:
        listed = read_json(folder / HASHES)
        damaged = [name for name, sha256 in listed.items() if not _has_sha256(folder / name, sha256)]
    except UserError:
        damaged = [HASHES]
    if damaged:
        log(f"data: {folder}: {', '.join(damaged)} missing or damaged; tokenising again")
        # Renamed first: another run that shares the cache finds all of it or nothing, or has removed it
        # already.
        with _scratch(folder.parent, "damaged") as scratch, suppress(FileNotFoundError):
            folder.rename(Path(scratch) / "columns")
    return not damaged


def _has_sha256(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


# ---------------------------------------------------------------- leftovers


def _scratch(parent: Path, what: str) -> tempfile.TemporaryDirectory:
    """A folder that is gone afterwards, unless this process is killed: its name says whose it is."""
    return tempfile.TemporaryDirectory(dir=parent, prefix=f".{what}-{socket.gethostname()}-{os.getpid()}-")


def remove_leftovers(parent: Path) -> None:
    """Remove the scratch folders of processes of this host that have ended.

    A kill leaves gigabytes at full size.
    """
    mine = re.compile(rf"\.(?:tokenising|damaged)-{re.escape(socket.gethostname())}-(\d+)-\w+")
    for folder in parent.iterdir():
        match = mine.fullmatch(folder.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


# ---------------------------------------------------------------- code


def hash_code(parts) -> str:
    """sha256 of the code of functions, classes and modules.

    Comments, docstrings and line breaks do not count.
    """
    digest = hashlib.sha256()
    for part in parts:
        tree = ast.parse(inspect.getsource(part))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
                and ast.get_docstring(node) is not None
            ):
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()
