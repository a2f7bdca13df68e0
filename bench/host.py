# SPDX-License-Identifier: Apache-2.0
"""Many daemons on one host: what each of them costs, beside bare interpreters in the same run.

Memory by smaps_rollup, processor time and wake-ups of idle daemons, latencies of all of them busy
at once. The daemons run as installed: in an environment that has no other package.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import vhost_rpmb
from bench.daemon import Tools, chains, percentile, reads
from vhost_rpmb.rpmb import spec
from vhost_rpmb.testing import RunningDevice

BARE = ("-S", "-I", "-c", "print(1, flush=True); input()")
WITH_SQLITE = ("-S", "-I", "-c", "import sqlite3; print(1, flush=True); input()")
_SYMBOLS = ("Rss", "Pss", "Private_Dirty", "Private_Clean")


class Memory(NamedTuple):
    """Memory of a process in KiB."""

    resident: int
    proportional: int
    private: int


def memory(pid: int) -> Memory:
    """The present memory of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {
        name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)
    }
    resident, proportional, dirty, clean = (found[name] for name in _SYMBOLS)
    return Memory(resident, proportional, dirty + clean)


def medians(pids: Sequence[int]) -> Memory:
    """The medians of several processes, each measured beside the others."""
    return Memory(*(int(median(column)) for column in zip(*map(memory, pids), strict=True)))


@contextmanager
def environment(folder: Path) -> Iterator[Path]:
    """An interpreter that has this package and no other, as an installation for the daemon."""
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    package = Path(vhost_rpmb.__file__).parent
    (packages / "bench.pth").write_text(f"{package.parent}\n")
    python = home / "bin/python"
    # As an installer does: compiling it takes time and memory.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([str(python), "-m", "compileall", "-q", str(package)], check=True)
    yield python


@contextmanager
def daemons(folder: Path, python: Path, count: int) -> Iterator[list[RunningDevice]]:
    """Run daemons with an image of 128 KiB each, on the compiled engine, in the sandbox."""
    with ExitStack() as stack:
        running = []
        for number in range(count):
            home = folder / f"daemon-{number}"
            home.mkdir()
            device = RunningDevice(home)
            device.command_line[0] = str(python)
            device.environment["VHOST_RPMB_ENGINE"] = "fast"
            running.append(stack.enter_context(device))
        yield running


@contextmanager
def interpreters(python: Path, program: Sequence[str], count: int) -> Iterator[list[int]]:
    """Run bare interpreters; their process IDs."""
    with ExitStack() as stack:
        pids = []
        for _ in range(count):
            process = stack.enter_context(
                subprocess.Popen(
                    [str(python), *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            pids.append(process.pid)
        yield pids


def cpu_time(pids: Sequence[int]) -> float:
    """Seconds that processes have spent on a processor."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


def switches(pids: Sequence[int]) -> int:
    """The number of times that processes were given a processor: wake-ups."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[2]) for pid in pids)


def idle(pids: Sequence[int], seconds: float) -> tuple[float, int]:
    """Processor time and wake-ups of all processes together in so many seconds."""
    time.sleep(2)  # what follows a start
    before = cpu_time(pids), switches(pids)
    time.sleep(seconds)
    return cpu_time(pids) - before[0], switches(pids) - before[1]


def busy(tools: Tools, running: Sequence[RunningDevice], count: int) -> list[float]:
    """Read from all devices at once, one request in flight each; the p99 of each in microseconds.

    Load generators and daemons share all processors.
    """
    with chains(tools.folder, reads(), 512) as file, ThreadPoolExecutor(len(running)) as pool:
        loads = pool.map(lambda device: tools.load(device.socket_path, file, count=count), running)
        return [percentile(load.times, 99) for load in loads]


def sparse(folder: Path, python: Path, data: int) -> int:
    """Private memory in KiB of a daemon whose image has 16 MiB, ``data`` bytes of them not zero."""
    image = folder / "rpmb.img"
    image.write_bytes(os.urandom(data))
    os.truncate(image, spec.MAX_CAPACITY)
    device = RunningDevice(folder, "--initial-counter=1")
    device.command_line[0] = str(python)
    device.environment["VHOST_RPMB_ENGINE"] = "fast"
    with device:
        return memory(device.pid).private
