"""launch/: what SLURM and SkyPilot would be given, as far as that shows without a cluster."""

import re
import shlex
import subprocess
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

LAUNCH = Path(__file__).parent.parent / "launch"
# sbatch(1): the options that the script uses, and what their values look like
SBATCH = {"job-name": r"\w+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": r"\d+", "gpus-per-node": r"(\w+:)?\d+", "cpus-per-task": r"\d+",
          "time": r"(\d+-)?\d+:\d\d:\d\d", "signal": r"(R?B?:)?[A-Z]+@\d+", "requeue": None, "open-mode": "append|truncate",
          "output": r"[\w%./-]+"}  # fmt: skip
# sky/utils/schemas.py of SkyPilot 0.14.1, get_task_schema and get_resources_schema: the keys that the task
# uses, and their types. The package brings eighty others, so it is not installed with the tests; its own
# Task.from_yaml_config took the file, and refused it with a misspelt key, on 2026-11-29.
TASK = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "resources": dict,
    "volumes": dict,
    "envs": dict,
    "secrets": dict,
    "setup": str,
    "run": str,
}
RESOURCES = {"accelerators": str, "use_spot": bool, "disk_size": int}


def check_shell(text):
    """bash reads it, and torch's own parser the arguments of its torchrun. Returns these."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True)
    (line,) = re.findall(r"bin/torchrun (.*)", text.replace("\\\n", ""))
    numbers = re.sub(r'"\$\w*(NODES|NODE)"', "2", line)  # what the environment will say
    return get_args_parser().parse_args(shlex.split(numbers.replace('"$@"', "train_sft.py")))


def test_slurm_script():
    text = (LAUNCH / "slurm.sh").read_text()
    directives = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M)
    assert len(directives) == text.count("#SBATCH") == len(dict(directives))
    for name, value in directives:
        assert re.fullmatch(SBATCH[name] or "", value), (name, value)
    first_command = re.search(r"^[^#\n]", text, re.M).start()
    assert text.rindex("#SBATCH") < first_command  # sbatch reads no directive behind it
    options = check_shell(text)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend, options.max_restarts) == (
        "2",
        "2",
        "c10d",
        3,
    )
    assert options.rdzv_endpoint == "$first:29500" and dict(directives)["ntasks-per-node"] == "1"
    seconds = int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", text)[1])
    assert seconds < int(dict(directives)["signal"].split("@")[1])  # the save ends before SLURM kills


def test_skypilot_task():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for keys, types in ((task, TASK), (task["resources"], RESOURCES)):
        assert {key: type(value) for key, value in keys.items()} == {key: types[key] for key in keys}
    assert re.fullmatch(r"[A-Z]\w*:\d+", task["resources"]["accelerators"])
    for values in (task["envs"], task["secrets"]):
        assert all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in values)
        assert all(value is None or isinstance(value, str) for value in values.values())
    assert all(path.startswith("/") and isinstance(name, str) for path, name in task["volumes"].items())
    options = check_shell(task["run"])
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("2", "2", "c10d")
    assert options.training_script == "$STAGE" and options.training_script_args == ["$CONFIG", "$KEYS"]


def test_both_start_each_attempt_with_a_new_store():
    for path in LAUNCH.iterdir():
        assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in path.read_text(), path
