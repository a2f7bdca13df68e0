# SPDX-License-Identifier: Apache-2.0
"""The device in a real guest: QEMU, Linux, our guest driver and the unmodified mmc tool."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.kit import AMD64, ARM64, Kit
from tests.e2e.monitor import Monitor
from tests.e2e.story import (
    COUNT_FAILURE,
    KEY,
    LETTER,
    OK,
    GuestStage,
    check_write_answer,
    tell,
    write_frames,
)
from tests.e2e.vm import VirtualMachine, succeed
from tests.support.daemon import Daemon
from tests.support.documents import demo_of_readme
from tests.support.oracle import BLOCK_SIZE, read_result

# The first test may have to make the kit.
pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]
# Which guest it is makes no difference to an engine that has passed with the other one.
on_each_guest = pytest.mark.parametrize(
    ("kit", "daemon"),
    [
        pytest.param(AMD64, "fast", id="amd64-fast"),
        pytest.param(AMD64, "pure", id="amd64-pure"),
        pytest.param(ARM64, "fast", id="arm64-fast"),
        pytest.param(ARM64, "pure", id="arm64-pure", marks=pytest.mark.long),
    ],
    indirect=True,
)


def counter(vm: VirtualMachine) -> int:
    output = succeed(vm, "mmc rpmb read-counter /dev/rpmb0")
    assert output.startswith("Counter value: 0x")
    return int(output.removeprefix("Counter value: "), 16)


def read_blocks(vm: VirtualMachine, address: int, count: int) -> bytes:
    succeed(vm, f"rm -f out && mmc rpmb read-block /dev/rpmb0 {address} {count} out key")
    return vm.get_file("out")


def program_key(vm: VirtualMachine) -> None:
    vm.put_file("key", KEY)
    succeed(vm, "mmc rpmb write-key /dev/rpmb0 key")


@on_each_guest
def test_story(kit: Kit, daemon: Daemon) -> None:
    transcript: list[str] = []
    tell(GuestStage(kit, daemon), transcript.append)
    print(*transcript, sep="\n")
    if kit.architecture is AMD64:  # the one of the demo
        lines = iter("\n".join(transcript).splitlines())
        for shown in demo_of_readme():
            assert shown in lines, f"the README shows a line that is not next in the demo: {shown}"


@on_each_guest
def test_daemon_killed_while_the_guest_writes(kit: Kit, daemon: Daemon) -> None:
    """What the guest was told is written is there after the daemon died at any moment."""
    blocks = 200
    daemon.start()
    with VirtualMachine(kit, daemon.socket_path) as vm:
        program_key(vm)
        succeed(
            vm,
            f"(for i in $(seq 0 {blocks - 1}); do"
            ' printf "%-256d" $i | mmc rpmb write-block /dev/rpmb0 $i - key || break;'
            " echo $i >> told; done) > /dev/null 2>&1 &",
        )
        while vm.run("test -s told && test $(wc -l < told) -ge 10")[0] != 0:
            time.sleep(0.05)
        daemon.kill()
        told = int(succeed(vm, "wc -l < told"))
    assert 10 <= told < blocks

    daemon.start()
    with VirtualMachine(kit, daemon.socket_path) as vm:
        vm.put_file("key", KEY)
        # One more may have been durable, its answer on the way.
        written = counter(vm)
        assert written in (told, told + 1)
        expected = b"".join(b"%-256d" % number for number in range(written))
        assert read_blocks(vm, 0, blocks) == expected.ljust(blocks * BLOCK_SIZE, b"\0")
        succeed(vm, "head -c 256 out > data && mmc rpmb write-block /dev/rpmb0 511 data key")
        assert counter(vm) == written + 1
    daemon.stop()


@on_each_guest
def test_guest_reboots_and_the_daemon_goes_on(kit: Kit, daemon: Daemon) -> None:
    daemon.start()
    with VirtualMachine(kit, daemon.socket_path) as vm:
        program_key(vm)
        vm.put_file("data", LETTER)
        succeed(vm, "mmc rpmb write-block /dev/rpmb0 7 data key")
        vm.reboot()
        vm.put_file("key", KEY)
        assert counter(vm) == 1
        assert read_blocks(vm, 7, 1) == LETTER
        vm.put_file("data", LETTER)
        succeed(vm, "mmc rpmb write-block /dev/rpmb0 8 data key")
        assert counter(vm) == 2
    daemon.stop()


@contextmanager
def monitored(kit: Kit, daemon: Daemon) -> Iterator[tuple[VirtualMachine, Monitor]]:
    """A virtual machine, and the monitor of its QEMU."""
    path = daemon.folder / "monitor.sock"
    with VirtualMachine(kit, daemon.socket_path, path) as vm, Monitor(path) as monitor:
        yield vm, monitor


@on_each_guest
def test_monitor_commands(kit: Kit, daemon: Daemon) -> None:
    """The device works after each, and QEMU goes on: it aborts where dirty logging is refused."""
    daemon.start()
    with monitored(kit, daemon) as (vm, monitor):
        program_key(vm)
        write_and_read(vm, 0)
        for _ in range(2):  # the log is started and ended each time
            assert monitor.dirty_rate()["mode"] == "dirty-bitmap"
            write_and_read(vm, counter(vm))
        monitor.execute("stop")
        assert monitor.execute("query-status")["status"] == "paused"
        monitor.execute("cont")
        write_and_read(vm, 3)
        driver = "/sys/bus/virtio/drivers/virtio_rpmb"
        succeed(vm, f"echo virtio0 > {driver}/unbind; echo virtio0 > {driver}/bind")
        write_and_read(vm, 4)
        vm.reboot_by(lambda: monitor.execute("system_reset"))
        vm.put_file("key", KEY)
        write_and_read(vm, 5)
        assert monitor.dirty_rate()["mode"] == "dirty-bitmap"
        write_and_read(vm, 6)
        assert read_blocks(vm, 0, 7) == b"".join(b"%-256d" % number for number in range(7))
        assert not re.search("WARNING: |BUG: |Oops: ", succeed(vm, "dmesg"))
    daemon.stop()
    assert "front-end disconnected, it broke" not in daemon.log
    assert "refused" not in daemon.log


@on_each_guest
def test_dirty_log_of_the_monitor(kit: Kit, daemon: Daemon) -> None:
    """With the log that --migration offers; QEMU starts and ends it under requests."""
    daemon.command_line += ["--migration=copy", "--verbose"]
    daemon.start()
    with monitored(kit, daemon) as (vm, monitor):
        program_key(vm)
        for number in range(2):
            assert monitor.dirty_rate()["mode"] == "dirty-bitmap"
            write_and_read(vm, number)
        assert not re.search("WARNING: |BUG: |Oops: ", succeed(vm, "dmesg"))
    daemon.stop()
    assert re.search("SET_LOG_BASE: flags 0x[19], 16 bytes, 1 file descriptors", daemon.log)
    assert "not complete" not in daemon.log
    assert "refused" not in daemon.log


def write_and_read(vm: VirtualMachine, number: int) -> None:
    """Write the block of this number, the first with this counter, and read it."""
    block = b"%-256d" % number
    vm.put_file("data", block)
    succeed(vm, f"mmc rpmb write-block /dev/rpmb0 {number} data key")
    assert counter(vm) == number + 1
    assert read_blocks(vm, number, 1) == block


@pytest.mark.parametrize("daemon", ["fast"], indirect=True)
def test_guest_driver(kit: Kit, daemon: Daemon) -> None:
    """What the mmc tool does not use of the driver: other shapes, limits, loss of the device."""
    daemon.command_line.append("--max-read-blocks=0")
    daemon.start()
    with VirtualMachine(kit, daemon.socket_path) as vm:
        program_key(vm)
        _one_command_an_ioctl(vm)
        _failures_fill_the_answer(vm)
        _result_in_more_blocks(vm)
        _largest_read(vm)
        _wrong_commands(vm)
        _silent_device(vm, daemon)
        _device_goes_away(vm)
        assert not re.search("WARNING: |BUG: |Oops: ", succeed(vm, "dmesg"))
    daemon.stop()


def _one_command_an_ioctl(vm: VirtualMachine) -> None:
    """Frames may come with an ioctl each, the write request's without a read command behind it."""
    for number in range(2):
        vm.put_file("write", write_frames(KEY, counter=number, address=number, data=LETTER))
        succeed(vm, "rpmb-send -s /dev/rpmb0 1 < write > answer")
        assert check_write_answer(KEY, vm.get_file("answer")) == (OK, number + 1)
    succeed(vm, "head -c 512 write > alone && rpmb-send -s /dev/rpmb0 0 < alone")
    vm.put_file("result", read_result())
    succeed(vm, "rpmb-send /dev/rpmb0 1 < result > answer")
    assert check_write_answer(KEY, vm.get_file("answer")) == (COUNT_FAILURE, 2)


