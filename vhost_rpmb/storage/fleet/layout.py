# SPDX-License-Identifier: Apache-2.0
"""Keys and records of a device in the engine. docs/fleet.md has the table.

The kind comes first in a key, so that all devices are one range. Chunks, log, table and RPMB key
have the random ID of the device's creation in their keys: a delayed request of an earlier life of
the name changes nothing of a later one.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from vhost_rpmb.errors import StateError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.fleet.seal import MAC_SIZE, Sealer

__all__ = [
    "CHUNK",
    "CHUNK_BLOCKS",
    "NO_CHAIN",
    "Entry",
    "Head",
    "Info",
    "Keys",
    "Malformed",
    "Owner",
    "Table",
    "after",
    "chain",
    "head_prefix",
    "incarnation_key",
]

CHUNK_BLOCKS = 64
CHUNK = CHUNK_BLOCKS * spec.BLOCK_SIZE  # bytes
NO_CHAIN = bytes(32)
MAX_NAME = 128  # characters

_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PROGRAMMED = 1
_HEAD = struct.Struct(">BBIQQ16s32s")  # format, flags, counter, seq, folded, incarnation, chain
_ENTRY = struct.Struct(">BII")  # format, counter, number of blocks
_ADDRESS = struct.Struct(">H")
_BLOCK = _ADDRESS.size + spec.BLOCK_SIZE
_SEQ = struct.Struct(">Q")

# Fields of records in JSON.
_OWNER_FIELDS = {"epoch": int, "token": str, "host": str, "pid": int, "state": str}
_INFO_FIELDS = {
    "format": int, "size": int, "life": str, "kek": str, "secret": str, "origin": str
}  # fmt: skip


class Malformed(Exception):
    """A record that this version cannot read; the text names what was expected and found."""


def check_name(device: str) -> str:
    """Return the name of a device. Raises StateError unless it is suitable as one."""
    if not _NAME.fullmatch(device) or len(device) > MAX_NAME:
        raise StateError(
            f"the device name: expected 1 to {MAX_NAME} of the characters A-Z a-z 0-9 _ . -,"
            f" the first one no . or -, found {device!r}: choose another name"
        )
    return device


class Keys:
    """The keys of one device below a prefix."""

    def __init__(self, prefix: bytes, device: str) -> None:
        self.prefix = prefix
        self.device = check_name(device)
        name = device.encode()
        self.owner = prefix + b"o/" + name
        self.alive = prefix + b"a/" + name
        self.head = head_prefix(prefix) + name
        self.info = prefix + b"i/" + name
        self.incarnation = incarnation_key(prefix)

    def context(self, life: str) -> bytes:
        """Return what sealed bytes are bound to: prefix, device and its life."""
        return b"\0".join((self.prefix, self.device.encode(), life.encode()))

    def _of(self, kind: bytes, life: str) -> bytes:
        return self.prefix + kind + b"/" + self.device.encode() + b"/" + life.encode()

    def key(self, life: str) -> bytes:
        """Return the key of the sealed RPMB key."""
        return self._of(b"k", life)

    def table(self, life: str) -> bytes:
        """Return the key of the table of chunks."""
        return self._of(b"t", life)

    def chunks(self, life: str) -> bytes:
        """Return the prefix of all chunks."""
        return self._of(b"c", life) + b"/"

    def chunk(self, life: str, number: int) -> bytes:
        """Return the key of a chunk."""
        return self.chunks(life) + b"%04x" % number

    def log(self, life: str) -> bytes:
        """Return the prefix of all log entries."""
        return self._of(b"l", life) + b"/"

    def entry(self, life: str, seq: int) -> bytes:
        """Return the key of a log entry."""
        return self.log(life) + b"%016x" % seq


def head_prefix(prefix: bytes) -> bytes:
    """Return the prefix of the heads of all devices."""
    return prefix + b"h/"


def incarnation_key(prefix: bytes) -> bytes:
    """Return the key of the store's incarnation."""
    return prefix + b"incarnation"


