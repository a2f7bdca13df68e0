# SPDX-License-Identifier: Apache-2.0
"""The units in a machine that systemd runs: a Debian, our wheel installed there as documented."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest

from tests.e2e.cache import Say
from tests.e2e.machine import make_machine
from tests.e2e.story import KEY, LETTER
from tests.e2e.unit import DROP_IN, GIVE, INSTALL, OPTIONS, USER, WAITING, Unit
from tests.e2e.vm import Guest, succeed

# The first test may have to make the kit and the machine.
pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory, say: Say) -> Iterator[Guest]:
    """A machine that runs, with our package; each test makes units of its own there."""
    machine = make_machine(say)
    disk = tmp_path_factory.mktemp("machine") / "disk"
    machine.make_disk(disk, INSTALL)
    with Guest(machine.command_line(disk)) as guest:
        disk.unlink()  # QEMU has it open
        guest.put_file("/root/key", KEY)
        succeed(guest, "chmod 600 /root/key")
        guest.put_file("/root/data", LETTER)
        yield guest


def test_documented_commands(guest: Guest) -> None:
    unit = Unit(guest, "vm1")
    unit.enable()
    assert unit.show("ActiveState", "UnitFileState", suffix="socket") == {
        "ActiveState": "active",
        "UnitFileState": "enabled",
    }
    assert unit.show("ActiveState") == {"ActiveState": "inactive"}

    # The first connection starts it.
    unit.program()
    unit.until("StatusText", WAITING.format(1, 3))
    status = unit.run(f"systemctl status {unit.unit}")
    assert f'Status: "{WAITING.format(1, 3)}"' in status
    assert unit.client("read-block 3 1 out key")["verified"]
    assert guest.get_file("/root/out") == LETTER
    holder = (
        "import socket, time; s = socket.socket(socket.AF_UNIX);"
        "s.connect('/run/vhost-user-rpmb/vm1.sock'); time.sleep(1000)"
    )
    pid = unit.run(f"python3 -c {shlex.quote(holder)} > /dev/null 2>&1 & echo $!")
    unit.until("StatusText", "front-end connected; write counter 1; 4 requests served")
    unit.run(f"kill {pid}")
    unit.until("StatusText", WAITING.format(1, 4))

    # Who else may connect.
    assert unit.client("info")["max_write_blocks"] == 32
    unit.run("useradd --system libvirt-qemu")
    assert unit.attempt("info", "libvirt-qemu")[0] == 1
    unit.run(f"systemctl edit --stdin {unit.unit}.socket <<'EOF'\n{DROP_IN}EOF")
    # More options.
    unit.run(
        f"mkdir /etc/vhost-user-rpmb\ncat > /etc/vhost-user-rpmb/vm1.conf <<'EOF'\n{OPTIONS}EOF"
    )
    unit.run(f"systemctl restart {unit.unit}.socket")
    assert unit.client("info", "libvirt-qemu")["max_write_blocks"] == 64
    assert unit.attempt("info", "nobody")[0] == 1

    # Files put there later.
    unit.run(f"systemctl stop {unit.unit}")
    unit.run(f"cd {unit.folder}; cp rpmb.img.state new; mv new rpmb.img.state")
    unit.run(f"vhost-rpmb-client verify --flash-path={unit.folder}/rpmb.img")
    assert unit.attempt("info")[0] == 1
    assert "Permission denied" in unit.journal("-p", "err")[-1]
    unit.run(GIVE)
    assert unit.client("read-counter key")["write_counter"] == 1


def test_counter_survives_every_kind_of_stop(guest: Guest) -> None:
    unit = Unit(guest, "ends")
    unit.start()
    unit.program()
    unit.run(f"systemctl kill --signal=KILL {unit.unit}.service")
    unit.until("NRestarts", "1")
    unit.until("StatusText", WAITING.format(1, 0))
    assert unit.client("write-block 4 data key")["write_counter"] == 2
    # On request it ends well, its log gone and the image complete.
    unit.run(f"systemctl restart {unit.unit}.service")
    assert unit.client("read-counter key")["write_counter"] == 2
    unit.run(f"systemctl stop {unit.unit}.service")
    ended = {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert unit.show(*ended) == ended
    assert unit.run(f"ls {unit.folder}").split() == ["rpmb.img", "rpmb.img.state"]
    image = guest.get_file(f"{unit.folder}/rpmb.img")
    assert image[3 * 256 : 5 * 256] == 2 * LETTER
    assert not unit.journal("-p", "warning")
    # Without its socket there is no service.
    assert unit.client("read-counter key")["write_counter"] == 2
    unit.run(f"systemctl stop {unit.unit}.socket")
    unit.until("ActiveState", "inactive")
    assert unit.show("Result") == {"Result": "success"}
    assert guest.run(f"test -e /run/vhost-user-rpmb/{unit.name}.sock")[0] == 1


def test_instances_are_kept_apart(guest: Guest) -> None:
    units = [Unit(guest, name) for name in ("one", "6f1cbfcb-7f3b-4f07-8d07-3c8c2c0c4f11")]
    for unit in units:
        unit.start()
        assert unit.client("info")["key_programmed"] is False
    units[0].program()
    assert units[1].client("info")["key_programmed"] is False
    for unit in units:
        owner = int(unit.process("Uid").split()[0])
        assert 61184 <= owner <= 65519  # systemd's dynamic users
        pid = unit.show("MainPID")["MainPID"]
        files = unit.run(
            f"nsenter --target {pid} --mount find /var/lib/private -type f -printf '%U %P\n'"
        )
        state = ("rpmb.img", "rpmb.img.state", "rpmb.img.state-wal")
        assert sorted(files.splitlines()) == [
            f"{owner} vhost-user-rpmb/{unit.name}/{name}" for name in state
        ]


def test_user_for_each_machine(guest: Guest) -> None:
    """By the template's drop-in; a name that is too long for a user has a drop-in of its own."""
    units = [Unit(guest, name) for name in ("Name_with-26-characters-xy", "c" * 36)]
    for unit in units:
        unit.start()
        unit.program()
    assert len({unit.process("Uid") for unit in units}) == 1
    template = "vhost-user-rpmb@.service"
    named = USER.replace("%i", "7f3b")
    units[0].run(f"systemctl edit --stdin {template} <<'EOF'\n{USER}EOF")
    units[1].run(f"systemctl edit --stdin {units[1].unit}.service <<'EOF'\n{named}EOF")
    try:
        for unit, user in zip(units, (f"rpmb-{units[0].name}", "rpmb-7f3b"), strict=True):
            unit.run(f"systemctl restart {unit.unit}.service")
            assert unit.client("write-block 4 data key")["write_counter"] == 2
            assert unit.show("User") == {"User": user}
        assert len({unit.process("Uid") for unit in units}) == 2
    finally:
        units[0].run(f"rm -r /etc/systemd/system/{template}.d; systemctl daemon-reload")


