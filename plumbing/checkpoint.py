"""Exact resume from `checkpoints/step_000123/`.

Checkpoints are written in the background, verified when read, and resume on any number of ranks. A step
folder holds one rank_00000.safetensors per rank (its rows of every trained parameter and of its optimizer
state; the header has the first row of each, the step and the run), checkpoint.json with the size and sha256
of these files, and COMPLETED, written last, with the sha256 of checkpoint.json. A kill at any byte leaves an
unfinished folder, which the next start removes, and earlier checkpoints untouched. Frozen weights are not
stored: they come from model_path again.
"""

import hashlib
import json
import re
import time
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from kernels import is_split, join_master
from plumbing import parallel, watchdog
from plumbing.files import (
    HASHERS,
    UserError,
    publish,
    read_json,
    remove_tree,
    sha256_of,
    sync,
    verify_hashes,
    write_json,
)
from plumbing.tensors import is_finite, open_safetensors, write_safetensors
from plumbing.weights import ADAPTER_CONFIG, check_replaceable, copy_rows, sharded_parameters

SLOW = 1.0  # seconds from which a save says what training waits for
# A copy that somebody named step_000100_good is theirs: never read, never deleted.
OWN_NAME = re.compile(r"(\.tmp_|\.old_)?step_\d+(\.damaged)?")


class Damaged(UserError):
    """A checkpoint that is not what was written; an earlier one is used instead, if there is one."""


