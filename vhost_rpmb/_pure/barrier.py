# SPDX-License-Identifier: Apache-2.0
"""A memory barrier, which Python has no name for."""

from __future__ import annotations

import threading

__all__ = ["full_barrier"]

_LOCK = threading.Lock()


def full_barrier() -> None:
    """Order all loads and stores before against all after it, as other processes see them.

    Taking a lock is an atomic acquire, giving it back an atomic release, and each is a full barrier
    on x86-64. On processors that order less, what stands before may still move behind the acquire,
    and what follows ahead of the release; but no acquire overtakes an earlier release, so a second
    round keeps the two apart.
    """
    for _ in range(2):
        with _LOCK:
            pass
