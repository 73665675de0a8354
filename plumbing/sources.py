"""Rows of local files, folders, saved data sets and the hub.

Local text files are read in place, row by row, when a row is asked for: no other row and no other column can
spoil it, errors name the file's own row, and there is no copy that could be out of date. Parquet is decoded
into memory. The hub's data goes through the `datasets` library, which keeps it by commit. It is imported
where it is needed: that takes a second.
"""

import csv
import glob
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

from plumbing import hub
from plumbing.files import UserError

READERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # how the files of a folder may begin


def open_source(name: str, scratch=None, log=print) -> "Rows":
    """Rows of "path", of a folder or a pattern of such files, or of the hub.

    path: parquet; jsonl, ndjson, json, csv, also .gz. "org/name@revision" pins a commit, tag or branch.
    "[split]", "[config/split]" or "[config/]" at the end picks of a hub data set; "[split]" also of a folder,
    saved by the data library or with files named train*, test*. Without it: "train". scratch: folder for what
    is unpacked, for as long as this process runs. UserError names the source, and where known the row.
    """
    return find_source(name).open(scratch, log)


def find_source(name: str) -> "LocalFiles | SavedFolder | HubData":
    """The source that a name means. Nothing is read yet, but it exists: UserError if not."""
    path, part = re.fullmatch(r"(.*?)(?:\[([\w./-]+)\])?", name, re.S).groups()
    # A file may be called "a[1]" itself.
    if part and Path(name).exists():
        path, part = name, None
    if Path(path).is_dir():
        is_saved = any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json"))
        if is_saved:
            return SavedFolder(name, Path(path), part)
        return LocalFiles(name, _files_of_folder(name, Path(path), part))
    if Path(path).is_file():
        if _kind(Path(path)) is None or part:
            needs = f"expected a file of {list(READERS)} (or, but for parquet, .gz of one), and no [split]"
            raise UserError(f"data {name!r}: {needs}")
        return LocalFiles(name, [Path(path)])
    # Only what is no file by that name is a pattern.
    if "*" in path or "?" in path:
        files = [Path(file) for file in sorted(glob.glob(path, recursive=True)) if Path(file).is_file()]
        return LocalFiles(name, _of_one_kind(name, files))
    if Path(path).suffix in READERS or hub.parse(path) is None:
        raise UserError(f"data {name!r}: no such file or folder")
    config, _, split = (part or "").rpartition("/")
    return HubData(name, path, config or None, split or "train")


def _kind(path: Path) -> str | None:
    """The reader of a file, by its name."""
    kind = READERS.get(Path(path.name.removesuffix(".gz")).suffix)
    return None if kind == "parquet" and path.name.endswith(".gz") else kind


def _of_one_kind(name: str, files: list[Path]) -> list[Path]:
    kinds = {_kind(file) for file in files}
    if not files or len(kinds) > 1 or None in kinds:
        found = ", ".join(file.name for file in files[:5]) or "none"
        raise UserError(
            f"data {name!r}: files {found}; expected one or more, all of one kind of {list(READERS)}"
        )
    return files


def _files_of_folder(name: str, folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder; of one split where their names begin with splits, as on the hub."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and _kind(file))
    begins = {file: re.match(r"[a-zA-Z]*", file.name).group().lower() for file in files}
    # A folder with train and test files must not train on both because nobody wrote [train].
    has_splits = bool({*begins.values()} & {*SPLITS})
    if split or has_splits:
        of_split = [file for file in files if begins[file] == (split or "train")]
        if not of_split:
            found = ", ".join(sorted({*begins.values()})) or "none"
            raise UserError(f"data {name!r}: files begin with {found}; expected [split] to be one of these")
        files = of_split
    return _of_one_kind(name, files)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__


# ---------------------------------------------------------------- sources


class LocalFiles:
    """One or more files of one kind."""

    def __init__(self, name: str, files: list[Path]):
        self.name, self.files = name, files
        self.seen = self._stats()

    def _stats(self) -> list[tuple]:
        # To notice a change within one run; between runs the bytes are compared.
        stats = [file.stat() for file in self.files]
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]

    def fingerprint(self) -> str:
        """sha256 of the files' names and bytes: equal means equal rows. 0.5 to 1.6 GB/s."""
        return _hash_files(self.name, self.files)

    def open(self, scratch=None, log=print) -> "Rows":
        """Its rows."""
        parts = {}
        for file in self.files:
            try:
                parts[file.name] = _open_file(file, scratch, log)
            except _BadRow as error:
                where = f"{file.name}, " if len(self.files) > 1 else ""
                raise UserError(f"data {self.name!r}, {where}row {error.number}: {error}") from error
            except Exception as error:  # of the disk, gzip, zlib, pyarrow or datasets
                raise UserError(
                    f"data {self.name!r}: not a {file.suffix} file: {_one_line(error)}"
                ) from error
        return Rows(self.name, parts)

    def check_unchanged(self) -> None:
        """UserError when a file is no longer the one that was found.

        Its fingerprint would stand for other rows.
        """
        if self._stats() != self.seen:
            raise UserError(
                f"data {self.name!r}: changed while it was read; expected files that stay as they are"
            )


