# SPDX-License-Identifier: Apache-2.0
"""Every byte of guest memory that the device changes lies on a marked page, and few others do."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rpmb.test_differential import ENGINES, MEMORY, REGIONS, descriptors, write_raw
from tests.support.dirty import DirtyMap, changed_pages, log_size, pages_of, snapshot
from tests.support.oracle import program_key, read_counter, read_data, read_result, write_data
from tests.support.rig import ALL_FEATURES, Rig, make_image
from vhost_rpmb.driver.packed import PackedRing, make_ring
from vhost_rpmb.driver.ring import Ring, Segment, Used
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user.wire import MemoryRegion
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.spec import VHOST_LOG_PAGE as PAGE

# Guest memory: pages without memory before each region (0: it adjoins), and pages of it. The first
# one has room for the ring.
PACKED = 1 << virtio.VIRTIO_F_RING_PACKED
layouts = st.tuples(
    st.tuples(st.sampled_from([0, 1, 7, 1 << 18]), st.integers(10, 12)),
    st.lists(st.tuples(st.sampled_from([0, 0, 1, 9]), st.integers(1, 3)), max_size=3),
).map(lambda made: [made[0], *made[1], (1, 48)])  # the last one has room for everything else

ChainLayout = tuple[str, int, int, list[int]]

# A request, bytes before its buffers, a distance from a border of regions (0: anywhere), and how
# its buffers are cut.
chains = st.tuples(
    st.sampled_from(["read", "read", "write", "counter", "key", "broken", "result"]),
    st.integers(0, PAGE),
    st.sampled_from([0, 0, 1, 100, 511, 513]),
    st.lists(st.sampled_from([1, 200, 512, 700]), max_size=4),
)


@contextmanager
def logged(engine: Engine, flash: Path, **options: Any) -> Iterator[tuple[Rig, DirtyMap]]:
    """A device with a dirty log."""
    with Rig(engine, flash, **options) as rig, DirtyMap(log_size(rig.guest)) as log:
        bits: Any = engine.GuestMemory(1)
        size, offset = log.description
        bits.add_region(0, size, 0, offset, log.fd)
        rig.memory.set_log(bits, True)
        yield rig, log
        assert not rig.memory.log_fault
        bits.clear()


def regions(layout: Sequence[tuple[int, int]]) -> list[MemoryRegion]:
    found = []
    page = 0
    for number, (gap, pages) in enumerate(layout):
        page += gap
        user = 0x7F00_0000_0000 - (number << 32)
        found.append(MemoryRegion(page * PAGE, pages * PAGE, user, number * PAGE))
        page += pages
    return found


def place(rig: Rig, size: int, filler: int, before_border: int) -> int:
    """Find a place for a buffer, over the border of two regions if there is one with room."""
    ends = {region.end for region in rig.guest.regions}
    for region in rig.guest.regions:
        if before_border and region.start in ends:
            try:
                rig.guest.reserve(region.start - before_border, size)
            except MemoryError:
                continue
            return region.start - before_border
    rig.guest.allocate(filler)
    return rig.guest.allocate(size)


def lay_out(
    rig: Rig, data: bytes, room: int, filler: int, before_border: int, sizes: Sequence[int]
) -> tuple[list[Segment], list[Segment]]:
    """Put a chain into guest memory: its readable and its writable buffers."""
    sides: list[list[Segment]] = [[], []]
    for side, length in enumerate((len(data), room)):
        done = 0
        while done < length:
            number = len(sides[side])
            size = sizes[number] if number < len(sizes) else length - done
            size = min(size, length - done)
            address = place(rig, size, filler, before_border)
            rig.guest.write(address, b"\xaa" * size if side else data[done : done + size])
            sides[side].append(Segment(address, size))
            done += size
    return sides[0], sides[1]


def written(rig: Rig, used: Sequence[Used], rooms: dict[int, list[Segment]]) -> set[int]:
    """The pages of all answers."""
    spans = []
    for head, length in used:
        left = length
        for address, size in rooms[head]:
            spans.append((address, min(size, left)))
            left -= min(size, left)
    return pages_of(spans)


def requests(counter: list[int], source: random.Random, kind: str) -> tuple[bytes, int]:
    """The frames of a request, and the room for its answer in frames."""
    address = source.randrange(8)
    if kind == "write":
        blocks = [source.randbytes(spec.BLOCK_SIZE) for _ in range(source.randrange(1, 3))]
        counter[0] += 1
        return write_data(counter[0] - 1, address, *blocks) + read_result(), 1
    if kind == "read":
        count = source.randrange(1, 5)
        return read_data(address, count), count + source.randrange(2)
    return {
        "counter": (read_counter(), 1),
        "key": (program_key(), 0),
        "broken": (bytes(100), 1),
        "result": (read_result(), 2),
    }[kind]


@settings(max_examples=80, deadline=None)
@given(
    layouts,
    st.sampled_from([4, 8, 64, 1024]),
    st.integers(0, 2 * PAGE),
    st.sampled_from([0, ALL_FEATURES, PACKED, PACKED | ALL_FEATURES]),
    st.lists(st.lists(chains, min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_changed_pages_are_marked(
    layout: list[tuple[int, int]],
    size: int,
    lead: int,
    features: int,
    batches: list[list[ChainLayout]],
    seed: int,
) -> None:
    for engine in ENGINES:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            flash = make_image(Path(folder) / "flash")
            places = regions(layout)
            with logged(engine, flash, size=size, features=features, regions=places) as (rig, log):
                move_ring(rig, lead, size, features)
                counter, source = [0], random.Random(seed)
                rig.queue.mark_ring(rig.ring.used_ring)
                key: ChainLayout = ("key", 0, 0, [])
                for batch in [[key], *batches]:
                    check_batch(rig, log, [(requests(counter, source, c[0]), c) for c in batch])


def move_ring(rig: Rig, lead: int, size: int, features: int) -> None:
    """Put the ring anywhere in its region, over a border of pages for example."""
    rig.ring.close()
    rig.guest.allocate(lead)
    rig.ring = make_ring(rig.guest, size, features=features)
    rig.start(features)


def check_batch(
    rig: Rig, log: DirtyMap, batch: list[tuple[tuple[bytes, int], ChainLayout]]
) -> None:
    ring = rig.ring
    rooms = {}
    for (data, frames), (_, filler, before_border, sizes) in batch:
        room = frames * spec.FRAME_SIZE
        readable, writable = lay_out(rig, data, room, filler, before_border, sizes)
        count = len(readable) + len(writable)
        needed = min(count, 1) if ring.indirect else count
        if count <= ring.size and 0 < needed <= ring.free_descriptors:
            rooms[ring.add(readable, writable)] = writable
    ring.publish()
    before, writes = snapshot(rig.guest), ring_writes(ring)
    used = rig.process()
    assert {element.head for element in used} == set(rooms)
    changed, marked = changed_pages(rig.guest, before), log.take()
    must = changed | written(rig, used, rooms)
    assert must <= marked <= must | pages_of(writes)


def ring_writes(ring: Ring) -> list[tuple[int, int]]:
    """The parts of the ring that are written when all that is available is answered."""
    if isinstance(ring, PackedRing):
        first, count = ring.base & 0x7FFF, ring.size - ring.free_descriptors
        slots = [(first + number) % ring.size for number in range(count)]
        return [(ring.used_ring, 4), *((ring.descriptor_table + 16 * slot, 16) for slot in slots)]
    slots = [(ring.used_index + number) % ring.size for number in range(ring.in_flight)]
    start = ring.used_ring + 4
    return [(ring.used_ring, 4), (start + 8 * ring.size, 2), *((start + 8 * s, 8) for s in slots)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(descriptors, min_size=8, max_size=8),
    st.lists(descriptors, min_size=4, max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=10),
    st.integers(1, 9),
    st.sampled_from([0, ALL_FEATURES]),
)
def test_raw_ring_marks_what_it_changes(
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    ahead: int,
    features: int,
) -> None:
    """Whatever the descriptors say, and in both engines alike."""
    marks = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for engine in ENGINES:
            flash = make_image(Path(folder) / engine.name)
            with logged(engine, flash, size=8, features=features, regions=REGIONS) as (rig, log):
                write_raw(rig.ring, table, indirect, heads)
                rig.ring.set_available_index(ahead)
                rig.queue.mark_ring(rig.ring.used_ring)
                before = snapshot(rig.guest)
                for _ in range(2):
                    rig.device.process(rig.queue)
                marks.append(log.take())
                assert changed_pages(rig.guest, before) <= marks[-1]
    assert marks[0] == marks[1]
