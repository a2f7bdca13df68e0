# SPDX-License-Identifier: Apache-2.0
"""The service manager of the tests does what systemd does, as a trivial service sees it."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.supervisor import Supervisor, in_order

pytestmark = pytest.mark.needs_host

# Carries out commands that come on a socket of its own: one line of Python each. `manager` is the
# socket of the service manager.
SERVICE = """
import os, socket, sys
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.connect(os.environ["NOTIFY_SOCKET"])
def store(name, *fds, more=""):
    text = f"FDSTORE=1\\nFDNAME={name}{more}"
    socket.send_fds(manager, [text.encode()], fds)
def found():
    assert os.environ.get("LISTEN_PID", str(os.getpid())) == str(os.getpid())
    names = os.environ.get("LISTEN_FDNAMES", "")
    names = names.split(":") if names else []
    assert len(names) == int(os.environ.get("LISTEN_FDS", 0))
    assert all(os.get_inheritable(fd) for fd in range(3, 3 + len(names)))
    return [(name, os.readlink(f"/proc/self/fd/{fd}")) for fd, name in enumerate(names, 3)]
control = socket.socket(socket.AF_UNIX)
control.connect(sys.argv[1])
manager.send(b"READY=1\\nSTATUS=runs")
for line in control.makefile():
    control.send(repr(eval(line)).encode() + b"\\n")
"""


class Service:
    """A supervised service; each start connects anew."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self._connection: socket.socket | None = None
        self._control = socket.socket(socket.AF_UNIX)
        self._control.bind(str(folder / "control"))
        self._control.listen()
        command = [sys.executable, "-c", SERVICE, str(folder / "control")]
        self.supervisor = Supervisor(folder, command, **options)
        self.supervisor.start()

    def does(self, *lines: str) -> Any:
        """The value of the last of some expressions, by the process that was started last."""
        self._control.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                connection, _ = self._control.accept()
                self._disconnect()
                self._connection = connection
                self._file = connection.makefile()
        assert self._connection is not None
        for line in lines:
            self._connection.sendall(f"{line}\n".encode())
            answer = self._file.readline()
            assert answer, self.supervisor.log
        return eval(answer)

    def found(self) -> list[str]:
        """The names of the descriptors that the process was started with."""
        return [name for name, _ in self.does("found()")]

    def close(self) -> None:
        self.supervisor.close()
        self._control.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._file.close()
            self._connection.close()


Launch = Callable[..., Service]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    services = []

    def launch(**options: Any) -> Service:
        services.append(Service(tmp_path, **options))
        return services[-1]

    yield launch
    for service in services:
        service.close()


