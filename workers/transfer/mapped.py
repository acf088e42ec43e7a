"""The family `mapped`: the source's pool is memory of this host, which this process maps and copies from by itself.

On CPUs a memfd, on GPUs CUDA IPC, over NVLink between two of them. The source takes no part: what it left mapped when it died can
still be read to the end, and a source that is stopped does not slow a copy down.
"""

import torch

from coordinator.messages import KVLayout
from workers import cuda_ipc
from workers.kv_cache import KVCache
from workers.transfer.moves import Move


class MappedLink:
    """To the pool at `address`. A copy raises Unavailable if it cannot be mapped here, LayoutMismatch if it is another than told."""

    IDLE_S = cuda_ipc.KEEP_UNUSED_S  # a mapping keeps the memory of a source that died

    def __init__(self, pool: KVCache, address: str, num_pages: int, layout: KVLayout, stream: torch.cuda.Stream | None = None) -> None:
        self._pool = pool
        self._address = address
        self._num_pages = num_pages
        self._layout = layout
        self._stream = stream

    def copy(self, move: Move) -> None:
        with torch.cuda.stream(self._stream):  # and its GPU, which is the one that maps; of None: the current one
            # Attached anew each time: a path in /proc names a process id and a descriptor, and both may mean another pool a moment later.
            source = KVCache.attach(self._address, self._num_pages, self._layout)
            self._pool.copy_pages_from(source, move.src_pages, move.dst_pages, move.num_tokens, move.heads)
            if self._stream is not None:
                done = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps: the cores belong to the step
                done.record()
                done.synchronize()

    def close(self) -> None:
        cuda_ipc.drop_unused()
