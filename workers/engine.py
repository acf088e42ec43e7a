"""The engine process: one loop of schedule, run, postprocess, send. No asyncio here; the I/O process is at the other end of a socketpair.

    reader thread --commands--> inbox <--copies done-- copier thread
                                  |
                    take commands, schedule, forward, sample, complete, send events

When the I/O process ends, for whatever reason, the reader sees the end of the stream and this process exits at once, also in the
middle of a long step: nobody could hear it any more.
"""

import argparse
import gc
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from coordinator.errors import ConfigError, InvalidField, LayoutMismatch, PagesExhausted
from coordinator.messages import KVLayout, pack_ids
from coordinator.sampling import SamplingParams
from workers.channel import BlockingChannel
from workers.engine_messages import (
    Activate,
    AddSequence,
    Cancel,
    Command,
    Event,
    Failed,
    Imported,
    ImportSequence,
    PoolAddress,
    Progress,
    Ready,
    ReleasePin,
    Shutdown,
    Stats,
    decode_command,
    encode,
)
from workers.model_runner import ModelRunner
from workers.page_copier import PageCopier, check_layout
from workers.sampler import Sampler
from workers.scheduler import PageCopy, Scheduler, SchedulerSettings
from workers.sequence import Limits, Sequence, Step, open_sequence
from workers.settings import EngineSettings

log = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.05
PROGRESS_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class CopyDone:
    """From the copier's thread: the pages of this import are here, or `error`."""

    copy: PageCopy
    error: str


Inbox = queue.SimpleQueue[Command | CopyDone]


class Engine:
    """A loaded model and its sequences. `run` returns after Shutdown."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, limits: Limits, layout: KVLayout, inbox: Inbox,
                 send: Callable[[Event], None]) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._limits = limits
        self._layout = layout
        self._inbox = inbox
        self._send = send
        self._sampler = Sampler(sorted(scheduler.settings.eos_ids))
        self._copier = PageCopier(runner.kv_cache, runner.attach, lambda copy, error: inbox.put(CopyDone(copy, error)))
        self._last_stats: Stats | None = None
        self._stats_sent_at = 0.0
        self._are_stats_due = True  # a sequence ended: tell without waiting for the interval
        self._is_shut_down = False

    def run(self) -> None:
        is_idle = True
        while not self._is_shut_down:
            self._take_commands(wait=is_idle)
            step = self._scheduler.schedule()
            for copy in step.copies:
                self._copier.start(copy)
            for event in (*step.imported, *self._run_step(step)):
                self._send(event)
            is_idle = not step.chunks
            self._send_stats(is_idle)
