# SPDX-License-Identifier: Apache-2.0
"""GPA_ADDRESSES: the parts of a vring are found by guest address."""

from __future__ import annotations

import pytest

from tests.support.peer import PAGE, EchoDevice, Peer
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.wire import ProtocolFeature, Request, VringState


@pytest.fixture
def peer(fresh: Peer) -> Peer:
    fresh.negotiate(PROTOCOL_FEATURES)
    return fresh


def addresses(ring: Ring) -> bytes:
    return wire.VringAddress(
        0, 0, ring.descriptor_table, ring.used_ring, ring.available_ring
    ).pack()


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("user_address", [0, 0x7000_0000, 2**64 - PAGE])
def test_vring_is_found_by_guest_address(
    peer: Peer,
    memory: GuestMemory,
    ring: Ring,
    device: EchoDevice,
    table: bool,
    user_address: int,
) -> None:
    region = memory.regions[0]
    place = region.place._replace(user_address=user_address)
    if table:
        packed = wire.pack_memory_table([place])
        assert not peer.ack(Request.SET_MEM_TABLE, packed, (region.fd,))
    else:
        packed = wire.pack_single_region(place)
        assert not peer.ack(Request.ADD_MEM_REG, packed, (region.fd,))
    assert not peer.ack(Request.SET_VRING_NUM, VringState(0, ring.size).pack())
    assert not peer.ack(Request.SET_VRING_ADDR, addresses(ring))
    queue = peer.vrings[0].queue
    ring.memory.store16(ring.used_ring + 2, 77)
    assert queue.used == 77
    removed = wire.pack_single_region(place._replace(user_address=1234))  # not read
    assert not peer.ack(Request.REM_MEM_REG, removed)
    assert peer.regions == ()
    assert queue.used is None


def test_without_the_feature_the_user_address_counts(
    fresh: Peer, memory: GuestMemory, ring: Ring
) -> None:
    fresh.negotiate(PROTOCOL_FEATURES & ~ProtocolFeature.GPA_ADDRESSES)
    fresh.share(memory)
    assert not fresh.ack(Request.SET_VRING_NUM, VringState(0, ring.size).pack())
    assert not fresh.ack(Request.SET_VRING_ADDR, addresses(ring))
    assert fresh.vrings[0].queue.used is None
