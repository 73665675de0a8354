"""aqi.py: the published runs reproduced, the three scales, the pitfalls, reading labelled prompts, the
command.
"""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from world import killed_before

import aqi
from aqi import (
    chi,
    measure,
    project,
    read_prompts,
    read_rows,
    restore_xb,
    score,
    table,
    warnings_for,
    write_report,
    xie_beni,
)
from plumbing.files import UserError, read_json, verify_hashes, write_hashes

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "aqi_published_runs.csv"
PUBLISHED = ("chi_norm", "xb_norm", "aqi")


def published():
    """Raw rows of 18 published runs, and what was published for them."""
    rows = read_rows(GOLDEN)
    return rows, [{name: float(row.pop(name)) for name in PUBLISHED} for row in rows]


def test_per_run_reproduces_every_published_row():
    """Within 0.02, and from the CHI, whose four decimals say more, within 0.0002 on all three columns."""
    rows, expected = published()
    assert len(rows) == 144
    for raw, tolerances in ((rows, (1e-4, 0.025, 0.02)), (restore_xb(rows), (2e-4, 2e-4, 2e-4))):
        for row, figures in zip(score(raw, "per_run"), expected, strict=True):
            for name, tolerance in zip(PUBLISHED, tolerances):
                assert abs(row[name] - figures[name]) <= tolerance, (row, figures)


def test_restored_rows_have_the_sizes_of_the_published_runs():
    """Sanity and full runs of 7 axioms x 2 labels x 100 or 500, and the first models' 200; the XB moves by
    less than its last decimal.
    """
    rows, _ = published()
    restored = restore_xb(rows)
    assert {row["n"] for row in restored if row["category"] != "overall"} == {200, 400, 1000}
    assert {row["n"] for row in restored if row["category"] == "overall"} == {1400, 2800, 7000}
    assert max(abs(new["xb"] - old["xb"]) for new, old in zip(restored, rows)) <= 0.5001e-4
    odd = [{"category": "x", "chi": 1e6, "xb": 0.0001}]  # any n from 202 to 602 rounds to this
    odd += [
        {"category": "x", "chi": chi, "xb": xb} for chi, xb in ((0.0, 9.0), (math.inf, 0.0), (math.inf, 1.0))
    ]
    assert restore_xb(odd) == odd


def test_a_stated_n_is_not_guessed():
    """chi 10 of n = 100: 10 is 9 above what chance gives, of 98 + 10: 100 * 9 / 108 = 8.33. XB = 2 would be
    another n's, 82.
    """
    rows = [
        {"category": name, "chi": chi, "xb": xb, "n": 100}
        for name, chi, xb in (("a", 10.0, 2.0), ("b", 12.0, 1.8))
    ]
    assert restore_xb(rows) == rows
    assert score(restore_xb(rows), "sweep")[0]["aqi"] == pytest.approx(100 * 9 / 108)


def test_saturation_is_in_the_published_runs():
    """55.00 on the overall row in 5 of these 18 runs, and a warning that says so."""
    rows, _ = published()
    scored = score(restore_xb(rows), "per_run")
    assert [row["aqi"] for row in scored if row["category"] == "overall"].count(55.0) == 5
    assert any(
        "saturated at 55.00 in 5 rows (overall, overall, overall)" in text for text in warnings_for(scored)
    )


# ---------------------------------------------------------------- scales

raw_rows = st.lists(
    st.fixed_dictionaries(
        {"category": st.sampled_from("abcdefgh"), "chi": st.floats(0.1, 2000), "xb": st.floats(0.01, 50)}
    ),
    min_size=2,
    max_size=8,
    unique_by=lambda row: row["category"],
)


@pytest.mark.slow
@given(raw_rows)
@settings(deadline=None, max_examples=50)
def test_per_run_stays_in_its_range(rows):
    scored = score(rows, "per_run")
    assert all(0 <= row["chi_norm"] <= 100 and 10 <= row["xb_norm"] <= 100 for row in scored)
    assert [row["category"] for row in scored] == [row["category"] for row in rows]


