# SPDX-License-Identifier: Apache-2.0
"""Guest memory: the regions that the front-end shared, by guest physical and by user address."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import stat
from bisect import bisect_right
from collections.abc import Iterator
from operator import attrgetter
from weakref import WeakSet

from vhost_rpmb import libc
from vhost_rpmb._pure.barrier import full_barrier
from vhost_rpmb.virtio import limits
from vhost_rpmb.virtio.spec import VHOST_LOG_PAGE

__all__ = ["GuestMemory", "GuestMemoryError"]

_ADDRESS_END = 1 << 64
_FILE_END = 1 << 63
_BY_GUEST_ADDRESS = attrgetter("guest_address")
_LOG_TOO_SMALL = "it has no bit for some of the pages that were written"
_LOG_LOST = "the file behind it was truncated"


class GuestMemoryError(Exception):
    """An address range is not wholly inside the shared memory regions."""


class _Region:
    """One memory region, mapped."""

    def __init__(
        self, guest_address: int, size: int, user_address: int, mmap_offset: int, fd: int
    ) -> None:
        self.guest_address = guest_address
        self.size = size
        self.user_address = user_address
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and mmap_offset + size > status.st_size:
            raise ValueError("the memory region reaches past the end of its file")
        # A huge-page file can be mapped from huge-page boundaries only, and in whole huge pages.
        granularity = max(status.st_blksize, mmap.ALLOCATIONGRANULARITY)
        skipped = mmap_offset % granularity
        self.length = -(-(skipped + size) // granularity) * granularity
        self.map = mmap.mmap(
            fd,
            skipped + size,
            flags=mmap.MAP_SHARED,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=mmap_offset - skipped,
        )
        self.skipped = skipped
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.lost = False  # set by the SIGBUS handler

    def key(self) -> tuple[int, int, int]:
        return self.guest_address, self.size, self.user_address


# The front-end can truncate a file under its mapping; an access to it is a SIGBUS. The handler maps
# private memory of zeros in the place of the region, so that the access continues, and sets a mark.
# A handler of signal.signal() would run too late: the access has to be repeated under it. That this
# one is Python code is sound because the signal comes at one kind of place only, the copying of
# bytes by an mmap or a memoryview: in this thread, with the interpreter's lock, in no allocation.


class _SignalInfo(ctypes.Structure):
    """The head of siginfo_t, as Linux has it on 64-bit machines, for a signal of an access."""

    _fields_ = (
        ("number", ctypes.c_int),
        ("error", ctypes.c_int),
        ("code", ctypes.c_int),
        ("address", ctypes.c_size_t),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_SignalInfo), ctypes.c_void_p)


class _SignalAction(ctypes.Structure):
    """The C library's struct sigaction on Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO = 4
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_MADV_NOHUGEPAGE = 15

_libc = ctypes.CDLL(None, use_errno=True)
_map_memory = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    *(ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)(("mmap", _libc))
_remap_memory = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    *(ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t),
)(("mremap", _libc))
_unmap_memory = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)(("munmap", _libc))
_advise_memory = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)(
    ("madvise", _libc)
)
_MAP_FAILED = ctypes.c_size_t(-1).value

_mapped: WeakSet[_Region] = WeakSet()
_previous: list[_SignalAction] = []  # the handler before ours, until it is back


def _lose(start: int, length: int) -> bool:
    """Map private memory of zeros in the place of a region or a part of one.

    Touched all over, it must not become huge pages.
    """
    place = _map_memory(
        start,
        length,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE,
        -1,
        0,
    )
    if place == _MAP_FAILED:
        return False
    _advise_memory(start, length, _MADV_NOHUGEPAGE)
    return True


def _renew(region: _Region) -> None:
    """Map a region anew, in place: frees its page tables.

    A size of 0 has mremap() map the same pages a second time; moving that there takes the place of
    the first mapping. Nothing is freed where there are no addresses for it, or for huge pages,
    which have no tables of that size.
    """
    for offset in range(0, region.length, limits.MAX_RENEWED):
        place = region.start + offset
        length = min(region.length - offset, limits.MAX_RENEWED)
        second = _remap_memory(place, 0, length, _MREMAP_MAYMOVE, 0)
        if second == _MAP_FAILED:
            continue
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
        if _remap_memory(second, length, length, flags, place) == _MAP_FAILED:
            _unmap_memory(second, length)
            region.lost |= _lose(place, length)  # the place may be empty by now


def _handle_bus_error(number: int, info: ctypes._Pointer[_SignalInfo], _context: int) -> None:
    fault = info.contents
    if fault.code > 0:  # from the kernel, for an access
        for region in list(_mapped):
            if 0 <= fault.address - region.start < region.length:
                region.lost = _lose(region.start, region.length)
                if region.lost:
                    return
    # Not ours: the access is repeated under the handler that was there before. Should that one hand
    # it back, the default ends the process.
    _libc.sigaction(number, ctypes.byref(_previous.pop() if _previous else _SignalAction()), None)
    if fault.code <= 0:
        signal.raise_signal(number)


