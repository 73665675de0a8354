"""Whole runs: the same numbers on 1, 2, 4 and 8 processes, exact resume, signals, NaN, the reference cache,
bad input, no network.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from world import (
    FORKED_RANKS,
    ROOT,
    change_weights,
    final_weights,
    largest_difference,
    launch,
    metrics,
    run_script,
    save_at_once,
    signal_after,
    stage_parts,
    trace,
    write_config,
)

import model
import train_dpo
import train_sft
import training
from plumbing import checkpoint, logbook, restarts, watchdog, weights

pytestmark = pytest.mark.slow

LORA = dict(lora_rank=4, lora_alpha=8.0)
SPLIT = dict(precision="bf16")  # one process: split masters; several: sharded float32
COMPACT = dict(precision="bf16", moments="bf16", gradients="bf16")
CASES = {"sft": ("sft", {}), "dpo": ("dpo", {}), "sft_lora": ("sft", LORA), "dpo_lora": ("dpo", LORA), "sft_split": ("sft", SPLIT),
         "dpo_compact": ("dpo", COMPACT)}  # fmt: skip
SIX_STEPS = dict(max_steps=6, weight_decay=0.1)  # two epochs of 16, 16 and 3


@pytest.fixture(scope="session")
def baseline(world, tmp_path_factory):
    """baseline(case) -> the run folder of six uninterrupted steps in one process."""
    runs = {}

    def run(case):
        if case not in runs:
            stage, keys = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            launch(stage, write_config(folder, world, **SIX_STEPS, **keys)).ok()
            runs[case] = folder / stage
        return runs[case]

    return run


def final_bytes(run):
    return (run / "final/model.safetensors").read_bytes()


def numbers(run):
    """The metrics of all steps that are no measurement of time or memory."""
    measured = ("step_s", "tokens_per_s", "peak_mem_gib", "padding_waste")
    return [{key: value for key, value in line.items() if key not in measured} for line in metrics(run)]


def first_step(outcome):
    """The first optimizer step that a successful run trained."""
    return int(re.search(r"step (\d+)/", outcome.ok().out[0])[1])


def assert_same_run(run, other, tolerance=2e-6):
    """Losses, norms, rewards, rates per step and final weights, to fp32 reduction order."""
    assert [line.keys() for line in numbers(run)] == [line.keys() for line in numbers(other)]
    for here, there in zip(numbers(run), numbers(other)):
        assert here["lr"] == there["lr"]
        assert here == pytest.approx(there, rel=10 * tolerance, abs=10 * tolerance)
    torch.testing.assert_close(trace(run, "loss"), trace(other, "loss"), rtol=tolerance, atol=tolerance)
    assert largest_difference(final_weights(run), final_weights(other)) <= tolerance


# ---------------------------------------------------------------- any number of processes


@pytest.mark.parametrize("case, count", [
    ("sft", 2), ("sft", 4), ("sft", 8), ("dpo", 2), ("dpo", 4), ("dpo_lora", 2), ("dpo_lora", 4), ("dpo_lora", 8),
])  # fmt: skip
def test_any_number_of_ranks(world, tmp_path, baseline, case, count):
    """CHECKS 1-4, 24: steps 3 and 6 have 3 examples, so that 4 and 8 ranks have empty micro-batches."""
    stage, keys = CASES[case]
    launch(stage, write_config(tmp_path, world, **SIX_STEPS, **keys), ranks=count).ok()
    assert_same_run(tmp_path / stage, baseline(case))
    rates = trace(tmp_path / stage, "lr").flatten().tolist()
    assert rates == pytest.approx([1e-2 * factor for factor in (0, 1, 0.8, 0.6, 0.4, 0.2)])


def copy_after(step, folder):
    """For launch: copy the run folder once that step is saved, which is what a kill would leave."""
    save_at_once()
    save = checkpoint.Checkpointer.save

    def hooked(self, done, *args):
        save(self, done, *args)
        if done == step and dist.get_rank() == 0:
            shutil.copytree(self.run_dir, folder)

    checkpoint.Checkpointer.save = hooked


def test_two_machines(world, tmp_path, baseline):
    """Shards in each machine of two ranks: the numbers of one process. Their checkpoint has each row once; what
    goes on from it ends in the same bytes on the two machines, and in the same numbers on one process."""
    config = write_config(tmp_path, world, save_every=3, **SIX_STEPS)
    hybrid, on_two_machines = "--sharding=hybrid", dict(ranks=4, machine=2)
    copies = [tmp_path / "two", tmp_path / "one"]
    launch("sft", config, hybrid, **on_two_machines, prepare=partial(copy_after, 3, copies[0])).ok()
    assert_same_run(tmp_path / "sft", baseline("sft"))
    assert json.loads((tmp_path / "sft/manifest.json").read_text())["sharding"] == "hybrid"

    shutil.copytree(*copies)
    files = [load_tensors(path) for path in copies[0].glob("checkpoints/step_000003/rank_*.safetensors")]
    rows = [len(rows["param/model.embed_tokens.weight"]) for rows in files]
    assert len(rows) == 4 and sum(rows) == len(final_weights(tmp_path / "sft")["model.embed_tokens.weight"])
    assert first_step(launch("sft", config, hybrid, f"--out_dir={copies[0]}", **on_two_machines)) == 4
    assert final_bytes(copies[0]) == final_bytes(tmp_path / "sft")
    assert first_step(launch("sft", config, f"--out_dir={copies[1]}")) == 4
    assert_same_run(copies[1], baseline("sft"))


def test_two_machines_go_on_where_one_process_was_killed(world, tmp_path, baseline):
    """LoRA, DPO: steps 4 to 6, the export and its merged adapters are theirs."""
    stage, keys = CASES["dpo_lora"]
    config = write_config(tmp_path, world, save_every=3, **SIX_STEPS, **keys)
    launch(stage, config, prepare=partial(save_at_once, kill_after=3))
    assert first_step(launch(stage, config, "--sharding=hybrid", ranks=4, machine=2)) == 4
    assert_same_run(tmp_path / stage, baseline("dpo_lora"))


def test_torchrun(world, tmp_path, baseline):
    """The command of the README: torchrun itself starts the ranks and sets their variables."""
    config = write_config(tmp_path, world, **SIX_STEPS)
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "train_dpo.py", str(config)]
    done = run_script(arguments, ROOT, FORKED_RANKS)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "dpo", baseline("dpo"))


def test_one_process_without_torchrun(world, tmp_path, baseline):
    """`python train_sft.py CONFIG --key=value`."""
    config = write_config(tmp_path, world, **SIX_STEPS | {"max_steps": 2})
    command = [sys.executable, "train_sft.py", str(config), "--max_steps=6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "; 6 steps on 1 rank(s) of cpu\n" in done.stdout
    assert final_bytes(tmp_path / "sft") == final_bytes(baseline("sft"))


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("case, at", [(case, 3) for case in CASES] + [("dpo", 2), ("dpo_compact", 2)])
def test_resume_is_exact(world, tmp_path, baseline, case, at):
    """CHECKS 23: killed after step 3, the edge of an epoch, or 2, inside one, the same command goes on: the
    result is that of the uninterrupted run, byte for byte, and metrics.jsonl has each step once."""
    stage, keys = CASES[case]
    config, run = write_config(tmp_path, world, save_every=at, **SIX_STEPS, **keys), tmp_path / stage
    assert launch(stage, config, prepare=partial(save_at_once, kill_after=at)).codes == [-signal.SIGKILL]
    assert [path.name for path in run.glob("checkpoints/*")] == [f"step_{at:06d}"]
    assert len(metrics(run)) == at and not (run / "final").exists()
    assert first_step(launch(stage, config)) == at + 1
    assert numbers(run) == numbers(baseline(case))
    assert final_bytes(run) == final_bytes(baseline(case))


def killed_unsaved():
    save_at_once()
    signal_after(5, signal.SIGKILL)


@pytest.mark.parametrize("case", ["sft", "dpo", "dpo_lora"])
def test_resume_on_other_ranks(world, tmp_path, baseline, case):
    """CHECKS 23: 2 ranks, killed in step 5 with step 4 saved; 1 rank trains step 5 again. The reference cache
    is gone by then: CHECKS 6: it is made again from the step-0 weights, not from the trained ones, or the
    losses would not agree."""
    stage, keys = CASES[case]
    config, run = (
        write_config(tmp_path, world, save_every=2, data_eval=None, **SIX_STEPS, **keys),
        tmp_path / stage,
    )
    assert -signal.SIGKILL in launch(stage, config, ranks=2, prepare=killed_unsaved).codes
    assert len(metrics(run)) == 5
    shutil.rmtree(tmp_path / "cache")
    assert first_step(launch(stage, config)) == 5
    assert_same_run(run, baseline(case))
    launch(stage, config).ok()  # trains nothing
    processes = json.loads((run / "manifest.json").read_text())["processes"]
    assert [(process["after_step"], process["world_size"]) for process in processes] == [(0, 2), (4, 1)]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_split_masters_resume_as_sharded_ones(world, tmp_path, baseline, before, after):
    """A checkpoint holds float32 weights, however they are kept: one process in bf16 goes on as two of FSDP2,
    and the other way round. The losses of the whole run are the same to bf16's rounding; what is read back is
    what was saved, to the bit."""
    keys = SIX_STEPS | SPLIT | dict(save_every=3, data_eval=None, sharding="full")
    config, run = write_config(tmp_path, world, **keys), tmp_path / "sft"
    assert (
        -signal.SIGKILL
        in launch("sft", config, ranks=before, prepare=partial(save_at_once, kill_after=3)).codes
    )
    saved = [load_tensors(path) for path in sorted(run.glob("checkpoints/step_000003/rank_*.safetensors"))]
    assert all(tensor.dtype == torch.float32 for rows in saved for tensor in rows.values())
    weights = [tensor for rows in saved for name, tensor in rows.items() if name.startswith("param/")]
    assert any(
        not torch.equal(weight, weight.bfloat16().float()) for weight in weights
    )  # more than bf16 holds
    assert first_step(launch("sft", config, ranks=after)) == 4
    losses, expected = ([line["loss"] for line in metrics(folder)] for folder in (run, baseline("sft_split")))
    assert losses == pytest.approx(expected, rel=5e-3) and len(losses) == 6


def test_bf16_state_on_two_ranks(world, tmp_path):
    """Moments and gradients in bf16, and the losses of one process to bf16's rounding; FSDP2 has neither."""
    config, traces = write_config(tmp_path, world, **COMPACT), []
    for ranks in (1, 2):
        outcome = launch("dpo", config, f"--out_dir={tmp_path}/{ranks}", ranks=ranks).ok()
        traces.append([line["loss"] for line in metrics(tmp_path / str(ranks))])
    assert "sharding=optimizer" in outcome.out[0]
    assert traces[1] == pytest.approx(traces[0], rel=2e-2)
    refused = launch("dpo", config, "--sharding=full", ranks=2)
    assert all(refused.codes) and "FSDP2 keeps both in float32" in refused.err[0]


