# SPDX-License-Identifier: Apache-2.0
"""Ownership of a device: one record that every change compares, and a lease that says "alive".

The owner's record alone fences writes; no clock is involved. The lease does two things: it tells
others to wait, and it bounds the time in which the owner may answer reads from its memory.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from vhost_rpmb.errors import Fenced, StateError, Stopped
from vhost_rpmb.storage.fleet.engine import (
    Answer,
    Compare,
    Get,
    LeaseEnded,
    Put,
    Refused,
    Unknown,
)
from vhost_rpmb.storage.fleet.layout import Keys, Malformed, Owner
from vhost_rpmb.storage.fleet.presence import Claim, Presence
from vhost_rpmb.storage.fleet.requests import Requests, named_refusals
from vhost_rpmb.storage.interface import TakeOver

__all__ = [
    "ACTIVE",
    "EXPORTED",
    "Ownership",
    "active_owner",
    "boot_time",
    "present_owner",
    "take_over",
    "try_take_over",
]

ACTIVE = "active"
EXPORTED = "exported"  # the device is in files
_POLL = 0.2  # seconds between two looks at a device that another daemon owns
_RELEASE_TRIES = 3
_HOST = socket.gethostname()  # before a sandbox, which does not allow to ask


def boot_time() -> float:
    """Return seconds that also pass while the host sleeps, unlike those of CLOCK_MONOTONIC."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Ownership:
    """The right to change one device, from `take_over` until another daemon takes it over.

    ``until`` (in seconds of the clock): before that no other daemon can have become the owner by
    waiting for the end of the lease, so the state in memory is the latest one. The margin covers
    clocks of different rates. ``found``: the records of the device when it was taken over.
    """

    def __init__(
        self,
        requests: Requests,
        keys: Keys,
        owner: Owner,
        claim: Claim,
        found: Answer,
        *,
        lease: int,
        lease_seconds: int,
        until: float,
        clock: Callable[[], float],
    ) -> None:
        self.record = owner.pack()
        self.owner = owner
        self.until = until
        self.found = found
        self._requests = requests
        self._keys = keys
        self._claim = claim
        self._lease = lease  # 0: none
        self._attached = True  # the key "alive" is on the lease
        self._seconds = lease_seconds
        self._clock = clock

    @property
    def certain(self) -> bool:
        """Whether the state in memory is the latest one."""
        return self._clock() < self.until

    @property
    def compare(self) -> Compare:
        """The condition of every change."""
        return Compare(self._keys.owner, self.record)

    def check(self, record: bytes | None) -> None:
        """Raise Fenced unless the record is this daemon's."""
        if record != self.record:
            raise Fenced(
                f"device {self._keys.device}: expected this daemon as its owner, found"
                f" {_describe(record)}: leave the device there, or take it over by a new start"
            )

    def renew(self) -> bool:
        """Move ``until`` ahead: one try of each request, so that it never waits long.

        If the lease has ended and no other daemon came, a new lease is attached. False: no answer,
        and ``until`` stays. Raises Fenced if another daemon owns the device.
        """
        engine = self._requests.engine
        try:
            if self._lease and self._attached:
                if self._keep_alive():
                    return True
                self._lease = 0
            if not self._lease:
                self._lease, self._attached = engine.grant(self._seconds), False
            self._attach()
            if not self._attached:
                return False  # the key of the earlier lease is about to disappear
            return self._keep_alive()
        except Refused:
            self._lease = 0  # it ended before it was attached, or the engine takes no writes
        except Unknown:
            pass  # the same lease is attached by the next call, whatever became of this one
        return False

    def _keep_alive(self) -> bool:
        """Extend the lease. False if it has ended."""
        sent = self._clock()
        if not self._requests.engine.keepalive(self._lease):
            return False
        # Of an owner that was replaced without waiting the lease lives on.
        answer = self._requests.engine.txn([self.compare], [], [Get(self._keys.owner)])
        if not answer.succeeded:
            self.check(answer.found.get(self._keys.owner))
        self.until = sent + reading_time(self._seconds)
        return True

    def _attach(self) -> None:
        mark = alive_mark(self.owner, self._lease)
        answer = self._requests.engine.txn(
            [self.compare, Compare(self._keys.alive, None)],
            [Put(self._keys.alive, mark, self._lease)],
            [Get(self._keys.owner), Get(self._keys.alive)],
        )
        if not answer.succeeded:
            self.check(answer.found.get(self._keys.owner))
        self._attached = answer.succeeded or answer.found.get(self._keys.alive) == mark

    def release(self, *, free: bool = False) -> None:
        """Let another daemon take the device over at once: the end of the lease removes its key.

        ``free``: that key was deleted, and the lease may end by itself.
        """
        self.until = 0
        revoked = free
        for _ in range(0 if free else _RELEASE_TRIES):
            try:
                if self._lease:
                    self._requests.engine.revoke(self._lease)
                revoked = True
            except Unknown:
                continue
            except Refused:
                pass
            break
        self._lease = 0
        # If its key stays until the lease ends by itself, this host goes on by the proof.
        self._claim.release(keep=not revoked)


