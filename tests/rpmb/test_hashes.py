# SPDX-License-Identifier: Apache-2.0
"""Hashes of both engines are those of the standard library."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from vhost_rpmb.engine import Engine

VALUES = (b"", b"x", bytes(range(256)), bytes(70_000))


@pytest.mark.parametrize("data", VALUES, ids=len)
def test_results_are_those_of_the_standard_library(engine: Engine, data: bytes) -> None:
    assert engine.Hashes.sha256(data) == hashlib.sha256(data).digest()
    for key in (b"", b"key", bytes(32), bytes(100)):
        assert engine.Hashes.hmac_sha256(key, data) == hmac.digest(key, data, "sha256")


def test_values_are_compared(engine: Engine) -> None:
    for one in VALUES:
        assert [engine.Hashes.equal(one, other) for other in VALUES] == [
            one == other for other in VALUES
        ]
    assert not engine.Hashes.equal(b"a", b"b")
