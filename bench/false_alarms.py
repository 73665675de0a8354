"""How often a verdict is wrong on data whose truth is known: `python bench/false_alarms.py` (no GPU, two minutes).

Ten settings without an effect, where anything but "flat" is a false alarm; then settings with one, where "rising" is right. Null directions
are left out: they could only turn a false alarm into "flat". verdict.simulate says how the data are made.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from analysis.verdict import simulate

NULL = (
    {},
    {"separation": 0.0},
    {"texts": 20},
    {"texts": 20, "tails": 3},
    {"texts": 50, "axioms": 1},
    {"texts": 40, "dims": 256},
    {"texts": 10, "axioms": 1},
    {"tails": 3, "axioms": 2},
    {"shared": 0.99},
    {"shared": 0.5},
)
EFFECTS = (0.02, 0.05, 0.1, 0.2)


def show(effect, settings, trials):
    start = time.perf_counter()
    counts = simulate(effect, trials=trials, **settings)
    name = ", ".join(f"{key}={value}" for key, value in settings.items()) or "defaults"
    found = ", ".join(f"{verdict} {count}" for verdict, count in counts.most_common())
    print(f"effect {effect:<5}{name:24} {found:40} {time.perf_counter() - start:6.1f} s", flush=True)
    return counts


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400, help="data sets of each setting without an effect; with one, 3/8 of them")
    trials = parser.parse_args(argv).trials
    alarms = [trials - show(0.0, settings, trials)["flat"] for settings in NULL]
    print(f"false alarms: {', '.join(map(str, alarms))}; at most {max(alarms) / trials:.2%} of {trials}")
    for effect in EFFECTS:
        show(effect, {}, trials * 3 // 8)


if __name__ == "__main__":
    main(sys.argv[1:])
