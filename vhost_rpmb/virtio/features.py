# SPDX-License-Identifier: Apache-2.0
"""The virtio feature bits that a device can offer: by name, with their rules."""

from __future__ import annotations

from vhost_rpmb.virtio import spec

__all__ = ["DEFAULT", "OPTIONAL", "REQUIRED", "check"]

# Offered or not at the operator's choice; the names of the command line.
OPTIONAL = {
    "event-idx": 1 << spec.VIRTIO_F_EVENT_IDX,
    "in-order": 1 << spec.VIRTIO_F_IN_ORDER,
    "indirect-desc": 1 << spec.VIRTIO_F_INDIRECT_DESC,
    "packed": 1 << spec.VIRTIO_F_RING_PACKED,
}
REQUIRED = 1 << spec.VIRTIO_F_VERSION_1
DEFAULT = REQUIRED | OPTIONAL["event-idx"] | OPTIONAL["in-order"] | OPTIONAL["indirect-desc"]


def check(features: int) -> None:
    """ValueError unless a device can offer exactly these bits."""
    if features & ~sum(OPTIONAL.values()) != REQUIRED:
        raise ValueError(f"expected VERSION_1 and optional feature bits, found 0x{features:x}")
    # There are drivers that use the position in the used ring as the head of the chain. The two
    # are equal only if each chain is one descriptor, which takes indirect tables.
    if features & OPTIONAL["in-order"] and not features & OPTIONAL["indirect-desc"]:
        raise ValueError("expected in-order only together with indirect-desc, found it alone")
