# SPDX-License-Identifier: Apache-2.0
"""As many memory regions as a front-end can have, over restarts, and more than the store has."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, SANDBOX
from tests.support.oracle import FRAME_SIZE, KEY, NO_KEY, read_counter, split
from tests.support.supervised import Supervised
from tests.support.supervisor import daemon_command
from vhost_rpmb import memfd
from vhost_rpmb.closing import Closing
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import MAX_MEM_SLOTS
from vhost_rpmb.vhost_user.wire import MemoryRegion, Request

PAGE = 4096
STEP = 16 * PAGE  # between regions, so that none adjoins another one
UNIT_LIMIT = 1024  # FileDescriptorStoreMax= of the unit
DEFAULT_NOFILE = 1024  # LimitNOFILE= of systemd, soft


@pytest.fixture(autouse=True)
def _descriptors() -> Iterator[None]:
    """This process is the front-end and the service manager: it has two for each region."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limited(folder: Path) -> list[str]:
    """The command of a daemon with the number of descriptors that a service has."""
    command = daemon_command([f"--flash-path={folder / 'flash.img'}"], "-v", *SANDBOX)
    return ["/bin/sh", "-c", f'ulimit -Sn {DEFAULT_NOFILE}; exec "$@"', "sh", *command]


class Scattered(Closing):
    """A front-end whose ring is in the first of its regions, and its buffers in all others."""

    def __init__(self, supervised: Supervised, count: int) -> None:
        self.memory = GuestMemory(
            [
                MemoryRegion(0x4000_0000 + n * STEP, PAGE, 0x7F00_0000_0000 + n * STEP, n * PAGE)
                for n in range(count)
            ]
        )
        self.ring = Ring(self.memory)
        self._pages = [region.start for region in self.memory.regions[1:]]
        self.frontend = supervised.frontend()
        self.frontend.handshake()
        self.frontend.start_device(0)
        self.frontend.share_memory(self.memory)
        self.frontend.start_ring(self.ring)

    def close(self) -> None:
        self.frontend.close()
        self.ring.close()
        self.memory.close()

    def use_all(self) -> None:
        """Send a request from each region, with its answer in another one."""
        nonces = {}
        for number, (page, other) in enumerate(zip(self._pages, self._pages[::-1], strict=True)):
            nonce = os.urandom(spec.NONCE_SIZE)
            self.memory.write(page, read_counter(nonce))
            self.memory.write(other + FRAME_SIZE, bytes(FRAME_SIZE))
            answer = Segment(other + FRAME_SIZE, FRAME_SIZE)
            nonces[self.ring.add([Segment(page, FRAME_SIZE)], [answer])] = (answer, nonce)
            if self.ring.free_descriptors < 2 or number + 1 == len(self._pages):
                self.ring.flush()
                self._take(nonces)
        assert not self.ring.in_flight

    def _take(self, nonces: dict[int, tuple[Segment, bytes]]) -> None:
        while nonces:
            for used in self.ring.wait(PATIENCE, peer=self.frontend.fileno()):
                answer, nonce = nonces.pop(used.head)
                (frame,) = split(self.memory.read(*answer))
                assert (frame.result, frame.nonce) == (NO_KEY, nonce)


@pytest.mark.parametrize(
    ("engine_name", "files"),
    [("fast", "many files"), ("pure", "many files"), ("pure", "one file")],
)
def test_all_regions_are_kept_over_restarts(
    tmp_path: Path, engine_name: str, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the limits of our unit; a service manager keeps one file only once."""
    with ExitStack() as stack:
        if files == "one file":
            whole = memfd.create("all", MAX_MEM_SLOTS * PAGE)
            stack.callback(os.close, whole)
            monkeypatch.setattr(memfd, "create", lambda *_, **__: os.dup(whole))
        supervised = stack.enter_context(
            Supervised(tmp_path, engine=engine_name, command=limited(tmp_path), limit=UNIT_LIMIT)
        )
        vm = stack.enter_context(Scattered(supervised, MAX_MEM_SLOTS))
        # The record, the connection, and the three eventfds of the vring.
        stored = 5 + (MAX_MEM_SLOTS if files == "many files" else 1)
        for number in (signal.SIGKILL, signal.SIGTERM):
            supervised.manager.restart(number)
            assert len(supervised.manager.names) == stored
            vm.use_all()
        region = vm.memory.regions[-1].place
        vm.frontend.tell(Request.REM_MEM_REG, wire.pack_single_region(region))
        supervised.manager.kill()
        vm.frontend.tell(
            Request.ADD_MEM_REG, wire.pack_single_region(region), [vm.memory.regions[-1].fd]
        )
        vm.use_all()
        vm.frontend.close()
        supervised.becomes_empty()
        assert not supervised.warnings


def test_more_regions_than_the_store_has_room_for(tmp_path: Path, engine: Engine) -> None:
    """They are served as without a store, and so is every later front-end of the process."""
    with Supervised(tmp_path, engine=engine.name, limit=12) as supervised:
        for count in (40, 2):
            with Scattered(supervised, count) as vm:
                vm.use_all()
                supervised.manager.wait(lambda: not supervised.manager.names)
        (line,) = supervised.warnings
        assert "a restart will end the connection: expected room for more than 12" in line
        with Scattered(supervised, 2) as vm:
            supervised.manager.kill()
            with pytest.raises(BackendError, match="closed the connection"):
                vm.frontend.receive()
        # The next process has a store again: a front-end that fits is kept.
        with supervised.client() as client:
            client.program_key(KEY)
            supervised.manager.kill()
            assert client.read_counter() == 0
        assert len(supervised.warnings) == 1