def test_a_category_stands_once_in_a_run():
    """Two runs in one csv, of one model and lambda, would share a scale."""
    rows = [{"category": c, "chi": 2.0, "xb": 1.0, "model": "m", "lambda": "0.5"} for c in "aba"]
    with pytest.raises(ValueError, match=r"'a' stands 2 times in one run \(model=m, lambda=0.5\); expected once"):
        score(rows, "per_run")
    assert len(score(rows, "sweep")) == 3


def test_per_run_by_hand():
    """CHI 10, 20, 30; XB 1, 2, 3: median 2, quartiles 1.5 and 2.5, so z = -1, 0, 1."""
    scored = score(
        [{"category": c, "chi": 10.0 * k, "xb": float(k)} for k, c in enumerate("abc", 1)], gamma=0.25
    )
    sigmoid = 100 / (1 + math.exp(-1))
    assert [row["chi_norm"] for row in scored] == [0, 50, 100]
    assert [row["xb_norm"] for row in scored] == pytest.approx([sigmoid, 50, 100 - sigmoid])
    assert scored[0]["aqi"] == pytest.approx(0.75 * sigmoid)


def test_per_run_of_equal_rows():
    scored = score([{"category": c, "chi": 7.0, "xb": 3.0} for c in "ab"])
    assert [(row["chi_norm"], row["xb_norm"], row["aqi"]) for row in scored] == [(50, 50, 50)] * 2


def test_runs_are_told_apart_by_model_and_lambda():
    two = ({"category": "a", "chi": 1.0, "xb": 1.0}, {"category": "b", "chi": 2.0, "xb": 0.5})
    rows = [row | {"model": model, "lambda": k} for model in "xy" for k in (0, 1) for row in two]
    rows[0]["chi"] = 0.5
    assert [row["chi_norm"] for row in score(rows)] == [0, 100] * 4
    assert [row["aqi"] for row in score(rows[::-1])][::-1] == [row["aqi"] for row in score(rows)]


@given(st.floats(1, 1000), st.floats(1.0001, 10), st.floats(0.01, 10))
@settings(deadline=None, max_examples=50)
def test_identity_4_two_anchors_always_score_the_same(chi_base, ratio, xb_base):
    """z = -1 and +1 however close the two are: 26.9 and 73.1."""
    rows = [{"model": "base", "category": "a", "chi": chi_base, "xb": xb_base},
            {"model": "dpo", "category": "a", "chi": chi_base * ratio, "xb": xb_base / ratio}]  # fmt: skip
    base, dpo = score(rows, "anchors")
    if chi_base * (ratio - 1) > 1e-4 and xb_base * (1 - 1 / ratio) > 1e-4:  # the floor of 1e-6 on the sd
        assert (round(base["aqi"], 1), round(dpo["aqi"], 1)) == (26.9, 73.1)
    assert any("26.9 and 73.1" in text for text in warnings_for([base, dpo]))


def test_anchors_score_other_models_by_category():
    """Anchors at CHI 10 and 20 (mean 15, sd 5), XB 4 and 2: a third model at 25 and 1 is at z = 2 and -2."""
    rows = [
        {"model": m, "category": "a", "chi": c, "xb": x}
        for m, c, x in (("base", 10, 4), ("dpo", 20, 2), ("steered", 25, 1))
    ]
    other = [
        {"model": m, "category": "b", "chi": c, "xb": x}
        for m, c, x in (("base", 1, 1), ("dpo", 1, 1), ("steered", 1, 1))
    ]
    scored = score(rows + other, "anchors")
    assert scored[2]["chi_norm"] == pytest.approx(100 / (1 + math.exp(-2)))
    assert scored[2]["xb_norm"] == pytest.approx(100 / (1 + math.exp(-2)))
    assert scored[5]["aqi"] == 50  # equal anchors: the sd is floored, z = 0
    with pytest.raises(
        ValueError,
        match=r"anchors: category 'a' has models \['base', 'steered'\]; expected \['base', 'dpo'\]",
    ):
        score([rows[0], rows[2]], "anchors")


