"""The index of runs, the ladder's table and the model card: what a finished run says of itself."""

import csv
import dataclasses
import json
import multiprocessing
import runpy

import huggingface_hub
import pytest
from world import ROOT, launch, write_config

from families import load_pretrained
from plumbing.config import section
from plumbing.weights import fingerprint
from reports import card, ladder, registry

PAIRS = runpy.run_path(str(ROOT / "configs/pairs.py"))["PAIRS"]


def run_entry(stage, start, weights, **metrics):
    return {"stage": stage, "start": start, "weights": weights, "metrics": metrics}


def validation(sft, dpo):
    """A validation that rose from 1 to 3."""
    metrics = {"lambdas": [0, 0.5, 1.0], "estimate": [1.0, 2.0, 3.0], "change": 2.0, "change_interval": [1.5, 2.5]}
    return {"stage": "validate", "pair": "tiny", "inject": "matched", "sft": sft, "dpo": dpo, "verdict": "rising", "metrics": metrics}


# ---------------------------------------------------------------- the index


def test_an_index_is_in_the_folder_runs_or_beside_the_run(tmp_path):
    assert registry.index_of(tmp_path / "runs/a/b/sft") == tmp_path / "runs/index.json"
    assert registry.index_of(tmp_path / "sft") == tmp_path / "index.json"


def test_an_entry_replaces_that_of_the_same_folder(tmp_path):
    (tmp_path / "runs").mkdir()
    for number in (1, 2):
        registry.add(tmp_path / "runs/index.json", tmp_path / "runs/x/sft", {"stage": "sft", "number": number})
    entries = registry.read_index(registry.add(tmp_path / "runs/index.json", tmp_path / "runs/x/dpo", {"stage": "dpo"}))
    assert list(entries) == ["x/sft", "x/dpo"] and entries["x/sft"]["number"] == 2 and entries["x/sft"]["date"][:2] == "20"


def test_the_path_of_an_index_is_relative_below_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here/runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert str(registry.add(registry.index_of("runs/x"), "runs/x", {"stage": "sft"})) == "runs/index.json"
    assert registry.add(tmp_path / "index.json", tmp_path / "y", {"stage": "sft"}) == tmp_path / "index.json"


def add_many(folder, first):
    for i in range(first, first + 20):
        registry.add(folder / "runs/index.json", folder / f"runs/{i}", {"stage": "sft"})


