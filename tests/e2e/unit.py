# SPDX-License-Identifier: Apache-2.0
"""The units of a virtual machine, in a machine that systemd runs (machine.py)."""

from __future__ import annotations

import json
import re
import shlex
import time

from tests.e2e.vm import Guest, succeed
from tests.support.documents import blocks_of_guide

TIMEOUT = 300.0  # seconds
WAITING = "waiting for a front-end; write counter {}; {} requests served"

# What an operator types or writes.
INSTALL, ENABLE, UPDATE, DROP_IN, USER, OPTIONS, GIVE, _CAPABILITIES = (
    block.text for block in blocks_of_guide("systemd")
)


class Unit:
    """A virtual machine's units in the guest, and its files."""

    def __init__(self, guest: Guest, name: str) -> None:
        self.guest = guest
        self.name = name
        self.unit = f"vhost-user-rpmb@{name}"
        self.folder = f"/var/lib/vhost-user-rpmb/{name}"

    def enable(self) -> None:
        """Make the image and start the socket, as documented."""
        self.run(ENABLE.replace("vm1", self.name))

    def start(self) -> None:
        """Do the same until the machine ends, which takes half the time."""
        self.run(ENABLE.replace("vm1", self.name).replace("enable --now", "start"))

    def run(self, command: str) -> str:
        return succeed(self.guest, f"set -eu\n{command}")

    def show(self, *names: str, suffix: str = "service") -> dict[str, str]:
        """Properties of a unit."""
        output = self.run(f"systemctl show {self.unit}.{suffix} -p {','.join(names)}")
        return dict(line.split("=", 1) for line in output.splitlines())

    def until(self, name: str, value: str) -> None:
        """Wait until a property of the service has a value."""
        ends = time.monotonic() + TIMEOUT
        while (found := self.show(name)[name]) != value:
            assert time.monotonic() < ends, f"{name}: expected {value!r}, found {found!r}"
            time.sleep(0.2)

    def attempt(self, words: str, user: str = "root") -> tuple[int, str]:
        """Run the client as a user: its exit status, and what it said."""
        client = f"vhost-rpmb-client --json --socket-path=/run/vhost-user-rpmb/{self.name}.sock"
        # The daemon may have to start first, in an emulated machine.
        timeout = f"--timeout={TIMEOUT:.0f}"
        return self.guest.run(f"runuser -u {user} -- {client} {timeout} {words}", 2 * TIMEOUT)

    def client(self, words: str, user: str = "root") -> dict[str, object]:
        """Run the client, which has to succeed: its report."""
        status, output = self.attempt(words, user)
        assert status == 0, "\n".join([output, *self.journal()])
        report: dict[str, object] = json.loads(output)
        return report

    def program(self) -> None:
        """Program the key and write a block: the counter is 1 then."""
        self.client("write-key key")
        assert self.client("write-block 3 data key")["write_counter"] == 1

    def journal(self, *options: str) -> list[str]:
        """What the daemon has said."""
        words = shlex.join(["-u", self.unit, "-t", "vhost-user-rpmb", "-o", "cat", *options])
        return self.run(f"journalctl --sync; journalctl --quiet {words}").splitlines()

    def process(self, field: str) -> str:
        """A field of the daemon's /proc/PID/status."""
        pid = self.show("MainPID")["MainPID"]
        (line,) = re.findall(
            rf"^{field}:\s+(.*)$", self.run(f"cat /proc/{pid}/status"), re.MULTILINE
        )
        return str(line)
