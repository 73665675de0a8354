"""Rows of local files, saved folders and the hub."""

import glob
import re
from pathlib import Path

import datasets

from plumbing import hub
from plumbing.files import UserError

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would call the hub to count every load, of local files too


READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


READ_AS = {
    "json": {"on_mixed_types": None},  # a key that some rows or messages lack is null there
    "csv": {"keep_default_na": False, "na_values": [""]},  # an answer may be "None" or "NA": only an empty cell is null
    "parquet": {},
}


def open_source(name: str) -> datasets.Dataset:
    """Rows of "path" (parquet; jsonl, json, csv, also .gz; or a folder from Dataset.save_to_disk) or of "org/name" on the hub.

    "org/name@revision" pins a commit, tag or branch; the commit that was read goes into hub.COMMITS. A "[split]" at the end picks the split
    of a hub dataset or saved folder; without it "train".
    """
    path, split = re.fullmatch(r"(.*?)(?:\[(\w+)\])?", name).groups()
    suffix = Path(path.removesuffix(".gz")).suffix
    if Path(path).is_dir():
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            return _split(name, saved, split or "train")
        if split:
            raise UserError(f"data {name!r}: the folder has no splits; expected no [split]")
        return saved
    if Path(path).is_file():
        if suffix not in READERS or split or path.endswith(".parquet.gz"):
            raise UserError(f"data {name!r}: expected a file of {list(READERS)} (or, but for parquet, .gz of one), and no [split]")
        is_quiet = not datasets.are_progress_bars_disabled() and Path(path).stat().st_size < 1 << 30  # under 5 s: no bar
        if is_quiet:
            datasets.disable_progress_bars()
        kind = READERS[suffix]
        try:
            rows = datasets.load_dataset(kind, data_files=glob.escape(path), split="train", **READ_AS[kind])
            rows.data.validate(full=True)  # json lets bytes pass that are not UTF-8
            return rows
        except (StopIteration, ValueError, datasets.exceptions.DatasetGenerationError) as error:  # an empty file is a StopIteration
            raise UserError(f"data {name!r}: no rows, or not a {suffix} file: {error.__cause__ or error!r}") from error
        finally:
            if is_quiet:
                datasets.enable_progress_bars()
    if suffix in READERS or hub.parse(path) is None:
        raise UserError(f"data {name!r}: no such file or folder")
    return _open_hub(path, split or "train")


def _open_hub(name: str, split: str) -> datasets.Dataset:
    wanted = hub.dataset_commit(name)
    try:
        builder = datasets.load_dataset_builder(hub.parse(name)[0], revision=wanted)
        for key, value in [option for options in READ_AS.values() for option in options.items()]:
            if hasattr(builder.config, key):  # as of a local file
                setattr(builder.config, key, value)
        builder.download_and_prepare()
    except hub.errors() as error:
        raise UserError(f"data {name!r}: no such file or folder, and no such data from the hub: {error}") from error
    if wanted not in (None, builder.hash):  # offline, the library takes the commit it read last
        raise UserError(f"data {name!r}: the hub cannot be reached, the latest copy here is of commit {builder.hash}; expected {wanted}")
    rows = _split(name, builder.as_dataset(), split)
    hub.COMMITS[f"datasets/{name}"] = builder.hash
    return rows


def _split(name: str, splits: dict[str, datasets.Dataset], split: str) -> datasets.Dataset:
    if split not in splits:
        raise UserError(f"data {name!r}: no split {split!r}; expected [split] to be one of {', '.join(splits)}")
    return splits[split]
