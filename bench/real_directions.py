"""How often the tool is wrong on real weights: random directions, judged as a pair's vector is.

    python bench/real_directions.py TARGET --prompts=FILE [--key=value ...]

TARGET and the keys are those of `steer.py sweep`. So many directions of each kind are as long as the vector,
and as many three and ten times as long, so that the texts alone would call many of them something. Each is
judged against 19 others of each kind, which count at the ends. Rows continue the first table of
bench/calibration.py: what is not flat is a false alarm. Minutes on a GPU.
"""

import argparse
import random
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import steer
from analysis.curves import bootstrap
from analysis.nulls import Nulls, isotropic_directions, sign_flipped_directions
from analysis.sweep import direction_curve
from analysis.vector import plain_document
from analysis.verdict import judge
from bench.calibration import alarm_row, any_axiom, per_cent
from plumbing import parallel
from plumbing.files import progress_bar

LENGTHS = (1, 3, 10)
OTHERS = 19


def curve_along(model, documents, prompts, addition, lambdas):
    """The Curve along one direction, in units of the unsteered states, as a sweep measures it."""
    states, _ = direction_curve(model, documents, addition, lambdas, prompts.label)
    groups = prompts.axiom, prompts.label, prompts.axioms
    return bootstrap(states, *groups, draws=300, group=prompts.group, scaled_by=states[0])


def curves_of(vector, config, prompts, length, trials):
    """{kind: the Curves of so many directions}, `length` times as long as what the vector adds."""
    model, tokenizer = vector.model("sft")
    limit = vector.manifest["max_text_tokens"]
    documents = [plain_document(text, tokenizer, limit) for text in prompts.texts]
    add = {layer: length * a for layer, a in vector.additions(config, model, tokenizer).items()}
    states = vector.differences(config)
    differences = {layer: torch.from_numpy(states[vector.keep, layer]) for layer in add}
    directions = {
        "isotropic": isotropic_directions(add, trials),
        "sign-flipped": sign_flipped_directions(differences, add, trials),
    }
    found = {}
    for kind, drawn in directions.items():
        found[kind] = []
        for trial in progress_bar(range(trials), desc=f"{kind}, {length} times as long", unit="direction"):
            addition = {layer: d[trial] for layer, d in drawn.items()}
            found[kind].append(curve_along(model, documents, prompts, addition, list(config.lambdas)))
    return found


def alarms_of(curves, kind):
    """(Counter of verdicts, directions with an axiom that is not flat, directions not flat without nulls).

    Each direction of the kind stands against OTHERS random ones of the rest of each kind.
    """
    chance = random.Random(0)
    whole, axioms_alarmed, bare = Counter(), 0, 0
    for curve in curves[kind]:
        others = {}
        for name, drawn in curves.items():
            rest = [other.estimate[[0, -1]] for other in drawn if other is not curve]
            others[name] = torch.stack(chance.sample(rest, OTHERS))
        nulls = Nulls(others)
        whole[judge(curve, nulls=nulls)["verdict"]] += 1
        axioms_alarmed += any_axiom(curve, nulls)
        bare += judge(curve)["verdict"] != "flat"
    return whole, axioms_alarmed, bare


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help=f"directions of each kind, above {OTHERS}")
    options, rest = parser.parse_known_args(argv)
    _, targets, config, measure = steer.parse(["sweep", *rest])
    vector = steer.find_vector(targets, config)
    prompts = steer.read_swept_prompts(config, measure)
    for length in LENGTHS:
        curves = curves_of(vector, config, prompts, length, options.trials)
        for kind in curves:
            whole, axioms_alarmed, bare = alarms_of(curves, kind)
            about = f"a random direction of {vector.manifest['sft_path']}, {kind}, {length} times v's length"
            about += f", without nulls {per_cent(bare, options.trials)} %"
            cells, *_ = alarm_row(about, options.trials, whole, axioms_alarmed)
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(main, sys.argv[1:]))
