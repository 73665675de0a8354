"""What can be known of the Triton kernels without a GPU: that they compile and fit, and that no address
leaves its tensor."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from world import interpreted

TESTS = Path(__file__).parent
# What is compiled for 80 also runs on 86 (A40, 3090), and on 89, which adds float8. A second of CPU time compiles
# five launches.
ARCHITECTURES = {"80": "A100", "89": "L40S, 4090", "90": "H100, H200", "100": "B200", "120": "5090"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="needs Triton, which works without a GPU here"
    ),
]


def does_not_fit(row):
    """A multiprocessor has 65,536 registers, and from 48 KiB on shared memory must be asked for. Spilled
    registers go to memory."""
    return row["spilled"] or row["shared"] > 48 * 1024 or row["registers"] * row["threads"] > 65536


@pytest.fixture(scope="module")
def compiled():
    """{architecture: rows}, and "large tile": a kernel that must not fit."""
    # In a Python of its own: warm.py has imported Triton to interpret.
    command = [sys.executable, TESTS / "compile_kernels.py", *ARCHITECTURES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_launch_compiles_and_fits_on_every_architecture(compiled):
    """At the shapes of an 8B model. Seen: at most 16 KiB of shared memory, 188 registers, nothing spilled."""
    assert compiled.keys() == {*ARCHITECTURES, "large tile"}
    for arch in ARCHITECTURES:
        rows = compiled[arch]
        # 13 of 16 bits and 3 of t-SNE; 8 of float8; 13 of 32 bits
        assert len(rows) == {"80": 16, "89": 8, "90": 37}.get(arch, 24), arch
        assert not [row for row in rows if does_not_fit(row)], arch


def test_a_tile_that_does_not_fit_is_noticed(compiled):
    (row,) = compiled["large tile"]
    assert does_not_fit(row), row


@pytest.fixture(scope="module")
def launches():
    """{kernel: (launches, violations)} of all kernels, and of three that are there to be told apart."""
    return interpreted("check_addresses.py")


BROKEN = ("no_mask_kernel", "no_cast_kernel", "right_kernel")


def test_no_address_leaves_its_tensor_beyond_2_32_numbers(launches):
    violations = {kernel: count for kernel, (_, count) in launches.items() if kernel not in BROKEN}
    assert len(violations) > 15 and not any(violations.values()), violations


def test_a_lost_mask_and_a_lost_cast_are_noticed(launches):
    no_mask, no_cast, right = [launches[kernel][1] for kernel in BROKEN]
    assert no_mask and no_cast and not right
