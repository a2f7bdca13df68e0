# SPDX-License-Identifier: Apache-2.0
"""Suspend, removal and return of the device while requests are in flight, through both routes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.kit import AMD64, Kit
from tests.e2e.monitor import Monitor
from tests.e2e.optee import with_files
from tests.e2e.vm import Guest, qemu_command_line, succeed
from tests.support.daemon import Daemon, until
from tests.support.optee import Model

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("kit", [AMD64], indirect=True, ids=["amd64"]),
    pytest.mark.parametrize("daemon", ["fast"], indirect=True),
]
DRIVER = "/sys/bus/virtio/drivers/virtio_rpmb"
DEVICE = "vhost-user-test-device-pci,"
PROPERTIES = "virtio-id=28,num_vqs=1,vq_size=64,config_size=3"
# What the kernel writes when a driver is wrong: Debian has none with KASAN or lockdep.
COMPLAINTS = "WARNING: |BUG: |Oops: |general protection|refcount_t|list_(add|del) corruption"


@contextmanager
def machine(kit: Kit, daemon: Daemon, folder: Path) -> Iterator[tuple[Guest, Monitor]]:
    """A guest whose device can be unplugged, and the monitor of its QEMU."""
    model = Model()
    start = model.program_key().pack() + model.write(3, 2).pack()
    reads = b"".join(model.read(3, 2).pack() + model.read_counter().pack() for _ in range(20))
    kit = with_files(kit, folder, start=start, reads=reads)
    line = qemu_command_line(kit, daemon.socket_path)
    number = next(number for number, word in enumerate(line) if word.startswith(DEVICE))
    line[number] += ",id=rpmb,bus=behind-port"
    line[number - 1 : number - 1] = ["-device", "pcie-root-port,id=behind-port,chassis=1"]
    socket_path = folder / "monitor.sock"
    with (
        Guest([*line, "-qmp", f"unix:{socket_path},server=on,wait=off"]) as vm,
        Monitor(socket_path) as monitor,
    ):
        succeed(vm, "insmod /rpmb_route.ko && rpmb-play route /start")
        yield vm, monitor
        complaints = re.search(COMPLAINTS + "|blocked for more", succeed(vm, "dmesg"))
        assert not complaints, succeed(vm, "dmesg")


def start_load(vm: Guest) -> None:
    """Both routes, again and again, until there is a file `stop`; errors of both are kept."""
    succeed(
        vm,
        "rm -f stop routed.* called.*; "
        "(while test ! -e stop; do rpmb-play route /reads >> routed.out 2>> routed.err ||"
        " sleep 0.1; done) & "
        "(while test ! -e stop; do mmc rpmb read-counter /dev/rpmb0 >> called.out"
        " 2>> called.err || sleep 0.1; done) &",
    )
    running(vm)


def running(vm: Guest) -> None:
    """Wait until both routes have got further."""
    for name in ("routed", "called"):
        lines = f"cat {name}.out 2> /dev/null | grep -c -E 'requests,|Counter value'"
        before = int(vm.run(lines)[1])
        while int(vm.run(lines)[1]) < before + 2:
            time.sleep(0.1)


def end_load(vm: Guest) -> None:
    """All loops end; each answer that there was is right."""
    succeed(vm, "touch stop; wait")
    assert succeed(vm, "sort -u called.out") == "Counter value: 0x00000001"
    assert "expected" not in succeed(vm, "cat routed.err")


def test_suspend_and_resume(routing_kit: Kit, daemon: Daemon, tmp_path: Path) -> None:
    """No request fails: they are frozen before they are sent, or go on after the resume."""
    daemon.start()
    with machine(routing_kit, daemon, tmp_path) as (vm, monitor):
        assert "deep" in succeed(vm, "cat /sys/power/mem_sleep; echo deep > /sys/power/mem_sleep")
        start_load(vm)
        for _ in range(3):
            suspends(vm, monitor)
            running(vm)
        end_load(vm)
        assert succeed(vm, "cat routed.err called.err") == ""
        # A request given up on keeps its buffers: the suspend takes them back.
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            assert vm.run("timeout 1 mmc rpmb read-counter /dev/rpmb0")[0] == 128 + signal.SIGTERM
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        suspends(vm, monitor)
        assert succeed(vm, "mmc rpmb read-counter /dev/rpmb0") == "Counter value: 0x00000001"
        succeed(vm, "rpmb-play route /reads")
    daemon.stop()


def suspends(vm: Guest, monitor: Monitor) -> None:
    """Suspend the guest and wake it up; its console takes nothing while it sleeps."""
    slept = "dmesg | grep -c 'Waking up from system sleep state S3'"
    before = int(vm.run(slept)[1])
    resumed = threading.Event()

    def wake() -> None:
        while not resumed.wait(0.05):
            if monitor.execute("query-status")["status"] == "suspended":
                monitor.execute("system_wakeup")

    with ThreadPoolExecutor(1) as other:
        woken = other.submit(wake)
        try:
            succeed(vm, "echo mem > /sys/power/state")
        finally:
            resumed.set()
        woken.result()
    assert int(succeed(vm, slept)) == before + 1


def test_unbind_and_bind_under_load(routing_kit: Kit, daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with machine(routing_kit, daemon, tmp_path) as (vm, _):
        start_load(vm)
        for _ in range(5):
            succeed(vm, f"echo virtio0 > {DRIVER}/unbind; test ! -e /dev/rpmb0")
            succeed(vm, f"echo virtio0 > {DRIVER}/bind; test -c /dev/rpmb0")
            running(vm)
        end_load(vm)
        succeed(vm, "rpmb-play route /reads")
    daemon.stop()


def test_unplugged_while_requests_are_in_flight(
    routing_kit: Kit, daemon: Daemon, tmp_path: Path
) -> None:
    """Users of both routes get an error, also where the daemon never answers, and can go on."""
    daemon.start()
    with machine(routing_kit, daemon, tmp_path) as (vm, monitor):
        chardevs = ["rpmb", "second", "third"]
        for old, new in pairwise(chardevs):
            start_load(vm)
            monitor.execute("device_del", id="rpmb")
            succeed(vm, "while test -e /dev/rpmb0; do sleep 0.1; done")
            plug_in(monitor, daemon, old, new)
            succeed(vm, "while test ! -c /dev/rpmb0; do sleep 0.1; done")
            running(vm)
            end_load(vm)

        os.kill(daemon.pid, signal.SIGSTOP)
        succeed(
            vm,
            "for user in 'rpmb-play route /reads' 'mmc rpmb read-counter /dev/rpmb0'; do"
            " ($user > /dev/null 2>> ended; echo ended >> ended) & done; sleep 1; test ! -s ended",
        )
        daemon.kill()
        monitor.execute("device_del", id="rpmb")
        succeed(vm, "while test -e /dev/rpmb0; do sleep 0.1; done; wait")
        ended = succeed(vm, "cat ended").splitlines()
        assert ended.count("ended") == 2
        assert sum("No such device" in line for line in ended) == 2, ended


def plug_in(monitor: Monitor, daemon: Daemon, old: str, new: str) -> None:
    """Plug the device in again, with a connection of its own: QEMU keeps that of a removed one."""

    def run(command: str) -> str:
        objection: str = monitor.execute("human-monitor-command", command_line=command)
        return objection

    # QEMU takes the device away after the guest has let it go.
    until(lambda: not run(f"chardev-remove {old}"))
    assert not run(f"chardev-add socket,id={new},path={daemon.socket_path}")
    device = f"{DEVICE}chardev={new},{PROPERTIES},id=rpmb,bus=behind-port"
    assert not run(f"device_add {device}")
