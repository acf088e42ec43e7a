"""The official `openai` client, as anybody would use it: OPENAI_BASE_URL and OPENAI_API_KEY say where, MODEL says which."""

import asyncio
import json
import os
import time

import openai
from pydantic import BaseModel

MODEL = os.environ["MODEL"]
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "The weather in a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False}}}]


class City(BaseModel):
    name: str
    is_capital: bool


def plain(client: openai.OpenAI) -> str:
    assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).id == MODEL
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=16, seed=1)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason in ("stop", "length")
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4, temperature=0).choices[0].text
    return choice.message.content


def streamed(client: openai.OpenAI, expected: str) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=16, stream=True,
                                            stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason and last.usage and last.usage.completion_tokens > 0
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=16) as events:
        assert events.get_final_completion().choices[0].message.content == expected


async def at_once(expected: str) -> None:
    async with openai.AsyncOpenAI() as client:
        ask = client.chat.completions.create
        answers = await asyncio.gather(*(ask(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=16) for _ in range(4)))
        assert [answer.choices[0].message.content for answer in answers] == [expected] * 4
        pieces = [chunk.choices[0].delta.content or "" async for chunk in await ask(
            model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=16, stream=True)]
        assert "".join(pieces) == expected


def chosen(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, n=2, seed=5, temperature=1, max_tokens=4, logprobs=True,
                                            top_logprobs=3, stop=["\n"], presence_penalty=0.5, frequency_penalty=-0.5)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for told in answer.choices[0].logprobs.content:
        assert told.logprob <= 0 and len(told.top_logprobs) == 3
    again = client.chat.completions.create(model=MODEL, messages=QUESTION, n=2, seed=5, temperature=1, max_tokens=4, stop=["\n"],
                                           presence_penalty=0.5, frequency_penalty=-0.5)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    forced = client.completions.create(model=MODEL, prompt="Hi", max_tokens=3, temperature=0, logit_bias={"42": 100}, logprobs=1)
    assert len(set(forced.choices[0].logprobs.tokens)) == 1


def with_tools(client: openai.OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        answer = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice=choice, temperature=0,
                                                parallel_tool_calls=False, max_tokens=64)
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    history = [*QUESTION, answer.choices[0].message.model_dump(exclude_none=True),
               {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    try:
        client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS, max_tokens=8)
    except openai.BadRequestError as error:   # the demo model's own template has no place for calls
        assert error.param == "messages", error


def held_to_a_schema(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=City, temperature=0, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, City)
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, response_format={"type": "json_object"}, temperature=0,
                                            max_tokens=200)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, store=True, metadata={"a": "b"})
    again = client.chat.completions.retrieve(answer.id)
    assert again.choices == answer.choices and again.metadata == {"a": "b"}
    assert client.chat.completions.delete(answer.id).deleted
    begun = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=8, extra_body={"background": True})
    while (shown := client.chat.completions.retrieve(begun.id)).status != "completed":
        assert shown.status in ("queued", "in_progress")
    assert shown.choices[0].message.content is not None


def in_a_batch(client: openai.OpenAI, expected: str) -> None:
    body = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_completion_tokens": 16}
    lines = [{"custom_id": f"line-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body} for i in range(5)]
    lines.append({**lines[0], "custom_id": "bad", "body": {**body, "temperature": -1}})
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert client.files.content(file.id).read() == content and file.id in [one.id for one in client.files.list()]
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"})
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.1)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 5, 1), batch
    rows = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(row["custom_id"] for row in rows) == [f"line-{i}" for i in range(5)]
    assert {row["response"]["body"]["choices"][0]["message"]["content"] for row in rows} == {expected}
    [error] = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert error["custom_id"] == "bad" and error["response"]["status_code"] == 400
    assert batch.id in [one.id for one in client.batches.list()] and client.files.delete(file.id).deleted


def refused(client: openai.OpenAI) -> None:
    for fields, kind in (({"model": "nobody"}, openai.NotFoundError), ({"temperature": -1}, openai.BadRequestError),
                         ({"extra_body": {"mood": 1}}, openai.BadRequestError)):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **fields})
        except kind as error:
            assert error.type == "invalid_request_error" and error.message
        else:
            raise AssertionError(f"{fields} was not refused")


def main() -> None:
    with openai.OpenAI() as client:
        expected = plain(client)
        streamed(client, expected)
        asyncio.run(at_once(expected))
        chosen(client)
        with_tools(client)
        held_to_a_schema(client)
        kept(client)
        in_a_batch(client, expected)
        refused(client)


if __name__ == "__main__":
    main()
