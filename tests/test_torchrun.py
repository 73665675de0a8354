"""tools/torchrun.py, which `make` puts in place of .venv/bin/torchrun; and what torchrun tells two machines."""

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from world import run_script

from tools.torchrun import expand

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("typed, meant", [
    ("--nproc 8 train_dpo.py c.py", "--nproc-per-node 8 train_dpo.py c.py"),
    ("--standalone --nproc=2 train_sft.py c.py", "--standalone --nproc-per-node=2 train_sft.py c.py"),
    ("--nproc 2 -m tools.work", "--nproc-per-node 2 -m tools.work"),
    ("--nproc-per-node 8 train_dpo.py c.py", "--nproc-per-node 8 train_dpo.py c.py"),
    ("--nproc_per_node=8 --nproc_x 1 a.py", "--nproc_per_node=8 --nproc_x 1 a.py"),
    ("--nnodes 1 script.py --nproc 3", "--nnodes 1 script.py --nproc 3"),
])  # fmt: skip
def test_nproc_is_spelt_out_before_the_script(typed, meant):
    assert expand(typed.split()) == meant.split()


@pytest.mark.slow
def test_what_make_installs_starts_two_ranks(tmp_path):
    """The recipe's line of the Makefile, run by hand: --nproc 2 is two ranks."""
    recipe = re.search(
        r"^\t@(\(echo .*tools/torchrun\.py\)) > \.venv/bin/torchrun$", (ROOT / "Makefile").read_text(), re.M
    )[1]
    installed = tmp_path / "torchrun"
    command = recipe.replace("$(CURDIR)/.venv/bin/python", sys.executable)
    installed.write_text(
        subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )
    installed.chmod(0o755)
    (tmp_path / "who.py").write_text(
        "import os\n"
        "line = f\"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\\n\"\n"
        "os.write(1, line.encode())\n"  # one write: print's words of two ranks can come between each other
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["--standalone", "--nproc", "2", str(tmp_path / "who.py")]
    done = subprocess.run([installed, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.slow
def test_two_machines_number_their_ranks_in_a_row(tmp_path):
    """sharding="hybrid" takes ranks 0 and 1 for a machine, and LOCAL_WORLD_SIZE for its size: so does world.py,
    which stands for torchrun in other tests.
    """
    (tmp_path / "who.py").write_text(
        "import os\n"
        "names = ('GROUP_RANK', 'RANK', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'WORLD_SIZE')\n"
        "line = ' '.join(os.environ[name] for name in names) + '\\n'\n"
        "os.write(1, line.encode())\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "1"]
    command = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", *rendezvous, "who.py"]
    with ThreadPoolExecutor(2) as pool:
        agents = [pool.submit(run_script, command, tmp_path, {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    done = [agent.result() for agent in agents]
    assert [agent.returncode for agent in done] == [0, 0], [agent.stderr for agent in done]
    ranks = sorted("".join(agent.stdout for agent in done).splitlines())
    assert ranks == ["0 0 0 2 4", "0 1 1 2 4", "1 2 0 2 4", "1 3 1 2 4"]
