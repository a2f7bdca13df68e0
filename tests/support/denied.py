# SPDX-License-Identifier: Apache-2.0
"""The daemon on a kernel that refuses calls: ``python -m tests.support.denied CALL=ERROR... --``.

CALL is a name, for fcntl with the number of a command: ``fcntl:1027=EINVAL kcmp=EPERM``. The
options of the daemon follow ``--``. The calls fail in the kernel, by a seccomp filter before the
daemon's own.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from vhost_rpmb import cli
from vhost_rpmb.daemon.sandbox import Comparison, add_rule
from vhost_rpmb.libc import as_int
from vhost_rpmb.library import Library

_ALLOW = 0x7FFF0000
_FAIL = 0x00050000
_MASKED_EQUAL = 7
_INT = 0xFFFF_FFFF

# Linux before 6.10 has no F_DUPFD_QUERY, others no kcmp(2) or forbid it.
OLD_KERNEL = ("fcntl:1027=EINVAL",)
NO_COMPARISON = (*OLD_KERNEL, "kcmp=EPERM")


def command(denials: Sequence[str], *options: str) -> list[str]:
    """The command of a daemon for which these calls fail."""
    return [sys.executable, "-m", "tests.support.denied", *denials, "--", *options]


def deny(denials: Sequence[str]) -> None:
    """Let calls of this process fail from now on."""
    library = Library("libseccomp.so.2")
    context, _ = library.call("seccomp_init", _ALLOW)
    for denial in denials:
        call, _, error = denial.partition("=")
        name, _, argument = call.partition(":")
        compared = [Comparison(1, _MASKED_EQUAL, _INT, int(argument))] if argument else []
        assert not add_rule(library, context, _FAIL | getattr(errno, error), name, *compared)
    assert not as_int(library.call("seccomp_load", context)[0])
    library.call("seccomp_release", context)


def main() -> int:
    end = sys.argv.index("--")
    deny(sys.argv[1:end])
    return cli.main(sys.argv[end + 1 :])


if __name__ == "__main__":
    sys.exit(main())