def random_row(n, gap, seed):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    X = torch.randn(n, 10, generator=generator) + gap * label[:, None]
    return {"category": "a", "n": n, "chi": chi(X, label), "xb": xie_beni(X, label)}


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.0, 0.3, 1.0])
def test_sweep_does_not_depend_on_n(gap):
    """The same population at n = 40 and n = 4,000, 200 and 5 draws: means within 4 standard errors, while CHI
    differs by up to 100 times. Population value: 100 B / (B + W) with B = 10 gap^2 / 4 and W = 10."""
    truth = 100 * (gap**2 / 4) / (gap**2 / 4 + 1)
    for n, draws in ((40, 200), (4000, 5)):
        values = np.array(
            [row["aqi"] for row in score([random_row(n, gap, seed) for seed in range(draws)], "sweep")]
        )
        assert (
            abs(values.mean() - truth) < 4 * values.std(ddof=1) / draws**0.5 + 0.2
        )  # 0.2: the ratio's own bias at n = 40


def test_sweep_is_one_scale():
    """A row scores the same whatever else is scored with it, with its n or, balanced, without; gamma changes
    nothing.
    """
    rows = [
        random_row(200, gap, 1) | {"model": m, "lambda": k}
        for m in "xy"
        for k, gap in enumerate((0.2, 0.5, 1.0))
    ]
    scored = score(rows, "sweep")
    assert [score([row], "sweep", gamma=0.9)[0]["aqi"] for row in rows] == pytest.approx(
        [row["aqi"] for row in scored]
    )
    assert [row["aqi"] for row in scored[:3]] == sorted(row["aqi"] for row in scored[:3])
    without = score([{name: value for name, value in row.items() if name != "n"} for row in rows], "sweep")
    assert [row["aqi"] for row in without] == pytest.approx([row["aqi"] for row in scored])


@pytest.mark.parametrize(
    "figures", [dict(chi=0.0, xb=9.0), dict(chi=5.0, xb=0.0), dict(chi=5.0, xb=0.1, n=2)]
)
def test_sweep_needs_to_know_n(figures):
    """Indices that a table has rounded to 0 tell no n."""
    with pytest.raises(
        ValueError,
        match=r"category 'a': chi=.*, xb=.*, n=(None|2); expected n above 2, or chi and xb above 0",
    ):
        score([{"category": "a", **figures}], "sweep")


def test_per_run_moves_with_resampling_alone_and_sweep_does_not():
    """Pitfall 3: one fixed separation, fresh texts. per_run's AQI of the overall row moves by several points,
    sweep's by less than one.
    """
    moved = {"per_run": [], "sweep": []}
    for draw in range(6):
        rows = [random_row(200, 0.6, 100 * draw + a) | {"category": a} for a in range(7)]
        for scale, values in moved.items():
            values.append(np.mean([row["aqi"] for row in score(rows, scale)]))
    assert np.ptp(moved["per_run"]) > 5 > 2 > np.ptp(moved["sweep"])


@pytest.mark.parametrize("row, message", [
    ({"category": "a", "chi": math.inf, "xb": 0.0}, "row 1: chi=inf in category 'a'; expected"),
    ({"category": "a", "chi": 1.0}, "row 1: xb=None"), ({"category": "a", "chi": math.nan, "xb": 1.0}, "row 1: chi=nan"),
    ({"category": "a", "chi": 1.0, "xb": math.inf}, "row 1: xb=inf"), ({"chi": 1.0, "xb": 1.0}, "row 1: category=None"),
])  # fmt: skip
def test_bad_rows(row, message):
    with pytest.raises(ValueError, match=message):
        score([{"category": "a", "chi": 1.0, "xb": 1.0}, row])


def test_bad_keys():
    with pytest.raises(
        ValueError, match=r"normalize='best': expected one of \['per_run', 'anchors', 'sweep'\]"
    ):
        score([], "best")
    with pytest.raises(ValueError, match="gamma=2: expected 0 to 1"):
        score([], gamma=2)


@pytest.mark.slow
def test_identity_5_tsne_adds_a_draw_of_its_own():
    """Forty points that stay where they are, CHI 5.4; in t-SNE every start and every perplexity has its own."""
    labels = [0] * 20 + [1] * 20
    X = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    X[20:, 0] += 1.5
    starts = [chi(project(X, "tsne", 10.0, seed=seed), labels) for seed in range(3)]
    perplexities = [chi(project(X, "tsne", perplexity), labels) for perplexity in (5.0, 13.0)]
    for values in (starts, perplexities):
        assert max(values) > 1.1 * min(values) and chi(X, labels) == pytest.approx(5.35, abs=0.01)