class SavedFolder:
    """A folder from Dataset.save_to_disk or DatasetDict.save_to_disk."""

    def __init__(self, name: str, folder: Path, split: str | None):
        self.name, self.folder, self.split = name, folder, split

    def fingerprint(self) -> str:
        """sha256 of the folder's names and bytes."""
        return _hash_files(self.name, sorted(file for file in self.folder.rglob("*") if file.is_file()))

    def open(self, scratch=None, log=print) -> "Rows":
        """Its rows."""
        import datasets

        try:
            saved = datasets.load_from_disk(str(self.folder))
        except Exception as error:  # the library has nothing narrower
            raise UserError(f"data {self.name!r}: not a saved data set: {_one_line(error)}") from error
        if isinstance(saved, datasets.DatasetDict):
            saved = _pick_split(self.name, saved, self.split or "train")
        elif self.split:
            raise UserError(f"data {self.name!r}: the folder has no splits; expected no [split]")
        return Rows(self.name, {self.folder.name: _Table(saved)})

    def check_unchanged(self) -> None:
        """As LocalFiles; the library holds the files open."""


class HubData:
    """A split of a data set on the hub, at one commit, read by the `datasets` library."""

    def __init__(self, name: str, path: str, config: str | None, split: str):
        self.name, self.path, self.split = name, path, split
        wanted = hub.dataset_commit(path)
        self.builder = _builder(name, path, config, wanted)
        if wanted not in (None, self.builder.hash):  # offline, the library takes the commit it read last
            found = f"the hub cannot be reached, the latest copy here is of commit {self.builder.hash}"
            raise UserError(f"data {name!r}: {found}; expected {wanted}")

    def fingerprint(self) -> str:
        """Commit, configuration and split; a commit's files never change."""
        self._record()
        return f"{self.builder.hash}/{self.builder.config.name}/{self.split}"

    def open(self, scratch=None, log=print) -> "Rows":
        """Its rows, downloaded unless they are here."""
        try:
            self.builder.download_and_prepare()
            splits = self.builder.as_dataset()
        except (
            Exception
        ) as error:  # of the network, the disk, the files' content: the library has nothing narrower
            raise UserError(f"data {self.name!r}: {_NOT_ON_THE_HUB}: {_one_line(error)}") from error
        rows = _pick_split(self.name, splits, self.split)
        self._record()
        return Rows(self.name, {self.path: _Table(rows)})

    def _record(self) -> None:
        hub.COMMITS[f"datasets/{self.path}"] = self.builder.hash

    def check_unchanged(self) -> None:
        """A commit never changes."""


_NOT_ON_THE_HUB = "no such file or folder, and no such data from the hub"
# How the library is to read files of the hub, where it has the option: as local ones are read.
_HUB_OPTIONS = {
    "on_mixed_types": None,  # json: a key that some rows or messages lack is null there
    "keep_default_na": False,  # csv: an answer may be "None" or "NA", and only an empty cell is null
    "na_values": [""],
}


