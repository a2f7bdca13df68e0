# SPDX-License-Identifier: Apache-2.0
"""A device of one engine, a real store and a driver's ring, in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.oracle import KEY, Frame, program_key, read_data, read_result, split, write_data
from vhost_rpmb.closing import Closing
from vhost_rpmb.driver.memory import DEFAULT_REGIONS, GuestMemory
from vhost_rpmb.driver.packed import make_ring
from vhost_rpmb.driver.ring import Segment, Used
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.interface import Store
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.vhost_user import inflight, inflight_packed
from vhost_rpmb.vhost_user.wire import MemoryRegion
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import MORE

ALL_FEATURES = 1 << virtio.VIRTIO_F_INDIRECT_DESC | 1 << virtio.VIRTIO_F_EVENT_IDX
UNIT_BLOCKS = spec.CAPACITY_UNIT // spec.BLOCK_SIZE  # blocks in the smallest image


def make_image(path: Path, units: int = 1) -> Path:
    """Make a sparse image of ``units`` times 128 KiB."""
    path.touch()
    os.truncate(path, units * spec.CAPACITY_UNIT)
    return path


def write_key(path: Path, key: bytes) -> None:
    """Write a key file that only its owner can read."""
    path.touch(0o600)
    path.write_bytes(key)


def resolved(flash: Path, options: dict[str, object]) -> Paths:
    """Resolve the paths of a device; takes state_path and key_path out of the options."""
    return Paths.resolve(str(flash), options.pop("state_path", None), options.pop("key_path", None))  # type: ignore[arg-type]


def open_files(flash: Path, options: dict[str, object]) -> Store:
    """Open a device in files."""
    return open_store(resolved(flash, options), **options)  # type: ignore[arg-type]


class Rig(Closing):
    """One queue between a driver and a device; ``flags`` is what the last batch returned."""

    def __init__(
        self,
        engine: Engine,
        flash: Path,
        *,
        size: int = 64,
        features: int = ALL_FEATURES,
        regions: Sequence[MemoryRegion] = DEFAULT_REGIONS,
        store: dict[str, object] | None = None,
        opened: Callable[[Path, dict[str, object]], Store] = open_files,
        **options: object,
    ) -> None:
        self.engine = engine
        self._options = options
        given = dict(store or {})
        self.store = opened(flash, given)
        try:
            self.device = engine.RpmbDevice(self.store, **options)  # type: ignore[arg-type]
        except ValueError:
            self.store.close()
            raise
        self.guest = GuestMemory(regions)
        self.ring = make_ring(self.guest, size, features=features)
        self.memory = engine.GuestMemory()
        for region in self.guest.regions:
            self.memory.add_region(*region.place, region.fd)
        self.queue = engine.Virtqueue(self.memory)
        self.start(features)
        self.flags = 0
        self._region: inflight.Region | None = None

    def start(self, features: int, base: int | None = None) -> None:
        """Give the queue what a front-end would give it before the first kick.

        ``base``: where the ring is to start, if not where the driver is.
        """
        self.queue.set_size(self.ring.size)
        self.queue.set_features(features)
        self.queue.set_addresses(
            self.guest.user_address(self.ring.descriptor_table),
            self.guest.user_address(self.ring.available_ring),
            self.guest.user_address(self.ring.used_ring),
        )
        self.queue.set_base(self.ring.base if base is None else base)

    def replace_device(self) -> None:
        """Serve with the device that a process would make if this one were killed now."""
        journal = self.device.journal
        self.device = self.engine.RpmbDevice(self.store, **self._options)  # type: ignore[arg-type]
        if journal is not None:
            self.device.journal = journal
            used = self.queue.used
            assert used is not None
            self.device.restore_register(used)

    def track(self) -> None:
        """Record what is in flight from now on; nothing is at present."""
        description, self._region_fd = inflight.create(1, self.ring.size)
        memory = self.engine.GuestMemory()
        self._region = inflight.Region(memory, description, self._region_fd)
        record = self._region.record(0)
        used = self.queue.used
        assert record is not None
        assert used is not None
        if self.queue.packed:
            inflight_packed.resume(self.queue, record, self.ring.size)
            return
        found = record.recover(self.ring.size, used, self.queue.base)
        self.queue.set_base(found.base)
        self.queue.resume(used, memory, record.offset, found.last, found.heads)

    @property
    def record(self) -> bytes:
        """The in-flight region; empty without one."""
        if self._region is None:
            return b""
        return os.pread(self._region_fd, inflight.stride(self.ring.size), 0)

    def close(self) -> None:
        if self._region is not None:
            self._region.close()
            os.close(self._region_fd)
        self.memory.clear()
        self.ring.close()
        self.guest.close()
        self.store.close()

    def put(self, data: bytes, sizes: Sequence[int] = ()) -> list[Segment]:
        """Lay bytes out in guest memory, cut into pieces of ``sizes`` (the last takes the rest)."""
        return self._lay_out(len(data), sizes, data)

    def room(self, length: int, sizes: Sequence[int] = ()) -> list[Segment]:
        """Give device-writable memory, filled with 0xAA, cut like put()."""
        return self._lay_out(length, sizes, b"\xaa" * length)

    def _lay_out(self, length: int, sizes: Sequence[int], data: bytes) -> list[Segment]:
        segments: list[Segment] = []
        start = 0
        while start < length:
            size = sizes[len(segments)] if len(segments) < len(sizes) else length - start
            size = min(size, length - start)
            address = self.guest.allocate(size)
            self.guest.write(address, data[start : start + size])
            segments.append(Segment(address, size))
            start += size
        return segments

    def process(self) -> list[Used]:
        """Run the device until nothing is left; return what came back."""
        self.ring.publish()
        used = []
        while True:
            self.flags = self.device.process(self.queue)
            used += self.ring.collect()
            if not self.flags & MORE:
                return used

    def chain(self, data: bytes, room: int = 1) -> list[Frame]:
        """Run one chain with ``room`` frames for the answer; return the answer's frames."""
        return split(self.raw_chain(data, room * spec.FRAME_SIZE))

    def raw_chain(self, data: bytes, room: int) -> bytes:
        """Run one chain with ``room`` bytes for the answer; return what was written."""
        readable, writable = self.put(data), self.room(room)
        head = self.ring.add(readable, writable)
        used = self.process()
        assert [element.head for element in used] == [head]
        answer = b"".join(self.guest.read(*segment) for segment in writable)
        for segment in (*readable, *writable):
            self.guest.free(segment.address)
        assert answer[used[0].length :] == b"\xaa" * (room - used[0].length)
        return answer[: used[0].length]

    def program(self, key: bytes = KEY) -> None:
        """Program the key, as a test's first step."""
        (answer,) = self.chain(program_key(key) + read_result())
        assert answer.req_resp == spec.VIRTIO_RPMB_RESP_PROGRAM_KEY
        assert not answer.result & ~spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED

    def write(self, counter: int, address: int, *blocks: bytes) -> Frame:
        """Write blocks and return the answer."""
        (answer,) = self.chain(write_data(counter, address, *blocks) + read_result())
        return answer

    def read(self, address: int, count: int = 1) -> list[bytes]:
        """Read blocks that have to be readable, with a MAC that has to be right."""
        answers = self.chain(read_data(address, count), count)
        assert [answer.result for answer in answers] == [0] * count
        return [answer.data for answer in answers]


RigFactory = Callable[..., Rig]