@pytest.mark.parametrize("number, count", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_signals_stop_after_the_step(world, tmp_path, baseline, number, count):
    """The step is finished and saved, though save_every is not set; all ranks stop though only the last got
    the signal; the message says how to go on, and going on gives the uninterrupted run."""
    config, run = write_config(tmp_path, world, **SIX_STEPS), tmp_path / "dpo"
    stopped = launch("dpo", config, ranks=count, prepare=partial(signal_after, 2, number, rank=count - 1))
    assert stopped.codes == [128 + number] * count
    assert (
        f"stopped by signal {int(number)} after step 2, saved; the same command goes on from there"
        in stopped.out[0]
    )
    assert not any("Traceback" in text for text in stopped.err)
    assert len(metrics(run)) == 2
    assert first_step(launch("dpo", config)) == 3
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert_same_run(run, baseline("dpo"))


def killed_after_evaluation():
    save_at_once()
    signal_after(3, signal.SIGKILL)


def test_evaluations_are_logged_once(world, tmp_path):
    """Killed just after the evaluation at the saved step: it is made again, not logged twice. A torn last
    line does not stop the run.
    """
    keys = dict(data_eval={f"{world}/pref.jsonl": 8}, eval_every=2, save_every=2)
    config, run = write_config(tmp_path, world, dpo=keys), tmp_path / "dpo"
    launch("dpo", config, prepare=killed_after_evaluation)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    launch("dpo", config).ok()
    assert [line["step"] for line in metrics(run, "eval/loss")] == [0, 2, 4]
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    first, *_, last = metrics(run, "eval/loss")
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) and first["eval/rewards/margins"] == 0.0
    assert last["eval/rewards/margins"] > 0.1


