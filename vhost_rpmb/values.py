# SPDX-License-Identifier: Apache-2.0
"""Values in command lines: text that is checked and converted, without `argparse`."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["MAX_DIGITS", "WrongValue", "number", "path"]

MAX_DIGITS = 10  # of a number


class WrongValue(ValueError):
    """A text that an option does not accept: expected and found."""


def number(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of a decimal number from `low` to `high`."""

    def parse(text: str) -> int:
        # Not int() alone: it also takes signs, spaces, underscores and non-ASCII digits.
        digits = text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS
        if not (digits and low <= int(text) <= high):
            raise WrongValue(f"expected a number {low} to {high}, found {text!r}")
        return int(text)

    return parse


def path(text: str) -> str:
    """Return ``text`` if it is usable as a path."""
    if not text:
        raise WrongValue("expected a path, found an empty string")
    return text
