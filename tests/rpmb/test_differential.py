# SPDX-License-Identifier: Apache-2.0
"""Both engines get the same bytes and have to leave the same bytes behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.oracle import KEY, OTHER_KEY, Frame, sign
from tests.support.rig import ALL_FEATURES, Rig, make_image
from vhost_rpmb import engine as engines
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user.wire import MemoryRegion

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # what a sync costs is not at stake here
ENGINES = [engines.load(name) for name in engines.ENGINES]


@st.composite
def frames(draw: st.DrawFn) -> list[bytes]:
    """One request, mostly meaningful: near every limit, with a right or a wrong MAC."""
    kind = draw(st.sampled_from([1, 2, 3, 3, 3, 4, 4, 5, 5, 0, 6, 0x100, 0xFFFF]))
    counter = draw(st.integers(0, 6) | st.sampled_from([0xFFFFFFFE, 0xFFFFFFFF]))
    address = draw(st.sampled_from([0, 1, 2, 3, 508, 510, 511, 512, 0xFFFF]))
    count = draw(st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 255, 0xFFFF]))
    present = draw(st.integers(1, 6)) if draw(st.booleans()) else max(1, min(count, 6))
    if kind != spec.VIRTIO_RPMB_REQ_DATA_WRITE:
        present = 1
    batch = [
        Frame(
            key_mac=KEY if kind == spec.VIRTIO_RPMB_REQ_PROGRAM_KEY else bytes(32),
            data=bytes([draw(st.integers(0, 255))]) * 256,
            nonce=draw(st.binary(min_size=16, max_size=16)),
            write_counter=counter,
            address=address,
            block_count=count,
            result=draw(st.sampled_from([0, 1])),
            req_resp=kind,
        )
        for _ in range(present)
    ]
    if draw(st.integers(0, 9)) == 0:
        spoiled = draw(st.integers(0, present - 1))
        field = draw(st.sampled_from(["address", "block_count", "write_counter"]))
        batch[spoiled] = _spoil(batch[spoiled], field, draw(st.integers(0, 3)))
    if kind == spec.VIRTIO_RPMB_REQ_DATA_WRITE:
        key = draw(st.sampled_from([KEY, KEY, KEY, OTHER_KEY]))
        macked = batch[: count if 0 < count <= present else present]
        batch[: len(macked)] = sign(macked, key)
    return [frame.pack() for frame in batch]


def _spoil(frame: Frame, field: str, value: int) -> Frame:
    return Frame(**(frame._asdict() | {field: value}))


chains = st.tuples(
    st.lists(frames(), max_size=4).map(lambda parts: b"".join(b"".join(part) for part in parts)),
    st.sampled_from([0, 0, 0, 0, 0, 1, 511]),  # bytes too many
    st.integers(0, 6),  # frames of room
    st.sampled_from([0, 0, 100]),  # bytes of room beyond whole frames
    st.lists(st.sampled_from([1, 200, 512, 700]), max_size=4),  # how both sides are cut
)

options = st.fixed_dictionaries(
    {
        "max_write_blocks": st.sampled_from([1, 2, 4, 255]),
        "max_read_blocks": st.sampled_from([0, 1, 3, 255]),
        "strict": st.booleans(),
        "features": st.sampled_from([ALL_FEATURES, 0]),
        "store": st.fixed_dictionaries(
            {"initial_counter": st.sampled_from([0, 0, 0, 0xFFFFFFFD, 0xFFFFFFFF])}
        ),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.lists(chains, min_size=1, max_size=5), st.booleans()), max_size=4),
    st.booleans(),
    st.booleans(),
    options,
)
def test_batches_leave_the_same_bytes(
    batches: list[tuple[list[tuple[bytes, int, int, int, list[int]]], bool]],
    programmed: bool,
    tracked: bool,
    settings: dict[str, object],
) -> None:
    """After some batches the device is replaced, and gets the chains a second time."""
    traces = []
    for engine in ENGINES:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            flash = make_image(Path(folder) / "flash")
            with Rig(engine, flash, **settings) as rig:  # type: ignore[arg-type]
                journal = bytearray(64)
                rig.device.journal = memoryview(journal)
                if programmed:
                    rig.program()
                if tracked:
                    rig.track()
                trace: list[object] = []
                for batch, again in batches:
                    trace.append(_run(rig, batch))
                    if again:
                        rig.replace_device()
                        trace.append(_run(rig, batch[::-1]))
                    trace += [bytes(journal), rig.record]
                trace += [bytes(rig.store.image), rig.store.counter, rig.store.key]
            trace.append(flash.read_bytes())
            traces.append(trace)
    assert traces[0] == traces[1]


def _run(rig: Rig, batch: list[tuple[bytes, int, int, int, list[int]]]) -> list[object]:
    rooms: list[list[Segment]] = []
    for data, extra, room, more, sizes in batch:
        readable = rig.put(data + bytes(extra), sizes)
        writable = rig.room(room * spec.FRAME_SIZE + more, sizes)
        rooms.append(writable)
        if readable or writable:
            rig.ring.add(readable, writable)
    used = rig.process()
    answers = [[rig.guest.read(*segment) for segment in room] for room in rooms]
    return [used, answers, rig.flags, rig.queue.take_faults(), rig.queue.base]


START, TABLE, END = 0x4000_0000, 0x4000_4000, 0x4000_8000  # guest memory of the raw rings
REGIONS = (MemoryRegion(START, END - START, 0x7F00_0000_0000, 0),)

descriptors = st.tuples(
    st.sampled_from([START, TABLE, END - 256, END - 1, END, 0, 2**64 - 1])
    | st.integers(START, END),
    st.sampled_from([0, 1, 16, 32, 48, 256, 512, 1024, 0xFFFF_FFFF]),
    st.sampled_from([0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 0xFFF8]),
    st.integers(0, 9),
)


def write_raw(
    ring: Ring,
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
) -> None:
    """Store descriptors, those of an indirect table, and heads of which any may be invalid."""
    for index, entry in enumerate(table):
        ring.write_descriptor(index, *entry)
    for index, entry in enumerate(indirect):
        ring.write_descriptor(index, *entry, table=TABLE)
    for position, head in enumerate(heads):
        ring.write_available(position % 8, head)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(descriptors, min_size=8, max_size=8),
    st.lists(descriptors, min_size=4, max_size=4),
    st.lists(st.integers(0, 9), max_size=10),
    st.integers(0, 9),
    st.sampled_from([0, ALL_FEATURES]),
    st.integers(0, 0xFFFF),
    st.integers(0, 1),
    st.booleans(),
)
# Two answers whose buffer is the ring itself: the used ring is written after all answers.
@example(8 * [(START, 512, 2, 0)], 4 * [(START, 0, 0, 0)], [], 2, 0, 0, 0, False)
def test_raw_rings_leave_the_same_bytes(
    table: list[tuple[int, int, int, int]],
    indirect: list[tuple[int, int, int, int]],
    heads: list[int],
    ahead: int,
    features: int,
    used_event: int,
    flags: int,
    tracked: bool,
) -> None:
    traces = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for engine in ENGINES:
            flash = make_image(Path(folder) / engine.name)
            with Rig(engine, flash, size=8, features=features, regions=REGIONS) as rig:
                write_raw(rig.ring, table, indirect, heads)
                rig.ring.set_available_flags(flags)
                rig.ring.set_used_event(used_event)
                rig.ring.set_available_index(ahead)
                if tracked:
                    rig.track()
                returned = [rig.device.process(rig.queue) for _ in range(2)]
                traces.append(
                    [
                        returned,
                        rig.queue.error,
                        rig.queue.base,
                        rig.queue.take_faults(),
                        rig.guest.read(START, END - START),
                        rig.record,
                    ]
                )
    assert traces[0] == traces[1]
