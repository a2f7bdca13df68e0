# SPDX-License-Identifier: Apache-2.0
"""The daemon, whose device has two queues: ``python -m tests.support.twoqueues OPTIONS...``.

QEMU transfers the state of vhost-user-fs devices only, which have two queues at least. Their
contents do not matter where no guest runs.
"""

import sys
from typing import Any

from vhost_rpmb import cli
from vhost_rpmb.vhost_user import backend, session


class TwoQueues:
    """The device of either engine; the compiled class cannot be changed."""

    num_queues = 2

    def __init__(self, device: Any) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class Backend(backend.Backend):
    """Serves the messages of such a device."""

    def __init__(self, device: Any, *others: Any, **named: Any) -> None:
        super().__init__(TwoQueues(device), *others, **named)


def main() -> int:
    vars(session)["Backend"] = Backend
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
