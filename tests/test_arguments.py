"""tools/arguments.py in every tool that has a number or a template on its command line."""

import pytest

from tools import compare, diff_open_instruct, diff_trl, from_open_instruct, torture

TRL = ["--model", "x", "--data", "y"]


@pytest.mark.parametrize(
    "main, args, flag, value, expected",
    [
        (diff_trl.main, TRL, "--train", "0", "a whole number >= 1"),
        (diff_trl.main, TRL, "--train", "1.5", "a whole number >= 1"),
        (diff_trl.main, [*TRL, "--train=1"], "--batch", "0", "a whole number >= 1"),
        (diff_trl.main, [*TRL, "--train=1"], "--rows", "0", "a whole number >= 1"),
        (diff_trl.main, [*TRL, "--train=1"], "--max-seq-len", "1", "a whole number >= 2"),
        (diff_trl.main, [*TRL, "--train=1"], "--lr", "0", "a number > 0"),
        (diff_trl.main, [*TRL, "--train=1"], "--lr", "nan", "a number > 0"),
        (diff_trl.main, [*TRL, "--train=1"], "--lr", "fast", "a number > 0"),
        (diff_trl.main, [*TRL, "--train=1"], "--template", "foo", "choose from"),
        (diff_open_instruct.main, ["--trl", *TRL], "--rows", "-1", "a whole number >= 1"),
        (diff_open_instruct.main, ["--trl", *TRL], "--max-seq-len", "0", "a whole number >= 2"),
        (diff_open_instruct.main, ["--trl", *TRL], "--template", "foo", "choose from"),
        (from_open_instruct.main, ["x.yaml"], "--processes", "0", "a whole number >= 1"),
        (compare.main, ["x", "y"], "--count", "0", "a whole number >= 1"),
        (compare.main, ["x", "y"], "--max-text-tokens", "1", "a whole number >= 2"),
        (compare.main, ["x", "y"], "--tensors", "-1", "a whole number >= 0"),
        (torture.main, ["no fault"], "--number", "0", "a whole number >= 1"),
    ],
)
def test_refused(main, args, flag, value, expected, capsys):
    """The last line, behind the usage, has the argument, its value and what was expected."""
    with pytest.raises(SystemExit):
        main([*args, f"{flag}={value}"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag}: " in line and repr(value) in line and expected in line
