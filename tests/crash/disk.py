# SPDX-License-Identifier: Apache-2.0
"""A file system as power loss may leave it, rebuilt from a record of system calls.

What is assumed of the disk, and what is not:

- A sector of 512 bytes is written whole or not at all.
- What fsync or fdatasync of a file covered is there. Of anything later any subset of sectors may be
  there, in any order; a sector that a file grew by and that was not written reads as zeros.
- A sync that fails leaves it open which of the sectors it was to write are there, and the system
  takes them for written: no later sync makes them durable, unless they are written once more.
- An extended attribute is there as it was at the last sync of its file, or in any later version.
- Directory operations (create, link, rename, unlink) and changes of a file's length are journaled:
  they come in order, and any number of the latest may be missing until the directory, or for
  lengths the file, is synced.
"""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

SECTOR = 512
_CALLS = (
    "openat,close,pwrite64,write,ftruncate,fsync,fdatasync,rename,link,linkat,unlink,dup,dup2,dup3,"
    "fsetxattr"
)
_UNFINISHED = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_LINE = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)")


class Call(NamedTuple):
    """One recorded system call that succeeded, or a sync that failed (result -1)."""

    name: str
    arguments: list[str]
    result: int


def record(
    command: Sequence[str], log: Path, environment: Mapping[str, str], failing_sync: int = 0
) -> list[Call]:
    """Run a command under strace and return its calls that may change files, in order.

    ``failing_sync``: the number of the sync that fails (counted from 1, fsync and fdatasync each
    for itself); 0: none.
    """
    trace = ["strace", "-f", "-qq", "-xx", "-s", "10000000", "-o", str(log), "-e", _CALLS]
    if failing_sync:
        trace += ["-e", f"inject=fsync,fdatasync:error=EIO:when={failing_sync}"]
    subprocess.run([*trace, *command], check=True, env=environment)
    calls = []
    begun: dict[str, str] = {}  # by thread: a call during which another thread called
    for logged in log.read_text().splitlines():
        line = logged
        thread, _, rest = line.partition(" ")
        if line.endswith(_UNFINISHED):
            begun[thread] = line.removesuffix(_UNFINISHED)
            continue
        if resumed := _RESUMED.match(rest.lstrip()):
            line = begun.pop(thread) + resumed[1]  # it counts when it ends
        if (found := _LINE.match(line)) and (int(found[3]) >= 0 or "sync" in found[1]):
            calls.append(Call(found[1], found[2].split(", "), int(found[3])))
    return calls


def text(argument: str) -> bytes:
    """Decode a string argument as strace -xx prints it."""
    assert argument.startswith('"'), argument
    assert argument.endswith('"'), argument
    return bytes.fromhex(argument[1:-1].replace("\\x", ""))


