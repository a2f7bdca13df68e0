# SPDX-License-Identifier: Apache-2.0
"""--migration=shared: the files stay where both hosts see them, and a ticket travels."""

from __future__ import annotations

import hashlib
import os
import time

from vhost_rpmb.errors import OperatorError
from vhost_rpmb.log import Logger
from vhost_rpmb.migration.blob import TICKET, State, pack, unpack
from vhost_rpmb.migration.mode import TOKEN_SIZE, Mode, MovableDevice, pass_on, superseded
from vhost_rpmb.migration.note import Note
from vhost_rpmb.migration.rules import Present, check_arrival, is_own
from vhost_rpmb.storage.interface import ACTIVE, EXPORTED, Possession
from vhost_rpmb.storage.local.shared import SharedFiles

__all__ = ["Handing"]

_PATIENCE = 3.0  # seconds for the other host to close the files

logger = Logger(__name__)


class Handing(Mode):
    """Hands over a device in shared files; implements `vhost_user.interfaces.DeviceState`.

    The lock on the files decides who may change them, and the state in them who may lock them.
    """

    def __init__(
        self, files: SharedFiles, device: MovableDevice, note: Note, *, incoming: bool
    ) -> None:
        super().__init__(files, device, note)
        self._files = files
        self._expected = incoming and not (note.given or note.arrived)
        self._arrived: Possession | None = None  # the state to become active with
        self._busy_since = 0.0

    def disconnected(self) -> None:
        """Release files that arrived on the connection, and were not used."""
        if self._arrived is not None:
            self._arrived = None
            self._expected = True
            self._files.close()

    def start(self) -> str | None:
        """Be active, since a ring is to run.

        Return why it must not, an empty string if it may, None if the files are still in use.
        """
        if self._files.active:
            return ""
        if self._arrived is None:
            if self._expected:
                return "the device is expected from another host, and did not arrive"
            try:
                if not self._files.opened:
                    self._files.open()
            except OperatorError as error:
                return self._busy(str(error))
            self._busy_since = 0.0
        found = self._files.store.possession
        try:
            to_be, reason = self._judge(found)
            if to_be is None:
                self._files.close()
                return reason
            self._files.begin(to_be)
        except OSError as error:
            self._files.close()
            return f"the hand-over: {error.strerror}"
        if self._arrived is None:
            self._device.reload()
        self._arrived = None
        logger.info("device %s is active, generation %d", self._files.store.name, to_be.generation)
        return ""

    def _busy(self, reason: str) -> str | None:
        now = time.monotonic()
        self._busy_since = self._busy_since or now
        if now - self._busy_since < _PATIENCE:
            return None
        self._busy_since = 0.0
        return reason

    def _judge(self, found: Possession) -> tuple[Possession | None, str]:
        """What to become, from the state in the open files; or why not."""
        name = self._files.store.name
        if self._arrived is not None:
            return self._arrived, ""
        if self._note.given:
            if found.state == EXPORTED and self._note.matches(found):
                return found._replace(state=ACTIVE, token=b""), ""
            # A hand-over that has become durable leaves no earlier generation behind.
            if found.state == ACTIVE and (self._note.stayed(found) or self._note.took_back(found)):
                return found, ""
            return None, superseded(name, found)
        if self._note.arrived:
            if found.state in (ACTIVE, EXPORTED) and self._note.matches(found):
                return found._replace(state=ACTIVE), ""
            return None, superseded(name, found)
        if found.state == ACTIVE:
            return found, ""
        return None, pass_on(name, found)

    def save(self) -> bytes:
        """Hand the device over durably and close the files; return the ticket.

        ValueError or OSError: it stays.
        """
        if reason := self.start():
            raise ValueError(reason)
        if not self._files.active:
            raise ValueError("the files are still in use by another process")
        store = self._files.store
        before = store.possession
        possession = Possession(EXPORTED, before.generation + 1, os.urandom(TOKEN_SIZE))
        ticket = self._describe(TICKET, store, possession, store.owed, _digest(self._files))
        self._note.give(possession)
        self._files.leave(possession)
        logger.info("device %s is handed over, generation %d", ticket.name, possession.generation)
        return pack(ticket)

    def load(self, blob: bytes) -> None:
        """Lock the files of a device that arrives; ValueError or OSError: nothing has changed."""
        ticket = unpack(blob, TICKET)
        if self._files.active:
            raise ValueError("expected a device that is handed over, found one that is active here")
        if not self._files.opened:
            try:
                self._files.open()
            except OperatorError as error:
                raise ValueError(str(error)) from error
        try:
            self._check(ticket)
        except ValueError:
            self._arrived = None
            self._files.close()
            raise
        self._arrived = self._files.store.possession._replace(state=ACTIVE)
        self._expected = False
        self._note.arrive(self._arrived)
        self._device.reload()
        self._device.register = ticket.register
        logger.info("device %s has arrived, generation %d", ticket.name, ticket.generation)

    def _check(self, ticket: State) -> None:
        """ValueError unless the open files are those of a ticket, unchanged."""
        store = self._files.store
        present = Present(
            *(store.name, store.possession, store.counter, len(store.image)),
            *(self._device.config, store.key),
        )
        check_arrival(present, ticket)
        if not is_own(present, ticket):
            raise ValueError(
                f"expected the files of this hand-over (device {ticket.name}, generation"
                f" {ticket.generation}, counter {ticket.counter}), found device {store.name},"
                f" generation {store.possession.generation}, counter {store.counter}: name the"
                " files that both hosts see"
            )
        if _digest(self._files) != ticket.digest:
            raise ValueError("expected the blocks of this hand-over, found others in the files")


def _digest(files: SharedFiles) -> bytes:
    return hashlib.sha256(bytes(files.image) + bytes(files.damaged)).digest()
