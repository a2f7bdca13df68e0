# SPDX-License-Identifier: Apache-2.0
"""Our own limits of requests and batches: they bound the memory and the time that each can cost.

The virtio specification lets a device have a reasonable limit. The largest request that the
configuration space allows has 256 frames.
"""

MAX_REQUEST_FRAMES = 512  # of one chain
MAX_RESPONSE_FRAMES = 2048  # of one chain
MAX_BATCH_FRAMES = 1024  # a batch with so many frames takes no further chain
MAX_BATCH_DESCRIPTORS = 4096  # the same for descriptors

REPLAY_WRITE_SIZE = 36  # bytes of a write in a replay record: its counter and its MAC
MAX_REPLAY_WRITES = 2048  # in a record that also keeps answers of an earlier one
