# SPDX-License-Identifier: Apache-2.0
"""The state of a device at a start: chunks, then the log, each verified.

Only the head is trusted, after its authentication. The table of the last checkpoint says which
version each chunk has at least; a chunk of a checkpoint that was not completed is newer, and the
log then has all that it contains. The chain proves that the log is whole. So a part of the state
that was replaced by an older one is found. All of it replaced is a restored backup, see `witness`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vhost_rpmb import sparse
from vhost_rpmb.errors import StateError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.fleet.layout import (
    CHUNK,
    CHUNK_BLOCKS,
    NO_CHAIN,
    Entry,
    Head,
    Info,
    Keys,
    Malformed,
    Table,
    after,
    chain,
    unpack_chunk,
)
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.seal import KeyEncryptionKey, Sealer, Unsealable

__all__ = ["Contents", "Device", "State", "blank", "load", "open_device", "update"]

_CHUNKS_PER_PAGE = 16
_ENTRIES_PER_PAGE = 32


class Device(NamedTuple):
    """What a host can open with the key-encryption key, before blocks are read."""

    info_record: bytes
    info: Info
    sealer: Sealer
    head_record: bytes
    head: Head


class Contents(NamedTuple):
    """The state at a start, in private memory."""

    memory: mmap.mmap
    versions: list[int]  # of the chunks at the last checkpoint
    pending: set[int]  # chunks that the log changes
    log_bytes: int
    replay: Replay  # of the last commit
    key: bytes | None
    last_chain: bytes  # the chain value before the last entry


class State(NamedTuple):
    """The state in memory, the head that it belongs to, and the owner's records at that time."""

    device: Device
    contents: Contents
    found: Mapping[bytes, bytes]

    def without_head(self) -> State:
        """Return the same memory as the state of no head that exists: it may be parts of two."""
        head = self.device.head._replace(incarnation=b"")
        return self._replace(device=self.device._replace(head_record=b"", head=head))


def open_device(
    keys: Keys, info_record: bytes | None, head_record: bytes | None, kek: KeyEncryptionKey
) -> Device:
    """Unwrap the secret of a device and authenticate its head. Raises StateError."""
    if info_record is None or head_record is None:
        raise StateError(
            f"the device {keys.device}: expected its description and head, found"
            f" {'no head' if info_record else 'no description'}: restore the store"
        )
    try:
        info = Info.unpack(info_record)
        head = Head.unpack(head_record)
    except (Malformed, ValueError) as error:
        raise StateError(f"the device {keys.device}: {error}: restore the store") from error
    if info.kek != kek.name:
        raise StateError(
            f"the device {keys.device}: expected it sealed with the key-encryption key {kek.name}"
            f" of this host, found one sealed with {info.kek}: configure that key"
        )
    try:
        # Size and life are authenticated with the secret: both choose the meaning of all else.
        sealer = kek.unwrap(info.secret, context(keys, info))
    except Unsealable as error:
        raise StateError(
            f"the device {keys.device}: its description was changed in the store: restore it"
        ) from error
    if not Head.is_authentic(head_record, sealer):
        raise StateError(
            f"the device {keys.device}: its head was changed in the store: restore the store"
        )
    return Device(info_record, info, sealer, head_record, head)


def context(keys: Keys, info: Info) -> bytes:
    """Return what everything sealed of a device is bound to."""
    return keys.context(info.life) + b"\0%d" % info.size


