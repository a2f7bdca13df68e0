# SPDX-License-Identifier: Apache-2.0
"""Hosts as network namespaces on a bridge, and their disconnection.

The caller is in namespaces of its own (``unshare --net --mount --pid``), which end with it.
"""

from __future__ import annotations

import subprocess

NETWORK = "10.79.0"  # the first three numbers of addresses


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def prepare(network: str = NETWORK) -> None:
    """Create the bridge, which this process is connected to."""
    run("mount", "-t", "tmpfs", "none", "/run")
    run("mkdir", "/run/netns")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "bridge", "type", "bridge")
    run("ip", "address", "add", f"{network}.254/24", "dev", "bridge")
    run("ip", "link", "set", "bridge", "up")


class Place:
    """A host in the network."""

    def __init__(self, name: str, number: int, network: str = NETWORK) -> None:
        self.name = name
        self.address = f"{network}.{number}"
        self._link = f"to-{name}"
        run("ip", "netns", "add", name)
        run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth", "netns", name)
        run("ip", "link", "set", self._link, "master", "bridge")
        run("ip", "link", "set", self._link, "up")
        self._inside("ip", "link", "set", "lo", "up")
        self._inside("ip", "address", "add", f"{self.address}/24", "dev", "eth")
        self._inside("ip", "link", "set", "eth", "up")

    @property
    def enter(self) -> list[str]:
        """What a command line begins with to run here."""
        return ["ip", "netns", "exec", self.name]

    def _inside(self, *command: str) -> None:
        run(*self.enter, *command)

    def isolate(self) -> None:
        """Cut it off from everybody; no one is told."""
        run("ip", "link", "set", self._link, "down")

    def join(self) -> None:
        run("ip", "link", "set", self._link, "up")

    def cut(self, other: Place) -> None:
        """Drop what it sends to another host; what that one sends arrives."""
        self._inside("ip", "route", "add", "blackhole", f"{other.address}/32")

    def mend(self, other: Place) -> None:
        self._inside("ip", "route", "del", "blackhole", f"{other.address}/32")
