# SPDX-License-Identifier: Apache-2.0
"""The state of a device as the bytes that a front-end carries.

The format is in docs/decisions/0036-device-state.md.

Big-endian. The length comes first and SHA-256 of everything before it last, so that a blob that was
cut or changed is refused as a whole.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from vhost_rpmb.cursor import Cursor
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.limits import MAX_REPLAY_WRITES, REPLAY_WRITE_SIZE
from vhost_rpmb.rpmb.replay import Replay
from vhost_rpmb.typed import NamedTuple

__all__ = ["COPY", "TICKET", "State", "largest", "pack", "unpack"]

FORMAT = 1
TICKET, COPY = 1, 2  # kinds: without and with the blocks

_MAGIC = b"RPMBMOVE"
_HEADER = struct.Struct(">8sQHH")  # magic, length of everything, format, kind
_DIGEST_SIZE = 32  # bytes
_IDENTITY = struct.Struct(">Q16sII3s")  # generation, token, counter, size, config space
_BYTE, _WORD, _LONG = struct.Struct(">B"), struct.Struct(">H"), struct.Struct(">I")
_KINDS = {TICKET: "a ticket (--migration=shared)", COPY: "a copy (--migration=copy)"}
_BLOCK_SIZE = _WORD.size + spec.BLOCK_SIZE
_REST = 4096  # bytes; more than everything but replay record and blocks


class State(NamedTuple):
    """What travels.

    ``generation`` and ``token`` are of this hand-over, ``size`` of the image in bytes.
    ``fingerprint`` of the key and ``sealed_key`` are empty without one, ``register`` is the result
    register. A ticket has the ``digest`` of the blocks that stay where they are; a copy has the
    addresses of ``damaged`` blocks and the ``blocks`` that are not zeros, ascending.
    """

    kind: int
    name: str
    generation: int
    token: bytes
    counter: int
    size: int
    config: bytes
    fingerprint: bytes
    sealed_key: bytes
    register: bytes
    replay: Replay
    digest: bytes = b""
    damaged: Sequence[int] = ()
    blocks: Sequence[tuple[int, bytes]] = ()

    @property
    def context(self) -> bytes:
        """What a sealed key belongs to: this hand-over of this device."""
        return f"{self.name}\0{self.generation}\0".encode() + self.token

    def image(self) -> bytes:
        """All blocks of a copy; zeros where one is damaged."""
        image = bytearray(self.size)
        for address, data in self.blocks:
            image[address * spec.BLOCK_SIZE : (address + 1) * spec.BLOCK_SIZE] = data
        return bytes(image)


def largest(size: int) -> int:
    """The length that no blob of a device of this size exceeds."""
    blocks = size // spec.BLOCK_SIZE * (_BLOCK_SIZE + _WORD.size)
    return _REST + MAX_REPLAY_WRITES * REPLAY_WRITE_SIZE + blocks


def pack(state: State) -> bytes:
    """Return the bytes of a state."""
    replay = state.replay.pack()
    name = state.name.encode()
    body = [
        *(_BYTE.pack(len(name)), name),
        _IDENTITY.pack(state.generation, state.token, state.counter, state.size, state.config),
        *(_BYTE.pack(len(state.fingerprint)), state.fingerprint),
        *(_WORD.pack(len(state.sealed_key)), state.sealed_key),
        *(_BYTE.pack(len(state.register)), state.register),
        *(_LONG.pack(len(replay)), replay),
        *(_BYTE.pack(len(state.digest)), state.digest),
        _LONG.pack(len(state.damaged)),
        *(_WORD.pack(address) for address in state.damaged),
        _LONG.pack(len(state.blocks)),
    ]
    for address, data in state.blocks:
        body += (_WORD.pack(address), data)
    content = b"".join(body)
    length = _HEADER.size + len(content) + _DIGEST_SIZE
    content = _HEADER.pack(_MAGIC, length, FORMAT, state.kind) + content
    return content + hashlib.sha256(content).digest()


def unpack(blob: bytes, kind: int) -> State:
    """Read a state of one kind; ValueError for bytes that `pack` does not return."""
    if len(blob) < _HEADER.size or not blob.startswith(_MAGIC):
        raise ValueError("expected the state of an RPMB device, found other bytes")
    _, length, number, found = _HEADER.unpack_from(blob)
    if number != FORMAT:
        raise ValueError(
            f"expected a state of format {FORMAT}, found {number}: use the same version of"
            " vhost-rpmb on both hosts"
        )
    if length != len(blob) or length < _HEADER.size + _DIGEST_SIZE:
        raise ValueError(f"expected a state of {length} bytes, found {len(blob)}")
    content, digest = blob[:-_DIGEST_SIZE], blob[-_DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("expected a state as it was sent, found one that was changed")
    if found != kind:
        raise ValueError(
            f"expected {_KINDS[kind]}, found {_KINDS.get(found, f'kind {found}')}: use the same"
            " mode on both hosts"
        )
    return _unpack(Cursor(content, "state", _HEADER.size), kind)


def _unpack(cursor: Cursor, kind: int) -> State:
    name = cursor.counted(_BYTE).decode("ascii", "replace")
    generation, token, counter, size, config = cursor.take(_IDENTITY)
    if not size or size % spec.CAPACITY_UNIT or size > spec.MAX_CAPACITY:
        raise ValueError(f"expected an image of 1 to 128 units of 128 KiB, found {size} bytes")
    fingerprint = cursor.counted(_BYTE)
    sealed_key = cursor.counted(_WORD)
    register = cursor.counted(_BYTE)
    replay = Replay.unpack(cursor.counted(_LONG))
    digest = cursor.counted(_BYTE)
    damaged = [cursor.take(_WORD)[0] for _ in range(cursor.take(_LONG)[0])]
    blocks = [
        (cursor.take(_WORD)[0], cursor.raw(spec.BLOCK_SIZE)) for _ in range(cursor.take(_LONG)[0])
    ]
    cursor.end()
    state = State(
        *(kind, name, generation, token, counter, size, config, fingerprint, sealed_key),
        *(register, replay, digest, damaged, blocks),
    )
    _check(state)
    return state


def _check(state: State) -> None:
    """ValueError for values that no device has."""
    if not state.name.isalnum() or len(state.name) > 16 or not state.generation:
        raise ValueError(
            f"expected the name and generation of a device, found {state.name!r} and"
            f" {state.generation}"
        )
    for what, value, sizes in (
        ("fingerprint", state.fingerprint, (0, spec.KEY_SIZE)),
        ("result register", state.register, (0, 10)),
        ("digest", state.digest, (_DIGEST_SIZE,) if state.kind == TICKET else (0,)),
    ):
        if len(value) not in sizes:
            raise ValueError(f"expected a {what} of {sizes[-1]} bytes, found {len(value)}")
    addresses = [address for address, _ in state.blocks]
    for found in (state.damaged, addresses):
        if list(found) != sorted(set(found)) or any(
            address >= state.size // spec.BLOCK_SIZE for address in found[-1:]
        ):
            raise ValueError("expected ascending addresses of the image, found others")
    if not set(addresses).isdisjoint(state.damaged) or (state.kind == TICKET and addresses):
        raise ValueError("expected blocks of a copy that are not damaged, found others")
