"""`--fresh` starts a run over once, also where something starts its command again.

torchrun (--max-restarts), SLURM (--requeue) and SkyPilot do, with the same keys; a second attempt goes on
with what the first one trained. Attempts of one launch are known by what outlives their processes: torchrun's
own process on one of the machines, a SLURM job, a SkyPilot task. Counts of restarts do not tell: torchrun's
differ between machines, and an attempt that was counted may have died before it started over.
"""

import json
import os
import socket
from pathlib import Path

from plumbing import parallel
from plumbing.files import read_json, write_json

FILE = "fresh.json"


def started_over(out_dir, world):
    """Whether an earlier attempt of this launch has started the run in out_dir over. Collective."""
    path = Path(out_dir) / FILE
    text = parallel.from_main(world, lambda: json.dumps(read_json(path) if path.is_file() else {}))
    earlier = json.loads(text).get("launch", [])
    names = _names_of_all_ranks()
    if not int(os.environ.get("SLURM_RESTART_COUNT", 0)):  # a job may run several commands
        names = {name for name in names if not name.startswith("SLURM")}
    return not names.isdisjoint(earlier)


def record(out_dir, world):
    """Remember that the run in out_dir has been started over, once its checkpoints are gone. Collective."""
    names = sorted(_names_of_all_ranks())
    if world.main and names:
        write_json(Path(out_dir) / FILE, {"launch": names})


def _names_of_all_ranks():
    names = set()
    for text in parallel.gather_texts(json.dumps(_names())):
        names |= set(json.loads(text))
    return names


def _names():
    """What this rank's process and every later attempt of its launch have in common."""
    names = []
    if "TORCHELASTIC_RUN_ID" in os.environ:
        agent = os.getppid()
        names.append(f"torchrun: process {agent} on {socket.gethostname()}, started at {_started(agent)}")
    for what, key in (("SLURM job", "SLURM_JOB_ID"), ("SkyPilot task", "SKYPILOT_TASK_ID")):
        if key in os.environ:
            names.append(f"{what} {os.environ[key]}")
    return names


def _started(process):
    """When a process started, in ticks since boot, where /proc tells: numbers of processes come again."""
    path = Path(f"/proc/{process}/stat")
    # the second field, a name in brackets, may hold blanks; the 22nd of all is the start
    return path.read_text().rpartition(")")[2].split()[19] if path.is_file() else "?"
