# SPDX-License-Identifier: Apache-2.0
"""A batch: chains taken out of guest memory, the staged state, and the answers of the chains.

Nothing here knows a request type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vhost_rpmb._pure.mac import Authenticator
from vhost_rpmb._pure.memory import GuestMemory
from vhost_rpmb._pure.virtqueue import Virtqueue
from vhost_rpmb.rpmb import limits, spec
from vhost_rpmb.rpmb.frame import cut
from vhost_rpmb.rpmb.replay import Replay

if TYPE_CHECKING:
    from vhost_rpmb.storage.interface import DeviceStore

__all__ = ["Batch", "View"]


class Register(NamedTuple):
    """The result register: the content of the answer to RESULT_READ."""

    req_resp: int
    result: int
    address: int = 0
    write_counter: int = 0


class Work(NamedTuple):
    """One chain of a batch, copied: its frames (None: not whole frames) and its room in frames.

    ``length``: of its request, in bytes.
    """

    token: int
    writable: list[tuple[int, int]]
    length: int
    frames: list[bytes] | None
    room: int
    broken: bool


class Batch:
    """The chains that one call of process() serves."""

    def __init__(self) -> None:
        self.work: list[Work] = []

    def take(self, queue: Virtqueue) -> bool:
        """Copy the available chains out of guest memory, up to the limit of a batch.

        Return whether nothing is left.
        """
        self.work = []
        frames = 0
        for _ in range(queue._open()):
            if frames >= limits.MAX_BATCH_FRAMES or queue._walked() >= limits.MAX_BATCH_DESCRIPTORS:
                return False
            chain = queue._take()
            if chain is None:
                break
            length = sum(length for _, length in chain.readable)
            room = sum(length for _, length in chain.writable) // spec.FRAME_SIZE
            room = min(room, limits.MAX_RESPONSE_FRAMES)
            request: list[bytes] | None = None
            whole = length % spec.FRAME_SIZE == 0
            if whole and 0 < length <= limits.MAX_REQUEST_FRAMES * spec.FRAME_SIZE:
                request = _gather(queue._memory, chain.readable)
            frames += room + len(request or ())
            broken = chain.fault is not None
            self.work.append(Work(chain.token, chain.writable, length, request, room, broken))
        return True

    def answer(self, queue: Virtqueue, answers: list[bytes]) -> None:
        """Write the answers of all chains into guest memory, then return the chains."""
        for work, answer in zip(self.work, answers, strict=True):
            _scatter(queue._memory, work.writable, answer)
        for work, answer in zip(self.work, answers, strict=True):
            queue._put(work.token, len(answer))


def _gather(memory: GuestMemory, readable: list[tuple[int, int]]) -> list[bytes]:
    """Copy the frames of a request."""
    return cut(b"".join(memory.read(*buffer) for buffer in readable))


def _scatter(memory: GuestMemory, writable: list[tuple[int, int]], answer: bytes) -> None:
    """Write an answer into the device-writable buffers of its chain."""
    done = 0
    for address, length in writable:
        if done >= len(answer):
            return
        memory._put(address, answer[done : done + length])
        done += length


class View:
    """The state that a batch sees: the durable one, and the changes that the batch has staged.

    Not ``writable``: nothing can be made durable, so writes that would be done fail.
    """

    def __init__(
        self,
        store: DeviceStore,
        authenticator: Authenticator | None,
        register: Register | None,
        writable: bool,
    ) -> None:
        self._store = store
        self._new_key: bytes | None = None
        self._blocks: dict[int, bytes] = {}
        self.accepted: list[bytes] = []  # writes answered OK, as in `Replay.writes`
        self.key_accepted = False
        self.authenticator = authenticator
        self.register = register
        self.counter = store.counter
        self.writable = writable
        self.wrote = False

    def program(self, key: bytes) -> None:
        """Stage a key."""
        self._new_key = key
        self.authenticator = Authenticator(key)
        self.key_accepted = True
        self.wrote = True

    def write(self, address: int, blocks: list[bytes]) -> None:
        """Stage the blocks of one write request."""
        self._blocks.update(enumerate(blocks, address))
        self.counter += 1
        self.wrote = True

    def read(self, address: int) -> bytes | None:
        """Return one block, or None if it is not what was stored."""
        staged = self._blocks.get(address)
        if staged is not None:
            return staged
        if self._store.damaged[address]:
            return None
        start = address * spec.BLOCK_SIZE
        return bytes(self._store.image[start : start + spec.BLOCK_SIZE])

    def commit(self, replay: Replay) -> bool:
        """Make the staged changes durable; False if the store cannot."""
        return self._store.commit(self.counter, list(self._blocks.items()), self._new_key, replay)
