# SPDX-License-Identifier: Apache-2.0
"""The vhost-user protocol, back-end side; knows nothing of the device that it carries."""
