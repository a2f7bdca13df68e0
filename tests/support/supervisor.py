# SPDX-License-Identifier: Apache-2.0
"""A service manager for tests that keeps descriptors: the protocol of systemd's descriptor store.

It does what systemd 257 was observed to do: a descriptor of an open file that it already has is
dropped, whatever its name; those above the limit are dropped; stored descriptors come after the
socket unit's, newest first, without CLOEXEC; a daemon that ends is started again with them, unless
its exit status is 2; a stop closes them. All notifications of a process are read before its death
is handled.
"""

from __future__ import annotations

import ctypes
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.support.daemon import PATIENCE

# Sets LISTEN_PID, which only the process itself knows before its program runs.
_WITH_PID = 'LISTEN_PID=$$ exec "$@"'
_PLAIN = 'exec "$@"'
_PREVENTS_RESTART = 2  # the exit status of RestartPreventExitStatus=
_KCMP = {"x86_64": 312, "aarch64": 272}[platform.machine()]
_MAX_MESSAGE = 4096
_MAX_FDS = 253  # SCM_MAX_FD
_libc = ctypes.CDLL(None, use_errno=True)


class Stored(NamedTuple):
    name: str
    fd: int
    polled: bool  # removed at a hang-up


class Supervisor:
    """Runs a command and starts it again when it ends.

    `listener` is handed over as the socket unit's descriptor. `oldest_first` hands the stored ones
    over as systemd does after daemon-reexec. `limit` is FileDescriptorStoreMax=; 0: there is no
    store. `environment` is the command's, without what a service manager sets.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        *,
        environment: dict[str, str] | None = None,
        listener: socket.socket | None = None,
        limit: int = 1024,
        oldest_first: bool = False,
    ) -> None:
        self.command = list(command)
        self.environment = dict(os.environ if environment is None else environment)
        self.limit = limit
        self.oldest_first = oldest_first
        self.starts = 0
        self.statuses: list[int] = []  # exit statuses; -9: killed by SIGKILL
        self.notifications: list[dict[str, str]] = []
        self.folder = folder
        self._listener = listener
        self._log = folder / f"supervised-{time.monotonic_ns()}.log"
        self._address = folder / f"notify-{time.monotonic_ns()}"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._address))
        self._notify.setblocking(False)
        self._store: list[Stored] = []  # newest first
        self._changed = threading.Condition()  # its lock guards everything below and the store
        self._pid = 0  # 0: no process
        self._pidfd = -1
        self._ready = False
        self._held = False  # a process that ends is not started again
        self._stopping = False  # and the store is emptied then
        self._closing = False
        self._wake = os.eventfd(0)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    # The operator's side.

    def start(self) -> None:
        """Start the service and wait until it is ready."""
        with self._changed:
            self._stopping = False
            self._start()
        self.wait_ready()

    def restart(self, number: int = signal.SIGTERM) -> None:
        """End the process with a signal; wait until the next one is ready."""
        starts = self.starts
        self.send(number)
        self.wait_ready(starts + 1)

    def kill(self) -> None:
        """Restart it by SIGKILL."""
        self.restart(signal.SIGKILL)

    def send(self, number: int) -> None:
        """Send a signal to the process, if there is one."""
        with self._changed:
            if self._pid:
                signal.pidfd_send_signal(self._pidfd, number)

    @contextmanager
    def down(self, number: int = signal.SIGKILL) -> Iterator[None]:
        """End the process; the next one is started at the end of the context."""
        with self._changed:
            self._held = True
        self.send(number)
        self.wait(lambda: not self._pid)
        yield
        with self._changed:
            self._held = False
            self._start()
        self.wait_ready()

    def stop(self) -> None:
        """End the service: the stored descriptors are closed."""
        with self._changed:
            self._stopping = True
        self.send(signal.SIGTERM)
        self.send(signal.SIGCONT)  # as systemd does, in case it does not run
        self.wait(lambda: not self._pid)
        with self._changed:
            self._empty()

    def wait_ready(self, starts: int = 0) -> None:
        """Wait until the process is ready, after at least so many starts."""
        self.wait(lambda: self._ready and self.starts >= starts)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds; it is asked after each event."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE), (
                f"started {self.starts} times, ready: {self._ready}, exit statuses "
                f"{self.statuses[-10:]}, log: {self.log[-4000:]}"
            )

    def close(self) -> None:
        """Kill the process and end."""
        with self._changed:
            self._stopping = self._closing = True
        self.send(signal.SIGKILL)
        os.eventfd_write(self._wake, 1)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._empty()
        self._notify.close()
        self._address.unlink()
        os.close(self._wake)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process; 0: there is none."""
        return self._pid

    @property
    def ready(self) -> bool:
        """Whether the process has said that it is ready."""
        return self._ready

    @property
    def log(self) -> str:
        """What all processes wrote to standard output and standard error."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def stored(self) -> list[Stored]:
        """The stored descriptors as they would be handed over now; they stay the store's."""
        with self._changed:
            return self._store[::-1] if self.oldest_first else list(self._store)

    @property
    def names(self) -> list[str]:
        """Their names."""
        return [stored.name for stored in self.stored]

    # The manager's side: everything below runs with the lock held.

    def _start(self) -> None:
        """Start a process with the descriptors and variables of a service."""
        store = self._store[::-1] if self.oldest_first else self._store
        fds = [stored.fd for stored in store]
        names = [stored.name for stored in store]
        if self._listener is not None:
            fds.insert(0, self._listener.fileno())
            names.insert(0, "vhost-user-rpmb.socket")
        variables = {"NOTIFY_SOCKET": str(self._address)}
        if self.limit:
            variables["FDSTORE"] = str(self.limit)
        if fds:
            variables |= {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        with open(os.devnull) as null, self._log.open("ab") as log:
            moves = {0: null.fileno(), 1: log.fileno(), 2: log.fileno()}
            moves |= dict(enumerate(fds, 3))
            self._pid = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", _WITH_PID if fds else _PLAIN, "sh", *self.command],
                self.environment | variables,
                file_actions=[(os.POSIX_SPAWN_DUP2, *move) for move in in_order(moves)],
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them
            )
        self._pidfd = os.pidfd_open(self._pid)
        self._ready = False
        self.starts += 1
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        """The thread: react to notifications, hang-ups and deaths."""
        while True:
            with self._changed:
                if self._closing and not self._pid:
                    return
                poll = select.poll()
                for fd in (self._notify.fileno(), self._wake, self._pidfd):
                    if fd >= 0:
                        poll.register(fd, select.POLLIN)
                for stored in self._store:
                    if stored.polled:
                        poll.register(stored.fd, 0)  # errors and hang-ups are always reported
            events = dict(poll.poll())
            with self._changed:
                if self._wake in events:
                    os.eventfd_read(self._wake)
                # Deaths are determined first, so that everything a dead process sent is read.
                ended = self._pid != 0 and is_readable(self._pidfd)
                for stored in [s for s in self._store if s.polled and s.fd in events]:
                    self._remove(stored)
                self._read_notifications()
                if ended:
                    self._reap()
                self._changed.notify_all()

    def _reap(self) -> None:
        _, status = os.waitpid(self._pid, 0)
        self.statuses.append(os.waitstatus_to_exitcode(status))
        os.close(self._pidfd)
        self._pid = 0
        self._pidfd = -1
        self._ready = False
        if self._stopping or self.statuses[-1] == _PREVENTS_RESTART:
            self._empty()
        elif not self._held:
            self._start()

    def _read_notifications(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(
                    self._notify, _MAX_MESSAGE, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            self._notified(dict(line.split("=", 1) for line in data.decode().split("\n")), fds)

    def _notified(self, variables: dict[str, str], fds: list[int]) -> None:
        self.notifications.append(variables)
        self._ready |= variables.get("READY") == "1"
        name = variables.get("FDNAME", "")
        if variables.get("FDSTOREREMOVE") == "1":
            for stored in [each for each in self._store if each.name == name]:
                self._remove(stored)
        elif variables.get("FDSTORE") == "1":
            if not name or ":" in name or len(name) > 255 or not name.isprintable():
                name = "stored"
            for fd in fds:
                if len(self._store) >= self.limit or any(same(fd, s.fd) for s in self._store):
                    os.close(fd)
                else:
                    self._store.insert(0, Stored(name, fd, variables.get("FDPOLL") != "0"))
            return
        for fd in fds:
            os.close(fd)

    def _remove(self, stored: Stored) -> None:
        self._store.remove(stored)
        os.close(stored.fd)

    def _empty(self) -> None:
        for stored in list(self._store):
            self._remove(stored)


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def same(one: int, other: int) -> bool:
    """Whether two descriptors of this process are of one open file, by kcmp(2)."""
    pid = os.getpid()
    result: int = _libc.syscall(_KCMP, pid, pid, 0, one, other)
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result == 0


def in_order(moves: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Calls of dup2(old, new) that carry out moves {new: old} as if all happened at once."""
    left = dict(moves)
    spare = max(*moves, *moves.values())
    while left:
        # A move to a number that another one still needs as its source has to wait.
        needed = Counter(left.values())
        free = [new for new, old in left.items() if needed[new] == (new == old)]
        if not free:  # cycles only: one source gets a number that no move has
            source = next(iter(left))
            spare += 1
            yield source, spare
            left = {new: spare if old == source else old for new, old in left.items()}
        for new in free:
            yield left.pop(new), new


def daemon_command(home: Sequence[str], *options: str) -> list[str]:
    """The command of a vhost-user-rpmb that gets its socket from the supervisor.

    ``home``: the options that name the home of the device's state.
    """
    return [sys.executable, "-m", "vhost_rpmb", "--fd=3", *home, *options]
