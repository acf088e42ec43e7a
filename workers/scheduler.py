"""Decide which sequences run next, and which pages they own. Knows counts, token ids and page ids; never a tensor, a socket or a clock.

A step is scheduled, launched and later completed. With depth 2 the next one is scheduled and launched in between, before the tokens of
the first are known: a sequence then goes on with a token that only the device has yet (`ForwardBatch.carried`), and if that turns out to
be its last one, the row was computed in vain and is dropped. A guided sequence never goes on so: what it may say depends on its last token,
so it sits out the step in between. Steps run in the order of their launch, so whatever a launched step computes
may be built on by the next (shared, freed, written over); only what leaves the engine waits for `complete`.

A sequence is admitted only when the projected peak, with every running sequence going on to its last token, fits the pool less
what is pinned; cached pages count as free. So a pool normally never runs out in mid-decode; if it does, the youngest sequence
gives its pages back and is computed again later. Order is first come, first served: the head of the queue is never overtaken.

Background sequences (batches) take what the others leave. They queue behind them, give way when slots or pages are short, and have few
tokens in any step: somebody who comes while it runs waits for its end. While others run they have an eighth of that, while one of them
waits for its first token next to nothing; those that have no turn keep their pages and sit the step out.
"""

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import replace
from math import isfinite

from coordinator.errors import InvalidField, PagesExhausted
from workers.admission import NEVER, Projection, fits
from workers.batch import ForwardBatch
from workers.engine_messages import Failed, Imported, Pinned, Prefilled, Stats, TokenRow, Tokens
from workers.guided import Guide
from workers.page_pool import PagePool
from workers.radix_cache import Journal, RadixCache
from workers.sequence import ImportSource, Sequence, State, num_pages_for, slots_for
from workers.step import PageCopy, Role, SchedulerSettings, Step

BACKGROUND_BESIDE = 8   # the share of `background_tokens` in a step where others run


