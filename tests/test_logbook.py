"""The run folder's files and the warnings about a run's numbers."""

import json
import math
import re
import subprocess
import types

import pytest
import torch

from plumbing import logbook
from plumbing.health import Health
from plumbing.logbook import Logbook
from plumbing.parallel import World


def after(health, losses, grad_norm=1.0):
    """The warnings of these steps, by step."""
    said = {}
    for step, loss in enumerate(losses, 1):
        for line in health.after_step({"step": step, "loss": loss, "grad_norm": grad_norm}):
            said[step] = line
    return said


def test_a_loss_that_jumps_is_said_once():
    """Over twice the largest of the 20 before: 2.1 after losses of 1.0, once; noise within a factor of two is
    not.
    """
    noisy = [1.0 + 0.4 * math.sin(i) for i in range(100)]
    assert after(Health("warn"), noisy) == {}
    said = after(Health("warn"), [1.0] * 20 + [2.1] + [1.0] * 20 + [3.0])
    assert (
        list(said) == [21]
        and "step 21: loss 2.1 is over 2 times the largest of the last 20 steps" in said[21]
    )
    assert after(Health("warn"), [1.0] * 19 + [9.0]) == {}  # too early to tell
    assert after(Health("warn"), [-1.0] * 20 + [1.9]) == {} and after(Health("warn"), [-1.0] * 20 + [2.1])


def test_a_loss_that_jumps_stops_the_run_where_that_is_asked_for():
    with pytest.raises(
        FloatingPointError,
        match="step 21: loss 2.1 is over 2 times .*loss_spike='stop'; the step is not saved",
    ):
        after(Health("stop"), [1.0] * 20 + [2.1])


def test_a_gradient_that_is_zero_is_said_once():
    assert after(Health("warn"), [1.0, 1.0], grad_norm=0.0) == {}
    said = after(Health("warn"), [1.0] * 9, grad_norm=0.0)
    assert list(said) == [3] and "gradient norm 0 for 3 steps" in said[3]


def test_held_out_loss_that_rises_while_training_loss_nears_zero_is_said_once():
    def evaluations(trained, held_out):
        health = Health("warn")
        after(health, trained)
        return [
            line
            for step, loss in enumerate(held_out)
            for line in health.after_evaluation(step, {"eval/loss": loss})
        ]

    falls = [0.69] * 20 + [0.05] * 20
    said = evaluations(falls, [0.6, 0.5, 0.7, 0.9])
    assert len(said) == 1 and "held-out loss up from 0.5 to 0.7, training loss 0.05" in said[0]
    assert evaluations(falls, [0.6, 0.5, 0.505]) == []  # within 2 %
    assert (
        evaluations([0.69] * 20 + [0.3] * 20, [0.6, 0.5, 0.9]) == []
    )  # it rises, but the training loss is not near 0


def make_logbook(folder, monkeypatch, total_steps=100, loss_spike="warn"):
    monkeypatch.setattr(logbook.watchdog, "start", lambda *args: None)
    monkeypatch.setattr(logbook, "config_dict", vars)
    config = types.SimpleNamespace(
        out_dir=str(folder), fresh=False, log_every=1, tensorboard=False, loss_spike=loss_spike
    )
    return Logbook(config, World(0, 1, torch.device("cpu")), total_steps, {})