class Checkpointer:
    """The resumable checkpoints of one run. All ranks construct it, and call save, load and wait together.

    run_identity: the configuration values that decide the numbers; a checkpoint saved under others is
    refused. keep_last: how many finished checkpoints stay (a new one is finished before an old one goes).
    fresh=True deletes those of an earlier run, and before them what says that final/ is its end. UserError,
    before anything is deleted, when the end of the run could not write final/ or adapter/ because other files
    are there.
    """

    def __init__(self, run_dir, keep_last, run_identity, fresh=False):
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.config, self.manifest = self.run_dir / "config.json", self.run_dir / "manifest.json"
        self.keep_last, self.fresh = keep_last, fresh
        # as it will be read back: tuples become lists
        self.run_identity = json.loads(json.dumps(run_identity))
        self._writer = futures.ThreadPoolExecutor(max_workers=1)
        self._pending = None  # the save that is being written
        self._copies = {}  # {key: what the last save copied to host memory}, where the next one copies to
        self._finished_step = None
        self._damaged = {}  # {path: what is wrong with it} of checkpoints that were passed over
        check_replaceable(self.run_dir / "final", "config.json")
        check_replaceable(self.run_dir / "adapter", ADAPTER_CONFIG)
        if dist.get_rank() == 0:
            if fresh:  # first: a run that dies at its start must not seem to be finished, or another's
                self.manifest.unlink(missing_ok=True)
                self.config.unlink(missing_ok=True)
            for path in list(self.folder.glob("*step_*")):
                is_unfinished = not (path / "COMPLETED").exists() or path.suffix == ".damaged"
                if OWN_NAME.fullmatch(path.name) and (fresh or is_unfinished):
                    _delete(path)
        parallel.barrier()

    # ------------------------------------------------------------ reading

    def latest(self):
        """The newest finished checkpoint whose checkpoint.json is intact, or None when there is none at all.

        UserError when it, or a finished run without any, is of another configuration, and when all are
        damaged.
        """
        for path in reversed(self._finished()):
            try:
                self._read_index(path)
                return path
            except Damaged as error:
                self._damaged[path] = str(error)
        self._refuse_if_damaged()
        if not self.fresh and (self.run_dir / "final").is_dir():
            self._check_finished_run()
        return None

    def finished(self):
        """A message when the run was trained to its end and its export is whole, else nothing.

        Called after latest().
        """
        final = self.run_dir / "final"
        if self.fresh or not final.is_dir() or not self.manifest.is_file():
            return ""
        if "finished" not in read_json(self.manifest):
            return ""
        try:
            verify_hashes(final)
        except UserError as error:
            print(f"{error} (it is written again)", flush=True)
            return ""
        how = "--fresh starts it over, another out_dir keeps both"
        return f"{final}: this run is finished; nothing is trained. {how}"

    def _check_finished_run(self):
        # config.json names weights and data by path, the identity by content, as the manifest does. Of a run
        # that was started over there is neither; where the manifest was deleted, the settings still count.
        there = read_json(self.config) if self.config.is_file() else {}
        contents = read_json(self.manifest) if self.manifest.is_file() else {}
        for key in ("weights", "data", "held_out"):
            there.pop(key, None)
            if contents:
                there[key] = contents.get(key)
        common = self.run_identity.keys() & there.keys()
        _refuse_other(self.run_dir / "final", there, {key: self.run_identity[key] for key in common})

    def load(self, path, model, optimizer):
        """Fill the trained parameters and the optimizer state from a checkpoint; return its step.

        The checkpoint may be of any number of ranks. When a file of it is damaged, the newest intact one
        before it is loaded, and the lost steps are said. UserError: no intact one, another configuration,
        other tensors than this model's.
        """
        for candidate in reversed(self._finished()):
            if _step_of(candidate) > _step_of(path) or candidate in self._damaged:
                continue
            problem = self._load(candidate, model, optimizer)
            if problem is None:
                self._finished_step = _step_of(candidate)
                if dist.get_rank() == 0:
                    self._pass_over_damaged(candidate)
                self._damaged = {}
                return self._finished_step
            self._damaged[candidate] = problem
        self._refuse_if_damaged()
        raise UserError(f"{path}: missing; expected a finished checkpoint")

    def _load(self, path, model, optimizer):
        """Copy one checkpoint while its files are hashed.

        Returns None, or, on every rank the same, what is damaged.
        """
        index = problem = error = None
        try:
            index = self._read_index(path)
        except Damaged as damage:
            problem = str(damage)
        if index is not None:
            _require_same_tensors(path, index["shapes"], model, optimizer)
            names = sorted(index["files"])[dist.get_rank() :: dist.get_world_size()]
            with futures.ThreadPoolExecutor(HASHERS) as pool:  # hashlib releases the GIL
                hashing = [pool.submit(_damage_of, path / name, index["files"][name]) for name in names]
                try:
                    _copy_tensors(path, index, model, optimizer)
                except Exception as caught:  # raised below, unless the file turns out to be damaged
                    error = caught
                found = [future.result() for future in hashing]
            # A file that is damaged explains any error of reading it, so its damage is what is told.
            damages = [damage for damage in found if damage]
            if isinstance(error, Damaged):
                damages.append(str(error))
            problem = damages[0] if damages else None
        # Every rank must take the same branch here: the ranks load one checkpoint.
        problems = list(filter(None, parallel.gather_texts(problem or "")))
        if error and not problems:
            raise error
        return problems[0] if problems else None

    def _read_index(self, path):
        """The content of checkpoint.json.

        Damaged when it is not what was written, UserError when it is of another configuration.
        """
        try:
            expected = read_json(path / "COMPLETED").get("checkpoint.json")
            index = read_json(path / "checkpoint.json")
        except UserError as error:
            raise Damaged(str(error)) from error
        if sha256_of(path / "checkpoint.json") != expected:
            raise Damaged(f"{path}/checkpoint.json: its sha256 is not the one in COMPLETED")
        if index["step"] != _step_of(path):
            raise Damaged(f"{path}/checkpoint.json: of step {index['step']}")
        there = index["run_identity"]
        _refuse_other(path, there, self.run_identity | dict.fromkeys(there.keys() - self.run_identity.keys()))
        return index

    def _refuse_if_damaged(self):
        if self._damaged:
            newest = next(iter(self._damaged.values()))
            advice = "restore it, or start over with --fresh"
            raise UserError(f"{newest}. No earlier checkpoint is intact; {advice}")

    def _pass_over_damaged(self, loaded):
        """Say what was damaged and how many steps that costs, and put it out of the way of the next save."""
        for path, problem in self._damaged.items():
            lost = _step_of(path) - _step_of(loaded)
            kept = path.with_name(f"{path.name}.damaged")
            path.rename(kept)
            print(f"{problem}. {loaded.name} is used instead: {lost} steps are trained again", flush=True)
            print(f"{kept}: kept until the next start", flush=True)
        # A kill right after the last save leaves one too many. Only now is the newest known to be whole.
        self._delete_old()

    def _finished(self):
        finished = []
        for path in self.folder.glob("step_*/COMPLETED"):
            if re.fullmatch(r"step_\d+", path.parent.name):
                finished.append(path.parent)
        return sorted(finished, key=_step_of)

    # ------------------------------------------------------------ writing

    def save(self, step, model, optimizer):
        """Copy this rank's shards to host memory, then write them in the background.

        Waits for the previous save first, and raises its error if it failed. The step that was saved or
        loaded last is not saved again. FloatingPointError, naming tensors, when one of them is not finite:
        nothing is written. The host memory is kept for the next save, until wait().
        """
        start = time.monotonic()
        self._wait()
        waited = time.monotonic() - start
        if waited >= SLOW:
            earlier = f"the checkpoint of step {self._finished_step} was still being written"
            parallel.say(f"step {step}: waited {waited:.1f} s to save, because {earlier}")
        if step == self._finished_step:
            return
        tensors = _trained_tensors(model, optimizer)
        _require_finite(step, tensors)
        start = time.monotonic()
        rows = self._copy(tensors)
        took = time.monotonic() - start
        if took >= SLOW:
            size = sum(local.nbytes for _, local in rows.values()) / 1e9
            parallel.say(f"step {step}: {took:.1f} s to copy {size:.1f} GB a rank to host memory")
        index = {"step": step, "run_identity": self.run_identity, "shapes": _shapes(tensors)}
        self._pending = self._writer.submit(self._write, self.folder / f"step_{step:06d}", index, rows)

    def check(self):
        """Raise the error of a save that has failed in the background, on every rank at the same step."""
        if self._pending:  # on all ranks or on none: a save is collective
            failed = self._pending.done() and self._pending.exception() is not None
            if parallel.max_across_ranks(failed):
                self.wait()

    def wait(self):
        """Return once the last save is finished on every rank; if it failed on any, raise on all.

        The host memory of its copy is free then.
        """
        self._wait()
        self._copies.clear()

    def _wait(self):
        pending, self._pending = self._pending, None
        if pending:
            while futures.wait([pending], timeout=5).not_done:
                watchdog.beat()  # a slow disk is not a hang
            pending.result()

    def _copy(self, tensors):
        """{key: (first row, host copy of the rows that this rank owns)} of the tensors that have any here.

        Wider dtypes first, as the writer needs them.
        """
        rows = {}
        for key, tensor in tensors.items():
            first, local = _copy_own_rows(tensor, self._copies.get(key))
            if local.numel():
                rows[key] = (first, local)
                self._copies[key] = local
        # stable: the order of the model, and of its optimizer, inside a dtype
        widest_first = sorted(rows, key=lambda key: rows[key][1].dtype.itemsize, reverse=True)
        return {key: rows[key] for key in widest_first}

    # ------------------------------------------------------------ in the writer thread

    def _write(self, path, index, rows):
        folder, rank = path.with_name(f".tmp_{path.name}"), dist.get_rank()
        header = {"step": str(index["step"]), "run": _hash_of(self.run_identity)}
        name, about = f"rank_{rank:05d}.safetensors", {}

        def write_rows():
            about["sha256"] = _write_rows(folder / name, rows, header)
            about["bytes"] = (folder / name).stat().st_size

        _on_all_ranks(write_rows)
        files = parallel.gather_texts(json.dumps({name: about}), parallel.background_group())
        index["files"] = {}
        for file in files:
            index["files"] |= json.loads(file)
        _on_all_ranks(lambda: self._finish(folder, path, index) if rank == 0 else None)
        self._finished_step = index["step"]

    def _finish(self, folder, path, index):
        write_json(folder / "checkpoint.json", index)
        digest = sha256_of(folder / "checkpoint.json")
        publish(folder, path)
        write_json(path / "COMPLETED", {"checkpoint.json": digest})
        sync(path)  # the new checkpoint is on the disk before an old one goes
        self._delete_old()

    def _delete_old(self):
        for old in self._finished()[: -self.keep_last]:
            _delete(old)


