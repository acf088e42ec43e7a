"""Copy KV pages of other workers into our pool on threads of their own, so that a step never waits for a hand-over.

    engine thread    start(copy): an event behind the steps launched so far, which may still write to the pages freed for it
                     plan: which source rank sends which heads and pages to this rank (transfer/plan.py)
    lane threads     one per source rank: wait for that event | copy | wait for it | the last of a copy's parts calls on_done

On a GPU each lane has a stream of its own beside the steps. A pool that cannot be mapped after all is asked for at its desk.
"""

import logging
import threading
from collections.abc import Callable

import torch

from coordinator.errors import TokenmillError, Unavailable
from coordinator.messages import KVLayout, KVRank
from workers.kv_cache import KVCache
from workers.step import PageCopy
from workers.transfer import staging
from workers.transfer.collective import CollectiveLink
from workers.transfer.lane import Errand, Lane
from workers.transfer.mapped import MappedLink
from workers.transfer.moves import Link, Move
from workers.transfer.plan import Part, plan

log = logging.getLogger(__name__)


CLOSE_S = 2.0


class PageCopier:
    """Copies from one source are made in order. `on_done(copy, error)` is called from a copying thread; error is "" if all went well.

    `copied_bytes` and `copy_seconds` grow with every copy: the time is that of copying alone, without opening and waiting for steps.
    """

    # The lowest that CUDA knows, and that of its default stream: where the steps' stream has a higher one (-1), their kernels are the
    # first to get a multiprocessor that falls free. At full bandwidth 4k tokens of V2-Lite take 60 us, 1 % of a decode step.
    STREAM_PRIORITY = 0

    def __init__(self, pool: KVCache, on_done: Callable[[PageCopy, str], None], rank: int = 0) -> None:
        """`pool`: that of the rank `rank` of this worker."""
        self.copied_bytes = 0
        self.copy_seconds = 0.0
        self._pool = pool
        self._rank = rank
        self._on_done = on_done
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._lock = threading.Lock()
        if pool.device.type == "cuda":  # compiles what copies launch: page 0 becomes what it is
            pool.copy_pages_from(pool, [0], [0], 1)
            staging.warm_up(pool)

    def start(self, copy: PageCopy) -> None:
        """Call it from the thread, and on the current stream, of the steps."""
        source = copy.source
        freed = _event(torch.cuda.current_stream(self._pool.device)) if self._pool.device.type == "cuda" else None
        try:
            parts = plan(source.layout.num_kv_heads, source.layout.tp_size, self._pool.layout("").tp_size, self._rank)
            if len(source.ranks) != source.layout.tp_size:
                raise Unavailable(f"{len(source.ranks)} ranks named of {source.layout.tp_size}")
        except TokenmillError as error:
            self._on_done(copy, f"{type(error).__name__}: {error}")
            return
        parcel = _Parcel(copy, freed, len(parts))
        for part in parts:
            rank = source.ranks[part.source_rank]
            self._put(parcel, part, KVRank(address=rank.address) if rank.address else rank, fallback=rank)

    def close(self) -> None:
        """What waits for its turn is still copied, for a moment. A process must not exit in the middle of a communicator's calls."""
        with self._lock:
            lanes, self._lanes = list(self._lanes.values()), {}
        for lane in lanes:
            lane.end()
        for lane in lanes:
            lane.join(CLOSE_S)

    def _put(self, parcel: "_Parcel", part: Part, way: KVRank, fallback: KVRank | None) -> None:
        copy, pool = parcel.copy, self._pool
        move = Move.of(part, copy.src_pages, copy.dst_pages, copy.num_tokens, pool.page_size)

        def on_done(error: str, seconds: float) -> None:
            if error.startswith(Unavailable.__name__) and way.address and fallback is not None and fallback.desk:
                log.info("job %s: %s; asking at the desk", copy.sequence.job_id, error)
                self._put(parcel, part, KVRank(desk=fallback.desk), None)
                return
            self._part_done(parcel, move, error, seconds)

        errand = Errand(move=move, freed=parcel.freed, is_cancelled=lambda: copy.is_cancelled, on_done=on_done)
        with self._lock:
            key = (way.address or way.desk, copy.source.num_pages)
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = self._open_lane(way, copy.source.num_pages, copy.source.layout)
            lane.put(errand)

    def _open_lane(self, way: KVRank, num_pages: int, layout: KVLayout) -> Lane:
        pool = self._pool

        def open_link() -> Link:
            stream = None
            if pool.device.type == "cuda":
                torch.cuda.set_device(pool.device)
                stream = torch.cuda.Stream(pool.device, priority=self.STREAM_PRIORITY)
            if way.address:
                return MappedLink(pool, way.address, num_pages, layout, stream)
            return CollectiveLink(pool, way.desk, stream)

        return Lane("page copier", open_link, self._end_if_empty, MappedLink.IDLE_S if way.address else CollectiveLink.IDLE_S)

    def _end_if_empty(self, lane: Lane) -> None:
        with self._lock:
            if lane.is_empty:
                self._lanes = {key: other for key, other in self._lanes.items() if other is not lane}
                lane.end()

    def _part_done(self, parcel: "_Parcel", move: Move, error: str, seconds: float) -> None:
        with self._lock:
            parcel.num_left -= 1
            parcel.error = parcel.error or error
            if not error and seconds:
                self.copy_seconds += seconds
                self.copied_bytes += self._pool.bytes_per_token * move.num_tokens * move.heads.num_heads // self._pool.num_heads
            is_last = parcel.num_left == 0
        if is_last:
            if parcel.error:
                log.warning("job %s: import failed: %s", parcel.copy.sequence.job_id, parcel.error)
            self._on_done(parcel.copy, parcel.error)


class _Parcel:
    """A copy whose parts are on their way."""

    def __init__(self, copy: PageCopy, freed: torch.cuda.Event | None, num_left: int) -> None:
        self.copy = copy
        self.freed = freed
        self.num_left = num_left
        self.error = ""


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Recorded now. Whoever waits for it sleeps: the cores belong to the step."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
