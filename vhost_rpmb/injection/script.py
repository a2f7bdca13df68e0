# SPDX-License-Identifier: Apache-2.0
"""The script of the faults to inject: TOML, checked completely before anything is served.

Each rule selects requests and names one action. docs/guides/faults.md describes the keys.
"""

from __future__ import annotations

import enum
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vhost_rpmb.errors import UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.results import request_name, result_name

__all__ = ["WRITES", "Action", "Rule", "Script", "load"]

WRITES = frozenset({spec.VIRTIO_RPMB_REQ_PROGRAM_KEY, spec.VIRTIO_RPMB_REQ_DATA_WRITE})
_ADDRESSED = frozenset({spec.VIRTIO_RPMB_REQ_DATA_WRITE, spec.VIRTIO_RPMB_REQ_DATA_READ})
_DEFAULT_REQUESTS = _ADDRESSED | WRITES | {spec.VIRTIO_RPMB_REQ_GET_WRITE_COUNTER}
_REQUESTS = {
    request_name(number): number
    for number in sorted(_DEFAULT_REQUESTS | {spec.VIRTIO_RPMB_REQ_RESULT_READ})
}
_RESULTS = {
    result_name(number): number
    for number in (
        *range(spec.VIRTIO_RPMB_RES_NO_AUTH_KEY + 1),
        spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED,
    )
}
_FIELDS = ("mac", "nonce", "write_counter", "address", "block_count", "req_resp")
_MAX_ADDRESS = 0xFFFF
_MAX_RESULT = 0xFFFF
_MAX_COUNT = 1_000_000_000
_MAX_SECONDS = 86_400


class Action(enum.Enum):
    """What happens to a request."""

    ANSWER = "answer"  # with a result
    CORRUPT = "corrupt"  # one field of the answer
    DELAY = "delay"
    EMPTY = "empty"  # return the chain without an answer
    LOSE = "lose"  # never return the chain
    DISCONNECT = "disconnect"


# The key that each action needs in addition; no other rule may have it.
_NEEDS = {Action.ANSWER: "result", Action.CORRUPT: "field", Action.DELAY: "seconds"}


class Rule(NamedTuple):
    """A rule. Of the requests that it concerns it selects some by their number, from 1 on."""

    number: int  # in the script, from 1 on
    requests: frozenset[int]  # types
    addresses: range | None  # blocks; None: any or none
    first: int
    every: int
    times: int | None  # None: no limit
    action: Action
    after: bool  # the request is executed, and its writes are durable, before the action
    result: int
    field: str
    seconds: float

    def concerns(self, req_resp: int, blocks: range) -> bool:
        """Whether the rule counts a request of this type about these blocks."""
        wanted = self.addresses
        return req_resp in self.requests and (
            wanted is None or (blocks.start < wanted.stop and wanted.start < blocks.stop)
        )

    def selects(self, count: int) -> bool:
        """Whether the rule acts on the request with this number."""
        steps, rest = divmod(count - self.first, self.every)
        return steps >= 0 and not rest and (self.times is None or steps < self.times)

    def __str__(self) -> str:
        """The action, in words of the script."""
        detail = {
            Action.ANSWER: result_name(self.result),
            Action.CORRUPT: self.field,
            Action.DELAY: f"{self.seconds:g} s",
        }.get(self.action, "")
        words = [f"rule {self.number}: {self.action.value}", *filter(None, [detail])]
        if self.action is not Action.CORRUPT:
            words.append("after execution" if self.after else "before execution")
        return " ".join(words)


class Script(NamedTuple):
    """A valid script."""

    path: str
    write_counter: int | None  # to jump to at the start
    rules: tuple[Rule, ...]

    def check(self, blocks: int) -> None:
        """Check it against a device with that many blocks. Raises UsageError."""
        for rule in self.rules:
            if rule.addresses is not None and rule.addresses[-1] >= blocks:
                raise _Table(self.path, f"rule {rule.number}", {}).error(
                    "address", f"blocks 0 to {blocks - 1} of the image", rule.addresses[-1]
                )


