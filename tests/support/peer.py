# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end that sends message by message, and a device that records its calls."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from vhost_rpmb.daemon.eventloop import EventLoop
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import PeerError
from vhost_rpmb.log import LimitedLog, Logger
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.interfaces import Device, DeviceState, Keeper
from vhost_rpmb.vhost_user.session import Session
from vhost_rpmb.vhost_user.vring import Vring
from vhost_rpmb.vhost_user.wire import MemoryRegion, ProtocolFeature, Request, VringState
from vhost_rpmb.virtio import spec as virtio

FEATURES = 1 << virtio.VIRTIO_F_VERSION_1 | 1 << virtio.VIRTIO_F_EVENT_IDX
OFFERED = FEATURES | wire.F_PROTOCOL_FEATURES
PAGE = 4096
# With GPA_ADDRESSES the addresses of vrings are others; test_gpa_addresses.py has those.
NEGOTIATED = PROTOCOL_FEATURES & ~wire.ProtocolFeature.GPA_ADDRESSES
REGION = MemoryRegion(guest_address=0x10000, size=PAGE, user_address=0x7000_0000, mmap_offset=0)


class EchoDevice:
    """A device of two queues that answers nothing; it records what it is asked to do."""

    features = FEATURES
    num_queues = 2
    config = b"abcdef"

    def __init__(self) -> None:
        self.processed = 0
        self.queues: list[object] = []  # that were processed, in order
        self.resets = 0
        self.journal: memoryview | None = None
        self.restored: list[int] = []  # used indices of registers
        self.cleared = 0
        self.flags: list[int] = []  # what process() returns next

    def process(self, queue: object) -> int:
        self.processed += 1
        self.queues.append(queue)
        return self.flags.pop(0) if self.flags else 0

    def reset(self) -> None:
        self.resets += 1

    def restore_register(self, used_index: int) -> None:
        self.restored.append(used_index)

    def clear_register(self) -> None:
        self.cleared += 1