def of_a_job(number, count):
    """Nobody typed the command again where SLURM counts a restart."""
    os.environ |= {"SLURM_JOB_ID": str(number), "SLURM_RESTART_COUNT": str(count)}


def test_fresh_starts_over(world, tmp_path):
    config, run = write_config(tmp_path, world, save_every=2), tmp_path / "sft"
    launch("sft", config).ok()
    first = final_bytes(run)
    again = launch("sft", config, ranks=2).ok().out[0]
    assert (
        "step 0" not in again
        and "sft/final: this run is finished; nothing is trained. --fresh starts it over" in again
    )
    # once more in the same job, and in one whose first attempt died before it had started over
    for job, count in ((7, 0), (7, 0), (8, 1)):
        prepare = partial(of_a_job, job, count)
        assert "step 00001" in launch("sft", config, "--fresh", prepare=prepare).ok().out[0]
        assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    restarted = launch("sft", config, "--fresh", prepare=partial(of_a_job, 8, 1)).ok().out[0]
    assert "--fresh: not again, this is a restart" in restarted and "nothing is trained" in restarted
    assert final_bytes(run) == first


def killed_before_the_manifest():
    logbook.Logbook._describe = lambda log: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("key", ["--lr=0.01", "--lr=0.003"])
def test_fresh_is_withdrawn_from_a_finished_run_at_once(world, tmp_path, key):
    """A new run that dies at its start, of the same settings or others, is trained by the same command."""
    config, run = write_config(tmp_path, world, save_every=2), tmp_path / "sft"
    launch("sft", config).ok()
    first = final_bytes(run)
    assert any(launch("sft", config, "--fresh", key, prepare=killed_before_the_manifest).codes)
    assert not list((run / "checkpoints").iterdir()) and final_bytes(run) == first
    again = launch("sft", config, key).ok().out[0]
    assert "step 00001" in again and "then it is replaced" in again
    assert (final_bytes(run) == first) == (key == "--lr=0.01")


def of_two_machines(folder):
    """Rank 0 in folder/0, rank 1 in folder/1."""
    os.chdir(folder / os.environ["RANK"])


