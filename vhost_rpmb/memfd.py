# SPDX-License-Identifier: Apache-2.0
"""Memory files that another process has too, and that nobody can shorten or extend.

An access behind the end of a file that was shortened would raise SIGBUS.
"""

import fcntl
import os

__all__ = ["create", "is_sealed"]

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, size: int, *, sealed: bool = True) -> int:
    """Create a memory file of ``size`` bytes; return its descriptor. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_sealed(fd: int) -> bool:
    """Whether the size of a memory file is final; OSError for another kind of file."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
