# SPDX-License-Identifier: Apache-2.0
"""The contract of a store: what the device and the daemon need of the durable state of a device.

`vhost_rpmb.storage.local` implements it. A further home of the state implements `Store` as well, in
a folder of its own; the device and the daemon know nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.typed import TYPE_CHECKING, IntFlag, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing import Literal

__all__ = [
    "ACTIVE",
    "EXPORTED",
    "IMPORTED",
    "SUPERSEDED",
    "VACANT",
    "Access",
    "DeviceStore",
    "Possession",
    "Received",
    "Resources",
    "SharedStore",
    "Store",
    "TakeOver",
]


# From the present owner, see docs/fleet.md.
if TYPE_CHECKING:
    TakeOver = Literal["expired", "now", "never"]
else:
    TakeOver = str


# States of a device in files, see docs/decisions/0036-device-state.md.
ACTIVE = "active"  # it is here, and may answer
VACANT = "vacant"  # files that wait for a device of another host
EXPORTED = "exported"  # handed to another host, which may have activated it
IMPORTED = "imported"  # received from another host, not yet activated
SUPERSEDED = "superseded"  # active elsewhere, for good


class Possession(NamedTuple):
    """Whether a device in files may answer.

    ``generation``: the number of its hand-overs. ``token``: random, of the last hand-over; empty if
    the host that gave it away took it back. ``claim``: by which this host claims the generation.
    """

    state: str = ACTIVE
    generation: int = 0
    token: bytes = b""
    claim: bytes = b""


class Received(NamedTuple):
    """A device as another host gave it: ``image`` has all blocks, zeros where one is damaged."""

    name: str
    image: bytes
    damaged: frozenset[int]
    counter: int
    key: bytes | None
    replay: Replay


class Access(IntFlag):
    """Operations on the files in a folder and in all folders below it."""

    CREATE = 1 << 0
    REMOVE = 1 << 1
    WRITE = 1 << 2  # open for writing; files that are open already need no access
    SYNC = 1 << 3  # open the folder itself and sync it
    READ = 1 << 4  # list the folder, and open files for reading
    TRUNCATE = 1 << 5  # cut files that are opened for writing
    LINK = 1 << 6  # with CREATE: give a file of the folder another name in it


class Resources(NamedTuple):
    """What a store uses that is not open yet, up to and including `Store.close`.

    ``folders``: paths without symbolic links, and the access needed in each. A kind of resource
    that another store needs becomes a field with an empty default.
    """

    folders: Mapping[str, Access]
    ports: frozenset[int] = frozenset()  # TCP ports to connect to


class DeviceStore(Protocol):
    """The durable state as the device uses it, from one thread.

    The attributes change only in `commit`. ``image`` and ``damaged`` stay the same objects, whose
    content changes; ``counter`` and ``key`` are replaced.
    """

    @property
    def image(self) -> memoryview:
        """The blocks in private memory: a multiple of 128 KiB, at most 16 MiB."""

    @property
    def damaged(self) -> bytearray:
        """One byte a block: non-zero where the block differs from what was stored.

        Such a block must not be served. A commit that writes it sets the byte to zero.
        """

    @property
    def counter(self) -> int:
        """The write counter, 0 to 0xFFFF_FFFF."""

    @property
    def key(self) -> bytes | None:
        """The programmed key, 32 bytes; None while no key is programmed."""

    @property
    def replay(self) -> Replay:
        """The record of the last commit; at the start, of answers that may still be owed."""

    def commit(
        self,
        counter: int,
        blocks: list[tuple[int, bytes]],
        key: bytes | None,
        replay: Replay = NO_REPLAY,
    ) -> bool:
        """Make a write counter, blocks, a new key and a replay record durable atomically.

        ``counter`` is never below the present one. ``blocks``: address and 256 bytes; of those with
        the same address the last one counts. ``key``: the key that the guest programs, None to keep
        the present one. ``replay``: the answers that this commit owes; it replaces the last record.

        True: all of it is durable and visible in the attributes. False: nothing has changed, now
        and after any crash, and the reason is logged; a later commit may succeed. Never raises for
        failures of the storage; a store that hosts share raises to end the process without an
        answer: `Fenced` when another daemon owns the device, `Stopped` in the wait for an outcome.
        """

    @property
    def confirm(self) -> Callable[[], None] | None:
        """Called before the answers of each batch are published; None: there is no need to.

        It returns as soon as no other daemon can have changed the device since the call, so that
        what was read is the latest state. Raises to end the process without an answer.
        """

    def settle(self) -> None:
        """Note that no answer is owed: the last batch was published, or its chains are void.

        Until then, and from the next commit on, `Store.close` leaves the record to the next start.
        """


class Store(DeviceStore, Protocol):
    """The durable state as the daemon uses it: opened, served by the device, closed once."""

    @property
    def name(self) -> str:
        """The random name of the device, up to 16 characters."""

    @property
    def checkpoint_due(self) -> bool:
        """Whether `checkpoint` has work; cheap, asked before each wait of the event loop."""

    def checkpoint(self) -> bool:
        """Do deferred work that no commit waits for; called while the device is idle.

        Return False if it failed: nothing is lost, the reason is logged, and it stays due.
        """

    def checkpoint_slice(self) -> bool | None:
        """Do a part of a checkpoint, which a request may have to wait for; None: more is left.

        Otherwise as `checkpoint`. The device may be served in between.
        """

    def resources(self) -> Resources:
        """What serving and closing will still use; asked once, before the sandbox is entered."""

    def close(self) -> None:
        """Complete deferred work, mark the state as closed, release locks and descriptors.

        The replay record becomes empty if no answer is owed (`settle`).

        Idempotent. Never raises for failures of the storage: they are logged, and the next start
        recovers the state.
        """


class SharedStore(Store, Protocol):
    """A store that hosts share: owned while a ring runs, otherwise not, and `commit` not allowed.

    At each `begin` counter, key and replay record may have changed, but neither name nor size.
    """

    @property
    def lease_seconds(self) -> int:
        """The time in which `renew` has to be called several times while it is owned."""

    @property
    def owned(self) -> bool:
        """Whether this daemon owns the device."""

    def begin(self) -> bool:
        """Own the device, so that requests may be served; False: not yet, try again soon.

        Raises StateError if it cannot be owned, `Fenced` and `Stopped`.
        """

    def end(self) -> None:
        """Let another daemon own the device; idempotent, and cheap if it is not owned."""

    def renew(self) -> None:
        """Stay the owner. Raises `Fenced`."""

    def refresh(self) -> None:
        """While it is not owned: read what changed, so that `begin` takes less time."""
