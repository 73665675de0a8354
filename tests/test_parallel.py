"""Sharding, sums and clipping: the checks of parallel_ranks.py in this process, a group of one, and on 2 and
3 processes.
"""

import errno
import json
import os
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from exchange_ranks import CHECKS as EXCHANGE_CHECKS
from failing_ranks import FAILURES
from parallel_ranks import CHECKS, ON_MACHINES, run_checks
from world import FORKED_RANKS, run_script, spawn

from plumbing import parallel
from plumbing.weights import resolve

ROOT = Path(__file__).parent.parent


LONG = (
    "check_gradients_and_clipping",
    "check_steps_are_those_of_one_process",
    "check_bf16_steps",
    "check_recompute",
)


def one_process(check):
    marks = [pytest.mark.slow] if check.__name__ in LONG else []
    return pytest.param(check, id=check.__name__.removeprefix("check_"), marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("check", [one_process(check) for check in CHECKS + EXCHANGE_CHECKS])
def test_one_process(check, ranks):
    assert ranks.size == 1 and ranks.main
    check(ranks)


def test_a_restarted_attempt_sees_no_address_of_the_one_before(monkeypatch):
    """torchrun on one machine keeps one store over its attempts: what a dead rank left there is not read
    again.
    """
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent.set("rank 1", "an address")
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in (environment | {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}).items():
        monkeypatch.setenv(name, value)
    assert not parallel._restarts_on_one_machine()
    for attempt in "12":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert parallel._restarts_on_one_machine()
        store = parallel._store_of_this_attempt(timedelta(seconds=10))
        assert not store.check(["rank 1"])
        store.set("rank 1", "another")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert not parallel._restarts_on_one_machine()


def test_what_a_user_can_mend_is_one_line(capsys):
    """Our UserErrors are messages; everything else may be a mistake of ours and keeps its traceback."""
    assert parallel.run(lambda argv: resolve("nowhere"), []) == 1
    ours = capsys.readouterr().err
    assert ours.startswith("error: ") and "nowhere" in ours and ours.count("\n") == 1
    with pytest.raises(json.JSONDecodeError):
        parallel.run(lambda argv: json.loads("{"), [])


def fails(error):
    def main(argv):
        raise error

    return main


def test_a_disk_that_refuses_is_one_line_with_its_path(capsys):
    """No space, no permission. An OSError of another kind, or one that names no path, keeps its traceback."""
    full = OSError(errno.ENOSPC, "No space left on device: 9 bytes needed", "runs/x/metrics.jsonl")
    assert parallel.run(fails(full), []) == 1
    assert capsys.readouterr().err == "error: runs/x/metrics.jsonl: No space left on device: 9 bytes needed\n"
    assert parallel.run(fails(FloatingPointError("the loss is not finite")), []) == 1
    assert capsys.readouterr().err == "error: the loss is not finite\n"
    for foreign in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "I/O error", "x"),
        OSError("odd"),
    ):
        with pytest.raises(OSError) as caught:
            parallel.run(fails(foreign), [])
        assert caught.value is foreign


READER_GONE = {  # command: (exit code, how stderr begins)
    "print('x' * 100_000)": (141, ""),  # more than a buffer: print itself fails
    "print('x'); raise SystemExit(0)": (141, ""),  # --help
    "print('x')": (141, ""),
    "print('x'); raise UserError('beta=-1')": (1, "error: beta=-1\n"),
    # A training is not done.
    "parallel.init(); print('x', flush=True)": (1, "error: the pipe of the output is closed"),
}
# Each command in a process of its own, which is forked from one that has imported torch.
READER_GONE_PROGRAM = """
import gc, os, sys
from plumbing import parallel
from plumbing.files import UserError

# Else each of them collects all of torch when it ends, for half a second.
gc.freeze()

def main(argv):
    exec(argv[0])

for number, command in enumerate(sys.argv[1:]):
    if os.fork() == 0:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(os.open(f"{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        raise SystemExit(parallel.run(main, [command]))
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.slow
def test_a_reader_that_has_gone(tmp_path):
    """`COMMAND | head -1`: SIGPIPE's status and not a word; an error is still said."""
    program = [sys.executable, "-c", READER_GONE_PROGRAM, *READER_GONE]
    environment = os.environ | {"PYTHONUNBUFFERED": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(code) for code, _ in READER_GONE.values()], done.stderr
    for number, (_, said) in enumerate(READER_GONE.values()):
        error = (tmp_path / f"{number}.err").read_text()
        assert error.startswith(said) and (said or not error), error
        assert "Exception ignored" not in error


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_torchrun_ends_with_the_message(failure):
    """One line on the screen, from one rank, and the same line as the last of torchrun's own summary."""
    arguments = ["--standalone", "--nproc-per-node", "2", "tests/failing_ranks.py", failure]
    environment = FORKED_RANKS | {"CUDA_VISIBLE_DEVICES": ""}
    result = run_script(["-m", "torch.distributed.run", *arguments], ROOT, environment)
    assert result.returncode == 1
    assert result.stderr.count("error: beta=-1: expected float > 0\n") == 1, result.stderr
    summary = result.stderr.partition("Root Cause")[2]
    assert "beta=-1: expected float > 0" in summary.splitlines()[-2] and "<N/A>" not in summary
    assert result.stderr.count("Traceback") == 1 and "ChildFailedError" in result.stderr  # torchrun's own


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("checks", [CHECKS, EXCHANGE_CHECKS], ids=["parallel_ranks", "exchange_ranks"])
def test_processes(num_ranks, checks, tmp_path):
    done = spawn(partial(run_checks, checks), tmp_path / "logs", num_ranks).ok()
    assert done.out[0].count(f"holds on {num_ranks} rank(s)") == len(checks)


@pytest.mark.slow
def test_two_machines_of_two(tmp_path):
    done = spawn(partial(run_checks, ON_MACHINES), tmp_path / "logs", ranks=4, machine=2).ok()
    assert done.out[0].count("holds on 4 rank(s)") == len(ON_MACHINES)
