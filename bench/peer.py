# SPDX-License-Identifier: Apache-2.0
"""A daemon of other people, which is measured beside ours: it listens already."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple, Self

from bench.daemon import SAME_CPU, connected, counter_of
from vhost_rpmb.rpmb import spec


class Peer(NamedTuple):
    """Its socket, and the key of its device."""

    socket: Path
    key: bytes

    @classmethod
    def find(cls, path: Path, key_file: Path) -> Self:
        """Connect once, to check the key's size and that it runs where ours are placed."""
        key = key_file.read_bytes()
        if len(key) != spec.KEY_SIZE:
            raise ValueError(
                f"expected a key of {spec.KEY_SIZE} bytes in {key_file}, found {len(key)}: "
                "name the file of the key that is programmed"
            )
        with connected(path, key) as client:
            fd = os.dup(client.frontend.fileno())
        with socket.socket(fileno=fd) as connection:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, *_ = struct.unpack("=iII", credentials)
        found = os.sched_getaffinity(pid)
        if found != {SAME_CPU[0]}:
            raise ValueError(
                f"expected the daemon at {path} on processor {SAME_CPU[0]} only, found "
                f"{sorted(found)}: start it by taskset --cpu-list {SAME_CPU[0]}"
            )
        counter_of(path, key)  # the key is programmed now at the latest
        return cls(path, key)
