# SPDX-License-Identifier: Apache-2.0
"""Measure a shared store against etcd's own transaction and against local files, in one run.

``python -m bench.fleet``: three members of etcd with their data in memory on this machine.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.daemon import KEY, Tools, chains, resident, writes
from tests.support.etcd import EtcdCluster
from tests.support.fleet import Host, create_device
from tests.support.rig import make_image
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.errors import ClientError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.fleet.administration import create, describe, list_devices
from vhost_rpmb.storage.fleet.config import load
from vhost_rpmb.storage.fleet.engine import Compare, Put
from vhost_rpmb.storage.fleet.etcd import Etcd
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.requests import Requests

ROUNDS = 1000
STARTS = 11
HEAD, ENTRY = 102, 340  # bytes of the records that a commit of one block puts
PREFIX = "/bench/"


class Served(NamedTuple):
    """A daemon whose device is programmed, and milliseconds from exec to its first answer."""

    socket: Path
    first_answer: float
    memory: int


def percentiles(took: list[float]) -> str:
    """Milliseconds: the median, and the time within which 99 of 100 ended."""
    ordered = sorted(took)
    return f"{statistics.median(ordered):.2f} | {ordered[len(ordered) * 99 // 100]:.2f}"


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e3


def transactions(engine: Etcd, size: int) -> list[float]:
    """Milliseconds of transactions that compare and put as much as a commit does."""
    owner, head, log = b"/plain/o", b"/plain/h", b"/plain/l/%016x"
    engine.txn([], [Put(owner, b"owner"), Put(head, bytes(HEAD))])
    before, took = bytes(HEAD), []
    for number in range(ROUNDS):
        value = secrets.token_bytes(HEAD)
        compare = [Compare(owner, b"owner"), Compare(head, before)]
        puts = [Put(head, value), Put(log % number, bytes(size))]
        took.append(timed(lambda c=compare, p=puts: engine.txn(c, p)))  # type: ignore[misc]
        before = value
    return took


@contextmanager
def served(
    folder: Path,
    *where: str,
    first: Callable[[RpmbClient], object] = RpmbClient.read_counter,
    key: bytes | None = KEY,
) -> Iterator[Served]:
    """Run a daemon until its first answer, that to ``first``, and longer."""
    path = folder / "bench.sock"
    command = [sys.executable, "-m", "vhost_rpmb", f"--socket-path={path}", *where]
    begin = time.perf_counter()
    with subprocess.Popen(command, env=os.environ | {"VHOST_RPMB_ENGINE": "fast"}) as process:
        try:
            while True:
                try:
                    with RpmbClient.connect(path, key, timeout=60) as client:
                        first(client)
                    break
                except ClientError:
                    if process.poll() is not None:
                        raise SystemExit("bench: the daemon ended") from None
                    time.sleep(0.001)
            took = (time.perf_counter() - begin) * 1e3
            yield Served(path, took, resident(process.pid))
        finally:
            process.terminate()
            process.wait(30)


def measure_daemon(tools: Tools, folder: Path, name: str, *where: str) -> None:
    with served(folder, *where, first=lambda client: client.program_key(KEY), key=None):
        pass
    starts = []
    for _ in range(STARTS):
        with served(folder, *where) as daemon:
            starts.append(daemon.first_answer)
    with served(folder, *where) as daemon:
        counter = 0
        for depth in (1, 32):
            count = ROUNDS * (8 if depth > 1 else 1)
            with chains(folder, writes(1, counter), count) as file:
                found = tools.load(daemon.socket, file, count=count, frames=2, depth=depth)
            counter += count
            what = f"durable write, {name}, {depth} in flight"
            print(f"| {what} | {found.p50 / 1e3:.2f} | {found.p99 / 1e3:.2f} |", flush=True)
            rate = found.requests / found.seconds
            print(f"| writes a second, {name}, {depth} in flight | {rate:.0f} | |")
    print(f"| exec to first answer, {name} | {percentiles(starts)} |")
    print(f"| resident MiB, {name} | {daemon.memory / (1 << 20):.1f} | |", flush=True)


def measure_many(cluster: EtcdCluster, host: Host, count: int) -> None:
    """Create, list and inspect devices."""
    config = load(str(host.config))
    kek = config.key_encryption_key()
    requests = Requests(config.connect())

    def keys(number: int) -> Keys:
        return Keys(config.prefix, f"device-{number:06}")

    begin = time.perf_counter()
    for number in range(count):
        create(requests, keys(number), kek, spec.CAPACITY_UNIT, "bench")
    took = time.perf_counter() - begin
    print(f"| create {count} devices, seconds | {took:.1f} | {took / count * 1e3:.2f} ms each |")
    begin = time.perf_counter()
    assert sum(1 for _ in list_devices(requests, config.prefix)) >= count
    print(f"| list {count} devices, seconds | {time.perf_counter() - begin:.2f} | |")
    chosen = [keys(random.randrange(count)) for _ in range(200)]
    took_each = [timed(lambda each=each: describe(requests, each, kek)) for each in chosen]  # type: ignore[misc]
    print(f"| inspect one of them | {percentiles(took_each)} |")
    status = cluster.leader().ask("/v3/maintenance/status", {})
    print(f"| database, MiB | {int(status['dbSize']) / (1 << 20):.0f} | |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.fleet", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=10_000, help="how many devices to create")
    parser.add_argument(
        "--folder", type=Path, default=Path("build"), help="where local files go, on a disk"
    )
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=options.folder.resolve()) as name,
        EtcdCluster() as cluster,
    ):
        folder = Path(name)
        tools = Tools(folder)
        host = Host(folder / "host", cluster, PREFIX)
        create_device(host)
        print("| milliseconds unless named otherwise | median | 99 of 100 within |\n|---|---|---|")
        engine = cluster.connect()
        print(f"| plain transaction, as for 1 block | {percentiles(transactions(engine, ENTRY))} |")
        measure_daemon(tools, folder, "shared", host.store, "--device=vm-1")
        print(f"| plain transaction, again | {percentiles(transactions(engine, ENTRY))} |")
        flash = make_image(folder / "flash")
        measure_daemon(tools, folder, "local files", f"--flash-path={flash}")
        if options.devices:
            measure_many(cluster, host, options.devices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
