# SPDX-License-Identifier: Apache-2.0
"""Front-ends as they really speak: the messages of four VMMs, in their order and with their masks.

Each is a `Frontend` for `RpmbClient`, so that the driver of the guest is the same behind all of
them. The sources are, of Cloud Hypervisor `virtio-devices/src/vhost_user/vu_common_ctrl.rs`, of
crosvm `devices/src/virtio/vhost_user_frontend/mod.rs`, of libkrun
`src/devices/src/virtio/vhost_user/device.rs`, and of QEMU 11.1 what the daemon logged.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Self

from tests.support.daemon import PATIENCE
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import ProtocolFeature, Request, VringState
from vhost_rpmb.virtio import spec as virtio

EVERYTHING = (1 << 64) - 1
VERSION_1 = 1 << virtio.VIRTIO_F_VERSION_1
EVENT_IDX = 1 << virtio.VIRTIO_F_EVENT_IDX
INDIRECT = 1 << virtio.VIRTIO_F_INDIRECT_DESC
IN_ORDER = 1 << virtio.VIRTIO_F_IN_ORDER


class Vmm(Frontend):
    """What the four have in common; a subclass gives the order.

    Nothing is sent when the driver negotiates and starts its ring: `activate` sends all of it.
    """

    #: The virtio feature bits that the guest may see, as far as they are offered.
    virtio_mask = EVERYTHING
    #: The protocol features that are acknowledged, as far as they are offered.
    protocol_mask = ProtocolFeature(0)

    def __init__(self, sock: socket.socket, *, timeout: float = PATIENCE) -> None:
        super().__init__(sock, timeout=timeout)
        self._reader = wire.MessageReader(sock, max_fds=1)
        self.memory: GuestMemory | None = None
        self.base = 0  # of the latest activation
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext  # each message

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        with self.around():
            super().send(request, payload, fds, flags)

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        if self.wants_ack(request):
            super().tell(request, payload, fds)
        else:
            self.send(request, payload, fds)

    def wants_ack(self, request: Request) -> bool:
        """Whether this VMM asks for an acknowledgement once REPLY_ACK is negotiated."""
        raise NotImplementedError

    def start_device(self, features: int) -> None:
        self.features = self._offered & features & self.virtio_mask & ~wire.F_PROTOCOL_FEATURES

    def share_memory(self, memory: GuestMemory) -> None:
        self.memory = memory

    def start_ring(self, ring: Ring, index: int = 0) -> None:
        self.activate(ring, ring.base)

    def activate(self, ring: Ring, base: int) -> None:
        """Set up everything, and let the vring run from `base` on."""
        raise NotImplementedError

    def stop(self) -> int:
        """Stop the vring; return the base for the next activation."""
        self.enable(False)
        return self.stop_ring()

    # Messages that all of them send

    def negotiate_protocol(self) -> None:
        offered = ProtocolFeature(self.ask_u64(Request.GET_PROTOCOL_FEATURES))
        self.set_protocol_features(offered & self.protocol_mask)

    def set_protocol_features(self, chosen: ProtocolFeature) -> None:
        self.tell(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(chosen))
        self.protocol_features = chosen

    def get_features(self) -> None:
        self._offered = self.ask_u64(Request.GET_FEATURES)

    def set_features(self) -> None:
        acked = self.features | wire.F_PROTOCOL_FEATURES
        self.tell(Request.SET_FEATURES, wire.pack_u64(acked))

    def set_mem_table(self) -> None:
        assert self.memory is not None
        regions = self.memory.regions
        table = wire.pack_memory_table([region.place for region in regions])
        self.tell(Request.SET_MEM_TABLE, table, [region.fd for region in regions])

    def set_vring_num(self, ring: Ring) -> None:
        self.tell(Request.SET_VRING_NUM, VringState(0, ring.size).pack())

    def set_vring_base(self, base: int) -> None:
        self.base = base
        self.tell(Request.SET_VRING_BASE, VringState(0, base).pack())

    def set_vring_addr(self, ring: Ring) -> None:
        parts: tuple[int, ...] = (ring.descriptor_table, ring.used_ring, ring.available_ring)
        if not self.protocol_features & ProtocolFeature.GPA_ADDRESSES:
            parts = tuple(map(ring.memory.user_address, parts))
        self.tell(Request.SET_VRING_ADDR, wire.VringAddress(0, 0, *parts).pack())

    def set_vring_call(self, ring: Ring) -> None:
        self.tell(Request.SET_VRING_CALL, wire.pack_u64(0), [ring.call_fd])

    def set_vring_kick(self, ring: Ring) -> None:
        self.tell(Request.SET_VRING_KICK, wire.pack_u64(0), [ring.kick_fd])

    def enable(self, enabled: bool) -> None:
        self.tell(Request.SET_VRING_ENABLE, VringState(0, enabled).pack())


class CloudHypervisor(Vmm):
    """Reconnects after the back-end's death. NEED_REPLY is set in every message.

    A ring begins at the available index, also after a crash: an in-flight region says what was not
    answered. Without one, and with IN_ORDER (since v54), it begins at the used index, and the
    front-end kicks.
    """

    virtio_mask = (
        1 << 26 | INDIRECT | EVENT_IDX | wire.F_PROTOCOL_FEATURES | VERSION_1 | IN_ORDER
        | 1 << 36 | 1 << 38
    )  # fmt: skip
    protocol_mask = (
        ProtocolFeature.CONFIG
        | ProtocolFeature.MQ
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.INFLIGHT_SHMFD
        | ProtocolFeature.LOG_SHMFD
        | ProtocolFeature.DEVICE_STATE
        | ProtocolFeature.BACKEND_REQ
    )

    def __init__(self, sock: socket.socket, *, timeout: float = PATIENCE) -> None:
        super().__init__(sock, timeout=timeout)
        self.region: tuple[bytes, int] | None = None  # description and memfd

    def close(self) -> None:
        super().close()
        self.free_region()

    def free_region(self) -> None:
        if self.region is not None:
            os.close(self.region[1])
            self.region = None

    def wants_ack(self, request: Request) -> bool:
        return True

    def ask(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        acked = self.protocol_features & ProtocolFeature.REPLY_ACK
        self.send(request, payload, fds, wire.FLAG_NEED_REPLY if acked else 0)
        return self._take_reply(request)

    def handshake(self, protocol_features: ProtocolFeature = protocol_mask) -> None:
        self.protocol_mask = protocol_features
        self.tell(Request.SET_OWNER)
        self.get_features()
        self.negotiate_protocol()
        assert self.ask_u64(Request.GET_QUEUE_NUM) == 1

    def activate(self, ring: Ring, base: int) -> None:
        self.set_features()
        self.set_mem_table()
        self.set_vring_num(ring)
        if self.protocol_features & ProtocolFeature.INFLIGHT_SHMFD:
            if self.region is None:
                self.region = self._get_inflight(ring)
            self.tell(Request.SET_INFLIGHT_FD, self.region[0], [self.region[1]])
        self.set_vring_addr(ring)
        self.set_vring_base(base)
        self.set_vring_call(ring)
        self.set_vring_kick(ring)
        self.enable(True)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def _get_inflight(self, ring: Ring) -> tuple[bytes, int]:
        asked = wire.InflightDescription(0, 0, 1, ring.size).pack()
        self.send(Request.GET_INFLIGHT_FD, asked, (), wire.FLAG_NEED_REPLY)
        with self.receive() as reply:
            assert reply.request == Request.GET_INFLIGHT_FD
            (fd,) = reply.take_fds()
            return reply.payload, fd

    def reconnect(self, path: Path, ring: Ring) -> Self:
        """Connect to a new back-end and go on with the vring; this connection is of no use."""
        new = type(self).connect(path, timeout=PATIENCE)
        new.features, new.memory = self.features, self.memory
        new.region, self.region = self.region, None
        new.tell(Request.SET_OWNER)
        new.get_features()
        new.set_protocol_features(self.protocol_features)  # without asking for the offer
        by_order = self.features & IN_ORDER and new.region is None
        available = ring.memory.load16(ring.available_ring + 2)
        new.activate(ring, ring.used_index if by_order else available)
        if by_order:
            ring.kick()
        return new

    def pause(self) -> None:
        self.enable(False)

    def resume(self) -> None:
        self.enable(True)

    def stop(self) -> int:  # for a snapshot
        self.free_region()
        return super().stop()


class Libkrun(Vmm):
    """Never reconnects; sets the owner late and the memory table before the features.

    The guest sees every bit that is offered, and a ring always begins at 0.
    """

    protocol_mask = ProtocolFeature.CONFIG | ProtocolFeature.MQ

    def wants_ack(self, request: Request) -> bool:
        return False

    def handshake(self, protocol_features: ProtocolFeature = protocol_mask) -> None:
        self.get_features()
        self.negotiate_protocol()
        assert self.ask_u64(Request.GET_QUEUE_NUM) == 1

    def activate(self, ring: Ring, base: int) -> None:
        assert base == 0
        self.tell(Request.SET_OWNER)
        self.set_mem_table()
        self.set_features()
        self.set_vring_num(ring)
        self.set_vring_base(0)
        self.set_vring_addr(ring)
        self.set_vring_kick(ring)
        self.set_vring_call(ring)
        self.enable(True)


class Crosvm(Vmm):
    """Never reconnects, and never asks for an acknowledgement, although it negotiates REPLY_ACK.

    The guest sees neither IN_ORDER nor INDIRECT. The features are sent once, when the driver
    acknowledges them.
    """

    virtio_mask = VERSION_1 | EVENT_IDX | 1 << 42 | (1 << 24) - 1
    protocol_mask = (
        ProtocolFeature.CONFIG
        | ProtocolFeature.MQ
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.DEVICE_STATE
        | ProtocolFeature(1 << 22)  # SHMEM
        | ProtocolFeature.REPLY_ACK
    )

    def wants_ack(self, request: Request) -> bool:
        return False

    def handshake(self, protocol_features: ProtocolFeature = protocol_mask) -> None:
        self.tell(Request.SET_OWNER)
        self.get_features()
        self.negotiate_protocol()
        assert self.ask_u64(Request.GET_QUEUE_NUM) == 1

    def start_device(self, features: int) -> None:
        super().start_device(features)
        self.set_features()

    def activate(self, ring: Ring, base: int) -> None:
        self.set_mem_table()
        self.set_vring_num(ring)
        self.set_vring_addr(ring)
        self.set_vring_base(base)
        self.set_vring_call(ring)
        self.set_vring_kick(ring)
        self.enable(True)


class Qemu(Vmm):
    """The generic device of QEMU 11.1, which never reconnects.

    The guest sees every bit that is offered. Acknowledgements are asked for where memory and event
    descriptors are concerned. Memory regions are sent once, the features at each start. With
    GPA_ADDRESSES, its own addresses are not sent.
    """

    protocol_mask = ProtocolFeature((1 << 22) - 1)
    _ACKNOWLEDGED = (
        Request.ADD_MEM_REG,
        Request.SET_VRING_ENABLE,
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
    )

    def wants_ack(self, request: Request) -> bool:
        return request in self._ACKNOWLEDGED

    def handshake(self, protocol_features: ProtocolFeature = protocol_mask) -> None:
        self.get_features()
        self.negotiate_protocol()
        assert self.ask_u64(Request.GET_QUEUE_NUM) == 1
        self._slots = self.ask_u64(Request.GET_MAX_MEM_SLOTS)
        self.tell(Request.SET_OWNER)
        self.get_features()
        with event_fd() as call, event_fd() as error:
            self.tell(Request.SET_VRING_CALL, wire.pack_u64(0), [call])
            self.tell(Request.SET_VRING_ERR, wire.pack_u64(0), [error])
        self._shared = False

    def activate(self, ring: Ring, base: int) -> None:
        self.set_features()
        status = self.get_status()
        if not status & virtio.VIRTIO_STATUS_FEATURES_OK:
            self.set_status(status | virtio.VIRTIO_STATUS_FEATURES_OK)
        if not self._shared:
            assert self.memory is not None
            assert len(self.memory.regions) <= self._slots
            for region in self.memory.regions:
                place = region.place
                if self.protocol_features & ProtocolFeature.GPA_ADDRESSES:
                    place = place._replace(user_address=place.guest_address)
                self.tell(Request.ADD_MEM_REG, wire.pack_single_region(place), [region.fd])
            self._shared = True
        self.set_vring_num(ring)
        self.set_vring_base(base)
        self.set_vring_addr(ring)
        self.set_vring_kick(ring)
        self.set_vring_call(ring)
        self.enable(True)
        self.set_vring_call(ring)


@contextmanager
def event_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
