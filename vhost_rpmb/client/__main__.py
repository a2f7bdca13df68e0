# SPDX-License-Identifier: Apache-2.0
"""``python -m vhost_rpmb.client`` is the same as ``vhost-rpmb-client``."""

import sys

from vhost_rpmb.client.cli import main

sys.exit(main())
