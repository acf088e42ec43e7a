"""What a saturating batch costs those who wait for an answer: interactive clients alone and beside one, in turn.

The batch is OpenAI's, through the same door, with more lines than the farm gets through: whatever the interactive clients leave idle it
takes. Its own rate, alone and beside them, says that it was there.
"""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from statistics import median

import httpx
import orjson

from bench.closed_loop import run_closed_loop
from bench.farm_figures import LIGHTLLM, InvalidAnswer, Prompts, Step
from bench.http_stream import Target
from bench.report import Row
from bench.summary import percentile

NUM_CLIENTS, NUM_TOKENS, PROMPT = 4, 32, 64
BATCH_LINES, BATCH_TOKENS, BATCH_PROMPT = 10_000, 32, 64
BAR_P99 = 1.5               # of what they wait for their first token without a batch
ALONE_S = 15.0              # the batch by itself: answers are counted by the part, of 64 lines
POLL_S = 0.1


@dataclass(slots=True)
class Waits:
    """Of one kind of phase, seconds."""

    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)


async def beside_batch(url: str, prompts: Prompts, rounds: int, requests: int, step: Step) -> list[Row]:
    """`requests` interactive requests of NUM_CLIENTS clients, alone and beside a batch, in each of `rounds` rounds."""
    target = replace(Target.parse(url), path=LIGHTLLM.path)
    alone, beside, rates_alone, rates_beside = Waits(), Waits(), [], []
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        await _ask(target, prompts, NUM_CLIENTS, Waits())  # warms up
        for _ in range(rounds):
            await _ask(target, prompts, requests, alone)
            step()
            batch_id = await _begin(http, prompts)
            rates_alone.append(await _rate(http, batch_id, asyncio.sleep(ALONE_S)))
            rates_beside.append(await _rate(http, batch_id, _ask(target, prompts, requests, beside)))
            await _end(http, batch_id)
            step()
    return _rows(alone, beside, median(rates_alone), median(rates_beside))


async def _ask(target: Target, prompts: Prompts, num: int, waits: Waits) -> None:
    items = [prompts.item(PROMPT, NUM_TOKENS) for _ in range(num)]
    run = await run_closed_loop(target, LIGHTLLM, items, num_clients=NUM_CLIENTS)
    for outcome in run.outcomes:
        if outcome.decode_token_s is None:
            raise InvalidAnswer(f"status {outcome.status}: {outcome.detail}")
        waits.first_token.append(outcome.first_token_s)
        waits.per_token.append(outcome.decode_token_s)


async def _begin(http: httpx.AsyncClient, prompts: Prompts) -> str:
    parameters = {"max_new_tokens": BATCH_TOKENS, "ignore_eos": True}
    bodies = [{"inputs": prompts.item(BATCH_PROMPT, BATCH_TOKENS).prompt_ids, "parameters": parameters} for _ in range(BATCH_LINES)]
    content = b"".join(orjson.dumps({"custom_id": str(i), "method": "POST", "url": "/generate", "body": body}) + b"\n"
                       for i, body in enumerate(bodies))
    upload = {"file": ("bench.jsonl", content)}
    file = (await http.post("/v1/files", data={"purpose": "batch"}, files=upload)).raise_for_status().json()
    asked = {"input_file_id": file["id"], "endpoint": "/generate", "completion_window": "24h"}
    batch_id: str = (await http.post("/v1/batches", json=asked)).raise_for_status().json()["id"]
    while (await _state(http, batch_id))[1] == 0:   # until it has answers, and has filled its slots
        await asyncio.sleep(POLL_S)
    return batch_id


async def _end(http: httpx.AsyncClient, batch_id: str) -> None:
    (await http.post(f"/v1/batches/{batch_id}/cancel")).raise_for_status()
    while (await _state(http, batch_id))[0] != "cancelled":
        await asyncio.sleep(POLL_S)


async def _rate(http: httpx.AsyncClient, batch_id: str, work: Awaitable[None]) -> float:
    """The batch's output tokens per second while `work` runs."""
    _, before = await _state(http, batch_id)
    started = time.perf_counter()
    await work
    status, after = await _state(http, batch_id)
    if status != "in_progress":
        raise InvalidAnswer(f"the batch that was to run all the while is {status}")
    return (after - before) / (time.perf_counter() - started)


async def _state(http: httpx.AsyncClient, batch_id: str) -> tuple[str, int]:
    """(status, output tokens so far)"""
    batch = (await http.get(f"/v1/batches/{batch_id}")).raise_for_status().json()
    return batch["status"], (batch.get("usage") or {}).get("output_tokens", 0)


def _rows(alone: Waits, beside: Waits, rate_alone: float, rate_beside: float) -> list[Row]:
    def ms(waits: list[float], p: float) -> float:
        return percentile(waits, p) * 1000

    note = (f"{NUM_CLIENTS} clients, {len(beside.first_token)} requests: p50 {ms(alone.first_token, 50):.0f} ms alone, "
            f"{ms(beside.first_token, 50):.0f} ms beside; p99 {ms(alone.first_token, 99):.0f} and {ms(beside.first_token, 99):.0f} ms; "
            f"per token p50 {ms(alone.per_token, 50):.0f} and {ms(beside.per_token, 50):.0f} ms; "
            f"the batch makes {rate_alone:.0f} tok/s by itself, {rate_beside:.0f} beside them")
    samples = {"alone_first_token_s": alone.first_token, "beside_first_token_s": beside.first_token,
               "alone_per_token_s": alone.per_token, "beside_per_token_s": beside.per_token,
               "batch_tok_s": rate_alone, "batch_beside_tok_s": rate_beside}
    return [Row(name="interactive first token p99 beside a saturating batch", figure=ms(beside.first_token, 99) / ms(alone.first_token, 99),
                bar=BAR_P99, unit="×", higher_is_better=False, note=note, samples=samples)]
