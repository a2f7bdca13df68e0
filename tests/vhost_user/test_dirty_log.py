# SPDX-License-Identifier: Apache-2.0
"""Dirty logging, which is not offered: QEMU sends its messages for calc-dirty-rate all the same."""

from __future__ import annotations

import pytest

from tests.support.peer import OFFERED, Peer, open_fds
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.wire import Request


@pytest.mark.parametrize("protocol_features", [PROTOCOL_FEATURES, 0], ids=["negotiated", "none"])
@pytest.mark.parametrize("size", [wire.U64_SIZE, wire.LOG_SIZE])
@pytest.mark.parametrize("fds", [0, 1])
def test_log_base_is_ignored(
    fresh: Peer, memfd: int, protocol_features: int, size: int, fds: int
) -> None:
    fresh.negotiate(protocol_features)
    before = open_fds()
    assert fresh.ask(Request.SET_LOG_BASE, bytes(size), (memfd,) * fds) is None
    assert fresh.end is None
    assert open_fds() == before
    if protocol_features:
        assert fresh.ack(Request.SET_LOG_BASE, bytes(size), (memfd,) * fds) == 0
        assert fresh.reply() is None
    assert fresh.ask_u64(Request.GET_FEATURES) == OFFERED


def test_log_fd_is_refused(peer: Peer, eventfds: list[int]) -> None:
    peer.refused(Request.SET_LOG_FD, b"", (eventfds[0],))
