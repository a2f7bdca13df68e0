# SPDX-License-Identifier: Apache-2.0
"""What OP-TEE sends, one request at a time: putting one object, and a whole recorded workload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.daemon import KEY, SAME_CPU, Load, Tools, chains, daemon
from tests.support import oracle
from tests.support.optee import COUNTS, PUT, Exchange, Model, Row, played, recorded

PUTS = 40
ROUNDS = 5


def puts(count: int) -> tuple[list[bytes], int]:
    """Records of so many puts, for the load generator, and how many of them write."""
    rows = recorded()[PUT] * count
    writes = sum(row.request == "DATA_WRITE" for row in rows)
    return list(_records(played(Model(KEY), rows))), writes


def put(tools: Tools, folder: Path, engine: str, cpus: tuple[int, int]) -> tuple[float, float]:
    """P50 of putting an object, one after the other, and its floor: of the quickest of some rounds.

    A round has its own floor, from before and after: disks change their mind.
    """
    rows = recorded()[PUT]
    rounds = []
    for _ in range(ROUNDS):
        before = _floor(tools, folder, rows)
        took = _send(tools, folder, rows * PUTS, engine, cpus, group=len(rows)).p50
        rounds.append((took, (before + _floor(tools, folder, rows)) / 2))
    return min(rounds)


def whole(tools: Tools, folder: Path, engine: str, cpus: tuple[int, int]) -> tuple[float, float]:
    """P50 and p99 of a request of the workload, the pauses left out: of the quickest round."""
    rounds = [_send(tools, folder, recorded(), engine, cpus) for _ in range(ROUNDS)]
    return min((load.p50, load.p99) for load in rounds)


def _floor(tools: Tools, folder: Path, rows: Sequence[Row]) -> float:
    """Syncs and MACs that the machine takes at least: a write checks one MAC and makes another."""
    writes = sum(row.request == "DATA_WRITE" for row in rows)
    further = sum(row.blocks - 1 for row in rows if row.request == "DATA_READ")
    return (
        writes * tools.floor("sync", 100, folder / "synced", SAME_CPU[0])
        + (len(rows) + writes) * tools.floor("hmac", 20_000)
        + further * tools.floor("bulk", 100)
    )


def _send(
    tools: Tools,
    folder: Path,
    rows: Sequence[Row],
    engine: str,
    cpus: tuple[int, int],
    **load: int,
) -> Load:
    """Send requests to a new device, each when the one before is answered."""
    exchanges = played(Model(KEY), rows)
    with (
        daemon(folder, "--max-read-blocks=0", engine=engine, cpu=cpus[0]) as running,
        chains(folder, _records(exchanges), len(rows)) as file,
    ):
        return tools.load(running.socket, file, count=len(rows), records=1, cpu=cpus[1], **load)


def _records(exchanges: Iterator[Exchange]) -> Iterator[bytes]:
    """Records for the load generator; a write is followed by the request for its result."""
    for request, answer in exchanges:
        (first, *_) = oracle.split(request)
        write = first.req_resp == oracle.DATA_WRITE
        whole = request + (oracle.read_result() if write else b"")
        sizes = (len(whole) // oracle.FRAME_SIZE, len(answer) // oracle.FRAME_SIZE)
        yield COUNTS.pack(*sizes) + whole
