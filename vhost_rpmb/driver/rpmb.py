# SPDX-License-Identifier: Apache-2.0
"""A virtio-rpmb driver and its VMM in one object: `RpmbClient`.

::

    with RpmbClient.connect("/run/rpmb.sock", key) as client:
        client.write(0, bytes(256))
        assert client.read(0, 1) == bytes(256)
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from os import PathLike
from typing import NamedTuple, Self

from vhost_rpmb.driver.errors import BackendError, QueueError
from vhost_rpmb.driver.frontend import PROTOCOL_FEATURES, Frontend
from vhost_rpmb.driver.memory import DEFAULT_REGIONS, GuestMemory
from vhost_rpmb.driver.packed import make_ring
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.rpmb import frame, spec
from vhost_rpmb.rpmb.mac import Authenticator
from vhost_rpmb.vhost_user.wire import MemoryRegion, ProtocolFeature
from vhost_rpmb.virtio import spec as virtio

#: The virtio feature bits that this driver makes use of when the device offers them.
FEATURES = (
    1 << virtio.VIRTIO_F_VERSION_1
    | 1 << virtio.VIRTIO_F_INDIRECT_DESC
    | 1 << virtio.VIRTIO_F_EVENT_IDX
    | 1 << virtio.VIRTIO_F_RING_PACKED
)

_NO_LIMIT = 255  # blocks; the largest limit in the config space, used where a device has none (0)


class Config(NamedTuple):
    """The config space: capacity in units of 128 KiB, the two limits in blocks of 256 bytes."""

    capacity: int
    max_wr_cnt: int
    max_rd_cnt: int

    @property
    def blocks(self) -> int:
        """The capacity in blocks of 256 bytes."""
        return self.capacity * (spec.CAPACITY_UNIT // spec.BLOCK_SIZE)


class _Buffers(NamedTuple):
    readable: list[Segment]
    writable: list[Segment]


class Answer(NamedTuple):
    """The answer to a chain: the token that `RpmbClient.submit` returned, and the bytes."""

    token: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Setup:
    """Feature negotiation and the shape of the chains; the defaults are those of a VM.

    ``features`` and ``protocol_features`` are accepted as far as they are offered. The ring has
    ``queue_size`` descriptors and starts at ``first_index``, of a packed ring a vring base (None:
    at the beginning). A descriptor covers at most ``segment_size`` bytes; None: one descriptor for
    the request, one for the answer.
    """

    features: int = FEATURES
    protocol_features: ProtocolFeature = PROTOCOL_FEATURES
    regions: tuple[MemoryRegion, ...] = DEFAULT_REGIONS
    queue_size: int = 64
    first_index: int | None = None
    segment_size: int | None = None


_DEFAULT_SETUP = Setup()


class RpmbClient:
    """One RPMB device behind a vhost-user socket; a context manager, not thread-safe.

    Addresses and counts are in blocks of 256 bytes. With a ``key`` (32 bytes) every answer has to
    carry its MAC; without one answers are checked for everything else, and `write` is not
    possible. Methods raise BackendError (disconnected, no answer within ``timeout`` seconds),
    QueueError, VerificationError or RpmbResultError; after a BackendError the client is unusable.
    """

    def __init__(
        self,
        frontend: Frontend,
        key: bytes | None = None,
        *,
        timeout: float = 10.0,
        setup: Setup = _DEFAULT_SETUP,
    ) -> None:
        self.frontend = frontend
        self.setup = setup
        self._timeout = timeout
        self._buffers: dict[int, _Buffers] = {}
        with ExitStack() as stack:
            stack.enter_context(frontend)
            self._authenticator = Authenticator(key) if key is not None else None
            self.memory = stack.enter_context(GuestMemory(setup.regions))
            frontend.handshake(setup.protocol_features)
            frontend.start_device(setup.features)
            self.config = Config(*frontend.read_config(spec.RPMB_CONFIG_SIZE))
            if self.config.capacity > spec.MAX_CAPACITY_UNITS:
                raise BackendError(
                    f"expected a capacity of at most {spec.MAX_CAPACITY_UNITS} units of 128 KiB, "
                    f"found {self.config.capacity}: is this an RPMB device?"
                )
            self.ring: Ring = stack.enter_context(
                make_ring(
                    self.memory,
                    setup.queue_size,
                    features=frontend.features,
                    first_index=setup.first_index,
                )
            )
            frontend.share_memory(self.memory)
            frontend.start_ring(self.ring)
            self._resources = stack.pop_all()

    @classmethod
    def connect(
        cls,
        socket_path: str | PathLike[str],
        key: bytes | None = None,
        *,
        timeout: float = 10.0,
        setup: Setup = _DEFAULT_SETUP,
    ) -> Self:
        """Connect to a daemon's UNIX socket; the other arguments are those of the class."""
        frontend = Frontend.connect(socket_path, timeout=timeout)
        return cls(frontend, key, timeout=timeout, setup=setup)

    def close(self) -> None:
        """Stop the queue as a VMM does, then close the connection and free everything.

        All answers have been received, so a back-end that has disconnected is no error.
        """
        with self._resources, suppress(BackendError):
            self.frontend.stop_ring()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._resources.close()  # without GET_VRING_BASE: the back-end may not answer

    # RPMB requests

    def program_key(self, key: bytes) -> None:
        """Program the key, which is possible once; the client uses it from then on."""
        authenticator = Authenticator(key)
        answer = self.exchange(frame.program_key_request(key), spec.FRAME_SIZE)
        frame.check_program_key(answer, authenticator)
        self._authenticator = authenticator

    def read_counter(self) -> int:
        """The write counter."""
        nonce = os.urandom(spec.NONCE_SIZE)
        answer = self.exchange(frame.counter_request(nonce), spec.FRAME_SIZE)
        return frame.check_counter(answer, nonce, self._authenticator)

    def write(self, address: int, data: bytes, counter: int | None = None) -> int:
        """Write blocks as one atomic request and return the new write counter.

        ``data`` is a multiple of 256 bytes, at most ``config.max_wr_cnt`` blocks. ``counter`` is
        the present write counter; where it is not given, it is read first.
        """
        if counter is None:
            counter = self.read_counter()
        request = self.write_request(address, data, counter)
        answer = self.exchange(request, spec.FRAME_SIZE)
        return frame.check_write(answer, address, counter, self._authenticator)

    def read(self, address: int, count: int) -> bytes:
        """Read ``count`` blocks, in as many requests as ``config.max_rd_cnt`` requires."""
        limit = self.config.max_rd_cnt or _NO_LIMIT
        parts = []
        for start in range(address, address + count, limit):
            size = min(limit, address + count - start)
            nonce = os.urandom(spec.NONCE_SIZE)
            request = frame.read_request(start, size, nonce)
            answer = self.exchange(request, size * spec.FRAME_SIZE)
            parts.append(frame.check_read(answer, start, size, nonce, self._authenticator))
        return b"".join(parts)

    def write_request(self, address: int, data: bytes, counter: int) -> bytes:
        """The frames of a write with its MAC, for `submit` and `exchange`."""
        if self._authenticator is None:
            raise ValueError("a write needs the key")
        return frame.write_request(address, data, counter, self._authenticator)

    def exchange(self, request: bytes, room: int) -> bytes:
        """Send one chain of any frames with ``room`` bytes for the answer; return the answer."""
        if self.ring.in_flight:
            raise ValueError("there are requests in flight: take their answers first")
        self.submit(request, room)
        self.flush()
        (answer,) = self.answers()
        return answer.data

    # Many requests in flight

    def submit(self, request: bytes | Sequence[bytes], room: int | Sequence[int]) -> int:
        """Put one chain into the ring and return its token; `flush` publishes all of them.

        ``request`` and ``room`` (bytes) are cut into segments of ``segment_size``; as sequences
        they are taken as they are, one descriptor an element. QueueError when the ring is full.
        """
        if isinstance(request, bytes):
            ends = accumulate(self._cut(len(request)), initial=0)
            request = [request[start:end] for start, end in pairwise(ends)]
        if isinstance(room, int):
            room = self._cut(room)
        buffers = _Buffers([], [])
        try:
            for piece in request:
                buffers.readable.append(self._allocate(len(piece)))
                self.memory.write(buffers.readable[-1].address, piece)
            for length in room:
                buffers.writable.append(self._allocate(length))
            head = self.ring.add(buffers.readable, buffers.writable)
        except (MemoryError, QueueError):
            self._free(buffers)
            raise
        self._buffers[head] = buffers
        return head

    def flush(self) -> None:
        """Make all submitted chains available to the device, and kick it if it asks for that."""
        self.ring.flush()

    def answers(self) -> list[Answer]:
        """The answers that have arrived, at least one; waits up to ``timeout`` seconds.

        Only for chains of `submit`: those offered to the ring directly come back from `Ring.wait`.
        """
        used = self.ring.wait(self._timeout, peer=self.frontend.fileno())
        return [Answer(head, self._take_answer(head, length)) for head, length in used]

    # Resets

    def reset_queue(self) -> None:
        """Stop the queue, drop all chains in flight and restart it, also a broken one."""
        self.frontend.stop_ring()
        self._restart_queue()

    def reset_device(self) -> None:
        """Reset the device by RESET_DEVICE and restart it."""
        self.frontend.reset_device()
        self.frontend.start_device(self.setup.features)
        self._restart_queue()

    def _restart_queue(self) -> None:
        for buffers in self._buffers.values():
            self._free(buffers)
        self._buffers.clear()
        self.ring.reset()
        self.frontend.start_ring(self.ring)

    def _cut(self, length: int) -> list[int]:
        """The lengths of the segments that make up ``length`` bytes."""
        limit = self.setup.segment_size or length
        return [min(limit, length - start) for start in range(0, length, limit)] if length else []

    def _allocate(self, length: int) -> Segment:
        return Segment(self.memory.allocate(length), length)

    def _free(self, buffers: _Buffers) -> None:
        for segment in (*buffers.readable, *buffers.writable):
            self.memory.free(segment.address)

    def _take_answer(self, head: int, length: int) -> bytes:
        buffers = self._buffers.pop(head)
        parts = []
        for segment in buffers.writable:
            parts.append(self.memory.read(segment.address, min(segment.length, length)))
            length -= len(parts[-1])
        self._free(buffers)
        return b"".join(parts)
