# SPDX-License-Identifier: Apache-2.0
"""The back-end side of one vhost-user connection: features, memory table, vrings, config, status.

Source: QEMU's ``docs/interop/vhost-user.rst``. Knows nothing of the device but the `Device`
protocol. Each message is a row of the table at the end. A row's handler raises ValueError when the
message breaks a rule and OSError when the kernel refuses what it asks for, and has changed nothing
then.

What the protocol leaves open:

- A message that fails is answered by a non-zero REPLY_ACK where one was asked for (NEED_REPLY set
  and REPLY_ACK negotiated), GET_CONFIG by an empty payload. Otherwise the connection ends
  (PeerError), also when a message with a reply of its own fails: the front-end could not tell the
  error from an answer.
- A vring runs while it is enabled and has a size, addresses and a kick descriptor. When it comes to
  run it is looked at once without a kick, and its call descriptor is signalled once: an earlier
  back-end that was killed may have taken the kick, or not have given the signal.
- GET_VRING_BASE stops a vring by giving up its kick descriptor. A broken vring works again after a
  new SET_VRING_BASE or SET_VRING_KICK, and is set up anew after a reset of the device
  (RESET_DEVICE, or status 0). Call and error descriptors, memory regions and acknowledged features
  stay through all of these: front-ends send them once.
- Size and base of a running vring cannot be changed, as in the kernel's vhost.
- A front-end turns dirty logging on although it was not offered: QEMU does on the monitor command
  calc-dirty-rate, and aborts with the whole VM when that is refused. SET_LOG_BASE,
  VHOST_F_LOG_ALL and the log flag of SET_VRING_ADDR are accepted without effect.
- GET_CONFIG beyond the config space reads zeros: some front-ends let the guest choose offset and
  size, and abort when they are refused.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vhost_rpmb.errors import PeerError
from vhost_rpmb.vhost_user import foreign, wire
from vhost_rpmb.vhost_user.wire import Message, ProtocolFeature, Request

if TYPE_CHECKING:
    from vhost_rpmb import _pure
    from vhost_rpmb.engine import Engine

MAX_MEM_SLOTS = 509  # as many as the kernel's vhost takes
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)

_ACK_SUCCESS = 0
_ACK_FAILURE = 1
_MESSAGES_AT_A_TIME = 32  # then vrings and signals have their turn
_PIPE_BYTES = 65536  # of a kick pipe, at a time
_BLOCKED = "the front-end made a write to an eventfd wait"

logger = logging.getLogger(__name__)


class Device(Protocol):
    """The virtio device behind a connection."""

    @property
    def features(self) -> int:
        """The virtio feature bits that it offers."""

    @property
    def num_queues(self) -> int:
        """How many virtqueues it has."""

    @property
    def config(self) -> bytes:
        """Its configuration space, read-only."""

    def process(self, queue: _pure.Virtqueue) -> int:
        """Serve one batch of a virtqueue; return the engine's flags NOTIFY, MORE, ..."""

    def reset(self) -> None:
        """Go back to the initial state (RESET_DEVICE)."""


class Watcher(Protocol):
    """The event loop, as far as a connection uses it."""

    @property
    def epoll(self) -> select.epoll:
        """Where it waits."""

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""

    def add(self, fd: int, handler: Callable[[], None], *, edge: bool = False) -> None:
        """Call `handler` when `fd` is readable; OSError if it cannot be watched.

        With `edge`, once each time something arrives, not as long as something is there.
        """

    def remove(self, fd: int) -> None:
        """Stop that; before `fd` is closed, because the front-end still has the same file open."""


class LimitedLog:
    """Warnings that a guest or a front-end can trigger: one line per rule and interval.

    A rule is one of a fixed set of texts, so that the table stays small. The line that comes after
    the interval says how many were left out.
    """

    def __init__(self, target: logging.Logger, interval: float = 10.0) -> None:
        self._target = target
        self._interval = interval  # seconds
        self._next: dict[str, float] = {}
        self._omitted: dict[str, int] = {}

    def report(self, rule: str, text: str) -> None:
        """Log `text`, unless there was a line for `rule` within the interval."""
        now = time.monotonic()
        if now < self._next.get(rule, now):
            self._omitted[rule] = self._omitted.get(rule, 0) + 1
            return
        self._next[rule] = now + self._interval
        omitted = self._omitted.pop(rule, 0)
        self._target.warning("%s%s", text, f" ({omitted} more before)" if omitted else "")


