# SPDX-License-Identifier: Apache-2.0
"""Prints what was measured: goals against their limits, latencies, the daemon's processor time."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench import optee
from bench.daemon import SAME_CPU, TWO_CPUS, chains, counter_reads, daemon, reads, writes
from bench.goals import ROWS
from bench.measure import Bench
from vhost_rpmb.engine import ENGINES

TRIES = 3


def gate(bench: Bench, stable_only: bool) -> Iterator[str]:
    """Measure every goal, best of three tries; print a table, give the names of the missed."""
    print("| goal | limit | reached | measured |\n|---|---|---|---|")
    for row in ROWS:
        best, how = row.measure(bench)
        for _ in range(TRIES - 1):
            if row.good(best):
                break
            value, text = row.measure(bench)
            if (value > best) == row.at_least:
                best, how = value, text
        sign = "≥" if row.at_least else "≤"
        print(f"| {row.name} | {sign} {row.limit} | {best:.2f} | {how} |", flush=True)
        if not row.good(best) and (row.stable or not stable_only):
            yield row.name


def table(bench: Bench) -> None:
    """Print latency and throughput of both engines for each kind of request."""
    print(f"one HMAC-SHA256 of a frame (libcrypto, key schedule kept): {bench.hmac:.2f} µs")
    print(f"pwrite of 512 bytes + fdatasync, p50: {bench.sync():.0f} µs")
    print(f"eventfd ping-pong with one HMAC, p50: same CPU {bench.same_cpu:.1f} µs,", end=" ")
    print(f"two CPUs {bench.two_cpus:.1f} µs\n")
    print("| work | engine | in flight | placement | µs a request | floor µs | ratio | generator |")
    print("|---|---|---|---|---|---|---|---|")
    for work, source, frames in (
        ("counter", counter_reads, 1),
        ("read", reads, 1),
        ("durable write", writes, 2),
    ):
        for engine in ENGINES:
            for depth, cpus in ((1, SAME_CPU), (1, TWO_CPUS), (32, SAME_CPU)):
                count = 1000 if work == "durable write" else 20_000 if engine == "fast" else 2000
                count *= 8 if depth > 1 else 1
                with (
                    daemon(bench.folder, engine=engine) as running,
                    chains(bench.folder, source(), count) as file,
                ):
                    load = bench.tools.load(
                        running.socket, file, count=count, frames=frames, depth=depth, cpu=cpus[1]
                    )
                floor = bench.two_cpus if cpus == TWO_CPUS else bench.same_cpu
                floor = bench.sync() if work == "durable write" else floor
                place = "two CPUs" if cpus == TWO_CPUS else "same CPU"
                took = load.p50 / depth
                print(
                    f"| {work} | {engine} | {depth} | {place} | {took:.2f} | {floor:.1f} |"
                    f" {took / floor:.2f} | {load.own:.2f} |",
                    flush=True,
                )


def requests_of_optee(bench: Bench) -> None:
    """Print how long an object takes to be put, and a request of OP-TEE's workload."""
    print("\n| engine | placement | put p50 µs | floor µs | ratio | a request p50 µs | p99 µs |")
    print("|---|---|---|---|---|---|---|")
    for engine in ENGINES:
        for cpus, place in ((SAME_CPU, "same CPU"), (TWO_CPUS, "two CPUs")):
            put, floor = optee.put(bench.tools, bench.folder, engine, cpus)
            p50, p99 = optee.whole(bench.tools, bench.folder, engine, cpus)
            print(
                f"| {engine} | {place} | {put:.0f} | {floor:.0f} | {put / floor:.2f} |"
                f" {p50:.1f} | {p99:.1f} |",
                flush=True,
            )


def cpu_time(bench: Bench) -> None:
    """Print what share of a processor the daemon takes, by pause between reads and by --poll-us."""
    pauses = {"idle": 0, "every 10 ms": 10_000, "every 1 ms": 1000, "every 100 µs": 100}
    print("\n| --poll-us |", *(f"{name} |" for name in pauses))
    print("|---|" + "---|" * len(pauses))
    for poll in (0, 64, 200, 1000):
        shares = []
        for pause in pauses.values():
            with (
                daemon(bench.folder, f"--poll-us={poll}") as running,
                chains(bench.folder, reads(), 512) as file,
            ):
                bench.tools.load(running.socket, file, count=100, cpu=1)
                before, start = running.cpu_time(), time.monotonic()
                if pause:
                    count = 2_000_000 // pause
                    bench.tools.load(running.socket, file, count=count, cpu=1, pause=pause)
                else:
                    time.sleep(2)
                shares.append((running.cpu_time() - before) / (time.monotonic() - start))
        print(f"| {poll} |", *(f"{share:.2%} |" for share in shares), flush=True)
