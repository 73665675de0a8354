"""A hanging run ends and says which rank hangs, after which step, in which line.

A thread in every rank watches that its main thread reports progress (`beat`). When it has not for the
patience, the run can only wait for ever: on several ranks all of them wait for the one that hangs. Each rank
tells the others through torchrun's store where it is. The lowest rank that still lives prints what all of
them told, and ends the run.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
# Seconds without progress; ten times the last step where that is more. Before the first step three times as
# long, in which weights are read and kernels compiled.
PATIENCE = 600.0
# While rank 0 downloads and tokenises, and the others wait. The collectives' own limit is two hours, and says
# nothing of who hangs.
PREPARING = 6600.0
_watch = None


def start(world, step, patience=None):
    """Watch from now on; `step` optimizer steps are done.

    patience: seconds without progress until the next step is done.
    """
    global _watch
    stop()
    _watch = Watch(world.rank, world.size, step, patience or 3 * PATIENCE)
    _watch.start()


def beat(step=None):
    """The main thread has made progress; step: an optimizer step is finished.

    Without a watch, nothing happens.
    """
    if _watch:
        _watch.beat(step)


def stop():
    """Watch no longer: what follows may take as long as it takes."""
    global _watch
    if _watch:
        _watch.stopped.set()
    _watch = None


class Watch(threading.Thread):
    """Counts the seconds since the last beat in ticks that it lives through itself.

    A process that somebody stopped and continued has not been silent.
    """

    def __init__(self, rank, size, step, patience):
        super().__init__(daemon=True)
        self.rank, self.size, self.step = rank, size, step
        self.stopped = threading.Event()
        self.silent = 0.0
        self.patience = patience
        self.store = None
        if size > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))

    def beat(self, step):
        if step is not None:
            self.patience = max(PATIENCE, 10 * self.silent)
            self.step = step
        self.silent = 0.0

    def run(self):
        tick = min(5.0, PATIENCE / 20)
        while not self.stopped.wait(tick):
            self.silent += tick
            self._tell()
            if self.silent > self.patience:
                return self._give_up(tick)

    def _tell(self):
        """Put into the store: the time, the last step, where the main thread is."""
        if self.store:
            self.store.set(f"watch/{self.rank}", json.dumps([time.time(), self.step, *where()]))

    def _give_up(self, tick):
        own = [time.time(), self.step, *where()]
        if not own[-1]:  # a rank that waits for no other is the one to look at
            since = _since(self.step)
            print(f"rank {self.rank}: no progress {since}; its stacks:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        # The others tell, too. Then the lowest rank that lives speaks, and torchrun ends the rest.
        time.sleep(tick * (2 + 2 * self.rank))
        lines, culprits, last_step = [], [], self.step
        for rank, (told, step, place, waits) in enumerate(self._states(own)):
            age = time.time() - told
            if age > 10 * tick + 5:
                place = f"its process has not answered for {age:.0f} s: stopped, or its machine is gone"
                waits = False
            last_step = min(last_step, step)
            lines.append(f"  rank {rank}, step {step}: {'waits for the others, ' if waits else ''}{place}")
            if not waits:
                culprits.append(f"rank {rank}")
        who = " and ".join(culprits) or "no rank by itself"
        message = f"no progress for {self.silent:.0f} s {_since(last_step)}; what hangs: {who}"
        print("\n".join([f"error: {message}", *lines]), file=sys.stderr, flush=True)
        write_error_file(message)
        os._exit(1)  # the main thread does not come back, so nothing can be cleaned up

    def _states(self, own):
        if not self.store:
            return [own]
        states = []
        for rank in range(self.size):
            key = f"watch/{rank}"
            has_told = self.store.check([key])
            states.append(json.loads(self.store.get(key)) if has_told else [0, self.step, "", False])
        return states


def _since(step):
    return f"after step {step}" if step else "before the first step"


def where():
    """(the main thread's innermost line in this project, whether it waits there for other ranks)."""
    frame = sys._current_frames()[threading.main_thread().ident]
    waits, place = False, "unknown"
    while frame:
        path = Path(frame.f_code.co_filename)
        waits = waits or "torch/distributed" in str(path)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts:
            place = f"{path.relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
            break
        frame = frame.f_back
    return place, waits


def write_error_file(message):
    """Tell torchrun, in torch.distributed.elastic's format, what its summary shows instead of `error_file:
    <N/A>`.
    """
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))
