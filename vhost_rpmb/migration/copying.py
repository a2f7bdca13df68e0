# SPDX-License-Identifier: Apache-2.0
"""--migration=copy: the blocks travel, and a fence folder says which host is active afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from vhost_rpmb.log import Logger
from vhost_rpmb.migration.blob import COPY, State, pack, unpack
from vhost_rpmb.migration.fence import Fence
from vhost_rpmb.migration.mode import TOKEN_SIZE, Mode, MovableDevice, pass_on, superseded
from vhost_rpmb.migration.note import Note
from vhost_rpmb.migration.rules import Present, check_arrival, is_own
from vhost_rpmb.migration.seal import MigrationKey
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.interface import (
    ACTIVE,
    EXPORTED,
    IMPORTED,
    SUPERSEDED,
    VACANT,
    Access,
    Possession,
    Received,
)
from vhost_rpmb.storage.local.keyfile import fingerprint
from vhost_rpmb.storage.local.store import Store

__all__ = ["Copying"]


logger = Logger(__name__)


class Copying(Mode):
    """Hands a device in files to another host, or receives one, as a copy.

    Implements `vhost_rpmb.vhost_user.interfaces.DeviceState`. ``key_file``: a key that a
    fingerprint may be of. ``incoming``: the device arrives before it is used. ``renaming`` is
    called with the name of a device that is about to arrive.
    """

    def __init__(
        self,
        store: Store,
        device: MovableDevice,
        note: Note,
        *,
        fence: Fence | None,
        sealer: MigrationKey | None,
        key_file: bytes | None,
        incoming: bool,
        renaming: Callable[[str], None] = lambda name: None,
    ) -> None:
        super().__init__(store, device, note)
        self._renaming = renaming
        self._store = store
        self._fence = fence
        self._sealer = sealer
        self._key_file = key_file
        self._expected = incoming and not store.possession.generation
        self._before: Possession | None = None  # of a hand-over whose state was not sent completely

    @property
    def folders(self) -> Mapping[str, Access]:
        """The fence folder, and the access that is needed there."""
        return {} if self._fence is None else self._fence.folders

    def connected(self) -> None:
        """Forget the hand-over of an earlier connection."""
        super().connected()
        self._before = None

    def start(self) -> str:
        """Be active, since a ring is to run; return why it must not, or an empty string."""
        possession = self._store.possession
        state = possession.state
        if state == VACANT or self._expected:
            return "the device is expected from another host, and did not arrive"
        if state == ACTIVE:
            return ""
        if state == SUPERSEDED:
            return superseded(self._store.name, possession)
        if state == EXPORTED and not self._gave(possession):
            return pass_on(self._store.name, possession)
        if self._before is not None:  # nobody else has the whole state
            return self._become(self._before)
        if self._fence is None and state == EXPORTED:
            return (
                f"{pass_on(self._store.name, possession)}; without --fence-path it cannot be taken"
                " back by itself"
            )
        return self._claim(possession)

    def _gave(self, possession: Possession) -> bool:
        """Whether the device left on the present connection."""
        return self._note.given and self._note.matches(possession)

    def _claim(self, possession: Possession) -> str:
        """Become active in a generation, unless another host is."""
        try:
            won = self._fence is None or self._fence.claim(
                self._store.name, possession.generation, possession.claim
            )
        except OSError as error:
            return f"the fence folder cannot be used: {error.strerror}"
        if not won:
            self._become(possession._replace(state=SUPERSEDED))
            return superseded(self._store.name, possession)
        token = possession.token if possession.state == IMPORTED else b""
        return self._become(possession._replace(state=ACTIVE, token=token))

    def _become(self, possession: Possession) -> str:
        """Store a state; return why that failed, or an empty string."""
        try:
            self._store.possess(possession)
        except OSError as error:
            return f"the hand-over: {error.strerror}"
        self._before = None
        logger.info(
            "device %s is %s, generation %d",
            *(self._store.name, possession.state, possession.generation),
        )
        return ""

    def save(self) -> bytes:
        """Hand the device over durably; return its state. ValueError or OSError: it stays."""
        possession = self._store.possession
        again = possession.state == EXPORTED and self._gave(possession)
        if not again:
            if reason := self.start():
                raise ValueError(reason)
            before = self._store.possession
            token, claim = os.urandom(TOKEN_SIZE), os.urandom(TOKEN_SIZE)
            possession = Possession(EXPORTED, before.generation + 1, token, claim)
            self._note.give(possession)
            self._store.possess(possession)
            self._before = before
            logger.info("device %s is handed over, %s", self._store.name, _of(possession))
        return pack(self._state(possession))

    def sent(self, complete: bool) -> None:
        """Note whether another host may have the whole state."""
        if complete:
            self._before = None

    def _state(self, possession: Possession) -> State:
        store = self._store
        state = self._describe(COPY, store, possession, store.owed)._replace(
            damaged=[address for address, mark in enumerate(store.damaged) if mark],
            blocks=_blocks(store),
        )
        key = store.key
        if key is not None and self._sealer is not None:
            state = state._replace(sealed_key=self._sealer.seal(key, state.context))
        return state

    def load(self, blob: bytes) -> None:
        """Receive a device; ValueError or OSError: nothing has changed."""
        state = unpack(blob, COPY)
        store = self._store
        present = Present(
            *(store.name, store.possession, store.counter, len(store.image)),
            *(self._device.config, store.key),
        )
        check_arrival(present, state)
        key = self._key_of(state)
        claim = os.urandom(TOKEN_SIZE)
        possession = Possession(IMPORTED, state.generation, state.token, claim)
        if is_own(present, state):
            if self._fence is None and store.possession.state == EXPORTED:
                raise ValueError(
                    "expected --fence-path for a device that returns to the files that it left:"
                    " without it another host may have it too"
                )
            store.possess(store.possession._replace(state=IMPORTED))
        else:
            damaged = frozenset(state.damaged)
            received = Received(
                state.name, state.image(), damaged, state.counter, key, state.replay
            )
            self._renaming(state.name)
            store.adopt(received, possession)
        self._expected = False
        self._before = None
        self._device.reload()
        self._device.register = state.register
        logger.info("device %s has arrived, %s", store.name, _of(store.possession))

    def _key_of(self, state: State) -> bytes | None:
        """The key of a state; ValueError if it is not known here."""
        if not state.fingerprint:
            return None
        key = self._store.key or self._key_file
        if state.sealed_key and self._sealer is not None:
            key = self._sealer.open(state.sealed_key, state.context)
        if key is None or fingerprint(key) != state.fingerprint:
            raise ValueError(
                f"expected the key of device {state.name}, found"
                f" {'none' if key is None else 'another'}: name its file with --key-path, or use"
                " --migration-key on both hosts"
            )
        return key


def _of(possession: Possession) -> str:
    return f"generation {possession.generation}"


def _blocks(store: Store) -> list[tuple[int, bytes]]:
    """The blocks that are not zeros, without damaged ones."""
    zeros = bytes(spec.BLOCK_SIZE)
    image = bytes(store.image)
    found = []
    for address, mark in enumerate(store.damaged):
        data = image[address * spec.BLOCK_SIZE : (address + 1) * spec.BLOCK_SIZE]
        if not mark and data != zeros:
            found.append((address, data))
    return found
