# SPDX-License-Identifier: Apache-2.0
"""The fence folder: which host owns a generation of a device is decided there, once.

All hosts see the folder. The host that first gives its file the name DEVICE.GENERATION owns that
generation. A file gets the name when its content is durable, so that a host which ends in between
recognises its own claim.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress

from vhost_rpmb.storage.interface import Access
from vhost_rpmb.storage.local.files import new_file, sync_folder, write_all

__all__ = ["Fence"]

_HOST = socket.gethostname()  # before a sandbox, which does not allow to ask
_ACCESS = Access.CREATE | Access.REMOVE | Access.WRITE | Access.SYNC | Access.READ | Access.LINK


class Fence:
    """Claims in one folder; OSError if it cannot be used."""

    def __init__(self, folder: str) -> None:
        self._folder = os.path.realpath(folder)

    @property
    def folders(self) -> Mapping[str, Access]:
        """The folder and the access that is needed there."""
        return {self._folder: _ACCESS}

    def claim(self, name: str, generation: int, claim: bytes) -> bool:
        """Own a generation durably; return whether it is owned by this claim."""
        path = self._path(name, generation)
        mine = f"{path}.{claim.hex()}"
        with suppress(FileNotFoundError):
            os.unlink(mine)  # of an attempt that was interrupted
        with new_file(mine) as fd:
            write_all(fd, f"{claim.hex()} {_HOST}\n".encode())
        try:
            os.link(mine, path)
        except FileExistsError:
            return self._is(path, claim)
        finally:
            os.unlink(mine)
            sync_folder(mine)
        return True

    def taken(self, name: str, generation: int) -> bool:
        """Whether a host owns a generation."""
        return os.path.lexists(self._path(name, generation))

    def _path(self, name: str, generation: int) -> str:
        return os.path.join(self._folder, f"{name}.{generation}")

    def _is(self, path: str, claim: bytes) -> bool:
        try:
            with open(path, "rb") as file:
                return file.read(2 * len(claim)) == claim.hex().encode()
        except PermissionError:
            return False  # of another user, thus not of this host
