# SPDX-License-Identifier: Apache-2.0
"""A virtual machine's side of a device on one host: its daemon, and a client that records."""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tests.nemesis.history import ADDRESSES, BLOCK, History, Operation, now
from tests.nemesis.network import Place
from tests.support.fleet import Host
from tests.support.oracle import KEY
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.errors import ClientError
from vhost_rpmb.rpmb.errors import RpmbResultError

TIMEOUT = 15.0  # seconds, for an answer: longer than each fault
PAUSE_AFTER_FAILURE = 4.0  # seconds: a late copy of the write may come until then

_names = itertools.count()


class Guest(threading.Thread):
    """Starts its daemon again whenever it ends, and reads and writes whenever it answers."""

    def __init__(
        self, place: Place, host: Host, device: str, history: History, mutant: str | None
    ) -> None:
        super().__init__(name=f"{device} on {place.name}", daemon=True)
        self.place = place
        self.device = device
        self.mode = "expired"  # of the next start
        self.served_at = 0.0
        self.error: BaseException | None = None
        self._history = history
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._random = random.Random(self.name)
        module = ["vhost_rpmb"] if mutant is None else ["tests.nemesis.mutant", mutant]
        self._socket = host.folder / f"{device}.sock"
        self._log = host.folder / f"{device}.log"
        self._command = [
            *place.enter,
            *(sys.executable, "-m", *module),
            *(f"--socket-path={self._socket}", host.store, f"--device={device}"),
        ]

    def start_daemon(self, *before: str) -> None:
        """Start the daemon; ``before`` is what its command line begins with."""
        enter, command = self._command[:4], self._command[4:]
        mode, self.mode = self.mode, "expired"
        environment = {n: v for n, v in os.environ.items() if not n.startswith("COVERAGE")}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*enter, *before, *command, f"--take-over={mode}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=Path(__file__).parents[2],
            )

    def signal(self, number: int) -> None:
        """Send a signal to the daemon, if there is one."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def status(self) -> int | None:
        """The exit status of the daemon, None: it runs."""
        assert self._process is not None
        return self._process.poll()

    def until_listening(self) -> None:
        """Wait until the daemon accepts connections."""
        end = time.monotonic() + 60
        while True:
            with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
                probe.connect(str(self._socket))
                return
            assert self.status() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.1)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def program(self) -> None:
        """Program the key, before the run."""
        self.start_daemon()
        end = time.monotonic() + 60
        while True:
            try:
                with RpmbClient.connect(self._socket, timeout=TIMEOUT) as client:
                    client.program_key(KEY)
                    return
            except (ClientError, OSError):
                assert time.monotonic() < end, self.log
                time.sleep(0.1)

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._process is None or self._process.poll() is not None:
                    self.start_daemon()
                with (
                    suppress(ClientError, OSError),
                    RpmbClient.connect(self._socket, KEY, timeout=TIMEOUT) as client,
                ):
                    self._talk(client)
                self._stopping.wait(0.1)
        except BaseException as error:
            self.error = error

    def _talk(self, client: RpmbClient) -> None:
        """Read and write until the connection ends."""
        counter = self._read_counter(client)
        while not self._stopping.is_set():
            chosen = self._random.random()
            if chosen < 0.1:
                counter = self._read_counter(client)
            elif chosen < 0.5:
                self._read(client)
            else:
                counter = self._write(client, counter)
            self.served_at = now()

    def _read_counter(self, client: RpmbClient) -> int:
        began = now()
        counter = client.read_counter()
        self._history.add(Operation("counter", began, now(), 0, b"", counter, "ok"))
        return counter

    def _read(self, client: RpmbClient) -> None:
        address, began = self._random.randrange(ADDRESSES), now()
        data = client.read(address, 1)
        self._history.add(Operation("read", began, now(), address, data, 0, "ok"))

    def _write(self, client: RpmbClient, counter: int) -> int:
        address, began = self._random.randrange(ADDRESSES), now()
        data = b"%d %s" % (next(_names), self.name.encode())
        data = data.ljust(BLOCK, b"\0")
        result = ""
        try:
            client.write(address, data, counter)
            result = "ok"
        except RpmbResultError:
            result = "failed"
        finally:
            operation = Operation("write", began, now(), address, data, counter + 1, result)
            self._history.add(operation)
        if result == "ok":
            return counter + 1
        self._stopping.wait(PAUSE_AFTER_FAILURE)
        return self._read_counter(client)

    def stop(self) -> None:
        """End the daemon, upon which the client ends; the last request may have no answer."""
        self._stopping.set()
        while self.is_alive():
            self.signal(signal.SIGKILL)
            self.join(0.5)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
