# SPDX-License-Identifier: Apache-2.0
"""Make all that tests keep in the cache, as `make test-loaded` does before it loads the machine.

Under load, the first test of each waited longer for it than a test may take.
"""

from __future__ import annotations

import sys

from tests.e2e.cache import KitUnavailable
from tests.e2e.kit import AMD64, ARM64, make_kit
from tests.e2e.machine import make_machine
from tests.e2e.optee import make_routing_kit
from tests.e2e.second_vmm import make_second_vmm
from tests.support.etcd import make_etcd, make_etcdctl


def main() -> int:
    """Make what is missing."""
    try:
        for architecture in (AMD64, ARM64):
            make_routing_kit(make_kit(architecture))
        make_machine()
        make_second_vmm()
        make_etcd()
        make_etcdctl()
    except KitUnavailable as error:
        print(f"everything.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
