# SPDX-License-Identifier: Apache-2.0
"""RESULT_READ, the result register, and requests of no known type."""

from __future__ import annotations

import pytest

from tests.support.oracle import (
    COUNT,
    GENERAL,
    NONCE,
    A,
    Frame,
    program_key,
    read_counter,
    read_data,
    read_result,
    request,
    sealed,
    write_data,
)
from tests.support.rig import Rig, RigFactory
from vhost_rpmb.rpmb import spec


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
    make_rig: RigFactory, strict: bool, block_count: int
) -> None:
    rig = make_rig(strict=strict)
    rig.program()
    rig.chain(write_data(0, 5, A))
    assert rig.chain(read_result(block_count)) == [sealed(result=GENERAL)]
    assert rig.chain(read_result())[0].write_counter == 1


def test_other_requests_keep_the_result_register(keyed: Rig) -> None:
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


@pytest.mark.parametrize("kind", [0, 6, 0x0100, 0x0300, 0xFFFF])
def test_unknown_request_fails(keyed: Rig, kind: int) -> None:
    assert keyed.chain(request(kind, nonce=NONCE, address=3)) == [sealed(result=GENERAL)]


def test_unknown_request_without_a_key_has_no_mac(rig: Rig) -> None:
    assert rig.chain(request(6)) == [Frame(result=GENERAL)]


def test_register_travels_to_another_device(keyed: Rig) -> None:
    assert keyed.chain(write_data(0, 5, A)) == []
    packed = keyed.device.register
    assert packed == bytes.fromhex("0300000000050000") + b"\0\1"
    expected = keyed.chain(read_result())
    keyed.device.clear_register()
    assert keyed.device.register == b""
    keyed.device.register = packed
    assert keyed.chain(read_result()) == expected
    keyed.device.register = b""
    assert keyed.chain(read_result())[0].result == GENERAL
    for wrong in (packed[:-1], packed + b"\0"):
        with pytest.raises(ValueError, match="0 or 10 bytes"):
            keyed.device.register = wrong
