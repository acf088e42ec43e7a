"""One job's answer as it arrives: puts runs of tokens in order by index, drops what was seen, knows what is missing. No I/O."""

from collections import deque
from dataclasses import replace

from coordinator.messages import Finish, TokenRun

MAX_UNREAD_TOKENS = 8192   # of one job; a reader that is further behind gets the rest read again when it has caught up
MAX_RUNS_AHEAD = 64        # kept while an earlier run is missing; what is over is read again with it


class JobStream:
    """Runs may come twice, from several workers, overlapping, and with gaps; every token leaves once, in order.

        0 ── taken by the reader ── [unread] ── next_index ── (missing) ── [ahead] ── known_end
    """

    def __init__(self) -> None:
        self.next_index = 0                 # of the token to come next
        self.finish: Finish | None = None   # set once all tokens before it are here
        self.num_unread = 0
        self._unread: deque[TokenRun] = deque()
        self._ahead: list[TokenRun] = []
        self._known_end = 0
        self._is_end_known = False

    @property
    def has_news(self) -> bool:
        return bool(self._unread) or self.finish is not None

    @property
    def is_behind(self) -> bool:
        """Tokens, or the end, are known to be stored but are not here: they must be read again."""
        return self.finish is None and (self.next_index < self._known_end or self._is_end_known)

    @property
    def has_room(self) -> bool:
        return self.num_unread < MAX_UNREAD_TOKENS

    def push(self, run: TokenRun) -> None:
        """Take what is new of `run`."""
        if self.finish is not None:
            return
        end = run.first_index + len(run.token_ids)
        self._known_end = max(self._known_end, end)
        self._is_end_known = self._is_end_known or run.finish is not None
        if run.first_index > self.next_index:
            if len(self._ahead) < MAX_RUNS_AHEAD:
                self._ahead.append(run)
            return
        self._take(run, end)
        while self._ahead and self.finish is None:
            fitting = [r for r in self._ahead if r.first_index <= self.next_index]
            if not fitting:
                return
            self._ahead = [r for r in self._ahead if r.first_index > self.next_index]
            for r in fitting:
                self._take(r, r.first_index + len(r.token_ids))

    def take(self) -> list[TokenRun]:
        """All that is unread, in order, without gaps."""
        runs = list(self._unread)
        self._unread.clear()
        self.num_unread = 0
        return runs

    def _take(self, run: TokenRun, end: int) -> None:
        room = MAX_UNREAD_TOKENS - self.num_unread
        start = self.next_index - run.first_index
        stop = min(len(run.token_ids), start + room)
        if start < stop:
            if start or stop < len(run.token_ids):
                shown = replace(run, first_index=self.next_index, token_ids=run.token_ids[start:stop], logprobs=run.logprobs[start:stop],
                                texts=run.texts[start:stop], top_logprobs=run.top_logprobs[start:stop],
                                finish=run.finish if stop == len(run.token_ids) else None)
                self._unread.append(shown)
            else:
                self._unread.append(run)
            self.num_unread += stop - start
            self.next_index += stop - start
        if run.finish is not None and self.next_index >= end:
            self.finish = run.finish
            self._ahead.clear()