def test_torn_lines_are_named_and_left_out(tmp_path, monkeypatch, capsys, ranks):
    """A torn line in the middle, a line that is no entry, bytes that are no text: the run goes on without
    them.
    """
    lines = [
        '{"step": 1, "loss": 1.0}',
        '{"step": 2, "lo',
        "[3]",
        '{"step": 3, "loss": 3.0}',
        '{"step": 4, "loss": 4.0}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b'\n\xff\xfe{"step"\n')
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 0, "prompts": ["a"], "answers": ["b"]}\n{"step": 2, "pro\n'
    )
    log = make_logbook(tmp_path, monkeypatch)
    log.resume_at(3, tmp_path / "checkpoints/step_000003")
    said = capsys.readouterr().out
    assert re.search(r"metrics.jsonl: line 2 is torn, and is left out from now on: '\{\"step\": 2", said)
    assert "metrics.jsonl: line 3 is torn" in said and "metrics.jsonl: line 6 is torn" in said
    assert (
        "metrics.jsonl: 1 of the 3 steps before are not in it" in said
        and "samples.jsonl: line 2 is torn" in said
    )
    left = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert left == [1, 3] and len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("steps", "said"), [((1, 2, 2, 3, 3), None), ((1, 1, 3, 3), "1 of the 3 steps before are not in it")]
)
def test_a_line_that_stands_twice_is_one_step(tmp_path, monkeypatch, capsys, ranks, steps, said):
    """An editor, or a copy that was appended: as many lines as steps may still lack one."""
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    make_logbook(tmp_path, monkeypatch).resume_at(3, tmp_path / "checkpoints/step_000003")
    found = re.search(r"metrics.jsonl: (-?\d+ of the 3 steps .*?),", capsys.readouterr().out)
    assert (found and found[1]) == said


def test_a_restart_stops_at_the_same_loss_again(tmp_path, monkeypatch, capsys, ranks):
    """A restart (--max-restarts) begins between the losses of before and the one that jumped; an evaluation
    that was not finite is null. A jump that was only warned of before stops nothing.
    """
    lines = [{"step": step, "loss": 9.0 if step == 22 else 1.0} for step in range(1, 31)]
    lines.insert(4, {"step": 4, "eval/loss": None})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = make_logbook(tmp_path, monkeypatch, loss_spike="stop")
    log.resume_at(30, tmp_path / "checkpoints/step_000030")
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(FloatingPointError, match="step 31: loss 19 is over 2 times"):
        log.step(31, {"loss": 19.0, "grad_norm": 1.0}, 100, 0)


def test_lines_that_no_checkpoint_holds_are_not_dropped_in_silence(tmp_path, monkeypatch, capsys, ranks):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' * 21)
    make_logbook(tmp_path, monkeypatch).resume_at(0)
    said = "metrics.jsonl: 21 lines of a run without a checkpoint are written over"
    assert said in capsys.readouterr().out


def test_step_line_says_the_time_so_far_and_the_time_left(tmp_path, monkeypatch, ranks):
    log = make_logbook(tmp_path, monkeypatch)
    log.resume_at(20)
    line = log._step_line({"step": 30, "loss": 0.5}, seconds=50.0)  # 10 steps in 50 s: 70 more take 350 s
    assert line == "step 00030/00100 | loss 0.5000 | 0:50 < 5:50"
    assert logbook._clock(4584) == "1:16:24" and logbook._clock(59.6) == "1:00"


def test_manifest_tells_changes_of_tracked_files_only(tmp_path, monkeypatch):
    """An untracked file changes nothing; a changed one is in changes.diff, whose hash is in the manifest."""
    repository = tmp_path / "checkout"
    repository.mkdir()
    for command in (["init", "-q"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    (repository / "model.py").write_text("x = 1\n")
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    subprocess.run(["git", "commit", "-qm", "one"], cwd=repository, check=True)
    monkeypatch.setattr(logbook, "ROOT", repository)
    (repository / "notes.txt").write_text("mine")
    make_logbook(tmp_path / "clean", monkeypatch)
    manifest = json.loads((tmp_path / "clean/manifest.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", manifest["commit"]) and "changes_sha256" not in manifest
    assert not (tmp_path / "clean/changes.diff").exists()
    (repository / "model.py").write_text("x = 2\n")
    make_logbook(tmp_path / "changed", monkeypatch)
    manifest = json.loads((tmp_path / "changed/manifest.json").read_text())
    assert manifest["commit"].endswith("+changes")
    assert "+x = 2" in (tmp_path / "changed/changes.diff").read_text()
    assert (
        manifest["changes_sha256"]
        == logbook.hashlib.sha256((tmp_path / "changed/changes.diff").read_bytes()).hexdigest()
    )
