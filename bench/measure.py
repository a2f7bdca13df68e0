# SPDX-License-Identifier: Apache-2.0
"""The parts that measurements share: requests to a fresh daemon, floors, and tools that count.

The daemon runs as it does in production; bench/load.c plays VMM and guest driver, bench/floor.c
measures what the machine allows. "Same CPU": both ends pinned to processor 0; "two CPUs": the
daemon on 0, the front-end on 1.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from bench import host
from bench.daemon import SAME_CPU, TWO_CPUS, Load, Tools, chains, daemon, reads, resident, writes
from tests.support.rig import make_image

FLOOR_PROGRAM = "from cryptography.hazmat.primitives import hashes, hmac"


class Bench:
    """The measurements, each against a fresh daemon; microseconds unless named otherwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = Tools(folder)

    @cached_property
    def hmac(self) -> float:
        """One HMAC-SHA256 of a frame, libcrypto with the key schedule kept."""
        return self.tools.floor("hmac", 300_000)

    @cached_property
    def same_cpu(self) -> float:
        """An eventfd ping-pong with one HMAC, both ends on one processor."""
        return self.tools.floor("pingpong", 30_000, *SAME_CPU)

    @cached_property
    def two_cpus(self) -> float:
        """The same over two processors, both ends asleep in between."""
        return self.tools.floor("pingpong", 20_000, *TWO_CPUS)

    @cached_property
    def read_instructions(self) -> float:
        """Instructions of a read at 64 in flight."""
        return self.counted_read("callgrind")

    def sync(self, count: int = 500) -> float:
        """Pwrite of 512 bytes and fdatasync; measured anew, because disks change their mind."""
        return self.tools.floor("sync", count, self.folder / "synced", SAME_CPU[0])

    def reads(
        self,
        count: int,
        *options: str,
        cpus: tuple[int, int] = SAME_CPU,
        engine: str = "fast",
        units: int = 1,
        blocks: int = 1,
        **load: int,
    ) -> Load:
        with (
            daemon(self.folder, *options, engine=engine, cpu=cpus[0], units=units) as running,
            chains(self.folder, reads(blocks, units), min(count, 65536)) as file,
        ):
            return self.tools.load(
                running.socket, file, count=count, room=blocks, cpu=cpus[1], **load
            )

    def writes(
        self, count: int, blocks: int = 1, cpus: tuple[int, int] = TWO_CPUS, **load: int
    ) -> Load:
        with (
            daemon(self.folder, cpu=cpus[0]) as running,
            chains(self.folder, writes(blocks), count) as file,
        ):
            return self.tools.load(
                running.socket, file, count=count, frames=blocks + 1, cpu=cpus[1], **load
            )

    def traced(self, calls: str, source: Iterator[bytes], count: int, **load: int) -> list[str]:
        """Run ``count`` requests; strace's lines for the daemon's ``calls``, start to stop."""
        log = self.folder / "strace"
        wrapper = ("strace", "-D", "-f", "-qq", "-o", str(log), "-e", f"trace={calls}")
        with (
            daemon(self.folder, "--poll-us=0", wrapper=wrapper) as running,
            chains(self.folder, source, count) as file,
        ):
            self.tools.load(running.socket, file, count=count, cpu=0, **load)
        return log.read_text().splitlines()

    def work(self, *mode: object) -> list[str]:
        """The command for one process that is guest and device, on the compiled engine."""
        return [sys.executable, "-m", "bench.work", "fast", str(self.folder), *map(str, mode)]

    def counted_read(self, tool: str, *options: str, mode: Sequence[str] = ()) -> float:
        """What a tool of valgrind counts for a read at 64 in flight."""
        subprocess.run(self.work(1), check=True)  # makes the device
        return per_unit(
            lambda batches: counted(self.work(batches, *mode), tool, *options), 10, 110, 100 * 64
        )


def per_unit(count: Callable[[int], int], few: int, many: int, units: int) -> float:
    """What one of ``units`` takes, start and stop taken away: the difference of two runs."""
    less, more = count(few), count(many)
    return (more - less) / units


def counted(command: Sequence[str], tool: str, *options: str, stdin: int | None = None) -> int:
    """What a tool of valgrind counts in a process; the same for the same binaries and input."""
    done = subprocess.run(
        [
            "valgrind",
            f"--tool={tool}",
            f"--{tool}-out-file=/dev/null",
            *options,
            *command,
        ],
        check=True,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    (counted,) = re.findall(r"(?:Collected :|Total:) +([\d,]+)", done.stderr)
    return int(counted.replace(",", ""))


def counted_start(folder: Path) -> tuple[int, int]:
    """Instructions of a start until the first front-end has left, and of bare Python with sqlite3.

    The sandbox is off, because valgrind cannot work in it.
    """
    with host.environment(folder) as python:
        floor = counted([str(python), "-S", "-I", "-c", "import sqlite3"], "callgrind")
        image = make_image(folder / "rpmb.img")
        command = (str(python), "-P", "-m", "vhost_rpmb", "--fd=0", "--sandbox=off")
        front_end, back_end = socket.socketpair()
        with back_end:
            front_end.close()
            started = counted(
                [*command, f"--flash-path={image}"], "callgrind", stdin=back_end.fileno()
            )
    return started, floor


def bare_python() -> tuple[float, int]:
    """Seconds and bytes of a bare Python that imports what MACs need."""
    program = f"{FLOOR_PROGRAM}; print(1, flush=True); input()"
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        took, memory = time.monotonic() - start, resident(process.pid)
        process.communicate(b"\n")
    return took, memory
