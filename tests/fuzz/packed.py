# SPDX-License-Identifier: Apache-2.0
"""A packed ring, as the input says: its slots, event areas, positions and in-flight record."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz.rings import AVAILABLE, DESCRIPTORS, FEATURES, INDIRECT, PAGE, Rings
from tests.fuzz.targets import Source
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import inflight, inflight_packed
from vhost_rpmb.vhost_user.inflight import InvalidRecordError
from vhost_rpmb.vhost_user.wire import InflightDescription
from vhost_rpmb.virtio import spec as virtio

START = 0x8000_8000
AVAIL, USED = virtio.VIRTQ_DESC_F_AVAIL, virtio.VIRTQ_DESC_F_USED
NEXT, WRITE, INDIRECT_FLAG = (
    virtio.VIRTQ_DESC_F_NEXT,
    virtio.VIRTQ_DESC_F_WRITE,
    virtio.VIRTQ_DESC_F_INDIRECT,
)
KINDS = (0, NEXT, WRITE, NEXT | WRITE, INDIRECT_FLAG, INDIRECT_FLAG | NEXT, 7, 0x7F78)


class Packed(Rings):
    """The steps of Rings, with slots in place of the available ring."""

    sizes = (5, 8, 5, 1, 2, 3, 33, 64, 256)  # the slots end where the driver event area begins
    features = tuple(features | 1 << virtio.VIRTIO_F_RING_PACKED for features in FEATURES)
    bases = (START, START, START, 0, 0x8004_8004, 0x3_0003, 0xFFFF_FFFF, 0x8001_0002)

    def __init__(self, engine: Engine, folder: Path) -> None:
        super().__init__(engine, folder)
        self._record_fd = os.memfd_create("record", os.MFD_CLOEXEC)
        os.ftruncate(self._record_fd, inflight.stride(1024))
        self._region: inflight.Region | None = None

    def close(self) -> None:
        super().close()
        os.close(self._record_fd)

    def run(self, data: bytes) -> list[object]:
        os.pwrite(self._record_fd, bytes(inflight.stride(1024)), 0)
        left = super().run(data)
        self._close_region()
        return [*left, os.pread(self._record_fd, inflight.stride(1024), 0)]

    def _close_region(self) -> None:
        if self._region is not None:
            self._region.close()
            self._region = None

    def _start(self, base: int) -> None:
        self._set_up(base)
        self._slot = base >> 16 & 0x7FFF
        self._wrap = base >> 31

    def _put(self, raw: bytes, kind: int, source: Source) -> None:
        """Store the next slot; mostly it is available."""
        if self._slot >= self._size:
            self._slot, self._wrap = 0, self._wrap ^ 1
        lap = AVAIL if self._wrap else USED
        if source.number(1) > 240:
            lap = source.pick((0, AVAIL | USED, AVAIL, USED))
        flags = (kind | lap) & 0xFFFF
        slot = DESCRIPTORS + virtio.VIRTQ_DESC_SIZE * self._slot
        self._store(slot, raw[:14] + flags.to_bytes(2, "little"))
        self._slot += 1

    def _descriptor_of(self, source: Source, address: int, length: int) -> bytes:
        identity = source.number(1) if source.number(1) & 7 else source.number(2)
        return (
            address.to_bytes(8, "little")
            + length.to_bytes(4, "little")
            + identity.to_bytes(2, "little")
            + bytes(2)
        )

    def _chain(self, source: Source) -> None:
        """Lay out a chain as a good driver does, in slots or in a table."""
        table = source.number(1) & 1
        readable = source.number(1) % 4
        total = readable + source.number(1) % 4
        for position in range(total):
            raw = self._descriptor_of(source, self._address(source), self._length(source))
            kind = WRITE if position >= readable else 0
            if table:
                place = INDIRECT + virtio.VIRTQ_DESC_SIZE * position
                self._store(place, raw[:14] + kind.to_bytes(2, "little"))
            else:
                self._put(raw, kind | (NEXT if position + 1 < total else 0), source)
        if table:
            length = virtio.VIRTQ_DESC_SIZE * total
            raw = self._descriptor_of(source, self._guest(INDIRECT), length)
            self._put(raw, INDIRECT_FLAG, source)

    def _any_slot(self, source: Source) -> None:
        kind = source.pick(KINDS)
        length = self._length(source)
        table = kind & INDIRECT_FLAG and length < PAGE
        address = self._guest(INDIRECT) if table else self._address(source)
        self._put(self._descriptor_of(source, address, length), kind, source)

    def _flags(self, source: Source) -> None:
        """Change the flags of any slot, behind the device or ahead of it."""
        slot = source.number(1) % self._size
        place = DESCRIPTORS + virtio.VIRTQ_DESC_SIZE * slot + 14
        self._store16(place, source.pick((0, AVAIL, USED, AVAIL | USED)) | source.pick(KINDS))

    def _notifications(self, source: Source) -> None:
        """Set the driver event area."""
        self._store16(AVAILABLE, source.number(2))
        self._store16(AVAILABLE + 2, source.pick((2, 2, 1, 0, 3, 0xFFFF)))

    def _size_and_base(self, source: Source) -> None:
        try:
            self._queue.set_size(source.number(2))
            self._queue.set_base(source.number(4))
        except ValueError as error:
            self._trace.append(str(error))

    def _format(self, source: Source) -> None:
        """Change the format: a new ring begins."""
        self._queue.set_features(source.pick((0, self._features)))

    def _recover(self, source: Source) -> None:
        """Continue from the record, some bytes of which the front-end has changed."""
        for _ in range(source.number(1) % 4):
            os.pwrite(self._record_fd, source.take(1), source.number(1) * source.pick((1, 3)))
        self._queue.set_base(self._queue.base)  # without the record before
        self._close_region()
        size = self._size
        description = InflightDescription(inflight.stride(size), 0, 1, size)
        self._region = inflight.Region(self.engine.GuestMemory(1), description, self._record_fd)
        record = self._region.record(0)
        assert record is not None
        self._queue.set_size(size)
        if self._queue.packed and self._queue.used is not None:
            try:
                inflight_packed.resume(self._queue, record, size)
            except InvalidRecordError as error:
                self._trace.append(str(error))

    _steps: tuple[Callable[[Any, Source], None], ...] = (
        _chain,
        Rings._frame,
        Rings._process,
        _any_slot,
        Rings._indirect,
        _chain,
        Rings._frame,
        _any_slot,
        _flags,
        Rings._process,
        Rings._bytes,
        _notifications,
        Rings._add_region,
        Rings._remove_region,
        Rings._clear,
        Rings._reset,
        Rings._addresses,
        _size_and_base,
        Rings._restart_device,
        _recover,
        _recover,
        _format,
    )
