# SPDX-License-Identifier: Apache-2.0
"""Messages of the vhost-user protocol: numbers, payload structs, framing, file descriptors.

Source: QEMU's ``docs/interop/vhost-user.rst``, sections "Message Specification", "Front-end message
types" and "Back-end message types"; names as they stand there, without the prefix ``VHOST_USER_``.
All integers are in native byte order. Both ends of a connection use this module.

File descriptors are plain integers. Exactly one object owns each: the reader until a message is
complete, then the `Message`, which closes at `Message.close` those that were not taken.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vhost_rpmb.closing import Closing
from vhost_rpmb.errors import PeerError
from vhost_rpmb.system import socket
from vhost_rpmb.typed import TYPE_CHECKING, IntEnum, IntFlag, NamedTuple
from vhost_rpmb.vhost_user import foreign

if TYPE_CHECKING:
    from typing import Self


class Request(IntEnum):
    """Front-end message types."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """Back-end message types, sent over the channel that SET_BACKEND_REQ_FD gives."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class ProtocolFeature(IntFlag):
    """Protocol features, as masks (the specification gives bit numbers)."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GPA_ADDRESSES = 1 << 21


# Masks in GET_FEATURES and SET_FEATURES.
F_LOG_ALL = 1 << 26  # VHOST_F_LOG_ALL: mark written guest memory in the dirty log
F_PROTOCOL_FEATURES = 1 << 30  # protocol features exist

# Header flags.
VERSION_MASK = 0x3
VERSION = 0x1
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3
FLAGS_MASK = VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY

# The u64 of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR.
VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8

VRING_ADDRESS_LOG = 1 << 0  # flag of SET_VRING_ADDR: mark what is written to the used ring

# Flags of a virtio device config space payload.
CONFIG_FLAG_WRITABLE = 0
CONFIG_FLAG_LIVE_MIGRATION = 1

MAX_CONFIG = 256  # bytes of config space, the maximum of a request

MAX_PAYLOAD = 4096  # bytes; the served messages need less than a third of it
MAX_FDS = 32  # file descriptors in one message; SET_MEM_TABLE carries one per memory region

# The maximum of one sendmsg() in the kernel (SCM_MAX_FD). The buffer has room for as many, so that
# descriptors are lost only if this process has no free one.
_KERNEL_MAX_FDS = 253
FD_SIZE = struct.calcsize("i")  # bytes of a descriptor in an ancillary message
CONTROL_SIZE = socket.CMSG_SPACE(_KERNEL_MAX_FDS * FD_SIZE)

_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_VRING_STATE = struct.Struct("=II")
_VRING_ADDRESS = struct.Struct("=IIQQQQ")
_MEMORY_TABLE = struct.Struct("=II")
_MEMORY_REGION = struct.Struct("=QQQQ")
_SINGLE_REGION = struct.Struct("=QQQQQ")
_CONFIG = struct.Struct("=III")
_LOG = struct.Struct("=QQ")
_INFLIGHT = struct.Struct("=QQHH4x")
_TRANSFER = struct.Struct("=II")

HEADER_SIZE = _HEADER.size  # 12 bytes
U64_SIZE = _U64.size  # 8 bytes
VRING_STATE_SIZE = _VRING_STATE.size  # 8 bytes
VRING_ADDRESS_SIZE = _VRING_ADDRESS.size  # 40 bytes
MEMORY_TABLE_SIZE = _MEMORY_TABLE.size  # 8 bytes, without the regions
MEMORY_REGION_SIZE = _MEMORY_REGION.size  # 32 bytes
SINGLE_REGION_SIZE = _SINGLE_REGION.size  # 40 bytes
CONFIG_SIZE = _CONFIG.size  # 12 bytes, without the config space bytes
LOG_SIZE = _LOG.size  # 16 bytes
INFLIGHT_SIZE = _INFLIGHT.size  # 24 bytes
TRANSFER_SIZE = _TRANSFER.size  # 8 bytes


# Messages that descriptors belong to; of the first three unless VRING_NO_FD is set.
_VRING_FD = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
_WITH_FDS = (
    *_VRING_FD,
    Request.SET_MEM_TABLE,
    Request.ADD_MEM_REG,
    Request.SET_BACKEND_REQ_FD,
    Request.SET_INFLIGHT_FD,
    Request.SET_LOG_BASE,
    Request.SET_LOG_FD,
    Request.SET_DEVICE_STATE_FD,
)


def request_name(number: int) -> str:
    """The name of a front-end message type, for the log; of an unknown one, its number."""
    try:
        return Request(number).name
    except ValueError:
        return f"message {number}"


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ValueError(f"expected a payload of {layout.size} bytes, found {len(payload)}")
    return layout.unpack(payload)


def _unpack_header(data: bytes | bytearray) -> tuple[int, int, int]:
    """Request, flags and payload size."""
    return _HEADER.unpack_from(data)


def pack_u64(value: int) -> bytes:
    """A single 64-bit integer."""
    return _U64.pack(value)


def unpack_u64(payload: bytes) -> int:
    """A single 64-bit integer; ValueError unless the payload has 8 bytes."""
    return _unpack(_U64, payload)[0]


class VringState(NamedTuple):
    """A vring state description: which vring, and a number."""

    vring: int
    num: int

    def pack(self) -> bytes:
        """The 8 bytes of the payload."""
        return _VRING_STATE.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """From the payload; ValueError unless it has 8 bytes."""
        return cls(*_unpack(_VRING_STATE, payload))


class VringAddress(NamedTuple):
    """A vring address description: which vring, and user addresses of its parts."""

    vring: int
    flags: int
    descriptor_table: int
    used_ring: int
    available_ring: int
    log: int = 0

    def pack(self) -> bytes:
        """The 40 bytes of the payload."""
        return _VRING_ADDRESS.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """From the payload; ValueError unless it has 40 bytes."""
        return cls(*_unpack(_VRING_ADDRESS, payload))


class LogDescription(NamedTuple):
    """A description of the dirty log: its bytes in a file, and their offset there."""

    mmap_size: int
    mmap_offset: int

    def pack(self) -> bytes:
        """The 16 bytes of the payload."""
        return _LOG.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """From the payload; ValueError unless it has 16 bytes."""
        return cls(*_unpack(_LOG, payload))


class MemoryRegion(NamedTuple):
    """One memory region: addresses, size and offset in bytes."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int


