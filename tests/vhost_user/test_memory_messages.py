# SPDX-License-Identifier: Apache-2.0
"""SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.peer import PAGE, REGION, Peer
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MemoryRegion, Request


def mapped(peer: Peer) -> tuple[tuple[int, int, int], ...]:
    return peer.regions


def make_places(count: int) -> list[MemoryRegion]:
    return [REGION._replace(guest_address=(2 * n + 1) * PAGE) for n in range(count)]


def test_every_memory_slot_can_be_used(peer: Peer, memfd: int) -> None:
    slots = peer.ask_u64(Request.GET_MAX_MEM_SLOTS)
    assert slots == 509
    places = make_places(slots + 1)
    for place in places[:-1]:
        assert peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(place), (memfd,)) == 0
    peer.refused(Request.ADD_MEM_REG, wire.pack_single_region(places[-1]), (memfd,))
    assert len(mapped(peer)) == slots


def test_table_of_32_regions(peer: Peer, memfd: int) -> None:
    places = make_places(32)
    table = wire.pack_memory_table(places)
    assert peer.ack(Request.SET_MEM_TABLE, table, (memfd,) * 32) == 0
    assert mapped(peer) == tuple(place[:3] for place in places)


def test_table_replaces_the_previous_one(peer: Peer, memfd: int) -> None:
    for place in make_places(3):
        table = wire.pack_memory_table([place])
        assert peer.ack(Request.SET_MEM_TABLE, table, (memfd,)) == 0
        assert mapped(peer) == (place[:3],)
    assert peer.ack(Request.SET_MEM_TABLE, wire.pack_memory_table([])) == 0
    assert mapped(peer) == ()


@pytest.mark.parametrize(
    "wrong",
    [
        REGION._replace(guest_address=0xFFF0_0000, size=0),
        REGION._replace(guest_address=REGION.guest_address + 100),
        REGION._replace(guest_address=0xFFF0_0000, mmap_offset=16 * PAGE),
        REGION._replace(guest_address=0xFFF0_0000, mmap_offset=1 << 63),
        REGION._replace(guest_address=(1 << 64) - PAGE // 2),
        REGION._replace(guest_address=0xFFF0_0000, user_address=(1 << 64) - 1),
    ],
    ids=["empty", "overlap", "past-the-end", "offset", "wraps", "user-address-wraps"],
)
def test_invalid_region_changes_nothing(peer: Peer, memfd: int, wrong: MemoryRegion) -> None:
    good = REGION
    assert peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(good), (memfd,)) == 0
    peer.refused(Request.ADD_MEM_REG, wire.pack_single_region(wrong), (memfd,))
    assert mapped(peer) == (good[:3],)
    table = wire.pack_memory_table([good, wrong])
    peer.refused(Request.SET_MEM_TABLE, table, (memfd, memfd))
    assert mapped(peer) == (good[:3],)


def test_descriptor_that_cannot_be_mapped_is_refused(peer: Peer, eventfds: list[int]) -> None:
    fds = (eventfds[0],)
    peer.refused(Request.ADD_MEM_REG, wire.pack_single_region(REGION), fds)
    peer.refused(Request.SET_MEM_TABLE, wire.pack_memory_table([REGION]), fds)
    assert mapped(peer) == ()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_number_of_descriptors_has_to_match_the_table(
    peer: Peer, memfd: int, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    table = wire.pack_memory_table(make_places(2))
    peer.refused(Request.SET_MEM_TABLE, table, (memfd,) * count)
    assert mapped(peer) == ()
    assert f"for each of 2 memory regions, found {count}" in caplog.text


def test_table_with_lost_descriptors_is_refused(peer: Peer, memfd: int) -> None:
    table = wire.pack_memory_table(make_places(32))
    peer.refused(Request.SET_MEM_TABLE, table, (memfd,) * 40)
    assert mapped(peer) == ()


@pytest.mark.parametrize("fds", [0, 1])
def test_region_is_removed(peer: Peer, memfd: int, fds: int) -> None:
    for place in make_places(2):
        assert not peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(place), (memfd,))
    first, second = make_places(2)
    ignored = wire.pack_single_region(first._replace(mmap_offset=77))
    assert peer.ack(Request.REM_MEM_REG, ignored, (memfd,) * fds) == 0
    assert mapped(peer) == (second[:3],)


@pytest.mark.parametrize("field", ["guest_address", "size", "user_address"])
def test_removing_an_unknown_region_is_refused(peer: Peer, memfd: int, field: str) -> None:
    assert not peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(REGION), (memfd,))
    other = REGION._replace(**{field: 0x5000})
    peer.refused(Request.REM_MEM_REG, wire.pack_single_region(other))
    assert mapped(peer) == (REGION[:3],)


def test_memory_is_unmapped_at_disconnect(peer: Peer, engine: Engine) -> None:
    fd = os.memfd_create("unmapped-at-the-end")
    os.ftruncate(fd, PAGE)
    assert not peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(REGION), (fd,))
    os.close(fd)
    assert "unmapped-at-the-end" in Path("/proc/self/maps").read_text()
    peer.close()
    assert "unmapped-at-the-end" not in Path("/proc/self/maps").read_text()
