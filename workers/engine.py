"""The engine process: one loop of schedule, run, postprocess, send. No asyncio here; the I/O process is at the other end of a socketpair.

    reader thread --commands--> inbox <--copies done-- copier thread; <--guides done-- grammar thread
                                  |
                    take commands, schedule, launch, complete the step before (depth 2) or this one (depth 1), send events

With depth 2 a GPU runs one step while this process prepares and launches the next: no step waits for the host, and the tokens of a
step are out as soon as the device has them.

When the I/O process ends, for whatever reason, the reader sees the end of the stream and this process exits at once, also in the
middle of a long step: nobody could hear it any more.
"""

import argparse
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from coordinator.collector import settle
from coordinator.errors import ConfigError, InvalidField, LayoutMismatch, PagesExhausted
from coordinator.messages import KVLayout, KVRank
from coordinator.rendezvous import PEER_STATUS, VANISHED
from workers import group as groups
from workers.block_journal import BlockJournal
from workers.channel import BlockingChannel
from workers.cpu_threads import CpuThreads
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
    Progress,
    Ready,
    ReleasePin,
    SetRole,
    Shutdown,
    Stats,
    TellBlocks,
    Tokens,
    decode_command,
    encode,
)
from workers.engine_sizes import EngineSizes, choose_sizes, resolve
from workers.executor import EagerExecutor, Executor, Flight
from workers.group import Group, GroupBroken
from workers.guided import Grammars, GuideMaker
from workers.kv_cache import KVCache, check_same_layout
from workers.leader import GroupCopier, LeaderExecutor
from workers.lockstep import Lockstep, Wake
from workers.model_config import ModelConfig
from workers.model_runner import ModelRunner
from workers.page_copier import PageCopier
from workers.parallel import Parallel
from workers.sampler import Sampler
from workers.scheduler import Scheduler
from workers.sequence import Limits, Sequence, open_sequence
from workers.settings import EngineSettings, RankSettings
from workers.step import PageCopy, SchedulerSettings, Step
from workers.transfer.desk import Desk
from workers.transfer.reach import COLLECTIVE, MAPPED

log = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.05
PROGRESS_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class CopyDone:
    """From the copier's thread: the pages of this import are here, or `error`."""

    copy: PageCopy
    error: str


@dataclass(frozen=True, slots=True)
class GuideDone:
    """From the grammar thread: this sequence has its guide, or `error`."""

    sequence: Sequence
    error: InvalidField | None


Inbox = queue.SimpleQueue[Command | CopyDone | GuideDone | Wake]


