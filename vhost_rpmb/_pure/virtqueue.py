# SPDX-License-Identifier: Apache-2.0
"""A virtqueue of any ring format: its settings, faults and error state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from vhost_rpmb._pure.barrier import full_barrier
from vhost_rpmb._pure.inflight import Inflight, PackedInflight
from vhost_rpmb._pure.memory import GuestMemory
from vhost_rpmb._pure.packed import PackedRing
from vhost_rpmb._pure.ring import BrokenRingError, Chain, Ring
from vhost_rpmb._pure.split import SplitRing
from vhost_rpmb.virtio import limits, rules
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN, FAULTS, MORE, NOTIFY, Unanswered

__all__ = ["Virtqueue"]


class Virtqueue:
    """One virtqueue as its device sees it.

    ``error`` is empty, or the reason why the ring is broken: nothing is processed then until
    set_base() or reset().
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """Reset everything but the guest memory: the state of a new queue."""
        self._ring: Ring = SplitRing(self._memory)
        self._packed = False
        self._faults: Counter[int] = Counter()
        self._rule = rules.RING_OK

    def set_size(self, size: int) -> None:
        """Set the number of descriptors; ValueError unless from 1 to 32768.

        A split ring takes a power of two: another size breaks it when it starts.
        """
        if not 0 < size <= virtio.VIRTQ_MAX_SIZE:
            raise ValueError(f"a queue size is a number from 1 to 32768, not {size}")
        if size != self._ring.size:
            base = self._ring.base
            self._ring.size = size
            self._ring.set_base(base)  # without the record of a ring of another size

    def set_addresses(self, descriptor_table: int, available_ring: int, used_ring: int) -> None:
        """Set the user addresses of the three parts; the next batch checks them."""
        self._ring.addresses = (descriptor_table, available_ring, used_ring)

    def mark_ring(self, address: int | None) -> None:
        """Mark what is written to the ring in the dirty log, the used ring at a guest address.

        None: do not. ValueError for an address that no log reaches.
        """
        if address is not None and address >= limits.LOG_ADDRESS_END:
            raise ValueError(f"expected a log address that a log reaches, found 0x{address:x}")
        self._ring.marked = address

    def mark_written(self) -> None:
        """Mark all that may have been written to the ring by a process that did not mark it."""
        try:
            self._ring.map()
        except BrokenRingError:
            return
        self._ring.mark()
        self._ring.unmap()

    def set_base(self, base: int) -> None:
        """Set the position to continue at, as SET_VRING_BASE has it; a broken queue works again.

        ValueError unless it has at most 32 bits, of a split ring 16.
        """
        if not 0 <= base <= 0xFFFF_FFFF:
            raise ValueError(f"a vring base has 32 bits, {base} has more")
        self._ring.set_base(base)
        self._rule = rules.RING_OK

    def set_features(self, features: int) -> None:
        """Set the negotiated virtio feature bits; another ring format begins a new ring."""
        packed = bool(features >> virtio.VIRTIO_F_RING_PACKED & 1)
        if packed != self._packed:
            before, self._packed = self._ring, packed
            self._ring = PackedRing(self._memory) if packed else SplitRing(self._memory)
            self._ring.size, self._ring.addresses = before.size, before.addresses
            self._ring.marked = before.marked
        self._ring.indirect = bool(features >> virtio.VIRTIO_F_INDIRECT_DESC & 1)
        self._ring.event_index = bool(features >> virtio.VIRTIO_F_EVENT_IDX & 1)

    @property
    def packed(self) -> bool:
        """Whether the ring is a packed one."""
        return self._packed

    @property
    def base(self) -> int:
        """The position that the next batch begins at, as GET_VRING_BASE has it."""
        return self._ring.base

    @property
    def used(self) -> int | None:
        """The used position, of a ring that was not served yet from its memory.

        None if a part of it is not there.
        """
        try:
            self._ring.map()
        except BrokenRingError:
            return None
        used = self._ring.used
        self._ring.unmap()
        return None if self._memory._lost else used

    @property
    def error(self) -> str:
        """The reason why the ring is broken; empty while it is not."""
        return rules.RING_RULES[self._rule]

    def take_faults(self) -> dict[str, int]:
        """Return how often each rule was broken by a chain since the last call."""
        faults = {rules.CHAIN_RULES[rule]: count for rule, count in sorted(self._faults.items())}
        self._faults.clear()
        return faults

    def resume(
        self, used_index: int, region: GuestMemory, offset: int, last: int, heads: Sequence[int]
    ) -> None:
        """Continue a split ring at a used index, after set_base(), and record what is in flight.

        The record is at ``offset`` of ``region`` (`vhost_rpmb.vhost_user.inflight`), which stays
        mapped until set_base() or reset(). ``heads`` are served again, before all others.
        """
        assert isinstance(self._ring, SplitRing)
        inflight = Inflight(region, offset, self._ring.size, last, heads)
        self._ring.resume(used_index, inflight)

    def resume_packed(
        self, region: GuestMemory, offset: int, record: bytes, heads: Sequence[int]
    ) -> None:
        """Continue a packed ring where its record says, after set_base(), and keep the record.

        It is at ``offset`` of ``region`` (`vhost_rpmb.vhost_user.inflight_packed`), which stays
        mapped until set_base() or reset(). ``record`` is its content, checked; the chains that
        begin at the entries ``heads`` are served again, before all others.
        """
        assert isinstance(self._ring, PackedRing)
        self._ring.resume(PackedInflight(region, offset, self._ring.size, record, heads))

    def read_slot(self, slot: int) -> bytes:
        """Return the descriptor of a slot of a packed ring, all of whose memory is there."""
        assert isinstance(self._ring, PackedRing)
        self._ring.map()
        descriptor = self._ring.read_slot(slot)
        self._ring.unmap()
        return descriptor

    def write_slot(self, slot: int, descriptor: bytes) -> None:
        """Store the descriptor of a slot of a packed ring, all of whose memory is there."""
        assert isinstance(self._ring, PackedRing)
        self._ring.map()
        self._ring.write_slot(slot, descriptor)
        self._ring.unmap()

    def answer_chains(
        self,
        answer: Callable[[bytes, int], bytes | Unanswered],
        max_bytes: int,
        max_chains: int,
    ) -> int:
        """Answer up to ``max_chains`` available chains in order; return the flags of the batch.

        The whole process() of a device that handles one request after the other, without knowing
        engine or ring format. ``answer`` gets the device-readable bytes of a chain and the length
        of its device-writable buffers, each cut to ``max_bytes``, and returns the bytes to write
        there, no more than that length, or `Unanswered`; it does not raise. A broken chain is
        returned unanswered.
        """
        available = self._open()
        drained = available <= max_chains
        for _ in range(min(available, max_chains)):
            chain = self._take()
            if chain is None:
                drained = True
                break
            request = self._gather(chain.readable, max_bytes)
            if self._memory_lost():
                break  # the copied bytes may be invalid
            written: bytes | Unanswered = b""
            if chain.fault is None:
                room = sum(length for _, length in chain.writable)
                written = answer(request, min(room, max_bytes))
            if written is Unanswered.LATER:
                self._ring.take_back(chain.token)
                break
            if isinstance(written, Unanswered):
                continue
            self._scatter(chain.writable, written)
            self._put(chain.token, len(written))
        return self._close(drained)

    def _gather(self, readable: list[tuple[int, int]], max_bytes: int) -> bytes:
        """Copy the first ``max_bytes`` bytes of buffers."""
        data = bytearray()
        for address, length in readable:
            if len(data) == max_bytes:
                break
            data += self._memory.read(address, min(length, max_bytes - len(data)))
        return bytes(data)

    def _scatter(self, writable: list[tuple[int, int]], data: bytes) -> None:
        """Write ``data`` into buffers."""
        done = 0
        for address, length in writable:
            if done >= len(data):
                break
            self._memory._put(address, data[done : done + length])
            done += length

    def _memory_lost(self) -> bool:
        """Tell whether earlier reads may be invalid, and break the ring then."""
        if self._memory._lost:
            rule = rules.RING_MEMORY_LOST
        elif self._ring.region is not None and self._ring.region._lost:
            rule = rules.RING_INFLIGHT_LOST
        else:
            return False
        self._rule = self._rule or rule
        return True

    # For the loop of this engine.

    def _arm(self) -> bool:
        """Ask for a kick for the next chain; tell whether there is something to process already.

        A broken ring is something to process.
        """
        if self._rule:
            return True
        try:
            self._ring.map()
        except BrokenRingError:
            return True  # the next batch records the rule
        self._ring.ask_for_kick()
        full_barrier()
        changed = self._ring.changed()
        self._ring.unmap()
        return changed or self._memory._lost

    # For the device of this engine, in this order: _open, _take ..., _put ..., _close.

    def _open(self) -> int:
        """Look at the ring and return how many chains are available at most; 0 if it is broken.

        Guest memory may have moved since the last batch, so the ring is mapped anew.
        """
        if self._rule:
            return 0
        try:
            self._ring.map()
        except BrokenRingError as broken:
            self._rule = broken.rule
            return 0
        try:
            available = self._ring.look()
        except BrokenRingError as broken:
            self._break(broken.rule)
            return 0
        return 0 if self._memory_lost() else available

    def _take(self) -> Chain | None:
        """Take the next available chain; None if there is none, or if the ring is broken."""
        try:
            chain = self._ring.take()
        except BrokenRingError as broken:
            self._break(broken.rule)
            return None
        if chain is not None and chain.fault is not None:
            self._faults[chain.fault] += 1
        return chain

    def _walked(self) -> int:
        """Return how many descriptors the batch has cost so far."""
        return self._ring.walked

    def _put(self, token: int, length: int) -> None:
        """Return a chain, ``length`` bytes of which were written; visible after _close()."""
        self._ring.put(token, length)

    def _position(self) -> int:
        """Return the used position after what was put."""
        return self._ring.position()

    def _close(self, drained: bool) -> int:
        """Publish what was put; return the flags for the caller.

        ``drained``: everything available was taken, so the driver shall kick for the next chain.
        """
        flags = 0
        self._memory._mark_noted()  # a process that is killed has marked what it published
        if self._ring.mapped and not self._memory_lost():
            self._ring.publish()
            if drained and not self._rule:
                self._ring.ask_for_kick()
            full_barrier()
            if self._ring.wants_notification():
                flags |= NOTIFY
            if self._ring.changed():
                flags |= MORE
        self._ring.unmap()
        if self._faults:
            flags |= FAULTS
        self._memory_lost()
        if self._rule:
            flags = (flags & ~MORE) | BROKEN
        return flags

    def _abandon(self) -> None:
        """Leave a batch without publishing anything, so that guest memory can be unmapped."""
        self._ring.unmap()

    def _break(self, rule: int) -> None:
        """Record a rule that the content of the ring breaks, or that its memory was lost."""
        if not self._memory_lost():
            self._rule = rule
