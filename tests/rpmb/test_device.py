# SPDX-License-Identifier: Apache-2.0
"""What the device must answer, request by request and check by check, on both engines."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.oracle import (
    AUTHENTICATED,
    KEY,
    NONCE,
    Frame,
    mac_of,
    program_key,
    read_counter,
    read_data,
    read_result,
    request,
    split,
    write_data,
)
from tests.support.rig import UNIT_BLOCKS, Rig, make_image, write_key
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec

A, B, C = (bytes([letter]) * spec.BLOCK_SIZE for letter in b"ABC")
OK = spec.VIRTIO_RPMB_RES_OK
GENERAL = spec.VIRTIO_RPMB_RES_GENERAL_FAILURE
AUTH = spec.VIRTIO_RPMB_RES_AUTH_FAILURE
COUNT = spec.VIRTIO_RPMB_RES_COUNT_FAILURE
ADDR = spec.VIRTIO_RPMB_RES_ADDR_FAILURE
WRITE = spec.VIRTIO_RPMB_RES_WRITE_FAILURE
READ = spec.VIRTIO_RPMB_RES_READ_FAILURE
NO_KEY = spec.VIRTIO_RPMB_RES_NO_AUTH_KEY
EXPIRED = spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
LAST = spec.MAX_WRITE_COUNTER

MakeRig = Callable[..., Rig]


def sealed(key: bytes = KEY, **fields: int | bytes) -> Frame:
    """The one answer frame with these fields, every other field zero, and the right MAC."""
    frame = Frame(**fields)  # type: ignore[arg-type]
    return frame._replace(key_mac=mac_of(frame, key=key))


# Configuration space


def test_config_has_capacity_and_the_default_limits(rig: Rig) -> None:
    assert rig.device.config == bytes((1, 32, 255))


@pytest.mark.parametrize("units", [1, 2, 127, 128])
def test_config_capacity_is_in_units_of_128_kib(
    make_rig: MakeRig, tmp_path: Path, units: int
) -> None:
    rig = make_rig(make_image(tmp_path / "sized", units))
    assert rig.device.config[0] == units


def test_config_capacity_is_at_most_16_mib(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(make_image(tmp_path / "large", 256))
    assert rig.device.config[0] == 0x80


def test_config_has_the_chosen_limits(make_rig: MakeRig) -> None:
    rig = make_rig(max_write_blocks=7, max_read_blocks=9)
    assert rig.device.config[1:] == bytes((7, 9))


def test_config_announces_no_limit_of_a_read_as_0(make_rig: MakeRig) -> None:
    rig = make_rig(max_read_blocks=0)
    assert rig.device.config == bytes((1, 32, 0))


@pytest.mark.parametrize(
    ("name", "limit", "allowed"),
    [
        ("max_write_blocks", 0, "1 to 255"),
        ("max_write_blocks", 256, "1 to 255"),
        ("max_read_blocks", -1, "0 to 255"),
        ("max_read_blocks", 256, "0 to 255"),
    ],
)
def test_a_limit_out_of_range_is_refused(
    make_rig: MakeRig, name: str, limit: int, allowed: str
) -> None:
    with pytest.raises(ValueError, match=allowed):
        make_rig(**{name: limit})


def test_it_is_virtio_device_28_with_one_queue(rig: Rig) -> None:
    assert (rig.device.device_id, rig.device.num_queues) == (28, 1)


# PROGRAM_KEY


def test_program_key_answers_ok_and_the_key_is_durable_first(rig: Rig) -> None:
    assert rig.chain(program_key() + read_result()) == [
        sealed(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY)
    ]
    assert rig.store.key == KEY


def test_program_key_alone_answers_nothing_and_is_done(rig: Rig) -> None:
    assert rig.chain(program_key()) == []
    assert rig.store.key == KEY


@pytest.mark.parametrize(("strict", "block_count"), [(False, 2), (True, 0), (True, 2)])
def test_program_key_with_a_wrong_count_fails(
    make_rig: MakeRig, strict: bool, block_count: int
) -> None:
    rig = make_rig(strict=strict)
    assert rig.chain(program_key(block_count=block_count) + read_result()) == [
        Frame(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY, result=GENERAL)
    ]
    assert rig.store.key is None


def test_program_key_takes_the_count_0_of_emmc_software(rig: Rig) -> None:
    (answer,) = rig.chain(program_key(block_count=0) + read_result(block_count=0))
    assert answer.result == OK
    assert rig.store.key == KEY


def test_program_key_again_fails_and_keeps_the_key(keyed: Rig) -> None:
    assert keyed.chain(program_key(bytes(32)) + read_result()) == [
        sealed(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY, result=WRITE)
    ]
    assert keyed.store.key == KEY


def test_program_key_checks_the_count_before_the_key(keyed: Rig) -> None:
    (answer,) = keyed.chain(program_key(block_count=2) + read_result())
    assert answer.result == GENERAL


def test_program_key_fails_where_key_set_made_the_key_count(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    write_key(path, KEY)
    rig = make_rig(store={"key_path": str(path), "key_set": True})
    (answer,) = rig.chain(program_key(bytes(32)) + read_result())
    assert answer == sealed(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY, result=WRITE)


def test_program_key_that_cannot_be_made_durable_fails_and_programs_none(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    rig = make_rig(store={"key_path": str(folder / "key")})
    folder.rmdir()
    (answer,) = rig.chain(program_key() + read_result())
    assert answer == Frame(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY, result=WRITE)
    assert rig.store.key is None
    (answer,) = rig.chain(read_counter())
    assert answer.result == NO_KEY
    folder.mkdir()
    rig.program()


# GET_WRITE_COUNTER


def test_read_counter_answers_counter_and_nonce(make_rig: MakeRig) -> None:
    rig = make_rig(store={"initial_counter": 77})
    rig.program()
    assert rig.chain(read_counter()) == [
        sealed(nonce=NONCE, write_counter=77, req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER)
    ]


def test_read_counter_without_a_key_fails_with_the_nonce_and_counter_0(make_rig: MakeRig) -> None:
    rig = make_rig(store={"initial_counter": 77})
    assert rig.chain(read_counter()) == [
        Frame(nonce=NONCE, result=NO_KEY, req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER)
    ]


def test_read_counter_checks_the_key_before_the_count(rig: Rig) -> None:
    (answer,) = rig.chain(read_counter(block_count=2))
    assert answer.result == NO_KEY


@pytest.mark.parametrize(("strict", "block_count"), [(False, 2), (True, 0), (True, 2)])
def test_read_counter_with_a_wrong_count_fails_with_the_nonce_and_counter_0(
    make_rig: MakeRig, strict: bool, block_count: int
) -> None:
    rig = make_rig(strict=strict, store={"initial_counter": 77})
    rig.program()
    assert rig.chain(read_counter(block_count=block_count)) == [
        sealed(nonce=NONCE, result=GENERAL, req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER)
    ]


def test_read_counter_takes_the_count_0_of_emmc_software(keyed: Rig) -> None:
    (answer,) = keyed.chain(read_counter(block_count=0))
    assert answer.result == OK


# DATA_WRITE


def test_write_stores_data_and_answers_the_new_counter(keyed: Rig) -> None:
    assert keyed.write(0, 5, A) == sealed(
        address=5, write_counter=1, req_resp=spec.VIRTIO_RPMB_RESP_DATA_WRITE
    )
    assert keyed.read(5) == [A]
    assert keyed.store.counter == 1


def test_write_of_several_blocks_is_one_step_of_the_counter(keyed: Rig) -> None:
    answer = keyed.write(0, 5, A, B, C)
    assert (answer.result, answer.write_counter, answer.address) == (OK, 1, 5)
    assert keyed.read(5, 3) == [A, B, C]


def test_write_without_a_result_read_answers_nothing_and_is_done(keyed: Rig) -> None:
    assert keyed.chain(write_data(0, 5, A)) == []
    assert keyed.read(5) == [A]


def test_write_without_a_key_fails_with_counter_0(make_rig: MakeRig) -> None:
    rig = make_rig(store={"initial_counter": 9})
    assert rig.write(9, 5, A) == Frame(
        address=5, result=NO_KEY, req_resp=spec.VIRTIO_RPMB_RESP_DATA_WRITE
    )


def check_refused(rig: Rig, data: bytes, result: int, address: int = 5, counter: int = 0) -> None:
    """A write request is refused with ``result``, and nothing has changed."""
    before = (bytes(rig.store.image), rig.store.counter)
    (answer,) = rig.chain(data + read_result())
    assert answer == sealed(
        address=address,
        write_counter=counter,
        result=result,
        req_resp=spec.VIRTIO_RPMB_RESP_DATA_WRITE,
    )
    assert (bytes(rig.store.image), rig.store.counter) == before


@pytest.mark.parametrize("strict", [False, True])
def test_write_with_count_0_fails(make_rig: MakeRig, strict: bool) -> None:
    rig = make_rig(strict=strict)
    rig.program()
    check_refused(rig, write_data(0, 5, A, block_count=0), GENERAL)


def test_write_of_more_blocks_than_allowed_fails(make_rig: MakeRig) -> None:
    rig = make_rig(max_write_blocks=2)
    rig.program()
    check_refused(rig, write_data(0, 5, A, B, C), GENERAL)
    assert rig.write(0, 5, A, B).result == OK


def test_write_of_255_blocks_can_be_allowed(make_rig: MakeRig) -> None:
    rig = make_rig(max_write_blocks=255)
    rig.program()
    assert rig.write(0, 5, *[A] * 255).result == OK
    assert rig.read(5, 255) == [A] * 255


def test_write_with_fewer_frames_than_its_count_fails(keyed: Rig) -> None:
    check_refused(keyed, write_data(0, 5, A, B, block_count=3), GENERAL)


@pytest.mark.parametrize("field", ["address", "block_count", "write_counter"])
def test_write_whose_frames_disagree_fails(keyed: Rig, field: str) -> None:
    frames = split(write_data(0, 5, A, B))
    frames[1] = Frame(**(frames[1]._asdict() | {field: 1, "key_mac": bytes(32)}))
    frames[1] = frames[1]._replace(key_mac=mac_of(*frames))
    check_refused(keyed, b"".join(frame.pack() for frame in frames), GENERAL)


def test_write_at_an_expired_counter_fails_as_write_failure(make_rig: MakeRig) -> None:
    rig = make_rig(store={"initial_counter": LAST})
    rig.program()
    check_refused(rig, write_data(LAST, 5, A), 0x0085, counter=LAST)


def test_write_at_an_expired_counter_answers_the_bare_bit_if_strict(make_rig: MakeRig) -> None:
    rig = make_rig(strict=True, store={"initial_counter": LAST})
    rig.program()
    check_refused(rig, write_data(LAST, 5, A), 0x0080, counter=LAST)


@pytest.mark.parametrize(
    ("address", "blocks"), [(UNIT_BLOCKS, 1), (UNIT_BLOCKS - 1, 2), (65535, 1)]
)
def test_write_beyond_the_capacity_fails(keyed: Rig, address: int, blocks: int) -> None:
    check_refused(keyed, write_data(0, address, *[A] * blocks), ADDR, address)


def test_write_reaches_the_last_block(keyed: Rig) -> None:
    assert keyed.write(0, UNIT_BLOCKS - 2, A, B).result == OK
    assert keyed.read(UNIT_BLOCKS - 2, 2) == [A, B]


def test_write_at_the_last_address_there_is(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(make_image(tmp_path / "full", 128))
    rig.program()
    assert rig.write(0, 65535, A).result == OK
    assert rig.read(65535) == [A]
    check_refused(rig, write_data(1, 65535, A, B), ADDR, 65535, 1)


def test_write_under_another_key_fails(keyed: Rig) -> None:
    check_refused(keyed, write_data(0, 5, A, key=bytes(32)), AUTH)


@pytest.mark.parametrize("byte", [228, 483, 484, 499, 503])
def test_write_with_any_changed_byte_fails(keyed: Rig, byte: int) -> None:
    data = bytearray(write_data(0, 5, A))
    data[byte] ^= 1
    check_refused(keyed, bytes(data), AUTH)


def test_stuff_is_not_in_the_mac(keyed: Rig) -> None:
    data = b"\xff" * spec.FRAME_KEY_MAC + write_data(0, 5, A)[spec.FRAME_KEY_MAC :]
    (answer,) = keyed.chain(data + read_result())
    assert answer.result == OK


def test_the_mac_of_several_frames_stands_in_the_last(keyed: Rig) -> None:
    frames = split(write_data(0, 5, A, B))
    swapped = [
        frames[0]._replace(key_mac=frames[1].key_mac).pack(),
        frames[1]._replace(key_mac=bytes(32)).pack(),
    ]
    check_refused(keyed, b"".join(swapped), AUTH)


@pytest.mark.parametrize("counter", [0, 2, LAST])
def test_write_with_another_counter_fails(keyed: Rig, counter: int) -> None:
    keyed.write(0, 0, A)
    check_refused(keyed, write_data(counter, 5, B), COUNT, counter=1)


def test_a_replayed_write_is_refused(keyed: Rig) -> None:
    recorded = write_data(0, 5, A) + read_result()
    assert keyed.chain(recorded)[0].result == OK
    keyed.write(1, 5, B)
    assert keyed.chain(recorded)[0].result == COUNT
    assert keyed.read(5) == [B]


def test_checks_of_a_write_come_in_order(make_rig: MakeRig) -> None:
    """Each request fails all later checks as well; the first one names the result."""
    rig = make_rig(max_write_blocks=2)
    everything = write_data(9, 600, A, A, A, key=bytes(32))
    assert rig.chain(everything + read_result())[0].result == NO_KEY
    rig.program()
    assert rig.chain(everything + read_result())[0].result == GENERAL
    assert rig.chain(write_data(9, 600, A, key=bytes(32)) + read_result())[0].result == ADDR
    assert rig.chain(write_data(9, 5, A, key=bytes(32)) + read_result())[0].result == AUTH
    assert rig.chain(write_data(9, 5, A) + read_result())[0].result == COUNT
    assert rig.chain(write_data(0, 5, A) + read_result())[0].result == OK


def test_an_expired_counter_is_checked_after_the_frames_and_before_the_address(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(store={"initial_counter": LAST})
    rig.program()
    bad_count = write_data(0, 600, A, block_count=0, key=bytes(32))
    assert rig.chain(bad_count + read_result())[0].result == GENERAL | EXPIRED
    bad_rest = write_data(0, 600, A, key=bytes(32))
    assert rig.chain(bad_rest + read_result())[0].result == WRITE | EXPIRED


def test_the_first_frames_address_counts(keyed: Rig) -> None:
    frames = split(write_data(0, 5, A, B))
    frames[1] = frames[1]._replace(address=9)
    (answer,) = keyed.chain(b"".join(frame.pack() for frame in frames) + read_result())
    assert (answer.result, answer.address) == (GENERAL, 5)


def test_a_request_takes_only_its_own_frames(keyed: Rig) -> None:
    data = write_data(0, 5, A, B) + write_data(1, 7, C) + read_result()
    (answer,) = keyed.chain(data)
    assert (answer.result, answer.write_counter, answer.address) == (OK, 2, 7)
    assert keyed.read(5, 3) == [A, B, C]


def test_a_refused_request_with_sound_frames_takes_only_its_own(keyed: Rig) -> None:
    data = write_data(0, 5, A, B, key=bytes(32)) + write_data(0, 7, C) + read_result()
    (answer,) = keyed.chain(data)
    assert (answer.result, answer.write_counter, answer.address) == (OK, 1, 7)


@pytest.mark.parametrize("block_count", [0, 3, 33])
def test_a_request_with_a_bad_count_takes_the_whole_run(keyed: Rig, block_count: int) -> None:
    bad = write_data(0, 5, A, block_count=block_count)
    data = bad + write_data(0, 7, C) + read_result() + read_counter()
    result, counter = keyed.chain(data, 2)
    assert (result.result, result.address) == (GENERAL, 5)
    assert counter.write_counter == 0
    assert keyed.read(7) == [bytes(256)]


def test_a_bad_count_takes_the_whole_run_whichever_check_named_the_result(rig: Rig) -> None:
    data = write_data(0, 5, A, block_count=0) + write_data(0, 7, C) + read_result()
    (answer,) = rig.chain(data)
    assert (answer.result, answer.address) == (NO_KEY, 5)


# Two frames each of which is refused at one of the checks, and the options of the device for it.
REFUSED_RUNS: dict[str, tuple[bytes, int, dict[str, object]]] = {
    "no room in the limit": (write_data(0, 5, A, B), GENERAL, {"max_write_blocks": 1}),
    "count above the frames": (write_data(0, 5, A, B, block_count=3), GENERAL, {}),
    "count far above": (write_data(0, 5, A, B, block_count=0xFFFF), GENERAL, {}),
    "count 0": (write_data(0, 5, A, B, block_count=0), GENERAL, {}),
    "frames disagree": (write_data(0, 5, A, block_count=2) + write_data(0, 6, B), GENERAL, {}),
    "expired": (write_data(LAST, 5, A, B), WRITE | EXPIRED, {"store": {"initial_counter": LAST}}),
    "address": (write_data(0, UNIT_BLOCKS - 1, A, B), ADDR, {}),
    "MAC": (write_data(0, 5, A, B, key=bytes(32)), AUTH, {}),
    "counter": (write_data(7, 5, A, B), COUNT, {}),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("keyed", [False, True], ids=["no key", "key"])
@pytest.mark.parametrize("refused", REFUSED_RUNS)
def test_a_refused_write_takes_its_frames_and_leaves_the_answer_to_result_read(
    make_rig: MakeRig, refused: str, keyed: bool, strict: bool
) -> None:
    data, result, options = REFUSED_RUNS[refused]
    rig = make_rig(**options, strict=strict)
    expired = rig.store.counter == LAST and EXPIRED
    if keyed:
        rig.program()
        result = EXPIRED if strict and refused == "expired" else result
    else:
        result = NO_KEY | expired
    answers = rig.chain(data + read_result() + read_counter(), 4)
    assert [(answer.req_resp, answer.result) for answer in answers] == [
        (spec.VIRTIO_RPMB_RESP_DATA_WRITE, result),
        (spec.VIRTIO_RPMB_RESP_GET_COUNTER, (OK if keyed else NO_KEY) | expired),
    ]
    assert answers[0].address == split(data)[0].address
    assert bytes(rig.store.image) == bytes(len(rig.store.image))


def test_what_follows_a_bad_run_is_executed(keyed: Rig) -> None:
    data = write_data(0, 5, A, block_count=0) + read_data(0) + write_data(0, 5, B) + read_result()
    read, result = keyed.chain(data, 2)
    assert (read.result, result.result, result.write_counter) == (OK, OK, 1)


def test_a_write_that_cannot_be_made_durable_changes_nothing(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()
    rig.program()
    rig.write(0, 5, A)
    with monkeypatch.context() as patch:
        patch.setattr(type(rig.store), "commit", lambda *_: False)
        data = write_data(1, 5, B) + read_result() + read_data(5) + read_counter()
        result, read, counter = rig.chain(data, 3)
    assert result == sealed(
        address=5,
        write_counter=1,
        result=WRITE,
        req_resp=spec.VIRTIO_RPMB_RESP_DATA_WRITE,
    )
    assert (read.data, counter.write_counter) == (A, 1)
    assert rig.chain(read_result())[0].result == WRITE
    assert rig.write(1, 5, B).result == OK


# DATA_READ


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


def test_read_of_more_blocks_than_allowed_fails(make_rig: MakeRig) -> None:
    rig = make_rig(max_read_blocks=2)
    rig.program()
    check_read_fails(rig, read_data(600, 3), GENERAL, 3)
    assert rig.read(0, 2) == [bytes(256)] * 2


def test_read_of_255_blocks_is_allowed_by_default(keyed: Rig) -> None:
    assert keyed.read(0, 255) == [bytes(256)] * 255
    check_read_fails(keyed, read_data(0, 256), GENERAL, 256)


@pytest.mark.parametrize(("limit", "blocks"), [(255, 255), (0, 255), (0, 256)])
def test_read_of_an_object_of_65280_bytes(make_rig: MakeRig, limit: int, blocks: int) -> None:
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


def test_read_without_a_limit_is_bounded_by_the_room(make_rig: MakeRig, tmp_path: Path) -> None:
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


def test_read_with_count_0_is_capped_by_the_limit(make_rig: MakeRig) -> None:
    rig = make_rig(max_read_blocks=2)
    rig.program()
    assert len(rig.chain(read_data(5, 0), 3)) == 2


def test_read_with_count_0_takes_what_earlier_answers_left(keyed: Rig) -> None:
    answers = keyed.chain(read_counter() + read_data(5, 0), 3)
    assert [answer.block_count for answer in answers[1:]] == [2, 2]


def test_read_with_count_0_and_no_room_answers_nothing(keyed: Rig) -> None:
    assert keyed.chain(read_data(5, 0), 0) == []


def test_read_with_count_0_fails_if_strict(make_rig: MakeRig) -> None:
    rig = make_rig(strict=True)
    rig.program()
    check_read_fails(rig, read_data(5, 0), GENERAL, 3)


def test_read_of_what_was_not_stored_fails(make_rig: MakeRig, flash: Path) -> None:
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


def test_checks_of_a_read_come_in_order(make_rig: MakeRig) -> None:
    rig = make_rig(max_read_blocks=2)
    check_read_fails(rig, read_data(600, 3), NO_KEY)
    rig.program()
    check_read_fails(rig, read_data(600, 3), GENERAL)
    check_read_fails(rig, read_data(600, 2), ADDR)
    check_read_fails(rig, read_data(0, 2), GENERAL)


# RESULT_READ


def test_result_read_answers_in_a_later_chain_and_again(keyed: Rig) -> None:
    keyed.chain(write_data(0, 5, A))
    expected = sealed(address=5, write_counter=1, req_resp=spec.VIRTIO_RPMB_RESP_DATA_WRITE)
    assert keyed.chain(read_result()) == [expected]
    assert keyed.chain(read_result()) == [expected]


def test_result_read_answers_the_latest(keyed: Rig) -> None:
    keyed.chain(program_key())
    keyed.chain(write_data(0, 5, A))
    keyed.chain(write_data(7, 6, A))
    (answer,) = keyed.chain(read_result())
    assert (answer.result, answer.address, answer.write_counter) == (COUNT, 6, 1)


def test_result_read_with_nothing_to_answer_fails(rig: Rig) -> None:
    assert rig.chain(read_result()) == [Frame(result=GENERAL)]


@pytest.mark.parametrize(("strict", "block_count"), [(False, 2), (True, 0), (True, 2)])
def test_result_read_with_a_wrong_count_fails_and_keeps_the_register(
    make_rig: MakeRig, strict: bool, block_count: int
) -> None:
    rig = make_rig(strict=strict)
    rig.program()
    rig.chain(write_data(0, 5, A))
    assert rig.chain(read_result(block_count)) == [sealed(result=GENERAL)]
    assert rig.chain(read_result())[0].write_counter == 1


def test_other_requests_leave_the_result_register_alone(keyed: Rig) -> None:
    keyed.chain(write_data(0, 5, A))
    keyed.chain(read_counter() + read_data(5) + request(0x77), 3)
    (answer,) = keyed.chain(read_result())
    assert answer.req_resp == spec.VIRTIO_RPMB_RESP_DATA_WRITE


def test_reset_device_clears_the_result_register_only(keyed: Rig) -> None:
    keyed.chain(write_data(0, 5, A))
    keyed.device.reset()
    assert keyed.chain(read_result()) == [sealed(result=GENERAL)]
    assert keyed.read(5) == [A]
    assert keyed.chain(read_counter())[0].write_counter == 1


# Anything else


@pytest.mark.parametrize("kind", [0, 6, 0x0100, 0x0300, 0xFFFF])
def test_an_unknown_request_fails(keyed: Rig, kind: int) -> None:
    assert keyed.chain(request(kind, nonce=NONCE, address=3)) == [sealed(result=GENERAL)]


def test_an_unknown_request_without_a_key_has_no_mac(rig: Rig) -> None:
    assert rig.chain(request(6)) == [Frame(result=GENERAL)]


# The write counter


def test_the_write_that_reaches_the_last_counter_is_done_and_flagged(make_rig: MakeRig) -> None:
    rig = make_rig(store={"initial_counter": LAST - 1})
    rig.program()
    answer = rig.write(LAST - 1, 5, A)
    assert (answer.result, answer.write_counter) == (OK | EXPIRED, LAST)
    assert rig.chain(read_data(5))[0].data == A
    assert rig.write(LAST, 5, B).result == WRITE | EXPIRED
    assert rig.store.counter == LAST


def test_the_expired_bit_is_in_every_answer(make_rig: MakeRig) -> None:
    rig = make_rig(store={"initial_counter": LAST})
    assert [
        rig.chain(data)[0].result
        for data in (read_counter(), read_data(0), read_result(), request(9), b"x" * 512)
    ] == [NO_KEY | EXPIRED, NO_KEY | EXPIRED] + [GENERAL | EXPIRED] * 3
    answer = rig.chain(program_key() + read_result())[0]
    assert answer.result == OK | EXPIRED
    counter = rig.chain(read_counter())[0]
    assert (counter.result, counter.write_counter) == (OK | EXPIRED, LAST)
    assert rig.chain(read_data(0))[0].result == OK | EXPIRED


# Chains


def test_more_requests_in_one_chain_are_executed_in_order(rig: Rig) -> None:
    data = (
        program_key()
        + read_result()
        + write_data(0, 5, A)
        + read_data(5)
        + write_data(1, 5, B)
        + read_data(5)
        + read_counter()
    )
    result, first, second, counter = rig.chain(data, 4)
    assert result == sealed(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY)
    assert (first.data, second.data, counter.write_counter) == (A, B, 2)


def test_requests_beyond_the_room_are_executed_all_the_same(keyed: Rig) -> None:
    data = read_counter() + write_data(0, 5, A) + read_result() + write_data(1, 6, B)
    (counter,) = keyed.chain(data)
    assert counter.write_counter == 0
    assert keyed.store.counter == 2


def test_an_answer_that_does_not_fit_leaves_the_room_to_the_next(keyed: Rig) -> None:
    keyed.write(0, 5, A)
    answers = keyed.chain(read_data(5) + read_data(5, 2) + read_counter(), 2)
    assert [answer.req_resp for answer in answers] == [
        spec.VIRTIO_RPMB_RESP_DATA_READ,
        spec.VIRTIO_RPMB_RESP_DATA_READ,
    ]
    assert [answer.result for answer in answers] == [OK, GENERAL]


@pytest.mark.parametrize("length", [1, 511, 513, 1023])
def test_a_chain_that_is_not_whole_frames_fails_without_effect(keyed: Rig, length: int) -> None:
    data = (write_data(0, 5, A) + read_result())[:length].ljust(length, b"\0")
    assert keyed.chain(data) == [sealed(result=GENERAL)]
    assert keyed.store.counter == 0


def test_a_chain_without_readable_bytes_fails(keyed: Rig) -> None:
    assert keyed.chain(b"") == [sealed(result=GENERAL)]


@pytest.mark.parametrize("room", [0, 1, 511])
def test_an_answer_without_room_for_a_frame_is_left_out(keyed: Rig, room: int) -> None:
    assert keyed.raw_chain(read_counter(), room) == b""
    assert keyed.raw_chain(b"x" * 100, room) == b""


def test_room_is_counted_in_whole_frames(keyed: Rig) -> None:
    assert len(keyed.raw_chain(read_counter() + read_counter(), 1000)) == 512
    assert len(keyed.raw_chain(read_data(0, 0), 3 * 512 - 1)) == 1024


def test_a_chain_of_the_longest_request_is_served(make_rig: MakeRig) -> None:
    rig = make_rig(max_write_blocks=255)
    rig.program()
    data = write_data(0, 0, *[A] * 255) + write_data(1, 255, *[B] * 255) + read_result()
    assert len(data) == 511 * 512
    (answer,) = rig.chain(data)
    assert (answer.result, answer.write_counter) == (OK, 2)


def test_a_chain_over_the_limit_fails_without_effect(keyed: Rig) -> None:
    frames = 513
    assert keyed.chain(write_data(0, 0, A) * frames) == [sealed(result=GENERAL)]
    assert keyed.store.counter == 0


def test_a_batch_is_made_durable_once(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig()
    rig.program()
    commits: list[tuple[int, int]] = []
    commit = type(rig.store).commit

    def counted(
        store: object, counter: int, blocks: list[tuple[int, bytes]], key: bytes | None
    ) -> bool:
        assert not rig.ring.collect()  # nothing is answered before it is durable
        commits.append((counter, len(blocks)))
        return commit(store, counter, blocks, key)  # type: ignore[arg-type]

    monkeypatch.setattr(type(rig.store), "commit", counted)
    rooms = []
    for number in range(20):
        room = rig.room(512)
        rig.ring.add(rig.put(write_data(number, number, A) + read_result()), room)
        rooms.append(room[0])
    assert len(rig.process()) == 20
    assert commits == [(20, 20)]
    counters = [split(rig.guest.read(*room))[0].write_counter for room in rooms]
    assert counters == list(range(1, 21))


def test_a_batch_without_writes_does_not_touch_the_store(
    keyed: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(keyed.store), "commit")
    assert keyed.chain(read_counter() + read_data(0) + read_result(), 3)[1].result == OK


def test_reads_see_the_writes_before_them_in_the_batch(keyed: Rig) -> None:
    rooms = []
    for data in (write_data(0, 5, A), read_data(5), write_data(1, 5, B), read_data(5)):
        room = keyed.room(512)
        keyed.ring.add(keyed.put(data), room)
        rooms.append(room[0])
    keyed.process()
    read = [split(keyed.guest.read(*rooms[index]))[0].data for index in (1, 3)]
    assert read == [A, B]


def test_a_batch_that_cannot_be_made_durable_is_answered_the_truth(
    keyed: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(keyed.store), "commit", lambda *_: False)
    rooms = []
    for number in range(3):
        room = keyed.room(1024)
        keyed.ring.add(keyed.put(write_data(number, 5, A) + read_result() + read_data(5)), room)
        rooms.append(room[0])
    keyed.process()
    answers = [split(keyed.guest.read(*room)) for room in rooms]
    assert [result.result for result, _ in answers] == [WRITE, COUNT, COUNT]
    assert [result.write_counter for result, _ in answers] == [0, 0, 0]
    assert [read.data for _, read in answers] == [bytes(256)] * 3


def test_engine_authenticators_agree_with_the_reference(engine: Engine) -> None:
    frames = [bytes([number]) * 512 for number in range(5)]
    mac = engine.Authenticator(KEY).mac(frames)
    assert mac == hmac.digest(KEY, b"".join(frame[AUTHENTICATED] for frame in frames), "sha256")
    assert engine.Authenticator(KEY).verify(frames, mac)
    assert not engine.Authenticator(KEY).verify(frames, mac[::-1])
    assert not engine.Authenticator(KEY).verify(frames[:4], mac)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_has_32_bytes(engine: Engine, length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        engine.Authenticator(bytes(length))


@pytest.mark.parametrize("length", [0, 511, 513])
def test_a_mac_is_of_whole_frames(engine: Engine, length: int) -> None:
    with pytest.raises(ValueError, match="512 bytes"):
        engine.Authenticator(KEY).mac([bytes(length)])
