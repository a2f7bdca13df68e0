# SPDX-License-Identifier: Apache-2.0
"""QEMU's vhost-user-blk-pci, which reconnects, on the block device of the tests under SIGKILL.

It is the stock front-end that uses what a back-end offers for a crash: after a disconnect it
connects again and starts its rings anew, while the guest's requests wait.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.cache import Say
from tests.e2e.kit import AMD64, Kit, make_kit
from tests.e2e.vm import Guest
from tests.support.blk import SECTOR_SIZE, BlkDaemon
from vhost_rpmb.virtio import spec as virtio

KILLS = int(os.environ.get("VHOST_RPMB_BLK_KILLS", "12"))
WRITERS = 4  # processes in the guest
AREA = 512 << 10  # bytes of the disk for each of them
REQUEST = 16 << 10
SECTORS = WRITERS * AREA // SECTOR_SIZE
# Writes an area with direct I/O, reads it back and compares, until told to stop; the content is new
# each time. $1: the number of the area.
WRITER = f"""\
rounds=0 start=$(($1 * {AREA // REQUEST}))
while ! test -e stop; do
	yes "writer $1 round $rounds" | head -c {AREA} >data$1
	dd bs={REQUEST} if=data$1 of=/dev/vda seek=$start conv=notrunc oflag=direct &&
	dd bs={REQUEST} if=/dev/vda of=back$1 skip=$start count={AREA // REQUEST} iflag=direct &&
	cmp data$1 back$1 || break
	rounds=$((rounds + 1))
	echo $rounds >new$1 && mv new$1 rounds$1
done >log$1 2>&1
echo ended >ended$1
"""

# The test may have to make the kit.
pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900 + 20 * KILLS)]


@pytest.fixture(scope="module")
def kit(say: Say) -> Kit:
    return make_kit(AMD64, say)


def command_line(kit: Kit, socket_path: Path, queues: int) -> list[str]:
    return [
        *kit.qemu,
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "mon:stdio"),
        *(*kit.architecture.machine, "-smp", str(queues)),
        *("-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-m", "256"),
        *("-kernel", str(kit.kernel), "-initrd", str(kit.initramfs)),
        *("-append", f"console={kit.architecture.console} quiet"),
        *("-chardev", f"socket,id=c,path={socket_path},reconnect-ms=100"),
        *("-device", f"vhost-user-blk-pci,chardev=c,num-queues={queues},queue-size=64"),
    ]


def checked(guest: Guest, command: str) -> str:
    status, output = guest.run(command)
    assert status == 0, f"{command}: {output}"
    return output


def rounds(guest: Guest) -> list[int]:
    """How often each writer has compared its area."""
    return [int(line) for line in checked(guest, "cat rounds*").split()]


def wait_for_rounds(guest: Guest, least: int) -> None:
    """Wait until each writer has done so many rounds more; none has ended."""
    before = rounds(guest)
    while any(now < then + least for now, then in zip(rounds(guest), before, strict=True)):
        checked(guest, "sleep 0.1; ! cat ended*")


@pytest.mark.parametrize(
    ("engine", "queues", "packed"),
    [("fast", 1, False), ("pure", 2, False), ("fast", 2, True), ("pure", 1, True)],
)
def test_no_request_fails_while_the_device_is_killed(
    kit: Kit, tmp_path: Path, engine: str, queues: int, packed: bool
) -> None:
    source = random.Random(queues)
    options = [f"--add-features={1 << virtio.VIRTIO_F_RING_PACKED}"] if packed else []
    with ExitStack() as stack:
        blk = BlkDaemon(tmp_path, engine, SECTORS, queues, *options)
        stack.callback(blk.kill)
        blk.start()
        line = command_line(kit, blk.socket_path, queues)
        line[-1] += ",packed=on" if packed else ""
        guest = stack.enter_context(Guest(line))
        checked(guest, "insmod /virtio_blk.ko && test -b /dev/vda")
        bits = checked(guest, "cat /sys/block/vda/device/features")
        assert bits[virtio.VIRTIO_F_RING_PACKED] == str(int(packed))
        guest.put_file("writer", WRITER.encode())
        for number in range(WRITERS):
            checked(guest, f"echo 0 >rounds{number}; sh writer {number} </dev/null &")
        for _ in range(KILLS):
            time.sleep(source.uniform(0, 0.5))
            blk.kill()
            time.sleep(source.choice([0, 0, 0.3]))
            blk.start()
            if source.random() < 0.5:  # otherwise also while QEMU sets the connection up
                blk.wait_for("SET_VRING_ENABLE")
        wait_for_rounds(guest, 1)
        assert "SET_INFLIGHT_FD" in blk.log  # the region of the processes before
        assert "GET_INFLIGHT_FD" not in blk.log
        checked(guest, "touch stop")
        for number in range(WRITERS):
            checked(guest, f"until test -e ended{number}; do sleep 0.1; done")
        errors = checked(guest, "cat log*; dmesg | grep -i -e 'I/O error' -e vda")
        assert "error" not in errors, errors
        assert "differ" not in errors, errors
        digest = checked(guest, "cat data* | sha256sum").split()[0]
    assert hashlib.sha256(blk.image.read_bytes()).hexdigest() == digest
