# SPDX-License-Identifier: Apache-2.0
"""A connection continues when the daemon is restarted or killed: requests and messages."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import denied
from tests.support.daemon import SANDBOX, is_stopped, until
from tests.support.faulty import Faults
from tests.support.oracle import FRAME_SIZE, KEY, OK, split
from tests.support.supervised import Supervised
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb.errors import RpmbResultError
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MemoryRegion, Request, VringState

SIGNALS = [signal.SIGTERM, signal.SIGKILL]


@pytest.fixture
def memory() -> Iterator[int]:
    """The file of more guest memory."""
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 8192)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_requests_continue_over_restarts(supervised: Supervised, number: int) -> None:
    with supervised.client() as client:
        client.program_key(KEY)
        for counter in range(5):
            assert client.write(counter, bytes([counter]) * 256) == counter + 1
            supervised.manager.restart(number)
            assert client.read_counter() == counter + 1
            assert client.read(counter, 1) == bytes([counter]) * 256
    supervised.becomes_empty()
    with supervised.client(KEY) as client:
        assert client.read_counter() == 5


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_messages_continue_over_restarts(supervised: Supervised, number: int) -> None:
    with supervised.client() as client:
        frontend = client.frontend
        for status in range(15, 20):
            supervised.manager.restart(number)
            assert frontend.get_status() == status
            frontend.set_status(status + 1)
        assert frontend.stop_ring() == 0


def test_stop_ends_the_connection(supervised: Supervised) -> None:
    with supervised.client() as client:
        supervised.manager.stop()
        with pytest.raises(BackendError, match="the back-end closed the connection"):
            client.frontend.receive()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_open_files_are_compared_by_kcmp(
    tmp_path: Path, engine: Engine, memory: int, number: int
) -> None:
    """On Linux before 6.10. What is one file for the service manager is stored once."""
    command = denied.command(
        denied.OLD_KERNEL, "--fd=3", f"--flash-path={tmp_path / 'flash.img'}", "-v", *SANDBOX
    )
    with (
        Supervised(tmp_path, engine=engine.name, command=command) as supervised,
        supervised.client() as client,
    ):
        frontend, manager = client.frontend, supervised.manager
        manager.wait(lambda: len(manager.names) == 6)
        regions = [
            wire.pack_single_region(MemoryRegion(address, 4096, address, address))
            for address in (0, 4096)
        ]
        for region in regions:
            frontend.tell(Request.ADD_MEM_REG, region, [memory])
        manager.wait(lambda: len(manager.names) == 7)
        frontend.tell(Request.SET_VRING_ERR, wire.pack_u64(0), [client.ring.call_fd])
        manager.wait(lambda: len(manager.names) == 6)
        manager.restart(number)
        client.program_key(KEY)
        frontend.tell(Request.REM_MEM_REG, regions[0])
        manager.restart(number)
        assert client.write(0, bytes(256)) == 1
        assert len(manager.names) == 6  # the other region has the file
        frontend.tell(Request.REM_MEM_REG, regions[1])
        manager.wait(lambda: len(manager.names) == 5)
        assert not supervised.warnings


# Where the next process is when the stop comes, and how it ends: before it handles signals it dies,
# later it gives the answer that is owed first.
DURING_THE_START = {"starting": -signal.SIGTERM, "opening": 0, "restoring": 0, "restored": 0}


@pytest.mark.parametrize("point", DURING_THE_START)
def test_stop_during_the_start_after_a_kill(tmp_path: Path, engine: Engine, point: str) -> None:
    """The connection ends, and nothing else is lost: not even the answer that was owed."""
    faults = Faults(tmp_path)
    command = faults.command("--fd=3", f"--flash-path={tmp_path / 'flash.img'}", "-v", *SANDBOX)
    with Supervised(tmp_path, engine=engine.name, command=command) as supervised:
        manager = supervised.manager
        with supervised.client() as client:
            client.program_key(KEY)
            assert client.write(0, b"1" * 256) == 1
            manager.wait(lambda: len(manager.names) == 6)
            used = client.ring.used_index
            with dead_after_the_commit(supervised, faults, client):
                faults.arm(f"~{point}")
            until(lambda: is_stopped(manager.pid))
            manager.stop()
            with pytest.raises(BackendError, match="closed the connection"):
                client.frontend.receive()
            answered = client.ring.used_index == used + 1
            if answered:
                ((_, answer),) = client.answers()
                assert split(answer)[0].result == OK
        assert answered == (DURING_THE_START[point] == 0)
        assert manager.statuses == [-signal.SIGKILL, DURING_THE_START[point]]
        assert manager.names == []
        assert not supervised.warnings
        manager.start()
        with supervised.client(KEY) as client:
            if not answered:  # it was durable: repeated, it is answered and not executed
                assert client.write(1, b"2" * 256, counter=1) == 2
            with pytest.raises(RpmbResultError, match="COUNT_FAILURE"):
                client.write(1, b"2" * 256, counter=1)
            assert client.read_counter() == 2
            assert client.read(0, 2) == b"1" * 256 + b"2" * 256


def test_pause_after_a_kill_keeps_the_answer(tmp_path: Path, engine: Engine) -> None:
    """Status 0, which some devices of QEMU write at a pause, does not close the replay window."""
    faults = Faults(tmp_path)
    command = faults.command("--fd=3", f"--flash-path={tmp_path / 'flash.img'}", "-v", *SANDBOX)
    with (
        Supervised(tmp_path, engine=engine.name, command=command) as supervised,
        supervised.client() as client,
    ):
        client.program_key(KEY)
        frontend, ring, index = client.frontend, client.ring, wire.pack_u64(0)
        used = ring.used_index
        addresses = wire.VringAddress(
            0,
            0,
            *(
                ring.memory.user_address(part)
                for part in (ring.descriptor_table, ring.used_ring, ring.available_ring)
            ),
        )
        with dead_after_the_commit(supervised, faults, client, counter=0):
            frontend.send(Request.GET_VRING_BASE, bytes(8))
            frontend.send(Request.SET_STATUS, wire.pack_u64(0), flags=wire.FLAG_NEED_REPLY)
        assert frontend.receive().payload == VringState(0, used).pack()
        assert frontend.receive().payload == wire.pack_u64(0)
        assert ring.used_index == used
        frontend.tell(Request.SET_VRING_NUM, VringState(0, ring.size).pack())
        frontend.tell(Request.SET_VRING_BASE, VringState(0, used).pack())
        frontend.tell(Request.SET_VRING_ADDR, addresses.pack())
        frontend.tell(Request.SET_VRING_CALL, index, [ring.call_fd])
        frontend.tell(Request.SET_VRING_KICK, index, [ring.kick_fd])
        frontend.tell(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
        ((_, answer),) = client.answers()
        assert split(answer)[0].result == OK
        assert client.read_counter() == 1


@contextmanager
def dead_after_the_commit(
    supervised: Supervised, faults: Faults, client: RpmbClient, counter: int = 1
) -> Iterator[None]:
    """Let the daemon die when a write of a block is durable; start it again after the context."""
    manager = supervised.manager
    with manager._changed:
        manager._held = True
    faults.arm("committed")
    client.submit(client.write_request(1, b"2" * 256, counter), FRAME_SIZE)
    client.flush()
    manager.wait(lambda: not manager.pid)
    yield
    with manager._changed:
        manager._held = False
        manager._start()
