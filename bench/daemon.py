# SPDX-License-Identifier: Apache-2.0
"""The parts of a measurement: the compiled tools, the running daemon, the requests."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vhost_rpmb.driver.errors import BackendError, RpmbResultError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.frame import Frame
from vhost_rpmb.rpmb.mac import Authenticator

KEY = bytes(range(32))
SAME_CPU = (0, 0)  # processor of the daemon, of the front-end
TWO_CPUS = (0, 1)
CPUS = {"same CPU": SAME_CPU, "two CPUs": TWO_CPUS}


class Load(NamedTuple):
    """What the load generator measured."""

    requests: int
    seconds: float
    own: float  # microseconds a request that the generator itself takes
    times: list[float]  # microseconds, in their order; of a round of ``depth`` requests each

    @property
    def p50(self) -> float:
        return percentile(self.times, 50)


def percentile(times: Sequence[float], percent: int) -> float:
    """The time within which so many of a hundred ended."""
    return sorted(times)[len(times) * percent // 100]


class Tools:
    """The compiled programs of this folder, and what they say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        here = Path(__file__).parent
        for name in ("load", "floor"):
            command = ["cc", "-O2", "-o", str(folder / name), str(here / f"{name}.c"), "-lcrypto"]
            subprocess.run(command, check=True)

    def load(self, socket: Path, chains: Path, **options: int) -> Load:
        requests, seconds, own, *times = self._run(
            "load", socket, chains, *(f"{k}={v}" for k, v in options.items())
        )
        return Load(int(requests), float(seconds), float(own), list(map(float, times)))

    def floor(self, kind: str, *arguments: object) -> float:
        """Measure a floor (microseconds) three times; the median."""
        runs = [float(self._run("floor", kind, *arguments)[0]) for _ in range(3)]
        return statistics.median(runs)

    def _run(self, name: str, *arguments: object) -> list[str]:
        done = subprocess.run(
            [str(self.folder / name), *map(str, arguments)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout.split()


class Daemon(NamedTuple):
    """A running daemon: its process and its socket."""

    pid: int
    socket: Path
    started: float  # seconds from exec to listening

    def memory(self) -> int:
        """Resident memory in bytes."""
        return resident(self.pid)

    def cpu_time(self) -> float:
        """Seconds that it has spent on a processor."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return not probe.connect_ex(str(path))


@contextmanager
def run(
    path: Path, *options: str, engine: str = "fast", cpu: int = 0, wrapper: Sequence[str] = ()
) -> Iterator[Daemon]:
    """Run a daemon that listens at ``path``, from then on on one processor."""
    command = [*wrapper, sys.executable, "-m", "vhost_rpmb", f"--socket-path={path}", *options]
    start = time.monotonic()
    with subprocess.Popen(command, env=os.environ | {"VHOST_RPMB_ENGINE": engine}) as process:
        try:
            while not _listens(path):
                assert process.poll() is None, "the daemon ended"
                time.sleep(0.001)
            started = time.monotonic() - start
            os.sched_setaffinity(process.pid, {cpu})
            yield Daemon(process.pid, path, started)
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def daemon(
    folder: Path, *options: str, units: int = 1, blank: bool = False, **how: Any
) -> Iterator[Daemon]:
    """Run a daemon with a fresh device of ``units`` times 128 KiB.

    Its key is programmed, unless it is to be ``blank``; the other arguments are those of run().
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        home = Path(name)
        (home / "flash").touch()
        os.truncate(home / "flash", units * spec.CAPACITY_UNIT)
        files = [f"--flash-path={home / 'flash'}", f"--key-path={home / 'key'}"]
        if not blank:
            (home / "key").touch(0o600)
            (home / "key").write_bytes(KEY)
            files.append("--key-set")
        with run(home / "socket", *files, *options, **how) as running:
            yield running


def connected(path: Path, key: bytes) -> RpmbClient:
    """A client of the device behind a socket, which may have to be opened again first."""
    end = time.monotonic() + 10
    while True:
        try:
            return RpmbClient.connect(path, key, timeout=60)
        except BackendError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


def counter_of(path: Path, key: bytes = KEY) -> int:
    """The write counter of the device behind a socket, whose key is programmed if it has none."""
    with connected(path, key) as client:
        try:
            return client.read_counter()
        except RpmbResultError as error:
            if error.result != spec.VIRTIO_RPMB_RES_NO_AUTH_KEY:
                raise
            client.program_key(key)
            return client.read_counter()


def counter_reads() -> Iterator[bytes]:
    """Requests for the write counter: one frame each."""
    while True:
        yield Frame(block_count=1, req_resp=spec.VIRTIO_RPMB_REQ_GET_WRITE_COUNTER).pack()


def reads(count: int = 1, units: int = 1) -> Iterator[bytes]:
    """Requests for ``count`` blocks each, all over the image."""
    while True:
        for address in range(0, units * spec.CAPACITY_UNIT // spec.BLOCK_SIZE - count + 1, count):
            yield Frame(
                address=address, block_count=count, req_resp=spec.VIRTIO_RPMB_REQ_DATA_READ
            ).pack()


def writes(count: int = 1, counter: int = 0, key: bytes = KEY) -> Iterator[bytes]:
    """Writes of ``count`` blocks each, and the request for the result: ``count`` + 1 frames."""
    authenticator = Authenticator(key)
    result = Frame(block_count=1, req_resp=spec.VIRTIO_RPMB_REQ_RESULT_READ).pack()
    while True:
        frames = [
            Frame(
                data=(counter + number).to_bytes(4, "big") * 64,
                write_counter=counter,
                address=counter * count % (512 - count + 1),
                block_count=count,
                req_resp=spec.VIRTIO_RPMB_REQ_DATA_WRITE,
            )
            for number in range(count)
        ]
        mac = authenticator.mac([frame.pack() for frame in frames])
        frames[-1] = frames[-1]._replace(key_mac=mac)
        yield b"".join(frame.pack() for frame in frames) + result
        counter += 1


@contextmanager
def chains(folder: Path, source: Iterator[bytes], count: int) -> Iterator[Path]:
    """Write ``count`` requests into a file for the load generator."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.writelines(islice(source, count))
        file.flush()
        yield Path(file.name)
