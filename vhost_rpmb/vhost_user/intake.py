# SPDX-License-Identifier: Apache-2.0
"""Reading messages so that a process that is killed loses none, nor a descriptor.

A message moves from the socket into the record in pieces of any size: peek, store its descriptors,
save the record with the piece, consume the piece. The message is handled when the record has all of
it. Another process finds the piece either in the socket or in the record, as the keeper's mark
says.

A peek is no proof of the number of descriptors: the kernel also shows those of the next message.
What counts is what was consumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vhost_rpmb.system import socket
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple
from vhost_rpmb.vhost_user import foreign, wire
from vhost_rpmb.vhost_user.saved import Intake
from vhost_rpmb.vhost_user.wire import Message, Request

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import Keeper

__all__ = ["Consumed", "KeptReader"]

_MEMORY = (
    Request.SET_MEM_TABLE,
    Request.ADD_MEM_REG,
    Request.SET_INFLIGHT_FD,
    Request.SET_LOG_BASE,
)


class Consumed(NamedTuple):
    """What was taken out of a socket: bytes, file descriptors, and whether none was lost."""

    length: int
    fds: int
    complete: bool


class KeptReader(wire.MessageReader):
    """Reads messages by way of a record, which ``save`` writes; without a keeper, as its base."""

    def __init__(self, sock: socket.socket, keeper: Keeper, save: Callable[[Intake], None]) -> None:
        super().__init__(sock)
        self._keeper = keeper
        self._save = save
        self._files: list[int] = []  # the numbers of the descriptors so far, as in `Intake`

    def read(self) -> Message | None:
        """The next message, as of the base; it stays in the record until the next one is saved."""
        message = super().read()
        if message is not None:
            self._files = []
        return message

    def restore(self, intake: Intake, consumed: Consumed) -> None:
        """Continue with what another process consumed."""
        self._bytes = bytearray(intake.data + intake.next_data[: consumed.length])
        files = [*intake.files, *_consumed_files(intake.next_files, consumed)]
        complete = intake.complete and consumed.complete
        if self._missing() > 0 and 0 in files:  # as of a message that is not complete
            files = [file for file in files if file]
            complete = False
        self._files = files[: self._max_fds]
        self._fds_complete = complete and len(files) <= self._max_fds
        for file in self._files:
            # A descriptor that cannot be stored is that of an unused request channel, or of the
            # wrong kind. The connection takes its place: it is a channel, and wrong elsewhere.
            known = self._keeper.descriptor(file) if file else self._sock.fileno()
            self._fds.append(os.dup(known))

    @property
    def files(self) -> Sequence[int]:
        """The stored descriptors of a message that was not returned."""
        return [file for file in self._files if file]

    def _take(self, count: int) -> tuple[bytes, list[int], bool]:
        """Take up to ``count`` bytes or, with a keeper, up to the end of the message."""
        if not self._keeper.active:
            return super()._take(count)
        peeked = self._sock.recv(wire.HEADER_SIZE + self._max_payload, socket.MSG_PEEK)
        if not peeked:
            return b"", [], True
        count = self._missing(peeked)
        piece = peeked[:count]
        files = self._store(bytes(self._bytes) + piece, len(piece))
        if files is None:  # it keeps nothing any more
            return super()._take(len(piece))
        self._save(Intake(bytes(self._bytes), self._files, self._fds_complete, piece, files))
        data, fds = self._keeper.consume(self._sock, len(piece))
        consumed = self._keeper.consumed
        self._files += _consumed_files(files, consumed)
        del self._files[self._max_fds :]
        return data, fds, consumed.complete

    def _store(self, message: bytes, count: int) -> list[int] | None:
        """Store the descriptors that come with the next ``count`` bytes of a message.

        None if the keeper failed.
        """
        if not wire.may_carry_fds(message):
            return []
        _data, fds, _complete = wire.receive(self._sock, count, socket.MSG_PEEK)
        request = wire.request_of(message)
        room = self._max_fds - len(self._files)  # a message with more is refused
        files = []
        try:
            for fd in fds:
                kept = len(fds) <= room and _is_kept(request, fd)
                files.append(self._keeper.store(fd) if kept else 0)
                if kept and not files[-1]:
                    return None
        finally:
            foreign.close(fds)
        return files


def _is_kept(request: int | None, fd: int) -> bool:
    """Whether a descriptor of a message can be stored: shared memory, eventfds, local files."""
    if foreign.is_lasting(fd):
        return True
    if request not in _MEMORY:
        return False
    try:
        foreign.check_memory(fd)
    except ValueError:
        return False
    return True


def _consumed_files(files: Sequence[int], consumed: Consumed) -> Sequence[int]:
    """The numbers of the descriptors that were consumed, if ``files`` are those of the peek."""
    return files if len(files) == consumed.fds else [0] * consumed.fds
