# SPDX-License-Identifier: Apache-2.0
"""The rules of a virtqueue that a driver can break, in the words of the log, with their numbers."""

from __future__ import annotations

from vhost_rpmb.virtio.limits import MAX_CROSSINGS as _CROSSINGS

# A broken chain costs the guest that chain.
CHAIN_RULES = (
    "a descriptor chain has more descriptors than the queue (or loops)",
    "a descriptor's next index is out of range",
    "a buffer lies outside every memory region",
    "a device-readable descriptor follows a device-writable one",
    "an indirect descriptor was used without VIRTIO_F_INDIRECT_DESC",
    "an indirect descriptor is flagged NEXT, is in an indirect table or follows another (packed)",
    "an indirect table's length is zero or not a multiple of 16 bytes",
    "an indirect table has more descriptors than the queue",
    "an indirect table lies outside every memory region",
    "a descriptor has length zero",
    "a descriptor chain is longer than 2^32 bytes",
    f"the buffers of a descriptor chain cross borders of memory regions over {_CROSSINGS} times",
)
(
    CHAIN_TOO_LONG,
    CHAIN_NEXT,
    CHAIN_BUFFER,
    CHAIN_ORDER,
    CHAIN_INDIRECT_FEATURE,
    CHAIN_INDIRECT_FLAGS,
    CHAIN_INDIRECT_LENGTH,
    CHAIN_INDIRECT_SIZE,
    CHAIN_INDIRECT_TABLE,
    CHAIN_EMPTY_DESCRIPTOR,
    CHAIN_BYTES,
    CHAIN_CROSSINGS,
) = range(len(CHAIN_RULES))
NUM_CHAIN_RULES = len(CHAIN_RULES)

# A broken ring stops the queue until the driver resets it.
RING_RULES = (
    "",
    "the queue has no size",
    "the descriptor table is not 16-byte aligned guest memory of one region",
    "the available ring is not 2-byte aligned guest memory of one region",
    "the used ring is not 4-byte aligned guest memory of one region",
    "the available index is ahead by more than the queue size",
    "a head index is not below the queue size",
    "guest memory went away: the file behind it was truncated",
    "the in-flight region went away: the file behind it was truncated",
    "the size of a split ring is not a power of two",
    "the driver event area is not 4-byte aligned guest memory of one region",
    "the device event area is not 4-byte aligned guest memory of one region",
    "a slot of the vring base is not below the queue size",
    "a descriptor chain does not end within the slots that are not in flight",
)
(
    RING_OK,
    RING_NO_SIZE,
    RING_DESCRIPTOR_TABLE,
    RING_AVAILABLE,
    RING_USED,
    RING_AVAILABLE_INDEX,
    RING_HEAD,
    RING_MEMORY_LOST,
    RING_INFLIGHT_LOST,
    RING_SPLIT_SIZE,
    RING_DRIVER_AREA,
    RING_DEVICE_AREA,
    RING_POSITION,
    RING_ENDLESS_CHAIN,
) = range(len(RING_RULES))
