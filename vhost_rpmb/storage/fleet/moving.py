# SPDX-License-Identifier: Apache-2.0
"""A device that comes from another home, or went to one: the part of the engine.

`vhost_rpmb.storage.transfer` has the order of the steps and the part of the files.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vhost_rpmb.errors import StateError
from vhost_rpmb.rpmb.replay import NO_REPLAY
from vhost_rpmb.storage.fleet.administration import NameTaken, choose_incarnation, taken
from vhost_rpmb.storage.fleet.contents import context
from vhost_rpmb.storage.fleet.engine import Compare, Delete, Get, Operation, Put
from vhost_rpmb.storage.fleet.layout import (
    CHUNK,
    CHUNK_BLOCKS,
    NO_CHAIN,
    Entry,
    Head,
    Info,
    Keys,
    Malformed,
    Owner,
    Table,
    after,
    chain,
    pack_chunk,
    unpack_chunk,
)
from vhost_rpmb.storage.fleet.ownership import ACTIVE, EXPORTED
from vhost_rpmb.storage.fleet.requests import Requests, named_refusals
from vhost_rpmb.storage.fleet.seal import KEY_SIZE, KeyEncryptionKey, Sealer, Unsealable

__all__ = ["add", "describe_new", "discard", "home", "place_of"]

_CHUNKS_PER_CHANGE = 8  # 128 KiB, as in a checkpoint
_VERSION = 1  # of the chunks of a device that was added


def place_of(requests: Requests, keys: Keys) -> str:
    """Return a name of the store, for the mark of files. Raises StateError."""
    with _named_errors(keys):
        return f"{keys.prefix.decode()} {choose_incarnation(requests, keys).hex()}"


def describe_new(keys: Keys, kek: KeyEncryptionKey, size: int, origin: str) -> bytes:
    """Choose life and secret of a device that will be added; nothing is sent."""
    info = Info(size, secrets.token_hex(8), kek.name, b"", origin)
    secret = kek.wrap(os.urandom(KEY_SIZE), context(keys, info))
    return info._replace(secret=secret).pack()


def home(requests: Requests, keys: Keys) -> tuple[Owner | None, bytes | None]:
    """Return the owner's record and the description of a device, None: there is none."""
    with _named_errors(keys):
        found = requests.read([], [keys.owner, keys.info]).found
        record = found.get(keys.owner)
        return None if record is None else Owner.unpack(record), found.get(keys.info)


def add(
    requests: Requests,
    keys: Keys,
    kek: KeyEncryptionKey,
    info_record: bytes,
    memory: memoryview,
    counter: int,
    key: bytes | None,
    progress: Callable[[int], object],
) -> None:
    """Add a device that `describe_new` described; repeated, also by another process, it goes on.

    ``progress`` gets blocks. Raises `NameTaken` and StateError.
    """
    with _named_errors(keys):
        try:
            info = Info.unpack(info_record)
            if info.kek != kek.name:
                raise StateError(
                    f"the device {keys.device}: expected the key-encryption key {info.kek} of the"
                    f" first attempt, found {kek.name}: configure that key"
                )
            sealer = kek.unwrap(info.secret, context(keys, info))
            versions = _put_chunks(requests, keys, info, sealer, memory, progress)
            _put_device(requests, keys, info_record, sealer, versions, counter, key)
        except (Malformed, Unsealable) as error:
            raise StateError(
                f"the device {keys.device}: expected the records of an earlier attempt, found"
                " others: restore the store"
            ) from error


