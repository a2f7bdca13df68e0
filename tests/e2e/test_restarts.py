# SPDX-License-Identifier: Apache-2.0
"""A guest that never notices that its daemon is killed: on QEMU, restarted by a supervisor."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest

from tests.e2e.kit import AMD64, Kit
from tests.e2e.monitor import Monitor
from tests.e2e.story import KEY
from tests.e2e.vm import Guest, VirtualMachine, qemu_command_line, succeed
from tests.support.daemon import PATIENCE, environment, installed_program, until
from tests.support.faulty import POINTS, Faults
from tests.support.rig import UNIT_BLOCKS, make_image
from tests.support.supervisor import Supervisor
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine

KILLS = int(os.environ.get("VHOST_RPMB_RESTART_KILLS", "10"))  # on each engine
# The first test may have to make the kit.
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(900 + 10 * KILLS),
    pytest.mark.parametrize("kit", [AMD64], indirect=True),
]
TIMEOUT = 300.0

# Writes the number of each round as a block, reads it and compares, until it is told to stop; the
# last line of its log is the number of rounds.
LOOP = f"""
i=$(cat rounds 2>/dev/null || echo 0)
while test ! -e stop; do
    printf '%-256d' $i > data
    mmc rpmb write-block /dev/rpmb0 $((i % {UNIT_BLOCKS})) data key || break
    rm -f out
    mmc rpmb read-block /dev/rpmb0 $((i % {UNIT_BLOCKS})) 1 out key || break
    cmp data out || break
    i=$((i + 1))
    echo $i > next && mv next rounds
