# SPDX-License-Identifier: Apache-2.0
"""A device whose state hosts share: its start, and in the event loop the renewal of its ownership.

Imported only with --store.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from vhost_rpmb import libc
from vhost_rpmb.errors import UsageError
from vhost_rpmb.storage.fleet.config import load
from vhost_rpmb.storage.fleet.engine import Refused, Unknown
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.opening import Opening
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.tenancy import Tenancy
from vhost_rpmb.storage.interface import SharedStore, TakeOver

__all__ = ["Renewal", "open_fleet"]

_KIND = "etcd:"
_RENEWALS = 3  # in the time of a lease


def open_fleet(
    store: str,
    device: str,
    take_over: TakeOver,
    *,
    stopping: Callable[[], bool],
    report: Callable[[str], None],
) -> Tenancy:
    """Prepare to serve a device as the options say; a ring that runs takes it over.

    Raises UsageError, StateError, and `Stopped` if a stop is requested meanwhile.
    """
    if not store.startswith(_KIND):
        raise UsageError(f"--store: expected {_KIND}CONFIG, found {store!r}: name a configuration")
    config = load(store.removeprefix(_KIND))
    kek = config.key_encryption_key()
    engine = config.connect()
    try:
        with suppress(Refused, Unknown):  # the first member may not answer now
            engine.check_version()
        opening = Opening(
            Requests(engine, stopping=stopping, report=report),
            Keys(config.prefix, device),
            kek,
            config.witness,
            config.confirmed_reads,
        )
        return Tenancy(opening, mode=take_over, lease_seconds=config.lease_seconds)
    except BaseException:
        engine.close()
        raise


class _Loop(Protocol):
    def add(self, fd: int, handler: Callable[[], None]) -> None: ...
    def remove(self, fd: int) -> None: ...


class Renewal:
    """Renews the ownership in intervals, for as long as the daemon serves events.

    While a front-end is connected whose ring does not run, for instance that of a virtual machine
    which is about to arrive, the state in memory follows that of the owner.
    """

    def __init__(self, loop: _Loop, store: SharedStore, connected: Callable[[], bool]) -> None:
        self._loop = loop
        self._store = store
        self._connected = connected
        self._fd = libc.interval_timer(store.lease_seconds / _RENEWALS)
        loop.add(self._fd, self._renew)

    def _renew(self) -> None:
        os.read(self._fd, 8)
        if self._store.owned:
            self._store.renew()
        elif self._connected():
            self._store.refresh()

    def close(self) -> None:
        """Stop the timer."""
        self._loop.remove(self._fd)
        os.close(self._fd)
