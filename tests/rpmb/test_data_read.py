# SPDX-License-Identifier: Apache-2.0
"""DATA_READ: its answer and its checks, in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.oracle import (
    ADDR,
    GENERAL,
    NO_KEY,
    NONCE,
    READ,
    A,
    B,
    C,
    Frame,
    mac_of,
    read_counter,
    read_data,
    sealed,
)
from tests.support.rig import UNIT_BLOCKS, Rig, RigFactory, make_image
from vhost_rpmb.rpmb import spec


def test_read_answers_data_nonce_address_and_count(keyed: Rig) -> None:
    keyed.write(0, 5, A)
    assert keyed.chain(read_data(5)) == [
        sealed(
            data=A,
            nonce=NONCE,
            address=5,
            block_count=1,
            req_resp=spec.VIRTIO_RPMB_RESP_DATA_READ,
        )
    ]


def test_read_of_several_blocks_has_one_mac_in_the_last_frame(keyed: Rig) -> None:
    keyed.write(0, 5, A, B, C)
    frames = [
        Frame(
            data=data,
            nonce=NONCE,
            address=5,
            block_count=3,
            req_resp=spec.VIRTIO_RPMB_RESP_DATA_READ,
        )
        for data in (A, B, C)
    ]
    frames[2] = frames[2]._replace(key_mac=mac_of(*frames))
    assert keyed.chain(read_data(5, 3), 3) == frames


def check_read_fails(rig: Rig, data: bytes, result: int, room: int = 1) -> None:
    asked = Frame.unpack(data)
    frame = Frame(
        nonce=NONCE,
        address=asked.address,
        block_count=asked.block_count,
        result=result,
        req_resp=spec.VIRTIO_RPMB_RESP_DATA_READ,
    )
    if rig.store.key is not None:
        frame = frame._replace(key_mac=mac_of(frame))
    assert rig.chain(data, room) == [frame]


def test_read_without_a_key_fails(rig: Rig) -> None:
    check_read_fails(rig, read_data(600, 300), NO_KEY)


def test_read_of_more_blocks_than_allowed_fails(make_rig: RigFactory) -> None:
    rig = make_rig(max_read_blocks=2)
    rig.program()
    check_read_fails(rig, read_data(600, 3), GENERAL, 3)
    assert rig.read(0, 2) == [bytes(256)] * 2


def test_read_of_255_blocks_is_allowed_by_default(keyed: Rig) -> None:
    assert keyed.read(0, 255) == [bytes(256)] * 255
    check_read_fails(keyed, read_data(0, 256), GENERAL, 256)


@pytest.mark.parametrize(("limit", "blocks"), [(255, 255), (0, 255), (0, 256)])
def test_read_of_an_object_of_65280_bytes(make_rig: RigFactory, limit: int, blocks: int) -> None:
    """OP-TEE asks for 256 blocks where the object begins within a block."""
    rig = make_rig(max_read_blocks=limit, max_write_blocks=255)
    rig.program()
    stored = [bytes([number % 251]) * 256 for number in range(blocks)]
    rig.write(0, 3, *stored[:255])
    rig.write(1, 258, *stored[255:] or [A])
    answers = rig.chain(read_data(3, blocks), blocks)
    assert [answer.data for answer in answers] == stored
    assert {answer.block_count for answer in answers} == {blocks}
    assert answers[-1].key_mac == mac_of(*answers)


def test_read_without_a_limit_is_bounded_by_the_room(make_rig: RigFactory, tmp_path: Path) -> None:
    rig = make_rig(make_image(tmp_path / "large", 16), max_read_blocks=0)
    rig.program()
    assert rig.read(0, 2048) == [bytes(256)] * 2048
    assert len(rig.chain(read_data(0, 0), 2048)) == 2048
    check_read_fails(rig, read_data(0, 2049), GENERAL, 2049)
    check_read_fails(rig, read_data(0, 300), GENERAL, 299)
    assert len(rig.chain(read_data(0, 0), 3000)) == 2048


@pytest.mark.parametrize(
    ("address", "count"), [(UNIT_BLOCKS, 1), (UNIT_BLOCKS - 1, 2), (65535, 255)]
)
def test_read_beyond_the_capacity_fails(keyed: Rig, address: int, count: int) -> None:
    check_read_fails(keyed, read_data(address, count), ADDR)


def test_read_of_more_blocks_than_there_is_room_fails(keyed: Rig) -> None:
    check_read_fails(keyed, read_data(0, 3), GENERAL, 2)


def test_read_with_count_0_fills_the_room(keyed: Rig) -> None:
    keyed.write(0, 5, A, B, C)
    answers = keyed.chain(read_data(5, 0), 3)
    assert [answer.data for answer in answers] == [A, B, C]
    assert {answer.block_count for answer in answers} == {3}
    assert answers[2].key_mac == mac_of(*answers)


def test_read_with_count_0_is_capped_by_the_limit(make_rig: RigFactory) -> None:
    rig = make_rig(max_read_blocks=2)
    rig.program()
    assert len(rig.chain(read_data(5, 0), 3)) == 2


def test_read_with_count_0_takes_what_earlier_answers_left(keyed: Rig) -> None:
    answers = keyed.chain(read_counter() + read_data(5, 0), 3)
    assert [answer.block_count for answer in answers[1:]] == [2, 2]


def test_read_with_count_0_and_no_room_answers_nothing(keyed: Rig) -> None:
    assert keyed.chain(read_data(5, 0), 0) == []


def test_read_with_count_0_fails_if_strict(make_rig: RigFactory) -> None:
    rig = make_rig(strict=True)
    rig.program()
    check_read_fails(rig, read_data(5, 0), GENERAL, 3)


@pytest.mark.parametrize("rig_home", ["files"], indirect=True)
def test_read_of_a_damaged_block_fails(make_rig: RigFactory, flash: Path) -> None:
    with Rig(make_rig().engine, make_image(flash.with_name("other"))) as first:
        first.program()
        first.write(0, 5, A, B)
    with flash.with_name("other").open("r+b") as image:
        image.seek(5 * 256 + 17)
        image.write(b"!")
    rig = make_rig(flash.with_name("other"))
    check_read_fails(rig, read_data(5), READ)
    check_read_fails(rig, read_data(4, 3), READ, 3)
    assert rig.read(6) == [B]
    rig.write(1, 5, C)
    assert rig.read(5) == [C]


def test_checks_of_a_read_come_in_order(make_rig: RigFactory) -> None:
    rig = make_rig(max_read_blocks=2)
    check_read_fails(rig, read_data(600, 3), NO_KEY)
    rig.program()
    check_read_fails(rig, read_data(600, 3), GENERAL)
    check_read_fails(rig, read_data(600, 2), ADDR)
    check_read_fails(rig, read_data(0, 2), GENERAL)
