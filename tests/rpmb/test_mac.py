# SPDX-License-Identifier: Apache-2.0
"""The MAC of each engine, and its checks of lengths."""

from __future__ import annotations

import hmac

import pytest

from tests.support.oracle import AUTHENTICATED, KEY
from vhost_rpmb.engine import Engine


def test_mac_is_that_of_the_oracle(engine: Engine) -> None:
    frames = [bytes([number]) * 512 for number in range(5)]
    mac = engine.Authenticator(KEY).mac(frames)
    assert mac == hmac.digest(KEY, b"".join(frame[AUTHENTICATED] for frame in frames), "sha256")
    assert engine.Authenticator(KEY).verify(frames, mac)
    assert not engine.Authenticator(KEY).verify(frames, mac[::-1])
    assert not engine.Authenticator(KEY).verify(frames[:4], mac)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_key_has_32_bytes(engine: Engine, length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        engine.Authenticator(bytes(length))


@pytest.mark.parametrize("length", [0, 511, 513])
def test_mac_is_of_whole_frames(engine: Engine, length: int) -> None:
    with pytest.raises(ValueError, match="512 bytes"):
        engine.Authenticator(KEY).mac([bytes(length)])
