"""Small files written whole or not at all, text tables, progress bars, UserError.

No torch: reports read runs without it.
"""

import hashlib
import json
import math
import os
import reprlib
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

HASHES = "hashes.json"  # beside the files whose sha256 it holds
HASHERS = 4  # files hashed at once


class UserError(ValueError):
    """A mistake that a user can mend.

    One line that names key, value, expectation and, where there is one, file or row. Commands print it
    without a traceback (parallel.run). Every other exception is a bug of ours and keeps its traceback.
    """


# ---------------------------------------------------------------- JSON


def read_json(path):
    """The object in a JSON file, as a dict.

    UserError naming the file when it is missing, torn or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing or torn (no such file)")
    return parse_json(path.read_bytes(), path)


def parse_json(content, source):
    """The object in the bytes of a JSON file, as a dict. UserError naming the source for anything else."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or thousands of open brackets
        raise UserError(f"{source}: missing or torn ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{source}: {reprlib.repr(value)}; expected a JSON object")
    return value


def read_jsonl(path):
    """The values of a file that has one JSON value a line."""
    return list(map(json.loads, Path(path).read_text().splitlines()))


def read_config(directory):
    """config.json of a model folder, as a dict. UserError when there is none, or a torn one."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json there; expected a Hugging Face model folder")
    return read_json(path)


def finite(value):
    """`value` with None for NaN and infinity, which JSON cannot express.

    One bad number must not cost hours of measurements.
    """
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path, value):
    """Write `finite(value)` atomically and durably.

    A reader sees the old file or the new one, also after a power cut.
    """
    write_whole(path, _json_bytes(value))


def _json_bytes(value):
    return (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode()


def write_whole(path, content):
    """Write bytes as write_json does its value."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with named(path), open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


# ---------------------------------------------------------------- hashes


def sha256_of(path, advance=None):
    """sha256 (hex) of a file's content. advance(bytes) is called after each piece, for a progress bar."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if advance:
                advance(len(chunk))
    return digest.hexdigest()


def write_hashes(folder, names=None, known=None):
    """Write folder/hashes.json: the sha256 of these files of it, of all by default.

    They stand beside those that it has already. known: {name: sha256} of files that need not be read.
    """
    path = folder / HASHES
    if names is None:
        names = [file.name for file in folder.iterdir() if file.is_file() and file.name != HASHES]
    found = read_json(path) if path.is_file() else {}
    for name in sorted(names):
        found[name] = (known or {}).get(name) or sha256_of(folder / name)
    write_json(path, found)


def verify_hashes(folder, wanted=lambda name: True, sha256=sha256_of):
    """UserError when a file that folder/hashes.json lists is missing or is not what was written.

    No hashes.json, no check: the folders of others are read as they are. wanted(name): which files.
    sha256(path): how a file is hashed, for a caller that remembers the results.
    """
    if not (folder / HASHES).is_file():
        return
    listed = read_json(folder / HASHES)
    listed = {name: digest for name, digest in listed.items() if wanted(name)}
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: missing {', '.join(missing)}, which {HASHES} lists; expected it whole")
    with ThreadPoolExecutor(HASHERS) as pool:  # hashlib releases the GIL: 1.6 GB/s a core
        digests = list(pool.map(lambda name: sha256(folder / name), listed))
    damaged = [name for name, digest in zip(listed, digests, strict=True) if digest != listed[name]]
    if damaged:
        problem = f"{folder}: {', '.join(damaged)}: damaged, the sha256 is not the one in {HASHES}"
        raise UserError(f"{problem}; restore it, or, if you changed it on purpose, delete {HASHES}")


def read_verified_json(path):
    """read_json of a file that hashes.json beside it may list."""
    verify_hashes(path.parent, lambda name: name == path.name)
    return read_json(path)


# ---------------------------------------------------------------- results
# A result is some files and, beside them, a report: the JSON file that says what they are of. Where a report
# is, its result is whole, and hashes.json lists the files and the report.


def write_result(report, value, names):
    """Write the report of a result whose files `names`, beside it, are written.

    They are on the disk, and hashed together with the report to come, before the report appears: a kill or a
    power cut leaves no report that nothing verifies.
    """
    content = _json_bytes(value)
    for name in names:
        sync(report.parent / name)
    write_hashes(report.parent, [*names, report.name], {report.name: hashlib.sha256(content).hexdigest()})
    sync(report.parent)
    write_whole(report, content)


def retract(report, names):
    """Delete the report of a result, and what hashes.json says of it and of the files `names`.

    Called before the first of these files is written again: no report stands beside files of another.
    """
    report.unlink(missing_ok=True)
    hashes = report.parent / HASHES
    if hashes.is_file():
        listed = read_json(hashes)
        write_json(hashes, {name: listed[name] for name in listed if name not in (report.name, *names)})


# ---------------------------------------------------------------- folders


def publish(folder, target):
    """Rename a finished folder to its name, replacing an older one, once all of it is on the disk.

    At any moment, also of a power cut, a whole copy of old or new is there.
    """
    for path in [*folder.iterdir(), folder]:  # a file that was synced before costs nothing
        sync(path)
    old = target.with_name(f".old_{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def temporary_beside(path):
    """A name beside `path` for what is to become it.

    It has machine and process in it, so that no two writers share one.
    """
    return path.with_name(f".tmp_{socket.gethostname()}_{os.getpid()}_{path.name}")


def remove_leftovers(folder):
    """Delete what temporary_beside named for processes of this machine that are dead.

    For a folder that several processes share.
    """
    for path in folder.glob(f".tmp_{socket.gethostname()}_*_*"):
        process = path.name.removeprefix(f".tmp_{socket.gethostname()}_").partition("_")[0]
        if process.isdigit() and not _is_alive(int(process)):
            _remove(path)


def _is_alive(process):
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def sweep(folder):
    """Finish or delete what a killed process left: *.tmp, .tmp_*, .old_*.

    For a folder that this process alone writes to.
    """
    for path in [*folder.glob("*.tmp"), *folder.glob(".tmp_*")]:
        _remove(path)
    for old in folder.glob(".old_*"):
        target = folder / old.name.removeprefix(".old_")
        if target.exists():
            _remove(old)
        else:
            old.rename(target)  # killed between the two renames of publish


def remove_tree(folder):
    """Delete a folder. OSErrors name a path that can be found, where shutil's is relative to the folder."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        error.filename = str(folder)
        raise


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path):
    """fsync a file or a folder.

    The fsync of a file does not cover its name, which is an entry of its folder.
    """
    handle = os.open(path, os.O_RDONLY)
    with named(path):
        os.fsync(handle)
    os.close(handle)


@contextmanager
def named(path):
    """OSErrors of the block name the path: a write or an fsync that fails does not say of which file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# ---------------------------------------------------------------- text for people


def table(head, rows, left=(0,)):
    """Rows of strings as one text, in columns two spaces apart.

    Columns whose numbers are in `left` (-1: the last) hold words and are aligned to the left, the others to
    the right.
    """
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [column % len(head) for column in left]
    text = []
    for line in lines:
        cells = []
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            cells.append(cell.ljust(width) if column in left else cell.rjust(width))
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def progress_bar(items=None, **options):
    """tqdm with rate and ETA.

    Refreshed twice a second on a terminal, every ten seconds in a log file, which keeps each refresh.
    """
    return tqdm(items, mininterval=0.5 if sys.stderr.isatty() else 10, **options)
