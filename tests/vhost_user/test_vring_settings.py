# SPDX-License-Identifier: Apache-2.0
"""Messages that describe a vring: size, base, addresses, descriptors."""

from __future__ import annotations

import pytest

from tests.support.peer import FEATURES, Peer
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request, VringState


@pytest.mark.parametrize("size", [1, 3, 64, 32768])
def test_valid_size_is_accepted(peer: Peer, size: int) -> None:
    assert peer.ack(Request.SET_VRING_NUM, VringState(0, size).pack()) == 0


@pytest.mark.parametrize("size", [0, 32769, 65536, 0xFFFF_FFFF])
def test_invalid_size_is_refused(peer: Peer, size: int) -> None:
    peer.refused(Request.SET_VRING_NUM, VringState(0, size).pack())


@pytest.mark.parametrize("base", [0, 1, 0xFFFF])
def test_base_is_kept_for_each_vring(peer: Peer, base: int) -> None:
    assert peer.ack(Request.SET_VRING_BASE, VringState(1, base).pack()) == 0
    reply = peer.ask(Request.GET_VRING_BASE, VringState(1, 0).pack())
    assert reply == VringState(1, base).pack()
    assert peer.ask(Request.GET_VRING_BASE, bytes(8)) == VringState(0, 0).pack()


@pytest.mark.parametrize("base", [0x10000, 0xFFFF_FFFF])
def test_base_of_more_than_16_bits_is_refused(peer: Peer, base: int) -> None:
    peer.refused(Request.SET_VRING_BASE, VringState(0, base).pack())


def test_log_flag_is_accepted(peer: Peer) -> None:
    assert peer.ack(Request.SET_VRING_ADDR, wire.VringAddress(0, 1, 0, 0, 0, 9).pack()) == 0


@pytest.mark.parametrize("flags", [2, 3, 0x8000_0000])
def test_other_flags_are_refused(peer: Peer, flags: int) -> None:
    peer.refused(Request.SET_VRING_ADDR, wire.VringAddress(0, flags, 0, 0, 0).pack())


@pytest.mark.parametrize("value", [2, 0xFFFF_FFFF])
def test_enable_takes_0_or_1(peer: Peer, value: int) -> None:
    peer.refused(Request.SET_VRING_ENABLE, VringState(0, value).pack())


def test_enable_needs_protocol_features(fresh: Peer) -> None:
    fresh.negotiate()
    assert fresh.ack(Request.SET_FEATURES, wire.pack_u64(FEATURES)) == 0
    fresh.refused(Request.SET_VRING_ENABLE, VringState(0, 1).pack())


@pytest.mark.parametrize(
    "request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
)
def test_event_descriptor_flags(peer: Peer, eventfds: list[int], request_: Request) -> None:
    no_fd = wire.pack_u64(wire.VRING_NO_FD)
    peer.refused(request_, no_fd, (eventfds[0],))
    peer.refused(request_, wire.pack_u64(0x200), (eventfds[0],))
    peer.refused(request_, wire.pack_u64(1 << 63), (eventfds[0],))
    assert peer.ack(request_, wire.pack_u64(0), (eventfds[0],)) == 0
    assert peer.ack(request_, wire.pack_u64(0), (eventfds[0],)) == 0
    if request_ == Request.SET_VRING_KICK:
        peer.refused(request_, no_fd)  # polling is not served
    else:
        assert peer.ack(request_, no_fd) == 0