class Engine:
    """A loaded model and its sequences. `run` returns after Shutdown."""

    def __init__(self, executor: Executor, scheduler: Scheduler, limits: Limits, layout: KVLayout, inbox: Inbox,
                 send: Callable[[Event], None], *, grammars: Grammars | None = None, journal: BlockJournal | None = None,
                 is_checked: bool = False, lockstep: Lockstep | None = None) -> None:
        """`grammars` None: guided sequences are refused. `lockstep`: steps that other dp groups take part in."""
        assert executor.depth == scheduler.settings.depth
        self._executor = executor
        self._scheduler = scheduler
        self._limits = limits
        self._layout = layout
        self._inbox = inbox
        self._send = send
        self._flights: deque[tuple[Step, Flight]] = deque()  # launched, oldest first
        on_copied = lambda copy, error: inbox.put(CopyDone(copy, error))
        self._copier = (GroupCopier(executor.followers, executor.kv_cache, on_copied) if isinstance(executor, LeaderExecutor)
                        else PageCopier(executor.kv_cache, on_copied))
        self._lockstep = lockstep
        if lockstep is not None:
            lockstep.on_wake = inbox.put
        self._guides = GuideMaker(grammars, lambda sequence, error: inbox.put(GuideDone(sequence, error))) if grammars else None
        self._journal = journal
        self._unguided: dict[str, Sequence] = {}  # waiting for their guides; the scheduler does not have them yet
        self._last_stats: Stats | None = None
        self._stats_sent_at = 0.0
        self._are_stats_due = True  # a sequence ended: tell, also if nothing seems to have changed
        self._is_checked = is_checked
        self._is_shut_down = False
        self.desk: Desk | None = None  # where other hosts ask for pages of this rank

    def close(self) -> None:
        """Behind `run`: let go of whom pages are copied from and to."""
        self._copier.close()
        if self.desk is not None:
            self.desk.close()

    def run(self) -> None:
        self._send_stats(is_idle=True)
        is_idle = True
        while not self._may_end:
            self._take_commands(wait=is_idle)
            step = self._scheduler.schedule()
            for copy in step.copies:
                self._copier.start(copy)
            for event in step.imported:
                self._send(event)
            is_launched = self._launch(step)
            is_idle = not self._flights
            if len(self._flights) >= self._executor.depth or not (is_idle or is_launched):
                self._complete_oldest()
            self._send_stats(is_idle=is_idle)
            if is_idle and self._is_checked:
                self._scheduler.check_integrity()

    @property
    def _may_end(self) -> bool:
        """Told to; and not before the other dp groups were too, whose steps need this one."""
        return self._is_shut_down and (self._lockstep is None or self._lockstep.are_all_leaving)

    # ---- commands ----

    def _take_commands(self, *, wait: bool) -> None:
        """Handle all that came; with `wait` at least one (nothing could run without it)."""
        while wait or not self._inbox.empty():
            self._handle(self._inbox.get())
            wait = False

    def _handle(self, command: Command | CopyDone | GuideDone | Wake) -> None:
        scheduler = self._scheduler
        match command:
            case AddSequence():
                self._add(command)
            case ImportSequence():
                try:
                    check_same_layout(self._layout, command.layout)
                except LayoutMismatch as error:
                    self._send(Imported(job_id=command.job_id, ok=False, error=str(error)))
                else:
                    self._add(command)
            case CopyDone():
                event = scheduler.finish_copy(command.copy, command.error)
                if event is not None:
                    self._send(event)
            case GuideDone():
                if self._unguided.get(command.sequence.job_id) is command.sequence:  # else it was cancelled
                    del self._unguided[command.sequence.job_id]
                    self._schedule(command.sequence, command.error)
            case Activate():
                if not scheduler.activate(command.job_id):
                    log.info("job %s: nothing to activate", command.job_id)
            case Cancel():
                self._unguided.pop(command.job_id, None)
                self._are_stats_due |= scheduler.cancel(command.job_id)
            case ReleasePin():
                self._are_stats_due |= scheduler.release_pin(command.job_id)
            case SetRole():
                self._unguided.clear()
                scheduler.set_role(command.role)
                self._limits = replace(self._limits, prefill_only=command.role == "prefill")
                self._are_stats_due = True
            case TellBlocks():
                if self._journal is not None:
                    self._journal.want_all()
            case Ping():
                self._send(Pong())
            case Wake() if self._lockstep is not None:
                self._lockstep.wake(command)
            case Shutdown():
                self._is_shut_down = True

    def _add(self, command: AddSequence | ImportSequence) -> None:
        self._unguided.pop(command.job_id, None)
        self._scheduler.cancel(command.job_id)
        try:
            sequence = open_sequence(command, self._limits)
        except InvalidField as error:
            self._send(Failed(job_id=command.job_id, error=error.reason, field=error.field))
            return
        constraint = command.params.constraint
        if constraint is None:
            self._schedule(sequence)
        elif self._guides is None:
            self._send(Failed(job_id=command.job_id, error="cannot be kept to by this engine", field=constraint[0]))
        else:
            self._unguided[command.job_id] = sequence
            self._guides.start(sequence)

    def _schedule(self, sequence: Sequence, error: InvalidField | None = None) -> None:
        try:
            if error is not None:
                raise error
            self._scheduler.add(sequence)
        except InvalidField as refused:
            self._send(Failed(job_id=sequence.job_id, error=refused.reason, field=refused.field))
        except PagesExhausted as exhausted:
            self._send(Failed(job_id=sequence.job_id, error=str(exhausted), field="max_new_tokens"))

    # ---- the step ----

    def _launch(self, step: Step) -> bool:
        """False: there is nothing to run. In lockstep a step may be empty here and none elsewhere."""
        agreed = None
        if self._lockstep is not None:
            agreed = self._lockstep.turn(step.num_tokens, is_leaving=self._is_shut_down,
                                         is_only_decodes=len(step.sampled) == step.num_tokens)
        if not (step.chunks or agreed):
            return False
        batch = self._scheduler.batch(step)
        batch.agreed = agreed
        self._flights.append((step, self._executor.launch(batch, step.sampled)))
        self._scheduler.advance(step)
        return True

    def _complete_oldest(self) -> None:
        step, flight = self._flights.popleft()
        token_ids, logprobs = flight.result()
        for event in self._scheduler.complete(step, token_ids, logprobs):
            self._send(event)
            self._are_stats_due |= not isinstance(event, Tokens) or any(row.finish for row in event.rows)

    def _send_stats(self, *, is_idle: bool) -> None:
        """Once per interval, or at once if nothing will run before the next command: what changed, and always if a sequence ended."""
        now = time.monotonic()
        if not is_idle and now - self._stats_sent_at < STATS_INTERVAL_S:
            return
        stats = self._scheduler.stats()
        if self._are_stats_due or stats != self._last_stats:
            self._send(stats)
        if self._journal is not None and (blocks := self._journal.take()) is not None:
            self._send(blocks)
        self._stats_sent_at, self._are_stats_due, self._last_stats = now, False, stats


