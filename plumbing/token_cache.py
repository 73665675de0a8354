"""Tokenised columns on disk, under a key that hashes all they depend on.

Written whole or not at all, checked at every read.
"""

import ast
import errno
import hashlib
import inspect
import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from plumbing.files import (
    HASHES,
    UserError,
    read_json,
    remove_leftovers,
    sha256_of,
    temporary_beside,
    write_hashes,
)


def write(folder: Path, columns: dict[str, np.ndarray], meta: dict) -> None:
    """Write beside `folder`, then rename.

    A run that shares the cache may have been faster: then its equal copy stays. OSError naming the folder and
    the space needed when the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    new = temporary_beside(folder)
    try:
        _save(new, columns, meta)
        new.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _save(new: Path, columns: dict[str, np.ndarray], meta: dict) -> None:
    new.mkdir()
    try:
        for name, column in columns.items():
            np.save(new / f"{name}.npy", column, allow_pickle=False)
        (new / "meta.json").write_text(json.dumps(meta, indent=1))
        write_hashes(new)
    except OSError as error:  # numpy's own names no file
        needed = sum(column.nbytes for column in columns.values())
        free = shutil.disk_usage(new.parent).free
        message = f"not written, {needed:,} bytes needed, {free:,} free: {error}"
        raise OSError(error.errno or errno.ENOSPC, message, str(new)) from error


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
        aside = temporary_beside(folder)
        with suppress(FileNotFoundError):
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    return not damaged


def _has_sha256(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


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
