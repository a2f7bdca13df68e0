# SPDX-License-Identifier: Apache-2.0
"""A running RPMB device for the test suites of others: `RunningDevice`.

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
from types import TracebackType
from typing import Self

from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import spec

_TIMEOUT = 60.0  # seconds for a start or a stop
_LOOK = 0.1  # seconds between two looks whether a daemon that has not said READY is still there


class RunningDevice:
    """A daemon in a process of its own, on one image in ``folder``; a context manager.

    The image gets ``capacity`` bytes, a multiple of 128 KiB up to 16 MiB, unless it is there
    already. ``options`` are further ones of vhost-user-rpmb's command line. Entering the context
    starts the daemon, leaving it stops it; `kill` and `start` in between are a crash and what comes
    after. A VMM attaches to ``socket_path``; `client` is a front-end without a virtual machine.
    ``command_line`` and ``environment`` are those of the next start.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *options: str, capacity: int = spec.CAPACITY_UNIT
    ) -> None:
        self.folder = Path(folder)
        self.socket_path = self.folder / "rpmb.sock"
        self.flash_path = self.folder / "rpmb.img"
        self.command_line = [
            *(sys.executable, "-P", "-m", "vhost_rpmb"),  # no imports from the current folder
            *(f"--socket-path={self.socket_path}", f"--flash-path={self.flash_path}"),
            *options,
        ]
        self.environment = dict(os.environ)
        self._log = self.folder / "rpmb.log"
        self._process: subprocess.Popen[bytes] | None = None
        if not self.flash_path.exists():
            self.flash_path.touch()
            os.truncate(self.flash_path, capacity)

    @property
    def log(self) -> str:
        """What the daemon has said so far, in all its starts."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def pid(self) -> int:
        """The running daemon's process; RuntimeError if there is none."""
        if self._process is None:
            raise RuntimeError("the device is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the daemon, wait until it serves; RuntimeError with its words if it does not."""
        if self._process is not None:
            raise RuntimeError("the device is running already")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind("")  # an abstract name that the kernel chooses
            manager.settimeout(_LOOK)
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
        """End the daemon as an operator would; RuntimeError with its words unless it ends well."""
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
        """End the daemon at once, as a crash would; everything acknowledged is there at `start`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def client(self, key: bytes | None = None) -> RpmbClient:
        """Connect as a virtual machine would; with the key every answer is verified.

        One front-end is served at a time: the client waits while another one is connected.
        """
        return RpmbClient.connect(self.socket_path, key)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.stop()
        self.kill()


def _is_ready(manager: socket.socket) -> bool:
    """Look for the daemon's notification, for a moment."""
    try:
        return manager.recv(4096).startswith(b"READY=1")
    except TimeoutError:
        return False
