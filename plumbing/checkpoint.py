"""Exact resume: `checkpoints/step_000123/`, written in the background, read on any number of ranks. safetensors and JSON only.

A step folder holds one rank_00000.safetensors per rank (its rows of every trained parameter and of its optimizer state; the header says
which row comes first), checkpoint.json, and COMPLETED, written last. A kill at any byte leaves an unfinished folder, which the next start
removes, and the checkpoints before it as they were. Frozen weights are not stored: they come from model_path again.
"""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from kernels import is_split, join_master
from plumbing import parallel
from plumbing.files import UserError, publish, read_json, sync_folder, write_json
from plumbing.tensors import open_safetensors, write_safetensors
from plumbing.weights import ADAPTER_CONFIG, check_replaceable, copy_rows, sharded_parameters

OWN_NAME = re.compile(r"(\.tmp_|\.old_)?step_\d+")  # a copy that someone called step_000100_good is theirs


class Checkpointer:
    """The resumable checkpoints of one run. All ranks construct it, and call save, load and wait together, between init and shutdown.

    identity: the configuration values that decide the numbers; a checkpoint saved under others is refused. keep_last: how many finished
    checkpoints stay (a new one is finished before an old one goes). fresh=True deletes those of an earlier run.
    ValueError, before anything is deleted, where the run's end could not write final/ or adapter/: other files are there.
    """

    def __init__(self, run_dir, keep_last, identity, fresh=False):
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.keep_last, self.fresh = keep_last, fresh
        self.identity = json.loads(json.dumps(identity))  # as it will be read back: tuples become lists
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._pending = None  # the save that is being written
        self._finished_step = None
        check_replaceable(self.run_dir / "final", "config.json")
        check_replaceable(self.run_dir / "adapter", ADAPTER_CONFIG)
        if dist.get_rank() == 0:
            for path in [path for path in self.folder.glob("*step_*") if OWN_NAME.fullmatch(path.name)]:
                if fresh or not (path / "COMPLETED").exists():  # what a kill left behind
                    _delete(path)
        parallel.barrier()

    def latest(self):
        """The newest finished checkpoint, or None. ValueError when it, or a finished run without any, is of another configuration."""
        finished = self._finished()
        if finished:
            self._read_index(finished[-1])
        elif not self.fresh and (self.run_dir / "final").is_dir():
            config, manifest = (read_json(self.run_dir / f"{name}.json") for name in ("config", "manifest"))
            there = config | {key: manifest[key] for key in ("weights", "data")}  # there it is their content, as in the identity
            _refuse_other(self.run_dir / "final", there, {key: self.identity[key] for key in self.identity.keys() & there.keys()})
        return finished[-1] if finished else None

    def _finished(self):
        finished = [path.parent for path in self.folder.glob("step_*/COMPLETED") if OWN_NAME.fullmatch(path.parent.name)]
        return sorted(finished, key=lambda path: int(path.name.removeprefix("step_")))

    def save(self, step, model, optimizer):
        """Copy this rank's shards to host memory, then write them in the background.

        Waits for the previous save first, and raises its error if it failed. The step that was saved or loaded last is not saved again.
        """
        self.wait()
        if step == self._finished_step:
            return
        tensors = _trained_tensors(model, optimizer)
        index = {"step": step, "world_size": dist.get_world_size(), "identity": self.identity, "shapes": _shapes(tensors)}
        rows = {key: (first, local.to("cpu", copy=True)) for key, (first, local) in _local_rows(tensors)}
        self._pending = self._writer.submit(self._write, self.folder / f"step_{step:06d}", index, rows)

    def wait(self):
        """Return once the last save is finished on every rank; if it failed on any, raise on all."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def load(self, path, model, optimizer):
        """Fill the trained parameters and the optimizer state from a checkpoint of any number of ranks; returns its step.

        ValueError: another configuration, a truncated or missing file, other tensors than this model's.
        """
        index = self._read_index(path)
        stored = _stored_rows(path, index["world_size"])
        if index["shapes"].keys() - _trained_tensors(model, optimizer).keys():
            _allocate_state(optimizer)
        tensors = _trained_tensors(model, optimizer)
        here, there = _shapes(tensors), index["shapes"]
        problems = [key for key in here | there if here.get(key) != there.get(key)]
        if problems:
            listed = [f"{key}: {there.get(key, 'nothing')} stored, {here.get(key, 'nothing')} expected" for key in problems[:20]]
            raise UserError(f"{path}: {len(problems)} tensors do not fit the model:\n  " + "\n  ".join(listed))
        with torch.no_grad():
            for key, tensor in tensors.items():
                copy_rows(tensor, stored[key])
        self._finished_step = index["step"]
        if dist.get_rank() == 0:
            self._delete_old()  # a kill right after the last step was saved leaves one too many; only now is the newest known to be whole
        return index["step"]

    def _read_index(self, path):
        index = read_json(path / "checkpoint.json")
        _refuse_other(path, index["identity"], self.identity | dict.fromkeys(index["identity"].keys() - self.identity.keys()))
        return index

    # ------------------------------------------------------------ in the writer thread

    def _write(self, path, index, rows):
        folder, rank = path.with_name(f".tmp_{path.name}"), dist.get_rank()
        _on_all_ranks(lambda: _write_rows(folder, rank, rows))
        _on_all_ranks(lambda: self._finish(folder, path, index) if rank == 0 else None)
        self._finished_step = index["step"]

    def _finish(self, folder, path, index):
        write_json(folder / "checkpoint.json", index)
        publish(folder, path)
        write_json(path / "COMPLETED", {})
        sync_folder(path)  # the new checkpoint is on the disk before an old one goes
        self._delete_old()

    def _delete_old(self):
        for old in self._finished()[: -self.keep_last]:
            _delete(old)


def _refuse_other(path, there, here):
    differing = [key for key in sorted(here) if there.get(key) != here[key]]
    if differing:
        changes = "; ".join(f"{key}={there.get(key)!r} there, {here[key]!r} now" for key in differing)
        raise UserError(f"{path} was saved under another configuration: {changes}. Restore it, or take another out_dir, or --fresh")


def _on_all_ranks(work):
    """work() here and on every rank; when it failed on one, all raise, so that none waits for the other."""
    error = None
    try:
        work()
    except Exception as caught:  # raised below, once the others know
        error = caught
    failures = torch.tensor([0 if error is None else 1])
    dist.all_reduce(failures, group=parallel.background_group())
    if error is not None:
        raise error
    if failures.item():
        raise RuntimeError(f"the checkpoint failed on {failures.item()} other rank(s), see there; earlier checkpoints are untouched")


def _write_rows(folder, rank, rows):
    folder.mkdir(parents=True, exist_ok=True)
    specs = {key: (local.dtype, local.shape) for key, (_, local) in rows.items()}
    first_rows = json.dumps({key: first for key, (first, _) in rows.items()})
    write_safetensors(folder / f"rank_{rank:05d}.safetensors", specs, lambda key: rows[key][1], {"first_rows": first_rows})


def _delete(path):
    (path / "COMPLETED").unlink(missing_ok=True)  # first, so that a kill half way leaves an unfinished checkpoint, not a torn one
    shutil.rmtree(path)


# ---------------------------------------------------------------- what a checkpoint holds


def _trained_tensors(model, optimizer):
    """{"param/<name>" or "<state>/<name>": sharded tensor} of everything that training changes; a scalar state counts as one row."""
    tensors = {}
    for name, param in sharded_parameters(model).items():
        if param.requires_grad:
            tensors[f"param/{name}"] = param
            for state, value in optimizer.state.get(param, {}).items():
                tensors[f"{state}/{name}"] = value.view(1) if value.ndim == 0 else value
    return tensors


def _shapes(tensors):
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def _local_rows(tensors):
    """(key, (first row, this rank's rows)) of each tensor that has any here; a split master as the float32 that it is."""

    def width(tensor):
        return 4 if is_split(tensor) else tensor.dtype.itemsize

    for key, tensor in sorted(tensors.items(), key=lambda item: -width(item[1])):  # stable: wider dtypes first, as the writer wants
        first, local = parallel.local_rows(tensor)
        if local.numel():
            yield key, (first, join_master(local, tensor.master.low_bits) if is_split(tensor) else local)


def _allocate_state(optimizer):
    """Let the optimizer allocate its state as it would in training: a step of zero gradients at lr 0. The caller overwrites all of it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _stored_rows(path, world_size):
    """{key: _StoredRows} of the files of all ranks that saved."""
    stored = {}
    for rank in range(world_size):
        file = open_safetensors(path / f"rank_{rank:05d}.safetensors")
        for key, first in json.loads(file.metadata()["first_rows"]).items():
            stored.setdefault(key, _StoredRows(f"{path}: {key}", [])).pieces.append((first, file.get_slice(key)))
    return stored


@dataclass(frozen=True)
class _StoredRows:
    """One tensor whose rows are spread over several files; [first:stop] reads just those."""

    name: str
    pieces: list  # (first row, file slice) in row order

    def __getitem__(self, rows):
        parts, row = [], rows.start
        for start, piece in self.pieces:
            stop = min(rows.stop, start + piece.get_shape()[0])
            if start <= row < stop:
                parts.append(piece[row - start : stop - start])
                row = stop
        if row < rows.stop:
            raise UserError(f"{self.name}: rows {row}..{rows.stop} are in none of the files")
        return torch.cat(parts)
