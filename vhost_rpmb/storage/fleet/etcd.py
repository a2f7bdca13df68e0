# SPDX-License-Identifier: Apache-2.0
"""etcd 3 as an engine, through its JSON gateway: one connection, one try of each request.

docs/decisions/0024-etcd-client.md explains why no client library is used.
"""

from __future__ import annotations

import base64
import binascii
import json
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from vhost_rpmb.errors import StateError
from vhost_rpmb.log import Logger
from vhost_rpmb.storage.fleet.engine import (
    Answer,
    Compare,
    Delete,
    Get,
    LeaseEnded,
    Operation,
    Page,
    Put,
    Refused,
    Unknown,
)
from vhost_rpmb.storage.fleet.http import Connection, Endpoint, Unreadable

__all__ = ["Endpoint", "Etcd", "resolve"]

logger = Logger(__name__)

TIMEOUT = 2.0  # seconds, of each step of a request; an election takes 1 to 2
_FIRST_SAFE_VERSION = (3, 5, 13)  # before, a former leader could end leases that live

_OK, _BAD_REQUEST = 200, 400  # of HTTP
# Codes of gRPC. With one of these the request was not applied and never will be.
_INVALID_ARGUMENT, _NOT_FOUND, _EXHAUSTED, _UNAUTHENTICATED = 3, 5, 8, 16
_DEFINITE = frozenset({_INVALID_ARGUMENT, _NOT_FOUND, 7, 9, 11, 12})
# Of RESOURCE_EXHAUSTED, what a repetition does not change.
_LASTING = ("space exceeded", "too large", "larger than max")
# Texts of INVALID_ARGUMENT that a new token changes.
_TOKEN_TEXTS = ("user name is empty", "revision in header is old")

_Fields = dict[str, Any]
T = TypeVar("T")