def _failures_fill_the_answer(vm: VirtualMachine) -> None:
    """A failure has one frame, but a tool looks at the last one it asked for."""
    status, output = vm.run("mmc rpmb read-block /dev/rpmb0 510 3 nothing")
    assert (status, output) == (1, "RPMB operation failed, retcode 0x0004")


def _result_in_more_blocks(vm: VirtualMachine) -> None:
    """tee-supplicant asks for the result of a write in as many blocks as the write had.

    Its buffer is one frame, of which it fills in the type: the other blocks are other memory.
    """
    stale = bytearray(read_result())
    stale[506:508] = (8).to_bytes(2)  # block_count
    vm.put_file("results", bytes(stale) * 3)
    vm.put_file("more", write_frames(KEY, counter=2, address=2, data=LETTER)[:512] + stale * 3)
    succeed(vm, "rpmb-send /dev/rpmb0 1 < more > answer")
    assert check_write_answer(KEY, vm.get_file("answer")) == (OK, 3)
    succeed(vm, "rpmb-send /dev/rpmb0 3 < results > answer")
    answers = vm.get_file("answer")
    assert answers == answers[:512] * 3
    assert check_write_answer(KEY, answers[:512]) == (OK, 3)


def _largest_read(vm: VirtualMachine) -> None:
    """OP-TEE reads an object of 65,280 bytes that starts within a block as 256 blocks at once."""
    vm.put_file("write", write_frames(KEY, counter=3, address=255, data=LETTER))
    succeed(vm, "rpmb-send /dev/rpmb0 1 < write > answer")
    assert check_write_answer(KEY, vm.get_file("answer")) == (OK, 4)
    assert read_blocks(vm, 0, 256) == LETTER * 3 + bytes(252 * BLOCK_SIZE) + LETTER
    # No limit but the size of the device: mmc verifies the MAC of all of it.
    succeed(vm, "rm -f all && mmc rpmb read-block /dev/rpmb0 0 512 all key")
    succeed(vm, "test $(wc -c < all) = 131072 && head -c 65536 all | cmp - out")


