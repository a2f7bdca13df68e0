# SPDX-License-Identifier: Apache-2.0
"""Features, owner, status, and the back-end request channel."""

from __future__ import annotations

import pytest

from tests.support.peer import OFFERED, EchoDevice, Peer
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.wire import ProtocolFeature, Request
from vhost_rpmb.virtio import spec as virtio


def test_offered_features(fresh: Peer) -> None:
    assert fresh.ask_u64(Request.GET_FEATURES) == OFFERED
    assert fresh.ask_u64(Request.GET_PROTOCOL_FEATURES) == PROTOCOL_FEATURES


def test_offer_of_protocol_features_is_the_callers(engine: Engine, device: EchoDevice) -> None:
    offered = PROTOCOL_FEATURES & ~ProtocolFeature.STATUS | ProtocolFeature.DEVICE_STATE
    peer = Peer(engine, device, protocol_features=offered)
    try:
        assert peer.ask_u64(Request.GET_PROTOCOL_FEATURES) == offered
        peer.negotiate(offered)
        peer.refused(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(ProtocolFeature.STATUS))
    finally:
        peer.close()


@pytest.mark.parametrize("bit", [0, virtio.VIRTIO_F_INDIRECT_DESC, 34, 63])
def test_feature_not_offered_is_refused(peer: Peer, bit: int) -> None:
    peer.refused(Request.SET_FEATURES, wire.pack_u64(OFFERED | 1 << bit))


def test_log_all_is_accepted_without_an_offer(peer: Peer) -> None:
    assert not OFFERED & wire.F_LOG_ALL
    assert peer.ack(Request.SET_FEATURES, wire.pack_u64(OFFERED | wire.F_LOG_ALL)) == 0
    assert peer.ack(Request.SET_FEATURES, wire.pack_u64(OFFERED)) == 0


@pytest.mark.parametrize("bit", [1, 8, 14, 17, 19, 22, 40, 63])
def test_protocol_feature_not_offered_is_refused(peer: Peer, bit: int) -> None:
    peer.refused(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(1 << bit))
    assert peer.ask(Request.GET_MAX_MEM_SLOTS)  # what was negotiated before still is


def test_number_of_queues(fresh: Peer) -> None:
    assert fresh.ask_u64(Request.GET_QUEUE_NUM) == 2


def test_status_is_kept(peer: Peer) -> None:
    assert peer.ask_u64(Request.GET_STATUS) == 0
    for status in (1, 3, 11, 15, 255, 0):
        assert peer.ack(Request.SET_STATUS, wire.pack_u64(status)) == 0
        assert peer.ask_u64(Request.GET_STATUS) == status


@pytest.mark.parametrize("status", [0x100, 1 << 63])
def test_status_wider_than_a_byte_is_refused(peer: Peer, status: int) -> None:
    assert peer.ack(Request.SET_STATUS, wire.pack_u64(3)) == 0
    peer.refused(Request.SET_STATUS, wire.pack_u64(status))
    assert peer.ask_u64(Request.GET_STATUS) == 3


def test_only_reset_device_resets_the_device(peer: Peer, device: EchoDevice) -> None:
    peer.send(Request.SET_STATUS, wire.pack_u64(15))
    peer.send(Request.SET_STATUS, wire.pack_u64(0))
    peer.send(Request.RESET_OWNER)
    assert device.resets == 0
    peer.send(Request.SET_STATUS, wire.pack_u64(15))
    assert peer.ack(Request.RESET_DEVICE) == 0
    assert device.resets == 1
    assert peer.ask_u64(Request.GET_STATUS) == 0


@pytest.mark.parametrize("request_", [Request.SET_STATUS, Request.RESET_DEVICE])
def test_memory_outlives_a_reset(peer: Peer, memory: GuestMemory, request_: Request) -> None:
    peer.share(memory)
    before = peer.regions
    peer.send(request_, wire.pack_u64(0) if request_ == Request.SET_STATUS else b"")
    assert before
    assert peer.regions == before