def _builder(name: str, path: str, config: str | None, commit: str | None):
    """The library's builder of a hub data set."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would call the hub to count every load
    try:
        builder = datasets.load_dataset_builder(hub.repository(path), config, revision=commit)
    except Exception as error:  # of the network, the token, a script, a missing configuration
        needs = f'; expected "{path}[CONFIG/SPLIT]"' if "onfig" in str(error) else ""
        raise UserError(f"data {name!r}: {_NOT_ON_THE_HUB}: {_one_line(error)}{needs}") from error
    for key, value in _HUB_OPTIONS.items():
        if hasattr(builder.config, key):
            setattr(builder.config, key, value)
    return builder


def _pick_split(name: str, splits, split: str):
    if split not in splits:
        raise UserError(
            f"data {name!r}: no split {split!r}; expected [split] to be one of {', '.join(splits)}"
        )
    return splits[split]


def _hash_files(name: str, files: list[Path]) -> str:
    # Names too: READERS goes by them, and rows are told apart by them.
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"data {name!r}: {error}") from error
        digest.update(json.dumps([path.name, content]).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- rows


class _BadRow(ValueError):
    """What is wrong with row `number` of a file."""

    def __init__(self, number: int, reason):
        super().__init__(" ".join(str(reason).split()))
        self.number = number


class Rows:
    """Rows of one or more files, as dicts, numbered through."""

    def __init__(self, name: str, parts: dict):
        self.name, self.labels, self.parts = name, list(parts), list(parts.values())
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self):
        for first in range(0, len(self), 1024):
            yield from self.read(range(first, min(first + 1024, len(self))))

    def __getitem__(self, key):
        """Row `key`, or the values of column `key`, None where a row lacks it."""
        if isinstance(key, str):
            return [row.get(key) for row in self]
        return self.read([key])[0]

    @property
    def column_names(self) -> list[str]:
        """The columns that any row has."""
        names = {}
        for row in self:
            names |= dict.fromkeys(row)
        return list(names)

    def read(self, numbers) -> list[dict]:
        """Rows `numbers`, in that order. UserError names the file's row that cannot be read."""
        numbers = np.asarray(numbers, dtype=np.int64)
        # Batches per part, then back in order: rows of a table cost three times as much one by one.
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        rows = [None] * len(numbers)
        for owner in np.unique(owners):
            places = np.flatnonzero(owners == owner)
            try:
                read = self.parts[owner].read((numbers[places] - self.starts[owner]).tolist())
            except _BadRow as error:
                where = self.where(self.starts[owner] + error.number)
                raise UserError(f"data {self.name!r}, {where}: {error}") from error
            for place, row in zip(places, read):
                rows[place] = row
        return rows

    def where(self, number: int) -> str:
        """Row `number` in words, also by its own file and number there if there are several files."""
        owner = np.searchsorted(self.starts, number, side="right") - 1
        if len(self.parts) == 1:
            return f"row {number}"
        return f"row {number} ({self.labels[owner]}, row {number - self.starts[owner]})"