def _step_of(path):
    return int(path.name.removeprefix("step_"))


def _hash_of(run_identity):
    return hashlib.sha256(json.dumps(run_identity, sort_keys=True).encode()).hexdigest()


def _refuse_other(path, there, here):
    """UserError naming the keys of `here` that `there` has otherwise."""
    changes = []
    for key in sorted(here):
        if there.get(key) != here[key]:
            changes.append(f"{key}={there.get(key)!r} there, {here[key]!r} now")
    if changes:
        advice = "Restore it, or take another out_dir, or --fresh"
        raise UserError(f"{path} was saved under another configuration: {'; '.join(changes)}. {advice}")


def _damage_of(path, about):
    """How a file differs from what was written, by its size, then by its sha256; None when it does not."""
    if not path.is_file():
        return f"{path}: missing file"
    size = path.stat().st_size
    if size != about["bytes"]:
        return f"{path}: truncated, or longer: {size:,} bytes, {about['bytes']:,} were written"
    if sha256_of(path) != about["sha256"]:
        return f"{path}: damaged, its sha256 is not the one in checkpoint.json"
    return None


def _require_finite(step, tensors):
    """FloatingPointError on every rank when a weight or a moment is NaN or infinite.

    A later run would find them in the checkpoint and blame the rows of its own first step. They are read
    where they are, by a GPU in a moment. A split master is finite when its bf16 weight is.
    """
    bad = []
    for key, tensor in tensors.items():
        if not is_finite(parallel.own_rows(tensor)[1]):
            bad.append(key)
    names = ", ".join(filter(None, parallel.gather_texts(", ".join(bad[:3]))))
    if names:
        problem = f"step {step}: not finite, so not saved: {names}. Earlier checkpoints are untouched"
        raise FloatingPointError(f"{problem}; a smaller lr, or a longer warmup, may help")


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
        problem = f"the checkpoint failed on {failures.item()} other rank(s), see there"
        raise parallel.OtherRankFailed(f"{problem}; earlier checkpoints are untouched")


