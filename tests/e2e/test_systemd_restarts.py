# SPDX-License-Identifier: Apache-2.0
"""A front-end under systemd that never notices how its daemon is restarted, killed and updated."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cache import Say
from tests.e2e.machine import WHEELS, make_machine, make_old_wheel
from tests.e2e.story import KEY, LETTER
from tests.e2e.unit import INSTALL, TIMEOUT, UPDATE, Unit
from tests.e2e.vm import Guest, succeed

ROUNDS = int(os.environ.get("VHOST_RPMB_SYSTEMD_RESTARTS", "3"))  # of each kind
# The first test may have to make the kit and the machine.
pytestmark = [pytest.mark.qemu, pytest.mark.timeout(1200 + 60 * ROUNDS)]

# The last commit with format 1 of the state file, before connections outlived their daemon.
FORMAT_1 = "75057ab"
CLIENT = Path(__file__).parent / "guest" / "pipelined.py"
IN_FLIGHT = 8  # its writes
# The client's own copy of the package, because updates replace the daemon's.
COPY = "cp -a /opt/vhost-rpmb /opt/client"
OLD = "python3 -m venv /opt/old && /opt/old/bin/pip install old/vhost_rpmb-*.whl"


@pytest.fixture(scope="module")
def guest(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    say: Say,
) -> Iterator[Guest]:
    """A machine that runs, with our package and, for the test that needs it, an earlier one."""
    machine = make_machine(say)
    old, install = None, f"{INSTALL}\n{COPY}"
    if any("from_format_1" in item.name for item in request.session.items):
        old, install = make_old_wheel(machine, FORMAT_1, say), f"{install}\n{OLD}"
    disk = tmp_path_factory.mktemp("machine") / "disk"
    machine.make_disk(disk, install, old)
    with Guest(machine.command_line(disk)) as guest:
        disk.unlink()  # QEMU has it open
        guest.put_file("/root/key", KEY)
        succeed(guest, "chmod 600 /root/key")
        guest.put_file("/root/data", LETTER)
        guest.put_file("/root/pipelined.py", CLIENT.read_bytes())
        yield guest


class Client:
    """A pipelined client of a unit that runs in the background."""

    def __init__(self, unit: Unit, mode: str = "") -> None:
        self.unit = unit
        self.folder = f"/root/{unit.name}"
        command = (
            "/opt/client/bin/python /root/pipelined.py"
            f" /run/vhost-user-rpmb/{unit.name}.sock /root/key {mode}"
        )
        self.pid = unit.run(
            f"mkdir {self.folder}; cd {self.folder}; {command} > said 2>&1 & echo $!"
        )
        self.progresses()

    @property
    def acknowledged(self) -> int:
        return int(self.unit.run(f"cat {self.folder}/acknowledged 2>/dev/null || echo 0") or 0)

    def progresses(self) -> None:
        """Wait until a write was acknowledged that was not before."""
        before = self.acknowledged
        ends = time.monotonic() + TIMEOUT
        while self.acknowledged <= before:
            assert time.monotonic() < ends, self.said
            time.sleep(0.1)

    @property
    def said(self) -> str:
        return self.unit.run(f"cat {self.folder}/said")

    def ended(self) -> None:
        """Wait for its end."""
        self.unit.run(f"while kill -0 {self.pid} 2>/dev/null; do sleep 0.1; done")

    def stop(self) -> tuple[int, int]:
        """Let it end: how many writes there were, and how often it connected."""
        self.unit.run(f"touch {self.folder}/stop")
        self.ended()
        written, connections = self.said.split()
        return int(written), int(connections)


def started(guest: Guest, name: str) -> Unit:
    unit = Unit(guest, name)
    unit.start()
    unit.program()
    return unit


def kill(unit: Unit, signal: str) -> None:
    """Send a signal as any program may; wait until the next process serves."""
    pid = unit.show("MainPID")["MainPID"]
    unit.run(f"kill -{signal} {pid}")
    ends = time.monotonic() + TIMEOUT
    while unit.show("MainPID", "ActiveState") in (
        {"MainPID": pid, "ActiveState": "active"},
        {"MainPID": "0", "ActiveState": "activating"},
    ):
        assert time.monotonic() < ends
    unit.until("ActiveState", "active")


def check(unit: Unit, client: Client) -> None:
    """The connection was the only one, the writes are there, and nothing is left in the store."""
    written, connections = client.stop()
    assert connections == 1
    unit.until("NFileDescriptorStore", "1")
    assert unit.client("read-counter key")["write_counter"] == written
    assert not unit.journal("-p", "warning")


def test_restarts(guest: Guest) -> None:
    unit = started(guest, "restarts")
    client = Client(unit)
    assert int(unit.show("NFileDescriptorStore")["NFileDescriptorStore"]) >= 6
    for _ in range(ROUNDS):
        unit.run(f"systemctl restart {unit.unit}.service")
    client.progresses()
    unit.run("systemctl daemon-reexec")
    unit.run(f"systemctl restart {unit.unit}.service")
    client.progresses()
    unit.run(f"systemctl restart {unit.unit}.socket")
    client.progresses()
    check(unit, client)


def test_kills(guest: Guest) -> None:
    unit = started(guest, "kills")
    client = Client(unit)
    for number in range(ROUNDS):
        kill(unit, "KILL")
        if number % 4 == 0:
            client.progresses()
    kill(unit, "TERM")
    client.progresses()
    # Soon after each other, more often than systemd's default limit allows.
    unit.run(f"for i in $(seq 8); do systemctl kill -s KILL {unit.unit}.service; done")
    client.progresses()
    check(unit, client)


@pytest.mark.long
def test_update(guest: Guest) -> None:
    """As the guide says, to the same version."""
    unit = started(guest, "updated")
    client = Client(unit)
    pid = unit.show("MainPID")
    unit.run(f"cd /{WHEELS}; PIP_NO_INDEX=1; export PIP_NO_INDEX\n{UPDATE}")
    assert unit.show("MainPID") != pid
    client.progresses()
    check(unit, client)


@pytest.mark.long
@pytest.mark.needs_history(FORMAT_1)
def test_update_from_format_1(guest: Guest) -> None:
    """That version does not keep the connection; the writes that it acknowledged are kept."""
    unit = Unit(guest, "old")
    folder = f"/run/systemd/system/{unit.unit}.service.d"
    drop_in = "[Service]\\nExecStart=\\nExecStart=/opt/old/bin/vhost-user-rpmb --fd=3 "
    drop_in += "--flash-path=%%S/vhost-user-rpmb/%%i/rpmb.img\\n"
    unit.run(
        f"mkdir -p {folder}; printf {shlex.quote(drop_in)} > {folder}/old.conf;"
        "systemctl daemon-reload"
    )
    unit.start()
    unit.program()
    client = Client(unit, "reconnect")
    assert unit.show("NFileDescriptorStore") == {"NFileDescriptorStore": "0"}
    unit.run(f"rm -r {folder}; systemctl daemon-reload; systemctl restart {unit.unit}.service")
    client.progresses()
    kill(unit, "KILL")  # from here on it does
    client.progresses()
    written, connections = client.stop()
    assert connections == 2
    assert unit.client("read-counter key")["write_counter"] == written


@pytest.mark.long
def test_stop_ends_the_connection(guest: Guest) -> None:
    unit = started(guest, "stops")
    client = Client(unit)
    unit.run(f"systemctl stop {unit.unit}.service")
    assert unit.show("NFileDescriptorStore") == {"NFileDescriptorStore": "0"}
    client.ended()
    assert "closed the connection" in client.said
    acknowledged = client.acknowledged
    counter = unit.client("read-counter key")["write_counter"]
    assert isinstance(counter, int)
    assert counter >= acknowledged


@pytest.mark.long
def test_stop_after_a_kill_ends_the_connection(guest: Guest) -> None:
    """In the pause before the next start, and at moments of that start."""
    unit = Unit(guest, "killed")
    unit.start()
    unit.program()
    for number in range(max(4, ROUNDS)):
        client = Client(unit)
        pid = unit.show("MainPID")["MainPID"]
        unit.run(f"kill -9 {pid}; sleep {0.3 * (number % 8)}; systemctl stop {unit.unit}.service")
        # The result is that of the kill until the next start.
        assert unit.show("NFileDescriptorStore", "ActiveState", "SubState") == {
            "NFileDescriptorStore": "0",
            "ActiveState": "inactive",
            "SubState": "dead",
        }
        client.ended()
        assert "closed the connection" in client.said
        acknowledged = client.acknowledged
        # The socket starts the next one, which has every write.
        counter = unit.client("read-counter key")["write_counter"]
        assert isinstance(counter, int)
        assert acknowledged <= counter <= acknowledged + IN_FLIGHT
        unit.run(f"rm -r {client.folder}")
    assert not unit.journal("-p", "warning")


@pytest.mark.long
def test_front_end_that_dies_with_the_daemon(guest: Guest) -> None:
    unit = started(guest, "both")
    client = Client(unit)
    pid = unit.show("MainPID")["MainPID"]
    unit.run(f"kill -9 {pid} {client.pid}")
    unit.until("NFileDescriptorStore", "1")
    assert unit.client("info")["key_programmed"] is True
