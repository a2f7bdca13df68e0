# SPDX-License-Identifier: Apache-2.0
"""The daemon, whose device has two queues: ``python -m tests.support.twoqueues OPTIONS...``.

QEMU transfers the state of vhost-user-fs devices only, which have two queues at least. Their
contents do not matter where no guest runs. On the engine in Python, whose class can be changed.
"""

import os
import sys

from vhost_rpmb import cli, engine


def main() -> int:
    os.environ[cli.ENGINE_VARIABLE] = "pure"
    engine.load("pure").RpmbDevice.num_queues = 2
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
