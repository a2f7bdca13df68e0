# SPDX-License-Identifier: Apache-2.0
"""``python -P -m vhost_rpmb.client`` is the same as ``vhost-rpmb-client``.

Without ``-P`` Python imports from the current folder first, before any code here could prevent it.
"""

import sys

from vhost_rpmb.client.cli import main

sys.exit(main())
