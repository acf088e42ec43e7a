"""An engine without a model: the real scheduler, page pool and prefix cache, steps that take the time a cost model says.

For tests of the control plane and for simulations, where hundreds of workers run on one machine. It loads no weights and no torch, and
never runs unless `--engine mock` asks for it. Its tokens are a function of the prompt and of their index (`mock_token`), so that whoever
reads an answer can tell whether it is whole, also where several workers said parts of it.
"""

import asyncio
import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from coordinator.errors import ConfigError, InvalidField, PagesExhausted
from coordinator.messages import KVLayout, KVRank, pack_ids
from coordinator.tokenizer import read_json
from workers.block_journal import BlockJournal
from workers.engine_messages import (
    Activate,
    AddSequence,
    Cancel,
    Command,
    Event,
    Failed,
    Imported,
    ImportSequence,
    Ping,
    Pong,
    PoolAddress,
    Ready,
    ReleasePin,
    SetRole,
    Shutdown,
    Stats,
    TellBlocks,
    Tokens,
)
from workers.mock_costs import MockCosts
from workers.scheduler import Scheduler
from workers.sequence import Limits, Sequence, open_sequence
from workers.settings import EngineSettings
from workers.step import PageCopy, SchedulerSettings, Step

log = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.05
PAGE_SIZE, CHUNK_SIZE, MAX_SEQS, NUM_TOKENS = 16, 2048, 64, 65_536   # where the settings say 0
LOGPROB = -1.0


class MockEngine:
    """One engine on an event loop. `send` takes the commands of engine_messages.py, `deliver` gets its events; `run` until Shutdown."""

    def __init__(self, settings: EngineSettings, eos_ids: tuple[int, ...], deliver: Callable[[Event], None]) -> None:
        """Raises ConfigError."""
        self._costs = MockCosts.parse(settings.mock_costs)
        self._deliver = deliver
        self.ready = ready = _ready(settings, eos_ids)
        self._limits = Limits(vocab_size=ready.vocab_size, max_seq_len=ready.max_seq_len, prefill_only=settings.role == "prefill")
        self._journal = BlockJournal() if settings.report_blocks else None
        self.scheduler = Scheduler(SchedulerSettings(
            role=settings.role,  # type: ignore[arg-type]
            num_pages=ready.pool.num_pages, page_size=ready.layout.page_size, chunk_size=ready.chunk_size, max_num_seqs=ready.max_num_seqs,
            max_batch_tokens=ready.chunk_size + ready.max_num_seqs, eos_ids=frozenset(eos_ids), prefix_cache=settings.use_prefix_cache),
            self._journal)
        self._inbox: deque[Command] = deque()
        self._wake = asyncio.Event()
        self._last_stats: Stats | None = None
        self._stats_sent_at = 0.0
        self._are_stats_due = True
        self._is_shut_down = False

    def send(self, command: Command) -> None:
        """Handled between two steps, as the real engine does."""
        self._inbox.append(command)
        self._wake.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._send_stats(loop.time())
        while True:
            while self._inbox:
                self._handle(self._inbox.popleft())
            if self._is_shut_down:
                return
            step = self.scheduler.schedule()
            self._start_copies(step, loop)
            if step.chunks:
                await self._run_step(step, loop)
            elif not self._inbox:
                self._send_stats(loop.time())
                self._wake.clear()
                await self._wake.wait()

    async def _run_step(self, step: Step, loop: asyncio.AbstractEventLoop) -> None:
        num_decodes = sum(sequence.num_pending == 1 for sequence in step.chunks)
        duration_s = self._costs.step_s(step.num_tokens - num_decodes, num_decodes)
        self.scheduler.advance(step)
        await asyncio.sleep(duration_s)
        token_ids = [mock_token(sequence, self.ready.vocab_size) for sequence in step.sampled]
        for event in self.scheduler.complete(step, token_ids, [LOGPROB] * len(token_ids)):
            self._deliver(event)
            self._are_stats_due |= not isinstance(event, Tokens) or any(row.finish for row in event.rows)
        if (now := loop.time()) - self._stats_sent_at >= STATS_INTERVAL_S:
            self._send_stats(now)

    def _handle(self, command: Command) -> None:
        scheduler = self.scheduler
        match command:
            case AddSequence():
                self._add(command)
            case ImportSequence():
                if command.layout != self.ready.layout:
                    self._deliver(Imported(job_id=command.job_id, ok=False, error="the pages are not of a mock engine like this one"))
                else:
                    self._add(command)
            case Activate():
                scheduler.activate(command.job_id)
            case Cancel():
                self._are_stats_due |= scheduler.cancel(command.job_id)
            case ReleasePin():
                self._are_stats_due |= scheduler.release_pin(command.job_id)
            case TellBlocks():
                if self._journal is not None:
                    self._journal.want_all()
            case SetRole():
                scheduler.set_role(command.role)
                self._limits = replace(self._limits, prefill_only=command.role == "prefill")
                self._are_stats_due = True
            case Ping():
                self._deliver(Pong())
            case Shutdown():
                self._is_shut_down = True

    def _add(self, command: AddSequence | ImportSequence) -> None:
        self.scheduler.cancel(command.job_id)
        try:
            if command.params.constraint is not None:
                raise InvalidField(command.params.constraint[0], "cannot be kept to by the mock engine")
            self.scheduler.add(open_sequence(command, self._limits))
        except InvalidField as error:
            self._deliver(Failed(job_id=command.job_id, error=error.reason, field=error.field))
        except PagesExhausted as error:
            self._deliver(Failed(job_id=command.job_id, error=str(error), field="max_new_tokens"))

    def _start_copies(self, step: Step, loop: asyncio.AbstractEventLoop) -> None:
        for event in step.imported:
            self._deliver(event)
        for copy in step.copies:
            loop.call_later(self._costs.copy_s(len(copy.src_pages)), self._finish_copy, copy)

    def _finish_copy(self, copy: PageCopy) -> None:
        """No bytes move: what a mock page holds is known from the tokens."""
        event = self.scheduler.finish_copy(copy)
        if event is not None:
            self._deliver(event)
        self._wake.set()

    def _send_stats(self, now: float) -> None:
        stats = self.scheduler.stats()
        if self._are_stats_due or stats != self._last_stats:
            self._deliver(stats)
        if self._journal is not None and (blocks := self._journal.take()) is not None:
            self._deliver(blocks)
        self._stats_sent_at, self._are_stats_due, self._last_stats = now, False, stats


