"""tools/compare.py against numbers worked by hand, and the whole command on two small folders."""

import math
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from world import WORDS, change_weights, write_rows

from families import load_pretrained
from tools import compare
from tools.compare import Distance


def write_folder(folder, **tensors):
    """Only weights: what distances reads."""
    folder.mkdir()
    save_file(
        {name: torch.tensor(values, dtype=torch.float32) for name, values in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def test_distances_by_hand(tmp_path, monkeypatch):
    """w: ours differs from published in one number, by 4; |published|^2 = 1 + 4 + 9 + 4 = 18. From the base,
    ours went (0, 0, 2, 4) and published (0, 0, 2, 0): the gap is 4 of 2, and the cosine 4 / (sqrt(20) 2). In
    rows of one at a time."""
    monkeypatch.setattr(compare, "ROWS", 1)
    ours = write_folder(tmp_path / "ours", w=[[1, 2], [3, 6]], b=[0, 3])
    published = write_folder(tmp_path / "published", w=[[1, 2], [3, 2]], b=[0, 3], extra=[1])
    base = write_folder(tmp_path / "base", w=[[1, 2], [1, 2]], b=[0, 0])
    found, alone = compare.distances(ours, published, base)
    assert alone == ["extra"] and list(found) == ["b", "w"]
    assert found["w"] == Distance(apart=16, size=18, moved=4, ours=20, product=4)
    assert found["b"] == Distance(apart=0, size=9, moved=9, ours=9, product=9)
    w, every = found["w"], found["w"] + found["b"]
    assert (w.relative, w.left, w.cosine) == pytest.approx((math.sqrt(16 / 18), 2.0, 4 / math.sqrt(80)))
    assert (every.relative, every.left, every.cosine) == pytest.approx(
        (math.sqrt(16 / 27), math.sqrt(16 / 13), 13 / math.sqrt(29 * 13))
    )
    without, _ = compare.distances(ours, published)
    assert (
        without["w"].relative == w.relative
        and math.isnan(without["w"].left)
        and math.isnan(without["w"].cosine)
    )


def test_log_probs_by_hand():
    """Tokens -1, -2, -3 and -1, -4, -3: differences 0, 2, 0; their deviations (1, 0, -1) and (5, -4, -1) / 3
    correlate 2 / sqrt(2 x 14 / 3).
    """
    found = compare.compare_logps(
        [np.array([-1.0, -2.0]), np.array([-3.0])], [np.array([-1.0, -4.0]), np.array([-3.0])]
    )
    expected = dict(
        tokens=3,
        ours=-2,
        published=-8 / 3,
        difference=2 / 3,
        root=math.sqrt(4 / 3),
        correlation=2 / math.sqrt(28 / 3),
    )
    assert found == pytest.approx(expected)


def test_cosines_by_hand(monkeypatch):
    """(3, 4) beside (4, 3): 24 / 25; a vector beside minus half of itself: -1, twice as long."""
    vectors = {"a": torch.tensor([[3.0, 4.0], [1.0, 1.0]]), "b": torch.tensor([[4.0, 3.0], [-0.5, -0.5]])}
    monkeypatch.setattr(
        compare.Vector, "load", lambda folder: SimpleNamespace(tensors={"chosen_last": vectors[folder]})
    )
    (first, second) = compare.vector_cosines("a", "b", "chosen", "last")
    assert first == pytest.approx((0.96, 1.0)) and second == pytest.approx((-1.0, 2.0))
    vectors["b"] = torch.ones(3, 2)
    with pytest.raises(ValueError, match="expected vectors of one shape"):
        compare.vector_cosines("a", "b", "chosen", "last")


@pytest.mark.slow
def test_the_command(world, tmp_path, capsys):
    """A model with itself is at distance 0 and KL 0; one whose weights moved is not; log-probs are those of
    the packed forward.
    """
    base, moved = world / "base", tmp_path / "moved"
    shutil.copytree(base, moved)
    change_weights(
        moved, lambda weights: weights.update({name: tensor * 1.1 for name, tensor in weights.items()})
    )
    rng = random.Random(0)
    texts = []
    for _ in range(6):
        asked = f"\n\nHuman: {rng.choice(WORDS)}\n\nAssistant:"
        texts.append({side: f"{asked} {' '.join(rng.choices(WORDS, k=5))}" for side in compare.SIDES})
    write_rows(tmp_path / "texts.jsonl", texts)
    options = [f"--texts={tmp_path}/texts.jsonl", "--count=6"]
    assert compare.main([str(base), str(base), *options]) == 0
    printed = capsys.readouterr().out
    assert (
        re.search(r"^all +0\.00e\+00$", printed, re.M)
        and "KL(published || ours) 0.00000" in printed
        and "correlation 1.0000" in printed
    )
    assert compare.main([str(moved), str(base), *options, f"--base={moved}"]) == 0
    printed = capsys.readouterr().out
    assert (
        re.search(r"^all +1\.00e-01 +1\.000 +nan$", printed, re.M)
        and "KL(published || ours) 0.00000" not in printed
    )

    model, tokenizer = load_pretrained(base)
    documents, _ = compare.read_texts(f"{tmp_path}/texts.jsonl", 6, tokenizer, None, 512)
    ids = torch.from_numpy(documents[7][0]).long()
    hidden = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
    expected = (hidden @ model.lm_head.weight.T).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    assert np.abs(compare.answer_logps(model, documents)[7] - expected.detach().numpy()).max() < 1e-5
