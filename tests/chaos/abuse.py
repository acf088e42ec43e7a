"""What users and strangers do to a farm that is not broken: clients that leave, too many of them, jobs that kill, messages that lie."""

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from bench.http_stream import StreamClient, Target
from coordinator import subjects
from coordinator.bus import Bus, Message
from coordinator.connection import TOO_MANY_MESSAGES, ApiError
from coordinator.errors import QueueFull
from coordinator.messages import CLASSES, Frame, Job, new_job_id
from coordinator.sampling import SamplingParams
from producers.client import TokenmillClient
from tests.chaos.chaos_farm import SHIMS, ChaosFarm
from tests.chaos.fuzz import mutated
from tests.chaos.workload import Spec, draw

ORIGIN = "stranger"


# ---- clients that leave ----


@dataclass(slots=True)
class Storm:
    """Figures of an abort storm. Rates are tokens per second, of the clients that stay."""

    calm_rate: float = 0.0
    storm_rate: float = 0.0
    num_aborted: int = 0
    ended_after_s: list[float] = field(default_factory=list)    # from leaving to the job's last frame and final record
    reasons: Counter[str] = field(default_factory=Counter)


class StormClients:
    """`num_clients` REST clients in a closed loop; from `leave` on, every second one hangs up at a random moment of each job."""

    def __init__(self, farm: ChaosFarm, num_clients: int, seed: int) -> None:
        self._urls = [farm.url(name) for name in SHIMS]
        self._farm = farm
        self._num_clients = num_clients
        self._drawn = random.Random(seed)
        self._specs = iter(draw(100_000, seed, min_tokens=40, max_tokens=100, max_prompt=60))
        self._is_leaving = False
        self._tokens: list[float] = []          # arrival of each token at a client that stays
        self._left: dict[str, float] = {}       # job id -> when its client left
        self.storm = Storm()

    async def run(self, calm_s: float, storm_s: float) -> Storm:
        """First nobody leaves, then half of them do; what is open at the end is left too."""
        async with self._farm.bus() as bus:
            await bus.subscribe("results.*", self._on_result)
            async with httpx.AsyncClient(timeout=60.0, limits=httpx.Limits(max_connections=None)) as http:
                clients = [asyncio.create_task(self._loop(http, index)) for index in range(self._num_clients)]
                try:
                    await asyncio.sleep(3.0)   # until the farm is in its stride
                    self.storm.calm_rate = await self._rate(calm_s)
                    self._is_leaving = True
                    await asyncio.sleep(min(5.0, storm_s / 2))
                    self.storm.storm_rate = await self._rate(storm_s)
                finally:
                    for client in clients:
                        client.cancel()
                    for outcome in await asyncio.gather(*clients, return_exceptions=True):
                        if isinstance(outcome, Exception):
                            raise outcome
            await self._farm.wait_at_rest()
        return self.storm

    async def _rate(self, seconds: float) -> float:
        began_at = time.monotonic()
        await asyncio.sleep(seconds)
        return sum(at >= began_at for at in self._tokens) / (time.monotonic() - began_at)

    async def _loop(self, http: httpx.AsyncClient, index: int) -> None:
        while True:
            leaves = self._is_leaving and index % 2 == 0
            await self._one(http, next(self._specs), index, self._drawn.random() * 1.2 if leaves else None)

    async def _one(self, http: httpx.AsyncClient, spec: Spec, index: int, patience_s: float | None) -> None:
        body = json.dumps({"inputs": spec.prompt, "parameters": spec.parameters}).encode()
        job_id = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                async with http.stream("POST", f"{self._urls[index % 2]}/generate_stream", content=body) as response:
                    assert response.status_code == 200, (await response.aread())[:300]
                    job_id = response.headers["X-Job-Id"]
                    async for line in response.aiter_lines():
                        if line.startswith("data:") and index % 2:
                            self._tokens.append(time.monotonic())
                return
        self.storm.num_aborted += 1
        if job_id:
            self._left[job_id] = time.monotonic()

    def _on_result(self, message: Message) -> None:
        left_at = self._left.pop(message.subject.partition(".")[2], None)
        if left_at is not None:
            self.storm.ended_after_s.append(time.monotonic() - left_at)