def test_two_writers_lose_nothing(tmp_path):
    (tmp_path / "runs").mkdir()
    writers = [multiprocessing.get_context("fork").Process(target=add_many, args=(tmp_path, first)) for first in (0, 20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert registry.read_index(tmp_path / "runs/index.json").keys() == set(map(str, range(40)))


@pytest.mark.parametrize("text", ['{"a": {"sta', "[1]", '{"a": 1}', '{"a": {"b": 1}}'])
def test_a_file_that_is_no_index_is_left_alone(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json: expected an index of runs, or no such file"):
        registry.add(tmp_path / "index.json", tmp_path / "sft", {"stage": "sft"})
    assert (tmp_path / "index.json").read_text() == text


# ---------------------------------------------------------------- the table


def test_runs_and_validations_are_joined_by_their_weights():
    """DPO model d of SFT model s was validated; d2 was trained after that from s, and diverged; t has no DPO yet; one rung was not run."""
    accuracy = {"first": 0.0, "last": 0.9, "ci95": 0.05}
    entries = {
        "tiny/sft": run_entry("sft", "base", "s", **{"loss": {"first": 2.0, "last": 1.0}, "eval/loss": {"first": 2.0, "last": 1.25}}),
        "tiny/dpo": run_entry("dpo", "s", "d", **{"eval/rewards/accuracies": accuracy}),
        "again/dpo": run_entry("dpo", "s", "d2", **{"eval/rewards/accuracies": {"first": 0.0, "last": None, "ci95": None}}),
        "other/sft": run_entry("sft", "base", "t", loss={"first": 2.0, "last": 1.0}),
        "validate/tiny": validation("s", "d"),
        "validate/hub": validation("elsewhere", "elsewhere too"),
    }
    own = {"tiny": dict(dpo="runs/tiny/dpo/final"), "new": dict(dpo="runs/new/dpo/final"), "far": dict(dpo="org/name")}
    own["odd"] = dict(not_representable="")
    curve = ["1.00", "-", "2.00", "-", "3.00", "+2.00 [+1.50, +2.50]", "rising"]
    assert ladder.rows(entries, own) == [
        ["tiny (matched)", "1.250", "0.900 ± 0.050", "-", *curve],
        ["tiny (matched)", "-", "-", "-", *curve],
        ["again/dpo", "1.250", "not finite", "-", *[""] * 6, "not validated"],
        ["other/sft", "1.000 (train)", "-", "-", *[""] * 6, "no DPO yet"],
        ["new", *[""] * 9, "not run"],
    ]


def test_the_table_without_any_run(tmp_path, capsys, monkeypatch):
    """Every rung of ours is named, and the published curves stand below; columns are aligned. An index that is named must be there."""
    with pytest.raises(ValueError, match="nope.json: no such index"):
        ladder.main(["nope.json"])
    monkeypatch.chdir(tmp_path)
    assert ladder.main([]) == 0
    first, head, *lines, last = capsys.readouterr().out.splitlines()
    assert ": 0 entries" in first and "55.00 is saturation" in last
    assert [line.split()[0] for line in lines[:7]] == ["tiny", "smol", "pku_lora", "tulu10_lora", "tulu10", "tulu_full_lora", "tulu_full"]
    assert all(line.endswith("not run") for line in lines[:7]) and len(lines) == 13
    assert {line.index("published") for line in lines[7:]} == {head.index("verdict")}


def test_published_curves_are_those_of_the_published_rows():
    """tests/golden has 13 of the 25 points of the five named models."""
    with open(ROOT / "tests/golden/aqi_published_runs.csv") as file:
        overall = [row for row in csv.DictReader(file) if row["category"] == "overall" and row["lambda"]]
    points = {(row["model"], float(row["lambda"])): row["aqi"] for row in overall}
    common = {key: aqi for key, aqi in points.items() if key[0] in ladder.PUBLISHED}
    assert len(common) == 13
    for (name, strength), aqi in common.items():
        assert ladder.PUBLISHED[name][ladder.LAMBDAS.index(strength)] == pytest.approx(float(aqi), abs=0.005), (name, strength)


def test_every_rung_is_a_pair_of_what_its_scripts_write():
    rungs = {path.stem for path in ROOT.glob("configs/*.py")} - {"pairs"}
    assert {name: (PAIRS[name]["sft"], PAIRS[name]["dpo"]) for name in rungs} == {
        name: (f"runs/{name}/sft/final", f"runs/{name}/dpo/final") for name in rungs
    }


# ---------------------------------------------------------------- a run


def test_an_entry_holds_first_and_last_values_and_the_overall_verdict(tmp_path, monkeypatch):
    """Of a run, from its metrics, and of a sweep, whose first verdict is that of all axioms."""
    monkeypatch.setattr(registry, "fingerprint", lambda folder: f"weights of {folder.name}")
    run, lines = tmp_path / "runs/x/dpo", [{"step": 0, "eval/loss": 0.7, "eval/loss_ci95": 0.2}, {"step": 1, "loss": 2.0}]
    run.mkdir(parents=True)
    lines += [{"step": 2, "loss": 3.0}, {"step": 3, "loss": 1.0}, {"step": 3, "eval/loss": 0.5, "eval/loss_ci95": 0.1}]
    (run / "config.json").write_text('{"loss": "simpo"}')
    (run / "manifest.json").write_text(json.dumps({"stage": "dpo", "data": "d", "commit": "c", "weights": "before"}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = section("dpo")(model_path="m", out_dir=str(run), data={"a": 1.0}, max_seq_len=8, global_batch_size=1,
                             tokens_per_microbatch=16, lr=1.0)  # fmt: skip
    registry.add_run(config)
    verdicts = [{"category": name, "verdict": name, "estimate": [x, 2 * x], "low": [x] * 2, "high": [x] * 2, "change": x,
                 "change_interval": [x, x], "p_monotone": x} for name, x in (("overall", 1.0), ("calm", 3.0))]  # fmt: skip
    sweep = tmp_path / "runs/x/steer/sweep_matched"
    sweep.mkdir(parents=True)
    (sweep / "aqi.json").write_text(json.dumps({"inputs": {"inject": "matched", "lambdas": [0, 1]}, "verdicts": verdicts}))
    (sweep.parent / "manifest.json").write_text(json.dumps({"inputs": {"sft": "s", "dpo": "d"}}))
    entries = registry.read_index(registry.index_of(run).parent / registry.add_validation(sweep, "pair").name)
    trained, validated = entries["x/dpo"], entries["x/steer/sweep_matched"]
    assert trained["metrics"] == {"loss": {"first": 2.0, "last": 1.0}, "eval/loss": {"first": 0.7, "last": 0.5, "ci95": 0.1}}
    assert (trained["start"], trained["weights"], trained["steps"]) == ("before", "weights of final", 3)
    assert (validated["sft"], validated["dpo"], validated["verdict"], validated["metrics"]["estimate"]) == ("s", "d", "overall", [1.0, 2.0])


@pytest.mark.slow
def test_both_stages_register_and_describe_themselves(world, tmp_path):
    """The DPO entry begins at the SFT entry's weights; the cards parse as the hub parses them, and the models still load."""
    (tmp_path / "runs").mkdir()
    keys = dict(data_eval={f"{world}/pref.jsonl": 8}, max_steps=2)
    config = write_config(tmp_path / "runs", world, dpo=keys | dict(model_path=f"{tmp_path}/runs/sft/final"))
    for stage in ("sft", "dpo", "dpo"):  # the third run replaces the second's final/, card and entry
        launch(stage, config).ok()
    entries = registry.read_index(tmp_path / "runs/index.json")
    sft, dpo = entries["sft"], entries["dpo"]
    assert len(entries) == 2 and sft["start"] == fingerprint(world / "base") and sft["weights"] == dpo["start"] != dpo["weights"]
    assert dpo["steps"] == 2 and dpo["metrics"]["eval/loss"]["first"] == pytest.approx(0.693147, abs=1e-5)
    text = (tmp_path / "runs/dpo/final/README.md").read_text()
    about = huggingface_hub.ModelCard(text).data.to_dict()
    # no folder is named to the hub
    assert about == dict(library_name="transformers", pipeline_tag="text-generation", tags=["dpo", "glassbox"])
    assert "license: yours to state" in text and f'"weights": "{sft["weights"]}"' in text and "| `loss` | 0.6931 |" in text
    load_pretrained(tmp_path / "runs/dpo/final")


def test_a_card_names_hub_sources_of_the_whole_lineage(tmp_path, monkeypatch):
    """A DPO run from a local SFT run: base model and data come from both configs, without revision and split; local
    files are left out, also one that is spelled like a hub name and is no longer there.

    The table holds every metric's first and last value."""
    monkeypatch.chdir(tmp_path)
    manifest = dict.fromkeys(card.SETUP, None) | {"stage": "dpo"}
    shared = dict.fromkeys([field.name for field in dataclasses.fields(section("dpo"))])
    shared |= dict(lora_rank=8, global_batch_size=4, loss="simpo")
    configs = {
        "sft": shared | dict(model_path="org/base@v1", data={"org/chats@main": 1.0, "data/gone.jsonl": 1.0}),
        "dpo": shared | dict(model_path="runs/x/sft/final", data={"org/pairs[test]": 100}),
    }
    commits = {"sft": {"org/base@v1": "c", "datasets/org/chats@main": "c"}, "dpo": {"datasets/org/pairs": "c"}}
    for stage, config in configs.items():
        folder = tmp_path / "runs/x" / stage
        (folder / "final").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "manifest.json").write_text(json.dumps(manifest | {"hub": commits[stage]}))
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    evaluations = [{"step": step, "eval/loss": 1 / step, "eval/loss_ci95": 0.1 / step} for step in (1, 4)]
    lines = [{"step": 1, "loss": 2.0}, evaluations[0], {"step": 2, "loss": 3.0}, {"step": 4, "loss": 1.0}, evaluations[1]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card.card(tmp_path / "runs/x/dpo")
    assert "| `loss` | 2.0000 | 1.0000 |\n| `eval/loss` | 1.0000 ± 0.1000 | 0.2500 ± 0.0250 |" in text
    assert " 4 optimizer steps of 4 examples " in text
    about = huggingface_hub.ModelCard(card.write("runs/x/dpo").read_text()).data.to_dict()
    assert about["base_model"] == "org/base" and about["datasets"] == ["org/chats", "org/pairs"]
    assert about["tags"] == ["dpo", "lora", "glassbox"] and "license" not in about
