# SPDX-License-Identifier: Apache-2.0
"""A connection that outlives the process: its descriptors and its record at the service manager.

The record is in a memfd that is stored beside the descriptors. It has two slots, of which the valid
one with the higher number counts, so that a kill at any instant leaves the earlier or the later
state. docs/decisions/0028-handover.md describes the order of all steps.

Whether a message was consumed or a reply sent cannot be seen on the socket. Therefore the structs
that the kernel fills in during these calls are in the record as well, for each slot its own: a call
and its mark are one step, because a process is killed only when it returns to user mode.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Collection, Sequence
from contextlib import suppress

from vhost_rpmb import libc, memfd
from vhost_rpmb.daemon.descriptors import PREFIX, DescriptorStore, StoreError
from vhost_rpmb.daemon.unkept import Unkept
from vhost_rpmb.log import Logger
from vhost_rpmb.system import socket
from vhost_rpmb.vhost_user import foreign
from vhost_rpmb.vhost_user.intake import Consumed
from vhost_rpmb.vhost_user.wire import CONTROL_SIZE, FD_SIZE, pack_fds, unpack_fds

__all__ = ["Handover"]

MAX_TRIES = 3  # takeovers in a row that ended before anything was served

# The record, in native byte order: a page of fixed fields, then the slots.
_MAGIC = b"RPMBSES1"
_MAGIC_AT, _TRIES_AT, _NUMBER_AT = 0, 16, 24
_TRIES = struct.Struct("=I")
_NUMBER = struct.Struct("=Q")  # of the descriptor stored last: none is used twice
_CONSUMED_AT, _REPLIED_AT, _CONTROL_AT = (64, 1088), (128, 1152), (1280, 2560)  # by slot
_JOURNAL = slice(512, 512 + 64)
_NOTE = slice(576, 576 + 64)
_OWNER_SIZE = 16
_ARRIVING = slice(640, 640 + _OWNER_SIZE)
_SLOT_SIZE = 61440
_SLOTS_AT = (4096, 4096 + _SLOT_SIZE)
_SLOT = struct.Struct("=QII")  # sequence number (0: void), length, checksum
_SIZE = 4096 + 2 * _SLOT_SIZE

_SESSION = f"{PREFIX}session"
_CONNECTION = f"{PREFIX}conn"
_FILE = f"{PREFIX}f"  # and a number

_CONTROL = struct.Struct("@Nii")  # struct cmsghdr: length, level, type
# Ancillary data that precede descriptors: a socket unit can have them enabled (PassCredentials=).
_ANCILLARY = (socket.SO_PASSCRED, 34, 76)  # SO_PASSSEC and SO_PASSPIDFD, which socket lacks

logger = Logger(__name__)


class _UnfitError(Exception):
    """What an earlier process left cannot be continued; the text says why."""


class Handover(Unkept):
    """Keeps one connection with the service manager; implements `interfaces.Keeper`.

    It is ``active`` as long as the service manager keeps everything that it is given. After the
    first failure it is not, for the rest of the process: a restart ends the connection, as without
    a service manager.
    """

    def __init__(self, store: DescriptorStore) -> None:
        super().__init__(store)
        self._map: mmap.mmap | None = None
        self._owner = b""
        self._sequence = 0
        self._tried = False  # this process has raised the number of tries
        self.record = b""  # of the connection; empty: there is none
        self.active = False

    # The server's side.

    def open(self, owner: str) -> None:
        """Take up the record of an earlier process of the device ``owner``, or begin a new one.

        Called before the sandbox is entered.
        """
        self._owner = owner.encode()
        if self._store.names or self._store.ambiguous:
            try:
                self._take_up()
            except _UnfitError as error:
                self.give_up(str(error))
            if self._map is None:
                self._drop()
            elif not self.record:
                self.disconnect()
        if not self._store.limit:
            self._warn()
        elif self._map is None:
            self._begin()

    @property
    def keeper(self) -> Handover | None:
        """The keeper of the session, as long as it keeps everything."""
        return self if self.active else None

    @property
    def journal(self) -> memoryview | None:
        """Memory for the result register of the device, which outlives the process."""
        return memoryview(self._map)[_JOURNAL] if self._map is not None else None

    @property
    def note(self) -> memoryview | None:
        """Memory for what was handed over on the connection, which outlives the process."""
        return memoryview(self._map)[_NOTE] if self._map is not None else None

    def rename(self, owner: str) -> None:
        """Keep the connection for a device of another name too; before that one has arrived."""
        if self._map is not None:
            self._map[_ARRIVING] = owner.encode().ljust(_OWNER_SIZE, b"\0")

    def connection(self) -> socket.socket:
        """The connection that the record describes; ValueError if it is another kind of file."""
        fd = self._store.get(_CONNECTION)
        foreign.check_unix_stream(fd)
        return socket.socket(fileno=os.dup(fd))

    def connect(self, sock: socket.socket, record: bytes) -> None:
        """Keep a new connection."""
        for option in _ANCILLARY:
            with suppress(OSError):  # unknown to this kernel
                sock.setsockopt(socket.SOL_SOCKET, option, 0)
        # Otherwise a kill between the two steps would leave a connection without its record.
        self.save(record)
        if self.active:
            try:
                self._store.add(_CONNECTION, sock.fileno())
            except StoreError as error:
                self._fail(str(error))

    def disconnect(self) -> None:
        """Keep the connection no longer."""
        if self.active:
            self.save(b"")
            self._remove([_CONNECTION])
            self.retain(())
        self.served()

    def give_up(self, reason: str) -> None:
        """End the connection of an earlier process, which cannot be continued."""
        logger.warning("the connection ends, it cannot be continued: %s", reason)
        with suppress(KeyError, OSError):
            foreign.close_connection(socket.socket(fileno=os.dup(self._store.get(_CONNECTION))))
        self.active = self._map is not None
        self.disconnect()

    def close(self) -> None:
        """Close the descriptors of this process; the service manager keeps its own."""
        self.active = False
        self._map = None
        self._store.close()

    # The session's side: interfaces.Keeper.

    def store(self, fd: int) -> int:
        """Store the open file of a descriptor; return its number, 0 if that failed."""
        try:
            name = self._store.find(fd)
            if name is None:
                assert self._map is not None
                (number,) = _NUMBER.unpack_from(self._map, _NUMBER_AT)
                _NUMBER.pack_into(self._map, _NUMBER_AT, number + 1)
                name = f"{_FILE}{number + 1}"
                self._store.add(name, fd)
        except StoreError as error:
            self._fail(str(error))
            return 0
        except OSError as error:
            self._fail(f"stored descriptors cannot be compared: {error.strerror}")
            return 0
        return _number(name)

    def descriptor(self, number: int) -> int:
        """The stored descriptor of this number, which stays ours; ValueError."""
        try:
            return self._store.get(f"{_FILE}{number}")
        except KeyError:
            raise ValueError(f"expected the stored descriptor {number}, found none") from None

    def save(self, record: bytes) -> None:
        """Make this the record; nothing was consumed or replied since it."""
        if self._map is None or not self.active:
            return
        self.record = record
        data = self._owner.ljust(_OWNER_SIZE, b"\0") + record if record else b""
        self._sequence += 1
        slot = self._sequence & 1
        place = _SLOTS_AT[slot]
        if len(data) > _SLOT_SIZE - _SLOT.size:
            self._fail("the record of the connection is too large")
            return
        _SLOT.pack_into(self._map, place, 0, 0, 0)
        for marks in (_CONSUMED_AT, _REPLIED_AT, _CONTROL_AT):
            self._map[marks[slot] : marks[slot] + 64] = bytes(64)
        begin = place + _SLOT.size
        self._map[begin : begin + len(data)] = data
        checksum = _checksum(self._sequence, data)
        _SLOT.pack_into(self._map, place, self._sequence, len(data), checksum)

    def served(self) -> None:
        """Note that a takeover was a success: a message or a batch was served after it."""
        if self._map is not None and self._tried:
            self._tried = False
            _TRIES.pack_into(self._map, _TRIES_AT, 0)

    def consume(self, sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
        """Receive up to ``size`` bytes and their descriptors; `consumed` says how much it was."""
        data = bytearray(size)
        control = self._control()
        header = self._header(_CONSUMED_AT)
        libc.receive_message(sock.fileno(), header, data, control)
        sent = bytes(control)[socket.CMSG_LEN(0) :][: self.consumed.fds * FD_SIZE]
        return bytes(data[: header.length]), unpack_fds(sent)

    @property
    def consumed(self) -> Consumed:
        """What was consumed since the record was saved."""
        header = self._header(_CONSUMED_AT)
        length = kind = 0
        if header.control_length >= _CONTROL.size:
            length, _level, kind = _CONTROL.unpack_from(self._control())
        fds = (length - socket.CMSG_LEN(0)) // FD_SIZE if kind == socket.SCM_RIGHTS else 0
        complete = not header.flags & socket.MSG_CTRUNC
        return Consumed(header.length, fds, complete) if header.length else Consumed(0, 0, True)

    def reply(self, sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
        """Send a reply; OSError, BlockingIOError if not all of it could be sent."""
        control = b""
        if fds:
            sent = pack_fds(fds)
            head = _CONTROL.pack(socket.CMSG_LEN(len(sent)), socket.SOL_SOCKET, socket.SCM_RIGHTS)
            control = (head + sent).ljust(socket.CMSG_SPACE(len(sent)), b"\0")
        header = self._header(_REPLIED_AT)
        libc.send_message(sock.fileno(), header, bytearray(data), bytearray(control))
        if header.length < len(data):
            raise BlockingIOError

    @property
    def replied(self) -> int:
        """The number of bytes that were sent since the record was saved."""
        return self._header(_REPLIED_AT).length

    def retain(self, numbers: Collection[int]) -> None:
        """Remove the stored descriptors with other numbers than these."""
        used = {f"{_FILE}{number}" for number in numbers}
        names = self._store.names | self._store.ambiguous
        self._remove([name for name in names if name.startswith(_FILE) and name not in used])

    # The record.

    def _begin(self) -> None:
        """Begin a new record."""
        fd = memfd.create(_SESSION, _SIZE)
        try:
            self._map = mmap.mmap(fd, _SIZE)
            self._map[: len(_MAGIC)] = _MAGIC
            self.active = True
            self._sequence = 0
            self.save(b"")
            self._store.add(_SESSION, fd)
        except StoreError as error:
            self._fail(str(error))
        finally:
            os.close(fd)

    def _take_up(self) -> None:
        """Load the record of an earlier process; _UnfitError if it cannot be continued."""
        if not self._store.limit:
            raise _UnfitError("the service manager has no descriptor store any more")
        if _SESSION not in self._store.names:
            raise _UnfitError("its record is missing")
        self._map = _map_record(self._store.get(_SESSION))
        self.active = True
        self._load()
        if not self.record:
            return
        if _CONNECTION not in self._store.names:
            raise _UnfitError("it was not stored")
        if self._store.ambiguous:
            raise _UnfitError(f"several descriptors have the name {min(self._store.ambiguous)}")
        (tries,) = _TRIES.unpack_from(self._map, _TRIES_AT)
        if tries >= MAX_TRIES:
            raise _UnfitError(f"{tries} starts failed to continue it")
        _TRIES.pack_into(self._map, _TRIES_AT, tries + 1)
        self._tried = True

    def _load(self) -> None:
        """Find the valid record."""
        assert self._map is not None
        best = None
        for place in _SLOTS_AT:
            sequence, length, checksum = _SLOT.unpack_from(self._map, place)
            if not sequence or length > _SLOT_SIZE - _SLOT.size:
                continue
            data = self._map[place + _SLOT.size : place + _SLOT.size + length]
            if checksum == _checksum(sequence, data) and sequence > self._sequence:
                self._sequence, best = sequence, data
        if best is None:
            raise _UnfitError("its record is damaged")
        owners = [name.rstrip(b"\0") for name in (best[:_OWNER_SIZE], self._map[_ARRIVING])]
        if best and self._owner not in owners:
            raise _UnfitError("it belongs to another device")
        self.record = best[_OWNER_SIZE:]

    def _control(self) -> memoryview:
        assert self._map is not None
        place = _CONTROL_AT[self._sequence & 1]
        return memoryview(self._map)[place : place + CONTROL_SIZE]

    def _header(self, marks: tuple[int, int]) -> libc.MessageHeader:
        assert self._map is not None
        return libc.MessageHeader(self._map, marks[self._sequence & 1])

    # Failures.

    def _fail(self, reason: str) -> None:
        """Keep nothing from now on."""
        logger.warning("a restart will end the connection: %s", reason)
        self.save(b"")
        self.active = False
        self._drop()

    def _drop(self) -> None:
        """Remove everything from the store, the record last."""
        names = self._store.names | self._store.ambiguous
        with suppress(StoreError):
            self._store.remove(sorted(names, key=lambda name: (name == _SESSION, name)))

    def _remove(self, names: Collection[str]) -> None:
        try:
            self._store.remove(names)
        except StoreError as error:
            self._fail(str(error))


def _map_record(fd: int) -> mmap.mmap:
    """Map the record of an earlier process; _UnfitError unless it is one."""
    try:
        sealed = memfd.is_sealed(fd)
        size = os.fstat(fd).st_size
    except OSError:
        raise _UnfitError("its record is another kind of file") from None
    if not sealed or size != _SIZE:
        raise _UnfitError("its record has another size, or can be truncated")
    record = mmap.mmap(fd, _SIZE)
    if record[: len(_MAGIC)] != _MAGIC:
        raise _UnfitError("its record has another format")
    return record


def _checksum(sequence: int, data: bytes) -> int:
    return zlib.crc32(data, sequence & 0xFFFF_FFFF)


def _number(name: str) -> int:
    digits = name.removeprefix(_FILE)
    return int(digits) if digits.isdigit() else 0
