# SPDX-License-Identifier: Apache-2.0
"""SET_OWNER on a connection that has an owner: QEMU plugged the device in again."""

from __future__ import annotations

import pytest

from tests.support.peer import OFFERED, EchoDevice, Peer, signalled
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.vhost_user import inflight, wire
from vhost_rpmb.vhost_user.wire import InflightDescription, Request, VringState


@pytest.fixture
def owned(peer: Peer, memory: GuestMemory, ring: Ring, memfd: int) -> Peer:
    """A running vring with everything that a front-end can give to it."""
    assert peer.ack(Request.SET_OWNER) == 0
    region = InflightDescription(2 * inflight.stride(8), 0, 2, 8)
    assert peer.ack(Request.SET_INFLIGHT_FD, region.pack(), (memfd,)) == 0
    peer.share(memory)
    peer.start(ring)
    assert peer.ack(Request.SET_STATUS, wire.pack_u64(15)) == 0
    return peer


def test_second_owner_sets_everything_up_again(
    owned: Peer, memory: GuestMemory, ring: Ring, device: EchoDevice
) -> None:
    for plugged in range(1, 4):
        processed = device.processed
        # In QEMU's order: the regions come again, after SET_OWNER.
        assert owned.ack(Request.SET_OWNER) == 0
        assert (owned.regions, device.cleared, device.resets) == ((), plugged, 0)
        ring.kick()
        owned.settle()
        assert device.processed == processed
        assert owned.ask_u64(Request.GET_STATUS) == 0
        assert owned.ask_u64(Request.GET_FEATURES) == OFFERED
        assert owned.ack(Request.SET_FEATURES, wire.pack_u64(OFFERED)) == 0
        signalled(ring.call_fd)
        owned.share(memory)
        owned.start(ring, base=0)
        assert device.processed > processed
        assert signalled(ring.call_fd)


def test_second_owner_stops_the_vrings(owned: Peer, device: EchoDevice) -> None:
    assert owned.ack(Request.SET_VRING_BASE, VringState(1, 9).pack()) == 0
    assert owned.ack(Request.SET_OWNER) == 0
    assert not any(vring.running or vring.pending for vring in owned.vrings)
    assert {(vring.kick_fd, vring.call_fd) for vring in owned.vrings} == {(-1, -1)}
    for index in range(2):
        ring = VringState(index, 0).pack()
        assert owned.ask(Request.GET_VRING_BASE, ring) == ring
    # SET_VRING_ENABLE needs SET_FEATURES, as in the beginning; protocol features stay.
    owned.refused(Request.SET_VRING_ENABLE, VringState(0, 1).pack())


def test_second_owner_unmaps_the_in_flight_region(
    owned: Peer, memory: GuestMemory, ring: Ring
) -> None:
    state = owned.backend._backend.save()
    assert state.inflight is not None
    assert owned.ack(Request.SET_OWNER) == 0
    state = owned.backend._backend.save()
    assert (state.inflight, state.files) == (None, set())
    assert owned.ack(Request.SET_FEATURES, wire.pack_u64(OFFERED)) == 0
    owned.share(memory)
    owned.start(ring, base=0)
    assert owned.vrings[0].running


def test_owner_after_reset_owner_changes_nothing(owned: Peer, device: EchoDevice) -> None:
    """RESET_OWNER disables the vrings; back-ends that reset more made it deprecated."""
    regions = owned.regions
    for _ in range(2):
        assert owned.ack(Request.RESET_OWNER) == 0
        assert owned.ack(Request.SET_OWNER) == 0
    assert (owned.regions, device.cleared) == (regions, 0)
    assert owned.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack()) == 0
    assert owned.vrings[0].running
