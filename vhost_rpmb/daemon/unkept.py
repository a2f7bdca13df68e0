# SPDX-License-Identifier: Apache-2.0
"""A connection that ends with the process: there is no descriptor store, nor a stored descriptor.

The module that keeps one (`vhost_rpmb.daemon.handover`) takes 0.1 MiB of memory and is imported
where it is needed.
"""

from __future__ import annotations

from vhost_rpmb.daemon.descriptors import DescriptorStore
from vhost_rpmb.log import INFO, WARNING, Logger
from vhost_rpmb.system import socket
from vhost_rpmb.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import Keeper

__all__ = ["Unkept"]

logger = Logger(__name__)


class Unkept:
    """The server's side of a connection that is kept; this one is not."""

    active = False  # the connection is kept
    record = b""  # of the connection of an earlier process; empty: there is none

    def __init__(self, store: DescriptorStore) -> None:
        self._store = store

    def open(self, _owner: str) -> None:
        """Take up the record of an earlier process of the device, or begin a new one.

        Called before the sandbox is entered.
        """
        self._warn()

    def _warn(self) -> None:
        # By hand a restart is no surprise; a unit was to survive it.
        logger.log(
            WARNING if self._store.managed else INFO,
            "a restart will end the connection: there is no descriptor store%s",
            ", set FileDescriptorStoreMax=" if self._store.managed else "",
        )

    @property
    def keeper(self) -> Keeper | None:
        """The keeper of the session, if the connection is kept."""
        return None

    @property
    def journal(self) -> memoryview | None:
        """Memory for the result register of the device, which outlives the process."""
        return None

    @property
    def note(self) -> memoryview | None:
        """Memory for what was handed over on the connection, which outlives the process."""
        return None

    def rename(self, owner: str) -> None:
        """Keep the connection for a device of another name too; before that one has arrived."""

    def connection(self) -> socket.socket:
        """The connection that the record describes; ValueError if it is another kind of file."""
        raise ValueError("expected a stored connection, found none")

    def connect(self, sock: socket.socket, record: bytes) -> None:
        """Keep a new connection."""

    def disconnect(self) -> None:
        """Keep the connection no longer."""

    def give_up(self, reason: str) -> None:
        """End the connection of an earlier process, which cannot be continued."""

    def served(self) -> None:
        """Note that a takeover was a success: a message or a batch was served after it."""

    def close(self) -> None:
        """Close the descriptors of this process; the service manager keeps its own."""
        self._store.close()