def pack_single_region(region: MemoryRegion) -> bytes:
    """A single memory region description (ADD_MEM_REG, REM_MEM_REG): 40 bytes."""
    return _SINGLE_REGION.pack(0, *region)


def unpack_single_region(payload: bytes) -> MemoryRegion:
    """A single memory region description; ValueError unless the payload has 40 bytes."""
    return MemoryRegion(*_unpack(_SINGLE_REGION, payload)[1:])


def pack_memory_table(regions: Sequence[MemoryRegion]) -> bytes:
    """A memory regions description (SET_MEM_TABLE): 8 bytes and 32 for each region."""
    packed = b"".join(_MEMORY_REGION.pack(*region) for region in regions)
    return _MEMORY_TABLE.pack(len(regions), 0) + packed


def unpack_memory_table(payload: bytes) -> tuple[MemoryRegion, ...]:
    """A memory regions description.

    ValueError unless the payload has exactly the bytes that its number of regions needs.
    """
    if len(payload) < MEMORY_TABLE_SIZE:
        raise ValueError(
            f"expected a payload of {MEMORY_TABLE_SIZE} bytes or more, found {len(payload)}"
        )
    count, _padding = _MEMORY_TABLE.unpack_from(payload)
    needed = MEMORY_TABLE_SIZE + count * MEMORY_REGION_SIZE
    if len(payload) != needed:
        raise ValueError(
            f"expected a payload of {needed} bytes for {count} memory regions, found {len(payload)}"
        )
    regions = _MEMORY_REGION.iter_unpack(payload[MEMORY_TABLE_SIZE:])
    return tuple(MemoryRegion(*region) for region in regions)


class Config(NamedTuple):
    """A virtio device config space payload: `size` bytes of data from `offset` on."""

    offset: int
    size: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        """The 12 bytes of the head and the data."""
        return _CONFIG.pack(self.offset, self.size, self.flags) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """From the payload; ValueError if it is too short or its size is not the data's."""
        if len(payload) < CONFIG_SIZE:
            raise ValueError(
                f"expected a payload of {CONFIG_SIZE} bytes or more, found {len(payload)}"
            )
        offset, size, flags = _CONFIG.unpack_from(payload)
        data = payload[CONFIG_SIZE:]
        if size != len(data):
            raise ValueError(f"expected {size} config space bytes, found {len(data)}")
        return cls(offset, size, flags, data)


