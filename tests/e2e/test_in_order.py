# SPDX-License-Identifier: Apache-2.0
"""VIRTIO_F_IN_ORDER with the driver of a real Linux guest, and many requests in flight."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.cache import Say
from tests.e2e.kit import AMD64, Kit, make_kit
from tests.e2e.test_blk import checked, command_line
from tests.e2e.vm import Guest, VirtualMachine
from tests.support.blk import SECTOR_SIZE, BlkDaemon
from tests.support.daemon import installed_daemon
from tests.support.oracle import KEY
from vhost_rpmb.virtio import spec as virtio

SIZE = 2 << 20  # bytes that are written, in requests of 4 KiB
DEEP = 64  # requests that have to be in flight at once
SECTORS = SIZE // SECTOR_SIZE
IN_ORDER, INDIRECT = 1 << virtio.VIRTIO_F_IN_ORDER, 1 << virtio.VIRTIO_F_INDIRECT_DESC
# Writes by way of the page cache, which submits as much at once as the queue has room for. Prints
# the largest number of requests that it saw in flight.
SCRIPT = f"""\
echo 4 >/sys/block/vda/queue/max_sectors_kb
head -c {SIZE} /dev/urandom >data
(cat data >/dev/vda && sync) &
most=0
while kill -0 $! 2>/dev/null; do
	set -- $(cat /sys/block/vda/inflight)
	test $2 -gt $most && most=$2
done
wait $! && echo $most
"""

# The test may have to make the kit.
pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def kit(say: Say) -> Kit:
    return make_kit(AMD64, say)


def check_driver(guest: Guest, *, indirect: bool) -> None:
    """The bits are in use, and the driver had nothing to complain of."""
    features = checked(guest, "cat /sys/bus/virtio/devices/virtio*/features").strip()
    assert features[virtio.VIRTIO_F_IN_ORDER] == "1"
    assert features[virtio.VIRTIO_F_INDIRECT_DESC] == str(int(indirect))
    messages = checked(guest, "dmesg")
    assert "is not a head" not in messages
    assert "I/O error" not in messages


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_linux_keeps_many_requests_in_flight_in_order(
    kit: Kit, tmp_path: Path, indirect: bool
) -> None:
    options = [f"--add-features={IN_ORDER}", "--pause=0.2"]
    if not indirect:
        options.append(f"--remove-features={INDIRECT}")
    with ExitStack() as stack:
        blk = BlkDaemon(tmp_path, "fast", SECTORS, 1, *options)
        stack.callback(blk.kill)
        blk.start()
        line = command_line(kit, blk.socket_path, 1)
        assert line[-1].endswith("queue-size=64")
        line[-1] = line[-1].replace("queue-size=64", "queue-size=1024,in_order=on")
        guest = stack.enter_context(Guest(line))
        checked(guest, "insmod /virtio_blk.ko && test -b /dev/vda")
        guest.put_file("script", SCRIPT.encode())
        most = checked(guest, "sh script")
        assert int(most) >= DEEP
        digest = checked(guest, "sha256sum <data").split()[0]
        assert hashlib.sha256(blk.image.read_bytes()).hexdigest() == digest
        check_driver(guest, indirect=indirect)


def test_rpmb_is_offered_in_order_with_indirect_descriptors(kit: Kit, tmp_path: Path) -> None:
    daemon = installed_daemon(tmp_path, "fast")
    daemon.start()
    try:
        with VirtualMachine(kit, daemon.socket_path) as vm:
            vm.put_file("key", KEY)
            checked(vm, "mmc rpmb write-key /dev/rpmb0 key && head -c 256 /dev/zero >block")
            for address in range(3):
                checked(vm, f"mmc rpmb write-block /dev/rpmb0 {address} block key")
            assert checked(vm, "mmc rpmb read-counter /dev/rpmb0") == "Counter value: 0x00000003"
            check_driver(vm, indirect=True)
    finally:
        daemon.kill()
