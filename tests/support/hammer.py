# SPDX-License-Identifier: Apache-2.0
"""A process that works on shared memory behind a device's back, until its standard input ends.

``python hammer.py truncate FD SIZE`` makes the file shorter and whole again.
``python hammer.py rewrite FD SIZE OFFSET:HEX[,HEX...] ...`` puts one of the texts at its offset.
``python hammer.py flood FD SIZE AVAILABLE USED QUEUE KICK`` keeps a ring full: offsets of the two
rings, the queue size, and the kick eventfd.
``python hammer.py refill FD SIZE`` empties an eventfd and fills its counter.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress


def truncate(fd: int, size: int, _: list[str]) -> Callable[[], None]:
    def step() -> None:
        os.ftruncate(fd, random.randrange(0, size, 4096))
        for _ in range(random.randrange(200)):
            pass
        os.ftruncate(fd, size)
        for _ in range(random.randrange(1000)):
            pass

    return step


def rewrite(fd: int, size: int, arguments: list[str]) -> Callable[[], None]:
    view = memoryview(mmap.mmap(fd, size))
    places = []
    for argument in arguments:
        offset, _, texts = argument.partition(":")
        places += [(int(offset), bytes.fromhex(text)) for text in texts.split(",")]

    def step() -> None:
        offset, text = random.choice(places)
        view[offset : offset + len(text)] = text

    return step


def flood(fd: int, size: int, arguments: list[str]) -> Callable[[], None]:
    words = memoryview(mmap.mmap(fd, size)).cast("H")
    available, used, queue, kick = (int(argument) for argument in arguments)

    def step() -> None:
        words[available // 2 + 1] = (words[used // 2 + 1] + queue) & 0xFFFF
        os.eventfd_write(kick, 1)

    return step


def refill(fd: int, _size: int, _: list[str]) -> Callable[[], None]:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)  # when it blocks itself

    def step() -> None:
        with suppress(InterruptedError):
            os.eventfd_read(fd)
            os.eventfd_write(fd, 2**64 - 2)

    return step


def main() -> None:
    step = globals()[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    print("ready", flush=True)
    while not select.select([0], [], [], 0)[0]:
        for _ in range(100):
            step()
    signal.setitimer(signal.ITIMER_REAL, 0)


main()
