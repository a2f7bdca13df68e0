# SPDX-License-Identifier: Apache-2.0
"""The record of one split ring in an in-flight region (vhost-user, "Inflight I/O tracking").

The region outlives the process. A killed process leaves its stores in program order, so that order
is all that counts: see `vhost_rpmb.vhost_user.inflight`, which reads the region after a start. The
engine only writes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vhost_rpmb._pure.memory import GuestMemory

__all__ = ["Inflight"]

_HEADER = 16  # bytes
_ENTRY = 16  # bytes of each descriptor
# Positions in units of the field's size: of the header, and of the entry of descriptor 0.
_LAST_BATCH_HEAD, _USED_INDEX = 6, 7
_TAKEN, _NEXT, _COUNTER = 16, 11, 3


class Inflight:
    """The record of a ring of ``size`` descriptors at ``offset`` of the region ``memory``.

    ``last``: the head that the record names as the last one answered. ``heads``: those to be served
    again, in this order, before any other.
    """

    def __init__(
        self, memory: GuestMemory, offset: int, size: int, last: int, heads: Sequence[int]
    ) -> None:
        self.memory = memory
        self._offset = offset
        self._length = _HEADER + _ENTRY * size
        self._last = last
        self._counter = len(heads)  # those have the numbers below
        self._again = deque(heads)
        self._answered: list[int] = []

    def map(self) -> None:
        """Find the record in the region, whose memory is mapped."""
        found = self.memory._ring_part(self._offset, self._length, 8)
        assert found is not None
        self._bytes = found[1]
        self._halves = self._bytes.cast("H")
        self._words = self._bytes.cast("Q")

    def unmap(self) -> None:
        """Release the region."""
        self._words.release()
        self._halves.release()
        self._bytes.release()

    @property
    def waiting(self) -> int:
        """The number of heads that are still to be served again."""
        return len(self._again)

    def take_again(self) -> int:
        """Return the next head to be served again; the region has it in flight already."""
        return self._again.popleft()

    def take_back(self, head: int) -> None:
        """Serve a chain that was taken again, before all others; it stays in flight."""
        self._again.appendleft(head)

    def take(self, head: int) -> None:
        """Record that a chain is in flight."""
        self._words[_COUNTER + _ENTRY // 8 * head] = self._counter
        self._counter += 1
        self._bytes[_TAKEN + _ENTRY * head] = 1

    def put(self, head: int) -> None:
        """Record a chain of the batch that is published next."""
        self._halves[_NEXT + _ENTRY // 2 * head] = self._last
        self._halves[_LAST_BATCH_HEAD] = head
        self._last = head
        self._answered.append(head)

    def published(self, used_index: int) -> None:
        """Record that the batch is published, after the used index was stored."""
        for head in self._answered:
            self._bytes[_TAKEN + _ENTRY * head] = 0
        self._answered.clear()
        self._halves[_USED_INDEX] = used_index
