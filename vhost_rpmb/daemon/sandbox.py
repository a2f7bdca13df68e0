# SPDX-License-Identifier: Apache-2.0
"""The sandbox: access that the process gives up for good before it serves a front-end.

A Landlock ruleset takes three system calls. The seccomp filter is made by libseccomp 2, which has
the numbers of the system calls on each machine. docs/decisions/0013-sandbox.md explains why no
Python package is used, and why a denied call fails instead of ending the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import reduce
from operator import or_

from vhost_rpmb import libc
from vhost_rpmb.log import Logger
from vhost_rpmb.storage.interface import Access
from vhost_rpmb.system import socket
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vhost_rpmb.library import Library

__all__ = ["Comparison", "add_rule", "enter"]

logger = Logger(__name__)

_PR_SET_NO_NEW_PRIVS = 38  # prctl(2)

# landlock(7): numbers of the system calls, the same on every machine.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ADD_RULE = 445
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
_LANDLOCK_RULE_NET_PORT = 2
_CONNECT_TCP = 1 << 1
# Rights in a folder and everything below it.
_RIGHTS = {
    Access.WRITE: 1 << 1,  # open files for writing
    Access.SYNC: 1 << 3,  # open the folder; seccomp allows no listing
    Access.READ: 1 << 2 | 1 << 3,  # open files for reading, and the folder; seccomp allows listing
    Access.REMOVE: 1 << 5,  # remove files that are not folders
    Access.TRUNCATE: 1 << 14,  # since version 3 of the interface
    Access.LINK: 1 << 8,  # link files; seccomp allows it
    Access.CREATE: 1 << 8,  # create regular files, and with REMOVE rename them
}
# Rights that a ruleset handles, by version of the interface: files, network, scopes.
_HANDLED_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_HANDLED_NETWORK = {4: 0b11}  # bind and connect of TCP
_HANDLED_SCOPES = {6: 0b11}  # abstract UNIX sockets and signals of other processes

# libseccomp, <seccomp.h>
_ALLOW = 0x7FFF0000
_FAIL = 0x00050000 | errno.EPERM
_EQUAL = 4
_MASKED_EQUAL = 7
_PROT_EXEC = 4
_INT = 0xFFFF_FFFF  # the part of a register that is an int
_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_PRIVATE_FILE = 0o600  # mknod: without a type a regular file
_F_DUPFD_QUERY = 1027  # since Linux 6.10
# All else can make the kernel send signals (F_SETOWN, F_SETSIG, F_NOTIFY, O_ASYNC by F_SETFL).
_FCNTL_COMMANDS = (
    fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL,
    fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_GET_SEALS, fcntl.F_ADD_SEALS,
    _F_DUPFD_QUERY,
)  # fmt: skip
# clone(2): what makes a thread of the process, and the namespaces that one could have.
_CLONE_THREAD = 0x10000 | 0x800 | 0x400 | 0x200 | 0x100  # with signals, files, folders, memory
_CLONE_NAMESPACES = 0x7E020000
_SOCKET_TYPE = 0xF  # the part of socket(2)'s argument beside its flags
_FIONCLEX, _FIOCLEX, _FIONBIO = 0x5450, 0x5451, 0x5421

_ALLOWED = (
    # The ring, the socket and the event loop; first, because they are called for each request.
    "epoll_wait", "epoll_pwait", "write", "read", "recvmsg", "sched_yield",
    "clock_gettime", "fdatasync", "pwrite64", "pread64",
    # Connections and descriptors.
    "accept4", "accept", "close", "dup", "epoll_create1", "epoll_ctl", "eventfd2",
    "getpeername", "getsockname", "getsockopt", "pipe2", "poll", "ppoll", "recvfrom", "select",
    "pselect6", "sendmsg", "setsockopt", "shutdown",
    # Files; Landlock decides which ones.
    "access", "faccessat", "faccessat2", "fallocate", "flock", "fstat", "fstatfs", "fsync",
    "ftruncate", "getcwd", "lseek", "lstat", "newfstatat", "preadv", "preadv2", "pwritev",
    "pwritev2", "readlink", "readlinkat", "readv", "rename", "renameat", "renameat2", "stat",
    "statx", "umask", "unlink", "unlinkat", "writev",
    # Threads; the filter allows no process.
    "rseq", "sched_getaffinity", "set_robust_list",
    # Memory and time.
    "brk", "clock_nanosleep", "futex", "getrandom", "gettimeofday", "madvise", "memfd_create",
    "mremap", "munmap",
    "nanosleep", "restart_syscall", "setitimer", "time",
    # Signals, identity and the end.
    "exit", "exit_group", "getegid", "geteuid", "getgid", "getpid", "gettid", "getuid",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack",
)  # fmt: skip

_BY_ACCESS = {
    # Files that are opened later have the stamp of an image.
    Access.READ: ("getdents64", "fgetxattr", "fsetxattr"),
    Access.LINK: ("link", "linkat"),
}

# Receiving and sending with a mark.
_DESCRIPTOR_STORE = ("recvmmsg", "sendmmsg")
_KCMP_FILE = 0


def enter(
    folders: Mapping[str, Access],
    ports: Collection[int] = (),
    *,
    descriptor_store: bool = False,
) -> None:
    """Give up all access that serving does not need, irrevocably.

    ``folders``: the access that remains in each folder and in all folders below it. ``ports``: TCP
    ports to which connections remain possible. Every other file, new sockets, other programs and
    new executable memory become inaccessible; open files stay usable. ``descriptor_store``:
    descriptors will be sent to the service manager. If the kernel or libseccomp lacks a part, a
    warning is logged and the rest is done.
    """
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    try:
        library = libc.library("libseccomp.so.2")  # while files can still be opened
    except OSError as error:
        logger.warning("sandbox: no seccomp filter, install libseccomp 2: %s", error)
        library = None
    with suppress(OSError):
        # glibc loads it when a thread ends at process exit, and aborts if it cannot.
        libc.library("libgcc_s.so.1")
    try:
        _restrict_files(folders, ports)
    except OSError as error:
        logger.warning(
            "sandbox: no Landlock ruleset, every file stays accessible: %s", error.strerror
        )
    if library is not None:
        try:
            needed = reduce(or_, folders.values(), Access(0))
            _filter_calls(library, descriptor_store, needed, connections=bool(ports))
        except OSError as error:
            logger.warning("sandbox: no seccomp filter: %s", error.strerror)


# struct landlock_ruleset_attr: files, network, scopes; its length by version of the interface
_RULESET = struct.Struct("QQQ")
_RULESET_SIZES = {1: 8, 4: 16, 6: _RULESET.size}
_PATH_BENEATH = struct.Struct("=Qi")  # struct landlock_path_beneath_attr: allowed, parent; packed
_PORT = struct.Struct("QQ")  # struct landlock_net_port_attr: allowed, port


def _restrict_files(folders: Mapping[str, Access], ports: Collection[int]) -> None:
    def since(table: dict[int, int]) -> int:
        return max((value for first, value in table.items() if first <= version), default=0)

    version = libc.call(
        "syscall", _LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION
    )
    files, network = since(_HANDLED_FILES), since(_HANDLED_NETWORK)
    attributes = _RULESET.pack(files, network, since(_HANDLED_SCOPES))
    size = since(_RULESET_SIZES)
    ruleset = libc.call("syscall", _LANDLOCK_CREATE_RULESET, attributes, size, 0)

    def add(kind: int, rule: bytes) -> None:
        libc.call("syscall", _LANDLOCK_ADD_RULE, ruleset, kind, rule, 0)

    try:
        for path, access in folders.items():
            granted = [right for operation, right in _RIGHTS.items() if operation & access]
            rights = reduce(or_, granted, 0) & files
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                add(_LANDLOCK_RULE_PATH_BENEATH, _PATH_BENEATH.pack(rights, parent))
            finally:
                os.close(parent)
        if ports and not network:
            logger.warning("sandbox: this kernel has no rules for TCP, every port stays accessible")
            ports = ()
        for port in ports:
            add(_LANDLOCK_RULE_NET_PORT, _PORT.pack(_CONNECT_TCP, port))
        libc.call("syscall", _LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


class Comparison(NamedTuple):
    """struct scmp_arg_cmp."""

    argument: int
    operator: int
    first: int
    second: int = 0


_COMPARISON = struct.Struct("IIQQ")


def add_rule(
    library: Library, context: int, action: int, name: str, *comparisons: Comparison
) -> int:
    """Add a rule to a filter of libseccomp; return 0 or the negative number of an error."""
    number, _ = library.call("seccomp_syscall_resolve_name", name.encode() + b"\0")
    array = b"".join([_COMPARISON.pack(*comparison) for comparison in comparisons])
    arguments = (context, action, libc.as_int(number), len(comparisons), array)
    return libc.as_int(library.call("seccomp_rule_add_array", *arguments)[0])


def _filter_calls(
    library: Library, descriptor_store: bool, needed: Access, *, connections: bool
) -> None:
    context, _ = library.call("seccomp_init", _FAIL)
    if not context:
        raise OSError(None, "libseccomp cannot make a filter")

    def allow(name: str, *comparisons: Comparison) -> None:
        rule(name, _ALLOW, *comparisons)

    def rule(name: str, action: int, *comparisons: Comparison) -> None:
        result = add_rule(library, context, action, name, *comparisons)
        if result and result != -errno.EDOM:  # EDOM: this machine does not have that call
            raise OSError(-result, f"{name}: {os.strerror(-result)}")

    try:
        for name in _ALLOWED:
            allow(name)
        for access, names in _BY_ACCESS.items():
            for name in names if access & needed else ():
                allow(name)
        if descriptor_store:
            for name in _DESCRIPTOR_STORE:
                allow(name)
            # Comparing open files of its own.
            own = [Comparison(argument, _EQUAL, os.getpid()) for argument in (0, 1)]
            allow("kcmp", *own, Comparison(2, _EQUAL, _KCMP_FILE))
        # Without an address: the service manager's datagram socket could reach any other socket.
        # That of sendmsg, which sends descriptors, is in memory, where a filter cannot read it.
        allow("sendto", Comparison(4, _EQUAL, 0))
        for name in ("mmap", "mprotect"):
            allow(name, Comparison(2, _MASKED_EQUAL, _PROT_EXEC, 0))
        # Without O_CREAT the mode has no meaning, and the C library passes 0.
        allow("open", Comparison(2, _MASKED_EQUAL, _SPECIAL_BITS, 0))
        allow("openat", Comparison(3, _MASKED_EQUAL, _SPECIAL_BITS, 0))
        allow("mknod", Comparison(1, _MASKED_EQUAL, _INT, _PRIVATE_FILE))
        allow("mknodat", Comparison(2, _MASKED_EQUAL, _INT, _PRIVATE_FILE))
        for command in _FCNTL_COMMANDS:
            allow("fcntl", Comparison(1, _MASKED_EQUAL, _INT, command))
        for request in (_FIONCLEX, _FIOCLEX, _FIONBIO):
            allow("ioctl", Comparison(1, _EQUAL, request))
        allow(
            "clone",
            Comparison(0, _MASKED_EQUAL, _CLONE_THREAD | _CLONE_NAMESPACES, _CLONE_THREAD),
        )
        if connections:
            # Of sockets that exist, only the service manager's could be connected elsewhere.
            allow("connect")
            for family in (socket.AF_INET, socket.AF_INET6):
                allow(
                    "socket",
                    Comparison(0, _EQUAL, family),
                    Comparison(1, _MASKED_EQUAL, _SOCKET_TYPE, socket.SOCK_STREAM),
                )
        # Its flags are in memory, which a filter cannot read; without it the C library uses clone.
        rule("clone3", _FAIL & ~0xFFFF | errno.ENOSYS)
        allow("tgkill", Comparison(0, _EQUAL, os.getpid()))  # a signal to itself, as abort() does
        result = libc.as_int(library.call("seccomp_load", context)[0])
        if result:
            raise OSError(-result, os.strerror(-result))
    finally:
        library.call("seccomp_release", context)
