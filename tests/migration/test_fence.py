# SPDX-License-Identifier: Apache-2.0
"""The fence folder and the migration key."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.rig import write_key
from vhost_rpmb.errors import UsageError
from vhost_rpmb.migration.fence import Fence
from vhost_rpmb.migration.seal import MigrationKey

A, B = bytes(16), bytes(range(16))


def test_first_claim_wins_and_is_recognised(tmp_path: Path) -> None:
    fence = Fence(str(tmp_path))
    assert not fence.taken("device", 1)
    assert fence.claim("device", 1, A)
    assert fence.taken("device", 1)
    assert not fence.claim("device", 1, B)
    assert fence.claim("device", 1, A)  # a process that ended behind its claim
    assert fence.claim("device", 2, B)
    assert fence.claim("other", 1, B)
    assert sorted(os.listdir(tmp_path)) == ["device.1", "device.2", "other.1"]


def test_claim_can_be_repeated_after_a_crash(tmp_path: Path) -> None:
    """Before the name was given, a file is left, which is nobody's claim."""
    (tmp_path / f"device.1.{A.hex()}").write_text("")
    fence = Fence(str(tmp_path))
    assert not fence.taken("device", 1)
    assert fence.claim("device", 1, A)
    assert os.listdir(tmp_path) == ["device.1"]


def test_one_of_many_wins(tmp_path: Path) -> None:
    claims = [os.urandom(16) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for generation in range(1, 20):
            results = pool.map(
                lambda c, g=generation: Fence(str(tmp_path)).claim("d", g, c), claims
            )
            assert sum(results) == 1


def test_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Fence(str(tmp_path / "none")).claim("device", 1, A)


def test_key_is_sealed_for_one_hand_over(tmp_path: Path) -> None:
    write_key(tmp_path / "key", B * 2)
    warnings: list[str] = []
    key = MigrationKey.load(str(tmp_path / "key"), warnings.append)
    assert warnings == []
    sealed = key.seal(A * 2, b"context")
    assert A * 2 not in sealed
    assert key.open(sealed, b"context") == A * 2
    assert key.seal(A * 2, b"context") != sealed
    for changed, context in (
        (sealed, b"other"),
        (sealed[:-1], b"context"),
        (b"", b"context"),
        (bytes(len(sealed)), b"context"),
    ):
        with pytest.raises(ValueError, match="use the same file on both hosts"):
            key.open(changed, context)


@pytest.mark.parametrize(("size", "found"), [(0, "found 0"), (31, "found 31"), (33, "found more")])
def test_file_of_another_size_is_refused(tmp_path: Path, size: int, found: str) -> None:
    write_key(tmp_path / "key", bytes(size))
    with pytest.raises(UsageError, match=found):
        MigrationKey.load(str(tmp_path / "key"), print)


def test_missing_and_exposed_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        MigrationKey.load(str(tmp_path / "key"), print)
    write_key(tmp_path / "key", bytes(32))
    (tmp_path / "key").chmod(0o644)
    warnings: list[str] = []
    MigrationKey.load(str(tmp_path / "key"), warnings.append)
    assert "chmod 600" in warnings[0]