def load(settings: EngineSettings, inbox: Inbox, send: Callable[[Event], None], *, is_checked: bool = False,
         group: Group | None = None, sizes: EngineSizes | None = None) -> Engine:
    """Read the weights, warm up, say Ready. For settings that are resolved or need not be. Raises ConfigError."""
    settings = resolve(settings)
    config = ModelConfig.from_dir(Path(settings.model_dir))
    sizes = sizes or choose_sizes(settings, config)
    if group is not None:
        sizes = group.agree(sizes)
    executor = load_executor(settings, config, sizes, _progress_sender(send), group)
    executor.warm_up()
    lockstep = None
    if group is not None:
        executor, lockstep = group.lead(executor, sizes.page_size), group.lockstep()
    cache = executor.kv_cache
    journal = BlockJournal() if settings.report_blocks else None
    scheduler = Scheduler(SchedulerSettings(
        role=settings.role,  # type: ignore[arg-type]
        num_pages=cache.num_pages, page_size=sizes.page_size, chunk_size=sizes.chunk_size, max_num_seqs=sizes.max_num_seqs,
        max_batch_tokens=sizes.chunk_size + sizes.max_num_seqs, eos_ids=frozenset(config.eos_ids), prefix_cache=settings.use_prefix_cache,
        depth=executor.depth, background_tokens=sizes.background_tokens), journal)
    layout = cache.layout(settings.model_name)
    limits = Limits(vocab_size=config.vocab_size, max_seq_len=sizes.max_seq_len, prefill_only=settings.role == "prefill")
    grammars = Grammars(Path(settings.model_dir), config.vocab_size, sorted(config.eos_ids))
    engine = Engine(executor, scheduler, limits, layout, inbox, send, grammars=grammars, journal=journal, is_checked=is_checked,
                    lockstep=lockstep)
    engine.desk = open_desk(settings, cache)
    ways = ways_to_pool(settings, cache, engine.desk), *(executor.followers.ways if isinstance(executor, LeaderExecutor) else ())
    settle()
    send(Ready(layout=layout, pool=PoolAddress(ranks=ways, num_pages=cache.num_pages), device=settings.device,
               max_total_tokens=cache.num_pages * sizes.page_size, max_seq_len=sizes.max_seq_len, max_num_seqs=sizes.max_num_seqs,
               chunk_size=sizes.chunk_size, vocab_size=config.vocab_size, eos_ids=tuple(config.eos_ids),
               group=None if group is None else group.view))
    return engine


def open_desk(settings: EngineSettings, pool: KVCache) -> Desk | None:
    """Where other hosts ask for pages of this rank, unless it is told to be mapped only. In any role: prefill may be ordered later."""
    return Desk(pool, settings.kv_host) if settings.kv_transfer != MAPPED else None