def test_service_that_cannot_start(guest: Guest) -> None:
    """Who connects is told at once, nothing is tried again; once mended, the next one is served."""
    unit = Unit(guest, "broken")
    unit.start()
    unit.run(f"mv {unit.folder}/rpmb.img {unit.folder}/elsewhere")
    status, output = unit.attempt("--timeout=1000 info")
    assert status == 1
    assert "closed the connection" in output
    unit.until("ActiveState", "failed")
    assert unit.show("Result", "ExecMainStatus", "NRestarts") == {
        "Result": "exit-code",
        "ExecMainStatus": "2",
        "NRestarts": "0",
    }
    (line,) = unit.journal("-p", "err")
    image = f"/var/lib/private/vhost-user-rpmb/{unit.name}/rpmb.img"  # links are resolved
    assert line.startswith(f"vhost-user-rpmb: error: the image {image} does not exist")
    assert unit.show("ActiveState", suffix="socket") == {"ActiveState": "active"}
    unit.run(f"mv {unit.folder}/elsewhere {unit.folder}/rpmb.img")
    assert unit.client("info")["write_counter"] is None


def test_priorities_in_the_journal(guest: Guest) -> None:
    unit = Unit(guest, "talks")
    unit.start()
    options = f"OPTIONS=--key-path={unit.folder}/rpmb.key --verbose"
    unit.run(
        f"cp key {unit.folder}/rpmb.key; mkdir -p /etc/vhost-user-rpmb;"
        f"echo {options!r} > /etc/vhost-user-rpmb/{unit.name}.conf"
    )
    unit.client("info")
    unit.run(f"systemctl stop {unit.unit}.service")
    said = unit.journal()
    (warning,) = unit.journal("-p", "warning")
    assert warning.startswith("vhost-user-rpmb: warning: the key in ")
    assert warning in said
    assert any(line.startswith("vhost-user-rpmb: info: front-end connected") for line in said)
    assert not unit.journal("-p", "err")


def test_confinement(guest: Guest) -> None:
    """systemd's and the daemon's own; the log would say what of the latter is missing."""
    unit = Unit(guest, "confined")
    unit.start()
    unit.client("info")
    assert not unit.journal()
    for capabilities in ("CapBnd", "CapEff", "CapPrm"):
        assert int(unit.process(capabilities), 16) == 0
    assert unit.process("NoNewPrivs") == "1"
    filters = int(unit.process("Seccomp_filters"))
    rating = unit.run(f"systemd-analyze security {unit.unit}.service | tail -n 1")
    found = re.search(r"exposure level for \S+: (\d+\.\d)", rating)
    assert found, rating
    assert float(found[1]) <= 1.5
    unit.run(
        "mkdir -p /etc/vhost-user-rpmb;"
        f"echo OPTIONS=--sandbox=off > /etc/vhost-user-rpmb/{unit.name}.conf;"
        f"systemctl restart {unit.unit}.service"
    )
    assert int(unit.process("Seccomp_filters")) == filters - 1


def test_machine_reboots(guest: Guest) -> None:
    unit = Unit(guest, "stays")
    unit.enable()
    unit.program()
    guest.reboot("systemctl reboot")
    assert unit.show("ActiveState") == {"ActiveState": "inactive"}
    assert unit.client("write-block 4 data key")["write_counter"] == 2
    assert unit.client("read-block 3 1 out key")["verified"]
    assert guest.get_file("/root/out") == LETTER
    assert not unit.journal("-p", "warning")
