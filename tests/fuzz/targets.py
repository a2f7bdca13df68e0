# SPDX-License-Identifier: Apache-2.0
"""What the fuzzer and the corpus tests run: an input in, everything that it left behind out.

An input is a little program: a `Source` reads decisions from it, and a target acts on them as a
hostile guest or front-end would. `run` returns what can be told from outside, so that two engines
can be compared; what must never be is an assertion here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tests.support.oracle import KEY
from tests.support.rig import make_image
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.store import Store
from vhost_rpmb.storage.paths import Paths

T = TypeVar("T")


class Source:
    """Decisions read from an input's bytes; zeros when they have run out."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> bool:
        """Whether there is a byte that was not read."""
        return self._position < len(self._data)

    def take(self, length: int) -> bytes:
        """Read ``length`` bytes."""
        data = self._data[self._position : self._position + length]
        self._position += length
        return data.ljust(length, b"\0")

    def number(self, size: int) -> int:
        """Read a little-endian number of ``size`` bytes."""
        return int.from_bytes(self.take(size), "little")

    def pick(self, choices: Sequence[T]) -> T:
        """Choose by one byte."""
        return choices[self.number(1) % len(choices)]


class Target(ABC):
    """One harness on one engine; what an input leaves behind must not reach the next one."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self.folder = folder

    @abstractmethod
    def run(self, data: bytes) -> list[object]:
        """Do what an input says; return what it left behind."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


class Disk:
    """A real store that starts each input anew, and can be told to fail.

    The same databases serve many inputs: what one wrote is written over for the next. Only a key
    cannot be taken back, so an input that programmed one is followed by a new store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stores: dict[bool, Store] = {}  # by whether a key is programmed at the start
        self._written: dict[bool, set[int]] = {False: set(), True: set()}
        self._keyed = False
        self.full = False
        self.confirmed: list[int] = []  # the write counter at each `confirm`

    def prepare(
        self,
        keyed: bool,
        counter: int,
        damaged: Sequence[int] = (),
        replay: Replay = NO_REPLAY,
    ) -> None:
        """Make a device: all zeros but for ``damaged``, this counter, and KEY or no key.

        ``replay``: what a process that was killed owed.
        """
        self.full = False
        self.confirmed.clear()
        self._keyed = keyed
        store = self._stores.get(keyed)
        if store is None or (store.key is not None and not keyed):
            store = self._open(keyed)
        blocks = [(address, bytes(spec.BLOCK_SIZE)) for address in sorted(self._written[keyed])]
        assert store.commit(counter, blocks, KEY if keyed and store.key is None else None, replay)
        self._written[keyed].clear()
        store.damaged[:] = bytes(len(store.damaged))
        for address in damaged:
            store.damaged[address] = 1

    def _open(self, keyed: bool) -> Store:
        flash = self._folder / ("keyed" if keyed else "blank")
        if keyed in self._stores:
            self._stores[keyed].close()
            flash.unlink()
            Path(f"{flash}.state").unlink()
            self._written[keyed].clear()
        self._stores[keyed] = open_store(Paths.resolve(str(make_image(flash))))
        return self._stores[keyed]

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    def left_behind(self) -> list[object]:
        """What a restart would find."""
        return [self.counter, self.key, self.digest(), bytes(self.damaged), list(self.confirmed)]

    def digest(self) -> bytes:
        """Stands for the whole image; cheaper than a copy."""
        return hashlib.sha256(self.image).digest()

    # What the device sees.

    @property
    def _store(self) -> Store:
        return self._stores[self._keyed]

    @property
    def image(self) -> memoryview:
        return self._store.image

    @property
    def damaged(self) -> bytearray:
        return self._store.damaged

    @property
    def counter(self) -> int:
        return self._store.counter

    @property
    def key(self) -> bytes | None:
        return self._store.key

    @property
    def replay(self) -> Replay:
        return self._store.replay

    def confirm(self) -> None:
        """As of a store that hosts share: engines have to ask at the same times, in this state."""
        self.confirmed.append(self.counter)

    def settle(self) -> None:
        self._store.settle()

    def commit(
        self,
        counter: int,
        blocks: list[tuple[int, bytes]],
        key: bytes | None,
        replay: Replay = NO_REPLAY,
    ) -> bool:
        """Do what a store does, unless the disk is full; check what no device may ask of one."""
        assert counter >= self.counter
        assert key is None or self.key is None
        assert len({address for address, _ in blocks}) == len(blocks)
        if self.full:
            return False
        self._written[self._keyed].update(address for address, _ in blocks)
        return self._store.commit(counter, blocks, key, replay)
