# SPDX-License-Identifier: Apache-2.0
"""The workload whose system calls are recorded: run as a program, under strace.

What it does and what has been acknowledged is written to descriptor MARKS, so that the record holds
it in order. The requests come from `requests`, which the checker knows as well.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from vhost_rpmb.errors import OperatorError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import Replay
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.store import Store
from vhost_rpmb.storage.paths import Paths

MARKS = 9
TRIES = 4  # of a step on a disk of which one fsync and one fdatasync fail
KEY = bytes(range(50, 82))


class Step(NamedTuple):
    """One step: a commit (blocks or key), or None for a checkpoint or a clean stop and start."""

    # "commit", "key", "checkpoint", "slice" of one, "half" of one: until changes wait in the
    # database, "slices" to its end, "restart", or "settled restart": owes no answer
    kind: str
    blocks: tuple[tuple[int, bytes], ...] = ()


def steps() -> Iterator[Step]:
    """Give the workload: single and multi-block writes, checkpoints, the key, clean stops."""
    source = random.Random(20)
    yield Step("key")
    for number in range(26):
        count = source.choice([1, 1, 1, 2, 7, 32])
        address = source.randrange(0, 40)
        data = [source.randbytes(spec.BLOCK_SIZE) for _ in range(count)]
        if number == 5:
            data = [bytes(spec.BLOCK_SIZE)] * count
        yield Step("commit", tuple(enumerate(data, address)))
        if number in (4, 11, 12, 20):
            yield Step("checkpoint")
        if number in (1, 14):
            yield Step("slice")
        if number in (7, 19):
            yield Step("half")
        if number in (2, 15):
            yield Step("slices")
        if number in (8, 17):
            yield Step("restart" if number == 8 else "settled restart")


def record(step: Step, counter: int) -> Replay:
    """The replay record of a commit, by the counter before it."""
    if step.kind == "key":
        return Replay(1, b"", True)
    return Replay(2, counter.to_bytes(4, "big") + step.blocks[0][1][:32])


def mark(text: str) -> None:
    os.write(MARKS, text.encode())


def start(paths: Paths) -> Store:
    """Open the store; again where a failing disk refused it, as an operator would."""
    for _ in range(TRIES - 1):
        with suppress(OperatorError):
            return open_store(paths)
    return open_store(paths)


def main(flash: str, key_path: str | None) -> None:
    logging.getLogger("vhost_rpmb").setLevel(logging.CRITICAL)
    paths = Paths.resolve(flash, key_path=key_path)
    store = start(paths)
    counter = 0
    for number, step in enumerate(steps()):
        done, tries = False, 0
        while not done:  # a step that a failing disk refused is tried again
            tries += 1
            assert tries <= TRIES
            mark(f"begin {number}")
            if step.kind == "key":
                done = store.commit(counter, [], KEY, record(step, counter))
            elif step.kind == "commit":
                done = store.commit(counter + 1, list(step.blocks), None, record(step, counter))
            elif step.kind == "checkpoint":
                done = store.checkpoint()
            elif step.kind == "slice":
                done = store.checkpoint_slice() is not False
            elif step.kind in ("half", "slices"):
                while (left := store.checkpoint_slice()) is None:
                    if step.kind == "half" and store._database.has_waiting:
                        break
                # Its sync is in a new thread each time, and strace counts the calls of each thread.
                done = left is not False or store.checkpoint()
            else:
                if step.kind == "settled restart":
                    store.settle()
                store.close()
                store = start(paths)
                done = True
            mark(f"{'done' if done else 'failed'} {number}")
        counter += step.kind == "commit"
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
