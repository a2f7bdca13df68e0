# SPDX-License-Identifier: Apache-2.0
"""Both routes from OP-TEE to the device, with all that OP-TEE sends, but without OP-TEE."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.e2e.kit import AMD64, Kit
from tests.e2e.optee import with_files
from tests.e2e.vm import VirtualMachine, succeed
from tests.support.daemon import Daemon
from tests.support.documents import blocks_that_begin
from tests.support.optee import Exchange, Model, workload
from tests.support.supervised import Supervised

# The first test may have to make the kit and the workshop.
pytestmark = [pytest.mark.qemu, pytest.mark.long, pytest.mark.timeout(900)]

DRIVER = "/sys/bus/virtio/drivers/virtio_rpmb"
DEFAULT_ID = b"virtio-rpmb-000\0".hex()
SIZES = r"type 0, capacity 1, reliable writes 16, id "
PARTS = 6
PLAYED = r"\d+ requests, p50 \d+ us, p99 \d+ us$"
ONE_KIT = pytest.mark.parametrize("kit", [AMD64], indirect=True, ids=["amd64"])
ONE_ENGINE = pytest.mark.parametrize("daemon", ["fast"], indirect=True)


def records(exchanges: Iterable[Exchange]) -> bytes:
    return b"".join(exchange.pack() for exchange in exchanges)


def is_clean(vm: VirtualMachine) -> bool:
    return not re.search("WARNING: |BUG: |Oops: |blocked for more", succeed(vm, "dmesg"))


def test_kernel_routing(routing_kit: Kit, daemon: Daemon, tmp_path: Path) -> None:
    """The whole recorded workload, while the other node is used at the same time."""
    model = Model()
    first = records(workload(model))
    written = model.counter
    write = records([model.write(511, 1)])
    check = records([model.read(511, 1), model.read(0, 256), model.read_counter()])
    daemon.command_line.append("--max-read-blocks=0")
    daemon.start()
    kit = with_files(routing_kit, tmp_path, workload=first, write=write, check=check)
    with VirtualMachine(kit, daemon.socket_path) as vm:
        succeed(vm, "insmod /rpmb_route.ko && dmesg | grep 'rpmb rpmb0: added'")
        succeed(
            vm,
            "(while test ! -e played; do mmc rpmb read-counter /dev/rpmb0; done > counters 2>&1) &",
        )
        played = succeed(vm, "rpmb-play route /workload")
        assert re.fullmatch(SIZES + DEFAULT_ID + "\n" + PLAYED, played), played
        print(played)
        assert played.splitlines()[1].startswith("935 requests")
        succeed(vm, "touch played; wait; test $(wc -l < counters) -gt 0")
        shown = succeed(vm, "sort -u counters").splitlines()
        assert shown[-1].startswith(("Counter value: 0x", "RPMB operation failed, retcode 0x0007"))
        counters = [int(line.split()[-1], 16) for line in shown if line.startswith("Counter")]
        assert all(0 <= counter <= written for counter in counters)
        assert succeed(vm, "mmc rpmb read-counter /dev/rpmb0") == (
            f"Counter value: 0x{written:08x}"
        )
        _killed_user_is_answered(vm, daemon)
        succeed(vm, "rpmb-play route /check")
        assert is_clean(vm)
    daemon.stop()
    assert daemon.flash_path.read_bytes() == model.content


def _killed_user_is_answered(vm: VirtualMachine, daemon: Daemon) -> None:
    """SIGKILL does not end a request of the kernel's subsystem, nor does time."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        succeed(vm, "rpmb-play route /write > /dev/null 2>&1 & echo $! > user")
        until_state(vm, "D")
        succeed(vm, "kill -9 $(cat user)")
        # Longer than the driver waits before it says so.
        while vm.run("dmesg | grep 'rpmb0: no answer yet, still waiting'")[0]:
            time.sleep(1)
        until_state(vm, "D")
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    while vm.run("dmesg | grep 'rpmb0: answered'")[0]:
        time.sleep(0.1)


def until_state(vm: VirtualMachine, state: str) -> None:
    while succeed(vm, "cut -d ' ' -f 3 /proc/$(cat user)/stat") != state:
        time.sleep(0.1)


