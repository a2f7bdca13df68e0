# SPDX-License-Identifier: Apache-2.0
"""The back-end as one front-end sets it up: one table row for each message, and what it changes.

Source: QEMU's ``docs/interop/vhost-user.rst``. A row's handler raises ValueError if the message
breaks a rule and OSError if the kernel refuses an operation, and changes nothing then.

Behaviour that the protocol leaves open:

- GET_VRING_BASE stops a vring by closing its kick descriptor. A broken vring works again after a
  new SET_VRING_BASE or SET_VRING_KICK, and is set up again after a reset of the device
  (RESET_DEVICE, or status 0). Call and error descriptors, memory regions and acknowledged features
  stay through all of these: front-ends send them once.
- SET_OWNER on a connection that has an owner begins a new session. Protocol features stay: they are
  negotiated before it.
- SET_FEATURES does not change the format of a ring that runs, and begins a new one otherwise.
- A front-end enables dirty logging although it was not offered: QEMU does on the monitor command
  calc-dirty-rate, and aborts with the whole VM if that is refused. Without LOG_SHMFD, SET_LOG_BASE,
  VHOST_F_LOG_ALL and the log flag of SET_VRING_ADDR are accepted without effect.
- SET_LOG_BASE with LOG_SHMFD always has one reply, the description of the log; back-ends differ
  here, and this is what all front-ends take. A failure ends the connection.
- GET_CONFIG beyond the config space reads zeros: some front-ends let the guest choose offset and
  size, and abort if they are refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

from vhost_rpmb.errors import PeerError
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple
from vhost_rpmb.vhost_user import foreign, inflight, saved, wire
from vhost_rpmb.vhost_user.dirty_log import DirtyLog
from vhost_rpmb.vhost_user.saved import SavedRegion, State
from vhost_rpmb.vhost_user.transfer import StateTransfer
from vhost_rpmb.vhost_user.vring import Vring
from vhost_rpmb.vhost_user.wire import Message, ProtocolFeature, Request, StateDirection
from vhost_rpmb.virtio import spec as virtio

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import Device, Engine, Log, Watcher

__all__ = ["MAX_MEM_SLOTS", "MESSAGES", "PROTOCOL_FEATURES", "UNKNOWN", "Backend", "Reply", "Row"]

_LEAST_RECORDED = 1024  # descriptors in a region of our own, so that a size may change
MAX_MEM_SLOTS = 509  # the limit of the kernel's vhost
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.GPA_ADDRESSES
)


class Backend:
    """The device's features, memory and vrings; owns every descriptor but those of messages.

    The vrings add their kick descriptors to ``watcher``. ``store`` returns the number under which a
    descriptor is stored for another process, 0 if it is not. ``offered`` are the protocol features.
    ``transfer`` is that of the device state.
    """

    def __init__(
        self,
        device: Device,
        engine: Engine,
        watcher: Watcher,
        log: Log,
        store: Callable[[int], int],
        offered: ProtocolFeature,
        transfer: StateTransfer,
    ) -> None:
        self._device = device
        self._engine = engine
        self._store = store
        self._offered = offered
        self.transfer = transfer
        self._regions: dict[tuple[int, int, int], SavedRegion] = {}
        self._memory = engine.GuestMemory(MAX_MEM_SLOTS)
        self.dirty_log = DirtyLog(engine, self._memory, log)
        self.vrings = [
            Vring(index, engine.Virtqueue(self._memory), watcher, log)
            for index in range(device.num_queues)
        ]
        self._inflight: inflight.Region | None = None
        self._saved_inflight: saved.Inflight | None = None
        self._features = 0
        self.protocol_features = ProtocolFeature(0)
        self._owned = False
        self._status = 0

    def close(self) -> None:
        """Unmap guest memory and close every descriptor."""
        self.transfer.close()
        for vring in self.vrings:
            vring.close()
        self._memory.clear()
        self._drop_inflight()
        self.dirty_log.clear()

    # Another process

    def save(self) -> State:
        """Return everything that another process needs to continue."""
        return State(
            offered=self._device.features,
            config=self._device.config,
            features=self._features,
            protocol_features=int(self.protocol_features),
            owned=self._owned,
            status=self._status,
            regions=list(self._regions.values()),
            vrings=[vring.save(self._store) for vring in self.vrings],
            inflight=self._saved_inflight,
            log=self.dirty_log.save(self._store),
        )

    def keep_rings(self) -> None:
        """Give rings that have started what another process needs to continue them.

        That is an in-flight region, if the front-end sent none. Before they are served.
        """
        if not any(vring.needs_record for vring in self.vrings):
            return
        size = max(_LEAST_RECORDED, *(vring.size for vring in self.vrings))
        description, fd = inflight.create(len(self.vrings), size)
        try:
            self._use_inflight(saved.Inflight(self._store(fd), *description), fd)
        finally:
            os.close(fd)

    def restore(self, state: State, descriptor: Callable[[int], int]) -> None:
        """Continue from the state of another process, before anything else; ValueError, OSError.

        ``descriptor`` returns the stored descriptor of a number, which stays the caller's.
        """
        self._check_device(state)
        self._features = state.features
        self.protocol_features = ProtocolFeature(state.protocol_features)
        self._owned = state.owned
        self._status = state.status
        for region in state.regions:
            fd = descriptor(region.file)
            foreign.check_memory(fd)
            self._memory.add_region(*region.place, fd)
            self._regions[region.place[:3]] = region
        if state.inflight is not None:
            fd = descriptor(state.inflight.file)
            foreign.check_memory(fd)
            self._use_inflight(state.inflight, fd)
        self.dirty_log.restore(state.log, descriptor)
        self.dirty_log.set_features(state.features)
        for vring, found in zip(self.vrings, state.vrings, strict=True):
            vring.restore(found, self._vring_features, descriptor)
        self._device.restore_register(self.vrings[0].used)

    def _check_device(self, state: State) -> None:
        """ValueError if the front-end was told of a device that this one is not."""
        if state.config != self._device.config:
            raise ValueError(
                f"expected the config space {state.config.hex()}, found {self._device.config.hex()}"
            )
        missing = state.offered & ~self._device.features
        if missing or state.protocol_features & ~int(self._offered):
            raise ValueError("expected all features that were offered, found some missing")
        if len(state.vrings) != len(self.vrings):
            raise ValueError(f"expected {len(state.vrings)} vrings, found {len(self.vrings)}")

    # Handlers return the reply; without one, the message may be acknowledged.

    def _unknown(self, _message: Message) -> None:
        raise ValueError("this back-end does not have this message")

    def _get_features(self, _message: Message) -> bytes:
        offered = self._device.features | wire.F_PROTOCOL_FEATURES
        if self._offered & ProtocolFeature.LOG_SHMFD:
            offered |= wire.F_LOG_ALL
        return wire.pack_u64(offered)

    def _set_features(self, message: Message) -> None:
        features = wire.unpack_u64(message.payload)
        accepted = self._device.features | wire.F_PROTOCOL_FEATURES | wire.F_LOG_ALL
        excess = features & ~accepted
        if excess:
            raise ValueError(f"feature bits 0x{excess:x} were not offered")
        packed = bool(features >> virtio.VIRTIO_F_RING_PACKED & 1)
        if any(vring.running and vring.queue.packed != packed for vring in self.vrings):
            raise ValueError("a vring is running: its format can change when it is stopped only")
        self._features = features
        self.dirty_log.set_features(features)
        for vring in self.vrings:
            vring.set_features(self._vring_features)
            if not features & wire.F_PROTOCOL_FEATURES:
                vring.enable(True)

    def _get_protocol_features(self, _message: Message) -> bytes:
        return wire.pack_u64(self._offered)

    def _set_protocol_features(self, message: Message) -> None:
        features = wire.unpack_u64(message.payload)
        excess = features & ~int(self._offered)  # the inverse of an IntFlag has its bits only
        if excess:
            raise ValueError(f"protocol feature bits 0x{excess:x} were not offered")
        self.protocol_features = ProtocolFeature(features)

    def _set_owner(self, _message: Message) -> None:
        """Begin a session; on a connection that had one, everything is set up again.

        QEMU sends it when a removed device is plugged in again with the same character device. It
        did not remove the memory regions, and adds them again.
        """
        if self._owned:
            self.transfer.close()
            self._features = self._status = 0
            for vring in self.vrings:
                vring.reset(0, enabled=False)
                vring.set_call(-1)
                vring.set_error(-1)
                vring.set_record(None)
            self._drop_inflight()
            self.dirty_log.clear()
            self.dirty_log.set_features(0)
            self._memory.clear()
            self._regions.clear()
            self._device.clear_register()
        self._owned = True

    def _reset_owner(self, _message: Message) -> None:
        """Disable all vrings; the message is deprecated because some back-ends reset more."""
        self._owned = False
        for vring in self.vrings:
            vring.enable(False)

    def _get_queue_num(self, _message: Message) -> bytes:
        return wire.pack_u64(self._device.num_queues)

    def _set_mem_table(self, message: Message) -> None:
        """Replace the memory table.

        The new table is first mapped beside the old one, so that a table that breaks a rule or
        cannot be mapped changes nothing. If the second mapping still fails, the old table is lost
        and the connection ends.
        """
        regions = [self._place(each) for each in wire.unpack_memory_table(message.payload)]
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
        self._regions.clear()
        try:
            for region, fd in zip(regions, message.fds, strict=True):
                self._add_region(region, fd)
        except (ValueError, OSError) as error:
            raise PeerError(f"SET_MEM_TABLE: a memory region was lost: {error}") from error

    def _place(self, region: wire.MemoryRegion) -> wire.MemoryRegion:
        """The region as the engine is to know it: vrings are looked up by its user address."""
        if self.protocol_features & ProtocolFeature.GPA_ADDRESSES:
            return region._replace(user_address=region.guest_address)
        return region

    def _get_max_mem_slots(self, _message: Message) -> bytes:
        return wire.pack_u64(MAX_MEM_SLOTS)

    def _add_mem_reg(self, message: Message) -> None:
        region = self._place(wire.unpack_single_region(message.payload))
        foreign.check_memory(message.fds[0])
        self._add_region(region, message.fds[0])

    def _add_region(self, region: wire.MemoryRegion, fd: int) -> None:
        self._memory.add_region(*region, fd)
        self._regions[region[:3]] = SavedRegion(region, self._store(fd))

    def _rem_mem_reg(self, message: Message) -> None:
        region = self._place(wire.unpack_single_region(message.payload))
        self._memory.remove_region(region.guest_address, region.size, region.user_address)
        del self._regions[region[:3]]

    def _set_log_base(self, message: Message) -> bytes | None:
        """Use a log; without LOG_SHMFD there is none, and the descriptor is closed unused."""
        if self.protocol_features & ProtocolFeature.LOG_SHMFD:
            size, offset = wire.LogDescription.unpack(message.payload)
            if not message.fds:
                raise ValueError("expected 1 file descriptor, found 0")
            fd = message.fds[0]
            foreign.check_memory(fd)  # before it is stored: another file could block
            self.dirty_log.set_base(size, offset, fd, self._store(fd))
            return message.payload
        # The specification has a u64 here, QEMU sends the log's description all the same.
        if len(message.payload) not in (wire.U64_SIZE, wire.LOG_SIZE):
            raise ValueError(
                f"expected a payload of {wire.U64_SIZE} or {wire.LOG_SIZE} bytes, "
                f"found {len(message.payload)}"
            )
        return None

    def _set_log_fd(self, message: Message) -> None:
        foreign.check_event(message.fds[0])
        (fd,) = message.take_fds()
        self.dirty_log.set_event(fd)

    def _get_inflight_fd(self, message: Message) -> Reply:
        asked = wire.InflightDescription.unpack(message.payload)
        self._check_queues(asked.num_queues)
        if not 0 < asked.queue_size <= virtio.VIRTQ_MAX_SIZE:
            raise ValueError(f"expected a queue size of 1 to 32768, found {asked.queue_size}")
        description, fd = inflight.create(asked.num_queues, asked.queue_size)
        return Reply(description.pack(), fd)

    def _set_inflight_fd(self, message: Message) -> None:
        description = wire.InflightDescription.unpack(message.payload)
        self._check_queues(description.num_queues)
        if any(vring.running for vring in self.vrings):
            raise ValueError("a vring is running: GET_VRING_BASE stops it")
        fd = message.fds[0]
        foreign.check_memory(fd)  # before it is stored: another file could block
        self._use_inflight(saved.Inflight(self._store(fd), *description), fd)

    def _use_inflight(self, found: saved.Inflight, fd: int) -> None:
        """Map an in-flight region and let the vrings use it."""
        description = wire.InflightDescription(*found[1:])
        region = inflight.Region(self._engine.GuestMemory(1), description, fd)
        for vring in self.vrings:
            vring.set_record(region.record(vring.index))
        self._drop_inflight()
        self._inflight, self._saved_inflight = region, found

    def _drop_inflight(self) -> None:
        """Unmap the in-flight region, which no vring uses any more."""
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = self._saved_inflight = None

    def _set_vring_num(self, message: Message) -> None:
        vring, size = self._vring_state(message)
        vring.set_size(size)

    def _set_vring_addr(self, message: Message) -> None:
        address = wire.VringAddress.unpack(message.payload)
        vring = self._vring(address.vring)
        if address.flags & ~wire.VRING_ADDRESS_LOG:
            raise ValueError(f"expected no flag but the log's, found 0x{address.flags:x}")
        vring.set_addresses(
            *(address.descriptor_table, address.available_ring, address.used_ring),
            address.log if address.flags & wire.VRING_ADDRESS_LOG else None,
        )

    def _set_vring_base(self, message: Message) -> None:
        vring, base = self._vring_state(message)
        vring.set_base(base)

    def _get_vring_base(self, message: Message) -> bytes:
        vring, _ = self._vring_state(message)
        vring.stop()
        return wire.VringState(vring.index, vring.queue.base).pack()

    def _set_vring_kick(self, message: Message) -> None:
        vring, fd = self._vring_fd(message)
        if fd is None:
            raise ValueError("expected a kick descriptor: polling a vring is not served")
        vring.watch(fd)
        message.take_fds()
        vring.set_kick(fd)

    def _set_vring_call(self, message: Message) -> None:
        vring, fd = self._vring_fd(message)
        message.take_fds()
        vring.set_call(-1 if fd is None else fd)

    def _set_vring_err(self, message: Message) -> None:
        vring, fd = self._vring_fd(message)
        message.take_fds()
        vring.set_error(-1 if fd is None else fd)

    def _set_vring_enable(self, message: Message) -> None:
        if not self._features & wire.F_PROTOCOL_FEATURES:
            raise ValueError("VHOST_USER_F_PROTOCOL_FEATURES was not negotiated")
        vring, enable = self._vring_state(message)
        if enable not in (0, 1):
            raise ValueError(f"expected 0 or 1, found {enable}")
        vring.enable(bool(enable))

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
        if self._inflight is not None:
            self._inflight.clear()
        self._device.reset()

    def _set_backend_req_fd(self, message: Message) -> None:
        """Accept the channel for back-end requests, and close it: this device sends none.

        It may hold the other end of this connection, whose disconnect would never be detected.
        """
        foreign.check_unix_stream(message.fds[0])

    def _set_device_state_fd(self, message: Message) -> bytes:
        """Accept a descriptor for the device state; the transfer begins after the reply."""
        asked = wire.StateTransferDescription.unpack(message.payload)
        if asked.direction not in tuple(StateDirection) or asked.phase != wire.STATE_PHASE_STOPPED:
            raise ValueError(
                f"expected direction 0 or 1 and phase 0, found {asked.direction} and {asked.phase}"
            )
        if not message.fds:
            raise ValueError("expected a file descriptor, found none")
        if any(vring.running for vring in self.vrings):
            raise ValueError("a vring is running: GET_VRING_BASE stops it")
        saving = asked.direction == StateDirection.SAVE
        self.transfer.accept(message.fds[0], saving=saving)
        message.take_fds()
        return wire.pack_u64(wire.STATE_FD_NONE)

    def _check_device_state(self, _message: Message) -> bytes:
        """Reply whether the transfer was a success, when it has ended."""
        return self.transfer.check() or wire.pack_u64(0)

    # Vrings

    @property
    def _vring_features(self) -> int:
        return self._features & ~wire.F_PROTOCOL_FEATURES

    def _check_queues(self, count: int) -> None:
        if not 0 < count <= len(self.vrings):
            raise ValueError(f"expected 1 to {len(self.vrings)} vrings, found {count}")

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise ValueError(f"expected a vring index below {len(self.vrings)}, found {index}")
        return self.vrings[index]

    def _vring_state(self, message: Message) -> tuple[Vring, int]:
        state = wire.VringState.unpack(message.payload)
        return self._vring(state.vring), state.num

    def _vring_fd(self, message: Message) -> tuple[Vring, int | None]:
        """Return the vring and the event descriptor, which the message still owns."""
        value = wire.unpack_u64(message.payload)
        if value & ~(wire.VRING_INDEX_MASK | wire.VRING_NO_FD):
            raise ValueError(f"expected an index and the invalid FD flag, found 0x{value:x}")
        vring = self._vring(value & wire.VRING_INDEX_MASK)
        expected = 0 if value & wire.VRING_NO_FD else 1
        if len(message.fds) != expected:
            raise ValueError(f"expected {expected} file descriptors, found {len(message.fds)}")
        if not message.fds:
            return vring, None
        fd = message.fds[0]
        foreign.check_event(fd)
        return vring, fd

    def _reset_vrings(self) -> None:
        for vring in self.vrings:
            vring.reset(
                self._vring_features,
                enabled=not self._features & wire.F_PROTOCOL_FEATURES,
            )


class Reply(NamedTuple):
    """A reply with a descriptor, which the caller closes when it was sent."""

    payload: bytes
    fd: int


class Row(NamedTuple):
    """The required form of a message, and its handler."""

    handler: Callable[[Backend, Message], bytes | Reply | None]
    size: int | None = 0  # bytes of payload; None: the handler checks it
    fds: Collection[int] = (0,)  # allowed numbers of file descriptors
    needs: ProtocolFeature = ProtocolFeature(0)  # must be negotiated
    replies: bool = False  # has a reply of its own
    replies_with: ProtocolFeature = ProtocolFeature(0)  # has one once this is negotiated
    failure: bytes | None = None  # the reply that reports a failure, if there is one


_U64 = wire.U64_SIZE
_STATE = wire.VRING_STATE_SIZE
_ONE = (1,)
_OPTIONAL = (0, 1)
_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS
_INFLIGHT = ProtocolFeature.INFLIGHT_SHMFD

UNKNOWN = Row(Backend._unknown, size=None, fds=range(wire.MAX_FDS + 1))
MESSAGES: dict[int, Row] = {
    Request.GET_FEATURES: Row(Backend._get_features, replies=True),
    Request.SET_FEATURES: Row(Backend._set_features, _U64),
    Request.SET_OWNER: Row(Backend._set_owner),
    Request.RESET_OWNER: Row(Backend._reset_owner),
    Request.SET_MEM_TABLE: Row(Backend._set_mem_table, size=None, fds=range(wire.MAX_FDS + 1)),
    Request.SET_LOG_BASE: Row(
        Backend._set_log_base, None, _OPTIONAL, replies_with=ProtocolFeature.LOG_SHMFD
    ),
    Request.SET_LOG_FD: Row(Backend._set_log_fd, fds=_ONE, needs=ProtocolFeature.LOG_SHMFD),
    Request.SET_VRING_NUM: Row(Backend._set_vring_num, _STATE),
    Request.SET_VRING_ADDR: Row(Backend._set_vring_addr, wire.VRING_ADDRESS_SIZE),
    Request.SET_VRING_BASE: Row(Backend._set_vring_base, _STATE),
    Request.GET_VRING_BASE: Row(Backend._get_vring_base, _STATE, replies=True),
    Request.SET_VRING_KICK: Row(Backend._set_vring_kick, _U64, _OPTIONAL),
    Request.SET_VRING_CALL: Row(Backend._set_vring_call, _U64, _OPTIONAL),
    Request.SET_VRING_ERR: Row(Backend._set_vring_err, _U64, _OPTIONAL),
    Request.GET_PROTOCOL_FEATURES: Row(Backend._get_protocol_features, replies=True),
    Request.SET_PROTOCOL_FEATURES: Row(Backend._set_protocol_features, _U64),
    # Allowed as soon as MQ was offered, which it always is.
    Request.GET_QUEUE_NUM: Row(Backend._get_queue_num, replies=True),
    Request.SET_VRING_ENABLE: Row(Backend._set_vring_enable, _STATE),
    # From a front-end that does not wait for BACKEND_REQ, which is not offered.
    Request.SET_BACKEND_REQ_FD: Row(Backend._set_backend_req_fd, fds=_ONE),
    Request.GET_CONFIG: Row(
        Backend._get_config, None, needs=ProtocolFeature.CONFIG, replies=True, failure=b""
    ),
    Request.SET_CONFIG: Row(Backend._set_config, None, needs=ProtocolFeature.CONFIG),
    Request.GET_INFLIGHT_FD: Row(
        Backend._get_inflight_fd, wire.INFLIGHT_SIZE, needs=_INFLIGHT, replies=True
    ),
    Request.SET_INFLIGHT_FD: Row(
        Backend._set_inflight_fd, wire.INFLIGHT_SIZE, _ONE, needs=_INFLIGHT
    ),
    Request.SET_DEVICE_STATE_FD: Row(
        Backend._set_device_state_fd,
        *(wire.TRANSFER_SIZE, _OPTIONAL, ProtocolFeature.DEVICE_STATE, True),
        failure=wire.pack_u64(wire.STATE_FD_NONE | wire.STATE_ERROR),
    ),
    Request.CHECK_DEVICE_STATE: Row(
        Backend._check_device_state,
        needs=ProtocolFeature.DEVICE_STATE,
        replies=True,
        failure=wire.pack_u64(wire.STATE_ERROR),
    ),
    Request.RESET_DEVICE: Row(Backend._reset_device, needs=ProtocolFeature.RESET_DEVICE),
    Request.GET_MAX_MEM_SLOTS: Row(Backend._get_max_mem_slots, needs=_SLOTS, replies=True),
    Request.ADD_MEM_REG: Row(Backend._add_mem_reg, wire.SINGLE_REGION_SIZE, _ONE, _SLOTS),
    # With a descriptor too: there are front-ends that send one. It is closed unused.
    Request.REM_MEM_REG: Row(Backend._rem_mem_reg, wire.SINGLE_REGION_SIZE, _OPTIONAL, _SLOTS),
    Request.SET_STATUS: Row(Backend._set_status, _U64, needs=ProtocolFeature.STATUS),
    Request.GET_STATUS: Row(Backend._get_status, needs=ProtocolFeature.STATUS, replies=True),
}
