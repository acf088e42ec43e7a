"""Copy KV pages of other pools into ours on a thread of its own, so that a step never waits for a hand-over."""

import logging
import queue
import threading
from collections.abc import Callable

from workers.kv_cache import KVCache
from workers.scheduler import PageCopy

log = logging.getLogger(__name__)


class PageCopier:
    """One copy at a time, in order. `on_done(copy, error)` is called from the copying thread; error is "" if all went well."""

    def __init__(self, pool: KVCache, on_done: Callable[[PageCopy, str], None]) -> None:
        self._pool = pool
        self._on_done = on_done
        self._waiting: queue.SimpleQueue[PageCopy] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="page copier", daemon=True).start()

    def start(self, copy: PageCopy) -> None:
        self._waiting.put(copy)

    def _run(self) -> None:
        while True:
            copy = self._waiting.get()
            error = ""
            if not copy.is_cancelled:
                try:
                    self._copy(copy)
                except Exception as failure:
                    # Whatever is wrong with another process' pool is that hand-over's problem: the source keeps its pages.
                    log.warning("job %s: import failed: %s", copy.sequence.job_id, failure)
                    error = f"{type(failure).__name__}: {failure}"
            self._on_done(copy, error)

    def _copy(self, copy: PageCopy) -> None:
        # Mapped anew each time: an address names a process id and a descriptor, and both may mean another pool a moment later.
        source = KVCache.attach(copy.source.address, copy.source.num_pages, copy.source.layout)
        self._pool.copy_pages_from(source, copy.src_pages, copy.dst_pages, copy.num_tokens)
