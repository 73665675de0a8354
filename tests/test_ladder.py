"""The ladder's table and the model card: what finished runs and sweeps say of themselves."""

import csv
import dataclasses
import hashlib
import json
import runpy
import shutil

import huggingface_hub
import pytest
from world import ROOT, launch, write_config

from families import load_pretrained
from plumbing.config import section
from plumbing.files import UserError
from plumbing.weights import fingerprint
from reports import card, folders, ladder

PAIRS = runpy.run_path(str(ROOT / "configs/pairs.py"))["PAIRS"]


def write_run(folder, stage, start, exported, *metrics):
    """A run folder of one step and of `metrics`, a dict of a later line each. exported: None for a run that
    has not ended.
    """
    folder.mkdir(parents=True)
    manifest = {"stage": stage, "weights": start} | ({"exported": exported} if exported else {})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.json").write_text(json.dumps({"loss": "simpo"}))
    lines = [{"step": 1, "loss": 2.0}, *({"step": 2} | line for line in metrics)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sweep(folder, sft, dpo, vector=b"v", is_there=True):
    """A vector between two models, and a sweep along it in which the separation rose from 1 to 3."""
    (folder / "sweep_matched").mkdir(parents=True)
    models = {f"{name}_path": str(folder.parent if is_there else folder / "gone") for name in ("sft", "dpo")}
    (folder / "manifest.json").write_text(json.dumps({"inputs": {"sft": sft, "dpo": dpo} | models}))
    (folder / "vector.safetensors").write_bytes(vector)
    inputs = {"inject": "matched", "lambdas": [0, 0.5, 1.0], "vector": hashlib.sha256(b"v").hexdigest()}
    overall = {
        "category": "overall",
        "verdict": "rising",
        "estimate": [1.0, 2.0, 3.0],
        "change": 2.0,
        "change_interval": [1.5, 2.5],
    }
    overall |= {"nulls": {"p_change": 0.05, "size_sd": 3.5}, "decision": "go on"}
    of_an_axiom = {"category": "calm", "verdict": "falling", "estimate": [9.0, 9.0, 9.0]}
    (folder / "sweep_matched/aqi.json").write_text(
        json.dumps({"inputs": inputs, "verdicts": [overall, of_an_axiom]})
    )


# ---------------------------------------------------------------- the table


def test_runs_and_sweeps_are_joined_by_their_weights(tmp_path):
    """DPO model d of SFT model s was steered along; d2 was trained after that from s, and diverged; t has no
    DPO yet; z has not ended; of two other people's models there is a sweep only; one vector was made anew
    after its sweep; one pair's models are deleted; one rung was not run."""
    accuracy = {"eval/rewards/accuracies": 0.9, "eval/rewards/accuracies_ci95": 0.05}
    write_run(tmp_path / "tiny/sft", "sft", "base", "s", {"loss": 1.0}, {"eval/loss": 1.25})
    write_run(
        tmp_path / "tiny/dpo",
        "dpo",
        "s",
        "d",
        {"rewards/accuracies": 0.5},
        {"eval/rewards/accuracies": 0.0},
        accuracy,
    )
    write_run(
        tmp_path / "again/dpo",
        "dpo",
        "s",
        "d2",
        {"eval/rewards/accuracies": None, "eval/rewards/accuracies_ci95": None},
    )
    write_run(tmp_path / "other/sft", "sft", "base", "t", {"loss": 1.0})
    write_run(tmp_path / "other/dpo", "dpo", "t", None)
    write_sweep(tmp_path / "validate/tiny", "s", "d")
    write_sweep(tmp_path / "validate/hub", "elsewhere", "elsewhere too")
    write_sweep(tmp_path / "validate/old", "s", "d", vector=b"another")
    write_sweep(tmp_path / "validate/deleted", "s9", "d9", is_there=False)
    own = {
        "tiny": dict(dpo="runs/tiny/dpo/final"),
        "new": dict(dpo="runs/new/dpo/final"),
        "far": dict(dpo="org/name"),
    }
    own["odd"] = dict(not_representable="")
    curve = ["1.00", "-", "2.00", "-", "3.00", "+2.00 [+1.50, +2.50]", "+3.5", "0.05", "rising", "go on"]
    runs, sweeps, outdated, _ = ladder.find(tmp_path)
    assert ladder.rows(runs, sweeps, own) == [
        ["validate/hub (matched)", "-", "-", "-", *curve],
        ["validate/tiny (matched)", "1.250", "0.900 ± 0.050", "-", *curve],
        ["again/dpo", "1.250", "not finite", "-", *[""] * 8, "not validated", ""],
        ["other/sft", "1.000 (train)", "-", "-", *[""] * 8, "no DPO yet", ""],
        ["new", *[""] * 11, "not run", ""],
    ]
    assert outdated == ["validate/deleted (matched)", "validate/old (matched)"]
    shutil.rmtree(tmp_path / "tiny/dpo")
    assert ladder.rows(*ladder.find(tmp_path)[:2], own)[-2:] == [
        [name, *[""] * 11, "not run", ""] for name in ("tiny", "new")
    ]


def test_the_table_without_any_run(tmp_path, capsys, monkeypatch):
    """Every rung of ours is named, no control is, and the published curves stand below; columns are aligned.
    A folder that is named must be there.
    """
    with pytest.raises(ValueError, match="nope: no such folder"):
        ladder.main(["nope"])
    monkeypatch.chdir(tmp_path)
    assert ladder.main([]) == 0
    first, head, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith("runs/: finished runs 0, sweeps 0.") and "55.00 is saturation" in last
    rungs = [
        "tiny",
        "smol",
        "olmo1b_10",
        "olmo1b_lora",
        "olmo1b",
        "pku_lora",
        "tulu10_lora",
        "tulu10",
        "tulu10_asrun",
        "tulu_full_lora",
    ]
    assert [line.split()[0] for line in lines[:11]] == [*rungs, "tulu_full"]
    assert all(line.rstrip().endswith("not run") for line in lines[:11]) and len(lines) == 17
    assert {line.index("published") for line in lines[11:]} == {head.index("verdict")}


def test_a_copy_of_a_run_hides_no_rung(tmp_path, capsys):
    """Both folders of one hash are counted, and have a line each until a sweep is of their weights."""
    write_run(tmp_path / "tiny/sft", "sft", "base", "s")
    write_run(tmp_path / "tiny/dpo", "dpo", "s", "d", {"eval/rewards/accuracies": 0.5})
    shutil.copytree(tmp_path / "tiny/dpo", tmp_path / "tiny/zdpo_copy")
    assert ladder.main([str(tmp_path)]) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert "finished runs 3, sweeps 0." in first
    assert [line.split()[0] for line in lines[:3]] == ["tiny/dpo", "tiny/zdpo_copy", "smol"]
    write_sweep(tmp_path / "validate", "s", "d")
    runs, sweeps, *_ = ladder.find(tmp_path)
    (line,) = ladder.rows(runs, sweeps, {"tiny": dict(dpo="runs/tiny/dpo/final")})
    assert line[:3] == ["validate (matched)", "2.000 (train)", "0.500"]


def test_folders_that_cannot_be_read_are_named_beside_the_others(tmp_path, capsys):
    """A torn line of a run, a torn manifest, a torn sweep: each is a line, and its rung is not called `not
    run`; the whole run stays in the table, with the step of a held-out value that is not of its last."""
    write_run(tmp_path / "smol/dpo", "dpo", "s", "d", {"eval/rewards/accuracies": 0.5}, {"step": 3})
    write_run(tmp_path / "tiny/dpo", "dpo", "s", "d2")
    with (tmp_path / "tiny/dpo/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    write_run(tmp_path / "olmo1b/dpo", "dpo", "s", "d3")
    (tmp_path / "olmo1b/dpo/manifest.json").write_text("{")
    write_sweep(tmp_path / "validate", "s", "d4")
    (tmp_path / "validate/sweep_matched/aqi.json").write_text("{")
    assert ladder.main([str(tmp_path)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "finished runs 1, sweeps 0, folders that cannot be read 3." in first
    why = [line for line in lines if line.startswith("cannot be read, ")]
    assert [line.split(": ")[:2] for line in why] == [
        ["cannot be read, olmo1b/dpo", f"{tmp_path}/olmo1b/dpo/manifest.json"],
        ["cannot be read, tiny/dpo", f"{tmp_path}/tiny/dpo/metrics.jsonl"],
        ["cannot be read, validate", f"{tmp_path}/validate/sweep_matched/aqi.json"],
    ]
    table = {line.split()[0]: line for line in lines}
    assert all(table[rung].rstrip().endswith("not readable") for rung in ("tiny", "olmo1b"))
    assert table["smol/dpo"].rstrip().endswith("not validated") and "0.500 (step 2)" in table["smol/dpo"]


def test_a_sweep_along_an_earlier_vector_is_named(tmp_path, capsys):
    write_sweep(tmp_path / "old", "s", "d", vector=b"another")
    assert ladder.main([str(tmp_path)]) == 0
    assert "there no more, or of an older version: old (matched)" in capsys.readouterr().out


def test_a_sweep_of_an_older_version_is_named(tmp_path, capsys):
    """Before the null directions a verdict had no such key."""
    write_sweep(tmp_path / "old", "s", "d")
    path = tmp_path / "old/sweep_matched/aqi.json"
    report = json.loads(path.read_text())
    del report["verdicts"][0]["nulls"]
    path.write_text(json.dumps(report))
    assert ladder.main([str(tmp_path)]) == 0
    assert "of an older version: old (matched)" in capsys.readouterr().out
    with pytest.raises(UserError, match="aqi.json: of an older version, without null directions"):
        folders.read(path.parent)


def test_published_curves_are_those_of_the_published_rows():
    """tests/golden has 13 of the 25 points of the five named models."""
    with open(ROOT / "tests/golden/aqi_published_runs.csv") as file:
        overall = [row for row in csv.DictReader(file) if row["category"] == "overall" and row["lambda"]]
    points = {(row["model"], float(row["lambda"])): row["aqi"] for row in overall}
    common = {key: aqi for key, aqi in points.items() if key[0] in ladder.PUBLISHED}
    assert len(common) == 13
    for (name, strength), aqi in common.items():
        assert ladder.PUBLISHED[name][ladder.LAMBDAS.index(strength)] == pytest.approx(
            float(aqi), abs=0.005
        ), (name, strength)


def test_every_rung_is_a_pair_of_what_its_scripts_write():
    rungs = {path.stem for path in ROOT.glob("configs/*.py")} - {"pairs"}
    assert {name: (PAIRS[name]["sft"], PAIRS[name]["dpo"]) for name in rungs} == {
        name: (f"runs/{name}/sft/final", f"runs/{name}/dpo/final") for name in rungs
    }


# ---------------------------------------------------------------- a run


@pytest.mark.slow
def test_both_stages_are_joined_and_describe_themselves(world, tmp_path):
    """The DPO run begins at the SFT run's weights; the cards parse as the hub parses them, and the models
    still load. Held-out rows that are trained on too are said, in the cards too.
    """
    (tmp_path / "runs").mkdir()
    keys = dict(data_eval={f"{world}/pref.jsonl": 8}, max_steps=2)
    config = write_config(
        tmp_path / "runs",
        world,
        sft=dict(data_eval={f"{world}/sft.jsonl": 5}),
        dpo=keys | dict(model_path=f"{tmp_path}/runs/sft/final"),
    )
    for stage, rows in (("sft", 5), ("dpo", 8), ("dpo", 8)):  # the last replaces the second's final/ and card
        done = launch(stage, config).ok()
        assert f"data_eval: {rows} of {rows} rows have a prompt" in done.out[0]
        text = (tmp_path / "runs" / stage / "final/README.md").read_text()
        assert f"of the {rows} rows of `data_eval`, of which {rows} have a prompt that was trained on" in text
    runs, *_ = ladder.find(tmp_path / "runs")
    ((sft_name, sft),) = runs["sft"].items()
    ((dpo_name, dpo),) = runs["dpo"].items()
    started, trained = sft.manifest["exported"], dpo.manifest["exported"]
    assert (sft_name, dpo_name) == ("sft", "dpo") and sft.manifest["weights"] == fingerprint(world / "base")
    assert started == dpo.manifest["weights"] != trained == fingerprint(tmp_path / "runs/dpo/final")
    steps, _ = dpo.points("loss")
    _, losses = dpo.points("eval/loss")
    assert steps[-1] == 2 and losses[0] == pytest.approx(0.693147, abs=1e-5)
    text = (tmp_path / "runs/dpo/final/README.md").read_text()
    about = huggingface_hub.ModelCard(text).data.to_dict()
    # no folder is named to the hub
    assert about == dict(
        library_name="transformers", pipeline_tag="text-generation", tags=["dpo", "glassbox"]
    )
    assert (
        "license: yours to state" in text
        and f'"weights": "{started}"' in text
        and "| `loss` | 0.6931 |" in text
    )
    load_pretrained(tmp_path / "runs/dpo/final")


def test_a_card_names_hub_sources_of_the_whole_lineage(tmp_path, monkeypatch):
    """A DPO run from a local SFT run: base model and data come from both configs, without revision and split;
    local files are left out, also one that is spelled like a hub name and is no longer there.

    The table holds every metric's first and last value."""
    monkeypatch.chdir(tmp_path)
    manifest = dict.fromkeys(card.SETUP, None) | {"stage": "dpo"}
    shared = dict.fromkeys([field.name for field in dataclasses.fields(section("dpo"))])
    shared |= dict(lora_rank=8, global_batch_size=4, loss="simpo")
    configs = {
        "sft": shared | dict(model_path="org/base@v1", data={"org/chats@main": 1.0, "data/gone.jsonl": 1.0}),
        "dpo": shared | dict(model_path="runs/x/sft/final", data={"org/pairs[test]": 100}),
    }
    commits = {
        "sft": {"org/base@v1": "c", "datasets/org/chats@main": "c"},
        "dpo": {"datasets/org/pairs": "c"},
    }
    for stage, config in configs.items():
        folder = tmp_path / "runs/x" / stage
        (folder / "final").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        about = {"hub": commits[stage], "exported": f"of {stage}", "weights": {"sft": "of base", "dpo": "of sft"}[stage]}
        (folder / "manifest.json").write_text(json.dumps(manifest | about))
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    evaluations = [{"step": step, "eval/loss": 1 / step, "eval/loss_ci95": 0.1 / step} for step in (1, 4)]
    lines = [
        {"step": 1, "loss": 2.0},
        evaluations[0],
        {"step": 2, "loss": 3.0},
        {"step": 4, "loss": 1.0},
        evaluations[1],
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card.card(tmp_path / "runs/x/dpo")
    assert "| `loss` | 2.0000 | 1.0000 |\n| `eval/loss` | 1.0000 ± 0.1000 | 0.2500 ± 0.0250 |" in text
    assert " 4 optimizer steps of 4 examples " in text and "`eval/`, of held-out data; ±" in text
    about = huggingface_hub.ModelCard(card.write("runs/x/dpo").read_text()).data.to_dict()
    assert about["base_model"] == "org/base" and about["datasets"] == ["org/chats", "org/pairs"]
    assert about["tags"] == ["dpo", "lora", "glassbox"] and "license" not in about
    # the SFT run was started over since, or another program has a config.json and a final/ there
    for other in ({"stage": "sft"}, {"exported": "of another run"}):
        (tmp_path / "runs/x/sft/manifest.json").write_text(json.dumps(other))
        about = huggingface_hub.ModelCard(card.card(tmp_path / "runs/x/dpo")).data.to_dict()
        assert "base_model" not in about and about["datasets"] == ["org/pairs"]
