"""Tokenised columns on disk, under a key that is a hash of all they depend on: written whole or not at all, checked whenever they are read."""

import errno
import hashlib
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np


def write(folder: Path, columns: dict[str, np.ndarray], meta: dict) -> None:
    """All or nothing: written beside `folder`, then renamed, unless another run that shares the cache was faster: it wrote the same.

    OSError naming the folder and the space needed when the disk is full."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tokenising-") as scratch:
        new = Path(scratch) / "columns"
        new.mkdir()
        try:
            for name, column in columns.items():
                np.save(new / f"{name}.npy", column, allow_pickle=False)
            meta["sha256"] = {path.name: _file_sha256(path) for path in sorted(new.glob("*.npy"))}
            (new / "meta.json").write_text(json.dumps(meta, indent=1))
        except OSError as error:  # numpy's own names no file
            needed, free = sum(column.nbytes for column in columns.values()), shutil.disk_usage(folder.parent).free
            message = f"not written, {needed:,} bytes needed, {free:,} free: {error}"
            raise OSError(error.errno or errno.ENOSPC, message, str(folder)) from error
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def is_intact(folder: Path, log) -> bool:
    """Whether `folder` holds, byte for byte, what was written; what does not is removed."""
    if not folder.is_dir():
        return False
    try:
        recorded = json.loads((folder / "meta.json").read_text())["sha256"]
        damaged = [name for name, sha256 in recorded.items() if not (folder / name).is_file() or _file_sha256(folder / name) != sha256]
    except (FileNotFoundError, ValueError):
        damaged = ["meta.json"]
    if damaged:
        log(f"data: {folder}: {', '.join(damaged)} missing or damaged; tokenising again")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".damaged-") as scratch, suppress(FileNotFoundError):
            folder.rename(Path(scratch) / "columns")  # at once: another run that shares the cache finds all of it, or has removed it itself
    return not damaged


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
