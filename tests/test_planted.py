"""demo/planted.py: an effect that is there is called one, its twin's is not; and what the tool says to pairs
that are none.

docs/aqi.md has the same table.
"""

import pytest
import torch
from test_steering import changed
from tiny_models import random_llama
from world import launch

import aqi
import families
import steer
from analysis.curves import bootstrap
from analysis.nulls import Nulls, isotropic_directions, null_curves, sign_flipped_directions
from analysis.steering import pool
from analysis.sweep import direction_curve
from analysis.vector import plain_document
from analysis.verdict import judge
from demo import planted

LAMBDAS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with sft/, and planted/ and twin/ after their DPO."""
    root = tmp_path_factory.mktemp("planted")
    planted.write(root)
    for name in ("planted", "twin"):
        launch("dpo", root / f"{name}.py", logs=f"logs_{name}").ok()
    return root


def said(root, sft, dpo, out, texts="planted.jsonl", flip=1):
    """judge's dict of the pair of two folders of root, steered by `flip` times the vector of texts."""
    argv = [
        "extract",
        f"{root}/{sft}",
        f"{root}/{dpo}",
        f"--texts={root}/{texts}",
        "--template=tulu",
        "--count=80",
    ]
    steer.main([*argv, f"--out_dir={root}/{out}"])
    _, _, config, _ = steer.parse(["sweep", f"{root}/planted.py"])
    vector = steer.Vector.load(f"{root}/{out}")
    model, tokenizer = vector.model("sft")
    add = {layer: flip * a for layer, a in vector.additions(config, model, tokenizer).items()}
    prompts = aqi.read_prompts(f"{root}/prompts.csv", log=lambda line: None)
    documents = [plain_document(text, tokenizer, 64) for text in prompts.texts]
    curve, scale = direction_curve(model, documents, add, LAMBDAS, prompts.label)
    differences = {layer: torch.from_numpy(vector.differences(config)[:, layer].copy()) for layer in add}
    directions = {
        "isotropic": isotropic_directions(add, 19),
        "sign-flipped": sign_flipped_directions(differences, add, 19),
    }
    of_texts = prompts.axiom, prompts.label, prompts.axioms
    curves = {}
    for kind, drawn in directions.items():
        curves[kind] = null_curves(
            model,
            documents,
            drawn,
            [0.0, 1.0],
            *of_texts,
            "cpu",
            embed=lambda h, cu: pool(h, cu, "text") / scale,
        )
    drawn = bootstrap(curve, *of_texts, draws=300, group=prompts.group)
    return judge(drawn, nulls=Nulls(curves))


@pytest.mark.slow
def test_what_is_planted_is_found_and_its_twin_is_not(root):
    found = said(root, "sft", "planted/dpo/final", "v")
    assert (found["verdict"], found["decision"]) == ("rising", "go on") and found["change"] > 10
    assert said(root, "sft", "twin/dpo/final", "v_twin")["verdict"] in ("flat", "falling")


@pytest.mark.slow
def test_what_is_said_to_pairs_that_are_none(root):
    """The vector with its sign flipped; the models exchanged; a model with itself; texts of the twin; random
    weights.
    """
    answers = {}
    answers["flipped"] = said(root, "sft", "planted/dpo/final", "v", flip=-1)
    answers["exchanged"] = said(root, "planted/dpo/final", "sft", "v_back")
    answers["other texts"] = said(root, "sft", "planted/dpo/final", "v_texts", texts="twin.jsonl")
    model, tokenizer = families.load_pretrained(root / "sft")
    random = random_llama(model.config)
    for name, pair in (("random", random), ("moved", changed(random, 0.02))):
        planted.save_pretrained(pair, tokenizer, root / name)
    answers["untrained"] = said(root, "random", "moved", "v_random")
    verdicts = {name: (found["verdict"], found["decision"]) for name, found in answers.items()}
    # The gate is opened on whatever texts: the vector of the twin's is as good.
    assert verdicts == {
        "flipped": ("flat", "any direction"),
        "exchanged": ("flat", "any direction"),
        "other texts": ("rising", "go on"),
        "untrained": ("flat", "nothing"),
    }
    with pytest.raises(ValueError, match="the same weights as sft="):
        said(root, "sft", "sft", "v_same")
