# SPDX-License-Identifier: Apache-2.0
"""One connection of HTTP/1.1 to a known address: a request is one packet, an answer is one read.

The standard library's client sends head and body apart, each of which wakes the server up, and
parses a head as it would an e-mail; both take as long as a third of what etcd needs to commit.
docs/decisions/0024-etcd-client.md has the numbers.
"""

from __future__ import annotations

import socket
import ssl
from typing import NamedTuple

__all__ = ["Connection", "Endpoint", "Response", "Unreadable"]

_PIECE = 65536  # bytes of a read
_MAX_HEAD = 65536  # bytes
_MAX_BODY = 64 << 20  # bytes, many times the largest answer to a request of a store


class Unreadable(Exception):
    """The answer is no HTTP/1.1, or it ended early; nothing is known of the request."""


class Endpoint(NamedTuple):
    """A server, its name resolved: a sandbox has no resolver."""

    host: str
    port: int
    address: str
    family: int = socket.AF_INET


class Response(NamedTuple):
    """An answer that is complete."""

    status: int
    body: bytes


class Connection:
    """A connection, with TLS to the name of the endpoint. After an error it has to be closed."""

    def __init__(self, endpoint: Endpoint, tls: ssl.SSLContext | None, timeout: float) -> None:
        """Connect; ``timeout``: seconds of each step. Raises OSError."""
        name = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        self._host = f"Host: {name}:{endpoint.port}\r\n"
        self._received = bytearray()
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect((endpoint.address, endpoint.port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                sock = tls.wrap_socket(sock, server_hostname=endpoint.host)
        except BaseException:
            sock.close()
            raise
        self._sock = sock

    def exchange(self, method: str, path: str, body: str | None, token: str | None) -> Response:
        """Send a request and wait for its answer. Raises OSError and `Unreadable`."""
        data = b"" if body is None else body.encode()
        fields = "" if token is None else f"Authorization: {token}\r\n"
        if body is not None:
            fields += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        self._sock.sendall(f"{method} {path} HTTP/1.1\r\n{self._host}{fields}\r\n".encode() + data)
        status, head = self._head()
        if head.get(b"transfer-encoding", b"").lower() == b"chunked":
            content = self._chunks()
        else:
            content = self._take(_size(head.get(b"content-length", b""), 10))
        if self._received:
            raise Unreadable("more bytes than one answer")
        return Response(status, content)

    def close(self) -> None:
        """Close it; idempotent."""
        self._sock.close()

    def _head(self) -> tuple[int, dict[bytes, bytes]]:
        """Read status and fields, whose names are in lower case."""
        first, *lines = self._until(b"\r\n\r\n").split(b"\r\n")
        version, _, rest = first.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise Unreadable("no answer of HTTP")
        fields = {}
        for line in lines:
            name, _, value = line.partition(b":")
            fields[name.lower()] = value.strip()
        return int(rest[:3]), fields

    def _chunks(self) -> bytes:
        parts = []
        left = _MAX_BODY
        while size := _size(self._until(b"\r\n").partition(b";")[0], 16):
            left -= size
            if left < 0:
                raise Unreadable("too large an answer")
            parts.append(self._take(size))
            if self._take(2) != b"\r\n":
                raise Unreadable("a part of another size")
        while self._until(b"\r\n"):
            pass  # fields behind the body
        return b"".join(parts)

    def _until(self, end: bytes) -> bytes:
        """Take the bytes before ``end``, and remove it."""
        while (at := self._received.find(end)) < 0:
            if len(self._received) > _MAX_HEAD:
                raise Unreadable("too long a head")
            self._receive()
        found = bytes(self._received[:at])
        del self._received[: at + len(end)]
        return found

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            self._receive()
        found = bytes(self._received[:size])
        del self._received[:size]
        return found

    def _receive(self) -> None:
        data = self._sock.recv(_PIECE)
        if not data:
            raise Unreadable("the server closed the connection")
        self._received += data


def _size(text: bytes, base: int) -> int:
    """Return a number of bytes as HTTP writes it."""
    try:
        size = int(text.strip(), base)
    except ValueError:
        size = -1
    if not 0 <= size <= _MAX_BODY:
        raise Unreadable("no valid size")
    return size