def reading_time(lease_seconds: int) -> float:
    """Return how long after the request that started a lease's time reads may be answered."""
    return lease_seconds - max(1, lease_seconds / 5)


def alive_mark(owner: Owner, lease: int) -> bytes:
    """Return the value of the key "alive": unique for owner and lease."""
    return f"{owner.token}:{lease:x}".encode()


def _describe(record: bytes | None) -> str:
    if record is None:
        return "no daemon (its record is missing)"
    try:
        return str(Owner.unpack(record))
    except Malformed as error:
        return f"an unknown daemon ({error})"


def take_over(
    requests: Requests,
    keys: Keys,
    mode: TakeOver,
    presence: Presence,
    *,
    lease_seconds: int,
    clock: Callable[[], float] = boot_time,
    waiting: Callable[[Owner], None] = lambda owner: None,
) -> Ownership:
    """Become the owner of a device, and wait for that as ``mode`` says, see `try_take_over`.

    ``waiting`` is called once with the present owner. Raises as `try_take_over` does.
    """
    told = False
    while True:
        outcome = try_take_over(
            requests, keys, mode, presence, lease_seconds=lease_seconds, clock=clock
        )
        if isinstance(outcome, Ownership):
            return outcome
        if not told:
            waiting(outcome)
            told = True
        requests.wait(_POLL)


def try_take_over(
    requests: Requests,
    keys: Keys,
    mode: TakeOver,
    presence: Presence,
    *,
    lease_seconds: int,
    clock: Callable[[], float] = boot_time,
    seen: Mapping[bytes, bytes] | None = None,
    after: str | None = None,
    intending: Callable[[Owner], None] = lambda owner: None,
) -> Ownership | Owner:
    """Become the owner of a device, or return the present one, whose lease has not ended.

    ``after``: the token of the only owner that may be replaced; raises `Fenced` for another.
    ``intending`` is called with the owner to be, before each attempt.

    ``mode``: "expired" leaves a device to an owner that is alive, "never" refuses it with an error,
    "now" looks at no lease: writes of the previous owner fail from then on, but it may answer reads
    until it renews its lease, so it has to be dead. An owner of this host that ``presence`` proves
    to be dead is replaced without its lease in each mode. ``seen``: the records as they were; if
    the device was only released since, they need not be read. Raises StateError and `Stopped`.
    """
    guess = seen is not None and mode == "expired"
    attempt = None
    with named_refusals(f"to give out {keys.device}"):
        found = seen if seen is not None and guess else _read(requests, keys)
        try:
            while True:
                before, alive = present_owner(keys, found, mode, presence)
                if after is not None and before.token != after:
                    raise Fenced(
                        f"device {keys.device} is superseded: expected the owner that handed it"
                        f" over, found {before}: use it there"
                    )
                if alive and mode != "now" and not guess:
                    if attempt is not None:
                        attempt.end(requests)
                    return before
                if attempt is None:
                    attempt = _Attempt(requests, presence, lease_seconds, clock)
                owner = attempt.owner(before)
                intending(owner)
                # Of a dead or replaced owner only the token counts: its lease may go on.
                any_lease = mode == "now" or (keys.alive in found and not alive)
                try:
                    answer = attempt.make(requests, keys, found, owner, any_lease=any_lease)
                except LeaseEnded:
                    attempt.end(requests)
                    attempt, found = None, _read(requests, keys)
                    continue
                if answer.succeeded or answer.found.get(keys.owner) == owner.pack():
                    presence.clear()
                    return Ownership(
                        requests,
                        keys,
                        owner,
                        attempt.claim,
                        answer,
                        lease=attempt.lease,
                        lease_seconds=lease_seconds,
                        until=attempt.sent + reading_time(lease_seconds),
                        clock=clock,
                    )
                found, guess = answer.found, False
        except BaseException as error:
            if attempt is not None:
                attempt.claim.release(keep=True)  # the change may be applied
                if isinstance(error, Refused | StateError | Stopped):
                    _revoke(requests, attempt.lease)
            raise