@dataclass
class File:
    """One inode: what is surely on the disk, and the sectors and lengths that may be."""

    durable: bytes = b""
    current: bytearray = field(default_factory=bytearray)
    dirty: dict[int, list[bytes]] = field(default_factory=dict)  # sector -> its versions
    lengths: list[int] = field(default_factory=list)
    clean: set[int] = field(default_factory=set)  # dirty sectors that no sync writes any more
    stamps: list[bytes | None] = field(default_factory=lambda: [None])  # durable one first

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > len(self.current):
            self.truncate(end)
        self.current[offset:end] = data
        for sector in range(offset // SECTOR, -(-end // SECTOR)):
            start = sector * SECTOR
            version = bytes(self.current[start : start + SECTOR]).ljust(SECTOR, b"\0")
            self.dirty.setdefault(sector, []).append(version)
            self.clean.discard(sector)

    def truncate(self, length: int) -> None:
        if length < len(self.current):
            del self.current[length:]
            for sector in [s for s in self.dirty if s * SECTOR >= length]:
                del self.dirty[sector]
                self.clean.discard(sector)
        self.current.extend(bytes(length - len(self.current)))
        self.lengths.append(length)

    def sync(self) -> None:
        durable = bytearray(self.current)
        for sector in self.clean:
            start, end = sector * SECTOR, min((sector + 1) * SECTOR, len(durable))
            durable[start:end] = self.durable[start:end].ljust(end - start, b"\0")
        self.durable = bytes(durable)
        self.dirty = {sector: self.dirty[sector] for sector in self.clean}
        self.lengths.clear()
        del self.stamps[:-1]

    def fail_sync(self) -> None:
        self.clean.update(self.dirty)

    def build(self, length: int, sectors: Mapping[int, bytes]) -> bytes:
        """Give the content with one of the lengths and some dirty sectors."""
        content = bytearray(self.durable[:length])
        content.extend(bytes(length - len(content)))
        for sector, version in sectors.items():
            start = sector * SECTOR
            part = version[: max(0, length - start)]
            content[start : start + len(part)] = part
        return bytes(content)


class Content(NamedTuple):
    """A file after a power cut: its bytes, and its extended attribute if it has one."""

    data: bytes
    stamp: bytes | None


State = dict[str, Content]


class Disk:
    """The files of one folder, driven by recorded calls."""

    def __init__(self, folder: Path, ignored_syncs: str = "") -> None:
        self._folder = os.fsencode(folder)
        self._ignored = ignored_syncs
        self._names: dict[str, File] = {}
        self._durable_names: dict[str, File] = {}
        self._directory: list[dict[str, File]] = []  # states since its last sync
        self._fds: dict[int, tuple[str, File | None]] = {}
        self._positions: dict[int, int] = {}
        self.marks: list[str] = []

    def add(self, name: str, content: bytes) -> None:
        """Put a file there that is durable from the start."""
        file = File(durable=content, current=bytearray(content))
        self._names[name] = self._durable_names[name] = file

    def apply(self, call: Call, marks: int) -> bool:
        """Follow one call; return whether it changed what a power cut may leave."""
        handler = getattr(self, f"_{call.name}")
        if call.name in ("write", "pwrite64") and int(call.arguments[0]) == marks:
            self.marks.append(text(call.arguments[1]).decode())
            return False
        return bool(handler(call))

    def _name(self, argument: str) -> str | None:
        path = text(argument)
        folder, _, name = path.rpartition(b"/")
        return os.fsdecode(name) if folder == self._folder else None

    def _changed_directory(self) -> bool:
        self._directory.append(dict(self._names))
        return True

    def _openat(self, call: Call) -> bool:
        path = text(call.arguments[1])
        if path == self._folder:
            self._fds[call.result] = ("/", None)
            return False
        name = self._name(call.arguments[1])
        if name is None:
            self._fds.pop(call.result, None)
            return False
        created = name not in self._names
        if created:
            self._names[name] = File()
        self._fds[call.result] = (name, self._names[name])
        self._positions[call.result] = 0
        if "O_TRUNC" in call.arguments[2]:
            self._names[name].truncate(0)
        return created and self._changed_directory()

    def _close(self, call: Call) -> bool:
        self._fds.pop(int(call.arguments[0]), None)
        return False

    def _dup(self, call: Call) -> bool:
        old = self._fds.get(int(call.arguments[0]))
        assert old is None, "a descriptor of the store is not duplicated"
        self._fds.pop(call.result, None)
        return False

    _dup2 = _dup3 = _dup

    def _file(self, call: Call) -> File | None:
        return self._fds.get(int(call.arguments[0]), ("", None))[1]

    def _pwrite64(self, call: Call) -> bool:
        file = self._file(call)
        if file is None:
            return False
        file.write(int(call.arguments[3]), text(call.arguments[1])[: call.result])
        return True

    def _write(self, call: Call) -> bool:
        file = self._file(call)
        if file is None:
            return False
        fd = int(call.arguments[0])
        file.write(self._positions[fd], text(call.arguments[1])[: call.result])
        self._positions[fd] += call.result
        return True

    def _ftruncate(self, call: Call) -> bool:
        file = self._file(call)
        if file is None:
            return False
        file.truncate(int(call.arguments[1]))
        return True

    def _fsync(self, call: Call) -> bool:
        name, file = self._fds.get(int(call.arguments[0]), ("?", None))
        if self._ignored and name.endswith(self._ignored):
            return False
        if file is not None:
            if call.result < 0:
                file.fail_sync()
            else:
                file.sync()
            return True
        if name == "/" and call.result >= 0:
            self._durable_names = dict(self._names)
            self._directory.clear()
            return True
        return False

    _fdatasync = _fsync

    def _fsetxattr(self, call: Call) -> bool:
        file = self._file(call)
        if file is None:
            return False
        file.stamps.append(text(call.arguments[2]))
        return True

    def _rename(self, call: Call) -> bool:
        old, new = self._name(call.arguments[0]), self._name(call.arguments[1])
        if old is None or new is None:
            return False
        self._names[new] = self._names.pop(old)
        return self._changed_directory()

    def _link(self, call: Call) -> bool:
        old, new = self._name(call.arguments[0]), self._name(call.arguments[1])
        if old is None or new is None:
            return False
        self._names[new] = self._names[old]
        return self._changed_directory()

    def _linkat(self, call: Call) -> bool:  # by which Python 3.14 links
        return self._link(call._replace(arguments=call.arguments[1:4:2]))

    def _unlink(self, call: Call) -> bool:
        name = self._name(call.arguments[0])
        if name is None:
            return False
        del self._names[name]
        return self._changed_directory()

    def states(self, source: random.Random, most: int) -> Iterator[State]:
        """Give states that a power cut now may leave: all if at most ``most``, else a sample.

        A sample begins with the extremes: nothing of what was not synced, and all of it.
        """
        directories = [self._durable_names, *self._directory]
        files = {id(file): file for names in directories for file in names.values()}.values()
        lengths = [(file, [len(file.durable), *file.lengths]) for file in files if file.lengths]
        stamps = [(file, file.stamps) for file in files]
        sectors = [
            (file, sector, [None, *versions])
            for file in files
            for sector, versions in file.dirty.items()
        ]
        choices: list[Sequence[Any]] = [
            directories,
            *(choice for _, choice in lengths),
            *(choice for _, choice in stamps),
            *(versions for _, _, versions in sectors),
        ]
        picks: Iterable[Sequence[Any]]
        if math.prod(map(len, choices)) <= most:
            picks = product(*choices)
        else:
            picks = self._sample(choices, source, most)
        for names, *rest in picks:
            size = {id(file): rest[index] for index, (file, _) in enumerate(lengths)}
            stamp = {id(file): rest[len(lengths) + index] for index, (file, _) in enumerate(stamps)}
            present: dict[int, dict[int, bytes]] = {}
            for (file, sector, _), version in zip(
                sectors, rest[len(lengths) + len(stamps) :], strict=True
            ):
                if version is not None:
                    present.setdefault(id(file), {})[sector] = version
            yield {
                name: Content(
                    file.build(size.get(id(file), len(file.durable)), present.get(id(file), {})),
                    stamp[id(file)],
                )
                for name, file in names.items()
            }

    @staticmethod
    def _sample(
        choices: list[Sequence[Any]], source: random.Random, count: int
    ) -> Iterator[list[Any]]:
        yield [choice[0] for choice in choices]
        yield [choice[-1] for choice in choices]
        for _ in range(count - 2):
            latest = source.choice([0.1, 0.5, 0.9])
            yield [
                choice[-1] if source.random() < latest else source.choice(choice)
                for choice in choices
            ]


def run_recorded(
    module: str, folder: Path, log: Path, *arguments: str, failing_sync: int = 0
) -> list[Call]:
    """Record ``python -m module arguments`` with the marks descriptor open."""
    command = [sys.executable, "-m", module, *arguments]
    shell = ["sh", "-c", 'exec 9>/dev/null; exec "$@"', "sh", *command]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return record(shell, log, environment, failing_sync)
