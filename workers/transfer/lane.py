"""A thread that keeps one way to one source and makes its copies in order. What a copy is for is not known here."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from coordinator.errors import TokenmillError
from workers.transfer.moves import Link, Move

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """A copy that waits for its turn. `on_done` is called from the lane's thread with an error or "", and how long the copy took."""

    move: Move
    freed: torch.cuda.Event | None       # behind the steps that may still write to the target pages
    is_cancelled: Callable[[], bool]
    on_done: Callable[[str, float], None]


class Lane:
    """`open_link` is called in the lane's thread, when first needed and after every failure; `on_idle` after `idle_s` without work."""

    def __init__(self, name: str, open_link: Callable[[], Link], on_idle: Callable[["Lane"], None], idle_s: float) -> None:
        self._open_link = open_link
        self._on_idle = on_idle
        self._idle_s = idle_s
        self._link: Link | None = None
        self._errands: queue.SimpleQueue[Errand | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_empty(self) -> bool:
        return self._errands.empty()

    def put(self, errand: Errand) -> None:
        self._errands.put(errand)

    def end(self) -> None:
        """When everything put before is done."""
        self._errands.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                errand = self._errands.get(timeout=self._idle_s)
            except queue.Empty:
                self._on_idle(self)
                continue
            if errand is None:
                break
            self._run_errand(errand)
        self._close()

    def _run_errand(self, errand: Errand) -> None:
        error, seconds = "", 0.0
        if not errand.is_cancelled() and errand.move.num_tokens:
            try:
                seconds = self._copy(errand)
            except Exception as failure:
                # Whatever is wrong with another process' pool is that hand-over's problem: the source keeps its pages.
                if not isinstance(failure, TokenmillError):
                    log.exception("a KV copy failed")
                error = f"{type(failure).__name__}: {failure}"
                self._close()
        errand.on_done(error, seconds)

    def _copy(self, errand: Errand) -> float:
        if self._link is None:
            self._link = self._open_link()
        if errand.freed is not None:
            errand.freed.synchronize()
        started_at = time.perf_counter()
        self._link.copy(errand.move)
        return time.perf_counter() - started_at

    def _close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
