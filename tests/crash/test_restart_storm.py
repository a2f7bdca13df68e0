# SPDX-License-Identifier: Apache-2.0
"""Kills at random instants and steps, between random requests and messages, against a model."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.support import mortal
from tests.support.campaign import DIVISOR
from tests.support.daemon import PATIENCE, SANDBOX
from tests.support.homes import Home
from tests.support.oracle import (
    BLOCK_SIZE,
    COUNT,
    FRAME_SIZE,
    OK,
    Frame,
    mac_of,
    program_key,
    read_counter,
    read_data,
    read_result,
    split,
    write_data,
)
from tests.support.recorded import PROTOCOL, InflightRegion
from tests.support.supervised import Supervised
from vhost_rpmb.driver.errors import RequestRefusedError
from vhost_rpmb.driver.frontend import PROTOCOL_FEATURES
from vhost_rpmb.driver.packed import PackedRing
from vhost_rpmb.driver.rpmb import RpmbClient, Setup
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MemoryRegion, Request, VringState
from vhost_rpmb.virtio import spec as virtio

STARTS = 300 if DIVISOR == 1 else 8
BLOCKS = 512  # of the image
EXTRA = MemoryRegion(0x10_0000_0000, 4096, 0x7E00_0000_0000, 0)
FEATURES = [
    1 << virtio.VIRTIO_F_VERSION_1,
    1 << virtio.VIRTIO_F_VERSION_1
    | 1 << virtio.VIRTIO_F_EVENT_IDX
    | 1 << virtio.VIRTIO_F_INDIRECT_DESC,
]
PACKED = 1 << virtio.VIRTIO_F_RING_PACKED


class Storm:
    """One driver and its front-end: random actions, each of which has to be done exactly once."""

    def __init__(
        self, client: RpmbClient, chance: random.Random, inflight: InflightRegion | None
    ) -> None:
        self.client = client
        self.inflight = inflight
        self.random = chance
        self.counter = 0
        self.blocks: dict[int, bytes] = {}
        self.register: Frame | None = None  # what RESULT_READ in a chain of its own answers
        self.extra = False  # the region is in the memory table
        self.file = os.memfd_create("extra")
        os.ftruncate(self.file, 4096)

    def close(self) -> None:
        os.close(self.file)
        if self.inflight is not None:
            self.inflight.close()

    def act(self) -> None:
        acts = [self.requests] * 8 + [
            self.result,
            self.status,
            self.region,
            self.queued,
            self.stop,
            self.signals,
            self.reset,
        ]
        if self.inflight is not None:
            acts.append(self.again)
        self.random.choice(acts)()

    # Requests

    def chains(self, chains: list[tuple[bytes, int]]) -> list[list[Frame]]:
        """Make chains available at once; return the answers in the order of submission."""
        client = self.client
        tokens = [client.submit(data, room * FRAME_SIZE) for data, room in chains]
        client.flush()
        found: dict[int, list[Frame]] = {}
        order = []
        while len(found) < len(tokens):
            for answer in client.answers():
                assert answer.token not in found
                order.append(answer.token)
                found[answer.token] = split(answer.data)
        assert order == tokens
        for frames in found.values():
            last = frames[-1]
            bare = [*frames[:-1], last._replace(key_mac=bytes(32))]
            assert last.key_mac == mac_of(*bare)
        return [found[token] for token in tokens]

    def program(self) -> None:
        ((answer,),) = self.chains([(program_key() + read_result(), 1)])
        assert answer.result == OK
        self.register = answer._replace(key_mac=bytes(32))

    def write(self) -> tuple[bytes, Frame, dict[int, bytes]]:
        """A write, its result, and the blocks that it changes."""
        count = self.random.choice((1, 1, 2, 3, 32))
        address = self.random.randrange(BLOCKS - count)
        data = [self.random.randbytes(BLOCK_SIZE) for _ in range(count)]
        wrong = not self.random.randrange(6)
        counter = self.counter + 1000 if wrong else self.counter
        request = write_data(counter, address, *data)
        if not wrong:
            self.counter += 1
        result = Frame(
            write_counter=self.counter,
            address=address,
            result=COUNT if wrong else OK,
            req_resp=0x300,
        )
        return request, result, {} if wrong else dict(enumerate(data, address))

    def requests(self) -> None:
        """Writes, and reads behind them: what a chain between two replayed ones sees is open."""
        size = self.random.choice((1, 1, 2, 5, 24))
        writes = [self.write() for _ in range(size)]
        changed: dict[int, bytes] = {}
        for _, _, blocks in writes:
            changed |= blocks
        chains = [(request + read_result(), 1) for request, _, _ in writes]
        chains += [(read_counter(), 1), (read_result(), 1)]
        read = self.random.choice(sorted(changed) or [0])
        chains.append((read_data(read), 1))
        self.blocks |= changed
        answers = self.chains(chains)
        for (_, expected, _), (answer,) in zip(writes, answers[:size], strict=True):
            self.register = answer._replace(key_mac=bytes(32))
            if expected.result:
                # Executed again, it fails with the write counter of that time.
                assert expected.write_counter <= answer.write_counter <= self.counter
                assert self.register._replace(write_counter=expected.write_counter) == expected
            else:
                assert self.register == expected
        assert answers[size][0].write_counter == self.counter
        assert answers[size + 1][0]._replace(key_mac=bytes(32)) == self.register
        assert answers[size + 2][0].data == self.blocks.get(read, bytes(BLOCK_SIZE))

    def result(self) -> None:
        ((answer,),) = self.chains([(read_result(), 1)])
        if self.register is None:
            assert (answer.req_resp, answer.result) == (0, 1)
        else:
            assert answer._replace(key_mac=bytes(32)) == self.register

    # Messages

    def status(self) -> None:
        status = self.random.randrange(1, 256)
        self.client.frontend.set_status(status)
        assert self.client.frontend.get_status() == status

    def region(self) -> None:
        """Add or remove a region twice: the second time is refused."""
        payload = wire.pack_single_region(EXTRA)
        request, fds = (
            (Request.REM_MEM_REG, ()) if self.extra else (Request.ADD_MEM_REG, (self.file,))
        )
        self.client.frontend.tell(request, payload, fds)
        with pytest.raises(RequestRefusedError):
            self.client.frontend.tell(request, payload, fds)
        self.extra = not self.extra

    def queued(self) -> None:
        """Messages with and without descriptors and replies, all sent before the first reply."""
        frontend, index = self.client.frontend, wire.pack_u64(0)
        ring = self.client.ring
        status = self.random.randrange(1, 256)
        replies = 0
        for _ in range(self.random.randrange(1, 4)):
            frontend.send(Request.SET_STATUS, wire.pack_u64(status))
            frontend.send(Request.SET_VRING_CALL, index, [ring.call_fd])
            frontend.send(Request.GET_STATUS)
            frontend.send(Request.SET_VRING_ERR, index, [ring.error_fd], wire.FLAG_NEED_REPLY)
            replies += 1
        for _ in range(replies):
            assert wire.unpack_u64(frontend.receive().payload) == status
            reply = frontend.receive()
            assert (reply.request, wire.unpack_u64(reply.payload)) == (Request.SET_VRING_ERR, 0)

    def stop(self) -> None:
        """Stop and continue the vring, as QEMU does for stop and cont."""
        frontend, ring, index = self.client.frontend, self.client.ring, wire.pack_u64(0)
        assert frontend.stop_ring() == ring.base
        frontend.tell(Request.SET_VRING_BASE, VringState(0, ring.base).pack())
        frontend.tell(Request.SET_VRING_CALL, index, [ring.call_fd])
        frontend.tell(Request.SET_VRING_KICK, index, [ring.kick_fd])

    def signals(self) -> None:
        """Requests by a driver that does not wait for the messages around them."""
        frontend, index = self.client.frontend, wire.pack_u64(0)
        frontend.send(Request.SET_VRING_CALL, index, [self.client.ring.call_fd])
        self.requests()

    def again(self) -> None:
        """Set the in-flight region again, which is possible while the vring is stopped."""
        assert self.inflight is not None
        self.inflight.becomes_complete()
        self.inflight.use()

    def reset(self) -> None:
        self.client.reset_device()
        self.register = None


@contextmanager
def killing(supervised: Supervised, chance: random.Random) -> Iterator[None]:
    """Kill the daemon again and again at random instants, of its start too."""
    done = threading.Event()
    manager = supervised.manager

    def run() -> None:
        early = 0
        while not done.wait(chance.uniform(0, 0.4)):
            # A session that three processes in a row fail to continue is given up.
            early = 0 if manager._ready else early + 1
            if early == 2:
                manager.wait(lambda: manager._ready)
                early = 0
            manager.send(chance.choice((signal.SIGKILL, signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("odds", "recorded", "ring"),
    [(0, False, 0), (60, False, 0), (60, True, 0), (0, False, PACKED), (60, True, PACKED)],
    ids=[
        *("signals", "steps", "steps with an in-flight region"),
        *("signals, packed", "steps with an in-flight region, packed"),
    ],
)
def test_storm(
    tmp_path: Path, engine: Engine, home: Home, odds: int, recorded: bool, ring: int
) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    fate = tmp_path / "fate"
    mortal.set_odds(fate, 0)
    command = [sys.executable, "-m", "tests.support.mortal", str(fate), "--fd=3"]
    with Supervised(
        tmp_path,
        engine=engine.name,
        command=[*command, *home.options, "-v", *SANDBOX, "--virtio-features=+packed"],
    ) as supervised:
        features = chance.choice(FEATURES) | ring
        protocol = PROTOCOL if recorded else PROTOCOL_FEATURES
        setup = Setup(features=features, protocol_features=protocol)
        client = RpmbClient.connect(supervised.path, timeout=PATIENCE, setup=setup)
        try:
            with client:
                assert isinstance(client.ring, PackedRing) == bool(ring)
                storm = Storm(client, chance, InflightRegion(client) if recorded else None)
                storm.program()
                if odds:
                    mortal.set_odds(fate, odds)
                with nullcontext() if odds else killing(supervised, random.Random(seed)):
                    while supervised.manager.starts < STARTS:
                        storm.act()
                mortal.set_odds(fate, 0)
                for address in range(BLOCKS):
                    ((answer,),) = storm.chains([(read_data(address), 1)])
                    assert answer.data == storm.blocks.get(address, bytes(BLOCK_SIZE))
                if storm.inflight is not None:
                    storm.inflight.becomes_complete()
                storm.close()
        except BaseException:
            print(f"seed {seed}; {supervised.manager.log[-5000:]}")
            raise
