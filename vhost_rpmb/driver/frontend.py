# SPDX-License-Identifier: Apache-2.0
"""The front-end of a vhost-user connection, the role of a VMM (QEMU's specification)."""

import errno
import select
import socket
import threading
import time
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Self

from vhost_rpmb.closing import Closing
from vhost_rpmb.driver.errors import BackendError, RequestRefusedError
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.errors import PeerError
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Message, ProtocolFeature, Request
from vhost_rpmb.virtio import spec as virtio

#: The protocol features that this front-end makes use of when the back-end offers them.
PROTOCOL_FEATURES = (
    ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)

_NOT_RPMB = "is this an RPMB device?"
_CONNECT_INTERVAL = 0.02  # seconds
_CONNECT_HINTS = {
    errno.ENOENT: "; start vhost-user-rpmb with --socket-path, or name its socket",
    errno.ECONNREFUSED: "; nothing listens there: is vhost-user-rpmb running?",
}


class Frontend(Closing):
    """A connection to a back-end, which it owns; a context manager.

    Every message is acknowledged once REPLY_ACK is negotiated. All methods raise BackendError if
    the back-end has disconnected or does not answer within ``timeout`` seconds, and
    RequestRefusedError if it refuses a message.
    """

    def __init__(self, sock: socket.socket, *, timeout: float = 10.0) -> None:
        self._sock = sock
        self._timeout = timeout
        self._reader = wire.MessageReader(sock, max_fds=0)
        self.features = 0  # virtio feature bits, negotiated
        self.protocol_features = ProtocolFeature(0)  # negotiated
        self._offered = 0  # the reply to GET_FEATURES
        self._status = 0
        sock.setblocking(False)

    @classmethod
    def connect(cls, path: str | PathLike[str], *, timeout: float = 10.0) -> Self:
        """Connect to the UNIX stream socket at ``path``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            _connect(sock, fspath(path), timeout)
            return cls(sock, timeout=timeout)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        # Closing the socket closes the descriptors in it that were not received, and such a close
        # can block: a TCP socket with SO_LINGER, for example. Hence a daemon thread, for which
        # the end of the process does not wait.
        closing = threading.Thread(target=self._sock.close, daemon=True)
        closing.start()
        closing.join(self._timeout)

    def fileno(self) -> int:
        """The socket, for `Ring.wait` to detect a disconnect."""
        return self._sock.fileno()

    # Single messages

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        """Send any message, well-formed or not, without waiting for a reply."""
        try:
            wire.send_message(self._sock, request, flags, payload, fds)
        except BlockingIOError:
            raise BackendError(
                f"{wire.request_name(request)}: the back-end does not read its socket"
            ) from None
        except OSError as error:
            raise BackendError(
                f"{wire.request_name(request)}: the back-end closed the connection "
                f"({error.strerror})"
            ) from None

    def receive(self) -> Message:
        """The next message of the back-end, of any type."""
        deadline = time.monotonic() + self._timeout
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            try:
                message = self._reader.read()
            except EOFError as error:
                raise BackendError(f"the back-end closed the connection: {error}") from None
            except PeerError as error:
                raise BackendError(f"the back-end violated the protocol: {error}") from None
            if message is not None:
                return message
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise BackendError(
                    f"the back-end did not answer within {self._timeout:g} s; it serves one "
                    "front-end at a time: is a virtual machine connected to it?"
                )

    def ask(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send a message that has a reply of its own and return the payload of that reply."""
        self.send(request, payload, fds)
        return self._take_reply(request)

    def ask_u64(self, request: Request) -> int:
        """Send a message without payload; return the 64-bit integer of its reply."""
        return _unpack_u64(request, self.ask(request))

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message that has no reply; with REPLY_ACK, wait until it is acknowledged."""
        if not self.protocol_features & ProtocolFeature.REPLY_ACK:
            self.send(request, payload, fds)
            return
        self.send(request, payload, fds, wire.FLAG_NEED_REPLY)
        if error := _unpack_u64(request, self._take_reply(request)):
            raise RequestRefusedError(f"the back-end refused {request.name} (reply {error})")

    def _take_reply(self, request: Request) -> bytes:
        """The payload of the reply to ``request``, an acknowledgement included."""
        reply = self.receive()
        if reply.request != request or not reply.flags & wire.FLAG_REPLY:
            raise BackendError(
                f"expected the reply to {request.name}, found "
                f"{wire.request_name(reply.request)} with flags 0x{reply.flags:x}"
            )
        return reply.payload

    # Life cycle of a device

    def handshake(self, protocol_features: ProtocolFeature = PROTOCOL_FEATURES) -> None:
        """Negotiate these protocol features as far as they are offered, and become the owner."""
        self._offered = self.ask_u64(Request.GET_FEATURES)
        if not self._offered >> virtio.VIRTIO_F_VERSION_1 & 1:
            raise BackendError(
                f"expected VIRTIO_F_VERSION_1 among the back-end's features, found "
                f"0x{self._offered:x}"
            )
        if self._offered & wire.F_PROTOCOL_FEATURES:
            chosen = self.ask_u64(Request.GET_PROTOCOL_FEATURES) & protocol_features
            self.tell(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(chosen))
            self.protocol_features = ProtocolFeature(chosen)
        self.tell(Request.SET_OWNER)

    def start_device(self, features: int) -> None:
        """Negotiate virtio feature bits as a driver does; VIRTIO_F_VERSION_1 always."""
        accepted = self._offered & (
            features | 1 << virtio.VIRTIO_F_VERSION_1 | wire.F_PROTOCOL_FEATURES
        )
        self._add_status(virtio.VIRTIO_STATUS_ACKNOWLEDGE | virtio.VIRTIO_STATUS_DRIVER)
        self.tell(Request.SET_FEATURES, wire.pack_u64(accepted))
        self._add_status(virtio.VIRTIO_STATUS_FEATURES_OK)
        if self.protocol_features & ProtocolFeature.STATUS:
            status = self.get_status()
            if not status & virtio.VIRTIO_STATUS_FEATURES_OK:
                raise BackendError(f"expected FEATURES_OK in the device status, found 0x{status:x}")
        self.features = accepted & ~wire.F_PROTOCOL_FEATURES

    def read_config(self, size: int) -> bytes:
        """The first ``size`` bytes of the device's config space."""
        if not self.protocol_features & ProtocolFeature.CONFIG:
            raise BackendError(
                "expected the protocol feature CONFIG, found "
                f"0x{self.protocol_features:x}: {_NOT_RPMB}"
            )
        asked = wire.Config(0, size, wire.CONFIG_FLAG_WRITABLE, bytes(size))
        payload = self.ask(Request.GET_CONFIG, asked.pack())
        if not payload:  # a refusal in the protocol
            raise BackendError(f"expected {size} bytes of config space, found none: {_NOT_RPMB}")
        try:
            config = wire.Config.unpack(payload)
        except ValueError as error:
            raise BackendError(f"GET_CONFIG: {error}") from None
        if config.offset:
            raise BackendError(
                f"expected config space from offset 0 on, found offset {config.offset}"
            )
        if config.size != size:
            raise BackendError(
                f"expected {size} bytes of config space, found {config.size}: {_NOT_RPMB}"
            )
        return config.data

    def share_memory(self, memory: GuestMemory) -> None:
        """Share all memory regions, one by one if CONFIGURE_MEM_SLOTS is negotiated."""
        if self.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            slots = self.ask_u64(Request.GET_MAX_MEM_SLOTS)
            if slots < len(memory.regions):
                raise BackendError(
                    f"expected room for {len(memory.regions)} memory regions, found {slots}"
                )
            for region in memory.regions:
                payload = wire.pack_single_region(region.place)
                self.tell(Request.ADD_MEM_REG, payload, [region.fd])
            return
        table = wire.pack_memory_table([region.place for region in memory.regions])
        self.tell(Request.SET_MEM_TABLE, table, [region.fd for region in memory.regions])

    def start_ring(self, ring: Ring, index: int = 0) -> None:
        """Set up vring ``index``, enable it, and set DRIVER_OK."""
        self.tell(Request.SET_VRING_NUM, wire.VringState(index, ring.size).pack())
        self.tell(Request.SET_VRING_BASE, wire.VringState(index, ring.base).pack())
        user = ring.memory.user_address
        addresses = wire.VringAddress(
            vring=index,
            flags=0,
            descriptor_table=user(ring.descriptor_table),
            used_ring=user(ring.used_ring),
            available_ring=user(ring.available_ring),
        )
        self.tell(Request.SET_VRING_ADDR, addresses.pack())
        self.tell(Request.SET_VRING_ERR, wire.pack_u64(index), [ring.error_fd])
        self.tell(Request.SET_VRING_CALL, wire.pack_u64(index), [ring.call_fd])
        self.tell(Request.SET_VRING_KICK, wire.pack_u64(index), [ring.kick_fd])
        if self._offered & wire.F_PROTOCOL_FEATURES:  # otherwise a vring starts out enabled
            self.tell(Request.SET_VRING_ENABLE, wire.VringState(index, 1).pack())
        self._add_status(virtio.VIRTIO_STATUS_DRIVER_OK)

    def stop_ring(self, index: int = 0) -> int:
        """Stop vring ``index``; return the available index at which it stopped."""
        payload = self.ask(Request.GET_VRING_BASE, wire.VringState(index, 0).pack())
        try:
            state = wire.VringState.unpack(payload)
        except ValueError as error:
            raise BackendError(f"GET_VRING_BASE: {error}") from None
        if state.vring != index:
            raise BackendError(f"GET_VRING_BASE: expected vring {index}, found {state.vring}")
        return state.num

    def set_status(self, status: int) -> None:
        """Set the device status field; 0 is a virtio reset, to be followed by `start_device`."""
        self.tell(Request.SET_STATUS, wire.pack_u64(status))
        self._status = status

    def get_status(self) -> int:
        """The device status field."""
        return self.ask_u64(Request.GET_STATUS)

    def reset_device(self) -> None:
        """Send RESET_DEVICE: vrings are stopped, and the device restarts with `start_device`.

        Memory regions and the owner stay.
        """
        if not self.protocol_features & ProtocolFeature.RESET_DEVICE:
            raise BackendError("RESET_DEVICE was not negotiated")
        self.tell(Request.RESET_DEVICE)
        self._status = 0

    def _add_status(self, bits: int) -> None:
        if self.protocol_features & ProtocolFeature.STATUS:
            self.set_status(self._status | bits)


def _unpack_u64(request: Request, payload: bytes) -> int:
    try:
        return wire.unpack_u64(payload)
    except ValueError as error:
        raise BackendError(f"reply to {request.name}: {error}") from None


def _connect(sock: socket.socket, path: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:  # the queue of connections that wait to be accepted is full
            if time.monotonic() >= deadline:
                raise BackendError(
                    f"{path}: the back-end accepted no connection within {timeout:g} s"
                ) from None
            time.sleep(_CONNECT_INTERVAL)
        except OSError as error:
            hint = _CONNECT_HINTS.get(error.errno or 0, "")
            reason = error.strerror or str(error)
            raise BackendError(f"cannot connect to {path}: {reason}{hint}") from None
