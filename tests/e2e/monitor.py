# SPDX-License-Identifier: Apache-2.0
"""QEMU's monitor, spoken to over its socket (QMP)."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from vhost_rpmb.closing import Closing

_TIMEOUT = 60.0  # seconds


class MonitorError(Exception):
    """The monitor refused a command, or it is gone."""


class Monitor(Closing):
    """A connection to the monitor of a running QEMU; usable in a ``with`` statement."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_TIMEOUT)
        try:
            self._socket.connect(str(path))
            self._stream = self._socket.makefile("r")
            self._receive()  # the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returns; ``_`` in a name stands for ``-``."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": named})
        try:
            self._socket.sendall(message.encode() + b"\n")
        except OSError as error:
            raise MonitorError(f"{command}: QEMU has ended: {error.strerror}") from error
        while True:  # events come in between
            answer = self._receive()
            if "error" in answer:
                raise MonitorError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def dirty_rate(self) -> dict[str, Any]:
        """Measure for a second, in mode dirty-bitmap, how much memory is written."""
        self.execute("calc-dirty-rate", calc_time=1, mode="dirty-bitmap")
        deadline = time.monotonic() + _TIMEOUT
        while True:
            measured: dict[str, Any] = self.execute("query-dirty-rate")
            if measured["status"] == "measured":
                return measured
            if time.monotonic() > deadline:
                raise MonitorError(f"the dirty rate was not measured in time: {measured}")
            time.sleep(0.1)

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except OSError as error:
            raise MonitorError(f"QEMU has ended: {error.strerror}") from error
        if not line:
            raise MonitorError("QEMU has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer
