# SPDX-License-Identifier: Apache-2.0
from typing import final

from vhost_rpmb._fast.virtqueue import Virtqueue
from vhost_rpmb.storage.interface import DeviceStore

__all__ = ["RpmbDevice"]

@final
class RpmbDevice:
    device_id: int
    num_queues: int
    served: int
    def __init__(
        self,
        store: DeviceStore,
        *,
        max_write_blocks: int = 32,
        max_read_blocks: int = 255,
        strict: bool = False,
        virtio_features: int | None = None,
    ) -> None: ...
    @property
    def features(self) -> int: ...
    @property
    def config(self) -> bytes: ...
    @property
    def journal(self) -> memoryview | None: ...
    @journal.setter
    def journal(self, buffer: memoryview | None) -> None: ...
    def restore_register(self, used_index: int) -> None: ...
    def clear_register(self) -> None: ...
    def reload(self) -> None: ...
    def reset(self) -> None: ...
    def process(self, queue: Virtqueue) -> int: ...
