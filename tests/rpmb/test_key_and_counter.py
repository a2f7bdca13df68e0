# SPDX-License-Identifier: Apache-2.0
"""PROGRAM_KEY, GET_WRITE_COUNTER and the end of the counter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.oracle import (
    EXPIRED,
    GENERAL,
    KEY,
    LAST,
    NO_KEY,
    NONCE,
    OK,
    WRITE,
    A,
    B,
    Frame,
    program_key,
    read_counter,
    read_data,
    read_result,
    request,
    sealed,
)
from tests.support.rig import Rig, RigFactory, write_key
from vhost_rpmb.rpmb import spec


def test_program_key_answers_ok_and_the_key_is_durable_first(rig: Rig) -> None:
    assert rig.chain(program_key() + read_result()) == [
        sealed(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY)
    ]
    assert rig.store.key == KEY


def test_program_key_without_a_result_read_is_executed_without_an_answer(rig: Rig) -> None:
    assert rig.chain(program_key()) == []
    assert rig.store.key == KEY


@pytest.mark.parametrize(("strict", "block_count"), [(False, 2), (True, 0), (True, 2)])
def test_program_key_with_a_wrong_count_fails(
    make_rig: RigFactory, strict: bool, block_count: int
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


@pytest.mark.parametrize("rig_home", ["files"], indirect=True)
def test_program_key_fails_after_key_set(make_rig: RigFactory, tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key(path, KEY)
    rig = make_rig(store={"key_path": str(path), "key_set": True})
    (answer,) = rig.chain(program_key(bytes(32)) + read_result())
    assert answer == sealed(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY, result=WRITE)


@pytest.mark.parametrize("rig_home", ["files"], indirect=True)
def test_program_key_that_cannot_be_made_durable_fails_and_programs_none(
    make_rig: RigFactory, tmp_path: Path
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


def test_read_counter_answers_counter_and_nonce(make_rig: RigFactory) -> None:
    rig = make_rig(store={"initial_counter": 77})
    rig.program()
    assert rig.chain(read_counter()) == [
        sealed(nonce=NONCE, write_counter=77, req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER)
    ]


def test_read_counter_without_a_key_fails_with_the_nonce_and_counter_0(
    make_rig: RigFactory,
) -> None:
    rig = make_rig(store={"initial_counter": 77})
    assert rig.chain(read_counter()) == [
        Frame(nonce=NONCE, result=NO_KEY, req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER)
    ]


def test_read_counter_checks_the_key_before_the_count(rig: Rig) -> None:
    (answer,) = rig.chain(read_counter(block_count=2))
    assert answer.result == NO_KEY


@pytest.mark.parametrize(("strict", "block_count"), [(False, 2), (True, 0), (True, 2)])
def test_read_counter_with_a_wrong_count_fails_with_the_nonce_and_counter_0(
    make_rig: RigFactory, strict: bool, block_count: int
) -> None:
    rig = make_rig(strict=strict, store={"initial_counter": 77})
    rig.program()
    assert rig.chain(read_counter(block_count=block_count)) == [
        sealed(nonce=NONCE, result=GENERAL, req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER)
    ]


def test_read_counter_takes_the_count_0_of_emmc_software(keyed: Rig) -> None:
    (answer,) = keyed.chain(read_counter(block_count=0))
    assert answer.result == OK


def test_write_that_reaches_the_last_counter_has_the_expired_bit(make_rig: RigFactory) -> None:
    rig = make_rig(store={"initial_counter": LAST - 1})
    rig.program()
    answer = rig.write(LAST - 1, 5, A)
    assert (answer.result, answer.write_counter) == (OK | EXPIRED, LAST)
    assert rig.chain(read_data(5))[0].data == A
    assert rig.write(LAST, 5, B).result == WRITE | EXPIRED
    assert rig.store.counter == LAST


def test_expired_bit_is_in_every_answer(make_rig: RigFactory) -> None:
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
