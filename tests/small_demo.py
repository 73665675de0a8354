"""`make demo` with a sixth of the pretraining and a quarter of the prompts, for test_commands.py: the same
commands and files, and numbers that are none of the demo's. The demo itself is run by .ci/run.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from demo import axioms, run, tiny


def write(folder):
    """demo.axioms.write, and of the labelled prompts every fourth pair of labels."""
    counts = write_all(folder)
    prompts = folder / "aqi.jsonl"
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join(line for i, line in enumerate(lines) if i // 2 % 4 == 0))
    return counts


write_all, axioms.write = axioms.write, write
tiny.pretrain = functools.partial(tiny.pretrain, steps=100)
run.EXPECTED.clear()
sys.exit(run.main([]))
