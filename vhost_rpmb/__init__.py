# SPDX-License-Identifier: Apache-2.0
"""A vhost-user back-end for the virtio RPMB device (virtio device ID 28)."""

__version__ = "0.1.0"
