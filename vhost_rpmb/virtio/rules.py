# SPDX-License-Identifier: Apache-2.0
"""What a driver can break in a virtqueue, in the words that the log uses.

The order is the numbering of the compiled engine (``_fast/virtqueue.pxd``).
"""

from __future__ import annotations

# How often the buffers of one chain may continue in the next memory region. A real guest has few
# regions that adjoin; without a bound each descriptor could be as much work as there are regions.
MAX_CROSSINGS = 4096

# A broken chain costs the guest that chain.
CHAIN_RULES = (
    "a descriptor chain has more descriptors than the queue (or loops)",
    "a descriptor's next index is out of range",
    "a buffer lies outside every memory region",
    "a device-readable descriptor follows a device-writable one",
    "an indirect descriptor was used without VIRTIO_F_INDIRECT_DESC",
    "an indirect descriptor is flagged NEXT or stands in an indirect table",
    "an indirect table's length is zero or not a multiple of 16 bytes",
    "an indirect table has more descriptors than the queue",
    "an indirect table lies outside every memory region",
    "a descriptor has length zero",
    "a descriptor chain is longer than 2^32 bytes",
    f"the buffers of a descriptor chain cross borders of memory regions over {MAX_CROSSINGS} times",
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
) = range(len(RING_RULES))
