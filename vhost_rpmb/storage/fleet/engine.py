# SPDX-License-Identifier: Apache-2.0
"""The contract of a replicated engine: transactions that compare, ranges and leases.

An implementation sends each request exactly once. It never repeats one by itself: whether that is
safe is decided in `vhost_rpmb.storage.fleet.requests`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

__all__ = [
    "Answer",
    "Compare",
    "Delete",
    "Engine",
    "Get",
    "LeaseEnded",
    "Operation",
    "Page",
    "Put",
    "Refused",
    "Unknown",
]


class Refused(Exception):
    """The engine refused the request: it was not applied and never will be."""


class LeaseEnded(Refused):
    """A key was to be put on a lease that has ended, which no lease will ever do again.

    All compares held, so no earlier copy of the transaction was applied, and no later one can be.
    """


class Unknown(Exception):
    """No definite answer: the request was applied, or will be at any later time, or never."""


class Compare(NamedTuple):
    """The key has exactly this value; None: the key is absent.

    Values and not revisions: revisions repeat after a backup was restored.
    """

    key: bytes
    value: bytes | None


class Put(NamedTuple):
    """Set a key; with a lease, until that ends. Refused if the lease has ended already."""

    key: bytes
    value: bytes
    lease: int = 0


class Delete(NamedTuple):
    """Delete one key, or all keys from ``key`` up to ``end``, which is excluded."""

    key: bytes
    end: bytes | None = None


class Get(NamedTuple):
    """Read one key."""

    key: bytes


Operation = Put | Delete | Get


class Answer(NamedTuple):
    """The outcome of a transaction: whether all compares held, and the keys that were read."""

    succeeded: bool
    found: Mapping[bytes, bytes]
    revision: int  # of the engine, increased by each change of any key


class Page(NamedTuple):
    """A part of a range in the order of the keys; ``more``: the range continues behind it."""

    pairs: Sequence[tuple[bytes, bytes]]
    more: bool


class Engine(Protocol):
    """Strictly serializable; each method raises `Refused` or `Unknown`."""

    @property
    def ports(self) -> frozenset[int]:
        """The TCP ports that it connects to, also later."""

    def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
    ) -> Answer:
        """Apply ``success`` if all compares hold, else ``failure``, atomically and durably."""

    def range(self, key: bytes, end: bytes, limit: int) -> Page:
        """Read up to ``limit`` keys from ``key`` up to ``end``, which is excluded."""

    def grant(self, seconds: int) -> int:
        """Create a lease, which ends that long after the grant or the last `keepalive`."""

    def keepalive(self, lease: int) -> bool:
        """Start the time of a lease again; False if it has ended."""

    def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; nothing happens if it has ended."""

    def close(self) -> None:
        """Close connections; idempotent."""
