# SPDX-License-Identifier: Apache-2.0
"""Attributes of the process that both programs set at their start: signals, access to memory."""

import resource
import signal

__all__ = ["hide_memory", "reset_signals"]

_PR_SET_DUMPABLE = 4  # prctl(2)

# Both have handlers or report an invalid access: ignored, neither would work.
_NEEDED = (signal.SIGALRM, signal.SIGBUS)


def reset_signals() -> None:
    """Reset what the parent left: unblock all signals, and ignore none that the program needs.

    Others stay ignored: nohup ignores SIGHUP, and a shell's & ignores SIGINT, on purpose.
    """
    # Before the loop, so that a pending signal that is ignored is dropped.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in _NEEDED:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def hide_memory() -> None:
    """Keep memory out of core dumps, and away from debuggers of the same user."""
    from vhost_rpmb import libc  # imported lazily: not needed for --help

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(_PR_SET_DUMPABLE, 0)
