"""Processes that have imported torch and this repository already.

What trains imports for 5 s of CPU time. One server imports it once (warm.py), with the first request, and forks
a process for every request. All workers of pytest share it; it ends with the process that called start().
"""

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from multiprocessing import connection, get_context, spawn
from pathlib import Path

ADDRESS = "GLASSBOX_FORKS"  # variable of the environment: the server's socket
TESTS = Path(__file__).parent
servers = []  # of this process: one or none


def start():
    """Start the server, if neither this process nor one that it comes from has."""
    if ADDRESS in os.environ:
        return
    os.environ[ADDRESS] = f"{tempfile.mkdtemp()}/socket"
    path = [str(TESTS.parent), str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[ADDRESS])
        listener.listen(64)
        handle = listener.fileno()
        command = [sys.executable, __file__, str(handle)]
        # Its standard input ends with this process.
        server = subprocess.Popen(command, env=os.environ | own, stdin=subprocess.PIPE, pass_fds=[handle])
    servers.append(server)


class Process:
    """A process with this one's environment, folder and sys.path that calls work(), which can be pickled."""

    def __init__(self, work):
        start()
        about = spawn.get_preparation_data("fork")
        # A secret of multiprocessing, which refuses to be pickled.
        del about["authkey"]
        self.keeper = connection.Client(os.environ[ADDRESS])
        self.keeper.send((dict(os.environ), about))
        self.keeper.send(work)
        self.pid = self.keeper.recv()

    def wait(self, seconds):
        """The exit code; -number where signal `number` ended it. It is killed after so many seconds."""
        if not self.keeper.poll(seconds):
            os.kill(self.pid, signal.SIGKILL)
        return self.keeper.recv()


# ---------------------------------------------------------------- the server


def serve(listener):
    # Ctrl-C is for those who wait; and the system need not keep how the keepers ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # pyarrow's allocator has a thread, and is made for forks. From Python 3.12 on this is said of any thread.
    warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        request = connection.Connection(listener.accept()[0].detach())
        import warm  # noqa: F401  now, because most who run a single test need none of it

        if os.fork() == 0:
            keep(request)
        request.close()
    shutil.rmtree(Path(listener.getsockname()).parent)


def keep(request):
    """Start the process of one request, say its pid, wait for it, and say its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    environment, about = request.recv()
    os.environ.clear()
    os.environ.update(environment)
    spawn.prepare(about)
    process = get_context("fork").Process(target=call, args=(request.recv(),))
    process.start()
    request.send(process.pid)
    process.join()
    request.send(process.exitcode)
    os._exit(0)


def call(work):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(work())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
