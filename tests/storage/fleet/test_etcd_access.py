# SPDX-License-Identifier: Apache-2.0
"""TLS, users, versions and invalid answers of etcd; a full one; a restored backup."""

from __future__ import annotations

import http.client
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.storage.fleet.story import KEK, block
from tests.support.authority import Authority
from tests.support.etcd import EtcdCluster
from tests.support.fleet import Host, create_device
from vhost_rpmb.daemon.fleet import open_fleet
from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.storage.fleet import etcd as etcd_module
from vhost_rpmb.storage.fleet.administration import accept, create, quarantine
from vhost_rpmb.storage.fleet.engine import Compare, Get, Put, Refused, Unknown
from vhost_rpmb.storage.fleet.etcd import Endpoint, Etcd, resolve
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.opening import open_store
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.store import FleetStore

PASSWORD = "p" * 32


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("ca"))
    made.issue("server")
    made.issue("host")
    made.issue("named", common_name="vm-host")
    return made


@pytest.fixture(scope="module")
def secured(authority: Authority) -> Iterator[EtcdCluster]:
    """One member with TLS; the user "rpmb" may access the prefix /rpmb/ only, for 2 s a token."""
    cluster = EtcdCluster(
        f"--cert-file={authority.path('server')}",
        f"--key-file={authority.path('server', 'key')}",
        f"--trusted-ca-file={authority.path('ca')}",
        "--client-cert-auth",
        "--bcrypt-cost=4",
        "--auth-token-ttl=2",
        scheme="https",
        members=1,
    )
    with cluster:
        admin = cluster.connect(tls=authority.context("host"))
        permission = {"permType": "READWRITE", "key": "L3JwbWIv", "range_end": "L3JwbWIw"}
        steps: list[tuple[str, dict[str, Any]]] = [
            ("user/add", {"name": "root", "password": PASSWORD}),
            ("role/add", {"name": "root"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("user/add", {"name": "rpmb", "password": PASSWORD}),
            ("role/add", {"name": "rpmb"}),
            ("role/grant", {"name": "rpmb", "perm": permission}),
            ("user/grant", {"user": "rpmb", "role": "rpmb"}),
            ("enable", {}),
        ]
        for path, body in steps:
            admin._call(f"/v3/auth/{path}", json.dumps(body), dict)
        yield cluster


@pytest.fixture
def connect(secured: EtcdCluster, authority: Authority) -> Iterator[Callable[..., Etcd]]:
    def make(certificate: str | None = "host", **options: Any) -> Etcd:
        given = {"user": "rpmb", "password": PASSWORD} | options
        return secured.connect(tls=authority.context(certificate), timeout=10, **given)

    yield make
    secured.disconnect()


@pytest.mark.etcd
def test_store_works_with_tls_and_a_user_of_its_prefix(
    connect: Callable[..., Etcd], folder: Path
) -> None:
    keys = Keys(b"/rpmb/", "vm-1")
    requests = Requests(connect())
    create(requests, keys, KEK, 128 * 1024, "test")
    store = open_store(requests, keys, KEK, witness_folder=str(folder))
    assert store.commit(1, [(address, block(1)) for address in range(200)], None)
    assert store.checkpoint()
    assert store.renew()
    store.close()


@pytest.mark.etcd
def test_other_prefixes_are_refused(connect: Callable[..., Etcd]) -> None:
    engine = connect()
    with pytest.raises(Refused, match="permission denied"):
        engine.txn([], [Put(b"/other/a", b"1")])
    with pytest.raises(Refused, match="permission denied"):
        engine.txn([Compare(b"/other/a", None)], [Get(b"/rpmb/a")])
    with pytest.raises(Refused, match="permission denied"):
        engine.range(b"/", b"0", 1)


@pytest.mark.etcd
def test_ended_token_is_replaced(connect: Callable[..., Etcd]) -> None:
    engine = connect()
    engine.txn([], [Put(b"/rpmb/a", b"1")])
    token = engine._token
    time.sleep(5)
    assert engine.txn([Compare(b"/rpmb/a", b"1")], []).succeeded
    assert engine._token != token


@pytest.mark.etcd
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"password": "wrong"}, "authentication failed"),
        ({"user": None}, "permission denied"),
        ({"certificate": "named"}, "CommonName"),
    ],
)
def test_wrong_access_is_refused_with_the_reason(
    connect: Callable[..., Etcd], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        connect(**options).txn([], [Put(b"/rpmb/a", b"1")])


@pytest.mark.etcd
def test_host_without_a_certificate_gets_no_answer(connect: Callable[..., Etcd]) -> None:
    with pytest.raises(Unknown):
        connect(None).txn([], [Put(b"/rpmb/a", b"1")])


@pytest.mark.etcd
def test_server_of_another_authority_gets_no_request(secured: EtcdCluster, tmp_path: Path) -> None:
    other = Authority(tmp_path)
    engine = secured.connect(tls=other.context(None))
    with pytest.raises(Unknown, match="certificate verify failed"):
        engine.txn([], [Put(b"/rpmb/a", b"1")])
    secured.disconnect()


def fill(engine: Etcd) -> None:
    for number in range(100):
        engine.txn([], [Put(b"/fill/%d" % number, bytes(200_000))])


@pytest.mark.etcd
def test_full_etcd_refuses_writes_and_recovers(folder: Path) -> None:
    with EtcdCluster("--quota-backend-bytes=4194304", members=1) as cluster:
        engine = cluster.connect(timeout=10)
        keys = Keys(b"/rpmb/", "vm-1")
        create(Requests(engine), keys, KEK, 128 * 1024, "test")
        store = open_store(Requests(engine), keys, KEK, witness_folder=str(folder))
        with pytest.raises(Refused, match="database space exceeded"):
            fill(engine)
        assert not store.commit(1, [(0, block(1))], None)
        assert store.renew(), "reads go on"
        store.close()


def start(cluster: EtcdCluster, keys: Keys, folder: Path) -> FleetStore:
    requests = Requests(cluster.connect(timeout=10))
    return open_store(requests, keys, KEK, witness_folder=str(folder), mode="now")


@pytest.mark.etcd
def test_restored_backup_fences_daemons_and_refuses_starts(folder: Path, tmp_path: Path) -> None:
    with EtcdCluster(members=1) as cluster:
        keys, idle = Keys(b"/rpmb/", "vm-1"), Keys(b"/rpmb/", "vm-2")
        for each in (keys, idle):
            create(Requests(cluster.connect(timeout=10)), each, KEK, 128 * 1024, "test")
        store = start(cluster, keys, folder)
        quiet = start(cluster, idle, folder)
        assert store.commit(1, [(0, block(1))], None)
        (tmp_path / "backup").write_bytes(cluster.members[0].backup())
        assert store.commit(2, [(0, block(2))], None)
        assert store.renew()
        cluster.restore(tmp_path / "backup")

        with pytest.raises(Fenced, match="restored from a backup"):
            store.commit(3, [(0, block(3))], None)
        assert quiet.commit(1, [(0, block(1))], None), "its state did not go back"
        quiet.close()
        with pytest.raises(Fenced, match="the store went back"):
            start(cluster, keys, folder)
        requests = Requests(cluster.connect(timeout=10))
        quarantine(requests, keys.prefix)
        with pytest.raises(Fenced, match="vm-1 is quarantined"):
            start(cluster, keys, folder)
        accept(requests, keys, KEK)
        store = start(cluster, keys, folder)
        assert (store.counter, store.image[0]) == (1, 1)


# Answers that no etcd gives


class _Handler(http.server.BaseHTTPRequestHandler):
    answer = (200, b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def server(status: int, body: bytes) -> Iterator[Etcd]:
    handler = type("Handler", (_Handler,), {"answer": (status, body)})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        engine = Etcd([Endpoint("localhost", running.server_port, "127.0.0.1")])
        try:
            yield engine
        finally:
            engine.close()
            running.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b""),
        (200, b"<html>"),
        (200, b"[]"),
        (404, b"not found"),
        (500, b"{}"),
        (503, b'{"code": 14, "message": "etcdserver: no leader"}'),
        (504, b'{"code": 4, "message": "context deadline exceeded"}'),
        (429, b'{"code": 8, "message": "etcdserver: too many requests"}'),
    ],
)
def test_answer_that_decides_nothing_is_unknown(status: int, body: bytes) -> None:
    with server(status, body) as engine, pytest.raises(Unknown, match=r"^localhost:[0-9]+: "):
        engine.txn([], [Put(b"a", b"1")])


