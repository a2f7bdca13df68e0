# SPDX-License-Identifier: Apache-2.0
"""Numbers of the virtio specification, under the names they have there.

Source: "Basic Facilities of a Virtio Device", "Split Virtqueues", "Packed Virtqueues" and "Reserved
Feature Bits".
"""

# Feature bits (bit numbers), "Reserved Feature Bits".
VIRTIO_F_INDIRECT_DESC = 28
VIRTIO_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_IN_ORDER = 35

# Device status bits, "Device Status Field".
VIRTIO_STATUS_ACKNOWLEDGE = 1
VIRTIO_STATUS_DRIVER = 2
VIRTIO_STATUS_DRIVER_OK = 4
VIRTIO_STATUS_FEATURES_OK = 8
VIRTIO_STATUS_NEEDS_RESET = 64
VIRTIO_STATUS_FAILED = 128

# Split virtqueue, "Split Virtqueues".
VIRTQ_MAX_SIZE = 32768
VIRTQ_DESC_SIZE = 16
VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4
VIRTQ_AVAIL_F_NO_INTERRUPT = 1
VIRTQ_USED_F_NO_NOTIFY = 1

# Packed virtqueue, "Packed Virtqueues".
VIRTQ_DESC_F_AVAIL = 1 << 7
VIRTQ_DESC_F_USED = 1 << 15
VIRTQ_EVENT_SIZE = 4
RING_EVENT_FLAGS_ENABLE = 0
RING_EVENT_FLAGS_DISABLE = 1
RING_EVENT_FLAGS_DESC = 2

# Dirty log of the vhost-user protocol: bytes of guest memory for one bit.
VHOST_LOG_PAGE = 4096
