"""Copy KV pages of other pools into ours on a thread of its own, so that a step never waits for a hand-over.

On a GPU the copies run on a stream of their own beside the steps:

    engine thread    start(copy): an event behind the steps launched so far, which may still write to the pages freed for it
    copier thread    attach | wait for that event | one launch | wait for it | on_done
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

import torch

from workers import cuda_ipc
from workers.kv_cache import KVCache
from workers.scheduler import PageCopy

log = logging.getLogger(__name__)


class PageCopier:
    """One copy at a time, in order. `on_done(copy, error)` is called from the copying thread; error is "" if all went well.

    `copied_bytes` and `copy_seconds` grow with every copy: the time is that of copying alone, without attaching and waiting for steps.
    """

    # The lowest that CUDA knows, and that of its default stream: where the steps' stream has a higher one (-1), their kernels are the
    # first to get a multiprocessor that falls free. At full bandwidth 4k tokens of V2-Lite take 60 us, 1 % of a decode step.
    STREAM_PRIORITY = 0

    def __init__(self, pool: KVCache, on_done: Callable[[PageCopy, str], None]) -> None:
        self.copied_bytes = 0
        self.copy_seconds = 0.0
        self._pool = pool
        self._on_done = on_done
        self._waiting: queue.SimpleQueue[tuple[PageCopy, torch.cuda.Event | None]] = queue.SimpleQueue()
        self._stream: torch.cuda.Stream | None = None
        if pool.device.type == "cuda":
            self._stream = torch.cuda.Stream(pool.device, priority=self.STREAM_PRIORITY)
            self._copy_on_device(pool, [0], [0], 1)  # compiles the kernel: page 0 becomes what it is
        threading.Thread(target=self._run, name="page copier", daemon=True).start()

    def start(self, copy: PageCopy) -> None:
        """Call it from the thread, and on the current stream, of the steps."""
        self._waiting.put((copy, None if self._stream is None else _event(torch.cuda.current_stream(self._pool.device))))

    def _run(self) -> None:
        if self._stream is not None:
            torch.cuda.set_device(self._pool.device)
        while True:
            copy, freed = self._next()
            error = ""
            if not copy.is_cancelled:
                try:
                    self._copy(copy, freed)
                except Exception as failure:
                    # Whatever is wrong with another process' pool is that hand-over's problem: the source keeps its pages.
                    log.warning("job %s: import failed: %s", copy.sequence.job_id, failure)
                    error = f"{type(failure).__name__}: {failure}"
            self._on_done(copy, error)

    def _next(self) -> tuple[PageCopy, torch.cuda.Event | None]:
        """Mappings that no copy needed for a while are let go of meanwhile: they keep the memory of processes that died."""
        while self._stream is not None:
            cuda_ipc.drop_unused()
            with contextlib.suppress(queue.Empty):
                return self._waiting.get(timeout=cuda_ipc.KEEP_UNUSED_S)
        return self._waiting.get()

    def _copy(self, copy: PageCopy, freed: torch.cuda.Event | None) -> None:
        # Attached anew each time: a path in /proc names a process id and a descriptor, and both may mean another pool a moment later.
        source = KVCache.attach(copy.source.address, copy.source.num_pages, copy.source.layout)
        if freed is not None:
            freed.synchronize()
        started_at = time.perf_counter()
        if self._stream is None:
            self._pool.copy_pages_from(source, copy.src_pages, copy.dst_pages, copy.num_tokens)
        else:
            self._copy_on_device(source, copy.src_pages, copy.dst_pages, copy.num_tokens)
        self.copy_seconds += time.perf_counter() - started_at
        self.copied_bytes += self._pool.bytes_per_token * copy.num_tokens

    def _copy_on_device(self, source: KVCache, src_pages: list[int], dst_pages: list[int], num_tokens: int) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._pool.copy_pages_from(source, src_pages, dst_pages, num_tokens)
        _event(self._stream).synchronize()


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Recorded now. Whoever waits for it sleeps: the cores belong to the step."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
