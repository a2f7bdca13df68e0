# SPDX-License-Identifier: Apache-2.0
"""Two hosts and a front-end that plays both sides of a migration."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tests.support.daemon import PATIENCE, SANDBOX, Daemon
from tests.support.oracle import KEY
from vhost_rpmb.driver.frontend import PROTOCOL_FEATURES, Frontend
from vhost_rpmb.driver.rpmb import RpmbClient, Setup
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import (
    ProtocolFeature,
    Request,
    StateDirection,
    StateTransferDescription,
)

_TRIES = 3  # of a transfer
_Result = TypeVar("_Result")
ACCEPTED, REFUSED = 0x100, 0x101  # replies to SET_DEVICE_STATE_FD
SETUP = Setup(protocol_features=PROTOCOL_FEATURES | ProtocolFeature.DEVICE_STATE)


class StateRefusedError(Exception):
    """The daemon refused a transfer, or found it bad."""


class MovingFrontend(Frontend):
    """A front-end whose virtual machine may move; with ``blob``, one that arrives.

    It arrives where QEMU gives the state: after the protocol features, before the virtio features.
    """

    blob: bytes | None = None
    through_socket = False  # as Cloud Hypervisor does, instead of a pipe

    def start_device(self, features: int) -> None:
        if self.blob is not None:
            self.load(self.blob)
        super().start_device(features)

    def transfer(self, direction: int, fd: int, phase: int = 0) -> int:
        """Send SET_DEVICE_STATE_FD; return the reply."""
        payload = StateTransferDescription(direction, phase).pack()
        return wire.unpack_u64(self.ask(Request.SET_DEVICE_STATE_FD, payload, [fd]))

    def check(self) -> int:
        """Send CHECK_DEVICE_STATE; return the reply."""
        return self.ask_u64(Request.CHECK_DEVICE_STATE)

    def pair(self) -> tuple[int, int]:
        """The reading and the writing end of a channel."""
        if not self.through_socket:
            return os.pipe()
        one, other = socket.socketpair()
        return one.detach(), other.detach()

    def save(self) -> bytes:
        """Take the state of the device, whose ring is stopped."""
        reading, writing = self.pair()
        try:
            reply = self.transfer(StateDirection.SAVE, writing)
        finally:
            os.close(writing)
        with open(reading, "rb") as file:
            if reply != ACCEPTED:
                raise StateRefusedError(f"reply 0x{reply:x}")
            blob = file.read()
        if error := self.check():
            raise StateRefusedError(f"check {error}")
        return blob

    def load(self, blob: bytes) -> None:
        """Give the state of a device that arrives."""
        reading, writing = self.pair()
        try:
            reply = self.transfer(StateDirection.LOAD, reading)
        finally:
            os.close(reading)
        with open(writing, "wb") as file:
            if reply != ACCEPTED:
                raise StateRefusedError(f"reply 0x{reply:x}")
            sending = threading.Thread(target=_write_all, args=(file.fileno(), blob))
            sending.start()
            sending.join(PATIENCE)
        if error := self.check():
            raise StateRefusedError(f"check {error}")


class PatientFrontend(MovingFrontend):
    """Repeats a transfer that failed; ``beginning`` is called before the first one."""

    beginning: Callable[[], None] = staticmethod(lambda: None)

    def save(self) -> bytes:
        return self._again(super().save)

    def load(self, blob: bytes) -> None:
        load = super().load
        self._again(lambda: load(blob))

    def _again(self, transfer: Callable[[], _Result]) -> _Result:
        self.beginning()
        for _ in range(_TRIES - 1):
            with suppress(StateRefusedError):
                return transfer()
        return transfer()


def _write_all(fd: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BrokenPipeError:
        pass  # the daemon has seen enough


class Host(Daemon):
    """A daemon of one host, which is not started yet; ``status``: how it ended last."""

    status = 0

    def __init__(
        self, folder: Path, *options: str, engine: str | None = None, incoming: bool = False
    ) -> None:
        folder.mkdir(exist_ok=True)
        arriving = ["--incoming"] if incoming else []
        super().__init__(folder, "-v", *options, *arriving, engine=engine, sandbox=SANDBOX)

    def kill(self) -> None:
        process = self._process
        super().kill()
        if process is not None:
            self.status = process.returncode

    def connect(self) -> MovingFrontend:
        """Connect, without any message."""
        return MovingFrontend.connect(self.socket_path, timeout=PATIENCE)

    def machine(
        self,
        key: bytes | None = None,
        blob: bytes | None = None,
        *,
        through_socket: bool = False,
        setup: Setup = SETUP,
    ) -> RpmbClient:
        """A virtual machine: new or, with ``blob``, one that arrives."""
        frontend = self.connect()
        frontend.blob, frontend.through_socket = blob, through_socket
        return RpmbClient(frontend, key, timeout=PATIENCE, setup=setup)


def give_device(host: Host) -> None:
    """Give the device of a host a key, a write counter of 2, and two blocks."""
    with host.machine() as machine:
        machine.program_key(KEY)
        assert machine.write(3, b"a" * 256) == 1
        assert machine.write(5, b"b" * 256) == 2


def leave(machine: RpmbClient) -> bytes:
    """Stop the ring of a machine, and take the state of its device."""
    machine.frontend.stop_ring()
    assert isinstance(machine.frontend, MovingFrontend)
    return machine.frontend.save()


def resume(machine: RpmbClient) -> None:
    """Let a machine continue where it is, after a migration that failed."""
    machine.ring.reset()
    machine.frontend.start_ring(machine.ring)


def copy_options(fence: Path | None, *options: str) -> Sequence[str]:
    """The options of a host that copies."""
    found = ["--migration=copy", *options]
    if fence is not None:
        fence.mkdir(exist_ok=True)
        found.append(f"--fence-path={fence}")
    return found
