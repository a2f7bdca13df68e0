# SPDX-License-Identifier: Apache-2.0
"""Functions of the C library that Python's ``os`` module lacks, through ctypes."""

import ctypes
import os

__all__ = ["check", "library", "prctl"]

library = ctypes.CDLL(None, use_errno=True)
library.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def check(result: int) -> int:
    """Return the result of a call into the library; OSError from errno if it is negative."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, value: int) -> None:
    """Set an attribute of the process by the system call of this name."""
    check(library.prctl(option, value, 0, 0, 0))
