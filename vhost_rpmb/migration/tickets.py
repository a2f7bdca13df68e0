# SPDX-License-Identifier: Apache-2.0
"""--migration=shared with --store: a ticket names the owner that hands the device over.

The store has the device, and the record of its owner decides. A ticket lets only the daemon become
the owner that follows the one which gave it.
"""

from __future__ import annotations

import hashlib

from vhost_rpmb.errors import OperatorError
from vhost_rpmb.log import Logger
from vhost_rpmb.migration.blob import TICKET, pack, unpack
from vhost_rpmb.migration.mode import Mode, MovableDevice
from vhost_rpmb.migration.note import Note
from vhost_rpmb.storage.fleet.layout import Owner
from vhost_rpmb.storage.fleet.tenancy import Tenancy
from vhost_rpmb.storage.interface import ACTIVE, Possession

__all__ = ["Tickets"]

logger = Logger(__name__)


class Tickets(Mode):
    """Hands over a device in a shared store; implements `vhost_user.interfaces.DeviceState`."""

    def __init__(
        self, tenancy: Tenancy, device: MovableDevice, note: Note, *, incoming: bool
    ) -> None:
        super().__init__(tenancy, device, note)
        self._tenancy = tenancy
        tenancy.intending = lambda owner: note.intend(_possession(owner))
        self._expected = incoming and not (note.given or note.arrived)

    def disconnected(self) -> None:
        """Expect a device again that arrived on the connection, and was not used."""
        if self._note.arrived and self._tenancy.owner is None:
            self._expected = True

    def start(self) -> str:
        """Judge whether a ring may run; return why not, or an empty string."""
        tenancy = self._tenancy
        if tenancy.owned:
            if (self._note.given or self._note.arrived) and tenancy.owner is not None:
                self._note.arrive(_possession(tenancy.owner))
            return ""
        if self._expected:
            return "the device is expected from another host, and did not arrive"
        tenancy.after = None
        if self._note.given or self._note.arrived:
            try:
                owner = tenancy.present()
            except OperatorError as error:
                return str(error)
            found = _possession(owner)
            # An earlier process can have become the owner, and ended before it noted that.
            if not (self._note.matches(found) or self._note.intended(found)):
                return f"device {tenancy.name} is superseded: it was taken over by {owner}"
            tenancy.after = owner.token
        return ""

    def save(self) -> bytes:
        """Return the ticket of a device that is released; ValueError: it is not ours to give."""
        tenancy = self._tenancy
        if reason := self.start():
            raise ValueError(reason)
        try:
            if not tenancy.begin():
                raise ValueError("another daemon owns the device")
        except OperatorError as error:
            raise ValueError(str(error)) from error
        tenancy.end()
        owner = tenancy.owner
        assert owner is not None
        possession = _possession(owner)
        self._note.give(possession)
        logger.info("device %s is handed over, epoch %d", tenancy.name, owner.epoch)
        digest = hashlib.sha256(tenancy.head).digest()
        return pack(self._describe(TICKET, tenancy, possession, tenancy.replay, digest))

    def load(self, blob: bytes) -> None:
        """Accept the ticket of the present owner; ValueError: it is spent, or another device's."""
        ticket = unpack(blob, TICKET)
        tenancy = self._tenancy
        if tenancy.owned:
            raise ValueError("expected a device that is handed over, found one that is active here")
        try:
            owner = tenancy.present()
        except OperatorError as error:
            raise ValueError(str(error)) from error
        given = Possession(ACTIVE, ticket.generation, ticket.token)
        if ticket.name != tenancy.name or given != _possession(owner):
            raise ValueError(
                f"expected the ticket of {owner} for device {tenancy.name}, found that of epoch"
                f" {ticket.generation} for {ticket.name}: a state is used once, a snapshot cannot"
                " be restored"
            )
        if (ticket.size, ticket.config) != (len(tenancy.image), self._device.config):
            raise ValueError(
                f"expected config space {self._device.config.hex()}, found {ticket.config.hex()}:"
                " use the same options on both hosts"
            )
        tenancy.refresh()
        if hashlib.sha256(tenancy.head).digest() != ticket.digest:
            raise ValueError("expected the device as it was handed over, found a later one")
        self._note.arrive(given)
        self._expected = False
        self._device.register = ticket.register
        logger.info("device %s has arrived, epoch %d", tenancy.name, owner.epoch)


def _possession(owner: Owner) -> Possession:
    return Possession(ACTIVE, owner.epoch, bytes.fromhex(owner.token))
