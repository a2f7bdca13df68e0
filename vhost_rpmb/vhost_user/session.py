# SPDX-License-Identifier: Apache-2.0
"""One vhost-user connection: messages, replies, serving of vrings, and its record.

Behaviour that the protocol leaves open: a failed message is answered by a non-zero REPLY_ACK if one
was requested (NEED_REPLY set and REPLY_ACK negotiated), GET_CONFIG by an empty payload. Otherwise
the connection ends (PeerError), also if a message with a reply of its own fails: the front-end
could not distinguish an error from an answer.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from functools import partial

from vhost_rpmb.errors import PeerError
from vhost_rpmb.log import Logger
from vhost_rpmb.system import socket
from vhost_rpmb.typed import TYPE_CHECKING
from vhost_rpmb.vhost_user import foreign, saved, wire
from vhost_rpmb.vhost_user.backend import (
    MESSAGES,
    PROTOCOL_FEATURES,
    UNKNOWN,
    Backend,
    Reply,
    Row,
)
from vhost_rpmb.vhost_user.saved import Intake, Owed, State
from vhost_rpmb.vhost_user.transfer import LATER, StateTransfer
from vhost_rpmb.vhost_user.vring import Vring
from vhost_rpmb.vhost_user.wire import Message, ProtocolFeature
from vhost_rpmb.virtio import flags

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.intake import KeptReader
    from vhost_rpmb.vhost_user.interfaces import (
        Device,
        DeviceState,
        Engine,
        Keeper,
        Log,
        Watcher,
    )

__all__ = ["Session"]

_ACK_SUCCESS = 0
_ACK_FAILURE = 1
_UNREAD = "the front-end does not read the replies it asks for"
_MESSAGES_AT_A_TIME = 32  # before vrings and signals are served

logger = Logger(__name__)


class Session:
    """One connection to a front-end; owns the socket (non-blocking) and every received descriptor.

    The caller's event loop calls `receive` when the socket is readable, and `run` while `pending`
    is true, between other events. The vrings add their kick descriptors to `watcher`.

    `protocol_features` are those that are offered. `state` is that of the device, for DEVICE_STATE;
    `wake` is called in the event loop when a transfer of it has ended, and leads to `receive`.

    `stopped` is called after each message while no vring runs, before the reply is sent.

    With a `keeper`, another process can continue the connection: the state and the reply to a
    message are saved together, before the reply is sent and before a vring that it changed runs.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        engine: Engine,
        watcher: Watcher,
        log: Log,
        *,
        poll_us: int = 0,
        keeper: Keeper | None = None,
        stopped: Callable[[], None] | None = None,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
        state: DeviceState | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._sock = sock
        self._keeper = keeper
        self._stopped = stopped
        self._watcher = watcher
        self._log = log
        self._kept_reader: KeptReader | None = None
        if keeper:
            # Imported lazily: only what keeps a connection needs it, and has imported it.
            from vhost_rpmb.vhost_user.intake import KeptReader

            self._kept_reader = KeptReader(sock, keeper, self._save_intake)
        self._reader: wire.MessageReader = self._kept_reader or wire.MessageReader(sock)
        self._store = partial(_store, keeper)
        self._transfer = StateTransfer(state, sock.fileno(), watcher, wake)
        self._held: Message | None = None  # its reply waits for the end of the transfer
        self._backend = Backend(
            *(device, engine, watcher, log, self._store, protocol_features, self._transfer)
        )
        self._loop = engine.Loop(device, watcher.epoll, poll_us)
        self._set_state(self._backend.save())
        sock.setblocking(False)
        # Otherwise a byte out of band is skipped, and descriptors sent with it are closed by the
        # kernel in this thread.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)

    @property
    def pending(self) -> bool:
        """Whether a vring waits for `run`."""
        return any(vring.pending for vring in self._backend.vrings)

    def receive(self) -> None:
        """Serve the messages that have arrived, up to a bound.

        Raises EOFError if the front-end has disconnected, PeerError if it broke the protocol in a
        way that ends the connection.
        """
        if self._held is not None and not self._answer_held():
            return
        for _ in range(_MESSAGES_AT_A_TIME):
            left_open = foreign.left_open()
            message = self._reader.read()
            if message is not None:
                with message:
                    self._serve(message)
            if foreign.more_stay_open(left_open):
                raise PeerError("too many descriptors of front-ends wait to be closed")
            if message is None or self._held is not None or self._watcher.stopping:
                return

    def _answer_held(self) -> bool:
        """Serve the message that waits, unless the transfer still runs. EOFError at a hang-up."""
        assert self._held is not None
        if self._transfer.running:
            hang_up = select.poll()
            hang_up.register(self._sock, select.POLLRDHUP)
            if hang_up.poll(0):
                raise EOFError("the connection ended while the device state was transferred")
            return False
        message, self._held = self._held, None
        self._watcher.listen(self._sock.fileno(), True)
        self._serve(message)
        return True

    def run(self, *, once: bool = False) -> bool:
        """Serve every pending vring, with `once` one batch, until something else needs attention.

        True if that was a second without any event. Raises PeerError if the front-end blocked a
        write to an eventfd.
        """
        vrings = [vring for vring in self._backend.vrings if vring.pending]
        for vring in vrings:
            vring.pending = False
        idle = False
        for vring in vrings:
            # Never sleeps while another waits.
            idle = self._process(vring, once=once or len(vrings) > 1)
        return idle and not self.pending

    def refuse(self, reason: str) -> None:
        """Stop every vring that waits to be served, and report the reason."""
        for vring in self._backend.vrings:
            if vring.pending:
                vring.refuse(reason)

    def close(self) -> None:
        """End the connection: unmap guest memory, close every descriptor and the socket."""
        self._close_own()
        foreign.close_connection(self._sock)

    def leave(self) -> None:
        """Close everything of this process, but leave the connection to another one."""
        self._close_own()
        foreign.close([self._sock.detach()])

    def _close_own(self) -> None:
        self._backend.close()
        self._reader.close()

    # Another process

    @property
    def record(self) -> bytes:
        """The record of the connection between two messages."""
        return saved.pack(self._packed, Intake(), Owed())

    def restore(self) -> None:
        """Continue the connection that the keeper has a record of; before anything else.

        Raises ValueError or OSError if something does not fit, EOFError or PeerError if the
        connection ends for another reason.
        """
        assert self._keeper is not None
        reader = self._kept_reader
        assert reader is not None
        record = saved.Record.unpack(self._keeper.record)
        self._backend.restore(record.state, self._keeper.descriptor)
        self._set_state(record.state)
        if record.owed.data and not self._keeper.replied:
            self._reply(record.owed)
        elif self._keeper.replied < len(record.owed.data):
            raise PeerError(_UNREAD)
        reader.restore(record.intake, self._keeper.consumed)
        self._keeper.retain(self._files.union(reader.files))

    def _set_state(self, state: State) -> None:
        self._packed, self._files = saved.pack_state(state), state.files

    def _save_intake(self, intake: Intake) -> None:
        assert self._keeper is not None
        self._keeper.save(saved.pack(self._packed, intake, Owed()))

    def _conclude(self, data: bytes, fds: Sequence[int]) -> None:
        """Save the state with the reply that is owed, then send the reply."""
        owed = Owed(data, [self._store(fd) for fd in fds])
        keeper = self._keeper
        if keeper is not None and keeper.active:
            self._backend.keep_rings()
            self._set_state(self._backend.save())
        if keeper is None or not keeper.active:
            if data:
                self._sending(lambda: wire.send_bytes(self._sock, data, fds))
            return
        keeper.save(saved.pack(self._packed, Intake(), owed))
        keeper.served()
        if owed.data:
            self._reply(owed)
        keeper.retain(self._files)

    # Messages

    def _serve(self, message: Message) -> None:
        name = wire.request_name(message.request)
        logger.debug(
            "%s: flags 0x%x, %d bytes, %d file descriptors",
            name,
            message.flags,
            len(message.payload),
            len(message.fds),
        )
        row = MESSAGES.get(message.request, UNKNOWN)
        try:
            self._check(row, message)
            reply: bytes | Reply | None = row.handler(self._backend, message)
        except (ValueError, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            reply = self._refuse(row, message, f"{name}: {reason}")
        else:
            if self._stopped is not None and not any(
                vring.running for vring in self._backend.vrings
            ):
                self._stopped()
            if reply is None and self._wants_ack(message):
                reply = wire.pack_u64(_ACK_SUCCESS)
        if reply is LATER:
            self._held = message
            self._watcher.listen(self._sock.fileno(), False)
            return
        fds: Sequence[int] = ()
        if isinstance(reply, Reply):
            fds = [reply.fd]
            reply = reply.payload
        data = b"" if reply is None else wire.pack_message(message.request, wire.FLAG_REPLY, reply)
        try:
            self._conclude(data, fds)
        finally:
            wire.close_fds(fds)
        self._transfer.begin()
        if self._transfer.running and any(vring.running for vring in self._backend.vrings):
            self._transfer.cancel("a vring runs")

    def _check(self, row: Row, message: Message) -> None:
        if message.flags & (wire.FLAG_REPLY | ~wire.FLAGS_MASK):
            raise ValueError(f"expected no flag but NEED_REPLY, found flags 0x{message.flags:x}")
        if row.needs & ~self._backend.protocol_features:
            raise ValueError(f"protocol feature {row.needs.name} was not negotiated")
        if row.size is not None and len(message.payload) != row.size:
            raise ValueError(
                f"expected a payload of {row.size} bytes, found {len(message.payload)}"
            )
        if not message.fds_complete:
            raise ValueError(f"some of its file descriptors were lost (at most {wire.MAX_FDS})")
        if len(message.fds) not in row.fds:
            expected = " or ".join(str(count) for count in row.fds)
            raise ValueError(f"expected {expected} file descriptors, found {len(message.fds)}")

    def _refuse(self, row: Row, message: Message, reason: str) -> bytes:
        """Return the reply to a failed message; PeerError if none can report the failure."""
        if row.failure is not None:
            reply = row.failure
        elif self._wants_ack(message) and not self._has_reply(row):
            reply = wire.pack_u64(_ACK_FAILURE)
        else:
            raise PeerError(reason)
        self._log.report("message refused", f"refused {reason}")
        return reply

    def _has_reply(self, row: Row) -> bool:
        """Whether a message has a reply of its own, which an acknowledgement could be taken for."""
        return row.replies or bool(row.replies_with & self._backend.protocol_features)

    def _wants_ack(self, message: Message) -> bool:
        return bool(
            message.flags & wire.FLAG_NEED_REPLY
            and self._backend.protocol_features & ProtocolFeature.REPLY_ACK
        )

    def _reply(self, owed: Owed) -> None:
        """Send the reply of the present record."""
        assert self._keeper is not None
        keeper = self._keeper
        fds = [keeper.descriptor(file) for file in owed.files]
        self._sending(lambda: keeper.reply(self._sock, owed.data, fds))

    def _sending(self, send: Callable[[], None]) -> None:
        try:
            send()
        except BlockingIOError:
            raise PeerError(_UNREAD) from None
        except OSError as error:
            raise EOFError(f"the connection broke: {error.strerror}") from error

    def _process(self, vring: Vring, *, once: bool) -> bool:
        """Serve a vring, with `once` one batch of it; True after a second without any event."""
        vring.recover()
        if not vring.running:
            return False
        once = once or self._backend.dirty_log.signals
        result = self._loop.serve(vring.queue, vring.kick_fd, vring.call_fd, once)
        taken = self._loop.take_events()
        for other in self._backend.vrings if taken else ():
            if other.kick_fd in taken:
                other.kicked()
        vring.handle(result)
        self._backend.dirty_log.served()
        return bool(result & flags.IDLE)


def _store(keeper: Keeper | None, fd: int) -> int:
    """Store a descriptor in case another process needs it; 0 without a keeper."""
    return keeper.store(fd) if keeper is not None and keeper.active else 0
