# SPDX-License-Identifier: Apache-2.0
"""The device side of a split virtqueue (virtio specification, "Split Virtqueues").

The guest may change any byte at any moment, so each is read once: a descriptor is copied, then
checked, then used.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections import Counter
from typing import NamedTuple

from vhost_rpmb._pure.memory import GuestMemory, GuestMemoryError
from vhost_rpmb.virtio import limits, rules
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN, FAULTS, MORE, NOTIFY

__all__ = ["Virtqueue"]

_DESCRIPTOR = struct.Struct("<QIHH")  # addr, len, flags, next
_USED_ELEMENT = struct.Struct("<II")  # id, len
_MAX_CHAIN_BYTES = 1 << 32
_LOCK = threading.Lock()


def _full_barrier() -> None:
    """Order all loads and stores before against all after it, as the driver sees them.

    Taking a lock is an atomic acquire, giving it back an atomic release, and each is a full barrier
    on x86-64. On processors that order less, what stands before may still move behind the acquire,
    and what follows ahead of the release; but no acquire overtakes an earlier release, so a second
    round keeps the two apart.
    """
    for _ in range(2):
        with _LOCK:
            pass


class _Index:
    """A 16-bit little-endian field that both sides use at once, read and written in one access.

    A memoryview of format H moves its two bytes by one load or store; struct's "<H" does not.
    """

    def __init__(self, view: memoryview, offset: int) -> None:
        self._cell = view[offset : offset + 2].cast("H")

    def load(self) -> int:
        return self._swap(self._cell[0])

    def store(self, value: int) -> None:
        self._cell[0] = self._swap(value)

    def release(self) -> None:
        self._cell.release()

    @staticmethod
    def _swap(value: int) -> int:
        return value if sys.byteorder == "little" else (value & 0xFF) << 8 | value >> 8


class Chain(NamedTuple):
    """One descriptor chain: its head index and buffers, or the rule that it breaks.

    ``readable`` and ``writable`` are lists of (guest physical address, length in bytes).
    """

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    broken: bool = False


class _BrokenChainError(Exception):
    """A descriptor chain breaks the rule with this number in rules.CHAIN_RULES."""

    def __init__(self, rule: int) -> None:
        super().__init__(rules.CHAIN_RULES[rule])
        self.rule = rule


class Virtqueue:
    """One split virtqueue as its device sees it.

    ``error`` is empty, or says why the ring is broken: nothing is processed any more until
    set_base() or reset().
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """Forget everything but the guest memory: the state of a new queue."""
        self._size = 0
        self._addresses = (0, 0, 0)
        self.set_features(0)
        self._watched = False
        self._faults: Counter[int] = Counter()
        self._parts: tuple[memoryview, memoryview, memoryview] | None = None
        self.set_base(0)

    def set_size(self, size: int) -> None:
        """Set the number of descriptors; ValueError unless a power of two from 1 to 32768."""
        if not 0 < size <= virtio.VIRTQ_MAX_SIZE or size & (size - 1):
            raise ValueError(f"a queue size is a power of two from 1 to 32768, not {size}")
        self._size = size

    def set_addresses(self, descriptor_table: int, available_ring: int, used_ring: int) -> None:
        """Set the user addresses of the three parts; the next batch finds out what they hold."""
        self._addresses = (descriptor_table, available_ring, used_ring)

    def set_base(self, index: int) -> None:
        """Set the available index to go on from, 0 to 65535; a broken queue works again."""
        if not 0 <= index <= 0xFFFF:
            raise ValueError(f"an available index has 16 bits, {index} has more")
        self._next_available = index
        self._next_used = 0
        self._started = False
        self._rule = rules.RING_OK

    def set_features(self, features: int) -> None:
        """Set the negotiated virtio feature bits."""
        self._indirect = bool(features >> virtio.VIRTIO_F_INDIRECT_DESC & 1)
        self._event_index = bool(features >> virtio.VIRTIO_F_EVENT_IDX & 1)

    @property
    def base(self) -> int:
        """The available index that the next batch begins at."""
        return self._next_available

    @property
    def error(self) -> str:
        """Why the ring is broken; empty while it is not."""
        return rules.RING_RULES[self._rule]

    def take_faults(self) -> dict[str, int]:
        """Return how often each rule was broken by a chain since the last call."""
        faults = {rules.CHAIN_RULES[rule]: count for rule, count in sorted(self._faults.items())}
        self._faults.clear()
        return faults

    def _memory_lost(self) -> bool:
        """Tell whether what was read so far may be made up, and break the ring then."""
        if not self._memory._lost:
            return False
        if not self._rule:
            self._rule = rules.RING_MEMORY_LOST
        return True

    # For the loop of this engine.

    def _watch(self, watched: bool) -> None:
        """Tell whether somebody watches the available ring, so that no kick is needed."""
        self._watched = watched

    def _peek(self) -> bool:
        """Tell whether there is something to process, be it an error."""
        if not self._rule and not self._map_parts():
            changed = self._available_index.load() != self._next_available
            self._unmap_parts()
            return changed or self._memory._lost
        return True

    def _arm(self) -> bool:
        """Ask for a kick for the next chain; tell whether there is something to process already."""
        if not self._rule and not self._map_parts():
            self._ask_for_kick()
            _full_barrier()
            self._unmap_parts()
        return self._peek()

    # For the device of this engine, in this order: _open, _pop ..., _push ..., _close.

    def _open(self) -> int:
        """Look at the ring and return how many chains are available; 0 and an error if broken.

        What guest memory holds may have moved since the last batch, so the three parts are looked
        up anew.
        """
        self._unpushed = 0
        self._walked = 0
        if self._rule:
            return 0
        rule = self._map_parts()
        if rule:
            return self._break(rule)
        if not self._started:
            self._next_used = self._used_index.load()
            self._started = True
        available = (self._available_index.load() - self._next_available) & 0xFFFF
        if self._memory_lost():
            return 0
        if available > self._size:
            return self._break(rules.RING_AVAILABLE_INDEX)
        _full_barrier()  # the index before the entries and descriptors
        return available

    def _map_parts(self) -> int:
        if not self._size:
            return rules.RING_NO_SIZE
        size = self._size
        wanted = (
            (rules.RING_DESCRIPTOR_TABLE, size * virtio.VIRTQ_DESC_SIZE, 16),
            (rules.RING_AVAILABLE, 6 + 2 * size, 2),
            (rules.RING_USED, 6 + 8 * size, 4),
        )
        parts: list[memoryview] = []
        for address, (rule, length, alignment) in zip(self._addresses, wanted, strict=True):
            part = self._memory._ring_part(address, length, alignment)
            if part is None:
                for earlier in parts:
                    earlier.release()
                return rule
            parts.append(part)
        _, available, used = self._parts = (parts[0], parts[1], parts[2])
        self._available_flags = _Index(available, 0)
        self._available_index = _Index(available, 2)
        self._used_event = _Index(available, 4 + 2 * size)
        self._used_flags = _Index(used, 0)
        self._used_index = _Index(used, 2)
        self._available_event = _Index(used, 4 + 8 * size)
        return rules.RING_OK

    def _unmap_parts(self) -> None:
        """Let go of guest memory, so that the front-end can take it away."""
        if self._parts is None:
            return
        for index in (
            self._available_flags,
            self._available_index,
            self._used_event,
            self._used_flags,
            self._used_index,
            self._available_event,
        ):
            index.release()
        for part in self._parts:
            part.release()
        self._parts = None

    def _break(self, rule: int) -> int:
        self._rule = rule
        return 0

    def _pop(self) -> Chain | None:
        """Take the next available chain; None (and an error) if its head breaks the ring."""
        assert self._parts is not None
        descriptors, available, _ = self._parts
        offset = 4 + 2 * (self._next_available % self._size)
        head = int.from_bytes(available[offset : offset + 2], "little")
        if head >= self._size:
            if not self._memory_lost():
                self._break(rules.RING_HEAD)
            return None
        self._next_available = (self._next_available + 1) & 0xFFFF
        try:
            return self._walk(descriptors, head)
        except _BrokenChainError as broken:
            self._faults[broken.rule] += 1
            return Chain(head, [], [], broken=True)

    def _walk(self, descriptors: memoryview, head: int) -> Chain:
        """Follow a chain through the descriptor table and at most one indirect table."""
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        indirect = False
        table = b""
        index, entries = head, self._size
        count = total = 0
        self._crossings = 0
        while True:
            self._walked += 1
            if indirect:
                raw = table[index * virtio.VIRTQ_DESC_SIZE :][: virtio.VIRTQ_DESC_SIZE]
            else:
                start = index * virtio.VIRTQ_DESC_SIZE
                raw = bytes(descriptors[start : start + virtio.VIRTQ_DESC_SIZE])
            address, length, flags, following = _DESCRIPTOR.unpack(raw)
            if flags & virtio.VIRTQ_DESC_F_INDIRECT:
                if not self._indirect:
                    raise _BrokenChainError(rules.CHAIN_INDIRECT_FEATURE)
                if indirect or flags & virtio.VIRTQ_DESC_F_NEXT:
                    raise _BrokenChainError(rules.CHAIN_INDIRECT_FLAGS)
                if not length or length % virtio.VIRTQ_DESC_SIZE:
                    raise _BrokenChainError(rules.CHAIN_INDIRECT_LENGTH)
                if length // virtio.VIRTQ_DESC_SIZE > self._size:
                    raise _BrokenChainError(rules.CHAIN_INDIRECT_SIZE)
                self._check_buffer(address, length, rules.CHAIN_INDIRECT_TABLE)
                table = self._memory.read(address, length)
                indirect = True
                index, entries = 0, length // virtio.VIRTQ_DESC_SIZE
                continue
            count += 1
            if count > self._size:
                raise _BrokenChainError(rules.CHAIN_TOO_LONG)
            if not length:
                raise _BrokenChainError(rules.CHAIN_EMPTY_DESCRIPTOR)
            total += length
            if total > _MAX_CHAIN_BYTES:
                raise _BrokenChainError(rules.CHAIN_BYTES)
            if flags & virtio.VIRTQ_DESC_F_WRITE:
                writable.append((address, length))
            elif writable:
                raise _BrokenChainError(rules.CHAIN_ORDER)
            else:
                readable.append((address, length))
            self._check_buffer(address, length, rules.CHAIN_BUFFER)
            if not flags & virtio.VIRTQ_DESC_F_NEXT:
                return Chain(head, readable, writable)
            if following >= entries:
                raise _BrokenChainError(rules.CHAIN_NEXT)
            index = following

    def _check_buffer(self, address: int, length: int, outside: int) -> None:
        """Check that a buffer lies in the regions, without too many borders in the chain so far.

        ``outside``: the rule that the chain breaks if the buffer does not.
        """
        try:
            for _, _, count in self._memory._spans(address, length):
                length -= count
                if length:
                    self._walked += 1
                    self._crossings += 1
                    if self._crossings > limits.MAX_CROSSINGS:
                        raise _BrokenChainError(rules.CHAIN_CROSSINGS)
        except GuestMemoryError:
            raise _BrokenChainError(outside) from None

    def _push(self, head: int, length: int) -> None:
        """Return a chain, ``length`` bytes of which were written; visible after _close()."""
        assert self._parts is not None
        slot = (self._next_used + self._unpushed) % self._size
        _USED_ELEMENT.pack_into(self._parts[2], 4 + 8 * slot, head, length)
        self._unpushed += 1

    def _close(self, drained: bool) -> int:
        """Publish what was pushed; return the flags that this asks for.

        ``drained``: everything available was popped, so the driver shall kick for the next chain.
        """
        flags = 0
        if self._parts is not None and not self._memory_lost():
            old = self._next_used
            self._next_used = (old + self._unpushed) & 0xFFFF
            if self._unpushed:
                _full_barrier()  # the elements and the buffers before the index
                self._used_index.store(self._next_used)
            if drained and not self._rule:
                if self._watched:
                    self._refuse_kicks()
                else:
                    self._ask_for_kick()
            _full_barrier()
            if self._unpushed and self._wants_notification(old):
                flags |= NOTIFY
            if self._available_index.load() != self._next_available:
                flags |= MORE
        self._unmap_parts()
        if self._faults:
            flags |= FAULTS
        self._memory_lost()
        if self._rule:
            flags = (flags & ~MORE) | BROKEN
        return flags

    def _ask_for_kick(self) -> None:
        """Ask for an available buffer notification for the next chain."""
        if self._event_index:
            self._available_event.store(self._next_available)
        else:
            self._used_flags.store(0)

    def _refuse_kicks(self) -> None:
        """Ask for none; with the event index, the one before last stays asked for, and is past."""
        if not self._event_index:
            self._used_flags.store(virtio.VIRTQ_USED_F_NO_NOTIFY)

    def _wants_notification(self, old: int) -> bool:
        """Tell whether the driver asked to hear of the step from ``old`` to the used index."""
        if not self._event_index:
            return not self._available_flags.load() & virtio.VIRTQ_AVAIL_F_NO_INTERRUPT
        event = self._used_event.load()
        return (self._next_used - event - 1) & 0xFFFF < (self._next_used - old) & 0xFFFF
