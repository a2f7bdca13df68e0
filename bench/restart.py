# SPDX-License-Identifier: Apache-2.0
"""Restarts of a daemon whose front-end stays: how long a request waits, and for what.

As a program this file is the daemon, which also says how many microseconds it took to continue a
connection: ``python -m bench.restart OPTIONS``.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.daemon import KEY
from tests.support.rig import make_image
from tests.support.supervisor import Supervisor
from vhost_rpmb.driver.rpmb import RpmbClient

ROUNDS = 21
_REBUILT = re.compile(r"^rebuilt in ([\d.]+) us$", re.MULTILINE)


@contextmanager
def supervised(folder: Path, *command: str) -> Iterator[tuple[Supervisor, RpmbClient]]:
    """A daemon with a service manager, and its front-end."""
    with tempfile.TemporaryDirectory(dir=folder) as name, socket.socket(socket.AF_UNIX) as listener:
        home = Path(name)
        listener.bind(str(home / "socket"))
        listener.listen()
        flash = make_image(home / "flash")
        options = ("--fd=3", f"--flash-path={flash}")
        words = [sys.executable, "-m", *command, *options]
        with Supervisor(home, words, listener=listener) as supervisor:
            supervisor.start()
            with RpmbClient.connect(home / "socket", timeout=60) as client:
                client.program_key(KEY)
                yield supervisor, client


def gaps(folder: Path, number: int) -> list[float]:
    """Milliseconds of the longest of the requests that follow each other after a signal."""
    found = []
    with supervised(folder, "vhost_rpmb") as (supervisor, client):
        for _ in range(ROUNDS):
            client.write(0, bytes(256))
            starts = supervisor.starts
            supervisor.send(number)
            longest = 0.0
            while not (supervisor.starts > starts and supervisor.ready):
                begin = time.monotonic()
                client.read_counter()
                longest = max(longest, time.monotonic() - begin)
            found.append(longest * 1e3)
    return found


def rebuilds(folder: Path) -> list[float]:
    """Milliseconds in which a process continues a connection."""
    with supervised(folder, "bench.restart") as (supervisor, client):
        for _ in range(ROUNDS):
            client.write(0, bytes(256))
            supervisor.kill()
        client.read_counter()
        return [float(found) / 1e3 for found in _REBUILT.findall(supervisor.log)]


def main() -> int:
    """The daemon, with a clock around all that it does for an earlier connection."""
    from vhost_rpmb import cli
    from vhost_rpmb.daemon.handover import Handover
    from vhost_rpmb.daemon.server import Server

    spent = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                spent[0] += time.perf_counter() - begin

        return call

    resume = timed(Server.resume)

    def resume_and_report(server: Server) -> None:
        resume(server)
        os.write(2, f"rebuilt in {spent[0] * 1e6:.0f} us\n".encode())

    Handover.open = timed(Handover.open)  # type: ignore[method-assign]
    Server.resume = resume_and_report  # type: ignore[method-assign, assignment]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
