# SPDX-License-Identifier: Apache-2.0
"""The units for a shared store, in a machine that systemd runs, with etcd on the same machine."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator

import pytest

from tests.e2e.machine import make_machine
from tests.e2e.story import KEY, LETTER
from tests.e2e.unit import INSTALL, TIMEOUT
from tests.e2e.vm import Guest, succeed
from tests.support.authority import Authority
from tests.support.documents import blocks_of_guide
from tests.support.etcd import make_etcd

# The first test may have to make the kit and the machine.
pytestmark = [pytest.mark.qemu, pytest.mark.etcd, pytest.mark.long, pytest.mark.timeout(1800)]

CONFIG, DROP_IN = (each.text for each in blocks_of_guide("fleet") if each.language in "toml ini")
START, STOP = (text for _, text in blocks_of_guide("fleet") if "systemctl st" in text)
UNIT = "vhost-user-rpmb-fleet@vm1"
SOCKET = "/run/vhost-user-rpmb-fleet/vm1.sock"
FOLDER = "/etc/vhost-user-rpmb"
# A front-end whose ring runs, so that its daemon owns the device.
RING = f"""\
import time
from vhost_rpmb.driver.rpmb import RpmbClient
client = RpmbClient.connect({SOCKET!r}, timeout={TIMEOUT})
client.read_counter()
print("owned", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Guest]:
    """A machine with one member of a store and a device, configured as documented."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    machine = make_machine(reporter.write_line)
    folder = tmp_path_factory.mktemp("machine")
    other = folder / "other"
    other.mkdir()
    shutil.copy(make_etcd(), other)
    authority = Authority(other)
    for name in ("server", "host"):
        authority.issue(name)
    disk = folder / "disk"
    install = INSTALL + f"\nmkdir -p {FOLDER}; mv old/etcd /usr/local/bin; cp old/* /root"
    machine.make_disk(disk, install, old=other)
    with Guest(machine.command_line(disk)) as guest:
        disk.unlink()  # QEMU has it open
        guest.put_file("/root/key", KEY)
        guest.put_file("/root/data", LETTER)
        run(guest, "chmod 600 key host.key; ip link set lo up || true")
        run(guest, f"cp ca.pem host.pem host.key {FOLDER}; chmod 644 {FOLDER}/*.pem")
        run(guest, f"umask 077; head -c 32 /dev/urandom > {FOLDER}/kek; echo x > {FOLDER}/password")
        # One member in place of three, without users.
        config = CONFIG.replace('user = "rpmb"\npassword-file = "credential:password"\n', "")
        config = re.sub("endpoints = .*", 'endpoints = ["https://127.0.0.1:2379"]', config)
        guest.put_file(f"{FOLDER}/fleet.toml", config.encode())
        run(
            guest,
            "systemd-run --unit=etcd etcd --data-dir=/root/store --cert-file=/root/server.pem"
            " --key-file=/root/server.key --trusted-ca-file=/root/ca.pem --client-cert-auth"
            " --listen-client-urls=https://127.0.0.1:2379"
            " --advertise-client-urls=https://127.0.0.1:2379"
            " --heartbeat-interval=500 --election-timeout=5000",
        )
        drop_in = DROP_IN.replace("192.0.2.", "127.0.0.")
        run(
            guest, f"systemctl edit --stdin {UNIT.replace('vm1', '')}.service <<'EOF'\n{drop_in}EOF"
        )
        fleet(guest, "create", "vm1")
        yield guest


def run(guest: Guest, command: str) -> str:
    return succeed(guest, f"set -eu\n{command}")


def fleet(guest: Guest, action: str, *arguments: str) -> None:
    """Run an action as root, with the secrets as a service has them."""
    run(
        guest,
        "for try in 1 2 3 4 5 6 7 8 9; do"
        " systemd-run --wait --pipe --quiet -p LoadCredential=kek:/etc/vhost-user-rpmb/kek"
        f" -p LoadCredential=host.key:{FOLDER}/host.key vhost-rpmb-client fleet {action}"
        f" {FOLDER}/fleet.toml {' '.join(arguments)} && break; sleep 5; done",
    )


def show(guest: Guest, *names: str) -> dict[str, str]:
    output = run(guest, f"systemctl show {UNIT}.service -p {','.join(names)}")
    return dict(line.split("=", 1) for line in output.splitlines())


def client(guest: Guest, words: str) -> dict[str, object]:
    command = f"vhost-rpmb-client --json --socket-path={SOCKET} --timeout={TIMEOUT:.0f} {words}"
    fields = json.loads(run(guest, f"cd /root; {command}"))
    assert isinstance(fields, dict)
    return fields


def test_unit_serves_a_shared_device_confined_and_ends_when_fenced(guest: Guest) -> None:
    run(guest, START)
    client(guest, "write-key key")
    assert client(guest, "write-block 3 data key")["write_counter"] == 1

    # The daemon's own sandbox, and systemd's.
    log = run(guest, f"journalctl --sync; journalctl --quiet -u {UNIT} -t vhost-user-rpmb -o cat")
    assert "sandbox" not in log
    pid = show(guest, "MainPID")["MainPID"]
    status = run(guest, f"cat /proc/{pid}/status")
    assert re.search(r"^CapBnd:\s+0+$", status, re.MULTILINE)
    rating = run(guest, f"systemd-analyze security {UNIT}.service | tail -n 1")
    found = re.search(r"exposure level for \S+: (\d+\.\d)", rating)
    assert found, rating
    assert float(found[1]) <= 2.0

    # A restart continues; another owner fences it while its ring runs, and systemd leaves it there.
    run(guest, f"systemctl restart {UNIT}.service")
    assert client(guest, "read-counter key")["write_counter"] == 1
    guest.put_file("/root/ring.py", RING.encode())
    run(guest, "$(head -n 1 $(which vhost-rpmb-client) | cut -c 3-) ring.py > ring.log 2>&1 &")
    run(guest, "for try in $(seq 300); do grep -q owned ring.log && exit; sleep 1; done; exit 1")
    fleet(guest, "take-over", "vm1", "--take-over=now")
    ends = time.monotonic() + TIMEOUT
    while show(guest, "ActiveState")["ActiveState"] != "failed":
        assert time.monotonic() < ends
        time.sleep(1)
    assert show(guest, "ExecMainStatus", "NRestarts") == {"ExecMainStatus": "3", "NRestarts": "0"}

    # The next connection takes it over again; a stop frees it.
    assert client(guest, "write-block 4 data key")["write_counter"] == 2
    run(guest, STOP)
    fleet(guest, "take-over", "vm1", "--take-over=never")
