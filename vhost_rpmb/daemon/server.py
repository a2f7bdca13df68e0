# SPDX-License-Identifier: Apache-2.0
"""The running daemon: store, device, socket and event loop; one front-end at a time.

Follows the "Backend program conventions" of QEMU's ``docs/interop/vhost-user.rst``.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

from vhost_rpmb import engine, hashes, libc, process
from vhost_rpmb.daemon import sandbox
from vhost_rpmb.daemon.descriptors import DescriptorStore
from vhost_rpmb.daemon.device import make_device
from vhost_rpmb.daemon.eventloop import EventLoop, StopSignals
from vhost_rpmb.daemon.listener import open_socket
from vhost_rpmb.daemon.notify import Notifier
from vhost_rpmb.daemon.unkept import Unkept
from vhost_rpmb.errors import Fenced, PeerError, Stopped, UsageError
from vhost_rpmb.log import LimitedLog, Logger
from vhost_rpmb.storage.interface import Access, Resources, SharedStore, Store, TakeOver
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.system import accept, socket
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.session import Session
from vhost_rpmb.vhost_user.wire import ProtocolFeature

if TYPE_CHECKING:
    from vhost_rpmb.daemon.device import ServedDevice
    from vhost_rpmb.daemon.migration import Migration
    from vhost_rpmb.injection.script import Script
    from vhost_rpmb.vhost_user.interfaces import Device

__all__ = ["Options", "Server", "Status", "folders", "run", "serve"]

_IDLE = 1.0  # seconds without an event before a checkpoint
_RETRY = 60.0  # seconds between a failed checkpoint and the next one
_PATIENCE = 1.0  # seconds between interruptions of a system call that a front-end blocks
_STATUS_INTERVAL = 1.0  # seconds between two status lines for the service manager
_OWNER_POLL = 0.05  # seconds between two looks at a device that another daemon owns
_ACCEPT_PAUSE = 0.1  # seconds, when the system has no descriptor or memory for a connection
_PEER = struct.Struct("iII")  # SO_PEERCRED: pid, uid, gid
_SO_PEERPIDFD = 77  # since Linux 6.5
_MOVABLE = PROTOCOL_FEATURES | ProtocolFeature.LOG_SHMFD | ProtocolFeature.DEVICE_STATE
_NO_PROCESS = (errno.EINVAL, errno.ESRCH)  # before Linux 6.16: it has ended and was waited for

logger = Logger(__name__)


class Options(NamedTuple):
    """The daemon's options; validated by the command line, not checked again.

    The command line fills each field from the parser's value of the same name and has the defaults.
    Exactly one of `socket_path` and `fd` is given; `socket_group` only with the former. Exactly one
    of `flash_path` and `store` is given; options about files only with the former.
    """

    flash_path: str | None
    store: str | None  # the home of the state in place of files: "etcd:" and a configuration
    device: str | None  # with `store`
    take_over: TakeOver
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
    virtio_features: int  # to be offered
    sandbox: bool  # restrict the process before it serves
    engine: str  # "fast" or "pure"
    verbosity: int  # 0 warnings, 1 connections, 2 messages of the protocol, 3 everything
    inject: Script | None  # faults, for tests of firmware
    migration: str  # "off", "shared" or "copy"
    incoming: bool  # the device arrives from another host; only with a mode
    fence_path: str | None  # of copies; likewise
    migration_key: str | None  # likewise


def run(options: Options) -> None:
    """Serve until SIGTERM or SIGINT, or until the end of the last front-end to be served.

    Raises UsageError and StateError. Both signals are handled until the process ends: a second one
    does not interrupt a clean end.
    """
    process.reset_signals()
    chosen = engine.load(options.engine)
    libc.use(chosen.Library)
    hashes.use(chosen.Hashes)
    process.hide_memory()
    process.allow_descriptors()
    with ExitStack() as stack:
        notifier = Notifier(os.environ)
        stack.callback(notifier.close)
        descriptors = DescriptorStore(notifier, os.environ)
        handover = _make_handover(descriptors)
        stack.callback(handover.close)
        loop = EventLoop(_PATIENCE)
        stack.callback(loop.close)
        stop = StopSignals(loop)
        stack.callback(stop.close)
        try:
            store, shared = _open_store(options, stop, notifier, stack)
        except Stopped:
            return
        device = stack.enter_context(make_device(options, store, chosen, loop.epoll.poll))
        handover.open(store.name)
        device.journal = handover.journal
        migration = None
        if options.migration != "off":
            from vhost_rpmb.daemon.migration import make_migration  # imported lazily: few use it

            migration = make_migration(options, store, device, handover)
        sock, listening = _open_socket(options, descriptors, handover, stack)
        server = Server(
            *(loop, sock, device, chosen, handover),
            listening=listening,
            once=options.once,
            poll_us=options.poll_us,
            shared=shared,
            reload=device.reload,
            migration=migration,
        )
        stack.callback(server.close)
        if shared is not None:
            from vhost_rpmb.daemon.fleet import Renewal

            stack.callback(Renewal(loop, shared, lambda: server.connected).close)
        if options.sandbox:
            resources = store.resources()
            sandbox.enter(
                folders(resources, options.socket_path, migration),
                resources.ports,
                descriptor_store=handover.active,
            )
        _tidy()
        status = Status(notifier, server, store, device)
        fenced = ""
        try:
            if handover.record:
                server.resume()
            elif listening:
                server.listen()
            else:
                server.connect(sock)
            # The notifications of a takeover may have filled the service manager's queue.
            with suppress(OSError):
                notifier.send_reliably("READY=1", status.update())
            serve(loop, stop, server, store, status)
        except Stopped:
            logger.warning("ending while the outcome of a write is unknown, without an answer")
        except Fenced as error:
            fenced = str(error)
        if fenced:
            server.disconnect()  # after the handler, whose traceback refers to the guest's memory
            raise Fenced(fenced)
        handover.served()  # a stop is no failure, whatever it interrupted
        notifier.send("STOPPING=1")
        logger.info("ending")


def _make_handover(store: DescriptorStore) -> Unkept:
    """Return what keeps the connection, as far as there is a store for it."""
    if not (store.limit or store.names or store.ambiguous):
        return Unkept(store)
    from vhost_rpmb.daemon.handover import Handover  # imported lazily: few have a store

    return Handover(store)


def _tidy() -> None:
    """Free what only the start needed: the daemon may stand by for weeks."""
    sys.path_importer_cache.clear()  # names of all files of the folders with modules
    libc.trim()


def _open_store(
    options: Options, stop: StopSignals, notifier: Notifier, stack: ExitStack
) -> tuple[Store, SharedStore | None]:
    """Open the home of the state that the options name; ``stack`` closes it.

    A home that hosts share is the second value too.
    """
    if options.flash_path is not None:
        paths = Paths.resolve(options.flash_path, options.state_path, options.key_path)
        local: Store
        if options.migration == "off":
            local = open_store(
                paths, key_set=options.key_set, initial_counter=options.initial_counter
            )
        else:
            from vhost_rpmb.daemon.migration import open_movable  # imported lazily: few use it

            local = open_movable(options, paths)
        stack.callback(local.close)
        return local, None
    from vhost_rpmb.daemon.fleet import open_fleet  # imported lazily: few devices use it

    fleet = open_fleet(
        options.store or "",
        options.device or "",
        options.take_over,
        stopping=lambda: stop.requested,
        report=lambda reason: notifier.send(f"STATUS=waiting for the store: {reason}"),
    )
    stack.callback(fleet.close)
    return fleet, fleet


def _open_socket(
    options: Options, descriptors: DescriptorStore, handover: Unkept, stack: ExitStack
) -> tuple[socket.socket, bool]:
    """Return the socket, and whether it listens (or is connected); UsageError.

    A number among those of the stored descriptors names a socket that the service manager had for
    the first process only: a connected one, which is stored.
    """
    if options.fd not in descriptors.inherited:
        return open_socket(options.socket_path, options.socket_group, options.fd, stack)
    if not handover.record:
        raise UsageError(
            f"--fd={options.fd}: expected a UNIX stream socket that listens or is connected, found "
            "a stored descriptor of an earlier process: start the socket unit"
        )
    sock = handover.connection()
    stack.callback(sock.close)
    return sock, False


def folders(
    resources: Resources, socket_path: str | None, migration: Migration | None = None
) -> dict[str, Access]:
    """Return the folders that stay accessible in the sandbox, and the access to each."""
    uses = dict(resources.folders)
    for folder, access in migration.folders.items() if migration is not None else ():
        uses[folder] = uses.get(folder, Access(0)) | access
    if socket_path is not None:
        folder = os.path.dirname(os.path.realpath(socket_path))
        uses[folder] = uses.get(folder, Access(0)) | Access.REMOVE
    return uses


def serve(loop: EventLoop, stop: StopSignals, server: Server, store: Store, status: Status) -> None:
    """Serve until a stop is requested; make a checkpoint after a second without an event.

    That second passes here or, while the ring is served, in the engine's loop, never in both.
    """
    idle = False
    under_way = False  # a checkpoint, in slices: a request that arrives is served in between
    not_before = 0.0  # the earliest time of a checkpoint; later after a failed one
    while not (stop.requested or server.done):
        due = under_way or (idle and time.monotonic() >= not_before)
        under_way = False
        if due and store.checkpoint_due:
            done = store.checkpoint_slice()
            under_way = done is None
            not_before = time.monotonic() + _RETRY if done is False else 0.0
        timeout: float | None = None
        if server.pending or under_way:
            timeout = 0
        elif server.waiting:
            timeout = _OWNER_POLL
        elif store.checkpoint_due:
            timeout = max(_IDLE, not_before - time.monotonic())
        happened = loop.wait(timeout)
        idle = server.run() or not (happened or timeout == 0)
        status.send_if_due()


class Status:
    """The status line of a service manager: sent when it changes, at most once a second."""

    def __init__(
        self, notifier: Notifier, server: Server, store: Store, device: ServedDevice
    ) -> None:
        self._notifier = notifier
        self._server = server
        self._store = store
        self._device = device
        self._connected = False
        self._due = 0.0
        self._last_sent = ""

    def update(self) -> str:
        """Return the current status as an assignment, which the caller sends."""
        self._connected = self._server.connected
        self._due = time.monotonic() + _STATUS_INTERVAL
        front_end = "front-end connected" if self._connected else "waiting for a front-end"
        self._last_sent = (
            f"STATUS={front_end}; write counter {self._store.counter}; "
            f"{self._device.served} requests served"
        )
        return self._last_sent

    def send_if_due(self) -> None:
        """Send it if it has changed and is due; immediately if a front-end came or left."""
        if not self._notifier.active:
            return
        if self._connected != self._server.connected or time.monotonic() >= self._due:
            before = self._last_sent
            if self.update() != before:
                self._notifier.send(self._last_sent)


class Server:
    """Serves the front-ends of a socket one at a time; `done` after the last one."""

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        device: Device,
        chosen: engine.Engine,
        handover: Unkept,
        *,
        listening: bool,
        once: bool,
        poll_us: int,
        shared: SharedStore | None = None,
        reload: Callable[[], None] = lambda: None,
        migration: Migration | None = None,
    ) -> None:
        self._loop = loop
        self._listener = sock
        self._device = device
        self._engine = chosen
        self._handover = handover
        self._listening = listening
        self._once = once or not listening
        self._poll_us = poll_us
        self._connection: socket.socket | None = None
        self._session: Session | None = None
        self._process = -1  # pidfd of the process that connected: readable after its end
        self._replaceable = False  # the next front-end ends this connection
        self._log = LimitedLog(logger)
        self._shared = shared
        self._reload = reload  # called when the shared device is owned anew
        self._migration = migration
        self.waiting = False  # to own the device: requests stay in the ring
        self.done = False

    @property
    def connected(self) -> bool:
        """Whether there is a front-end."""
        return self._session is not None

    @property
    def pending(self) -> bool:
        """Whether `run` has work."""
        return self._session is not None and self._session.pending and not self.waiting

    def listen(self) -> None:
        """Accept the next front-end; others wait in the socket's backlog meanwhile."""
        self._loop.add(self._listener.fileno(), self._accept)

    def connect(self, sock: socket.socket) -> None:
        """Serve a connected front-end."""
        self._device.clear_register()
        if self._migration is not None:
            self._migration.connected()
        self._handover.connect(sock, self._begin(sock).record)
        logger.info("front-end connected: %s", _peer(sock))

    def resume(self) -> None:
        """Serve the front-end of an earlier process, or end its connection."""
        try:
            sock = self._handover.connection() if self._listening else self._listener
            self._begin(sock).restore()
        except EOFError as error:
            logger.info("front-end disconnected: %s", error)
            self._end()
        except Exception as error:
            # No exception may end the process: the next one would find the same record.
            self._handover.give_up(str(error) or type(error).__name__)
            self._end()
        else:
            logger.info("front-end taken over: %s", _peer(sock))
            # What made the earlier process end may be the next message or request.
            self._receive()
            self.run(once=True)
            self._handover.served()

    def _begin(self, sock: socket.socket) -> Session:
        """Create the session of a connection."""
        self._session = Session(
            *(sock, self._device, self._engine, self._loop, self._log),
            poll_us=self._poll_us,
            keeper=self._handover.keeper,
            stopped=self._release if self._shared is not None else None,
            protocol_features=PROTOCOL_FEATURES if self._migration is None else _MOVABLE,
            state=self._migration,
            wake=self._receive,
        )
        self._connection = sock
        self._loop.add(sock.fileno(), self._receive)
        if sock is not self._listener:
            self._watch_process(sock)
        return self._session

    def run(self, *, once: bool = False) -> bool:
        """Serve each pending vring, with `once` one batch of it, as soon as the device is owned.

        True if that was a second without any event.
        """
        if self._session is None or (self._session.pending and not self._own()):
            return False
        return self._guard(partial(self._session.run, once=once))

    def _own(self) -> bool:
        """Own the device, if hosts share it or it is handed over: a vring runs."""
        if self._migration is not None:
            refusal = self._migration.start()
            self.waiting = refusal is None
            if refusal:
                assert self._session is not None
                self._session.refuse(refusal)
            if refusal or self.waiting:
                return False
        if self._shared is None or self._shared.owned:
            return True
        self.waiting = not self._shared.begin()
        if not self.waiting:
            self._reload()
        return not self.waiting

    def _release(self) -> None:
        """Let another daemon own the device: no vring runs."""
        if self._shared is not None:
            self._shared.end()
            self.waiting = False

    def close(self) -> None:
        """Leave the front-end to the next process or, if that cannot be, disconnect it."""
        self._close(leave=self._handover.active)

    def disconnect(self) -> None:
        """Disconnect the front-end; no process continues the connection."""
        self._close(leave=False)
        self._handover.disconnect()

    def _close(self, *, leave: bool) -> None:
        if self._session is not None and self._connection is not None:
            self._loop.remove(self._connection.fileno())
            self._forget_process()
            if self._replaceable:
                self._loop.remove(self._listener.fileno())
                self._replaceable = False
            if leave:
                self._session.leave()
            else:
                self._session.close()
                self._release()
                self.waiting = False
                if self._migration is not None:
                    self._migration.disconnected()
            self._session = self._connection = None

    def _watch_process(self, sock: socket.socket) -> None:
        try:
            self._process = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:
            if error.errno in _NO_PROCESS:
                self._orphaned()
            return  # otherwise a kernel before 6.5
        self._loop.add(self._process, self._orphaned)

    def _forget_process(self) -> None:
        if self._process >= 0:
            self._loop.remove(self._process)
            os.close(self._process)
            self._process = -1

    def _orphaned(self) -> None:
        """Handle the end of the process that connected, while the connection stays open.

        Another process may have inherited it, or it is in the queue of a socket from which no
        process receives, for instance that of a waiting front-end. It ends when another front-end
        connects.
        """
        self._forget_process()
        self._replaceable = True
        self._loop.add(self._listener.fileno(), self._replace)

    def _replace(self) -> None:
        logger.info("front-end disconnected: its process has ended, and another front-end waits")
        self._end()

    def _accept(self) -> None:
        try:
            sock = accept(self._listener)
        except (BlockingIOError, ConnectionAbortedError):
            return  # disconnected, or accepted by another process that shares the socket
        except OSError as error:
            self._log.report("accept", f"a front-end cannot be accepted: {error.strerror}")
            time.sleep(_ACCEPT_PAUSE)
            return
        self._loop.remove(self._listener.fileno())
        self.connect(sock)

    def _receive(self) -> None:
        assert self._session is not None
        self._guard(self._session.receive)

    def _guard(self, action: Callable[[], bool | None]) -> bool:
        """Let the session act; if it ends, accept the next front-end."""
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
        self.disconnect()
        if self._once:
            self.done = True
        else:
            self.listen()


def _peer(sock: socket.socket) -> str:
    """The process at the other end, as it was when it connected."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _gid = _PEER.unpack(credentials)
    return f"process {pid} of user {uid}"
