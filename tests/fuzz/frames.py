# SPDX-License-Identifier: Apache-2.0
"""The requests: well-formed chains of frames, many of them valid, in any order and number."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.targets import Disk, Source, Target
from tests.support.oracle import KEY, OTHER_KEY, Frame, sign, split
from tests.support.rig import ALL_FEATURES, UNIT_BLOCKS, Rig, make_image
from vhost_rpmb.driver.ring import Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user.wire import MemoryRegion
from vhost_rpmb.virtio import spec as virtio

# Two regions that adjoin, so that some buffers span them.
REGIONS = (
    MemoryRegion(0x4000_0000, 0x18000, 0x7F00_0000_0000, 0),
    MemoryRegion(0x4001_8000, 0x200000, 0x7E00_0000_0000, 0x1000),
)
COUNTERS = (0, 0, 0, 7, 0xFFFF_FFFD, 0xFFFF_FFFE, 0xFFFF_FFFF)
LIMITS = (32, 255, 1, 2, 3, 4)
READ_LIMITS = (*LIMITS, 0)
KINDS = (3, 3, 3, 3, 4, 4, 4, 2, 5, 5, 1, 0, 6, 0x100, 0x300, 0xFFFF)
ADDRESSES = (0, 1, 2, 3, 5, 255, UNIT_BLOCKS - 2, UNIT_BLOCKS - 1, UNIT_BLOCKS, 0xFFFF)
COUNTS = (1, 1, 1, 1, 2, 3, 4, 32, 33, 0, 254, 255, 256, 0xFFFF)
ROOMS = (1, 1, 1, 2, 3, 4, 0, 16, 254, 255, 256, 270)  # frames
ODD = (0, 0, 0, 0, 0, 0, 0, 1, 100, 511)  # bytes
CUTS = (512, 1, 196, 200, 700, 1024, 65536)  # bytes
MAX_CHAINS = 24


class Frames(Target):
    """A good driver, and whatever it may be told to ask."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        super().__init__(engine, folder)
        self._rig = Rig(engine, make_image(folder / "rig"), regions=REGIONS)
        self._disk = Disk(folder)

    def close(self) -> None:
        self._rig.close()
        self._disk.close()

    def run(self, data: bytes) -> list[object]:
        source = Source(data)
        rig = self._rig
        self._disk.prepare(
            keyed=source.pick((True, True, True, False)),
            counter=source.pick(COUNTERS),
            damaged=source.pick(((), (), (2, 3), (255, UNIT_BLOCKS - 1))),
        )
        self._limits = (source.pick(LIMITS), source.pick(READ_LIMITS), source.pick((False, True)))
        self._journal = bytearray(64)
        self._start()
        rig.ring.reset()
        rig.queue.reset()
        rig.start(source.pick((ALL_FEATURES, 1 << virtio.VIRTIO_F_INDIRECT_DESC)))
        self._trace: list[object] = [rig.device.config]
        self._batch: list[tuple[list[Segment], list[Segment]]] = []
        self._sent: list[bytes] = []  # the requests of the latest chains
        self._again: list[bytes] = []
        self._image = self._disk.digest()
        self._counter = self._disk.counter  # what a good driver would send next
        for _ in range(MAX_CHAINS):
            if not source.left:
                break
            self._chain(source)
            control = source.number(1)
            if control & 1:
                self._process()
            if control & 0xF0 == 0x10:
                self._disk.full = not self._disk.full
            if control & 0xF0 == 0x20:
                rig.device.reset()
            if control & 0xF0 == 0x30:
                self._counter = self._disk.counter
            if control & 0xF0 == 0x40:
                self._process()
                self._start()  # what a killed process owes, comes again
                self._again = self._sent[::-1] if control & 2 else list(self._sent)
        self._process()
        return [*self._trace, bytes(self._journal), *self._disk.left_behind()]

    def _start(self) -> None:
        """Put a new device on the disk and the journal."""
        writes, reads, strict = self._limits
        self._rig.device = self.engine.RpmbDevice(
            self._disk, max_write_blocks=writes, max_read_blocks=reads, strict=strict
        )
        self._rig.device.journal = memoryview(self._journal)
        self._rig.device.restore_register(self._rig.ring.used_index)

    def _chain(self, source: Source) -> None:
        """Add a chain of up to 5 requests."""
        frames: list[bytes] = []
        for _ in range(source.number(1) % 6):
            frames += self._request(source)
        data = b"".join(frames) + bytes(source.pick(ODD))
        if self._again:
            data = self._again.pop(0)
        else:
            self._sent = [*self._sent[-3:], data]
        room = source.pick(ROOMS) * spec.FRAME_SIZE + source.pick(ODD)
        cuts = [source.pick(CUTS) for _ in range(source.number(1) % 6)]
        rig = self._rig
        laid_out = sum(piece.length for sides in self._batch for side in sides for piece in side)
        if laid_out > REGIONS[1].size // 2 or rig.ring.free_descriptors < 2 * len(CUTS) + 2:
            self._process()
        readable, writable = rig.put(data, cuts), rig.room(room, cuts[::-1])
        self._batch.append((readable, writable))
        if readable or writable:
            rig.ring.add(readable, writable, indirect=source.pick((None, False)))

    def _request(self, source: Source) -> list[bytes]:
        kind = source.pick(KINDS)
        count = source.pick(COUNTS)
        details = source.number(1)
        present = 1
        if kind == spec.VIRTIO_RPMB_REQ_DATA_WRITE:
            present = source.pick((1, 2, 3, 33, 255)) if details & 1 else max(1, min(count, 40))
        write_counter = (self._counter + source.pick((0, 0, 0, 0, 1, -1, 2))) % 2**32
        batch = [
            Frame(
                key_mac=source.take(32) if details & 2 else KEY,
                data=bytes([details]) * 256,
                nonce=source.take(16) if details & 4 else bytes(16),
                write_counter=write_counter,
                address=address,
                block_count=count,
                result=details >> 7,
                req_resp=kind,
            )
            for address in [source.pick(ADDRESSES)]
            for _ in range(present)
        ]
        if details & 0x18 == 0x18:
            spoiled = source.number(1) % present
            field = source.pick(("address", "block_count", "write_counter", "req_resp"))
            batch[spoiled] = Frame(**(batch[spoiled]._asdict() | {field: details}))
        if kind == spec.VIRTIO_RPMB_REQ_DATA_WRITE:
            macked = batch[: count if 0 < count <= present else present]
            key = OTHER_KEY if details & 0x60 == 0x60 else KEY
            batch[: len(macked)] = sign(macked, key)
            if not details & 0x10:
                self._counter = (write_counter + 1) % 2**32
        return [frame.pack() for frame in batch]

    def _process(self) -> None:
        """Run the batch; record the answers, and check what holds for every one of them."""
        rig, disk = self._rig, self._disk
        counter, key = disk.counter, disk.key
        used = rig.process()
        answers = []
        lengths = iter(used)
        for readable, writable in self._batch:
            answer = b"".join(rig.guest.read(*segment) for segment in writable)
            length = next(lengths).length if readable or writable else 0
            assert answer[length:] == b"\xaa" * (len(answer) - length)
            answers.append(answer[:length])
            split(answer[:length])
            for segment in (*readable, *writable):
                rig.guest.free(segment.address)
        assert next(lengths, None) is None
        assert disk.counter >= counter
        assert key is None or disk.key == key
        image = disk.digest()
        assert disk.counter > counter or image == self._image
        self._image = image
        self._batch.clear()
        self._trace += [used, answers, rig.flags, rig.queue.take_faults(), disk.counter]
