# SPDX-License-Identifier: Apache-2.0
"""A position in a packed ring (virtio specification, "Driver and Device Ring Wrap Counters")."""

from __future__ import annotations

from vhost_rpmb.typed import NamedTuple
from vhost_rpmb.virtio import spec

__all__ = ["AVAILABLE_OR_USED", "Position"]

AVAILABLE_OR_USED = spec.VIRTQ_DESC_F_AVAIL | spec.VIRTQ_DESC_F_USED


class Position(NamedTuple):
    """A slot of the ring, and the wrap counter of its lap."""

    slot: int
    wrap: int

    @classmethod
    def unpack(cls, value: int) -> Position:
        """From the 16 bits of a vring base or an event area."""
        return cls(value & 0x7FFF, value >> 15)

    def pack(self) -> int:
        """As the 16 bits of a vring base or an event area."""
        return self.slot | self.wrap << 15

    def advanced(self, count: int, size: int) -> Position:
        """The position `count` slots later, at most a lap."""
        slot = self.slot + count
        return Position(slot - size, self.wrap ^ 1) if slot >= size else Position(slot, self.wrap)

    def moved_back(self, count: int, size: int) -> Position:
        """The position `count` slots earlier, at most a lap."""
        slot = self.slot - count
        return Position(slot + size, self.wrap ^ 1) if slot < 0 else Position(slot, self.wrap)

    @property
    def available(self) -> int:
        """The flags, of AVAILABLE_OR_USED, of a slot that is available in this lap."""
        return spec.VIRTQ_DESC_F_AVAIL if self.wrap else spec.VIRTQ_DESC_F_USED

    @property
    def used(self) -> int:
        """The flags, of AVAILABLE_OR_USED, of a slot that is used in this lap."""
        return AVAILABLE_OR_USED if self.wrap else 0