# ---- too many clients ----


@dataclass(slots=True)
class Overload:
    """Figures of a farm that is offered more than its bound."""

    num_accepted: int = 0
    num_finished: int = 0
    num_refused: int = 0
    num_without_retry_after: int = 0
    refused_after_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)


async def offer(farm: ChaosFarm, num_clients: int, num_jobs: int, seed: int) -> Overload:
    """`num_clients` in a closed loop until `num_jobs` were accepted and answered. Refused ones come back when they are told to."""
    figures = Overload()
    specs = iter(draw(num_jobs, seed, min_tokens=16, max_tokens=48, max_prompt=60))
    drawn = random.Random(seed)

    async def client(door: StreamClient) -> None:
        for spec in specs:
            while not await _offer_one(door, spec, figures):
                await asyncio.sleep(drawn.uniform(0.5, 1.5))
        door.close()

    async with asyncio.TaskGroup() as group:
        for index in range(num_clients):
            group.create_task(client(_door(farm, SHIMS[index % 2])))
    return figures


async def probe_full_queue(farm: ChaosFarm, direct: TokenmillClient, max_queued: int, num_probes: int) -> Overload:
    """Keep the queue at its bound with long jobs, and ask a shim for another one again and again, one at a time."""
    figures = Overload()
    long = SamplingParams(max_new_tokens=400, ignore_eos=True)

    async def occupy(index: int) -> None:
        while True:
            try:
                await (await direct.submit([5 + index, 6, 7], long)).result()
            except QueueFull:
                await asyncio.sleep(0.2)

    occupants = [asyncio.create_task(occupy(index)) for index in range(2 * max_queued)]
    try:
        door, spec = _door(farm, SHIMS[0]), draw(1, seed=3, max_tokens=8)[0]
        while figures.num_refused < num_probes:
            await _offer_one(door, spec, figures)
            await asyncio.sleep(0.02)
        door.close()
    finally:
        for occupant in occupants:
            occupant.cancel()
        await asyncio.gather(*occupants, return_exceptions=True)
    return figures


def _door(farm: ChaosFarm, name: str) -> StreamClient:
    return StreamClient(Target.parse(f"{farm.url(name)}/generate_stream"))


async def _offer_one(door: StreamClient, spec: Spec, figures: Overload) -> bool:
    """False when it was refused."""
    response = await door.request(json.dumps({"inputs": spec.prompt, "parameters": spec.parameters}).encode())
    if response.status == 429:
        figures.num_refused += 1
        figures.refused_after_s.append(response.pieces[-1][0] - response.sent_at)
        figures.num_without_retry_after += int(response.headers.get("retry-after", "0")) < 1
        return False
    assert response.status == 200, response.body[:300]
    arrivals = [arrival for arrival, _ in response.data_lines()]
    figures.num_accepted += 1
    figures.first_token_s.append(arrivals[0] - response.sent_at)
    figures.num_finished += len(arrivals) == spec.num_tokens
    return True


def memory_mib(farm: ChaosFarm) -> dict[str, float]:
    """Resident memory of each process of the farm, engines included."""
    sizes = {}
    for process in farm.all_alive():
        parent = psutil.Process(process.process.pid)
        sizes[process.name] = sum(p.memory_info().rss for p in (parent, *parent.children(recursive=True))) / 2**20
    return sizes


# ---- jobs that kill ----


async def kill_whoever_runs(farm: ChaosFarm, direct: TokenmillClient, job_id: str, kill: Callable[[str], Coroutine[Any, Any, None]]) -> int:
    """Kill the owner of this job whenever it runs, until the farm gives it up. Returns how many workers died of it."""
    assert direct.store is not None
    num_killed = 0
    while await direct.bus.get_result(job_id) is None:
        record = await direct.store.job(job_id)
        victim = await _alive(farm, direct, record.get("owner", "")) if record.get("state") == "owned" else None
        if victim is not None and await _has_shown(direct, job_id, record["owner"], int(record["epoch"])):
            await kill(victim)
            num_killed += 1
            farm.restart(victim)
        await asyncio.sleep(0.02)
    return num_killed


