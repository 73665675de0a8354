"""One writer a folder, and what a killed one leaves."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing import lock as locks
from plumbing.files import UserError, remove_leftovers, temporary_beside
from plumbing.lock import lock, unlock

ROOT = Path(__file__).parent.parent
HOLDER = "import sys; from plumbing.lock import lock; lock(sys.argv[1], None); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_ends_naming_the_first(tmp_path, holder):
    with pytest.raises(
        UserError, match=rf"run: in use by process {holder.pid} on \S+, started \d{{4}}-\d\d-\d\d"
    ):
        lock(tmp_path / "run", None)
    lock(tmp_path / "other", None)
    holder.send_signal(signal.SIGKILL)  # the kernel drops the lock, however a process ends
    holder.wait()
    lock(tmp_path / "run", None)
    lock(tmp_path / "run", None)  # twice by one process is once
    assert f"process {os.getpid()} on " in (tmp_path / "run/.lock").read_text()
    unlock()
    lock(tmp_path / "run", None)
    unlock()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    lock(tmp_path, None)
    assert "no locks on this file system (No locks available)" in capsys.readouterr().out


def test_what_a_killed_writer_left_is_removed(tmp_path):
    """Half-written files, a half-made export, and an export between the two renames that replace it."""
    (tmp_path / ".tmp_final").mkdir()
    (tmp_path / "manifest.json.tmp").touch()
    (tmp_path / ".old_adapter").mkdir()  # adapter/ is gone: killed in between
    (tmp_path / ".old_final").mkdir()
    (tmp_path / "final").mkdir()
    lock(tmp_path, None)
    unlock()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "adapter", "final"]


def test_leftovers_of_dead_processes_in_a_shared_folder(tmp_path):
    """Of this machine only: another's processes cannot be seen from here."""
    child = subprocess.Popen(["true"])
    child.wait()
    mine = temporary_beside(tmp_path / "table.safetensors")
    dead = Path(str(mine).replace(str(os.getpid()), str(child.pid)))
    elsewhere = tmp_path / f".tmp_othermachine_{child.pid}_table.safetensors"
    for path in (mine, elsewhere):
        path.touch()
    dead.mkdir()
    (dead / "column.npy").touch()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere])


@pytest.mark.parametrize(
    "name, content, key, holds",
    [
        ("config.json", {"model_type": "llama"}, "stage", "a model"),
        ("adapter_config.json", {}, "inputs", "a model"),
        ("manifest.json", {"stage": "dpo"}, "inputs", "the manifest.json of another command"),
        ("manifest.json", {"inputs": {}}, "stage", "the manifest.json of another command"),
        ("manifest.json", {"inputs": {}}, None, "the manifest.json of another command"),
    ],
)
def test_a_folder_of_another_command_is_not_written_over(tmp_path, name, content, key, holds):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"holds {holds}, which would be written over"):
        lock(tmp_path, key)


def test_a_folder_of_the_same_command_or_with_a_torn_file_is_taken(tmp_path):
    """Who reads a torn manifest.json names it."""
    for content in ('{"stage": "dpo"}', '{"inputs": {', ""):
        (tmp_path / "manifest.json").write_text(content)
        (tmp_path / "config.json").write_text('{"lr": 1.0}')
        lock(tmp_path, "stage")
