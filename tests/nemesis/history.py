# SPDX-License-Identifier: Apache-2.0
"""What clients saw of a device, and the check against all commits that the store ever had.

The chain of commits is read from the store's own history, each entry authenticated. An answer is
right if it fits the order of that chain and the time between request and answer.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

from tests.nemesis.store import Change
from vhost_rpmb.storage.fleet.contents import Device
from vhost_rpmb.storage.fleet.layout import NO_CHAIN, Entry, Head, Keys, chain

ADDRESSES = 16
BLOCK = 256


class Operation(NamedTuple):
    """``kind``: "write", "read" or "counter". ``result``: "ok", "failed", or "": no answer."""

    kind: str
    began: float
    ended: float
    address: int
    data: bytes
    counter: int  # of a write: after it; of a read of the counter: the answer
    result: str


class History:
    """The operations of all clients of one device, on one clock."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._lock = threading.Lock()

    def add(self, operation: Operation) -> None:
        with self._lock:
            self.operations.append(operation)

    def acknowledged(self) -> int:
        return sum(each.kind == "write" and each.result == "ok" for each in self.operations)


def now() -> float:
    return time.monotonic()


class Commit(NamedTuple):
    counter: int
    blocks: dict[int, bytes]


def walk(changes: Iterable[Change], keys: Keys, device: Device) -> list[Commit]:
    """Return the commits in their order; each is authentic, and follows the one before."""
    sealer, life = device.sealer, device.info.life
    commits: list[Commit] = []
    log = keys.log(life)
    entries: dict[int, bytes] = {}
    heads: list[Head] = []
    for change in changes:
        if change.value is None:
            continue
        if change.key.startswith(log):
            number = int(change.key[len(log) :], 16)
            assert number not in entries, f"log entry {number} was replaced"
            entries[number] = change.value
        elif change.key == keys.head:
            assert Head.is_authentic(change.value, sealer), "a head is not authentic"
            heads.append(Head.unpack(change.value))
    value, seq, counter = NO_CHAIN, 0, 0
    for head in heads:
        if head.seq == seq:
            assert head.chain == value, "two states have one number"
            continue
        assert head.seq == seq + 1, f"expected commit {seq + 1}, found {head.seq}"
        seq += 1
        value = chain(value, entries[seq])
        assert head.chain == value, f"commit {seq} does not follow the one before"
        entry = Entry.unpack(sealer.open(entries[seq], Entry.place(seq)))
        assert entry.counter == head.counter >= counter
        counter = entry.counter
        commits.append(Commit(counter, dict(entry.blocks)))
    return commits


def check(history: History, commits: list[Commit]) -> None:
    """Raise AssertionError for an answer that contradicts the commits."""
    writes = [each for each in history.operations if each.kind == "write"]
    by_data: dict[bytes, int] = {}  # the counter after the commit of a block's data
    versions: dict[int, tuple[list[int], list[bytes]]] = {
        a: ([0], [bytes(BLOCK)]) for a in range(ADDRESSES)
    }
    last = 0
    for commit in commits:
        assert commit.counter in (last, last + 1) or not commit.blocks, "a gap of the counter"
        last = commit.counter
        for address, data in commit.blocks.items():
            assert data not in by_data, "a write was applied twice"
            by_data[data] = commit.counter
            versions[address][0].append(commit.counter)
            versions[address][1].append(data)
    began = {each.data: each.began for each in writes}
    acknowledged: dict[int, Operation] = {}
    for write in writes:
        if write.result == "ok":
            assert write.counter not in acknowledged, "a counter was acknowledged twice"
            acknowledged[write.counter] = write
            assert by_data.get(write.data) == write.counter, (
                f"an acknowledged write is lost: {write}"
            )
        elif write.result == "failed":
            assert write.data not in by_data, f"a write that failed was applied: {write}"
    known = _Known(history.operations)
    for each in history.operations:
        if each.result != "ok" or each.kind == "write":
            continue
        least = known.at(each.began)
        if each.kind == "counter":
            assert each.counter >= least, f"a stale counter: {least} was known: {each}"
            continue
        counters, contents = versions[each.address]
        assert each.data in contents, f"read data that no commit has: {each}"
        assert each.data not in began or began[each.data] <= each.ended, "a read of the future"
        position = len(contents) - 1 - contents[::-1].index(each.data)
        replaced = counters[position + 1] if position + 1 < len(counters) else last + 1
        assert replaced > least, f"a stale read: replaced by {replaced}, {least} was known: {each}"


class _Known:
    """The highest counter that any client knew of at a time."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        found = sorted(
            (each.ended, each.counter)
            for each in operations
            if each.result == "ok" and each.kind != "read"
        )
        self._times = [time_ for time_, _ in found]
        self._highest: list[int] = []
        for _, counter in found:
            self._highest.append(max(counter, self._highest[-1] if self._highest else 0))

    def at(self, moment: float) -> int:
        position = bisect.bisect_left(self._times, moment)
        return self._highest[position - 1] if position else 0
