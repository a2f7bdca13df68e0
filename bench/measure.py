# SPDX-License-Identifier: Apache-2.0
"""The measurements: each compares the daemon with a floor of the machine, or counts work.

The daemon runs as it does in production; bench/load.c plays VMM and guest driver, bench/floor.c
measures what the machine allows. "Same CPU": both ends pinned to processor 0; "two CPUs": the
daemon on 0, the front-end on 1. Limits and output belong elsewhere (goals.py, report.py).
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import optee, restart
from bench.daemon import SAME_CPU, TWO_CPUS, Load, Tools, chains, daemon, reads, resident, writes
from vhost_rpmb.rpmb import spec

FLOOR_PROGRAM = "from cryptography.hazmat.primitives import hashes, hmac"
MAC_BYTES = spec.FRAME_SIZE - spec.FRAME_DATA  # of a frame
# A ratio or a count, and how it came about.
Measured = tuple[float, str]


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

    def sync(self, cpu: int = SAME_CPU[0]) -> float:
        """Pwrite of 512 bytes and fdatasync; measured anew, because disks change their mind."""
        return self.tools.floor("sync", 500, self.folder / "synced", cpu)

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

    def writes(self, count: int, blocks: int = 1, **load: int) -> Load:
        """The daemon on one processor, the driver on the other."""
        with (
            daemon(self.folder, cpu=TWO_CPUS[0]) as running,
            chains(self.folder, writes(blocks), count) as file,
        ):
            return self.tools.load(
                running.socket, file, count=count, frames=blocks + 1, cpu=TWO_CPUS[1], **load
            )

    def write_against_sync(self) -> tuple[float, float]:
        """P50 of a durable write, and of the floor before and after it."""
        before = self.sync()
        took = self.writes(2000, spin=1).p50
        return took, (before + self.sync()) / 2


def _ratio(took: float, floor: float) -> Measured:
    return took / floor, f"{took:.2f} µs / {floor:.2f} µs"


def one_same_cpu(bench: Bench) -> Measured:
    return _ratio(bench.reads(30_000, "--poll-us=0").p50, bench.same_cpu)


def one_two_cpus(bench: Bench) -> Measured:
    return _ratio(bench.reads(50_000, cpus=TWO_CPUS, spin=1).p50, bench.two_cpus)


def sixty_four(bench: Bench) -> Measured:
    return _ratio(bench.reads(320_000, depth=64).p50 / 64, bench.hmac)


def durable_write(bench: Bench) -> Measured:
    return _ratio(*bench.write_against_sync())


def group_commit(bench: Bench) -> Measured:
    one, many = bench.writes(1000), bench.writes(16_000, depth=32)
    rates = one.requests / one.seconds, many.requests / many.seconds
    return rates[1] / rates[0], f"{rates[1]:.0f}/s / {rates[0]:.0f}/s"


def _trace(bench: Bench, calls: str, source: Iterator[bytes], count: int, **load: int) -> list[str]:
    """Run ``count`` requests; strace's lines for the daemon's ``calls``, from start to stop."""
    log = bench.folder / "strace"
    wrapper = ("strace", "-D", "-f", "-qq", "-o", str(log), "-e", f"trace={calls}")
    with (
        daemon(bench.folder, "--poll-us=0", wrapper=wrapper) as running,
        chains(bench.folder, source, count) as file,
    ):
        bench.tools.load(running.socket, file, count=count, cpu=0, **load)
    return log.read_text().splitlines()


def syncs_per_batch(bench: Bench) -> Measured:
    """Count the syncs of 100 batches of 32 writes, those of start and stop taken away."""
    few, many = (
        len(_trace(bench, "fdatasync,fsync", writes(), batches * 32, frames=2, depth=32))
        for batches in (50, 150)
    )
    return (many - few) / 100, f"{many - few} syncs / 100 batches"


def syncs_of_put(bench: Bench) -> Measured:
    """Count the syncs of 100 objects that OP-TEE puts, and the writes that have to be durable."""
    counts = []
    for objects in (20, 120):
        records, writes = optee.puts(objects)
        calls = "fdatasync,fsync"
        lines = _trace(bench, calls, iter(records), len(records), records=1)
        counts.append((len(lines), writes))
    (few, few_writes), (many, many_writes) = counts
    syncs, writes = many - few, many_writes - few_writes
    return syncs / writes, f"{syncs} syncs / {writes} writes of 100 puts"


def calls_per_batch(bench: Bench) -> Measured:
    """Count the system calls of 100 batches of 64 reads, the driver asleep in between."""
    few, many = (
        len(_trace(bench, "all", reads(), batches * 64, depth=64)) for batches in (50, 150)
    )
    return (many - few) / 100, f"{many - few} system calls / 100 batches"


def bytes_per_write(bench: Bench) -> Measured:
    """Sum up what 1,000 writes of one block write into files, checkpoints of the log included."""
    few, many = (
        sum(
            int(line.rpartition("= ")[2])
            for line in _trace(bench, "pwrite64", writes(), count, frames=2)
            if line.rpartition("= ")[2].isdigit()
        )
        for count in (500, 1500)
    )
    return (many - few) / 1000, f"{many - few} bytes / 1000 writes"


def _count(command: Sequence[object], tool: str, *options: str) -> int:
    """What a tool of valgrind counts in a process; the same for the same binaries and input."""
    done = subprocess.run(
        [
            "valgrind",
            f"--tool={tool}",
            f"--{tool}-out-file=/dev/null",
            *options,
            *map(str, command),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    (counted,) = re.findall(r"(?:Collected :|Total:) +([\d,]+)", done.stderr)
    return int(counted.replace(",", ""))


def _count_read(bench: Bench, tool: str, *options: str, mode: Sequence[str] = ()) -> float:
    """What a tool counts for a read at 64 in flight."""
    work = [sys.executable, "-m", "bench.work", "fast", bench.folder]
    _count([*work, 1], tool, *options)  # makes the device
    few, many = (_count([*work, batches, *mode], tool, *options) for batches in (10, 110))
    return (many - few) / (100 * 64)


def instructions(bench: Bench) -> Measured:
    """Count what a read takes on top of its HMAC."""
    few, many = (
        _count([bench.folder / "floor", "hmac", count], "callgrind") for count in (1000, 11_000)
    )
    mac, read = (many - few) / 10_000, _count_read(bench, "callgrind")
    return read - mac, f"{read:.0f} instructions - {mac:.0f} of one HMAC"


def bookkeeping(bench: Bench) -> Measured:
    """Compare a read whose batch and chain are recorded for the next process with another one."""
    plain = _count_read(bench, "callgrind")
    kept = _count_read(bench, "callgrind", mode=["kept"])
    return kept / plain, f"{kept:.0f} instructions / {plain:.0f}"


def bookkeeping_calls(bench: Bench) -> Measured:
    """Count the system calls of 100 such batches in one process."""
    work = [sys.executable, "-m", "bench.work", "fast", str(bench.folder)]
    log = bench.folder / "strace"
    counts = []
    for batches in (1, 10, 110):  # the first one makes the device
        tracer = ["strace", "-qq", "-o", str(log)]
        subprocess.run([*tracer, *work, str(batches), "kept"], check=True)
        counts.append(len(log.read_text().splitlines()))
    _, few, many = counts
    return (many - few) / 100, f"{many - few} system calls / 100 batches"


def orderly_gap(bench: Bench) -> Measured:
    return _gap(bench, signal.SIGTERM)


def crash_gap(bench: Bench) -> Measured:
    return _gap(bench, signal.SIGKILL)


def _gap(bench: Bench, number: int) -> Measured:
    found = sorted(restart.gaps(bench.folder, number))
    p50, p90 = found[len(found) // 2], found[len(found) * 9 // 10]
    return p50, f"{p50:.0f} ms, p90 {p90:.0f} ms, longest {found[-1]:.0f} ms"


def rebuild(bench: Bench) -> Measured:
    p50 = statistics.median(restart.rebuilds(bench.folder))
    return p50, f"{p50:.2f} ms"


def bytes_copied(bench: Bench) -> Measured:
    """Count the bytes that a read has copied by the C library."""
    copied = _count_read(bench, "dhat", "--mode=copy")
    return copied, f"{copied:.0f} bytes"


def multi_block_write(bench: Bench) -> Measured:
    return _ratio(bench.writes(1000, blocks=32).p50, bench.writes(1000).p50)


def multi_block_read(bench: Bench) -> Measured:
    took = bench.reads(5000, blocks=255, depth=2).p50 / 2
    with_bulk = 255 * MAC_BYTES / took
    alone = bench.tools.floor("bulk", 2000)
    return with_bulk / (MAC_BYTES / alone), f"{took:.1f} µs / {255 * alone:.1f} µs of HMAC"


def flat(**other: Any) -> Callable[[Bench], Measured]:
    """Compare 64 reads in flight under other circumstances with the usual ones."""

    def measure(bench: Bench) -> Measured:
        usual = min(bench.reads(200_000, depth=64).p50 for _ in range(2)) / 64
        took = min(bench.reads(200_000, depth=64, **other).p50 for _ in range(2)) / 64
        return _ratio(took, usual)

    return measure


def after_many(bench: Bench) -> Measured:
    """Compare latency and memory before and after many requests and reconnects."""
    with (
        daemon(bench.folder) as running,
        chains(bench.folder, reads(), 512) as file,
    ):
        load = {"depth": 64, "cpu": 0}
        before = bench.tools.load(running.socket, file, count=200_000, **load).p50
        memory = running.memory()
        bench.tools.load(running.socket, file, count=10_000_000, **load)
        for _ in range(1000):
            bench.tools.load(running.socket, file, count=1)
        after = bench.tools.load(running.socket, file, count=200_000, **load).p50
        grown = running.memory() - memory
    ratio = max(after / before, 1 + grown / memory)
    return ratio, f"{after:.1f} µs / {before:.1f} µs, {grown / 1024:.0f} KiB grown"


def _floor_start() -> tuple[float, int]:
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


def _start(bench: Bench) -> float:
    """Milliseconds from exec to listening, of a new device."""
    took = []
    for _ in range(7):
        with daemon(bench.folder) as running:
            took.append(running.started)
    return min(took) * 1e3


def start_time(bench: Bench) -> Measured:
    floor = min(_floor_start()[0] for _ in range(7)) * 1e3
    took = _start(bench)
    return took / floor, f"{took:.0f} ms / {floor:.0f} ms"


def start_milliseconds(bench: Bench) -> Measured:
    took = _start(bench)
    return took, f"{took:.0f} ms"


def memory(bench: Bench) -> Measured:
    floor = _floor_start()[1]
    with daemon(bench.folder) as running, chains(bench.folder, reads(), 512) as file:
        bench.tools.load(running.socket, file, count=10_000, depth=64)
        used = running.memory()
    return used / floor, f"{used / 2**20:.1f} MiB / {floor / 2**20:.1f} MiB"


def engines(bench: Bench) -> Measured:
    pure = bench.reads(6400, depth=64, engine="pure").p50 / 64
    return _ratio(pure, bench.reads(320_000, depth=64).p50 / 64)
