"""LightLLM's shapes, byte for byte: `/generate`'s object and `/generate_stream`'s events; and its parameters in our words."""

from collections.abc import Sequence
from typing import Any

import orjson

from coordinator.messages import FinalRecord, Finish, TokenRun, TopLogprobs, unpack_ids, unpack_tops
from coordinator.tokenizer import Tokenizer
from producers.job_handle import JobResult

NO_TOKEN = -1  # the id in an event that ends a stream without another token

# Defaults of what LightLLM's servers tell each other, and of images.
NOTHING_SAID = {"image_max_patch_num": -1, "group_request_id": -1, "suggested_dp_index": -1, "move_kv_to_decode_node": None}


def as_ours(given: dict[str, Any]) -> dict[str, Any]:
    """LightLLM's parameters without those that say nothing here; any other value of them is refused as unknown."""
    return {name: value for name, value in given.items() if name not in NOTHING_SAID or value not in (None, NOTHING_SAID[name])}


def generate_object(results: Sequence[JobResult], tokenizer: Tokenizer, *, num_prompt_tokens: int, with_details: bool) -> dict[str, Any]:
    """`generated_text` is always a list; the other fields are lists only for several answers."""
    is_single = len(results) == 1

    def one_or_all(values: list[Any]) -> Any:
        return values[0] if is_single else values

    answer = {
        "generated_text": [result.text for result in results],
        "count_output_tokens": one_or_all([len(result.token_ids) for result in results]),
        "finish_reason": one_or_all([result.reason for result in results]),
        "prompt_tokens": num_prompt_tokens,
    }
    if with_details:
        answer["tokens"] = one_or_all([_details(result, tokenizer, num_prompt_tokens) for result in results])
    return answer


def _details(result: JobResult, tokenizer: Tokenizer, num_prompt_tokens: int) -> list[dict[str, Any]]:
    details = []
    cumlogprob = 0.0
    for i, (token_id, logprob, text) in enumerate(zip(result.token_ids, result.logprobs, result.texts, strict=True), start=1):
        cumlogprob += logprob
        details.append({
            "id": token_id, "logprob": logprob, "cumlogprob": cumlogprob, "special": tokenizer.is_special(token_id),
            "count_output_tokens": i, "prompt_tokens": num_prompt_tokens, "prompt_cache_len": result.cached_tokens, "text": text})
        if result.top_logprobs:
            details[-1]["top_logprobs"] = pairs(result.top_logprobs[i - 1])
    return details


def pairs(top: TopLogprobs) -> list[dict[str, Any]]:
    """Ours, not LightLLM's: the likeliest tokens, when they were asked for."""
    return [{"id": token_id, "logprob": logprob} for token_id, logprob in top]


def record_object(record: FinalRecord) -> dict[str, Any]:
    """A job's whole answer, wherever it is asked for by the job's id."""
    shown: dict[str, Any] = {
        "job_id": record.job_id, "finish_reason": record.reason, "error": record.error or None, "generated_text": record.text,
        "token_ids": unpack_ids(record.token_ids), "prompt_tokens": record.prompt_tokens, "cached_tokens": record.cached_tokens}
    if record.top_logprobs:
        shown["top_logprobs"] = [pairs(top) for top in unpack_tops(record.top_logprobs)]
    return shown


class StreamEvents:
    """Encodes one stream. An event is `data:{json}` and an empty line, without a space and without a closing `[DONE]`.

    With `next_index` each event is preceded by `id:` and its token's index, and tokens before that index are left out: what a client
    sends back as Last-Event-ID to go on elsewhere.
    """

    def __init__(self, special_ids: frozenset[int], num_prompt_tokens: int, next_index: int | None = None) -> None:
        self._special_ids = special_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._next_index = next_index

    def encode(self, run: TokenRun) -> bytes:
        """The events of a run, its end included."""
        last = len(run.token_ids) - 1
        events = bytearray()
        for i, token_id in enumerate(run.token_ids):
            if self._next_index is not None and run.first_index + i < self._next_index:
                continue
            finish = run.finish if i == last else None
            top = run.top_logprobs[i] if run.top_logprobs else None
            events += self._event(token_id, run.texts[i], run.logprobs[i], run.first_index + i + 1, finish, top)
        return bytes(events)

    def end(self, finish: Finish, num_tokens: int) -> bytes:
        """For a stream that ends without another token."""
        return self._event(NO_TOKEN, "", None, num_tokens, finish)

    def _event(self, token_id: int, text: str, logprob: float | None, count: int, finish: Finish | None,
               top: TopLogprobs | None = None) -> bytes:
        event: dict[str, Any] = {
            "token": {"id": token_id, "text": text, "logprob": logprob, "special": token_id in self._special_ids,
                      "count_output_tokens": count, "prompt_tokens": self._num_prompt_tokens},
            "generated_text": None,
            "finished": finish is not None,
            "finish_reason": None if finish is None else finish.reason,
            "details": None,
        }
        if top is not None:
            event["token"]["top_logprobs"] = pairs(top)
        if finish is not None and finish.reason not in ("stop", "length"):
            event["message"] = finish.error or f"the job ended as {finish.reason}"
        line = b"data:%b\n\n" % orjson.dumps(event)
        return line if self._next_index is None else b"id:%d\n%b" % (max(0, count - 1), line)