def test_warnings_appear_where_they_apply_and_only_there():
    row = {"category": "a", "chi": 9.0, "xb": 1.0, "n": 38}
    assert warnings_for(score([row], "sweep")) == []
    cases = (
        ({"space": "tsne", "seed": 1}, "one t-SNE"),
        ({"tap": "post_norm"}, "final norm"),
        ({"injection": "cumulative"}, "several"),
    )
    for more, words in cases:
        (only,) = warnings_for(score([row | more], "sweep"))
        assert words in only
    curve = [row | {"lambda": k} for k in (0, 1)]
    assert ["random direction" in text for text in warnings_for(score(curve, "sweep"))] == [True]
    assert warnings_for(score([*curve, row | {"lambda": 1, "control": True}], "sweep")) == []
    assert any("own scale" in text for text in warnings_for(score(curve)))
    assert not any("own scale" in text for text in warnings_for(score(curve[:1])))
    seeds = [row | {"space": "tsne", "seed": seed} for seed in range(3)]
    assert warnings_for(score(seeds, "sweep")) == []


# ---------------------------------------------------------------- measuring


def labelled(per_group=30, axioms=2, dims=6):
    generator = torch.Generator().manual_seed(0)
    axiom = torch.arange(axioms).repeat_interleave(2 * per_group)
    label = torch.arange(2 * per_group * axioms) % 2
    return torch.randn(len(axiom), dims, generator=generator) + 2 * label[:, None], axiom, label


def test_measure_gives_one_row_per_axiom_and_overall():
    X, axiom, label = labelled()
    rows = measure(X, axiom, label, ["a", "b"], extra=("silhouette", "probe_auc"))
    assert all(0 < row["silhouette"] < 1 and row["probe_auc"] > 0.95 for row in rows)
    assert [(row["category"], row["n"]) for row in rows] == [("a", 60), ("b", 60), ("overall", 120)]
    assert rows[1]["chi"] == chi(X[axiom == 1], label[axiom == 1]) and rows[2]["xb"] == xie_beni(X, label)


def test_the_probe_of_copies_is_of_whole_groups():
    """Labels without meaning, every text five times: copies on both sides of a fold would give AUC 1."""
    X, axiom, label = labelled(per_group=60, dims=200)
    X -= 2 * label[:, None]
    group = torch.arange(240).repeat_interleave(5)
    copies = X[group], axiom[group], label[group], ["a", "b"]
    alone = measure(*copies, extra=("probe_auc",))
    whole = measure(*copies, extra=("probe_auc",), group=group)
    assert all(row["probe_auc"] > 0.95 for row in alone)
    assert all(0.3 < row["probe_auc"] < 0.7 for row in whole)


def test_an_axiom_too_small_for_the_probe_has_an_empty_cell(tmp_path):
    """Four texts of a label in axiom b: the other indices are there, in the table and the csv too."""
    X, axiom, label = labelled(per_group=5)
    kept = torch.arange(len(X)) < 18
    rows = measure(X[kept], axiom[kept], label[kept], ["a", "b"], extra=("silhouette", "probe_auc"))
    assert [row["probe_auc"] is None for row in rows] == [False, True, False]
    assert all(-1 <= row["silhouette"] <= 1 for row in rows)
    scored = score(rows, "sweep")
    write_report(tmp_path, scored)
    assert len(table(scored).splitlines()) == 4 and not read_rows(tmp_path / "aqi.csv")[1]["probe_auc"]


@pytest.mark.slow
def test_measure_in_other_spaces():
    X, axiom, label = labelled()
    everything = measure(X, axiom, label, ["a", "b"], "pca:6")  # all six components are a rotation
    assert everything[2]["chi"] == pytest.approx(chi(X, label), rel=1e-5)
    embedded = measure(X, axiom, label, ["a", "b"], "tsne")
    assert [row["space"] for row in embedded] == ["tsne"] * 3 and embedded[2]["chi"] > 10
    assert project(X, "raw") is X
    for space in ("umap", "pca", "pca:0", "pca:7", "tsne:2"):
        with pytest.raises(ValueError, match="expected 'raw', 'pca:k' with k of 1 to 6, or 'tsne'"):
            project(X, space)


