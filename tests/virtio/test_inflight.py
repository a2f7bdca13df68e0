# SPDX-License-Identifier: Apache-2.0
"""The record of what is in flight: a kill at any store loses nothing and repeats no answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.oracle import read_counter
from tests.support.rig import Rig, RigFactory
from tests.support.stores import states_of
from tests.support.tracked import TrackedRing
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import inflight
from vhost_rpmb.vhost_user.inflight import Record
from vhost_rpmb.vhost_user.wire import InflightDescription
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN

SIZE = 64
FEATURES = 1 << virtio.VIRTIO_F_INDIRECT_DESC  # one descriptor a request
START = 65533  # of the indices, which wrap
RECORD = 16 + 16 * SIZE  # bytes


class Tracked(TrackedRing):
    """A split ring, of which the used ring without the event index is put back."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig, RECORD, (rig.ring.used_ring, 4 + 8 * SIZE))
        rig.ring.reset(START)

    def start(self, base: int) -> tuple[int, ...]:
        """Start the vring of a new process; return the heads that are to be served again."""
        rig = self.rig
        rig.queue = rig.engine.Virtqueue(rig.memory)
        rig.start(FEATURES, base)
        used = rig.queue.used
        assert used is not None
        found = self.record.recover(SIZE, used, base)
        assert not found.cleared
        rig.queue.set_base(found.base)
        rig.queue.resume(used, self.memory, 0, found.last, found.heads)
        assert rig.queue.base == used
        return found.heads

    def used(self) -> int:
        """The number of requests that are answered."""
        return (self.rig.ring.used_index - START) & 0xFFFF

    def check_answered(self) -> None:
        """Each request is answered once, in order, and nothing is in flight."""
        assert self.used() == len(self.heads)
        for position, head in enumerate(self.heads[-SIZE:], max(0, len(self.heads) - SIZE)):
            element = self.rig.ring.used_element((START + position) % SIZE)
            assert element == (head, spec.FRAME_SIZE)
        state = self.file.read(0, RECORD)
        assert not any(state[16::16])
        assert int.from_bytes(state[14:16], "little") == self.rig.ring.used_index

    def check_recovery(self, state: bytes, base: int) -> None:
        """From a state that a kill left, everything is answered exactly once."""
        self.put_back(state)
        done = self.used()
        heads = self.start(base)
        assert heads == tuple(self.heads[done : done + len(heads)])
        assert self.serve() == len(self.heads) - done
        self.check_answered()


@pytest.fixture
def tracked(make_rig: RigFactory) -> Iterator[Tracked]:
    tracked = Tracked(make_rig(size=SIZE, features=FEATURES))
    yield tracked
    tracked.close()


@pytest.mark.needs_ptrace
@pytest.mark.parametrize("batches", [(1,), (2,), (64,), (1, 2, 3), (5, 5)])
def test_kill_at_each_store_loses_and_repeats_nothing(
    tracked: Tracked, engine: Engine, batches: Sequence[int]
) -> None:
    base = START
    tracked.start(base)
    for count in batches[:-1]:
        tracked.submit(count)
        assert tracked.serve() == count
        tracked.rig.ring.collect()
    tracked.check_answered()
    tracked.submit(batches[-1])
    states = states_of(
        engine.name, lambda: tracked.rig.device.process(tracked.rig.queue), tracked.look
    )
    # Taking: counter (but 0) and mark; putting: two links of which one may be there already, used
    # element; publishing: two indices, and the marks.
    assert len(states) > 4 * batches[-1]
    available = (START + len(tracked.heads)) & 0xFFFF
    for number, state in enumerate(states):
        # What a front-end may send as the base: the used index, the available index, anything.
        tracked.check_recovery(state, (available, base, 12345)[number % 3])


@pytest.mark.needs_ptrace
def test_kill_during_a_recovery_loses_and_repeats_nothing(tracked: Tracked, engine: Engine) -> None:
    tracked.start(START)
    tracked.submit(3)
    tracked.serve()
    tracked.submit(4)
    states = states_of(
        engine.name, lambda: tracked.rig.device.process(tracked.rig.queue), tracked.look
    )
    for state in states:
        tracked.put_back(state)
        memory: Any = _Stopping(tracked.memory)
        record = Record(memory, 0, SIZE)
        used = tracked.rig.ring.used_index
        record.recover(SIZE, used, 0)
        for stores in range(memory.stores):
            tracked.put_back(state)
            memory.left = stores
            with pytest.raises(_KilledError):
                record.recover(SIZE, used, 0)
            tracked.check_recovery(tracked.look(), 0)


class _KilledError(Exception):
    pass


