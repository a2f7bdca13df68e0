# SPDX-License-Identifier: Apache-2.0
"""The part that all modes of --migration share, whatever travels and whoever decides."""

from __future__ import annotations

from collections.abc import Mapping

from vhost_rpmb.migration.blob import State, largest
from vhost_rpmb.migration.note import Note
from vhost_rpmb.rpmb.replay import Replay
from vhost_rpmb.storage.interface import Access, Possession, Store
from vhost_rpmb.storage.local.keyfile import fingerprint
from vhost_rpmb.typed import Protocol

__all__ = ["TOKEN_SIZE", "Mode", "MovableDevice", "pass_on", "superseded"]

TOKEN_SIZE = 16  # bytes
RELEASE = "see vhost-rpmb-client release"


class MovableDevice(Protocol):
    """The device, as far as it travels."""

    register: bytes  # the result register

    @property
    def config(self) -> bytes:
        """Its configuration space."""

    def reload(self) -> None:
        """Take the durable state again."""


class Mode:
    """A mode; with its own `start`, `save` and `load` a `vhost_user.interfaces.DeviceState`."""

    def __init__(self, home: Store, device: MovableDevice, note: Note) -> None:
        self._home = home
        self._device = device
        self._note = note

    @property
    def limit(self) -> int:
        """The largest number of bytes of a state."""
        return largest(len(self._home.image))

    @property
    def folders(self) -> Mapping[str, Access]:
        """Folders that are used beside those of the store, and the access that is needed there."""
        return {}

    def connected(self) -> None:
        """Forget the hand-over of an earlier connection."""
        self._note.clear()

    def disconnected(self) -> None:
        """Nothing is held for a connection."""

    def sent(self, complete: bool) -> None:
        """The home says who has the device, whatever was sent."""

    def _describe(
        self,
        kind: int,
        store: Store,
        possession: Possession,
        replay: Replay,
        digest: bytes = b"",
    ) -> State:
        """Return the state of a device that is handed over, without its blocks."""
        return State(
            kind=kind,
            name=store.name,
            generation=possession.generation,
            token=possession.token,
            counter=store.counter,
            size=len(store.image),
            config=self._device.config,
            fingerprint=b"" if store.key is None else fingerprint(store.key),
            sealed_key=b"",
            register=self._device.register,
            replay=replay,
            digest=digest,
        )


def pass_on(name: str, possession: Possession) -> str:
    """Why a device that left is not served."""
    return (
        f"device {name} was handed to another host (generation {possession.generation}): use it"
        f" there, or {RELEASE}"
    )


def superseded(name: str, possession: Possession) -> str:
    """Why a device is not served for good."""
    return (
        f"device {name} is superseded: another host is active in generation {possession.generation}"
    )
