# SPDX-License-Identifier: Apache-2.0
"""Messages as a stream of bytes: cut, joined, ended early."""

from __future__ import annotations

import socket
import struct

from tests.support.peer import EchoDevice, Peer, message
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.errors import PeerError
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request


def test_message_is_taken_byte_by_byte(peer: Peer, eventfds: list[int]) -> None:
    data = message(Request.SET_VRING_KICK, wire.pack_u64(1), wire.FLAG_NEED_REPLY)
    socket.send_fds(peer.sock, [data[:1]], [eventfds[0]])
    for offset in range(1, len(data)):
        peer.settle()
        assert peer.reply() is None
        peer.sock.send(data[offset : offset + 1])
    peer.settle()
    assert peer.reply() == wire.pack_u64(0)


def test_many_messages_in_one_send(peer: Peer) -> None:
    peer.sock.sendall(message(Request.GET_STATUS) * 200)
    peer.settle()
    for _ in range(200):
        assert peer.reply() == wire.pack_u64(0)
    assert peer.reply() is None


def test_messages_do_not_starve_vrings(
    peer: Peer, ring: Ring, memory: GuestMemory, device: EchoDevice
) -> None:
    peer.share(memory)
    peer.start(ring)
    before = device.processed
    peer.sock.sendall(message(Request.SET_STATUS, wire.pack_u64(4)) * 1000)
    peer.sock.sendall(message(Request.GET_STATUS))
    ring.kick()
    peer.loop.wait(0)
    peer.run()
    assert device.processed == before + 1
    assert peer.reply() is None  # the messages are not through yet
    peer.settle()
    assert peer.reply() == wire.pack_u64(4)


def test_disconnect_in_the_middle_of_a_message(peer: Peer, eventfds: list[int]) -> None:
    socket.send_fds(peer.sock, [message(Request.SET_VRING_KICK)[:5]], eventfds)
    peer.sock.close()
    peer.settle()
    assert isinstance(peer.end, EOFError)


def test_other_protocol_version_ends_the_connection(peer: Peer) -> None:
    peer.sock.sendall(struct.pack("=III", Request.GET_FEATURES, 2, 0))
    peer.settle()
    assert isinstance(peer.end, PeerError)
