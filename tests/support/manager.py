# SPDX-License-Identifier: Apache-2.0
"""A service manager in this process that takes every descriptor; for one session on its own.

`tests.support.supervisor` is the one for daemons: it hands descriptors over.
"""

from __future__ import annotations

import os
import socket
import threading

from vhost_rpmb.closing import Closing
from vhost_rpmb.daemon.descriptors import DescriptorStore
from vhost_rpmb.daemon.handover import Handover
from vhost_rpmb.daemon.notify import Notifier


class Manager(Closing):
    """Receives notifications in a thread; ``handover`` is the daemon's side."""

    def __init__(self, limit: int = 1024) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("")  # an abstract name that the kernel chooses
        self._notifier = Notifier(
            {"NOTIFY_SOCKET": f"@{os.fsdecode(self._socket.getsockname()[1:])}"}
        )
        self.stored: list[str] = []  # names
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.handover = Handover(DescriptorStore(self._notifier, {"FDSTORE": str(limit)}))
        self.handover.open("device")

    def _run(self) -> None:
        while True:
            data = self._socket.recv(4096)  # without room for descriptors: this process has none
            if data == b"END=1":
                return
            lines = dict(line.split("=", 1) for line in data.decode().split("\n"))
            if "FDSTORE" in lines:
                self.stored.append(lines["FDNAME"])
            elif "FDSTOREREMOVE" in lines:
                self.stored.remove(lines["FDNAME"])

    def close(self) -> None:
        self._notifier.send_reliably("END=1")
        self._thread.join()
        self._notifier.close()
        self.handover.close()
        self._socket.close()
