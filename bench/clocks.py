"""Clock and power of a GPU beside a measurement.

A card at its power limit (700 W for an H200) lowers the clock to keep the power.

The GPU is the first that this process sees.
"""

import os
import subprocess
import threading

import numpy as np

_GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
COMMAND = [
    "nvidia-smi",
    "-i",
    _GPU,
    "--query-gpu=clocks.sm,power.draw",
    "--format=csv,noheader,nounits",
]  # bench/training.sh asks the same
LAST = 60  # readings, a second apart


def median_clocks(lines):
    """"1605 MHz, 692 W", the medians of the last minute; None without lines.

    lines: of "MHz, W" as nvidia-smi prints them. Only readings above half of the largest power count: a run
    that ended by itself is followed, and every run begun, by an idle card.
    """
    if not lines:
        return None
    readings = np.loadtxt(lines, delimiter=",", ndmin=2)
    watts = readings[:, 1]
    mhz, watts = np.median(readings[watts > watts.max() / 2][-LAST:], axis=0)
    return f"{mhz:.0f} MHz, {watts:.0f} W"


class Clocks:
    """One reading a second, from a thread beside the work.

    start(), work, stop(), or `with Clocks() as clocks:`, then median().
    """

    def __init__(self):
        self.lines, self.done, self.thread = (
            [],
            threading.Event(),
            threading.Thread(target=self._read, daemon=True),
        )

    def _read(self):
        while not self.done.wait(1):
            self.lines.append(subprocess.check_output(COMMAND, text=True))

    def start(self):
        self.thread.start()

    def stop(self):
        self.done.set()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def median(self):
        return median_clocks(self.lines)
