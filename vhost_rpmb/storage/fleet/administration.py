# SPDX-License-Identifier: Apache-2.0
"""Steps of an administrator: create and accept devices, replace the key-encryption key.

Each is one transaction that compares what it replaces, so it happens once or not at all.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vhost_rpmb.errors import StateError, UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.fleet.contents import Device, context, open_device
from vhost_rpmb.storage.fleet.engine import Compare, Get, Put, Refused
from vhost_rpmb.storage.fleet.layout import (
    NO_CHAIN,
    Head,
    Info,
    Keys,
    Malformed,
    Owner,
    after,
    head_prefix,
    incarnation_key,
)
from vhost_rpmb.storage.fleet.ownership import ACTIVE, active_owner
from vhost_rpmb.storage.fleet.requests import Requests, named_refusals
from vhost_rpmb.storage.fleet.seal import KEY_SIZE, KeyEncryptionKey, Sealer

__all__ = [
    "Description",
    "NameTaken",
    "accept",
    "choose_incarnation",
    "create",
    "describe",
    "list_devices",
    "quarantine",
    "replace_kek",
    "taken",
]

_PAGE = 1000  # heads


class NameTaken(StateError):
    """Another device has the name for ever, so this one will never be there."""


class Description(NamedTuple):
    """A device as it is now. Of a listed one nothing is authenticated."""

    device: str
    size: int
    counter: int
    programmed: bool
    quarantined: bool
    alive: bool  # an owner renews its lease
    state: str  # "active", or where the device went
    epoch: int  # how often the device was taken over or accepted
    host: str
    pid: int


def create(requests: Requests, keys: Keys, kek: KeyEncryptionKey, size: int, origin: str) -> None:
    """Create a blank device without a key that no daemon owns.

    Raises UsageError for a wrong size, StateError if the device exists or the store refuses it.
    """
    if size % spec.CAPACITY_UNIT or not 0 < size <= spec.MAX_CAPACITY:
        raise UsageError(f"the size: expected 1 to 128 times 128 KiB, found {size} bytes")
    with named_refusals(f"to create {keys.device}"):
        incarnation = choose_incarnation(requests, keys)
        secret = os.urandom(KEY_SIZE)
        info = Info(size, secrets.token_hex(8), kek.name, b"", origin)
        place = context(keys, info)
        info = info._replace(secret=kek.wrap(secret, place))
        head = Head(0, 0, 0, incarnation, NO_CHAIN, False).pack(Sealer(secret, place))
        owner = Owner(0, secrets.token_hex(16), "", 0, ACTIVE)
        answer = requests.change(
            [Compare(keys.owner, None)],
            [Put(keys.owner, owner.pack()), Put(keys.info, info.pack()), Put(keys.head, head)],
            [Get(keys.info)],
        )
    if not answer.succeeded and answer.found.get(keys.info) != info.pack():
        raise taken(keys)


def taken(keys: Keys) -> NameTaken:
    """Return the error of a name that another device has."""
    return NameTaken(f"the device {keys.device} exists already: choose another name")


def choose_incarnation(requests: Requests, keys: Keys) -> bytes:
    """Return the random name of the store's present life; the first device chooses it."""
    chosen = os.urandom(16)
    answer = requests.change(
        [Compare(keys.incarnation, None)],
        [Put(keys.incarnation, chosen)],
        [Get(keys.incarnation)],
    )
    return chosen if answer.succeeded else answer.found[keys.incarnation]


def replace_kek(
    requests: Requests, keys: Keys, old: KeyEncryptionKey, new: KeyEncryptionKey
) -> None:
    """Seal the secret of a device with another key-encryption key; a daemon may serve the device.

    The secret stays: whoever had the old key and a copy of the store can still read that copy.
    Raises StateError.
    """
    with named_refusals(f"to change {keys.device}"):
        device = _open(requests, keys, old)
        secret = old.unwrap_secret(device.info.secret, context(keys, device.info))
        wrapped = new.wrap(secret, context(keys, device.info))
        info = device.info._replace(kek=new.name, secret=wrapped)
        answer = requests.change(
            [Compare(keys.info, device.info_record)],
            [Put(keys.info, info.pack())],
            [Get(keys.info)],
        )
    if not answer.succeeded and answer.found.get(keys.info) != info.pack():
        raise _changed(keys)


