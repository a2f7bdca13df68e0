# SPDX-License-Identifier: Apache-2.0
"""One vring: its virtqueue, its descriptors, and whether it runs.

A vring runs while it is enabled and has a size, addresses and a kick descriptor. When it starts to
run it is looked at once without a kick, its call descriptor is signalled once, and all that is ever
written to it is marked in the dirty log: an earlier back-end that was killed may have consumed the
kick, and may not have given the signal, nor marked what it wrote last.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from vhost_rpmb.errors import PeerError
from vhost_rpmb.log import Logger
from vhost_rpmb.typed import TYPE_CHECKING
from vhost_rpmb.vhost_user import foreign, inflight_packed
from vhost_rpmb.vhost_user.events import BLOCKED, signal
from vhost_rpmb.vhost_user.inflight import InvalidRecordError, Record
from vhost_rpmb.vhost_user.saved import SavedVring
from vhost_rpmb.virtio import flags
from vhost_rpmb.virtio import spec as virtio

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import Log, Virtqueue, Watcher

__all__ = ["Vring"]

logger = Logger(__name__)


class Vring:
    """A vring; owns its descriptors (-1: none). `pending`: it is to be served."""

    def __init__(self, index: int, queue: Virtqueue, watcher: Watcher, log: Log) -> None:
        self.index = index
        self.queue = queue
        self.running = False
        self.pending = False
        self.kick_fd = -1
        self.call_fd = -1
        self.used = 0  # the used position when another process's vring was restored
        self._watcher = watcher
        self._log = log
        self.size = 0  # 0: none was set
        self._addresses: tuple[int, int, int] | None = None
        self._log_address: int | None = None
        self._enabled = False
        self._error_fd = -1
        self._record: Record | None = None
        self._recovered = False  # the record was read since the base was set
        self._kept = False  # it is of the ring that this connection has set up
        self._fault = ""  # of the record: the vring does not run

    # Settings; ValueError changes nothing

    def set_features(self, features: int) -> None:
        """Set the negotiated virtio feature bits; the ring format only while it does not run."""
        packed = bool(features >> virtio.VIRTIO_F_RING_PACKED & 1)
        if packed != self.queue.packed:
            self._forget()
            self._recovered = False
        self.queue.set_features(features)
        self._update()

    def set_size(self, size: int) -> None:
        """Set the number of descriptors; not while it runs, as in the kernel's vhost."""
        self._refuse_running()
        self.queue.set_size(size)
        if size != self.size:
            self._recovered = False  # the record has as many entries
        self.size = size
        self._update()

    def set_addresses(
        self,
        descriptor_table: int,
        available_ring: int,
        used_ring: int,
        log_address: int | None = None,
    ) -> None:
        """Set the user addresses of the three parts, and whether and where the dirty log has it."""
        self.queue.mark_ring(log_address)
        self.queue.set_addresses(descriptor_table, available_ring, used_ring)
        self._addresses = descriptor_table, available_ring, used_ring
        self._log_address = log_address
        self._update()

    def set_base(self, base: int) -> None:
        """Set the position of the next chain; not while it runs. Repairs a broken vring."""
        self._refuse_running()
        before = self.queue.base
        self._set_base(base)
        if self.queue.packed and self.queue.base != before:
            self._forget()

    def set_record(self, record: Record | None) -> None:
        """Set the record of what is in flight; not while it runs."""
        self._record = record
        self._kept = False
        self._set_base(self.queue.base)

    def enable(self, enabled: bool) -> None:
        """Enable or disable it."""
        self._enabled = enabled
        self._update()

    def reset(self, features: int, enabled: bool) -> None:
        """Return to the initial state; call and error descriptors stay."""
        self.stop()
        if self.queue.packed:
            self._forget()
        self.queue.reset()
        self.queue.set_features(features)
        self.size, self._addresses, self._log_address = 0, None, None
        self._recovered = self._kept = False
        self._fault = ""
        self.enable(enabled)

    # Descriptors

    def watch(self, fd: int) -> None:
        """Watch the next kick descriptor, for `set_kick`; OSError changes nothing."""
        self._watcher.add(fd, self.kicked, edge=True)

    def set_kick(self, fd: int) -> None:
        """Replace the kick descriptor by a watched one. Repairs a broken vring."""
        self.stop()
        self.kick_fd = fd
        self._set_base(self.queue.base)

    def set_call(self, fd: int) -> None:
        """Replace the call descriptor, and signal it in case the vring runs."""
        _close(self.call_fd)
        self.call_fd = fd
        if self.running:
            signal(fd, self._log)

    def set_error(self, fd: int) -> None:
        """Replace the error descriptor."""
        _close(self._error_fd)
        self._error_fd = fd

    def stop(self) -> None:
        """Stop it by closing its kick descriptor."""
        if self.kick_fd >= 0:
            self._watcher.remove(self.kick_fd)
            _close(self.kick_fd)
            self.kick_fd = -1
            self._update()

    def close(self) -> None:
        """Close all descriptors."""
        self.stop()
        _close(self.call_fd)
        _close(self._error_fd)
        self.pending = False

    # Another process

    def save(self, store: Callable[[int], int]) -> SavedVring:
        """Everything that another process needs; ``store`` returns the number of a descriptor."""
        used = self.queue.used or 0
        base = self.queue.base & 0xFFFF  # of a packed ring: there is nothing in flight
        kick, call, error = (
            store(fd) if fd >= 0 else 0 for fd in (self.kick_fd, self.call_fd, self._error_fd)
        )
        ahead = 0 if self.queue.packed else base - used & 0xFFFF
        return SavedVring(
            *(self.size, self._addresses, self._enabled, self.running, base, ahead, used),
            *(kick, call, error, self._log_address, self._kept),
        )

    def restore(self, saved: SavedVring, features: int, descriptor: Callable[[int], int]) -> None:
        """Continue a vring of another process, whose memory is mapped; ValueError, OSError."""
        self.queue.set_features(features)
        if saved.size:
            self.set_size(saved.size)
        if saved.addresses is not None:
            self.set_addresses(*saved.addresses, saved.log_address)
        self._enabled = saved.enabled
        self._kept = saved.kept
        self.used, base = saved.used, saved.base
        if self.queue.packed:
            base |= base << 16
        elif saved.running and (used := self.queue.used) is not None:
            self.used, base = used, used + saved.ahead & 0xFFFF  # chains complete in order
        self.queue.set_base(base)
        if self.queue.packed:
            self._restore_packed(saved.running)
        if saved.call:
            self.call_fd = _copy(descriptor(saved.call))
        if saved.error:
            self._error_fd = _copy(descriptor(saved.error))
        if saved.kick:
            kick_fd = _copy(descriptor(saved.kick))
            try:
                self.watch(kick_fd)
            except OSError:
                os.close(kick_fd)
                raise
            self.kick_fd = kick_fd
        self._update()

    def _restore_packed(self, running: bool) -> None:
        """Find the position of a packed ring in its record; ValueError if it needs one."""
        if running:
            if self._record is None:
                raise ValueError("expected an in-flight region of a packed ring, found none")
            self.recover()
            self.used = self.queue.base & 0xFFFF

    @property
    def needs_record(self) -> bool:
        """Whether it runs, but no other process could continue it.

        Guest memory does not say where a packed ring continues, and a batch that is published in
        part has overwritten its requests.
        """
        return self.running and self.queue.packed and self._record is None

    # Serving

    def kicked(self) -> None:
        """Handle the event that the kick descriptor became readable.

        It is watched edge-triggered, so that the eventfd need not be read.
        """
        if self.running:
            self.pending = True

    def recover(self) -> None:
        """Continue where the record of what is in flight says; before the first batch.

        A record that is invalid stops the vring.
        """
        if self._recovered or self._record is None:
            return
        used = self.queue.used
        if used is None:
            return  # the next batch finds the reason
        self._recovered = self._kept = True
        try:
            if self.queue.packed:
                inflight_packed.resume(self.queue, self._record, self.size)
            else:
                self._resume(self._record, used)
        except InvalidRecordError as error:
            self._fault = f"the in-flight region is invalid: {error}"
            self._stopped(self._fault, "the in-flight region is invalid")

    def _resume(self, record: Record, used_index: int) -> None:
        """Continue a split ring where its record says; InvalidRecordError."""
        found = record.recover(self.size, used_index, self.queue.base)
        if found.cleared:
            self._log.report(
                "in-flight region",
                f"vring {self.index}: the in-flight region does not fit the used index, and was "
                "cleared",
            )
        self.queue.set_base(found.base)
        self.queue.resume(used_index, record.memory, record.offset, found.last, found.heads)

    def _forget(self) -> None:
        """Make the record of another ring that this connection had set up fresh.

        That ring is stopped and answered. A record of an earlier connection stays: it says where
        the ring of a back-end that was killed continues.
        """
        if self._record is not None and self._kept:
            self._record.clear()
            self._kept = False

    def refuse(self, reason: str) -> None:
        """Do not run: the device is not here. The next start asks again."""
        self._fault = reason
        self._stopped(reason)

    def handle(self, result: int) -> None:
        """Handle the flags that the engine's loop returned for this vring.

        Raises PeerError if the front-end blocked a write.
        """
        if result & flags.BLOCKED:
            raise PeerError(BLOCKED)
        if result & flags.UNSIGNALLED:
            self._log.report("signal", f"vring {self.index}: the front-end cannot be signalled")
        if result & flags.MORE:
            self.pending = True
        if result & flags.FAULTS:
            for rule, count in self.queue.take_faults().items():
                self._log.report(rule, f"vring {self.index}: {count} broken chains: {rule}")
        if result & flags.BROKEN:
            self._stopped(self.queue.error)

    def _stopped(self, cause: str, rule: str = "") -> None:
        """Report that the vring is broken; the ``rule`` of a cause in which a number varies."""
        self._log.report(
            f"vring stopped: {rule or cause}",
            f"vring {self.index} stopped until its reset: {cause}",
        )
        self._update()
        signal(self._error_fd, self._log)

    def _set_base(self, base: int) -> None:
        self.queue.set_base(base)
        self._recovered = False
        self._fault = ""
        self._update()

    def _update(self) -> None:
        """Start or stop the vring after a change of anything that decides whether it runs."""
        running = (
            self._enabled
            and self.size > 0
            and self._addresses is not None
            and self.kick_fd >= 0
            and not (self.queue.error or self._fault)
        )
        started = running and not self.running
        self.running = running
        if started:
            self.pending = True
            self.queue.mark_written()
            signal(self.call_fd, self._log)
        elif not running:
            self.pending = False

    def _refuse_running(self) -> None:
        if self.running:
            raise ValueError("the vring is running: GET_VRING_BASE stops it")


def _copy(fd: int) -> int:
    foreign.check_event(fd)
    return os.dup(fd)


def _close(fd: int) -> None:
    if fd >= 0:
        foreign.close([fd])