def after(prefix: bytes) -> bytes:
    """Return the first key behind all keys with a prefix."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def chain(before: bytes, sealed_entry: bytes) -> bytes:
    """Return the chain value of the log up to and including an entry."""
    return hashlib.sha256(before + sealed_entry).digest()


class Head(NamedTuple):
    """What each commit replaces: readable, authenticated, different after every change."""

    counter: int
    seq: int  # of the last log entry, 0: none yet
    folded: int  # log entries up to this one are in the chunks
    incarnation: bytes  # of the store, in which the device was created or accepted
    chain: bytes  # over all log entries
    programmed: bool

    def pack(self, sealer: Sealer) -> bytes:
        """Return the record."""
        body = _HEAD.pack(
            _FORMAT,
            _PROGRAMMED if self.programmed else 0,
            self.counter,
            self.seq,
            self.folded,
            self.incarnation,
            self.chain,
        )
        return body + sealer.mac(b"head\0" + body)

    @classmethod
    def unpack(cls, record: bytes) -> Self:
        """Return what the record says, not authenticated. Raises `Malformed`."""
        if len(record) != _HEAD.size + MAC_SIZE or record[0] != _FORMAT:
            raise Malformed(
                f"expected a head of format {_FORMAT}, found {len(record)} bytes of format"
                f" {record[0] if record else 'none'}"
            )
        _, flags, counter, seq, folded, incarnation, chain_value = _HEAD.unpack_from(record)
        return cls(counter, seq, folded, incarnation, chain_value, bool(flags & _PROGRAMMED))

    @staticmethod
    def is_authentic(record: bytes, sealer: Sealer) -> bool:
        """Tell whether a host with the key-encryption key made the record for this device."""
        body, mac = record[: _HEAD.size], record[_HEAD.size :]
        return hmac.compare_digest(mac, sealer.mac(b"head\0" + body))


class Entry(NamedTuple):
    """One commit, as it is before sealing. ``record``: bytes that the device stored with it."""

    counter: int
    blocks: Sequence[tuple[int, bytes]]
    record: bytes

    def pack(self) -> bytes:
        """Return the bytes of the entry."""
        parts = [_ENTRY.pack(_FORMAT, self.counter, len(self.blocks))]
        for address, data in self.blocks:
            parts += (_ADDRESS.pack(address), data)
        return b"".join((*parts, self.record))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Return what `pack` was given. Raises `Malformed`."""
        if len(data) < _ENTRY.size or data[0] != _FORMAT:
            raise Malformed(f"expected a log entry of format {_FORMAT}, found another")
        _, counter, count = _ENTRY.unpack_from(data)
        end = _ENTRY.size + count * _BLOCK
        if end > len(data):
            raise Malformed(f"expected a log entry with {count} blocks, found {len(data)} bytes")
        blocks = [
            (_ADDRESS.unpack_from(data, at)[0], data[at + _ADDRESS.size : at + _BLOCK])
            for at in range(_ENTRY.size, end, _BLOCK)
        ]
        return cls(counter, blocks, data[end:])

    @staticmethod
    def place(seq: int) -> bytes:
        """Return the place for which an entry is sealed."""
        return b"log/%d" % seq


class Table(NamedTuple):
    """The versions of all chunks at a checkpoint; an exchanged chunk is found by it.

    ``versions``: for each chunk the log entry up to which it is complete, 0 for one that was never
    written. ``chain``: the chain value before the last entry of that checkpoint, which stays in the
    log.
    """

    versions: Sequence[int]
    chain: bytes

    def pack(self, sealer: Sealer, folded: int) -> bytes:
        """Return the sealed record of the checkpoint up to an entry."""
        data = self.chain + b"".join(map(_SEQ.pack, self.versions))
        return sealer.seal(data, b"table/%d" % folded)

    @classmethod
    def unpack(cls, record: bytes, sealer: Sealer, folded: int) -> Self:
        """Return what was packed for the same checkpoint. Raises `Unsealable`."""
        data = sealer.open(record, b"table/%d" % folded)
        return cls([each for (each,) in _SEQ.iter_unpack(data[32:])], data[:32])


def pack_chunk(sealer: Sealer, number: int, version: int, data: bytes) -> bytes:
    """Return the record of a chunk that is complete up to a log entry."""
    return _SEQ.pack(version) + sealer.seal(data, b"chunk/%d/%d" % (number, version))


def unpack_chunk(sealer: Sealer, number: int, record: bytes) -> tuple[int, bytes]:
    """Return version and data of a chunk. Raises `Unsealable` and `Malformed`."""
    if len(record) <= _SEQ.size:
        raise Malformed(f"expected a chunk, found {len(record)} bytes")
    (version,) = _SEQ.unpack_from(record)
    return version, sealer.open(record[_SEQ.size :], b"chunk/%d/%d" % (number, version))


class Owner(NamedTuple):
    """The daemon that may write; the random token makes each record unique."""

    epoch: int
    token: str
    host: str
    pid: int
    state: str  # "active", or the reason why no daemon may take the device over

    def pack(self) -> bytes:
        """Return the record."""
        return json.dumps(self._asdict()).encode()

    @classmethod
    def unpack(cls, record: bytes) -> Self:
        """Return what the record says. Raises `Malformed`."""
        return cls(**_fields(record, "an owner", _OWNER_FIELDS))

    def __str__(self) -> str:
        """Name the owner in one line of a log."""
        return f"process {self.pid} on host {self.host}" if self.pid else "no daemon"


class Info(NamedTuple):
    """What never changes in a device's life, and its wrapped secret, which a new KEK replaces."""

    size: int  # bytes
    life: str  # random, see `Keys`
    kek: str  # the name of the key-encryption key
    secret: bytes  # wrapped
    origin: str  # text for the operator: where the device came from

    def pack(self) -> bytes:
        """Return the record."""
        secret = base64.b64encode(self.secret).decode()
        return json.dumps({"format": _FORMAT} | self._asdict() | {"secret": secret}).encode()

    @classmethod
    def unpack(cls, record: bytes) -> Self:
        """Return what the record says. Raises `Malformed`."""
        fields = _fields(record, "the description of a device", _INFO_FIELDS)
        if fields.pop("format") != _FORMAT:
            raise Malformed(f"expected a device of format {_FORMAT}, found a later one")
        size = fields["size"]
        if size % spec.CAPACITY_UNIT or not 0 < size <= spec.MAX_CAPACITY:
            raise Malformed(f"expected 1 to 128 times 128 KiB, found a device of {size} bytes")
        fields["secret"] = base64.b64decode(fields["secret"])
        return cls(**fields)


def _fields(record: bytes, what: str, types: dict[str, type]) -> dict[str, Any]:
    """Return the fields of a JSON record; unknown ones are left out."""
    try:
        fields = json.loads(record)
        known = {name: fields[name] for name in types}
    except (ValueError, KeyError, TypeError) as error:
        raise Malformed(f"expected {what}, found another record") from error
    for name, value in known.items():
        if type(value) is not types[name]:
            raise Malformed(f"expected {what}, found no valid field {name!r}")
    return known