def test_tsne_runs_at_the_published_perplexities_from_the_seed_it_is_given(monkeypatch):
    """30 for an axiom, 50 overall, n - 2 where that is less."""
    calls = []
    monkeypatch.setattr(
        aqi, "tsne", lambda X, perplexity, seed: calls.append((len(X), perplexity, seed)) or (X, 0.0)
    )
    axiom, label = torch.arange(60) // 40, torch.arange(60) % 2
    measure(
        torch.randn(60, 4, generator=torch.Generator().manual_seed(0)),
        axiom,
        label,
        ["a", "b"],
        "tsne",
        seed=3,
    )
    assert calls == [(40, 30, 3), (20, 18, 3), (60, 50, 3)]


@pytest.mark.parametrize("key", ("model", "injection", "control", "tap", "lambda", "layer", "seed"))
def test_per_run_scores_every_run_by_itself(key):
    """Runs that differ in one key alone share no scale."""
    first, second = ([{"category": c, "chi": chi, "xb": 1 / chi, key: run} for c, chi in zip("abc", chis)]
                     for run, chis in ((0, (1.0, 2.0, 3.0)), (1, (5.0, 7.0, 11.0))))  # fmt: skip
    assert score(first + second, "per_run") == score(first, "per_run") + score(second, "per_run")


# ---------------------------------------------------------------- reading


def write_csv(path, rows, columns=("axiom", "safety_label", "input")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def litmus(per_group=150, axioms=("Duty", "Care")):
    """Rows as LITMUS has them, labels alternating."""
    return [
        (axiom, label, f"{axiom} {label} {i}")
        for i in range(per_group)
        for axiom in axioms
        for label in ("safe", "unsafe")
    ]


@pytest.mark.slow
def test_prompts_are_sampled_as_pandas_does(tmp_path):
    """The published scripts: groupby([axiom, label]), then group.sample(n, random_state=42), concatenated in
    sorted order.
    """
    pandas, said = pytest.importorskip("pandas"), []
    prompts = read_prompts(write_csv(tmp_path / "a.csv", litmus()), "sanity", said.append)
    frame = pandas.DataFrame(litmus(), columns=["axiom", "label", "input"])
    frame["label"] = (frame["label"] == "safe").astype(int)
    expected = pandas.concat(
        [group.sample(100, random_state=42) for _, group in frame.groupby(["axiom", "label"])]
    )
    assert prompts.texts == expected["input"].tolist()
    assert prompts.label.tolist() == expected["label"].tolist()
    assert [prompts.axioms[a] for a in prompts.axiom] == expected["axiom"].tolist() and prompts.axioms == [
        "Care",
        "Duty",
    ]
    assert len(said) == 1 and said[0].endswith("2 axioms, 400 of 600 texts; 0 dropped")


@pytest.mark.slow
def test_fewer_rows_than_asked_are_taken_and_counted(tmp_path):
    said = []
    rows = [*litmus(150), ("", "safe", "no axiom"), ("Duty", "safe", " ")]
    prompts = read_prompts(write_csv(tmp_path / "a.csv", rows), "full", said.append)
    assert len(prompts.texts) == 600 and sorted(prompts.texts) == sorted(text for *_, text in litmus(150))
    (line,) = said
    assert "600 of 602 texts; 2 dropped for want of an axiom or a text" in line
    fewer = "fewer than the 500 texts of mode full in 4 of 4 cells of axiom and label, 150 in the least"
    assert line.endswith(f"; {fewer}")


def test_columns_that_are_not_read_are_named(tmp_path):
    said, rows = [], [(*row, "g", "an answer") for row in litmus(100)]
    path = write_csv(tmp_path / "a.csv", rows, ("axiom", "label", "prompt", "group", "response"))
    read_prompts(path, log=said.append)
    assert said == [
        f"{path}: columns axiom, label, prompt; 2 axioms, 400 of 400 texts; 0 dropped; "
        "columns not read: response"
    ]


def test_texts_with_both_labels_are_counted(tmp_path):
    """Rows of prompt and response, labels of the response: one prompt has a safe and an unsafe answer."""
    said = []
    rows = [("a", ("safe", "unsafe")[i % 2], f"question {i // 2 if i < 6 else i}") for i in range(12)]
    path = write_csv(tmp_path / "a.csv", rows)
    read_prompts(path, log=said.append)
    assert said[0] == (
        f"{path}: WARNING: 3 of 9 distinct texts of column 'input' are both safe and unsafe, so their "
        "labels say nothing (first: 'question 0')"
    )


def test_json_rows_without_a_text_are_dropped_and_counted(tmp_path):
    said, rows = [], [dict(zip(("axiom", "label", "text"), row)) for row in litmus(5)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"axiom": "Duty", "label": "safe"}]))
    assert sorted(read_prompts(str(path), "sanity", said.append).texts) == sorted(row["text"] for row in rows)
    assert "20 of 21 texts; 1 dropped for want of an axiom or a text" in said[-1]


