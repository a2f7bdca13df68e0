# SPDX-License-Identifier: Apache-2.0
"""The running daemon: options, socket, signals, event loop; one front-end at a time.

Follows the "Backend program conventions" of QEMU's ``docs/interop/vhost-user.rst``.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from vhost_rpmb import engine, signals
from vhost_rpmb.daemon import notify as service
from vhost_rpmb.daemon import sandbox
from vhost_rpmb.errors import PeerError, UsageError
from vhost_rpmb.storage.interface import Access, Resources, Store
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.vhost_user import foreign
from vhost_rpmb.vhost_user.session import Backend, Device, LimitedLog

if TYPE_CHECKING:
    from vhost_rpmb import _pure

__all__ = ["EventLoop", "Options", "run"]

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG, logging.NOTSET + 1)  # by verbosity
_PRIORITIES = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}  # syslog
_BACKLOG = 64  # front-ends that wait for their turn
_MAX_PATH = 107  # bytes of a UNIX socket's path
_IDLE = 1.0  # seconds without an event, then the image is brought up to date
_RETRY = 60.0  # the same, after that failed
_PATIENCE = 1.0  # seconds between interruptions of a system call that a front-end makes block
_STATUS_INTERVAL = 1.0  # seconds between two lines for the service manager
_ACCEPT_PAUSE = 0.1  # seconds, when the system has no descriptor or memory for a connection
_PEER = struct.Struct("iII")  # SO_PEERCRED: pid, uid, gid
_SO_PEERPIDFD = 77  # since Linux 6.5

logger = logging.getLogger(__name__)


class Options(NamedTuple):
    """The daemon's options; validated by the command line, not checked again.

    The command line fills each field from the parser's value of the same name and has the defaults.
    Exactly one of `socket_path` and `fd` is given; `socket_group` only with the former.
    """

    flash_path: str
    socket_path: str | None
    socket_group: int | None  # a group that may also connect
    fd: int | None
    key_path: str | None
    key_set: bool
    initial_counter: int | None  # None: not given
    state_path: str | None  # None: beside the image, see `Paths`
    max_write_blocks: int
    max_read_blocks: int
    strict: bool
    once: bool
    poll_us: int  # microseconds
    sandbox: bool  # restrict the process before it serves
    engine: str  # "fast" or "pure"
    verbosity: int  # 0 warnings, 1 connections, 2 messages of the protocol, 3 everything


def run(options: Options) -> None:
    """Serve until SIGTERM or SIGINT, or until the last front-end that is to be served has gone.

    Raises UsageError and StateError with a text for the operator. Both signals are taken over for
    the rest of the process: a second one does not break a clean end that is under way.
    """
    signals.reset_inherited()
    _configure_logging(options.verbosity)
    sandbox.hide_memory()
    with ExitStack() as stack:
        notifier = service.Notifier(os.environ)
        stack.callback(notifier.close)
        loop = EventLoop(_PATIENCE)
        stack.callback(loop.close)
        stop = _StopSignals(loop)
        stack.callback(stop.close)
        paths = Paths.resolve(options.flash_path, options.state_path, options.key_path)
        store = open_store(
            paths,
            key_set=options.key_set,
            initial_counter=options.initial_counter,
        )
        stack.callback(store.close)
        chosen = engine.load(options.engine)
        device = chosen.RpmbDevice(
            store,
            max_write_blocks=options.max_write_blocks,
            max_read_blocks=options.max_read_blocks,
            strict=options.strict,
        )
        sock, listening = _open_socket(options, stack)
        once = options.once or not listening
        server = _Server(loop, sock, device, chosen, once=once, poll_us=options.poll_us)
        stack.callback(server.close)
        if options.sandbox:
            sandbox.enter(_folders(store.resources(), options.socket_path))
        if listening:
            server.listen()
        else:
            server.connect(sock)
        status = _Status(notifier, server, store, device)
        notifier.tell("READY=1", status.update())
        _serve(loop, stop, server, store, status)
        notifier.tell("STOPPING=1")
        logger.info("ending")


_RIGHTS = {
    Access.CREATE: sandbox.MAKE,
    Access.REMOVE: sandbox.REMOVE,
    Access.SYNC: sandbox.OPEN_FOLDER,
    Access.WRITE: sandbox.WRITE,
}


def _folders(resources: Resources, socket_path: str | None) -> dict[str, int]:
    """The folders that stay usable in the sandbox, and the rights in each."""
    uses = dict(resources.folders)
    if socket_path is not None:
        folder = os.path.dirname(os.path.realpath(socket_path))
        uses[folder] = uses.get(folder, Access(0)) | Access.REMOVE
    return {
        folder: sum(right for flag, right in _RIGHTS.items() if flag in access)
        for folder, access in uses.items()
    }


def _serve(
    loop: EventLoop, stop: _StopSignals, server: _Server, store: Store, status: _Status
) -> None:
    """Serve; after a second without an event bring the image up to date.

    That second passes here or, while the ring is served, in the engine's loop, never in both.
    """
    idle = False
    not_before = 0.0  # when a checkpoint may be tried; later after a failed one
    while not (stop.requested or server.done):
        if idle and store.checkpoint_due and time.monotonic() >= not_before:
            not_before = 0.0 if store.checkpoint() else time.monotonic() + _RETRY
        timeout: float | None = None
        if server.pending:
            timeout = 0
        elif store.checkpoint_due:
            timeout = max(_IDLE, not_before - time.monotonic())
        happened = loop.wait(timeout)
        idle = server.run() or not (happened or timeout == 0)
        status.tell()


class _Status:
    """The line that a service manager shows; told when it changes, once a second at most."""

    def __init__(
        self,
        notifier: service.Notifier,
        server: _Server,
        store: Store,
        device: _pure.RpmbDevice,
    ) -> None:
        self._notifier = notifier
        self._server = server
        self._store = store
        self._device = device
        self._connected = False
        self._due = 0.0
        self._told = ""

    def update(self) -> str:
        """The assignment with how things stand."""
        self._connected = self._server.connected
        self._due = time.monotonic() + _STATUS_INTERVAL
        front_end = "front-end connected" if self._connected else "waiting for a front-end"
        self._told = (
            f"STATUS={front_end}; write counter {self._store.counter}; "
            f"{self._device.served} requests served"
        )
        return self._told

    def tell(self) -> None:
        """Tell it if it has changed and is due; at once when a front-end came or went."""
        if not self._notifier.listens:
            return
        if self._connected != self._server.connected or time.monotonic() >= self._due:
            before = self._told
            if self.update() != before:
                self._notifier.tell(self._told)


class EventLoop:
    """Calls a handler for each descriptor that is readable (epoll).

    With `patience`, SIGALRM comes every that many seconds between two sleeps: a front-end may share
    an eventfd without O_NONBLOCK and fill its counter, and the write to it that then blocks has to
    end. While the loop sleeps there is no timer.
    """

    def __init__(self, patience: float = 0) -> None:
        self._patience = patience
        self._timer_runs = False
        if patience:
            signal.signal(signal.SIGALRM, lambda _number, _frame: None)
        self.epoll = select.epoll()
        self.stopping = False  # asked to end: handlers leave soon
        self._handlers: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, handler: Callable[[], None], *, edge: bool = False) -> None:
        """Call `handler` when `fd` is readable; OSError if it cannot be watched.

        With `edge`, once each time something arrives, not as long as something is there.
        """
        self.epoll.register(fd, select.EPOLLIN | (select.EPOLLET if edge else 0))
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """Stop that; before `fd` is closed."""
        self.epoll.unregister(fd)
        del self._handlers[fd]

    def wait(self, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) and call handlers; False at a timeout."""
        if timeout != 0:
            self._time(False)
        events = self.epoll.poll(timeout)
        self._time(True)
        for fd, _ in events:
            handler = self._handlers.get(fd)  # an earlier handler may have removed it
            if handler is not None:
                handler()
        return bool(events)

    def _time(self, run: bool) -> None:
        if self._patience and run != self._timer_runs:
            seconds = self._patience if run else 0
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
            self._timer_runs = run

    def close(self) -> None:
        """Stop the timer, and give the descriptor of epoll back."""
        self._time(False)
        self.epoll.close()


