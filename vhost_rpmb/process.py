# SPDX-License-Identifier: Apache-2.0
"""Attributes of the process that the programs set at their start: signals, memory, descriptors."""

import resource

from vhost_rpmb.system import signal

__all__ = ["allow_descriptors", "hide_memory", "reset_signals"]

_PR_SET_DUMPABLE = 4  # prctl(2)

# 509 memory regions, each mapped with a copy of its descriptor by Python and kept for the next
# process, with all descriptors of a message, exceed the usual soft limit of 1024.
_DESCRIPTORS = 4096


def reset_signals() -> None:
    """Unblock all signals, which the parent may have left blocked.

    A signal that it left ignored stays so until a handler is installed, as for SIGALRM and SIGBUS:
    nohup ignores SIGHUP, and a shell's & ignores SIGINT, on purpose.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def hide_memory() -> None:
    """Keep memory out of core dumps, and away from debuggers of the same user."""
    from vhost_rpmb import libc  # imported lazily: not needed for --help

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(_PR_SET_DUMPABLE, 0)


def allow_descriptors() -> None:
    """Raise the soft limit of descriptors to what a front-end can need, up to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _DESCRIPTORS:
        wanted = _DESCRIPTORS if hard < 0 else min(_DESCRIPTORS, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
