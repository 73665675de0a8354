"""The short form of `make torture`: some faults of most kinds, none of which loses or changes anything.

A stopped rank takes a minute of waiting; test_runs.py::test_a_rank_that_hangs_is_named has it with a short
patience. Damaged checkpoints are test_checkpoint.py's.
"""

import pytest

from tools import torture


@pytest.mark.slow
@pytest.mark.parametrize("faults, number", [
    (("random kills", "flipped bits"), 1), (("placed kills", "full disk"), 3), (("two writers",), 1),
])  # fmt: skip
def test_faults(faults, number, capsys):
    code = torture.main([*faults, f"--number={number}"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err[-3000:]
    assert all(fault in printed.out for fault in faults)