class _StopSignals:
    """SIGTERM and SIGINT: `requested` becomes true, and the loop's wait ends."""

    def __init__(self, loop: EventLoop) -> None:
        self.requested = False
        self._loop = loop
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)
        loop.add(self._reader, self._drain)

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = self._loop.stopping = True

    def _drain(self) -> None:
        os.read(self._reader, 512)


class _Server:
    """Takes front-ends from a socket, one at a time; `done` after the last one."""

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        device: Device,
        chosen: engine.Engine,
        *,
        once: bool,
        poll_us: int,
    ) -> None:
        self._loop = loop
        self._listener = sock
        self._device = device
        self._engine = chosen
        self._once = once
        self._poll_us = poll_us
        self._connection: socket.socket | None = None
        self._backend: Backend | None = None
        self._process = -1  # of the process that connected: readable once it has ended
        self._replaceable = False  # the next front-end ends this connection
        self._log = LimitedLog(logger)
        self.done = False

    @property
    def connected(self) -> bool:
        """Whether there is a front-end."""
        return self._backend is not None

    @property
    def pending(self) -> bool:
        """Whether `run` has something to do."""
        return self._backend is not None and self._backend.pending

    def listen(self) -> None:
        """Wait for a front-end; meanwhile others wait in the socket's backlog."""
        self._loop.add(self._listener.fileno(), self._accept)

    def connect(self, sock: socket.socket) -> None:
        """Serve a front-end that is connected."""
        backend = Backend(
            sock, self._device, self._engine, self._loop, self._log, poll_us=self._poll_us
        )
        self._backend, self._connection = backend, sock
        self._loop.add(sock.fileno(), self._receive)
        if sock is not self._listener:
            self._watch_process(sock)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        pid, uid, _gid = _PEER.unpack(credentials)
        logger.info("front-end connected: process %d of user %d", pid, uid)

    def run(self) -> bool:
        """Serve each vring that has something; True when that was a second without any event."""
        return self._backend is not None and self._guard(self._backend.run)

    def close(self) -> None:
        """Part with the front-end."""
        if self._backend is not None and self._connection is not None:
            self._loop.remove(self._connection.fileno())
            self._forget_process()
            if self._replaceable:
                self._loop.remove(self._listener.fileno())
                self._replaceable = False
            self._backend.close()
            self._backend = self._connection = None

    def _watch_process(self, sock: socket.socket) -> None:
        with suppress(OSError):  # an older kernel
            self._process = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
            self._loop.add(self._process, self._orphaned)

    def _forget_process(self) -> None:
        if self._process >= 0:
            self._loop.remove(self._process)
            os.close(self._process)
            self._process = -1

    def _orphaned(self) -> None:
        """The process that connected has ended, but not the connection.

        Another one may have taken it over. Or it lies where nobody takes it away, in the queue of
        a front-end that waits for instance. So it ends as soon as another front-end wants its
        place.
        """
        self._forget_process()
        self._replaceable = True
        self._loop.add(self._listener.fileno(), self._replace)

    def _replace(self) -> None:
        logger.info("front-end disconnected: its process has ended, and another front-end waits")
        self._end()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # gone again, or taken by another process that has the same socket
        except OSError as error:
            self._log.report("accept", f"a front-end cannot be accepted: {error.strerror}")
            time.sleep(_ACCEPT_PAUSE)
            return
        self._loop.remove(self._listener.fileno())
        self.connect(sock)

    def _receive(self) -> None:
        assert self._backend is not None
        self._guard(self._backend.receive)

    def _guard(self, action: Callable[[], bool | None]) -> bool:
        """Let the connection do something; when it ends, wait for the next one."""
        try:
            return bool(action())
        except EOFError as error:
            logger.info("front-end disconnected: %s", error)
        except PeerError as error:
            self._log.report("protocol", f"front-end disconnected, it broke the protocol: {error}")
        self._end()
        return False

    def _end(self) -> None:
        """Disconnect the front-end and wait for the next one."""
        self.close()
        if self._once:
            self.done = True
        else:
            self.listen()


