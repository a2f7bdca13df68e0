# SPDX-License-Identifier: Apache-2.0
"""Calls into shared libraries, of both engines."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

import pytest

from vhost_rpmb.engine import Engine
from vhost_rpmb.libc import as_int


def test_numbers_memory_and_null_pointers_are_passed(engine: Engine) -> None:
    library = engine.Library()
    assert library.call("getpid")[0] == os.getpid()
    for text in (b"four", bytearray(b"four\0"), memoryview(bytearray(b"four\0"))):
        assert library.call("strnlen", text, 9)[0] == 4
    target = bytearray(4)
    assert library.call("memcpy", target, b"four", 4)[0] == library.address(target)
    assert target == b"four"
    assert library.call("getcwd", None, 0)[0] != 0
    assert library.call("labs", -5)[0] == 5


def test_seven_arguments_are_passed(engine: Engine) -> None:
    text = bytearray(64)
    values = (7, -6, 5, 4)
    assert engine.Library().call("snprintf", text, 64, b"%ld %ld %ld %ld\0", *values)[0] == 8
    assert text.rstrip(b"\0") == b"7 -6 5 4"


def test_the_error_of_a_call_is_returned(engine: Engine) -> None:
    result, error = engine.Library().call("close", -1)
    assert (as_int(result), error) == (-1, errno.EBADF)


def test_addresses_are_those_of_the_memory(engine: Engine) -> None:
    memory = mmap.mmap(-1, 4096)
    view = memoryview(memory)[8:]
    assert engine.Library.address(view) == engine.Library.address(memoryview(memory)) + 8


WRONG: list[tuple[type[Exception], Callable[[Engine], object]]] = [
    (OSError, lambda engine: engine.Library("libmissing.so.0")),
    (OSError, lambda engine: engine.Library().call("no_such_function")),
    (ValueError, lambda engine: engine.Library().call("getpid", *range(8))),
    (OverflowError, lambda engine: engine.Library().call("getpid", 1 << 63)),
    (OverflowError, lambda engine: engine.Library().call("getpid", -(1 << 63) - 1)),
    (TypeError, lambda engine: engine.Library().call("getpid", "text")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("kind", "use"), WRONG)
def test_wrong_uses_are_errors(
    engine: Engine, kind: type[Exception], use: Callable[[Engine], object]
) -> None:
    with pytest.raises(kind):
        use(engine)
