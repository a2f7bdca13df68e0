# SPDX-License-Identifier: Apache-2.0
"""Guest memory as a VMM provides it: memfds, mapped in this process and in the back-end."""

import mmap
import os
import sys
from collections.abc import Sequence

from vhost_rpmb import memfd
from vhost_rpmb.closing import Closing
from vhost_rpmb.vhost_user.wire import MemoryRegion

#: One region of 4 MiB: rings, and room for 16 answers of the largest size. Guest physical and user
#: address differ so that mixing them up is noticed.
DEFAULT_REGIONS = (MemoryRegion(0x4000_0000, 4 << 20, 0x7F00_0000_0000, 0),)


class Region:
    """One mapped memory region; ``view`` is its memory, ``fd`` its memfd."""

    def __init__(self, place: MemoryRegion, *, sealed: bool = True) -> None:
        self.place = place
        # The back-end, which has it too, could otherwise raise SIGBUS here, or use up memory.
        self.fd = memfd.create("guest-memory", place.mmap_offset + place.size, sealed=sealed)
        try:
            self._map = mmap.mmap(self.fd, place.size, offset=place.mmap_offset)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._map)
        self.words = self.view.cast("H")
        self.start = place.guest_address
        self.end = place.guest_address + place.size

    def close(self) -> None:
        """Unmap the region and close its memfd."""
        self.words.release()
        self.view.release()
        self._map.close()
        os.close(self.fd)


class GuestMemory(Closing):
    """Memory regions at chosen addresses, with an allocator for rings and buffers.

    Addresses are guest physical, sizes are bytes. Sizes and mmap offsets of the regions have to be
    multiples of the page size. The memfds are sealed against changes of their size, unless
    ``sealed`` is False. A context manager: leaving it unmaps everything.
    """

    def __init__(
        self, places: Sequence[MemoryRegion] = DEFAULT_REGIONS, *, sealed: bool = True
    ) -> None:
        self.regions: list[Region] = []
        self._allocated: dict[int, int] = {}
        try:
            for place in sorted(places):
                self.regions.append(Region(place, sealed=sealed))
        except BaseException:
            self.close()
            raise
        self._free = [(region.start, region.end) for region in self.regions]

    def close(self) -> None:
        """Unmap all regions. The memory object is empty afterwards."""
        while self.regions:
            self.regions.pop().close()

    # Allocation

    def allocate(self, size: int, align: int = 1) -> int:
        """Allocate ``size`` bytes inside one region; MemoryError if there is no room."""
        size = max(size, 1)
        for start, end in self._free:
            address = -(-start // align) * align
            if size <= end - address:
                self.reserve(address, size)
                return address
        raise MemoryError(f"no {size} free bytes in guest memory")

    def reserve(self, address: int, size: int) -> None:
        """Allocate exactly these bytes, which may span adjoining regions; MemoryError if in use."""
        kept = []
        taken = 0
        for start, end in self._free:
            low, high = max(start, address), min(end, address + size)
            if low >= high:
                kept.append((start, end))
                continue
            taken += high - low
            kept += [span for span in ((start, low), (high, end)) if span[0] < span[1]]
        if taken != size:
            raise MemoryError(f"guest memory 0x{address:x}..0x{address + size:x} is not free")
        self._free = kept
        self._allocated[address] = size

    def free(self, address: int) -> None:
        """Free an allocation by its address; KeyError if there is none."""
        end = address + self._allocated.pop(address)
        spans: list[tuple[int, int]] = []
        borders = {region.start for region in self.regions}
        pieces = [
            (max(address, region.start), min(end, region.end))
            for region in self.regions
            if address < region.end and region.start < end
        ]
        for span in sorted(self._free + pieces):
            if spans and spans[-1][1] == span[0] and span[0] not in borders:
                spans[-1] = (spans[-1][0], span[1])
            else:
                spans.append(span)
        self._free = spans

    # Access

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes from ``address`` on; may span adjoining regions. IndexError outside."""
        parts = []
        end = address + length
        while address < end:
            region = self._region(address)
            part = region.view[address - region.start : end - region.start]
            parts.append(bytes(part))
            address += len(part)
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """Store ``data`` from ``address`` on; may span adjoining regions. IndexError outside."""
        while data:
            region = self._region(address)
            offset = address - region.start
            room = min(len(data), region.end - address)
            region.view[offset : offset + room] = data[:room]
            address += room
            data = data[room:]

    def load16(self, address: int) -> int:
        """One 16-bit little-endian load that the other side cannot tear (`address` is even)."""
        region = self._region(address)
        return _little_endian(region.words[(address - region.start) >> 1])

    def store16(self, address: int, value: int) -> None:
        """One 16-bit little-endian store that the other side cannot tear (`address` is even)."""
        region = self._region(address)
        region.words[(address - region.start) >> 1] = _little_endian(value)

    def load32(self, address: int) -> int:
        """One 32-bit little-endian load, of an address that is a multiple of four."""
        return int.from_bytes(self._cell(address)[0].to_bytes(4, sys.byteorder), "little")

    def store32(self, address: int, value: int) -> None:
        """One 32-bit little-endian store, at an address that is a multiple of four."""
        self._cell(address)[0] = int.from_bytes(value.to_bytes(4, "little"), sys.byteorder)

    def _cell(self, address: int) -> "memoryview[int]":
        region = self._region(address)
        offset = address - region.start
        return region.view[offset : offset + 4].cast("I")

    def user_address(self, address: int) -> int:
        """The user address of a guest physical address; IndexError outside."""
        region = self._region(address)
        return region.place.user_address + address - region.start

    def _region(self, address: int) -> Region:
        for region in self.regions:
            if region.start <= address < region.end:
                return region
        raise IndexError(f"guest physical address 0x{address:x} is in no memory region")


# CPython reads and writes an element of a memoryview in format "H" with one access of two bytes;
# "<H" through struct goes byte by byte.
if sys.byteorder == "little":

    def _little_endian(value: int) -> int:
        return value

else:

    def _little_endian(value: int) -> int:
        return (value >> 8) | ((value & 0xFF) << 8)
