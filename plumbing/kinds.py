"""Which values the keys of other programs' JSON may have: config.json, index files, adapter_config.json."""

import math
import reprlib
from collections.abc import Callable
from typing import NamedTuple

from plumbing.files import UserError


class Kind(NamedTuple):
    """A set of values. `fits` takes a bool for a bool, never for 0 or 1."""

    expected: str
    fits: Callable

    def __or__(self, other):
        return Kind(
            f"{self.expected} or {other.expected}", lambda value: self.fits(value) or other.fits(value)
        )


def check(source, raw, kinds):
    """UserError naming the source and every key of the dict `raw` whose value is not of the key's Kind.

    An absent key passes.
    """
    problems = []
    for key, kind in kinds.items():
        if key in raw and not kind.fits(raw[key]):
            problems.append(f"{key}={reprlib.repr(raw[key])}: expected {kind.expected}")
    if problems:
        raise UserError(f"{source}: " + "; ".join(problems))


def list_of(kind):
    """Lists whose items are of `kind`."""

    def fits(value):
        return isinstance(value, list) and all(map(kind.fits, value))

    return Kind(f"a list, each {kind.expected}", fits)


def map_to(kind):
    """Objects whose values are of `kind`."""

    def fits(value):
        return isinstance(value, dict) and all(map(kind.fits, value.values()))

    return Kind(f"an object, each value {kind.expected}", fits)


def object_with(kinds_of_keys):
    """Objects that have each of these keys, with a value of its Kind."""

    def fits(value):
        return isinstance(value, dict) and all(
            key in value and kind.fits(value[key]) for key, kind in kinds_of_keys.items()
        )

    return Kind(f"an object with {', '.join(kinds_of_keys)}", fits)


def _integer(low, high):
    return Kind(f"an integer from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _is_text(value):
    # json reads half a surrogate pair, which no UTF-8 file can hold and no tokenizer takes
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


NULL = Kind("null", lambda value: value is None)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", _is_text)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
SIZE = _integer(1, 2**31 - 1)
LAYERS = _integer(1, 10_000)  # each is built before its weights are looked for
LAYER = _integer(0, 9_999)
TOKEN_ID = _integer(-1, 2**31 - 1)  # some files say -1 for none
NUMBER = Kind("a finite number", _is_number)
NOT_NEGATIVE = Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
