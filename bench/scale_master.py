"""One master of the scale bench: sends jobs at a fixed rate, reads every answer and checks each token. `python -m bench.scale_master …`

Through the client (the master is this process) or through a REST shim (`--url`; then this process is its load).
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import uvloop

from bench.http_stream import StreamClient, Target
from bench.workload import id_range
from coordinator import lifeline
from coordinator.collector import settle
from coordinator.errors import TokenmillError
from coordinator.sampling import SamplingParams
from producers.client import TokenmillClient
from workers.mock_engine import prompt_digest, token_at

Prompt = list[int]
# Job id and output tokens of one answer.
Ask = Callable[[Prompt], Awaitable[tuple[str, list[int]]]]


@dataclass(slots=True)
class Tally:
    """What became of the jobs sent here. `answers`: job id, when it was sent (Unix s), how long its whole answer took."""

    answers: list[tuple[str, float, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    latest_s: float = 0.0      # how late the latest job was sent: this process' own lack of time


class Load:
    def __init__(self, ask: Ask, *, num_prompt: int, num_output: int, vocab_size: int, seed: int) -> None:
        self.tally = Tally()
        self._ask = ask
        self._num_prompt, self._num_output, self._vocab_size = num_prompt, num_output, vocab_size
        self._draw = random.Random(seed)
        low, high = id_range(vocab_size)
        self._ids = range(low, high + 1)

    async def run(self, rate: float, seconds: float, start_at: float) -> None:
        """Send at `rate`, whether or not answers come; return when all are there."""
        await asyncio.sleep(max(0.0, start_at - time.time()))
        began = time.monotonic()
        async with asyncio.TaskGroup() as jobs:
            for number in range(int(rate * seconds)):
                due = began + number / rate
                if (early_s := due - time.monotonic()) > 0:
                    await asyncio.sleep(early_s)
                self.tally.latest_s = max(self.tally.latest_s, -early_s)
                jobs.create_task(self._one())

    async def _one(self) -> None:
        prompt, sent = self._draw.choices(self._ids, k=self._num_prompt), time.time()
        try:
            job_id, token_ids = await self._ask(prompt)
        except (TokenmillError, OSError, ValueError, KeyError) as error:
            self.tally.failed.append(f"{type(error).__name__}: {error}"[:200])
            return
        self.tally.answers.append((job_id, sent, time.time() - sent))
        digest = prompt_digest(prompt)
        if token_ids != [token_at(digest, index, self._vocab_size) for index in range(self._num_output)]:
            self.tally.wrong.append(job_id)


def by_client(client: TokenmillClient, params: SamplingParams) -> Ask:
    async def ask(prompt: Prompt) -> tuple[str, list[int]]:
        handle = await client.submit(prompt, params)
        result = await handle.result()
        return result.job_id, list(result.token_ids)

    return ask


def by_rest(url: str, params: SamplingParams) -> Ask:
    target, idle = Target.parse(f"{url}/generate"), list[StreamClient]()
    parameters = {"max_new_tokens": params.max_new_tokens, "ignore_eos": True, "return_details": True, "do_sample": False}

    async def ask(prompt: Prompt) -> tuple[str, list[int]]:
        connection = idle.pop() if idle else StreamClient(target)
        answer = await connection.request(orjson.dumps({"inputs": prompt, "parameters": parameters}))
        idle.append(connection)
        body = orjson.loads(answer.body)
        if answer.status != 200:
            raise ValueError(f"status {answer.status}: {answer.body[:100]!r}")
        return answer.headers["x-job-id"], [token["id"] for token in body["tokens"]]

    return ask


async def _run(flags: argparse.Namespace) -> Tally:
    params = SamplingParams(max_new_tokens=flags.output_tokens, ignore_eos=True)
    if flags.url:
        return await _load(flags, by_rest(flags.url, params))
    async with await TokenmillClient.connect(flags.nats_url, flags.redis_url, model=flags.model_name) as client:
        return await _load(flags, by_client(client, params))


async def _load(flags: argparse.Namespace, ask: Ask) -> Tally:
    settle()
    load = Load(ask, num_prompt=flags.prompt_tokens, num_output=flags.output_tokens, vocab_size=flags.vocab_size, seed=flags.seed)
    await load.run(flags.rate, flags.seconds, flags.start_at)
    return load.tally


def main() -> int:
    lifeline.hold_on()
    parser = argparse.ArgumentParser(prog="bench.scale_master")
    add = parser.add_argument
    for name in ("nats_url", "redis_url", "model_name"):
        add(f"--{name}", required=True)
    for name in ("prompt_tokens", "output_tokens", "vocab_size", "seed"):
        add(f"--{name}", type=int, required=True)
    for name in ("rate", "seconds", "start_at"):
        add(f"--{name}", type=float, required=True)
    add("--url", default="")
    add("--out", type=Path, required=True)
    flags = parser.parse_args()
    run = asyncio.run if flags.url else uvloop.run   # the HTTP client wants asyncio's own transports
    tally = run(_run(flags))
    flags.out.write_text(json.dumps({"answers": tally.answers, "wrong": tally.wrong, "failed": tally.failed, "latest_s": tally.latest_s}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
