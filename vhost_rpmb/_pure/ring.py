# SPDX-License-Identifier: Apache-2.0
"""The interface of a ring format, and the checks of descriptor chains that all formats share.

A format (`vhost_rpmb._pure.split`) knows where descriptors, indices and flags are in guest memory.
The virtqueue calls it, in this order: map, look, take ..., put ..., publish, ask_for_kick or
refuse_kicks, wants_notification, changed, unmap. The device sees neither: it returns a chain by the
token that the format gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vhost_rpmb._pure.memory import GuestMemory, GuestMemoryError
from vhost_rpmb.virtio import limits, rules
from vhost_rpmb.virtio import spec as virtio

__all__ = ["Ring"]

_MAX_CHAIN_BYTES = 1 << 32


@dataclass(slots=True)
class Chain:
    """One descriptor chain: its buffers, or the number of the chain rule that it breaks.

    ``token`` is the format's name of it, for put() and take_back(). ``readable`` and ``writable``
    are lists of (guest physical address, length in bytes), ``length`` is their sum.
    """

    token: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0
    fault: int | None = None


class BrokenChainError(Exception):
    """A descriptor chain breaks the rule with this number in rules.CHAIN_RULES."""

    def __init__(self, rule: int) -> None:
        super().__init__(rules.CHAIN_RULES[rule])
        self.rule = rule


class BrokenRingError(Exception):
    """A ring breaks the rule with this number in rules.RING_RULES."""

    def __init__(self, rule: int) -> None:
        super().__init__(rules.RING_RULES[rule])
        self.rule = rule


class Ring:
    """A ring of ``size`` descriptors in guest memory, with its negotiated features.

    ``addresses`` are the user addresses of its three parts. ``marked`` is the guest address at
    which the dirty log has the used ring, of a packed ring any; None: the ring is not marked.
    ``region`` has the record of the chains in flight, if there is one; set_base() ends it.
    ``walked`` counts the descriptors since the last look().
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.size = 0
        self.addresses = (0, 0, 0)
        self.marked: int | None = None
        self.indirect = False
        self.event_index = False
        self.region: GuestMemory | None = None
        self.walked = 0
        self._crossings = 0

    # A format implements these.

    @property
    def base(self) -> int:
        """The position of the next chain: the 32 bits of GET_VRING_BASE."""
        raise NotImplementedError

    def set_base(self, base: int) -> None:
        """Set the position of the next chain: the 32 bits of SET_VRING_BASE; ValueError."""
        raise NotImplementedError

    @property
    def used(self) -> int:
        """The used position; of a ring that was not served yet from its memory, if it is there."""
        raise NotImplementedError

    def map(self) -> None:
        """Find the parts in guest memory; BrokenRingError where a part breaks a rule."""
        raise NotImplementedError

    def unmap(self) -> None:
        """Release guest memory, so that the front-end can remove it."""
        raise NotImplementedError

    @property
    def mapped(self) -> bool:
        """Whether the parts are mapped."""
        raise NotImplementedError

    def look(self) -> int:
        """Begin a batch: return how many chains are available at most; BrokenRingError."""
        raise NotImplementedError

    def take(self) -> Chain | None:
        """Take the next available chain; None if there is none, BrokenRingError."""
        raise NotImplementedError

    def mark(self) -> None:
        """Mark all that the device ever writes to the ring, which is mapped."""
        raise NotImplementedError

    def take_back(self, token: int) -> None:
        """Make the chain that was taken last the next one to be taken."""
        raise NotImplementedError

    def put(self, token: int, length: int) -> None:
        """Return a chain, ``length`` bytes of which were written; visible after publish()."""
        raise NotImplementedError

    def position(self) -> int:
        """Return the used position after publish()."""
        raise NotImplementedError

    def publish(self) -> None:
        """Make the chains that were put visible to the driver."""
        raise NotImplementedError

    def ask_for_kick(self) -> None:
        """Ask for an available buffer notification for the next chain."""
        raise NotImplementedError

    def wants_notification(self) -> bool:
        """Tell whether the driver asked to be notified of the chains published last."""
        raise NotImplementedError

    def changed(self) -> bool:
        """Look again: tell whether there are chains that were not taken."""
        raise NotImplementedError

    # Shared by the formats.

    def _find_parts(
        self, wanted: Sequence[tuple[int, int, int]]
    ) -> tuple[list[int], list[memoryview]]:
        """Return guest addresses and memory of the parts, each with its rule, length and alignment.

        BrokenRingError, with nothing held, where a part breaks its rule.
        """
        places: list[int] = []
        parts: list[memoryview] = []
        for address, (rule, length, alignment) in zip(self.addresses, wanted, strict=True):
            found = self.memory._ring_part(address, length, alignment)
            if found is None:
                for part in parts:
                    part.release()
                raise BrokenRingError(rule)
            places.append(found[0])
            parts.append(found[1])
        return places, parts

    # The checks of chains.

    def _check_table(self, address: int, length: int, flags: int, nested: bool) -> None:
        """Check the descriptor of an indirect table; ``nested``: it is in such a table itself."""
        if not self.indirect:
            raise BrokenChainError(rules.CHAIN_INDIRECT_FEATURE)
        if nested or flags & virtio.VIRTQ_DESC_F_NEXT:
            raise BrokenChainError(rules.CHAIN_INDIRECT_FLAGS)
        if not length or length % virtio.VIRTQ_DESC_SIZE:
            raise BrokenChainError(rules.CHAIN_INDIRECT_LENGTH)
        if length // virtio.VIRTQ_DESC_SIZE > self.size:
            raise BrokenChainError(rules.CHAIN_INDIRECT_SIZE)
        self._check_buffer(address, length, rules.CHAIN_INDIRECT_TABLE)

    def _add(self, chain: Chain, address: int, length: int, writable: bool) -> None:
        """Check the next descriptor of a chain and append its buffer."""
        if len(chain.readable) + len(chain.writable) >= self.size:
            raise BrokenChainError(rules.CHAIN_TOO_LONG)
        if not length:
            raise BrokenChainError(rules.CHAIN_EMPTY_DESCRIPTOR)
        chain.length += length
        if chain.length > _MAX_CHAIN_BYTES:
            raise BrokenChainError(rules.CHAIN_BYTES)
        if writable:
            chain.writable.append((address, length))
        elif chain.writable:
            raise BrokenChainError(rules.CHAIN_ORDER)
        else:
            chain.readable.append((address, length))
        self._check_buffer(address, length, rules.CHAIN_BUFFER)

    def _check_buffer(self, address: int, length: int, outside: int) -> None:
        """Check that a buffer is in the regions, with few enough borders in the chain so far.

        ``outside``: the rule that the chain breaks where the buffer is not.
        """
        try:
            for _, _, count in self.memory._spans(address, length):
                length -= count
                if length:
                    self.walked += 1
                    self._crossings += 1
                    if self._crossings > limits.MAX_CROSSINGS:
                        raise BrokenChainError(rules.CHAIN_CROSSINGS)
        except GuestMemoryError:
            raise BrokenChainError(outside) from None