class InflightDescription(NamedTuple):
    """An inflight description: size and offset of the region in bytes, and the vrings in it."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    def pack(self) -> bytes:
        """The 24 bytes of the payload."""
        return _INFLIGHT.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """From the payload; ValueError unless it has 24 bytes."""
        return cls(*_unpack(_INFLIGHT, payload))


class StateDirection(IntEnum):
    """The direction of a transfer of device state, as the back-end sees it."""

    SAVE = 0
    LOAD = 1


STATE_PHASE_STOPPED = 0
STATE_FD_NONE = 1 << 8  # in the reply to SET_DEVICE_STATE_FD: the front-end's descriptor is used
STATE_ERROR = 1  # in the reply to CHECK_DEVICE_STATE, and in the low bits of the other


class StateTransferDescription(NamedTuple):
    """The parameters of SET_DEVICE_STATE_FD."""

    direction: int
    phase: int = STATE_PHASE_STOPPED

    def pack(self) -> bytes:
        """The 8 bytes of the payload."""
        return _TRANSFER.pack(*self)

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """From the payload; ValueError unless it has 8 bytes."""
        return cls(*_unpack(_TRANSFER, payload))


def close_fds(fds: Sequence[int]) -> None:
    """Close received file descriptors."""
    foreign.close(fds)


class Message(Closing):
    """One received message; owner of its file descriptors until they are taken.

    `fds_complete` is False if descriptors were sent and closed: more than the reader allows, of a
    kind that cannot be kept until the message is complete, or this process had no free descriptor.
    """

    __slots__ = ("fds", "fds_complete", "flags", "payload", "request")

    def __init__(
        self, request: int, flags: int, payload: bytes, fds: list[int], fds_complete: bool = True
    ) -> None:
        self.request = request
        self.flags = flags
        self.payload = payload
        self.fds = fds
        self.fds_complete = fds_complete

    def take_fds(self) -> list[int]:
        """Return the descriptors and transfer their ownership to the caller."""
        fds = self.fds
        self.fds = []
        return fds

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        close_fds(self.take_fds())


class MessageReader:
    """Reads messages from a UNIX stream socket, in slices of any size.

    It never reads beyond the current message: a descriptor belongs to the message with whose bytes
    it was sent. Works on blocking and on non-blocking sockets; the caller owns the socket. With
    ``max_fds`` 0 this process receives no descriptor: one that was sent stays in the socket, and
    the bytes after it cannot be read.
    """

    def __init__(
        self, sock: socket.socket, *, max_payload: int = MAX_PAYLOAD, max_fds: int = MAX_FDS
    ) -> None:
        self._sock = sock
        self._max_payload = max_payload
        self._max_fds = max_fds
        self._bytes = bytearray()
        self._fds: list[int] = []
        self._fds_complete = True

    def read(self) -> Message | None:
        """The next message, or None if a non-blocking socket has no more bytes now.

        Raises EOFError if the peer has closed the connection, and PeerError if the stream is
        invalid (another protocol version, a payload beyond `max_payload`, descriptors although
        `max_fds` is 0): no later byte can be interpreted.
        """
        try:
            while (missing := self._missing()) > 0:
                self._receive(missing)
        except BlockingIOError:
            self._drop_fds()
            return None
        request, flags, _size = _unpack_header(self._bytes)
        message = Message(
            request, flags, bytes(self._bytes[HEADER_SIZE:]), self._fds, self._fds_complete
        )
        self._bytes.clear()
        self._fds = []
        self._fds_complete = True
        return message

    def close(self) -> None:
        """Close the descriptors of an incomplete message."""
        fds, self._fds = self._fds, []
        close_fds(fds)

    def _drop_fds(self) -> None:
        """Close descriptors that an incomplete message must not keep open.

        The peer's own end of the connection, for instance: its disconnect would not be detected.
        """
        lasting = [fd for fd in self._fds if foreign.is_lasting(fd)]
        if len(lasting) < len(self._fds):
            others = [fd for fd in self._fds if fd not in lasting]
            self._fds = lasting
            self._fds_complete = False
            close_fds(others)

    def _missing(self, more: bytes = b"") -> int:
        """The number of missing bytes: of the header, then of the payload.

        With ``more``, the number that would be missing if these were available.
        """
        if len(self._bytes) + len(more) < HEADER_SIZE:
            return HEADER_SIZE - len(self._bytes)
        request, flags, size = _unpack_header(self._bytes + more if more else self._bytes)
        if flags & VERSION_MASK != VERSION:
            raise PeerError(
                f"{request_name(request)}: expected protocol version {VERSION}, "
                f"found {flags & VERSION_MASK}"
            )
        if size > self._max_payload:
            raise PeerError(
                f"{request_name(request)}: expected a payload of at most {self._max_payload} "
                f"bytes, found {size}"
            )
        return HEADER_SIZE + size - len(self._bytes)

    def _receive(self, count: int) -> None:
        try:
            if not self._max_fds:
                count = self._without_fds(count)
            data, fds, complete = self._take(count)
        except ConnectionError as error:
            raise EOFError(f"the connection broke: {error.strerror}") from error
        self._fds += fds
        if not complete or len(self._fds) > self._max_fds:
            surplus = self._fds[self._max_fds :]
            del self._fds[self._max_fds :]
            close_fds(surplus)
            self._fds_complete = False
        if not data:
            raise EOFError(
                "the connection ended in the middle of a message"
                if self._bytes
                else "the connection ended"
            )
        self._bytes += data

    def _take(self, count: int) -> tuple[bytes, list[int], bool]:
        """Take up to ``count`` bytes and their descriptors; False if some of these were lost."""
        return receive(self._sock, count)

    def _without_fds(self, count: int) -> int:
        """The number of available bytes, up to ``count``; PeerError if descriptors came with them.

        Closing a descriptor may block, so the bytes are only peeked at.
        """
        data, _control, flags, _address = self._sock.recvmsg(count, 0, socket.MSG_PEEK)
        if flags & socket.MSG_CTRUNC:
            raise PeerError("expected no file descriptors, found some")
        return len(data)


def receive(sock: socket.socket, count: int, flags: int = 0) -> tuple[bytes, list[int], bool]:
    """Receive up to ``count`` bytes and descriptors; False if some descriptors were lost."""
    data, control, results, _address = sock.recvmsg(
        count, CONTROL_SIZE, flags | socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += unpack_fds(content)
    return data, fds, not results & socket.MSG_CTRUNC


def pack_fds(fds: Sequence[int]) -> bytes:
    """The content of an ancillary message with descriptors."""
    return struct.pack(f"{len(fds)}i", *fds)


def unpack_fds(content: bytes) -> list[int]:
    """The descriptors in an ancillary message, as far as it is whole."""
    return list(memoryview(content)[: len(content) // FD_SIZE * FD_SIZE].cast("i"))


def request_of(message: bytes) -> int | None:
    """The type of a message, of which this is the beginning; None if that is too short."""
    return _unpack_header(message)[0] if len(message) >= HEADER_SIZE else None


def may_carry_fds(message: bytes) -> bool:
    """Whether descriptors can belong to a message, of which this is the beginning or all."""
    if len(message) < HEADER_SIZE:
        return True
    request, _flags, size = _unpack_header(message)
    if request in _VRING_FD and size == len(message) - HEADER_SIZE == U64_SIZE:
        return not unpack_u64(message[HEADER_SIZE:]) & VRING_NO_FD
    return request in _WITH_FDS


def pack_message(request: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """A whole message, with the protocol version in the flags."""
    return _HEADER.pack(request, flags | VERSION, len(payload)) + payload


def send_message(
    sock: socket.socket, request: int, flags: int = 0, payload: bytes = b"", fds: Sequence[int] = ()
) -> None:
    """Send one message, with the protocol version in the flags. The descriptors stay open.

    Raises BlockingIOError if a non-blocking socket is full (the message may be sent in part: the
    connection is unusable), and OSError if the peer has disconnected.
    """
    send_bytes(sock, pack_message(request, flags, payload), fds)


def send_bytes(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send all bytes, descriptors with the first; the exceptions are those of `send_message`."""
    if fds:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, pack_fds(fds))]
        data = data[sock.sendmsg([data], control) :]
    while data:
        data = data[sock.send(data) :]
