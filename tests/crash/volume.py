# SPDX-License-Identifier: Apache-2.0
"""A daemon on a file system that is full, then read-only: run as a program, under ``unshare -rm``.

``python -m tests.crash.volume FOLDER``: mounts a small tmpfs on the folder, which nobody else sees.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon import PATIENCE
from tests.support.oracle import KEY
from tests.support.rig import make_image
from vhost_rpmb.driver.errors import RpmbResultError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.testing import RunningDevice

BLOCKS = 32  # in each write


class Volume:
    """A mounted folder and the device in it."""

    def __init__(self, folder: Path, outside: Path) -> None:
        self.folder = folder
        self.flash = folder / "flash.img"
        self.filler = folder / "filler"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", folder], check=True)
        # Socket and log stand outside, and an image that is not used.
        self._device = RunningDevice(outside)
        given = self._device.command_line.index(f"--flash-path={self._device.flash_path}")
        self._device.command_line[given] = f"--flash-path={self.flash}"

    @contextmanager
    def served(self) -> Iterator[RpmbClient]:
        """Serve the device to a client; killed at the end."""
        try:
            self._device.start()
            with self._device.client(KEY) as client:
                yield client
        finally:
            self._device.kill()

    def refused(self) -> str:
        """Start the daemon, which has to end with one line; return it."""
        done = subprocess.run(
            self._device.command_line, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode in (1, 2), done
        (line,) = done.stderr.splitlines()
        return line

    def fill(self) -> None:
        with self.filler.open("ab", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass


def pattern(counter: int) -> bytes:
    return counter.to_bytes(4, "big") * 64 * BLOCKS


def write(client: RpmbClient, counter: int) -> bool:
    """Write blocks that tell the counter; return whether that could be made durable."""
    try:
        assert client.write(counter * BLOCKS % 4096, pattern(counter), counter) == counter + 1
    except RpmbResultError as error:
        if error.result != spec.VIRTIO_RPMB_RES_WRITE_FAILURE:
            raise
        return False
    return True


def check(client: RpmbClient, counter: int) -> None:
    assert client.read_counter() == counter
    last = counter - 1
    assert client.read(last * BLOCKS % 4096, BLOCKS) == pattern(last)
    before = counter - 4096 // BLOCKS  # where the next write, or the one that failed, goes to
    old = pattern(before) if before >= 0 else bytes(256 * BLOCKS)
    assert client.read(counter * BLOCKS % 4096, BLOCKS) == old


def main(folder: Path, outside: Path) -> None:
    volume = Volume(folder, outside)
    volume.fill()
    make_image(volume.flash, 8)
    print("a new device:", volume.refused())
    assert sorted(os.listdir(folder)) == ["filler", "flash.img"]
    volume.filler.unlink()

    counter = 0
    with volume.served() as client:
        client.program_key(KEY)
        assert write(client, counter)
        counter += 1
        volume.fill()
        while write(client, counter):  # as long as the log has room
            counter += 1
            assert counter < 1000
        for _ in range(3):
            assert not write(client, counter)
            check(client, counter)
        os.truncate(volume.filler, volume.filler.stat().st_size - 1024 * 1024)
        assert write(client, counter), "there is room again"
        counter += 1
        check(client, counter)
        volume.fill()
        while write(client, counter):
            counter += 1
        check(client, counter)
    volume.fill()
    print("a killed device:", volume.refused())
    volume.filler.unlink()
    with volume.served() as client:
        check(client, counter)

    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    print("read-only:", volume.refused())
    report = verify(Paths.resolve(str(volume.flash)))
    assert (report.counter, report.damaged, report.clean) == (counter, [], False)
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    with volume.served() as client:
        check(client, counter)
        assert write(client, counter)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(sys.argv[1]), Path(name))
