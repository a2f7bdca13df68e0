# SPDX-License-Identifier: Apache-2.0
"""Notifications to a service manager, by the protocol of sd_notify(3).

docs/decisions/0014-systemd.md explains why no library is used.
"""

import errno
import os
import select
import time
from collections.abc import MutableMapping, Sequence
from contextlib import suppress

from vhost_rpmb.system import socket
from vhost_rpmb.vhost_user.wire import pack_fds

__all__ = ["Notifier"]

_SOCKET_VARIABLE = "NOTIFY_SOCKET"
_PATIENCE = 5.0  # seconds for a service manager that is busy, with a reload for instance


class Notifier:
    """Sends notifications to the service manager, if there is one.

    The variable is removed from ``environment``. The socket is connected at once, because a process
    in the sandbox cannot create one. No error here ends the service.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._socket: socket.socket | None = None
        address = environment.pop(_SOCKET_VARIABLE, "")
        if not address:
            return
        if address.startswith("@"):
            address = "\0" + address[1:]  # an abstract name
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.connect(address)
        except OSError:
            self.close()

    @property
    def active(self) -> bool:
        """Whether there is a service manager."""
        return self._socket is not None

    def send(self, *assignments: str) -> None:
        """Send assignments: ``READY=1``, ``STATUS=text``, ..."""
        if self._socket is not None:
            with suppress(OSError):  # gone or busy: the next status replaces this one
                self._socket.send("\n".join(assignments).encode())

    def send_reliably(self, *assignments: str, fds: Sequence[int] = ()) -> None:
        """Send assignments and descriptors, if necessary wait until there is room; OSError."""
        if self._socket is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        message = "\n".join(assignments).encode()
        deadline = time.monotonic() + _PATIENCE
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        while True:
            try:
                if fds:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, pack_fds(fds))
                    self._socket.sendmsg([message], [rights])
                else:
                    self._socket.send(message)
                return
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0 or not room.poll(left * 1000):
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