class _Attempt:
    """A token, its lock and a lease, with which a device is about to be taken over."""

    def __init__(
        self,
        requests: Requests,
        presence: Presence,
        lease_seconds: int,
        clock: Callable[[], float],
    ) -> None:
        self.sent = clock()
        self.lease = requests.grant(lease_seconds)
        self._token = secrets.token_hex(16)
        self.claim = presence.claim(self._token)  # before another daemon can see the token

    def owner(self, before: Owner) -> Owner:
        """The owner that replaces another one."""
        return Owner(before.epoch + 1, self._token, _HOST, os.getpid(), ACTIVE)

    def make(
        self,
        requests: Requests,
        keys: Keys,
        found: Mapping[bytes, bytes],
        owner: Owner,
        *,
        any_lease: bool,
    ) -> Answer:
        """Replace the owner that was found by another; return the records of the device."""
        compare = [Compare(keys.owner, found[keys.owner])]
        if not any_lease:
            compare.append(Compare(keys.alive, None))
        records = [Get(key) for key in (keys.head, keys.info, keys.incarnation)]
        mark = alive_mark(owner, self.lease)
        return requests.change(
            compare,
            [Put(keys.owner, owner.pack()), Put(keys.alive, mark, self.lease), *records],
            [Get(keys.owner), Get(keys.alive), *records],
        )

    def end(self, requests: Requests) -> None:
        """Give it up: the change was definitely not applied."""
        self.claim.release()
        _revoke(requests, self.lease)


def _read(requests: Requests, keys: Keys) -> Mapping[bytes, bytes]:
    return requests.read([], [keys.owner, keys.alive]).found


def present_owner(
    keys: Keys, found: Mapping[bytes, bytes], mode: TakeOver, presence: Presence
) -> tuple[Owner, bool]:
    """Return the owner in the records, and whether it may be alive.

    Raises StateError if no daemon may take the device over.
    """
    record = found.get(keys.owner)
    if record is None:
        raise StateError(
            f"the device {keys.device}: expected one below {keys.prefix.decode()}, found none:"
            " create it first, or check prefix and name"
        )
    owner = active_owner(record, keys.device)
    alive = keys.alive in found and not presence.is_dead(owner.token)
    if alive and mode == "never":
        raise StateError(f"the device {keys.device} is in use by {owner}: stop that daemon first")
    return owner, alive


def active_owner(record: bytes, device: str) -> Owner:
    """Return the owner's record. Raises StateError if no daemon may take the device over."""
    try:
        owner = Owner.unpack(record)
    except Malformed as error:
        raise StateError(f"the device {device}: {error}: restore the store") from error
    if owner.state != ACTIVE:
        raise StateError(f"the device {device} is {owner.state}: use it where it is now")
    return owner


def _revoke(requests: Requests, lease: int) -> None:
    """End a lease if the engine answers; otherwise it ends by itself."""
    with suppress(Refused, Unknown):
        requests.engine.revoke(lease)