done
touch ended
"""


@contextmanager
def supervised(folder: Path, engine: str, program: list[str]) -> Iterator[Supervisor]:
    """The daemon of a new image, not yet started; it listens at `rpmb.sock`."""
    flash = make_image(folder / "rpmb.img")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "rpmb.sock"))
        listener.listen()
        command = [*program, "--fd=3", f"--flash-path={flash}", "--verbose"]
        variables = environment() | {"VHOST_RPMB_ENGINE": engine}
        with Supervisor(folder, command, environment=variables, listener=listener) as supervisor:
            yield supervisor


@pytest.fixture
def supervisor(tmp_path: Path, engine: Engine) -> Iterator[Supervisor]:
    program = installed_program("vhost-user-rpmb", "vhost_rpmb")
    with supervised(tmp_path, engine.name, program) as supervisor:
        yield supervisor


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Let a thread work during the context; the event is set at its end."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(work, stop)
        try:
            yield
        finally:
            stop.set()
    worker.result()


class Killer:
    """Kills a supervised daemon at random moments, its starts included."""

    def __init__(self, supervisor: Supervisor, seed: int) -> None:
        self._supervisor = supervisor
        self._source = random.Random(seed)
        self.kills = 0

    def kill(self) -> None:
        """Kill it once."""
        if self._source.random() < 0.8:
            self._supervisor.wait_ready()
            time.sleep(self._source.choice([0.02, 0.2]) * self._source.random())
        else:  # while it starts
            time.sleep(0.1 * self._source.random())
        starts = self._supervisor.starts
        # An orderly end that follows a crash, or the other way round, owes answers as well.
        self._supervisor.send(self._source.choice([signal.SIGKILL] * 3 + [signal.SIGTERM]))
        self._supervisor.wait(lambda: self._supervisor.starts > starts)
        self.kills += 1

    @contextmanager
    def working(self) -> Iterator[None]:
        """Kill it again and again as soon as it has a connection, until the end of the context."""

        def work(stop: threading.Event) -> None:
            # What dies between accept() and the storing of the connection cannot be continued.
            self._supervisor.wait(lambda: bool(self._supervisor.names) or stop.is_set())
            while not stop.is_set():
                self.kill()

        with meanwhile(work):
            yield


class Deaths:
    """Lets a supervised daemon die at a point of its code, again whenever it has got over that."""

    def __init__(self, supervisor: Supervisor, faults: Faults) -> None:
        self._supervisor = supervisor
        self._faults = faults
        self.kills = 0

    @contextmanager
    def working(self, point: str) -> Iterator[None]:
        """Do so until the end of the context, as soon as there is a connection; at least once."""
        before = self.kills
        armed = threading.Event()

        def ready() -> bool:
            return self._supervisor.ready and "rpmb-conn" in self._supervisor.names

        def work(stop: threading.Event) -> None:
            while not stop.is_set():
                self._supervisor.wait(lambda: ready() or stop.is_set())
                starts = self._supervisor.starts
                self._faults.arm(point)
                armed.set()
                while not stop.is_set() and self._supervisor.starts == starts:
                    time.sleep(0.005)
                if stop.is_set():
                    self._faults.arm("")
                    self._supervisor.wait_ready()
                self.kills += self._supervisor.starts - starts

        with meanwhile(work):
            if "rpmb-conn" in self._supervisor.names:  # it may send messages only once
                assert armed.wait(PATIENCE)
            yield
        assert self.kills > before, point


class Workload:
    """The loop in the guest, and what it must have made of the device."""

    def __init__(self, vm: Guest) -> None:
        self._vm = vm

    def prepare(self) -> None:
        self._vm.put_file("key", KEY)
        self._vm.put_file("loop", LOOP.encode())

    def start(self) -> None:
        before = self.rounds
        succeed(self._vm, "rm -f stop ended; sh loop > log 2>&1 &")
        self.progresses(before)

    def progresses(self, before: int) -> None:
        """Wait until there were more rounds than before."""
        self._until(lambda: self.rounds > before)

    @property
    def rounds(self) -> int:
        return int(succeed(self._vm, "cat rounds 2>/dev/null || echo 0"))

    def stop(self) -> int:
        """Stop the loop, which must not have failed: how many rounds there were."""
        assert self._vm.run("test -e ended")[0] != 0, self.log
        succeed(self._vm, "touch stop")
        self._until(lambda: self._vm.run("test -e ended")[0] == 0)
        assert self.log == ""
        return self.rounds

    @property
    def log(self) -> str:
        return succeed(self._vm, "cat log")

    def _until(self, condition: Callable[[], bool]) -> None:
        ends = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < ends, self.log
            time.sleep(0.05)


def image_of(rounds: int) -> bytes:
    """What the device holds after so many rounds."""
    blocks = [bytes(256)] * UNIT_BLOCKS
    for number in range(rounds):
        blocks[number % UNIT_BLOCKS] = b"%-256d" % number
    return b"".join(blocks)


def check(supervisor: Supervisor, rounds: int) -> None:
    """The device, read without the guest, has done each write once."""
    supervisor.stop()
    supervisor.start()
    with RpmbClient.connect(Path(supervisor.folder, "rpmb.sock"), KEY, timeout=TIMEOUT) as client:
        assert client.read_counter() == rounds
        assert client.read(0, UNIT_BLOCKS) == image_of(rounds)


def check_processes(supervisor: Supervisor, killer: Killer | Deaths) -> None:
    """No daemon ended by itself, and none had to connect again."""
    supervisor.wait_ready()
    assert supervisor.starts == killer.kills + 1
    assert "Traceback" not in supervisor.log
    assert "warning" not in supervisor.log
    assert supervisor.log.count("front-end connected") == 1


def add_memory(monitor: Monitor, number: int) -> None:
    """Plug 128 MiB into one of the guest's slots: one more memory region for the daemon."""
    name = f"more{number}"
    backend = {"qom_type": "memory-backend-memfd", "size": 128 << 20, "share": True}
    monitor.execute("object-add", id=name, **backend)
    monitor.execute("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=name)


def with_slots(kit: Kit, socket_path: Path, monitor_path: Path, slots: int) -> list[str]:
    """The command line of a machine with a monitor and slots for memory."""
    line = qemu_command_line(kit, socket_path)
    number = line.index("-m") + 1
    line[number] += f",slots={slots},maxmem=2G"
    return [*line, "-qmp", f"unix:{monitor_path},server=on,wait=off"]


def test_killed_at_random_moments(kit: Kit, supervisor: Supervisor) -> None:
    supervisor.start()
    killer = Killer(supervisor, 1)
    with VirtualMachine(kit, supervisor.folder / "rpmb.sock") as vm:
        vm.put_file("key", KEY)
        succeed(vm, "mmc rpmb write-key /dev/rpmb0 key")
        workload = Workload(vm)
        workload.prepare()
        workload.start()
        for _ in range(KILLS):
            killer.kill()
        rounds = workload.stop()
        assert not re.search("virtio_rpmb.*error|WARNING: |BUG: |Oops: ", succeed(vm, "dmesg"))
    check_processes(supervisor, killer)
    check(supervisor, rounds)


def test_killed_during_boot_and_commands_of_the_monitor(
    kit: Kit, supervisor: Supervisor, tmp_path: Path
) -> None:
    supervisor.start()
    killer = Killer(supervisor, 2)
    monitor_path = tmp_path / "monitor"
    command_line = with_slots(kit, tmp_path / "rpmb.sock", monitor_path, 2)
    with killer.working():
        vm = Guest(command_line)
    with vm, Monitor(monitor_path) as monitor:
        workload = Workload(vm)
        workload.prepare()
        succeed(vm, "mmc rpmb write-key /dev/rpmb0 key")
        workload.start()
        for number in range(max(2, KILLS // 20)):
            rounds = workload.rounds
            with killer.working():
                for _ in range(5):
                    monitor.execute("stop")
                    monitor.execute("cont")
                if number < 2:  # as many as there are slots
                    add_memory(monitor, number)
                workload.progresses(rounds)
        written = workload.stop()
        for _ in range(max(1, KILLS // 40)):
            with killer.working():
                vm.reboot_by(lambda: monitor.execute("system_reset"))
            workload.prepare()
            succeed(vm, f"echo {written} > rounds")
            workload.start()
            written = workload.stop()
    check_processes(supervisor, killer)
    check(supervisor, written)


@pytest.mark.parametrize(
    ("points", "engine_name"),
    [
        pytest.param(["consumed"], "fast"),
        # The first point is also that of QEMU's start, which each of them has once.
        *(
            pytest.param(list(points), engine, marks=pytest.mark.long)
            for points, engine in zip(
                zip(POINTS, [*POINTS[1:], POINTS[0]], strict=True), cycle(["pure", "fast"])
            )
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_killed_at_points_of_messages(
    kit: Kit, tmp_path: Path, points: list[str], engine_name: str
) -> None:
    """Of those of the boot, of `stop` and `cont`, of memory that is plugged in, of a reset."""
    faults = Faults(tmp_path)
    monitor_path = tmp_path / "monitor"
    command_line = with_slots(kit, tmp_path / "rpmb.sock", monitor_path, len(points))
    with supervised(tmp_path, engine_name, faults.command()) as supervisor:
        supervisor.start()
        deaths = Deaths(supervisor, faults)
        with deaths.working(points[0]):
            vm = Guest(command_line)
        with vm, Monitor(monitor_path) as monitor:
            workload = Workload(vm)
            workload.prepare()
            succeed(vm, "mmc rpmb write-key /dev/rpmb0 key")
            written = 0
            for number, point in enumerate(points):
                workload.start()
                with deaths.working(point):
                    monitor.execute("stop")
                    monitor.execute("cont")
                    workload.progresses(workload.rounds)
                with deaths.working(point):
                    add_memory(monitor, number)
                    workload.progresses(workload.rounds)
                written = workload.stop()
                with deaths.working(point):
                    vm.reboot_by(lambda: monitor.execute("system_reset"))
                workload.prepare()
                succeed(vm, f"echo {written} > rounds")
            assert not re.search("virtio_rpmb.*error|WARNING: |BUG: |Oops: ", succeed(vm, "dmesg"))
        check_processes(supervisor, deaths)
        check(supervisor, written)


@pytest.mark.long
def test_plugged_in_again_on_the_same_connection(
    kit: Kit, supervisor: Supervisor, tmp_path: Path
) -> None:
    """QEMU keeps the connection of a removed device; the next one begins with SET_OWNER."""
    supervisor.start()
    line = qemu_command_line(kit, tmp_path / "rpmb.sock")
    number = next(n for n, word in enumerate(line) if word.startswith("vhost-user-test-device-pci"))
    line[number] += ",id=rpmb,bus=behind-port"
    device = line[number]
    line[number - 1 : number - 1] = ["-device", "pcie-root-port,id=behind-port,chassis=1"]
    monitor_path = tmp_path / "monitor"
    line += ["-qmp", f"unix:{monitor_path},server=on,wait=off"]
    with Guest(line) as vm, Monitor(monitor_path) as monitor:
        vm.put_file("key", KEY)
        succeed(vm, "mmc rpmb write-key /dev/rpmb0 key")
        for counter in range(1, 4):
            monitor.execute("device_del", id="rpmb")
            succeed(vm, "while test -e /dev/rpmb0; do sleep 0.1; done")
            plug_in(monitor, device)
            succeed(vm, "while test ! -c /dev/rpmb0; do sleep 0.1; done")
            supervisor.kill()
            succeed(vm, "head -c 256 /dev/zero | mmc rpmb write-block /dev/rpmb0 0 - key")
            found = succeed(vm, "mmc rpmb read-counter /dev/rpmb0")
            assert found == f"Counter value: 0x{counter:08x}"
    supervisor.wait_ready()
    assert "warning" not in supervisor.log
    assert supervisor.log.count("front-end connected") == 1


def plug_in(monitor: Monitor, device: str) -> None:
    """Plug a device in, once QEMU has taken the one of its name away."""

    def refused() -> bool:
        return bool(monitor.execute("human-monitor-command", command_line=f"device_add {device}"))

    until(lambda: not refused())
