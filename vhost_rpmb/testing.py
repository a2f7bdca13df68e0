# SPDX-License-Identifier: Apache-2.0
"""A running RPMB device for test suites of other projects: `RunningDevice`.

::

    @pytest.fixture
    def rpmb(tmp_path):
        with RunningDevice(tmp_path) as device:
            yield device
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import spec

_TIMEOUT = 60.0  # seconds for a start or a stop
_OF_A_SERVICE = ("INVOCATION_ID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "FDSTORE")
_POLL_INTERVAL = 0.1  # seconds between checks that a starting daemon still runs


class RunningDevice:
    """A daemon in its own process, with one image in ``folder``; a context manager.

    The image is created with ``capacity`` bytes, a multiple of 128 KiB up to 16 MiB, unless it
    exists. ``options`` are further options of vhost-user-rpmb. Entering the context starts the
    daemon, leaving it stops the daemon; `kill` and `start` in between simulate a crash and a
    restart. A VMM attaches to ``socket_path``; `client` is a front-end without a virtual machine.
    ``command_line`` and ``environment`` apply to the next start. ``inject`` is the text of a script
    of faults for --inject, which is written to ``inject_path``; None: no faults.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *options: str,
        capacity: int = spec.CAPACITY_UNIT,
        inject: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.socket_path = self.folder / "rpmb.sock"
        self.flash_path = self.folder / "rpmb.img"
        self.inject_path = self.folder / "inject.toml"
        self.command_line = [
            *(sys.executable, "-P", "-m", "vhost_rpmb"),  # no imports from the current folder
            *(f"--socket-path={self.socket_path}", f"--flash-path={self.flash_path}"),
            *options,
        ]
        # The test suite may run under a service manager; the daemon of a test does not.
        self.environment = {k: v for k, v in os.environ.items() if k not in _OF_A_SERVICE}
        if inject is not None:
            self.inject_path.write_text(inject)
            self.command_line.append(f"--inject={self.inject_path}")
        self._log = self.folder / "rpmb.log"
        self._process: subprocess.Popen[bytes] | None = None
        if not self.flash_path.exists():
            self.flash_path.touch()
            os.truncate(self.flash_path, capacity)

    @property
    def log(self) -> str:
        """The log of the daemon, of all starts so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """The process ID of the running daemon; RuntimeError if there is none."""
        if self._process is None:
            raise RuntimeError("the device is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the daemon and wait until it serves; RuntimeError with its log if it does not."""
        if self._process is not None:
            raise RuntimeError("the device is running already")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind("")  # an abstract name that the kernel chooses
            manager.settimeout(_POLL_INTERVAL)
            process = self._launch("@" + os.fsdecode(manager.getsockname()[1:]))
            ends = time.monotonic() + _TIMEOUT
            while not _is_ready(manager):
                if process.poll() is not None or time.monotonic() > ends:
                    self.kill()
                    raise RuntimeError(f"the device does not start: {self.log}")

    def _launch(self, notify_socket: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command_line,
                env=self.environment | {"NOTIFY_SOCKET": notify_socket},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests; they stop the daemon
            )
        return self._process

    def stop(self) -> None:
        """Stop the daemon by SIGTERM; RuntimeError with its log unless it ends with status 0."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            status = self._process.wait(_TIMEOUT)
        except subprocess.TimeoutExpired:
            status = None
        self.kill()
        if status != 0:
            raise RuntimeError(f"the device ended with status {status}: {self.log}")

    def kill(self) -> None:
        """Kill the daemon, as a crash would; every acknowledged write is there after `start`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self, key: bytes | None = None) -> RpmbClient:
        """Connect as a virtual machine would; with ``key``, every answer is verified.

        The daemon serves one front-end at a time: the client waits while another is connected.
        """
        return RpmbClient.connect(self.socket_path, key)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        self.kill()


def _is_ready(manager: socket.socket) -> bool:
    """Wait up to the socket's timeout for the daemon's READY notification."""
    try:
        return manager.recv(4096).startswith(b"READY=1")
    except TimeoutError:
        return False