@pytest.mark.parametrize("differs", ["weights", "lr", "save_every"])
def test_machines_that_differ_are_refused(world, tmp_path, differs):
    """Where disks are not shared, a name may mean two models, or two configs: a mixture, or a deadlock."""
    for rank in (0, 1):
        shutil.copytree(world / "base", tmp_path / f"{rank}/base")
    if differs == "weights":
        change_weights(tmp_path / "1/base", lambda weights: weights["model.norm.weight"].mul_(1.5))
    config = write_config(tmp_path, world, model_path="base")
    if differs != "weights":
        text = f"import os\nsft |= dict({differs}=1 + int(os.environ['RANK']))\n"
        config.write_text(config.read_text() + text)
    outcome = launch("sft", config, ranks=2, machine=1, prepare=partial(of_two_machines, tmp_path))
    assert outcome.codes == [1, 1], outcome.err
    expected = "expected the same command and files on every machine, unchanged while a run starts"
    assert f"error: {differs}: not the same on all ranks; {expected}\n" in "".join(outcome.err)
    assert not (tmp_path / "sft/checkpoints").exists() and not (tmp_path / "sft/metrics.jsonl").exists()


def test_a_deleted_manifest_is_made_anew(world, tmp_path):
    """As docs/troubleshooting.md advises for a torn one: the run goes on from its checkpoint, and exports."""
    config, run = write_config(tmp_path, world, save_every=2), tmp_path / "sft"
    launch("sft", config).ok()
    first = final_bytes(run)
    (run / "manifest.json").unlink()
    assert "step_000004: goes on after step 4 of 4" in launch("sft", config).ok().out[0]
    assert "finished" in json.loads((run / "manifest.json").read_text()) and final_bytes(run) == first
    shutil.rmtree(run / "checkpoints")
    (run / "manifest.json").unlink()
    expect_message(launch("sft", config, "--lr=0.5"), "sft/final was saved under another configuration: lr=")
    assert final_bytes(run) == first


def test_fresh_starts_over_once_a_torchrun(tmp_path, monkeypatch, ranks):
    """Where one of several torchruns is new, and by the start of the process, whose number may come again."""

    def under(*agents):
        monkeypatch.setattr(restarts, "_names_of_all_ranks", lambda: set(agents))

    under("torchrun: process 7 on a", "torchrun: process 7 on b")
    assert not restarts.started_over(tmp_path, ranks)
    restarts.record(tmp_path, ranks)
    under("torchrun: process 9 on a", "torchrun: process 7 on b")
    assert restarts.started_over(tmp_path, ranks)
    under("torchrun: process 9 on a", "torchrun: process 9 on b")
    assert not restarts.started_over(tmp_path, ranks)
    monkeypatch.undo()
    assert restarts._names() == [] == list(restarts._names_of_all_ranks())  # of a process without a launcher
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    (name,) = restarts._names_of_all_ranks()
    assert f"process {os.getppid()} on " in name and name.endswith(restarts._started(os.getppid()))


def test_a_finished_run_of_other_settings_is_not_replaced(world, tmp_path):
    """Without any checkpoint too; the same command trains nothing, or, when the export is damaged, says so
    and trains again.
    """
    config, run = write_config(tmp_path, world, max_steps=3, data_eval=None), tmp_path / "sft"
    launch("sft", config).ok()
    first = final_bytes(run)
    refused = launch("sft", config, "--lr=0.5", ranks=2)
    assert refused.codes == [1, 1] and "final was saved under another configuration: lr=" in refused.err[0]
    assert final_bytes(run) == first
    assert "this run is finished; nothing is trained" in launch("sft", config).ok().out[0]
    (run / "final/config.json").write_text("{}")
    again = launch("sft", config).ok().out[0]
    assert "final: config.json: damaged" in again and final_bytes(run) == first
    assert re.search(
        r"final: of a finished run .*: 3 steps are trained again, then it is replaced\n(.*\n)*step 00001",
        again,
    )
    fresh = launch("sft", config, "--lr=0.5", "--fresh").ok().out[0]
    assert "step 00001" in fresh and "finished run" not in fresh
    assert final_bytes(run) != first


def test_an_export_that_could_not_be_written_is_refused_before_training(world, tmp_path):
    """A file of someone else's in final/ would stop the export, after hours; nothing is deleted, not by
    --fresh either.
    """
    config, run = write_config(tmp_path, world, max_steps=2, save_every=1, data_eval=None), tmp_path / "sft"
    launch("sft", config).ok()
    (run / "final/model-f16.gguf").touch()
    before = sorted(path for path in run.rglob("*"))
    for count in (1, 2):
        refused = launch("sft", config, "--fresh", "--lr=0.5", ranks=count)
        assert (
            refused.codes == [1] * count and "holds model-f16.gguf, which no export wrote" in refused.err[0]
        )
        assert "step 00001" not in refused.out[0] and sorted(path for path in run.rglob("*")) == before


def killed_while_the_card_is_written():
    rename = Path.rename

    def killed(self, target):
        if Path(target).name == "README.md":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = killed


