# SPDX-License-Identifier: Apache-2.0
"""Replies to messages that fail."""

from __future__ import annotations

from contextlib import suppress

import pytest

from tests.support.peer import Peer
from vhost_rpmb.errors import PeerError
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.wire import ProtocolFeature, Request, VringState


def test_failure_without_need_reply_ends_the_connection(peer: Peer) -> None:
    peer.ends("SET_VRING_NUM: a queue size", Request.SET_VRING_NUM, VringState(0, 0).pack())


def test_failure_without_reply_ack_ends_the_connection(fresh: Peer) -> None:
    fresh.negotiate(PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK)
    fresh.ends(
        "SET_VRING_NUM: a queue size",
        Request.SET_VRING_NUM,
        VringState(0, 0).pack(),
        flags=wire.FLAG_NEED_REPLY,
    )


def test_need_reply_without_reply_ack_is_ignored(fresh: Peer) -> None:
    fresh.send(Request.SET_OWNER, flags=wire.FLAG_NEED_REPLY)
    assert fresh.reply() is None
    assert fresh.end is None


def test_reply_ack_applies_to_its_own_negotiation(fresh: Peer) -> None:
    payload = wire.pack_u64(PROTOCOL_FEATURES)
    assert fresh.ack(Request.SET_PROTOCOL_FEATURES, payload) == 0


def test_reason_of_a_refusal_is_logged(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    peer.refused(Request.SET_VRING_NUM, VringState(0, 0).pack())
    assert [record.getMessage() for record in caplog.records] == [
        "refused SET_VRING_NUM: a queue size is a number from 1 to 32768, not 0"
    ]


def test_flood_of_failures_is_logged_once(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(500):
        assert peer.ack(1000 + number) == 1
    assert len(caplog.records) == 1


def test_front_end_that_reads_no_replies_is_disconnected(peer: Peer) -> None:
    with suppress(BrokenPipeError):
        while peer.end is None:
            peer.send(Request.GET_FEATURES)
    assert isinstance(peer.end, PeerError)
    assert "does not read the replies" in str(peer.end)


def test_disconnect_before_the_reply(peer: Peer) -> None:
    wire.send_message(peer.sock, Request.GET_FEATURES)
    peer.sock.close()
    peer.settle()
    assert isinstance(peer.end, EOFError)
