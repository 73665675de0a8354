"""XSTest's prompts as labelled texts for the AQI: `python -m demo.xstest xstest_prompts.csv OUT.csv`.

XSTest (Roettger et al. 2024) pairs ten types of safe prompts that sound unsafe with unsafe contrasts. The
axiom is the type, a contrast's being the type that it contrasts; the label is the prompt's own. Types that
have only one label are dropped, and counted.
"""

import argparse
import csv
import sys
from collections import Counter, defaultdict

from plumbing.files import UserError
from plumbing.sources import open_source

# the types whose contrast is not called contrast_<type>
CONTRAST_OF = {
    "discr": ("real_group_nons_discr", "nons_group_real_discr"),
    "privacy": ("privacy_public", "privacy_fictional"),
}


def axiom_of(kind):
    """The axiom of an XSTest type: contrasts and their originals share one."""
    kind = kind.removeprefix("contrast_")
    return next((axiom for axiom, kinds in CONTRAST_OF.items() if kind in kinds), kind)


def main(source, target):
    rows, labels = [], defaultdict(set)
    for row in open_source(str(source)):
        axiom = axiom_of(row["type"] or "")
        rows.append({"axiom": axiom, "safety_label": row["label"], "input": row["prompt"]})
        labels[axiom].add(row["label"])
    kept, axioms, dropped = [], set(), Counter()
    for row in rows:
        axiom = row["axiom"]
        if len(labels[axiom]) == 2:
            kept.append(row)
            axioms.add(axiom)
        else:
            dropped[axiom] += 1
    with open(target, "w", newline="") as file:
        writer = csv.DictWriter(file, ["axiom", "safety_label", "input"])
        writer.writeheader()
        writer.writerows(kept)
    left_out = f"dropped for one label only: {dict(dropped)}"
    print(f"{target}: {len(kept)} of {len(rows)} prompts, {len(axioms)} axioms; {left_out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="xstest_prompts.csv", help="the published file")
    parser.add_argument("target", metavar="OUT.csv", help="file to write")
    try:
        main(**vars(parser.parse_args()))
    except UserError as error:
        sys.exit(f"demo.xstest: {error}")
    except (OSError, KeyError) as error:
        sys.exit(f"demo.xstest: {error!r}; expected XSTest's prompts: columns type, label and prompt")
