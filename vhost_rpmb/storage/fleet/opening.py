# SPDX-License-Identifier: Apache-2.0
"""Opening a device: look at it, become its owner, load and verify the state, only then serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.log import Logger
from vhost_rpmb.storage.fleet.contents import (
    Contents,
    Device,
    State,
    blank,
    load,
    open_device,
    update,
)
from vhost_rpmb.storage.fleet.engine import Answer
from vhost_rpmb.storage.fleet.layout import Keys, Owner
from vhost_rpmb.storage.fleet.ownership import Ownership, boot_time, present_owner, take_over
from vhost_rpmb.storage.fleet.presence import Presence
from vhost_rpmb.storage.fleet.requests import Requests, named_refusals
from vhost_rpmb.storage.fleet.seal import KeyEncryptionKey
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.fleet.witness import Witness
from vhost_rpmb.storage.interface import Resources, TakeOver

__all__ = ["Opening", "open_store", "say_waiting"]

logger = Logger(__name__)

_LOOKS = 3  # at a device that its owner changes meanwhile


class Opening(NamedTuple):
    """How this host opens one device."""

    requests: Requests
    keys: Keys
    kek: KeyEncryptionKey
    witness_folder: str
    confirmed_reads: bool = False

    def look(self, mode: TakeOver) -> State:
        """Check that this host may serve the device, and load it without owning it.

        If its owner changed it all the time, the state is blank and belongs to no head that exists.
        Raises StateError, `Fenced` if the store was restored from a backup, and `Stopped`.
        """
        device, found = self._look_once(mode)
        with named_refusals(f"to give out {self.keys.device}"):
            for _ in range(_LOOKS):
                try:
                    return State(device, load(self.requests, self.keys, device), found)
                except StateError:
                    before = device.head_record
                    device, found = self._look_once(mode)
                    if device.head_record == before:
                        raise
        return State(device, blank(device.info.size), found).without_head()

    def refresh(self, known: State) -> State:
        """Bring a state that was loaded without owning the device closer to the present one.

        Raises as `look` does, and StateError if the owner changed the device meanwhile.
        """
        device, found = self._look_once("expired")
        return State(device, update(self.requests, self.keys, device, known), found)

    def own(self, ownership: Ownership, known: State | None) -> FleetStore:
        """Return the store of a device that is owned now; ``known`` may be out of date.

        Raises StateError, `Fenced` if another daemon takes it over meanwhile, and `Stopped`. A
        refused start leaves the device free.
        """
        requests, keys = self.requests, self.keys
        with ExitStack() as undo:
            undo.callback(ownership.release)
            revision = ownership.found.revision
            device, witness = self._judge(ownership.found)
            contents = self._load_owned(ownership, device, known)
            witness.note(keys.device, device.head, revision)
            store = FleetStore(
                *(requests, keys, ownership, device, contents, witness, revision),
                confirmed_reads=self.confirmed_reads,
            )
            undo.pop_all()
            return store

    @property
    def presence(self) -> Presence:
        """The owners of the device on this host."""
        return Presence(self.witness_folder, self.keys.device)

    def resources(self) -> Resources:
        """Return the folder of the witness and the ports of the engine."""
        return (
            Witness(self.witness_folder, b"").resources()._replace(ports=self.requests.engine.ports)
        )

    def _look_once(self, mode: TakeOver) -> tuple[Device, Mapping[bytes, bytes]]:
        """Read and check everything but the contents."""
        keys = self.keys
        names = [keys.owner, keys.alive, keys.head, keys.info, keys.incarnation]
        with named_refusals(f"to give out {keys.device}"):
            answer = self.requests.read([], names)
        present_owner(keys, answer.found, mode, self.presence)
        return self._judge(answer)[0], answer.found

    def _judge(self, answer: Answer) -> tuple[Device, Witness]:
        """Check the records of the device."""
        keys, found = self.keys, answer.found
        device = open_device(keys, found.get(keys.info), found.get(keys.head), self.kek)
        incarnation = found.get(keys.incarnation, b"")
        if device.head.incarnation != incarnation:
            raise Fenced(
                f"the device {keys.device} is quarantined, because the store was restored from"
                " a backup: accept the device"
            )
        witness = Witness(self.witness_folder, incarnation)
        witness.check(keys.device, device.head, answer.revision)
        return device, witness

    def _load_owned(self, ownership: Ownership, device: Device, known: State | None) -> Contents:
        """Load the state; of a device that was lost meanwhile the parts need not match."""
        requests, keys = self.requests, self.keys
        if known is not None and known.device.head_record == device.head_record:
            return known.contents
        with named_refusals(f"to give out {keys.device}"):
            try:
                if known is None:
                    return load(requests, keys, device)
                return update(requests, keys, device, known)
            except StateError:
                ownership.check(requests.read([], [keys.owner]).found.get(keys.owner))
                raise


def open_store(
    requests: Requests,
    keys: Keys,
    kek: KeyEncryptionKey,
    *,
    witness_folder: str,
    mode: TakeOver = "expired",
    lease_seconds: int = 15,
    confirmed_reads: bool = False,
    clock: Callable[[], float] = boot_time,
) -> FleetStore:
    """Own a device and load its state.

    Raises StateError, `Fenced` if another daemon takes it over meanwhile, and `Stopped`. A refused
    start leaves the device free.
    """
    opening = Opening(requests, keys, kek, witness_folder, confirmed_reads)
    ownership = take_over(
        requests,
        keys,
        mode,
        opening.presence,
        lease_seconds=lease_seconds,
        clock=clock,
        waiting=lambda owner: say_waiting(keys.device, owner),
    )
    return opening.own(ownership, None)


def say_waiting(device: str, owner: Owner) -> None:
    """Log that a device is about to be taken over from an owner that is alive."""
    logger.warning("device %s is owned by %s: waiting for the end of its lease", device, owner)