class Scheduler:
    """Call `schedule`, launch its `batch`, call `advance`, then `complete` when the tokens are there; add, cancel and the rest in between.

    With depth 2 a step is completed after the next one was launched, or before the next is scheduled, as it comes.
    """

    def __init__(self, settings: SchedulerSettings, journal: Journal | None = None) -> None:
        self.settings = settings
        self.pool = PagePool(settings.num_pages)
        self.cache = RadixCache(self.pool, settings.page_size, enabled=settings.prefix_cache, journal=journal)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []    # RUNNING, IMPORTING and IMPORTED, oldest first
        self._copies: list[PageCopy] = []
        self._may_admit = False              # something changed since the head of the queue was last found not to fit

    # ---- commands ----

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises PagesExhausted if the whole pool could not hold it. A job id that is known starts anew."""
        needed = sequence.num_max_pages(self.settings.page_size)
        if needed > self.settings.num_pages:
            raise PagesExhausted(needed, self.settings.num_pages)
        self.cancel(sequence.job_id)
        self._sequences[sequence.job_id] = sequence
        if sequence.is_background:
            self._waiting.append(sequence)
        else:
            self._waiting.insert(self._num_waiting_in_front(), sequence)
        self._may_admit = True

    def activate(self, job_id: str) -> bool:
        """Start decoding an imported sequence: its pages are proven, so the prefix tree may have them. False if there is none."""
        sequence = self._sequences.get(job_id)
        if sequence is None or sequence.state is not State.IMPORTED or sequence.source is None:
            return False
        sequence.state = State.RUNNING
        sequence.num_computed = sequence.source.num_tokens
        sequence.source = None
        self._share(sequence)
        return True

    def cancel(self, job_id: str) -> bool:
        """Free all that it holds, at any stage. False if it is unknown."""
        sequence = self._sequences.pop(job_id, None)
        if sequence is None:
            return False
        copy = next((copy for copy in self._copies if copy.sequence is sequence), None)
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is State.PINNED:
            self.pool.unpin(sequence.generation)
        else:
            self._active.remove(sequence)
        if copy is not None:
            copy.is_cancelled = True  # a thread is writing into these pages: finish_copy frees them
        else:
            self._free(sequence)
        sequence.state = State.FINISHED
        return True

    def release_pin(self, job_id: str) -> bool:
        """The reader is done: the pages stay in the prefix tree only. False if nothing is pinned under this id."""
        sequence = self._sequences.get(job_id)
        return sequence is not None and sequence.state is State.PINNED and self.cancel(job_id)

    def finish_copy(self, copy: PageCopy, error: str = "") -> Imported | None:
        """The copy ended. Returns what to tell the other side: nothing if the sequence was cancelled meanwhile."""
        self._copies.remove(copy)
        sequence = copy.sequence
        if copy.is_cancelled:
            self._free(sequence)
            return None
        if error:
            self.cancel(sequence.job_id)
            return Imported(job_id=sequence.job_id, ok=False, error=error)
        sequence.state = State.IMPORTED
        return Imported(job_id=sequence.job_id, ok=True)

    # ---- the step ----

    def schedule(self) -> Step:
        """The next step: all decodes, then prefill in order of arrival. Its `chunks` are empty when there is nothing to run."""
        step = Step(background_left=self._background_budget())
        self._take_running(step)
        self._admit(step)
        step.sampled = [sequence for sequence, count in step.chunks.items() if count == sequence.num_pending]
        return step

    def batch(self, step: Step) -> ForwardBatch:
        """The step as the flat lists that the model runs on. Before `advance`."""
        size = self.settings.page_size
        batch = ForwardBatch(token_ids=[], positions=[], slot_mapping=[], query_lens=[], seq_lens=[], page_tables=[], logit_rows=[])
        for sequence, count in step.chunks.items():
            start, pages, known = sequence.num_computed, sequence.page_table, sequence.token_ids
            end = start + count
            is_carried = start == len(known)
            if is_carried:
                batch.token_ids.append(0)
            elif count == 1:
                batch.token_ids.append(known[start])
            else:
                batch.token_ids += known[start:end]
            if count == 1:  # almost all of them: worth their own lines
                batch.positions.append(start)
                batch.slot_mapping.append(pages[start // size] * size + start % size)
            else:
                batch.positions += range(start, end)
                batch.slot_mapping += slots_for(pages, start, end, size)
            batch.query_lens.append(count)
            batch.seq_lens.append(end)
            batch.page_tables.append(pages)
            batch.carried.append(sequence.sample_row if is_carried else -1)
            if end == sequence.num_tokens:
                batch.logit_rows.append(len(batch.token_ids) - 1)
        return batch

    def advance(self, step: Step) -> None:
        """The step was launched: its tokens count as computed, full pages of prompts can be found, and what it draws is in flight."""
        for sequence, count in step.chunks.items():
            sequence.num_computed += count
            if sequence.is_prefill_reported and count == 1:
                continue
            self._share(sequence)
            if not sequence.num_pending and not sequence.is_prefill_reported:
                sequence.is_prefill_reported = True
                step.prefilled.append((sequence, Prefilled(sequence.job_id, sequence.num_cached_tokens)))
        for row, sequence in enumerate(step.sampled):
            sequence.num_in_flight += 1
            sequence.sample_row = row

    def complete(self, step: Step, token_ids: Seq[int], logprobs: Seq[float]) -> list[Tokens | Pinned | Failed]:
        """Take in the tokens drawn for `step.sampled`; returns the events in the order in which they are to be sent.

        What was drawn for a sequence that ended after the launch is dropped. One that was preempted gets its token all the same.
        """
        prefilled = [told for sequence, told in step.prefilled if sequence.state is not State.FINISHED]
        finished, eos_ids, is_prefill = State.FINISHED, self.settings.eos_ids, self.settings.role == "prefill"
        rows: list[TokenRow] = []
        after: list[Pinned | Failed] = []
        for sequence, token_id, logprob in zip(step.sampled, token_ids, logprobs, strict=True):
            if sequence.state is finished:
                continue
            sequence.num_in_flight -= 1
            if not isfinite(logprob):
                self.cancel(sequence.job_id)
                after.append(Failed(job_id=sequence.job_id, error=f"the model gave no next token (log probability {logprob})"))
                continue
            sequence.token_ids.append(token_id)
            if sequence.guide is not None and (refused := _refusal(sequence.guide, token_id)) is not None:
                self.cancel(sequence.job_id)
                after.append(Failed(job_id=sequence.job_id, error=refused.reason, field=refused.field))
                continue
            finish = sequence.finish_reason(eos_ids)
            top = sequence.tops.popleft()() if sequence.tops else None
            rows.append(TokenRow(sequence.job_id, len(sequence.token_ids) - sequence.num_prompt - 1, token_id, logprob, finish, top))
            if finish:
                self.cancel(sequence.job_id)
            elif is_prefill:
                after.append(self._pin(sequence))
        tokens = [Tokens(rows=tuple(rows), prefilled=tuple(prefilled))] if rows or prefilled else []
        return [*tokens, *after]

    def set_role(self, role: Role) -> None:
        """Forget all sequences: what is still in flight for them is dropped when it arrives."""
        for job_id in list(self._sequences):
            self.cancel(job_id)
        self.settings = replace(self.settings, role=role)

    # ---- views ----

    @property
    def num_live(self) -> int:
        return len(self._sequences)

    @property
    def num_held_pages(self) -> int:
        return self.settings.num_pages - self.pool.num_free - self.cache.num_evictable

    def stats(self) -> Stats:
        size, states = self.settings.page_size, [sequence.state for sequence in self._sequences.values()]
        promised = sum(self._growth(sequence) for sequence in (*self._active, *self._waiting))
        pending = [sequence.num_pending for sequence in self._sequences.values() if sequence.source is None]
        return Stats(
            free_pages=self.pool.num_free, total_pages=self.settings.num_pages, cached_pages=self.cache.num_evictable,
            held_pages=self.num_held_pages, pinned=states.count(State.PINNED), running=states.count(State.RUNNING),
            waiting=states.count(State.WAITING), importing=states.count(State.IMPORTING) + states.count(State.IMPORTED),
            free_tokens=max(0, self.settings.num_pages - self.num_held_pages - promised) * size,
            pending_tokens=sum(count for count in pending if count > 1))

    def check_integrity(self) -> None:
        """free + owned + cached + pinned pages must be all pages, each counted by who refers to it."""
        cancelled = [copy.sequence for copy in self._copies if copy.is_cancelled]
        holders = [*self._sequences.values(), *cancelled]
        self.pool.check_integrity([*(sequence.page_table for sequence in holders), self.cache.pages()])
        self.cache.check_integrity()
        assert self.pool.num_pins == sum(sequence.state is State.PINNED for sequence in holders)
        assert len(self._active) <= self.settings.max_num_seqs
        for sequence in holders:
            assert [node.page for node in sequence.path] == sequence.page_table[:len(sequence.path)]
            assert len(sequence.page_table) * self.settings.page_size >= sequence.num_computed
            assert sequence.page_table or sequence.state in (State.WAITING, State.FINISHED)
            assert 0 <= sequence.num_in_flight <= self.settings.depth

    # ---- which sequences ----

    def _take_running(self, step: Step) -> None:
        running, is_prefill, size = State.RUNNING, self.settings.role == "prefill", self.settings.page_size
        prefills = []
        for sequence in list(self._active):
            if sequence.state is not running:
                continue  # importing, or preempted a moment ago
            if sequence.num_pending > 1:
                prefills.append(sequence)
            elif sequence.is_background and step.background_left <= 0:
                continue  # it sits this one out
            elif sequence.num_in_flight and (is_prefill or sequence.guide is not None or sequence.num_remaining <= 0):
                continue  # it ends, or is pinned, with the token that is being drawn; or what it may say depends on that token
            elif sequence.num_computed < len(sequence.page_table) * size or self._reserve(sequence, 1, step):
                step.take(sequence, 1)
        for sequence in sorted(prefills, key=_is_background):
            if sequence.state is running:
                count = self._chunk(sequence, step)
                if count > 0 and self._reserve(sequence, count, step):
                    step.take(sequence, count)

    def _admit(self, step: Step) -> None:
        while self._waiting and self._may_admit and not step.is_pool_short:
            sequence = self._waiting[0]
            if sequence.num_in_flight:
                return  # preempted while its newest token was drawn: it needs to know all of them to start over
            if sequence.source is None and self._room(sequence, step) <= 0:
                return
            if len(self._active) >= self.settings.max_num_seqs and not self._make_way(sequence, step):
                return
            limit = sequence.source.num_tokens if sequence.source else len(sequence.token_ids) - 1
            sequence.path = self.cache.match(sequence.token_ids, limit)
            while not self._fits(sequence):
                if not self._make_way(sequence, step):
                    self._may_admit = False
                    break
            if not self._may_admit or self._finds_half_of_it_next_step(sequence, step):
                self.cache.unlock(sequence.path)
                return
            self._waiting.popleft()
            self._active.append(sequence)
            sequence.page_table = [node.page for node in sequence.path]
            self.pool.retain(sequence.page_table)
            self.cache.count_lookup(limit, len(sequence.path) * self.settings.page_size)
            if sequence.source:
                self._start_import(sequence, sequence.source, step)
            else:
                self._start_prefill(sequence, step)

    def _finds_half_of_it_next_step(self, sequence: Sequence, step: Step) -> bool:
        """Whether this very step computes at least half of what it lacks, for another with the same beginning."""
        if sequence.source is not None or not self.settings.prefix_cache:
            return False
        size, found = self.settings.page_size, len(sequence.path)
        enough = found + max(1, (len(sequence.token_ids) // size - found) // 2)
        beginning = sequence.token_ids[:enough * size]
        return any(count > 1 and other.num_computed + count >= enough * size and other.token_ids[:enough * size] == beginning
                   for other, count in step.chunks.items())

    def _start_prefill(self, sequence: Sequence, step: Step) -> None:
        sequence.state = State.RUNNING
        sequence.num_computed = len(sequence.path) * self.settings.page_size
        if not sequence.is_prefill_reported:
            sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt)
        count = self._chunk(sequence, step)
        if self._reserve(sequence, count, step):
            step.take(sequence, count)

    def _start_import(self, sequence: Sequence, source: ImportSource, step: Step) -> None:
        sequence.is_prefill_reported = True
        matched, wanted = len(sequence.path), len(source.page_ids)
        if matched == wanted:
            sequence.state = State.IMPORTED
            step.imported.append(Imported(job_id=sequence.job_id, ok=True))
            return
        sequence.state = State.IMPORTING
        sequence.page_table += self._allocate(sequence, wanted - matched)
        copy = PageCopy(sequence=sequence, source=source, num_tokens=source.num_tokens - matched * self.settings.page_size,
                        src_pages=list(source.page_ids[matched:]), dst_pages=sequence.page_table[matched:])
        self._copies.append(copy)
        step.copies.append(copy)

    def _chunk(self, sequence: Sequence, step: Step) -> int:
        return min(sequence.num_pending, self.settings.chunk_size, self._room(sequence, step))

    def _room(self, sequence: Sequence, step: Step) -> int:
        room = self.settings.max_batch_tokens - step.num_tokens
        return min(room, step.background_left) if sequence.is_background else room

    def _background_budget(self) -> int:
        most = self.settings.background_tokens or self.settings.max_batch_tokens
        others = [sequence for sequence in self._active if not sequence.is_background]
        if self._num_waiting_in_front() or any(sequence.state is State.RUNNING and sequence.num_pending > 1 for sequence in others):
            return 1
        return max(1, most // BACKGROUND_BESIDE) if others else most

    def _num_waiting_in_front(self) -> int:
        """Waiting sequences before the first background one."""
        return next((index for index, sequence in enumerate(self._waiting) if sequence.is_background), len(self._waiting))

    def _make_way(self, sequence: Sequence, step: Step) -> bool:
        """Preempt a background sequence for one that is none. False if there is nobody to give way."""
        if sequence.is_background:
            return False
        victim = next((other for other in reversed(self._active) if other.is_background and self._is_preemptible(other)), None)
        if victim is None:
            return False
        self._preempt(victim)
        step.drop(victim)
        return True

    # ---- which pages ----

    def _fits(self, candidate: Sequence) -> bool:
        """Whether the pool lasts to everybody's end if the candidate (its path matched and locked) joins."""
        everybody = (*self._active, candidate)
        num_held, num_pages = self.num_held_pages, self.settings.num_pages
        if num_held + sum(map(self._growth, everybody)) <= num_pages:
            return True  # all of them at their largest, side by side
        per_step = min(self.settings.chunk_size, self.settings.max_batch_tokens - self.settings.max_num_seqs)
        projections, num_prefill_tokens = [], 0
        for sequence in everybody:
            num_prefill_tokens += sequence.num_pending - 1
            is_end_known = self.settings.role != "prefill" and sequence.source is None  # else it waits for a command, then or now
            # Pages come back when the last step is completed; by then as many more as the depth says have been launched.
            num_steps = sequence.num_remaining * (self.settings.depth if sequence.guide is not None else 1)
            end = num_steps + num_prefill_tokens // per_step + self.settings.depth if is_end_known else NEVER
            projections.append(Projection(end=end, num_tokens=sequence.num_tokens, num_pages=self._num_pages(sequence),
                                          growth=self._growth(sequence), own_pages=self._num_own_pages(sequence) if is_end_known else 0))
        return fits(projections, num_held=num_held, num_pages=num_pages, page_size=self.settings.page_size)

    def _growth(self, sequence: Sequence) -> int:
        """Pages that it may still take."""
        return max(0, sequence.num_max_pages(self.settings.page_size) - self._num_pages(sequence))

    def _num_pages(self, sequence: Sequence) -> int:
        return len(sequence.page_table) or len(sequence.path)

    def _num_own_pages(self, sequence: Sequence) -> int:
        """Pages that no other sequence uses: its end makes them free or evictable."""
        return self._num_pages(sequence) - sum(node.locks > 1 for node in sequence.path)

    def _reserve(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Own pages for its next `num_tokens`. False if it had to be preempted itself."""
        missing = num_pages_for(sequence.num_computed + num_tokens, self.settings.page_size) - len(sequence.page_table)
        if missing <= 0:
            return True
        while self.pool.num_free + self.cache.num_evictable < missing:
            candidates = [other for other in reversed(self._active) if self._is_preemptible(other)]
            victim = next(filter(_is_background, candidates), candidates[0])
            self._preempt(victim)
            step.is_pool_short = True
            step.drop(victim)
            if victim is sequence:
                return False
        sequence.page_table += self._allocate(sequence, missing)
        return True

    def _is_preemptible(self, sequence: Sequence) -> bool:
        """A sequence whose last prompt token was launched in role prefill is as good as pinned."""
        return sequence.state is State.RUNNING and not (sequence.num_in_flight and self.settings.role == "prefill")

    def _allocate(self, sequence: Sequence, count: int) -> list[int]:
        self.cache.evict(count - self.pool.num_free)
        last = sequence.page_table[-1] if sequence.page_table else None
        return self.pool.allocate(count, after=last, expected=self._growth(sequence))

    def _preempt(self, sequence: Sequence) -> None:
        self._active.remove(sequence)
        self._free(sequence)
        sequence.state = State.WAITING
        sequence.num_computed = 0
        self._waiting.insert(self._num_waiting_in_front() if sequence.is_background else 0, sequence)

    def _share(self, sequence: Sequence) -> None:
        """Let others find its full pages while it runs."""
        sequence.page_table = list(sequence.page_table)  # the cache may exchange pages in it, and an executor may know the old one
        self.cache.insert(sequence.path, sequence.token_ids, sequence.page_table, sequence.num_computed)

    def _pin(self, sequence: Sequence) -> Pinned:
        self._active.remove(sequence)
        sequence.state = State.PINNED
        sequence.generation = self.pool.pin(sequence.page_table)
        self._may_admit = True
        return Pinned(job_id=sequence.job_id, generation=sequence.generation, num_tokens=sequence.num_computed,
                      page_ids=tuple(sequence.page_table))

    def _free(self, sequence: Sequence) -> None:
        """Give all pages back; what is computed stays findable until it is evicted."""
        self._share(sequence)
        self.cache.unlock(sequence.path)
        self.pool.release(sequence.page_table)
        sequence.page_table = []
        self._may_admit = True


def _is_background(sequence: Sequence) -> bool:
    return sequence.is_background


def _refusal(guide: Guide, token_id: int) -> InvalidField | None:
    """Why the guide cannot go on behind this token; None: it did."""
    try:
        guide.take(token_id)
    except InvalidField as refused:
        return refused
    return None