def resolve(host: str, port: int) -> Endpoint:
    """Return the endpoint with its first address. Raises StateError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StateError(
            f"the endpoint {host}: expected a name that resolves, found: {error.strerror}: correct"
            " the name, or give an address"
        ) from error
    family, _, _, _, address = found[0]
    return Endpoint(host, port, str(address[0]), family)


class Etcd:
    """A connection to one member at a time; after a request without an answer, to the next one."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        tls: ssl.SSLContext | None = None,
        user: str | None = None,
        password: str = "",
        timeout: float = TIMEOUT,
    ) -> None:
        self._endpoints = list(endpoints)
        self._tls = tls
        self._user = user
        self._password = password
        self._timeout = timeout
        self._token: str | None = None
        self._connection: Connection | None = None

    def __repr__(self) -> str:
        return f"Etcd({', '.join(f'{each.host}:{each.port}' for each in self._endpoints)})"

    @property
    def ports(self) -> frozenset[int]:
        """The ports of all members; see `Engine`."""
        return frozenset(each.port for each in self._endpoints)

    def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
    ) -> Answer:
        """Send a transaction; see `Engine`."""
        return self._call(
            "/v3/kv/txn",
            # All values are numbers and base64: no encoder is needed.
            f'{{"compare":[{",".join(map(_compare, compare))}],'
            f'"success":[{",".join(map(_operation, success))}],'
            f'"failure":[{",".join(map(_operation, failure))}]}}',
            _answer,
        )

    def range(self, key: bytes, end: bytes, limit: int) -> Page:
        """Read a range; see `Engine`."""
        return self._call(
            "/v3/kv/range",
            json.dumps({"key": _text(key), "range_end": _text(end), "limit": limit}),
            lambda fields: Page(_pairs(fields), fields.get("more", False)),
        )

    def grant(self, seconds: int) -> int:
        """Create a lease; see `Engine`."""
        return self._call(
            "/v3/lease/grant", json.dumps({"TTL": seconds}), lambda fields: int(fields["ID"])
        )

    def keepalive(self, lease: int) -> bool:
        """Start the time of a lease again; see `Engine`."""
        return self._call(
            "/v3/lease/keepalive",
            json.dumps({"ID": str(lease)}),
            lambda fields: int(fields["result"].get("TTL", 0)) > 0,
        )

    def revoke(self, lease: int) -> None:
        """End a lease; see `Engine`."""
        with suppress(LeaseEnded):  # it has ended
            self._call("/v3/lease/revoke", json.dumps({"ID": str(lease)}), lambda _: None)

    def check_version(self) -> None:
        """Log a warning about a version whose leases are not safe. Raises as the requests do."""
        version = self._exchange("GET", "/version", None, lambda fields: fields["etcdserver"])
        numbers = [int(part) for part in version.split(".") if part.isdigit()]
        if tuple(numbers) < _FIRST_SAFE_VERSION:
            logger.warning(
                "etcd: expected version 3.5.13 or later, found %s, which may end leases too early:"
                " update it",
                version or "none",
            )

    def close(self) -> None:
        """Close the connection; the next request opens one again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _call(self, path: str, body: str, read: Callable[[_Fields], T]) -> T:
        """Send a request, with a new token if the present one is refused; ``read`` its answer."""
        if self._user is not None and self._token is None:
            self._authenticate()
        try:
            return self._exchange("POST", path, body, read)
        except _TokenRefused:
            # Nothing was applied, so this is no repetition of a request in doubt.
            if self._user is None:
                raise
        self._authenticate()
        return self._exchange("POST", path, body, read)

    def _authenticate(self) -> None:
        self._token = None
        body = json.dumps({"name": self._user, "password": self._password})
        self._token = self._exchange("POST", "/v3/auth/authenticate", body, _token)

    def _exchange(
        self, method: str, path: str, body: str | None, read: Callable[[_Fields], T]
    ) -> T:
        try:
            if self._connection is None:
                self._connection = Connection(self._endpoints[0], self._tls, self._timeout)
            status, answer = self._connection.exchange(method, path, body, self._token)
        except (OSError, Unreadable) as error:
            raise self._unknown(str(error) or type(error).__name__) from error
        try:
            fields = json.loads(answer)
            if status == _OK:
                return read(fields)
            refusal = self._judge(fields)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if status == _BAD_REQUEST:
                # The gateway itself refuses certificates with a name, and not in JSON.
                raise Refused(answer.decode(errors="replace").strip()) from error
            raise self._unknown(f"an invalid answer of status {status}") from error
        raise refusal

    def _judge(self, fields: Mapping[str, Any]) -> Exception:
        """Return what an error means for the request."""
        code = fields.get("code")
        text = str(fields.get("message") or fields.get("error"))
        if code == _UNAUTHENTICATED or (
            code == _INVALID_ARGUMENT and any(each in text for each in _TOKEN_TEXTS)
        ):
            return _TokenRefused(text)
        if code == _NOT_FOUND and "lease not found" in text:
            return LeaseEnded(text)
        if code in _DEFINITE or (code == _EXHAUSTED and any(each in text for each in _LASTING)):
            return Refused(text)
        return self._unknown(text)

    def _unknown(self, text: str) -> Unknown:
        """Go on with the next member."""
        self.close()
        endpoint = self._endpoints.pop(0)
        self._endpoints.append(endpoint)
        return Unknown(f"{endpoint.host}:{endpoint.port}: {text}")


class _TokenRefused(Refused):
    pass


def _text(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _answer(fields: _Fields) -> Answer:
    found: dict[bytes, bytes] = {}
    for response in fields.get("responses", ()):
        found.update(_pairs(response.get("response_range", {})))
    return Answer(fields.get("succeeded", False), found, int(fields["header"]["revision"]))


def _pairs(fields: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """Return keys and values of a range; the gateway leaves out empty fields."""
    return [
        (base64.b64decode(each["key"]), base64.b64decode(each.get("value", "")))
        for each in fields.get("kvs", ())
    ]


def _compare(compare: Compare) -> str:
    key, value = compare
    if value is None:
        return f'{{"key":"{_text(key)}","target":"CREATE","create_revision":"0"}}'
    return f'{{"key":"{_text(key)}","target":"VALUE","value":"{_text(value)}"}}'


def _operation(operation: Operation) -> str:
    match operation:
        case Put(key, value, lease):
            more = f',"lease":"{lease}"' if lease else ""
            return f'{{"request_put":{{"key":"{_text(key)}","value":"{_text(value)}"{more}}}}}'
        case Delete(key, end):
            more = "" if end is None else f',"range_end":"{_text(end)}"'
            return f'{{"request_delete_range":{{"key":"{_text(key)}"{more}}}}}'
        case Get(key):
            return f'{{"request_range":{{"key":"{_text(key)}"}}}}'


def _token(fields: _Fields) -> str:
    """Return a token that can be a field of HTTP."""
    token = fields["token"]
    if not (isinstance(token, str) and token.isascii() and token.isprintable()):
        raise ValueError
    return token