class _Vring:
    """One vring: its virtqueue and its descriptors (-1: none), which it owns."""

    def __init__(self, index: int, queue: _pure.Virtqueue) -> None:
        self.index = index
        self.queue = queue
        self.has_size = False
        self.has_addresses = False
        self.enabled = False
        self.running = False
        self.kick_fd = -1
        self.kick_is_pipe = False
        self.call_fd = -1
        self.error_fd = -1


class Backend:
    """One connection to a front-end; owns the socket (non-blocking) and all that comes over it.

    The caller's event loop calls `receive` when the socket is readable, and `run` as long as
    `pending` is true, between other events. Kick descriptors go to `watcher` by themselves.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        engine: Engine,
        watcher: Watcher,
        log: LimitedLog,
        *,
        poll_us: int = 0,
    ) -> None:
        self._sock = sock
        self._device = device
        self._engine = engine
        self._watcher = watcher
        self._log = log
        self._reader = wire.MessageReader(sock)
        self._memory = engine.GuestMemory(MAX_MEM_SLOTS)
        self._vrings = [
            _Vring(index, engine.Virtqueue(self._memory)) for index in range(device.num_queues)
        ]
        self._loop = engine.Loop(device, watcher.epoll, poll_us)
        self._pending: set[_Vring] = set()
        self._features = 0
        self._protocol_features = ProtocolFeature(0)
        self._owned = False
        self._status = 0
        sock.setblocking(False)
        # A byte out of band would be passed over, with descriptors that close wherever they do.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)

    @property
    def pending(self) -> bool:
        """Whether a vring waits for `run`."""
        return bool(self._pending)

    def receive(self) -> None:
        """Serve the messages that have arrived, up to a bound.

        Raises EOFError when the front-end is gone, PeerError when it broke the protocol in a way
        that ends the connection.
        """
        for _ in range(_MESSAGES_AT_A_TIME):
            left_open = foreign.left_open()
            message = self._reader.read()
            if message is not None:
                with message:
                    self._serve(message)
            if foreign.left_open() > left_open:
                raise PeerError("too many descriptors of front-ends wait to be closed")
            if message is None or self._watcher.stopping:
                return

    def run(self) -> bool:
        """Serve every vring that was kicked or has more, until something else needs attention.

        True when that was a second without any event. Raises PeerError when the front-end made a
        write to an eventfd wait.
        """
        vrings = list(self._pending)
        self._pending.clear()
        idle = False
        for vring in vrings:
            idle = self._process(vring, once=len(vrings) > 1)  # never asleep while another waits
        return idle and not self._pending

    def close(self) -> None:
        """End the connection: unmap guest memory, close every descriptor and the socket."""
        for vring in self._vrings:
            self._drop_kick(vring)
            foreign.close(fd for fd in (vring.call_fd, vring.error_fd) if fd >= 0)
        self._pending.clear()
        self._memory.clear()
        self._reader.close()
        foreign.close_connection(self._sock)

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
        row = _MESSAGES.get(message.request, _UNKNOWN)
        try:
            self._check(row, message)
            reply = row.handler(self, message)
        except (ValueError, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            self._refuse(row, message, f"{name}: {reason}")
            return
        if reply is not None:
            self._send(message, reply)
        elif self._wants_ack(message):
            self._send(message, wire.pack_u64(_ACK_SUCCESS))

    def _check(self, row: _Row, message: Message) -> None:
        if message.flags & (wire.FLAG_REPLY | ~wire.FLAGS_MASK):
            raise ValueError(f"expected no flag but NEED_REPLY, found flags 0x{message.flags:x}")
        if row.needs & ~self._protocol_features:
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

    def _refuse(self, row: _Row, message: Message, reason: str) -> None:
        """Answer a message that failed; PeerError where there is no answer that says so."""
        if row.failure is not None:
            self._send(message, row.failure)
        elif self._wants_ack(message) and not row.replies:
            self._send(message, wire.pack_u64(_ACK_FAILURE))
        else:
            raise PeerError(reason)
        self._log.report("message refused", f"refused {reason}")

    def _wants_ack(self, message: Message) -> bool:
        return bool(
            message.flags & wire.FLAG_NEED_REPLY
            and self._protocol_features & ProtocolFeature.REPLY_ACK
        )

    def _send(self, message: Message, payload: bytes) -> None:
        try:
            wire.send_message(self._sock, message.request, wire.FLAG_REPLY, payload)
        except BlockingIOError:
            raise PeerError("the front-end does not read the replies it asks for") from None
        except OSError as error:
            raise EOFError(f"the connection broke: {error.strerror}") from error

    # Handlers. What they return is the reply; without one, the message may be acknowledged.

    def _unknown(self, _message: Message) -> None:
        raise ValueError("this back-end does not have this message")

    def _get_features(self, _message: Message) -> bytes:
        return wire.pack_u64(self._device.features | wire.F_PROTOCOL_FEATURES)

    def _set_features(self, message: Message) -> None:
        features = wire.unpack_u64(message.payload)
        accepted = self._device.features | wire.F_PROTOCOL_FEATURES | wire.F_LOG_ALL
        excess = features & ~accepted
        if excess:
            raise ValueError(f"feature bits 0x{excess:x} were not offered")
        self._features = features
        for vring in self._vrings:
            vring.queue.set_features(features & ~wire.F_PROTOCOL_FEATURES)
            if not features & wire.F_PROTOCOL_FEATURES:
                vring.enabled = True
            self._update(vring)

    def _get_protocol_features(self, _message: Message) -> bytes:
        return wire.pack_u64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, message: Message) -> None:
        features = wire.unpack_u64(message.payload)
        excess = features & ~int(PROTOCOL_FEATURES)  # the inverse of an IntFlag has its bits only
        if excess:
            raise ValueError(f"protocol feature bits 0x{excess:x} were not offered")
        self._protocol_features = ProtocolFeature(features)

    def _set_owner(self, _message: Message) -> None:
        if self._owned:
            raise ValueError("the session has an owner already")
        self._owned = True

    def _reset_owner(self, _message: Message) -> None:
        """Disable all vrings; to forget more is what made this message deprecated."""
        self._owned = False
        for vring in self._vrings:
            vring.enabled = False
            self._update(vring)

    def _get_queue_num(self, _message: Message) -> bytes:
        return wire.pack_u64(self._device.num_queues)

    def _set_mem_table(self, message: Message) -> None:
        """Replace the memory table.

        The new one is mapped beside the old one first, so that a table that breaks a rule or cannot
        be mapped changes nothing. If mapping it again fails even so, the old one is gone and the
        connection ends.
        """
        regions = wire.unpack_memory_table(message.payload)
        if len(regions) != len(message.fds):
            raise ValueError(
                f"expected a file descriptor for each of {len(regions)} memory regions, "
                f"found {len(message.fds)}"
            )
        for fd in message.fds:
            foreign.check_memory(fd)
        trial = self._engine.GuestMemory(MAX_MEM_SLOTS)
        try:
            for region, fd in zip(regions, message.fds, strict=True):
                trial.add_region(*region, fd)
        finally:
            trial.clear()
        self._memory.clear()
        try:
            for region, fd in zip(regions, message.fds, strict=True):
                self._memory.add_region(*region, fd)
        except (ValueError, OSError) as error:
            raise PeerError(f"SET_MEM_TABLE: a memory region was lost: {error}") from error

    def _get_max_mem_slots(self, _message: Message) -> bytes:
        return wire.pack_u64(MAX_MEM_SLOTS)

    def _add_mem_reg(self, message: Message) -> None:
        region = wire.unpack_single_region(message.payload)
        foreign.check_memory(message.fds[0])
        self._memory.add_region(*region, message.fds[0])

    def _rem_mem_reg(self, message: Message) -> None:
        region = wire.unpack_single_region(message.payload)
        self._memory.remove_region(region.guest_address, region.size, region.user_address)

    def _set_log_base(self, message: Message) -> None:
        """Ignore it: without LOG_SHMFD there is no log. The descriptor is closed unused."""
        # The specification has a u64 here, QEMU sends the log's description all the same.
        if len(message.payload) not in (wire.U64_SIZE, wire.LOG_SIZE):
            raise ValueError(
                f"expected a payload of {wire.U64_SIZE} or {wire.LOG_SIZE} bytes, "
                f"found {len(message.payload)}"
            )

    def _set_vring_num(self, message: Message) -> None:
        vring, size = self._vring_state(message)
        _refuse_running(vring)
        vring.queue.set_size(size)
        vring.has_size = True
        self._update(vring)

    def _set_vring_addr(self, message: Message) -> None:
        address = wire.VringAddress.unpack(message.payload)
        vring = self._vring(address.vring)
        if address.flags & ~wire.VRING_ADDRESS_LOG:
            raise ValueError(f"expected no flag but the log's, found 0x{address.flags:x}")
        vring.queue.set_addresses(
            address.descriptor_table, address.available_ring, address.used_ring
        )
        vring.has_addresses = True
        self._update(vring)

    def _set_vring_base(self, message: Message) -> None:
        vring, base = self._vring_state(message)
        _refuse_running(vring)
        vring.queue.set_base(base)
        self._update(vring)

    def _get_vring_base(self, message: Message) -> bytes:
        vring, _ = self._vring_state(message)
        self._drop_kick(vring)
        return wire.VringState(vring.index, vring.queue.base).pack()

    def _set_vring_kick(self, message: Message) -> None:
        vring, fd, is_pipe = self._vring_fd(message)
        if fd is None:
            raise ValueError("expected a kick descriptor: polling a vring is not served")
        self._watcher.add(fd, partial(self._kicked, vring), edge=True)
        message.take_fds()
        self._drop_kick(vring)
        vring.kick_fd = fd
        vring.kick_is_pipe = is_pipe
        vring.queue.set_base(vring.queue.base)  # also repairs a broken one
        self._update(vring)

    def _set_vring_call(self, message: Message) -> None:
        vring, fd, _ = self._vring_fd(message)
        message.take_fds()
        foreign.close([vring.call_fd] if vring.call_fd >= 0 else [])
        vring.call_fd = -1 if fd is None else fd
        if vring.running:
            self._signal(vring.call_fd)

    def _set_vring_err(self, message: Message) -> None:
        vring, fd, _ = self._vring_fd(message)
        message.take_fds()
        foreign.close([vring.error_fd] if vring.error_fd >= 0 else [])
        vring.error_fd = -1 if fd is None else fd

    def _set_vring_enable(self, message: Message) -> None:
        if not self._features & wire.F_PROTOCOL_FEATURES:
            raise ValueError("VHOST_USER_F_PROTOCOL_FEATURES was not negotiated")
        vring, enable = self._vring_state(message)
        if enable not in (0, 1):
            raise ValueError(f"expected 0 or 1, found {enable}")
        vring.enabled = bool(enable)
        self._update(vring)

    def _get_config(self, message: Message) -> bytes:
        asked = wire.Config.unpack(message.payload)
        if asked.offset + asked.size > wire.MAX_CONFIG:
            raise ValueError(
                f"expected a range within {wire.MAX_CONFIG} bytes, found {asked.size} bytes from "
                f"{asked.offset} on"
            )
        config = self._device.config.ljust(wire.MAX_CONFIG, b"\0")
        data = config[asked.offset : asked.offset + asked.size]
        return wire.Config(asked.offset, asked.size, asked.flags, data).pack()

    def _set_config(self, _message: Message) -> None:
        raise ValueError("the config space is read-only")

    def _get_status(self, _message: Message) -> bytes:
        return wire.pack_u64(self._status)

    def _set_status(self, message: Message) -> None:
        status = wire.unpack_u64(message.payload)
        if status > 0xFF:
            raise ValueError(f"expected a device status of 8 bits, found 0x{status:x}")
        self._status = status
        if status == 0:
            self._reset_vrings()

    def _reset_device(self, _message: Message) -> None:
        self._status = 0
        self._reset_vrings()
        self._device.reset()

    def _set_backend_req_fd(self, message: Message) -> None:
        """Accept the channel for requests of ours, and keep nothing: this device has none to make.

        It may hold the other end of this connection, whose end would never be seen.
        """
        foreign.check_unix_stream(message.fds[0])

    # Vrings

    def _vring(self, index: int) -> _Vring:
        if index >= len(self._vrings):
            raise ValueError(f"expected a vring index below {len(self._vrings)}, found {index}")
        return self._vrings[index]

    def _vring_state(self, message: Message) -> tuple[_Vring, int]:
        state = wire.VringState.unpack(message.payload)
        return self._vring(state.vring), state.num

    def _vring_fd(self, message: Message) -> tuple[_Vring, int | None, bool]:
        """The vring that an event descriptor is for, the descriptor, whether it is a pipe.

        The descriptor is still the message's.
        """
        value = wire.unpack_u64(message.payload)
        if value & ~(wire.VRING_INDEX_MASK | wire.VRING_NO_FD):
            raise ValueError(f"expected an index and the invalid FD flag, found 0x{value:x}")
        vring = self._vring(value & wire.VRING_INDEX_MASK)
        expected = 0 if value & wire.VRING_NO_FD else 1
        if len(message.fds) != expected:
            raise ValueError(f"expected {expected} file descriptors, found {len(message.fds)}")
        if not message.fds:
            return vring, None, False
        fd = message.fds[0]
        is_pipe = foreign.check_event(fd)
        # Full or drained by the front-end, it must not hold us up.
        if is_pipe:
            fd = message.fds[0] = _reopen_pipe(fd)
        return vring, fd, is_pipe

    def _update(self, vring: _Vring) -> None:
        """Start or stop a vring after anything that decides whether it runs has changed."""
        running = (
            vring.enabled
            and vring.has_size
            and vring.has_addresses
            and vring.kick_fd >= 0
            and not vring.queue.error
        )
        if running and not vring.running:
            self._pending.add(vring)
            self._signal(vring.call_fd)
        elif not running:
            self._pending.discard(vring)
        vring.running = running

    def _drop_kick(self, vring: _Vring) -> None:
        if vring.kick_fd >= 0:
            self._watcher.remove(vring.kick_fd)
            foreign.close([vring.kick_fd])
            vring.kick_fd = -1
            self._update(vring)

    def _reset_vrings(self) -> None:
        for vring in self._vrings:
            self._drop_kick(vring)
            vring.queue.reset()
            vring.queue.set_features(self._features & ~wire.F_PROTOCOL_FEATURES)
            vring.has_size = vring.has_addresses = False
            vring.enabled = not self._features & wire.F_PROTOCOL_FEATURES
            self._update(vring)

    def _kicked(self, vring: _Vring) -> None:
        """A kick descriptor became readable.

        It is watched edge-triggered, so that an eventfd need not be read, and one at its end or in
        error is reported only once. A pipe is read to keep it from filling up.
        """
        if vring.kick_is_pipe:
            try:
                os.read(vring.kick_fd, _PIPE_BYTES)
            except OSError as error:
                logger.debug("vring %d: kick: %s", vring.index, error.strerror)
        if vring.running:
            self._pending.add(vring)

    def _process(self, vring: _Vring, *, once: bool) -> bool:
        """Serve a vring, with `once` one batch of it; True after a second without any event."""
        kick_fd = -1 if vring.kick_is_pipe else vring.kick_fd  # a pipe wants reading
        flags = self._loop.serve(vring.queue, kick_fd, vring.call_fd, once)
        taken = self._loop.take_events()
        for other in self._vrings if taken else ():
            if other.kick_fd in taken:
                self._kicked(other)
        if flags & self._engine.BLOCKED:
            raise PeerError(_BLOCKED)
        if flags & self._engine.UNSIGNALLED:
            self._log.report("signal", f"vring {vring.index}: the front-end cannot be signalled")
        if flags & self._engine.MORE:
            self._pending.add(vring)
        if flags & self._engine.FAULTS:
            for rule, count in vring.queue.take_faults().items():
                self._log.report(rule, f"vring {vring.index}: {count} broken chains: {rule}")
        if flags & self._engine.BROKEN:
            cause = vring.queue.error
            self._log.report(
                f"vring stopped: {cause}", f"vring {vring.index} stopped until its reset: {cause}"
            )
            self._update(vring)
            self._signal(vring.error_fd)
        return bool(flags & self._engine.IDLE)

    def _signal(self, fd: int) -> None:
        if fd < 0:
            return
        room = select.poll()
        room.register(fd, select.POLLOUT)
        if not any(events & select.POLLOUT for _, events in room.poll(0)):
            return  # full: the signal is there, and the front-end has yet to take it
        try:
            os.eventfd_write(fd, 1)  # unlike os.write(), ends when a signal interrupts it
        except BlockingIOError:
            pass  # full by now
        except InterruptedError:
            raise PeerError(_BLOCKED) from None
        except OSError as error:
            self._log.report("signal", f"a front-end cannot be signalled: {error.strerror}")


def _refuse_running(vring: _Vring) -> None:
    if vring.running:
        raise ValueError("the vring is running: GET_VRING_BASE stops it")


def _reopen_pipe(fd: int) -> int:
    """Exchange a descriptor of a pipe for one whose O_NONBLOCK is ours alone.

    An eventfd cannot be opened anew; the event loop's timer is for that.
    """
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    ours = os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_CLOEXEC)
    foreign.close([fd])
    return ours


class _Row(NamedTuple):
    """What a message must look like, and what is done with it."""

    handler: Callable[[Backend, Message], bytes | None]
    size: int | None = 0  # bytes of payload; None: the handler judges
    fds: Collection[int] = (0,)  # how many file descriptors it may carry
    needs: ProtocolFeature = ProtocolFeature(0)  # to be negotiated
    replies: bool = False  # has a reply of its own
    failure: bytes | None = None  # the reply that stands for a failure, if there is one


_U64 = wire.U64_SIZE
_STATE = wire.VRING_STATE_SIZE
_ONE = (1,)
_OPTIONAL = (0, 1)
_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS

_UNKNOWN = _Row(Backend._unknown, size=None, fds=range(wire.MAX_FDS + 1))
_MESSAGES: dict[int, _Row] = {
    Request.GET_FEATURES: _Row(Backend._get_features, replies=True),
    Request.SET_FEATURES: _Row(Backend._set_features, _U64),
    Request.SET_OWNER: _Row(Backend._set_owner),
    Request.RESET_OWNER: _Row(Backend._reset_owner),
    Request.SET_MEM_TABLE: _Row(Backend._set_mem_table, size=None, fds=range(wire.MAX_FDS + 1)),
    Request.SET_LOG_BASE: _Row(Backend._set_log_base, size=None, fds=_OPTIONAL),
    Request.SET_VRING_NUM: _Row(Backend._set_vring_num, _STATE),
    Request.SET_VRING_ADDR: _Row(Backend._set_vring_addr, wire.VRING_ADDRESS_SIZE),
    Request.SET_VRING_BASE: _Row(Backend._set_vring_base, _STATE),
    Request.GET_VRING_BASE: _Row(Backend._get_vring_base, _STATE, replies=True),
    Request.SET_VRING_KICK: _Row(Backend._set_vring_kick, _U64, _OPTIONAL),
    Request.SET_VRING_CALL: _Row(Backend._set_vring_call, _U64, _OPTIONAL),
    Request.SET_VRING_ERR: _Row(Backend._set_vring_err, _U64, _OPTIONAL),
    Request.GET_PROTOCOL_FEATURES: _Row(Backend._get_protocol_features, replies=True),
    Request.SET_PROTOCOL_FEATURES: _Row(Backend._set_protocol_features, _U64),
    # Allowed as soon as MQ was offered, which it always is.
    Request.GET_QUEUE_NUM: _Row(Backend._get_queue_num, replies=True),
    Request.SET_VRING_ENABLE: _Row(Backend._set_vring_enable, _STATE),
    # From a front-end that does not wait for BACKEND_REQ, which is not offered.
    Request.SET_BACKEND_REQ_FD: _Row(Backend._set_backend_req_fd, fds=_ONE),
    Request.GET_CONFIG: _Row(
        Backend._get_config, None, needs=ProtocolFeature.CONFIG, replies=True, failure=b""
    ),
    Request.SET_CONFIG: _Row(Backend._set_config, None, needs=ProtocolFeature.CONFIG),
    Request.RESET_DEVICE: _Row(Backend._reset_device, needs=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: _Row(Backend._get_max_mem_slots, needs=_SLOTS, replies=True),
    Request.ADD_MEM_REG: _Row(Backend._add_mem_reg, wire.SINGLE_REGION_SIZE, _ONE, _SLOTS),
    # With a descriptor too: there are front-ends that send one. It is closed unused.
    Request.REM_MEM_REG: _Row(Backend._rem_mem_reg, wire.SINGLE_REGION_SIZE, _OPTIONAL, _SLOTS),
    Request.SET_STATUS: _Row(Backend._set_status, _U64, needs=ProtocolFeature.STATUS),
    Request.GET_STATUS: _Row(Backend._get_status, needs=ProtocolFeature.STATUS, replies=True),
}
