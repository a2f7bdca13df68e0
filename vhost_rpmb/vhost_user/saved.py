# SPDX-License-Identifier: Apache-2.0
"""The record of a connection as bytes: everything that another process needs to continue it.

Native byte order: the record never leaves the machine. Descriptors are the numbers under which a
`Keeper` stored them, 0 where there is none. Every released format stays readable: tests/data has a
record of each. Format 2 has the dirty log.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vhost_rpmb.cursor import Cursor
from vhost_rpmb.typed import NamedTuple
from vhost_rpmb.vhost_user.wire import MemoryRegion

__all__ = ["Inflight", "Intake", "Owed", "Record", "SavedLog", "SavedRegion", "SavedVring", "State"]

FORMAT = 2

_FORMAT = struct.Struct("=H")
_STATE = struct.Struct("=QQQBB")
_COUNT = struct.Struct("=H")
_REGION = struct.Struct("=QQQQQ")
_VRING = struct.Struct("=IQQQHHHBQQQ")
_INFLIGHT = struct.Struct("=QQQHH")
_LOG = struct.Struct("=QQQQ")
_COMPLETE = struct.Struct("=B")
_NUMBER = struct.Struct("=Q")
_ENABLED, _HAS_ADDRESSES, _RUNNING, _MARKED, _KEPT = 1, 2, 4, 8, 16


class SavedRegion(NamedTuple):
    """A memory region, and its file."""

    place: MemoryRegion
    file: int


class SavedVring(NamedTuple):
    """The settings of a vring, its position and its descriptors.

    A vring that ``running`` is set for continues at the used index in guest memory plus ``ahead``,
    any other at ``base``; ``used`` is the used index when the record was saved. A packed ring that
    runs continues where its in-flight record says, any other at ``base``, which is half of a base.
    The dirty log has it at ``log_address``, None: not. ``kept``: the in-flight record is of the
    ring that the connection has set up, not of an earlier one.
    """

    size: int
    addresses: tuple[int, int, int] | None
    enabled: bool
    running: bool
    base: int
    ahead: int
    used: int
    kick: int
    call: int
    error: int
    log_address: int | None = None
    kept: bool = False


class SavedLog(NamedTuple):
    """The dirty log, of SET_LOG_BASE, and the descriptor of SET_LOG_FD."""

    file: int = 0
    size: int = 0
    offset: int = 0
    event: int = 0


class Inflight(NamedTuple):
    """The memory shared by SET_INFLIGHT_FD."""

    file: int
    size: int
    offset: int
    num_queues: int
    queue_size: int


class State(NamedTuple):
    """The state between two messages; ``offered`` and ``config`` are the device's."""

    offered: int
    config: bytes
    features: int
    protocol_features: int
    owned: bool
    status: int
    regions: Sequence[SavedRegion]
    vrings: Sequence[SavedVring]
    inflight: Inflight | None = None
    log: SavedLog = SavedLog()

    @property
    def files(self) -> set[int]:
        """The numbers of all descriptors."""
        numbers = {region.file for region in self.regions}
        for vring in self.vrings:
            numbers.update((vring.kick, vring.call, vring.error))
        if self.inflight is not None:
            numbers.add(self.inflight.file)
        numbers.update((self.log.file, self.log.event))
        return numbers - {0}


class Intake(NamedTuple):
    """A message that has not been handled: what was consumed of it, and what is to be next.

    A file of number 0 is a descriptor that came and was not stored. ``complete``: none was lost.
    ``next_data`` and ``next_files`` belong to it as far as the keeper says that they were consumed.
    """

    data: bytes = b""
    files: Sequence[int] = ()
    complete: bool = True
    next_data: bytes = b""
    next_files: Sequence[int] = ()


class Owed(NamedTuple):
    """A reply, due unless the keeper says that it was sent."""

    data: bytes = b""
    files: Sequence[int] = ()


class Record(NamedTuple):
    """Everything that is saved."""

    state: State
    intake: Intake
    owed: Owed

    @classmethod
    def unpack(cls, packed: bytes) -> Record:
        """From bytes; ValueError if they are damaged or of an unknown format."""
        cursor = Cursor(packed, "record")
        (found,) = cursor.take(_FORMAT)
        if not 0 < found <= FORMAT:
            raise ValueError(f"expected a record of format 1 to {FORMAT}, found format {found}")
        record = cls(_take_state(cursor, found), _take_intake(cursor), _take_owed(cursor))
        cursor.end()
        return record


