# SPDX-License-Identifier: Apache-2.0
"""Rings and chains, good and broken, on both engines."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest

from tests.support.oracle import NONCE, read_counter, read_data, split, write_data
from tests.support.rig import ALL_FEATURES, Rig, RigFactory
from vhost_rpmb.driver.ring import Segment, Used
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user.wire import MemoryRegion
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN, FAULTS, MORE, NOTIFY

NEXT, WRITE, INDIRECT = (
    virtio.VIRTQ_DESC_F_NEXT,
    virtio.VIRTQ_DESC_F_WRITE,
    virtio.VIRTQ_DESC_F_INDIRECT,
)
START = 0x4000_0000
OUTSIDE = 0x1000
EVENT_INDEX = 1 << virtio.VIRTIO_F_EVENT_IDX
PAGE = 4096

Table = list[tuple[int, int, int, int]]  # addr, len, flags, next


# Good chains


@pytest.mark.parametrize("features", [0, ALL_FEATURES])
@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ((), ()),
        ((512,), (512,)),  # NuttX: a readable buffer a command
        ((1, 2, 3), (7, 500)),
        ((196, 32, 256, 16, 4, 2, 2, 2, 2), (511,)),
        ((1000,), (1, 1, 1)),
    ],
)
def test_descriptor_boundaries_mean_nothing(
    make_rig: RigFactory, features: int, readable: tuple[int, ...], writable: tuple[int, ...]
) -> None:
    rig = make_rig(features=features)
    rig.program()
    room = rig.room(1024, writable)
    rig.ring.add(rig.put(read_counter() + read_data(3), readable), room)
    (used,) = rig.process()
    assert used.length == 1024
    answers = split(b"".join(rig.guest.read(*segment) for segment in room))
    assert [(answer.result, answer.nonce) for answer in answers] == [(0, NONCE)] * 2


def test_buffer_may_span_regions_that_adjoin(make_rig: RigFactory) -> None:
    regions = [
        MemoryRegion(START, 1 << 20, 0x7F00_0000_0000, 0),
        MemoryRegion(START + (1 << 20), 4 * PAGE, 0x7E00_0000_0000, PAGE),
        MemoryRegion(START + (1 << 20) + 4 * PAGE, 1 << 20, 0x7D00_0000_0000, 0),
    ]
    rig = make_rig(regions=regions)
    rig.program()
    border = START + (1 << 20)
    rig.guest.reserve(border - 100, 512)
    rig.guest.write(border - 100, read_counter())
    rig.guest.reserve(border + PAGE, 5 * PAGE)
    rig.ring.add([Segment(border - 100, 512)], [Segment(border + 4 * PAGE - 300, 512)])
    assert rig.process()[0].length == 512
    (answer,) = split(rig.guest.read(border + 4 * PAGE - 300, 512))
    assert (answer.result, answer.nonce) == (0, NONCE)


def test_chained_descriptors_may_end_in_an_indirect_table(keyed: Rig) -> None:
    data, room, table = keyed.put(read_counter(), (300,)), keyed.room(512), keyed.guest.allocate(32)
    keyed.ring.write_descriptor(0, *data[0], NEXT, 1)
    keyed.ring.write_descriptor(1, table, 32, INDIRECT | WRITE)  # WRITE means nothing here
    keyed.ring.write_descriptor(0, *data[1], NEXT, 1, table=table)
    keyed.ring.write_descriptor(1, *room[0], WRITE, table=table)
    keyed.ring.offer(0)
    assert keyed.process() == [Used(0, 512)]
    assert split(keyed.guest.read(*room[0]))[0].nonce == NONCE


@pytest.mark.parametrize("size", [1, 2, 16, 1024, 32768])
@pytest.mark.parametrize("features", [0, ALL_FEATURES])
def test_any_queue_size_serves(make_rig: RigFactory, size: int, features: int) -> None:
    rig = make_rig(size=size, features=features)
    if size == 1:
        rig.ring.add([], rig.room(512))
        assert rig.process()[0].length == 512
        return
    rig.program()
    for _ in range(3):
        assert rig.chain(read_counter())[0].result == 0


def test_full_ring_is_served_in_order(make_rig: RigFactory) -> None:
    rig = make_rig(size=16)
    rig.program()
    for _ in range(3):
        heads = [rig.ring.add(rig.put(read_counter()), rig.room(512)) for _ in range(16)]
        assert [used.head for used in rig.process()] == heads


def test_indices_wrap_at_65536(make_rig: RigFactory) -> None:
    rig = make_rig(size=4)
    rig.program()
    rig.ring.reset(65534)
    rig.queue.set_base(65534)
    for _ in range(5):
        assert rig.chain(read_counter())[0].result == 0
    assert rig.queue.base == 3


def test_spurious_kick_does_nothing(keyed: Rig) -> None:
    assert keyed.process() == []
    assert keyed.flags == 0


def test_large_batch_is_served_in_parts(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig(size=64)
    rig.program()
    read, room = rig.put(read_data(0)), rig.room(512 * 512)
    for _ in range(20):
        rig.ring.add(read, room)
    rig.ring.publish()
    assert rig.device.process(rig.queue) & MORE
    first = rig.ring.collect()
    assert 0 < len(first) < 20
    assert len(first) + len(rig.process()) == 20


# Notifications


def test_without_event_index_the_driver_is_notified_unless_it_says_no(
    make_rig: RigFactory, engine: Engine
) -> None:
    rig = make_rig(features=0)
    rig.chain(read_counter())
    assert rig.flags & NOTIFY
    rig.ring.set_available_flags(virtio.VIRTQ_AVAIL_F_NO_INTERRUPT)
    rig.chain(read_counter())
    assert not rig.flags & NOTIFY
    assert rig.ring.used_flags == 0


@pytest.mark.parametrize(("event", "notified"), [(0, True), (1, True), (2, True), (3, False)])
def test_event_index_decides_about_the_notification(
    make_rig: RigFactory, engine: Engine, event: int, notified: bool
) -> None:
    rig = make_rig(features=EVENT_INDEX)
    rig.ring.set_available_flags(virtio.VIRTQ_AVAIL_F_NO_INTERRUPT)  # means nothing with it
    rig.ring.set_used_event(event)
    for _ in range(3):
        rig.ring.add(rig.put(read_counter()), rig.room(512))
    rig.process()
    assert bool(rig.flags & NOTIFY) == notified


def test_device_asks_for_a_kick_for_the_next_chain(make_rig: RigFactory) -> None:
    rig = make_rig(features=EVENT_INDEX)
    for _ in range(3):
        rig.chain(read_counter())
    assert rig.ring.available_event == 3


# Broken chains


def run_table(
    rig: Rig, table: Table, indirect: Sequence[tuple[int, int, int, int]] = (), place: int = 0
) -> tuple[list[Used], dict[str, int]]:
    """Offer the chain at descriptor 0, with an indirect table at ``place``."""
    for index, entry in enumerate(table):
        rig.ring.write_descriptor(index, *entry)
    for index, entry in enumerate(indirect):
        rig.ring.write_descriptor(index, *entry, table=place)
    rig.ring.offer(0)
    return rig.process(), rig.queue.take_faults()


BUFFER = START + 0x10_0000  # free memory
PLACE = START + 0x20_0000  # of indirect tables
GOOD = (BUFFER, 512, 0, 0)

BROKEN_CHAINS: dict[str, tuple[Table, Table, int]] = {
    "loop": ([(BUFFER, 512, NEXT, 0)], [], rules.CHAIN_TOO_LONG),
    "long loop": ([(BUFFER, 1, NEXT, 1), (BUFFER, 1, NEXT, 0)], [], rules.CHAIN_TOO_LONG),
    "next too large": ([(BUFFER, 512, NEXT, 8)], [], rules.CHAIN_NEXT),
    "next far too large": ([(BUFFER, 512, NEXT, 65535)], [], rules.CHAIN_NEXT),
    "buffer outside": ([(OUTSIDE, 512, 0, 0)], [], rules.CHAIN_BUFFER),
    "buffer outside, writable": (
        [(BUFFER, 512, NEXT, 1), (OUTSIDE, 512, WRITE, 0)],
        [],
        rules.CHAIN_BUFFER,
    ),
    "buffer over the end": ([(START + (4 << 20) - 511, 512, 0, 0)], [], rules.CHAIN_BUFFER),
    "buffer before the start": ([(START - 1, 512, 0, 0)], [], rules.CHAIN_BUFFER),
    "buffer wraps": ([(2**64 - 256, 512, 0, 0)], [], rules.CHAIN_BUFFER),
    "largest buffer": ([(START, 0xFFFF_FFFF, 0, 0)], [], rules.CHAIN_BUFFER),
    "readable after writable": (
        [(BUFFER, 512, NEXT | WRITE, 1), (BUFFER, 512, 0, 0)],
        [],
        rules.CHAIN_ORDER,
    ),
    "zero length": ([(BUFFER, 0, 0, 0)], [], rules.CHAIN_EMPTY_DESCRIPTOR),
    "zero length, writable": (
        [(BUFFER, 512, NEXT, 1), (BUFFER, 0, WRITE, 0)],
        [],
        rules.CHAIN_EMPTY_DESCRIPTOR,
    ),
    "indirect and next": (
        [(PLACE, 16, INDIRECT | NEXT, 1), GOOD],
        [GOOD],
        rules.CHAIN_INDIRECT_FLAGS,
    ),
    "indirect in indirect": (
        [(PLACE, 32, INDIRECT, 0)],
        [(BUFFER, 512, NEXT, 1), (PLACE, 16, INDIRECT, 0)],
        rules.CHAIN_INDIRECT_FLAGS,
    ),
    "indirect of length 0": ([(PLACE, 0, INDIRECT, 0)], [], rules.CHAIN_INDIRECT_LENGTH),
    "indirect of length 24": ([(PLACE, 24, INDIRECT, 0)], [GOOD], rules.CHAIN_INDIRECT_LENGTH),
    "indirect longer than the queue": (
        [(PLACE, 9 * 16, INDIRECT, 0)],
        [GOOD],
        rules.CHAIN_INDIRECT_SIZE,
    ),
    "indirect table outside": ([(OUTSIDE, 32, INDIRECT, 0)], [], rules.CHAIN_INDIRECT_TABLE),
    "indirect table wraps": ([(2**64 - 16, 32, INDIRECT, 0)], [], rules.CHAIN_INDIRECT_TABLE),
    "indirect next beyond its table": (
        [(PLACE, 32, INDIRECT, 0)],
        [(BUFFER, 512, NEXT, 2), GOOD, GOOD],
        rules.CHAIN_NEXT,
    ),
    "loop in an indirect table": (
        [(PLACE, 32, INDIRECT, 0)],
        [(BUFFER, 512, NEXT, 1), (BUFFER, 512, NEXT, 0)],
        rules.CHAIN_TOO_LONG,
    ),
    "both tables longer than the queue": (
        [(BUFFER, 1, NEXT, 1), (PLACE, 8 * 16, INDIRECT, 0)],
        [(BUFFER, 1, NEXT, index + 1) for index in range(7)] + [GOOD],
        rules.CHAIN_TOO_LONG,
    ),
}


@pytest.mark.parametrize(
    ("table", "indirect", "rule"), BROKEN_CHAINS.values(), ids=BROKEN_CHAINS.keys()
)
def test_broken_chain_affects_no_other_chain(
    make_rig: RigFactory, engine: Engine, table: Table, indirect: Table, rule: int
) -> None:
    rig = make_rig(size=8)
    rig.program()
    rig.guest.reserve(BUFFER, 512)
    rig.guest.write(BUFFER, write_data(0, 5, bytes(256)))
    used, faults = run_table(rig, table, indirect, PLACE)
    assert used == [Used(0, 0)]
    assert rig.flags & FAULTS
    assert faults == {rules.CHAIN_RULES[rule]: 1}
    assert rig.store.counter == 0
    assert rig.chain(read_counter())[0].result == 0
    assert not rig.flags & FAULTS


def test_chain_longer_than_2_to_the_32_is_broken(make_rig: RigFactory) -> None:
    rig = make_rig(size=2048, features=0, regions=[MemoryRegion(START, 8 << 20, 0x10000000, 0)])
    table = [(START, 4 << 20, NEXT, index + 1) for index in range(1024)] + [(START, 512, 0, 0)]
    used, faults = run_table(rig, table)
    assert (used, list(faults)) == ([Used(0, 0)], [rules.CHAIN_RULES[rules.CHAIN_BYTES]])


@pytest.mark.parametrize(
    ("buffers", "extra", "table", "used"),
    [
        (256, [], PLACE, 512),  # 4096 borders
        (256, [(START + (8 << 20) + PAGE - 1, 2)], PLACE, 0),
        (255, [(START + (8 << 20) + PAGE - 1, 2)] * 16, PLACE, 512),
        (255, [(START + (8 << 20) + PAGE - 1, 2)] * 17, PLACE, 0),
        (256, [], START + (8 << 20) + PAGE - 64, 0),  # the table itself crosses one or two
        (1, [(START + (8 << 20) + 17 * PAGE - 1, 2)], PLACE, 0),  # and then nothing is there
    ],
)
def test_chain_of_too_many_pieces_is_broken(
    make_rig: RigFactory, buffers: int, extra: list[tuple[int, int]], table: int, used: int
) -> None:
    many = START + (8 << 20)
    regions = [
        MemoryRegion(many + number * PAGE, PAGE, 0x7E00_0000_0000 + number * 2 * PAGE, 0)
        for number in range(17)
    ]
    rig = make_rig(size=512, regions=[MemoryRegion(START, 4 << 20, 0x7F00_0000_0000, 0), *regions])
    segments = [*extra, *[(many, 17 * PAGE)] * buffers]
    entries = [(*segment, WRITE | NEXT, index + 1) for index, segment in enumerate(segments)]
    entries[-1] = (*segments[-1], WRITE, 0)
    raw = b"".join(struct.pack("<QIHH", *entry) for entry in entries)
    rig.guest.write(table, raw)
    assert run_table(rig, [(table, len(raw), INDIRECT, 0)])[0] == [Used(0, used)]
    rule = rules.CHAIN_BUFFER if buffers == 1 else rules.CHAIN_CROSSINGS
    expected = {} if used else {rules.CHAIN_RULES[rule]: 1}
    run_again, faults = run_table(rig, [(table, len(raw), INDIRECT, 0)])
    assert (run_again, faults) == ([Used(0, used)], expected)
    rig.program()
    assert rig.chain(read_counter())[0].result == 0


def test_indirect_table_that_was_not_negotiated_breaks_the_chain(make_rig: RigFactory) -> None:
    rig = make_rig(size=8, features=EVENT_INDEX)
    used, faults = run_table(rig, [(PLACE, 16, INDIRECT, 0)], [GOOD], PLACE)
    assert used == [Used(0, 0)]
    assert list(faults) == [rules.CHAIN_RULES[rules.CHAIN_INDIRECT_FEATURE]]


def test_good_chains_around_a_broken_one_are_answered(keyed: Rig) -> None:
    rooms = [keyed.room(512)[0] for _ in range(2)]
    first = keyed.ring.add(keyed.put(read_counter()), [rooms[0]])
    keyed.ring.write_descriptor(40, OUTSIDE, 512)
    keyed.ring.offer(40)
    last = keyed.ring.add(keyed.put(read_counter()), [rooms[1]])
    assert keyed.process() == [Used(first, 512), Used(40, 0), Used(last, 512)]
    assert all(split(keyed.guest.read(*room))[0].nonce == NONCE for room in rooms)


# Broken rings


def check_broken(rig: Rig, engine: Engine, rule: int) -> None:
    """The ring is broken, stays broken, and works again after the driver resets it."""
    assert rig.flags & BROKEN
    assert rig.queue.error == rules.RING_RULES[rule] != ""
    assert rig.device.process(rig.queue) & BROKEN
    assert rig.ring.collect() == []
    rig.ring.reset()
    rig.queue.reset()
    assert rig.queue.error == ""
    rig.start(ALL_FEATURES)
    assert rig.chain(read_counter())[0].result == 0
    assert not rig.flags & BROKEN


def test_head_that_is_no_index_breaks_the_ring_after_the_chains_before_it(
    keyed: Rig, engine: Engine
) -> None:
    room = keyed.room(512)[0]
    head = keyed.ring.add(keyed.put(write_data(0, 5, bytes(256)) + read_counter()), [room])
    keyed.ring.offer(64)
    keyed.ring.offer(0)
    keyed.ring.set_used_event(1)
    assert keyed.process() == [Used(head, 512)]
    assert split(keyed.guest.read(*room))[0].write_counter == 1
    assert keyed.flags & NOTIFY
    check_broken(keyed, engine, rules.RING_HEAD)


@pytest.mark.parametrize("index", [65, 200, 40000, 65535])
def test_available_index_too_far_ahead_breaks_the_ring(
    keyed: Rig, engine: Engine, index: int
) -> None:
    keyed.ring.reset()
    keyed.queue.set_base(0)
    keyed.ring.set_available_index(index)
    assert keyed.process() == []
    check_broken(keyed, engine, rules.RING_AVAILABLE_INDEX)


@pytest.mark.parametrize(
    ("part", "rule"),
    [(0, rules.RING_DESCRIPTOR_TABLE), (1, rules.RING_AVAILABLE), (2, rules.RING_USED)],
)
@pytest.mark.parametrize("fault", ["unmapped", "misaligned", "over the end"])
def test_ring_memory_that_is_not_there_breaks_the_ring(
    keyed: Rig, engine: Engine, part: int, rule: int, fault: str
) -> None:
    ring = keyed.ring
    addresses = [
        keyed.guest.user_address(address)
        for address in (ring.descriptor_table, ring.available_ring, ring.used_ring)
    ]
    place = keyed.guest.regions[0].place
    addresses[part] = {
        "unmapped": 0x1000,
        "misaligned": addresses[part] + 1,
        "over the end": place.user_address + place.size - 16,
    }[fault]
    keyed.queue.set_addresses(*addresses)
    assert keyed.process() == []
    check_broken(keyed, engine, rule)


def test_ring_memory_that_goes_away_breaks_the_ring(keyed: Rig, engine: Engine) -> None:
    keyed.chain(read_counter())
    region = keyed.guest.regions[0]
    place = region.place
    keyed.memory.remove_region(place.guest_address, place.size, place.user_address)
    assert keyed.process() == []
    assert keyed.flags & BROKEN
    keyed.memory.add_region(
        place.guest_address, place.size, place.user_address, place.mmap_offset, region.fd
    )
    check_broken(keyed, engine, rules.RING_DESCRIPTOR_TABLE)


def test_ring_memory_that_moves_is_found_again(keyed: Rig) -> None:
    keyed.chain(read_counter())
    region = keyed.guest.regions[0]
    place = region.place
    for _ in range(3):
        keyed.memory.clear()
        keyed.memory.add_region(
            place.guest_address, place.size, place.user_address, place.mmap_offset, region.fd
        )
        assert keyed.chain(read_counter())[0].result == 0


def test_queue_without_a_size_is_broken(keyed: Rig, engine: Engine) -> None:
    keyed.queue.reset()
    assert keyed.device.process(keyed.queue) & BROKEN
    assert keyed.queue.error == rules.RING_RULES[rules.RING_NO_SIZE]


@pytest.mark.parametrize("size", [0, 32769, 65536, -1])
def test_queue_size_out_of_range_is_refused(keyed: Rig, size: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 32768"):
        keyed.queue.set_size(size)
    assert keyed.chain(read_counter())[0].result == 0


@pytest.mark.parametrize("size", [3, 100, 32767])
def test_queue_size_that_is_no_power_of_two_breaks_a_split_ring(
    keyed: Rig, engine: Engine, size: int
) -> None:
    keyed.queue.set_size(size)
    assert keyed.process() == []
    check_broken(keyed, engine, rules.RING_SPLIT_SIZE)


@pytest.mark.parametrize(
    ("base", "bits"), [(-1, 32), (0x10000, 16), (0xFFFF_FFFF, 16), (1 << 32, 32)]
)
def test_base_of_too_many_bits_is_refused(keyed: Rig, base: int, bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits"):
        keyed.queue.set_base(base)
    assert keyed.chain(read_counter())[0].result == 0


def test_used_index_goes_on_from_guest_memory(make_rig: RigFactory) -> None:
    """After a back-end was killed, the front-end knows what was answered by the used index."""
    rig = make_rig()
    rig.program()
    rig.ring.reset(7)
    rig.queue.set_base(7)
    assert rig.chain(read_counter())[0].result == 0
    assert rig.ring.used_index == 8
