# SPDX-License-Identifier: Apache-2.0
"""One connection of HTTP to a server that answers with the bytes of a test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from vhost_rpmb.storage.fleet.http import Connection, Endpoint, Response, Unreadable

OK = b"HTTP/1.1 200 OK\r\n"
Serve = Callable[..., "tuple[Connection, Server]"]
SHORT = OK + b"Content-Length: 2\r\n\r\n{}"


class Server:
    """Answers each request on its only connection with the next of its answers."""

    def __init__(self, answers: list[list[bytes]]) -> None:
        self.requests: list[bytes] = []
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("test", self._listener.getsockname()[1], "127.0.0.1")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with self._listener, self._listener.accept()[0] as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for answer in self._answers:
                self.requests.append(sock.recv(1 << 20))
                for part in answer:
                    sock.sendall(part)

    def close(self) -> None:
        self._thread.join()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Connect to a server with the given answers, each in the given parts."""
    made: list[tuple[Connection, Server]] = []

    def start(*answers: list[bytes], timeout: float = 60) -> tuple[Connection, Server]:
        server = Server(list(answers))
        made.append((Connection(server.endpoint, None, timeout), server))
        return made[-1]

    yield start
    for connection, server in made:
        connection.close()
        server.close()


def test_requests_and_answers_on_one_connection(
    serve: Serve,
) -> None:
    connection, server = serve([SHORT], [OK.replace(b"200", b"404"), b"content-LENGTH:0\r\n\r\n"])
    assert connection.exchange("POST", "/v3/x", '{"a":"ä"}', "secret") == Response(200, b"{}")
    assert connection.exchange("GET", "/version", None, None) == Response(404, b"")
    host = b"Host: test:%d\r\n" % server.endpoint.port
    # Each arrives whole: it is one packet.
    assert server.requests == [
        b"POST /v3/x HTTP/1.1\r\n" + host + b"Authorization: secret\r\n"
        b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n" + '{"a":"ä"}'.encode(),
        b"GET /version HTTP/1.1\r\n" + host + b"\r\n",
    ]


CHUNKED = (
    OK + b"Transfer-Encoding: Chunked\r\n\r\n"
    b"3\r\nabc\r\n0A;name=value\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
)


@pytest.mark.parametrize(
    ("answer", "body"), [(SHORT, b"{}"), (CHUNKED, b"abc0123456789")], ids=["size", "chunked"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_answer_in_any_pieces(serve: Serve, answer: bytes, body: bytes, whole: bool) -> None:
    parts = [answer] if whole else [bytes([byte]) for byte in answer]
    connection, _ = serve(parts, parts)
    for _ in range(2):
        assert connection.exchange("POST", "/", "{}", None) == Response(200, body)


def test_large_answer(serve: Serve) -> None:
    body = bytes(range(256)) * 4096
    connection, _ = serve([OK + b"Content-Length: %d\r\n\r\n" % len(body), body])
    assert connection.exchange("POST", "/", "{}", None).body == body


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        SHORT[:10],
        SHORT[:-1],
        CHUNKED[:-2],
        SHORT + b"x",
        SHORT + SHORT,
        OK + b"\r\n",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Content-Length: 99999999999\r\n\r\n",
        OK + b"Content-Length: two\r\n\r\n{}",
        OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
        b"HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 two OK\r\nContent-Length: 2\r\n\r\n{}",
        b"220 mail.example ESMTP\r\n\r\n",
        OK + b"Field: " + bytes(100_000),
    ],
    ids=lambda answer: repr(answer[:60]),
)
def test_other_answer_is_unreadable(serve: Serve, answer: bytes) -> None:
    connection, _ = serve([answer])
    with pytest.raises(Unreadable):
        connection.exchange("POST", "/", "{}", None)


def test_silent_server_is_left_after_the_timeout() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        endpoint = Endpoint("test", listener.getsockname()[1], "127.0.0.1")
        with (
            closing(Connection(endpoint, None, 0.05)) as connection,
            pytest.raises(TimeoutError),
        ):
            connection.exchange("POST", "/", "{}", None)


def test_address_of_ipv6_is_a_host_in_brackets() -> None:
    with closing(socket.create_server(("::1", 0), family=socket.AF_INET6)) as listener:
        endpoint = Endpoint("::1", listener.getsockname()[1], "::1", socket.AF_INET6)
        with closing(Connection(endpoint, None, 0.05)) as connection:
            with pytest.raises(TimeoutError):
                connection.exchange("GET", "/", None, None)
            with listener.accept()[0] as sock:
                assert f"Host: [::1]:{endpoint.port}\r\n".encode() in sock.recv(1000)
