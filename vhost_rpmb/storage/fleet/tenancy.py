# SPDX-License-Identifier: Apache-2.0
"""A device that is owned only while its ring runs, so that it can move with its virtual machine.

The daemon at the destination is started, and has the device in memory, before the one at the source
gives it up. Whoever starts a ring takes the device over, and a move that fails takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vhost_rpmb.errors import Fenced, StateError, Stopped
from vhost_rpmb.log import Logger
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.fleet.engine import Refused
from vhost_rpmb.storage.fleet.layout import Owner
from vhost_rpmb.storage.fleet.opening import Opening, say_waiting
from vhost_rpmb.storage.fleet.ownership import (
    Ownership,
    active_owner,
    boot_time,
    try_take_over,
)
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.fleet.witness import Witness
from vhost_rpmb.storage.interface import Resources, TakeOver

__all__ = ["Tenancy"]

logger = Logger(__name__)


class Tenancy:
    """The device as this daemon has it: owned between `begin` and `end`, otherwise only in memory.

    Implements `vhost_rpmb.storage.interface.SharedStore`. Size and name are known from the start.
    The rest is the latest state only while the device is owned; only then `commit` and `confirm`
    may be called. The mode is that of the first take-over: what an operator knows of the previous
    owner does not hold for a later one, which is waited for.
    """

    def __init__(
        self,
        opening: Opening,
        *,
        mode: TakeOver,
        lease_seconds: int,
        clock: Callable[[], float] = boot_time,
    ) -> None:
        self._opening = opening
        self._mode = mode
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._state = opening.look(mode)
        self._store: FleetStore | None = None
        self._witness: Witness | None = None  # of the last time that the device was owned
        self._seen: Mapping[bytes, bytes] | None = self._state.found  # and not tried
        self.after: str | None = None  # the token of the only owner that `begin` may replace
        # Called with the owner that this daemon is about to be, before the store is asked.
        self.intending: Callable[[Owner], None] = lambda owner: None
        self.owner: Owner | None = None  # as which it was owned last
        self._told = False  # that another daemon owns the device
        self._closed = False
        info = self._state.device.info
        self.name = info.life[:16]
        self.image = memoryview(self._state.contents.memory)
        self.damaged = bytearray(info.size // spec.BLOCK_SIZE)

    # Ownership

    @property
    def owned(self) -> bool:
        """Whether this daemon owns the device."""
        return self._store is not None

    def begin(self) -> bool:
        """Own the device; False: another daemon owns it, try again later.

        Raises StateError, `Fenced` and `Stopped`.
        """
        if self._store is not None:
            return True
        keys = self._opening.keys
        outcome = try_take_over(
            self._opening.requests,
            keys,
            self._mode,
            self._opening.presence,
            lease_seconds=self.lease_seconds,
            clock=self._clock,
            seen=self._seen if self.after is None else None,
            after=self.after,
            intending=self.intending,
        )
        self._seen = None
        if not isinstance(outcome, Ownership):
            if not self._told:
                say_waiting(keys.device, outcome)
                self._told = True
            return False
        self._store = self._opening.own(outcome, self._state)
        self._witness = self._store.witness
        self.owner, self.after = outcome.owner, None
        self._mode, self._told = "expired", False
        logger.info("device %s is owned by this daemon", keys.device)
        return True

    def present(self) -> Owner:
        """The owner in the store now. Raises StateError and `Stopped`."""
        keys = self._opening.keys
        found = self._opening.requests.read([], [keys.owner]).found
        return active_owner(found.get(keys.owner, b""), keys.device)

    @property
    def head(self) -> bytes:
        """The record that authenticates the state in memory; that of the owner's last change."""
        return self._state.device.head_record

    def end(self) -> None:
        """Release the device, so that another daemon can take it over at once; idempotent."""
        self._told = False
        if self._store is not None:
            self._state = self._store.release()
            self._seen = self._state.found
            self._store = None
            logger.info("device %s is released", self._opening.keys.device)

    def renew(self) -> None:
        """Move the time ahead in which reads may be answered. Raises `Fenced`."""
        if self._store is not None:
            self._store.renew()

    def refresh(self) -> None:
        """Bring the state in memory closer to that of the owner, so that `begin` reads less.

        Each request is tried once: the front-end does not wait for an outage. A device that its
        owner changes meanwhile, or that is refused, is left to `begin`.
        """
        if self._store is not None:
            return
        try:
            once = Requests(self._opening.requests.engine, stopping=lambda: True)
            self._state = self._opening._replace(requests=once).refresh(self._state)
            self._seen = self._state.found
        except (Refused, Fenced, StateError, Stopped):
            self._state = self._state.without_head()

    # The store

    @property
    def counter(self) -> int:
        """The write counter."""
        return self._state.device.head.counter if self._store is None else self._store.counter

    @property
    def key(self) -> bytes | None:
        """The programmed key."""
        return self._state.contents.key if self._store is None else self._store.key

    @property
    def replay(self) -> Replay:
        """The record of the last commit."""
        return self._state.contents.replay if self._store is None else self._store.replay

    def commit(
        self,
        counter: int,
        blocks: list[tuple[int, bytes]],
        key: bytes | None,
        replay: Replay = NO_REPLAY,
    ) -> bool:
        """Make it durable, see `FleetStore`."""
        assert self._store is not None
        return self._store.commit(counter, blocks, key, replay)

    def confirm(self) -> None:
        """Return as soon as reads may be answered, see `FleetStore`."""
        assert self._store is not None
        self._store.confirm()

    def settle(self) -> None:
        """Note that no answer is owed."""
        if self._store is not None:
            self._store.settle()
        else:
            contents = self._state.contents._replace(replay=NO_REPLAY)
            self._state = self._state._replace(contents=contents)

    @property
    def checkpoint_due(self) -> bool:
        """Whether the log is long enough to be moved into the chunks, or the witness is behind."""
        return self._log_is_long or (self._witness is not None and self._witness.pending)

    def checkpoint(self) -> bool:
        """Do what is due, see `FleetStore.checkpoint`."""
        if self._witness is not None:
            self._witness.flush()
        return self._store is None or not self._log_is_long or self._store.checkpoint()

    def checkpoint_slice(self) -> bool | None:
        """As `checkpoint`: all of it."""
        return self.checkpoint()

    @property
    def _log_is_long(self) -> bool:
        return self._store is not None and self._store.checkpoint_due

    def resources(self) -> Resources:
        """Return the folder of the witness and the ports of the engine."""
        return self._opening.resources()

    def close(self) -> None:
        """Release the device and close the connection; idempotent."""
        if not self._closed:
            self._closed = True
            self.end()
            if self._witness is not None:
                self._witness.flush()
            self._opening.requests.engine.close()