class _Stopping:
    """The memory of a region that a process stops writing to."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.left = 1 << 32
        self.stores = 0

    def write(self, address: int, data: bytes) -> None:
        if not self.left:
            raise _KilledError
        self.left -= 1
        self.stores += 1
        self._memory.write(address, data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._memory, name)


def test_first_start_may_be_killed_at_each_store(tracked: Tracked) -> None:
    """A front-end whose base is the available index has requests before the first start ends."""
    tracked.submit(5)
    memory: Any = _Stopping(tracked.memory)
    for stores in range(2):
        tracked.put_back(bytes(RECORD) + tracked.look()[RECORD:])
        memory.left = stores
        with pytest.raises(_KilledError):
            Record(memory, 0, SIZE).recover(SIZE, START, (START + 5) & 0xFFFF)
        assert tracked.start((START + 5) & 0xFFFF) == ()
        assert tracked.serve() == 5
        tracked.check_answered()
        tracked.put_back(bytes(RECORD) + bytes(4 + 8 * SIZE))
        tracked.rig.guest.store16(tracked.rig.ring.used_ring + 2, START)


def test_heads_of_the_record_are_served_before_the_others(tracked: Tracked) -> None:
    """They come from the record, whatever the guest has in the available ring by now."""
    tracked.start(START)
    tracked.submit(6)
    state = bytearray(tracked.look())
    for counter, head in enumerate(tracked.heads[:4]):
        state[16 + 16 * head] = 1
        state[24 + 16 * head] = 10 + counter
    for position in range(4):
        tracked.rig.ring.write_available((START + position) % SIZE, 63)
    tracked.check_recovery(bytes(state), 0)


def test_stop_before_the_record_is_served_names_the_first_of_its_chains(tracked: Tracked) -> None:
    tracked.start(START)
    tracked.submit(6)
    state = bytearray(tracked.look())
    for head in tracked.heads[:4]:
        state[16 + 16 * head] = 1
        state[24 + 16 * head] = 64 - head
    tracked.put_back(bytes(state))
    assert tracked.start(0) == tuple(sorted(tracked.heads[:4], reverse=True))
    assert tracked.rig.queue.base == START


def test_record_with_more_chains_than_the_ring_has_breaks_the_ring(tracked: Tracked) -> None:
    """The front-end wrote it: at most the ring breaks."""
    tracked.start(START)
    tracked.submit(2)
    state = bytearray(tracked.look())
    for head in range(SIZE):
        state[16 + 16 * head] = 1
        state[24 + 16 * head] = head
    tracked.put_back(bytes(state))
    assert len(tracked.start(0)) == SIZE
    assert tracked.rig.device.process(tracked.rig.queue) & BROKEN
    assert tracked.rig.queue.error == rules.RING_RULES[rules.RING_AVAILABLE_INDEX]


def test_region_rewritten_while_it_is_served_changes_nothing(tracked: Tracked) -> None:
    tracked.start(START)
    for _ in range(5):
        tracked.submit(7)
        tracked.file.write(0, b"\xff" * RECORD)
        assert tracked.serve() == 7
        assert [used.head for used in tracked.rig.ring.collect()] == tracked.heads[-7:]


def test_same_head_again_and_again_is_answered(tracked: Tracked) -> None:
    """A guest may offer a head more often than once: its own record suffers, nobody else."""
    tracked.start(START)
    tracked.submit(1)
    for _ in range(SIZE - 1):
        tracked.rig.ring.offer(tracked.heads[0])
    tracked.rig.ring.publish()
    assert tracked.serve() == SIZE
    state = tracked.file.read(0, RECORD)
    assert not any(state[16::16])


@pytest.mark.parametrize("started", [False, True])
def test_truncated_region_breaks_the_ring(make_rig: RigFactory, started: bool) -> None:
    rig = make_rig(size=SIZE, features=0)
    fd = os.memfd_create("region")
    os.ftruncate(fd, 4096)
    memory = rig.engine.GuestMemory(1)
    description = InflightDescription(inflight.stride(SIZE), 0, 1, SIZE)
    region = inflight.Region(memory, description, fd)
    record = region.record(0)
    assert record is not None
    if not started:
        os.ftruncate(fd, 0)
    found = record.recover(SIZE, 0, 0)
    rig.queue.set_base(found.base)
    rig.queue.resume(0, memory, 0, found.last, found.heads)
    if started:
        assert rig.chain(read_counter())[0].result == spec.VIRTIO_RPMB_RES_NO_AUTH_KEY
        os.ftruncate(fd, 0)
    os.close(fd)
    rig.ring.add(rig.put(read_counter()), rig.room(512))
    rig.ring.publish()
    assert rig.device.process(rig.queue) & BROKEN
    assert rig.queue.error == rules.RING_RULES[rules.RING_INFLIGHT_LOST]
    rig.queue.set_base(int(started))  # without the region it works again
    assert rig.process()[0].length == spec.FRAME_SIZE
    region.close()
