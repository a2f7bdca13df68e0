# SPDX-License-Identifier: Apache-2.0
"""The device on a VMM that is not QEMU: nothing of ours but the frames is on the other side."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.cache import Say
from tests.e2e.second_vmm import make_second_vmm
from tests.support.daemon import Daemon
from tests.support.hosts import Host, copy_options
from tests.support.oracle import (
    BLOCK_SIZE,
    KEY,
    Frame,
    mac_of,
    program_key,
    read_counter,
    read_data,
    read_result,
    split,
)
from tests.support.oracle import write_data as signed_write
from tests.support.rig import write_key
from vhost_rpmb.driver.errors import QueueError
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

CONFIG = "config [1, 32, 255]"


@pytest.fixture(scope="session")
def second_vmm(say: Say) -> Path:
    return make_second_vmm(say)


class Machine:
    """Runs the second VMM, once for each row of requests."""

    def __init__(self, program: Path, daemon: Daemon, mode: str, folder: Path) -> None:
        self._command = [str(program), str(daemon.socket_path), mode]
        self._folder = folder

    def run(self, *requests: tuple[bytes, int]) -> list[list[Frame]]:
        """Attach the device, send requests with room for so many frames, detach; the answers."""
        files = []
        for number, (request, room) in enumerate(requests):
            path = self._folder / f"request-{number}"
            path.write_bytes(request)
            files += [str(path), str(room * spec.FRAME_SIZE)]
        done = subprocess.run([*self._command, *files], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [CONFIG, f"stopped at {len(requests)}"]
        return [split(Path(f"{name}.answer").read_bytes()) for name in files[::2]]


def test_dirty_log_on_another_vmm(second_vmm: Path, daemon: Daemon, tmp_path: Path) -> None:
    """It checks after each request that the used ring and the answer are marked, nothing else."""
    daemon.command_line.append("--migration=copy")
    daemon.start()
    machine = Machine(second_vmm, daemon, "log", tmp_path)
    blocks = [os.urandom(BLOCK_SIZE) for _ in range(32)]
    (programmed,), (written,), read, _ = machine.run(
        (program_key() + read_result(), 1),
        (signed_write(0, 5, *blocks) + read_result(), 1),
        (read_data(5, 32, bytes(16)), 32),
        (program_key(bytes(32)), 0),
    )
    assert programmed.result == written.result == 0
    assert [frame.data for frame in read] == blocks
    daemon.stop()


def test_device_moves_on_another_vmm(second_vmm: Path, engine: Engine, tmp_path: Path) -> None:
    """The messages around the state are the crate's, the two of the state those of the program."""
    write_key(tmp_path / "migration.key", bytes(range(32)))
    options = [
        *copy_options(tmp_path / "fence"),
        f"--migration-key={tmp_path / 'migration.key'}",
    ]
    source = Host(tmp_path / "source", *options, engine=engine.name)
    destination = Host(tmp_path / "there", *options, engine=engine.name, incoming=True)
    state = tmp_path / "state"
    blocks = [os.urandom(BLOCK_SIZE) for _ in range(32)]
    try:
        source.start()
        Machine(second_vmm, source, f"save={state}", tmp_path).run(
            (program_key() + read_result(), 1),
            (signed_write(0, 5, *blocks) + read_result(), 1),
        )
        assert blocks[0] in state.read_bytes()
        destination.start()
        (counted,), read, (written,) = Machine(
            second_vmm, destination, f"load={state}", tmp_path
        ).run(
            (read_counter(bytes(16)), 1),
            (read_data(5, 32, bytes(16)), 32),
            (signed_write(1, 0, blocks[0]) + read_result(), 1),
        )
        assert (counted.result, counted.write_counter) == (0, 1)
        assert counted.key_mac == mac_of(counted)
        assert [frame.data for frame in read] == blocks
        assert (written.result, written.write_counter) == (0, 2)
        with source.machine(KEY) as machine, pytest.raises(QueueError):
            machine.read_counter()
    finally:
        source.kill()
        destination.kill()


@pytest.mark.parametrize("memory", ["table", "slots"])
def test_device_on_another_vmm(
    second_vmm: Path, daemon: Daemon, memory: str, tmp_path: Path
) -> None:
    machine = Machine(second_vmm, daemon, memory, tmp_path)
    blocks = [os.urandom(BLOCK_SIZE) for _ in range(32)]
    write = signed_write(0, 5, *blocks)
    nonce = os.urandom(spec.NONCE_SIZE)

    daemon.start()
    ((counter,), (programmed,), (counted,), (written,), read, nothing) = machine.run(
        (read_counter(nonce), 1),
        (program_key() + read_result(), 1),
        (read_counter(nonce), 1),
        (write + read_result(), 1),
        (read_data(5, 32, nonce), 32),
        (program_key(bytes(32)), 0),
    )
    assert counter.result == spec.VIRTIO_RPMB_RES_NO_AUTH_KEY
    assert (programmed.req_resp, programmed.result) == (spec.VIRTIO_RPMB_RESP_PROGRAM_KEY, 0)
    assert (counted.result, counted.write_counter, counted.nonce) == (0, 0, nonce)
    assert (written.result, written.write_counter, written.address) == (0, 1, 5)
    assert [frame.data for frame in read] == blocks
    assert all(frame.result == 0 and frame.nonce == nonce for frame in read)
    assert not nothing
    for answer in ([programmed], [counted], [written], read):
        assert answer[-1].key_mac == mac_of(*answer)

    daemon.kill()
    daemon.start()
    # The write might not have been answered: it may come again once.
    ((repeated,), (refused,), (counted,), again) = machine.run(
        (write + read_result(), 1),
        (write + read_result(), 1),
        (read_counter(), 1),
        (read_data(5, 32, nonce), 32),
    )
    assert (repeated.result, repeated.write_counter) == (0, 1)
    assert (refused.result, refused.write_counter) == (spec.VIRTIO_RPMB_RES_COUNT_FAILURE, 1)
    assert counted.write_counter == 1
    assert again == read
    daemon.stop()
    assert daemon.flash_path.read_bytes()[5 * BLOCK_SIZE :][: 32 * BLOCK_SIZE] == b"".join(blocks)
