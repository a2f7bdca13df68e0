# SPDX-License-Identifier: Apache-2.0
"""What a process inherits of signals: the mask, and which of them are ignored."""

import signal

__all__ = ["reset_inherited"]

# Ours have handlers, or are the kernel's word on a bad access: ignored, neither would work.
_NEEDED = (signal.SIGALRM, signal.SIGBUS)


def reset_inherited() -> None:
    """Undo what the parent left: no signal is blocked, and none that this program needs ignored.

    Others stay ignored: nohup ignores SIGHUP, and a shell's & SIGINT, on purpose.
    """
    # First of all, so that one that waits while it is ignored is dropped.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in _NEEDED:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
