# SPDX-License-Identifier: Apache-2.0
"""A driver whose memory and ring outlive the processes that serve it.

Each life of the device is a child process. It opens the store, continues at the used index of the
ring, and ends as the test says: killed at a point of its choice, or stopped.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.support.homes import Home
from tests.support.oracle import FRAME_SIZE, OK, Frame, mac_of, program_key, read_result, split
from tests.support.rig import ALL_FEATURES
from vhost_rpmb.closing import Closing
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.vhost_user.wire import MemoryRegion
from vhost_rpmb.virtio.flags import MORE

REGIONS = (MemoryRegion(0x4000_0000, 8 << 20, 0x7F00_0000_0000, 0),)


class Chain(NamedTuple):
    """A chain in the ring; its answer is collected once."""

    head: int
    readable: Segment
    writable: list[Segment]


class Guest(Closing):
    """The driver's side: memory, ring, device, and a journal that survives like a memfd."""

    def __init__(self, engine: Engine, home: Home, size: int = 256, **options: object) -> None:
        self.engine = engine
        self.home = home
        self.memory = GuestMemory(REGIONS)
        self.ring = Ring(self.memory, size, features=ALL_FEATURES)
        self.options = options  # of the device
        self.key_path: str | None = None
        self.initial_counter: int | None = None
        self.journal: mmap.mmap | None = None
        self._chains: dict[int, Chain] = {}

    def close(self) -> None:
        self.ring.close()
        self.memory.close()
        if self.journal is not None:
            self.journal.close()

    def submit(self, data: bytes, room: int = 1) -> Chain:
        """Make a chain available; the next life serves it."""
        readable = Segment(self.memory.allocate(len(data)), len(data))
        self.memory.write(readable.address, data)
        writable = []
        if room:
            writable = [Segment(self.memory.allocate(room * FRAME_SIZE), room * FRAME_SIZE)]
            self.memory.write(writable[0].address, b"\xaa" * room * FRAME_SIZE)
        chain = Chain(self.ring.add([readable], writable), readable, writable)
        self._chains[chain.head] = chain
        self.ring.publish()
        return chain

    def answers(self) -> list[list[Frame]]:
        """The answers of the submitted chains returned since the last call, in order."""
        answers = []
        for used in self.ring.collect():
            chain = self._chains.pop(used.head, None)
            if chain is None:
                continue  # a head that the test offered
            answers.append(
                split(b"".join(self.memory.read(*part) for part in chain.writable)[: used.length])
            )
            for segment in (chain.readable, *chain.writable):
                self.memory.free(segment.address)
        return answers

    def answer(self) -> list[Frame]:
        """The answers that each have to be one frame."""
        answers = self.answers()
        assert all(len(answer) == 1 for answer in answers)
        return [answer[0] for answer in answers]

    def live(self, *acts: Callable[[Life], None]) -> None:
        """Let a process serve the ring, and end without a clean stop after the last act."""
        sys.stderr.flush()
        child = os.fork()
        if not child:
            try:
                life = Life(self)
                for act in acts:
                    act(life)
                os.kill(os.getpid(), signal.SIGKILL)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert status == signal.SIGKILL, "the process failed"

    def serve(self) -> list[Frame]:
        """Let a process serve all that is available, and be killed; return the answers."""
        self.live(Life.serve)
        return self.answer()


class Life:
    """One process: store, device and queue."""

    def __init__(self, guest: Guest) -> None:
        self.store = guest.home.open(guest.initial_counter, guest.key_path)
        self.device = guest.engine.RpmbDevice(self.store, **guest.options)  # type: ignore[arg-type]
        memory = self._memory = guest.engine.GuestMemory()
        for region in guest.memory.regions:
            memory.add_region(*region.place, region.fd)
        self.queue = guest.engine.Virtqueue(memory)
        ring = guest.ring
        self.queue.set_size(ring.size)
        self.queue.set_features(ALL_FEATURES)
        self.queue.set_addresses(
            *(
                guest.memory.user_address(part)
                for part in (ring.descriptor_table, ring.available_ring, ring.used_ring)
            )
        )
        self.queue.set_base(ring.used_index)
        if guest.journal is not None:
            self.device.journal = memoryview(guest.journal)
            self.device.restore_register(ring.used_index)

    def serve(self) -> None:
        """Serve until nothing is available."""
        while self.device.process(self.queue) & MORE:
            pass

    def stop(self) -> None:
        """Stop cleanly."""
        self.device.journal = None
        self._memory.clear()
        self.store.close()

    def before_publication(self, act: Callable[[], None], number: int = 1) -> None:
        """Call ``act`` after the n-th commit, before its batch is published."""
        commit = self.store.commit
        left = number

        def commit_and_act(
            counter: int,
            blocks: list[tuple[int, bytes]],
            key: bytes | None,
            replay: Replay = NO_REPLAY,
        ) -> bool:
            nonlocal left
            done = commit(counter, blocks, key, replay)
            left -= 1
            if done and not left:
                act()
            return done

        self.store.commit = commit_and_act  # type: ignore[method-assign]

    def die_before_publication(self) -> None:
        """Be killed after the next commit, before its batch is published."""
        self.before_publication(lambda: os.kill(os.getpid(), signal.SIGKILL))


GuestFactory = Callable[..., Guest]
LifeFactory = Callable[[Guest], Life]
DEATH: Sequence[Callable[[Life], None]] = (Life.die_before_publication, Life.serve)


def results(frames: list[Frame]) -> list[int]:
    """The results of answers, each of which has the right MAC or none."""
    for frame in frames:
        assert frame.key_mac in (bytes(32), mac_of(frame._replace(key_mac=bytes(32))))
    return [frame.result for frame in frames]


def keyed(guest: Guest) -> Guest:
    """Program the key in a process that is stopped cleanly."""
    guest.submit(program_key() + read_result())
    guest.live(Life.serve, Life.stop)
    assert results(guest.answer()) == [OK]
    return guest