def test_answer_without_a_result_is_unknown() -> None:
    with server(200, b'{"error": {"code": 14}}') as engine, pytest.raises(Unknown):
        engine.keepalive(1)
    for body in (b"{}", b'{"header": {}}', b'{"header": {"revision": "x"}}'):
        with server(200, body) as engine, pytest.raises(Unknown):
            engine.txn([], [])


@pytest.mark.parametrize("version", ["3.4.23", "3.5.12", ""])
def test_version_with_unsafe_leases_is_warned_about(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    with server(200, b'{"etcdserver": "%s"}' % version.encode()) as engine:
        engine.check_version()
    expected = f"expected version 3.5.13 or later, found {version or 'none'}"
    assert expected in caplog.text


@pytest.mark.etcd
def test_start_of_a_daemon_checks_the_version(
    tmp_path: Path,
    members: EtcdCluster,
    prefix: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = Host(tmp_path / "host", members, prefix.decode())
    create_device(host)
    monkeypatch.setattr(etcd_module, "_FIRST_SAFE_VERSION", (99,))
    opened = open_fleet(
        f"etcd:{host.config}",
        "vm-1",
        "expired",
        stopping=lambda: False,
        report=lambda reason: None,
    )
    opened.close()
    assert caplog.text.count("etcd: expected version") == 1


def test_safe_version_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    for version in (b"3.5.13", b"3.6.0-rc.1", b"4.0.0"):
        with server(200, b'{"etcdserver": "%s"}' % version) as engine:
            engine.check_version()
    assert not caplog.records


def test_members_are_tried_in_turn() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        endpoints = [Endpoint("silent", port, "127.0.0.1"), Endpoint("nobody", 1, "127.0.0.1")]
        engine = Etcd(endpoints, timeout=0.1)
        for name in ("silent", "nobody", "silent"):
            with pytest.raises(Unknown, match=f"^{name}:"):
                engine.grant(15)


def test_name_that_does_not_resolve_is_refused() -> None:
    with pytest.raises(StateError, match=r"host\.invalid: expected a name that resolves"):
        resolve("host.invalid", 2379)
    assert resolve("127.0.0.1", 2379) == Endpoint("127.0.0.1", 2379, "127.0.0.1")
