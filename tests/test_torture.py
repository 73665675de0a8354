"""The short form of `make torture`: some faults of every kind, none of which loses or changes anything."""

import pytest

from tools import torture


@pytest.mark.slow
@pytest.mark.parametrize("faults, number", [
    (("random kills", "flipped bits"), 3), (("placed kills", "full disk"), 6), (("two writers", "stopped rank"), 1),
])  # fmt: skip
def test_faults(faults, number, capsys):
    code = torture.main([*faults, f"--number={number}"])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err[-3000:]
    assert all(fault in printed.out for fault in faults)