def test_a_kill_while_the_card_is_written(world, tmp_path):
    """What it leaves is not taken for someone else's file in final/, which would be refused from then on, by
    --fresh too.
    """
    config = write_config(tmp_path, world, max_steps=1, warmup_steps=0, data_eval=None)
    assert launch("sft", config, prepare=killed_while_the_card_is_written).codes == [-signal.SIGKILL]
    launch("sft", config).ok()
    assert (tmp_path / "sft/final/README.md").is_file()


def test_held_out_data_are_part_of_the_run(world, tmp_path):
    """Other held-out rows under the same path: the numbers of the two halves could not be compared."""
    held_out = tmp_path / "held_out.jsonl"
    shutil.copy(world / "sft.jsonl", held_out)
    config = write_config(tmp_path, world, max_steps=4, save_every=2, sft=dict(data_eval={str(held_out): 8}))
    launch("sft", config, prepare=partial(signal_after, 2, signal.SIGTERM))
    rows = held_out.read_text().splitlines(keepends=True)
    held_out.write_text("".join(reversed(rows)))
    refused = launch("sft", config)
    assert (
        refused.codes == [1]
        and "step_000002 was saved under another configuration: held_out=" in refused.err[0]
    )


def interrupted(name):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    setattr(train_dpo, name, lambda *args, **keys: os.kill(os.getpid(), signal.SIGINT))


@pytest.mark.parametrize("name", ["load_preferences", "_compute_reference"])
def test_ctrl_c_before_the_first_step_is_one_line(world, tmp_path, name):
    """While the data are tokenised, and in the reference pass."""
    stopped = launch("dpo", write_config(tmp_path, world), prepare=partial(interrupted, name))
    assert stopped.codes == [130] and "Traceback" not in stopped.err[0]
    assert (
        "stopped by Ctrl-C; what was finished is kept, and the same command goes on from there"
        in stopped.err[0]
    )


def killed_by_sigint_in_the_export():
    save = train_sft.training.save_model
    train_sft.training.save_model = lambda *args: os.kill(os.getpid(), signal.SIGINT) or save(*args)
    train_sft.training.hub.open_for_push = print  # no hub is asked


def test_ctrl_c_during_the_export_is_said_and_the_export_finished(world, tmp_path):
    """And `train_sft.py .. && train_dpo.py ..` ends there; nothing is pushed."""
    config = write_config(tmp_path, world, max_steps=1, warmup_steps=0)
    done = launch("sft", config, "--push=org/name", prepare=killed_by_sigint_in_the_export)
    assert done.codes == [130], done.err[0]
    assert "signal 2: what runs now, a step or the export, is finished first" in done.err[0]
    assert "stopped by signal 2 after the export; nothing is pushed" in done.out[0]
    assert (tmp_path / "sft/final/hashes.json").is_file() and "finished" in json.loads(
        (tmp_path / "sft/manifest.json").read_text()
    )


def hang(rank, step):
    """Rank `rank` falls asleep before step `step` is logged; patience is seconds."""
    watchdog.PATIENCE = 3.0
    original = logbook.Logbook.step

    def hooked(self, done, *args):
        if done == step and self.world.rank == rank:
            time.sleep(1000)
        original(self, done, *args)

    logbook.Logbook.step = hooked


@pytest.mark.parametrize("rank, step", [(0, 3), (1, 1)])
def test_a_rank_that_hangs_is_named(world, tmp_path, rank, step):
    """With its last step and the line that it is in, and its stacks; no rank is left behind."""
    outcome = launch("sft", write_config(tmp_path, world), ranks=2, prepare=partial(hang, rank, step))
    assert all(outcome.codes)
    said = "".join(outcome.err)
    since = f"after step {step - 1}" if step > 1 else "before the first step"
    assert re.search(rf"error: no progress for \d+ s {since}; what hangs: rank {rank}\n", said)
    assert f"rank {rank}, step {step - 1}: tests/test_runs.py:" in said and "hooked" in said
    assert re.search(
        rf"rank {1 - rank}, step [{step - 1}{step}]: waits for the others, plumbing/parallel.py:\d+", said
    )
    assert f"rank {rank}: no progress {since}; its stacks:" in said and "Current thread" in said


def hang_while_loading(rank):
    watchdog.PATIENCE = 1.0
    load = train_sft.training.load_weights
    train_sft.training.load_weights = lambda *args: (
        load(*args) if os.environ["RANK"] != str(rank) else time.sleep(1000)
    )


def test_a_rank_that_hangs_while_it_loads_is_named(world, tmp_path):
    outcome = launch("sft", write_config(tmp_path, world), ranks=2, prepare=partial(hang_while_loading, 1))
    assert all(outcome.codes)
    assert re.search(
        r"error: no progress for \d+ s before the first step; what hangs: rank 1\n", "".join(outcome.err)
    )


def export_slowly():
    """Rank 0 takes longer than the patience over all tensors, and not over any of them."""
    watchdog.PATIENCE = 4.0  # the watch looks twenty times in it
    save, is_finite = training.save_model, weights.is_finite

    def slow(tensor):
        time.sleep(0.2 * (os.environ["RANK"] == "0"))
        return is_finite(tensor)

    def hooked(*args):
        watchdog._watch.patience = 1.5
        weights.is_finite = slow
        return save(*args)

    training.save_model = hooked


