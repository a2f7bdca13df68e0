# SPDX-License-Identifier: Apache-2.0
"""What a service manager gets to know: notifications, and priorities of log lines.

Both are protocols of systemd that others speak as well: sd_notify(3) and sd-daemon(3).
docs/decisions/0014-systemd.md says why no library does this.
"""

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

__all__ = ["Notifier", "priority"]

_SOCKET_VARIABLE = "NOTIFY_SOCKET"
_JOURNAL_VARIABLE = "JOURNAL_STREAM"


class Notifier:
    """Tells the service manager how the service is doing; silent where there is none.

    The variable is taken out of ``environment``. The socket is connected at once, because a process
    in the sandbox cannot make another one. Nothing that goes wrong here ends the service.
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
    def listens(self) -> bool:
        """Whether there is a service manager to tell."""
        return self._socket is not None

    def tell(self, *assignments: str) -> None:
        """Send ``READY=1``, ``STATUS=text``, ...: one each."""
        if self._socket is not None:
            with suppress(OSError):  # gone or busy: the next line says what this one would have
                self._socket.send("\n".join(assignments).encode())

    def close(self) -> None:
        """Give the socket back."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def priority(level: int) -> str:
    """Give the prefix of a line on standard error: the priority, where it goes to the journal.

    ``level``: one of syslog's, 3 for an error to 7 for debugging.
    """
    journal = os.environ.get(_JOURNAL_VARIABLE)
    if journal is None:
        return ""
    try:
        stream = os.fstat(2)
    except OSError:
        return ""
    return f"<{level}>" if journal == f"{stream.st_dev}:{stream.st_ino}" else ""