@pytest.mark.parametrize("engine_name", ["fast", "pure"])
def test_daemon_killed_during_the_workload(
    routing_kit: Kit, engine_name: str, tmp_path: Path
) -> None:
    """No request fails, and every answer is the one of a daemon that was never killed."""
    model = Model()
    exchanges = list(workload(model))
    size = -(-len(exchanges) // PARTS)
    parts = {f"part{number}": records(exchanges[number * size :][:size]) for number in range(PARTS)}
    kit = with_files(routing_kit, tmp_path, **parts)
    kills = 0
    with Supervised(tmp_path, engine=engine_name) as device:
        with VirtualMachine(kit, device.path) as vm:
            succeed(vm, "insmod /rpmb_route.ko")
            for part in parts:
                succeed(vm, f"rm -f ended; (rpmb-play route /{part}; echo $? > ended) > out 2>&1 &")
                # The part goes on while the daemon is started again.
                while vm.run("test -s ended")[0] != 0:
                    device.manager.kill()
                    kills += 1
                played = succeed(vm, "cat out")
                assert succeed(vm, "cat ended") == "0", played
            assert is_clean(vm)
        device.manager.stop()
        assert device.manager.statuses[:-1] == [-signal.SIGKILL] * kills
    assert kills >= PARTS
    assert device.flash.read_bytes() == model.content


@ONE_KIT
@ONE_ENGINE
def test_registration(routing_kit: Kit, daemon: Daemon, tmp_path: Path) -> None:
    """Identity, refusal to be unloaded, and removal while in use."""
    daemon.start()
    identity = "00112233445566778899aabbccddeeff"
    kit = with_files(routing_kit, tmp_path, nothing=b"")
    with VirtualMachine(kit, daemon.socket_path) as vm:
        succeed(vm, "insmod /rpmb_route.ko")
        assert vm.run("rmmod virtio_rpmb")[0] != 0
        # Without a user it can be unbound, and unloaded then.
        succeed(vm, f"echo virtio0 > {DRIVER}/unbind && rmmod virtio_rpmb")
        assert vm.run("rpmb-play route /nothing") == (1, "open: No such device")
        for wrong in (identity[:-2], identity + "00", identity[:-1] + "g", ""):
            succeed(vm, f"insmod /virtio_rpmb.ko dev_id={wrong} && test ! -e /dev/rpmb0")
            message = f'dev_id: expected 32 hex digits, found "{wrong}"'
            assert message in succeed(vm, "dmesg | tail -n 2; rmmod virtio_rpmb")
        succeed(vm, f"insmod /virtio_rpmb.ko dev_id={identity}")
        assert identity in succeed(vm, "rpmb-play route /nothing")
        assert succeed(vm, f"cat {DRIVER}/virtio0/cid") == identity
        assert succeed(vm, f"cat {DRIVER}/virtio0/raw_rpmb_size_mult") == "0x1"
        assert succeed(vm, f"cat {DRIVER}/virtio0/rel_sectors") == "0x10"

        # A user keeps what was removed: it gets errors until the device is back.
        vm.put_file("request", b"\1\0\0\0" + Model().read_counter().request)
        succeed(
            vm,
            f"exec 3<>/dev/rpmb-route; cat request >&3; echo virtio0 > {DRIVER}/unbind;"
            " ! cat request >&3 2> error; grep 'No such device' error; ! rmmod virtio_rpmb;"
            f" echo virtio0 > {DRIVER}/bind; cat request >&3",
        )
        assert "rpmb0: removed while in use, the module stays loaded" in succeed(vm, "dmesg")
        succeed(vm, f"echo virtio0 > {DRIVER}/unbind; ! rmmod virtio_rpmb")
        assert is_clean(vm)
    daemon.stop()


@ONE_KIT
@ONE_ENGINE
def test_device_that_writes_single_blocks_is_not_registered(
    routing_kit: Kit, daemon: Daemon, tmp_path: Path
) -> None:
    daemon.command_line.append("--max-write-blocks=1")
    daemon.start()
    with VirtualMachine(routing_kit, daemon.socket_path) as vm:
        assert "expected a device that writes at least 2 blocks at once" in succeed(vm, "dmesg")
        succeed(vm, "insmod /rpmb_route.ko && test -c /dev/rpmb0")
        assert vm.run("rpmb-play route /dev/null") == (1, "open: No such device")
        succeed(vm, "rmmod virtio_rpmb")
    daemon.stop()


@ONE_ENGINE
def test_supplicant_route(routing_kit: Kit, daemon: Daemon, tmp_path: Path) -> None:
    """The ioctls of tee-supplicant on the name that it opens, and the identity it reads."""
    model = Model()
    kit = with_files(routing_kit, tmp_path, workload=records(workload(model)))
    daemon.start()
    with VirtualMachine(kit, daemon.socket_path) as vm:
        (name,) = blocks_that_begin("optee", "ln -s")
        succeed(vm, name)
        (place,) = blocks_that_begin("optee", "unshare")
        assert place.count("exec tee-supplicant\n") == 1
        vm.put_file(
            "start", place.replace("tee-supplicant", "rpmb-play supplicant /workload").encode()
        )
        played = succeed(vm, "sh start")
        described = f"cid {DEFAULT_ID}\nraw_rpmb_size_mult 0x1\nrel_sectors 0x10\n"
        assert re.fullmatch(described + PLAYED, played), played
        print(played)
        assert is_clean(vm)
    daemon.stop()
    assert daemon.flash_path.read_bytes() == model.content