def _write_rows(path, rows, header):
    """Write one rank's rows. Returns the sha256 of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    specs, first_rows = {}, {}
    for key, (first, local) in rows.items():
        specs[key] = (local.dtype, local.shape)
        first_rows[key] = first
    header = header | {"first_rows": json.dumps(first_rows)}
    return write_safetensors(path, specs, lambda key: rows[key][1], header)


def _delete(path):
    # COMPLETED first: a kill half way leaves an unfinished checkpoint, not a torn one.
    (path / "COMPLETED").unlink(missing_ok=True)
    remove_tree(path)


# ---------------------------------------------------------------- what a checkpoint holds


def _trained_tensors(model, optimizer):
    """All that training changes, {"param/<name>" or "<state>/<name>": sharded tensor}.

    A scalar state counts as one row.
    """
    tensors = {}
    params = sharded_parameters(model)
    for name, shard in parallel.shards(model).items():
        if shard.requires_grad:
            tensors[f"param/{name}"] = params[name]
            for state, value in optimizer.state.get(shard, {}).items():
                of_all_ranks = parallel.of_all_ranks(model, name, value) if value.ndim else value.view(1)
                tensors[f"{state}/{name}"] = of_all_ranks
    return tensors


def _shapes(tensors):
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


@torch.no_grad()
def _copy_own_rows(tensor, copy):
    """(first row, the rows that this rank owns, in host memory); a split master is one float32 tensor.

    copy: the tensor to copy to, or None. Memory that has been written before takes them several times faster.
    """
    first, local = parallel.own_rows(tensor)
    if is_split(tensor):
        local = join_master(local, tensor.master.low_bits)
    if copy is None:
        copy = torch.empty_like(local, device="cpu")
    assert copy.shape == local.shape and copy.dtype == local.dtype, (copy.shape, local.shape)
    return first, copy.copy_(local)


def _require_same_tensors(path, there, model, optimizer):
    """UserError unless the stored tensors are those of this model.

    Allocates the optimizer's state where the stored tensors include it.
    """
    if there.keys() - _trained_tensors(model, optimizer).keys():
        _allocate_state(optimizer)
    here = _shapes(_trained_tensors(model, optimizer))
    problems = [key for key in here | there if here.get(key) != there.get(key)]
    if problems:
        lines = [f"{path}: {len(problems)} tensors do not fit the model:"]
        for key in problems[:20]:
            lines.append(f"  {key}: {there.get(key, 'nothing')} stored, {here.get(key, 'nothing')} expected")
        raise UserError("\n".join(lines))


def _allocate_state(optimizer):
    """Let the optimizer allocate its state as in training: a step of zero gradients at lr 0.

    The caller overwrites all of it.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@torch.no_grad()
def _copy_tensors(path, index, model, optimizer):
    """Read this rank's rows of every trained tensor from the files of all ranks that saved."""
    stored = {}
    for name in sorted(index["files"]):
        file = open_safetensors(path / name)
        header = file.metadata()
        if (header["step"], header["run"]) != (str(index["step"]), _hash_of(index["run_identity"])):
            raise Damaged(f"{path / name}: of step {header['step']}, or of another run")
        for key, first in json.loads(header["first_rows"]).items():
            rows = stored.setdefault(key, _StoredRows(f"{path}: {key}", []))
            rows.pieces.append((first, file.get_slice(key)))
    for rows in stored.values():  # with sharding="hybrid" files are not in the order of their rows
        rows.pieces.sort(key=lambda piece: piece[0])
    for key, tensor in _trained_tensors(model, optimizer).items():
        copy_rows(tensor, stored[key])
    parallel.share_weights(model)


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
            raise Damaged(f"{self.name}: rows {row}..{rows.stop} are in none of the files")
        return torch.cat(parts)
