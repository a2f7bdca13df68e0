# SPDX-License-Identifier: Apache-2.0
"""A daemon that breaks a rule of the store: ``python -m tests.nemesis.mutant NAME OPTIONS...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vhost_rpmb import cli
from vhost_rpmb.storage.fleet.engine import (
    Answer,
    Compare,
    Get,
    Operation,
    Put,
    Refused,
    Unknown,
)
from vhost_rpmb.storage.fleet.etcd import Etcd
from vhost_rpmb.storage.fleet.ownership import Ownership
from vhost_rpmb.storage.fleet.presence import Presence

_send = Etcd.txn


def _without_compares(
    self: Etcd,
    compare: Sequence[Compare],
    success: Sequence[Operation],
    failure: Sequence[Operation] = (),
) -> Answer:
    """Apply each change of a state, whoever owns the device."""
    kept = [each for each in compare if not each.value]
    return _send(self, kept, success, failure)


def _believing_a_read(
    self: Etcd,
    compare: Sequence[Compare],
    success: Sequence[Operation],
    failure: Sequence[Operation] = (),
) -> Answer:
    """Take a commit without an answer for refused if a read does not show it."""
    try:
        return _send(self, compare, success, failure)
    except Unknown as error:
        heads = [each for each in success if isinstance(each, Put) and b"/h/" in each.key]
        if not heads:
            raise
        while True:
            try:
                found = _send(self, [], [Get(heads[0].key)]).found
            except Unknown:
                continue
            if found.get(heads[0].key) != heads[0].value:
                raise Refused("not there") from error
            raise


def main() -> int:
    match sys.argv[1]:
        case "no-compares":
            Etcd.txn = _without_compares  # type: ignore[method-assign]
        case "believes-a-read":
            Etcd.txn = _believing_a_read  # type: ignore[method-assign]
            keywords = Etcd.__init__.__kwdefaults__
            assert keywords is not None
            keywords["timeout"] = 0.3
        case "reads-without-lease":
            Ownership.certain = property(lambda self: True)  # type: ignore[assignment]
            Ownership.renew = lambda self: True  # type: ignore[method-assign]
        case "takes-owners-for-dead":
            Presence.is_dead = lambda self, token: True  # type: ignore[method-assign]
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
