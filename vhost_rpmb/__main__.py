# SPDX-License-Identifier: Apache-2.0
"""``python -m vhost_rpmb`` is the same as ``vhost-user-rpmb``."""

import sys

from vhost_rpmb.cli import main

sys.exit(main())
