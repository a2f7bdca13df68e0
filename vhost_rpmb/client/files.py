# SPDX-License-Identifier: Apache-2.0
"""Files and streams of ``vhost-rpmb-client``: keys, input and output data, messages."""

import errno
import os
import select
import stat
import sys
import tempfile
import time

from vhost_rpmb.driver.errors import ClientError
from vhost_rpmb.errors import UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.files import new_file, sync_folder, write_all
from vhost_rpmb.storage.local.keyfile import exposure

__all__ = [
    "STANDARD_STREAM",
    "create_file",
    "create_folder",
    "name_of",
    "read_blocks",
    "read_key",
    "read_optional_key",
    "warn",
    "write_file",
    "write_stdout",
]

PROG = "vhost-rpmb-client"
STANDARD_STREAM = "-"
_FIFO_WAIT = 10  # seconds for the other end of a FIFO
_FIFO_PAUSE = 0.05  # seconds between two attempts to open a FIFO without a reader


def read_key(path: str) -> bytes:
    """Read a key of 32 bytes; UsageError for fewer."""
    key, mode = _read_input(path, spec.KEY_SIZE + 1)
    if len(key) < spec.KEY_SIZE:
        raise UsageError(
            f"{name_of(path)}: expected a key of {spec.KEY_SIZE} bytes, found {len(key)}"
        )
    if path != STANDARD_STREAM and (exposed := exposure(path, mode)):
        warn(f"the key file {exposed}")
    if len(key) > spec.KEY_SIZE:
        warn(
            f"{name_of(path)}: expected a key of {spec.KEY_SIZE} bytes, found more: the rest is"
            " ignored"
        )
    return key[: spec.KEY_SIZE]


def read_optional_key(path: str | None) -> bytes | None:
    """Read a key if a file is given, else warn."""
    if path is None:
        warn("no KEYFILE given: answers are not authenticated")
        return None
    return read_key(path)


def read_blocks(path: str, limit: int) -> bytes:
    """Read the data of up to ``limit`` blocks; UsageError for an incomplete block."""
    size = limit * spec.BLOCK_SIZE
    data, _ = _read_input(path, size + 1)
    if not data or len(data) % spec.BLOCK_SIZE or len(data) > size:
        found = f"more than {size}" if len(data) > size else str(len(data))
        raise UsageError(
            f"{name_of(path)}: expected a multiple of {spec.BLOCK_SIZE} bytes, up to {size}, found "
            f"{found}"
        )
    return data


def _read_input(path: str, limit: int) -> tuple[bytes, int]:
    """Read at most ``limit`` bytes of an input file; return its mode as well."""
    try:
        if path != STANDARD_STREAM:
            with open(path, "rb", buffering=0, opener=_open_at_once) as file:
                fd = file.fileno()
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                began = bool(poll.poll(_FIFO_WAIT * 1000))
                os.set_blocking(fd, True)  # a FIFO without a writer then is at its end
                data = _read_up_to(fd, limit)
                if not data and not began:
                    raise UsageError(
                        f"{path}: expected a program that writes into this FIFO, found none within"
                        f" {_FIFO_WAIT} s: start it first"
                    )
                return data, os.fstat(fd).st_mode
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        return _read_up_to(sys.stdin.fileno(), limit), 0
    except OSError as error:
        raise UsageError(f"{name_of(path)}: {error.strerror}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a FIFO without waiting for its other end."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _read_up_to(fd: int, limit: int) -> bytes:
    data = b""
    while len(data) < limit and (part := os.read(fd, limit - len(data))):
        data += part
    return data


def write_stdout(data: bytes) -> None:
    """Write all data to standard output; ClientError if that fails."""
    if sys.stdout is None:
        raise ClientError("standard output is closed")
    try:
        write_all(sys.stdout.fileno(), data)
    except OSError as error:
        raise ClientError(f"standard output: {error.strerror}") from None


def write_file(path: str, data: bytes) -> None:
    """Replace the content of a file; after a failure the file is unchanged."""
    path = os.path.realpath(path)
    try:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG | stat.S_IRUSR | stat.S_IWUSR
        if not stat.S_ISREG(mode):  # a device or a FIFO cannot be replaced
            _write_special(path, data)
            return
        fd, new = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".vhost-rpmb-client-")
        try:
            try:
                write_all(fd, data)
                os.fchmod(fd, stat.S_IMODE(mode))
            finally:
                os.close(fd)
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}") from None


def _write_special(path: str, data: bytes) -> None:
    """Write into a device, or into a FIFO, after waiting a while for its reader."""
    ends = time.monotonic() + _FIFO_WAIT
    while True:
        try:
            fd = _open_at_once(path, os.O_WRONLY)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(path).st_mode):
                raise
        if time.monotonic() > ends:
            raise ClientError(
                f"{path}: expected a program that reads from this FIFO, found none within"
                f" {_FIFO_WAIT} s: start it first"
            )
        time.sleep(_FIFO_PAUSE)
    try:
        os.set_blocking(fd, True)
        write_all(fd, data)
    finally:
        os.close(fd)


def create_file(path: str, data: bytes, size: int | None = None) -> None:
    """Create a file, mode 0600, complete and durable or not at all; sparse up to ``size`` bytes.

    UsageError where the path exists already or the file cannot be created.
    """
    created = False
    try:
        with new_file(path) as fd:
            created = True
            write_all(fd, data)
            os.ftruncate(fd, len(data) if size is None else size)
            sync_folder(path)
    except FileExistsError:
        raise UsageError(f"{path} exists already: choose another path, or remove it") from None
    except OSError as error:
        kind = ClientError if created else UsageError
        raise kind(f"cannot create {path}: {error.strerror}") from None


def create_folder(path: str) -> None:
    """Create a folder, mode 0700, and missing folders above it.

    UsageError where the path exists already or the folder cannot be created.
    """
    path = os.path.abspath(path)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already: choose another path, or remove it")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, 0o700)
        sync_folder(path)
    except OSError as error:
        raise UsageError(f"cannot create {path}: {error.strerror}") from None


def name_of(path: str) -> str:
    """Return the name of a file in messages."""
    return "standard input" if path == STANDARD_STREAM else path


def warn(text: str) -> None:
    """Print one warning on standard error."""
    from vhost_rpmb import log  # imported lazily: few commands warn

    log.warn(PROG, text)
