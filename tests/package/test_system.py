# SPDX-License-Identifier: Apache-2.0
"""Sockets and signals of the daemon are those of the standard library."""

from __future__ import annotations

import ast
import os
import signal
import socket
from pathlib import Path

import pytest

import vhost_rpmb
from vhost_rpmb import system

PACKAGE = Path(vhost_rpmb.__file__).parent
PUBLIC = {"signal": signal, "socket": socket}


def users() -> list[Path]:
    text = "from vhost_rpmb.system import "
    return [path for path in sorted(PACKAGE.rglob("*.py")) if text in path.read_text()]


@pytest.mark.parametrize("path", users(), ids=lambda path: path.stem)
def test_every_name_is_that_of_the_public_module(path: Path) -> None:
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in PUBLIC
    }
    for module, name in used:
        ours = getattr(getattr(system, module), name)
        theirs = getattr(PUBLIC[module], name)
        if isinstance(theirs, type):
            assert issubclass(theirs, ours)
        elif callable(theirs):
            # A function that returns enumerations, around the one that returns numbers.
            assert (theirs.__name__, theirs.__doc__) == (ours.__name__, ours.__doc__)
        else:
            assert theirs == ours


def test_accept_is_that_of_the_public_module() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")  # an abstract name that the kernel chooses
        listener.listen()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            system.accept(listener)
        ends = []
        for accept in (system.accept, lambda listener: listener.accept()[0]):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(listener.getsockname())
                ends.append(accept(listener))
                client.sendall(b"sent")
                assert ends[-1].recv(5) == b"sent"
        for end in ends:
            assert (end.family, end.type, end.gettimeout()) == (
                socket.AF_UNIX,
                socket.SOCK_STREAM,
                None,
            )
            assert not os.get_inheritable(end.fileno())
            end.close()
