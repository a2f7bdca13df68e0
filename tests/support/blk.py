# SPDX-License-Identifier: Apache-2.0
"""A second device for the vhost-user part: virtio-blk on a file, one request after the other.

It shows that `vhost_rpmb.vhost_user` and the rings of both engines know no device: it is written
against `vhost_rpmb.vhost_user.interfaces` only. Run as a program it serves a socket until SIGTERM::

    python -m tests.support.blk --socket=blk.sock --image=disk.img --engine=fast --queues=1
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.support.daemon import SANDBOX, environment, until
from vhost_rpmb import engine, log
from vhost_rpmb.daemon.descriptors import DescriptorStore
from vhost_rpmb.daemon.eventloop import EventLoop, StopSignals
from vhost_rpmb.daemon.handover import Handover
from vhost_rpmb.daemon.listener import open_socket
from vhost_rpmb.daemon.notify import Notifier
from vhost_rpmb.daemon.server import Server
from vhost_rpmb.vhost_user.interfaces import Virtqueue
from vhost_rpmb.virtio import spec as virtio

# Virtio specification, "Block Device".
VIRTIO_BLK_F_SIZE_MAX = 1
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_MQ = 12
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2
SECTOR_SIZE = 512
ID_SIZE = 20

SIZE_MAX = 64 << 10  # bytes of a segment
SEG_MAX = 16
REQUEST = struct.Struct("<IIQ")  # type, reserved, sector
MAX_BYTES = REQUEST.size + SIZE_MAX * SEG_MAX + 1
MAX_CHAINS = 16  # of a batch
# capacity, size_max, seg_max, then up to num_queues geometry, sizes, topology and cache mode.
CONFIG = struct.Struct("<QII18xH")


class BlkDevice:
    """A block device of any number of queues on an open file."""

    pause = 0.0  # seconds before each batch, for requests to collect

    def __init__(self, fd: int, num_queues: int = 1) -> None:
        self._fd = fd
        self._sectors = os.fstat(fd).st_size // SECTOR_SIZE
        self.num_queues = num_queues
        self.features = (
            1 << virtio.VIRTIO_F_VERSION_1
            | 1 << virtio.VIRTIO_F_INDIRECT_DESC
            | 1 << virtio.VIRTIO_F_EVENT_IDX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_FLUSH
            | (num_queues > 1) << VIRTIO_BLK_F_MQ
        )

    @property
    def config(self) -> bytes:
        return CONFIG.pack(self._sectors, SIZE_MAX, SEG_MAX, self.num_queues)

    def process(self, queue: Virtqueue) -> int:
        time.sleep(self.pause)
        return queue.answer_chains(self._answer, MAX_BYTES, MAX_CHAINS)

    journal: memoryview | None = None

    def reset(self) -> None:
        """There is nothing but the file."""

    def restore_register(self, used_index: int) -> None:
        """There is no register."""

    def clear_register(self) -> None:
        """There is no register."""

    def _answer(self, request: bytes, room: int) -> bytes:
        """Serve one request; the status is the last byte of the answer."""
        if len(request) < REQUEST.size or not room:
            return b""
        kind, _, sector = REQUEST.unpack_from(request)
        data = request[REQUEST.size :]
        length = len(data) if kind == VIRTIO_BLK_T_OUT else room - 1
        status, answer = VIRTIO_BLK_S_OK, b""
        if kind in (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT) and (
            length % SECTOR_SIZE or sector + length // SECTOR_SIZE > self._sectors
        ):
            status = VIRTIO_BLK_S_IOERR
        elif kind == VIRTIO_BLK_T_IN:
            answer = os.pread(self._fd, length, sector * SECTOR_SIZE)
        elif kind == VIRTIO_BLK_T_OUT:
            os.pwrite(self._fd, data, sector * SECTOR_SIZE)
        elif kind == VIRTIO_BLK_T_FLUSH:
            os.fdatasync(self._fd)
        elif kind == VIRTIO_BLK_T_GET_ID:
            answer = b"vhost-user test disk"[:ID_SIZE]
        else:
            status = VIRTIO_BLK_S_UNSUPP
        return answer.ljust(room - 1, b"\0") + bytes([status])


class BlkDaemon:
    """The device as a process, to be killed and started again on the same socket and image."""

    def __init__(
        self, folder: Path, engine: str, sectors: int, queues: int = 1, *options: str
    ) -> None:
        self.socket_path = folder / "blk.sock"
        self.image = folder / "disk.img"
        self.image.touch()
        os.truncate(self.image, sectors * SECTOR_SIZE)
        self.starts = 0
        self._command = [
            *(sys.executable, "-m", "tests.support.blk", f"--socket={self.socket_path}"),
            *(f"--image={self.image}", f"--engine={engine}", f"--queues={queues}"),
            *options,
        ]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _log(self) -> Path:
        return self._folder / f"blk-{self.starts}.log"

    @property
    def log(self) -> str:
        """What the latest process logged: a line for each message."""
        return self._log.read_text() if self.starts else ""

    def start(self) -> None:
        """Start it and wait until it listens."""
        self.starts += 1
        with self._log.open("wb") as log_file:
            self._process = process = subprocess.Popen(
                self._command,
                cwd=Path(__file__).parents[2],
                env=environment(SANDBOX),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
            )
        until(lambda: "listening on" in self.log or process.poll() is not None)
        assert process.poll() is None, self.log

    def wait_for(self, text: str) -> None:
        """Wait until the process has logged a text, and still runs."""
        process = self._process
        assert process is not None
        until(lambda: text in self.log or process.poll() is not None)
        assert process.poll() is None, self.log

    def kill(self) -> None:
        """End it by SIGKILL; it had not ended by itself."""
        if self._process is not None:
            assert self._process.poll() is None, self.log
            self._process.kill()
            self._process.wait()
            self._process = None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--image", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--queues", type=int, required=True)
    parser.add_argument("--add-features", type=int, default=0, help="a mask")
    parser.add_argument("--remove-features", type=int, default=0, help="a mask")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before each batch")
    options = parser.parse_args()
    log.configure("blk", verbosity=2)
    with ExitStack() as stack:
        loop = EventLoop(patience=1)
        stack.callback(loop.close)
        stop = StopSignals(loop)
        stack.callback(stop.close)
        image = stack.enter_context(open(options.image, "r+b"))
        device = BlkDevice(image.fileno(), options.queues)
        device.features = (device.features | options.add_features) & ~options.remove_features
        device.pause = options.pause
        sock, _ = open_socket(options.socket, None, None, stack)
        chosen = engine.load(options.engine)
        handover = Handover(DescriptorStore(Notifier({}), {}))
        server = Server(
            *(loop, sock, device, chosen, handover), listening=True, once=False, poll_us=0
        )
        stack.callback(server.close)
        server.listen()
        while not stop.requested:
            loop.wait(0 if server.pending else None)
            server.run()


if __name__ == "__main__":
    main()
