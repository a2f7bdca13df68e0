# SPDX-License-Identifier: Apache-2.0
"""Sockets and signals: `socket` and `signal` without the enumerations of their constants.

Making those takes 0.6 MiB of each daemon and a sixth of its start. Types, functions and numbers
are the same objects without them; docs/decisions/0039-sockets-and-signals.md has the reasons.
"""

from __future__ import annotations

from vhost_rpmb.typed import TYPE_CHECKING

__all__ = ["accept", "signal", "socket"]

if TYPE_CHECKING:
    import signal
    import socket
else:
    try:
        import _signal as signal
        import _socket as socket
    except ImportError:  # another implementation of Python
        import signal
        import socket


def accept(listener: socket.socket) -> socket.socket:
    """Accept a connection, as `socket.socket.accept` does; its descriptor is not inherited."""
    fd, _address = listener._accept()  # type: ignore[attr-defined]
    return socket.socket(fileno=fd)