def quarantine(requests: Requests, prefix: bytes) -> None:
    """Refuse all devices below the prefix until each is accepted; after a backup was restored.

    A daemon that serves a device goes on; the next start is refused. Raises StateError.
    """
    chosen, key = os.urandom(16), incarnation_key(prefix)
    with named_refusals("the quarantine"):
        before = requests.read([], [key]).found.get(key)
        answer = requests.change([Compare(key, before)], [Put(key, chosen)], [Get(key)])
    if not answer.succeeded and answer.found.get(key) != chosen:
        raise StateError("the quarantine of the store was changed by another command: repeat it")


def describe(requests: Requests, keys: Keys, kek: KeyEncryptionKey) -> Description:
    """Report a device, its head authenticated; a daemon may serve it. Raises StateError."""
    with named_refusals(f"to read {keys.device}"):
        device = _open(requests, keys, kek)
        names = [keys.owner, keys.alive, keys.info, keys.incarnation]
        found = requests.read([], names).found
        return _describe(keys, device.head, found)._replace(size=device.info.size)


def list_devices(requests: Requests, prefix: bytes) -> Iterator[Description]:
    """Report all devices in the order of their names. Raises StateError."""
    heads = head_prefix(prefix)
    try:
        found = requests.read([], [incarnation_key(prefix)]).found
        pairs = requests.pages(heads, after(heads), _PAGE)
        while page := list(itertools.islice(pairs, _PAGE)):
            devices = [Keys(prefix, key[len(heads) :].decode()) for key, _ in page]
            first, last = (
                (keys.owner, keys.alive, keys.info) for keys in (devices[0], devices[-1])
            )
            records = dict(found)
            for start, end in zip(first, last, strict=True):
                records |= dict(requests.pages(start, end + b"\0", _PAGE))
            for keys, (_, record) in zip(devices, page, strict=True):
                yield _describe(keys, Head.unpack(record), records)
    except (Refused, Malformed, ValueError) as error:
        raise StateError(f"the devices below {prefix.decode()}: {error}") from error


def _describe(keys: Keys, head: Head, found: Mapping[bytes, bytes]) -> Description:
    try:
        owner = Owner.unpack(found.get(keys.owner, b""))
        info = Info.unpack(found.get(keys.info, b""))
    except (Malformed, ValueError) as error:
        raise StateError(f"the device {keys.device}: {error}: restore the store") from error
    return Description(
        keys.device,
        info.size,
        head.counter,
        head.programmed,
        head.incarnation != found.get(keys.incarnation),
        keys.alive in found,
        owner.state,
        owner.epoch,
        owner.host,
        owner.pid,
    )


def accept(requests: Requests, keys: Keys, kek: KeyEncryptionKey) -> None:
    """Declare the state that the store has of a device now as the right one.

    Refused while a daemon serves the device. Raises StateError.
    """
    with named_refusals(f"to accept {keys.device}"):
        device = _open(requests, keys, kek)
        found = requests.read([], [keys.owner, keys.alive, keys.incarnation]).found
        if keys.owner not in found or keys.alive in found:
            raise StateError(f"the device {keys.device} is in use: stop its daemon first")
        before = active_owner(found[keys.owner], keys.device)
        owner = Owner(before.epoch + 1, secrets.token_hex(16), "", 0, ACTIVE)
        accepted = device.head._replace(incarnation=found[keys.incarnation])
        head = accepted.pack(device.sealer)
        answer = requests.change(
            [
                Compare(keys.owner, found[keys.owner]),
                Compare(keys.alive, None),
                Compare(keys.head, device.head_record),
            ],
            [Put(keys.owner, owner.pack()), Put(keys.head, head)],
            [Get(keys.owner)],
        )
    if not answer.succeeded and answer.found.get(keys.owner) != owner.pack():
        raise _changed(keys)


def _open(requests: Requests, keys: Keys, kek: KeyEncryptionKey) -> Device:
    found = requests.read([], [keys.info, keys.head]).found
    return open_device(keys, found.get(keys.info), found.get(keys.head), kek)


def _changed(keys: Keys) -> StateError:
    return StateError(f"the device {keys.device} was changed by another command: repeat this one")