@pytest.mark.parametrize(
    "columns",
    [("Category", "Label", "Prompt"), ("prompt_type", "safety", "text"), ("principle", "label", "Text")],
)
def test_columns_by_other_names(tmp_path, columns):
    assert len(read_prompts(write_csv(tmp_path / "a.csv", litmus(3), columns), log=len).texts) == 12


@pytest.mark.slow  # imports datasets
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "folder"])
def test_formats(tmp_path, suffix):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(
        [dict(zip(("axiom", "safety_label", "input"), row)) for row in litmus(3)]
    )
    path = tmp_path / f"rows.{suffix}"
    {"jsonl": rows.to_json, "parquet": rows.to_parquet, "folder": rows.save_to_disk}[suffix](str(path))
    assert sorted(read_prompts(str(path), log=len).texts) == sorted(text for *_, text in litmus(3))


@pytest.mark.parametrize("safe, unsafe", [("1", "0"), ("True", "False"), ("yes", "no"), (" Safe", "UNSAFE")])
def test_is_safe_says_what_one_means(tmp_path, safe, unsafe):
    rows = [("a", safe if i % 2 else unsafe, f"text {i}") for i in range(6)]
    prompts = read_prompts(write_csv(tmp_path / "a.csv", rows, ("axiom", "is_safe", "input")), log=len)
    assert all((int(text.split()[1]) % 2) == label for text, label in zip(prompts.texts, prompts.label))
    named = [
        dict(zip(("axiom", "is_safe", "input"), row)) for row in rows
    ]  # text stays text in jsonl, where a csv's may become a bool
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, named)))
    assert read_prompts(str(tmp_path / "a.jsonl"), log=len).label.tolist() == prompts.label.tolist()


@pytest.mark.parametrize("columns, rows, message", [
    (("axiom", "label", "input"), [("a", i % 2, "x") for i in range(6)], r"column 'label' holds '0' x 3, '1' x 3; expected unsafe, safe"),
    (("axiom", "label", "input"), [*litmus(3), ("a", "sfae", "x"), ("a", None, "x")], "holds 'sfae' x 1, None x 1; expected unsafe, safe"),
    (("topic", "label", "input"), litmus(3), r"columns \['topic', 'label', 'input'\]; expected one for the axiom: axiom, category"),
    (("axiom", "label", "input"), [("a", "safe", "x")] * 9, r"a \(9 safe, 0 unsafe\); expected at least two texts of either label"),
    (("axiom", "label", "input"), [*litmus(3), ("b", "safe", "x"), ("b", "unsafe", "x")], r"b \(1 safe, 1 unsafe\); expected at least two"),
    (("axiom", "label", "input"), litmus(3, ("overall",)), "an axiom is called 'overall'"),
    (("axiom", "label", "input"), [("a", label, f"question {i}") for i in range(5) for label in ("safe", "unsafe")],
     "5 of 5 distinct texts of column 'input' are both safe and unsafe; expected at most 50%"),
])  # fmt: skip
def test_bad_tables(tmp_path, columns, rows, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write_csv(tmp_path / "a.csv", rows, columns), log=len)


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"mode='paper': expected one of \['sanity', 'full', 'max'\]"):
        read_prompts("x.csv", "paper")


# ---------------------------------------------------------------- output and command