@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_ranks_that_wait_for_an_export_do_not_end_it(world, tmp_path, sharding):
    """Under "optimizer" every rank has all of the weights, and would be through with them at once."""
    config = write_config(tmp_path, world, max_steps=1, warmup_steps=0, sharding=sharding, **LORA)
    start = time.monotonic()
    assert "final" in launch("sft", config, ranks=2, prepare=export_slowly).ok().out[0]
    assert time.monotonic() - start > 4


def test_two_runs_in_one_folder(world, tmp_path):
    """The second one ends at once, --fresh too, and the first goes on undisturbed."""
    config = write_config(tmp_path, world, max_steps=3)
    first = []
    release = tmp_path / "release"
    thread = threading.Thread(
        target=lambda: first.append(launch("sft", config, prepare=partial(wait_for, release)))
    )
    thread.start()
    while thread.is_alive() and not (tmp_path / "sft/manifest.json").exists():
        time.sleep(0.1)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(config, other)
    for flag in ("--lr=0.5", "--fresh"):
        second = launch("sft", other / "config.py", flag)
        assert second.codes == [1] and re.search(r"error: .*/sft: in use by process \d+ on ", second.err[0])
    assert thread.is_alive()
    release.touch()
    thread.join()
    first[0].ok()
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [1, 2, 3]


def wait_for(release):
    """Every step waits until the file is there."""
    original = logbook.Logbook.step

    def hooked(self, done, *args):
        original(self, done, *args)
        while not release.exists():
            time.sleep(0.05)

    logbook.Logbook.step = hooked


# ---------------------------------------------------------------- the reference


def test_reference_cache_of_a_run(world, tmp_path):
    """CHECKS 6, 7, 27: computed with a bar from the first second; found again, whatever the ranks and the
    batch size; a miss when the weights under the same path change."""
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    config = write_config(tmp_path, world, model_path=str(base), max_steps=3)
    first = launch("dpo", config).ok()
    assert re.search(
        r"reference log-probs \(0 of 35 pairs found\):   0%.* 0/3 \[00:00<\?, \?batch/s\]", first.err[0]
    )
    assert "3/3" in first.err[0]

    second = launch("dpo", config, "--fresh", "--global_batch_size=10", ranks=2).ok()
    assert "35 of 35 pairs found" in second.err[0] and "10 pairs computed again" in second.out[0]
    again = launch("dpo", config, "--fresh").ok()
    assert "16 pairs computed again, largest difference 0.0e+00" in again.out[0]

    change_weights(base, lambda weights: weights["model.norm.weight"].mul_(1.5))
    third = launch("dpo", config, "--fresh").ok()
    assert "0 of 35 pairs found" in third.err[0]
    assert metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def unverified():
    train_dpo._verify_reference = lambda *_: None


def test_wrong_reference_stops_the_run(world, tmp_path):
    """CHECKS 5, 6: one wrong pair, found when the file is, and, were it not, in step 1; no step is taken."""
    config = write_config(tmp_path, world, max_steps=3)
    launch("dpo", config).ok()
    (path,) = tmp_path.glob("cache/reference/*.safetensors")
    table = load_file(path)["logps"]
    last_of_step_1 = train_dpo.step_examples(0, 35, 16, 42)[-1]
    table[last_of_step_1] += 0.1
    train_dpo._write_table(path, table)
    for prepare, message in (
        (None, "not this model's log-probs"),
        (unverified, "the reference is not of model_path"),
    ):
        failed = launch("dpo", config, "--fresh", prepare=prepare)
        assert failed.codes == [1] and "Traceback" not in failed.err[0]
        assert message in failed.err[0] and "step 00001" not in failed.out[0]


def count_models():
    """Print the number of Llamas and of parameters whenever one is built."""
    original = model.Llama.__init__

    def counted(self, config):
        original(self, config)
        print("built a Llama of", sum(param.numel() for param in self.parameters()))

    model.Llama.__init__ = counted


