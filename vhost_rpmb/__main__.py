# SPDX-License-Identifier: Apache-2.0
"""``python -P -m vhost_rpmb`` is the same as ``vhost-user-rpmb``.

Without ``-P`` Python imports from the current folder first, before any code here could prevent it.
"""

import sys

from vhost_rpmb.cli import main

sys.exit(main())
