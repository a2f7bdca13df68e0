# SPDX-License-Identifier: Apache-2.0
"""The socket on which front-ends connect: created at a path, or inherited."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, closing, suppress

from vhost_rpmb.errors import UsageError
from vhost_rpmb.log import Logger
from vhost_rpmb.system import socket
from vhost_rpmb.vhost_user import foreign

__all__ = ["adopt", "listen", "open_socket"]

_BACKLOG = 64  # front-ends that wait to be accepted
_MAX_PATH = 107  # bytes of a UNIX socket's path

logger = Logger(__name__)


def open_socket(
    path: str | None, group: int | None, fd: int | None, stack: ExitStack
) -> tuple[socket.socket, bool]:
    """Return the socket at `path` or `fd`, and whether it listens (or is connected).

    `stack` closes it. Raises UsageError.
    """
    if path is not None:
        sock = listen(path, group, stack)
        listening = True
    else:
        assert fd is not None
        sock, listening = adopt(fd)
        stack.callback(_close, sock)
    sock.setblocking(False)
    return sock, listening


def _close(sock: socket.socket) -> None:
    """Close the socket without waiting for descriptors that are queued in its backlog."""
    foreign.close([sock.detach()] if sock.fileno() >= 0 else [])


def listen(path: str, group: int | None, stack: ExitStack) -> socket.socket:
    """Create a UNIX stream socket at `path` and listen.

    It is created with mode 0600 or, with `group`, 0660. `stack` closes and removes it. Raises
    UsageError if another file is at `path`.
    """
    length = len(os.fsencode(path))
    if length > _MAX_PATH:
        raise UsageError(
            f"--socket-path={path}: expected at most {_MAX_PATH} bytes, found {length}: "
            "name a shorter path"
        )
    _clear_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stack.callback(_close, sock)
    umask = os.umask(0o177 if group is None else 0o117)
    try:
        sock.bind(path)
        stack.callback(_remove_socket, path, os.lstat(path))
        if group is not None:
            _give_to_group(path, group)  # before it listens: no client can connect earlier
        sock.listen(_BACKLOG)
    except OSError as error:
        raise UsageError(f"--socket-path={path}: cannot listen there: {error.strerror}") from error
    finally:
        os.umask(umask)
    logger.info("listening on %s", path)
    return sock


def _give_to_group(path: str, group: int) -> None:
    try:
        os.chown(path, -1, group, follow_symlinks=False)
    except OSError as error:
        raise UsageError(
            f"--socket-group={group}: expected a group that this user may assign to {path}, found: "
            f"{error.strerror}: name one of this user's groups, or start as root"
        ) from error


def _clear_path(path: str) -> None:
    """Remove a stale socket at `path`; UsageError if it is in use or another kind of file."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # there is no file, or bind() reports the error
    if not stat.S_ISSOCK(mode):
        raise UsageError(
            f"--socket-path={path}: expected no file or a stale socket, found another kind of "
            "file: remove it or name another path"
        )
    # Connecting a socket of another type shows whether a process listens, without making a
    # connection that this process would have to accept.
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as probe:
        result = probe.connect_ex(path)
    if result == errno.ECONNREFUSED:
        logger.info("replacing the stale socket %s", path)
        with suppress(FileNotFoundError):
            os.unlink(path)
    elif result in (0, errno.EPROTOTYPE):
        raise UsageError(
            f"--socket-path={path}: another process is listening there: stop it or name another "
            "path"
        )
    elif result != errno.ENOENT:
        raise UsageError(
            f"--socket-path={path}: cannot determine whether the socket there is stale: "
            f"{os.strerror(result)}: remove it or name another path"
        )


def _remove_socket(path: str, ours: os.stat_result) -> None:
    """Remove the socket file, unless another file has replaced it."""
    with suppress(OSError):
        if os.path.samestat(os.lstat(path), ours):
            os.unlink(path)


def adopt(fd: int) -> tuple[socket.socket, bool]:
    """Return the inherited socket, and whether it listens; UsageError unless UNIX stream."""
    expected = f"--fd={fd}: expected a UNIX stream socket that listens or is connected"
    try:
        foreign.refuse_path(fd)
        sock = socket.socket(fileno=fd)
    except ValueError:
        raise UsageError(f"{expected}, found a descriptor opened with O_PATH") from None
    except OSError as error:
        raise UsageError(f"{expected}, found: {error.strerror}") from error
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise UsageError(f"{expected}, found another kind of socket")
        listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if not listening:
            try:
                sock.getpeername()
            except OSError:
                raise UsageError(f"{expected}, found one that does neither") from None
    except BaseException:
        sock.close()
        raise
    os.set_inheritable(fd, False)
    return sock, listening
