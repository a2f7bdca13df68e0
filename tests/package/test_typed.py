# SPDX-License-Identifier: Apache-2.0
"""Named tuples and enumerations of our own behave as those of the standard library."""

from __future__ import annotations

import copy
import enum
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


class OurNumber(typed.IntEnum):
    ONE = 1
    TWO = 2


class TheirNumber(enum.IntEnum):
    ONE = 1
    TWO = 2


class OurFlag(typed.IntFlag):
    LOW = 1
    HIGH = 4


class TheirFlag(enum.IntFlag):
    LOW = 1
    HIGH = 4


ENUMERATION_USES: list[Callable[[typing.Any, typing.Any], object]] = [
    lambda number, _: [(each.name, int(each)) for each in number],
    lambda number, _: number(2) is number.TWO,
    lambda number, flag: (number["TWO"] is number.TWO, flag["HIGH"] is flag.HIGH),
    lambda number, flag: (number.TWO.value, flag.HIGH.value),
    lambda number, _: (number.ONE == 1, number.ONE in {1}, {1: "x"}[number.ONE]),
    lambda number, _: (f"{number.ONE}", str(number.TWO), f"{number.TWO:x}"),
    lambda number, _: repr(number.ONE).partition(".")[2],
    lambda number, _: isinstance(number.ONE, number),
    lambda number, _: copy.copy(number.ONE) is number.ONE,
    lambda number, _: pickle.loads(pickle.dumps(number.ONE)) is number.ONE,
    lambda _, flag: (flag(0) == 0, flag(4).name, int(flag(5)), int(flag(1 << 22))),
    lambda _, flag: (int(flag.LOW | flag.HIGH), flag.LOW & 5, bool(flag.LOW & flag.HIGH)),
    lambda _, flag: (7 & ~flag.LOW, f"{flag.HIGH:x}"),
]


@pytest.mark.parametrize("use", ENUMERATION_USES)
def test_enumerations_are_used_in_the_same_way(
    use: Callable[[typing.Any, typing.Any], object],
) -> None:
    assert use(OurNumber, OurFlag) == use(TheirNumber, TheirFlag)


@pytest.mark.parametrize("kind", [OurNumber, TheirNumber])
def test_a_number_without_member_is_an_error(kind: typing.Any) -> None:
    with pytest.raises(ValueError, match="3 is not a valid"):
        kind(3)
