# SPDX-License-Identifier: Apache-2.0
"""The dirty log, in which a front-end finds the guest memory that was written during a migration.

Source: QEMU's ``docs/interop/vhost-user.rst``, "Migration". One bit stands for a page of 4096 bytes
of guest physical address, from address 0 on. Answers are marked while VHOST_F_LOG_ALL is set, what
is written to a ring while the ring's own log flag is set. Without a log neither has an effect.

The engines mark (`vhost_rpmb._pure.memory`): a bit is set after its page was written and before the
batch ends. So all is marked when GET_VRING_BASE is answered. A process that is killed may have
written to a ring without a mark, which the next start of the vring makes up for; other pages that
it wrote are written again, because their chains were not published.

A page that has no bit, or whose bit is in a part of the file that was truncated, is left out. Then
the log of the daemon has one line, because the front-end cannot be told.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from vhost_rpmb.typed import TYPE_CHECKING
from vhost_rpmb.vhost_user import foreign, wire
from vhost_rpmb.vhost_user.events import signal
from vhost_rpmb.vhost_user.saved import SavedLog

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import Engine, Log, Memory

__all__ = ["DirtyLog"]


class DirtyLog:
    """The dirty log of a connection; owns its mapping and its descriptor.

    ``memory`` is the guest memory whose pages are marked.
    """

    def __init__(self, engine: Engine, memory: Memory, log: Log) -> None:
        self._engine = engine
        self._memory = memory
        self._log = log
        self._bits: Memory | None = None
        self._saved = SavedLog()
        self._all = False
        self._event_fd = -1
        self._reported = False

    def set_features(self, features: int) -> None:
        """Set the acknowledged features: VHOST_F_LOG_ALL is one of them."""
        self._all = bool(features & wire.F_LOG_ALL)
        self._memory.set_log(self._bits, self._all)

    def set_base(self, size: int, offset: int, fd: int, file: int) -> None:
        """Use a log, in place of an earlier one; ValueError or OSError changes nothing.

        ``file``: the number under which ``fd``, which stays the caller's, is stored.
        """
        bits = self._engine.GuestMemory(1)
        bits.add_region(0, size, 0, offset, fd)
        self._replace(bits)
        self._saved = SavedLog(file, size, offset)

    def set_event(self, fd: int) -> None:
        """Signal an eventfd, which is taken over, after each batch that marked something."""
        if self._event_fd >= 0:
            foreign.close([self._event_fd])
        self._event_fd = fd

    @property
    def signals(self) -> bool:
        """Whether there is a descriptor to be signalled after each batch."""
        return self._event_fd >= 0

    def served(self) -> None:
        """Signal and report what a vring's batches have marked; PeerError as for `signal`."""
        if self._bits is None:
            return
        if self.signals and self._memory.take_marked():
            signal(self._event_fd, self._log)
        if not self._reported and (fault := self._memory.log_fault):
            self._reported = True
            self._log.report("dirty log", f"the dirty log is not complete: {fault}")

    def clear(self) -> None:
        """Forget the log and its descriptor."""
        self._replace(None)
        self._saved = SavedLog()
        self.set_event(-1)

    # Another process

    def save(self, store: Callable[[int], int]) -> SavedLog:
        """Everything that another process needs; ``store`` returns the number of a descriptor."""
        return self._saved._replace(event=store(self._event_fd) if self.signals else 0)

    def restore(self, saved: SavedLog, descriptor: Callable[[int], int]) -> None:
        """Continue with the log of another process; ValueError, OSError."""
        if saved.file:
            foreign.check_memory(fd := descriptor(saved.file))
            self.set_base(saved.size, saved.offset, fd, saved.file)
        if saved.event:
            foreign.check_event(fd := descriptor(saved.event))
            self.set_event(os.dup(fd))

    def _replace(self, bits: Memory | None) -> None:
        before, self._bits = self._bits, bits
        self._memory.set_log(bits, self._all)
        self._reported = False
        if before is not None:
            before.clear()
