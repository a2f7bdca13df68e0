# SPDX-License-Identifier: Apache-2.0
"""Numbers, names and rules of the virtio specification.

Belongs here: what any virtio device shares. Does not: the RPMB device, any input or output.
"""
