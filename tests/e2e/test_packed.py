# SPDX-License-Identifier: Apache-2.0
"""Packed rings with the driver of a real Linux guest, whose daemon is killed under it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.kit import AMD64, Kit
from tests.e2e.monitor import Monitor
from tests.e2e.test_restarts import (
    Killer,
    Workload,
    check,
    check_processes,
    supervised,
)
from tests.e2e.vm import VirtualMachine, succeed
from tests.support.daemon import installed_program
from vhost_rpmb.virtio import features
from vhost_rpmb.virtio import spec as virtio

KILLS = 5  # in each part
# The first test may have to make the kit.
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("kit", [AMD64], indirect=True),
]


def negotiated(vm: VirtualMachine) -> int:
    """The virtio feature bits that the guest's driver accepted."""
    bits = succeed(vm, "cat /sys/bus/virtio/devices/virtio0/features").strip()
    return sum(1 << number for number, bit in enumerate(bits) if bit == "1")


@pytest.mark.parametrize(
    ("engine_name", "options"),
    [
        ("fast", ""),
        ("pure", ",-in-order"),
        ("fast", ",-event-idx,-in-order"),
        ("pure", ",-event-idx"),
        ("fast", ",-in-order,-indirect-desc"),
        pytest.param("pure", ",-event-idx,-in-order,-indirect-desc", marks=pytest.mark.long),
    ],
)
def test_guest_never_notices(kit: Kit, tmp_path: Path, engine_name: str, options: str) -> None:
    """Load, `stop` and `cont` under it, kills of the daemon, and resets of the guest."""
    offered = features.DEFAULT | 1 << virtio.VIRTIO_F_RING_PACKED
    for name in re.findall(r"-([a-z-]+)", options):
        offered &= ~features.OPTIONAL[name]
    program = installed_program("vhost-user-rpmb", "vhost_rpmb")
    program = [*program, f"--virtio-features=+packed{options}"]
    monitor_path = tmp_path / "monitor"
    with supervised(tmp_path, engine_name, program) as supervisor:
        supervisor.start()
        killer = Killer(supervisor, 3)
        with (
            VirtualMachine(kit, supervisor.folder / "rpmb.sock", monitor_path) as vm,
            Monitor(monitor_path) as monitor,
        ):
            assert negotiated(vm) & ~(1 << virtio.VIRTIO_F_RING_PACKED | offered) == 0
            assert negotiated(vm) >> virtio.VIRTIO_F_RING_PACKED & 1
            workload = Workload(vm)
            workload.prepare()
            succeed(vm, "mmc rpmb write-key /dev/rpmb0 key")
            workload.start()
            for _ in range(5):
                rounds = workload.rounds
                monitor.execute("stop")
                monitor.execute("cont")
                workload.progresses(rounds)
            for _ in range(KILLS):
                killer.kill()
            with killer.working():
                for _ in range(3):
                    monitor.execute("stop")
                    monitor.execute("cont")
            workload.progresses(workload.rounds)
            rounds = workload.stop()
            for reset in (lambda: monitor.execute("system_reset"), lambda: vm._send("reboot -f")):
                vm.reboot_by(reset)
                assert negotiated(vm) >> virtio.VIRTIO_F_RING_PACKED & 1
                workload.prepare()
                succeed(vm, f"echo {rounds} > rounds")
                workload.start()
                killer.kill()
                workload.progresses(workload.rounds)
                rounds = workload.stop()
            assert not re.search("virtio_rpmb.*error|WARNING: |BUG: |Oops: ", succeed(vm, "dmesg"))
        check_processes(supervisor, killer)
        check(supervisor, rounds)
