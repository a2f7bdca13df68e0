# SPDX-License-Identifier: Apache-2.0
"""A front-end like Cloud Hypervisor: it reconnects after a SIGKILL of the daemon, with the region.

It then sends the available index as the base, and no kick.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.campaign import DIVISOR
from tests.support.daemon import DaemonFactory, connect, until
from tests.support.homes import Home
from tests.support.oracle import KEY, read_counter, split
from tests.support.supervised import Supervised
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import InflightDescription, ProtocolFeature, Request, VringState
from vhost_rpmb.virtio import features

ROUNDS = 50 // DIVISOR
SIZE = 64
PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.INFLIGHT_SHMFD
)


class FrontEnd:
    """One connection; `region` outlives it."""

    def __init__(self, path: Path) -> None:
        self._sock = connect(path)
        self._reader = wire.MessageReader(self._sock)
        self._tell(Request.SET_OWNER, flags=0)
        self._ask(Request.GET_FEATURES)
        self._tell(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(PROTOCOL), flags=0)

    def close(self) -> None:
        self._sock.close()

    def _ask(self, request: Request, payload: bytes = b"") -> wire.Message:
        wire.send_message(self._sock, request, 0, payload)
        message = self._reader.read()
        assert message is not None
        return message

    def _tell(
        self,
        request: Request,
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
        flags: int = wire.FLAG_NEED_REPLY,
    ) -> None:
        wire.send_message(self._sock, request, flags, payload, fds)
        if flags:
            reply = self._reader.read()
            assert reply is not None
            assert reply.payload == wire.pack_u64(0)

    def get_region(self) -> tuple[bytes, int]:
        """A new region: its description and its descriptor."""
        asked = InflightDescription(0, 0, 1, SIZE)
        reply = self._ask(Request.GET_INFLIGHT_FD, asked.pack())
        (fd,) = reply.take_fds()
        return reply.payload, fd

    def activate(self, memory: GuestMemory, ring: Ring, region: tuple[bytes, int] | None) -> None:
        self._tell(Request.SET_FEATURES, wire.pack_u64(features.DEFAULT | wire.F_PROTOCOL_FEATURES))
        table = wire.pack_memory_table([each.place for each in memory.regions])
        self._tell(Request.SET_MEM_TABLE, table, tuple(each.fd for each in memory.regions))
        self._tell(Request.SET_VRING_NUM, VringState(0, ring.size).pack())
        if region is not None:
            self._tell(Request.SET_INFLIGHT_FD, region[0], (region[1],))
        user = memory.user_address
        parts = user(ring.descriptor_table), user(ring.used_ring), user(ring.available_ring)
        self._tell(Request.SET_VRING_ADDR, wire.VringAddress(0, 0, *parts).pack())
        index = memory.load16(ring.available_ring + 2)
        self._tell(Request.SET_VRING_BASE, VringState(0, index).pack())
        self._tell(Request.SET_VRING_CALL, wire.pack_u64(0), (ring.call_fd,))
        self._tell(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        self._tell(Request.SET_VRING_ENABLE, VringState(0, 1).pack())


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory() as memory:
        yield memory


class Requests:
    """Requests whose answers are known, one batch after the other."""

    def __init__(self, memory: GuestMemory, ring: Ring) -> None:
        self._memory = memory
        self._ring = ring
        self._places = [memory.allocate(2 * spec.FRAME_SIZE) for _ in range(SIZE)]
        self._nonces: dict[int, bytes] = {}

    def submit(self, count: int) -> None:
        """Submit a batch, and kick."""
        self._nonces = {place: os.urandom(16) for place in self._places[:count]}
        for place, nonce in self._nonces.items():
            frame = bytearray(read_counter())
            frame[spec.FRAME_NONCE : spec.FRAME_NONCE + 16] = nonce
            self._memory.write(place, bytes(frame) + bytes(spec.FRAME_SIZE))
            answer = Segment(place + spec.FRAME_SIZE, spec.FRAME_SIZE)
            self._ring.add([Segment(place, spec.FRAME_SIZE)], [answer])
        self._ring.publish()
        self._ring.kick()

    def wait(self) -> None:
        """Wait until all are answered; the ring checks that none is twice."""
        until(lambda: not (self._ring.collect() or self._ring.in_flight))
        for place, nonce in self._nonces.items():
            answer = self._memory.read(place + spec.FRAME_SIZE, spec.FRAME_SIZE)
            (found,) = split(answer)
            assert (found.result, found.nonce) == (0, nonce)


def program(path: Path) -> None:
    with RpmbClient.connect(str(path)) as client:
        client.program_key(KEY)


def test_requests_in_flight_are_answered_after_a_reconnect(
    daemon: DaemonFactory, memory: GuestMemory
) -> None:
    running = daemon()
    program(running.socket_path)
    chosen = random.Random(7)
    rounds = interrupted = 0
    with Ring(memory, SIZE, features=features.DEFAULT) as ring:
        requests = Requests(memory, ring)
        front_end = FrontEnd(running.socket_path)
        region = front_end.get_region()
        front_end.activate(memory, ring, region)
        while rounds < ROUNDS or not interrupted:
            rounds += 1
            requests.submit(chosen.choice((1, 2, SIZE)))
            time.sleep(chosen.choice((0, 0, 0.0001, 0.0005, 0.002)))
            running.kill()
            front_end.close()
            interrupted += ring.used_index != memory.load16(ring.available_ring + 2)
            running.start()
            front_end = FrontEnd(running.socket_path)
            front_end.activate(memory, ring, region)
            requests.wait()
        front_end.close()
        os.close(region[1])
    running.stop()
    assert "in-flight" not in running.log


def test_region_stays_in_use_after_a_takeover(
    engine: Engine, tmp_path: Path, memory: GuestMemory, home: Home
) -> None:
    """The service manager keeps the connection, and with it the region."""
    chosen = random.Random(8)
    with (
        Supervised(tmp_path, engine=engine.name, home=home.options) as supervised,
        Ring(memory, SIZE, features=features.DEFAULT) as ring,
    ):
        program(supervised.path)
        requests = Requests(memory, ring)
        front_end = FrontEnd(supervised.path)
        region = front_end.get_region()
        front_end.activate(memory, ring, region)
        for _ in range(ROUNDS):
            requests.submit(chosen.choice((1, 2, SIZE)))
            supervised.manager.restart(chosen.choice((signal.SIGKILL, signal.SIGTERM)))
            requests.wait()
            # The record follows the used index: the region is the one that is used.
            until(lambda: _used_index(region) == ring.used_index)
        front_end.close()
        os.close(region[1])
        assert not [line for line in supervised.warnings if "in-flight" in line]


def _used_index(region: tuple[bytes, int]) -> int:
    return int.from_bytes(os.pread(region[1], 2, 14), sys.byteorder)
