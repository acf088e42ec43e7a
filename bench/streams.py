"""The two streaming interfaces a server may speak: how a request is written, and what makes its stream valid.

Valid means: every event well-formed, token counts contiguous from 1, exactly the tokens asked for, and a finish flag on the last one only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from bench.http_stream import Response
from bench.workload import WorkItem


class InvalidStream(Exception):
    """The server answered 200 but the stream is not what was asked for; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A valid stream: one arrival per token (`time.perf_counter`); `token_ids` is empty where the interface has none."""

    times: tuple[float, ...]
    token_ids: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class ServerApi:
    path: str
    body: Callable[[WorkItem, str], bytes]  # (item, model name)
    read: Callable[[Response, WorkItem], Stream]  # raises InvalidStream


def lightllm_body(item: WorkItem, model: str) -> bytes:
    parameters = {"do_sample": False, "ignore_eos": True, "max_new_tokens": item.output_len}
    return orjson.dumps({"inputs": item.prompt_ids, "parameters": parameters})


def read_lightllm(response: Response, item: WorkItem) -> Stream:
    lines = response.data_lines()
    if not lines:
        raise InvalidStream("the stream is empty")
    times, token_ids, texts = [], [], []
    for number, (arrival, payload) in enumerate(lines, start=1):
        event = _json(payload)
        token = event.get("token")
        if not isinstance(token, dict):
            raise InvalidStream(f"event {number} has no token: {payload[:200].decode(errors='replace')}")
        if token.get("count_output_tokens") != number:
            raise InvalidStream(f"event {number} says count_output_tokens {token.get('count_output_tokens')}")
        if token.get("prompt_tokens") != len(item.prompt_ids):
            raise InvalidStream(f"prompt_tokens is {token.get('prompt_tokens')}, sent were {len(item.prompt_ids)}")
        is_last = number == len(lines)
        if event.get("finished") is not is_last:
            raise InvalidStream(f"event {number} of {len(lines)} says finished {event.get('finished')}")
        times.append(arrival)
        token_ids.append(_integer(token.get("id")))
        texts.append(token.get("text") or "")
    _check_count(len(times), item)
    _check_reason(event.get("finish_reason"))
    return Stream(tuple(times), tuple(token_ids), "".join(texts))


def openai_body(item: WorkItem, model: str) -> bytes:
    return orjson.dumps(
        {
            "model": model, "prompt": item.prompt_ids, "max_tokens": item.output_len, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }
    )  # fmt: skip


def read_openai(response: Response, item: WorkItem) -> Stream:
    """One chunk may carry several tokens: the server's own usage counts, else the chunks do. A chunk's tokens share its arrival."""
    lines = response.data_lines()
    if not lines or lines[-1][1] != b"[DONE]":
        raise InvalidStream("the stream does not end with [DONE]")
    times, texts, reason, counted = [], [], None, None
    for arrival, payload in lines[:-1]:
        event = _json(payload)
        if "error" in event:
            raise InvalidStream(f"error in the stream: {payload[:200].decode(errors='replace')}")
        if event.get("usage"):
            counted = event["usage"].get("completion_tokens")
        for choice in event.get("choices") or ():
            if reason is not None:
                raise InvalidStream("a chunk follows the one with the finish reason")
            reason = choice.get("finish_reason")
            if choice.get("text") or reason is None:
                times.append(arrival)
                texts.append(choice.get("text") or "")
    _check_count(counted if counted is not None else len(times), item)
    _check_reason(reason)
    if not times:
        raise InvalidStream("no chunk carried text")
    return Stream(_spread(times, item.output_len), text="".join(texts))


def _spread(times: list[float], num_tokens: int) -> tuple[float, ...]:
    """One arrival per token: chunks that carry more than one are taken to be the last ones."""
    return tuple(times[:num_tokens]) + (times[-1],) * (num_tokens - len(times))


def _json(payload: bytes) -> dict[str, Any]:
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise InvalidStream(f"not JSON: {payload[:200].decode(errors='replace')}") from None
    if not isinstance(event, dict):
        raise InvalidStream(f"not an object: {payload[:200].decode(errors='replace')}")
    return event


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise InvalidStream(f"a token's id is {value!r:.80}")
    return value


def _check_count(num_tokens: int, item: WorkItem) -> None:
    if num_tokens != item.output_len:
        raise InvalidStream(f"{num_tokens} tokens came, {item.output_len} were asked for")


def _check_reason(reason: Any) -> None:
    if reason != "length":
        raise InvalidStream(f"finish_reason is {reason!r}, not 'length'")


APIS = {
    "lightllm": ServerApi("/generate_stream", lightllm_body, read_lightllm),
    "openai": ServerApi("/v1/completions", openai_body, read_openai),
}
