"""What the diff tools print.

One row per quantity with a verdict, then the reasons and the first disagreements in context.
"""

import contextlib
import sys
from dataclasses import dataclass

import numpy as np

from plumbing.files import table

EQUAL, INTENDED, DIFFERS, SKIPPED = "equal", "intended", "DIFFERS", "not compared"


class NotCompared(Exception):
    """The other side's code cannot be run as it is called here, or a part of it is missing."""


@dataclass(frozen=True)
class Row:
    """One quantity.

    note: why a difference is intended, why nothing was compared, what decided, or the first disagreement.
    """

    quantity: str
    size: str  # what was compared, "24 texts"
    difference: str  # the largest, or how many of them differ
    verdict: str
    note: str = ""


def call(function, *args, **kwargs):
    """function(*args, **kwargs) of the other side.

    NotCompared, saying what it raised: its signature or its libraries are others.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is not ours
            return function(*args, **kwargs)
    except Exception as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise NotCompared(f"{name} of theirs raised {type(error).__name__}: {error}") from error


def items(quantity, unit, ours, theirs, describe):
    """Row for two equally long lists of things that must be equal.

    describe(i) is the context of the first that differ.
    """
    assert len(ours) == len(theirs)
    unequal = []
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            unequal.append(i)
    note = describe(unequal[0]) if unequal else ""
    return Row(
        quantity,
        f"{len(ours):,} {unit}{'s' * (len(ours) != 1)}",
        f"{len(unequal):,} differ",
        DIFFERS if unequal else EQUAL,
        note,
    )


def gap(ours, theirs):
    """The largest difference, relative to the largest of theirs."""
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float64).tiny)


def numbers(quantity, unit, ours, theirs, tolerance, intended=None):
    """Row for two arrays. The difference is relative to the largest of theirs; `tolerance` bounds it.

    intended: (array, why), what theirs should be if the known difference is the only one: checked before it
    is called intended.
    """
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape and ours.size
    size, difference = f"{ours.size:,} {unit}{'s' * (ours.size != 1)}", gap(ours, theirs)
    if difference <= tolerance:
        return Row(quantity, size, f"{difference:.1e}", EQUAL)
    if intended is not None:
        known, why = intended
        rest = gap(known, theirs)
        if rest <= tolerance:
            return Row(
                quantity,
                size,
                f"{difference:.1e}",
                INTENDED,
                f"{why} (computed that way, ours differs by {rest:.1e})",
            )
    first = np.argmax(np.abs(ours - theirs).ravel() > tolerance * np.abs(theirs).max())
    note = f"number {first}: ours {ours.ravel()[first]:.8g}, theirs {theirs.ravel()[first]:.8g}"
    return Row(quantity, size, f"{difference:.1e}", DIFFERS, note)


def first_difference(ours, theirs):
    """The first place in which two sequences differ; the shorter's end where it begins the longer."""
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return i
    return min(len(ours), len(theirs))


def text_context(ours, theirs):
    """The surroundings of the first character in which two strings differ."""
    at = first_difference(ours, theirs)
    near = slice(max(0, at - 40), at + 40)
    return f"character {at}: ours {ours[near]!r}, theirs {theirs[near]!r}"


def print_table(rows):
    """Print the table and the notes; returns the exit code.

    1 for a disagreement, else 2 for something not compared, else 0.
    """
    lines = [[row.quantity, row.size, row.difference, row.verdict] for row in rows]
    print(table(["quantity", "compared", "largest difference", "verdict"], lines, left=(0, -1)))
    titles = {
        EQUAL: "Decided",
        INTENDED: "Intended differences",
        DIFFERS: "Disagreements",
        SKIPPED: "Not compared",
    }
    for verdict, title in titles.items():
        noted = [row for row in rows if row.verdict == verdict and row.note]
        if noted:
            print(f"\n{title}: {len(noted)}")
        for row in noted:
            print(f"  {row.quantity}: {row.note}")
    verdicts = {row.verdict for row in rows}
    if DIFFERS in verdicts:
        return 1
    return 2 if SKIPPED in verdicts else 0
