"""Numbers on the command lines of the tools, for `type=` of argparse: a wrong one is refused by its name."""

import argparse
import math


def at_least(minimum):
    """A reader of whole numbers that are not below `minimum`."""

    def read(text):
        try:
            number = int(text)
        except ValueError:
            number = -math.inf
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number >= {minimum}")
        return number

    return read


def above_zero(text):
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number > 0")
    return number
