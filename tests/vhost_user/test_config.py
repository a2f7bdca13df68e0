# SPDX-License-Identifier: Apache-2.0
"""GET_CONFIG and SET_CONFIG."""

from __future__ import annotations

import pytest

from tests.support.peer import EchoDevice, Peer
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request


@pytest.mark.parametrize(("offset", "size"), [(0, 6), (0, 3), (3, 3), (5, 1), (0, 0), (6, 0)])
def test_config_space_is_read_in_parts(peer: Peer, offset: int, size: int) -> None:
    reply = peer.ask(Request.GET_CONFIG, wire.Config(offset, size, 0, bytes(size)).pack())
    expected = EchoDevice.config[offset : offset + size]
    assert reply == wire.Config(offset, size, 0, expected).pack()


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 7), (0, 256), (5, 2), (6, 1), (7, 0), (100, 56), (255, 1), (256, 0)],
)
def test_zeros_beyond_the_config_space(peer: Peer, offset: int, size: int) -> None:
    reply = peer.ask(Request.GET_CONFIG, wire.Config(offset, size, 0, bytes(size)).pack())
    expected = (EchoDevice.config + bytes(250))[offset : offset + size]
    assert reply == wire.Config(offset, size, 0, expected).pack()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 257), (256, 1), (257, 0), (0xFFFF_FFFF, 1), (0xFFFF_FFFF, 0)]
)
def test_range_beyond_the_largest_config_space_is_refused(
    peer: Peer, offset: int, size: int
) -> None:
    asked = wire.Config(offset, size, 0, bytes(size)).pack()
    assert peer.ask(Request.GET_CONFIG, asked) == b""
    assert peer.end is None


def test_size_other_than_the_payload_is_refused(peer: Peer) -> None:
    assert peer.ask(Request.GET_CONFIG, wire.Config(0, 3, 0, b"1234").pack()) == b""


@pytest.mark.parametrize("flags", [wire.CONFIG_FLAG_WRITABLE, wire.CONFIG_FLAG_LIVE_MIGRATION])
def test_config_space_is_read_only(peer: Peer, flags: int) -> None:
    peer.refused(Request.SET_CONFIG, wire.Config(0, 1, flags, b"x").pack())
    whole = wire.Config(0, 6, 0, bytes(6)).pack()
    assert peer.ask(Request.GET_CONFIG, whole) == wire.Config(0, 6, 0, b"abcdef").pack()
