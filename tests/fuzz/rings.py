# SPDX-License-Identifier: Apache-2.0
"""A split ring: memory regions, descriptor table, rings and indirect tables as the input says."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.targets import Disk, Source, Target
from tests.support.oracle import program_key, read_counter, read_data, read_result, write_data
from tests.support.rig import ALL_FEATURES
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN

PAGE = 4096
ARENA = 8 * PAGE  # all that the guest has, in one memfd
GUEST, USER = 0x4000_0000, 0x7F00_0000_0000
# Where things lie in the arena unless the input says something else, in bytes.
DESCRIPTORS, AVAILABLE, USED, INDIRECT, BUFFERS = 0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE

# (guest address, size, user address, mmap offset) of the regions.
LAYOUTS = (
    ((GUEST, ARENA, USER, 0),),
    ((GUEST, 4 * PAGE, USER, 0), (GUEST + 4 * PAGE, 4 * PAGE, USER + 4 * PAGE, 4 * PAGE)),
    # A border inside a page and inside what is likely to be a buffer.
    ((GUEST, 0x4300, USER, 0), (GUEST + 0x4300, 0x3D00, USER + 0x4300, 0x4300)),
    # Neighbours in guest physical address, strangers in user address and in the file.
    ((GUEST, 4 * PAGE, USER, 0), (GUEST + 4 * PAGE, 4 * PAGE, USER + ARENA, 4 * PAGE)),
    ((GUEST, 6 * PAGE, USER, 0), (GUEST + ARENA, PAGE, USER + ARENA, 5 * PAGE)),
    # Two windows on the same bytes.
    ((GUEST, ARENA, USER, 0), (GUEST + ARENA, ARENA, USER + ARENA, 0)),
    # The last bytes of both address spaces that a region can have.
    ((2**64 - 1 - ARENA, ARENA, 2**64 - 1 - ARENA, 0),),
    (),
)
FEATURES = (
    ALL_FEATURES,
    0,
    1 << virtio.VIRTIO_F_INDIRECT_DESC,
    1 << virtio.VIRTIO_F_EVENT_IDX,
)
LENGTHS = (512, 512, 1024, 256, 1, 16, 32, 48, 128, 4096, 0x4000, 0, 0xFFFF_FFF0, 0xFFFF_FFFF)
FLAGS = (0, 1, 2, 3, 4, 5, 6, 7, 0xFFF8)
MAX_STEPS = 96


class Rings(Target):
    """One queue whose every byte the input may set, between calls of process()."""

    sizes: tuple[int, ...] = (8, 8, 8, 1, 2, 4, 64, 256, 1024)
    features: tuple[int, ...] = FEATURES
    bases: tuple[int, ...] = (0, 0, 0, 1, 7, 0xFFFD, 0xFFFF)

    def __init__(self, engine: Engine, folder: Path) -> None:
        super().__init__(engine, folder)
        self._disk = Disk(folder)
        self._fd = os.memfd_create("rings", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, ARENA)
        self._map = mmap.mmap(self._fd, ARENA)
        self._memory = engine.GuestMemory(4)

    def close(self) -> None:
        self._memory.clear()
        self._map.close()
        os.close(self._fd)
        self._disk.close()

    def run(self, data: bytes) -> list[object]:
        source = Source(data)
        self._map[:] = bytes(ARENA)
        self._trace: list[object] = []
        self._memory.clear()
        self._disk.prepare(source.pick((True, True, False)), source.pick((0, 1, 0xFFFF_FFFE)))
        self._device = self.engine.RpmbDevice(self._disk)
        self._queue = self.engine.Virtqueue(self._memory)
        self._layout = source.pick(LAYOUTS)
        for place in self._layout:
            self._memory.add_region(*place, self._fd)
        self._features = source.pick(self.features)
        self._size = source.pick(self.sizes)
        self._heads = source.pick(self.bases)  # the next entry of the available ring
        self._start(self._heads)
        for _ in range(MAX_STEPS):
            if not source.left:
                break
            source.pick(self._steps)(self, source)
        self._process(source)
        self._process(source)
        self._memory.clear()
        return [*self._trace, self._map[:], *self._disk.left_behind()]

    def _set_up(self, base: int) -> None:
        self._queue.set_size(self._size)
        self._queue.set_features(self._features)
        self._queue.set_addresses(self._user(DESCRIPTORS), self._user(AVAILABLE), self._user(USED))
        self._queue.set_base(base)

    def _start(self, base: int) -> None:
        self._set_up(base)
        self._store16(AVAILABLE + 2, base)
        self._store16(USED + 2, base)

    # Where the input points to

    def _user(self, offset: int) -> int:
        for _guest, size, user, start in self._layout:
            if start <= offset < start + size:
                return user + offset - start
        return USER + offset

    def _guest(self, offset: int) -> int:
        for guest, size, _user, start in self._layout:
            if start <= offset < start + size:
                return guest + offset - start
        return GUEST + offset

    def _address(self, source: Source) -> int:
        """A guest physical address: mostly of a buffer, sometimes at an edge, sometimes any."""
        kind = source.number(1)
        if kind < 160:
            return self._guest(BUFFERS + kind % 32 * spec.FRAME_SIZE)
        if kind < 192:
            return self._guest(source.number(2) % ARENA)
        if kind < 240:
            guest, size, _, _ = source.pick(self._layout or LAYOUTS[0])
            return (guest + size - source.number(1)) % 2**64
        return source.number(8)

    def _length(self, source: Source) -> int:
        kind = source.number(1)
        if kind < 240:
            return LENGTHS[kind % len(LENGTHS)]
        return source.number(4)

    def _store(self, offset: int, data: bytes) -> None:
        offset %= ARENA
        data = data[: ARENA - offset]
        self._map[offset : offset + len(data)] = data

    def _store16(self, offset: int, value: int) -> None:
        self._store(offset, (value & 0xFFFF).to_bytes(2, "little"))

    # The steps of an input

    def _descriptor(self, source: Source, table: int = DESCRIPTORS) -> None:
        index = source.number(1)
        self._store(table + virtio.VIRTQ_DESC_SIZE * index, self._packed(source))

    def _indirect(self, source: Source) -> None:
        self._descriptor(source, INDIRECT)

    def _packed(self, source: Source) -> bytes:
        flags = source.pick(FLAGS)
        length = self._length(source)
        address = self._guest(INDIRECT) if flags & 4 and length < PAGE else self._address(source)
        following = source.number(1)
        return (
            address.to_bytes(8, "little")
            + length.to_bytes(4, "little")
            + flags.to_bytes(2, "little")
            + following.to_bytes(2, "little")
        )

    def _head(self, source: Source) -> None:
        """Offer a head index, as a driver would."""
        self._store16(AVAILABLE + 4 + 2 * (self._heads % self._size), source.number(1))
        self._heads = (self._heads + 1) & 0xFFFF
        self._store16(AVAILABLE + 2, self._heads)

    def _wide_head(self, source: Source) -> None:
        self._store16(AVAILABLE + 4 + 2 * (self._heads % self._size), source.number(2))

    def _available_index(self, source: Source) -> None:
        self._heads = (self._heads + source.pick((1, 2, 7, 8, 9, 64, 0x8000, 0xFFFF))) & 0xFFFF
        self._store16(AVAILABLE + 2, self._heads)

    def _chain(self, source: Source) -> None:
        """Lay out a chain as a good driver does: readable pieces, then writable ones."""
        first = source.number(1) % self._size
        table, index = DESCRIPTORS, first
        if source.number(1) & 1:
            table, index = INDIRECT, 0
        readable = source.number(1) % 4
        total = readable + source.number(1) % 4
        for position in range(total):
            flags = (position >= readable) * 2 + (position + 1 < total)
            self._store(
                table + virtio.VIRTQ_DESC_SIZE * index,
                self._address(source).to_bytes(8, "little")
                + self._length(source).to_bytes(4, "little")
                + flags.to_bytes(2, "little")
                + (index + 1).to_bytes(2, "little"),
            )
            index += 1
        if table == INDIRECT:
            self._store(
                DESCRIPTORS + virtio.VIRTQ_DESC_SIZE * first,
                self._guest(INDIRECT).to_bytes(8, "little")
                + (virtio.VIRTQ_DESC_SIZE * total).to_bytes(4, "little")
                + (4).to_bytes(2, "little")
                + bytes(2),
            )
        self._head(Source(bytes([first])))

    def _frame(self, source: Source) -> None:
        """Put a request where buffers point to."""
        address = source.number(1)
        requests: tuple[Callable[[], bytes], ...] = (
            program_key,
            read_counter,
            read_result,
            lambda: read_data(address, source.number(1)),
            lambda: write_data(self._disk.counter, address, source.take(1) * 256),
            lambda: write_data(self._disk.counter, address, bytes(256), b"\1" * 256),
        )
        frames = source.pick(requests)()
        self._store(BUFFERS + source.number(1) % 32 * spec.FRAME_SIZE, frames)

    def _bytes(self, source: Source) -> None:
        self._store(source.number(2), source.take(source.number(1)))

    def _notifications(self, source: Source) -> None:
        """Set the available ring's flags, and used_event behind it."""
        self._store16(AVAILABLE, source.number(1))
        self._store16(AVAILABLE + 4 + 2 * self._size, source.number(2))

    def _process(self, _source: Source) -> None:
        flags = self._device.process(self._queue)
        assert not flags & ~15
        assert bool(flags & BROKEN) == bool(self._queue.error)
        self._trace += [flags, self._queue.error, self._queue.base, self._queue.take_faults()]

    def _add_region(self, source: Source) -> None:
        if source.number(1) & 1:
            place = source.pick([place for layout in LAYOUTS for place in layout])
        else:
            place = (self._address(source), self._length(source), source.number(8), 0)
            place = (*place[:3], source.pick((0, PAGE, 0x300, ARENA, 2**63 - 1, 2**64 - 1)))
        try:
            self._memory.add_region(*place, self._fd)
        except (ValueError, OSError) as error:
            self._trace.append(str(error))

    def _remove_region(self, source: Source) -> None:
        regions = [*self._memory.regions, (GUEST, PAGE, USER)]
        self._trace.append(regions)
        try:
            self._memory.remove_region(*source.pick(regions))
        except ValueError as error:
            self._trace.append(str(error))

    def _clear(self, _source: Source) -> None:
        self._memory.clear()

    def _reset(self, source: Source) -> None:
        self._queue.reset()
        self._size = source.pick(self.sizes)
        self._features = source.pick(self.features)
        self._heads = source.pick(self.bases)
        if source.number(1) & 1:
            self._start(self._heads)

    def _addresses(self, source: Source) -> None:
        """Put the parts of the ring somewhere else."""
        near = [
            self._user(source.number(2) % ARENA) if source.number(1) & 3 else source.number(8)
            for _ in range(3)
        ]
        self._queue.set_addresses(*near)

    def _size_and_base(self, source: Source) -> None:
        try:
            self._queue.set_size(source.number(2))
        except ValueError as error:
            self._trace.append(str(error))
        self._queue.set_base(source.number(2))

    def _restart_device(self, source: Source) -> None:
        """Reset the device, or let the disk be full from now on, or no more."""
        if source.number(1) & 1:
            self._device.reset()
        else:
            self._disk.full = not self._disk.full

    _steps: tuple[Callable[[Any, Source], None], ...] = (
        _chain,
        _frame,
        _process,
        _descriptor,
        _indirect,
        _head,
        _chain,
        _frame,
        _wide_head,
        _available_index,
        _bytes,
        _notifications,
        _add_region,
        _remove_region,
        _clear,
        _reset,
        _addresses,
        _size_and_base,
        _restart_device,
    )
