# SPDX-License-Identifier: Apache-2.0
"""The key is where it belongs and nowhere else."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, DaemonFactory
from tests.support.oracle import (
    program_key,
    read_counter,
    read_data,
    read_result,
    request,
    write_data,
)
from vhost_rpmb.driver.rpmb import RpmbClient

MAC, NONCE = "MAC [0-9a-f]{64}", "nonce [0-9a-f]{32}"  # as the log has them
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
PIECE = 8  # bytes of a key that count as the key


def traces(key: bytes, data: bytes) -> list[str]:
    """The pieces of a key that are found in data, as bytes or written in a usual way."""
    found = []
    for start in range(len(key) - PIECE + 1):
        piece = key[start : start + PIECE]
        forms = (
            piece,
            piece.hex().encode(),
            piece.hex().upper().encode(),
            repr(piece)[2:-1].encode(),
        )
        found += [f"piece at {start}" for form in forms if form in data]
    encoded = base64.b64encode(key)
    return found + (["base64"] if encoded[:40] in data else [])


def test_key_search_detects_each_encoding() -> None:
    key = os.urandom(32)
    for text in (key, key[5:20], key.hex().encode(), repr(key).encode(), base64.b64encode(key)):
        assert traces(key, b"before " + text + b" after")
    assert not traces(key, os.urandom(4096))


@pytest.mark.parametrize(
    ("verbosity", "key_file"),
    [("-vv", True), ("--debug", False), ("-vvv", False), ("-vvv", True)],
)
def test_key_is_in_no_other_place(
    daemon: DaemonFactory, tmp_path: Path, verbosity: str, key_file: bool
) -> None:
    key, other = os.urandom(32), os.urandom(32)
    folder = tmp_path / "keys"
    folder.mkdir()
    options = [verbosity, *([f"--key-path={folder / 'key'}"] if key_file else [])]
    running = daemon(*options)
    answers = b"".join(use(running, key, other))
    assert not traces(key, answers)
    assert not traces(other, answers)
    for name in ("cmdline", "environ"):
        assert not traces(key, Path(f"/proc/{running.pid}/{name}").read_bytes())
    stored = stored_beside(running)
    if key_file:
        assert not traces(key, stored)
    running.stop()
    said = running.log.encode()
    assert b"ADD_MEM_REG" in said
    assert not traces(key, said)
    assert not traces(other, said)
    stored += stored_beside(running)
    assert not traces(other, stored), "a key that was refused was kept"
    if key_file:
        assert not traces(key, stored)
        assert (folder / "key").read_bytes() == key


def stored_beside(running: Daemon) -> bytes:
    folder, name = running.flash_path.parent, running.flash_path.name
    return b"".join(path.read_bytes() for path in folder.iterdir() if path.name.startswith(name))


def use(running: Daemon, key: bytes, other: bytes) -> Iterator[bytes]:
    """Every request, right and wrong, before and after the key; what is answered."""
    with RpmbClient.connect(str(running.socket_path)) as client:
        for programming in (program_key(key, block_count=2), program_key(key), program_key(other)):
            for asked in (
                programming + read_result(),
                read_counter() + read_counter(block_count=3),
                write_data(0, 1, bytes(256), key=key) + read_result(),
                write_data(0, 1, bytes(256), key=other) + read_result(),
                write_data(9, 1, bytes(256), key=key) + read_result(),
                write_data(0, 9999, bytes(256), key=key) + read_result(),
                read_data(0, 4) + read_data(9999, 1),
                request(99, key_mac=key) + request(0x100, key_mac=key),
                # By mistake where a MAC belongs, before it is programmed, and the one to come.
                request(3, key_mac=key) + request(3, key_mac=other) + read_result(),
                request(3, key_mac=key, block_count=0) + read_result(),
                program_key(key)[:-1],
                program_key(key)[1:] + b"\0",
            ):
                yield client.exchange(asked, 8 * 512)


def test_each_frame_is_logged(daemon: DaemonFactory, engine: object) -> None:
    running = daemon("--debug")
    key = os.urandom(32)
    list(use(running, key, os.urandom(32)))
    with RpmbClient.connect(str(running.socket_path), key) as client:
        assert client.read(0, 2) == bytes(512)
    running.stop()
    said = running.log
    for line in (
        "request PROGRAM_KEY: address 0, block count 1, write counter 0: OK",
        "request DATA_WRITE: address 1, block count 1, write counter 0: OK",
        "request DATA_WRITE: address 1, block count 1, write counter 9: COUNT_FAILURE",
        "request DATA_WRITE: address 0, block count 1, write counter 0: AUTH_FAILURE",
        f"answer DATA_WRITE: address 1, block count 0, write counter 1, {MAC}: OK, 1 frame",
        "request 0x0063: address 0, block count 1, write counter 0: GENERAL_FAILURE",
        f"answer 0x0000: .*, {MAC}: GENERAL_FAILURE, 1 frame",
        f"request DATA_READ: address 0, block count 2, write counter 0, {NONCE}: OK",
        f"answer DATA_READ: address 0, block count 2, write counter 0, {NONCE}: OK, 2 frames",
        "request: expected whole frames of 512 bytes, 1 to 512 .*, found 511 bytes: GENERAL_.*",
    ):
        assert re.search(f"^{TIME} vhost-user-rpmb: debug: {line}$", said, re.MULTILINE), line
    assert not re.search("^[^0-9].* debug:", said, re.MULTILINE), "a debug line without its time"


def test_answers_without_room_are_logged(daemon: DaemonFactory) -> None:
    running = daemon("--debug")
    with RpmbClient.connect(str(running.socket_path)) as client:
        client.program_key(os.urandom(32))
        assert len(client.exchange(read_counter() * 2 + read_data(0), 1100)) == 1024
        assert client.exchange(bytes(1000), 511) == b""
    running.stop()
    said = running.log
    pattern = (
        "request DATA_READ: .*: GENERAL_FAILURE\n"
        f"{TIME} vhost-user-rpmb: debug: answer left out: expected room for 1 frame, found room "
        "for 0 frames\n(?s:.*)found 1000 bytes: GENERAL_FAILURE\n"
        f"{TIME} vhost-user-rpmb: debug: answer left out: expected room for 1 frame"
    )
    assert re.search(pattern, said), said
    assert said.count("answer left out") == 2
