# SPDX-License-Identifier: Apache-2.0
"""The in-flight record of a packed ring: bytes to the state that a ring continues from.

The layout is that of the vhost-user text, in the byte order of the machine:

    0 u64 features (0), 8 u16 version (0: fresh, 1), 10 u16 desc_num, 12 u16 free_head,
    14 u16 old_free_head, 16 u16 used_idx, 18 u16 old_used_idx, 20 u8 used_wrap_counter,
    21 u8 old_used_wrap_counter, then from 32 on for each descriptor 32 bytes:
    0 u8 inflight, 2 u16 next, 4 u16 last, 6 u16 num, 8 u64 counter,
    16 u16 id, 18 u16 flags, 20 u32 len, 24 u64 addr

The ring's descriptors are overwritten by answers, so that the record has copies. Its entries are a
free list from free_head on, which ends at desc_num, and the entries of each chain in flight. The
order of an engine's stores (`vhost_rpmb._pure.inflight`), of which a killed process leaves the
first ones:

- Taking a chain, whose first entry is the head of the free list: num = 0, its counter, inflight
  = 1; for each descriptor its copy, num, free_head = next; last; then old_free_head = free_head.
- Publishing a batch: for each chain next of its last entry = free_head, free_head = its first
  entry, used_idx and used_wrap_counter; the used descriptors of the ring, the flags of the first
  one at the end; inflight = 0 for each chain; old_free_head; then old_used_idx and
  old_used_wrap_counter, by one store of the 8 bytes at 16 (as two stores, one of them would let a
  descriptor of the next lap pass for one that was not used).

So where used and old_used differ, the ring's descriptor at old_used_idx tells whether the driver
has seen the batch.

Unlike a split ring, a packed one does not say in guest memory where it continues. So a record that
is not fresh wins over SET_VRING_BASE, which after a crash is an old value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple
from vhost_rpmb.vhost_user.inflight import (
    VERSION,
    InvalidRecordError,
    Record,
    check_header,
    check_marks,
)
from vhost_rpmb.virtio.position import AVAILABLE_OR_USED, Position

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import Virtqueue

__all__ = ["PackedRecovery", "initial", "recover", "resume"]

# features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, and both wraps
_HEADER = struct.Struct("=QHHHHHHBB10x")
_ENTRY = struct.Struct("=BxHHHQ")  # inflight, next, last, num, counter; then the copy
_COPY = struct.Struct("=HHIQ")  # id, flags, len, addr
_DESCRIPTOR = struct.Struct("<QIHH")  # in the ring: addr, len, id, flags
_SIZE = _ENTRY.size + _COPY.size
_FREE_HEADS = struct.Struct("=HH")
_FREE_HEADS_AT = 12
_USED = struct.Struct("=HHBB2x")
_USED_AT = 16
_VERSION = struct.Struct("=H")
_VERSION_AT = 8
_COUNTER = struct.Struct("=Q")
_COUNTER_AT = 8


class PackedRecovery(NamedTuple):
    """The state of a ring that follows from its record.

    ``heads``: the first entries of the chains that are to be served again, in order, from
    ``used`` to ``available`` in the ring. ``slots`` (number and descriptor) are written back into
    the ring first, ``stores`` (offset and bytes) into the record then, each in this order.
    """

    used: Position
    available: Position
    heads: tuple[int, ...]
    slots: tuple[tuple[int, bytes], ...]
    stores: tuple[tuple[int, bytes], ...]


class _Chain(NamedTuple):
    counter: int
    head: int
    copies: list[bytes]


def initial(size: int, used: Position) -> bytes:
    """Return the record of a ring of `size` descriptors with nothing in flight."""
    header = _HEADER.pack(0, VERSION, size, 0, 0, used.slot, used.slot, used.wrap, used.wrap)
    entries = (_ENTRY.pack(0, number + 1, 0, 0, 0).ljust(_SIZE, b"\0") for number in range(size))
    return header + b"".join(entries)


def recover(record: bytes, size: int, flags_of: Callable[[int], int]) -> PackedRecovery:
    """Return the state of a ring of `size` descriptors that its record describes.

    ``flags_of`` returns the flags of a descriptor in the ring. InvalidRecordError if the record
    breaks a rule; nothing was changed then. An interruption at any of the stores that it returns
    leaves a record from which the same state follows.
    """
    features, version, count, free, old_free, slot, old_slot, wrap, old_wrap = _HEADER.unpack_from(
        record
    )
    check_header(features, version, count, size)
    if max(slot, old_slot) >= size or max(wrap, old_wrap) > 1:
        raise InvalidRecordError(
            f"expected used slots below {size} and wrap counters 0 or 1, found {slot} and "
            f"{old_slot}, {wrap} and {old_wrap}"
        )
    new, used = Position(slot, wrap), Position(old_slot, old_wrap)
    undone = new != used and flags_of(used.slot) & AVAILABLE_OR_USED == used.available
    if new == used or undone:
        free = old_free  # a chain that was half taken, or a batch that was not published
    else:
        used = new
    entries = [_ENTRY.unpack_from(record, _place(number)) for number in range(size)]
    check_marks({entry[0] for entry in entries})
    free_list = _walk([entry[1] for entry in entries], free)
    chains = _chains(record, entries, set(free_list))
    slots = []
    available = used
    for chain in chains:
        for copy in chain.copies:
            slots.append((available.slot, copy))
            available = available.advanced(1, size)
    stores = [(_place(number), b"\0") for number in free_list if entries[number][0]]
    stores.append((_FREE_HEADS_AT, _FREE_HEADS.pack(free, free)))
    stores.append((_USED_AT, _USED.pack(used.slot, used.slot, used.wrap, used.wrap)))
    # From 0 on, so that no counter ever reaches its end; each one shrinks or stays.
    stores += [
        (_place(chain.head) + _COUNTER_AT, _COUNTER.pack(counter))
        for counter, chain in enumerate(chains)
    ]
    return PackedRecovery(
        used=used,
        available=available,
        heads=tuple(chain.head for chain in chains),
        # Behind the first, the dead process may have written used descriptors already.
        slots=tuple(reversed(slots)) if undone else (),
        stores=tuple(stores),
    )


def resume(queue: Virtqueue, record: Record, size: int) -> None:
    """Continue a packed ring whose parts are there where its record says, and keep the record.

    A fresh record begins at the ring's base. InvalidRecordError changes nothing. May be interrupted
    at any store.
    """
    record.check_size(size)
    content = record.read(_place(size))
    if not _VERSION.unpack_from(content, _VERSION_AT)[0]:
        content = initial(size, Position.unpack(queue.base >> 16))
        rest = _VERSION_AT + _VERSION.size
        record.store(rest, content[rest:])
        record.store(0, content[:rest])  # with its version at the end
    found = recover(content, size, lambda slot: _DESCRIPTOR.unpack(queue.read_slot(slot))[3])
    for slot, descriptor in found.slots:
        queue.write_slot(slot, descriptor)
    recovered = bytearray(content)
    for offset, data in found.stores:
        record.store(offset, data)
        recovered[offset : offset + len(data)] = data
    queue.set_base(queue.base)  # a broken ring works again
    queue.resume_packed(record.memory, record.offset, bytes(recovered), found.heads)


def _walk(following: list[int], number: int) -> list[int]:
    """The free list; its end is the number of all entries."""
    found: dict[int, None] = {}
    while number != len(following):
        if number > len(following):
            raise InvalidRecordError(f"expected an entry below {len(following)}, found {number}")
        if number in found:
            raise InvalidRecordError(f"expected a free list, found a loop at {number}")
        found[number] = None
        number = following[number]
    return list(found)


def _chains(record: bytes, entries: list[tuple[int, ...]], free: set[int]) -> list[_Chain]:
    """The chains in flight, in order; with the free list they have each entry once."""
    chains = []
    seen = set(free)
    for head, (mark, _, last, num, counter) in enumerate(entries):
        if not mark or head in free:
            continue
        if not 0 < num <= len(entries):
            raise InvalidRecordError(f"expected a chain of 1 to {len(entries)}, found {num}")
        copies = []
        number = head
        for left in reversed(range(num)):
            if number >= len(entries) or number in seen:
                raise InvalidRecordError(f"expected an entry of one chain, found {number}")
            seen.add(number)
            identity, flags, length, address = _COPY.unpack_from(
                record, _place(number) + _ENTRY.size
            )
            copies.append(_DESCRIPTOR.pack(address, length, identity, flags))
            if not left and number != last:
                raise InvalidRecordError(f"expected a chain that ends at {last}, found {number}")
            number = entries[number][1]
        chains.append(_Chain(counter, head, copies))
    if len(seen) != len(entries):
        raise InvalidRecordError(
            f"expected {len(entries)} entries in use or free, found {len(seen)}"
        )
    if len({chain.counter for chain in chains}) < len(chains):
        raise InvalidRecordError("expected different counters, found two that are equal")
    return sorted(chains)


def _place(number: int) -> int:
    return _HEADER.size + number * _SIZE
