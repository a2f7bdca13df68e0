# SPDX-License-Identifier: Apache-2.0
"""Whether a state that arrives may replace the device that is here; nothing is changed here."""

from __future__ import annotations

from vhost_rpmb.migration.blob import State
from vhost_rpmb.storage.interface import EXPORTED, IMPORTED, VACANT, Possession
from vhost_rpmb.storage.local.keyfile import fingerprint
from vhost_rpmb.typed import NamedTuple

__all__ = ["Present", "check_arrival", "is_own"]


class Present(NamedTuple):
    """The device that is here. ``size`` and ``config``: see `State`."""

    name: str
    possession: Possession
    counter: int
    size: int
    config: bytes
    key: bytes | None


def is_own(present: Present, state: State) -> bool:
    """Whether a state is that of the hand-over by which the device left, or arrived."""
    possession = present.possession
    return (
        present.name == state.name
        and possession.state in (EXPORTED, IMPORTED)
        and possession.token == state.token
        and possession.generation == state.generation
        and present.counter == state.counter
    )


def check_arrival(present: Present, state: State) -> None:
    """ValueError for a state that must not replace what is here."""
    possession = present.possession
    if state.size != present.size or state.config != present.config:
        raise ValueError(
            f"expected {present.size} bytes and config space {present.config.hex()}, found"
            f" {state.size} and {state.config.hex()}: use an image of the same size and the same"
            " options on both hosts"
        )
    if possession.state == VACANT or is_own(present, state):
        return
    if state.name != present.name:
        raise ValueError(
            f"expected device {present.name}, found {state.name}: name files of that device, or a"
            " new image"
        )
    if state.generation <= possession.generation:
        raise ValueError(
            f"expected a generation above {possession.generation} of device {state.name}, found"
            f" {state.generation}: a state is used once, a snapshot cannot be restored"
        )
    if state.counter < present.counter:
        raise ValueError(
            f"expected a write counter of at least {present.counter}, found {state.counter}:"
            " the state is outdated"
        )
    if present.key is not None and fingerprint(present.key) != state.fingerprint:
        raise ValueError("expected the key of this device, found another: check --key-path")
