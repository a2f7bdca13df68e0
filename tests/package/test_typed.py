# SPDX-License-Identifier: Apache-2.0
"""Named tuples of our own behave as those of the standard library."""

from __future__ import annotations

import copy
import pickle
import typing
from collections.abc import Callable

import pytest

from vhost_rpmb import typed


class Ours(typed.NamedTuple):
    one: int
    two: str = "2"
    three: bytes = b"3"

    def both(self) -> str:
        return f"{self.one}{self.two}"

    @classmethod
    def of(cls, text: str) -> Ours:
        return cls(int(text))


class Theirs(typing.NamedTuple):
    one: int
    two: str = "2"
    three: bytes = b"3"

    def both(self) -> str:
        return f"{self.one}{self.two}"

    @classmethod
    def of(cls, text: str) -> Theirs:
        return cls(int(text))


USES: list[Callable[[typing.Any], object]] = [
    lambda kind: kind(1),
    lambda kind: kind(1, three=b"x"),
    lambda kind: kind(one=1, two="x", three=b"x"),
    lambda kind: kind._make([1, "x", b"y"]),
    lambda kind: kind(1)._replace(two="x"),
    lambda kind: kind(1)._asdict(),
    lambda kind: kind.of("7").both(),
    lambda kind: (kind._fields, kind._field_defaults, kind.__match_args__, kind.__slots__),
    lambda kind: (kind(1).one, kind(1).two, kind(1)[2], kind(1)[:2], len(kind(1))),
    lambda kind: (kind(1) == (1, "2", b"3"), hash(kind(1)) == hash((1, "2", b"3"))),
    lambda kind: (kind(1) < kind(2), isinstance(kind(1), tuple), tuple(kind(1))),
    lambda kind: repr(kind(1)).partition("(")[1:],
    lambda kind: copy.copy(kind(1)),
    lambda kind: pickle.loads(pickle.dumps(kind(1))),
]
WRONG: list[Callable[[typing.Any], object]] = [
    lambda kind: kind(),
    lambda kind: kind(1, "2", b"3", 4),
    lambda kind: kind(1, one=1),
    lambda kind: kind(1, four=4),
    lambda kind: kind(1)._replace(four=4),
    lambda kind: kind._make([]),
    lambda kind: setattr(kind(1), "one", 2),
    lambda kind: setattr(kind(1), "four", 4),
]


@pytest.mark.parametrize("use", USES)
def test_results_are_the_same(use: Callable[[typing.Any], object]) -> None:
    assert use(Ours) == use(Theirs)
    assert Ours.__module__ == __name__


@pytest.mark.parametrize("use", WRONG)
def test_wrong_uses_are_errors_of_both(use: Callable[[typing.Any], object]) -> None:
    for kind in (Ours, Theirs):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            use(kind)