class Peer:
    """The front-end's end of a connection to a `Session`, which is driven by a real event loop."""

    def __init__(
        self,
        engine: Engine,
        device: Device,
        keeper: Keeper | None = None,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
        state: DeviceState | None = None,
    ) -> None:
        self.sock, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.reader = wire.MessageReader(self.sock)
        self.loop = EventLoop()
        self.log = LimitedLog(Logger("vhost_rpmb.test"))
        self.backend = Session(
            *(far, device, engine, self.loop, self.log),
            keeper=keeper,
            protocol_features=protocol_features,
            state=state,
            wake=self._receive,
        )
        self.end: Exception | None = None
        self._attention = os.eventfd(1)
        self._far = far.fileno()
        self._watched = True
        self.loop.add(self._far, self._receive)

    @property
    def vrings(self) -> list[Vring]:
        return self.backend._backend.vrings

    @property
    def regions(self) -> tuple[tuple[int, int, int], ...]:
        """The memory regions that the back-end has mapped."""
        regions: tuple[tuple[int, int, int], ...] = self.backend._backend._memory.regions  # type: ignore[attr-defined]
        return regions

    def _receive(self) -> None:
        try:
            self.backend.receive()
        except (EOFError, PeerError) as error:
            self.end = error
            self._disconnect()

    def _disconnect(self) -> None:
        if self._watched:
            self._watched = False
            self.loop.remove(self._far)
            self.backend.close()

    def close(self) -> None:
        if self._attention < 0:
            return
        self._disconnect()
        self.end = None  # its traceback refers to a keeper's record, which stays mapped so long
        os.close(self._attention)
        self._attention = -1
        self.loop.close()
        self.reader.close()
        self.sock.close()

    def run(self) -> None:
        """Let the vrings be served, with something else that wants attention all the time."""
        self.loop.add(self._attention, lambda: None)
        self.backend.run()
        self.loop.remove(self._attention)

    def settle(self, rounds: int = 1000) -> int:
        """Run the loop until nothing happens any more; return how often it turned."""
        for turn in range(rounds):
            happened = self.loop.wait(0)
            pending = self.backend.pending
            self.run()
            if not happened and not pending:
                return turn
        raise AssertionError("the back-end does not come to rest")

    def send(
        self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0
    ) -> None:
        wire.send_message(self.sock, request, flags, payload, fds)
        self.settle()

    def reply(self) -> bytes | None:
        """The payload of the next reply, None if there is none."""
        message = self.reader.read()
        if message is None:
            return None
        assert message.flags == wire.FLAG_REPLY | wire.VERSION
        with message:
            assert len(message.fds) == (message.request == Request.GET_INFLIGHT_FD)
        return message.payload

    def ask(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes | None:
        self.send(request, payload, fds)
        return self.reply()

    def ask_u64(self, request: int) -> int:
        reply = self.ask(request)
        assert reply is not None
        return wire.unpack_u64(reply)

    def ack(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """Send with NEED_REPLY; return what the acknowledgement says."""
        self.send(request, payload, fds, wire.FLAG_NEED_REPLY)
        message = self.reader.read()
        assert message is not None, f"no acknowledgement ({self.end})"
        assert message.request == request
        assert message.flags == wire.FLAG_REPLY | wire.VERSION
        return wire.unpack_u64(message.payload)

    def refused(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Check that a message is refused, and that the connection survives."""
        assert self.ack(request, payload, fds) != 0
        assert self.end is None
        assert self.ask_u64(Request.GET_FEATURES) & ~wire.F_LOG_ALL == OFFERED

    def ends(
        self,
        reason: str,
        request: int,
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
        flags: int = 0,
    ) -> None:
        """Check that a message ends the connection for this reason, without an answer."""
        self.send(request, payload, fds, flags)
        assert isinstance(self.end, PeerError)
        assert reason in str(self.end)
        with pytest.raises(EOFError):
            self.reader.read()

    def negotiate(self, protocol_features: int = NEGOTIATED) -> None:
        self.send(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(protocol_features))
        self.send(Request.SET_FEATURES, wire.pack_u64(OFFERED))
        assert self.end is None

    def share(self, memory: GuestMemory) -> None:
        for region in memory.regions:
            assert not self.ack(
                Request.ADD_MEM_REG, wire.pack_single_region(region.place), (region.fd,)
            )

    def configure(self, ring: Ring, index: int = 0, base: int = 0) -> None:
        """Size, base and addresses of a vring."""
        assert not self.ack(Request.SET_VRING_NUM, VringState(index, ring.size).pack())
        assert not self.ack(Request.SET_VRING_BASE, VringState(index, base).pack())
        assert not self.ack(Request.SET_VRING_ADDR, addresses(ring, index).pack())

    def start(self, ring: Ring, index: int = 0, base: int = 0) -> None:
        """All that makes a vring run."""
        self.configure(ring, index, base)
        payload = wire.pack_u64(index)
        assert not self.ack(Request.SET_VRING_CALL, payload, (ring.call_fd,))
        assert not self.ack(Request.SET_VRING_ERR, payload, (ring.error_fd,))
        assert not self.ack(Request.SET_VRING_KICK, payload, (ring.kick_fd,))
        assert not self.ack(Request.SET_VRING_ENABLE, VringState(index, 1).pack())


def addresses(ring: Ring, index: int = 0, flags: int = 0) -> wire.VringAddress:
    user = ring.memory.user_address
    return wire.VringAddress(
        index, flags, user(ring.descriptor_table), user(ring.used_ring), user(ring.available_ring)
    )


def message(request: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """The bytes of a message, to be sent in other slices than one."""
    return struct.pack("=III", request, flags | wire.VERSION, len(payload)) + payload


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def signalled(fd: int) -> bool:
    """Take the signal of an eventfd."""
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False
