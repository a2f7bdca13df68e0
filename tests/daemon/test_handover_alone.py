# SPDX-License-Identifier: Apache-2.0
"""Without a service manager that keeps descriptors: the daemon serves, and says so once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support import denied
from tests.support.daemon import PATIENCE, SANDBOX, Launch, Process, listens, until
from tests.support.oracle import KEY
from tests.support.supervised import Supervised
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine

LOG = "vhost-user-rpmb: warning: a restart will end the connection: "
NO_STORE = "there is no descriptor store, set FileDescriptorStoreMax="
FULL = "expected room for more than {} descriptors in the service manager's store: increase"
REFUSED = "the service manager does not take descriptors: "
INCOMPARABLE = "descriptors cannot be compared or copied: "


def serves_alone(supervised: Supervised, reason: str) -> None:
    """Connections are served, there is one warning, and a restart ends the connection."""
    with supervised.client() as client:
        client.program_key(KEY)
    with supervised.client(KEY) as client:
        assert client.write(0, bytes(256)) == 1
        (line,) = supervised.warnings
        assert line.startswith(LOG + reason)
        supervised.manager.kill()
        with pytest.raises(BackendError, match="closed the connection"):
            client.frontend.receive()
    with supervised.client(KEY) as client:
        assert client.read_counter() == 1
        assert len(supervised.warnings) == 2  # one by each process
        # The manager may not have read yet that the others are withdrawn.
        until(lambda: set(supervised.manager.names) <= {"rpmb-session"})


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_absent_or_full_store(tmp_path: Path, engine: Engine, limit: int) -> None:
    reason = FULL.format(limit) if limit else NO_STORE
    with Supervised(tmp_path, engine=engine.name, limit=limit) as supervised:
        serves_alone(supervised, reason)


@pytest.mark.parametrize(
    ("denials", "reason"),
    [
        (["sendmsg=ENOBUFS"], REFUSED + "No buffer space available"),
        (["sendmsg=EMSGSIZE"], REFUSED + "Message too long"),
        (["sendmsg=ETOOMANYREFS"], REFUSED + "Too many references: cannot splice"),
        (denied.NO_COMPARISON, INCOMPARABLE + "Operation not permitted"),
        ([*denied.OLD_KERNEL, "kcmp=ENOSYS"], INCOMPARABLE + "Function not implemented"),
    ],
    ids=["no-buffers", "too-long", "too-many", "forbidden", "no-kcmp"],
)
def test_refused_descriptors(
    tmp_path: Path, engine: Engine, denials: list[str], reason: str
) -> None:
    options = ["--fd=3", f"--flash-path={tmp_path / 'flash.img'}", "-v", *SANDBOX]
    command = denied.command(denials, *options)
    with Supervised(tmp_path, engine=engine.name, command=command) as supervised:
        serves_alone(supervised, reason)


def test_service_manager_that_ends(tmp_path: Path, engine: Engine) -> None:
    """Its socket refuses what comes later."""
    path, notify = tmp_path / "socket", tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        manager.bind(str(notify))
        process = Process(
            tmp_path,
            f"--socket-path={path}",
            engine=engine.name,
            variables={"NOTIFY_SOCKET": str(notify), "FDSTORE": "1024"},
        )
        while b"READY=1" not in manager.recv(4096):
            pass
    try:
        with RpmbClient.connect(path, timeout=PATIENCE) as client:
            client.program_key(KEY)
        with RpmbClient.connect(path, KEY, timeout=PATIENCE) as client:
            assert client.write(0, bytes(256)) == 1
        assert process.log == f"{LOG}{REFUSED}Connection refused\n"
        process.stop()
    finally:
        process.kill()


def test_started_by_hand_says_nothing(launch: Launch, path: Path, engine: Engine) -> None:
    process = launch(f"--socket-path={path}", engine=engine.name)
    until(lambda: listens(path))
    with RpmbClient.connect(path, timeout=PATIENCE) as client:
        client.program_key(KEY)
    assert process.log == ""
    process.stop()