def _put_chunks(
    requests: Requests,
    keys: Keys,
    info: Info,
    sealer: Sealer,
    memory: memoryview,
    progress: Callable[[int], object],
) -> list[int]:
    """Put all chunks that are not zeros; return the versions of all chunks.

    Each one compares its own absence: a late copy of the request replaces no later chunk.
    """
    chunks = [bytes(memory[start : start + CHUNK]) for start in range(0, info.size, CHUNK)]
    used = [number for number, data in enumerate(chunks) if any(data)]
    progress(CHUNK_BLOCKS * (len(chunks) - len(used)))
    for first in range(0, len(used), _CHUNKS_PER_CHANGE):
        numbers = used[first : first + _CHUNKS_PER_CHANGE]
        names = [keys.chunk(info.life, number) for number in numbers]
        puts = [
            Put(name, pack_chunk(sealer, number, _VERSION, chunks[number]))
            for name, number in zip(names, numbers, strict=True)
        ]
        absent = [Compare(name, None) for name in names]
        answer = requests.change(absent, puts, [Get(name) for name in names])
        if not answer.succeeded:
            for name, number in zip(names, numbers, strict=True):
                found = unpack_chunk(sealer, number, answer.found.get(name, b""))
                if found != (_VERSION, chunks[number]):
                    raise Malformed
        progress(CHUNK_BLOCKS * len(numbers))
    return [_VERSION if number in set(used) else 0 for number in range(len(chunks))]


def _put_device(
    requests: Requests,
    keys: Keys,
    info_record: bytes,
    sealer: Sealer,
    versions: Sequence[int],
    counter: int,
    key: bytes | None,
) -> None:
    """Make the device exist: one change, in place of no device or of one that was exported.

    Its log has one entry, which is already in the chunks. The numbers of entries go on behind those
    of the earlier device, because hosts remember them.
    """
    info = Info.unpack(info_record)
    names = [keys.owner, keys.info, keys.head, keys.incarnation]
    found = requests.read([], names).found
    before = found.get(keys.owner)
    if found.get(keys.info) == info_record:
        return
    if before is not None and Owner.unpack(before).state != EXPORTED:
        raise taken(keys)
    seq, epoch = 1, 0
    if before is not None:
        epoch, earlier = Owner.unpack(before).epoch + 1, Head.unpack(found.get(keys.head, b""))
        seq = earlier.seq + 1
        if counter < earlier.counter:
            raise NameTaken(
                f"the device {keys.device}: expected the one that was exported with write counter"
                f" {earlier.counter}, found {counter}: choose another name"
            )
    entry = sealer.seal(Entry(counter, [], NO_REPLAY.pack()).pack(), Entry.place(seq))
    incarnation, value = found[keys.incarnation], chain(NO_CHAIN, entry)
    head = Head(counter, seq, seq, incarnation, value, key is not None)
    puts: list[Operation] = [
        Put(keys.owner, Owner(epoch, secrets.token_hex(16), "", 0, ACTIVE).pack()),
        Put(keys.info, info_record),
        Put(keys.head, head.pack(sealer)),
        Put(keys.table(info.life), Table(versions, NO_CHAIN).pack(sealer, seq)),
        Put(keys.entry(info.life, seq), entry),
    ]
    if key is not None:
        puts.append(Put(keys.key(info.life), sealer.seal(key, b"key")))
    answer = requests.change([Compare(keys.owner, before)], puts, [Get(keys.info)])
    if not answer.succeeded and answer.found.get(keys.info) != info_record:
        raise taken(keys)


def discard(requests: Requests, keys: Keys, token: str) -> None:
    """Delete the contents of a device that was exported with a token. Raises StateError."""
    with _named_errors(keys):
        found = requests.read([], [keys.owner, keys.info]).found
        record = found.get(keys.owner, b"")
        if Owner.unpack(record).token != token:
            return
        life = Info.unpack(found.get(keys.info, b"")).life
        ranges = [keys.chunks(life), keys.log(life)]
        deletes: list[Operation] = [Delete(each, after(each)) for each in ranges]
        deletes += [Delete(keys.table(life)), Delete(keys.key(life))]
        requests.change([Compare(keys.owner, record)], deletes, [])


@contextmanager
def _named_errors(keys: Keys) -> Iterator[None]:
    """Turn refusals and malformed records into errors for the operator."""
    try:
        with named_refusals(f"to change {keys.device}", ": repeat the command"):
            yield
    except Malformed as error:
        raise StateError(f"the device {keys.device}: {error}: restore the store") from error
