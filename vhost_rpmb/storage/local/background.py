# SPDX-License-Identifier: Apache-2.0
"""A system call that may take long, in a thread, while the daemon serves."""

from __future__ import annotations

import _thread
from collections.abc import Callable

from vhost_rpmb.system import signal

__all__ = ["Background"]


class Background:
    """Runs one call in a thread, or in this one if no thread can be started."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._running = _thread.allocate_lock()
        self._running.acquire()
        self._error: BaseException | None = None
        # Signals are for the main thread, whose system calls they interrupt.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError:
            self._run()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error
        finally:
            self._running.release()

    def ended(self, seconds: float = -1) -> bool:
        """Wait for its end, at most so long (-1: no limit); raise the error of the call, if any."""
        if not self._running.acquire(timeout=seconds):
            return False
        self._running.release()
        if self._error is not None:
            raise self._error
        return True
