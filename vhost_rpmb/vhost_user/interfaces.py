# SPDX-License-Identifier: Apache-2.0
"""The objects that a session is given: device, event loop, log, and the classes of an engine.

An engine's objects go from one of its classes to another, so that their types are left open (Any).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from vhost_rpmb.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import select
    from typing import Any

    from vhost_rpmb.system import socket
    from vhost_rpmb.vhost_user.intake import Consumed
    from vhost_rpmb.virtio.flags import Unanswered

__all__ = [
    "Device",
    "DeviceState",
    "Engine",
    "Keeper",
    "Log",
    "Loop",
    "Memory",
    "Virtqueue",
    "Watcher",
]


class Device(Protocol):
    """The virtio device behind a connection."""

    @property
    def features(self) -> int:
        """The virtio feature bits that it offers."""

    @property
    def num_queues(self) -> int:
        """The number of its virtqueues."""

    @property
    def config(self) -> bytes:
        """Its configuration space, read-only."""

    def process(self, queue: Any) -> int:
        """Serve one batch of a virtqueue; return flags of `vhost_rpmb.virtio.flags`."""

    def reset(self) -> None:
        """Return to the initial state (RESET_DEVICE)."""

    @property
    def journal(self) -> memoryview | None:
        """A writable buffer of 64 bytes that survives the process, for `restore_register`.

        All zeros at the start of a connection; the device writes it before each publication.
        """

    @journal.setter
    def journal(self, buffer: memoryview | None) -> None: ...

    def restore_register(self, used_index: int) -> None:
        """Restore the state of the connection from the journal, at a take-over of it.

        ``used_index``: of the ring, where the last batch was published.
        """

    def clear_register(self) -> None:
        """Clear the state of the connection, and the journal: a new one begins."""


class DeviceState(Protocol):
    """The state of the device, which another host takes over, or gives.

    Its methods raise ValueError or OSError for a refusal, upon which nothing has changed.
    """

    @property
    def limit(self) -> int:
        """The largest number of bytes of a state."""

    def save(self) -> bytes:
        """Give the device away durably; return its state."""

    def sent(self, complete: bool) -> None:
        """Note the end of the transfer: whether the front-end may have all of the state."""

    def load(self, blob: bytes) -> None:
        """Take a device over durably."""


class Watcher(Protocol):
    """The event loop, as far as a connection uses it."""

    @property
    def epoll(self) -> select.epoll:
        """The epoll object on which it waits."""

    @property
    def stopping(self) -> bool:
        """Whether a stop is requested."""

    def add(self, fd: int, handler: Callable[[], None], *, edge: bool = False) -> None:
        """Call `handler` when `fd` is readable; OSError if epoll does not support it.

        With `edge`, once for each arrival, not for as long as data is left.
        """

    def listen(self, fd: int, enabled: bool) -> None:
        """Call the handler of `fd` when it is readable or, not `enabled`, at its hang-up only."""

    def remove(self, fd: int) -> None:
        """Stop watching; before `fd` is closed, because the front-end has the same file open."""


class Log(Protocol):
    """A log of warnings that a guest or a front-end can cause."""

    def report(self, rule: str, text: str) -> None:
        """Log `text`, with a limit on the lines for one `rule`."""


class Keeper(Protocol):
    """Keeps a connection beyond the process: a record of it, and its descriptors.

    The record is replaced as a whole. What was consumed and replied since is recorded in the same
    step in which it happens.
    """

    @property
    def active(self) -> bool:
        """Whether it does so; once False, it stays False."""

    @property
    def record(self) -> bytes:
        """The present record."""

    @property
    def consumed(self) -> Consumed:
        """What was consumed since the record was saved."""

    @property
    def replied(self) -> int:
        """The number of bytes that were sent since the record was saved."""

    def store(self, fd: int) -> int:
        """Store the open file of a descriptor; return its number, 0 if that failed.

        A file that is stored already keeps its number.
        """

    def descriptor(self, number: int) -> int:
        """The stored descriptor of this number, which stays the keeper's; ValueError."""

    def save(self, record: bytes) -> None:
        """Replace the record."""

    def served(self) -> None:
        """Note that this process has made progress with the connection."""

    def consume(self, sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
        """Receive up to `size` bytes with their descriptors, once after each save()."""

    def reply(self, sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
        """Send a reply, once after each save(); BlockingIOError if it does not fit."""

    def retain(self, numbers: Collection[int]) -> None:
        """Remove all stored descriptors but these."""


class Memory(Protocol):
    """Guest memory."""

    def add_region(
        self, guest_address: int, size: int, user_address: int, mmap_offset: int, fd: int
    ) -> None:
        """Map a region; ValueError or OSError. The descriptor stays the caller's."""

    def remove_region(self, guest_address: int, size: int, user_address: int) -> None:
        """Unmap a region; ValueError if there is none."""

    def clear(self) -> None:
        """Unmap all regions; a dirty log stays."""

    def read(self, guest_address: int, length: int) -> bytes:
        """Copy bytes out of it."""

    def write(self, guest_address: int, data: bytes) -> None:
        """Copy bytes into it."""

    def set_log(self, log: Any, marks_writes: bool = False) -> None:
        """Use another dirty log, which is the only region of `log`, or none."""

    def take_marked(self) -> bool:
        """Whether anything was marked in it since the last call."""

    @property
    def log_fault(self) -> str:
        """The reason why pages could not be marked in it; empty if all could."""


class Virtqueue(Protocol):
    """A virtqueue in guest memory; the setters raise ValueError."""

    @property
    def packed(self) -> bool:
        """Whether the ring is a packed one."""

    @property
    def base(self) -> int:
        """The position of the next chain, as GET_VRING_BASE has it."""

    @property
    def error(self) -> str:
        """The reason why the virtqueue is broken; empty if it works."""

    @property
    def used(self) -> int | None:
        """The used position, of a ring that was not served yet from its memory; None without it."""

    def reset(self) -> None:
        """Return to the initial state."""

    def set_size(self, size: int) -> None:
        """Set the number of descriptors; another one ends the record of what is in flight."""

    def set_addresses(self, descriptor_table: int, available_ring: int, used_ring: int) -> None:
        """Set the user addresses of the three parts."""

    def mark_ring(self, address: int | None) -> None:
        """Mark what is written to the ring in the dirty log, at this guest address, or do not."""

    def mark_written(self) -> None:
        """Mark all that may have been written to the ring before."""

    def set_base(self, base: int) -> None:
        """Set the position of the next chain, and repair a broken virtqueue."""

    def set_features(self, features: int) -> None:
        """Set the negotiated virtio feature bits; another ring format begins a new ring."""

    def resume(
        self, used_index: int, region: Any, offset: int, last: int, heads: Sequence[int]
    ) -> None:
        """Continue a split ring at a used index, and keep the record of what is in flight."""

    def resume_packed(self, region: Any, offset: int, record: bytes, heads: Sequence[int]) -> None:
        """Continue a packed ring where its record says, and keep the record."""

    def read_slot(self, slot: int) -> bytes:
        """Return a descriptor of a packed ring, whose memory is there."""

    def write_slot(self, slot: int, descriptor: bytes) -> None:
        """Store a descriptor of a packed ring, whose memory is there."""

    def take_faults(self) -> dict[str, int]:
        """Return the number of broken chains for each broken rule since the last call."""

    def answer_chains(
        self,
        answer: Callable[[bytes, int], bytes | Unanswered],
        max_bytes: int,
        max_chains: int,
    ) -> int:
        """Answer up to `max_chains` chains, for `Device.process`; return its flags.

        `answer` maps the readable bytes and the writable length, each up to `max_bytes`, to the
        bytes to write, or to `Unanswered`.
        """


class Loop(Protocol):
    """Serves one virtqueue until something else needs attention."""

    def serve(self, queue: Any, kick_fd: int, call_fd: int, once: bool = False) -> int:
        """Serve batches, with `once` one batch; return flags of `vhost_rpmb.virtio.flags`."""

    def take_events(self) -> list[int]:
        """Return the descriptors, except `kick_fd`, whose events the last serve() took."""


class Engine(Protocol):
    """The classes of an engine that a session creates objects of."""

    @property
    def GuestMemory(self) -> Callable[[int], Memory]:  # noqa: N802
        """Create guest memory of a maximum number of regions."""

    @property
    def Virtqueue(self) -> Callable[[Any], Virtqueue]:  # noqa: N802
        """Create a virtqueue in guest memory."""

    @property
    def Loop(self) -> Callable[[Any, select.epoll, int], Loop]:  # noqa: N802
        """Create the loop of a device: epoll object, microseconds of busy polling."""
