# SPDX-License-Identifier: Apache-2.0
"""A device whose state hosts share: the start, and the renewal of its ownership in the event loop.

Imported only with --store.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from vhost_rpmb import libc
from vhost_rpmb.errors import UsageError
from vhost_rpmb.storage.fleet.config import load
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.opening import open_store
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.interface import TakeOver

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
) -> tuple[FleetStore, int]:
    """Take a device over as the options say; return its store and the time of its lease.

    Raises UsageError, StateError, `Fenced`, and `Stopped` if a stop is requested meanwhile.
    """
    if not store.startswith(_KIND):
        raise UsageError(f"--store: expected {_KIND}CONFIG, found {store!r}: name a configuration")
    config = load(store.removeprefix(_KIND))
    kek = config.key_encryption_key()
    engine = config.connect()
    try:
        opened = open_store(
            Requests(engine, stopping=stopping, report=report),
            Keys(config.prefix, device),
            kek,
            witness_folder=config.witness,
            mode=take_over,
            lease_seconds=config.lease_seconds,
        )
    except BaseException:
        engine.close()
        raise
    return opened, config.lease_seconds


class _Loop(Protocol):
    def add(self, fd: int, handler: Callable[[], None]) -> None: ...
    def remove(self, fd: int) -> None: ...


class Renewal:
    """Renews the ownership in intervals, for as long as the daemon serves events."""

    def __init__(self, loop: _Loop, store: FleetStore, lease_seconds: int) -> None:
        self._loop = loop
        self._store = store
        self._fd = libc.interval_timer(lease_seconds / _RENEWALS)
        loop.add(self._fd, self._renew)

    def _renew(self) -> None:
        os.read(self._fd, 8)
        self._store.renew()

    def close(self) -> None:
        """Stop the timer."""
        self._loop.remove(self._fd)
        os.close(self._fd)