def blank(size: int) -> Contents:
    """Return contents for a device of which nothing was loaded."""
    memory = sparse.new(size)
    return Contents(memory, [0] * (size // CHUNK), set(), 0, NO_REPLAY, None, NO_CHAIN)


def load(
    requests: Requests, keys: Keys, device: Device, memory: mmap.mmap | None = None
) -> Contents:
    """Read and verify the state that belongs to the head, into ``memory`` if given.

    Raises StateError, also if another daemon changes the device meanwhile.
    """
    info, sealer, head = device.info, device.sealer, device.head
    try:
        table, key = _table_and_key(requests, keys, device)
        if memory is None:
            memory = sparse.new(info.size)
        else:
            sparse.clear(memory)
        _load_chunks(requests, keys, device, table, memory)
        pending: set[int] = set()
        log_bytes, replay = 0, NO_REPLAY
        value = last_chain = table.chain
        seq = max(head.folded - 1, 0)
        for sealed in _entries(requests, keys, info.life, seq, keys.log(info.life)):
            seq += 1
            last_chain, value = value, chain(value, sealed)
            entry = Entry.unpack(sealer.open(sealed, Entry.place(seq)))
            replay = _replay(entry.record)
            if seq > head.folded:
                _apply(entry, memory, pending)
                log_bytes += len(sealed)
        if seq != head.seq or value != head.chain:
            raise Malformed(f"expected the log up to entry {head.seq}, found another log")
    except (Malformed, Unsealable) as error:
        reason = str(error) or "a record was changed in the store"
        raise StateError(f"the device {keys.device}: {reason}: restore the store") from error
    return Contents(memory, list(table.versions), pending, log_bytes, replay, key, last_chain)


def update(requests: Requests, keys: Keys, device: Device, known: State) -> Contents:
    """Read what has changed since an earlier head, into the same memory; verified as by `load`.

    Where the log does not reach back to that head, or does not continue it, all is read again.
    Raises StateError, also if another daemon changes the device meanwhile.
    """
    head, last = device.head, known.device.head
    if device.info.life != known.device.info.life:
        raise StateError(
            f"the device {keys.device} was replaced by another one of this name: start again"
        )
    continues = head.incarnation == last.incarnation and head.folded <= last.seq <= head.seq
    contents = _continue(requests, keys, device, known) if continues else None
    return contents or load(requests, keys, device, known.contents.memory)


def _continue(requests: Requests, keys: Keys, device: Device, known: State) -> Contents | None:
    """Apply the log behind a known state; None if it does not lead to the head."""
    info, sealer, head = device.info, device.sealer, device.head
    contents, seq, value = known.contents, known.device.head.seq, known.device.head.chain
    pending, log_bytes = set(contents.pending), contents.log_bytes
    replay, last_chain = contents.replay, contents.last_chain
    versions, key = contents.versions, contents.key
    try:
        if head.folded != known.device.head.folded or head.programmed != (key is not None):
            table, key = _table_and_key(requests, keys, device)
            versions = list(table.versions)
        if seq != head.seq:
            first = keys.entry(info.life, seq + 1)
            for sealed in _entries(requests, keys, info.life, seq, first):
                seq += 1
                last_chain, value = value, chain(value, sealed)
                entry = Entry.unpack(sealer.open(sealed, Entry.place(seq)))
                replay = _replay(entry.record)
                _apply(entry, contents.memory, pending)
                log_bytes += len(sealed)
                if seq == head.seq:
                    break
    except (Malformed, Unsealable):
        return None
    if seq != head.seq or value != head.chain:
        return None
    return Contents(contents.memory, versions, pending, log_bytes, replay, key, last_chain)


def _replay(record: bytes) -> Replay:
    try:
        return Replay.unpack(record)
    except ValueError as error:
        raise Malformed(str(error)) from error


def _table_and_key(requests: Requests, keys: Keys, device: Device) -> tuple[Table, bytes | None]:
    info, sealer, head = device.info, device.sealer, device.head
    table_key, rpmb_key = keys.table(info.life), keys.key(info.life)
    found = requests.read([], [table_key, rpmb_key]).found
    table = Table([0] * (info.size // CHUNK), NO_CHAIN)
    if head.folded:
        if table_key not in found:
            raise Malformed("expected the table of a checkpoint, found none")
        table = Table.unpack(found[table_key], sealer, head.folded)
    if not head.programmed:
        return table, None
    if rpmb_key not in found:
        raise Malformed("expected the key of a programmed device, found none")
    return table, sealer.open(found[rpmb_key], b"key")


def _load_chunks(
    requests: Requests, keys: Keys, device: Device, table: Table, memory: mmap.mmap
) -> None:
    info, sealer, head = device.info, device.sealer, device.head
    prefix = keys.chunks(info.life)
    missing = {number for number, version in enumerate(table.versions) if version}
    for key, record in requests.pages(prefix, after(prefix), _CHUNKS_PER_PAGE):
        number = _number(key, prefix)
        version, data = unpack_chunk(sealer, number, record)
        expected = table.versions[number] if number < len(table.versions) else -1
        if len(data) != CHUNK or not (version == expected or head.folded < version <= head.seq):
            raise Malformed(f"expected chunk {number} of version {expected}, found {version}")
        memory[number * CHUNK : (number + 1) * CHUNK] = data
        missing.discard(number)
    if missing:
        raise Malformed(f"expected chunk {min(missing)}, found none")


def _entries(
    requests: Requests, keys: Keys, life: str, before: int, first: bytes
) -> Iterator[bytes]:
    """Read the log from the key ``first`` on; each entry has the number after ``before``."""
    prefix = keys.log(life)
    for key, sealed in requests.pages(first, after(prefix), _ENTRIES_PER_PAGE):
        before += 1
        if _number(key, prefix) != before:
            raise Malformed(f"expected log entry {before}, found another")
        yield sealed


def _number(key: bytes, prefix: bytes) -> int:
    try:
        return int(key[len(prefix) :], 16)
    except ValueError as error:
        raise Malformed("expected a number in a key, found none") from error


def _apply(entry: Entry, memory: mmap.mmap, pending: set[int]) -> None:
    for address, data in entry.blocks:
        start = address * spec.BLOCK_SIZE
        if start + spec.BLOCK_SIZE > len(memory):
            raise Malformed(f"expected a block inside the device, found address {address}")
        memory[start : start + spec.BLOCK_SIZE] = data
        pending.add(address // CHUNK_BLOCKS)