def _open_socket(options: Options, stack: ExitStack) -> tuple[socket.socket, bool]:
    """The socket that the options name, and whether it listens (or is connected already)."""
    if options.socket_path is not None:
        sock = _listen(options.socket_path, options.socket_group, stack)
        listening = True
    else:
        assert options.fd is not None
        sock, listening = _adopt(options.fd)
        stack.callback(_close_listener, sock)
    sock.setblocking(False)
    return sock, listening


def _close_listener(sock: socket.socket) -> None:
    """Close it without waiting for what those sent whose turn has not come."""
    foreign.close([sock.detach()] if sock.fileno() >= 0 else [])


def _listen(path: str, group: int | None, stack: ExitStack) -> socket.socket:
    """Create a UNIX stream socket at `path` and listen.

    Its mode is 0600 from the first moment or, with `group`, 0660. `stack` closes and removes it.
    Raises UsageError where something else is in the way.
    """
    length = len(os.fsencode(path))
    if length > _MAX_PATH:
        raise UsageError(
            f"--socket-path={path}: expected at most {_MAX_PATH} bytes, found {length}: "
            "name a shorter path"
        )
    _clear_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.callback(_close_listener, sock)
    umask = os.umask(0o177 if group is None else 0o117)
    try:
        sock.bind(path)
        stack.callback(_remove_socket, path, os.lstat(path))
        if group is not None:
            _give_to_group(path, group)  # before it listens: nobody can have connected
        sock.listen(_BACKLOG)
    except OSError as error:
        raise UsageError(f"--socket-path={path}: cannot listen there: {error.strerror}") from error
    finally:
        os.umask(umask)
    logger.info("listening on %s", path)
    return sock