def _wrong_commands(vm: VirtualMachine) -> None:
    for command, error in (
        ("rpmb-send /dev/rpmb0 513 < result", "Value too large"),
        ("rpmb-send /dev/rpmb0 1 < alone", "Invalid argument"),  # nothing asks for an answer
        ("for i in $(seq 257); do cat alone; done | rpmb-send /dev/rpmb0 0", "Value too large"),
        ("mmc extcsd read /dev/rpmb0", "Invalid argument"),
        ("blockdev --getsz /dev/rpmb0", ""),
    ):
        status, output = vm.run(command)
        assert status != 0, command
        assert error in output


def _silent_device(vm: VirtualMachine, daemon: Daemon) -> None:
    """A request given up on leaves its buffers with the device; the next one waits for them."""
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        assert vm.run("timeout 1 mmc rpmb read-counter /dev/rpmb0")[0] == 128 + signal.SIGTERM
        assert vm.run("timeout 1 mmc rpmb read-counter /dev/rpmb0")[0] == 128 + signal.SIGTERM
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert counter(vm) == 4


def _device_goes_away(vm: VirtualMachine) -> None:
    """An open file outlives its device; the device can be bound again."""
    driver = "/sys/bus/virtio/drivers/virtio_rpmb"
    succeed(vm, f"exec 3<>/dev/rpmb0; echo virtio0 > {driver}/unbind; test ! -e /dev/rpmb0")
    succeed(vm, f"echo virtio0 > {driver}/bind; test -c /dev/rpmb0")
    assert counter(vm) == 4
    succeed(vm, "rmmod virtio_rpmb && test ! -e /dev/rpmb0 && insmod /virtio_rpmb.ko")
    assert counter(vm) == 4
