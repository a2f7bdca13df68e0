# SPDX-License-Identifier: Apache-2.0
"""Our own limits of guest memory, descriptor chains and the loop that serves a virtqueue."""

# How often the buffers of one chain may continue in the next memory region. A real guest has few
# regions that adjoin; without a bound each descriptor could be as much work as there are regions.
MAX_CROSSINGS = 4096

# Each access costs the process the page tables of the address, 4 KiB for 2 MiB of addresses and as
# much again for 1 GiB, and they stay until the mapping goes. A guest could make them grow to 1/512
# of a sparse file. So the mappings are made anew, in place, after so many areas of 2 MiB. The time
# of that grows with all that is mapped, to 80 ms: one more area for each 4 GiB bounds a batch's.
MAX_TOUCHED_AREAS = 1024
TOUCHED_AREA_BITS = 21
MAPPED_PER_AREA_BITS = 32

# A mapping is made anew in parts of that size, each of which needs as many free addresses for a
# moment. Where the regions take half of a 47-bit address space at most, 510 gaps between them
# cannot all be smaller.
MAX_RENEWED = 1 << 36  # bytes
MAX_MAPPED = 1 << 46  # bytes, of all regions

# A dirty log of the size above has no bit for this guest address, nor for any behind it.
LOG_ADDRESS_END = 1 << 62

SLEEP_MS = 1000  # without an event; then serve() returns, because its caller may have work to do
