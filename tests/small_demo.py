"""`make demo` with a sixth of the pretraining and fewer rows, for test_commands.py: the same commands and files,
and numbers that are none of the demo's. The demo itself is run by .ci/run.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from demo import axioms, run, tiny

KEPT = {"sft": 3, "preferences": 3, "preferences_eval": 2}  # every so many rows


def generate(seed=0):
    """demo.axioms.generate, fewer rows; of the labelled prompts every fourth pair of labels."""
    files = generate_all(seed)
    for stem, step in KEPT.items():
        files[stem] = files[stem][::step]
    files["aqi"] = [row for i, row in enumerate(files["aqi"]) if i // 2 % 4 == 0]
    return files


generate_all, axioms.generate = axioms.generate, generate
tiny.pretrain = functools.partial(tiny.pretrain, steps=100)
run.EXPECTED.clear()
sys.exit(run.main([]))