def mock_token(sequence: Sequence, vocab_size: int) -> int:
    """The next token of a sequence."""
    if sequence.sampling is None:
        sequence.sampling = prompt_digest(sequence.token_ids[:sequence.num_prompt])
    return token_at(sequence.sampling, len(sequence.token_ids) - sequence.num_prompt, vocab_size)


def prompt_digest(prompt_ids: Iterable[int]) -> int:
    return zlib.crc32(pack_ids(prompt_ids))


def token_at(digest: int, index: int, vocab_size: int) -> int:
    """Output token `index` to the prompt with this digest. From the upper half of the vocabulary, where words are and no EOS is."""
    half = vocab_size // 2
    return vocab_size - half + zlib.crc32(index.to_bytes(8, "little"), digest) % half


def _ready(settings: EngineSettings, eos_ids: tuple[int, ...]) -> Ready:
    if settings.role not in ("prefill", "decode", "both"):
        raise ConfigError(f"--role must be prefill, decode or both, got {settings.role!r}")
    vocab_size = int(read_json(Path(settings.model_dir) / "config.json").get("vocab_size") or 0)
    if vocab_size < 2:
        raise ConfigError(f"--model_dir {settings.model_dir}: config.json has no vocab_size")
    page_size = settings.page_size or PAGE_SIZE
    num_pages = (settings.max_total_token_num or NUM_TOKENS) // page_size
    if num_pages < 1:
        raise ConfigError(f"--max_total_token_num {settings.max_total_token_num}: no room for a KV page of {page_size} tokens")
    layout = KVLayout(model=settings.model_name, weights="mock", kind="mock", num_layers=1, row=1, dtype="none", page_size=page_size)
    pool = PoolAddress(ranks=(KVRank(address="mock"),), num_pages=num_pages)
    return Ready(layout=layout, pool=pool, device="mock", max_total_tokens=num_pages * page_size,
                 max_seq_len=settings.max_req_total_len, max_num_seqs=settings.running_max_req_size or MAX_SEQS,
                 chunk_size=settings.chunked_prefill_size or CHUNK_SIZE, vocab_size=vocab_size, eos_ids=eos_ids)
