# SPDX-License-Identifier: Apache-2.0
"""A replicated engine in memory whose requests fail as a test plans: each one, in each way.

Time is that of the test. Each request has a number, counted from 0 over all clients of a cluster.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from vhost_rpmb.storage.fleet.engine import (
    Answer,
    Compare,
    Delete,
    Get,
    LeaseEnded,
    Operation,
    Page,
    Put,
    Refused,
    Unknown,
)

FOREVER = 1 << 30


class Kind(enum.Enum):
    LOSE_REQUEST = enum.auto()  # not applied, no answer
    LOSE_ANSWER = enum.auto()  # applied, no answer
    DELAY = enum.auto()  # no answer, applied before request ``due``
    DUPLICATE = enum.auto()  # applied and answered, a copy applied before request ``due``
    REFUSE = enum.auto()
    CRASH_BEFORE = enum.auto()  # the client dies; the request was not applied
    CRASH_AFTER = enum.auto()  # the client dies; the request was applied


class Fault(NamedTuple):
    kind: Kind
    due: int = FOREVER


class Crash(BaseException):
    """The death of a client: no handler of the store catches it."""


class Cluster:
    """The state of the engine; ``plan`` has the faults by the number of the request."""

    def __init__(
        self,
        plan: Mapping[int, Fault] | None = None,
        engine: Callable[[Cluster], FakeEngine] | None = None,
    ) -> None:
        self.engine = engine or FakeEngine  # of the clients that connect
        self.plan = dict(plan or {})
        self.now = 1000.0
        self.revision = 1
        self.data: dict[bytes, bytes] = {}
        self.on_lease: dict[bytes, int] = {}
        self.leases: dict[int, tuple[float, int]] = {}  # end, seconds
        self.changes: list[int] = []  # the numbers of requests that change something
        self.count = 0
        self.full = False  # puts are refused
        self._granted = 0
        self._late: list[tuple[int, Callable[[], object]]] = []

    def connect(self) -> FakeEngine:
        return self.engine(self)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._expire()

    def request(self, apply: Callable[[], object], changes: bool) -> object:
        number = self.count
        self.count += 1
        if changes:
            self.changes.append(number)
        self.now += 0.001
        self._expire()
        self.deliver(number)
        fault = self.plan.get(number)
        if fault is None:
            return apply()
        match fault.kind:
            case Kind.LOSE_REQUEST:
                raise Unknown("the request was lost")
            case Kind.DELAY:
                self._late.append((fault.due, apply))
                raise Unknown("the request is late")
            case Kind.LOSE_ANSWER:
                self._apply_unheard(apply)
                raise Unknown("the answer was lost")
            case Kind.DUPLICATE:
                self._late.append((fault.due, apply))
                return apply()
            case Kind.REFUSE:
                raise Refused("as planned")
            case Kind.CRASH_BEFORE:
                raise Crash
            case Kind.CRASH_AFTER:
                self._apply_unheard(apply)
                raise Crash

    def deliver(self, number: int = FOREVER) -> None:
        """Apply all late requests that are due before a request, or all of them."""
        due = [apply for at, apply in self._late if at <= number]
        self._late = [each for each in self._late if each[0] > number]
        for apply in due:
            self._apply_unheard(apply)

    @staticmethod
    def _apply_unheard(apply: Callable[[], object]) -> None:
        with suppress(Refused):
            apply()

    def _expire(self) -> None:
        for lease, (end, _) in list(self.leases.items()):
            if end <= self.now:
                self.end(lease)

    def end(self, lease: int) -> None:
        if self.leases.pop(lease, None) is not None:
            for key in [key for key, on in self.on_lease.items() if on == lease]:
                self.delete(key)

    def delete(self, key: bytes) -> None:
        self.data.pop(key, None)
        self.on_lease.pop(key, None)

    def txn(
        self, compare: Sequence[Compare], success: Sequence[Operation], failure: Sequence[Operation]
    ) -> Answer:
        succeeded = all(self.data.get(key) == value for key, value in compare)
        operations = success if succeeded else failure
        puts = [each for each in operations if isinstance(each, Put)]
        if any(put.lease and put.lease not in self.leases for put in puts):
            raise LeaseEnded("the lease has ended")
        if puts and self.full:
            raise Refused("no space")
        found = {}
        for operation in operations:
            match operation:
                case Put(key, value, lease):
                    self.delete(key)
                    self.data[key] = value
                    if lease:
                        self.on_lease[key] = lease
                case Delete(key, None):
                    self.delete(key)
                case Delete(key, end):
                    for each in [each for each in self.data if key <= each < (end or b"")]:
                        self.delete(each)
                case Get(key):
                    if key in self.data:
                        found[key] = self.data[key]
        if any(not isinstance(each, Get) for each in operations):
            self.revision += 1
        return Answer(succeeded, found, self.revision)

    def grant(self, seconds: int) -> int:
        if self.full:
            raise Refused("no space")
        self._granted += 1
        self.leases[self._granted] = (self.now + seconds, seconds)
        return self._granted

    def keepalive(self, lease: int) -> bool:
        if lease not in self.leases:
            return False
        seconds = self.leases[lease][1]
        self.leases[lease] = (self.now + seconds, seconds)
        return True


class FakeEngine:
    """The connection of one client to a cluster; implements `Engine`."""

    ports = frozenset({2379})

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
    ) -> Answer:
        changes = any(not isinstance(each, Get) for each in success)
        answer = self.cluster.request(lambda: self.cluster.txn(compare, success, failure), changes)
        assert isinstance(answer, Answer)
        return answer

    def range(self, key: bytes, end: bytes, limit: int) -> Page:
        def read() -> Page:
            keys = sorted(each for each in self.cluster.data if key <= each < end)
            return Page(
                [(each, self.cluster.data[each]) for each in keys[:limit]], len(keys) > limit
            )

        page = self.cluster.request(read, False)
        assert isinstance(page, Page)
        return page

    def grant(self, seconds: int) -> int:
        lease = self.cluster.request(lambda: self.cluster.grant(seconds), False)
        assert isinstance(lease, int)
        return lease

    def keepalive(self, lease: int) -> bool:
        return bool(self.cluster.request(lambda: self.cluster.keepalive(lease), True))

    def revoke(self, lease: int) -> None:
        self.cluster.request(lambda: self.cluster.end(lease), True)

    def close(self) -> None:
        pass