def test_descriptors_come_back_newest_first_after_each_kind_of_end(launch: Launch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        service = launch(listener=listener)
        assert service.found() == ["vhost-user-rpmb.socket"]
        for name in "abc":
            service.does(f"store({name!r}, os.memfd_create({name!r}))")
        expected = ["vhost-user-rpmb.socket", "c", "b", "a"]
        service.supervisor.restart()
        assert service.found() == expected
        service.supervisor.kill()
        assert service.found() == expected
        service.supervisor.send(signal.SIGKILL)  # nobody asks for the restart
        service.supervisor.wait_ready(4)
        found = service.does("found()")
        assert [name for name, _ in found] == expected
        for name, path in found[1:]:
            assert path == f"/memfd:{name} (deleted)"
        assert service.supervisor.statuses == [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGKILL]


def test_order_after_reexecution(launch: Launch) -> None:
    service = launch(oldest_first=True)
    assert service.does("os.environ.get('LISTEN_PID')") is None
    for name in "abc":
        service.does(f"store({name!r}, os.memfd_create({name!r}))")
    service.supervisor.kill()
    assert service.found() == ["a", "b", "c"]


def test_stored_in_the_last_moment(launch: Launch) -> None:
    service = launch()
    service.does("[store(f'f{n}', os.memfd_create('m')) for n in range(5)]")
    with pytest.raises(AssertionError):  # it cannot answer
        service.does("store('last', os.memfd_create('m')) or os.kill(os.getpid(), 9)")
    service.supervisor.wait_ready(2)
    assert service.found() == ["last", "f4", "f3", "f2", "f1", "f0"]


def test_duplicates_are_dropped(launch: Launch) -> None:
    """By open file, not by inode: two of one path are two."""
    service = launch()
    service.does("store('a', 0)", "store('b', 0, os.dup(0))", "store('c', os.open('/dev/null', 0))")
    service.supervisor.kill()
    assert service.found() == ["c", "a"]


def test_names(launch: Launch) -> None:
    service = launch()
    for name in ("a", "a", "with:colon", "n" * 255, "n" * 256):
        service.does(f"store({name!r}, os.memfd_create('m'))")
    expected = ["stored", "n" * 255, "stored", "a", "a"]
    service.supervisor.wait(lambda: service.supervisor.names == expected)
    service.does("manager.send(b'FDSTOREREMOVE=1\\nFDNAME=a')")
    service.supervisor.wait(lambda: "a" not in service.supervisor.names)
    service.supervisor.kill()
    assert service.found() == ["stored", "n" * 255, "stored"]


@pytest.mark.parametrize("limit", [0, 3])
def test_limit(launch: Launch, limit: int) -> None:
    service = launch(limit=limit)
    assert service.does("os.environ.get('FDSTORE')") == (str(limit) if limit else None)
    service.does("[store(f'f{n}', os.memfd_create('m')) for n in range(5)]")
    service.supervisor.kill()
    assert service.found() == [f"f{n}" for n in reversed(range(limit))]


def test_polled_descriptor_is_removed_at_its_hang_up(launch: Launch) -> None:
    service = launch()
    for more in ("", "\\nFDPOLL=0"):
        service.does("globals().update(pair=socket.socketpair())")
        service.does(f"store('s', pair[0].fileno(), more='{more}')", "[s.close() for s in pair]")
    service.does("store('file', os.open('/proc/self/exe', 0))", "store('m', os.memfd_create('m'))")
    service.supervisor.wait(lambda: service.supervisor.names == ["m", "file", "s"])
    assert not service.supervisor.stored[2].polled


def test_end_that_prevents_a_restart(launch: Launch) -> None:
    service = launch()
    service.does("store('a', 0)")
    service.does("manager.send(b'STATUS=ends')")
    with pytest.raises(AssertionError):
        service.does("os._exit(2)")
    service.supervisor.wait(lambda: service.supervisor.statuses == [2])
    assert not service.supervisor.pid
    assert not service.supervisor.names
    assert service.supervisor.notifications[-1] == {"STATUS": "ends"}


def test_stop_closes_what_is_stored(launch: Launch) -> None:
    service = launch()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            service.does("store('a', 0)")
            socket.send_fds(ours, [b"x"], [ours.fileno()])
        service.supervisor.stop()
        assert not service.supervisor.names
        service.supervisor.start()
        assert service.found() == []


def test_something_happens_while_it_is_down(launch: Launch) -> None:
    service = launch()
    service.does("store('a', 0)")
    with service.supervisor.down(signal.SIGTERM):
        assert service.supervisor.pid == 0
        assert service.supervisor.names == ["a"]
    assert service.found() == ["a"]
    assert service.supervisor.starts == 2


def test_more_descriptors_than_one_message_holds(launch: Launch) -> None:
    service = launch()
    service.does("[store(f'f{n}', os.memfd_create(f'm{n}')) for n in range(300)]")
    service.supervisor.kill()
    found = service.does("found()")
    assert found == [(f"f{n}", f"/memfd:m{n} (deleted)") for n in reversed(range(300))]


def test_descriptors_are_moved_as_if_at_once() -> None:
    for sources in itertools.product(range(3, 8), repeat=4):
        files = {fd: f"file {fd}" for fd in range(3, 8)}
        for old, new in in_order(dict(enumerate(sources, 3))):
            files[new] = files[old]
        assert [files[fd] for fd in range(3, 7)] == [f"file {fd}" for fd in sources]


def test_waiting_for_a_service_that_cannot_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.support.supervisor.PATIENCE", 0.5)
    with Supervisor(tmp_path, ["/nowhere/service"]) as supervisor:
        with pytest.raises(AssertionError, match="not found"):
            supervisor.start()
        assert set(supervisor.statuses) == {127}
    assert not os.path.exists(f"/proc/{supervisor.pid}") or not supervisor.pid
