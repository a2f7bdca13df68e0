# SPDX-License-Identifier: Apache-2.0
"""DATA_WRITE: its effect and its checks, in their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.oracle import (
    ADDR,
    AUTH,
    COUNT,
    EXPIRED,
    GENERAL,
    LAST,
    NO_KEY,
    OK,
    WRITE,
    A,
    B,
    C,
    Frame,
    mac_of,
    read_counter,
    read_data,
    read_result,
    sealed,
    split,
    write_data,
)
from tests.support.rig import UNIT_BLOCKS, Rig, RigFactory, make_image
from vhost_rpmb.rpmb import spec


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


def test_write_without_a_result_read_is_executed_without_an_answer(keyed: Rig) -> None:
    assert keyed.chain(write_data(0, 5, A)) == []
    assert keyed.read(5) == [A]


def test_write_without_a_key_fails_with_counter_0(make_rig: RigFactory) -> None:
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
def test_write_with_count_0_fails(make_rig: RigFactory, strict: bool) -> None:
    rig = make_rig(strict=strict)
    rig.program()
    check_refused(rig, write_data(0, 5, A, block_count=0), GENERAL)


def test_write_of_more_blocks_than_allowed_fails(make_rig: RigFactory) -> None:
    rig = make_rig(max_write_blocks=2)
    rig.program()
    check_refused(rig, write_data(0, 5, A, B, C), GENERAL)
    assert rig.write(0, 5, A, B).result == OK


def test_write_of_255_blocks_can_be_allowed(make_rig: RigFactory) -> None:
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


def test_write_at_an_expired_counter_fails_as_write_failure(make_rig: RigFactory) -> None:
    rig = make_rig(store={"initial_counter": LAST})
    rig.program()
    check_refused(rig, write_data(LAST, 5, A), 0x0085, counter=LAST)


def test_write_at_an_expired_counter_answers_the_bare_bit_if_strict(make_rig: RigFactory) -> None:
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


def test_write_at_the_highest_address(make_rig: RigFactory, tmp_path: Path) -> None:
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


def test_stuff_bytes_are_not_in_the_mac(keyed: Rig) -> None:
    data = b"\xff" * spec.FRAME_KEY_MAC + write_data(0, 5, A)[spec.FRAME_KEY_MAC :]
    (answer,) = keyed.chain(data + read_result())
    assert answer.result == OK


def test_mac_of_several_frames_is_in_the_last(keyed: Rig) -> None:
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


def test_replayed_write_is_refused(keyed: Rig) -> None:
    recorded = write_data(0, 5, A) + read_result()
    assert keyed.chain(recorded)[0].result == OK
    keyed.write(1, 5, B)
    assert keyed.chain(recorded)[0].result == COUNT
    assert keyed.read(5) == [B]


def test_checks_of_a_write_come_in_order(make_rig: RigFactory) -> None:
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


def test_expired_counter_is_checked_after_the_frames_and_before_the_address(
    make_rig: RigFactory,
) -> None:
    rig = make_rig(store={"initial_counter": LAST})
    rig.program()
    bad_count = write_data(0, 600, A, block_count=0, key=bytes(32))
    assert rig.chain(bad_count + read_result())[0].result == GENERAL | EXPIRED
    bad_rest = write_data(0, 600, A, key=bytes(32))
    assert rig.chain(bad_rest + read_result())[0].result == WRITE | EXPIRED


def test_address_of_the_first_frame_is_used(keyed: Rig) -> None:
    frames = split(write_data(0, 5, A, B))
    frames[1] = frames[1]._replace(address=9)
    (answer,) = keyed.chain(b"".join(frame.pack() for frame in frames) + read_result())
    assert (answer.result, answer.address) == (GENERAL, 5)


def test_request_takes_only_its_own_frames(keyed: Rig) -> None:
    data = write_data(0, 5, A, B) + write_data(1, 7, C) + read_result()
    (answer,) = keyed.chain(data)
    assert (answer.result, answer.write_counter, answer.address) == (OK, 2, 7)
    assert keyed.read(5, 3) == [A, B, C]


def test_refused_request_with_valid_frames_takes_only_its_own(keyed: Rig) -> None:
    data = write_data(0, 5, A, B, key=bytes(32)) + write_data(0, 7, C) + read_result()
    (answer,) = keyed.chain(data)
    assert (answer.result, answer.write_counter, answer.address) == (OK, 1, 7)


@pytest.mark.parametrize("block_count", [0, 3, 33])
def test_request_with_an_invalid_count_takes_the_whole_run(keyed: Rig, block_count: int) -> None:
    bad = write_data(0, 5, A, block_count=block_count)
    data = bad + write_data(0, 7, C) + read_result() + read_counter()
    result, counter = keyed.chain(data, 2)
    assert (result.result, result.address) == (GENERAL, 5)
    assert counter.write_counter == 0
    assert keyed.read(7) == [bytes(256)]


def test_invalid_count_takes_the_whole_run_whichever_check_fails(rig: Rig) -> None:
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
def test_refused_write_takes_its_frames_and_leaves_the_answer_to_result_read(
    make_rig: RigFactory, refused: str, keyed: bool, strict: bool
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


def test_requests_after_an_invalid_run_are_executed(keyed: Rig) -> None:
    data = write_data(0, 5, A, block_count=0) + read_data(0) + write_data(0, 5, B) + read_result()
    read, result = keyed.chain(data, 2)
    assert (read.result, result.result, result.write_counter) == (OK, OK, 1)


def test_write_that_cannot_be_made_durable_changes_nothing(
    make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch
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
