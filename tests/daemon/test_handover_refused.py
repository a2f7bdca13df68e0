# SPDX-License-Identifier: Apache-2.0
"""What does not fit ends the connection with one line, and the daemon serves the next one."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from tests.support.supervised import Supervised
from tests.support.supervisor import Stored, Supervisor
from vhost_rpmb.driver.errors import BackendError

SLOTS = (4096, 65536)  # of the record
SLOT = struct.Struct("=QII")  # sequence number, length, checksum


def record(manager: Supervisor) -> int:
    """The file of the record."""
    return next(stored.fd for stored in manager.stored if stored.name == "rpmb-session")


def damage(manager: Supervisor) -> None:
    for slot in SLOTS:
        os.pwrite(record(manager), b"?", slot + SLOT.size + 40)


def rewrite(manager: Supervisor, place: int, data: bytes) -> None:
    """Change both versions of the record, with checksums that are right."""
    fd = record(manager)
    for slot in SLOTS:
        sequence, length, _ = SLOT.unpack(os.pread(fd, SLOT.size, slot))
        body = bytearray(os.pread(fd, length, slot + SLOT.size))
        if body:
            body[place : place + len(data)] = data
            os.pwrite(fd, body, slot + SLOT.size)
            checksum = zlib.crc32(body, sequence & 0xFFFF_FFFF)
            os.pwrite(fd, SLOT.pack(sequence, length, checksum), slot)


def drop(manager: Supervisor, name: str) -> None:
    for stored in [each for each in manager._store if each.name == name]:
        manager._remove(stored)


def exchange(manager: Supervisor, name: str) -> None:
    """Another kind of file has the name."""
    drop(manager, name)
    manager._store.insert(0, Stored(name, os.memfd_create("other"), False))


def repeat(manager: Supervisor, name: str) -> None:
    manager._store.insert(0, Stored(name, os.eventfd(0), False))


# What changes while there is no process, and the reason in the log.
CHANGES: dict[str, tuple[Callable[[Supervisor], object], str]] = {
    "damaged": (damage, "its record is damaged"),
    "other magic": (lambda m: os.pwrite(record(m), b"RPMBSES2", 0), "another format"),
    "newer format": (
        lambda m: rewrite(m, 16, b"\3\0"),
        "expected a record of format 1 to 2, found format 3",
    ),
    "other device": (lambda m: rewrite(m, 0, b"?"), "it belongs to another device"),
    "no record": (lambda m: drop(m, "rpmb-session"), "its record is missing"),
    "other file for the record": (
        lambda m: exchange(m, "rpmb-session"),
        "its record has another size, or can be truncated",
    ),
    "no connection": (lambda m: drop(m, "rpmb-conn"), "it was not stored"),
    "other file for the connection": (
        lambda m: exchange(m, "rpmb-conn"),
        "expected a connected UNIX stream socket",
    ),
    "no memory": (lambda m: drop(m, "rpmb-f1"), "expected the stored descriptor 1, found none"),
    "other memory": (lambda m: exchange(m, "rpmb-f1"), "past the end of its file"),
    "no kick": (lambda m: drop(m, "rpmb-f4"), "expected the stored descriptor 4, found none"),
    "other kick": (lambda m: exchange(m, "rpmb-f4"), "expected an eventfd"),
    "name of two files": (lambda m: repeat(m, "rpmb-f4"), "several descriptors have the name"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_connection_that_does_not_fit_ends(tmp_path: Path, change: str) -> None:
    alter, reason = CHANGES[change]
    with Supervised(tmp_path, engine="fast") as supervised, supervised.client() as client:
        client.program_key(KEY)
        supervised.manager.wait(lambda: len(supervised.manager.names) == 6)
        with supervised.manager.down():
            alter(supervised.manager)
        with pytest.raises(BackendError, match="closed the connection"):
            client.frontend.receive()
        (line,) = supervised.warnings
        assert reason in line
        assert line.startswith("vhost-user-rpmb: warning: the connection ends, it cannot be cont")
        supervised.becomes_empty()
        with supervised.client(KEY) as successor:
            assert successor.write(0, bytes(256)) == 1
            supervised.manager.kill()
            assert successor.read_counter() == 1


@pytest.mark.parametrize("option", ["--max-write-blocks=16", "--virtio-features=-event-idx"])
def test_other_device_by_options_ends_the_connection(tmp_path: Path, option: str) -> None:
    with Supervised(tmp_path, engine="fast") as supervised, supervised.client() as client:
        with supervised.manager.down():
            supervised.manager.command.append(option)
        with pytest.raises(BackendError, match="closed the connection"):
            client.frontend.receive()
        assert len(supervised.warnings) == 1
        with supervised.client() as successor:
            successor.program_key(KEY)


def test_record_cannot_be_truncated(tmp_path: Path) -> None:
    with Supervised(tmp_path) as supervised, pytest.raises(PermissionError):
        os.ftruncate(record(supervised.manager), 0)


def test_front_end_that_has_gone_meanwhile(tmp_path: Path) -> None:
    with Supervised(tmp_path, engine="fast") as supervised:
        client = supervised.client()
        with supervised.manager.down():
            client.__exit__(EOFError)  # as if it died: it does not stop the queue
        supervised.becomes_empty()
        assert not supervised.warnings
        with supervised.client() as successor:
            successor.program_key(KEY)


def test_started_by_a_stored_descriptor_only(tmp_path: Path) -> None:
    """Without a socket unit, the number of --fd is that of a stored descriptor."""
    with Supervised(tmp_path, engine="fast") as supervised, supervised.client() as client:
        with supervised.manager.down():
            supervised.manager._listener = None
        assert client.frontend.get_status() == 15
        client.close()
        supervised.manager.wait(lambda: supervised.manager.statuses[-1:] == [2])
        assert "found a stored descriptor of an earlier process" in supervised.manager.log
