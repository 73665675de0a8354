"""Small files, written whole or not at all; progress for people; UserError. No torch: reports read runs without it."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

from tqdm import tqdm


class UserError(ValueError):
    """What a user can mend: one line that names key, value, expectation and, where there is one, file or row.

    Scripts print it without a traceback (parallel.run). Everything else that is raised is a fault of ours and keeps its traceback.
    """



# ---------------------------------------------------------------- JSON


def read_json(path):
    """What a JSON file holds. ValueError naming the file when it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as error:  # the latter: no JSON, or no text
        raise UserError(f"{path}: missing or torn ({error})") from error


def finite(value):
    """`value` with None for NaN and infinity: JSON has neither, and a measurement of hours is not lost to one of its numbers."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path, value):
    """Write `finite(value)` atomically, and through to the disk: a reader, also after a power cut, sees the old file or the new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


# ---------------------------------------------------------------- folders


def publish(folder, target):
    """Rename a finished folder to its name, replacing an older one; at any moment a whole copy of old or new is on the disk."""
    old = target.with_name(f".old_{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(path):
    """fsync a folder: the names in it, which the fsync of a file does not cover."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ---------------------------------------------------------------- progress


def progress_bar(items=None, **options):
    """tqdm, with rate and ETA: two refreshes a second on a terminal; where each stays, in a log file, one in ten seconds."""
    return tqdm(items, mininterval=0.5 if sys.stderr.isatty() else 10, **options)


def read_config(directory):
    """config.json of a model folder, as a dict. ValueError when there is none, or a torn one."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json there; expected a Hugging Face model folder")
    return read_json(path)