def test_lora_sft_then_lora_dpo(world, tmp_path, ranks):
    """CHECKS 22: the reference of DPO is the merged SFT, not the base. CHECKS 9: there is one model in
    memory, policy and reference.
    """
    from transformers import AutoModelForCausalLM

    config = write_config(tmp_path, world, **LORA, dpo=dict(model_path=f"{tmp_path}/sft/final"))
    launch("sft", config).ok()
    base, merged = load_tensors(world / "base/model.safetensors"), final_weights(tmp_path / "sft")
    assert largest_difference(base, merged) > 1e-3
    done = launch("dpo", config, prepare=count_models).ok()
    assert done.out[0].count("built a Llama") == 1
    assert "largest |policy - reference| 0.0e+00" in done.out[0]
    assert metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)

    (path,) = tmp_path.glob("cache/reference/*.safetensors")
    _, pairs, _ = stage_parts("dpo", config, ranks)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "sft/final")
    for i in range(3):
        for column, side in enumerate((pairs.chosen, pairs.rejected)):
            ids, mask = (torch.from_numpy(np.array(values)).long() for values in side[i])
            with torch.no_grad():
                logps = reference(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            assert load_file(path)["logps"][i, column] == pytest.approx(
                logps[mask[1:].bool()].sum().item(), rel=1e-4
            )


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stage, count", [("sft", 1), ("sft", 2), ("dpo", 1), ("dpo", 2)])
def test_broken_weights_stop_the_run(world, tmp_path, stage, count, value):
    """CHECKS 24: no step taken, rows named, exit code 1 on every rank, no hang."""
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    change_weights(base, lambda weights: weights["model.layers.1.mlp.down_proj.weight"][3].fill_(value))
    failed = launch(stage, write_config(tmp_path, world, model_path=str(base)), ranks=count)
    assert failed.codes == [1] * count
    what = {"sft": "the loss is", "dpo": "the reference's log-probs are"}[stage]
    assert all(f"{what} not finite; no step was taken" in text for text in failed.err)
    assert not any("Traceback" in text for text in failed.err)
    assert re.search(r"(sft|pref)\.jsonl#\d+", failed.err[0])
    assert not (tmp_path / stage / "final").exists()


def break_row(stage, row, where):
    """Training on this row gives a loss ("forward") or a gradient ("backward") that is not finite.

    A checkpoint takes longer to write than a step.
    """
    script, name = {"sft": (train_sft, "nll_sum"), "dpo": (train_dpo, "answer_logps")}[stage]
    batches, logps, with_row = script.local_batches, getattr(script, name), []

    def watched_batches(*args):
        for members, batch, waste in batches(*args):
            if row in members and torch.is_grad_enabled():
                with_row.append(batch)
            yield members, batch, waste

    def broken_logps(model, batch, *args):
        result = logps(model, batch, *args)
        value, *rest = result if stage == "dpo" else (result,)
        if any(batch is broken for broken in with_row):
            if where == "backward":
                value.register_hook(lambda grad: grad * math.inf)
            else:
                value = value * math.nan
        return (value, *rest) if stage == "dpo" else value

    def slow_write(*args):
        time.sleep(0.5)
        return write_rows(*args)

    script.local_batches = watched_batches
    setattr(script, name, broken_logps)
    write_rows = checkpoint._write_rows
    checkpoint._write_rows = slow_write


@pytest.mark.parametrize(
    "stage, count, where",
    [("sft", 2, "forward"), ("dpo", 2, "forward"), ("sft", 2, "backward"), ("dpo", 1, "backward")],
)
def test_one_bad_row_stops_the_run(world, tmp_path, stage, count, where):
    """CHECKS 24: in step 2 one row, so one of two ranks, has a NaN loss, or an infinite gradient: all stop,
    the row is named, step 1 is all that was logged, and the checkpoint of step 1, half written then, is finished.
    """
    row = int(train_sft.step_examples(1, 35, 16, 42)[5])
    config, run = write_config(tmp_path, world, save_every=1), tmp_path / stage
    failed = launch(stage, config, ranks=count, prepare=partial(break_row, stage, row, where))
    assert failed.codes == [1] * count
    what = {"forward": "the loss is not finite; no step was taken", "backward": "the gradient norm is"}[where]
    assert all(what in text and "Traceback" not in text for text in failed.err)
    assert any(re.search(rf"(sft|pref)\.jsonl#{row}\b", text) for text in failed.err)
    assert len(metrics(run)) == 1 and not (run / "final").exists()
    assert (run / "checkpoints/step_000001/COMPLETED").exists()


# ---------------------------------------------------------------- bad input


def other_tokenizer(base):
    """One whose vocabulary is larger than the model's embedding."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 9000, "content": "<|more|>"})
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


def truncate_weights(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def shape(base, **changes):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_BASES = {
    "missing file": (
        lambda base: (base / "model.safetensors").unlink(),
        "missing weight files: model.safetensors",
    ),
    "truncated file": (truncate_weights, "truncated, or not a safetensors file"),
    "missing tensor": (lambda base: drop_tensor(base, "model.norm.weight"), "model.norm.weight"),
    "no tokenizer": (lambda base: (base / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    "other tokenizer": (other_tokenizer, "the model's embedding only has vocab_size="),
    "no config": (lambda base: (base / "config.json").unlink(), "no config.json there"),
    "positions": (
        partial(shape, max_position_embeddings=63),
        "max_seq_len=64: expected at most the model's max_position_embeddings=63",
    ),
    "window": (
        partial(shape, model_type="mistral", sliding_window=63),
        "max_seq_len=64: expected at most the model's sliding_window=63",
    ),
}


def drop_tensor(base, name):
    change_weights(base, lambda weights: weights.pop(name))


@pytest.mark.parametrize("case", BAD_BASES)
def test_bad_model(world, tmp_path, case):
    """All but missing and broken weights before the data are tokenised."""
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    change, message = BAD_BASES[case]
    change(base)
    expect_message(launch("sft", write_config(tmp_path, world, model_path=str(base))), message)
    assert case in ("missing file", "truncated file", "missing tensor") or not (tmp_path / "cache").exists()


BAD_DATA = {
    "empty": ("", "no rows"),
    "not json": ("{garbage", "row 0: Expecting property name"),
    "torn": ('{"messages": [{"role": "user", "content": "a"}]}\n{"mess', "row 1: Unterminated string"),
    "schema": ('{"text": "a"}\n', "columns text (str); expected one of: messages"),
    "row": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}\n',
        "row 0: message 1: role='robot'",
    ),
    "no answers": (
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        "1 dropped without an assistant turn",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(world, tmp_path, case):
    """Named by source and row."""
    text, message = BAD_DATA[case]
    (tmp_path / "bad.jsonl").write_text(text)
    failed = launch("sft", write_config(tmp_path, world, sft=dict(data={f"{tmp_path}/bad.jsonl": 1.0})))
    expect_message(failed, message)
    assert case == "no answers" or f"{tmp_path}/bad.jsonl" in failed.err[0]


BAD_COMMANDS = {
    "typo": (["--bta=1"], 1, "unknown key 'bta', did you mean 'beta'?"),
    "type": (["--lr=fast"], 1, "lr"),
    "ranks": (["--global_batch_size=1"], 2, "a batch that cannot be formed on 2 ranks"),
    "model": (["--model_path=nowhere"], 1, "no such folder"),
    "missing data": (["--max_seq_len=4000"], 1, "expected at least twice max_seq_len=4000"),
    "float8": (["--precision=fp8"], 1, "multiples of 16, the model has (32, 56, 32, 16)"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_command(world, tmp_path, case):
    """CHECKS 3, 25. Before the data are tokenised."""
    args, count, message = BAD_COMMANDS[case]
    expect_message(launch("dpo", write_config(tmp_path, world), *args, ranks=count), message)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("where", ["data", "model"])
def test_bad_input_on_two_ranks(world, tmp_path, where):
    """Rank 0 looks first: the message comes once, and nobody hangs."""
    keys = {"data": dict(dpo=dict(data={"nowhere.jsonl": 1.0})), "model": dict(model_path="nowhere")}[where]
    failed = launch("dpo", write_config(tmp_path, world, **keys), ranks=2)
    assert failed.codes == [1, 1] and "error: " in failed.err[0] and "no such f" in failed.err[0]
    assert not failed.err[1] and "Traceback" not in failed.err[0]


def left_by(run):
    """{file: content} of a run folder, but for the lock, which names the last process."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


def test_checkpoint_of_another_config(world, tmp_path):
    """Refused naming the key, and what the earlier run left is as it was; keys that do not decide the numbers
    may change.
    """
    config, run = write_config(tmp_path, world, save_every=2, max_steps=4), tmp_path / "dpo"
    launch("dpo", config, prepare=partial(save_at_once, kill_after=2))
    before = left_by(run)
    expect_message(launch("dpo", config, "--beta=0.3"), "beta=5.0 there, 0.3 now")
    assert left_by(run) == before
    launch("dpo", config, "--tokens_per_microbatch=256", "--log_every=2").ok()
    launch("dpo", config, "--beta=0.3", "--fresh").ok()
    assert [
        process["after_step"] for process in json.loads((run / "manifest.json").read_text())["processes"]
    ] == [0]


def test_another_model_under_the_same_path(world, tmp_path):
    """CHECKS 6, 7: a checkpoint does not go on from other weights."""
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    config = write_config(tmp_path, world, save_every=2, max_steps=4, model_path=str(base))
    launch("dpo", config, prepare=partial(save_at_once, kill_after=2))
    change_weights(base, lambda weights: weights["model.norm.weight"].mul_(1.5))
    expect_message(launch("dpo", config), "saved under another configuration: weights=")


def expect_message(outcome, message):
    assert outcome.codes == [1] * len(outcome.codes)
    assert any(message in text for text in outcome.err), outcome.err
    assert all("error: " in text and "Traceback" not in text for text in outcome.err), outcome.err


# ---------------------------------------------------------------- the outside world


def forbid_network():
    def refuse(*args, **kwargs):
        os.write(2, b"NETWORK\n")
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, refuse)
    socket.create_connection = socket.getaddrinfo = refuse


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_no_network(world, tmp_path, stage):
    """CHECKS 26: no connection and no name is looked up; nothing is written but the run folder and the
    cache.
    """
    done = launch(stage, write_config(tmp_path, world, max_steps=2), prepare=forbid_network).ok()
    assert "NETWORK" not in done.err[0]
    assert {path.name for path in tmp_path.iterdir()} == {stage, "cache", "config.py", "logs"}
    files = {path.name for path in (tmp_path / stage).iterdir()} - {
        "changes.diff"
    }  # of a checkout with changes
    assert files == {".lock", "config.json", "manifest.json", "metrics.jsonl", "final"}
    manifest = json.loads((tmp_path / stage / "manifest.json").read_text())
    assert {"loss_reduction", "adam_eps", "warmup_rounding", "weights", "data", "versions"} <= manifest.keys()