def ways_to_pool(settings: EngineSettings, pool: KVCache, desk: Desk | None, *, is_on_leaders_host: bool = True) -> KVRank:
    """How a decode worker reaches this rank's pool. Memory is named only where the leader's host is this one: a handle tells that host."""
    is_mapped = settings.kv_transfer != COLLECTIVE and is_on_leaders_host
    return KVRank(address=pool.address if is_mapped else "", desk=desk.address if desk is not None else "")


def load_executor(settings: EngineSettings, config: ModelConfig, sizes: EngineSizes, progress: Callable[[int, int], None],
                  group: Group | None) -> Executor:
    """For `resolve`d settings; `group`: this rank's share of the model."""
    parallel = group.parallel if group is not None else Parallel.single()
    if settings.device != "cpu":
        from workers.cuda_executor import CudaExecutor  # Triton and its kernels: only where there is a GPU

        return CudaExecutor.create(settings, config, sizes, progress, parallel)
    threads = CpuThreads(settings.num_threads, settings.ranks.num_local)
    runner = ModelRunner(Path(settings.model_dir), settings.device, sizes.dtype, sizes.num_pages, sizes.page_size, settings.load_workers,
                         progress, parallel)
    return EagerExecutor(runner, Sampler(sorted(eos for eos in config.eos_ids if eos < config.vocab_size)), settings.depth, threads)


def _progress_sender(send: Callable[[Event], None]) -> Callable[[int, int], None]:
    last_sent_at = 0.0

    def progress(loaded_bytes: int, total_bytes: int) -> None:
        nonlocal last_sent_at
        now = time.monotonic()
        if loaded_bytes >= total_bytes or now - last_sent_at >= PROGRESS_INTERVAL_S:
            last_sent_at = now
            send(Progress(loaded_bytes=loaded_bytes, total_bytes=total_bytes))

    return progress


def _read_commands(channel: BlockingChannel, inbox: Inbox) -> None:
    """The reader thread. Ends the process with the stream: at once, whatever the main thread is computing."""
    status = 0
    try:
        for data in channel:
            inbox.put(decode_command(data))
    except Exception:
        log.exception("the command channel is unreadable")
        status = 1
    os._exit(status)


def parse_settings(text: str) -> EngineSettings:
    """EngineSettings from a JSON object. Raises ConfigError on unknown or missing keys."""
    given = json.loads(text)
    known = {field.name for field in fields(EngineSettings)}
    if not isinstance(given, dict) or set(given) - known:
        raise ConfigError(f"engine settings: unknown keys {sorted(set(given) - known) if isinstance(given, dict) else given!r}")
    try:
        return EngineSettings(**{**given, "ranks": RankSettings(**given.get("ranks", {}))})
    except TypeError as error:
        raise ConfigError(f"engine settings: {error}") from None


def _serve(settings: EngineSettings, inbox: Inbox, send: Callable[[Event], None], *, is_checked: bool) -> None:
    settings = resolve(settings)
    config = ModelConfig.from_dir(Path(settings.model_dir))
    if groups.is_alone(settings, config):
        engine = load(settings, inbox, send, is_checked=is_checked)
        engine.run()
        engine.close()
        return
    sizes = choose_sizes(settings, config)
    with groups.joined(settings, config, sizes) as group:
        engine = load(settings, inbox, send, is_checked=is_checked, group=group, sizes=sizes)
        engine.run()
        group.stop_followers()
        engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="workers.engine", description="The engine process; a worker's I/O process starts it.")
    parser.add_argument("--fd", type=int, required=True, help="inherited end of a unix stream socketpair")
    parser.add_argument("--settings", required=True, help="EngineSettings as a JSON object")
    parser.add_argument("--check", action="store_true", help="prove that all pages are accounted for whenever idle (for tests)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s engine %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the I/O process says when to stop
    channel, inbox = BlockingChannel(socket.socket(fileno=arguments.fd)), Inbox()
    threading.Thread(target=_read_commands, args=(channel, inbox), name="command reader", daemon=True).start()
    try:
        _serve(parse_settings(arguments.settings), inbox, lambda event: channel.send(encode(event)), is_checked=arguments.check)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except GroupBroken:
        return PEER_STATUS[VANISHED]
    except BrokenPipeError:
        return 0  # the I/O process is gone; the reader thread is about to find out too
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # not through the interpreter's teardown: it would abort on a thread that is inside of native code just then