_handler = _Handler(_handle_bus_error)
_handler_address = ctypes.cast(_handler, ctypes.c_void_p).value


def _guard(region: _Region) -> None:
    """Install the handler for a region, so that the end of its file does not end the process."""
    current = _SignalAction()
    _libc.sigaction(signal.SIGBUS, None, ctypes.byref(current))
    if current.handler != _handler_address:
        _previous[:] = [current]
        wanted = _SignalAction(handler=_handler_address, flags=_SA_SIGINFO)
        if _libc.sigaction(signal.SIGBUS, ctypes.byref(wanted), None):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _mapped.add(region)


class GuestMemory:
    """The memory table of one connection (vhost-user, "Memory regions description").

    Addresses and sizes are in bytes. At most ``max_regions`` regions, which may adjoin but never
    overlap in guest physical address.

    With a dirty log, `write` marks the pages that it changes, once ``marks_writes`` is set there;
    rings mark their own parts by `mark`. Marked means: after the page was changed, before the batch
    ends, by one atomic access, because others mark the same log and the front-end clears it.
    """

    def __init__(self, max_regions: int = 509) -> None:
        self._max_regions = max_regions
        self._regions: list[_Region] = []  # by guest address
        self._was_lost = False
        self._touched: set[int] = set()  # areas, by number, since the mappings were made
        self._max_touched = 0
        self.set_log(None)

    @property
    def regions(self) -> tuple[tuple[int, int, int], ...]:
        """(guest address, size, user address) of each region, by guest address."""
        return tuple(region.key() for region in self._regions)

    def add_region(
        self, guest_address: int, size: int, user_address: int, mmap_offset: int, fd: int
    ) -> None:
        """Map ``size`` bytes of ``fd`` from ``mmap_offset``; the caller keeps (and closes) ``fd``.

        Raises ValueError if the region breaks a rule (the text names it), OSError if it cannot be
        mapped; the table is unchanged then.
        """
        if size == 0:
            raise ValueError("the memory region is empty")
        if guest_address + size >= _ADDRESS_END or user_address + size >= _ADDRESS_END:
            raise ValueError("the memory region reaches the end of the address space")
        if mmap_offset + size >= _FILE_END:
            raise ValueError("the memory region reaches past the end of its file")
        if len(self._regions) >= self._max_regions:
            raise ValueError(f"there are {self._max_regions} memory regions already")
        index = bisect_right(self._regions, guest_address, key=_BY_GUEST_ADDRESS)
        before = self._regions[index - 1] if index else None
        after = self._regions[index] if index < len(self._regions) else None
        if (before and before.guest_address + before.size > guest_address) or (
            after and guest_address + size > after.guest_address
        ):
            raise ValueError("the memory region overlaps another one")
        if sum(region.size for region in self._regions) + size > limits.MAX_MAPPED:
            raise ValueError("the memory regions have more than 64 TiB")
        region = _Region(guest_address, size, user_address, mmap_offset, fd)
        _guard(region)
        self._regions.insert(index, region)
        self._limit_touched()

    def remove_region(self, guest_address: int, size: int, user_address: int) -> None:
        """Unmap the region with exactly these three values; ValueError where there is none."""
        for index, region in enumerate(self._regions):
            if region.key() == (guest_address, size, user_address):
                del self._regions[index]
                self._drop(region)
                return
        raise ValueError("there is no such memory region")

    def clear(self) -> None:
        """Unmap every region; a dirty log stays."""
        while self._regions:
            self._drop(self._regions.pop())
        self._was_lost = False

    def read(self, guest_address: int, length: int) -> bytes:
        """Copy ``length`` bytes out, across regions that adjoin; GuestMemoryError outside."""
        pieces = []
        for region, start, count in self._spans(guest_address, length):
            self._touch(region, start, count)
            pieces.append(region.map[start : start + count])
        return b"".join(pieces)

    def write(self, guest_address: int, data: bytes) -> None:
        """Copy ``data`` in, across regions that adjoin; GuestMemoryError (and no write) outside.

        Buffers are written by this method and by _put(), rings by the views of their parts.
        """
        self._put(guest_address, data)
        self._mark_noted()

    def set_log(self, log: GuestMemory | None, marks_writes: bool = False) -> None:
        """Use another dirty log, or none: a bit for each page from guest address 0 on.

        ``log`` has the bits as its only region, from address 0 on, and stays mapped meanwhile.
        """
        self._log = log
        self._log_pages = log.regions[0][1] * 8 if log else 0
        self._marks_writes = log is not None and marks_writes
        self._noted: set[int] = set()
        self._marked = False
        self._log_fault = ""

    def mark(self, guest_address: int, length: int) -> None:
        """Mark the pages of a range, of a byte or more, in the dirty log, if there is one."""
        self._note(guest_address, length)
        self._mark_noted()

    def take_marked(self) -> bool:
        """Tell whether anything was marked since the last call."""
        marked, self._marked = self._marked, False
        return marked

    @property
    def log_fault(self) -> str:
        """The reason why pages could not be marked in this dirty log; empty if all could."""
        return self._log_fault

    def _put(self, guest_address: int, data: bytes) -> None:
        """Copy ``data`` in; its pages are marked by _mark_noted(), before the batch ends."""
        done = 0
        for region, start, count in list(self._spans(guest_address, len(data))):
            self._touch(region, start, count)
            region.map[start : start + count] = data[done : done + count]
            done += count
        if self._marks_writes and data:
            self._note(guest_address, len(data))

    def _note(self, guest_address: int, length: int) -> None:
        """Note the pages of a range that has been written: a batch marks each of them once."""
        if self._log is None:
            return
        self._marked = True
        first = guest_address // VHOST_LOG_PAGE
        last = (guest_address + length - 1) // VHOST_LOG_PAGE
        if last >= self._log_pages:
            self._log_fault = self._log_fault or _LOG_TOO_SMALL
            last = self._log_pages - 1
        self._noted.add(last) if first == last else self._noted.update(range(first, last + 1))

    def _mark_noted(self) -> None:
        """Mark the pages that were noted."""
        if not self._noted or self._log is None:
            return
        full_barrier()  # all that was written before a look at the bits
        for page in self._noted:
            if not self._log._set_bit(page // 8, page % 8):
                self._log_fault = _LOG_LOST
                break
        self._noted.clear()

    def _set_bit(self, offset: int, bit: int) -> bool:
        """Set a bit of the first region by one atomic access; False if its memory was lost.

        One that is set already, behind a full barrier, needs no access: whoever clears it finds
        what was written before.
        """
        region = self._regions[0]
        place = region.skipped + offset
        if region.start + place >> limits.TOUCHED_AREA_BITS not in self._touched:
            self._touch(region, place, 1)
        if not region.map[place] >> bit & 1 and not region.lost:
            try:
                libc.atomic_set_bit(region.start + place, bit)
            except OSError:
                return False
        return not region.lost

    @property
    def _lost(self) -> bool:
        """Whether an access so far found the file behind a region truncated.

        Its reads were zeros and its writes reached nobody, so this is true until clear().
        """
        return self._was_lost or any(region.lost for region in self._regions)

    def _drop(self, region: _Region) -> None:
        """Unmap a region that is no longer in the table."""
        _mapped.discard(region)
        region.map.close()
        self._was_lost |= region.lost
        self._limit_touched()

    def _limit_touched(self) -> None:
        """Set how many areas may be touched before the next renewal."""
        mapped = sum(region.size for region in self._regions)
        self._max_touched = limits.MAX_TOUCHED_AREAS + (mapped >> limits.MAPPED_PER_AREA_BITS)

    def _spans(self, guest_address: int, length: int) -> Iterator[tuple[_Region, int, int]]:
        """Cut a range into (region, offset in its map, byte count)."""
        while length:
            index = bisect_right(self._regions, guest_address, key=_BY_GUEST_ADDRESS) - 1
            region = self._regions[index] if index >= 0 else None
            if region is None or guest_address - region.guest_address >= region.size:
                raise GuestMemoryError(f"{guest_address:#x} is outside every memory region")
            offset = guest_address - region.guest_address
            count = min(length, region.size - offset)
            yield region, region.skipped + offset, count
            guest_address += count
            length -= count

    def _ring_part(
        self, user_address: int, length: int, alignment: int
    ) -> tuple[int, memoryview] | None:
        """Return the guest address and a view of ``length`` bytes at a user address, or None.

        None if they are not all in one region, or not aligned to ``alignment`` bytes. The caller
        releases the view before the memory table can change.
        """
        for region in self._regions:
            offset = user_address - region.user_address
            if 0 <= offset < region.size:
                start = region.skipped + offset
                if length > region.size - offset or user_address % alignment or start % alignment:
                    return None
                self._touch(region, start, length)
                view = memoryview(region.map)[start : start + length]
                return region.guest_address + offset, view
        return None

    def _touch(self, region: _Region, start: int, length: int) -> None:
        """Count what an access costs in page tables, and free those of all regions in time.

        Once memory was lost, nothing in it counts, and all of it becomes zeros.
        """
        first = region.start + start
        self._touched.update(
            range(
                first >> limits.TOUCHED_AREA_BITS,
                (first + length - 1 >> limits.TOUCHED_AREA_BITS) + 1,
            )
        )
        if len(self._touched) >= self._max_touched:
            self._touched.clear()
            for mapped in self._regions:
                if self._lost:
                    _lose(mapped.start, mapped.length)
                else:
                    _renew(mapped)
