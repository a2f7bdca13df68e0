# SPDX-License-Identifier: Apache-2.0
"""Conditions under which a vring is processed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.peer import FEATURES, OFFERED, EchoDevice, Peer, addresses, signalled
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request, VringState
from vhost_rpmb.virtio.flags import MORE, NOTIFY


@pytest.fixture
def disabled(peer: Peer, memory: GuestMemory, ring: Ring) -> Peer:
    """Everything is there but that the vring is running."""
    peer.share(memory)
    peer.start(ring)
    assert not peer.ack(Request.SET_VRING_ENABLE, VringState(0, 0).pack())
    signalled(ring.call_fd)
    return peer


@pytest.fixture
def running(disabled: Peer, ring: Ring, device: EchoDevice) -> Peer:
    assert not disabled.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    signalled(ring.call_fd)
    device.processed = 0
    return disabled


@pytest.mark.parametrize("last", range(4))
def test_vring_starts_with_its_last_setting(
    peer: Peer, memory: GuestMemory, ring: Ring, device: EchoDevice, last: int
) -> None:
    peer.share(memory)
    steps: list[tuple[Request, bytes, tuple[int, ...]]] = [
        (Request.SET_VRING_NUM, VringState(0, ring.size).pack(), ()),
        (Request.SET_VRING_ADDR, addresses(ring).pack(), ()),
        (Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,)),
        (Request.SET_VRING_ENABLE, VringState(0, 1).pack(), ()),
    ]
    assert not peer.ack(Request.SET_VRING_CALL, wire.pack_u64(0), (ring.call_fd,))
    final = steps.pop(last)
    for step in steps:
        assert not peer.ack(*step)
    ring.kick()
    peer.settle()
    assert device.processed == 0
    assert not signalled(ring.call_fd)
    assert not peer.ack(*final)
    peer.settle()
    assert device.processed >= 1
    assert signalled(ring.call_fd)


def test_vring_is_looked_at_without_a_kick_when_it_starts(
    disabled: Peer, ring: Ring, device: EchoDevice
) -> None:
    device.processed = 0
    assert not disabled.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    disabled.settle()
    assert device.processed == 1
    assert signalled(ring.call_fd)
    assert not disabled.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    disabled.settle()
    assert device.processed == 1  # it ran already


def test_vring_is_enabled_from_the_start_without_protocol_features(
    fresh: Peer, memory: GuestMemory, ring: Ring, device: EchoDevice
) -> None:
    fresh.negotiate()
    assert not fresh.ack(Request.SET_FEATURES, wire.pack_u64(FEATURES))
    fresh.share(memory)
    fresh.configure(ring)
    assert device.processed == 0
    assert not fresh.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
    assert device.processed == 1


def test_each_kick_processes_the_vring_once(running: Peer, ring: Ring, device: EchoDevice) -> None:
    for count in range(1, 50):
        ring.kick()
        running.settle()
        assert device.processed == count
    assert not signalled(ring.call_fd)


def test_notification_signals_the_call_descriptor(
    running: Peer, ring: Ring, device: EchoDevice, engine: Engine
) -> None:
    device.flags = [NOTIFY]
    ring.kick()
    running.settle()
    assert signalled(ring.call_fd)
    assert not signalled(ring.error_fd)


def test_remaining_work_is_done_after_other_events(
    running: Peer, ring: Ring, device: EchoDevice, engine: Engine
) -> None:
    device.flags = [MORE] * 5
    ring.kick()
    running.loop.wait(0)
    for count in range(1, 6):
        running.run()
        assert device.processed == count
        assert running.backend.pending
    wire.send_message(running.sock, Request.GET_STATUS)
    running.loop.wait(0)
    assert running.reply() is not None
    running.run()
    assert device.processed == 6
    assert not running.backend.pending


def test_endless_work_ends_when_the_vring_is_stopped(
    running: Peer, ring: Ring, device: EchoDevice, engine: Engine
) -> None:
    device.flags = [MORE] * 1000
    ring.kick()
    wire.send_message(running.sock, Request.GET_VRING_BASE, 0, bytes(8))
    running.settle(rounds=10)
    assert len(device.flags) > 990
    assert running.reply() == VringState(0, 0).pack()


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.SET_VRING_ENABLE, VringState(0, 0).pack()),
        (Request.RESET_OWNER, b""),
        (Request.SET_STATUS, wire.pack_u64(0)),
        (Request.RESET_DEVICE, b""),
    ],
    ids=["disable", "reset-owner", "status-0", "reset-device"],
)
def test_stopped_vring_ignores_kicks(
    running: Peer, ring: Ring, device: EchoDevice, request_: Request, payload: bytes
) -> None:
    assert not running.ack(request_, payload)
    ring.kick()
    running.settle()
    assert device.processed == 0


def test_get_vring_base_stops_the_vring(
    running: Peer, ring: Ring, device: EchoDevice, memory: GuestMemory
) -> None:
    assert running.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
    ring.kick()
    running.settle()
    assert device.processed == 0
    # A new kick descriptor is all that it needs to go on.
    assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
    assert device.processed >= 1
    assert signalled(ring.call_fd)


def test_reset_forgets_the_vrings_settings(running: Peer, ring: Ring, device: EchoDevice) -> None:
    assert not running.ack(Request.SET_VRING_BASE, VringState(1, 9).pack())
    assert not running.ack(Request.SET_STATUS, wire.pack_u64(0))
    assert running.ask(Request.GET_VRING_BASE, VringState(1, 0).pack()) == bytes([1]) + bytes(7)
    assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
    assert not running.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    assert device.processed == 0
    running.start(ring)
    assert device.processed >= 1


def test_vring_is_enabled_after_a_reset_only_without_protocol_features(
    running: Peer, ring: Ring, device: EchoDevice
) -> None:
    """As in the beginning: only without protocol features, as there is no message for it."""
    for features, processed in ((OFFERED, 0), (FEATURES, 1)):
        assert not running.ack(Request.SET_FEATURES, wire.pack_u64(features))
        assert not running.ack(Request.RESET_DEVICE)
        device.processed = 0
        assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        running.configure(ring)
        assert bool(device.processed) == processed


def test_size_and_base_of_a_running_vring_cannot_change(running: Peer, ring: Ring) -> None:
    running.refused(Request.SET_VRING_NUM, VringState(0, 8).pack())
    running.refused(Request.SET_VRING_BASE, VringState(0, 0).pack())
    assert running.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
    assert not running.ack(Request.SET_VRING_NUM, VringState(0, 8).pack())
    assert not running.ack(Request.SET_VRING_BASE, VringState(0, 3).pack())


def test_addresses_of_a_running_vring_can_change(running: Peer) -> None:
    assert not running.ack(Request.SET_VRING_ADDR, wire.VringAddress(0, 0, 0, 0, 0).pack())


def test_new_kick_descriptor_replaces_the_previous_one(
    running: Peer, ring: Ring, device: EchoDevice, eventfds: list[int]
) -> None:
    assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (eventfds[0],))
    device.processed = 0
    ring.kick()
    running.settle()
    assert device.processed == 0
    os.eventfd_write(eventfds[0], 1)
    running.settle()
    assert device.processed == 1


def test_new_call_descriptor_is_signalled(
    running: Peer, ring: Ring, device: EchoDevice, eventfds: list[int], engine: Engine
) -> None:
    assert not running.ack(Request.SET_VRING_CALL, wire.pack_u64(0), (eventfds[0],))
    assert signalled(eventfds[0])
    device.flags = [NOTIFY]
    ring.kick()
    running.settle()
    assert signalled(eventfds[0])
    assert not signalled(ring.call_fd)


def test_vring_runs_without_a_call_descriptor(
    running: Peer, ring: Ring, device: EchoDevice, engine: Engine
) -> None:
    assert not running.ack(Request.SET_VRING_CALL, wire.pack_u64(wire.VRING_NO_FD))
    device.flags = [NOTIFY]
    ring.kick()
    running.settle()
    assert device.processed == 1
    assert not signalled(ring.call_fd)


def test_vrings_are_independent(running: Peer, memory: GuestMemory, device: EchoDevice) -> None:
    with Ring(memory, 4) as second:
        running.start(second, index=1)
        device.processed = 0
        second.kick()
        running.settle()
        assert device.processed == 1
        assert running.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
        second.kick()
        running.settle()
        assert device.processed == 2


@pytest.fixture
def two(running: Peer, memory: GuestMemory, device: EchoDevice) -> Iterator[Ring]:
    """A second vring that runs; nothing was kicked."""
    with Ring(memory, 4) as second:
        running.start(second, index=1)
        running.settle()
        device.queues.clear()
        yield second


def queues(peer: Peer) -> list[object]:
    return [vring.queue for vring in peer.vrings]


def test_kick_is_seen_while_the_loop_waits_for_another_vring(
    running: Peer, ring: Ring, two: Ring, device: EchoDevice
) -> None:
    ring.kick()
    running.loop.wait(0)
    kick = threading.Timer(0.1, two.kick)
    kick.start()
    running.backend.run()  # asleep on the first vring until the kick, for a second at most
    kick.join()
    running.settle()
    assert device.queues[-1] is queues(running)[1]


def test_vrings_kicked_at_once_take_turns(
    running: Peer, ring: Ring, two: Ring, device: EchoDevice, engine: Engine
) -> None:
    """None waits until the other one has nothing more to do."""
    device.flags = [MORE] * 1000
    ring.kick()
    two.kick()
    running.loop.wait(0)
    running.backend.run()
    assert len(device.queues) == 2
    assert all(queue in device.queues for queue in queues(running))


def test_call_and_error_descriptors_outlive_a_reset(
    running: Peer, ring: Ring, device: EchoDevice, engine: Engine
) -> None:
    assert not running.ack(Request.RESET_DEVICE)
    running.configure(ring)
    assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
    device.flags = [NOTIFY]
    assert not running.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    assert signalled(ring.call_fd)


def test_disconnect_stops_a_running_vring(running: Peer, ring: Ring, device: EchoDevice) -> None:
    ring.kick()
    running.sock.close()
    running.settle()
    assert isinstance(running.end, EOFError)
    assert device.processed <= 1
    ring.kick()
    assert running.settle() == 0