def pack_state(state: State) -> bytes:
    """Pack the first part of a record; `pack` adds the others."""
    parts = [
        _FORMAT.pack(FORMAT),
        _STATE.pack(
            state.offered, state.features, state.protocol_features, state.owned, state.status
        ),
        _pack_bytes(state.config),
        _COUNT.pack(len(state.regions)),
    ]
    parts += [_REGION.pack(*region.place, region.file) for region in state.regions]
    parts.append(_COUNT.pack(len(state.vrings)))
    for vring in state.vrings:
        flags = (
            _ENABLED * vring.enabled
            | _HAS_ADDRESSES * (vring.addresses is not None)
            | _RUNNING * vring.running
            | _MARKED * (vring.log_address is not None)
            | _KEPT * vring.kept
        )
        parts.append(
            _VRING.pack(
                *(vring.size, *(vring.addresses or (0, 0, 0))),
                *(vring.base, vring.ahead, vring.used, flags, vring.kick, vring.call, vring.error),
            )
        )
    parts.append(_INFLIGHT.pack(*(state.inflight or (0, 0, 0, 0, 0))))
    parts.append(_LOG.pack(*state.log))
    parts += [_NUMBER.pack(vring.log_address or 0) for vring in state.vrings]
    return b"".join(parts)


def pack(state: bytes, intake: Intake, owed: Owed) -> bytes:
    """Pack a record, whose state is packed already."""
    return b"".join(
        (
            state,
            _pack_bytes(intake.data),
            _pack_files(intake.files),
            _COMPLETE.pack(intake.complete),
            _pack_bytes(intake.next_data),
            _pack_files(intake.next_files),
            _pack_bytes(owed.data),
            _pack_files(owed.files),
        )
    )


def _pack_bytes(data: bytes) -> bytes:
    return _COUNT.pack(len(data)) + data


def _pack_files(files: Sequence[int]) -> bytes:
    return _COUNT.pack(len(files)) + b"".join(_NUMBER.pack(file) for file in files)


def _take_files(cursor: Cursor) -> tuple[int, ...]:
    return tuple(cursor.take(_NUMBER)[0] for _ in range(cursor.take(_COUNT)[0]))


def _take_state(cursor: Cursor, found: int) -> State:
    offered, features, protocol_features, owned, status = cursor.take(_STATE)
    config = cursor.counted(_COUNT)
    regions = [_take_region(cursor) for _ in range(cursor.take(_COUNT)[0])]
    vrings = [_take_vring(cursor) for _ in range(cursor.take(_COUNT)[0])]
    inflight = Inflight(*cursor.take(_INFLIGHT))
    log = SavedLog()
    if found > 1:
        log = SavedLog(*cursor.take(_LOG))
        vrings = [_take_log_address(cursor, vring) for vring in vrings]
    return State(
        *(offered, config, features, protocol_features, bool(owned), status, regions, vrings),
        *(inflight if inflight.file else None, log),
    )


def _take_region(cursor: Cursor) -> SavedRegion:
    *place, file = cursor.take(_REGION)
    return SavedRegion(MemoryRegion(*place), file)


def _take_vring(cursor: Cursor) -> SavedVring:
    size, table, available, ring, base, ahead, used, flags, *files = cursor.take(_VRING)
    kick, call, error = files
    return SavedVring(
        size=size,
        addresses=(table, available, ring) if flags & _HAS_ADDRESSES else None,
        enabled=bool(flags & _ENABLED),
        running=bool(flags & _RUNNING),
        base=base,
        ahead=ahead,
        used=used,
        kick=kick,
        call=call,
        error=error,
        log_address=0 if flags & _MARKED else None,
        kept=bool(flags & _KEPT),
    )


def _take_log_address(cursor: Cursor, vring: SavedVring) -> SavedVring:
    (address,) = cursor.take(_NUMBER)
    return vring._replace(log_address=None if vring.log_address is None else address)


def _take_intake(cursor: Cursor) -> Intake:
    data, files = cursor.counted(_COUNT), _take_files(cursor)
    (complete,) = cursor.take(_COMPLETE)
    return Intake(data, files, bool(complete), cursor.counted(_COUNT), _take_files(cursor))


def _take_owed(cursor: Cursor) -> Owed:
    return Owed(cursor.counted(_COUNT), _take_files(cursor))
