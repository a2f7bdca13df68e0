# SPDX-License-Identifier: Apache-2.0
"""Taking a device over: become the owner, load the state, verify it, and only then serve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from vhost_rpmb.errors import StateError
from vhost_rpmb.storage.fleet.contents import Contents, Device, load, open_device
from vhost_rpmb.storage.fleet.engine import Refused
from vhost_rpmb.storage.fleet.layout import Keys, Owner
from vhost_rpmb.storage.fleet.ownership import Ownership, boot_time, take_over
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.seal import KeyEncryptionKey
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.fleet.witness import Witness
from vhost_rpmb.storage.interface import TakeOver

__all__ = ["open_store"]

logger = logging.getLogger(__name__)


def open_store(
    requests: Requests,
    keys: Keys,
    kek: KeyEncryptionKey,
    *,
    witness_folder: str,
    mode: TakeOver = "expired",
    lease_seconds: int = 15,
    clock: Callable[[], float] = boot_time,
) -> FleetStore:
    """Own a device and load its state.

    Raises StateError, `Fenced` if another daemon takes it over meanwhile, and `Stopped`. A refused
    start leaves the device free.
    """
    try:
        with ExitStack() as undo:
            ownership = take_over(
                requests,
                keys,
                mode,
                lease_seconds=lease_seconds,
                clock=clock,
                waiting=lambda owner: _say_waiting(keys.device, owner),
            )
            undo.callback(ownership.release)
            answer = requests.read([ownership.compare], [keys.head, keys.info, keys.incarnation])
            if not answer.succeeded:
                _check_owner(requests, keys, ownership)
            found = answer.found
            device = open_device(keys, found.get(keys.info), found.get(keys.head), kek)
            incarnation = found.get(keys.incarnation, b"")
            if device.head.incarnation != incarnation:
                raise StateError(
                    f"the device {keys.device} is quarantined, because the store was restored from"
                    " a backup: accept the device"
                )
            witness = Witness(witness_folder, incarnation)
            witness.check(keys.device, device.head, answer.revision)
            contents = _load_owned(requests, keys, ownership, device)
            witness.record(keys.device, device.head, answer.revision)
            store = FleetStore(
                requests, keys, ownership, device, contents, witness, answer.revision
            )
            undo.pop_all()
            return store
    except Refused as error:
        raise StateError(f"the store refused to give out {keys.device}: {error}") from error


def _load_owned(requests: Requests, keys: Keys, ownership: Ownership, device: Device) -> Contents:
    """Load the state; of a device that was lost meanwhile the parts need not match."""
    try:
        contents = load(requests, keys, device)
    except StateError:
        _check_owner(requests, keys, ownership)
        raise
    _check_owner(requests, keys, ownership)
    return contents


def _check_owner(requests: Requests, keys: Keys, ownership: Ownership) -> None:
    ownership.check(requests.read([], [keys.owner]).found.get(keys.owner))


def _say_waiting(device: str, owner: Owner) -> None:
    logger.warning("device %s is owned by %s: waiting for the end of its lease", device, owner)