def _give_to_group(path: str, group: int) -> None:
    try:
        os.chown(path, -1, group, follow_symlinks=False)
    except OSError as error:
        raise UsageError(
            f"--socket-group={group}: expected a group that this user may give {path} to, found: "
            f"{error.strerror}: name a group of this user's, or start as root"
        ) from error


def _clear_path(path: str) -> None:
    """Remove a stale socket at `path`; UsageError where a live one or another file is."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # nothing is there, or bind() will say what is wrong
    if not stat.S_ISSOCK(mode):
        raise UsageError(
            f"--socket-path={path}: expected no file or a stale socket, found another kind of "
            "file: remove it or name another path"
        )
    # Connecting with another socket type tells whether a process has the socket, without troubling
    # that process with a connection.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        result = probe.connect_ex(path)
    if result == errno.ECONNREFUSED:
        logger.info("replacing the stale socket %s", path)
        with suppress(FileNotFoundError):
            os.unlink(path)
    elif result in (0, errno.EPROTOTYPE):
        raise UsageError(
            f"--socket-path={path}: another process is listening there: stop it or name another "
            "path"
        )
    elif result != errno.ENOENT:
        raise UsageError(
            f"--socket-path={path}: cannot tell whether the socket there is stale: "
            f"{os.strerror(result)}: remove it or name another path"
        )


def _remove_socket(path: str, ours: os.stat_result) -> None:
    """Remove the socket file, unless another one has taken its place."""
    with suppress(OSError):
        if os.path.samestat(os.lstat(path), ours):
            os.unlink(path)


def _adopt(fd: int) -> tuple[socket.socket, bool]:
    """The inherited socket, and whether it listens; UsageError unless UNIX stream socket."""
    expected = f"--fd={fd}: expected a UNIX stream socket that listens or is connected"
    try:
        foreign.refuse_path(fd)
        sock = socket.socket(fileno=fd)
    except ValueError:
        raise UsageError(f"{expected}, found a descriptor opened with O_PATH") from None
    except OSError as error:
        raise UsageError(f"{expected}, found: {error.strerror}") from error
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise UsageError(f"{expected}, found another kind of socket")
        listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if not listening:
            try:
                sock.getpeername()
            except OSError:
                raise UsageError(f"{expected}, found one that does neither") from None
    except BaseException:
        sock.close()
        raise
    sock.set_inheritable(False)
    return sock, listening


class _Formatter(logging.Formatter):
    """Lines as other programs write them: program, severity, text; the journal gets a priority.

    The journal has the time as well; elsewhere debug lines begin with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._prefixes = {level: service.priority(_PRIORITIES[level]) for level in _PRIORITIES}

    def format(self, record: logging.LogRecord) -> str:
        prefix = self._prefixes.get(record.levelno, "")
        if record.levelno <= logging.DEBUG and not prefix:
            # UTC, because the sandbox may have no file of time zones.
            second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            prefix = f"{second}.{int(record.msecs):03}Z "
        return f"{prefix}vhost-user-rpmb: {record.levelname.lower()}: {super().format(record)}"


def _configure_logging(verbosity: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    package = logging.getLogger("vhost_rpmb")
    package.handlers[:] = [handler]
    package.propagate = False
    package.setLevel(_LEVELS[min(verbosity, len(_LEVELS) - 1)])
