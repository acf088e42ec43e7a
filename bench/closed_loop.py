"""Clients that each send one request, wait for its end, and send the next: the seed's load model. No answer of a server ends a run."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time

from bench.http_stream import Response, StreamClient, Target
from bench.streams import InvalidStream, ServerApi, Stream
from bench.workload import WorkItem

LONGEST_PAUSE_S = 5.0  # however long a server's Retry-After asks for
DETAIL_CHARS = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. `status` is the HTTP status, 0 if there was no whole answer; `stream` is set if it is valid."""

    item: WorkItem
    status: int
    detail: str  # "" for a valid stream, else what went wrong
    request_s: float = 0.0
    first_token_s: float = 0.0
    stream: Stream | None = None

    @property
    def is_valid(self) -> bool:
        return self.stream is not None

    @property
    def decode_token_s(self) -> float | None:
        """Mean time per token after the first (TPOT); None if there is only one."""
        if self.stream is None or len(self.stream.times) < 2:
            return None
        return (self.stream.times[-1] - self.stream.times[0]) / (len(self.stream.times) - 1)


@dataclass(frozen=True, slots=True)
class Run:
    """All outcomes of one closed loop, in order of completion."""

    outcomes: tuple[Outcome, ...]
    elapsed_s: float
    cpu_s: float = 0.0  # of this process meanwhile


async def run_closed_loop(
    target: Target,
    api: ServerApi,
    items: Sequence[WorkItem],
    *,
    num_clients: int,
    model: str = "default_model_name",
    timeout_s: float = 600.0,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Run:
    """Send all `items`, at most `num_clients` at a time.

    A refused request counts as done: its client pauses for as long as Retry-After says (but not over LONGEST_PAUSE_S) and goes on.
    """
    outcomes: list[Outcome] = []
    waiting = iter(items)

    async def client(waiting: Iterator[WorkItem]) -> None:
        connection = StreamClient(target)
        try:
            for item in waiting:
                outcome, pause_s = await _send(connection, api, item, model, timeout_s)
                outcomes.append(outcome)
                on_outcome(outcome)
                if pause_s:
                    await asyncio.sleep(pause_s)
        finally:
            connection.close()

    started, cpu_before = perf_counter(), process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(num_clients, len(items))):
            group.create_task(client(waiting))
    return Run(tuple(outcomes), perf_counter() - started, process_time() - cpu_before)


async def _send(connection: StreamClient, api: ServerApi, item: WorkItem, model: str, timeout_s: float) -> tuple[Outcome, float]:
    """The outcome, and how long to wait before the next request."""
    try:
        async with asyncio.timeout(timeout_s):
            response = await connection.request(api.body(item, model))
    except TimeoutError:
        return Outcome(item, 0, f"no whole answer within {timeout_s:g} s"), 0.0
    except OSError as error:
        return Outcome(item, 0, f"{type(error).__name__}: {error}"[:DETAIL_CHARS]), 0.0
    return judge(response, api, item), _pause_s(response)


def judge(response: Response, api: ServerApi, item: WorkItem) -> Outcome:
    if response.status != 200:
        return Outcome(item, response.status, response.body[:DETAIL_CHARS].decode(errors="replace"))
    try:
        stream = api.read(response, item)
    except InvalidStream as error:
        return Outcome(item, 200, str(error)[:DETAIL_CHARS])
    return Outcome(item, 200, "", stream.times[-1] - response.sent_at, stream.times[0] - response.sent_at, stream)


def _pause_s(response: Response) -> float:
    if response.status not in (429, 503):
        return 0.0
    try:
        return min(max(float(response.headers.get("retry-after", "0")), 0.0), LONGEST_PAUSE_S)
    except ValueError:  # a date: rare, and not worth a parser
        return LONGEST_PAUSE_S