class _Table:
    """Rows of a `datasets.Dataset`."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, numbers: list[int]) -> list[dict]:
        try:
            return self._read(numbers)
        except Exception as error:  # of pyarrow, or of a column that decodes itself
            if len(numbers) == 1:
                raise _BadRow(numbers[0], error) from error
            return [self.read([number])[0] for number in numbers]  # finds the row that cannot be read

    def _read(self, numbers: list[int]) -> list[dict]:
        columns = self.dataset[numbers]
        return [dict(zip(columns, row)) for row in zip(*columns.values())]


class _TextFile:
    """Rows of a file of text, each between two places of it, decoded when it is read."""

    def __init__(self, file, spans: list[tuple[int, int]], decode):
        self.file, self.decode = file, decode
        self.spans = np.array(spans, dtype=np.int64).reshape(-1, 2)  # (n, 2) bytes: 16 bytes of memory a row

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, numbers: list[int]) -> list[dict]:
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> dict:
        start, end = self.spans[number].tolist()
        self.file.seek(start)
        try:
            row = self.decode(self.file.read(end - start).decode("utf-8"))
        except (ValueError, RecursionError, csv.Error) as error:
            raise _BadRow(number, error) from error
        if not isinstance(row, dict):
            raise _BadRow(number, f"{type(row).__name__}; expected an object {{column: value}}")
        return row


def _open_file(path: Path, scratch, log):
    """The reader of a file. _BadRow, or whatever gzip, pyarrow and the disk raise."""
    kind = _kind(path)
    if kind == "parquet":
        import datasets
        import pyarrow.parquet

        # As a file and not as a data set: "a=b" in a folder's name would become a column.
        table = pyarrow.parquet.ParquetFile(path).read()
        return _Table(datasets.Dataset(datasets.table.InMemoryTable(table)))
    file = _unpack(path, scratch, log) if path.name.endswith(".gz") else path.open("rb")
    start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark
    file.seek(start)
    if kind == "csv":
        return _open_csv(file, start)
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    file.seek(start)
    # By content: many files of rows, one a line, are called .json.
    if first == b"[":
        return _TextFile(file, _array_spans(file.read().decode("utf-8"), start), json.loads)
    return _TextFile(file, _line_spans(file, start), json.loads)


def _unpack(path: Path, scratch, log):
    """The content of a .gz as an open file that has no name.

    It is gone when the process ends, however it ends.
    """
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    file = tempfile.TemporaryFile(dir=scratch)
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (EOFError, zlib.error) as error:
        raise OSError(f"torn: {error}") from error
    size = file.tell()
    where = scratch or tempfile.gettempdir()
    log(f"data: {path}: unpacked into {where} while this process runs: {size:,} bytes")
    file.seek(0)
    return file


def _line_spans(file, start: int) -> list[tuple[int, int]]:
    """Where the lines are that are not blank."""
    spans = []
    for line in file:
        if not line.isspace():
            spans.append((start, start + len(line)))
        start += len(line)
    return spans


def _array_spans(text: str, start: int) -> list[tuple[int, int]]:
    """Where the elements of a JSON list are, in bytes. _BadRow for the one that is not JSON."""
    blank, decoder = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()
    spans, done = [], 0  # characters of the text whose bytes are in `start`
    at = blank.match(text, blank.match(text).end() + 1).end()  # behind the bracket
    is_open = text[at : at + 1] != "]"
    while is_open:
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _BadRow(len(spans), error) from error
        first = start + len(text[done:at].encode())
        start, done = first + len(text[at:end].encode()), end
        spans.append((first, start))
        at = blank.match(text, end).end()
        is_open = text[at : at + 1] == ","
        if is_open:
            at = blank.match(text, at + 1).end()
        elif text[at : at + 1] != "]":
            raise _BadRow(len(spans) - 1, f"followed by {text[at : at + 20]!r}; expected , or ]")
    if text[at + 1 :].strip():
        raise _BadRow(len(spans), f"the list ends, then {text[at + 1 : at + 21]!r} follows")
    return spans


def csv_rows(lines):
    """(cells, number of lines up to its end) of every row of a csv, the header first.

    A blank line is a row without cells. csv.Error for a quote that is never closed, ValueError for a row of
    more or fewer cells than the header.
    """
    csv.field_size_limit(sys.maxsize)  # 131,072 characters by default
    # Not strict, a quote that is never closed would swallow the rest of the file as one cell.
    rows, count = csv.reader(lines, strict=True), None
    for cells in rows:
        if count is None:
            count = len(cells)
        elif cells and len(cells) != count:
            raise ValueError(f"{len(cells)} cells; expected {count}")
        yield cells, rows.line_num


def check_columns(names):
    """ValueError for a csv's header that has two columns of one name, or other separators than commas."""
    if len(set(names)) < len(names):
        raise ValueError(f"columns {names}; expected names that differ")
    if len(names) == 1 and set(";\t|") & set(names[0]):
        raise ValueError(f"one column, {names[0]!r}; expected commas between the cells")


def _open_csv(file, start: int) -> _TextFile:
    """Every cell is text as it is written; an empty one is None."""
    spans, end = [], start

    def lines():
        nonlocal end
        for line in file:
            end += len(line)
            yield line.decode("utf-8")

    rows, header = csv_rows(lines()), None
    while True:
        first = end
        try:
            cells, _ = next(rows, (None, 0))
        except (ValueError, csv.Error) as error:
            raise _BadRow(len(spans), error) from error
        if cells is None:
            break
        if header is None:
            header = cells
            check_columns(header)
        elif cells:
            spans.append((first, end))

    def decode(text):
        cells = next(csv.reader(io.StringIO(text, newline=""), strict=True))
        return {column: cell or None for column, cell in zip(header, cells)}

    return _TextFile(file, spans, decode)