def test_table_and_report(tmp_path):
    scored = score(
        [{"model": "m", "lambda": "0.50", "category": "a", "chi": 1234.5, "xb": 0.25, "n": 20.0}], "sweep"
    )
    head, line = table(scored).splitlines()
    assert head.split() == ["model", "lambda", "category", "n", "chi", "xb", "separation"]
    assert line.split() == ["m", "0.50", "a", "20", "1,234.50", "0.2500", "98.48"]
    assert scored[0]["separation"] == scored[0]["aqi"] == scored[0]["chi_norm"] == scored[0]["xb_norm"]
    write_report(tmp_path / "out", scored, verdict={"verdict": "flat"})
    report = json.loads((tmp_path / "out" / "aqi.json").read_text())
    assert report["rows"] == scored and report["verdict"] == {"verdict": "flat"} and report["warnings"] == []
    with open(tmp_path / "out" / "aqi.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["aqi"]) == scored[0]["aqi"]


def test_a_report_that_is_killed_while_it_is_written_again(tmp_path):
    """At any moment: no report, or a verified one with its own table. The next one replaces what is left."""
    old, new = ([{"category": "a", "chi": value, "xb": 0.5}] for value in (3.0, 7.0))
    chis = set()
    for number in itertools.count(1):
        write_report(tmp_path, old)
        with killed_before(number) as calls:
            write_report(tmp_path, new)
        (row,) = read_rows(tmp_path / "aqi.csv")
        if (tmp_path / "aqi.json").is_file():
            verify_hashes(tmp_path)
            assert read_json(tmp_path / "hashes.json").keys() == {"aqi.csv", "aqi.json"}
            assert read_json(tmp_path / "aqi.json")["rows"][0]["chi"] == row["chi"]
            chis.add(row["chi"])
        if len(calls) < number:
            break
    assert chis == {3.0, 7.0} and number > 8


def test_a_report_in_the_folder_of_a_vector_leaves_its_hashes(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    write_hashes(tmp_path, ["manifest.json"])
    for value in (3.0, 7.0):
        write_report(tmp_path, [{"category": "a", "chi": value, "xb": 0.5}])
        assert read_json(tmp_path / "hashes.json").keys() == {"aqi.csv", "aqi.json", "manifest.json"}


def test_a_report_is_json_whatever_was_measured(tmp_path):
    """Two labels at a point each have an infinite Dunn index, and a text beyond 709 nats per token an
    infinite perplexity.
    """
    write_report(
        tmp_path,
        [{"category": "a", "dunn": math.inf}],
        behaviour=[{"perplexity_chosen": np.float64("nan"), "lambda": 0.5}],
    )
    report = json.loads(
        (tmp_path / "aqi.json").read_text(), parse_constant=pytest.fail
    )  # called with NaN, Infinity
    assert report["rows"] == [{"category": "a", "dunn": None}]
    assert report["behaviour"] == [{"perplexity_chosen": None, "lambda": 0.5}]


@pytest.mark.slow
def test_score_command(tmp_path):
    command = [
        sys.executable,
        "aqi.py",
        "score",
        str(GOLDEN),
        "--normalize=sweep",
        f"--report_dir={tmp_path}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "XB of 144 of 144 rows taken from CHI" in done.stdout
    assert len(json.loads((tmp_path / "aqi.json").read_text())["rows"]) == 144


def test_score_command_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        aqi.main(["score", write_csv(tmp_path / "b.csv", [], ("category", "chi", "xb"))])
    with pytest.raises(
        ValueError,
        match=r"d.csv: no column category, xb among \['Category', 'chi'\]; expected category, chi, xb",
    ):
        aqi.main(["score", write_csv(tmp_path / "d.csv", [("a", 1)], ("Category", "chi"))])
    (tmp_path / "e.csv").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="e.csv: not a csv of UTF-8 text"):
        aqi.main(["score", f"{tmp_path}/e.csv"])


@pytest.mark.parametrize("text, message", [
    ("category,chi,xb\na,1,1\nb,2,x\n", "line 3: xb='x': expected a finite number of at least 0"),
    ("category,chi,xb\na,inf,\n", "line 2: chi=inf: expected a finite number of at least 0; xb='': expected"),
    ("category,chi,xb,n\na,3,1,inf\n", "line 2: n=inf: expected a whole number above 2"),
    ("category,chi,xb,n\na,3,1,nan\n", "line 2: n=nan: expected a whole number above 2"),
    ("category,chi,xb,n\na,3,1,12.5\n", "line 2: n=12.5: expected a whole number above 2"),
    ("category,chi,xb,eta2\na,3,1,nan\n", "line 2: eta2=nan: expected a finite number"),
    ("category,chi,xb,control\na,3,1,yes\n", "line 2: control='yes': expected True or False"),
    ("category,chi,xb,dunn\na,3,1,x\n", "line 2: dunn='x': expected a number"),
    ("category,chi,xb\na,10,5,2,25\n", "line 2: 5 cells; expected 3"),  # 10,5 is 10.5 elsewhere
    ("category,chi,xb,n\na,10,5\n", "line 2: 3 cells; expected 4"),
    ('category,chi,xb\n"two\nlines",1,1\n\nb,2\n', "line 5: 2 cells; expected 3"),
    ('category,chi,xb\na,1,1\n"b,2,1\nc,2,1\n', "line 3: unexpected end of data"),
    ("category,chi,xb,chi\na,1,2,3\n", "line 1: columns ['category', 'chi', 'xb', 'chi']; expected names that differ"),
    ("category;chi;xb\na;10,5;2\n", "line 1: one column, 'category;chi;xb'; expected commas between the cells"),
])  # fmt: skip
def test_a_csv_that_is_no_table_of_rows_is_named_by_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(f'{tmp_path}/a.csv, {message}')}[^\n]*$"):
        aqi.main(["score", f"{tmp_path}/a.csv"])


def test_a_long_cell_is_read(tmp_path):
    """csv's own limit of 131,072 characters would be a traceback."""
    (tmp_path / "a.csv").write_text(f"category,chi,xb\n{'b' * 131_073},1,1\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["category"]) == 131_073


def test_an_index_that_is_not_scored_may_be_infinite(tmp_path):
    """Dunn's of two labels at a point each; a report's own csv is read again."""
    path = write_csv(tmp_path / "a.csv", [("a", 3, 0.5, "inf")], ("category", "chi", "xb", "dunn"))
    assert read_rows(path)[0]["dunn"] == math.inf


def test_a_spreadsheets_csv_is_read(tmp_path):
    """A byte-order mark before the first column's name; n known of some rows only; TRUE for True."""
    rows = [("a", 3, 0.5, 8, "TRUE"), ("b", 2, 1, "", "False")]
    path = Path(write_csv(tmp_path / "a.csv", rows, ("category", "chi", "xb", "n", "control")))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert aqi.main(["score", str(path), "--normalize=sweep"]) == 0
    found = [(row["category"], row["n"], row["control"]) for row in read_rows(path)]
    assert found == [("a", 8, True), ("b", "", False)]


def test_a_csv_that_is_not_there():
    with pytest.raises(
        ValueError, match="^none.csv: no such file; expected a csv with columns category, chi, xb$"
    ):
        aqi.main(["score", "none.csv"])


def test_rows_that_know_their_n_beside_rows_that_do_not(tmp_path):
    """n where known: a cell left empty is no n. Row b is then taken as balanced, n = 4 * 12 * 2 + 2 = 98: 100
    * 11 / (12 + 96) = 10.185.
    """
    rows = read_rows(
        write_csv(
            tmp_path / "a.csv", [("a", 10, 3.5, 1400), ("b", 12, 2, "")], ("category", "chi", "xb", "n")
        )
    )
    assert rows[0]["n"] == 1400 and not rows[1]["n"]
    assert [row["aqi"] for row in score(rows, "sweep")] == pytest.approx(
        [100 * 9 / (10 + 1398), 100 * 11 / 108]
    )


def test_a_sweeps_own_csv_is_scored_as_the_sweep_did(tmp_path, capsys):
    """Steered and control rows are runs of their own, and stay apart in the table."""
    X, axiom, label = labelled()
    rows = [
        {"model": "m", "lambda": 0.0, "control": c, **row}
        for c in (False, True)
        for row in measure(X + c, axiom, label, ["a", "b"])
    ]
    rows[0]["chi"] *= 3  # a largest CHI that is not the control's
    scored = score(rows, "per_run")
    write_report(tmp_path, scored)
    again = score(read_rows(tmp_path / "aqi.csv"), "per_run")
    assert [row["aqi"] for row in again] == pytest.approx([row["aqi"] for row in scored])
    shown = table(again).splitlines()
    assert "control" in shown[0] and [("True" in line) for line in shown[1:]] == [False] * 3 + [True] * 3
