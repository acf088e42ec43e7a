"""OpenAI's answers, whole: choices, usage and log probabilities, from the results of jobs. Streams: openai_stream.py. No I/O."""

from collections.abc import Sequence
from typing import Any

from coordinator.errors import JobFailed
from coordinator.messages import TopLogprobs
from coordinator.tokenizer import Tokenizer
from producers.chat_reader import ChatReader, message_of
from producers.chat_templates import chat_format
from producers.job_handle import JobResult
from producers.openai_plan import IDS, Shape
from producers.token_texts import TokenTexts

GOOD = ("stop", "length")


class Show:
    """Writes the answers of one model. One per process: it knows the texts of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)

    def reader(self, shape: Shape, job_id: str) -> ChatReader:
        return ChatReader(shape, chat_format(self._tokenizer).tool_format, job_id)

    def whole(self, shape: Shape, request_id: str, results: Sequence[JobResult]) -> dict[str, Any]:
        """The answer's object. Raises JobFailed for the first job without a whole answer."""
        for result in results:
            if result.reason not in GOOD:
                raise JobFailed(result.job_id, result.reason, result.error)
        thought_tokens = 0
        choices = []
        for i, result in enumerate(results):
            if shape.kind == "text":
                choices.append(self._text_choice(shape, i, result))
            else:
                choice, num_thought = self._chat_choice(shape, i, result)
                choices.append(choice)
                thought_tokens += num_thought
        prompt_tokens = sum(result.prompt_tokens for result in results[::shape.n])
        answer = {"id": IDS[shape.kind] + request_id, "object": "chat.completion" if shape.kind == "chat" else "text_completion",
                  "created": shape.created, "model": shape.model, "choices": choices,
                  "usage": usage(prompt_tokens, sum(len(result.token_ids) for result in results),
                                 sum(result.cached_tokens for result in results[::shape.n]), thought_tokens)}
        if shape.metadata:
            answer["metadata"] = shape.metadata
        return answer

    def _text_choice(self, shape: Shape, index: int, result: JobResult) -> dict[str, Any]:
        echo = shape.echo[index // shape.n] if shape.echo else ""
        logprobs = empty_logprobs() if shape.wants_logprobs else None
        offset = 0
        for i, text in enumerate(result.texts):
            if logprobs is not None:
                self.add_text_logprob(logprobs, result.token_ids[i], result.logprobs[i], _top(result.top_logprobs, i), offset)
            offset += len(text)
        return {"index": index, "text": echo + result.text, "logprobs": logprobs, "finish_reason": result.reason}

    def _chat_choice(self, shape: Shape, index: int, result: JobResult) -> tuple[dict[str, Any], int]:
        reader = self.reader(shape, result.job_id)
        last = len(result.texts) - 1
        deltas = [reader.feed(text, is_last=i == last) for i, text in enumerate(result.texts)]
        logprobs = None
        if shape.wants_logprobs:
            logprobs = {"content": [self.chat_logprob(token_id, result.logprobs[i], _top(result.top_logprobs, i))
                                    for i, token_id in enumerate(result.token_ids)], "refusal": None}
        return {"index": index, "message": message_of(deltas), "logprobs": logprobs,
                "finish_reason": finish_reason(shape, result.reason, has_called=reader.has_called)}, reader.num_thought_tokens

    def chat_logprob(self, token_id: int, logprob: float, top: TopLogprobs) -> dict[str, Any]:
        others = [self._one(other, value) for other, value in top]
        return {**self._one(token_id, logprob), "top_logprobs": others}

    def add_text_logprob(self, logprobs: dict[str, Any], token_id: int, logprob: float, top: TopLogprobs, offset: int) -> None:
        """One more token in the older form, which has a list per property."""
        logprobs["tokens"].append(self._texts.of(token_id)[0])
        logprobs["token_logprobs"].append(logprob)
        logprobs["top_logprobs"].append({self._texts.of(other)[0]: value for other, value in top})
        logprobs["text_offset"].append(offset)

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._texts.of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


def empty_logprobs() -> dict[str, Any]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def finish_reason(shape: Shape, reason: str, *, has_called: bool) -> str:
    """A named function's arguments end with `stop`, as OpenAI has it."""
    return "tool_calls" if has_called and reason == "stop" and shape.tool_mode != "named" else reason


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int, thought_tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens}, "completion_tokens_details": {"reasoning_tokens": thought_tokens}}


def _top(tops: tuple[TopLogprobs, ...], index: int) -> TopLogprobs:
    return tops[index] if tops else ()