class _Table:
    """The keys of one table that are not read yet; each error names file, table and key."""

    def __init__(self, path: str, name: str, values: Mapping[str, Any]) -> None:
        self._path = path
        self._name = name
        self._values = dict(values)

    def error(self, key: str, expected: str, found: object) -> UsageError:
        place = " ".join(filter(None, [f"{self._path}:", self._name and f"{self._name}:"]))
        return UsageError(
            f"{place} {key}: expected {expected}, found {found!r}: correct the script"
        )

    def take(self, key: str, default: Any = None) -> Any:
        return self._values.pop(key, default)

    def has(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> Any:
        value = self.take(key, default)
        if value is not default and not (type(value) is int and low <= value <= high):
            raise self.error(key, f"a number {low} to {high}", value)
        return value

    def word(self, key: str, valid: Sequence[str], default: str | None = None) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or value not in valid:
            raise self.error(key, " or ".join(valid), "nothing" if value is None else value)
        return value

    def end(self, valid: Sequence[str]) -> None:
        for key in self._values:
            raise self.error("key", " or ".join(valid), key)


def load(path: str) -> Script:
    """Read and check a script. Raises UsageError, whose one line names file, rule and key."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: name a readable TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected TOML, found: {error}: correct the script") from error
    table = _Table(path, "", values)
    counter = table.integer("write-counter", 0, spec.MAX_WRITE_COUNTER)
    rules = table.take("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise table.error("rule", "tables with the head [[rule]]", rules)
    table.end(("write-counter", "rule"))
    if counter is None and not rules:
        raise table.error("script", "a [[rule]] or write-counter", "neither")
    return Script(
        path,
        counter,
        tuple(
            _rule(number, _Table(path, f"rule {number}", rule))
            for number, rule in enumerate(rules, 1)
        ),
    )


def _rule(number: int, table: _Table) -> Rule:
    action = Action(table.word("action", [each.value for each in Action]))
    for owner, key in _NEEDS.items():
        if table.has(key) != (owner is action):
            expected = f"{key} with action {owner.value}, and only there"
            raise table.error(key, expected, f"action {action.value}")
    requests = _requests(table)
    addresses = _addresses(table, requests)
    first, every, times = _selection(table)
    after = False
    if action is Action.CORRUPT and table.has("when"):
        raise table.error("when", "no such key with action corrupt", table.take("when"))
    after = table.word("when", ("before", "after"), "before") == "after"
    rule = Rule(
        *(number, requests, addresses, first, every, times, action, after),
        result=_result(table, requests) if action is Action.ANSWER else 0,
        field=table.word("field", _FIELDS) if action is Action.CORRUPT else "",
        seconds=_seconds(table) if action is Action.DELAY else 0.0,
    )
    table.end(_KEYS)
    return rule


_KEYS = (
    *("request", "address", "nth", "from", "every", "times"),
    *("action", "when", "result", "field", "seconds"),
)


def _requests(table: _Table) -> frozenset[int]:
    if not table.has("request"):
        return _DEFAULT_REQUESTS
    value = table.take("request")
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in _REQUESTS for name in names):
        raise table.error("request", f"one or more of {', '.join(_REQUESTS)}", value)
    return frozenset(_REQUESTS[name] for name in names)


def _addresses(table: _Table, requests: frozenset[int]) -> range | None:
    """Read ``address``: a block, or the first and the last one in a list."""
    if not table.has("address"):
        return None
    value = table.take("address")
    bounds = value if isinstance(value, list) else [value, value]
    if not (
        len(bounds) == 2
        and all(type(each) is int and 0 <= each <= _MAX_ADDRESS for each in bounds)
        and bounds[0] <= bounds[1]
    ):
        expected = f"a block, or [first, last], each 0 to {_MAX_ADDRESS}"
        raise table.error("address", expected, value)
    if not requests & _ADDRESSED:
        found = ", ".join(request_name(each) for each in sorted(requests))
        raise table.error("address", "it with DATA_WRITE or DATA_READ", f"request {found}")
    return range(bounds[0], bounds[1] + 1)


def _selection(table: _Table) -> tuple[int, int, int | None]:
    """Read ``nth``, or ``from``, ``every`` and ``times``."""
    nth = table.integer("nth", 1, _MAX_COUNT)
    if nth is not None:
        for key in ("from", "every", "times"):
            if table.has(key):
                raise table.error(key, "no such key beside nth", table.take(key))
        return nth, 1, 1
    first = table.integer("from", 1, _MAX_COUNT, 1)
    every = table.integer("every", 1, _MAX_COUNT, 1)
    return first, every, table.integer("times", 1, _MAX_COUNT)


def _result(table: _Table, requests: frozenset[int]) -> int:
    value = table.take("result")
    number = _RESULTS.get(value) if isinstance(value, str) else value
    if type(number) is not int or not 0 <= number <= _MAX_RESULT:
        expected = f"{', '.join(_RESULTS)} or a number 0 to {_MAX_RESULT}"
        raise table.error("result", expected, value)
    if number == spec.VIRTIO_RPMB_RES_OK and not requests <= WRITES:
        raise table.error("result", "OK with request DATA_WRITE or PROGRAM_KEY only", value)
    return number


def _seconds(table: _Table) -> float:
    value = table.take("seconds")
    if type(value) not in (int, float) or not 0 < value <= _MAX_SECONDS:
        raise table.error("seconds", f"more than 0, up to {_MAX_SECONDS}", value)
    return float(value)