async def _alive(farm: ChaosFarm, direct: TokenmillClient, owner: str) -> str | None:
    """The name of the process that is this very incarnation, if it still runs."""
    assert direct.store is not None
    for view in await direct.store.workers():
        process = farm.processes.get(view.worker)
        if f"{view.worker}.{view.incarnation}" == owner and process is not None and process.process.pid == view.info.get("pid"):
            return view.worker
    return None


async def _has_shown(direct: TokenmillClient, job_id: str, owner: str, epoch: int) -> bool:
    """Whether this owner has stored a token of the job under this claim: then it runs there, now."""
    worker, _, incarnation = owner.rpartition(".")
    frames = await direct.bus.read_chain(subjects.chain(direct.origin, worker, int(incarnation)))
    return any(run.job_id == job_id and run.epoch >= epoch for _, _, frame in frames for run in frame.runs)


# ---- messages that lie ----


@contextlib.asynccontextmanager
async def wiretap(bus: Bus) -> AsyncIterator[dict[str, list[bytes]]]:
    """Real messages by the first word of their subject, as they pass."""
    heard: dict[str, list[bytes]] = {}
    taps = [await bus.subscribe(f"{word}.>", lambda message: heard.setdefault(message.subject.partition(".")[0], []).append(message.data))
            for word in ("jobs", "handoff", "out", "kv", "cancel")]
    try:
        yield heard
    finally:
        for tap in taps:
            await tap.close()


async def lie(farm: ChaosFarm, bus: Bus, heard: dict[str, list[bytes]], num_messages: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Send mutations of what was heard on every subject that is read. (messages by subject, ids of jobs that may have come of it)."""
    drawn = random.Random(seed)
    owners = [(view["worker"], view["incarnation"]) for view in (await farm.status())["workers"] if view["alive"]]
    sent: Counter[str] = Counter()
    job_ids: list[str] = []
    for index in range(num_messages):
        word = drawn.choice(("jobs", "jobs", "handoff", "handoff", "kv", "kv", "cancel", "out", "live"))
        sent[word] += 1
        if word == "jobs":
            job_ids.append(new_job_id())
            job = Job(job_id=job_ids[-1], origin=ORIGIN, model=farm.model_token, prompt_ids=tuple(range(5, 5 + drawn.randint(1, 40))),
                      params=SamplingParams(max_new_tokens=drawn.randint(1, 4)))
            subject = subjects.jobs(farm.model_token, drawn.choice(CLASSES))
            await _store(bus, subject, mutated(job.encode(), drawn))
        elif word == "handoff":
            await _store(bus, subjects.handoff(farm.model_token), mutated(drawn.choice(heard["handoff"]), drawn))
        elif word == "kv":
            await bus.publish(subjects.kv(*drawn.choice(owners)), mutated(drawn.choice(heard["kv"]), drawn))
        elif word == "cancel":
            await bus.publish(f"cancel.{drawn.choice((new_job_id(), 'x', '-', 'a' * 200))}", drawn.randbytes(drawn.randrange(50)))
        else:
            frame = mutated(drawn.choice([data for data in heard["out"][:200] if Frame.decode(data).runs]), drawn)
            if word == "out":
                await _store(bus, subjects.chain(ORIGIN, "ghost", 1 + index % 7), frame)
            else:
                await bus.publish(f"live.{drawn.choice((ORIGIN, 'chaos'))}.ghost.{index}", frame)
    await bus.flush()
    return sent, job_ids


async def _store(bus: Bus, subject: str, data: bytes) -> None:
    """Publish to a stream; when it is full, wait until the farm has made room."""
    while True:
        try:
            await bus.store(subject, data, {})
            return
        except ApiError as error:
            if error.err_code != TOO_MANY_MESSAGES:
                raise
            await asyncio.sleep(0.02)
